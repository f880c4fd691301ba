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
        let fresh = match &self.accumulated {
            Some(Accumulated { sum: Sum::Dense(_), .. }) => None,
            Some(Accumulated { sum: Sum::Rows(rows), calls }) => {
                let sum = densify(None, rows, 1.0, &self.var)?;
                Some((Buffer::from_tensor(&sum, &self.var, self.place())?, *calls))
            }
            None => Some((Buffer::zeros(&self.var, self.place())?, 0)),
        };
        if let Some((sum, calls)) = fresh {
            self.accumulated = Some(Accumulated { sum: Sum::Dense(sum), calls });
        }
        match &mut self.accumulated {
            Some(Accumulated { sum: Sum::Dense(sum), .. }) => Ok(sum),
            _ => Err(candle_core::Error::msg("the sum is not dense").into()),
        }
    }

    /// The accumulated sum, if there is one.
    pub(super) fn sum(&self) -> Option<GradRef<'_>> {
        self.accumulated.as_ref().and_then(Accumulated::sum)
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
        let is_last = self.counters.pending + 1 >= steps;
        if is_last {
            // A call that is refused adds nothing to the sums.
            self.check_missing(|index, param| collected.get(index).is_some() || param.sum().is_some())?;
            self.check_tables(rates, |index, param| {
                let of_call = collected.get(index).map(|grad| matches!(grad, Grad::Rows(_)));
                match (of_call, param.sum().map(GradRef::is_of_rows)) {
                    (Some(of_call), Some(of_sum)) => Some(of_call && of_sum),
                    (of_call, of_sum) => of_call.or(of_sum),
                }
            })?;
            self.seek_written(Gradients::OfThisCall(collected))?;
            self.seek_written(Gradients::Accumulated { calls: steps })?;
        }
        let unscale = self.unscale();
        let mut sums = Vec::new();
        for (index, param) in self.vars.iter().enumerate() {
            if let Some(Grad::Rows(rows)) = collected.get(index) {
                sums.push((index, param.sum_with(rows, unscale)?));
            }
        }
        let mut tasks = Vec::with_capacity(self.vars.len());
        for (index, param) in self.vars.iter_mut().enumerate() {
            if let Some(Grad::Dense(grad)) = collected.get(index) {
                let place = param.place();
                let kind = Accumulate { unscale, sum: param.dense_sum()? };
                tasks.push(Task { place, nth: index, lent: None, read: Some(Source::Tensor(grad)), kind });
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
        if !is_last {
            self.counters.pending += 1;
            let (vars, call) = (collected.count(), self.counters.pending);
            return Ok(Outcome::Accumulated { vars, call, of: steps });
        }
        // A sum that has overflowed cannot be mended: where that is skipped, the calls before go with it.
        let outcome = self.update(Gradients::Accumulated { calls: steps }, rates)?;
        self.clear_sums()?;
        Ok(outcome)
    }

    /// Drops the sums; the memory of dense ones is kept for the next.
    pub(super) fn clear_sums(&mut self) -> Result<()> {
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
        Ok(())
    }

    /// How many calls wait for an update: those whose gradients have been accumulated since the last one
    /// ([`gradient_accumulation_steps`](crate::ParamsAdamax::gradient_accumulation_steps)).
    pub fn pending(&self) -> u64 {
        self.counters.pending
    }

    /// Updates with the gradients of the calls that [wait](Self::pending), and tells whether there were any: for
    /// the end of an epoch, whose number of calls is not a multiple of the accumulation steps.
    ///
    /// The update is that of the N-th call if N were the number of calls that wait: their mean is clipped, skipped
    /// if it is not finite and that is asked for, and [reported](Self::report), and the averages move once more. It
    /// is no call of its own: [`calls`](Self::calls) and schedules stay where they are, and its learning rate is
    /// that of the last call. Where it is skipped, the sums are dropped, and a
    /// [`grad_scaler`](crate::ParamsAdamax::grad_scaler) follows.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let w = Var::new(&[8f32], &Device::Cpu)?;
    /// let params = ParamsAdamax { lr: 0.5.into(), gradient_accumulation_steps: 4, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// for _batch in 0..6 {
    ///     optimizer.backward_step(&w.sum_all()?)?;
    /// }
    /// assert_eq!((optimizer.updates(), optimizer.pending()), (1, 2));
    /// assert!(optimizer.flush_gradients()?); // with the mean of two
    /// assert_eq!((optimizer.updates(), optimizer.pending(), w.to_vec1::<f32>()?), (2, 0, vec![7.0]));
    /// assert!(!optimizer.flush_gradients()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`step`](candle_nn::Optimizer::step), but for what it says of single gradients. Nothing has changed then.
    pub fn flush_gradients(&mut self) -> Result<bool> {
        self.settle(true).map_err(|error| self.own(error))?;
        if self.vars.iter().all(|param| param.sum().is_none()) {
            // The variables of the calls that waited, if any, have been removed.
            self.counters.pending = 0;
            return Ok(false);
        }
        self.traced(Self::flush)?;
        Ok(true)
    }

    /// Drops the gradients of the calls that [wait](Self::pending), and gives the number of these calls. What they
    /// counted, and where averages are, stays.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let w = Var::new(&[8f32], &Device::Cpu)?;
    /// let params = ParamsAdamax { gradient_accumulation_steps: 4, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// optimizer.backward_step(&w.sum_all()?)?;
    /// assert_eq!(optimizer.discard_gradients()?, 1);
    /// assert_eq!((optimizer.calls(), optimizer.updates(), optimizer.pending()), (1, 0, 0));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A device whose memory cannot be written.
    pub fn discard_gradients(&mut self) -> Result<u64> {
        let calls = self.counters.pending;
        self.clear_sums().map_err(|error| self.own(error))?;
        Ok(calls)
    }
}
