//! Settings of an optimizer and of its groups: resolved and checked when they are set.

use candle_core::{Tensor, Var};

use super::Adamax;
use crate::codec::Encoding;
use crate::error::{Error, ErrorKind, Result};
use crate::group::GroupSettings;
use crate::kernel::Kernel;
use crate::params::{ParamsAdamax, StateStorage};
use crate::pattern;
use crate::rule::{Hyperparameters, WeightDecay};
use crate::state::{Layout, Place, Units};

/// Settings of one group: the optimizer's, with what the group overrides.
pub(super) struct ResolvedGroup {
    pub(super) hyper: Hyperparameters,
    /// Numbers of a variable that is spared from decay.
    pub(super) spared: Hyperparameters,
    pub(super) storage: StateStorage,
    /// `-log2(beta2)`.
    pub(super) neg_log2_beta2: f64,
}

impl ResolvedGroup {
    pub(super) fn of(params: &ParamsAdamax, group: &GroupSettings) -> Result<Self> {
        let hyper = group.hyperparameters(params);
        let spared = Hyperparameters { weight_decay: WeightDecay::None, ..hyper };
        Ok(Self { hyper, spared, storage: group.storage(params)?, neg_log2_beta2: -hyper.beta2.log2() })
    }

    /// The layout of one variable's moments.
    pub(super) fn layout(&self, var: &Tensor, units: Units) -> Layout {
        let StateStorage { state_dtype, rowwise_norm, .. } = self.storage;
        Layout::of(var, state_dtype, units, rowwise_norm, Encoding::of(&self.hyper))
    }

    /// Whether the kernel of `place` can keep state in this way.
    pub(super) fn check(&self, place: Place) -> Result<()> {
        let StateStorage { state_dtype, rowwise_norm, rounding, sparse_update } = self.storage;
        let plain = ParamsAdamax::default().storage();
        let is_operations = place == Place::Device;
        let got: [(&str, &dyn std::fmt::Debug, bool); 4] = [
            ("state_dtype", &state_dtype, state_dtype == plain.state_dtype),
            ("rowwise_norm", &rowwise_norm, rowwise_norm == plain.rowwise_norm),
            ("rounding", &rounding, rounding == plain.rounding),
            ("sparse_update", &sparse_update, sparse_update == plain.sparse_update),
        ];
        match got.into_iter().find(|(_, _, is_plain)| is_operations && !is_plain) {
            Some((field, got, _)) => {
                let expected = "the default for variables that candle's tensor operations update, on this device";
                Err(Error::invalid(field, expected, format!("{got:?}")))
            }
            None => Ok(()),
        }
    }
}

impl Adamax {
    /// The names of the variables, in alphabetical order; "var.I" for the I-th of those without one,
    /// with leading zeros where there are more than ten.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.vars.iter().map(|param| param.name.as_str())
    }

    /// The variables with their names, in alphabetical order of these.
    pub fn vars(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.vars.iter().map(|param| (param.name.as_str(), &param.var))
    }

    /// The settings.
    pub fn params(&self) -> &ParamsAdamax {
        &self.params
    }

    /// The settings of the groups. The first one is "default", unless it has no variables and overrides nothing while
    /// there are others.
    pub fn groups(&self) -> &[GroupSettings] {
        let [default, others @ ..] = &self.groups[..] else { return &[] };
        let is_used = default.overrides_any() || self.vars.iter().any(|info| info.group == 0);
        if is_used || others.is_empty() { &self.groups } else { others }
    }

    /// The names of the variables that [`no_decay`](ParamsAdamax::no_decay) spares from decay, in alphabetical order.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, WeightDecay};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap, linear};
    ///
    /// let varmap = VarMap::new();
    /// linear(4, 2, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    /// let params = ParamsAdamax {
    ///     weight_decay: WeightDecay::Decoupled(0.01),
    ///     no_decay: vec!["bias".into()],
    ///     ..Default::default()
    /// };
    /// let optimizer = Adamax::from_varmap(&varmap, params)?;
    /// assert_eq!(optimizer.spared_names().collect::<Vec<_>>(), ["bias"]);
    /// assert!(optimizer.to_string().contains("no decay: 1 of 2 vars"));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn spared_names(&self) -> impl Iterator<Item = &str> {
        self.vars.iter().filter(|param| !param.decays).map(|param| param.name.as_str())
    }

    /// Replaces the settings, from the next call on. Moments are converted into another encoding, to its nearest values
    /// or, for u in [`StateDType::Q8`](crate::StateDType::Q8), up. What came from Q8 keeps its bits on its way back there, but for a table
    /// that has had gradients of rows, whose rows come back in blocks of 1,024 elements: its u is rounded up once more.
    ///
    /// Loss scale and plateau stay what they have come to; another [`init_scale`](crate::GradScaler::init_scale) is
    /// the scale of the next call.
    ///
    /// # Errors
    ///
    /// A setting that is not allowed; another [`eps_mode`](ParamsAdamax::eps_mode) after the first update, since u holds
    /// something else then; another number of accumulation steps while gradients [wait](Self::pending); a pattern of
    /// [`no_decay`](ParamsAdamax::no_decay) that spares no variable. Nothing has changed then.
    pub fn set_params(&mut self, params: ParamsAdamax) -> Result<()> {
        params.validate()?;
        self.named(|adamax| {
            adamax.sync()?;
            adamax.check_changes(&params)?;
            let resolved = adamax.resolve(&params, &adamax.groups, adamax.kernel)?;
            // Patterns that were accepted before stay so, even if the variables that they spared have been removed.
            let known = if decays_any(&adamax.params, &adamax.groups) { &adamax.params.no_decay[..] } else { &[] };
            adamax.check_patterns(&params, &adamax.groups, known)?;
            let converted = adamax.converted(&resolved)?;
            for param in adamax.vars.iter_mut() {
                param.info.decays = params.decays(&param.name);
                param.average = param.average.take().filter(|_| params.ema.is_some());
            }
            adamax.progress.scaler = params.loss_scale.carried(adamax.params.loss_scale, adamax.progress.scaler);
            adamax.plateau = params.plateau.map(|_| adamax.plateau.unwrap_or_default());
            adamax.params = params;
            adamax.take_converted(converted, resolved);
            Ok(())
        })
    }

    /// Refuses settings that the state does not allow any more.
    fn check_changes(&self, params: &ParamsAdamax) -> Result<()> {
        if params.eps_mode != self.params.eps_mode && self.progress.counters.updates > 0 {
            let expected = format!("{:?} as before, since u is made for it", self.params.eps_mode);
            return Err(Error::invalid("eps_mode", expected, format!("{:?}", params.eps_mode)));
        }
        let (steps, got) = (self.params.gradient_accumulation_steps, params.gradient_accumulation_steps);
        if got != steps && self.progress.counters.pending > 0 {
            let expected = format!(
                "{steps} until `flush_gradients` has used the gradients that wait, or `discard_gradients` dropped them"
            );
            return Err(Error::invalid("gradient_accumulation_steps", expected, got));
        }
        Ok(())
    }

    /// Replaces the settings of the group of the same name.
    ///
    /// # Errors
    ///
    /// No group has this name, or a setting is not allowed; it is the first one with a decay, and a pattern of
    /// [`no_decay`](ParamsAdamax::no_decay) spares no variable. Nothing has changed then.
    pub fn set_group(&mut self, settings: GroupSettings) -> Result<()> {
        self.named(|adamax| {
            settings.validate()?;
            adamax.sync()?;
            let index = adamax.group_index(&settings.name)?;
            let mut groups = adamax.groups.clone();
            groups[index] = settings;
            let resolved = adamax.resolve(&adamax.params, &groups, adamax.kernel)?;
            if !decays_any(&adamax.params, &adamax.groups) {
                adamax.check_patterns(&adamax.params, &groups, &[])?;
            }
            let converted = adamax.converted(&resolved)?;
            adamax.groups = groups;
            adamax.take_converted(converted, resolved);
            Ok(())
        })
    }

    /// The settings of all groups, checked against the variables in them.
    pub(super) fn resolve(
        &self,
        params: &ParamsAdamax,
        groups: &[GroupSettings],
        kernel: Kernel,
    ) -> Result<Vec<ResolvedGroup>> {
        let resolved = groups.iter().map(|group| ResolvedGroup::of(params, group)).collect::<Result<Vec<_>>>()?;
        self.vars.iter().try_for_each(|info| resolved[info.group].check(kernel.place(&info.var)))?;
        Ok(resolved)
    }

    /// Refuses patterns of `no_decay` that spare no variable.
    pub(super) fn check_no_decay(&self) -> Result<()> {
        self.check_patterns(&self.params, &self.groups, &[]).map_err(|error| self.own(error))
    }

    /// Checks settings to come in this way, but for patterns that are `known`.
    fn check_patterns(&self, params: &ParamsAdamax, groups: &[GroupSettings], known: &[String]) -> Result<()> {
        if self.vars.is_empty() || !decays_any(params, groups) {
            return Ok(());
        }
        let spares = |pattern: &String| self.names().any(|name| pattern::matches(pattern, name));
        match params.no_decay.iter().find(|pattern| !known.contains(pattern) && !spares(pattern)) {
            None => Ok(()),
            Some(pattern) => {
                let names = some_of(self.names());
                let expected =
                    format!("whole components of the names of vars, `*` for a part of one; they are {names}");
                Err(Error::invalid("no_decay", expected, format!("`{pattern}`, which matches none")))
            }
        }
    }

    /// The variable of this name.
    pub(super) fn index_of(&self, name: &str) -> Result<usize> {
        self.vars.position(name).map_err(|_| self.unknown_var(name))
    }

    /// The index of the group of this name.
    pub(super) fn group_index(&self, name: &str) -> Result<usize> {
        self.group_indices.get(name).copied().ok_or_else(|| self.unknown_group(name))
    }

    pub(super) fn unknown_var(&self, name: &str) -> Error {
        self.own(unknown("var", name, self.names()))
    }

    pub(super) fn unknown_group(&self, name: &str) -> Error {
        self.own(unknown("group", name, self.groups.iter().map(|group| group.name.as_str())))
    }

    /// The error, as one of this optimizer.
    pub(super) fn own(&self, error: Error) -> Error {
        error.of_optimizer(&self.params.name)
    }

    /// Runs a method, whose errors become those of this optimizer.
    pub(super) fn named<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        run(self).map_err(|error| self.own(error))
    }
}

/// Whether there is any decay.
pub(super) fn decays_any(params: &ParamsAdamax, groups: &[GroupSettings]) -> bool {
    let mut decays = groups.iter().filter_map(|group| group.weight_decay).chain([params.weight_decay]);
    decays.any(|decay| !matches!(decay, WeightDecay::None | WeightDecay::L2(0.0) | WeightDecay::Decoupled(0.0)))
}

fn unknown<'a>(what: &'static str, name: &str, known: impl Iterator<Item = &'a str>) -> Error {
    ErrorKind::Unknown { what, name: name.to_owned(), known: some_of(known) }.into()
}

/// The first few of some names.
fn some_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<&str> = names.take(SHOWN + 1).collect();
    if names.len() > SHOWN {
        names[SHOWN] = "...";
    }
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
