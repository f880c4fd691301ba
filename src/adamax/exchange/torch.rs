//! PyTorch's Adamax, both ways: which settings its groups bring, and which they get.

use std::collections::HashMap;
use std::path::Path;

use super::super::Adamax;
use crate::checkpoint::torch::{self, PARAM_GROUPS, TorchGroup, TorchOptions, TorchState};
use crate::checkpoint::{AtomicFile, Counters};
use crate::error::{Error, Result};
use crate::group::{GroupLr, GroupSettings};
use crate::params::{ParamsAdamax, StepCount};
use crate::rule::{EpsMode, WeightDecay};
use crate::schedule::LearningRate;

/// What is left of a state once it is only moments and counters.
const NONE_FITS: &str = "none, since PyTorch's state has no place for it";

/// What a group of PyTorch says about the variables of one of ours.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Numbers {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    /// None where all of the variables are spared.
    weight_decay: Option<f64>,
}

impl Adamax {
    /// Writes the state of this optimizer as that of a `torch.optim.Adamax`: a safetensors file with `NAME.exp_avg`,
    /// `NAME.exp_inf` and `NAME.step` for each variable and the `param_groups` as JSON in its metadata.
    /// `examples/exchange/pytorch.py` puts it into a checkpoint of PyTorch. The weights are not in it
    /// (`VarMap::save` writes them; call it afterwards with [`SparseUpdate::Exact`](crate::SparseUpdate::Exact)).
    ///
    /// - m and u are f32 (f64 for f64 variables), decoded if [`state_dtype`](crate::ParamsAdamax::state_dtype) encodes
    ///   them. PyTorch converts them to the dtype of its parameter when it loads them, so for f16 and bf16 parameters
    ///   it rounds. Masters are a part of the weights, and left out.
    /// - A group becomes one of PyTorch's, or two where [`no_decay`](crate::ParamsAdamax::no_decay) spares some of its
    ///   variables. The learning rate is that of the next call, as a number.
    /// - With [`StepCount::Shared`] every parameter's `step` is the number of updates, with
    ///   which the next bias correction is the same.
    /// - Clipping, accumulation and skipping belong to the training loop in PyTorch, and are left out.
    ///
    /// The file is complete or it is not there, as that of [`save`](Self::save).
    ///
    /// # Errors
    ///
    /// State that PyTorch cannot hold: another convention of [`eps_mode`](crate::ParamsAdamax::eps_mode), decoupled
    /// decay, moving averages, accumulated gradients that wait for their update, a count of more than 2^24 updates;
    /// variables without names; the system's errors.
    pub fn save_torch(&self, path: impl AsRef<Path>) -> Result<()> {
        self.require_names()?;
        self.try_save_torch(path.as_ref()).map_err(|error| self.own(error))
    }

    /// Takes the state of a `torch.optim.Adamax` from a file that `examples/exchange/pytorch.py`, or
    /// [`save_torch`](Self::save_torch), wrote. The next steps are then those of the run in PyTorch.
    ///
    /// - The names are those of the model's `named_parameters()`, which a `VarMap` with the same layers has, too. (Where
    ///   it has more, such as the running means of `BatchNorm`, choose with
    ///   [`from_varmap_where`](Self::from_varmap_where).) Each
    ///   variable has its three tensors, in its shape and in its dtype or f32. m and u are encoded as
    ///   [`state_dtype`](crate::ParamsAdamax::state_dtype) says.
    /// - `lr`, `betas`, `eps`, `weight_decay` (as [`WeightDecay::L2`]) and `maximize` are taken
    ///   over, as by PyTorch's `load_state_dict`, into the settings and, where they differ, into the groups. A learning
    ///   rate that is a schedule or comes from outside stays, as does a scheduler in PyTorch. Change settings afterwards.
    /// - What PyTorch's optimizer does not know stays as it is: clipping, accumulation, averages (which begin anew), how
    ///   state is stored, the names that `no_decay` spares.
    /// - A [dynamic loss scale](crate::LossScale::Dynamic) and a [`plateau`](crate::ParamsAdamax::plateau) begin anew, as they
    ///   are no part of the optimizer there. What a plateau has made of a learning rate is in the file's; of a schedule, which
    ///   stays, it is forgotten.
    /// - `foreach`, `capturable` and `differentiable` mean nothing here, nor does what PyTorch's schedulers keep in
    ///   `param_groups`: `initial_lr`, `swa_lr`, `max_lr`, `min_lr`, `base_momentum`, `max_momentum`. Other keys are an error
    ///   unless [`ignore_unknown`](TorchOptions::ignore_unknown) is set.
    /// - The counts of updates and of calls are those of the parameter that has had most of them.
    ///
    /// # Errors
    ///
    /// A file that is missing, truncated or of another kind; a parameter or tensor that is missing, surplus or of another
    /// shape or dtype; an optimizer whose [`eps_mode`](crate::ParamsAdamax::eps_mode) is not
    /// [`InsideMax`](crate::EpsMode::InsideMax); counters that differ between parameters where
    /// [`step_count`](crate::ParamsAdamax::step_count) is [`Shared`](crate::StepCount::Shared); settings that differ
    /// between variables of one group, or that are not allowed; a decay of a variable that `no_decay` spares. Nothing has
    /// changed then.
    pub fn load_torch(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.load_torch_with(path, TorchOptions::default())
    }

    /// Loads as [`load_torch`](Self::load_torch) does, with options.
    ///
    /// ```no_run
    /// use candle_adamax::{Adamax, ParamsAdamax, TorchOptions};
    /// # let varmap = candle_nn::VarMap::new();
    ///
    /// let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::pytorch())?;
    /// // A run whose groups have an `lr_scale`, by which their `lr` has been multiplied already.
    /// optimizer.load_torch_with("adamax.safetensors", TorchOptions { ignore_unknown: true })?;
    /// # Ok::<(), candle_adamax::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`load_torch`](Self::load_torch).
    pub fn load_torch_with(&mut self, path: impl AsRef<Path>, options: TorchOptions) -> Result<()> {
        self.require_names()?;
        let path = path.as_ref();
        let loaded = self.require_eps_mode(EpsMode::InsideMax, "PyTorch");
        let loaded = loaded.and_then(|()| self.try_load_torch(path, options).map_err(|error| error.in_file(path)));
        loaded.map_err(|error| self.own(error))
    }

    fn try_save_torch(&self, path: &Path) -> Result<()> {
        // All that can fail comes before rows catch up, which changes weights.
        let (groups, counters) = self.torch_groups()?;
        let file = AtomicFile::create(path)?;
        let (_, mut vars) = self.plain()?;
        if self.params.step_count == StepCount::Shared {
            vars.values_mut().for_each(|var| var.step = counters.updates);
        }
        torch::write(&TorchState { groups, vars }, file)
    }

    /// The groups that PyTorch has for this optimizer, if its state can hold all of this one's; and the counters.
    fn torch_groups(&self) -> Result<(Vec<TorchGroup>, Counters)> {
        self.require_eps_mode(EpsMode::InsideMax, "PyTorch")?;
        let counters = self.resolved().counters;
        if let Some(param) = self.vars.iter().find(|param| param.average.is_some()) {
            return Err(Error::checkpoint(format!("{}.ema", param.name), NONE_FITS, "a moving average"));
        }
        if counters.pending > 0 {
            let got = format!("gradients of {} calls that wait for their update", counters.pending);
            let expected = format!("{NONE_FITS} (`flush_gradients` uses them, `discard_gradients` drops them)");
            return Err(Error::checkpoint("accumulated", expected, got));
        }
        let mut groups = Vec::new();
        let base = self.params.lr.at(counters.calls)?;
        for (index, group) in self.groups.iter().enumerate() {
            let hyper = group.hyperparameters(&self.params);
            let decay = match hyper.weight_decay {
                WeightDecay::None => 0.0,
                WeightDecay::L2(decay) | WeightDecay::Decoupled(decay @ 0.0) => decay,
                WeightDecay::Decoupled(decay) => {
                    let entry = format!("groups.{}.weight_decay", group.name);
                    let expected = "None or L2, PyTorch's way of decaying";
                    return Err(Error::checkpoint(entry, expected, format!("Decoupled({decay})")));
                }
            };
            let lr = self.reduced(group.lr(base, counters.calls)?);
            for decays in [true, false] {
                let params = self.vars.iter().filter(|info| info.group == index && info.decays == decays);
                let params: Vec<_> = params.map(|info| info.name.clone()).collect();
                if !params.is_empty() {
                    let decay = if decays { decay } else { 0.0 };
                    let betas = [hyper.beta1, hyper.beta2];
                    groups.push(TorchGroup::new(lr, betas, hyper.eps, decay, self.params.maximize, params));
                }
            }
        }
        let steps = self.vars.iter().enumerate().map(|(index, info)| {
            let step = match self.params.step_count {
                StepCount::Shared => counters.updates,
                StepCount::PerVar => self.step_of(index),
            };
            (info.name.as_str(), step)
        });
        torch::check(steps, &groups)?;
        Ok((groups, counters))
    }

    fn try_load_torch(&mut self, path: &Path, options: TorchOptions) -> Result<()> {
        let names: Vec<_> = self.names().collect();
        let TorchState { groups: theirs, vars } =
            torch::read(path, &names, options, |state| self.check_plain(&state.vars))?;
        let mut steps = vars.iter().map(|(name, var)| (name, var.step));
        if let (StepCount::Shared, Some((first, step))) = (self.params.step_count, steps.next())
            && let Some((name, other)) = steps.find(|(_, other)| *other != step)
        {
            let expected = format!("{step}, as for `{first}`, since `step_count: Shared` counts for all together");
            return Err(Error::checkpoint(format!("{name}.step"), expected, other));
        }
        let (params, groups) = self.with_torch_groups(&theirs)?;
        let updates = vars.values().map(|var| var.step).max().unwrap_or(0);
        let calls = updates.saturating_mul(params.gradient_accumulation_steps);
        let counters = Counters { calls, updates, ..Counters::default() };
        self.restore_plain(params, groups, counters, &vars)
    }

    /// This optimizer's settings and groups with the numbers of PyTorch's.
    fn with_torch_groups(&self, theirs: &[TorchGroup]) -> Result<(ParamsAdamax, Vec<GroupSettings>)> {
        let (mut params, mut groups) = (self.params.clone(), self.groups.clone());
        let of: HashMap<&str, &TorchGroup> =
            theirs.iter().flat_map(|group| group.params.iter().map(move |name| (name.as_str(), group))).collect();
        let mut used = theirs.iter().filter(|group| !group.params.is_empty());
        if let Some(first) = used.next() {
            params.maximize = first.maximize;
            if let Some(other) = used.find(|group| group.maximize != first.maximize) {
                let expected = format!("{}, as in the other groups", first.maximize);
                return Err(Error::checkpoint(format!("{PARAM_GROUPS}.maximize"), expected, other.maximize));
            }
        }
        let numbers = (0..groups.len()).map(|index| self.torch_numbers(index, &of));
        let numbers = numbers.collect::<Result<Vec<_>>>()?;
        // What most groups are to inherit: the numbers of the first that has variables, the rate of the first that
        // inherits one.
        let Some(base) = numbers.iter().flatten().next().copied() else { return Ok((params, groups)) };
        (params.beta1, params.beta2, params.eps) = (base.beta1, base.beta2, base.eps);
        let decay = numbers.iter().flatten().find_map(|numbers| numbers.weight_decay);
        params.weight_decay = decay.map_or(WeightDecay::None, l2);
        let inherits = |group: &GroupSettings| matches!(group.lr, GroupLr::Inherit);
        let inherited = groups.iter().zip(&numbers).find_map(|(group, numbers)| numbers.filter(|_| inherits(group)));
        if let (LearningRate::Constant(lr), Some(numbers)) = (&mut params.lr, inherited) {
            *lr = numbers.lr;
        }
        for (group, numbers) in groups.iter_mut().zip(&numbers) {
            let Some(numbers) = numbers else { continue };
            group.lr = group_lr(&group.lr, &params.lr, numbers.lr);
            group.beta1 = Some(numbers.beta1).filter(|&beta1| beta1 != params.beta1);
            group.beta2 = Some(numbers.beta2).filter(|&beta2| beta2 != params.beta2);
            group.eps = Some(numbers.eps).filter(|&eps| eps != params.eps);
            group.weight_decay = numbers.weight_decay.map(l2).filter(|&decay| decay != params.weight_decay);
            group.validate()?;
        }
        Ok((params, groups))
    }

    /// What PyTorch's groups say about the variables of group `index`; they have to agree.
    fn torch_numbers(&self, index: usize, of: &HashMap<&str, &TorchGroup>) -> Result<Option<Numbers>> {
        let mut numbers: Option<(&str, Numbers)> = None;
        for info in self.vars.iter().filter(|info| info.group == index) {
            let name = info.name.as_str();
            let Some(group) = of.get(name) else {
                return Err(Error::checkpoint(PARAM_GROUPS, format!("a group of `{name}`"), "none"));
            };
            if !info.decays && group.weight_decay != 0.0 {
                let (entry, expected) =
                    (format!("{PARAM_GROUPS}.weight_decay"), format!("0 for `{name}`, which `no_decay` spares"));
                return Err(Error::checkpoint(entry, expected, group.weight_decay));
            }
            let [beta1, beta2] = group.betas;
            let weight_decay = info.decays.then_some(group.weight_decay);
            let new = Numbers { lr: group.lr, beta1, beta2, eps: group.eps, weight_decay };
            let Some((first, known)) = &mut numbers else {
                numbers = Some((name, new));
                continue;
            };
            let known_decay = known.weight_decay.or(new.weight_decay);
            let alike = Numbers { weight_decay: new.weight_decay.or(known_decay), ..new };
            *known = Numbers { weight_decay: known_decay, ..*known };
            if alike != *known {
                let own = &self.groups[index].name;
                let expected = format!("the same for `{first}` and `{name}`, which are both in the group `{own}`");
                return Err(Error::checkpoint(PARAM_GROUPS, expected, format!("{known:?} and {alike:?}")));
            }
        }
        Ok(numbers.map(|(_, numbers)| numbers))
    }
}

/// PyTorch's decay.
fn l2(decay: f64) -> WeightDecay {
    if decay == 0.0 { WeightDecay::None } else { WeightDecay::L2(decay) }
}

/// The learning rate of a group that has been `own`, where the optimizer's is `base` and PyTorch's is `lr`.
fn group_lr(own: &GroupLr, base: &LearningRate, lr: f64) -> GroupLr {
    let inherited = match (own, base) {
        (GroupLr::Own(LearningRate::Constant(_)), _) => return GroupLr::Own(lr.into()),
        // A schedule, or what comes from outside.
        (GroupLr::Own(_), _) | (_, LearningRate::Schedule(_) | LearningRate::Tensor(_) | LearningRate::Custom(_)) => {
            return own.clone();
        }
        (GroupLr::Inherit, LearningRate::Constant(base)) => *base,
        (GroupLr::Factor(factor), LearningRate::Constant(base)) => base * factor,
    };
    if inherited == lr { own.clone() } else { GroupLr::Own(lr.into()) }
}
