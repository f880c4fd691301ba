//! Checks of arguments, with errors that name the function, the argument, its shape and what is allowed.

use candle_core::{D, DType, Result, Tensor, bail};

/// Fails unless `x` holds floating point numbers that this crate computes with.
pub(crate) fn float(function: &str, name: &str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => bail!("{function}: {name} is of type {dtype:?}, but must be f32, f64, f16 or bf16"),
    }
}

/// Fails unless `other` has the element type and the device of `x`.
pub(crate) fn like(function: &str, (x_name, x): (&str, &Tensor), (name, other): (&str, &Tensor)) -> Result<()> {
    if other.dtype() != x.dtype() {
        let (found, expected) = (other.dtype(), x.dtype());
        bail!("{function}: {name} is of type {found:?}, but must be {expected:?}, as {x_name} is");
    }
    if !other.device().same_device(x.device()) {
        let (found, expected) = (other.device().location(), x.device().location());
        bail!("{function}: {name} is on {found:?}, but must be on {expected:?}, where {x_name} is");
    }
    Ok(())
}

/// The size of the last dimension of `x`.
pub(crate) fn last_dim(function: &str, name: &str, x: &Tensor) -> Result<usize> {
    if x.rank() == 0 {
        bail!("{function}: {name} is a scalar, but must have at least one dimension");
    }
    x.dim(D::Minus1)
}

/// Fails unless `x` has this shape.
pub(crate) fn shape(function: &str, name: &str, x: &Tensor, dims: &[usize]) -> Result<()> {
    if x.dims() != dims {
        bail!("{function}: the shape of {name} is {:?}, but must be {dims:?}", x.dims());
    }
    Ok(())
}

/// The four sizes of `x`.
pub(crate) fn dims4(function: &str, name: &str, x: &Tensor, expected: &str) -> Result<(usize, usize, usize, usize)> {
    match *x.dims() {
        [a, b, c, d] => Ok((a, b, c, d)),
        _ => bail!("{function}: the shape of {name} is {:?}, but must be {expected}", x.dims()),
    }
}
