//! Plan of one call, as plain numbers. It is made before anything is written.

use super::Adamax;
use super::settings::ResolvedGroup;
use super::vars::VarInfo;
use crate::codec::shrinkage;
use crate::error::Result;
use crate::kernel::UpdateArgs;
use crate::params::{ParamsAdamax, StepCount};
use crate::rounding::derive;
use crate::rule::Coefficients;
use crate::state::{ParamState, Units};

/// Part of a call in the accumulation of gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It updates with its own gradients.
    Update,
    /// Its gradients wait for later calls; it is number `call` of `of`.
    Wait { call: u64, of: u64 },
    /// It updates with the mean of its own gradients and those that wait, `of` calls together.
    Last { of: u64 },
    /// No call: an update with the mean of the gradients that wait.
    Flush,
}

impl Turn {
    /// Whether it ends with an update.
    pub(super) fn updates(self) -> bool {
        !matches!(self, Self::Wait { .. })
    }
}

/// Numbers of one call.
pub(super) struct Call {
    pub(super) turn: Turn,
    /// Learning rate before groups.
    pub(super) lr: f64,
    /// Learning rate of each group.
    pub(super) group_lrs: Vec<f64>,
    /// Factor that undoes the loss scale.
    pub(super) unscale: f64,
}

impl Call {
    /// The next call of `step`.
    pub(super) fn plan(adamax: &Adamax) -> Result<Self> {
        let counters = &adamax.progress.counters;
        let turn = match (adamax.params.gradient_accumulation_steps, counters.pending + 1) {
            (1, _) => Turn::Update,
            (of, call) if call < of => Turn::Wait { call, of },
            (of, _) => Turn::Last { of },
        };
        Self::of(adamax, turn, counters.calls, 1.0 / adamax.loss_scale())
    }

    /// A flush of the gradients that wait, with the learning rates of the last call.
    pub(super) fn flush(adamax: &Adamax) -> Result<Self> {
        Self::of(adamax, Turn::Flush, adamax.progress.counters.calls.saturating_sub(1), 1.0)
    }

    fn of(adamax: &Adamax, turn: Turn, call: u64, unscale: f64) -> Result<Self> {
        let base = adamax.params.lr.at(call)?;
        let group_lrs = adamax.groups.iter().map(|group| Ok(adamax.reduced(group.lr(base, call)?)));
        Ok(Self { turn, lr: adamax.reduced(base), group_lrs: group_lrs.collect::<Result<_>>()?, unscale })
    }
}

/// Makes the arguments of each variable's update.
pub(super) struct ArgsMaker<'c> {
    pub(super) params: &'c ParamsAdamax,
    pub(super) resolved: &'c [ResolvedGroup],
    pub(super) call: &'c Call,
    /// Number of this update, from 1.
    pub(super) update: u64,
    /// Group, decay and t that coefficients were asked for last. Neighbors mostly ask for the same.
    pub(super) last: Option<((usize, bool, u64), Coefficients<f64>)>,
}

impl ArgsMaker<'_> {
    /// The arguments for a variable whose gradient is multiplied by `scale` before it is clamped.
    pub(super) fn args(&mut self, info: &VarInfo, state: &ParamState, scale: f64) -> UpdateArgs {
        let (params, group) = (self.params, &self.resolved[info.group]);
        let step = state.step + 1;
        let t = match params.step_count {
            StepCount::Shared => self.update,
            StepCount::PerVar => step,
        };
        let of = (info.group, info.decays, t);
        let known = match self.last {
            Some((last, known)) if last == of => known,
            _ => Coefficients::of_update(info.hyper(group), self.call.group_lrs[info.group], t),
        };
        self.last = Some((of, known));
        let coefficients =
            Coefficients { grad_scale: if params.maximize { -scale } else { scale }, clamp: params.clamp(), ..known };
        let layout = &state.moments.layout;
        let key = derive(derive(params.seed, info.key), step);
        let shrink = shrinkage(group.neg_log2_beta2, step, (layout.units == Units::Rows).then_some(key));
        UpdateArgs { coefficients, encoding: layout.encoding, shrink, rounding: group.storage.rounding, key }
    }
}
