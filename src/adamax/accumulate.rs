//! Gradients that wait for their update: summed in the shape of the variable, or by rows where they are of rows.

use super::collect::{Collected, Grad};
use super::report::Outcome;
use super::{Adamax, GradRef, Gradients, Param, Rates};
use crate::error::Result;
use crate::gradient::Summary;
use crate::gradient::sparse::{self, densify};
use crate::kernel::{Accumulate, RowGrad, Source, Task};
use crate::state::Buffer;

/// The sum of unscaled gradients since the last update.
pub(super) struct Accumulated {
    pub(super) sum: Sum,
    /// In how many calls the variable had a gradient; the sum counts for nothing if there was none.
    pub(super) calls: u64,
}

/// A sum of gradients.
pub(super) enum Sum {
    /// In the shape of the variable.
    Dense(Buffer),
    /// Of the rows that had any.
    Rows(RowGrad<'static>),
}

impl Param {
    /// The accumulated sum with the gradient of some rows added.
    fn sum_with(&self, rows: &RowGrad<'_>, unscale: f64) -> Result<Sum> {
        let var = self.var.as_tensor();
        // A dense sum of no calls is an empty buffer that was kept; rows do not become dense for it.
        let sum = self.accumulated.as_ref().filter(|accumulated| accumulated.calls > 0);
        Ok(match sum.map(|accumulated| &accumulated.sum) {
            Some(Sum::Dense(sum)) => {
                let sum = densify(Some(&sum.to_tensor(var.shape())?), rows, unscale, var)?;
                Sum::Dense(Buffer::from_tensor(&sum, var, self.place())?)
            }
            Some(Sum::Rows(sum)) => Sum::Rows(sparse::accumulate(Some(sum), rows, unscale, var.dtype())?),
            None => Sum::Rows(sparse::accumulate(None, rows, unscale, var.dtype())?),
        })
    }

    /// The accumulated sum, to add a dense gradient to; what it was of some rows only is zero elsewhere.
    fn dense_sum(&mut self) -> Result<&mut Buffer> {
        let (sum, calls) = match self.accumulated.take() {
            None => (Buffer::zeros(&self.var, self.place())?, 0),
            Some(Accumulated { sum: Sum::Dense(sum), calls }) => (sum, calls),
            Some(Accumulated { sum: Sum::Rows(rows), calls }) => {
                let sum = densify(None, &rows, 1.0, &self.var)?;
                (Buffer::from_tensor(&sum, &self.var, self.place())?, calls)
            }
        };
        match &mut self.accumulated.insert(Accumulated { sum: Sum::Dense(sum), calls }).sum {
            Sum::Dense(sum) => Ok(sum),
            Sum::Rows(_) => Err(candle_core::Error::msg("the sum is not dense").into()),
        }
    }
}

impl Accumulated {
    /// The sum, if there is one.
    pub(super) fn sum(&self) -> Option<GradRef<'_>> {
        (self.calls > 0).then_some(match &self.sum {
            Sum::Dense(buffer) => GradRef::Dense(Source::Buffer(buffer)),
            Sum::Rows(rows) => GradRef::Rows(rows),
        })
    }
}

impl Adamax {
    /// Adds the gradients to what was accumulated, and updates with the mean on the last of `steps` calls.
    pub(super) fn accumulate(&mut self, collected: &Collected<'_>, steps: u64, rates: &Rates) -> Result<Outcome> {
        let sources = || Gradients::OfThisCall(collected).sources(&self.vars);
        if self.params.skips_nonfinite() && !Summary::check(&mut self.context, &sources()?)? {
            return Ok(Outcome::Skipped);
        }
        let unscale = self.unscale();
        let mut tasks = Vec::with_capacity(self.vars.len());
        let mut sums = Vec::new();
        for (index, param) in self.vars.iter_mut().enumerate() {
            match collected.get(index) {
                None => {}
                Some(Grad::Rows(rows)) => sums.push((index, param.sum_with(rows, unscale)?)),
                Some(Grad::Dense(grad)) => {
                    let place = param.place();
                    let kind = Accumulate { unscale, sum: param.dense_sum()? };
                    tasks.push(Task { place, nth: index, lent: None, read: Some(Source::Tensor(grad)), kind });
                }
            }
        }
        self.context.accumulate(tasks)?;
        for (index, sum) in sums {
            let accumulated = &mut self.vars[index].accumulated;
            let calls = accumulated.as_ref().map_or(0, |accumulated| accumulated.calls);
            *accumulated = Some(Accumulated { sum, calls });
        }
        for (index, param) in self.vars.iter_mut().enumerate() {
            if let (Some(_), Some(accumulated)) = (collected.get(index), &mut param.accumulated) {
                accumulated.calls += 1;
            }
        }
        if self.counters.pending + 1 < steps {
            self.counters.pending += 1;
            return Ok(Outcome::Accumulated);
        }
        // A sum that has overflowed cannot be mended: where that is skipped, the calls before go with it.
        let outcome = self.update(Gradients::Accumulated { steps }, rates)?;
        self.counters.pending = 0;
        for accumulated in self.vars.iter_mut().map(|param| &mut param.accumulated) {
            match accumulated {
                Some(Accumulated { sum: Sum::Rows(_), .. }) => *accumulated = None,
                Some(Accumulated { sum: Sum::Dense(sum), calls }) if *calls > 0 => {
                    *calls = 0;
                    sum.clear()?;
                }
                _ => {}
            }
        }
        Ok(outcome)
    }
}
