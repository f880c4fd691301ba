//! One update: its last checks, its preparation, and its application to variables and states.
//!
//! `check_update` and `prepare` are where an update is still refused; `apply` writes.

use candle_core::Tensor;

use super::Adamax;
use super::averages::Averages;
use super::call::{ArgsOf, Call, Turn};
use super::grads::{Grad, Grads};
use super::norms::Norms;
use super::progress::InFlight;
use super::report::Outcome;
use super::settings::ResolvedGroup;
use super::state::{RowState, StateCell, StateGuard};
use super::sums::{Addition, Sum};
use super::vars::Vars;
use crate::error::{Error, ErrorKind, Result};
use crate::group::GroupSettings;
use crate::kernel::{Backends, Orders, RowTask, Task, Update as DenseUpdate};
use crate::params::{MissingGradients, ParamsAdamax, SparseUpdate};
use crate::rule::Coefficients;
use crate::table::debts;

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
    /// Of an update with the gradients of `grads`, and with those that wait if it is not one of a single call.
    fn of(adamax: &Adamax, turn: Turn, grads: &Grads<'_>) -> Self {
        let mut own = grads.iter().map(|(index, grad)| (*index, Kind::of(grad))).peekable();
        if turn == Turn::Update {
            return Self(own.collect());
        }
        let sums = adamax.sums.0.iter().enumerate();
        Self(Vec::from_iter(sums.filter_map(|(index, sum)| {
            let own = own.next_if(|(of, _)| *of == index).map(|(_, kind)| kind);
            let sum = sum.get().map(|sum| match sum {
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
        let is_any_exact = debts::is_any();
        for &(index, kind) in &trained.0 {
            let (info, is_table) = (&self.vars[index], self.states[index].is_table());
            let group = &self.resolved[info.group];
            let is_exact = group.keeping.sparse_update == SparseUpdate::Exact;
            if !is_table && !is_exact && !is_any_exact {
                continue;
            }
            if !is_table {
                // Whoever else writes the table writes rows that have missed updates.
                debts::check_alone(info.var.id())?;
                if !is_exact || kind == Kind::Dense {
                    continue;
                }
            }
            let lr = call.group_lrs[info.group];
            if Coefficients::of_update(&group.hyper(info.decays), lr, 1).decay >= 1.0 {
                let expected = "less than 1 of the weight to decay in a step, for `sparse_update: Exact`";
                return Err(Error::invalid("lr", expected, lr));
            }
        }
        if is_any_exact {
            let Self { vars, states, sums, .. } = self;
            seek_written(grads, vars, states)?;
            seek_written(&sums.grads(vars), vars, states)?;
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
            |index: usize| rule == MissingGradients::Half && self.states[index].read(|state| state.step > 0);
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
            Turn::Wait { .. } | Turn::Last { .. } => Some(self.sums.prepare(grads, &self.vars, call.unscale)?),
        };
        let mut states = Vec::new();
        for &(index, _) in trained.0.iter().filter(|(_, kind)| *kind == Kind::Rows && call.turn.updates()) {
            let (cell, info) = (&self.states[index], &self.vars[index]);
            let state = RowState::prepare(cell, info, &self.resolved[info.group], self.params.seed)?;
            states.extend(state.map(|state| (index, state)));
        }
        let is_trained = |index: usize| call.turn.updates() && trained.has(index);
        let averages = Averages::prepare(self, is_trained)?;
        Ok(Prepared { states, addition, averages })
    }

    fn apply(&mut self, call: &Call, grads: &Grads<'_>, norms: &Norms, prepared: Prepared) -> Result<Outcome> {
        let Self { params, resolved, vars, states, sums, progress, backends, .. } = self;
        let setup = Setup { params, resolved, vars };
        let Prepared { states: row_states, addition, averages } = prepared;
        if let Some(addition) = addition {
            sums.add(addition, grads, vars, call.unscale, backends)?;
        }
        for (index, state) in row_states {
            state.install(&mut states[index]);
        }
        let number = progress.counters.updates + 1;
        let outcome = match call.turn {
            Turn::Wait { call, of } => Outcome::Accumulated { vars: grads.len(), call, of },
            Turn::Update => update(&setup, call, number, (grads, norms), states, backends)?,
            Turn::Last { .. } | Turn::Flush => {
                let calls = progress.counters.pending + u64::from(call.turn != Turn::Flush);
                let mut mean = sums.grads(vars);
                let norms = Norms::measure(&setup, &mut mean, 1.0 / calls as f64, backends)?;
                let outcome = match norms.skips(params) {
                    // A sum that has overflowed cannot be mended: the calls before go with it.
                    true => Outcome::Overflowed,
                    false => update(&setup, call, number, (&mean, &norms), states, backends)?,
                };
                drop(mean);
                sums.clear()?;
                outcome
            }
        };
        if let Outcome::InFlight { .. } = outcome {
            progress.in_flight = Some(InFlight::new(grads.indices().collect()));
        }
        if outcome != Outcome::Overflowed {
            averages.advance(self, call.turn)?;
        }
        Ok(outcome)
    }
}

/// Parts of an optimizer that stay as they are during a call.
pub(super) struct Setup<'a> {
    pub(super) params: &'a ParamsAdamax,
    pub(super) resolved: &'a [ResolvedGroup],
    pub(super) vars: &'a Vars,
}

/// One variable's share of an update.
struct Entry<'a> {
    var: &'a Tensor,
    grad: &'a Grad<'a>,
    state: StateGuard<'a>,
    args: Orders,
}

/// Update number `number`, of variables and states.
fn update(
    setup: &Setup<'_>,
    call: &Call,
    number: u64,
    (grads, norms): (&Grads<'_>, &Norms),
    states: &mut [Box<StateCell>],
    backends: &mut Backends,
) -> Result<Outcome> {
    let mut args_of = ArgsOf::new(setup, &call.group_lrs, number);
    let mut entries = Vec::with_capacity(grads.len());
    for (nth, (index, grad, cell)) in grads.with(states).enumerate() {
        let (info, mut state) = (&setup.vars[index], cell.lock());
        state.prepare(grad, &info.var)?;
        let args = args_of.args(info, &state, norms.grad_scale(nth));
        entries.push(Entry { var: info.var.as_tensor(), grad, state, args });
    }
    let (mut tasks, mut rows) = (Vec::with_capacity(entries.len()), Vec::new());
    for (nth, Entry { var, grad, state, args }) in entries.iter_mut().enumerate() {
        let orders = *args;
        match grad {
            Grad::Dense(grad) => {
                let (place, read) = (state.place(), Some(grad.source()));
                tasks.push(Task { place, nth, lent: Some(*var), read, kind: DenseUpdate { orders, state } });
            }
            Grad::Rows(grad) => {
                let (state, checksums) = state.parts();
                rows.push(RowTask { nth, var, grad, orders, state, checksums });
            }
        }
    }
    backends.update(tasks, rows, norms.on_device())?;
    let outcome = norms.outcome(entries.len());
    for Entry { grad, state, args, .. } in &mut entries {
        // A call in flight is counted when it is known.
        state.step += u64::from(!matches!(outcome, Outcome::InFlight { .. }));
        state.record(args, grad)?;
    }
    Ok(outcome)
}

/// Refuses gradients of rows that somebody has written while they had missed updates.
fn seek_written(grads: &Grads<'_>, vars: &Vars, states: &mut [Box<StateCell>]) -> Result<()> {
    let mut tables = grads.with(states).filter(|(.., cell)| cell.is_table());
    tables.try_for_each(|(index, grad, cell)| cell.lock().seek_written(grad, &vars[index].var))
}
