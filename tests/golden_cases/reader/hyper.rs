//! Hyperparameters of a case: as the user set them, and as the framework rounded them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{Clip, Ema};
use serde_json::{Map, Value};

use super::number;

/// A share by which a framework may round a hyperparameter, for a run in f32 to be comparable without it.
pub(crate) const UNNOTICED: f64 = 5e-7;

/// Hyperparameters under their common names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hyper {
    pub(crate) lr: Option<f64>,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: Option<f64>,
    pub(crate) maximize: bool,
    /// Several are an error.
    pub(crate) clips: Vec<Clip>,
    pub(crate) ema: Option<Ema>,
    pub(crate) loss_scale: Option<f64>,
    pub(crate) accumulation: u64,
    pub(crate) decay: f64,
}

impl Hyper {
    /// Those of `map`, and else those of `base`. Every key has to be known.
    pub(crate) fn read(base: &Self, map: &Map<String, Value>) -> Result<Self> {
        let mut hyper = base.clone();
        let (mut use_ema, mut ema) = (base.ema.is_some(), base.ema.unwrap_or_default());
        for (key, value) in map {
            let flag = || value.as_bool().or(value.is_null().then_some(false)).context("expected true or false");
            let option = || number(value);
            let required = || number(value)?.with_context(|| format!("no number as `{key}`"));
            match key.as_str() {
                "lr" => hyper.lr = option()?,
                "beta_1" => hyper.beta1 = required()?,
                "beta_2" => hyper.beta2 = required()?,
                "epsilon" => hyper.eps = required()?,
                "weight_decay" => hyper.weight_decay = option()?,
                "maximize" => hyper.maximize = flag()?,
                "clipvalue" => hyper.clips.extend(option()?.map(Clip::Value)),
                "clipnorm" => hyper.clips.extend(option()?.map(Clip::Norm)),
                "global_clipnorm" => hyper.clips.extend(option()?.map(Clip::GlobalNorm)),
                "use_ema" => use_ema = flag()?,
                "ema_momentum" => ema.momentum = option()?.unwrap_or(ema.momentum),
                "ema_overwrite_frequency" => ema.overwrite_frequency = option()?.map(|f| f as u64),
                "loss_scale_factor" => hyper.loss_scale = option()?,
                "gradient_accumulation_steps" => hyper.accumulation = option()?.map_or(1, |n| n as u64),
                "decay" => hyper.decay = option()?.unwrap_or(0.0),
                // Which of PyTorch's implementations ran.
                "foreach" => _ = flag()?,
                other => bail!("unknown hyperparameter `{other}`"),
            }
        }
        hyper.ema = use_ema.then_some(ema);
        Ok(hyper)
    }
}

/// What the framework made of the hyperparameters by rounding them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effective {
    pub(crate) beta1: f64,
    /// What is raised to the power of t.
    pub(crate) power_base: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: Option<f64>,
}

impl Effective {
    pub(crate) fn read(hyper: &Hyper, map: &Map<String, Value>) -> Result<Self> {
        let mut found = BTreeMap::new();
        for (key, value) in map {
            let known = ["beta_1", "beta_2", "epsilon", "one_minus_beta_1", "beta_1_power_base", "weight_decay"];
            ensure!(known.contains(&key.as_str()), "unknown effective hyperparameter `{key}`");
            found.extend(number(value)?.map(|x| (key.as_str(), x)));
        }
        let get = |key: &str| found.get(key).copied();
        // Moments are formed with 1 - beta1, so that this is what beta1 has to be made from.
        let beta1 = get("one_minus_beta_1").map_or(get("beta_1").unwrap_or(hyper.beta1), |x| 1.0 - x);
        Ok(Self {
            beta1,
            power_base: get("beta_1_power_base").or(get("beta_1")).unwrap_or(beta1),
            beta2: get("beta_2").unwrap_or(hyper.beta2),
            eps: get("epsilon").unwrap_or(hyper.eps),
            weight_decay: hyper.weight_decay.map(|decay| get("weight_decay").unwrap_or(decay)),
        })
    }

    /// Whether the difference from what the user set is more than the rounding of one number in f32.
    pub(crate) fn shows(&self, hyper: &Hyper) -> bool {
        let differ = |a: f64, b: f64| (a - b).abs() > UNNOTICED * a.abs().max(b.abs());
        differ(1.0 - self.beta1, 1.0 - hyper.beta1)
            || differ(1.0 - self.power_base, 1.0 - hyper.beta1)
            || differ(self.beta2, hyper.beta2)
            || differ(self.eps, hyper.eps)
            || differ(self.weight_decay.unwrap_or(0.0), hyper.weight_decay.unwrap_or(0.0))
    }

    /// What the step size has to be multiplied with, because the optimizer corrects by `1 - beta1^t`.
    pub(crate) fn correction(&self, t: u64) -> f64 {
        if self.power_base == self.beta1 {
            return 1.0;
        }
        (1.0 - self.beta1.powf(t as f64)) / (1.0 - self.power_base.powf(t as f64))
    }
}
