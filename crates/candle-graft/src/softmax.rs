//! The softmax and its logarithm.

use candle_core::backend::BackendStorage;
use candle_core::shape::Dim;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, WithDType};

use crate::cpu::{self, by_type};
use crate::kernel::softmax as kernel;
use crate::{check, composed};

/// `exp(x) / sum(exp(x))`, with the sum over dimension `dim`, for an `x` of any shape.
///
/// Where all numbers of a row are minus infinity, the result is NaN, as candle's is. Large finite numbers, such as
/// masks of -1e30, never give NaN.
///
/// With `y` the result and `g` its gradient, the gradient of `x` is `y * (g - sum(y * g))`.
///
/// ```
/// use candle_core::{D, Device, Var};
/// use candle_graft::softmax;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[[0f32, 0.0, f32::NEG_INFINITY], [1.0, 1.0, 1.0]], &Device::Cpu)?;
/// let y = softmax(&x, D::Minus1)?;
/// assert_eq!(y.to_vec2::<f32>()?[0], [0.5, 0.5, 0.0]);
/// assert!(y.sqr()?.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn softmax<T: Dim>(x: &Tensor, dim: T) -> Result<Tensor> {
    check::float("softmax", "x", x)?;
    let dim = dim.to_index(x.shape(), "softmax")?;
    if x.device().is_cpu() { x.apply_op1(Softmax { dim, log: false }) } else { composed::softmax(x, dim) }
}

/// [`softmax`] over the last dimension, under the name that it has in candle-nn.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_graft::softmax_last_dim;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[0f32, 3f32.ln()], &Device::Cpu)?;
/// let y = softmax_last_dim(&x)?.to_vec1::<f32>()?;
/// assert!((y[1] - 0.75).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    softmax(x, D::Minus1)
}

/// `x - log(sum(exp(x)))`, with the sum over dimension `dim`, for an `x` of any shape.
///
/// With `g` the gradient of the result, the gradient of `x` is `g - softmax(x) * sum(g)`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::log_softmax;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[[0f32, 0.0], [5.0, -1000.0]], &Device::Cpu)?;
/// let y = log_softmax(&x, 1)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-2f32.ln(), -2f32.ln()], [0.0, -1005.0]]);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn log_softmax<T: Dim>(x: &Tensor, dim: T) -> Result<Tensor> {
    check::float("log_softmax", "x", x)?;
    let dim = dim.to_index(x.shape(), "log_softmax")?;
    if x.device().is_cpu() { x.apply_op1(Softmax { dim, log: true }) } else { composed::log_softmax(x, dim) }
}

struct Softmax {
    dim: usize,
    log: bool,
}

impl Softmax {
    /// The layout with dimension `dim` and the last exchanged.
    fn last(&self, layout: &Layout) -> Result<Layout> {
        layout.transpose(self.dim, layout.shape().rank() - 1)
    }

    /// The reverse of [`Self::last`], for the elements of a result.
    fn back<T: WithDType>(&self, elements: Vec<T>, shape: &Shape) -> Result<Vec<T>> {
        let last = shape.rank() - 1;
        if self.dim == last {
            return Ok(elements);
        }
        let layout = Layout::contiguous(Layout::contiguous(shape).transpose(self.dim, last)?.shape());
        let elements = T::to_cpu_storage_owned(elements);
        Ok(cpu::slice(&elements, &layout.transpose(self.dim, last)?)?.into_owned())
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax" } else { "softmax" }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (shape, len) = (layout.shape(), layout.dims()[self.dim]);
        by_type!(x.dtype(), self.name(), T => {
            let x = cpu::slice::<T>(x, &self.last(layout)?)?;
            let y = if self.log { kernel::log_forward(&x, len) } else { kernel::forward(&x, len) };
            cpu::storage(self.back(y, shape)?, shape)
        })
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (shape, len, last) = (x.shape(), x.dim(self.dim)?, x.rank() - 1);
        // Rounded to 16 bits, neither probabilities nor their logarithms have the digits of a gradient.
        let anew = self.log || composed::wide(x.dtype()) != x.dtype();
        let from = (if anew { x } else { y }).detach().transpose(self.dim, last)?;
        let grad = grad.detach().transpose(self.dim, last)?;
        by_type!(x.dtype(), self.name(), T => {
            let grad = cpu::with_slices([&from, &grad], |[from, grad]: [&[T]; 2]| {
                match (self.log, anew) {
                    (true, _) => kernel::log_backward(from, grad, len),
                    (false, true) => kernel::backward_anew(from, grad, len),
                    (false, false) => kernel::backward(from, grad, len),
                }
            })?;
            Ok(Some(cpu::tensor(self.back(grad, shape)?, shape)?))
        })
    }
}
