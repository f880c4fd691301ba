//! Counters and loss scale of an optimizer, and the call whose outcome only a GPU knows yet.
//!
//! Invariant: [`Progress::record`] is the only place that counts. At most one call is in flight: whatever writes begins with
//! [`Adamax::sync`], and whatever reads asks [`Adamax::resolved`].

use candle_core::{DType, Tensor};

use super::Adamax;
use super::call::Turn;
use super::outcome::{Outcome, TotalNorm};
use crate::checkpoint::Counters;
use crate::error::Result;
use crate::scaler::{GradScalerState, LossScale};

/// Counters and loss scale.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) counters: Counters,
    pub(super) scaler: Option<GradScalerState>,
    pub(super) in_flight: Option<InFlight>,
}

/// A call that updates or is skipped, as a GPU decides.
#[derive(Clone, Debug)]
pub(super) struct InFlight {
    /// The indices of the variables that it updates, ascending.
    vars: Vec<usize>,
}

impl InFlight {
    pub(super) fn new(vars: Vec<usize>) -> Self {
        Self { vars }
    }

    /// The outcome, if it is not skipped.
    fn updated(&self) -> Outcome {
        Outcome::Updated { vars: self.vars.len(), norm: TotalNorm::OnDevice }
    }
}

impl Progress {
    /// Counts a call, and lets the loss scale follow it. A call in flight is counted when it is known.
    pub(super) fn record(&mut self, turn: Turn, outcome: Outcome, loss_scale: LossScale) {
        let Counters { calls, updates, skipped, pending } = &mut self.counters;
        let found_inf = match outcome {
            Outcome::NoGradients | Outcome::InFlight { .. } => return,
            Outcome::Skipped | Outcome::Overflowed => {
                *skipped += 1;
                true
            }
            Outcome::Accumulated { .. } | Outcome::Updated { .. } => false,
        };
        match outcome {
            Outcome::Accumulated { .. } => *pending += 1,
            Outcome::Updated { .. } => (*updates, *pending) = (*updates + 1, 0),
            Outcome::Overflowed => *pending = 0,
            Outcome::NoGradients | Outcome::Skipped | Outcome::InFlight { .. } => {}
        }
        let is_call = turn != Turn::Flush;
        *calls += u64::from(is_call && !found_inf);
        // A flush has no loss of its own. If it overflows, the scale was too large for the calls before.
        if let (Some(scaler), Some(state), true) = (loss_scale.scaler(), &mut self.scaler, is_call || found_inf) {
            *state = scaler.after(*state, found_inf);
        }
    }

    /// Counts no calls that wait any more, since their gradients are gone. Returns how many they were.
    pub(super) fn forget_pending(&mut self) -> u64 {
        std::mem::take(&mut self.counters.pending)
    }
}

impl Adamax {
    /// Learns whether the call in flight was skipped, and counts it.
    ///
    /// The GPU copies its decision before its update begins, and the next forward and backward pass are queued behind that
    /// update. So it has work while the host waits here.
    pub(super) fn sync(&mut self) -> Result<()> {
        let Some(in_flight) = &self.progress.in_flight else { return Ok(()) };
        // Asked first: an error leaves the call in flight.
        let outcome = if self.backends.was_skipped()? {
            Outcome::Skipped
        } else {
            in_flight.vars.iter().for_each(|&index| self.vars[index].state.lock().step += 1);
            in_flight.updated()
        };
        self.progress.in_flight = None;
        self.progress.record(Turn::Update, outcome, self.params.loss_scale);
        self.report.outcome = Some(outcome);
        Ok(())
    }

    /// Counters and loss scale with the call in flight counted. Waits for a GPU that decides; a device that does not answer
    /// is an error of the next call, and counts as one that has updated until then.
    pub(super) fn resolved(&self) -> Progress {
        let mut progress = self.progress.clone();
        if let Some(in_flight) = progress.in_flight.take() {
            let is_skipped = self.backends.was_skipped().unwrap_or(false);
            let outcome = if is_skipped { Outcome::Skipped } else { in_flight.updated() };
            progress.record(Turn::Update, outcome, self.params.loss_scale);
        }
        progress
    }

    /// The number of updates that variable `index` has had, with the call in flight counted.
    pub(super) fn step_of(&self, index: usize) -> u64 {
        let in_flight = self.progress.in_flight.as_ref().filter(|call| call.vars.binary_search(&index).is_ok());
        let counts = in_flight.is_some() && !self.backends.was_skipped().unwrap_or(false);
        self.vars[index].state.read(|state| state.step) + u64::from(counts)
    }

    /// How many calls of `step` counted, that is, were neither skipped nor failed nor without any gradient. Schedules count
    /// them.
    pub fn calls(&self) -> u64 {
        self.resolved().counters.calls
    }

    /// How many updates there were: one for every N calls, where N are accumulated, and one for each
    /// [flush](Self::flush_gradients) of fewer.
    pub fn updates(&self) -> u64 {
        self.resolved().counters.updates
    }

    /// How many calls were skipped because something was not finite.
    pub fn skipped(&self) -> u64 {
        self.resolved().counters.skipped
    }

    /// All counters.
    pub fn counters(&self) -> Counters {
        self.resolved().counters
    }

    /// Factor of the next loss, as [`loss_scale`](crate::ParamsAdamax::loss_scale) sets it or has adapted it.
    ///
    /// Where a GPU has yet to say whether the last call was skipped, this waits for it.
    pub fn loss_scale(&self) -> f64 {
        match self.resolved().scaler {
            Some(state) => f64::from(state.scale),
            None => self.params.loss_scale.constant(),
        }
    }

    /// The loss, multiplied by the [loss scale](Self::loss_scale): for those who call `backward` themselves. The gradients
    /// of the result are what `step` is to be given.
    ///
    /// A loss of f16 or bf16 is scaled in f32, as a scalar is in PyTorch, so that the product is finite. Its own gradient
    /// is the scale, in its dtype, and infinite in f16 from 65,520 on: with the default scale the first call is then
    /// skipped. Better take the mean in f32 (`to_dtype(DType::F32)` before the loss).
    ///
    /// ```
    /// use candle_adamax::{Adamax, GradScaler, LossScale, ParamsAdamax};
    /// use candle_core::{Device, Var};
    ///
    /// let w = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    /// let params = ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// let loss = w.sqr()?.sum_all()?;
    /// let grads = optimizer.scale_loss(&loss)?.backward()?; // 65,536 times those of the loss
    /// optimizer.step(&grads)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A device that does not answer, or has no memory.
    pub fn scale_loss(&mut self, loss: &Tensor) -> Result<Tensor> {
        self.named(|adamax| {
            if adamax.progress.scaler.is_some() {
                adamax.sync()?;
            }
            let scale = adamax.loss_scale();
            Ok(match loss.dtype() {
                _ if scale == 1.0 => loss.clone(),
                DType::F16 | DType::BF16 => (loss.to_dtype(DType::F32)? * scale)?,
                _ => (loss * scale)?,
            })
        })
    }
}
