//! State as other frameworks keep it: m and u as they are, a tensor for each.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, ErrorKind, Result};
use crate::state::arithmetic;

/// The state of one variable.
#[derive(Clone, Debug)]
pub(crate) struct PlainVar {
    /// m, in the variable's shape.
    pub(crate) exp_avg: Tensor,
    /// u, in the variable's shape.
    pub(crate) exp_inf: Tensor,
    /// How many updates it has had.
    pub(crate) step: u64,
    /// Its moving average.
    pub(crate) ema: Option<Tensor>,
    /// The sum of its unscaled gradients since the last update, and of how many calls they are.
    pub(crate) accumulated: Option<(Tensor, u64)>,
}

impl PlainVar {
    /// Makes sure that the tensors are in the shape of the variable `var` and of one of its dtypes.
    pub(crate) fn check(&self, name: &str, var: &Tensor) -> Result<()> {
        check_tensor(name, "exp_avg", &self.exp_avg, var)?;
        check_tensor(name, "exp_inf", &self.exp_inf, var)?;
        self.ema.iter().try_for_each(|ema| check_tensor(name, "ema", ema, var))?;
        self.accumulated.iter().try_for_each(|(sum, _)| check_tensor(name, "accumulated", sum, var))
    }
}

/// Other frameworks keep the state of f16 and bf16 parameters in their dtype, or in f32. Both fit.
fn check_tensor(name: &str, what: &'static str, tensor: &Tensor, var: &Tensor) -> Result<()> {
    let (expected, got) = (var.dims().to_vec(), tensor.dims().to_vec());
    if expected != got {
        return Err(ErrorKind::ShapeMismatch { what, name: name.to_owned(), expected, got }.into());
    }
    let (own, exact, got) = (var.dtype(), arithmetic(var.dtype()), tensor.dtype());
    if got != own && got != exact {
        let expected = if own == exact { format!("{own:?}") } else { format!("{own:?} or {exact:?}") };
        return Err(ErrorKind::DTypeMismatch { what, name: name.to_owned(), expected, got }.into());
    }
    Ok(())
}

/// Makes sure that a norm is one: a maximum of magnitudes. (NaN is what a gradient that was NaN leaves.)
pub(crate) fn check_norm(entry: &str, norm: &Tensor) -> Result<()> {
    /// So that little memory is taken beside the norm.
    const PART: usize = 1 << 16;
    let norm = norm.flatten_all()?;
    for begin in (0..norm.elem_count()).step_by(PART) {
        let part = norm.narrow(0, begin, PART.min(norm.elem_count() - begin))?;
        let negative = part.lt(0.0)?.to_vec1::<u8>()?;
        if let Some(index) = negative.iter().position(|&is_negative| is_negative != 0) {
            let got = part.get(index)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            return Err(Error::checkpoint(entry, "numbers that are not negative", got));
        }
    }
    Ok(())
}

/// Whether all elements are zero, which NaN is not.
pub(crate) fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.ne(0.0)?.flatten_all()?.to_vec1::<u8>()?.iter().all(|&differs| differs == 0))
}

/// The number in a tensor of one element and no dimensions.
pub(super) fn scalar(entry: &str, tensor: &Tensor) -> Result<f64> {
    if tensor.rank() != 0 {
        let got = format!("one of shape {:?}", tensor.dims());
        return Err(Error::checkpoint(entry, "a tensor without dimensions", got));
    }
    Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// The count in a tensor of one element and no dimensions, of whatever dtype.
pub(super) fn count(entry: &str, tensor: &Tensor) -> Result<u64> {
    /// Up to here an f64 tells every whole number from its neighbors.
    const EXACT: f64 = (1u64 << f64::MANTISSA_DIGITS) as f64;
    let value = scalar(entry, tensor)?;
    if value.fract() == 0.0 && (0.0..=EXACT).contains(&value) {
        return Ok(value as u64);
    }
    Err(Error::checkpoint(entry, format!("a whole number from 0 to {EXACT}"), value))
}

/// A tensor of one element and no dimensions.
pub(super) fn of_scalar<T: candle_core::WithDType>(value: T) -> Result<Tensor> {
    Ok(Tensor::from_slice(&[value], (), &Device::Cpu)?)
}
