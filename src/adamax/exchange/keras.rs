//! Keras's Adamax, both ways.

use std::path::Path;

use candle_core::Device;

use super::super::Adamax;
use crate::checkpoint::keras::{self, Extras, KerasState};
use crate::checkpoint::plain::is_zero;
use crate::checkpoint::{AtomicFile, Counters};
use crate::error::{Error, ErrorKind, Result};
use crate::group::{GroupLr, GroupSettings};
use crate::params::{ParamsAdamax, StepCount};
use crate::rule::{EpsMode, WeightDecay};
use crate::scaler::LossScale;
use crate::schedule::LearningRate;

impl Adamax {
    /// Writes the state of this optimizer as the variables of Keras 3's Adamax: a safetensors file with `NAME_momentum`
    /// and `NAME_norm` for each variable, `iteration`, `learning_rate`, and where they are kept `NAME_average` and
    /// `NAME_gradient_accumulator`. `examples/exchange/keras3.py` puts it into a Keras model; the settings travel as
    /// [`to_keras_json`](crate::ParamsAdamax::to_keras_json). The weights are not in it (`VarMap::save` writes them; call
    /// it afterwards with [`SparseUpdate::Exact`](crate::SparseUpdate::Exact)).
    ///
    /// Tensors are f32 (f64 for f64 variables), decoded if [`state_dtype`](crate::ParamsAdamax::state_dtype) encodes
    /// them; Keras converts them to the dtype of its variable. Masters are a part of the weights, and left out.
    /// `iteration` is the number of calls, or after [`flush_gradients`](Self::flush_gradients) and the like what Keras makes
    /// the number of updates of. `learning_rate` is there unless it is a schedule, of which Keras has no
    /// variable, either.
    ///
    /// The file is complete or it is not there, as that of [`save`](Self::save).
    ///
    /// # Errors
    ///
    /// State that Keras cannot hold: another convention of [`eps_mode`](crate::ParamsAdamax::eps_mode), L2,
    /// [`maximize`](crate::ParamsAdamax::maximize), [`LossScale::Dynamic`] or a
    /// [`plateau`](crate::ParamsAdamax::plateau), variables whose own counters differ where those count, groups with numbers of
    /// their own, a number of calls that is not N for each update where a schedule counts them; variables without names;
    /// the system's errors.
    pub fn save_keras(&self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        let write = || {
            self.require_keras()?;
            let file = AtomicFile::create(path.as_ref())?;
            keras::write(&self.keras_state()?, file)
        };
        write().map_err(|error| self.own(error))
    }

    /// Takes the variables of Keras 3's Adamax from a file that `examples/exchange/keras3.py`, or
    /// [`save_keras`](Self::save_keras), wrote. The next steps are then those of the run in Keras, if the settings are:
    /// [`from_keras_json`](crate::ParamsAdamax::from_keras_json) reads them.
    ///
    /// - A variable `dense/kernel` has `dense/kernel_momentum` and `dense/kernel_norm`, in its shape and in its dtype or
    ///   f32. The names that Keras gives its own variables, `adamax/dense_kernel_momentum`, are understood, too.
    /// - `NAME_average` is there exactly if [`ema`](crate::ParamsAdamax::ema) is set, `NAME_gradient_accumulator` if
    ///   [`gradient_accumulation_steps`](crate::ParamsAdamax::gradient_accumulation_steps) is more than 1.
    /// - `learning_rate` takes the place of a number; a schedule, or what comes from outside, stays.
    /// - All other settings, those of groups too, stay as they are.
    ///
    /// # Errors
    ///
    /// A file that is missing, truncated or of another kind; a tensor that is missing, surplus or of another shape or
    /// dtype; an optimizer whose [`eps_mode`](crate::ParamsAdamax::eps_mode) is not [`AddToNorm`](crate::EpsMode::AddToNorm);
    /// a learning rate or a count that is not allowed. Nothing has changed then.
    pub fn load_keras(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        let path = path.as_ref();
        let loaded = self.require_eps_mode(EpsMode::AddToNorm, "Keras");
        let loaded = loaded.and_then(|()| self.try_load_keras(path).map_err(|error| error.in_file(path)));
        loaded.map_err(|error| self.own(error))
    }

    /// Writes the state in the order of `get_weights()` of Keras 2's optimizers and of `tf_keras.optimizers.legacy`: a
    /// safetensors file whose tensors are called `0`, the iteration, then `1` to `n`, m of each variable, then those of
    /// their u. `order` is that of the model's trainable variables, as the names that they have here.
    ///
    /// # Errors
    ///
    /// As [`save_keras`](Self::save_keras); moving averages or accumulation, which those optimizers do not have; an
    /// `order` in which a variable is missing, unknown or there twice.
    pub fn save_keras_legacy(&self, path: impl AsRef<Path>, order: &[impl AsRef<str>]) -> Result<()> {
        let write = || {
            let order = self.legacy_order(order)?;
            self.require_keras()?;
            let file = AtomicFile::create(path.as_ref())?;
            keras::write_legacy(&self.keras_state()?, &order, file)
        };
        write().map_err(|error| self.own(error))
    }

    /// Takes the state from a file in the order of [`save_keras_legacy`](Self::save_keras_legacy), which has no names:
    /// what tells variables apart is `order`, and shapes only guard it. Settings stay as they are, the learning rate too.
    ///
    /// # Errors
    ///
    /// As [`load_keras`](Self::load_keras), and as [`save_keras_legacy`](Self::save_keras_legacy) of the order. Nothing
    /// has changed then.
    pub fn load_keras_legacy(&mut self, path: impl AsRef<Path>, order: &[impl AsRef<str>]) -> Result<()> {
        let path = path.as_ref();
        let loaded = self.legacy_order(order).and_then(|order| {
            let read = keras::read_legacy(path, &order, |state| self.check_plain(&state.vars));
            read.and_then(|state| self.take_keras(state)).map_err(|error| error.in_file(path))
        });
        loaded.map_err(|error| self.own(error))
    }

    /// Makes sure that Keras can hold all that [`keras_state`](Self::keras_state) gives. It comes before that, since rows
    /// catch up there, which changes weights.
    fn require_keras(&self) -> Result<()> {
        self.require_eps_mode(EpsMode::AddToNorm, "Keras")?;
        self.require_keras_settings()?;
        self.groups.iter().enumerate().try_for_each(|(index, group)| self.require_no_numbers(index, group))?;
        let counters = self.resolved().counters;
        let Counters { calls, updates, .. } = counters;
        for (index, info) in self.vars.iter().enumerate() {
            let (name, step) = (&info.name, self.step_of(index));
            if self.params.step_count == StepCount::PerVar && step != updates {
                let expected = format!("{updates}, since Keras counts for all variables together");
                return Err(Error::checkpoint(format!("{name}.step"), expected, step));
            }
        }
        let iteration = self.keras_iteration(&counters);
        keras::check_iteration(iteration)?;
        if self.keras_rate(calls)?.is_none() && iteration != calls {
            let expected = format!(
                "{iteration}, by which Keras counts updates and steps of the schedule alike: after `flush_gradients`, \
                 `discard_gradients` or another number of accumulation steps they differ"
            );
            return Err(Error::checkpoint("counters.calls", expected, calls));
        }
        Ok(())
    }

    /// One number, of which Keras makes both: how many updates there were, and how many calls wait.
    fn keras_iteration(&self, counters: &Counters) -> u64 {
        counters.updates.saturating_mul(self.params.gradient_accumulation_steps).saturating_add(counters.pending)
    }

    /// The learning rate after so many calls, unless it is a schedule, for which Keras has no variable.
    fn keras_rate(&self, calls: u64) -> Result<Option<f64>> {
        match &self.params.lr {
            LearningRate::Constant(_) | LearningRate::Tensor(_) => self.rate(calls).map(Some),
            LearningRate::Schedule(_) | LearningRate::Custom(_) => Ok(None),
        }
    }

    /// The state, which [Keras can hold](Self::require_keras).
    fn keras_state(&self) -> Result<KerasState> {
        let (counters, mut vars) = self.plain()?;
        let calls = counters.calls;
        let (averages, accumulators) = (self.params.ema.is_some(), self.params.gradient_accumulation_steps > 1);
        for (name, var) in &mut vars {
            let zeros = || var.exp_avg.zeros_like();
            if averages && var.ema.is_none() {
                // Before the first call it is nothing yet; then that of a variable without a gradient is the variable.
                let weight = &self.vars[self.index_of(name)?].var;
                var.ema = Some(match calls {
                    0 => zeros()?,
                    _ => weight.to_device(&Device::Cpu)?.to_dtype(var.exp_avg.dtype())?.copy()?,
                });
            }
            if accumulators && var.accumulated.is_none() {
                var.accumulated = Some((zeros()?, 0));
            }
        }
        Ok(KerasState { iteration: self.keras_iteration(&counters), learning_rate: self.keras_rate(calls)?, vars })
    }

    /// Makes sure that no setting is one that Keras's optimizer does not have: the next steps would be others there.
    fn require_keras_settings(&self) -> Result<()> {
        let ParamsAdamax { weight_decay, maximize, loss_scale, plateau, .. } = &self.params;
        let refuse =
            |entry, expected, got: &dyn std::fmt::Debug| Err(Error::checkpoint(entry, expected, format!("{got:?}")));
        match (weight_decay, maximize, loss_scale, plateau) {
            (WeightDecay::L2(decay), ..) if *decay != 0.0 => {
                refuse("weight_decay", "None or Decoupled, Keras's way of decaying", weight_decay)
            }
            (_, true, ..) => refuse("maximize", "false, since Keras always goes down", maximize),
            (_, _, LossScale::Dynamic(_), _) => {
                refuse("loss_scale", "None or Static, all that Keras's Adamax has", loss_scale)
            }
            (_, _, _, Some(plateau)) => refuse("plateau", "none, which Keras's Adamax does not have", plateau),
            _ => Ok(()),
        }
    }

    /// Makes sure that a group has no numbers of its own, unless it has no variables.
    fn require_no_numbers(&self, index: usize, group: &GroupSettings) -> Result<()> {
        if self.vars.iter().all(|info| info.group != index) {
            return Ok(());
        }
        let GroupSettings { name, lr, beta1, beta2, eps, weight_decay, .. } = group;
        let refuse = |what: &str, got: &dyn std::fmt::Debug| {
            let entry = format!("groups.{name}.{what}");
            Err(Error::checkpoint(entry, "the optimizer's, since Keras has no groups", format!("{got:?}")))
        };
        match lr {
            GroupLr::Inherit => {}
            GroupLr::Factor(1.0) => {}
            lr => return refuse("lr", lr),
        }
        let own = self.params.hyperparameters();
        let numbers = [("beta1", *beta1, own.beta1), ("beta2", *beta2, own.beta2), ("eps", *eps, own.eps)];
        for (what, number, own) in numbers {
            if number.is_some_and(|number| number != own) {
                return refuse(what, &number);
            }
        }
        match weight_decay {
            Some(decay) if *decay != own.weight_decay => refuse("weight_decay", decay),
            _ => Ok(()),
        }
    }

    fn try_load_keras(&mut self, path: &Path) -> Result<()> {
        let names: Vec<_> = self.names().collect();
        let accumulators = self.params.gradient_accumulation_steps > 1;
        let extras = Extras { averages: self.params.ema.is_some(), accumulators };
        let state = keras::read(path, &names, extras, |state| self.check_plain(&state.vars))?;
        self.take_keras(state)
    }

    fn take_keras(&mut self, state: KerasState) -> Result<()> {
        let KerasState { iteration: calls, learning_rate, mut vars } = state;
        let mut params = self.params.clone();
        if let (LearningRate::Constant(own), Some(rate)) = (&mut params.lr, learning_rate) {
            *own = rate;
        }
        let steps = params.gradient_accumulation_steps;
        let counters = Counters { calls, updates: calls / steps, skipped: 0, pending: calls % steps };
        for var in vars.values_mut() {
            var.step = counters.updates;
            // A sum of zeros is that of a variable that has had no gradient.
            if let Some((sum, calls)) = &mut var.accumulated {
                *calls = if is_zero(sum)? { 0 } else { counters.pending };
            }
        }
        self.restore_plain(params, self.groups.clone(), counters, &vars)
    }

    /// The order of variables in a legacy file, which has each of this optimizer's once.
    fn legacy_order<'o>(&self, order: &'o [impl AsRef<str>]) -> Result<Vec<&'o str>> {
        self.require_eps_mode(EpsMode::AddToNorm, "Keras")?;
        let ParamsAdamax { ema, gradient_accumulation_steps, .. } = &self.params;
        if ema.is_some() {
            return Err(Error::checkpoint("ema", "none, which the legacy optimizers do not have", "moving averages"));
        }
        if *gradient_accumulation_steps > 1 {
            let (entry, expected) = ("gradient_accumulation_steps", "1, since the legacy optimizers do not accumulate");
            return Err(Error::checkpoint(entry, expected, gradient_accumulation_steps));
        }
        let order: Vec<&str> = order.iter().map(AsRef::as_ref).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ErrorKind::DuplicateName(twice[0].to_owned()).into());
        }
        sorted.iter().try_for_each(|name| self.index_of(name).map(drop))?;
        match self.names().find(|name| sorted.binary_search(name).is_err()) {
            Some(missing) => {
                Err(Error::invalid("order", format!("`{missing}`, too"), format!("{} names", order.len())))
            }
            None => Ok(order),
        }
    }
}
