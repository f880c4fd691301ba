//! The settings of an optimizer, the presets of the frameworks, and what is allowed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check;
use crate::clip::Clip;
use crate::codec::{LARGEST_NOISE, StateDType, q8_noise};
use crate::error::{Error, Result};
use crate::ledger::{self, LONGEST_WINDOW};
use crate::pattern;
use crate::reduce::NormType;
use crate::rounding::Rounding;
use crate::rule::{EpsMode, Hyperparameters, WeightDecay};
use crate::scaler::LossScale;
use crate::schedule::{LearningRate, ReduceLrOnPlateau};

/// What the bias correction `1 - beta1^t` of a variable counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StepCount {
    /// All updates of the optimizer, also those in which the variable had no gradient. Keras, optax.
    #[default]
    Shared,
    /// The variable's own updates. PyTorch.
    PerVar,
}

/// The variables that an update needs a gradient of; it tells a model that trains from one whose graph is cut.
///
/// candle's fast operations cut a graph silently, and a model behind them goes on without an error, as a rule with its
/// head alone. The check is about variables and not about their elements: an embedding table has more elements than all
/// layers together and would outvote them.
///
/// It is made for each update, before anything changes. With accumulation the update has the gradients of all its
/// calls. Variables of groups whose learning rate is the constant 0 ([`GroupLr::Own`](crate::GroupLr::Own) or
/// [`GroupLr::Factor`](crate::GroupLr::Factor)) are frozen and do not count. A table that no lookup has used has no
/// gradient; a [`SparseGrad`](crate::SparseGrad) without rows is one. A call that is skipped because something is not
/// finite is no update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MissingGradients {
    /// Every variable needs a gradient in every update.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ErrorKind, MissingGradients, ParamsAdamax};
    /// use candle_core::{Device, Var};
    ///
    /// let (a, b) = (Var::new(&[1f32], &Device::Cpu)?, Var::new(&[1f32], &Device::Cpu)?);
    /// let params = ParamsAdamax { missing_gradients: MissingGradients::Error, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("a", a.clone()), ("b", b)], params)?;
    /// let error = optimizer.apply_gradients([(&a, &a.ones_like()?)]).unwrap_err();
    /// assert!(matches!(error.kind(), ErrorKind::MissingGradients { with_gradient: 1, vars: 2, .. }));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    Error,
    /// At least half of the variables need to have had a gradient, in this update or in an earlier one, and an update
    /// without any gradient is an error.
    ///
    /// Tasks that alternate, experts and tables that are rarely used pass once half of all variables have been updated;
    /// the first update is the one that needs most. The numbers of updates are part of snapshots and checkpoints, so
    /// that a resumed run is checked as the unbroken one. [`StepReport::missing`](crate::StepReport::missing) names the
    /// variables that had a gradient before and have none now. A batch norm passes: of its four variables two train.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{Device, Var};
    ///
    /// let [a, b, c] = [1f32, 2.0, 3.0].map(|x| Var::new(&[x], &Device::Cpu));
    /// let (a, b, c) = (a?, b?, c?);
    /// let vars = [("a", a.clone()), ("b", b.clone()), ("c", c)];
    /// let mut optimizer = Adamax::from_named(vars, ParamsAdamax::default())?;
    /// let grad = a.ones_like()?;
    /// assert!(optimizer.apply_gradients([(&a, &grad)]).is_err()); // 1 of 3
    /// optimizer.apply_gradients([(&a, &grad), (&b, &grad)])?; // 2 of 3
    /// optimizer.apply_gradients([(&a, &grad)])?; // a now, b before
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[default]
    Half,
    /// No variable needs a gradient.
    ///
    /// A call in which none has one does nothing, as in PyTorch: it is no call, neither for schedules nor for averages
    /// nor among those that are accumulated, and [`updated`](crate::StepReport::updated) is false.
    ///
    /// ```
    /// use candle_adamax::{Adamax, MissingGradients, ParamsAdamax};
    /// use candle_core::backprop::GradStore;
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("a", Var::new(&[1f32], &Device::Cpu)?)], params)?;
    /// optimizer.step(&GradStore::default())?;
    /// assert_eq!(optimizer.calls(), 0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    Allow,
}

impl fmt::Display for MissingGradients {
    /// The name that settings files have for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "Error",
            Self::Half => "Half",
            Self::Allow => "Allow",
        })
    }
}

/// Keras 3's moving average of the weights.
///
/// After every call of `step`: `average = momentum * average + (1 - momentum) * w`. An average begins as a copy of the
/// weights after the first update in which its variable has a gradient. With `overwrite_frequency` f, every f-th update
/// ends with `w = average`. A variable that has never had a gradient, such as a running statistic, has no average, and
/// nothing overwrites it.
///
/// w is the master copy where there is one ([`Rounding::Master`]), and becomes the average without being rounded. With
/// [`Rounding::Stochastic`] a weight that becomes its average is rounded at random, with a key of its own.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ema {
    /// The share that the average keeps, in `[0, 1]`; Keras's default is 0.99.
    pub momentum: f64,
    /// After how many updates the weights are replaced by their average; never if `None`.
    pub overwrite_frequency: Option<u64>,
}

impl Default for Ema {
    fn default() -> Self {
        Self { momentum: 0.99, overwrite_frequency: None }
    }
}

/// What a step does to the rows of a table that had no gradient in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SparseUpdate {
    /// Nothing: neither they nor their moments change. TensorFlow's, for `IndexedSlices`.
    #[default]
    Lazy,
    /// The result of a dense optimizer, at the cost of the touched rows. The updates that a row has missed are applied when
    /// it is next looked up: its moments decay, and it moves by the sum of the steps, within the rounding of the arithmetic.
    ///
    /// - It needs `beta1 < beta2`, so far apart that what a step leaves of its momentum vanishes within 65,536 updates:
    ///   `beta1 <= 0.99936 * beta2` does. Betas that are closer are an error, since the work of a step grows with that number.
    ///   It excludes [`WeightDecay::L2`], whose gradient no row is without; also where
    ///   [`no_decay`](ParamsAdamax::no_decay) spares the table: give such a table a group with another decay.
    /// - A step in which [`WeightDecay::Decoupled`] would leave nothing of a weight, `lr * decay >= 1`, is an error,
    ///   and so is, as without `Exact`, a step with gradients of rows where [`ema`](ParamsAdamax::ema) is set.
    /// - The weights of rows that have missed updates are behind: [`Adamax::catch_up`](crate::Adamax::catch_up)
    ///   brings all of them up to date before the weight is read as a whole. Lookups do so for their rows, and
    ///   [`Table::weight`](crate::Table::weight) in a copy; checkpoints hold the missed updates. Catching up in two parts
    ///   rounds differently from catching up once, so lookups and `catch_up` are part of the run.
    /// - Call [`Adamax::catch_up`](crate::Adamax::catch_up) also before weights are written other than by this crate
    ///   (`Var::set`, `VarMap::load`): updates that were missed before would move what was written. In host memory most such
    ///   writes are noticed, and are [`ErrorKind::WrittenRow`](crate::ErrorKind::WrittenRow) in the next lookup or step of
    ///   such a row; a call of `catch_up` then lets what was written stand. A write is not noticed where the new bits are the
    ///   old ones, in a row that was not updated or looked up since all rows were up to date, in one case of 8,191 by
    ///   chance, and on a GPU.
    /// - A [padding row](crate::Embedding::padding_idx) stays as it is until another layer trains it.
    /// - With betas that are as far apart as the default ones, a row of f32 ends within 1e-6 of the way that it has gone of
    ///   where a dense run in f64 does, beside the rounding of the weight itself: one unit in its last place for each time
    ///   that it was updated or caught up. With encoded moments it is 1e-3 of the way for F16, 1e-2 for BF16 and 0.25 for Q8. Dense runs with the same [`StateDType`] are
    ///   further away: in the runs that these numbers come from, up to 8e-4, 2e-3, 0.016 and 0.53.
    /// - With f16 or bf16 weights and [`Rounding::Nearest`] the sum of the steps that a row missed survives where a
    ///   dense run loses each of them, so the two differ, and the dense one is further from exact arithmetic;
    ///   [`Rounding::Master`] loses none.
    Exact,
}

/// How the state of a group of parameters is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StateStorage {
    pub(crate) state_dtype: StateDType,
    pub(crate) rowwise_norm: bool,
    pub(crate) rounding: Rounding,
    pub(crate) sparse_update: SparseUpdate,
}

/// Below this share of `beta2` a `beta1` has a window that is short enough: `1e-18` to the power of `1 / 65536`, rounded down.
const LARGEST_QUOTIENT: f64 = 0.99936;

impl StateStorage {
    /// Checks it against the numbers of its group.
    pub(crate) fn validate(&self, hyper: &Hyperparameters) -> Result<()> {
        let Hyperparameters { beta1, beta2, weight_decay, .. } = *hyper;
        let needs = match (self.sparse_update, self.state_dtype) {
            (SparseUpdate::Exact, _) => Some("`sparse_update: Exact`"),
            (_, StateDType::F16) => Some("`state_dtype: F16`"),
            (_, StateDType::Q8) => Some("`state_dtype: Q8`"),
            _ => None,
        };
        if let Some(needs) = needs.filter(|_| beta1 >= beta2) {
            return Err(Error::invalid("beta1", format!("a number below `beta2`, {beta2}, for {needs}"), beta1));
        }
        let noise = q8_noise(beta1, beta2);
        if self.state_dtype == StateDType::Q8 && noise > LARGEST_NOISE {
            let expected = format!(
                "a number so far below `beta2`, {beta2}, that the rounding of `state_dtype: Q8` is at most \
                 {LARGEST_NOISE} of the learning rate in a step, where it is {noise:.3} of it"
            );
            return Err(Error::invalid("beta1", expected, beta1));
        }
        // Of betas that are neighbors the quotient may be 1, whose window never ends.
        let window = ledger::window(beta1, beta2);
        if self.sparse_update == SparseUpdate::Exact && !(0.0..=LONGEST_WINDOW as f64).contains(&window) {
            let expected = format!(
                "a number further below `beta2`, {beta2}, for `sparse_update: Exact`: what a step leaves of its momentum has \
                 to vanish within {LONGEST_WINDOW} updates, as it does for at most {LARGEST_QUOTIENT} times `beta2`"
            );
            return Err(Error::invalid("beta1", expected, beta1));
        }
        if let (SparseUpdate::Exact, WeightDecay::L2(lambda)) = (self.sparse_update, weight_decay) {
            let expected = "None or Decoupled for `sparse_update: Exact`: with L2 no row is without a gradient";
            return Err(Error::invalid("weight_decay", expected, format!("L2({lambda})")));
        }
        Ok(())
    }
}

/// The settings of [`Adamax`](crate::Adamax). The default is Keras's optimizer, [`pytorch`](Self::pytorch) is
/// PyTorch's; every setting stands alone, so that others can be mixed.
///
/// ```text
/// g  = gradient / loss scale, accumulated, clipped, negated if maximize, + lambda * w for L2
/// m  = beta1 * m + (1 - beta1) * g
/// u  = max(beta2 * u, |g|)                                                       InsideMax: max(beta2 * u, |g| + eps)
/// w  = w - lr * lambda * w for Decoupled - lr / (1 - beta1^t) * m / (u + eps)    InsideMax: / u
/// ```
///
/// (Kingma & Ba 2015, section 7.1; `tf.keras.optimizers.Adamax`; `torch.optim.Adamax`.)
///
/// With serde, a field that is left out has its default, and an unknown one is an error that names it; values are checked
/// when an optimizer is made. A file in TOML, with the crate `toml`; JSON and YAML have the same fields, and in YAML a
/// variant with a number is a tag, such as `weight_decay: !Decoupled 0.01`:
///
/// ```
/// # use candle_adamax::{GroupSettings, ParamsAdamax, WeightDecay};
/// #[derive(serde::Deserialize)]
/// struct Settings {
///     optimizer: ParamsAdamax,
///     groups: Vec<GroupSettings>,
/// }
///
/// let settings: Settings = toml::from_str(
///     r#"
///     [optimizer]
///     lr = { class_name = "CosineDecay", config = { initial_learning_rate = 2e-3, decay_steps = 10_000 } }
///     weight_decay = { Decoupled = 0.01 }
///     no_decay = ["bias", "*norm*"]
///     clip = { GlobalNorm = 1.0 }
///
///     [[groups]]
///     name = "head"
///     lr = { Factor = 10.0 }
///     "#,
/// )?;
/// assert_eq!(settings.optimizer.weight_decay, WeightDecay::Decoupled(0.01));
/// assert_eq!(settings.groups[0].name, "head");
/// # Ok::<(), toml::de::Error>(())
/// ```
///
/// The same settings in Rust:
///
/// ```
/// use candle_adamax::{Clip, CosineDecay, ParamsAdamax, WeightDecay};
///
/// let params = ParamsAdamax {
///     lr: CosineDecay::new(2e-3, 10_000).into(),
///     weight_decay: WeightDecay::Decoupled(0.01),
///     no_decay: vec!["bias".into(), "*norm*".into()],
///     clip: Some(Clip::GlobalNorm(1.0)),
///     ..Default::default()
/// };
/// params.validate()?;
/// # Ok::<(), candle_adamax::Error>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParamsAdamax {
    /// What this optimizer is called in checkpoints, `Display` and errors. Default: "Adamax".
    pub name: String,
    /// The learning rate: a number, a schedule, a scalar tensor that is read at each step; `.into()` makes each one.
    /// Not negative. Default: 1e-3.
    pub lr: LearningRate,
    /// Lower learning rates once a metric has stopped getting better, which [`Adamax::observe_metric`](crate::Adamax::observe_metric)
    /// is told. Default: none.
    pub plateau: Option<ReduceLrOnPlateau>,
    /// How much of m remains each update, in `[0, 1)`. Default: 0.9.
    pub beta1: f64,
    /// How much of u remains each update, in `[0, 1)`. Default: 0.999.
    pub beta2: f64,
    /// Keeps the quotient finite; not negative, and where it is 0, `0 / 0` counts as 0. Default: 1e-7.
    pub eps: f64,
    /// Where `eps` stands. Default: [`EpsMode::AddToNorm`], of Keras.
    pub eps_mode: EpsMode,
    /// How weights decay. Default: not at all.
    pub weight_decay: WeightDecay,
    /// Patterns of the names of variables that are spared from decay. A pattern is one or several components of a name
    /// between its dots, each as a whole; `*` is any run of characters but dots, and case counts.
    ///
    /// | pattern | spares | and not |
    /// | --- | --- | --- |
    /// | `"bias"` | `bias`, `encoder.0.bias` | `encoder.0.bias_table` |
    /// | `"norm"` | `norm.weight`, `layers.1.norm.bias` | `normal_head.weight`, `layers.1.layer_norm.bias` |
    /// | `"layer_norm.weight"` | `layers.1.layer_norm.weight` | `layers.1.layer_norm.bias` |
    /// | `"*norm*"` | `norm.weight`, `layers.1.input_layernorm.weight` | `bert.LayerNorm.weight` |
    ///
    /// A pattern that spares no variable is an error when the optimizer is made, where anything decays and there are
    /// variables; [`Adamax::spared_names`](crate::Adamax::spared_names) has those that are spared. Default: none.
    pub no_decay: Vec<String>,
    /// What t counts. Default: [`StepCount::Shared`], of Keras.
    pub step_count: StepCount,
    /// Go up the gradient instead of down. Default: false.
    pub maximize: bool,
    /// How gradients are clipped. Default: not at all.
    pub clip: Option<Clip>,
    /// Measure the L2 norm of all gradients at each update, for [`StepReport`](crate::StepReport), where no clip does
    /// so anyway; that reads all gradients once more. Default: false.
    pub measure_norm: bool,
    /// Factor of the loss, by which gradients are divided before anything else. Default:
    /// [`LossScale::None`].
    pub loss_scale: LossScale,
    /// Keep a moving average of the weights. Default: none.
    pub ema: Option<Ema>,
    /// Update once in so many calls of `step`, with the mean of their gradients; at least 1. Of the calls that
    /// [wait](crate::Adamax::pending), [`flush_gradients`](crate::Adamax::flush_gradients) makes an update before there
    /// are so many, and [`discard_gradients`](crate::Adamax::discard_gradients) drops them. Default: 1.
    pub gradient_accumulation_steps: u64,
    /// Skip a call in which a gradient, or the norm to clip by, is not finite: it changes nothing, and is counted by
    /// [`Adamax::skipped`](crate::Adamax::skipped). The exception is an accumulated sum that overflows although each of
    /// its gradients was finite: the gradients that wait are dropped with the call. Default: false, so that NaN
    /// propagates and shows itself.
    pub skip_nonfinite: bool,
    /// How moments are stored. Default: [`StateDType::F32`].
    pub state_dtype: StateDType,
    /// Whether the elements of a row of a variable (of all that is under one index of its first dimension) share one u,
    /// the largest of the row: `u = max(beta2 * u, |g_1|, |g_2|, ..)`. u then takes 4 bytes a row, and no weight moves
    /// further in a step than it would with a u of its own. Default: false.
    pub rowwise_norm: bool,
    /// How f16 and bf16 variables are rounded after an update. Default: [`Rounding::Nearest`].
    pub rounding: Rounding,
    /// What a step does to rows that had no gradient in it. Default: [`SparseUpdate::Lazy`].
    pub sparse_update: SparseUpdate,
    /// Of the random numbers of stochastic rounding, which are those of a counter: the same seed, names and gradients
    /// give the same bits, on any number of threads. Default: 0.
    pub seed: u64,
    /// The variables that an update needs a gradient of. Default: [`MissingGradients::Half`], an error where less than
    /// half of them have had one: a graph that is cut silently is a common mistake.
    pub missing_gradients: MissingGradients,
}

impl Default for ParamsAdamax {
    /// Keras's defaults: lr 1e-3, betas 0.9 and 0.999, epsilon 1e-7 added to the norm.
    fn default() -> Self {
        Self {
            name: "Adamax".to_owned(),
            lr: 1e-3.into(),
            plateau: None,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-7,
            eps_mode: EpsMode::AddToNorm,
            weight_decay: WeightDecay::None,
            no_decay: Vec::new(),
            step_count: StepCount::Shared,
            maximize: false,
            clip: None,
            measure_norm: false,
            loss_scale: LossScale::None,
            ema: None,
            gradient_accumulation_steps: 1,
            skip_nonfinite: false,
            state_dtype: StateDType::F32,
            rowwise_norm: false,
            rounding: Rounding::Nearest,
            sparse_update: SparseUpdate::Lazy,
            seed: 0,
            missing_gradients: MissingGradients::Half,
        }
    }
}

impl ParamsAdamax {
    /// PyTorch's defaults: lr 2e-3, betas 0.9 and 0.999, epsilon 1e-8 inside the maximum, own counters.
    ///
    /// `torch.optim.Adamax(weight_decay=x)` is [`WeightDecay::L2`]`(x)`.
    pub fn pytorch() -> Self {
        Self {
            lr: 2e-3.into(),
            eps: 1e-8,
            eps_mode: EpsMode::InsideMax,
            step_count: StepCount::PerVar,
            ..Self::default()
        }
    }

    /// Checks every setting; [`Adamax::new`](candle_nn::Optimizer::new) does so too.
    ///
    /// # Errors
    ///
    /// The first setting that is not allowed, with its name, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.validate_settings().map_err(|error| error.of_optimizer(&self.name))
    }

    fn validate_settings(&self) -> Result<()> {
        check::require(!self.name.is_empty(), "name", "a name", "an empty one")?;
        self.lr.validate()?;
        self.plateau.map_or(Ok(()), |plateau| plateau.validate().map_err(|e| e.within("plateau")))?;
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check::not_negative("eps", self.eps)?;
        check_decay(self.weight_decay)?;
        if let Some(pattern) = self.no_decay.iter().find(|pattern| pattern.split('.').any(str::is_empty)) {
            return Err(Error::invalid("no_decay", "patterns without empty components", format_args!("{pattern:?}")));
        }
        self.clip.map_or(Ok(()), Clip::validate)?;
        self.storage().validate(&self.hyperparameters())?;
        self.loss_scale.validate()?;
        if let Some(Ema { momentum, overwrite_frequency }) = self.ema {
            check::share("ema.momentum", momentum)?;
            check::at_least_one("ema.overwrite_frequency", overwrite_frequency.unwrap_or(1))?;
        }
        check::at_least_one("gradient_accumulation_steps", self.gradient_accumulation_steps)
    }

    /// Whether a call in which something is not finite is skipped.
    pub(crate) fn skips_nonfinite(&self) -> bool {
        self.skip_nonfinite || self.loss_scale.scaler().is_some()
    }

    /// Which norm is to be measured, and [reported](crate::StepReport::total_norm).
    pub(crate) fn norm_type(&self) -> Option<NormType> {
        self.clip.and_then(Clip::norm_type).or(self.measure_norm.then_some(NormType::L2))
    }

    /// The largest magnitude that an element of a gradient keeps.
    pub(crate) fn clamp(&self) -> f64 {
        match self.clip {
            Some(Clip::Value(limit)) => limit,
            _ => f64::INFINITY,
        }
    }

    /// The numbers that groups may override.
    pub(crate) fn hyperparameters(&self) -> Hyperparameters {
        Hyperparameters {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            eps_mode: self.eps_mode,
            weight_decay: self.weight_decay,
        }
    }

    /// The ways of storing state that groups may override.
    pub(crate) fn storage(&self) -> StateStorage {
        StateStorage {
            state_dtype: self.state_dtype,
            rowwise_norm: self.rowwise_norm,
            rounding: self.rounding,
            sparse_update: self.sparse_update,
        }
    }

    /// Whether a variable of this name decays.
    pub(crate) fn decays(&self, name: &str) -> bool {
        !self.no_decay.iter().any(|pattern| pattern::matches(pattern, name))
    }
}

pub(crate) fn check_beta(field: &str, beta: f64) -> Result<()> {
    check::require((0.0..1.0).contains(&beta), field, "a number in [0, 1)", beta)
}

pub(crate) fn check_decay(decay: WeightDecay) -> Result<()> {
    match decay {
        WeightDecay::None => Ok(()),
        WeightDecay::L2(lambda) | WeightDecay::Decoupled(lambda) => check::not_negative("weight_decay", lambda),
    }
}
