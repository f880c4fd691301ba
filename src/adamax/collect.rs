//! Gradients found and checked. After this nothing about them can fail any more, and nothing has been written yet.

use std::borrow::Cow;
use std::collections::HashMap;

use candle_core::{DType, Tensor};

use super::Param;
use crate::error::{ErrorKind, Result};
use crate::kernel::lend::storage_address;
use crate::state::arithmetic;

/// The gradients of one call: for each variable a contiguous one, or none.
pub(super) struct Collected<'g>(Vec<Option<Cow<'g, Tensor>>>);

impl Collected<'_> {
    /// The gradient of variable `index`.
    pub(super) fn get(&self, index: usize) -> Option<&Tensor> {
        self.0.get(index)?.as_deref()
    }

    /// Whether no variable has one.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The indices of the variables without one.
    pub(super) fn missing(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&index| self.get(index).is_none()).collect()
    }
}

/// Looks up the gradient of every variable.
pub(super) fn collect<'g>(
    params: &[Param],
    storages: &HashMap<usize, String>,
    lookup: impl Fn(&Tensor) -> Option<&'g Tensor>,
) -> Result<Collected<'g>> {
    let grads = params.iter().map(|param| lookup(&param.var).map(|grad| check(param, storages, grad)).transpose());
    grads.collect::<Result<_>>().map(Collected)
}

fn check<'g>(param: &Param, storages: &HashMap<usize, String>, grad: &'g Tensor) -> Result<Cow<'g, Tensor>> {
    let (var, name) = (&param.var, || param.name.clone());
    if grad.shape() != var.shape() {
        let (expected, got) = (var.dims().to_vec(), grad.dims().to_vec());
        return Err(ErrorKind::ShapeMismatch { what: "gradient", name: name(), expected, got }.into());
    }
    if grad.dtype() != var.dtype() && grad.dtype() != arithmetic(var.dtype()) {
        let expected = match var.dtype() {
            own @ (DType::F16 | DType::BF16) => format!("{own:?} or F32"),
            own => format!("{own:?}"),
        };
        return Err(ErrorKind::DTypeMismatch { what: "gradient", name: name(), expected, got: grad.dtype() }.into());
    }
    if !grad.device().same_device(var.device()) {
        let (expected, got) = (var.device().location(), grad.device().location());
        return Err(ErrorKind::DeviceMismatch { what: "gradient", name: name(), expected, got }.into());
    }
    if let Some(owner) = storages.get(&storage_address(grad)) {
        return Err(ErrorKind::SharedStorage { name: name(), owner: owner.clone() }.into());
    }
    // candle's own gradients are contiguous; those that a caller made need not be.
    Ok(if grad.is_contiguous() { Cow::Borrowed(grad) } else { Cow::Owned(grad.contiguous()?) })
}
