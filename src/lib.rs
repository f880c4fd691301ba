//! The Adamax optimizer (Kingma & Ba 2015, section 7.1) for [candle](candle_core): the numbers of Keras or of PyTorch,
//! in one pass over memory a step, with moments of 8, 4 or 2 bytes a parameter.
//!
//! ```
//! use candle_adamax::{Adamax, CosineDecay, ParamsAdamax};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, Optimizer, VarBuilder, VarMap, linear, loss};
//!
//! let device = Device::Cpu;
//! let varmap = VarMap::new();
//! let model = linear(3, 1, VarBuilder::from_varmap(&varmap, DType::F32, &device))?;
//! let x = Tensor::randn(0f32, 1.0, (64, 3), &device)?;
//! let y = x.matmul(&Tensor::new(&[[1f32], [-2.0], [0.5]], &device)?)?;
//!
//! let params = ParamsAdamax { lr: CosineDecay::new(0.3, 300).into(), ..Default::default() };
//! let mut optimizer = Adamax::from_varmap(&varmap, params)?;
//! for _ in 0..300 {
//!     let loss = loss::mse(&model.forward(&x)?, &y)?;
//!     optimizer.backward_step(&loss)?;
//! }
//! assert!(loss::mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()? < 1e-3);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Where to look:
//!
//! | for | see |
//! | --- | --- |
//! | the optimizer: making one, stepping, saving | [`Adamax`] |
//! | its settings, and the conventions of the frameworks | [`ParamsAdamax`], [`EpsMode`], [`WeightDecay`], [`StepCount`] |
//! | learning rates that change | [`LearningRate`], [`Schedule`], [`LearningRateSchedule`], [`ReduceLrOnPlateau`] |
//! | mixed precision | [`GradScaler`], [`StateDType`], [`Rounding`] |
//! | settings of some variables | [`ParamGroup`] |
//! | fewer bytes for moments, rounding of f16 and bf16 weights | [`StateDType`], [`Rounding`] |
//! | embedding tables, of which a step touches some rows | [`Embedding`], [`EmbeddingBag`], [`Table`], [`SparseGrad`], [`SparseUpdate`] |
//! | what a step did | [`StepReport`] |
//! | a model that does not train | [`MissingGradients`], [`Adamax::audit`], [`Audit`] |
//! | what is kept, and how many bytes of it | [`StateBytes`], [`MomentStatistics`] |
//! | state in memory | [`Snapshot`], [`State`] |
//! | a part of a checkpoint | [`Adamax::load_matching`], [`Restored`] |
//! | moving in from PyTorch or Keras, and out | [`Adamax::load_torch`], [`Adamax::load_keras`], [`ParamsAdamax::from_keras_json`] |
//! | what goes wrong | [`Error`], [`ErrorKind`] |
//!
//! What to choose, and why, is in the [`guide`]:
//!
//! | question | page |
//! | --- | --- |
//! | which epsilon | [`guide::epsilon`] |
//! | fine-tuning candle-transformers | [`guide::fine_tuning`] |
//! | bytes for moments, rounding of weights | [`guide::precision`] |
//! | learning rate, betas and decay of a run that had AdamW | [`guide::from_adamw`] |
//! | tables: dense, lazy or exact | [`guide::tables`] |
//! | f16 and bf16 | [`guide::mixed_precision`] |
//! | stopping and going on | [`guide::resume`] |
//! | PyTorch, Keras and `candle_nn`, in and out | [`guide::moving_in`] |
//! | every departure from the other frameworks | [`guide::departures`] |
//!
//! # Numerics
//!
//! Arithmetic is f32 for f32, f16 and bf16 variables and f64 for f64, and so are moments unless
//! [`state_dtype`](ParamsAdamax::state_dtype) says otherwise. Coefficients such as `lr / (1 - beta1^t)` are computed in
//! f64 and rounded once. No operation is fused and none is reordered, so the number of threads and the width of the
//! CPU's vectors do not change a bit of the result. NaN propagates into the moments and the weights unless
//! [`skip_nonfinite`](ParamsAdamax::skip_nonfinite) is set.
//!
//! # Crate features
//!
//! | feature | default | what it does |
//! | --- | --- | --- |
//! | `cuda` | off | updates variables on NVIDIA GPUs by kernels of this crate, compiled at run time; needs what candle's own feature `cuda` needs, and adds no public items |
//! | `tracing` | off | a [tracing](https://docs.rs/tracing) span for each call of a step, `adamax.step` at the level `DEBUG`, with the fields `optimizer`, `call`, `lr`, `updated` and `skipped` (the last two are left empty where a GPU has yet to say); adds no public items |
//!
//! # How it works
//!
//! ARCHITECTURE.md in the sources has the order of a call, the invariants and the modules in layers; CONTRIBUTING.md says
//! how to build, test and measure.

#![deny(unsafe_code)]

mod adamax;
mod check;
mod checkpoint;
mod clip;
mod codec;
mod element;
mod embedding;
mod error;
mod gradient;
mod group;
pub mod guide;
mod ids;
mod kernel;
mod ledger;
mod maps;
mod mark;
mod pages;
mod params;
mod pattern;
mod reduce;
mod rounding;
mod rule;
mod scaler;
mod schedule;
mod state;
mod table;
mod trace;

pub use adamax::{Adamax, Audit, MomentStatistics, Restored, State, StateBytes, Statistics, StepReport};
pub use checkpoint::{AccumulatedGrad, Counters, MissedUpdates, Snapshot, TorchOptions, VarSnapshot};
pub use clip::Clip;
pub use codec::StateDType;
pub use embedding::{Bags, Embedding, EmbeddingBag, Pooling, embedding, embedding_bag, embedding_with_init};
pub use error::{Error, ErrorKind, Result};
pub use gradient::{Gradient, SparseGrad, TouchedRows};
pub use group::{GroupLr, GroupSettings, ParamGroup};
#[doc(hidden)]
pub use kernel::Kernel;
pub use params::{Ema, MissingGradients, ParamsAdamax, SparseUpdate, StepCount};
pub use reduce::NormType;
pub use rounding::Rounding;
pub use rule::{EpsMode, WeightDecay};
pub use scaler::{GradScaler, GradScalerState, LossScale};
pub use schedule::{
    AnnealStrategy, Constant, CosineDecay, CosineDecayRestarts, ExponentialDecay, InverseTimeDecay, Join, LearningRate,
    LearningRateSchedule, LinearWarmup, OneCycle, PiecewiseConstantDecay, Plateau, PlateauMode, PolynomialDecay,
    ReduceLrOnPlateau, Schedule, ThresholdMode,
};
pub use table::Table;

/// candle's trait of optimizers, which [`Adamax`] implements: `step`, `backward_step` and the learning rate are its
/// methods.
#[doc(no_inline)]
pub use candle_nn::Optimizer;

/// Compiles and runs the examples of the README.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
pub struct ReadmeDoctests;
