//! The configuration of Keras's Adamax, as `keras.optimizers.serialize` writes it, into settings and back.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::clip::Clip;
use crate::error::{Error, Result};
use crate::params::{Ema, ParamsAdamax, StepCount};
use crate::rule::{EpsMode, WeightDecay};
use crate::scaler::LossScale;
use crate::schedule::{InverseTimeDecay, LearningRate, Schedule};

/// What the JSON text is called in errors.
const TEXT: &str = "keras configuration";
/// The keys that Keras gives a serialized object.
const KEYS: [&str; 4] = ["module", "class_name", "config", "registered_name"];

/// Which class a serialized object is of.
#[derive(Deserialize)]
struct Class {
    #[serde(default)]
    class_name: Option<String>,
}

/// A serialized optimizer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "keys that are known and mean nothing here")]
struct Object {
    #[serde(default)]
    module: Option<String>,
    #[serde(default)]
    class_name: Option<String>,
    config: Config,
    #[serde(default)]
    registered_name: Option<String>,
}

/// Its config: of Keras 3, of TensorFlow 2.11 and later, or of the legacy optimizers. A key that is left out has Keras's
/// default.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    name: String,
    learning_rate: Value,
    weight_decay: Option<f64>,
    clipnorm: Option<f64>,
    global_clipnorm: Option<f64>,
    clipvalue: Option<f64>,
    use_ema: bool,
    ema_momentum: f64,
    ema_overwrite_frequency: Option<u64>,
    loss_scale_factor: Option<f64>,
    gradient_accumulation_steps: Option<u64>,
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    /// Of the legacy optimizers: `lr / (1 + decay * step)`.
    #[serde(skip_serializing)]
    decay: Option<f64>,
    /// Of TensorFlow 2.11 and later: whether XLA compiles the update, and which of two classes it is.
    #[serde(skip_serializing)]
    #[allow(dead_code, reason = "a key that is known and means nothing here")]
    jit_compile: Option<bool>,
    #[serde(skip_serializing)]
    #[allow(dead_code, reason = "a key that is known and means nothing here")]
    is_legacy_optimizer: Option<bool>,
}

impl Default for Config {
    fn default() -> Self {
        let ParamsAdamax { beta1, beta2, eps, .. } = ParamsAdamax::default();
        Self {
            name: "adamax".to_owned(),
            learning_rate: json!(1e-3),
            weight_decay: None,
            clipnorm: None,
            global_clipnorm: None,
            clipvalue: None,
            use_ema: false,
            ema_momentum: Ema::default().momentum,
            ema_overwrite_frequency: None,
            loss_scale_factor: None,
            gradient_accumulation_steps: None,
            beta_1: beta1,
            beta_2: beta2,
            epsilon: eps,
            decay: None,
            jit_compile: None,
            is_legacy_optimizer: None,
        }
    }
}

impl ParamsAdamax {
    /// The settings of a Keras optimizer, from the JSON that `json.dumps(keras.optimizers.serialize(optimizer))` gives:
    /// `{"class_name": "Adamax", "config": {..}}`, with a learning-rate schedule nested in it. What Keras has no word
    /// for has its default.
    ///
    /// Keys may be those of Keras 3, of TensorFlow's optimizers since 2.11 and of its legacy ones, whose `decay` becomes
    /// an [`InverseTimeDecay`]. `jit_compile` and `is_legacy_optimizer` mean nothing here. A key that is left out has
    /// Keras's default.
    ///
    /// ```
    /// use candle_adamax::{Clip, CosineDecay, ParamsAdamax};
    ///
    /// let params = ParamsAdamax::from_keras_json(
    ///     r#"{"class_name": "Adamax", "config": {
    ///         "learning_rate": {"class_name": "CosineDecay", "config": {"initial_learning_rate": 0.01, "decay_steps": 1000}},
    ///         "clipnorm": 1.0,
    ///         "beta_2": 0.99
    ///     }}"#,
    /// )?;
    /// assert_eq!((params.beta1, params.beta2, params.clip), (0.9, 0.99, Some(Clip::Norm(1.0))));
    /// assert_eq!(params.lr.at(500)?, 0.005);
    /// # Ok::<(), candle_adamax::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A text that is not such JSON; another class; a key, or a class of schedules, that is not known; a value that is
    /// not allowed, as from [`validate`](Self::validate).
    pub fn from_keras_json(json: &str) -> Result<Self> {
        // Editors put a mark before the text, which serde_json refuses.
        let json = json.strip_prefix('\u{feff}').unwrap_or(json);
        // The class first: the keys of another one are not to blame.
        if let Ok(Class { class_name }) = serde_json::from_str(json)
            && class_name.as_deref() != Some("Adamax")
        {
            let expected = "Adamax, as `keras.optimizers.serialize(optimizer)` has it";
            return Err(Error::invalid("class_name", expected, class_name.unwrap_or("none".to_owned())));
        }
        let Object { config, .. } =
            serde_json::from_str(json).map_err(|error| Error::invalid(TEXT, "that of an Adamax", error))?;
        let steps = match config.gradient_accumulation_steps {
            None => 1,
            Some(steps @ 2..) => steps,
            Some(steps) => return Err(Error::invalid("gradient_accumulation_steps", "at least 2, or null", steps)),
        };
        let clip = clip(&config)?;
        let params = Self {
            lr: learning_rate(config.learning_rate, config.decay)?,
            name: config.name,
            beta1: config.beta_1,
            beta2: config.beta_2,
            eps: config.epsilon,
            weight_decay: config.weight_decay.map_or(WeightDecay::None, WeightDecay::Decoupled),
            clip,
            loss_scale: config.loss_scale_factor.map_or(LossScale::None, LossScale::Static),
            ema: config.use_ema.then_some(Ema {
                momentum: config.ema_momentum,
                // Keras takes 0 for never, too.
                overwrite_frequency: config.ema_overwrite_frequency.filter(|&frequency| frequency > 0),
            }),
            gradient_accumulation_steps: steps,
            ..Self::default()
        };
        params.validate()?;
        Ok(params)
    }

    /// The settings as the JSON from which `keras.optimizers.deserialize(json.loads(text))` makes the same optimizer.
    ///
    /// How state is kept ([`state_dtype`](Self::state_dtype), [`rowwise_norm`](Self::rowwise_norm),
    /// [`rounding`](Self::rounding), [`sparse_update`](Self::sparse_update), [`seed`](Self::seed)) and what is reported
    /// is this crate's own and left out. A learning rate in a tensor is written as the number that it holds.
    ///
    /// ```
    /// use candle_adamax::{ParamsAdamax, WeightDecay};
    ///
    /// let params = ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.01), ..Default::default() };
    /// let json = params.to_keras_json()?;
    /// assert!(json.contains(r#""class_name":"Adamax""#) && json.contains(r#""weight_decay":0.01"#));
    /// assert_eq!(ParamsAdamax::from_keras_json(&json)?.weight_decay, params.weight_decay);
    ///
    /// let error = ParamsAdamax::pytorch().to_keras_json().unwrap_err();
    /// assert_eq!(error.to_string(), "Adamax: invalid `eps_mode`: expected AddToNorm, all that Keras can do, got InsideMax");
    /// # Ok::<(), candle_adamax::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A setting that Keras does not have, or one that is not allowed.
    pub fn to_keras_json(&self) -> Result<String> {
        self.validate()?;
        self.keras_json().map_err(|error| error.of_optimizer(&self.name))
    }

    fn keras_json(&self) -> Result<String> {
        let decay = match self.weight_decay {
            WeightDecay::None => None,
            WeightDecay::Decoupled(decay) => Some(decay),
            WeightDecay::L2(_) => {
                return Err(only("weight_decay", "None or Decoupled", format_args!("{:?}", self.weight_decay)));
            }
        };
        if self.eps_mode != EpsMode::AddToNorm {
            return Err(only("eps_mode", "AddToNorm", format_args!("{:?}", self.eps_mode)));
        }
        if self.step_count != StepCount::Shared {
            return Err(only("step_count", "Shared", format_args!("{:?}", self.step_count)));
        }
        if self.maximize {
            return Err(only("maximize", "false", "true"));
        }
        if self.skip_nonfinite {
            return Err(only("skip_nonfinite", "false", "true"));
        }
        let loss_scale_factor = match self.loss_scale {
            LossScale::None => None,
            LossScale::Static(scale) => Some(scale),
            LossScale::Dynamic(_) => {
                return Err(only("loss_scale", "None or Static", format_args!("{:?}", self.loss_scale)));
            }
        };
        if let Some(plateau) = self.plateau {
            return Err(only("plateau", "none", format_args!("{plateau:?}")));
        }
        let (clipvalue, clipnorm, global_clipnorm) = match self.clip {
            None => (None, None, None),
            Some(Clip::Value(limit)) => (Some(limit), None, None),
            Some(Clip::Norm(limit)) => (None, Some(limit), None),
            Some(Clip::GlobalNorm(limit)) => (None, None, Some(limit)),
            Some(clip @ Clip::GradNorm { .. }) => {
                return Err(only("clip", "none, Value, Norm or GlobalNorm", format_args!("{clip:?}")));
            }
        };
        if decay.is_some() && !self.no_decay.is_empty() {
            let expected = "none in a configuration; call the Keras optimizer's `exclude_from_weight_decay`";
            return Err(Error::invalid("no_decay", expected, format_args!("{:?}", self.no_decay)));
        }
        let ema = self.ema.unwrap_or_default();
        let config = Config {
            name: self.name.clone(),
            learning_rate: keras_rate(&self.lr)?,
            weight_decay: decay,
            clipnorm,
            global_clipnorm,
            clipvalue,
            use_ema: self.ema.is_some(),
            ema_momentum: ema.momentum,
            ema_overwrite_frequency: ema.overwrite_frequency,
            loss_scale_factor,
            gradient_accumulation_steps: Some(self.gradient_accumulation_steps).filter(|&steps| steps > 1),
            beta_1: self.beta1,
            beta_2: self.beta2,
            epsilon: self.eps,
            ..Config::default()
        };
        let object = json!({
            "module": "keras.optimizers",
            "class_name": "Adamax",
            "config": config,
            "registered_name": null,
        });
        Ok(object.to_string())
    }
}

/// A setting that Keras has in one form only.
fn only(field: &str, form: &str, got: impl std::fmt::Display) -> Error {
    Error::invalid(field, format!("{form}, all that Keras can do"), got)
}

/// The clip of a config, which has at most one.
fn clip(config: &Config) -> Result<Option<Clip>> {
    let value = config.clipvalue.map(|limit| ("clipvalue", limit, Clip::Value(limit)));
    let norm = config.clipnorm.map(|limit| ("clipnorm", limit, Clip::Norm(limit)));
    let global = config.global_clipnorm.map(|limit| ("global_clipnorm", limit, Clip::GlobalNorm(limit)));
    let mut set = [value, norm, global].into_iter().flatten();
    match (set.next(), set.next()) {
        (Some((first, ..)), Some((key, limit, _))) => Err(Error::invalid(key, format!("null beside `{first}`"), limit)),
        (one, _) => Ok(one.map(|(_, _, clip)| clip)),
    }
}

/// The learning rate of a config: a number or a serialized schedule, with the `decay` of the legacy optimizers.
fn learning_rate(rate: Value, decay: Option<f64>) -> Result<LearningRate> {
    let decay = decay.filter(|&decay| decay != 0.0);
    let schedule = match rate {
        Value::Number(number) => {
            let rate = number.as_f64().unwrap_or(f64::NAN);
            return Ok(match decay {
                None => rate.into(),
                Some(decay) => InverseTimeDecay::new(rate, 1, decay).into(),
            });
        }
        Value::Object(schedule) => schedule,
        other => return Err(Error::invalid("learning_rate", "a number or a schedule", other)),
    };
    if let Some(decay) = decay {
        return Err(Error::invalid("decay", "none beside a schedule", decay));
    }
    if let Some(key) = schedule.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(Error::invalid("learning_rate", format!("the keys {}", KEYS.join(", ")), format!("`{key}`")));
    }
    let schedule: Schedule = serde_json::from_value(Value::Object(schedule))
        .map_err(|error| Error::invalid("learning_rate", "a schedule of Keras", error))?;
    match keras_name(&schedule) {
        Some(_) => Ok(schedule.into()),
        None => Err(Error::invalid("learning_rate", "a schedule of Keras", schedule)),
    }
}

/// The learning rate for a config.
fn keras_rate(rate: &LearningRate) -> Result<Value> {
    let schedule = match rate {
        LearningRate::Constant(_) | LearningRate::Tensor(_) => return Ok(json!(rate.at(0)?)),
        LearningRate::Schedule(schedule) => schedule,
        LearningRate::Custom(_) => return Err(only("lr", "a number or a schedule that it has", rate)),
    };
    let Some(name) = keras_name(schedule) else {
        return Err(only("lr", "a number or a schedule that it has", schedule));
    };
    let failed = |error| Error::invalid("lr", "a schedule that JSON can hold", error);
    let mut object = match serde_json::to_value(schedule).map_err(failed)? {
        Value::Object(object) => object,
        _ => Map::new(),
    };
    if let Some(Value::Object(config)) = object.get_mut("config") {
        config.insert("name".to_owned(), json!(name));
    }
    object.insert("module".to_owned(), json!("keras.optimizers.schedules"));
    object.insert("registered_name".to_owned(), Value::Null);
    Ok(Value::Object(object))
}

/// What Keras calls a schedule in its config, where it has such a class.
fn keras_name(schedule: &Schedule) -> Option<&'static str> {
    match schedule {
        Schedule::ExponentialDecay(_) => Some("ExponentialDecay"),
        Schedule::PiecewiseConstantDecay(_) => Some("PiecewiseConstant"),
        Schedule::PolynomialDecay(_) => Some("PolynomialDecay"),
        Schedule::InverseTimeDecay(_) => Some("InverseTimeDecay"),
        Schedule::CosineDecay(_) => Some("CosineDecay"),
        Schedule::CosineDecayRestarts(_) => Some("SGDRDecay"),
        _ => None,
    }
}
