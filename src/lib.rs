//! Adamax for candle.
#![deny(unsafe_code)]

mod adamax;
mod checkpoint;
mod element;
mod error;
mod gradient;
mod group;
mod kernel;
mod params;
mod reduce;
mod rule;
mod schedule;
mod state;

pub use adamax::{Adamax, State, StepReport};
pub use checkpoint::{Counters, Snapshot, VarSnapshot};
pub use error::{Error, ErrorKind, Result};
pub use group::{GroupLr, GroupSettings, ParamGroup};
pub use kernel::Kernel;
pub use params::{ClipGradNorm, Ema, ParamsAdamax, StepCount};
pub use reduce::NormType;
pub use rule::{Epsilon, WeightDecay};
pub use schedule::{
    CosineDecay, CosineDecayRestarts, ExponentialDecay, InverseTimeDecay, Join, LearningRate, LearningRateSchedule,
    LinearWarmup, PiecewiseConstantDecay, PolynomialDecay, Schedule,
};
