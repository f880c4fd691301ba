//! Calls of which only the GPU knows yet whether they were skipped.
//!
//! With [`skip_nonfinite`](crate::ParamsAdamax::skip_nonfinite) on one GPU a call is skipped there, and the host hears of it
//! later (with a [`grad_scaler`](crate::ParamsAdamax::grad_scaler) before the next call). Until then it counts the call as
//! one that was not, and hands the GPU the coefficients of every number of calls that may have been; the GPU picks those of
//! its own count. Invariant: the calls that are not settled have the same variables with a gradient, so that their number
//! alone decides every counter.

use super::{Adamax, Counters, Gradients};
use crate::error::Result;

/// So many calls may be unsettled; then the host waits for the first of them.
const UNSETTLED: usize = 4;

/// The calls that are not settled.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    calls: usize,
    /// The variables that had a gradient in each of them.
    vars: Vec<usize>,
}

impl Unsettled {
    pub(super) fn len(&self) -> usize {
        self.calls
    }

    /// One more, with these variables.
    pub(super) fn push(&mut self, vars: Vec<usize>) {
        self.calls += 1;
        self.vars = vars;
    }
}

impl Adamax {
    /// Hears of the calls of which the GPU knows; of all, if it is to `wait`.
    pub(super) fn settle(&mut self, wait: bool) -> Result<()> {
        while self.unsettled.calls > 0 {
            let Some(skipped) = self.context.settle(wait)? else { break };
            self.unsettled.calls -= 1;
            self.follow_call(skipped);
            if skipped {
                self.counters = without(&self.counters, 1);
                for &index in &self.unsettled.vars {
                    self.vars[index].state.get_mut().step -= 1;
                }
            }
        }
        Ok(())
    }

    /// Makes sure that a call with these gradients can come, if it may be skipped `on_gpu`.
    pub(super) fn make_room(&mut self, gradients: Gradients<'_>, on_gpu: bool) -> Result<()> {
        self.settle(false)?;
        let is_alike = || self.unsettled.vars.iter().copied().eq(gradients.indices(&self.vars));
        // The loss scale of this call is what the last one has left.
        let limit = if self.scaler.is_some() { 1 } else { UNSETTLED };
        if self.unsettled.calls > 0 && (!on_gpu || self.unsettled.calls >= limit || !is_alike()) {
            self.settle(true)?;
        }
        Ok(())
    }

    /// How many of the unsettled calls were skipped; waits for the GPU. None of them if it does not answer, which the next
    /// step will say.
    pub(super) fn late(&self) -> u64 {
        if self.unsettled.calls == 0 {
            return 0;
        }
        self.context.unheard().unwrap_or(0)
    }

    /// The counters with all calls settled.
    pub(super) fn settled_counters(&self) -> Counters {
        without(&self.counters, self.late())
    }

    /// How many updates a variable has had that counts `step`, if `late` of the unsettled calls were skipped.
    pub(super) fn settled_step(&self, name: &str, step: u64, late: u64) -> u64 {
        let is_of_them = late > 0 && self.index_of(name).is_ok_and(|index| self.unsettled.vars.contains(&index));
        if is_of_them { step - late } else { step }
    }
}

/// The counters if so many calls that were counted have been skipped.
pub(super) fn without(counters: &Counters, skipped: u64) -> Counters {
    Counters {
        calls: counters.calls - skipped,
        updates: counters.updates - skipped,
        skipped: counters.skipped + skipped,
        ..*counters
    }
}
