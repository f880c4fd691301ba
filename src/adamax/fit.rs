//! Whether a snapshot fits an optimizer: its settings, and of its tensors the shapes, the dtypes and what is in them.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use super::Adamax;
use super::grads::expected_values;
use super::settings::ResolvedGroup;
use super::vars::VarInfo;
use crate::checkpoint::plain::check_norm;
use crate::checkpoint::{AccumulatedGrad, Counters, MissedUpdates, Snapshot, VarSnapshot};
use crate::codec::{LARGEST_LOG, POINT};
use crate::error::{Error, ErrorKind, Result};
use crate::group::{GroupLr, GroupSettings};
use crate::ids::rows_of;
use crate::params::{ParamsAdamax, SparseUpdate};
use crate::scaler::GradScalerState;
use crate::schedule::{LearningRate, Plateau};
use crate::state::{Layout, Master, Moments, Place, arithmetic};

impl Adamax {
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
    pub(super) fn check(&self, snapshot: &Snapshot) -> Result<(ParamsAdamax, Vec<GroupSettings>, Vec<ResolvedGroup>)> {
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
        check_moments(name, snapshot, var, &resolved.layout(var, snapshot.units()))?;
        let has_master = Master::is_kept(var.dtype(), resolved.storage.rounding);
        let of_master = has_master.then(|| (Master::dtype(var.dtype()), var.dims().to_vec()));
        check_optional(name, "master", snapshot.master.as_ref(), of_master)?;
        check_averages_and_sums(info, snapshot)?;
        snapshot.missed.iter().try_for_each(|missed| check_missed(info, resolved, missed))?;
        match &snapshot.accumulated {
            Some((_, calls)) if *calls > pending => {
                let (entry, expected) =
                    (format!("{name}.accumulated"), format!("gradients of at most {pending} calls"));
                Err(Error::checkpoint(entry, expected, calls))
            }
            _ => Ok(()),
        }
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
}

/// Makes sure that moments are as this layout stores them.
pub(super) fn check_moments(name: &str, snapshot: &VarSnapshot, var: &Tensor, layout: &Layout) -> Result<()> {
    let [of_exp_avg, of_exp_inf] = Moments::expected(var, layout);
    check_tensor(name, "exp_avg", &snapshot.exp_avg, of_exp_avg)?;
    check_tensor(name, "exp_inf", &snapshot.exp_inf, of_exp_inf)?;
    check_optional(name, "scales", snapshot.scales.as_ref(), Moments::expected_scales(var, layout))
}

/// Makes sure that an average and a sum have the shapes and dtypes of those of this variable.
pub(super) fn check_averages_and_sums(info: &VarInfo, snapshot: &VarSnapshot) -> Result<()> {
    let VarInfo { name, var, .. } = info;
    let of_var = || (arithmetic(var.dtype()), var.dims().to_vec());
    snapshot.ema.iter().try_for_each(|ema| check_tensor(name, "ema", ema, of_var()))?;
    match &snapshot.accumulated {
        // The sum of no calls counts for nothing, whatever is in it.
        None | Some((_, 0)) => Ok(()),
        Some((AccumulatedGrad::Dense(sum), _)) => check_tensor(name, "accumulated", sum, of_var()),
        Some((AccumulatedGrad::Rows(sum), _)) => {
            let (dtype, of_rows) = (arithmetic(var.dtype()), expected_values(info, sum)?);
            check_tensor(name, "accumulated", &sum.values, (dtype, of_rows))
        }
    }
}

/// Makes sure that the updates that rows have missed have a place here, and their shapes.
fn check_missed(info: &VarInfo, resolved: &ResolvedGroup, missed: &MissedUpdates) -> Result<()> {
    let VarInfo { name, var, place, .. } = info;
    let expected = match (resolved.storage.sparse_update, place) {
        (SparseUpdate::Exact, Place::Host) => {
            return match missed.have_shapes(rows_of(name, var)?) {
                true => Ok(()),
                false => Err(impossible_missed(name)),
            };
        }
        (SparseUpdate::Exact, _) => "none for a variable that is not in host memory: call `catch_up` before saving",
        _ => "none without `sparse_update: Exact`",
    };
    Err(Error::checkpoint(format!("{name}.missed"), expected, "missed updates"))
}

pub(super) fn impossible_missed(name: &str) -> Error {
    Error::checkpoint(format!("{name}.missed"), "updates and rows that a run can have", "others")
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
