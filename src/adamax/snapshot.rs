//! All state as plain data, out of an optimizer and into a file; and one variable's state, to look at.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::Adamax;
use super::progress::Progress;
use super::sums::Sum;
use super::vars::Param;
use crate::checkpoint::{self, AccumulatedGrad, AtomicFile, Snapshot, VarSnapshot};
use crate::error::{ErrorKind, Result};
use crate::gradient::sparse::to_sparse;
use crate::state::{MomentTensors, ParamState, Units};

/// The state of one variable: copies, in host memory, in the shape of the variable; f64 for f64 variables, else f32.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct State {
    /// m, the first moment.
    pub exp_avg: Tensor,
    /// u, the exponentially weighted infinity norm.
    pub exp_inf: Tensor,
    /// How many updates the variable has had.
    pub step: u64,
    /// The moving average of the variable, if one is kept and has begun.
    pub ema: Option<Tensor>,
    /// The sum of the unscaled gradients since the last update, if there are any.
    pub accumulated: Option<AccumulatedGrad>,
    /// The bytes that moments and master take as they are stored: [`Adamax::state_bytes`].
    pub bytes: usize,
}

impl Adamax {
    /// The state of the variable `name`. With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) copies of its rows catch
    /// up, and on a GPU the rows themselves: in host memory looking changes no bit of the run.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn state(&self, name: &str) -> Result<State> {
        let index = self.index_of(name)?;
        let param = &self.vars[index];
        let (exp_avg, exp_inf) = param.state.moments(&param.var)?;
        let (ema, accumulated) = (self.average(index)?, self.waiting(index)?.map(|(sum, _)| sum));
        let bytes = param.state.read(ParamState::bytes);
        Ok(State { exp_avg, exp_inf, step: self.step_of(index), ema, accumulated, bytes })
    }

    /// The bytes that moments and masters of the variable `name` take as they are stored, once all of them have been
    /// written; averages and accumulated gradients are not counted.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn state_bytes(&self, name: &str) -> Result<usize> {
        Ok(self.vars[self.index_of(name)?].state.read(ParamState::bytes))
    }

    /// All state as plain data: settings, counters, moments. Nothing is shared with the optimizer; the variables
    /// themselves are not in it.
    ///
    /// It changes no bit of the run. With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) the updates that rows have
    /// missed are in it, so the weights of the same moment belong to it. (Rows that a layer with
    /// [`max_norm`](crate::Embedding::max_norm) has looked up are scaled now, and not by the next step; on a GPU rows catch
    /// up.)
    ///
    /// # Errors
    ///
    /// A device whose memory cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let Progress { counters, scaler, .. } = self.resolved();
        // A run that goes on from here has to find the weights as they are at the next step.
        self.scale_down()?;
        let vars = (0..self.vars.len()).map(|index| Ok((self.vars[index].name.clone(), self.var_snapshot(index)?)));
        Ok(Snapshot {
            params: self.params.clone(),
            groups: self.groups.clone(),
            counters,
            grad_scaler: scaler,
            plateau: self.plateau,
            vars: vars.collect::<Result<BTreeMap<_, _>>>()?,
        })
    }

    /// Writes all state to a safetensors file, keyed by the variables' names, in a format that is described in the
    /// [guide](crate::guide::resume). The weights are not in it: `VarMap::save` writes them, before or afterwards. With
    /// [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) they are weights whose rows have missed updates, which this file
    /// has; call [`catch_up`](Self::catch_up) before weights are saved to be used without it.
    ///
    /// The file is complete or it is not there: it is written beside `path`, synced and renamed. Its mode is 666 less the
    /// umask, or that of the file that it replaces; a symbolic link is followed. The [guide](crate::guide::resume) says
    /// more.
    ///
    /// # Errors
    ///
    /// Variables that were given without names, by which another process could not know them; settings of more than a
    /// mebibyte, or of more than some 65,000 values; the system's errors.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        let write = || {
            checkpoint::native::check_settings(&self.params, &self.groups)?;
            let file = AtomicFile::create(path.as_ref())?;
            checkpoint::native::write(&self.snapshot()?, file)
        };
        write().map_err(|error| self.own(error))
    }

    pub(super) fn require_names(&self) -> Result<()> {
        match self.vars.iter().find_map(|info| info.unnamed) {
            Some(position) => Err(self.own(ErrorKind::UnnamedVar(position).into())),
            None => Ok(()),
        }
    }

    fn var_snapshot(&self, index: usize) -> Result<VarSnapshot> {
        let Param { info, state: cell, .. } = &*self.vars[index];
        let missed = cell.missed()?;
        let shape = info.var.shape();
        let (MomentTensors { exp_avg, exp_inf, scales }, master, by_rows) = cell.read(|state| {
            let master = state.master.as_ref().map(|master| master.to_tensor(shape)).transpose()?;
            Ok::<_, crate::error::Error>((
                state.moments.to_stored(shape)?,
                master,
                state.moments.layout.units == Units::Rows,
            ))
        })?;
        let (group, step) = (self.groups[info.group].name.clone(), self.step_of(index));
        let (ema, accumulated) = (self.average(index)?, self.waiting(index)?);
        Ok(VarSnapshot { group, step, exp_avg, exp_inf, scales, by_rows, master, ema, accumulated, missed })
    }

    /// The moving average of a variable.
    pub(super) fn average(&self, index: usize) -> Result<Option<Tensor>> {
        let Param { info, average, .. } = &*self.vars[index];
        average.as_ref().map(|average| average.to_tensor(info.var.shape())).transpose()
    }

    /// The sum of the gradients of a variable that wait, with the number of their calls.
    fn waiting(&self, index: usize) -> Result<Option<(AccumulatedGrad, u64)>> {
        let (sum, var) = (&self.vars[index].sum, &self.vars[index].var);
        Ok(match sum.get() {
            Some(Sum::Dense(buffer)) => Some((AccumulatedGrad::Dense(buffer.to_tensor(var.shape())?), sum.calls)),
            Some(Sum::Rows(rows)) => Some((AccumulatedGrad::Rows(to_sparse(rows.merged(), var)?), sum.calls)),
            None => None,
        })
    }
}
