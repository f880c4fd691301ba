//! The moving average of the weights, as Keras 3 keeps it.

use candle_core::DType;

use super::{Adamax, Param};
use crate::error::{Error, Result};
use crate::kernel::{Average, Context, Task};
use crate::params::Ema;
use crate::state::{Buffer, arithmetic};

/// What the averages of a call need, allocated before anything is written.
pub(super) struct Averages {
    /// For each variable without an average, an empty one.
    fresh: Vec<Option<Buffer>>,
}

impl Averages {
    pub(super) fn prepare(params: &[Param], ema: Option<Ema>) -> Result<Self> {
        let fresh = |param: &Param| match (ema, &param.ema) {
            (Some(_), None) => Buffer::zeros(&param.var, param.place()).map(Some),
            _ => Ok(None),
        };
        Ok(Self { fresh: params.iter().map(fresh).collect::<Result<_>>()? })
    }

    /// Moves every average towards its variable; `update` is the number of updates before this call.
    ///
    /// The average is a copy of the variable in all calls of the first update, and in the first call of a variable
    /// that came later.
    pub(super) fn advance(
        self,
        params: &mut [Param],
        ema: Option<Ema>,
        update: u64,
        context: &mut Context,
    ) -> Result<()> {
        let Some(Ema { momentum, overwrite_frequency }) = ema else { return Ok(()) };
        let overwrite = overwrite_frequency.is_some_and(|frequency| (update + 1).is_multiple_of(frequency));
        let mut tasks = Vec::with_capacity(params.len());
        for (nth, (param, fresh)) in params.iter_mut().zip(self.fresh).enumerate() {
            // The average is one of weights that are up to date, and may take their place.
            param.state.pay_all()?;
            let place = param.place();
            let momentum = if update == 0 || fresh.is_some() { 0.0 } else { rounded(momentum, param.var.dtype()) };
            param.ema = fresh.or(param.ema.take());
            let Some(average) = &mut param.ema else { continue };
            let kind = Average { momentum, overwrite, average };
            tasks.push(Task { place, nth, lent: Some(param.var.as_tensor()), read: None, kind });
        }
        context.average(tasks)
    }
}

/// The momentum as the arithmetic on `dtype` has it, before `1 - momentum` is made of it, as in Keras.
///
/// If each were rounded for itself, the two shares would not add up to 1: with 0.9 in f32 every call would take 2e-8 of
/// the average away, and with `overwrite_frequency` of the weights.
fn rounded(momentum: f64, dtype: DType) -> f64 {
    match arithmetic(dtype) {
        DType::F64 => momentum,
        _ => f64::from(momentum as f32),
    }
}

impl Adamax {
    /// Replaces every weight by its moving average: Keras's `finalize_variable_values`, for the end of training.
    ///
    /// A variable that has no average yet stays as it is.
    ///
    /// # Errors
    ///
    /// No moving average is kept ([`ParamsAdamax::ema`](crate::ParamsAdamax::ema) is `None`).
    pub fn finalize_ema(&mut self) -> Result<()> {
        if self.params.ema.is_none() {
            let error = Error::invalid("ema", "a moving average to finalize with", "none");
            return Err(error.of_optimizer(&self.params.name));
        }
        let mut tasks = Vec::with_capacity(self.vars.len());
        for (nth, param) in self.vars.iter_mut().enumerate() {
            param.state.pay_all()?;
            let place = param.place();
            let Some(average) = &mut param.ema else { continue };
            // With momentum 1 the average stays, and the weight becomes it.
            let kind = Average { momentum: 1.0, overwrite: true, average };
            tasks.push(Task { place, nth, lent: Some(param.var.as_tensor()), read: None, kind });
        }
        self.context.average(tasks)
    }
}
