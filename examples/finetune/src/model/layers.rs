//! The layers of an encoder, by functions of candle-graft, which have a backward pass.

use candle_core::{DType, Result, Tensor};
use rand::{Rng, rngs::StdRng};

/// A linear layer on matrices; its weight is `[outputs, inputs]`.
pub(super) struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

impl Linear {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_graft::linear(x, &self.weight, Some(&self.bias))
    }
}

/// Layer normalization of the rows of a matrix.
pub(super) struct Norm {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) eps: f64,
}

impl Norm {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_graft::layer_norm(x, &self.weight, Some(&self.bias), self.eps)
    }
}

/// Whether a pass is one of training, in which dropout sets numbers to 0 at random.
pub(crate) enum Pass<'r> {
    Evaluation,
    Training(&'r mut StdRng),
}

impl Pass<'_> {
    /// Sets each element to 0 with probability `p`, and divides the others by `1 - p`, which keeps the mean.
    ///
    /// candle's own dropout draws from numbers that cannot be seeded on the CPU.
    pub(super) fn dropout(&mut self, x: &Tensor, p: f64) -> Result<Tensor> {
        match self {
            Self::Training(rng) if p > 0.0 => candle_graft::dropout(x, p, rng.random()),
            _ => Ok(x.clone()),
        }
    }
}

/// The softmax over the last dimension of `scores + bias`, where `bias` is constant.
pub(super) fn softmax(scores: &Tensor, bias: &Tensor) -> Result<Tensor> {
    candle_graft::softmax_last_dim(&scores.broadcast_add(&bias.to_dtype(scores.dtype())?)?)
}

/// What is added to the scores of attention: 0 for a token, and for padding a number that leaves nothing of `exp`.
pub(super) fn attention_bias(mask: &Tensor) -> Result<Tensor> {
    let hidden = mask.to_dtype(DType::F32)?.affine(-1.0, 1.0)?;
    (hidden * -1e30)?.unsqueeze(1)?.unsqueeze(1)
}
