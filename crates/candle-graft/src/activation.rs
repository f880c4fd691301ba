//! Functions of one number.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::cpu::{self, by_type};
use crate::kernel::activation::{self as kernel, Activation};
use crate::{check, composed};

/// The [GELU](https://arxiv.org/abs/1606.08415) by the error function: `x * Phi(x)`, where
/// `Phi(x) = (1 + erf(x / sqrt(2))) / 2` is the distribution function of the normal distribution.
///
/// It is candle's `gelu_erf` and the default of PyTorch. The derivative is
/// `Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi)`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::gelu;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[-1f32, 0.0, 1.0], &Device::Cpu)?;
/// let y = gelu(&x)?;
/// assert!((y.to_vec1::<f32>()?[2] - 0.841_344_7).abs() < 1e-6);
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).map(|grad| grad.to_vec1::<f32>()).transpose()?.map(|grad| grad[1]), Some(0.5));
/// # Ok(())
/// # }
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Activation::Gelu.apply(x, composed::gelu)
}

/// The [GELU](https://arxiv.org/abs/1606.08415) by the hyperbolic tangent: `x * (1 + tanh(u)) / 2` with
/// `u = sqrt(2 / pi) * (x + 0.044715 * x^3)`.
///
/// It is candle's `gelu`, which candle-nn calls `NewGelu` or `GeluPytorchTanh`. With `s = (1 + tanh(u)) / 2`, the
/// derivative is `s + 2 * x * s * (1 - s) * u'`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::gelu_tanh;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[-1f32, 0.0, 1.0], &Device::Cpu)?;
/// let y = gelu_tanh(&x)?;
/// assert!((y.to_vec1::<f32>()?[2] - 0.841_192).abs() < 1e-6);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    Activation::GeluTanh.apply(x, composed::gelu_tanh)
}

/// The sigmoid linear unit, or [swish](https://arxiv.org/abs/1710.05941): `x * s` with `s = sigmoid(x)`.
///
/// The derivative is `s + x * s * (1 - s)`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::silu;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[-1f32, 0.0, 1.0], &Device::Cpu)?;
/// let y = silu(&x)?;
/// assert!((y.to_vec1::<f32>()?[2] - 0.731_058_6).abs() < 1e-6);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Activation::Silu.apply(x, composed::silu)
}

/// The logistic function: `s = 1 / (1 + exp(-x))`.
///
/// The derivative is `s * (1 - s)`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::sigmoid;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[-1000f32, 0.0, 1000.0], &Device::Cpu)?;
/// let y = sigmoid(&x)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0.0, 0.5, 1.0]);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Activation::Sigmoid.apply(x, composed::sigmoid)
}

impl Activation {
    fn apply(self, x: &Tensor, composed: fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        check::float(self.name(), "x", x)?;
        if x.device().is_cpu() { x.apply_op1(self) } else { composed(x) }
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
            Activation::Sigmoid => "sigmoid",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(x.dtype(), self.name(), T => {
            cpu::storage(kernel::forward(*self, &cpu::slice::<T>(x, layout)?), layout.shape())
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        by_type!(x.dtype(), self.name(), T => {
            let grad = cpu::with_slices([x, grad], |[x, grad]: [&[T]; 2]| kernel::backward(*self, x, grad))?;
            Ok(Some(cpu::tensor(grad, x.shape())?))
        })
    }
}
