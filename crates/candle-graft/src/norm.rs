//! Layer normalization and RMS normalization.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use crate::cpu::{self, by_type};
use crate::kernel::Element;
use crate::kernel::norm::Norm;
use crate::{check, composed};

/// [Layer normalization](https://arxiv.org/abs/1607.06450): `(x - mean) / sqrt(variance + eps) * weight + bias` for
/// each row.
///
/// A row is the last dimension of `x`, which has any shape `(..., n)`. `weight` and `bias` have the shape `(n)` and the
/// type of `x`. The variance is the mean of the squared deviations.
///
/// With `y` the normalized row, `g` the gradient of the result and `h = g * weight`, the gradient of `x` is
/// `(h - mean(h) - y * mean(h * y)) / sqrt(variance + eps)`. The gradients of `weight` and `bias` are the sums of
/// `g * y` and of `g` over all rows.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_graft::layer_norm;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.0, 3.0], [9.0, 8.0, 7.0]], &Device::Cpu)?;
/// let weight = Var::ones(3, DType::F32, &Device::Cpu)?;
/// let y = layer_norm(&x, &weight, None, 0.0)?;
/// let expected = 1.5f32.sqrt();
/// assert!((y.to_vec2::<f32>()?[0][2] - expected).abs() < 1e-6);
/// let grads = y.sum_all()?.backward()?;
/// assert!(grads.get(&weight).is_some());
/// # Ok(())
/// # }
/// ```
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check_args("layer_norm", x, weight, bias)?;
    if !x.device().is_cpu() {
        return composed::layer_norm(x, weight, bias, eps);
    }
    let norm = Norm { centered: true, eps };
    match bias {
        Some(bias) => x.apply_op3(weight, bias, norm),
        None => x.apply_op2(weight, norm),
    }
}

/// [RMS normalization](https://arxiv.org/abs/1910.07467): `x / sqrt(mean(x^2) + eps) * weight` for each row.
///
/// A row is the last dimension of `x`, which has any shape `(..., n)`. `weight` has the shape `(n)` and the type of
/// `x`.
///
/// With `y` the normalized row, `g` the gradient of the result and `h = g * weight`, the gradient of `x` is
/// `(h - y * mean(h * y)) / sqrt(mean(x^2) + eps)`. The gradient of `weight` is the sum of `g * y` over all rows.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_graft::rms_norm;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[[3f32, 4.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// let y = rms_norm(&x, &weight, 0.0)?;
/// let rms = 12.5f32.sqrt();
/// assert!((y.to_vec2::<f32>()?[0][1] - 8.0 / rms).abs() < 1e-6);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    check_args("rms_norm", x, weight, None)?;
    if !x.device().is_cpu() {
        return composed::rms_norm(x, weight, eps);
    }
    x.apply_op2(weight, Norm { centered: false, eps })
}

fn check_args(function: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    check::float(function, "x", x)?;
    let size = check::last_dim(function, "x", x)?;
    for (name, arg) in [("weight", Some(weight)), ("bias", bias)] {
        if let Some(arg) = arg {
            check::shape(function, name, arg, &[size])?;
            check::like(function, ("x", x), (name, arg))?;
        }
    }
    Ok(())
}

impl Norm {
    const fn function(self) -> &'static str {
        if self.centered { "layer_norm" } else { "rms_norm" }
    }

    fn value(
        self,
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        by_type!(x.0.dtype(), self.function(), T => {
            let bias = bias.map(|(storage, layout)| cpu::slice::<T>(storage, layout)).transpose()?;
            let (values, weight) = (cpu::slice::<T>(x.0, x.1)?, cpu::slice(weight.0, weight.1)?);
            cpu::storage(self.forward(&values, &weight, bias.as_deref()), x.1.shape())
        })
    }

    /// The gradients of x, the weight and the bias, where they are wanted.
    fn gradients(
        self,
        [x, weight, grad]: [&Tensor; 3],
        bias: Option<&Tensor>,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [of_x, of_weight] = [x, weight].map(Tensor::track_op);
        let of_bias = bias.is_some_and(Tensor::track_op);
        by_type!(x.dtype(), self.function(), T => {
            let (x_grad, [weight_grad, bias_grad]) = cpu::with_slices([x, weight, grad], |args: [&[T]; 3]| {
                self.backward(args, of_x, of_weight || of_bias)
            })?;
            let sum = |wanted: bool, sum| wanted.then(|| cpu::tensor(T::of_wide(sum), weight.shape())).transpose();
            let x_grad = of_x.then(|| cpu::tensor(x_grad, x.shape())).transpose()?;
            Ok((x_grad, sum(of_weight, weight_grad)?, sum(of_bias, bias_grad)?))
        })
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        self.function()
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, weight: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.value((x, x_l), (weight, w_l), None)
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight, _) = self.gradients([x, weight, grad], None)?;
        Ok((x, weight))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        self.function()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        weight: &CpuStorage,
        weight_l: &Layout,
        bias: &CpuStorage,
        bias_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.value((x, x_l), (weight, weight_l), Some((bias, bias_l)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.gradients([x, weight, grad], Some(bias))
    }
}
