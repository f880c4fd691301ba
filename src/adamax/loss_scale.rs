//! The loss scale of an optimizer: what losses are multiplied by, and gradients divided by.
//!
//! Invariant: with a [`GradScaler`](crate::GradScaler) at most one call is not settled, the last one; it is before the next
//! loss is scaled and before the next gradients are unscaled, so that both have the same scale.

use candle_core::{DType, Tensor};

use super::Adamax;
use super::report::Outcome;
use crate::error::Result;
use crate::scaler::GradScalerState;

impl Adamax {
    /// What the next loss is to be multiplied by: the scale of [`grad_scaler`](crate::ParamsAdamax::grad_scaler), or
    /// [`loss_scale_factor`](crate::ParamsAdamax::loss_scale_factor), or 1.
    ///
    /// Where a GPU has yet to say whether the last call was skipped, this waits for it.
    pub fn loss_scale(&self) -> f64 {
        match self.scaler_after(self.late()) {
            Some(state) => f64::from(state.scale),
            None => self.params.loss_scale_factor.unwrap_or(1.0),
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
    /// use candle_adamax::{Adamax, GradScaler, ParamsAdamax};
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let w = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    /// let params = ParamsAdamax { grad_scaler: Some(GradScaler::default()), ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// let loss = w.sqr()?.sum_all()?;
    /// let grads = optimizer.scale(&loss)?.backward()?; // 65,536 times those of the loss
    /// optimizer.step(&grads)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A device that does not answer, or has no memory.
    pub fn scale(&mut self, loss: &Tensor) -> Result<Tensor> {
        self.try_scale(loss).map_err(|error| self.own(error))
    }

    fn try_scale(&mut self, loss: &Tensor) -> Result<Tensor> {
        if self.scaler.is_some() {
            // By the event behind that call, and not by what the device has been given to do since.
            self.settle(true)?;
        }
        let scale = self.loss_scale();
        if scale == 1.0 {
            return Ok(loss.clone());
        }
        let loss = match loss.dtype() {
            DType::F16 | DType::BF16 => loss.to_dtype(DType::F32)?,
            _ => loss.clone(),
        };
        Ok((loss * scale)?)
    }

    /// What gradients are multiplied by to undo the scaling of the loss.
    pub(super) fn unscale(&self) -> f64 {
        1.0 / self.loss_scale()
    }

    /// Lets the loss scale follow a call, unless only the GPU knows yet what has become of it.
    pub(super) fn follow(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::None | Outcome::NoGradients | Outcome::UpdatedOnGpu { skips: true, .. } => {}
            Outcome::Skipped => self.follow_call(true),
            Outcome::Accumulated { .. } | Outcome::Updated { .. } | Outcome::UpdatedOnGpu { skips: false, .. } => {
                self.follow_call(false);
            }
        }
    }

    /// Lets the loss scale follow a call in which something was not finite, or nothing.
    pub(super) fn follow_call(&mut self, found_inf: bool) {
        if let (Some(scaler), Some(state)) = (&self.params.grad_scaler, &mut self.scaler) {
            *state = scaler.after(*state, found_inf);
        }
    }

    /// The state of the loss scale, if so many of the calls that are not settled have been skipped: 0 or 1.
    pub(super) fn scaler_after(&self, late: u64) -> Option<GradScalerState> {
        let (scaler, state) = (self.params.grad_scaler?, self.scaler?);
        Some(if self.unsettled.len() == 0 { state } else { scaler.after(state, late > 0) })
    }
}
