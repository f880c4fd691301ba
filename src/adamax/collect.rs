//! Gradients found and checked. After this nothing about them can fail any more, and nothing has been written yet.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::Param;
use super::report::History;
use crate::error::{ErrorKind, Result};
use crate::gradient::sparse::{IdsOf, densify, nonzero, read_ids, row_len, rows_of};
use crate::gradient::{SparseGrad, TouchedRows};
use crate::kernel::lend::storage_address;
use crate::kernel::{Listed, Occurrences, Part, RowGrad, RowValues, total};
use crate::maps::IdMap;
use crate::state::{Place, arithmetic};

/// What a call has for one variable.
#[derive(Default)]
pub(super) struct Found<'g> {
    /// A gradient in its shape.
    pub(super) dense: Option<&'g Tensor>,
    /// Which rows of that are meant, if not all.
    pub(super) touched: Option<TouchedRows<'g>>,
    /// The gradients of its lookups.
    pub(super) lookups: Vec<Part<'g>>,
    /// A gradient of some rows.
    pub(super) sparse: Option<&'g SparseGrad>,
}

/// A gradient, checked.
pub(super) enum Grad<'g> {
    /// Contiguous, in the variable's shape.
    Dense(Cow<'g, Tensor>),
    /// Of some rows.
    Rows(Box<RowGrad<'g>>),
}

/// The gradients of one call: one for each variable, or none.
pub(super) struct Collected<'g>(Vec<Option<Grad<'g>>>);

impl<'g> Collected<'g> {
    /// The gradient of variable `index`.
    pub(super) fn get(&self, index: usize) -> Option<&Grad<'g>> {
        self.0.get(index)?.as_ref()
    }

    /// Whether no variable has one.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// How many variables have one.
    pub(super) fn count(&self) -> usize {
        self.0.iter().flatten().count()
    }

    /// The indices of the variables without one, but for those that have taken part before and never had one.
    pub(super) fn missing(&self, params: &[Box<Param>]) -> Vec<usize> {
        let is_missing = |&index: &usize| self.get(index).is_none() && params[index].history != History::Untrained;
        (0..self.0.len()).filter(is_missing).collect()
    }

    /// The first variable whose gradient is of some rows.
    pub(super) fn first_sparse(&self) -> Option<usize> {
        self.0.iter().position(|grad| matches!(grad, Some(Grad::Rows(_))))
    }

    /// Sums up the rows' contributions, which norms are measured from; otherwise the update does it on its way.
    pub(super) fn sum_rows(&mut self, params: &[Box<Param>]) -> Result<()> {
        for (grad, param) in self.0.iter_mut().zip(params) {
            if let Some(Grad::Rows(rows)) = grad {
                rows.sum(param.var.dtype())?;
            }
        }
        Ok(())
    }
}

/// Looks up the gradient of every variable.
pub(super) fn collect<'g>(
    params: &[Box<Param>],
    storages: &IdMap<usize, String>,
    mut lookup: impl FnMut(&Param) -> Found<'g>,
) -> Result<Collected<'g>> {
    let grads = params.iter().map(|param| Checker { param, storages }.check(lookup(param)));
    grads.collect::<Result<_>>().map(Collected)
}

/// A gradient of some rows, checked and summed up by rows.
pub(super) fn check_sparse<'g>(
    param: &Param,
    storages: &IdMap<usize, String>,
    grad: &'g SparseGrad,
) -> Result<RowGrad<'g>> {
    RowGrad::coalesced(&[Checker { param, storages }.sparse(grad)?], row_len(&param.var))
}

/// Checks the gradients of one variable.
struct Checker<'p> {
    param: &'p Param,
    storages: &'p IdMap<usize, String>,
}

impl Checker<'_> {
    fn check<'g>(&self, found: Found<'g>) -> Result<Option<Grad<'g>>> {
        let Found { dense, touched, lookups, sparse } = found;
        let mut dense = dense.map(|grad| self.dense(grad)).transpose()?;
        let var = &self.param.var;
        if lookups.is_empty() && sparse.is_none() && touched.is_none() {
            return Ok(dense.map(Grad::Dense));
        }
        let mut parts = Vec::with_capacity(lookups.len() + 1);
        for Part { grad, occurrences } in lookups {
            occurrences.check()?;
            let values = self.tensor("gradient", grad)?;
            parts.push(Part { grad: self.where_summed(values)?, occurrences });
        }
        if let Some(sparse) = sparse {
            parts.push(self.sparse(sparse)?);
        }
        if let Some(touched) = touched
            && let Some(grad) = dense.take()
        {
            parts.push(self.touched(touched, grad)?);
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let rows = match self.param.place() {
            Place::Cuda => {
                total(&parts)?;
                RowGrad { row_len: row_len(var), values: RowValues::Unsorted(parts) }
            }
            Place::Host | Place::Device => RowGrad::coalesced(&parts, row_len(var))?,
        };
        Ok(Some(match dense {
            None => Grad::Rows(Box::new(rows)),
            // A weight that is used both ways gets the sum of both, and that has all rows.
            Some(grad) => Grad::Dense(Cow::Owned(densify(Some(&grad), &rows, 1.0, var)?.to_device(var.device())?)),
        }))
    }

    /// A gradient in the shape of the variable.
    fn dense<'g>(&self, grad: &'g Tensor) -> Result<Cow<'g, Tensor>> {
        let (var, name) = (&self.param.var, || self.param.name.clone());
        if grad.shape() != var.shape() {
            let (expected, got) = (var.dims().to_vec(), grad.dims().to_vec());
            return Err(ErrorKind::ShapeMismatch { what: "gradient", name: name(), expected, got }.into());
        }
        self.tensor("gradient", Cow::Borrowed(grad))
    }

    /// A gradient of some rows, as a caller gave it.
    fn sparse<'g>(&self, grad: &'g SparseGrad) -> Result<Part<'g>> {
        let (SparseGrad { indices, values }, var) = (grad, &self.param.var);
        let rows = rows_of(&self.param.name, var)?;
        if indices.rank() != 1 {
            let (expected, got) = (vec![indices.elem_count()], indices.dims().to_vec());
            return Err(
                ErrorKind::ShapeMismatch { what: "indices", name: self.param.name.clone(), expected, got }.into()
            );
        }
        let mut expected = var.dims().to_vec();
        expected[0] = indices.elem_count();
        if values.dims() != expected {
            let got = values.dims().to_vec();
            return Err(
                ErrorKind::ShapeMismatch { what: "values", name: self.param.name.clone(), expected, got }.into()
            );
        }
        let ids = read_ids(IdsOf { what: "indices", of: &self.param.name }, indices, rows)?;
        let grad = self.tensor("values", Cow::Borrowed(values))?;
        Ok(Part {
            grad: self.where_summed(grad)?,
            occurrences: Arc::new(Occurrences::Host(Listed::new(ids, None, None))),
        })
    }

    /// Some rows of a gradient in the shape of the variable, where they are.
    fn touched<'g>(&self, touched: TouchedRows<'_>, grad: Cow<'g, Tensor>) -> Result<Part<'g>> {
        let rows = match touched {
            TouchedRows::NonZero => {
                rows_of(&self.param.name, &grad)?;
                nonzero(&grad)?
            }
            TouchedRows::Ids(ids) => {
                let what = IdsOf { what: "touched rows", of: &self.param.name };
                let mut rows = read_ids(what, ids, rows_of(&self.param.name, &grad)?)?;
                rows.sort_unstable();
                rows.dedup();
                rows
            }
        };
        let occurrences = Arc::new(Occurrences::Host(Listed::new(rows.clone(), Some(rows), None)));
        Ok(Part { grad: self.where_summed(grad)?, occurrences })
    }

    /// Rows are summed where a kernel does it, and in host memory for tensor operations.
    fn where_summed<'g>(&self, grad: Cow<'g, Tensor>) -> Result<Cow<'g, Tensor>> {
        Ok(match self.param.place() {
            Place::Device => Cow::Owned(grad.to_device(&Device::Cpu)?),
            Place::Host | Place::Cuda => grad,
        })
    }

    /// What holds for every tensor of gradients; contiguous.
    fn tensor<'g>(&self, what: &'static str, grad: Cow<'g, Tensor>) -> Result<Cow<'g, Tensor>> {
        let (var, name) = (&self.param.var, || self.param.name.clone());
        if grad.dtype() != var.dtype() && grad.dtype() != arithmetic(var.dtype()) {
            let expected = match var.dtype() {
                own @ (DType::F16 | DType::BF16) => format!("{own:?} or F32"),
                own => format!("{own:?}"),
            };
            return Err(ErrorKind::DTypeMismatch { what, name: name(), expected, got: grad.dtype() }.into());
        }
        if !grad.device().same_device(var.device()) {
            let (expected, got) = (var.device().location(), grad.device().location());
            return Err(ErrorKind::DeviceMismatch { what, name: name(), expected, got }.into());
        }
        if let Some(owner) = self.storages.get(&storage_address(&grad)) {
            return Err(ErrorKind::SharedStorage { name: name(), owner: owner.clone() }.into());
        }
        // candle's own gradients are contiguous; those that a caller made need not be.
        Ok(if grad.is_contiguous() { grad } else { Cow::Owned(grad.contiguous()?) })
    }
}
