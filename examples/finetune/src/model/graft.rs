//! A backward pass for results that were computed without a graph.
//!
//! candle's fast kernels for the softmax and for layer normalization have none, and cut the graph without a word. The
//! slow way around is to write both as a dozen differentiable operations, each of which keeps its result until the
//! backward pass. Here the fast kernels compute the result, and the derivative is said beside it.
//!
//! The other functions would be differentiable without this, but dearly: candle sums the gradient of a bias number by
//! number, and in the type of the bias (in bf16, sums of a few hundred numbers stop growing); it adds the gradient of a
//! weight of a linear layer transposed; and it makes gradients of what is constant.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, D, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor, bail,
};

/// The derivative: from the arguments, the result and the gradient of the result, the gradients of the arguments.
type Backward<const N: usize> = Box<dyn Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Tensor; N]> + Send + Sync>;

/// A result as a function of N arguments.
struct Graft<const N: usize> {
    name: &'static str,
    result: Tensor,
    backward: Backward<N>,
}

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
    let backward: Backward<1> = Box::new(move |[arg], result, grad| Ok([backward(arg, result, grad)?]));
    arg.apply_op1(Graft { name, result, backward })
}

/// The same for three arguments.
fn graft3(
    name: &'static str,
    args: [&Tensor; 3],
    result: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !args.iter().any(|arg| arg.track_op()) {
        return Ok(result);
    }
    let [a, b, c] = args;
    a.apply_op3(b, c, Graft { name, result, backward: Box::new(backward) })
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

/// `weight * (x - mean) / sqrt(variance + eps) + bias` for each row of `x`, a matrix; computed in f32.
///
/// With y the quotient, g the gradient of the result and h = g * weight, the gradient of x is
/// `(h - mean h - y * mean (h * y)) / sqrt(variance + eps)`, and of weight and bias `sum (g * y)` and `sum g` by rows.
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let [x_, weight_, bias_] = [x, weight, bias].map(Tensor::detach);
    let result = candle_nn::ops::layer_norm(&x_.contiguous()?, &weight_, &bias_, eps as f32)?;
    graft3("layer-norm", [x, weight, bias], result, move |[x, weight, _], _, grad| {
        let dtype = x.dtype();
        let (x, weight, g) = (x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?, grad.to_dtype(DType::F32)?);
        let centered = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let scale = (centered.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?.recip()?;
        let y = centered.broadcast_mul(&scale)?;
        let h = g.broadcast_mul(&weight)?;
        let along = y.broadcast_mul(&(&h * &y)?.mean_keepdim(1)?)?;
        let of_x = (h.broadcast_sub(&h.mean_keepdim(1)?)? - along)?.broadcast_mul(&scale)?;
        let of_weight = sum_of_rows(&(&g * &y)?)?;
        Ok([of_x.to_dtype(dtype)?, of_weight.to_dtype(dtype)?, sum_of_rows(&g)?.to_dtype(dtype)?])
    })
}

/// `x * weight^T + bias` for `x` of `[rows, inputs]` and a weight of `[outputs, inputs]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let [x_, weight_, bias_] = [x, weight, bias].map(Tensor::detach);
    let result = x_.matmul(&weight_.t()?)?.broadcast_add(&bias_)?;
    graft3("linear", [x, weight, bias], result, |[x, weight, _], _, grad| {
        let grad = grad.contiguous()?;
        Ok([grad.matmul(weight)?, grad.t()?.matmul(x)?, sum_of_rows(&grad)?])
    })
}

/// `x * Phi(x)` with the distribution function of the normal distribution; computed in f32.
///
/// Its derivative is `Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi)`.
pub(super) fn gelu(x: &Tensor) -> Result<Tensor> {
    let x_ = x.detach().to_dtype(DType::F32)?;
    let phi = (x_.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?.erf()?.affine(0.5, 0.5))?;
    let result = (&x_ * &phi)?.to_dtype(x.dtype())?;
    graft("gelu", x, result, move |x, _, grad| {
        let x = x.to_dtype(DType::F32)?;
        let density = (x.sqr()?.affine(-0.5, 0.0)?.exp()? / std::f64::consts::TAU.sqrt())?;
        let slope = (&phi + (x * density)?)?;
        (grad.to_dtype(DType::F32)? * slope)?.to_dtype(grad.dtype())
    })
}

/// The sum of the rows of a matrix, as a product, which candle computes much faster than a sum.
fn sum_of_rows(x: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?;
    ones.matmul(x)?.squeeze(0)
}

impl<const N: usize> Graft<N> {
    /// Lends the storage and the layout of the result.
    fn with_result<T>(&self, copy: impl FnOnce(&Storage, &Layout) -> Result<T>) -> Result<(T, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        // A storage is copied whole, so it has to begin and end with the tensor.
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("{}: a result that is a view of another tensor", self.name);
        }
        Ok((copy(&storage, layout)?, self.result.shape().clone()))
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Cpu(storage) => storage.try_clone(layout),
            _ => bail!("{}: arguments and result are on different devices", self.name),
        })
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Cuda(storage) => storage.try_clone(layout),
            _ => bail!("{}: arguments and result are on different devices", self.name),
        })
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        self.with_result(|storage, layout| match storage {
            Storage::Metal(storage) => storage.try_clone(layout),
            _ => bail!("{}: arguments and result are on different devices", self.name),
        })
    }
}

impl CustomOp1 for Graft<1> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, arg: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [grad] = (self.backward)([arg], result, grad)?;
        Ok(Some(grad))
    }
}

impl CustomOp3 for Graft<3> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.backward)([a, b, c], result, grad)?;
        Ok((Some(a), Some(b), Some(c)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Numbers that look random, and of which some are far from the others.
    fn numbers(shape: &[usize], seed: f32) -> Result<Tensor> {
        let number = |i: usize| ((i as f32 + seed) * 12.9898).sin() * if i.is_multiple_of(7) { 5.0 } else { 1.0 };
        Tensor::from_iter((0..shape.iter().product()).map(number), &Device::Cpu)?.reshape(shape)
    }

    /// The result of `function` and the gradients of its arguments, in f32, where the gradient of the result is a tensor
    /// of some numbers.
    fn derive(args: &[Tensor], function: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let y = function(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())?;
        let y = y.to_dtype(DType::F32)?;
        let grads = (&y * numbers(y.dims(), 0.5)?)?.sum_all()?.backward()?;
        let mut all = vec![y];
        for var in &vars {
            let grad = grads.get(var).ok_or_else(|| candle_core::Error::msg("no gradient"))?;
            assert_eq!(grad.dtype(), var.dtype());
            all.push(grad.to_dtype(DType::F32)?);
        }
        Ok(all)
    }

    /// Compares `ours` with `slow`, which is made of differentiable operations, in f32 and in bf16.
    fn compare(
        args: &[Tensor],
        ours: impl Fn(&[Tensor]) -> Result<Tensor>,
        slow: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let expected = derive(args, slow)?;
        for (dtype, allowed) in [(DType::F32, 2e-6), (DType::BF16, 0.03)] {
            let args = args.iter().map(|arg| arg.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
            for (ours, expected) in derive(&args, &ours)?.iter().zip(&expected) {
                let size = expected.abs()?.max_all()?.to_scalar::<f32>()?;
                let difference = (ours - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(size > 0.1 && difference < allowed * size, "{dtype:?}: {difference} of {size}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_softmax() -> Result<()> {
        let bias = Tensor::new(&[[[0f32, 0.0, -1e30, 0.0, 0.0]]], &Device::Cpu)?;
        let slow = |args: &[Tensor]| candle_nn::ops::softmax(&args[0].broadcast_add(&bias)?, D::Minus1);
        compare(&[numbers(&[2, 3, 5], 0.0)?], |args| softmax(&args[0], &bias), slow)
    }

    #[test]
    fn the_layer_normalization() -> Result<()> {
        let slow = |args: &[Tensor]| {
            let centered = args[0].broadcast_sub(&args[0].mean_keepdim(1)?)?;
            let deviation = (centered.sqr()?.mean_keepdim(1)? + 0.01)?.sqrt()?;
            centered.broadcast_div(&deviation)?.broadcast_mul(&args[1])?.broadcast_add(&args[2])
        };
        let args = [numbers(&[6, 16], 0.0)?, numbers(&[16], 0.2)?, numbers(&[16], 0.4)?];
        compare(&args, |args| layer_norm(&args[0], &args[1], &args[2], 0.01), slow)
    }

    #[test]
    fn the_linear_layer() -> Result<()> {
        let slow = |args: &[Tensor]| args[0].matmul(&args[1].t()?)?.broadcast_add(&args[2]);
        let args = [numbers(&[6, 8], 0.0)?, numbers(&[5, 8], 0.2)?, numbers(&[5], 0.4)?];
        compare(&args, |args| linear(&args[0], &args[1], &args[2]), slow)
    }

    #[test]
    fn the_gelu() -> Result<()> {
        compare(&[numbers(&[60], 0.0)?], |args| gelu(&args[0]), |args| args[0].gelu_erf())
    }

    #[test]
    fn a_sum_of_many_in_bf16_does_not_stop_growing() -> Result<()> {
        let (x, weight) =
            (Tensor::zeros((4096, 1), DType::BF16, &Device::Cpu)?, Tensor::zeros((1, 1), DType::BF16, &Device::Cpu)?);
        let bias = Var::zeros(1, DType::BF16, &Device::Cpu)?;
        let grads = linear(&x, &weight, &bias)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
        let grad = grads.get(&bias).map(|grad| grad.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
        assert_eq!(grad, Some(vec![4096.0])); // where a sum in bf16 ends at 256
        Ok(())
    }

    #[test]
    fn where_there_is_no_graph_none_begins() -> Result<()> {
        let (x, one) = (numbers(&[2, 4], 0.0)?, Tensor::ones(4, DType::F32, &Device::Cpu)?);
        assert!(!layer_norm(&x, &one, &one, 0.01)?.track_op());
        assert!(!gelu(&x)?.track_op());
        Ok(())
    }
}
