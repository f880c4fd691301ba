//! Tables of an optimizer: steps of some rows, rows that begin anew, and rows that are added.

use std::collections::VecDeque;
use std::sync::PoisonError;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId, Var};
use candle_nn::VarMap;

use super::collect::Found;
use super::held::Held;
use super::{Adamax, Sum};
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::TouchedRows;
use crate::gradient::sparse::{self, IDS, read_ids, row_len, rows_of};
use crate::kernel::lend::storage_address;
use crate::maps::IdMap;
use crate::state::{Buffer, ParamState};
use crate::table::{self, Lookups};

/// The variables that [`Adamax::append_rows`] has replaced: their ids and their names, not their memory.
///
/// A layer that still holds one of them would train nothing, so that its gradients are errors. The oldest ones are
/// forgotten, which bounds what a step looks for.
#[derive(Default)]
pub(super) struct Replaced(VecDeque<(TensorId, String)>);

/// So many are remembered.
const REPLACED: usize = 256;

impl Replaced {
    fn push(&mut self, id: TensorId, name: String) {
        if self.0.len() == REPLACED {
            self.0.pop_front();
        }
        self.0.push_back((id, name));
    }

    /// Forgets those of a name that is gone, or that stands for another variable now.
    pub(super) fn forget_name(&mut self, name: &str) {
        self.0.retain(|(_, of)| of != name);
    }

    /// Forgets a variable that is the optimizer's own again.
    pub(super) fn forget_id(&mut self, id: TensorId) {
        self.0.retain(|(known, _)| *known != id);
    }

    /// The name of the first one of which that is true.
    fn find(&self, is_used: impl Fn(TensorId) -> bool) -> Option<&str> {
        self.0.iter().find(|(id, _)| is_used(*id)).map(|(_, name)| name.as_str())
    }
}

impl Adamax {
    /// A call of [`step`](candle_nn::Optimizer::step) for models that keep `candle_nn`'s `Embedding`, whose gradients are
    /// as large as their tables: of the variables listed, only these rows of the gradient are used, and only they and
    /// their moments change.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, TouchedRows};
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_nn::{Embedding, Module};
    ///
    /// let weight = Var::ones((1000, 4), DType::F32, &Device::Cpu)?;
    /// let layer = Embedding::new(weight.as_tensor().clone(), 4);
    /// let mut optimizer = Adamax::from_named([("weight", weight.clone())], ParamsAdamax::default())?;
    ///
    /// let ids = Tensor::new(&[3u32, 5, 3], &Device::Cpu)?;
    /// let grads = layer.forward(&ids)?.sum_all()?.backward()?;
    /// optimizer.step_rows(&grads, [(&weight, TouchedRows::Ids(&ids))])?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`step`](candle_nn::Optimizer::step); a variable that is not the optimizer's or that is listed twice; an id
    /// that is not the number of a row.
    pub fn step_rows<'a>(
        &mut self,
        grads: &GradStore,
        rows: impl IntoIterator<Item = (&'a Var, TouchedRows<'a>)>,
    ) -> Result<()> {
        let (owned, mut touched) = (self.names_by_id(), IdMap::default());
        for (position, (var, rows)) in rows.into_iter().enumerate() {
            let name = *owned.get(&var.id()).ok_or_else(|| self.not_owned(position, var))?;
            if touched.insert(var.id(), rows).is_some() {
                return Err(self.own(ErrorKind::DuplicateGradient(name.to_owned()).into()));
            }
        }
        self.step_found(grads, |var| touched.get(&var.id()).copied())
    }

    /// Lets rows of the variable `name` begin anew: their moments become zero, their masters
    /// ([`Rounding::Master`](crate::Rounding::Master)) become the weights as they are, and gradients that are accumulated
    /// for them are dropped. For an id that is given to a new item; [`Table::set_rows`](crate::Table::set_rows) sets the
    /// weights.
    ///
    /// # Errors
    ///
    /// No variable has this name; an id that is not the number of a row. Nothing has changed then.
    pub fn reset_rows(&mut self, name: &str, ids: &Tensor) -> Result<()> {
        let index = self.index_of(name)?;
        self.settle(true).map_err(|error| self.own(error))?;
        let param = &mut self.vars[index];
        let rows = rows_of(&param.name, &param.var).and_then(|rows| read_ids(IDS, ids, rows));
        let mut rows = match rows {
            Ok(rows) => rows,
            Err(error) => return Err(self.own(error)),
        };
        rows.sort_unstable();
        rows.dedup();
        let len = row_len(&param.var);
        let mut state = param.state.get_mut();
        state.pay(&rows)?;
        state.moments.clear_rows(&rows, len)?;
        if let Some(master) = &state.master {
            master.clear_rows(&rows);
        }
        drop(state);
        match param.accumulated.as_mut().map(|accumulated| &mut accumulated.sum) {
            Some(Sum::Dense(sum)) => sum.clear_rows(&rows, len)?,
            Some(Sum::Rows(sum)) => sum.remove(&rows),
            None => {}
        }
        Ok(())
    }

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
    /// assert_eq!(items.embeddings().dims(), [15, 4]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No variable has this name; rows of another shape, dtype or device; more than 4,294,967,295 rows in all.
    /// Nothing has changed then.
    pub fn append_rows(&mut self, name: &str, rows: &Tensor) -> Result<Var> {
        let index = self.index_of(name)?;
        self.settle(true).map_err(|error| self.own(error))?;
        let (var, param, address) = self.grown(index, rows).map_err(|error| self.own(error))?;
        let old = std::mem::replace(&mut *self.vars[index], param);
        self.storages.remove(&storage_address(&old.var));
        self.storages.insert(address, old.name.clone());
        self.replaced.push(old.var.id(), old.name);
        Ok(var)
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
    /// assert_eq!(items.embeddings().dims(), [15, 4]);
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

    fn grown(&self, index: usize, rows: &Tensor) -> Result<(Var, super::Param, usize)> {
        let param = &self.vars[index];
        let (old, name) = (&param.var, || param.name.clone());
        let before = rows_of(&param.name, old)?;
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
        let mut dims = expected;
        dims[0] += before;
        if u32::try_from(dims[0]).is_err() {
            return Err(crate::Error::invalid("rows", "at most 4294967295 rows in all", dims[0]));
        }
        param.state.pay_all()?;
        table::limits::scale_down(old)?;
        let var = Var::zeros(dims, old.dtype(), old.device())?;
        if old.elem_count() > 0 {
            var.slice_set(&old.detach(), 0, 0)?;
        }
        if rows.elem_count() > 0 {
            var.slice_set(&rows.detach().contiguous()?, 0, before)?;
        }
        let before = param.state.get();
        let state = Held::Own(ParamState {
            moments: before.moments.grown(&var)?,
            master: before.master.as_ref().map(|master| master.grown(&var)).transpose()?,
            step: before.step,
        });
        drop(before);
        let accumulated = match &param.accumulated {
            None => None,
            Some(accumulated) => Some(super::Accumulated {
                sum: match &accumulated.sum {
                    Sum::Dense(sum) => Sum::Dense(sum.grown(&var)?),
                    Sum::Rows(sum) => Sum::Rows(sparse::accumulate(None, sum, 1.0, old.dtype())?),
                },
                calls: accumulated.calls,
            }),
        };
        // An average begins as a copy of the weights.
        let ema = match &param.ema {
            None => None,
            Some(ema) => {
                let old = ema.to_tensor(old.shape())?;
                let rows = rows.to_device(old.device())?.to_dtype(old.dtype())?;
                Some(Buffer::from_tensor(&Tensor::cat(&[old, rows], 0)?, &var, param.place())?)
            }
        };
        let super::Param { unnamed, group, decays, key, history, .. } = **param;
        let address = storage_address(&var);
        let (name, var) = (name(), var.clone());
        let grown =
            super::Param { name, unnamed, group, decays, key, var: var.clone(), state, accumulated, ema, history };
        Ok((var, grown, address))
    }

    /// The names of all variables, for calls that are given some of them.
    pub(super) fn names_by_id(&self) -> IdMap<TensorId, &str> {
        self.vars.iter().map(|param| (param.var.id(), param.name.as_str())).collect()
    }

    /// The error of a variable in a list that is not the optimizer's.
    pub(super) fn not_owned(&self, position: usize, var: &Var) -> Error {
        self.own(match self.replaced.find(|id| id == var.id()) {
            Some(name) => replaced("a pair", name),
            None => ErrorKind::UnknownPair { position, shape: var.dims().to_vec() }.into(),
        })
    }

    /// A call with the gradients of a `GradStore`: those of variables, and those of lookups in them.
    pub(super) fn step_found<'g>(
        &mut self,
        grads: &'g GradStore,
        touched: impl Fn(&Tensor) -> Option<TouchedRows<'g>>,
    ) -> Result<()> {
        let mut lookups = self.lookups(grads)?;
        let has_gradient = |id| grads.get_id(id).is_some() || lookups.has(id);
        if let Some(name) = self.replaced.find(has_gradient) {
            return Err(self.own(replaced("a layer with a gradient", name)));
        }
        self.call(|param| {
            let lookups = lookups.take(param.var.id());
            Found { dense: grads.get(&param.var), touched: touched(&param.var), lookups, sparse: None }
        })
    }

    /// The gradients of lookups in the variables.
    pub(super) fn lookups<'g>(&self, grads: &'g GradStore) -> Result<Lookups<'g>> {
        let lookups = table::find(grads);
        let checked = lookups.check(self.vars.iter().map(|param| param.var.id()));
        checked.map_err(|error| self.own(error))?;
        Ok(lookups)
    }
}

fn replaced(holder: &'static str, name: &str) -> Error {
    ErrorKind::ReplacedVar { holder, name: name.to_owned() }.into()
}
