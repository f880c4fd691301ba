//! A part of a checkpoint: the variables that fit take their state, the others begin anew.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::DType;

use super::Adamax;
use super::fit::{check_averages_and_sums, check_moments, check_values};
use super::settings::ResolvedGroup;
use super::vars::VarInfo;
use crate::checkpoint::names::hint;
use crate::checkpoint::{Snapshot, VarSnapshot, native};
use crate::error::{Error, Result, listed};
use crate::params::SparseUpdate;
use crate::state::{Master, MomentTensors, Moments, Place, Units, arithmetic};

/// The outcome of [`Adamax::restore_matching`] and [`Adamax::load_matching`]: names of variables, in alphabetical order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// The variables that took their state.
    pub restored: Vec<String>,
    /// The variables of the optimizer that the snapshot does not have; they begin anew.
    pub not_in_snapshot: Vec<String>,
    /// The variables of the snapshot that the optimizer does not have.
    pub not_in_optimizer: Vec<String>,
    /// The variables that both have and that do not fit, with the reason; they begin anew.
    pub mismatched: Vec<(String, String)>,
}

impl Restored {
    /// Whether all variables of both sides took part.
    pub fn is_complete(&self) -> bool {
        self.not_in_snapshot.is_empty() && self.not_in_optimizer.is_empty() && self.mismatched.is_empty()
    }
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { restored, not_in_snapshot, not_in_optimizer, mismatched } = self;
        write!(f, "restored: {}", restored.len())?;
        for (what, names) in [("not in the snapshot", not_in_snapshot), ("not in the optimizer", not_in_optimizer)] {
            if !names.is_empty() {
                write!(f, "; {what}: {}", listed(names.iter().map(String::as_str)))?;
            }
        }
        mismatched.iter().try_for_each(|(name, reason)| write!(f, "; `{name}`: {reason}"))
    }
}

impl Adamax {
    /// Takes the state of the variables that a snapshot and this optimizer have in common: of the same name, of the same
    /// shape and of the same type of arithmetic (f64, or f32 for all others). The other variables begin anew, whatever
    /// state they have had. It is what `load_state_dict(strict=False)` is for a model in PyTorch, and passes over other
    /// shapes, too.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{DType, Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let var = |classes: usize| Var::ones((4, classes), DType::F32, &Device::Cpu);
    /// let (body, head) = (var(4)?, var(10)?);
    /// let mut optimizer =
    ///     Adamax::from_named([("body", body.clone()), ("head", head.clone())], ParamsAdamax::default())?;
    /// optimizer.backward_step(&(body.sum_all()? + head.sum_all()?)?)?;
    ///
    /// // A new head, of another number of classes.
    /// let mut other = Adamax::from_named([("body", body), ("head", var(2)?)], ParamsAdamax::default())?;
    /// let restored = other.restore_matching(&optimizer.snapshot()?)?;
    /// assert_eq!(restored.restored, ["body"]);
    /// assert_eq!(restored.mismatched[0], ("head".into(), "shape [4, 2] here, [4, 10] there".into()));
    /// assert_eq!((other.updates(), other.state("body")?.step, other.state("head")?.step), (1, 1, 0));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// | | |
    /// | --- | --- |
    /// | settings and groups | stay this optimizer's own; a variable may be in another group there. [`Snapshot::params`] has those of the snapshot, to make an optimizer with |
    /// | counters | the snapshot's, so that a schedule goes on. With [`StepCount::Shared`](crate::StepCount::Shared) a variable that begins anew counts from there, as one that is [added](Self::add_var): its first updates are smaller. With `PerVar` it counts from 0 |
    /// | moments | the snapshot's, bit for bit where [`state_dtype`](crate::ParamsAdamax::state_dtype), `rowwise_norm` and the betas are the same; converted otherwise |
    /// | masters | the snapshot's where both keep one of the same kind, which needs the weights of the same moment; else they begin as the weights are |
    /// | averages | the snapshot's where both keep them; else they begin with the next call |
    /// | gradients that wait for their update | the snapshot's; the variables that begin anew have had none |
    /// | loss scale, plateau | the snapshot's where both have one; else they begin anew |
    ///
    /// # Errors
    ///
    /// Another convention for [`eps_mode`](crate::ParamsAdamax::eps_mode) or
    /// [`step_count`](crate::ParamsAdamax::step_count); more calls that wait for their update than
    /// [`gradient_accumulation_steps`](crate::ParamsAdamax::gradient_accumulation_steps) allows; not one variable that fits,
    /// which is the sign of other names; tensors and counters that no run can have made. Nothing has changed then.
    pub fn restore_matching(&mut self, snapshot: &Snapshot) -> Result<Restored> {
        self.try_restore_matching(snapshot).map_err(|error| self.own(error))
    }

    /// Takes a part of the state in a file that [`save`](Self::save) wrote, as
    /// [`restore_matching`](Self::restore_matching) does.
    ///
    /// # Errors
    ///
    /// As [`restore_matching`](Self::restore_matching); a file that is missing, truncated or not such a checkpoint; variables
    /// that were given without names.
    pub fn load_matching(&mut self, path: impl AsRef<Path>) -> Result<Restored> {
        self.require_names()?;
        let path = path.as_ref();
        let snapshot = native::read(path, None, |outline| self.matching(outline).map(drop));
        let restored = snapshot.and_then(|snapshot| self.try_restore_matching(&snapshot));
        restored.map_err(|error| self.own(error.in_file(path)))
    }

    /// The variables that take their state from a snapshot, with that state and the settings that it was kept by.
    fn matching<'s>(&self, snapshot: &'s Snapshot) -> Result<(Vec<Match<'_, 's>>, Restored)> {
        self.check_convention(&snapshot.params)?;
        let (mut matches, mut report) = (Vec::new(), Restored::default());
        for info in self.vars.iter() {
            let name = &info.name;
            let Some(theirs) = snapshot.vars.get(name) else {
                report.not_in_snapshot.push(name.clone());
                continue;
            };
            if let Some(reason) = info.mismatch(theirs) {
                report.mismatched.push((name.clone(), reason));
                continue;
            }
            let Some(group) = snapshot.groups.iter().find(|group| group.name == theirs.group) else {
                let expected = "one of the groups of the snapshot";
                return Err(Error::checkpoint(format!("{name}.group"), expected, format!("`{}`", theirs.group)));
            };
            let there = ResolvedGroup::of(&snapshot.params, group)?;
            check_moments(name, theirs, &info.var, &there.layout(&info.var, theirs.units()))?;
            check_averages_and_sums(info, theirs)?;
            matches.push(Match { info, theirs, there });
            report.restored.push(name.clone());
        }
        let is_known = |name: &&String| self.vars.position(name).is_ok();
        report.not_in_optimizer = snapshot.vars.keys().filter(|name| !is_known(name)).cloned().collect();
        if let (true, Some(first), false) = (matches.is_empty(), self.vars.first(), snapshot.vars.is_empty()) {
            let got = match report.mismatched.first() {
                Some((name, reason)) => format!("none that fits; `{name}` has {reason}"),
                None => {
                    let theirs: Vec<_> = snapshot.vars.keys().map(String::as_str).collect();
                    format!("none that fits{}", hint(&self.names().collect::<Vec<_>>(), &theirs, "snapshot"))
                }
            };
            return Err(Error::checkpoint(&first.name, "the state of this var, or of another one", got));
        }
        Ok((matches, report))
    }

    fn try_restore_matching(&mut self, snapshot: &Snapshot) -> Result<Restored> {
        let (matches, report) = self.matching(snapshot)?;
        let vars = matches.into_iter().map(|Match { info, theirs, there }| {
            let mut var = info.carried(theirs, &there, &self.resolved[info.group])?;
            var.group.clone_from(&self.groups[info.group].name);
            var.ema = var.ema.filter(|_| self.params.ema.is_some());
            Ok((info.name.clone(), var))
        });
        let vars = vars.collect::<Result<BTreeMap<_, _>>>()?;
        let grad_scaler = self.params.loss_scale.carried(snapshot.params.loss_scale, snapshot.grad_scaler);
        let plateau = self.params.plateau.map(|_| snapshot.plateau.unwrap_or_default());
        let (params, groups) = (self.params.clone(), self.groups.clone());
        self.try_restore(&Snapshot { params, groups, counters: snapshot.counters, grad_scaler, plateau, vars })?;
        Ok(report)
    }
}

/// A variable and the state that it takes.
struct Match<'v, 's> {
    info: &'v VarInfo,
    theirs: &'s VarSnapshot,
    /// The settings of its group there.
    there: ResolvedGroup,
}

impl VarInfo {
    /// The reason for which the state of a variable of this name is not one of this variable.
    fn mismatch(&self, theirs: &VarSnapshot) -> Option<String> {
        let (here, there) = (self.var.dims(), theirs.exp_avg.dims());
        if here != there {
            return Some(format!("shape {here:?} here, {there:?} there"));
        }
        // Codes are those of moments in f32.
        let of_moments = if theirs.exp_avg.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let exact = arithmetic(self.var.dtype());
        (exact != of_moments).then(|| format!("moments of {exact:?} here, of {of_moments:?} there"))
    }

    /// Converts state that is kept by the plan `there` to the plan `here`.
    fn carried(&self, theirs: &VarSnapshot, there: &ResolvedGroup, here: &ResolvedGroup) -> Result<VarSnapshot> {
        let var = self.var.as_tensor();
        let (from, to) = (there.layout(var, theirs.units()), here.layout(var, theirs.units()));
        check_values(&self.name, theirs)?;
        let is_exact = here.storage.sparse_update == SparseUpdate::Exact;
        if theirs.missed.is_some() && (from != to || there.hyper != here.hyper || !is_exact) {
            let entry = format!("{}.missed", self.name);
            let expected =
                "none for other settings of betas, decay, moments or `sparse_update`: call `catch_up` before saving";
            return Err(Error::checkpoint(entry, expected, "missed updates"));
        }
        let mut carried = theirs.clone();
        if from != to {
            let VarSnapshot { exp_avg, exp_inf, scales, .. } = theirs.clone();
            let moments = Moments::from_stored(&MomentTensors { exp_avg, exp_inf, scales }, var, Place::Host, &from)?;
            let MomentTensors { exp_avg, exp_inf, scales } = moments.converted(&to)?.to_stored(var.shape())?;
            carried = VarSnapshot { exp_avg, exp_inf, scales, by_rows: to.units == Units::Rows, ..carried };
        }
        let own = Master::zeros(var, Place::Host, here.storage.rounding)?;
        carried.master = match (own, carried.master) {
            (Some(_), Some(theirs)) if theirs.dtype() == Master::dtype(var.dtype()) => Some(theirs),
            (own, _) => own.map(|master| master.to_tensor(var.shape())).transpose()?,
        };
        Ok(carried)
    }
}
