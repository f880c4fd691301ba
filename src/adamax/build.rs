//! Optimizers are made, and variables come and go.

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;

use candle_core::Var;
use candle_nn::VarMap;

use super::Adamax;
use super::outcome::Report;
use super::progress::Progress;
use super::settings::ResolvedGroup;
use super::vars::{Param, VarInfo, Vars};
use crate::check;
use crate::error::{Error, ErrorKind, Result};
use crate::group::{DEFAULT_GROUP, GroupSettings, ParamGroup};
use crate::kernel::lend::storage_address;
use crate::kernel::{Backends, Kernel, is_supported};
use crate::maps::IdMap;
use crate::params::ParamsAdamax;
use crate::rounding::key_of;
use crate::schedule::Plateau;
use crate::state::{ParamState, Units};

impl Adamax {
    /// An optimizer with Keras's defaults but for the learning rate; variables have no names.
    ///
    /// # Errors
    ///
    /// As [`new`](candle_nn::Optimizer::new).
    pub fn new_lr(vars: Vec<Var>, lr: f64) -> Result<Self> {
        Self::unnamed(vars, ParamsAdamax { lr: lr.into(), ..ParamsAdamax::default() })
    }

    /// An optimizer of all variables in a `VarMap`, under their names there.
    ///
    /// # Errors
    ///
    /// As [`new`](candle_nn::Optimizer::new).
    pub fn from_varmap(varmap: &VarMap, params: ParamsAdamax) -> Result<Self> {
        Self::from_varmap_where(varmap, |_, _| true, params)
    }

    /// An optimizer of the variables in a `VarMap` that `keep` is true for, under their names there. `keep` is asked in
    /// the order of the names.
    ///
    /// A `VarMap` also has variables that are not trained, such as the running statistics of `candle_nn::batch_norm`.
    /// The optimizer never writes a variable without a gradient, so it may have them; leave them out where its
    /// variables are to be those that PyTorch's optimizer has.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap, batch_norm};
    ///
    /// let varmap = VarMap::new();
    /// let norm = batch_norm(8, 1e-5, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    /// let is_trained = |name: &str, _: &_| !name.ends_with("running_mean") && !name.ends_with("running_var");
    /// let optimizer = Adamax::from_varmap_where(&varmap, is_trained, ParamsAdamax::default())?;
    /// assert_eq!(optimizer.names().collect::<Vec<_>>(), ["bias", "weight"]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`new`](candle_nn::Optimizer::new); none of the variables is kept.
    pub fn from_varmap_where(
        varmap: &VarMap,
        mut keep: impl FnMut(&str, &Var) -> bool,
        params: ParamsAdamax,
    ) -> Result<Self> {
        let mut vars = sorted(varmap);
        let all = vars.len();
        vars.retain(|(name, var)| keep(name, var));
        if vars.is_empty() && all > 0 {
            let error = Error::invalid("keep", "a function that keeps a variable", format!("none of {all}"));
            return Err(error.of_optimizer(&params.name));
        }
        Self::from_named(vars, params)
    }

    /// An optimizer of all variables in a `VarMap`, in groups that their names decide: `group_of` gives each variable's
    /// group, with its settings. Variables whose groups have one name are one group, with the settings of the first.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap, linear};
    ///
    /// let varmap = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    /// let (_body, _head) = (linear(8, 4, vb.pp("body"))?, linear(4, 2, vb.pp("head"))?);
    /// let optimizer = Adamax::from_varmap_groups(&varmap, ParamsAdamax::default(), |name| {
    ///     if name.starts_with("head.") { ParamGroup::new("head").lr_factor(10.0) } else { ParamGroup::new("body") }
    /// })?;
    /// assert_eq!(optimizer.group_learning_rate("head")?, 10.0 * optimizer.group_learning_rate("body")?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`from_groups`](Self::from_groups).
    pub fn from_varmap_groups(
        varmap: &VarMap,
        params: ParamsAdamax,
        mut group_of: impl FnMut(&str) -> ParamGroup,
    ) -> Result<Self> {
        let mut groups: Vec<ParamGroup> = Vec::new();
        let mut indices: HashMap<String, usize> = HashMap::new();
        for (name, var) in sorted(varmap) {
            let group = group_of(&name);
            let index = *indices.entry(group.settings.name.clone()).or_insert_with(|| {
                groups.push(group);
                groups.len() - 1
            });
            groups[index].vars.push((name, var));
        }
        Self::from_groups(groups, params)
    }

    /// An optimizer of named variables.
    ///
    /// # Errors
    ///
    /// As [`new`](candle_nn::Optimizer::new), and a name that is given twice.
    pub fn from_named<S: Into<String>>(vars: impl IntoIterator<Item = (S, Var)>, params: ParamsAdamax) -> Result<Self> {
        Self::from_groups([ParamGroup::new(DEFAULT_GROUP).vars(vars)], params)
    }

    /// An optimizer of groups of variables with settings of their own. A group named "default" takes the place of the
    /// one for variables that are [added](Self::add_var) later.
    ///
    /// # Errors
    ///
    /// As [`from_named`](Self::from_named), for the names of groups, too.
    pub fn from_groups(groups: impl IntoIterator<Item = ParamGroup>, params: ParamsAdamax) -> Result<Self> {
        let mut adamax = Self::without_vars(params)?;
        let mut groups: Vec<_> = groups.into_iter().collect();
        if let Some(index) = groups.iter().position(|group| group.settings.name == DEFAULT_GROUP) {
            let ParamGroup { settings, vars } = groups.remove(index);
            adamax.set_group(settings)?;
            let vars = vars.into_iter().map(|(name, var)| (name, None, var)).collect();
            adamax.named(|adamax| adamax.insert(0, vars))?;
        }
        groups.into_iter().try_for_each(|group| adamax.add_group(group))?;
        adamax.check_no_decay()?;
        Ok(adamax)
    }

    /// Adds a variable to the group "default". Its moments begin with zero; its bias correction follows
    /// [`StepCount`](crate::StepCount).
    ///
    /// # Errors
    ///
    /// The name or the variable is there already, or its float dtype is not supported. A variable that is not
    /// floating point is left out without an error, as everywhere in candle.
    pub fn add_var(&mut self, name: impl Into<String>, var: Var) -> Result<()> {
        self.named(|adamax| adamax.insert(0, vec![(name.into(), None, var)]))
    }

    /// Adds a group and its variables.
    ///
    /// # Errors
    ///
    /// As [`add_var`](Self::add_var), for the group's name, too; and settings that are not allowed. Nothing is added
    /// then.
    pub fn add_group(&mut self, group: ParamGroup) -> Result<()> {
        self.named(|adamax| {
            let ParamGroup { settings, vars } = group;
            settings.validate()?;
            if adamax.group_indices.contains_key(&settings.name) {
                return Err(ErrorKind::DuplicateName(settings.name).into());
            }
            adamax.resolved.push(ResolvedGroup::of(&adamax.params, &settings)?);
            let vars = vars.into_iter().map(|(name, var)| (name, None, var)).collect();
            if let Err(error) = adamax.insert(adamax.groups.len(), vars) {
                adamax.resolved.pop();
                return Err(error);
            }
            adamax.group_indices.insert(settings.name.clone(), adamax.groups.len());
            adamax.groups.push(settings);
            Ok(())
        })
    }

    /// Takes a variable out, with its state.
    ///
    /// # Errors
    ///
    /// No variable has this name.
    pub fn remove_var(&mut self, name: &str) -> Result<Var> {
        self.named(|adamax| {
            let index = adamax.index_of(name)?;
            adamax.sync()?;
            adamax.vars[index].state.catch_up()?;
            // Its indices are no longer those of the variables.
            adamax.report.missing.clear();
            Ok(adamax.vars.remove(index))
        })
    }

    fn without_vars(params: ParamsAdamax) -> Result<Self> {
        params.validate()?;
        let default = GroupSettings::new(DEFAULT_GROUP);
        Ok(Self {
            progress: Progress { scaler: params.loss_scale.start(), ..Progress::default() },
            plateau: params.plateau.map(|_| Plateau::default()),
            resolved: vec![ResolvedGroup::of(&params, &default)?],
            params,
            groups: vec![default],
            group_indices: HashMap::from([(DEFAULT_GROUP.to_owned(), 0)]),
            vars: Vars::default(),
            kernel: Kernel::Auto,
            backends: Backends::default(),
            report: Report::default(),
        })
    }

    /// Adds variables to a group, all or none: names, positions of those without a name, variables.
    fn insert(&mut self, group: usize, vars: Vec<(String, Option<usize>, Var)>) -> Result<()> {
        self.sync()?;
        let resolved = &self.resolved[group];
        let (mut names, mut storages) = (HashSet::new(), IdMap::default());
        let mut new = Vec::with_capacity(vars.len());
        for (name, unnamed, var) in vars {
            if !var.dtype().is_float() {
                continue;
            }
            if !is_supported(var.dtype()) {
                let (expected, got) = ("F64, F32, F16 or BF16".to_owned(), var.dtype());
                return Err(ErrorKind::DTypeMismatch { what: "var", name, expected, got }.into());
            }
            check::require(!name.is_empty(), "name", "a name for every var", "an empty one")?;
            let address = storage_address(&var);
            if let Some(first) = self.vars.owner_of(address).or(storages.get(&address)) {
                return Err(ErrorKind::DuplicateVar { first: first.clone(), second: name }.into());
            }
            if self.vars.position(&name).is_ok() || !names.insert(name.clone()) {
                return Err(ErrorKind::DuplicateName(name).into());
            }
            storages.insert(address, name.clone());
            let place = self.kernel.place(&var);
            resolved.check(place)?;
            let layout = resolved.layout(&var, Units::Blocks);
            let state = ParamState::zeros(&var, place, &layout, resolved.storage.rounding)?;
            let (decays, key) = (self.params.decays(&name), key_of(&name));
            let info = VarInfo { name, unnamed, group, decays, key, place, var };
            new.push(Box::new(Param::new(info, state)));
        }
        self.vars.extend(new);
        self.report.missing.clear();
        Ok(())
    }

    /// An optimizer of variables without names.
    pub(super) fn unnamed(vars: Vec<Var>, params: ParamsAdamax) -> Result<Self> {
        let mut adamax = Self::without_vars(params)?;
        // With leading zeros the order of the names is that of the variables.
        let digits = vars.len().saturating_sub(1).to_string().len();
        let vars = vars.into_iter().enumerate().map(|(i, var)| (format!("var.{i:0digits$}"), Some(i), var)).collect();
        adamax.named(|adamax| adamax.insert(0, vars))?;
        adamax.check_no_decay()?;
        Ok(adamax)
    }
}

/// The variables of a `VarMap`, by name. Functions of the caller run without its lock.
fn sorted(varmap: &VarMap) -> Vec<(String, Var)> {
    let named = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut vars: Vec<_> = named.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    drop(named);
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    vars
}
