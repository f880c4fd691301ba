//! Losses.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{self, by_type};
use crate::kernel::{Element, Real, loss as kernel};
use crate::{check, composed};

/// The cross entropy: the mean of `-log(softmax(logits))` at the targets.
///
/// `logits` has the shape `(n, classes)`, `targets` the shape `(n)` and the type u8, u32 or i64. The result is a scalar
/// of the type of the logits. Probabilities are not kept between the passes, so that the only tensor as large as the
/// logits is their gradient. The mean over no rows is NaN, as in PyTorch.
///
/// With `g` the gradient of the result, the gradient of the logits is `(softmax(logits) - 1 at the targets) * g / n`.
///
/// # Errors
///
/// A target that is negative, or not less than the number of classes, is an error. There is no number that stands for
/// no target.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_graft::cross_entropy;
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Var::new(&[[0f32, 0.0], [1000.0, 0.0]], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &Tensor::new(&[1u32, 0], &Device::Cpu)?)?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln() / 2.0).abs() < 1e-6);
/// let grads = loss.backward()?;
/// let grad = grads.get(&logits).map(|grad| grad.to_vec2::<f32>()).transpose()?;
/// assert_eq!(grad, Some(vec![vec![0.25, -0.25], vec![0.0, 0.0]]));
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check::float("cross_entropy", "logits", logits)?;
    let [n, classes] = *logits.dims() else {
        bail!("cross_entropy: the shape of logits is {:?}, but must be (n, classes)", logits.dims());
    };
    check::shape("cross_entropy", "targets", targets, &[n])?;
    let ids = target_ids(targets, classes)?;
    if !logits.device().is_cpu() {
        return composed::cross_entropy(logits, targets);
    }
    logits.apply_op1(CrossEntropy { targets: ids })
}

struct CrossEntropy {
    /// Less than the number of classes.
    targets: Vec<usize>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let classes = layout.dims()[1];
        by_type!(logits.dtype(), self.name(), T => {
            let loss = kernel::forward(&cpu::slice::<T>(logits, layout)?, &self.targets, classes);
            cpu::storage(T::of_wide(vec![loss]), ())
        })
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let classes = logits.dim(1)?;
        by_type!(logits.dtype(), self.name(), T => {
            let grad = <T as Element>::Wide::of(grad.to_dtype(DType::F64)?.to_scalar()?);
            let grad = cpu::with_slices([logits], |[logits]: [&[T]; 1]| {
                kernel::backward(logits, &self.targets, classes, grad)
            })?;
            Ok(Some(cpu::tensor(grad, logits.shape())?))
        })
    }
}

/// The targets as indices, all of them less than `classes`.
fn target_ids(targets: &Tensor, classes: usize) -> Result<Vec<usize>> {
    let host = targets.to_device(&Device::Cpu)?;
    let ids: Vec<i64> = match targets.dtype() {
        DType::U8 | DType::U32 | DType::I64 => host.to_dtype(DType::I64)?.to_vec1()?,
        dtype => bail!("cross_entropy: targets are of type {dtype:?}, but must be u8, u32 or i64"),
    };
    let index = |(i, id)| match usize::try_from(id) {
        Ok(index) if index < classes => Ok(index),
        _ => bail!("cross_entropy: the target at {i} is {id}, but must be at least 0 and less than {classes}"),
    };
    ids.into_iter().enumerate().map(index).collect()
}
