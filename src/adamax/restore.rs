//! State out of a snapshot or a file, into an optimizer: checked as a whole, then taken.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use super::Adamax;
use super::grads::check_sparse;
use super::progress::Progress;
use super::report::{History, Report};
use super::settings::ResolvedGroup;
use super::state::StateCell;
use super::sums::{GradSum, Sum};
use super::vars::{Param, VarInfo};
use crate::checkpoint::plain::check_norm;
use crate::checkpoint::{self, AccumulatedGrad, Counters, MissedUpdates, Snapshot, VarSnapshot, names};
use crate::codec::{LARGEST_LOG, POINT};
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::SparseGrad;
use crate::gradient::sparse::{RowSum, rows_of};
use crate::group::{GroupLr, GroupSettings};
use crate::params::{ParamsAdamax, SparseUpdate, StateStorage};
use crate::rounding::derive;
use crate::scaler::GradScalerState;
use crate::schedule::{LearningRate, Plateau};
use crate::state::{Buffer, Layout, Master, MomentTensors, Moments, ParamState, Place, arithmetic};
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
        let snapshot = checkpoint::native::read(path, Some(&names), |outline| self.check(outline).map(drop));
        let loaded = snapshot.and_then(|snapshot| self.try_restore(&snapshot));
        loaded.map_err(|error| self.own(error.in_file(path)))
    }

    /// Makes sure that u and the counters are what they are here.
    pub(super) fn check_convention(&self, theirs: &ParamsAdamax) -> Result<()> {
        let convention = |entry: &str, own: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            let (own, theirs) = (format!("{own:?}"), format!("{theirs:?}"));
            if own == theirs {
                Ok(())
            } else {
                Err(Error::checkpoint(entry, format!("this optimizer's convention, {own}"), theirs))
            }
        };
        convention("eps_mode", &self.params.eps_mode, &theirs.eps_mode)?;
        convention("step_count", &self.params.step_count, &theirs.step_count)
    }

    /// The settings that this optimizer has with a snapshot, whose tensors are found to have the shapes and dtypes that
    /// they then need. It looks at no element, so outlines of tensors will do.
    fn check(&self, snapshot: &Snapshot) -> Result<(ParamsAdamax, Vec<GroupSettings>, Vec<ResolvedGroup>)> {
        self.check_convention(&snapshot.params)?;
        let Snapshot { params, groups, counters, grad_scaler, plateau, vars } = snapshot;
        let mut params = params.clone();
        params.lr = merge_lr(&self.params.lr, params.lr);
        params.validate()?;
        check_counters(counters, params.gradient_accumulation_steps)?;
        check_trainer(&params, grad_scaler.as_ref(), plateau.as_ref())?;
        if let (None, Some((name, _))) = (&params.ema, vars.iter().find(|(_, var)| var.ema.is_some())) {
            let expected = "none, since the settings have no `ema`";
            return Err(Error::checkpoint(format!("{name}.ema"), expected, "an average"));
        }
        let groups = self.merge_groups(groups)?;
        let resolved = self.resolve(&params, &groups, self.kernel)?;
        let mut found = self.vars.iter().filter_map(|info| Some((info, vars.get(&info.name)?)));
        found.try_for_each(|(info, var)| self.check_var(info, &resolved[info.group], counters, var))?;
        Ok((params, groups, resolved))
    }

    fn check_var(
        &self,
        info: &VarInfo,
        resolved: &ResolvedGroup,
        counters: &Counters,
        snapshot: &VarSnapshot,
    ) -> Result<()> {
        let VarInfo { name, group, var, .. } = info;
        let group = &self.groups[*group].name;
        if snapshot.group != *group {
            return Err(Error::checkpoint(name, format!("a var of group `{group}`"), format!("`{}`", snapshot.group)));
        }
        let Counters { updates, pending, .. } = *counters;
        if snapshot.step > updates {
            let (entry, expected) = (format!("{name}.step"), format!("at most the {updates} updates of the optimizer"));
            return Err(Error::checkpoint(entry, expected, snapshot.step));
        }
        check_moments(name, snapshot, var, &resolved.layout(var, snapshot.by_rows))?;
        let has_master = Master::is_kept(var.dtype(), resolved.storage.rounding);
        let of_master = has_master.then(|| (Master::dtype(var.dtype()), var.dims().to_vec()));
        check_optional(name, "master", snapshot.master.as_ref(), of_master)?;
        check_extras(info, snapshot)?;
        match &snapshot.accumulated {
            Some((_, calls)) if *calls > pending => {
                let (entry, expected) =
                    (format!("{name}.accumulated"), format!("gradients of at most {pending} calls"));
                Err(Error::checkpoint(entry, expected, calls))
            }
            _ => Ok(()),
        }
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
                    let (layout, rounding) = (group.layout(&info.var, false), group.storage.rounding);
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

    /// The groups of a snapshot, in this optimizer's order and with its learning rates that come from outside.
    fn merge_groups(&self, theirs: &[GroupSettings]) -> Result<Vec<GroupSettings>> {
        let mut by_name = HashMap::new();
        for group in theirs {
            if !self.group_indices.contains_key(&group.name) {
                return Err(Error::checkpoint(format!("groups.{}", group.name), "no such group", "a surplus one"));
            }
            if by_name.insert(group.name.as_str(), group).is_some() {
                return Err(Error::checkpoint(
                    format!("groups.{}", group.name),
                    "one group of this name",
                    "another one",
                ));
            }
        }
        let merged = self.groups.iter().map(|own| {
            let Some(&group) = by_name.get(own.name.as_str()) else {
                return Err(Error::checkpoint(format!("groups.{}", own.name), "a group of this name", "none"));
            };
            let mut group = group.clone();
            group.lr = match (&own.lr, group.lr) {
                (GroupLr::Own(own), GroupLr::Own(theirs)) => GroupLr::Own(merge_lr(own, theirs)),
                (_, theirs) => theirs,
            };
            group.validate()?;
            Ok(group)
        });
        merged.collect()
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
        let layout = resolved.layout(var, snapshot.by_rows);
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
        let Param { info: VarInfo { name, var, place, key, .. }, state: cell, .. } = param;
        let refuse = |expected: &str, got: &str| Err(Error::checkpoint(format!("{name}.missed"), expected, got));
        let StateStorage { sparse_update, rounding, .. } = resolved.storage;
        if sparse_update != SparseUpdate::Exact {
            return refuse("none without `sparse_update: Exact`", "missed updates");
        }
        if *place != Place::Host {
            let expected = "none for a variable that is not in host memory: call `catch_up` before saving";
            return refuse(expected, "missed updates");
        }
        let (hyper, rows) = (resolved.hyper(params.decays(name)), rows_of(name, var)?);
        let Some(missed) = RestoredLedger::of(missed, rows, &hyper)? else {
            return refuse("updates and rows that a run can have", "others");
        };
        let owner = match cell {
            StateCell::Table(_) => None,
            StateCell::Own(_) => Some(Owner::new(var, state, &hyper, rounding, derive(params.seed, *key))?),
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

/// Makes sure that moments are as this layout stores them.
pub(super) fn check_moments(name: &str, snapshot: &VarSnapshot, var: &Tensor, layout: &Layout) -> Result<()> {
    let [of_exp_avg, of_exp_inf] = Moments::expected(var, layout);
    check_tensor(name, "exp_avg", &snapshot.exp_avg, of_exp_avg)?;
    check_tensor(name, "exp_inf", &snapshot.exp_inf, of_exp_inf)?;
    check_optional(name, "scales", snapshot.scales.as_ref(), Moments::expected_scales(var, layout))
}

/// Makes sure that an average, sums and missed updates have the shapes and dtypes of those of this variable, whatever
/// its settings are.
pub(super) fn check_extras(info: &VarInfo, snapshot: &VarSnapshot) -> Result<()> {
    let (name, var) = (&info.name, &info.var);
    let exact = arithmetic(var.dtype());
    if let Some(ema) = &snapshot.ema {
        check_tensor(name, "ema", ema, (exact, var.dims().to_vec()))?;
    }
    match &snapshot.accumulated {
        Some((AccumulatedGrad::Dense(sum), _)) => check_tensor(name, "accumulated", sum, (exact, var.dims().to_vec()))?,
        Some((AccumulatedGrad::Rows(SparseGrad { values, .. }), _)) if values.dtype() != exact => {
            let (name, expected, got) = (name.clone(), format!("{exact:?}"), values.dtype());
            return Err(ErrorKind::DTypeMismatch { what: "accumulated", name, expected, got }.into());
        }
        _ => {}
    }
    Ok(())
}

/// Makes sure that an update can have made such moments.
pub(super) fn check_values(name: &str, snapshot: &VarSnapshot) -> Result<()> {
    check_scales(name, snapshot.scales.as_ref())?;
    // Bytes are codes, and each of them is one.
    if snapshot.exp_inf.dtype().is_float() {
        check_norm(&format!("{name}.exp_inf"), &snapshot.exp_inf)?;
    }
    Ok(())
}

fn check_tensor(name: &str, what: &'static str, tensor: &Tensor, expected: (DType, Vec<usize>)) -> Result<()> {
    let (expected_dtype, expected) = expected;
    let (name, got) = (name.to_owned(), tensor.dims().to_vec());
    if expected != got {
        return Err(ErrorKind::ShapeMismatch { what, name, expected, got }.into());
    }
    let (expected, got) = (format!("{expected_dtype:?}"), tensor.dtype());
    if expected_dtype != got {
        return Err(ErrorKind::DTypeMismatch { what, name, expected, got }.into());
    }
    Ok(())
}

fn check_optional(
    name: &str,
    what: &'static str,
    tensor: Option<&Tensor>,
    expected: Option<(DType, Vec<usize>)>,
) -> Result<()> {
    match (tensor, expected) {
        (None, None) => Ok(()),
        (Some(tensor), Some(expected)) => check_tensor(name, what, tensor, expected),
        (None, Some(_)) => Err(Error::checkpoint(format!("{name}.{what}"), "a tensor", "none")),
        (Some(_), None) => Err(Error::checkpoint(format!("{name}.{what}"), "no such tensor", "a surplus one")),
    }
}

/// Logarithms that scales can have.
fn check_scales(name: &str, scales: Option<&Tensor>) -> Result<()> {
    let Some(scales) = scales else { return Ok(()) };
    let limit = (LARGEST_LOG + 1) << POINT;
    match scales.flatten_all()?.to_vec1::<u32>()?.into_iter().find(|log| *log >= limit) {
        Some(log) => Err(Error::checkpoint(format!("{name}.scales"), format!("logarithms below {limit}"), log)),
        None => Ok(()),
    }
}

/// Counters that a run can have; what follows counts on without an overflow then.
fn check_counters(counters: &Counters, accumulation_steps: u64) -> Result<()> {
    let Counters { calls, updates, skipped, pending } = *counters;
    for (entry, value, limit, what) in [
        ("calls", calls, u64::MAX / 2, "more would overflow"),
        ("skipped", skipped, u64::MAX / 2, "more would overflow"),
        ("updates", updates, u64::MAX / 2, "more would overflow"),
        ("pending", pending, accumulation_steps - 1, "one less than the accumulation steps"),
        ("pending", pending, calls, "they are calls, too"),
    ] {
        if value > limit {
            return Err(Error::checkpoint(format!("counters.{entry}"), format!("at most {limit} ({what})"), value));
        }
    }
    Ok(())
}

/// Loss scale and plateau: there where the settings have them, and states that a run can have come to.
fn check_trainer(params: &ParamsAdamax, scaler: Option<&GradScalerState>, plateau: Option<&Plateau>) -> Result<()> {
    let fits = |entry: &str, is_set: bool, is_there: bool| match (is_set, is_there) {
        (true, false) => Err(Error::checkpoint(entry, "a state, since the settings have one", "none")),
        (false, true) => Err(Error::checkpoint(entry, "none, since the settings have none", "a state")),
        _ => Ok(()),
    };
    let settings = params.loss_scale.scaler();
    fits("grad_scaler", settings.is_some(), scaler.is_some())?;
    fits("plateau", params.plateau.is_some(), plateau.is_some())?;
    if let (Some(settings), Some(state)) = (settings, scaler) {
        settings.check(state)?;
    }
    plateau.map_or(Ok(()), Plateau::check)
}

/// The learning rate of a snapshot, or the optimizer's own where both come from outside.
fn merge_lr(own: &LearningRate, theirs: LearningRate) -> LearningRate {
    if own.is_external() && theirs.is_external() { own.clone() } else { theirs }
}
