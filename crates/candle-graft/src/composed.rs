//! All functions as compositions of candle's differentiable operations, for devices other than the CPU.
//!
//! The arguments have been checked. Types of 16 bits are computed in f32, and rounded once at the end.

use candle_core::{D, DType, Result, Tensor};

/// The type in which numbers of type `dtype` are computed.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

/// `x` in the type in which it is computed.
fn widen(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(wide(x.dtype()))
}

pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let wide = widen(x)?;
    let y = standardized(&wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?, eps)?;
    let y = y.broadcast_mul(&widen(weight)?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&widen(bias)?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}

pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    standardized(&widen(x)?, eps)?.broadcast_mul(&widen(weight)?)?.to_dtype(x.dtype())
}

/// Each row divided by the root of its mean square plus `eps`.
fn standardized(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)
}

pub(crate) fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let wide = widen(x)?;
    // The result does not depend on what is subtracted, so that the maximum is a constant for the derivative.
    let exp = wide.broadcast_sub(&wide.detach().max_keepdim(dim)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(dim)?)?.to_dtype(x.dtype())
}

/// The softmax over the last dimension, and zeros in rows that have minus infinity everywhere.
pub(crate) fn softmax_or_zero(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(D::Minus1)?.clamp(f32::MIN, f32::MAX)?;
    let exp = x.broadcast_sub(&max)?.exp()?;
    // The sum is 0 in a row that has minus infinity everywhere, and at least 1 in others.
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?.maximum(0.5)?)
}

pub(crate) fn log_softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let wide = widen(x)?;
    let below_max = wide.broadcast_sub(&wide.detach().max_keepdim(dim)?)?;
    below_max.broadcast_sub(&below_max.exp()?.sum_keepdim(dim)?.log()?)?.to_dtype(x.dtype())
}

/// The mean of `-log_softmax(logits)` at the targets, integers that have been checked.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let picked = log_softmax(&widen(logits)?, 1)?.gather(&targets.unsqueeze(1)?.contiguous()?, 1)?;
    picked.mean_all()?.neg()?.to_dtype(logits.dtype())
}

pub(crate) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (widen(x)?.neg()?.exp()? + 1.0)?.recip()?.to_dtype(x.dtype())
}

pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    widen(x)?.silu()?.to_dtype(x.dtype())
}

pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    let wide = widen(x)?;
    // candle's own derivative of this function has six digits; those of its parts have all.
    let phi = wide.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?.erf()?.affine(0.5, 0.5)?;
    (wide * phi)?.to_dtype(x.dtype())
}

pub(crate) fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    let wide = widen(x)?;
    let inner = (&wide * wide.sqr()?.affine(0.044715, 1.0)?)?.affine(std::f64::consts::FRAC_2_PI.sqrt(), 0.0)?;
    (wide * inner.tanh()?.affine(0.5, 0.5)?)?.to_dtype(x.dtype())
}

/// `x weight^T + bias` for an `x` of two dimensions.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = widen(x)?.matmul(&widen(weight)?.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&widen(bias)?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}

/// Rotates the pairs that are half a head apart. `cos` and `sin` can be broadcast to the halves.
pub(crate) fn rope_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (wide, half) = (widen(x)?, x.dim(D::Minus1)? / 2);
    let (y1, y2) = rotate(&wide.narrow(D::Minus1, 0, half)?, &wide.narrow(D::Minus1, half, half)?, cos, sin)?;
    Tensor::cat(&[y1, y2], D::Minus1)?.to_dtype(x.dtype())
}

/// Rotates the pairs of neighbours.
pub(crate) fn rope_neighbours(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    let pairs = widen(x)?.reshape((b, h, t, d / 2, 2))?;
    let [x1, x2] = [0, 1].map(|i| pairs.narrow(D::Minus1, i, 1).and_then(|x| x.squeeze(D::Minus1)));
    let (y1, y2) = rotate(&x1?, &x2?, cos, sin)?;
    Tensor::stack(&[y1, y2], D::Minus1)?.reshape((b, h, t, d))?.to_dtype(x.dtype())
}

fn rotate(x1: &Tensor, x2: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let (cos, sin) = (widen(cos)?, widen(sin)?);
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x1.broadcast_mul(&sin)? + x2.broadcast_mul(&cos)?)?;
    Ok((y1, y2))
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use candle_core::Device;

    use super::*;
    use crate::common::{assert_close, derive, numbers};
    use crate::kernel::probabilities::Scores;
    use crate::probabilities;

    type Function<'a> = &'a dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

    /// Compares results and gradients with those of the kernels, in f64 and in bf16.
    fn check(name: &str, shapes: &[&[usize]], composed: Function<'_>, kernel: Function<'_>) -> Result<()> {
        for (dtype, allowed) in [(DType::F64, 1e-12), (DType::BF16, 2f64.powi(-7))] {
            let args = shapes.iter().enumerate().map(|(i, shape)| Ok(numbers(shape, i as u64)?.to_dtype(dtype)?));
            let args = args.collect::<Result<Vec<_>>>()?;
            let weights = numbers(kernel(&args)?.dims(), 99)?.to_dtype(dtype)?;
            let (y, grads) = derive(&args, Some(&weights), composed)?;
            let (expected, expected_grads) = derive(&args, Some(&weights), kernel)?;
            assert_close(name, &y, &expected, allowed)?;
            for (grad, expected) in grads.iter().zip(&expected_grads) {
                assert_close(name, grad, expected, allowed)?;
            }
        }
        Ok(())
    }

    #[test]
    fn they_compute_what_the_kernels_compute() -> Result<()> {
        let x = &[6, 7][..];
        check("layer_norm", &[x, &[7], &[7]], &|a| layer_norm(&a[0], &a[1], Some(&a[2]), 0.1), &|a| {
            crate::layer_norm(&a[0], &a[1], Some(&a[2]), 0.1)
        })?;
        check("layer_norm", &[x, &[7]], &|a| layer_norm(&a[0], &a[1], None, 0.1), &|a| {
            crate::layer_norm(&a[0], &a[1], None, 0.1)
        })?;
        check("rms_norm", &[x, &[7]], &|a| rms_norm(&a[0], &a[1], 0.1), &|a| crate::rms_norm(&a[0], &a[1], 0.1))?;
        for dim in [0, 1] {
            check("softmax", &[x], &|a| softmax(&a[0], dim), &|a| crate::softmax(&a[0], dim))?;
            check("log_softmax", &[x], &|a| log_softmax(&a[0], dim), &|a| crate::log_softmax(&a[0], dim))?;
        }
        check("gelu", &[x], &|a| gelu(&a[0]), &|a| crate::gelu(&a[0]))?;
        check("gelu_tanh", &[x], &|a| gelu_tanh(&a[0]), &|a| crate::gelu_tanh(&a[0]))?;
        check("silu", &[x], &|a| silu(&a[0]), &|a| crate::silu(&a[0]))?;
        check("sigmoid", &[x], &|a| sigmoid(&a[0]), &|a| crate::sigmoid(&a[0]))?;
        check("linear", &[x, &[5, 7], &[5]], &|a| linear(&a[0], &a[1], Some(&a[2])), &|a| {
            crate::linear(&a[0], &a[1], Some(&a[2]))
        })?;
        check("linear", &[x, &[5, 7]], &|a| linear(&a[0], &a[1], None), &|a| crate::linear(&a[0], &a[1], None))?;
        let targets = Tensor::new(&[0u32, 6, 6, 1, 2, 3], &Device::Cpu)?;
        check("cross_entropy", &[x], &|a| cross_entropy(&a[0], &targets), &|a| crate::cross_entropy(&a[0], &targets))
    }

    #[test]
    fn rotations_are_those_of_the_kernels() -> Result<()> {
        let x = &[2, 3, 5, 4][..];
        let [cos, sin] = [1, 2].map(|seed| numbers(&[5, 2], seed));
        let (cos, sin) = (cos?.to_dtype(DType::BF16)?, sin?.to_dtype(DType::BF16)?);
        let tables = |x: &Tensor| [cos.to_dtype(x.dtype()), sin.to_dtype(x.dtype())];
        check(
            "rope",
            &[x],
            &|a| {
                tables(&a[0])
                    .into_iter()
                    .collect::<Result<Vec<_>, _>>()
                    .and_then(|cs| rope_halves(&a[0], &cs[0], &cs[1]))
            },
            &|a| {
                tables(&a[0])
                    .into_iter()
                    .collect::<Result<Vec<_>, _>>()
                    .and_then(|cs| crate::rope(&a[0], &cs[0], &cs[1]))
            },
        )?;
        check(
            "rope_i",
            &[x],
            &|a| {
                let [cos, sin] = tables(&a[0]);
                rope_neighbours(&a[0], &cos?, &sin?)
            },
            &|a| {
                let [cos, sin] = tables(&a[0]);
                crate::rope_i(&a[0], &cos?, &sin?)
            },
        )
    }

    #[test]
    fn probabilities_are_those_of_the_kernels() -> Result<()> {
        let bias = [[0.0, 1.0, f64::NEG_INFINITY, 0.0], [f64::NEG_INFINITY; 4], [0.0; 4]];
        let bias = Tensor::new(&[[bias]], &Device::Cpu)?;
        for softcap in [None, Some(2.0)] {
            for causal in [None, Some(0), Some(1)] {
                let scores = Scores { scale: 0.7, softcap, causal, heads: 4, queries: 3, keys: 4 };
                for bias in [None, Some(bias.clone())] {
                    let shapes: [&[usize]; 2] = [&[2, 2, 6, 5], &[2, 2, 4, 5]];
                    let of = |a: &[Tensor], on: fn(&_, &_, Option<&_>, _) -> candle_core::Result<Tensor>| {
                        let [q, k] = [&a[0], &a[1]].map(widen);
                        let (q, k) = (q?, k?);
                        let bias = bias.as_ref().map(|bias| bias.to_dtype(q.dtype())).transpose()?;
                        on(&q, &k, bias.as_ref(), scores)?.to_dtype(a[0].dtype())
                    };
                    let composed: Function<'_> = &|a| of(a, probabilities::composed);
                    check("probabilities", &shapes, composed, &|a| of(a, probabilities::on_cpu))?;
                }
            }
        }
        Ok(())
    }
}
