//! The linear layer.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};

use crate::cpu::{self, by_type};
use crate::kernel::{Element, columns};
use crate::{check, composed};

/// The linear layer: `x * weight^T + bias`.
///
/// `x` has any shape `(..., in)`, `weight` the shape `(out, in)`, `bias` the shape `(out)`, and the result the shape
/// `(..., out)`.
///
/// With `g` the gradient of the result, both as matrices of rows, the gradient of `x` is `g * weight`, and that of
/// `weight` is `g^T * x`. The gradient of `bias` is the sum of the rows of `g`. In 16 bits, that sum is computed in
/// f32: a sum of ones in bf16 would end at 256.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_graft::linear;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[10f32, 100.0]], &Device::Cpu)?;
/// let weight = Var::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let bias = Var::new(&[0f32, 0.0, 1.0], &Device::Cpu)?;
/// let y = linear(&x, &weight, Some(&bias))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[210.0, 430.0, 651.0]]);
/// let grads = y.sum_all()?.backward()?;
/// let grad = grads.get(&weight).map(|grad| grad.to_vec2::<f32>()).transpose()?;
/// assert_eq!(grad, Some(vec![vec![10.0, 100.0]; 3]));
/// # Ok(())
/// # }
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check::float("linear", "x", x)?;
    let inputs = check::last_dim("linear", "x", x)?;
    let [outputs, expected] = *weight.dims() else {
        bail!("linear: the shape of weight is {:?}, but must be (out, in)", weight.dims());
    };
    if inputs != expected {
        let (x, weight) = (x.dims(), weight.dims());
        bail!("linear: the last dimension of x, of shape {x:?}, must be the last of weight, of shape {weight:?}");
    }
    check::like("linear", ("x", x), ("weight", weight))?;
    if let Some(bias) = bias {
        check::shape("linear", "bias", bias, &[outputs])?;
        check::like("linear", ("x", x), ("bias", bias))?;
    }
    if !x.device().is_cpu() {
        let y = composed::linear(&x.reshape((rows(x.shape()), inputs))?, weight, bias)?;
        return y.reshape(result_shape(x.shape(), outputs));
    }
    match bias {
        Some(bias) => x.apply_op3(weight, bias, Linear),
        None => x.apply_op2(weight, Linear),
    }
}

/// How many vectors `x` holds.
fn rows(x: &Shape) -> usize {
    x.dims()[..x.rank() - 1].iter().product()
}

fn result_shape(x: &Shape, outputs: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(outputs);
    dims.into()
}

/// `x` as a matrix of these sizes in the type in which it is computed; without a copy where there need not be one.
fn wide_matrix<'a, T: Element>(
    x: &'a CpuStorage,
    layout: &Layout,
    sizes: (usize, usize),
) -> Result<(Cow<'a, CpuStorage>, Layout)> {
    if T::DTYPE == <T::Wide as WithDType>::DTYPE {
        if layout.is_contiguous() {
            return Ok((Cow::Borrowed(x), Layout::contiguous_with_offset(sizes, layout.start_offset())));
        }
        if layout.shape().rank() == 2 {
            return Ok((Cow::Borrowed(x), layout.clone()));
        }
    }
    let numbers = T::into_wide(cpu::slice(x, layout)?.into_owned());
    Ok((Cow::Owned(<T::Wide as WithDType>::to_cpu_storage_owned(numbers)), Layout::contiguous(sizes)))
}

struct Linear;

impl Linear {
    fn value(
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = weight.1.shape().dims2()?;
        let shape = result_shape(x.1.shape(), outputs);
        by_type!(x.0.dtype(), "linear", T => {
            let rows = rows(x.1.shape());
            let (x, x_l) = wide_matrix::<T>(x.0, x.1, (rows, inputs))?;
            let (weight, weight_l) = wide_matrix::<T>(weight.0, weight.1, (outputs, inputs))?;
            let y = x.matmul(&weight, (1, rows, outputs, inputs), &x_l, &weight_l.transpose(0, 1)?)?;
            let mut y = <<T as Element>::Wide as WithDType>::cpu_storage_data(y)?;
            if let Some((bias, layout)) = bias {
                let (bias, mut room) = (cpu::slice::<T>(bias, layout)?, Vec::new());
                columns::add(&mut y, T::widen(&bias, &mut room));
            }
            cpu::storage(T::of_wide(y), shape)
        })
    }

    fn gradients(
        [x, weight, grad]: [&Tensor; 3],
        bias: Option<&Tensor>,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let of_bias = bias.is_some_and(Tensor::track_op);
        let (x_dims, rows) = (x.shape(), rows(x.shape()));
        let grad = grad.detach().reshape((rows, outputs))?;
        let wide = composed::wide(x.dtype());
        let wide_grad = grad.to_dtype(wide)?;
        let x_grad = if x.track_op() {
            let product = wide_grad.matmul(&weight.detach().to_dtype(wide)?)?;
            Some(product.to_dtype(x.dtype())?.reshape(x_dims)?)
        } else {
            None
        };
        let weight_grad = if weight.track_op() {
            let x = x.detach().to_dtype(wide)?.reshape((rows, inputs))?;
            Some(wide_grad.t()?.matmul(&x)?.to_dtype(weight.dtype())?)
        } else {
            None
        };
        let bias_grad = if of_bias {
            by_type!(grad.dtype(), "linear", T => {
                let sum = cpu::with_slices([&grad], |[grad]: [&[T]; 1]| columns::sum(grad, outputs))?;
                Some(cpu::tensor(T::of_wide(sum), outputs)?)
            })
        } else {
            None
        };
        Ok((x_grad, weight_grad, bias_grad))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, weight: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        Self::value((x, x_l), (weight, w_l), None)
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight, _) = Self::gradients([x, weight, grad], None)?;
        Ok((x, weight))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        Self::value((x, x_l), (weight, weight_l), Some((bias, bias_l)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Self::gradients([x, weight, grad], Some(bias))
    }
}
