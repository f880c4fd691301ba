//! LoRA (Hu et al. 2021, arXiv 2106.09685) for any candle model that is built from a
//! [`VarBuilder`](candle_nn::VarBuilder), in the files of Hugging Face's PEFT.
//!
//! The adapter of a weight W, [out, in], is a pair of small matrices A, [r, in], and B, [out, r]. The model computes
//! with
//!
//! ```text
//! W + scale * B A,    scale = lora_alpha / r
//! ```
//!
//! and only A and B are trained. [`Lora::build`] wraps the base model's `VarBuilder`, so the model's own code stays as
//! it is: every model of candle-transformers can be adapted. (Whether such a model *trains* is another matter: some
//! functions of candle-nn 0.11 have no backward pass. The optimizer of the crate candle-adamax says so.)
//!
//! ```
//! use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
//! use candle_adapters::{Lora, LoraConfig};
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{Linear, Module, Optimizer, VarBuilder, VarMap, linear};
//!
//! // Any model that is built from a `VarBuilder`.
//! struct Model { query: Linear, head: Linear }
//!
//! impl Model {
//!     fn load(vb: VarBuilder<'_>) -> Result<Self> {
//!         Ok(Self { query: linear(8, 8, vb.pp("layer.0.query"))?, head: linear(8, 2, vb.pp("head"))? })
//!     }
//!
//!     fn loss(&self, input: &Tensor) -> Result<Tensor> {
//!         self.head.forward(&self.query.forward(input)?.tanh()?)?.sqr()?.mean_all()
//!     }
//! }
//!
//! // The base model's weights; `VarBuilder::from_mmaped_safetensors` for a model from a file.
//! let base = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let lora = Lora::new(
//!     LoraConfig {
//!         r: 4,
//!         lora_alpha: 8.0,
//!         target_modules: ["query"].into(),
//!         modules_to_save: vec!["head".into()],
//!         ..LoraConfig::default()
//!     },
//!     42, // the seed
//! )?;
//! let model = lora.build(base.clone(), Model::load)?;
//!
//! // The variables exist once the model is built.
//! let groups = [
//!     ParamGroup::new("adapters").vars(lora.adapter_vars()?),
//!     ParamGroup::new("head").vars(lora.saved_vars()?).lr_factor(0.1),
//! ];
//! let mut optimizer = Adamax::from_groups(groups, ParamsAdamax { lr: 0.01.into(), ..Default::default() })?;
//! let input = Tensor::ones((4, 8), DType::F32, &Device::Cpu)?;
//! for _ in 0..3 {
//!     let loss = model.loss(&input)?;
//!     lora.check(&loss)?;
//!     optimizer.backward_step(&loss)?;
//!     // The weights that the model holds follow the variables.
//!     lora.refresh()?;
//! }
//!
//! let folder = std::env::temp_dir().join(format!("candle-adapters-doc-{}", std::process::id()));
//! lora.save(&folder)?;
//!
//! // For inference: no graph, and no more memory than the base model.
//! let model = Lora::load(&folder)?.build_merged(base, Model::load)?;
//! # std::fs::remove_dir_all(folder)?;
//! # model.loss(&input)?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Weights follow their adapters by `refresh`
//!
//! A candle model takes its weights once, when it is built. The weight W + scale * B A that it holds is a value of that
//! moment; after a step of the optimizer it is another one. There are two ways to keep up:
//!
//! 1. **[`Lora::refresh`] after each step.** It computes the weights again in the storage that the model holds. It
//!    reaches the tensor itself, its clones and its views: `candle_nn::Linear`, `Embedding` and `Conv` keep no others.
//! 2. **[`Lora::build`] for each step.** It does what `refresh` does, and a model that keeps *copies* of its weights
//!    (`weight.t()?.contiguous()?`, `to_dtype`, `Tensor::cat` of q, k and v) makes them anew. Weights that are not
//!    adapted are asked of the base again, so the base should be one that shares its tensors, as
//!    `VarBuilder::from_tensors` and `from_varmap` do.
//!
//! Both give the same bits. What is forgotten is an error:
//!
//! - A backward pass through a weight whose A, B or base has changed since it was computed is [`Error::Stale`]. (On a
//!   GPU, the first 4096 elements of each are compared.) A forward pass alone cannot know; [`Lora::check`] tells
//!   without a backward pass.
//! - [`Lora::check`] finds copies that `refresh` does not reach, and is [`Error::Copied`] then. Call it for the first
//!   two losses of a run, or for all.
//!
//! The base may change in place, as by `VarMap::load` after the build: the next [`Lora::refresh`] or [`Lora::build`]
//! computes with the new values. Variables of `modules_to_save` keep the values that they have.
//!
//! As with every variable of candle, no thread may be in a forward pass, and no loss may wait for its backward pass,
//! while weights change. Gradients of several batches may be accumulated between two calls.
//!
//! # Dropout
//!
//! PEFT's `lora_dropout` sets elements of the adapter's *input* to 0, each token's on its own. An adapter within a
//! weight does not see inputs, so here a mask leaves out *input features*: columns of A, which is the same as setting
//! those features to 0 for all tokens of all batches until the next [`Lora::refresh`] or [`Lora::build`]. What is left
//! is scaled by 1 / (1 - p) in both. So the expected output is that of PEFT; the noise is coarser, and a smaller p than
//! PEFT's is a sensible start. Embeddings have no dropout, as in PEFT. The masks are a function of the seed, the
//! module's name and a count, which [`Lora::save`] writes: save after the `refresh` of a step, and a run goes on with
//! the same bits.
//!
//! # Types and cost
//!
//! A and B are f32, or f64 where the base is, also beside a base in bf16 or f16, as in PEFT; the sum is computed in
//! their type and rounded once to the base's. What the optimizer holds, gradients and moments, is that of A and B
//! alone.
//!
//! Unlike PEFT, which multiplies activations with A and B, this keeps both W and the sum of each adapted weight in
//! memory, and the backward pass computes the gradient G of the whole sum for a moment, to derive dB = scale * G Aᵀ and
//! dA = scale * Bᵀ G from it. `refresh` costs about as much as reading W and writing the sum. A `refresh`
//! that finds nothing to do, [`Lora::check`] and the backward pass read W once, to see whether it has changed:
//! 0.3 ms for a weight of [1024, 1024] in f32, where computing it takes 3 ms or more.
//!
//! The base has no gradient that anyone sees. But candle's own multiplication computes the gradients of both of its
//! operands, and its `GradStore` keeps them: with candle-nn as released, the backward pass of an adapted model takes
//! the time of full training, and the memory of the gradients of its linear layers. A `Linear` of the crate
//! candle-graft, which the candle-nn that trainable-candle writes has, leaves out what is frozen.
//!
//! # Settings
//!
//! [`LoraConfig`] has PEFT's names. In an `adapter_config.json`:
//!
//! | key | |
//! |-----|-|
//! | `r`, `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern` | as in PEFT |
//! | `target_modules`, `exclude_modules` | as in PEFT: names, or a regular expression; `"all-linear"` |
//! | `layers_to_transform`, `layers_pattern` | as in PEFT |
//! | `modules_to_save` | as in PEFT: trained whole, saved with the adapter |
//! | `fan_in_fan_out` | as in PEFT, for all adapted weights but tables of embeddings |
//! | `lora_dropout` | see [above](#dropout) |
//! | `ensure_weight_tying` | see [below](#tied-tables) |
//! | `init_lora_weights` | `true`, `false`, `"gaussian"`; where an adapter is loaded also `"eva"` and `"orthogonal"` |
//! | | refused, because they change the base: `"pissa"`, `"olora"`, `"corda"`, `"loftq"`, `"lora_ga"`; and `"mica"` |
//! | `bias` | `"none"`; refused: `"all"`, `"lora_only"` |
//! | `base_model_name_or_path`, `revision`, `task_type` | kept |
//! | `inference_mode`, `peft_version`, `auto_mapping`, `runtime_config` | ignored: no influence on numbers |
//! | `megatron_core`, `qalora_group_size` | ignored: no influence without keys that are refused |
//! | `loftq_config`, `eva_config`, `corda_config`, `lora_ga_config` | ignored: of initializations |
//! | `use_dora`, `use_qalora`, `use_bdlora`, `lora_bias` | refused, unless off |
//! | `target_parameters`, `trainable_token_indices`, `alora_invocation_tokens` | refused, unless off |
//! | `layer_replication`, `megatron_config`, `arrow_config` | refused, unless off |
//! | `velora_config`, `kasa_config`, `monteclora_config` | refused, unless off |
//! | any other key | refused, unless off: null, false or empty |
//!
//! Weights of two dimensions can be adapted: linear layers and tables of embeddings. A module that matches and whose
//! weight has another number, such as a convolution or a norm, is an error.
//!
//! An entry in the settings of new adapters that no module of the model matches is [`Error::Unmatched`]. Files of PEFT
//! may have such entries, because PEFT adds some by itself.
//!
//! # Tied tables
//!
//! In many decoders the head has no weight of its own and computes with the table of embeddings
//! (`tie_word_embeddings`). Where the table has an adapter, the head of a candle model computes with the adapted table.
//! PEFT's head does not: it keeps the table of the base. So PEFT's outputs differ from this crate's, and this crate
//! cannot know, because a `VarBuilder` does not tell that a table is tied.
//!
//! Set [`ensure_weight_tying`](LoraConfig::ensure_weight_tying) where a table of such a model is a target. A PEFT that
//! has the setting reads it in the file and gives the head the table's adapter, with the same outputs as this crate. It
//! changes nothing here. PEFT itself then writes the head's adapter a second time, and a model of candle refuses these
//! names.
//!
//! # Names
//!
//! Names of modules are those that the model asks the root of the `VarBuilder` for, without `.weight`. They are PEFT's
//! where candle's model and that of `transformers` agree. Where they do not, rename on both sides of the adapters:
//!
//! ```
//! # use candle_adapters::{Lora, LoraConfig};
//! # use candle_core::{DType, Device};
//! # use candle_nn::VarBuilder;
//! # let weight = candle_core::Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?;
//! # let base = VarBuilder::from_tensors([("query.weight".to_owned(), weight)].into(), DType::F32, &Device::Cpu);
//! # let lora = Lora::new(LoraConfig { target_modules: ["query"].into(), ..Default::default() }, 0)?;
//! // The base model's file and candle's model say `query.weight`, the adapter says `bert.query`.
//! let base = base.rename_f(|name| name.trim_start_matches("bert.").to_owned());
//! let weight = lora.build(base, |vb| {
//!     let vb = vb.rename_f(|name| format!("bert.{name}"));
//!     vb.get((4, 4), "query.weight")
//! })?;
//! assert_eq!(lora.modules()?, ["bert.query"]);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod backend;
mod config;
mod error;
mod files;
mod json;
mod lora;
mod random;
mod rules;
mod stamp;
mod state;
mod weight;

pub use config::{InitLora, LoraConfig, Modules};
pub use error::{Error, Result};
pub use lora::Lora;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
