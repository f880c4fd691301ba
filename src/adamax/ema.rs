//! The moving average of the weights, as Keras 3 keeps it.

use candle_core::{DType, Tensor};

use super::held::StateMut;
use super::rates::Rates;
use super::{Adamax, Param};
use crate::error::{Error, Result};
use crate::kernel::{Average, Context, Task};
use crate::params::Ema;
use crate::rounding::{Rounding, derive};
use crate::state::{Buffer, arithmetic};

/// What the averages of a call need, allocated before anything is written.
pub(super) struct Averages {
    /// For each variable whose average begins, an empty one.
    fresh: Vec<Option<Buffer>>,
}

impl Averages {
    /// `trains` tells which variables have a gradient in an update of this call: an average begins with the first one.
    pub(super) fn prepare(
        params: &[Box<Param>],
        ema: Option<Ema>,
        trains: impl Fn(usize, &Param) -> bool,
    ) -> Result<Self> {
        if ema.is_none() {
            return Ok(Self { fresh: Vec::new() });
        }
        let fresh = params.iter().enumerate().map(|(index, param)| match &param.ema {
            None if trains(index, param) => Buffer::zeros(&param.var, param.place()).map(Some),
            _ => Ok(None),
        });
        Ok(Self { fresh: fresh.collect::<Result<_>>()? })
    }

    /// Moves every average towards its variable; `update` is the number of updates before this call.
    ///
    /// An average begins as a copy of its variable, after the first update in which that has a gradient. A variable
    /// that has never had one has no average, and is left alone.
    pub(super) fn advance(
        self,
        params: &mut [Box<Param>],
        ema: Option<Ema>,
        update: u64,
        rounded: &Rounded,
        context: &mut Context,
    ) -> Result<()> {
        let Some(Ema { momentum, overwrite_frequency }) = ema else { return Ok(()) };
        let overwrite = overwrite_frequency.is_some_and(|frequency| (update + 1).is_multiple_of(frequency));
        let mut moves = Vec::with_capacity(params.len());
        for (param, fresh) in params.iter_mut().zip(self.fresh) {
            let momentum = if update == 0 || fresh.is_some() { 0.0 } else { exact(momentum, param.var.dtype()) };
            param.ema = fresh.or(param.ema.take());
            moves.extend(Move::prepare(param, momentum, overwrite, rounded)?);
        }
        context.average(moves.iter_mut().enumerate().map(|(nth, each)| each.task(nth)).collect())
    }
}

/// How averages become weights again.
pub(super) struct Rounded {
    /// The rounding of each group.
    roundings: Vec<Rounding>,
    /// The seed of the optimizer's random numbers.
    seed: u64,
    /// Which of the optimizer's writes of averages it is: no other write of weights, by an update or by a row that catches
    /// up, has its random numbers.
    write: u64,
}

impl Rounded {
    /// For call `call` of the optimizer.
    pub(super) fn of_call(rates: &Rates, seed: u64, call: u64) -> Self {
        Self::of(rates, seed, derive(OVERWRITTEN, call))
    }

    /// For a flush of gradients after `updates` updates.
    pub(super) fn of_flush(rates: &Rates, seed: u64, updates: u64) -> Self {
        Self::of(rates, seed, derive(FLUSHED, updates))
    }

    fn of(rates: &Rates, seed: u64, write: u64) -> Self {
        let roundings = rates.groups.iter().map(|group| group.plan.keeping.rounding).collect();
        Self { roundings, seed, write }
    }
}

/// Tell the keys of the random numbers of averages from those of updates, whose numbers are small.
const OVERWRITTEN: u64 = 0x6f76_6572_7772_6974;
const FLUSHED: u64 = 0x666c_7573_6865_6421;
const FINALIZED: u64 = 0x6669_6e61_6c69_7a65;

/// The average of one variable and what it moves towards. Nobody else reads or writes the state meanwhile.
struct Move<'p> {
    var: &'p Tensor,
    momentum: f64,
    overwrite: bool,
    average: &'p mut Buffer,
    state: StateMut<'p>,
    rounding: Rounding,
    key: u64,
}

impl<'p> Move<'p> {
    /// None for a variable without an average.
    fn prepare(param: &'p mut Param, momentum: f64, overwrite: bool, rounded: &Rounded) -> Result<Option<Self>> {
        let Param { var, group, key, state, ema, .. } = param;
        let Some(average) = ema else { return Ok(None) };
        let mut state = state.get_mut();
        // The average is one of all rows, as they would be.
        state.pay_all()?;
        let rounding = rounded.roundings.get(*group).copied().unwrap_or_default();
        let key = derive(derive(rounded.seed, *key), rounded.write);
        Ok(Some(Self { var: var.as_tensor(), momentum, overwrite, average, state, rounding, key }))
    }

    fn task(&mut self, nth: usize) -> Task<'_, Average<'_>> {
        let Self { var, momentum, overwrite, average, state, rounding, key } = self;
        let (momentum, overwrite, rounding, key) = (*momentum, *overwrite, *rounding, *key);
        let (place, master) = (state.place(), state.master.as_mut());
        let kind = Average { momentum, overwrite, average, master, rounding, key };
        Task { place, nth, lent: Some(var), read: None, kind }
    }
}

/// The momentum as the arithmetic on `dtype` has it, before `1 - momentum` is made of it, as in Keras.
///
/// If each were rounded for itself, the two shares would not add up to 1: with 0.9 in f32 every call would take 2e-8 of
/// the average away, and with `overwrite_frequency` of the weights.
fn exact(momentum: f64, dtype: DType) -> f64 {
    match arithmetic(dtype) {
        DType::F64 => momentum,
        _ => f64::from(momentum as f32),
    }
}

impl Adamax {
    /// Replaces every weight by its moving average: Keras's `finalize_variable_values`, for the end of training.
    ///
    /// A variable that has no average yet stays as it is. f16 and bf16 variables are rounded as their
    /// [`Rounding`] says; with a master copy the average becomes that, too.
    ///
    /// # Errors
    ///
    /// No moving average is kept ([`ParamsAdamax::ema`](crate::ParamsAdamax::ema) is `None`).
    pub fn finalize_ema(&mut self) -> Result<()> {
        self.try_finalize_ema().map_err(|error| error.of_optimizer(&self.params.name))
    }

    fn try_finalize_ema(&mut self) -> Result<()> {
        if self.params.ema.is_none() {
            return Err(Error::invalid("ema", "a moving average to finalize with", "none"));
        }
        let roundings = self.groups.iter().map(|group| Ok(group.keeping(&self.params)?.rounding));
        let rounded = Rounded {
            roundings: roundings.collect::<Result<_>>()?,
            seed: self.params.seed,
            write: derive(FINALIZED, self.settled_counters().calls),
        };
        let mut moves = Vec::with_capacity(self.vars.len());
        for param in &mut self.vars {
            // With momentum 1 the average stays, and the weight becomes it.
            moves.extend(Move::prepare(param, 1.0, true, &rounded)?);
        }
        self.context.average(moves.iter_mut().enumerate().map(|(nth, each)| each.task(nth)).collect())
    }
}
