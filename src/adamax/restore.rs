//! State out of a snapshot or a file, into an optimizer: checked as a whole, then taken.

use std::path::Path;

use candle_core::Tensor;

use super::Adamax;
use super::fit::{check_values, impossible_missed};
use super::grads::check_sparse;
use super::outcome::{History, Report};
use super::progress::Progress;
use super::settings::ResolvedGroup;
use super::state::StateCell;
use super::sums::{GradSum, Sum};
use super::vars::{Param, VarInfo};
use crate::checkpoint::{AccumulatedGrad, MissedUpdates, Snapshot, VarSnapshot, names, native};
use crate::error::Result;
use crate::gradient::SparseGrad;
use crate::gradient::sparse::RowSum;
use crate::params::ParamsAdamax;
use crate::rounding::derive;
use crate::state::{Buffer, Master, MomentTensors, Moments, ParamState, Units};
use crate::table::exact::{Owner, RestoredLedger};

impl Adamax {
    /// Takes all state from a snapshot, its settings included: the learning rate and everything else are as they were
    /// when it was taken. A learning rate that comes from outside (a tensor or a schedule of the caller's) stays this
    /// optimizer's own where both have one.
    ///
    /// # Errors
    ///
    /// A variable or group that is missing, surplus or of another shape, dtype or group; another convention for
    /// epsilon or the counters than this optimizer's. Nothing has changed then.
    /// [`restore_matching`](Self::restore_matching) takes what fits.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let names: Vec<_> = snapshot.vars.keys().map(String::as_str).collect();
        let restored = names::check(&self.names().collect::<Vec<_>>(), &names, names::Source::Snapshot);
        restored.and_then(|()| self.try_restore(snapshot)).map_err(|error| self.own(error))
    }

    /// Takes all state from a file that [`save`](Self::save) wrote, as [`restore`](Self::restore) does. The next steps
    /// then have the bits that they would have had after saving, without the interruption.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore), and a file that is missing, truncated or not such a checkpoint.
    /// [`load_matching`](Self::load_matching) takes what fits.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        let path = path.as_ref();
        let names: Vec<_> = self.names().collect();
        let snapshot = native::read(path, Some(&names), |outline| self.check(outline).map(drop));
        let loaded = snapshot.and_then(|snapshot| self.try_restore(&snapshot));
        loaded.map_err(|error| self.own(error.in_file(path)))
    }

    /// Takes all state from a snapshot. A variable that is not in it begins anew.
    pub(super) fn try_restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.sync()?;
        let (params, groups, resolved) = self.check(snapshot)?;
        let Snapshot { counters, grad_scaler, plateau, vars, .. } = snapshot;
        let restored = self.vars.iter().map(|param| {
            let (info, group) = (&param.info, &resolved[param.group]);
            match vars.get(&info.name) {
                Some(snapshot) => self.restore_var(param, group, &params, snapshot),
                None => {
                    let (layout, rounding) = (group.layout(&info.var, Units::Blocks), group.storage.rounding);
                    let state = ParamState::zeros(&info.var, info.place, &layout, rounding)?;
                    Ok(RestoredVar { state, missed: None, sum: GradSum::default(), average: None })
                }
            }
        });
        let restored = restored.collect::<Result<Vec<_>>>()?;
        for (index, RestoredVar { state, missed, sum, average }) in restored.into_iter().enumerate() {
            // Rows do not catch up: the weights are those of the snapshot, or will be.
            let param = &mut self.vars[index];
            if let StateCell::Table(table) = &param.state {
                table.forget();
            }
            param.history = match (state.step > 0 || sum.calls > 0, counters.calls) {
                (true, _) => History::Trained,
                (false, 0) => History::New,
                (false, _) => History::Untrained,
            };
            param.info.decays = params.decays(&param.name);
            (param.sum, param.average) = (sum, average);
            match (missed, &param.state) {
                (None, _) => param.state = StateCell::Own(state),
                (Some(RestoredTable { missed, .. }), StateCell::Table(table)) => table.restore(state, missed),
                (Some(RestoredTable { missed, owner: Some(owner) }), StateCell::Own(_)) => {
                    owner.restore(state, missed);
                    param.state = StateCell::Table(owner);
                }
                (Some(RestoredTable { owner: None, .. }), StateCell::Own(_)) => unreachable!("made for this state"),
            }
        }
        (self.params, self.groups, self.resolved) = (params, groups, resolved);
        self.progress = Progress { counters: *counters, scaler: *grad_scaler, in_flight: None };
        self.plateau = *plateau;
        self.report = Report::default();
        Ok(())
    }

    /// The state of a variable whose snapshot has been [checked](Self::check_var).
    fn restore_var(
        &self,
        param: &Param,
        resolved: &ResolvedGroup,
        params: &ParamsAdamax,
        snapshot: &VarSnapshot,
    ) -> Result<RestoredVar> {
        let info = &param.info;
        let VarInfo { name, place, var, .. } = info;
        let buffer = |tensor: &Tensor| Buffer::from_tensor(tensor, var, *place);
        let layout = resolved.layout(var, snapshot.units());
        check_values(name, snapshot)?;
        let tensors = MomentTensors {
            exp_avg: snapshot.exp_avg.clone(),
            exp_inf: snapshot.exp_inf.clone(),
            scales: snapshot.scales.clone(),
        };
        let master = snapshot.master.as_ref().map(|master| Master::from_tensor(master, var, *place));
        let state = ParamState {
            moments: Moments::from_stored(&tensors, var, *place, &layout)?,
            master: master.transpose()?,
            step: snapshot.step,
        };
        let missed = match &snapshot.missed {
            None => None,
            Some(missed) => Some(self.restore_missed(param, resolved, (params, &state, missed))?),
        };
        let average = snapshot.ema.as_ref().map(buffer).transpose()?;
        let sum = match &snapshot.accumulated {
            Some((sum, calls)) if *calls > 0 => {
                let sum = match sum {
                    AccumulatedGrad::Dense(sum) => Sum::Dense(buffer(sum)?),
                    AccumulatedGrad::Rows(sum) => Sum::Rows(self.restore_rows(info, sum)?),
                };
                GradSum { calls: *calls, sum: Some(sum) }
            }
            // The sum of no calls counts for nothing, whatever is in it.
            _ => GradSum::default(),
        };
        // An average begins with the first update.
        Ok(RestoredVar { state, missed, sum, average: average.filter(|_| snapshot.step > 0) })
    }

    fn restore_missed(
        &self,
        param: &Param,
        resolved: &ResolvedGroup,
        (params, state, missed): (&ParamsAdamax, &ParamState, &MissedUpdates),
    ) -> Result<RestoredTable> {
        let Param { info: VarInfo { name, var, key, .. }, state: cell, .. } = param;
        let hyper = if params.decays(name) { &resolved.hyper } else { &resolved.spared };
        let Some(missed) = RestoredLedger::of(missed, hyper)? else { return Err(impossible_missed(name)) };
        let owner = match cell {
            StateCell::Table(_) => None,
            StateCell::Own(_) => {
                Some(Owner::new(var, state, hyper, resolved.storage.rounding, derive(params.seed, *key))?)
            }
        };
        Ok(RestoredTable { missed, owner })
    }

    fn restore_rows(&self, info: &VarInfo, sum: &SparseGrad) -> Result<RowSum> {
        let rows = check_sparse(info, &self.vars, sum)?;
        Ok(RowSum::new(rows.row_len, rows.summed(info.var.dtype())?))
    }
}

/// Missed updates, and the table that takes them, unless there is one.
struct RestoredTable {
    missed: RestoredLedger,
    owner: Option<Owner>,
}

/// All that a snapshot has for one variable.
struct RestoredVar {
    state: ParamState,
    missed: Option<RestoredTable>,
    sum: GradSum,
    average: Option<Buffer>,
}
