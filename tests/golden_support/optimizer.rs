//! Recorded runs of an optimizer: the same calls, compared after each one.
//!
//! f32 and f64 parameters follow the recorded trajectory from its beginning. And each call, for every dtype, is made
//! once more from the recorded state of the call before, which leaves the rounding of one call and tests `restore`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{
    AccumulatedGrad, Adamax, Counters, Ema, Epsilon, ErrorKind, Kernel, ParamGroup, ParamsAdamax, StepCount,
    VarSnapshot, WeightDecay,
};
use candle_core::{DType, Tensor, Var};
use serde_json::{Map, Value};

use super::compare::{RunningMaximum, check, epsilon, ulp};
use super::rates::Rate;
use super::{Case, Outcome, clip, number};
use crate::common::formulas::{self, Call};
use crate::common::{tensor, values};

/// A share by which a framework may round a hyperparameter, for a run in f32 to be comparable without it.
const UNNOTICED: f64 = 5e-7;

pub(crate) fn run(case: &Case, kernel: Kernel) -> Result<Outcome> {
    let recording = Recording::read(case, kernel)?;
    if recording.vars.iter().any(|var| var.sparse) {
        return Ok(Outcome::NotCompared("not yet run: sparse gradients".into()));
    }
    if recording.hyper.clips() > 1 {
        recording.expect_refusal()?;
        return Ok(Outcome::Own("an error: two clips at once".into()));
    }
    if let Some(reason) = recording.departure()? {
        recording.follow_formulas().context("by the formulas in f64")?;
        return Ok(Outcome::Own(reason));
    }
    recording.follow_trajectory(true).context("trajectory")?;
    if recording.visible {
        recording.follow_trajectory(false).context("trajectory with the settings as the user wrote them")?;
    }
    recording.follow_each_call().context("one call from the recorded state")?;
    Ok(Outcome::Compared)
}

/// Hyperparameters under their common names.
#[derive(Clone, Debug, Default)]
struct Hyper {
    lr: Option<f64>,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: Option<f64>,
    maximize: bool,
    clip_value: Option<f64>,
    clip_norm: Option<f64>,
    clip_global_norm: Option<f64>,
    ema: Option<Ema>,
    loss_scale: Option<f64>,
    accumulation: u64,
    decay: f64,
}

impl Hyper {
    /// Those of `map`, and else those of `base`. Every key has to be known.
    fn read(base: &Self, map: &Map<String, Value>) -> Result<Self> {
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
                "clipvalue" => hyper.clip_value = option()?,
                "clipnorm" => hyper.clip_norm = option()?,
                "global_clipnorm" => hyper.clip_global_norm = option()?,
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

    fn clips(&self) -> usize {
        [self.clip_value, self.clip_norm, self.clip_global_norm].iter().flatten().count()
    }
}

/// What the framework made of the hyperparameters by rounding them.
#[derive(Clone, Copy, Debug)]
struct Effective {
    beta1: f64,
    /// What is raised to the power of t.
    power_base: f64,
    beta2: f64,
    eps: f64,
    weight_decay: Option<f64>,
}

impl Effective {
    fn read(hyper: &Hyper, map: &Map<String, Value>) -> Result<Self> {
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
    fn shows(&self, hyper: &Hyper) -> bool {
        let differ = |a: f64, b: f64| (a - b).abs() > UNNOTICED * a.abs().max(b.abs());
        differ(1.0 - self.beta1, 1.0 - hyper.beta1)
            || differ(1.0 - self.power_base, 1.0 - hyper.beta1)
            || differ(self.beta2, hyper.beta2)
            || differ(self.eps, hyper.eps)
            || differ(self.weight_decay.unwrap_or(0.0), hyper.weight_decay.unwrap_or(0.0))
    }

    /// What the step size has to be multiplied with, because the optimizer corrects by `1 - beta1^t`.
    fn correction(&self, t: u64) -> f64 {
        if self.power_base == self.beta1 {
            return 1.0;
        }
        (1.0 - self.beta1.powf(t as f64)) / (1.0 - self.power_base.powf(t as f64))
    }
}

struct RecordedVar {
    name: String,
    sparse: bool,
    overrides: Map<String, Value>,
}

/// One recorded run, understood.
struct Recording<'c> {
    case: &'c Case,
    family: &'c str,
    kernel: Kernel,
    dtype: DType,
    steps: usize,
    vars: Vec<RecordedVar>,
    hyper: Hyper,
    /// The numbers after the framework's rounding, unless that is the rounding of the optimizer's own arithmetic.
    effective: Option<Effective>,
    /// Whether the settings as the user wrote them give the recorded numbers, too, with a tolerance for the rounding.
    visible: bool,
    rate: Rate,
}

impl<'c> Recording<'c> {
    fn read(case: &'c Case, kernel: Kernel) -> Result<Self> {
        let base = Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-7, accumulation: 1, ..Hyper::default() };
        let hyper = Hyper::read(&base, &case.object("hyperparameters")?)?;
        let family = case.family()?;
        let dtype = case.dtype()?;
        let tensorflow = matches!(family, "tf_legacy" | "tf_raw");
        ensure!(!tensorflow || hyper.weight_decay.is_none(), "TensorFlow's Adamax has no weight decay");
        let effective = Effective::read(&hyper, &case.object("effective")?)?;
        let f32_state = case.json.get("state_dtype").and_then(Value::as_str) == Some("float32");
        let rounds_as_we_do = f32_state && matches!(dtype, DType::F16 | DType::BF16);
        let vars = case.get("vars")?.as_array().context("expected a list of `vars`")?;
        let recording = Self {
            case,
            family,
            kernel,
            dtype,
            steps: case.steps()?,
            vars: vars.iter().map(RecordedVar::read).collect::<Result<_>>()?,
            rate: Rate::read(case, hyper.decay)?,
            visible: dtype == DType::F32 && !effective.shows(&hyper),
            hyper,
            effective: (!rounds_as_we_do).then_some(effective),
        };
        recording.check_tensors()?;
        recording.check_rates()?;
        Ok(recording)
    }

    /// Every tensor has to be one that is compared or used.
    fn check_tensors(&self) -> Result<()> {
        let known = ["init", "grad", "has_grad", "param", "m", "u", "ema", "acc", "param_final", "t"];
        for name in self.case.tensors.keys() {
            let of_var = self.vars.iter().find_map(|var| name.strip_prefix(&var.name)?.strip_prefix('.'));
            let is_known = match of_var {
                Some(what) => known.contains(&what) || what.starts_with("idx.") || what.starts_with("val."),
                None => name == "lr" || name == "beta1_power",
            };
            ensure!(is_known, "unknown tensor `{name}`");
        }
        Ok(())
    }

    /// The framework's learning rates have to be those that the metadata asks for, up to its own rounding.
    fn check_rates(&self) -> Result<()> {
        let rounding = if matches!(self.dtype, DType::F16 | DType::BF16) { epsilon(self.dtype) } else { 1e-5 };
        let recorded = &self.case.tensor("lr")?.values;
        let peak = recorded.iter().fold(0.0, |peak: f64, lr| peak.max(lr.abs()));
        for (k, &expected) in recorded.iter().enumerate() {
            let got = self.rate.at(k)?;
            ensure!((got - expected).abs() <= rounding * peak, "lr of call {k}: expected {expected:e}, got {got:e}");
        }
        Ok(())
    }

    fn has_grad(&self, var: &RecordedVar, k: usize) -> Result<bool> {
        match self.case.tensors.get(&format!("{}.has_grad", var.name)) {
            Some(has) => Ok(has.values.get(k).context("`has_grad` is too short")? != &0.0),
            None => Ok(true),
        }
    }

    fn grad(&self, var: &RecordedVar, k: usize) -> Result<Option<Tensor>> {
        let grad = || self.case.tensor(&format!("{}.grad", var.name))?.tensor_at(k);
        self.has_grad(var, k)?.then(grad).transpose()
    }

    fn grads(&self, k: usize) -> Result<BTreeMap<String, Tensor>> {
        let grads = self.vars.iter().filter_map(|var| match self.grad(var, k) {
            Ok(grad) => grad.map(|grad| Ok((var.name.clone(), grad))),
            Err(error) => Some(Err(error)),
        });
        grads.collect()
    }

    /// Why the crate means to differ from this recording, if it does.
    fn departure(&self) -> Result<Option<String>> {
        let note = self.case.notes().find(|note| note.contains("not a model to follow"));
        if let Some(note) = note {
            return Ok(Some(note.to_owned()));
        }
        if self.case.json.get("expect_mismatch") == Some(&Value::Bool(true)) {
            return Ok(Some("recorded as a mismatch".into()));
        }
        let params = self.params(0, false)?;
        let norms = params.clip_norm.is_some() || params.clip_global_norm.is_some();
        let n = self.hyper.accumulation as usize;
        let mut sums: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for k in 0..self.steps {
            let last = (k + 1) % n == 0;
            for var in &self.vars {
                let Some(grad) = self.grad(var, k)? else {
                    if last && n > 1 && sums.contains_key(var.name.as_str()) {
                        let reason = "Keras forgets what it has accumulated where the last gradient is missing";
                        return Ok(Some(reason.into()));
                    }
                    continue;
                };
                let grad = values(&grad);
                let not_finite = grad.iter().any(|g| g.is_nan() || (norms && !g.is_finite()));
                if not_finite && self.family.starts_with("tf_") {
                    return Ok(Some("TensorFlow's kernel lets u pass over a NaN".into()));
                }
                let sum = sums.entry(&var.name).or_insert_with(|| vec![0.0; grad.len()]);
                sum.iter_mut().zip(&grad).for_each(|(sum, g)| *sum += g / self.hyper.loss_scale.unwrap_or(1.0));
            }
            if last {
                sums.values_mut().flatten().for_each(|sum| *sum /= n as f64);
                if clip::overflows(&params, &sums, self.dtype) {
                    return Ok(Some(format!("the norm of call {k} overflows in the framework's {:?}", self.dtype)));
                }
                sums.clear();
            }
        }
        Ok(None)
    }

    /// The settings of call `k`. Where the framework's rounding counts, the recorded learning rate and its `effective`
    /// numbers: another base of the bias correction goes into the learning rate, and out of the decay again.
    fn params(&self, k: usize, rounded: bool) -> Result<ParamsAdamax> {
        let Hyper { maximize, clip_value, clip_norm, clip_global_norm, ema, loss_scale, accumulation, .. } = self.hyper;
        let family = match self.family {
            "torch" => ParamsAdamax::pytorch(),
            "optax" => {
                let step_count = StepCount::Shared;
                ParamsAdamax { epsilon: Epsilon::Inside, step_count, ..ParamsAdamax::default() }
            }
            _ => ParamsAdamax::default(),
        };
        let lr = match &self.rate {
            Rate::Source(lr) => lr.clone(),
            Rate::List(_) => self.rate.at(k)?.into(),
        };
        let params = ParamsAdamax {
            lr,
            beta1: self.hyper.beta1,
            beta2: self.hyper.beta2,
            eps: self.hyper.eps,
            weight_decay: self.decay(self.hyper.weight_decay),
            maximize,
            clip_value,
            clip_norm,
            clip_global_norm,
            loss_scale_factor: loss_scale,
            ema,
            gradient_accumulation_steps: accumulation,
            allow_no_gradients: true,
            ..family
        };
        let Some(effective) = self.effective.filter(|_| rounded) else { return Ok(params) };
        let correction = effective.correction(k as u64 / accumulation + 1);
        ensure!(correction == 1.0 || params.step_count == StepCount::Shared, "a base of the power with own counters");
        Ok(ParamsAdamax {
            lr: (self.case.tensor("lr")?.values[k] * correction).into(),
            beta1: effective.beta1,
            // bf16(0.999) is 1, which is allowed nobody but shows in bf16 only.
            beta2: effective.beta2.min(1f64.next_down()),
            eps: effective.eps,
            weight_decay: self.decay(effective.weight_decay.map(|decay| decay / correction)),
            ..params
        })
    }

    fn decay(&self, decay: Option<f64>) -> WeightDecay {
        match decay {
            None | Some(0.0) => WeightDecay::None,
            Some(decay) if self.family == "torch" => WeightDecay::L2(decay),
            Some(decay) => WeightDecay::Decoupled(decay),
        }
    }

    /// The optimizer and its variables, before the first call.
    fn start(&self, rounded: bool) -> Result<(Adamax, BTreeMap<String, Var>)> {
        let mut params = self.params(0, rounded)?;
        let mut vars = BTreeMap::new();
        let mut groups: BTreeMap<String, ParamGroup> = BTreeMap::new();
        let spared: Vec<&str> = self.vars.iter().filter(|var| var.is_spared()).map(|var| var.name.as_str()).collect();
        // A part of a name spares all names that contain it; where that is too much, and on the portable path, a group.
        let by_name = self.kernel == Kernel::Auto
            && self.vars.iter().all(|var| var.is_spared() || !spared.iter().any(|part| var.name.contains(part)));
        for recorded in &self.vars {
            let init = self.case.tensor(&format!("{}.init", recorded.name))?;
            ensure!(init.dtype()? == self.dtype, "{}.init is not of the case's dtype", recorded.name);
            let var = Var::from_tensor(&init.tensor()?)?;
            vars.insert(recorded.name.clone(), var.clone());
            if by_name && recorded.is_spared() {
                params.no_decay.push(recorded.name.clone());
            }
            let overrides = if by_name && recorded.is_spared() { Map::new() } else { recorded.overrides.clone() };
            let name = match overrides.is_empty() {
                true => "default".to_owned(),
                false => Value::Object(overrides.clone()).to_string(),
            };
            let group = match groups.remove(&name) {
                Some(group) => group,
                None => self.group(&name, &overrides)?,
            };
            groups.insert(name, group.var(recorded.name.as_str(), &var));
        }
        let mut optimizer = Adamax::from_groups(groups.into_values(), params)?;
        optimizer.set_kernel(self.kernel)?;
        Ok((optimizer, vars))
    }

    fn group(&self, name: &str, overrides: &Map<String, Value>) -> Result<ParamGroup> {
        let hyper = Hyper::read(&self.hyper, overrides)?;
        let mut group = ParamGroup::new(name);
        for key in overrides.keys() {
            group = match key.as_str() {
                "lr" => group.lr(hyper.lr.context("null as the lr of a variable")?),
                "beta_1" => group.beta1(hyper.beta1),
                "beta_2" => group.beta2(hyper.beta2),
                "epsilon" => group.eps(hyper.eps),
                "weight_decay" => group.weight_decay(self.decay(hyper.weight_decay)),
                other => bail!("`{other}` cannot differ between variables"),
            };
        }
        Ok(group)
    }

    /// Sets what call `k` needs set.
    fn prepare(&self, optimizer: &mut Adamax, k: usize, rounded: bool) -> Result<()> {
        if self.effective.is_some() && rounded {
            let no_decay = optimizer.params().no_decay.clone();
            optimizer.set_params(ParamsAdamax { no_decay, ..self.params(k, true)? })?;
        } else if let Rate::List(_) = self.rate {
            candle_nn::Optimizer::set_learning_rate(optimizer, self.rate.at(k)?);
        }
        Ok(())
    }

    fn call(&self, optimizer: &mut Adamax, vars: &BTreeMap<String, Var>, k: usize) -> Result<()> {
        let grads = self.grads(k)?;
        optimizer.apply_gradients(grads.iter().map(|(name, grad)| (&vars[name], grad)))?;
        Ok(())
    }

    /// The quantities that were recorded for a variable, with the optimizer's own.
    fn quantities(&self, optimizer: &Adamax, vars: &BTreeMap<String, Var>, name: &str) -> Result<Vec<Quantity<'c>>> {
        let state = optimizer.state(name)?;
        let zeros = || vec![0.0; vars[name].elem_count()];
        let all = [
            ("param", values(&vars[name])),
            ("m", values(&state.exp_avg)),
            ("u", values(&state.exp_inf)),
            ("ema", state.ema.as_ref().map_or_else(zeros, values)),
            ("acc", state.accumulated.as_ref().and_then(AccumulatedGrad::dense).map_or_else(zeros, values)),
        ];
        let recorded =
            |(what, got)| Some(Quantity { what, got, recorded: self.case.tensors.get(&format!("{name}.{what}"))? });
        Ok(all.into_iter().filter_map(recorded).collect())
    }

    fn rtol(&self, what: &str) -> Result<Option<f64>> {
        self.case.tolerance("rtol", what)
    }

    /// From the first call to the last, never looking at recorded state. Where parameters are halves, only what has a
    /// tolerance is compared.
    /// `rounded` takes the framework's rounded hyperparameters. Without, a share of each step is allowed on top.
    fn follow_trajectory(&self, rounded: bool) -> Result<()> {
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        let atol = self.case.tolerance("atol", "")?.context("no `atol`")?;
        let (mut optimizer, vars) = self.start(rounded)?;
        let mut maxima: BTreeMap<(String, &str), RunningMaximum> = BTreeMap::new();
        let mut way = 0.0;
        for k in 0..self.steps {
            self.prepare(&mut optimizer, k, rounded)?;
            self.call(&mut optimizer, &vars, k)?;
            way += optimizer.report().lr();
            let allowed = |what: &str| match what {
                "param" | "ema" if !rounded => atol + 4.0 * UNNOTICED * way,
                _ => atol,
            };
            for name in vars.keys() {
                for Quantity { what, got, recorded } in self.quantities(&optimizer, &vars, name)? {
                    let expected = recorded.at(k)?;
                    let rtol = match self.rtol(what)? {
                        Some(rtol) => rtol,
                        None if half || expected.is_empty() => continue,
                        None => bail!("no tolerance for `{what}`"),
                    };
                    let maximum = maxima.entry((name.clone(), what)).or_default();
                    if what == "param" {
                        // A step from a large weight to a small one keeps the rounding of the large one.
                        maximum.update(&self.case.tensor(&format!("{name}.init"))?.values);
                    }
                    let maximum = maximum.update(expected);
                    let label = format!("{name}.{what} after call {k}");
                    check(&label, &got, expected, |i| rtol * maximum[i] + allowed(what))?;
                }
                if let Some(t) = self.case.tensors.get(&format!("{name}.t")) {
                    let (got, expected) = (optimizer.state(name)?.step, t.values[k]);
                    ensure!(got as f64 == expected, "{name}.t after call {k}: expected {expected}, got {got}");
                }
            }
        }
        if let Some(calls) = self.case.json.get("final_iterations") {
            ensure!(*calls == optimizer.calls(), "calls: expected {calls}, got {}", optimizer.calls());
        }
        let mut finals =
            vars.keys().filter_map(|name| Some((name, self.case.tensors.get(&format!("{name}.param_final"))?)));
        if !half && rounded && self.hyper.ema.is_some() {
            optimizer.finalize_ema()?;
            finals.try_for_each(|(name, expected)| {
                let rtol = self.rtol("ema")?.context("no tolerance for `ema`")?;
                let maximum = maxima.entry((name.clone(), "ema")).or_default().update(&expected.values);
                let label = format!("{name}.param_final");
                check(&label, &values(&vars[name]), &expected.values, |i| rtol * maximum[i] + atol)
            })?;
        }
        Ok(())
    }

    /// Every call once, from the recorded state of the call before.
    fn follow_each_call(&self) -> Result<()> {
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        let atol = self.case.tolerance("atol", "")?.context("no `atol`")?;
        let (mut optimizer, vars) = self.start(true)?;
        for k in 0..self.steps {
            self.prepare(&mut optimizer, k, true)?;
            self.restore(&mut optimizer, &vars, k)?;
            self.call(&mut optimizer, &vars, k)?;
            for recorded in &self.vars {
                let name = &recorded.name;
                for Quantity { what, got, recorded: tensor } in self.quantities(&optimizer, &vars, name)? {
                    let expected = tensor.at(k)?;
                    let magnitudes = self.magnitudes(recorded, what, k)?;
                    let ulps = match self.case.tolerance("one_step_ulp", what)? {
                        Some(ulps) => ulps,
                        None if expected.is_empty() => continue,
                        None => bail!("no `one_step_ulp` for `{what}`"),
                    };
                    let storage = tensor.dtype()?;
                    // In f32 and f64 the trajectory's tolerance counts, too, and a step of nearly the learning rate.
                    let rtol = if half { 0.0 } else { self.rtol(what)?.unwrap_or(0.0) };
                    let lr = match what {
                        "param" | "ema" if !half => 16.0 * epsilon(self.dtype) * self.case.tensor("lr")?.values[k],
                        _ => 0.0,
                    };
                    let label = format!("{name}.{what} after call {k}");
                    check(&label, &got, expected, |i| {
                        ulps * ulp(magnitudes[i], storage) + rtol * magnitudes[i] + lr + atol
                    })?;
                }
            }
        }
        Ok(())
    }

    /// The largest magnitude that takes part in call `k`, for each element.
    fn magnitudes(&self, var: &RecordedVar, what: &str, k: usize) -> Result<Vec<f64>> {
        let at = |what: &str, k: usize| self.case.tensor(&format!("{}.{what}", var.name))?.at(k);
        let new = at(what, k)?;
        let old = match (k, what) {
            (0, "param") => self.case.tensor(&format!("{}.init", var.name))?.values.clone(),
            (0, _) => vec![0.0; new.len()],
            _ => at(what, k - 1)?.to_vec(),
        };
        let part = match what {
            "m" => 1.0 - self.effective.map_or(self.hyper.beta1, |effective| effective.beta1),
            "acc" => 1.0,
            _ => 0.0,
        };
        let grad = at("grad", k)?;
        let accumulated = match self.case.tensors.get(&format!("{}.acc", var.name)) {
            Some(accumulated) if k > 0 => accumulated.at(k - 1)?.to_vec(),
            _ => vec![0.0; new.len()],
        };
        let magnitude = |i: usize| {
            let grad = part * grad[i].abs().max(accumulated[i].abs());
            [old[i].abs(), new[i].abs(), grad].into_iter().filter(|x| x.is_finite()).fold(0.0, f64::max)
        };
        Ok((0..new.len()).map(magnitude).collect())
    }

    /// Puts variables and optimizer into the recorded state before call `k`.
    fn restore(&self, optimizer: &mut Adamax, vars: &BTreeMap<String, Var>, k: usize) -> Result<()> {
        let state_dtype = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let n = self.hyper.accumulation as usize;
        let mut snapshot = optimizer.snapshot()?;
        snapshot.counters = Counters { calls: k as u64, updates: (k / n) as u64, skipped: 0, pending: (k % n) as u64 };
        for recorded in &self.vars {
            let name = &recorded.name;
            let (var, shape) = (&vars[name], vars[name].dims());
            let before = |what: &str| -> Result<Option<Tensor>> {
                let Some(array) = self.case.tensors.get(&format!("{name}.{what}")) else { return Ok(None) };
                Ok(Some(tensor(array.at(k - 1)?, shape, state_dtype)))
            };
            let zeros = || Tensor::zeros(shape, state_dtype, var.device());
            let weight = match k {
                0 => self.case.tensor(&format!("{name}.init"))?.tensor()?,
                _ => self.case.tensor(&format!("{name}.param"))?.tensor_at(k - 1)?,
            };
            var.set(&weight)?;
            let count = |range: std::ops::Range<usize>| -> Result<u64> {
                range.map(|k| Ok(u64::from(self.has_grad(recorded, k)?))).sum()
            };
            // Updates in which the variable took part; all that count for it are complete.
            let step = if n == 1 { count(0..k)? } else { (k / n) as u64 };
            let pending = count(k - k % n..k)?;
            let accumulated = (pending > 0).then(|| before("acc")).transpose()?.flatten();
            let state = VarSnapshot {
                group: snapshot.vars[name].group.clone(),
                step,
                exp_avg: if k == 0 { zeros()? } else { before("m")?.context("no m")? },
                exp_inf: if k == 0 { zeros()? } else { before("u")?.context("no u")? },
                ema: if k == 0 { None } else { before("ema")? },
                accumulated: accumulated.map(|sum| (sum.into(), pending)),
            };
            snapshot.vars.insert(name.clone(), state);
        }
        Ok(optimizer.restore(&snapshot)?)
    }

    /// Every call, compared with the formulas in f64 from the optimizer's own state before it, as the user set them.
    fn follow_formulas(&self) -> Result<()> {
        let (mut optimizer, vars) = self.start(false)?;
        for k in 0..self.steps {
            self.prepare(&mut optimizer, k, false)?;
            let norm_error = if self.kernel == Kernel::Portable { 1e-5 } else { 0.0 };
            let expected: Call = formulas::call(&optimizer.snapshot()?, &vars, &self.grads(k)?, norm_error);
            self.call(&mut optimizer, &vars, k)?;
            if let Some(mismatch) = expected.mismatch(&optimizer.snapshot()?, &vars) {
                bail!("call {k}: {mismatch}");
            }
        }
        Ok(())
    }

    /// Two clips at once are an error.
    fn expect_refusal(&self) -> Result<()> {
        let params = self.params(0, false)?;
        match Adamax::from_named::<&str>([], params) {
            Err(error) if matches!(error.kind(), ErrorKind::Exclusive { .. }) => Ok(()),
            Err(error) => bail!("expected an error that names two clips, got: {error}"),
            Ok(_) => bail!("two clips at once were accepted"),
        }
    }
}

struct Quantity<'c> {
    what: &'static str,
    got: Vec<f64>,
    recorded: &'c super::case::Array,
}

impl RecordedVar {
    fn read(json: &Value) -> Result<Self> {
        let map = json.as_object().context("a variable that is no JSON object")?;
        let known = ["name", "shape", "sparse", "hyperparameters"];
        let unknown = map.keys().find(|key| !known.contains(&key.as_str()));
        ensure!(unknown.is_none(), "unknown entry {unknown:?} of a variable");
        Ok(Self {
            name: map.get("name").and_then(Value::as_str).context("a variable without a name")?.to_owned(),
            sparse: map.get("sparse").and_then(Value::as_bool).unwrap_or(false),
            overrides: map.get("hyperparameters").and_then(Value::as_object).cloned().unwrap_or_default(),
        })
    }

    /// Whether all that is different about it is that it does not decay.
    fn is_spared(&self) -> bool {
        self.overrides.len() == 1 && self.overrides.get("weight_decay").is_some_and(Value::is_null)
    }
}
