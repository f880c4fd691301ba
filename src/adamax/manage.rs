//! Variables, groups and settings of an optimizer: in, out and about.

use std::collections::{HashMap, HashSet};
use std::fmt;

use candle_core::Var;

use super::held::{GroupPlan, Held};
use super::late::Unsettled;
use super::report::History;
use super::rows::Replaced;
use super::{Accumulated, Adamax, Param, Report, Sum};
use crate::check;
use crate::checkpoint::Counters;
use crate::codec::StateDType;
use crate::error::{Error, ErrorKind, Result};
use crate::group::{DEFAULT_GROUP, GroupSettings, ParamGroup};
use crate::kernel::lend::storage_address;
use crate::kernel::{Context, Kernel, is_supported};
use crate::maps::IdMap;
use crate::params::{MissingGradients, ParamsAdamax, SparseUpdate};
use crate::rounding::{Rounding, key_of};
use crate::rule::WeightDecay;
use crate::schedule::Plateau;
use crate::state::{Buffer, Master, Moments, ParamState};

impl Adamax {
    pub(super) fn without_vars(params: ParamsAdamax) -> Result<Self> {
        params.validate()?;
        Ok(Self {
            scaler: params.grad_scaler.map(|scaler| scaler.start()),
            plateau: params.plateau.map(|_| Plateau::default()),
            params,
            groups: vec![GroupSettings::new(DEFAULT_GROUP)],
            group_indices: HashMap::from([(DEFAULT_GROUP.to_owned(), 0)]),
            vars: Vec::new(),
            storages: IdMap::default(),
            counters: Counters::default(),
            kernel: Kernel::Auto,
            context: Context::default(),
            unsettled: Unsettled::default(),
            report: Report::default(),
            replaced: Replaced::default(),
        })
    }

    /// Adds a variable to the group "default". Its moments begin with zero; its bias correction follows
    /// [`StepCount`](crate::StepCount).
    ///
    /// # Errors
    ///
    /// The name or the variable is there already, or its float dtype is not supported. A variable that is not
    /// floating point is left out without an error, as everywhere in candle.
    pub fn add_var(&mut self, name: impl Into<String>, var: Var) -> Result<()> {
        self.insert_named(0, vec![(name.into(), var)]).map_err(|error| self.own(error))
    }

    /// Adds a group and its variables.
    ///
    /// # Errors
    ///
    /// As [`add_var`](Self::add_var), for the group's name, too; and settings that are not allowed. Nothing is added
    /// then.
    pub fn add_group(&mut self, group: ParamGroup) -> Result<()> {
        self.try_add_group(group).map_err(|error| self.own(error))
    }

    fn try_add_group(&mut self, group: ParamGroup) -> Result<()> {
        let ParamGroup { settings, vars } = group;
        settings.validate()?;
        if self.group_indices.contains_key(&settings.name) {
            return Err(ErrorKind::DuplicateName(settings.name).into());
        }
        let vars = vars.into_iter().map(|(name, var)| (name, None, var)).collect();
        self.insert(self.groups.len(), &settings, vars)?;
        self.group_indices.insert(settings.name.clone(), self.groups.len());
        self.groups.push(settings);
        Ok(())
    }

    /// Takes a variable out, with its state.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn remove_var(&mut self, name: &str) -> Result<Var> {
        let index = self.index_of(name)?;
        self.settle(true).map_err(|error| self.own(error))?;
        self.vars[index].state.pay_all().map_err(|error| self.own(error))?;
        let param = self.vars.remove(index);
        self.storages.remove(&storage_address(&param.var));
        self.replaced.forget_name(name);
        // Its indices are no longer those of the variables.
        self.report.missing.clear();
        Ok(param.var)
    }

    /// The names of the variables, in alphabetical order; "var.I" for the I-th of those without one.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.vars.iter().map(|param| param.name.as_str())
    }

    /// The settings.
    pub fn params(&self) -> &ParamsAdamax {
        &self.params
    }

    /// Replaces the settings, from the next call on. Moments are converted into another encoding, to its nearest values
    /// or, for u in [`StateDType::Q8`], up. What came from Q8 keeps its bits on its way back there, but for a table
    /// that has had gradients of rows, whose rows come back in blocks of 1,024 elements: its u is rounded up once more.
    ///
    /// Loss scale and plateau stay what they have come to; another `grad_scaler.init_scale` is the scale of the next call.
    ///
    /// # Errors
    ///
    /// A setting that is not allowed; another [`epsilon`](ParamsAdamax::epsilon) after the first update, since u holds
    /// something else then; another number of accumulation steps while gradients [wait](Self::pending); a part of
    /// [`no_decay`](ParamsAdamax::no_decay) that spares no variable. Nothing has changed then.
    pub fn set_params(&mut self, params: ParamsAdamax) -> Result<()> {
        params.validate()?;
        self.settle(true).map_err(|error| self.own(error))?;
        if params.epsilon != self.params.epsilon && self.counters.updates > 0 {
            let expected = format!("{:?} as before, since u is made for it", self.params.epsilon);
            return Err(self.own(Error::invalid("epsilon", expected, format!("{:?}", params.epsilon))));
        }
        let steps = self.params.gradient_accumulation_steps;
        if params.gradient_accumulation_steps != steps && self.counters.pending > 0 {
            let expected = format!(
                "{steps} until `flush_gradients` has used the gradients that wait, or `discard_gradients` dropped them"
            );
            let got = params.gradient_accumulation_steps;
            return Err(self.own(Error::invalid("gradient_accumulation_steps", expected, got)));
        }
        let plans = self.plans(&params, &self.groups, self.kernel).map_err(|error| self.own(error))?;
        // Parts that were accepted before stay so, even if the variables that it spared have been removed.
        let known = if decays_any(&self.params, &self.groups) { &self.params.no_decay[..] } else { &[] };
        self.check_parts(&params, &self.groups, known)?;
        let states = self.replanned(&plans).map_err(|error| self.own(error))?;
        for param in &mut self.vars {
            param.decays = params.decays(&param.name);
            if params.ema.is_none() {
                param.ema = None;
            }
        }
        self.scaler = match (&params.grad_scaler, &self.params.grad_scaler, self.scaler) {
            (Some(scaler), Some(before), Some(state)) => Some(scaler.carried(before, state)),
            (scaler, ..) => scaler.map(|scaler| scaler.start()),
        };
        self.plateau = params.plateau.map(|_| self.plateau.unwrap_or_default());
        self.params = params;
        self.take_states(states, &plans);
        Ok(())
    }

    /// The settings of the groups. The first one is "default", unless it has no variables and overrides nothing while
    /// there are others.
    pub fn groups(&self) -> &[GroupSettings] {
        let [default, others @ ..] = &self.groups[..] else { return &[] };
        let is_used = default.overrides_any() || self.vars.iter().any(|param| param.group == 0);
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

    /// Replaces the settings of the group of the same name.
    ///
    /// # Errors
    ///
    /// No group has this name, or a setting is not allowed; it is the first one with a decay, and a part of
    /// [`no_decay`](ParamsAdamax::no_decay) spares no variable. Nothing has changed then.
    pub fn set_group(&mut self, settings: GroupSettings) -> Result<()> {
        settings.validate().map_err(|error| self.own(error))?;
        self.settle(true).map_err(|error| self.own(error))?;
        let index = self.group_index(&settings.name)?;
        let mut groups = self.groups.clone();
        groups[index] = settings;
        let plans = self.plans(&self.params, &groups, self.kernel).map_err(|error| self.own(error))?;
        if !decays_any(&self.params, &self.groups) {
            self.check_parts(&self.params, &groups, &[])?;
        }
        let states = self.replanned(&plans).map_err(|error| self.own(error))?;
        self.groups = groups;
        self.take_states(states, &plans);
        Ok(())
    }

    /// How many calls of `step` counted, that is, were neither skipped nor failed nor without any gradient. Schedules count
    /// them.
    pub fn calls(&self) -> u64 {
        self.settled_counters().calls
    }

    /// How many updates there were: one for every N calls, where N are accumulated, and one for each
    /// [flush](Self::flush_gradients) of fewer.
    pub fn updates(&self) -> u64 {
        self.settled_counters().updates
    }

    /// How many calls were skipped because something was not finite.
    pub fn skipped(&self) -> u64 {
        self.settled_counters().skipped
    }

    /// Chooses another kernel and moves the state to where it needs it.
    ///
    /// # Errors
    ///
    /// The device has no memory for the state; nothing has changed then.
    pub fn set_kernel(&mut self, kernel: Kernel) -> Result<()> {
        self.settle(true).map_err(|error| self.own(error))?;
        self.plans(&self.params, &self.groups, kernel).map_err(|error| self.own(error))?;
        self.catch_up()?;
        let mut moved = Vec::with_capacity(self.vars.len());
        for param in &self.vars {
            let place = kernel.place(&param.var);
            let buffer = |buffer: &Buffer| -> Result<Buffer> {
                Buffer::from_tensor(&buffer.to_tensor(param.var.shape())?, &param.var, place)
            };
            let state = param.state.get();
            // What stays need not be copied.
            let state = if state.place() == place {
                None
            } else {
                let (var, layout) = (param.var.as_tensor(), state.moments.layout);
                let tensors = state.moments.to_stored(var.shape())?;
                let master = state
                    .master
                    .as_ref()
                    .map(|master| Master::from_tensor(&master.to_tensor(var.shape())?, var, place));
                Some(ParamState {
                    moments: Moments::from_stored(&tensors, var, place, &layout)?,
                    master: master.transpose()?,
                    step: state.step,
                })
            };
            // Accumulated rows are in host memory anyway.
            let sum = match &param.accumulated {
                Some(Accumulated { sum: Sum::Dense(sum), .. }) => Some(Sum::Dense(buffer(sum)?)),
                _ => None,
            };
            let ema = param.ema.as_ref().map(buffer).transpose()?;
            moved.push((state, sum, ema));
        }
        for (param, (state, sum, ema)) in self.vars.iter_mut().zip(moved) {
            if let Some(state) = state {
                param.state = Held::Own(state);
            }
            param.ema = ema;
            if let (Some(accumulated), Some(sum)) = (&mut param.accumulated, sum) {
                accumulated.sum = sum;
            }
        }
        self.kernel = kernel;
        Ok(())
    }

    /// Adds variables to a group, all or none.
    pub(super) fn insert_named(&mut self, group: usize, vars: Vec<(String, Var)>) -> Result<()> {
        let settings = self.groups[group].clone();
        self.insert(group, &settings, vars.into_iter().map(|(name, var)| (name, None, var)).collect())
    }

    /// Adds variables to a group, all or none: names, positions of those without a name, variables.
    pub(super) fn insert(
        &mut self,
        group: usize,
        settings: &GroupSettings,
        vars: Vec<(String, Option<usize>, Var)>,
    ) -> Result<()> {
        self.settle(true).map_err(|error| self.own(error))?;
        let plan = GroupPlan::of(&self.params, settings).map_err(|error| self.own(error))?;
        let mut storages: IdMap<usize, String> = IdMap::default();
        let mut names = HashSet::new();
        let (mut new, mut ids) = (Vec::with_capacity(vars.len()), Vec::with_capacity(vars.len()));
        for (name, unnamed, var) in vars {
            if !var.dtype().is_float() {
                continue;
            }
            if !is_supported(var.dtype()) {
                let (expected, got) = ("F64, F32, F16 or BF16".to_owned(), var.dtype());
                return Err(self.own(ErrorKind::DTypeMismatch { what: "var", name, expected, got }.into()));
            }
            check::require(!name.is_empty(), "name", "a name for every var", "an empty one")
                .map_err(|e| self.own(e))?;
            let address = storage_address(&var);
            if let Some(first) = self.storages.get(&address).or(storages.get(&address)) {
                let (first, second) = (first.clone(), name);
                return Err(self.own(ErrorKind::DuplicateVar { first, second }.into()));
            }
            if self.position(&name).is_ok() || !names.insert(name.clone()) {
                return Err(self.own(ErrorKind::DuplicateName(name).into()));
            }
            storages.insert(address, name.clone());
            ids.push(var.id());
            let place = self.kernel.place(&var);
            plan.check(place).map_err(|error| self.own(error))?;
            let layout = plan.layout(&var, false);
            let state = Held::Own(ParamState::zeros(&var, place, &layout, plan.keeping.rounding)?);
            let (decays, key) = (self.params.decays(&name), key_of(&name));
            let (accumulated, ema, history) = (None, None, History::New);
            new.push(Box::new(Param { name, unnamed, group, decays, key, var, state, accumulated, ema, history }));
        }
        ids.into_iter().for_each(|id| self.replaced.forget_id(id));
        self.storages.extend(storages);
        // To sort costs a look at all of them, so a few are put where they belong.
        const FEW: usize = 16;
        if new.len() > FEW {
            self.vars.extend(new);
            self.vars.sort_by(|a, b| a.name.cmp(&b.name));
        } else {
            for param in new {
                let index = self.position(&param.name).unwrap_or_else(|index| index);
                self.vars.insert(index, param);
            }
        }
        self.report.missing.clear();
        Ok(())
    }

    /// Refuses parts of `no_decay` that spare no variable.
    pub(super) fn check_no_decay(&self) -> Result<()> {
        self.check_parts(&self.params, &self.groups, &[])
    }

    /// Checks settings to come in this way, but for parts that are `known`.
    fn check_parts(&self, params: &ParamsAdamax, groups: &[GroupSettings], known: &[String]) -> Result<()> {
        if self.vars.is_empty() || !decays_any(params, groups) {
            return Ok(());
        }
        let spares = |part: &String| self.vars.iter().any(|param| param.name.contains(part.as_str()));
        match params.no_decay.iter().find(|part| !known.contains(part) && !spares(part)) {
            None => Ok(()),
            Some(part) => {
                let expected = format!("parts of the names of vars, which are {}", some_of(self.names()));
                Err(self.own(Error::invalid("no_decay", expected, format!("`{part}`, which is part of none"))))
            }
        }
    }

    /// The variable of this name.
    pub(super) fn index_of(&self, name: &str) -> Result<usize> {
        self.position(name).map_err(|_| self.unknown_var(name))
    }

    /// The index of the variable of this name, or that which it would have.
    fn position(&self, name: &str) -> std::result::Result<usize, usize> {
        self.vars.binary_search_by(|param| param.name.as_str().cmp(name))
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
}

/// Whether there is any decay.
fn decays_any(params: &ParamsAdamax, groups: &[GroupSettings]) -> bool {
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

impl fmt::Display for Adamax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ParamsAdamax { name, lr, beta1, beta2, eps, epsilon, weight_decay, .. } = &self.params;
        let ParamsAdamax { state_dtype, rowwise_norm, rounding, sparse_update, missing_gradients, .. } = &self.params;
        write!(f, "{name}(lr: {lr}, beta1: {beta1}, beta2: {beta2}, eps: {eps:e} {epsilon:?}")?;
        if *weight_decay != WeightDecay::None {
            write!(f, ", weight decay: {weight_decay:?}")?;
        }
        if !self.params.no_decay.is_empty() && decays_any(&self.params, &self.groups) {
            write!(f, ", no decay: {} of {} vars", self.spared_names().count(), self.vars.len())?;
        }
        if *state_dtype != StateDType::default() {
            write!(f, ", moments: {state_dtype:?}")?;
        }
        if *rowwise_norm {
            write!(f, ", one norm a row")?;
        }
        if *rounding != Rounding::default() {
            write!(f, ", rounding: {rounding:?}")?;
        }
        if *sparse_update != SparseUpdate::default() {
            write!(f, ", rows: {sparse_update:?}")?;
        }
        if *missing_gradients != MissingGradients::default() {
            write!(f, ", missing gradients: {missing_gradients}")?;
        }
        let groups = self.groups();
        if groups.len() > 1 {
            write!(f, ", groups: {}", groups.len())?;
        }
        write!(f, ", vars: {}, updates: {}", self.vars.len(), self.updates())?;
        let steps = self.params.gradient_accumulation_steps;
        if steps > 1 {
            write!(f, ", accumulated: {} of {steps} calls", self.counters.pending)?;
        }
        write!(f, ")")
    }
}

impl fmt::Debug for Adamax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adamax")
            .field("params", &self.params)
            .field("groups", &self.groups())
            .field("vars", &self.names().collect::<Vec<_>>())
            .field("counters", &self.settled_counters())
            .field("scaler", &self.scaler_after(self.late()))
            .field("plateau", &self.plateau)
            .field("kernel", &self.kernel)
            .field("report", &self.report())
            .finish()
    }
}
