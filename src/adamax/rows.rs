//! Rows of tables: steps of some rows, and rows that begin anew.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::grads::Found;
use super::sums::Sum;
use super::vars::Param;
use super::{Adamax, StepReport};
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::TouchedRows;
use crate::ids::{IDS, read_ids, row_len, rows_of};
use crate::maps::IdMap;
use crate::table::{self, Lookups, Table};

impl Adamax {
    /// A call of [`step`](Self::step) for models that keep `candle_nn`'s `Embedding`, whose gradients are
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
    /// As [`step`](Self::step); a variable that is not the optimizer's or that is listed twice; an id
    /// that is not the number of a row.
    pub fn step_rows<'a>(
        &mut self,
        grads: &GradStore,
        rows: impl IntoIterator<Item = (&'a Var, TouchedRows<'a>)>,
    ) -> Result<StepReport<'_>> {
        let (owned, mut touched) = (self.vars.names_by_id(), IdMap::default());
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
        self.named(|adamax| {
            let index = adamax.index_of(name)?;
            adamax.sync()?;
            let Param { info, state, sum, .. } = &mut *adamax.vars[index];
            let var = info.var.as_tensor();
            let mut rows = read_ids(IDS, ids, rows_of(name, var)?)?;
            rows.sort_unstable();
            rows.dedup();
            let len = row_len(var);
            let mut state = state.lock();
            state.catch_up_rows(&rows)?;
            state.moments.clear_rows(&rows, len)?;
            if let Some(master) = &state.master {
                master.clear_rows(&rows);
            }
            drop(state);
            match &mut sum.sum {
                Some(Sum::Dense(sum)) => sum.clear_rows(&rows, len)?,
                Some(Sum::Rows(sum)) => sum.remove(&rows),
                None => {}
            }
            Ok(())
        })
    }

    /// Gives rows of the variable `name` new weights, and lets them begin anew, as [`reset_rows`](Self::reset_rows) does: for
    /// ids that are given to other items.
    ///
    /// ```
    /// use candle_adamax::{Adamax, Embedding, ParamsAdamax};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// let items = Var::ones((10, 2), DType::F32, &Device::Cpu)?;
    /// let layer = Embedding::new(items.as_tensor().clone())?;
    /// let mut optimizer = Adamax::from_named([("items", items.clone())], ParamsAdamax::default())?;
    /// let ids = Tensor::new(&[3u32, 7], &Device::Cpu)?;
    /// optimizer.backward_step(&layer.lookup(&ids)?.sum_all()?)?;
    ///
    /// optimizer.replace_rows("items", &ids, &Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?)?;
    /// assert_eq!(layer.lookup(&ids)?.to_vec2::<f32>()?, [[0.0; 2]; 2]);
    /// assert_eq!(optimizer.state("items")?.exp_avg.max_all()?.to_scalar::<f32>()?, 0.0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`reset_rows`](Self::reset_rows) and [`Table::set_rows`](crate::Table::set_rows). Nothing has changed then.
    pub fn replace_rows(&mut self, name: &str, ids: &Tensor, values: &Tensor) -> Result<()> {
        let var = self.vars[self.index_of(name)?].var.clone();
        self.named(|adamax| {
            adamax.sync()?;
            Table::new(&var)?.set_rows(ids, values)?;
            adamax.reset_rows(name, ids)
        })
    }

    /// The error of a variable in a list that is not the optimizer's.
    pub(super) fn not_owned(&self, position: usize, var: &Var) -> Error {
        self.own(match self.vars.replaced.find(|id| id == var.id()) {
            Some(name) => replaced("a pair", name),
            None => ErrorKind::UnknownPair { position, shape: var.dims().to_vec() }.into(),
        })
    }

    /// A call with the gradients of a `GradStore`: those of variables, and those of lookups in them.
    pub(super) fn step_found<'g>(
        &mut self,
        grads: &'g GradStore,
        touched: impl Fn(&Tensor) -> Option<TouchedRows<'g>>,
    ) -> Result<StepReport<'_>> {
        let mut lookups = self.lookups(grads)?;
        let has_gradient = |id| grads.get_id(id).is_some() || lookups.has(id);
        if let Some(name) = self.vars.replaced.find(has_gradient) {
            return Err(self.own(replaced("a layer with a gradient", name)));
        }
        self.call(|info| {
            let lookups = lookups.take(info.var.id());
            Found { dense: grads.get(&info.var), touched: touched(&info.var), lookups, sparse: None }
        })
    }

    /// The gradients of lookups in the variables.
    pub(super) fn lookups<'g>(&self, grads: &'g GradStore) -> Result<Lookups<'g>> {
        let lookups = table::find(grads);
        let checked = lookups.check(self.vars.iter().map(|info| info.var.id()));
        checked.map_err(|error| self.own(error))?;
        Ok(lookups)
    }
}

fn replaced(holder: &'static str, name: &str) -> Error {
    ErrorKind::ReplacedVar { holder, name: name.to_owned() }.into()
}
