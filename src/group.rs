//! Groups of variables, and what they override. Every optimizer has the group "default", for the variables that
//! were given without one; it overrides nothing unless it is told to.

use candle_core::Var;
use serde::{Deserialize, Serialize};

use crate::check;
use crate::codec::StateDType;
use crate::error::Result;
use crate::params::{ParamsAdamax, SparseUpdate, StateStorage, check_beta, check_decay};
use crate::rounding::Rounding;
use crate::rule::{Hyperparameters, WeightDecay};
use crate::schedule::LearningRate;

/// The name of the group of variables that were given without one.
pub(crate) const DEFAULT_GROUP: &str = "default";

/// The learning rate of a group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum GroupLr {
    /// The optimizer's.
    #[default]
    Inherit,
    /// The optimizer's, times a finite factor that is not negative. A product that is beyond f64 is an error of the step.
    Factor(f64),
    /// Its own, which `set_learning_rate` does not touch.
    Own(LearningRate),
}

/// What a group of variables overrides; `None` is the optimizer's own setting.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSettings {
    /// The group's name, which is its key in checkpoints.
    pub name: String,
    /// Its learning rate; the optimizer's, if a file leaves it out.
    #[serde(default)]
    pub lr: GroupLr,
    /// Its beta1, in `[0, 1)`.
    pub beta1: Option<f64>,
    /// Its beta2, in `[0, 1)`.
    pub beta2: Option<f64>,
    /// Its epsilon, not negative; it stands where the optimizer's stands.
    pub eps: Option<f64>,
    /// Its decay; the optimizer's `no_decay` spares names here, too.
    pub weight_decay: Option<WeightDecay>,
    /// How its moments are stored.
    pub state_dtype: Option<StateDType>,
    /// Whether the elements of a row share one norm.
    pub rowwise_norm: Option<bool>,
    /// How its f16 and bf16 variables are rounded.
    pub rounding: Option<Rounding>,
    /// What a step does to rows that had no gradient in it.
    pub sparse_update: Option<SparseUpdate>,
}

impl GroupSettings {
    /// A group that overrides nothing.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            lr: GroupLr::Inherit,
            beta1: None,
            beta2: None,
            eps: None,
            weight_decay: None,
            state_dtype: None,
            rowwise_norm: None,
            rounding: None,
            sparse_update: None,
        }
    }

    /// Whether anything is overridden.
    pub(crate) fn overrides_any(&self) -> bool {
        let Self { name: _, lr, beta1, beta2, eps, weight_decay, state_dtype, rowwise_norm, rounding, sparse_update } =
            self;
        let numbers = [beta1, beta2, eps].into_iter().any(Option::is_some) || weight_decay.is_some();
        let storage = state_dtype.is_some() || rowwise_norm.is_some() || rounding.is_some() || sparse_update.is_some();
        !matches!(lr, GroupLr::Inherit) || numbers || storage
    }

    /// Whether its learning rate is 0 in every call.
    pub(crate) fn is_frozen(&self) -> bool {
        matches!(self.lr, GroupLr::Factor(0.0) | GroupLr::Own(LearningRate::Constant(0.0)))
    }

    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// The first one that is not allowed, as `groups.NAME.FIELD`.
    pub fn validate(&self) -> Result<()> {
        check::require(!self.name.is_empty(), "groups", "a name for every group", "an empty one")?;
        self.validate_settings().map_err(|error| error.within(format_args!("groups.{}", self.name)))
    }

    fn validate_settings(&self) -> Result<()> {
        match &self.lr {
            GroupLr::Inherit => {}
            GroupLr::Factor(factor) => check::not_negative("lr_factor", *factor)?,
            GroupLr::Own(lr) => lr.validate()?,
        }
        self.beta1.map_or(Ok(()), |beta1| check_beta("beta1", beta1))?;
        self.beta2.map_or(Ok(()), |beta2| check_beta("beta2", beta2))?;
        self.eps.map_or(Ok(()), |eps| check::not_negative("eps", eps))?;
        self.weight_decay.map_or(Ok(()), check_decay)
    }

    /// The optimizer's numbers with this group's overrides.
    pub(crate) fn hyperparameters(&self, params: &ParamsAdamax) -> Hyperparameters {
        let base = params.hyperparameters();
        Hyperparameters {
            beta1: self.beta1.unwrap_or(base.beta1),
            beta2: self.beta2.unwrap_or(base.beta2),
            eps: self.eps.unwrap_or(base.eps),
            eps_mode: base.eps_mode,
            weight_decay: self.weight_decay.unwrap_or(base.weight_decay),
        }
    }

    /// The optimizer's ways of storing state with this group's overrides, checked together with its numbers.
    pub(crate) fn storage(&self, params: &ParamsAdamax) -> Result<StateStorage> {
        let base = params.storage();
        let storage = StateStorage {
            state_dtype: self.state_dtype.unwrap_or(base.state_dtype),
            rowwise_norm: self.rowwise_norm.unwrap_or(base.rowwise_norm),
            rounding: self.rounding.unwrap_or(base.rounding),
            sparse_update: self.sparse_update.unwrap_or(base.sparse_update),
        };
        let checked = storage.validate(&self.hyperparameters(params));
        checked.map_err(|error| error.within(format_args!("groups.{}", self.name)))?;
        Ok(storage)
    }

    /// This group's learning rate in call `call`, where the optimizer's is `base`.
    pub(crate) fn lr(&self, base: f64, call: u64) -> Result<f64> {
        let lr = match &self.lr {
            GroupLr::Inherit => Ok(base),
            GroupLr::Factor(factor) => check::not_negative("lr", base * factor).map(|()| base * factor),
            GroupLr::Own(lr) => lr.at(call),
        };
        lr.map_err(|error| error.within(format_args!("groups.{}", self.name)))
    }
}

/// Named variables and what they override: `param_groups` of PyTorch.
///
/// ```
/// use candle_adamax::{Adamax, ParamGroup, ParamsAdamax, WeightDecay};
/// use candle_core::{DType, Device, Var};
///
/// let weight = Var::zeros((4, 4), DType::F32, &Device::Cpu)?;
/// let bias = Var::zeros(4, DType::F32, &Device::Cpu)?;
/// let optimizer = Adamax::from_groups(
///     [
///         ParamGroup::new("weights").var("fc.weight", &weight).weight_decay(WeightDecay::Decoupled(0.01)),
///         ParamGroup::new("biases").var("fc.bias", &bias).lr_factor(2.0),
///     ],
///     ParamsAdamax::default(),
/// )?;
/// assert_eq!(optimizer.groups().len(), 2);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ParamGroup {
    pub(crate) settings: GroupSettings,
    pub(crate) vars: Vec<(String, Var)>,
}

impl ParamGroup {
    /// A group without variables that overrides nothing.
    pub fn new(name: impl Into<String>) -> Self {
        Self { settings: GroupSettings::new(name), vars: Vec::new() }
    }

    /// Adds one variable.
    pub fn var(mut self, name: impl Into<String>, var: &Var) -> Self {
        self.vars.push((name.into(), var.clone()));
        self
    }

    /// Adds several.
    pub fn vars<S: Into<String>>(mut self, vars: impl IntoIterator<Item = (S, Var)>) -> Self {
        self.vars.extend(vars.into_iter().map(|(name, var)| (name.into(), var)));
        self
    }

    /// A learning rate of its own.
    pub fn lr(mut self, lr: impl Into<LearningRate>) -> Self {
        self.settings.lr = GroupLr::Own(lr.into());
        self
    }

    /// The optimizer's learning rate times a factor.
    pub fn lr_factor(mut self, factor: f64) -> Self {
        self.settings.lr = GroupLr::Factor(factor);
        self
    }

    /// Its own beta1.
    pub fn beta1(mut self, beta1: f64) -> Self {
        self.settings.beta1 = Some(beta1);
        self
    }

    /// Its own beta2.
    pub fn beta2(mut self, beta2: f64) -> Self {
        self.settings.beta2 = Some(beta2);
        self
    }

    /// Its own epsilon.
    pub fn eps(mut self, eps: f64) -> Self {
        self.settings.eps = Some(eps);
        self
    }

    /// Its own decay.
    pub fn weight_decay(mut self, decay: WeightDecay) -> Self {
        self.settings.weight_decay = Some(decay);
        self
    }

    /// How its moments are stored.
    pub fn state_dtype(mut self, dtype: StateDType) -> Self {
        self.settings.state_dtype = Some(dtype);
        self
    }

    /// Whether the elements of a row share one norm.
    pub fn rowwise_norm(mut self, rowwise: bool) -> Self {
        self.settings.rowwise_norm = Some(rowwise);
        self
    }

    /// How its f16 and bf16 variables are rounded.
    pub fn rounding(mut self, rounding: Rounding) -> Self {
        self.settings.rounding = Some(rounding);
        self
    }

    /// What a step does to rows that had no gradient in it.
    pub fn sparse_update(mut self, update: SparseUpdate) -> Self {
        self.settings.sparse_update = Some(update);
        self
    }
}
