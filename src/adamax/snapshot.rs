//! All state as plain data, out of an optimizer and into one; and one variable's state, to look at.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};

use super::held::{GroupPlan, Held};
use super::late::without;
use super::report::History;
use super::{Accumulated, Adamax, Param, Sum, collect};
use crate::checkpoint::plain::check_norm;
use crate::checkpoint::{self, AccumulatedGrad, AtomicFile, Counters, Snapshot, VarSnapshot, names};
use crate::codec::{LARGEST_LOG, POINT};
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::{SparseGrad, sparse};
use crate::group::{GroupLr, GroupSettings};
use crate::kernel::RowGrad;
use crate::params::ParamsAdamax;
use crate::scaler::GradScalerState;
use crate::schedule::{LearningRate, Plateau};
use crate::state::{Buffer, Layout, Master, MomentTensors, Moments, ParamState, arithmetic};

/// The state of one variable: copies, in host memory, in the shape of the variable; f64 for f64 variables, else f32.
#[derive(Clone, Debug)]
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

impl Param {
    fn average(&self) -> Result<Option<Tensor>> {
        self.ema.as_ref().map(|ema| ema.to_tensor(self.var.shape())).transpose()
    }

    /// The sum of the gradients that wait, with the number of their calls.
    fn waiting(&self) -> Result<Option<(AccumulatedGrad, u64)>> {
        Ok(match &self.accumulated {
            Some(Accumulated { sum: Sum::Dense(sum), calls }) if *calls > 0 => {
                Some((AccumulatedGrad::Dense(sum.to_tensor(self.var.shape())?), *calls))
            }
            Some(Accumulated { sum: Sum::Rows(sum), calls }) if *calls > 0 => {
                Some((AccumulatedGrad::Rows(sparse::to_sparse(sum, &self.var)?), *calls))
            }
            _ => None,
        })
    }
}

impl Adamax {
    /// The state of the variable `name`. With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) copies of its rows catch
    /// up, and on a GPU the rows themselves: in host memory looking changes no bit of the run.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn state(&self, name: &str) -> Result<State> {
        let param = &self.vars[self.index_of(name)?];
        let (exp_avg, exp_inf) = param.state.moments(&param.var)?;
        let (ema, accumulated) = (param.average()?, param.waiting()?);
        let state = param.state.get();
        let step = self.settled_step(&param.name, state.step, self.late());
        Ok(State { exp_avg, exp_inf, step, ema, accumulated: accumulated.map(|(sum, _)| sum), bytes: state.bytes() })
    }

    /// The bytes that moments and masters of the variable `name` take as they are stored, once all of them have been
    /// written; averages and accumulated gradients are not counted.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn state_bytes(&self, name: &str) -> Result<usize> {
        Ok(self.vars[self.index_of(name)?].state.get().bytes())
    }

    /// All state as plain data: settings, counters, moments. Nothing is shared with the optimizer; the variables
    /// themselves are not in it.
    ///
    /// With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) all rows pay what they owe, as by
    /// [`catch_up`](Self::catch_up), so this is part of the run: paying in two parts rounds differently from paying
    /// once.
    ///
    /// # Errors
    ///
    /// A device whose memory cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let late = self.late();
        // A run that goes on from here has to find the weights as they are at the next step.
        self.scale_down()?;
        let vars = self.vars.iter().map(|param| Ok((param.name.clone(), self.var_snapshot(param, late)?)));
        Ok(Snapshot {
            params: self.params.clone(),
            groups: self.groups.clone(),
            counters: without(&self.counters, late),
            grad_scaler: self.scaler_after(late),
            plateau: self.plateau,
            vars: vars.collect::<Result<BTreeMap<_, _>>>()?,
        })
    }

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

    /// Writes all state to a safetensors file, keyed by the variables' names, in a format that is described in the
    /// [guide](crate::guide::resume). The weights are not in it: `VarMap::save` writes them. With
    /// [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) call that afterwards, since saving lets all rows pay what
    /// they owe, as [`snapshot`](Self::snapshot) does.
    ///
    /// The file is complete or it is not there: it is written beside `path`, synced and renamed. Its mode is 666 less the
    /// umask, or that of the file that it replaces; a symbolic link is followed. The [guide](crate::guide::resume) says
    /// more.
    ///
    /// # Errors
    ///
    /// Variables that were given without names, by which another process could not know them; settings of more than a
    /// mebibyte, or of more than some 65,000 values; the system's errors. Where the file cannot be made, no row has caught
    /// up; if the disk is full later, all have, as by [`catch_up`](Self::catch_up).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        let write = || {
            checkpoint::native::check_settings(&self.params, &self.groups)?;
            let file = AtomicFile::create(path.as_ref())?;
            checkpoint::native::write(&self.snapshot()?, file)
        };
        write().map_err(|error| self.own(error))
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
        let snapshot = checkpoint::native::read(path, Some(&self.names().collect::<Vec<_>>()));
        let loaded = snapshot.and_then(|snapshot| self.try_restore(&snapshot).map_err(|error| error.in_file(path)));
        loaded.map_err(|error| self.own(error))
    }

    pub(super) fn require_names(&self) -> Result<()> {
        match self.vars.iter().find_map(|param| param.unnamed) {
            Some(position) => Err(self.own(ErrorKind::UnnamedVar(position).into())),
            None => Ok(()),
        }
    }

    fn var_snapshot(&self, param: &Param, late: u64) -> Result<VarSnapshot> {
        param.state.pay_all()?;
        let state = param.state.get();
        let MomentTensors { exp_avg, exp_inf, units } = state.moments.to_stored(param.var.shape())?;
        Ok(VarSnapshot {
            group: self.groups[param.group].name.clone(),
            step: self.settled_step(&param.name, state.step, late),
            exp_avg,
            exp_inf,
            units,
            by_rows: state.moments.layout.by_rows,
            master: state.master.as_ref().map(|master| master.to_tensor(param.var.shape())).transpose()?,
            ema: param.average()?,
            accumulated: param.waiting()?,
        })
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
        convention("epsilon", &self.params.epsilon, &theirs.epsilon)?;
        convention("step_count", &self.params.step_count, &theirs.step_count)
    }

    /// Takes all state from a snapshot. A variable that is not in it begins anew.
    pub(super) fn try_restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.settle(true)?;
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
        let plans = self.plans(&params, &groups, self.kernel)?;
        let restored = self.vars.iter().map(|param| {
            let plan = &plans[param.group];
            match vars.get(&param.name) {
                Some(snapshot) => self.restore_var(param, plan, counters, snapshot),
                None => {
                    let (layout, rounding) = (plan.layout(&param.var, false), plan.keeping.rounding);
                    Ok((ParamState::zeros(&param.var, param.place(), &layout, rounding)?, None, None))
                }
            }
        });
        let restored = restored.collect::<Result<Vec<_>>>()?;
        for (param, (state, accumulated, ema)) in self.vars.iter_mut().zip(restored) {
            // What rows owe is not paid: the weights are those of the snapshot, or will be.
            if let Held::Shared(debts) = &param.state {
                debts.forget();
            }
            param.state = Held::Own(state);
            param.accumulated = accumulated;
            param.ema = ema;
            param.decays = params.decays(&param.name);
            param.history = match (param.state.get().step > 0 || param.sum().is_some(), counters.calls) {
                (true, _) => History::Trained,
                (false, 0) => History::New,
                (false, _) => History::Untrained,
            };
        }
        self.params = params;
        self.groups = groups;
        self.counters = *counters;
        (self.scaler, self.plateau) = (*grad_scaler, *plateau);
        self.report = super::Report::default();
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

    fn restore_var(
        &self,
        param: &Param,
        plan: &GroupPlan,
        counters: &Counters,
        snapshot: &VarSnapshot,
    ) -> Result<(ParamState, Option<Accumulated>, Option<Buffer>)> {
        let name = &param.name;
        let group = &self.groups[param.group].name;
        if snapshot.group != *group {
            return Err(Error::checkpoint(name, format!("a var of group `{group}`"), format!("`{}`", snapshot.group)));
        }
        let buffer = |what: &'static str, tensor: &Tensor| -> Result<Buffer> {
            check_tensor(name, what, tensor, (arithmetic(param.var.dtype()), param.var.dims().to_vec()))?;
            Buffer::from_tensor(tensor, &param.var, param.place())
        };
        let Counters { updates, pending, .. } = *counters;
        if snapshot.step > updates {
            let (entry, expected) = (format!("{name}.step"), format!("at most the {updates} updates of the optimizer"));
            return Err(Error::checkpoint(entry, expected, snapshot.step));
        }
        let layout = plan.layout(&param.var, snapshot.by_rows);
        check_moments(name, snapshot, &param.var, &layout)?;
        let has_master = Master::is_kept(param.var.dtype(), plan.keeping.rounding);
        let of_master = has_master.then(|| (Master::dtype(param.var.dtype()), param.var.dims().to_vec()));
        check_optional(name, "master", snapshot.master.as_ref(), of_master)?;
        let tensors = MomentTensors {
            exp_avg: snapshot.exp_avg.clone(),
            exp_inf: snapshot.exp_inf.clone(),
            units: snapshot.units.clone(),
        };
        let state = ParamState {
            moments: Moments::from_stored(&tensors, &param.var, param.place(), &layout)?,
            master: snapshot
                .master
                .as_ref()
                .map(|master| Master::from_tensor(master, &param.var, param.place()))
                .transpose()?,
            step: snapshot.step,
        };
        let ema = snapshot.ema.as_ref().map(|ema| buffer("ema", ema)).transpose()?;
        // Older files have averages of variables that were never trained.
        let ema = ema.filter(|_| snapshot.step > 0);
        // The sum of no calls counts for nothing, whatever is in it.
        let accumulated = snapshot.accumulated.as_ref().filter(|(_, calls)| *calls > 0);
        if let Some((_, calls)) = accumulated.filter(|(_, calls)| *calls > pending) {
            let (entry, expected) = (format!("{name}.accumulated"), format!("gradients of at most {pending} calls"));
            return Err(Error::checkpoint(entry, expected, calls));
        }
        let accumulated = accumulated
            .map(|(sum, calls)| {
                let sum = match sum {
                    AccumulatedGrad::Dense(sum) => Sum::Dense(buffer("accumulated", sum)?),
                    AccumulatedGrad::Rows(sum) => Sum::Rows(self.restore_rows(param, sum)?),
                };
                Ok::<_, Error>(Accumulated { sum, calls: *calls })
            })
            .transpose()?;
        Ok((state, accumulated, ema))
    }
}

impl Adamax {
    fn restore_rows(&self, param: &Param, sum: &SparseGrad) -> Result<RowGrad<'static>> {
        let (expected, got) = (arithmetic(param.var.dtype()), sum.values.dtype());
        if expected != got {
            let (name, expected) = (param.name.clone(), format!("{expected:?}"));
            return Err(ErrorKind::DTypeMismatch { what: "accumulated", name, expected, got }.into());
        }
        let rows = collect::check_sparse(param, &self.storages, sum)?;
        sparse::accumulate(None, &rows, 1.0, param.var.dtype())
    }
}

/// Makes sure that moments are as this layout stores them, and such as an update can have made.
pub(super) fn check_moments(name: &str, snapshot: &VarSnapshot, var: &Tensor, layout: &Layout) -> Result<()> {
    let [of_exp_avg, of_exp_inf] = Moments::expected(var, layout);
    check_tensor(name, "exp_avg", &snapshot.exp_avg, of_exp_avg)?;
    check_tensor(name, "exp_inf", &snapshot.exp_inf, of_exp_inf)?;
    check_optional(name, "units", snapshot.units.as_ref(), Moments::expected_units(var, layout))?;
    check_units(name, snapshot.units.as_ref())?;
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

/// Logarithms that units can have.
fn check_units(name: &str, units: Option<&Tensor>) -> Result<()> {
    let Some(units) = units else { return Ok(()) };
    let limit = (LARGEST_LOG + 1) << POINT;
    match units.flatten_all()?.to_vec1::<u32>()?.into_iter().find(|log| *log >= limit) {
        Some(log) => Err(Error::checkpoint(format!("{name}.units"), format!("logarithms below {limit}"), log)),
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
    fits("grad_scaler", params.grad_scaler.is_some(), scaler.is_some())?;
    fits("plateau", params.plateau.is_some(), plateau.is_some())?;
    if let (Some(settings), Some(state)) = (&params.grad_scaler, scaler) {
        settings.check(state)?;
    }
    plateau.map_or(Ok(()), Plateau::check)
}

/// The learning rate of a snapshot, or the optimizer's own where both come from outside.
fn merge_lr(own: &LearningRate, theirs: LearningRate) -> LearningRate {
    if own.is_live() && theirs.is_live() { own.clone() } else { theirs }
}
