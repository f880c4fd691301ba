//! The layers of an encoder, each with a backward pass, and dropout with a seed.

use candle_core::{DType, Result, Tensor};
use rand::{Rng, rngs::StdRng};

use super::graft::{self, graft};

/// A linear layer on matrices; its weight is `[outputs, inputs]`.
pub(super) struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

impl Linear {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        graft::linear(x, &self.weight, &self.bias)
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
        graft::layer_norm(x, &self.weight, &self.bias, self.eps)
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
        let Self::Training(rng) = self else { return Ok(x.clone()) };
        if p == 0.0 {
            return Ok(x.clone());
        }
        let (bound, factor) = ((p * 2f64.powi(32)) as u32, (1.0 / (1.0 - p)) as f32);
        let draw = |_| if rng.random::<u32>() < bound { 0.0 } else { factor };
        let factors: Vec<f32> = (0..x.elem_count()).map(draw).collect();
        let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
        let result = (x.detach() * &factors)?;
        graft("dropout", x, result, move |_, _, grad| grad * &factors)
    }
}

/// What is added to the scores of attention: 0 for a token, and for padding a number that leaves nothing of `exp`.
pub(super) fn attention_bias(mask: &Tensor) -> Result<Tensor> {
    let hidden = mask.to_dtype(DType::F32)?.affine(-1.0, 1.0)?;
    (hidden * -1e30)?.unsqueeze(1)?.unsqueeze(1)
}
