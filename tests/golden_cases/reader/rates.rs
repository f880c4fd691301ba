//! The learning rate of a case: a number, a schedule of Keras or optax, one number for each call.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{
    CosineDecay, ExponentialDecay, InverseTimeDecay, LearningRate, LearningRateSchedule, PolynomialDecay, Schedule,
};
use serde_json::{Map, Value};

use super::{Case, number};

/// Where a case's learning rates come from.
#[derive(Clone, Debug)]
pub(crate) enum Rate {
    /// What an optimizer can be given.
    Source(LearningRate),
    /// One number for each call, from the first again after the last.
    List(Vec<f64>),
}

impl Rate {
    /// Reads the case's `learning_rate`, on which the old `decay` of `tf_keras` comes on top.
    pub(crate) fn read(case: &Case, decay: f64) -> Result<Self> {
        let schedule = match case.get("learning_rate")? {
            Value::Array(list) => {
                ensure!(decay == 0.0, "`decay` with one learning rate for each call is not understood");
                let numbers = list.iter().map(|lr| number(lr)?.context("null as a learning rate"));
                return Ok(Self::List(numbers.collect::<Result<_>>()?));
            }
            Value::Object(form) => schedule(form)?,
            other => {
                let lr = number(other)?.context("null as the learning rate")?;
                let decayed = InverseTimeDecay::new(lr, 1, decay);
                return Ok(Self::Source(if decay == 0.0 { lr.into() } else { decayed.into() }));
            }
        };
        Ok(Self::Source(match decay {
            0.0 => schedule.into(),
            _ => LearningRate::Custom(Arc::new(Decayed { schedule, decay })),
        }))
    }

    /// The learning rate of call `k`.
    pub(crate) fn at(&self, k: usize) -> Result<f64> {
        match self {
            Self::Source(lr) => Ok(lr.at(k as u64)?),
            Self::List(list) => list.get(k % list.len().max(1)).copied().context("an empty list of learning rates"),
        }
    }
}

/// A schedule, divided by `1 + decay * calls`.
#[derive(Debug)]
struct Decayed {
    schedule: Schedule,
    decay: f64,
}

impl LearningRateSchedule for Decayed {
    fn learning_rate(&self, step: u64) -> f64 {
        self.schedule.learning_rate(step) / (1.0 + self.decay * step as f64)
    }
}

fn schedule(form: &Map<String, Value>) -> Result<Schedule> {
    let unknown = form.keys().find(|key| !["class_name", "config"].contains(&key.as_str()));
    ensure!(unknown.is_none(), "unknown entry {unknown:?} of the learning rate");
    let class_name = form.get("class_name").and_then(Value::as_str).context("a schedule without `class_name`")?;
    let config = form.get("config").and_then(Value::as_object).context("a schedule without `config`")?;
    if class_name.starts_with(char::is_uppercase) {
        let form = Value::Object(form.clone());
        return serde_json::from_value(form).with_context(|| format!("the schedule {class_name} {config:?}"));
    }
    Config { config, read: Vec::new() }.optax(class_name).with_context(|| format!("the schedule {class_name}"))
}

/// The settings of an optax schedule, and which of them have been read.
struct Config<'c> {
    config: &'c Map<String, Value>,
    read: Vec<&'static str>,
}

impl Config<'_> {
    fn get(&mut self, key: &'static str, default: Option<f64>) -> Result<f64> {
        self.read.push(key);
        match self.config.get(key) {
            None | Some(Value::Null) => default.with_context(|| format!("no `{key}`")),
            Some(Value::Bool(x)) => Ok(f64::from(u8::from(*x))),
            Some(value) => Ok(number(value)?.unwrap_or_default()),
        }
    }

    /// A setting that the crate's schedules have with this value only.
    fn only(&mut self, key: &'static str, value: f64) -> Result<()> {
        let got = self.get(key, Some(value))?;
        ensure!(got == value, "`{key}` of {got} is not understood");
        Ok(())
    }

    fn optax(mut self, name: &str) -> Result<Schedule> {
        let schedule: Schedule = match name {
            "exponential_decay" => {
                self.only("transition_begin", 0.0)?;
                ensure!(self.get("end_value", Some(f64::NAN))?.is_nan(), "`end_value` is not understood");
                let staircase = self.get("staircase", Some(0.0))? != 0.0;
                let (lr, steps) = (self.get("init_value", None)?, self.get("transition_steps", None)? as u64);
                ExponentialDecay { staircase, ..ExponentialDecay::new(lr, steps, self.get("decay_rate", None)?) }.into()
            }
            "cosine_decay_schedule" => {
                self.only("exponent", 1.0)?;
                let alpha = self.get("alpha", Some(0.0))?;
                let (lr, steps) = (self.get("init_value", None)?, self.get("decay_steps", None)? as u64);
                CosineDecay { alpha, ..CosineDecay::new(lr, steps) }.into()
            }
            "warmup_cosine_decay_schedule" => {
                self.only("exponent", 1.0)?;
                let (peak, warmup) = (self.get("peak_value", None)?, self.get("warmup_steps", None)? as u64);
                let steps = self.get("decay_steps", None)? as u64;
                CosineDecay {
                    initial_learning_rate: self.get("init_value", None)?,
                    // optax counts the warm-up among them.
                    decay_steps: steps.saturating_sub(warmup),
                    alpha: self.get("end_value", Some(0.0))? / peak,
                    warmup_target: Some(peak),
                    warmup_steps: warmup,
                }
                .into()
            }
            "polynomial_schedule" | "linear_schedule" => {
                self.only("transition_begin", 0.0)?;
                PolynomialDecay {
                    initial_learning_rate: self.get("init_value", None)?,
                    decay_steps: self.get("transition_steps", None)? as u64,
                    end_learning_rate: self.get("end_value", None)?,
                    power: if name == "linear_schedule" { 1.0 } else { self.get("power", None)? },
                    cycle: false,
                }
                .into()
            }
            "constant_schedule" => ExponentialDecay::new(self.get("value", None)?, 1, 1.0).into(),
            other => bail!("unknown schedule `{other}`"),
        };
        let unknown = self.config.keys().find(|key| !self.read.contains(&key.as_str()));
        ensure!(unknown.is_none(), "unknown setting {unknown:?}");
        Ok(schedule)
    }
}
