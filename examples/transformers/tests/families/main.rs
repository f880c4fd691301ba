//! Model families of candle-transformers, with the candle-nn that `trainable-candle` writes: every variable gets the
//! gradient that finite differences give, and the loss falls.
//!
//! `cargo test --release --test families -- --nocapture` prints how many variables have a gradient.

mod check;
mod decoders;
mod encoders;
mod vision;

use candle_core::{DType, Device, Result, Tensor};

/// The sizes that the models have in common.
const VOCAB: usize = 19;
const HIDDEN: usize = 16;
const HEADS: usize = 4;

/// Two sequences of six tokens; none is padding, and they have all tokens up to the ninth.
fn ids() -> Result<Tensor> {
    Tensor::new(&[[1u32, 2, 3, 4, 5, 6], [7, 8, 9, 2, 4, 1]], &Device::Cpu)
}

/// The cross entropy of logits `(2, classes)`.
fn cross_entropy(logits: &Tensor) -> Result<Tensor> {
    let targets = Tensor::new(&[1u32, 2], &Device::Cpu)?;
    // In f64, so that no digit is lost here.
    candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F64)?, &targets)
}
