//! The moving average of the weights, as Keras 3 keeps it.

use candle_core::DType;

use super::Adamax;
use super::call::Turn;
use super::grads::Grads;
use super::vars::Param;
use crate::checkpoint::Counters;
use crate::error::{Error, Result};
use crate::kernel::{Average, Task};
use crate::params::Ema;
use crate::rounding::derive;
use crate::state::{Buffer, arithmetic};

/// Memory for the averages that a call begins, made before anything is written.
pub(super) struct Averages {
    fresh: Vec<(usize, Buffer)>,
}

impl Averages {
    /// `trains` tells which variables have a gradient in an update of this call: an average begins with the first one.
    pub(super) fn prepare(adamax: &Adamax, trains: impl Fn(usize) -> bool) -> Result<Self> {
        let Adamax { params, vars, .. } = adamax;
        let begins = |&index: &usize| params.ema.is_some() && vars[index].average.is_none() && trains(index);
        let fresh = (0..vars.len()).filter(begins).map(|index| {
            let info = &vars[index];
            Ok((index, Buffer::zeros(&info.var, info.place)?))
        });
        Ok(Self { fresh: fresh.collect::<Result<_>>()? })
    }

    /// Moves every average towards its variable, before the call is counted.
    ///
    /// An average begins as a copy of its variable, after the first update in which that has a gradient. A variable
    /// that has never had one has no average, and is left alone.
    pub(super) fn advance(self, adamax: &mut Adamax, turn: Turn) -> Result<()> {
        let Some(Ema { momentum, overwrite_frequency }) = adamax.params.ema else { return Ok(()) };
        let Counters { calls, updates, .. } = adamax.progress.counters;
        let overwrite = overwrite_frequency.is_some_and(|frequency| (updates + 1).is_multiple_of(frequency));
        let write = match turn {
            Turn::Flush => derive(FLUSHED, updates),
            _ => derive(OVERWRITTEN, calls),
        };
        let mut begins = vec![updates == 0; adamax.vars.len()];
        for (index, fresh) in self.fresh {
            (adamax.vars[index].average, begins[index]) = (Some(fresh), true);
        }
        adamax.move_averages(
            Write { key: write, overwrite },
            |index, dtype| if begins[index] { 0.0 } else { exact(momentum, dtype) },
        )
    }
}

impl Adamax {
    /// Refuses gradients of rows beside averages.
    pub(super) fn check_averages(&self, grads: &Grads<'_>) -> Result<()> {
        match (self.params.ema, grads.first_of_rows()) {
            (Some(_), Some(index)) => {
                let name = &self.vars[index].name;
                let expected = format!("none with `{name}`, whose average would cost all of its rows");
                Err(Error::invalid("ema", expected, "a gradient of some rows"))
            }
            _ => Ok(()),
        }
    }

    /// Moves averages towards their variables, of which they keep a share of `momentum`.
    fn move_averages(&mut self, write: Write, momentum: impl Fn(usize, DType) -> f64) -> Result<()> {
        let Self { params, resolved, vars, backends, .. } = self;
        let mut moves = Vec::new();
        for (index, param) in vars.iter_mut().enumerate() {
            let Param { info, state, average: Some(average), .. } = &mut **param else { continue };
            let mut state = state.lock();
            // The average is one of all rows, as they would be.
            state.catch_up()?;
            moves.push((index, info, average, state));
        }
        let tasks = moves.iter_mut().map(|(index, info, average, state)| {
            let (momentum, rounding) = (momentum(*index, info.var.dtype()), resolved[info.group].storage.rounding);
            let Write { key, overwrite } = write;
            let key = derive(derive(params.seed, info.key), key);
            let (place, master) = (info.place, state.master.as_mut());
            let kind = Average { momentum, overwrite, average, master, rounding, key };
            Task { place, nth: *index, lent: Some(info.var.as_tensor()), read: None, kind }
        });
        backends.average(tasks.collect())
    }
}

/// Whether variables become their averages.
#[derive(Clone, Copy)]
struct Write {
    /// Makes the random numbers of this write differ from those of all others.
    key: u64,
    overwrite: bool,
}

/// Tell the keys of the random numbers of averages from those of updates, whose numbers are small.
const OVERWRITTEN: u64 = 0x6f76_6572_7772_6974;
const FLUSHED: u64 = 0x666c_7573_6865_6421;
const FINALIZED: u64 = 0x6669_6e61_6c69_7a65;

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
    /// [`Rounding`](crate::Rounding) says; with a master copy the average becomes that, too.
    ///
    /// # Errors
    ///
    /// No moving average is kept ([`ParamsAdamax::ema`](crate::ParamsAdamax::ema) is `None`).
    pub fn finalize_ema(&mut self) -> Result<()> {
        self.named(|adamax| {
            if adamax.params.ema.is_none() {
                return Err(Error::invalid("ema", "a moving average to finalize with", "none"));
            }
            adamax.sync()?;
            let write = derive(FINALIZED, adamax.progress.counters.calls);
            // With momentum 1 the average stays, and the weight becomes it.
            adamax.move_averages(Write { key: write, overwrite: true }, |_, _| 1.0)
        })
    }
}
