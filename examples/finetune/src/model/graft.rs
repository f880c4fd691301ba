//! A backward pass for results that were computed without a graph.
//!
//! candle's fast kernels for the softmax and for layer normalization have none, and cut the graph without a word. The
//! slow way around is to write both as a dozen differentiable operations, each of which keeps its result until the
//! backward pass. Here the fast kernels compute the result, and the derivative is said beside it.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor, bail,
};

/// The derivative: from the argument, the result and the gradient of the result, the gradient of the argument.
type Backward = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync>;

/// `result` as a function of `arg`, with this derivative. `result` has been computed from `arg.detach()`, and what else
/// it depends on is constant.
///
/// It costs one copy of `result`, and nothing where `arg` is not part of a graph.
pub(super) fn graft(
    name: &'static str,
    arg: &Tensor,
    result: Tensor,
    backward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !arg.track_op() {
        return Ok(result);
    }
    arg.apply_op1(Graft { name, result, backward: Box::new(backward) })
}

struct Graft {
    name: &'static str,
    result: Tensor,
    backward: Backward,
}

impl Graft {
    /// Lends the storage and the layout of the result.
    fn with_result<T>(&self, copy: impl FnOnce(&Storage, &Layout) -> Result<T>) -> Result<(T, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        // A storage is copied whole, so it has to begin and end with the tensor.
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("{}: a result that is a view of another tensor", self.name);
        }
        Ok((copy(&storage, layout)?, self.result.shape().clone()))
    }
}

impl CustomOp1 for Graft {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Cpu(storage) => storage.try_clone(layout),
            _ => bail!("{}: argument and result are on different devices", self.name),
        })
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Cuda(storage) => storage.try_clone(layout),
            _ => bail!("{}: argument and result are on different devices", self.name),
        })
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Metal(storage) => storage.try_clone(layout),
            _ => bail!("{}: argument and result are on different devices", self.name),
        })
    }

    fn bwd(&self, arg: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(arg, result, grad).map(Some)
    }
}

/// The softmax over the last dimension of `scores + bias`, where `bias` is constant: 0 or as good as minus infinity.
/// Computed in f32, since a sum of many small numbers has no place in bf16.
///
/// With p the result and g its gradient, that of the scores is `p * (g - sum (p * g))`.
pub(super) fn softmax(scores: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let biased = scores.detach().to_dtype(DType::F32)?.broadcast_add(bias)?;
    let p = candle_nn::ops::softmax_last_dim(&biased)?.to_dtype(scores.dtype())?;
    graft("softmax", scores, p, |_, p, grad| {
        let product = (p * grad)?;
        let sum = product.to_dtype(DType::F32)?.sum_keepdim(D::Minus1)?.to_dtype(p.dtype())?;
        product - p.broadcast_mul(&sum)?
    })
}

/// `(x - mean) / sqrt(variance + eps)` over the last dimension, computed in f32.
///
/// With y the result and g its gradient, that of x is `(g - mean g - y * mean (y * g)) / sqrt(variance + eps)`.
pub(super) fn normalize(x: &Tensor, eps: f64) -> Result<Tensor> {
    let last = D::Minus1;
    let size = x.dim(last)?;
    let (one, zero) = (Tensor::ones(size, x.dtype(), x.device())?, Tensor::zeros(size, x.dtype(), x.device())?);
    let y = candle_nn::ops::layer_norm(&x.detach().contiguous()?, &one, &zero, eps as f32)?;
    graft("normalize", x, y, move |x, y, grad| {
        let [x32, y32, g] = [x, y, grad].map(|tensor| tensor.to_dtype(DType::F32));
        let (x32, y32, g) = (x32?, y32?, g?);
        let variance = x32.broadcast_sub(&x32.mean_keepdim(last)?)?.sqr()?.mean_keepdim(last)?;
        let deviation = (variance + eps)?.sqrt()?;
        let centered = g.broadcast_sub(&g.mean_keepdim(last)?)?;
        let along = y32.broadcast_mul(&(&y32 * &g)?.mean_keepdim(last)?)?;
        (centered - along)?.broadcast_div(&deviation)?.to_dtype(x.dtype())
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Numbers that look random, and of which some are far from the others.
    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 12.9898).sin() * if i % 7 == 0 { 5.0 } else { 1.0 }).collect()
    }

    /// The result and the gradient of `function`, where the gradient of its result is a tensor of some numbers.
    fn derive(x: &Tensor, function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[Tensor; 2]> {
        let x = Var::from_tensor(x)?;
        let y = function(&x)?;
        let weights = Tensor::from_vec(numbers(y.elem_count(), 0.5), y.shape(), &Device::Cpu)?.to_dtype(y.dtype())?;
        let grads = (&y * weights)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
        let grad = grads.get(&x).ok_or_else(|| candle_core::Error::msg("no gradient"))?;
        Ok([y.to_dtype(DType::F32)?, grad.to_dtype(DType::F32)?])
    }

    fn assert_near(ours: [Tensor; 2], slow: [Tensor; 2], allowed: f32) -> Result<()> {
        for (ours, slow) in ours.iter().zip(&slow) {
            let size = slow.abs()?.max_all()?.to_scalar::<f32>()?;
            let difference = (ours - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(size > 0.1 && difference < allowed * size, "{difference} of {size}");
        }
        Ok(())
    }

    #[test]
    fn the_softmax_has_the_derivative_of_one_of_differentiable_operations() -> Result<()> {
        let x = Tensor::from_vec(numbers(2 * 3 * 5, 0.0), (2, 3, 5), &Device::Cpu)?;
        let bias = Tensor::new(&[[[0f32, 0.0, -1e30, 0.0, 0.0]]], &Device::Cpu)?;
        let slow = |x: &Tensor| candle_nn::ops::softmax(&x.to_dtype(DType::F32)?.broadcast_add(&bias)?, D::Minus1);
        let expected = derive(&x, slow)?;
        assert_near(derive(&x, |x| softmax(x, &bias))?, expected.clone(), 1e-6)?;
        assert_near(derive(&x.to_dtype(DType::BF16)?, |x| softmax(x, &bias))?, expected, 0.03)
    }

    #[test]
    fn a_normalization_has_the_derivative_of_one_of_differentiable_operations() -> Result<()> {
        let x = Tensor::from_vec(numbers(2 * 3 * 16, 0.0), (2, 3, 16), &Device::Cpu)?;
        let slow = |x: &Tensor| {
            let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
            centered.broadcast_div(&(variance + 0.01)?.sqrt()?)
        };
        let expected = derive(&x, slow)?;
        assert_near(derive(&x, |x| normalize(x, 0.01))?, expected.clone(), 1e-6)?;
        assert_near(derive(&x.to_dtype(DType::BF16)?, |x| normalize(x, 0.01))?, expected, 0.03)
    }

    #[test]
    fn where_there_is_no_graph_none_begins() -> Result<()> {
        let x = Tensor::from_vec(numbers(8, 0.0), (2, 4), &Device::Cpu)?;
        assert!(!normalize(&x, 0.01)?.track_op());
        Ok(())
    }
}
