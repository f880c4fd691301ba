//! Gradients of one call: found and checked. After this nothing about them can fail any more, and nothing has been
//! written yet.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::vars::{Param, VarInfo, Vars};
use crate::error::{ErrorKind, Result};
use crate::gradient::sparse::{densify, nonzero};
use crate::gradient::{SparseGrad, TouchedRows};
use crate::ids::{IdsOf, read_ids, row_len, rows_of};
use crate::kernel::lend::storage_address;
use crate::kernel::{HostIds, LookupGrad, LookupIds, RowGrad, RowValues, Source, all_on_one_gpu, total};
use crate::state::{Buffer, Place, arithmetic};

/// Everything that a call has for one variable.
#[derive(Default)]
pub(super) struct Found<'g> {
    /// A gradient in its shape.
    pub(super) dense: Option<&'g Tensor>,
    /// Which rows of that are meant, if not all.
    pub(super) touched: Option<TouchedRows<'g>>,
    /// The gradients of its lookups.
    pub(super) lookups: Vec<LookupGrad<'g>>,
    /// A gradient of some rows.
    pub(super) sparse: Option<&'g SparseGrad>,
}

/// The gradient of one variable, checked.
pub(super) enum Grad<'g> {
    /// In the variable's shape.
    Dense(DenseGrad<'g>),
    /// Gradient of some rows.
    Rows(Box<RowGrad<'g>>),
}

/// A gradient in the shape of its variable.
pub(super) enum DenseGrad<'g> {
    /// Gradient of one call, contiguous.
    Call(Cow<'g, Tensor>),
    /// Sum of several calls.
    Sum(Buffer),
}

impl DenseGrad<'_> {
    /// The memory that kernels read.
    pub(super) fn source(&self) -> Source<'_> {
        match self {
            Self::Call(grad) => Source::Tensor(grad),
            Self::Sum(sum) => Source::Buffer(sum),
        }
    }
}

/// Gradients of one call or of one update: of each variable that has one, with its index, in the order of names.
pub(super) struct Grads<'g>(pub(super) Vec<(usize, Grad<'g>)>);

impl<'g> Grads<'g> {
    /// Looks up the gradient of every variable.
    pub(super) fn collect(vars: &Vars, mut find: impl FnMut(&VarInfo) -> Found<'g>) -> Result<Self> {
        let mut grads = Vec::with_capacity(vars.len());
        for (index, param) in vars.iter().enumerate() {
            let info = &param.info;
            if let Some(grad) = (Checker { info, vars }).check(find(info))? {
                grads.push((index, grad));
            }
        }
        Ok(Self(grads))
    }

    /// No gradients.
    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether no variable has one.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many variables have one.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, (usize, Grad<'g>)> {
        self.0.iter()
    }

    /// The indices of their variables.
    pub(super) fn indices(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(index, _)| *index)
    }

    /// Each with its variable.
    pub(super) fn with<'s>(&'s self, vars: &'s mut Vars) -> impl Iterator<Item = (&'s Grad<'g>, &'s mut Param)> {
        let mut vars = vars.iter_mut().enumerate();
        self.0.iter().filter_map(move |(index, grad)| {
            let (_, param) = vars.find(|(of, _)| of == index)?;
            Some((grad, &mut **param))
        })
    }

    /// The first variable whose gradient is of some rows.
    pub(super) fn first_of_rows(&self) -> Option<usize> {
        self.0.iter().find(|(_, grad)| matches!(grad, Grad::Rows(_))).map(|(index, _)| *index)
    }

    /// Sums up the rows' contributions, which norms are measured from; otherwise the update does it on its way.
    pub(super) fn sum_rows(&mut self, vars: &Vars) -> Result<()> {
        for (index, grad) in &mut self.0 {
            if let Grad::Rows(rows) = grad {
                rows.sum(vars[*index].var.dtype())?;
            }
        }
        Ok(())
    }

    /// The memory that norms are measured from, with its place. Rows have been [summed](Self::sum_rows).
    pub(super) fn sources(&self, vars: &Vars) -> Vec<(Source<'_>, Place)> {
        let sources = self.0.iter().map(|(index, grad)| match grad {
            Grad::Dense(grad) => (grad.source(), vars[*index].place),
            Grad::Rows(rows) => (Source::Buffer(&rows.sums().values), Place::Host),
        });
        sources.collect()
    }

    /// Whether all of them are measured and used on one GPU.
    pub(super) fn are_on_one_gpu(&self, vars: &Vars) -> bool {
        all_on_one_gpu(self.0.iter().map(|(index, _)| (vars[*index].var.as_tensor(), vars[*index].place)))
    }
}

/// A gradient of some rows, checked and summed up by rows.
pub(super) fn check_sparse<'g>(info: &VarInfo, vars: &Vars, grad: &'g SparseGrad) -> Result<RowGrad<'g>> {
    RowGrad::coalesced(&[Checker { info, vars }.sparse(grad)?], row_len(&info.var))
}

/// The shape that the values of a gradient of some rows have, by the shape of its indices.
pub(super) fn expected_values(info: &VarInfo, grad: &SparseGrad) -> Result<Vec<usize>> {
    let VarInfo { name, var, .. } = info;
    rows_of(name, var)?;
    let (expected, got) = (vec![grad.indices.elem_count()], grad.indices.dims().to_vec());
    if expected != got {
        return Err(ErrorKind::ShapeMismatch { what: "indices", name: name.clone(), expected, got }.into());
    }
    Ok([&expected, &var.dims()[1..]].concat())
}

/// Checks the gradients of one variable.
struct Checker<'p> {
    info: &'p VarInfo,
    vars: &'p Vars,
}

impl Checker<'_> {
    fn check<'g>(&self, found: Found<'g>) -> Result<Option<Grad<'g>>> {
        let Found { dense, touched, lookups, sparse } = found;
        let mut dense = dense.map(|grad| self.dense(grad)).transpose()?;
        let var = &self.info.var;
        if lookups.is_empty() && sparse.is_none() && touched.is_none() {
            return Ok(dense.map(|grad| Grad::Dense(DenseGrad::Call(grad))));
        }
        let mut parts = Vec::with_capacity(lookups.len() + 1);
        for LookupGrad { grad, lookup_ids } in lookups {
            lookup_ids.check()?;
            let values = self.tensor("gradient", grad)?;
            parts.push(LookupGrad { grad: self.where_summed(values)?, lookup_ids });
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
        let rows = match self.info.place {
            Place::Cuda => {
                total(&parts)?;
                RowGrad { row_len: row_len(var), values: RowValues::Unsorted(parts) }
            }
            Place::Host | Place::Device => RowGrad::coalesced(&parts, row_len(var))?,
        };
        Ok(Some(match dense {
            None => Grad::Rows(Box::new(rows)),
            // A weight that is used both ways gets the sum of both, and that has all rows.
            Some(grad) => {
                let sum = densify(Some(&grad), &rows, 1.0, var)?.to_device(var.device())?;
                Grad::Dense(DenseGrad::Call(Cow::Owned(sum)))
            }
        }))
    }

    /// A gradient in the shape of the variable.
    fn dense<'g>(&self, grad: &'g Tensor) -> Result<Cow<'g, Tensor>> {
        let (var, name) = (&self.info.var, || self.info.name.clone());
        if grad.shape() != var.shape() {
            let (expected, got) = (var.dims().to_vec(), grad.dims().to_vec());
            return Err(ErrorKind::ShapeMismatch { what: "gradient", name: name(), expected, got }.into());
        }
        self.tensor("gradient", Cow::Borrowed(grad))
    }

    /// A gradient of some rows, as a caller gave it.
    fn sparse<'g>(&self, grad: &'g SparseGrad) -> Result<LookupGrad<'g>> {
        let (SparseGrad { indices, values }, var) = (grad, &self.info.var);
        let rows = rows_of(&self.info.name, var)?;
        let expected = expected_values(self.info, grad)?;
        if values.dims() != expected {
            let got = values.dims().to_vec();
            return Err(ErrorKind::ShapeMismatch { what: "values", name: self.info.name.clone(), expected, got }.into());
        }
        let ids = read_ids(IdsOf { what: "indices", of: &self.info.name }, indices, rows)?;
        let grad = self.tensor("values", Cow::Borrowed(values))?;
        Ok(LookupGrad {
            grad: self.where_summed(grad)?,
            lookup_ids: Arc::new(LookupIds::Host(HostIds::new(ids, None, None))),
        })
    }

    /// Some rows of a gradient in the shape of the variable, where they are.
    fn touched<'g>(&self, touched: TouchedRows<'_>, grad: Cow<'g, Tensor>) -> Result<LookupGrad<'g>> {
        let rows = match touched {
            TouchedRows::NonZero => {
                rows_of(&self.info.name, &grad)?;
                nonzero(&grad)?
            }
            TouchedRows::Ids(ids) => {
                let what = IdsOf { what: "touched rows", of: &self.info.name };
                let mut rows = read_ids(what, ids, rows_of(&self.info.name, &grad)?)?;
                rows.sort_unstable();
                rows.dedup();
                rows
            }
        };
        let lookup_ids = Arc::new(LookupIds::Host(HostIds::new(rows.clone(), Some(rows), None)));
        Ok(LookupGrad { grad: self.where_summed(grad)?, lookup_ids })
    }

    /// Rows are summed where a kernel does it, and in host memory for tensor operations.
    fn where_summed<'g>(&self, grad: Cow<'g, Tensor>) -> Result<Cow<'g, Tensor>> {
        Ok(match self.info.place {
            Place::Device => Cow::Owned(grad.to_device(&Device::Cpu)?),
            Place::Host | Place::Cuda => grad,
        })
    }

    /// Checks that hold for every tensor of gradients. Returns it contiguous.
    fn tensor<'g>(&self, what: &'static str, grad: Cow<'g, Tensor>) -> Result<Cow<'g, Tensor>> {
        let (var, name) = (&self.info.var, || self.info.name.clone());
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
        if let Some(owner) = self.vars.owner_of(storage_address(&grad)) {
            return Err(ErrorKind::SharedStorage { name: name(), owner: owner.clone() }.into());
        }
        // candle's own gradients are contiguous; those that a caller made need not be.
        Ok(if grad.is_contiguous() { grad } else { Cow::Owned(grad.contiguous()?) })
    }
}
