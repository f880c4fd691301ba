//! The guide: a page for each question that a training run raises. Each begins with the answer; reasons and numbers follow.
//!
//! | question | page |
//! | --- | --- |
//! | Which epsilon, and where does it stand? Does it matter? | [`epsilon`] |
//! | Fine-tuning candle-transformers: why does a model not train, and what mends it? | [`fine_tuning`] |
//! | How many bytes for moments, and how are bf16 and f16 weights rounded? | [`precision`] |
//! | The run had AdamW: what becomes of its learning rate, betas, decay? | [`from_adamw`] |
//! | Embedding tables: dense, lazy or exact? What of decay and learning rates? | [`tables`] |
//! | Training in f16 or bf16: what does it need? | [`mixed_precision`] |
//! | A run that stops and goes on: what is saved, and which bits are promised? | [`resume`] |
//! | A run of PyTorch, Keras or `candle_nn` that goes on here, and back | [`moving_in`] |
//! | What is done otherwise than elsewhere, and why | [`departures`] |
//!
//! Numbers on these pages are measured; each says on what, and by which command. "A Zen 3" is two cores of a virtual machine
//! with one. Accuracies and errors do not depend on the machine's speed; times do.

#[doc = include_str!("epsilon.md")]
pub mod epsilon {}

#[doc = include_str!("fine_tuning.md")]
pub mod fine_tuning {}

#[doc = include_str!("precision.md")]
pub mod precision {}

#[doc = include_str!("from_adamw.md")]
pub mod from_adamw {}

#[doc = include_str!("tables.md")]
pub mod tables {}

#[doc = include_str!("mixed_precision.md")]
pub mod mixed_precision {}

#[doc = include_str!("resume.md")]
pub mod resume {}

#[doc = include_str!("moving_in.md")]
pub mod moving_in {}

#[doc = include_str!("departures.md")]
pub mod departures {}
