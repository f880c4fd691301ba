//! Rows that are added at the end of a variable.

use std::sync::PoisonError;

use candle_core::{Tensor, Var};
use candle_nn::VarMap;

use super::Adamax;
use super::state::StateCell;
use super::sums::Sum;
use super::vars::{Param, VarInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::sparse::RowSum;
use crate::ids::{row_len, rows_of};
use crate::state::{Buffer, ParamState};
use crate::table::limits;

impl Adamax {
    /// Adds rows at the end of the variable `name`: a new variable takes its place, which has the old rows with their
    /// moments, then `rows`, `[n, ..]`, with moments of zero. It is returned, for the layers and the `VarMap`, which
    /// still have the old one: give it to both ([`append_rows_in`](Self::append_rows_in) gives it to the `VarMap`). A step
    /// with a gradient of the old one is an error. The optimizer does not know the `VarMap`: while that has the old one,
    /// `VarMap::save` writes the weights as they were before, beside an optimizer's state that fits the new ones, and
    /// only `VarMap::load` will say so.
    ///
    /// ```
    /// use candle_adamax::{Adamax, Embedding, ParamsAdamax, embedding};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let varmap = VarMap::new();
    /// let mut items = embedding(10, 4, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    /// let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
    ///
    /// let grown = optimizer.append_rows("weight", &Tensor::zeros((5, 4), DType::F32, &Device::Cpu)?)?;
    /// items = Embedding::new(grown.as_tensor().clone())?;
    /// varmap.data().lock().unwrap().insert("weight".into(), grown);
    /// assert_eq!(items.embeddings()?.dims(), [15, 4]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No variable has this name; rows of another shape, dtype or device; more than 4,294,967,295 rows in all.
    /// Nothing has changed then.
    pub fn append_rows(&mut self, name: &str, rows: &Tensor) -> Result<Var> {
        self.named(|adamax| {
            let index = adamax.index_of(name)?;
            adamax.sync()?;
            let Grown { var, state, sum, average } = adamax.grown(index, rows)?;
            let param = &mut adamax.vars[index];
            (param.state, param.sum.sum, param.average) = (StateCell::Own(state), sum, average);
            adamax.vars.replace(index, var.clone());
            Ok(var)
        })
    }

    /// [`append_rows`](Self::append_rows), with the new variable put into the `VarMap` that the variable came from. Layers
    /// are still to be given it, or to be made anew from the `VarMap`.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, embedding};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let varmap = VarMap::new();
    /// let layer = |rows: usize| embedding(rows, 4, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu));
    /// let mut items = layer(10)?;
    /// let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
    ///
    /// optimizer.append_rows_in(&varmap, "weight", &Tensor::zeros((5, 4), DType::F32, &Device::Cpu)?)?;
    /// items = layer(15)?;
    /// assert_eq!(items.embeddings()?.dims(), [15, 4]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`append_rows`](Self::append_rows); the `VarMap` has another variable under this name, or none. Nothing has
    /// changed then.
    pub fn append_rows_in(&mut self, varmap: &VarMap, name: &str, rows: &Tensor) -> Result<Var> {
        let index = self.index_of(name)?;
        let mut vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
        match vars.get_mut(name) {
            Some(var) if var.id() == self.vars[index].var.id() => {
                *var = self.append_rows(name, rows)?;
                Ok(var.clone())
            }
            var => {
                let got = if var.is_some() { "another one" } else { "none" };
                let expected = format!("a `VarMap` that has the optimizer's var under `{name}`");
                Err(self.own(Error::invalid("varmap", expected, got)))
            }
        }
    }

    fn grown(&self, index: usize, rows: &Tensor) -> Result<Grown> {
        let Param { info, state: cell, sum, average, .. } = &*self.vars[index];
        let var = grown_shape(info, rows)?;
        let (old, before) = (&info.var, info.var.dims()[0]);
        cell.catch_up()?;
        limits::scale_down(old)?;
        let var = Var::zeros(var, old.dtype(), old.device())?;
        if old.elem_count() > 0 {
            var.slice_set(&old.detach(), 0, 0)?;
        }
        if rows.elem_count() > 0 {
            var.slice_set(&rows.detach().contiguous()?, 0, before)?;
        }
        let state = cell.read(|state| {
            let master = state.master.as_ref().map(|master| master.grown(&var)).transpose()?;
            Ok::<_, Error>(ParamState { moments: state.moments.grown(&var)?, master, step: state.step })
        })?;
        let sum = match &sum.sum {
            None => None,
            Some(Sum::Dense(sum)) => Some(Sum::Dense(sum.grown(&var)?)),
            Some(Sum::Rows(sum)) => Some(Sum::Rows(RowSum::new(row_len(&var), sum.merged()))),
        };
        // An average begins as a copy of the weights.
        let average = match average {
            None => None,
            Some(average) => {
                let old = average.to_tensor(old.shape())?;
                let rows = rows.to_device(old.device())?.to_dtype(old.dtype())?;
                Some(Buffer::from_tensor(&Tensor::cat(&[old, rows], 0)?, &var, info.place)?)
            }
        };
        Ok(Grown { var, state, sum, average })
    }
}

/// A variable with more rows, and all that is kept for it.
struct Grown {
    var: Var,
    state: ParamState,
    sum: Option<Sum>,
    average: Option<Buffer>,
}

/// The shape of a variable with these rows at its end.
fn grown_shape(info: &VarInfo, rows: &Tensor) -> Result<Vec<usize>> {
    let (old, name) = (&info.var, || info.name.clone());
    let before = rows_of(&info.name, old)?;
    let mut expected = old.dims().to_vec();
    expected[0] = rows.dims().first().copied().unwrap_or(1);
    if rows.dims() != expected {
        let got = rows.dims().to_vec();
        return Err(ErrorKind::ShapeMismatch { what: "rows", name: name(), expected, got }.into());
    }
    if rows.dtype() != old.dtype() {
        let expected = format!("{:?}", old.dtype());
        return Err(ErrorKind::DTypeMismatch { what: "rows", name: name(), expected, got: rows.dtype() }.into());
    }
    if !rows.device().same_device(old.device()) {
        let (expected, got) = (old.device().location(), rows.device().location());
        return Err(ErrorKind::DeviceMismatch { what: "rows", name: name(), expected, got }.into());
    }
    expected[0] += before;
    match u32::try_from(expected[0]) {
        Ok(_) => Ok(expected),
        Err(_) => Err(Error::invalid("rows", "at most 4294967295 rows in all", expected[0])),
    }
}
