//! One update: its last checks, its preparation, and its application to variables and states.
//!
//! `check_update` and `prepare` are where an update is still refused; `apply` writes.

use super::Adamax;
use super::averages::Averages;
use super::call::{ArgsMaker, Call, Turn};
use super::grads::{Grad, Grads};
use super::norms::Norms;
use super::outcome::Outcome;
use super::progress::InFlight;
use super::state::{RowState, StateGuard};
use super::sums::{Addition, Sum};
use super::vars::{Param, VarInfo, Vars};
use crate::error::{Error, ErrorKind, Result};
use crate::group::GroupSettings;
use crate::kernel::{RowTask, Task, Update, UpdateArgs};
use crate::params::{MissingGradients, SparseUpdate};
use crate::rule::Coefficients;
use crate::table::exact;

/// Kind of a gradient.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Dense,
    Rows,
}

impl Kind {
    fn of(grad: &Grad<'_>) -> Self {
        match grad {
            Grad::Dense(_) => Self::Dense,
            Grad::Rows(_) => Self::Rows,
        }
    }
}

/// The variables that an update has gradients for, with their kinds, in the order of names. They are known before the
/// gradients of the last call are added to the sums.
struct Trained(Vec<(usize, Kind)>);

impl Trained {
    /// The variables of an update with the gradients of `grads`, and with those that wait unless it is one of a single call.
    fn of(adamax: &Adamax, turn: Turn, grads: &Grads<'_>) -> Self {
        let mut own = grads.iter().map(|(index, grad)| (*index, Kind::of(grad))).peekable();
        if turn == Turn::Update {
            return Self(own.collect());
        }
        let params = adamax.vars.iter().enumerate();
        Self(Vec::from_iter(params.filter_map(|(index, param)| {
            let own = own.next_if(|(of, _)| *of == index).map(|(_, kind)| kind);
            let sum = param.sum.get().map(|sum| match sum {
                Sum::Dense(_) => Kind::Dense,
                Sum::Rows(_) => Kind::Rows,
            });
            let kind = match (own, sum) {
                (Some(Kind::Rows), Some(Kind::Rows)) => Kind::Rows,
                (Some(_), Some(_)) => Kind::Dense,
                (own, sum) => own.or(sum)?,
            };
            Some((index, kind))
        })))
    }

    /// Whether variable `index` is one of them.
    fn has(&self, index: usize) -> bool {
        self.0.binary_search_by_key(&index, |(index, _)| *index).is_ok()
    }
}

/// All that a call needs beside what is there. It is made before anything is written.
struct Prepared {
    states: Vec<(usize, RowState)>,
    addition: Option<Addition>,
    averages: Averages,
}

impl Adamax {
    /// Adds gradients to those that wait, and updates if the turn is that of an update; then averages move.
    pub(super) fn update(&mut self, call: &Call, grads: &Grads<'_>, norms: &Norms) -> Result<Outcome> {
        let trained = Trained::of(self, call.turn, grads);
        if call.turn.updates() {
            self.check_update(call, grads, &trained)?;
        }
        let prepared = self.prepare(call, grads, &trained)?;
        // Everything that can be refused has been. An error from here on is one of a device.
        self.apply(call, grads, norms, prepared)
    }

    /// Refuses an update that settings do not allow. After it they have no more say.
    fn check_update(&mut self, call: &Call, grads: &Grads<'_>, trained: &Trained) -> Result<()> {
        self.check_missing(trained)?;
        let is_any_exact = exact::is_any();
        for &(index, kind) in &trained.0 {
            let Param { info, state, .. } = &*self.vars[index];
            let is_table = state.is_table();
            let group = &self.resolved[info.group];
            let is_exact = group.storage.sparse_update == SparseUpdate::Exact;
            if !is_table && !is_exact && !is_any_exact {
                continue;
            }
            if !is_table {
                // Whoever else writes the table writes rows that have missed updates.
                exact::check_alone(info.var.id())?;
                if !is_exact || kind == Kind::Dense {
                    continue;
                }
            }
            let lr = call.group_lrs[info.group];
            if Coefficients::of_update(info.hyper(group), lr, 1).decay >= 1.0 {
                let expected = "less than 1 of the weight to decay in a step, for `sparse_update: Exact`";
                return Err(Error::invalid("lr", expected, lr));
            }
        }
        if is_any_exact {
            seek_written(grads, &mut self.vars)?;
            let sums = self.vars.take_sums();
            let sought = seek_written(&sums, &mut self.vars);
            self.vars.put_back(sums);
            sought?;
        }
        Ok(())
    }

    /// Refuses an update in which too few variables have a gradient.
    fn check_missing(&self, trained: &Trained) -> Result<()> {
        let rule = self.params.missing_gradients;
        let is_any_frozen = self.groups.iter().any(GroupSettings::is_frozen);
        let counts = |index: usize| !is_any_frozen || !self.groups[self.vars[index].group].is_frozen();
        let counted = || (0..self.vars.len()).filter(|&index| counts(index));
        let vars = if is_any_frozen { counted().count() } else { self.vars.len() };
        let with_gradient = trained.0.iter().filter(|(index, _)| counts(*index)).count();
        let is_enough = |count: usize| match rule {
            MissingGradients::Allow => true,
            MissingGradients::Half => 2 * count >= vars,
            MissingGradients::Error => count == vars,
        };
        // Almost every update ends here.
        if is_enough(with_gradient) {
            return Ok(());
        }
        // The count of updates is in snapshots, so that a resumed run knows it.
        let was_updated =
            |index: usize| rule == MissingGradients::Half && self.vars[index].state.read(|state| state.step > 0);
        let missing = counted().filter(|&index| !trained.has(index) && !was_updated(index));
        let missing: Vec<_> = missing.map(|index| self.vars[index].label()).collect();
        let with_gradient = vars - missing.len();
        if is_enough(with_gradient) {
            return Ok(());
        }
        let expected = match rule {
            MissingGradients::Error => "all of them, in every update (`missing_gradients: Error`)",
            _ => "at least half of them, in this update or an earlier one",
        };
        Err(ErrorKind::MissingGradients { with_gradient, vars, expected, missing }.into())
    }

    /// Gets ready for a call: sums, states for gradients of rows, and averages that begin.
    fn prepare(&self, call: &Call, grads: &Grads<'_>, trained: &Trained) -> Result<Prepared> {
        let addition = match call.turn {
            Turn::Update | Turn::Flush => None,
            Turn::Wait { .. } | Turn::Last { .. } => Some(Addition::prepare(&self.vars, grads, call.unscale)?),
        };
        let mut states = Vec::new();
        for &(index, _) in trained.0.iter().filter(|(_, kind)| *kind == Kind::Rows && call.turn.updates()) {
            let param = &self.vars[index];
            let state = RowState::prepare(param, &self.resolved[param.group], self.params.seed)?;
            states.extend(state.map(|state| (index, state)));
        }
        let is_trained = |index: usize| call.turn.updates() && trained.has(index);
        let averages = Averages::prepare(self, is_trained)?;
        Ok(Prepared { states, addition, averages })
    }

    fn apply(&mut self, call: &Call, grads: &Grads<'_>, norms: &Norms, prepared: Prepared) -> Result<Outcome> {
        let Prepared { states, addition, averages } = prepared;
        if let Some(addition) = addition {
            addition.add(&mut self.vars, grads, call.unscale, &mut self.backends)?;
        }
        for (index, state) in states {
            state.install(&mut self.vars[index].state);
        }
        let outcome = match call.turn {
            Turn::Wait { call, of } => Outcome::Accumulated { vars: grads.len(), call, of },
            Turn::Update => self.update_with(call, grads, norms)?,
            Turn::Last { .. } | Turn::Flush => {
                let mut sums = self.vars.take_sums();
                let outcome = self.update_with_mean(call, &mut sums);
                self.vars.put_back(sums);
                self.vars.clear_sums()?;
                if outcome.is_err() {
                    self.progress.forget_pending();
                }
                outcome?
            }
        };
        if outcome != Outcome::Overflowed {
            averages.advance(self, call.turn)?;
        }
        Ok(outcome)
    }

    /// An update with the mean of the gradients of several calls.
    fn update_with_mean(&mut self, call: &Call, sums: &mut Grads<'_>) -> Result<Outcome> {
        let calls = self.progress.counters.pending + u64::from(call.turn != Turn::Flush);
        let norms = Norms::measure(self, sums, 1.0 / calls as f64)?;
        match norms.skips(&self.params) {
            // A sum that has overflowed cannot be mended: the calls before go with it.
            true => Ok(Outcome::Overflowed),
            false => self.update_with(call, sums, &norms),
        }
    }

    /// The update itself, of variables and states.
    fn update_with(&mut self, call: &Call, grads: &Grads<'_>, norms: &Norms) -> Result<Outcome> {
        let Self { params, resolved, vars, progress, backends, .. } = self;
        let mut args_maker = ArgsMaker { params, resolved, call, update: progress.counters.updates + 1, last: None };
        let mut entries = Vec::with_capacity(grads.len());
        for (nth, (grad, Param { info, state, .. })) in grads.with(vars).enumerate() {
            let mut state = state.lock();
            state.prepare(grad, &info.var)?;
            let args = args_maker.args(info, &state, norms.grad_scale(nth));
            entries.push(Entry { info, grad, state, args });
        }
        let (mut tasks, mut rows) = (Vec::with_capacity(entries.len()), Vec::new());
        for (nth, Entry { info, grad, state, args }) in entries.iter_mut().enumerate() {
            let (var, update_args) = (info.var.as_tensor(), *args);
            match grad {
                Grad::Dense(grad) => {
                    let (place, read) = (info.place, Some(grad.source()));
                    tasks.push(Task { place, nth, lent: Some(var), read, kind: Update { update_args, state } });
                }
                Grad::Rows(grad) => {
                    let (state, checksums) = state.parts();
                    rows.push(RowTask { nth, var, grad, update_args, state, checksums });
                }
            }
        }
        backends.update(tasks, rows, norms.on_device())?;
        let outcome = norms.outcome(entries.len());
        if let Outcome::InFlight { .. } = outcome {
            // Its updates are counted when they are known.
            progress.in_flight = Some(InFlight::new(grads.indices().collect()));
            return Ok(outcome);
        }
        for Entry { grad, state, args, .. } in &mut entries {
            state.step += 1;
            state.record(args, grad)?;
        }
        Ok(outcome)
    }
}

/// One variable's share of an update.
struct Entry<'a> {
    info: &'a VarInfo,
    grad: &'a Grad<'a>,
    state: StateGuard<'a>,
    args: UpdateArgs,
}

/// Refuses gradients of rows that somebody has written while they had missed updates.
fn seek_written(grads: &Grads<'_>, vars: &mut Vars) -> Result<()> {
    let mut tables = grads.with(vars).filter(|(_, param)| param.state.is_table());
    tables.try_for_each(|(grad, Param { info, state, .. })| state.lock().seek_written(grad, &info.var))
}
