//! Recorded runs of an optimizer: the same calls, compared after each one.
//!
//! f32 and f64 parameters follow the recorded trajectory from its beginning. And each call, for every dtype, is made
//! once more from the recorded state of the call before, which leaves the rounding of one call and tests `restore`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{AccumulatedGrad, Adamax, Counters, Kernel, ParamGroup, ParamsAdamax, VarSnapshot};
use candle_core::{DType, Tensor, Var};
use serde_json::{Map, Value, json};

use super::case::Array;
use super::compare::{RunningMaximum, check, epsilon, ulp};
use super::hyper::{Hyper, UNNOTICED};
use super::model::Model;
use super::rates::Rate;
use super::recording::{CLIP_OF_SUMS, Recording};
use super::rows::Untouched;
use super::{Case, Outcome};
use crate::common::formulas::{self, Call};
use crate::common::{tensor, values};

pub(crate) fn run(case: &Case, kernel: Kernel) -> Result<Outcome> {
    let mut recording = Recording::read(case, kernel)?;
    let models = Model::all(case)?;
    if recording.hyper.clips.len() > 1 {
        recording.expect_refusal()?;
        return Ok(Outcome::Own("an error: two clips at once".into()));
    }
    if let Some(reason) = recording.departure()? {
        ensure!(models.is_empty(), "a model whose numbers we mean to differ from: {reason}");
        recording.follow_formulas().context("by the formulas in f64")?;
        if reason == CLIP_OF_SUMS {
            let once = |k| Ok(!recording.repeats_rows(k)?);
            recording.follow_each_call(once).context("one call without repeated rows from the recorded state")?;
        }
        return Ok(Outcome::Own(reason));
    }
    recording.follow()?;
    for model in models {
        recording.model = Some(model);
        recording.follow().with_context(|| format!("{model:?}"))?;
    }
    Ok(Outcome::Compared)
}

impl Recording<'_> {
    /// All ways to follow what was recorded.
    fn follow(&self) -> Result<()> {
        self.follow_trajectory(true).context("trajectory")?;
        if self.visible {
            self.follow_trajectory(false).context("trajectory with the settings as the user wrote them")?;
        }
        self.follow_each_call(|_| Ok(true)).context("one call from the recorded state")
    }

    /// The optimizer and its variables, before the first call.
    fn start(&self, rounded: bool) -> Result<(Adamax, BTreeMap<String, Var>)> {
        let mut params = self.params(0, rounded)?;
        let mut vars = BTreeMap::new();
        let mut groups: BTreeMap<String, ParamGroup> = BTreeMap::new();
        let spared: Vec<&str> = self.vars.iter().filter(|var| var.is_spared()).map(|var| var.name.as_str()).collect();
        // A name spares all names that it is a part of; where that is too much, and on the portable path, a group.
        let by_name = self.kernel == Kernel::Auto
            && self
                .vars
                .iter()
                .all(|var| var.is_spared() || !spared.iter().any(|part| formulas::is_part(part, &var.name)));
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
        let untouched = Untouched::before(optimizer, vars, &grads)?;
        match self.model {
            Some(model) => model.call(self.case, optimizer, vars, k)?,
            None => optimizer.apply_gradients(grads.iter().map(|(name, grad)| (&vars[name], grad))).map(drop)?,
        }
        untouched.check(optimizer, vars).with_context(|| format!("call {k}"))
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
                scales: None,
                by_rows: false,
                master: None,
                ema: if k == 0 { None } else { before("ema")? },
                accumulated: accumulated.map(|sum| (sum.into(), pending)),
                missed: None,
            };
            snapshot.vars.insert(name.clone(), state);
        }
        Ok(optimizer.restore(&snapshot)?)
    }

    /// The quantities that were recorded for a variable, with the optimizer's own.
    fn quantities(&self, optimizer: &Adamax, vars: &BTreeMap<String, Var>, name: &str) -> Result<Vec<Quantity<'_>>> {
        let state = optimizer.state(name)?;
        let zeros = || vec![0.0; vars[name].elem_count()];
        // Before its first update a variable has no average; Keras has a copy.
        let copy = || values(&vars[name]);
        let all = [
            ("param", values(&vars[name])),
            ("m", values(&state.exp_avg)),
            ("u", values(&state.exp_inf)),
            ("ema", state.ema.as_ref().map_or_else(copy, values)),
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

    /// Every call that counts once, from the recorded state of the call before.
    fn follow_each_call(&self, counts: impl Fn(usize) -> Result<bool>) -> Result<()> {
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        let atol = self.case.tolerance("atol", "")?.context("no `atol`")?;
        let (mut optimizer, vars) = self.start(true)?;
        for k in 0..self.steps {
            if !counts(k)? {
                continue;
            }
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

    /// Two clips at once are an error of Keras's configuration; settings cannot have them.
    fn expect_refusal(&self) -> Result<()> {
        let hyperparameters = self.case.object("hyperparameters")?;
        let clips: Map<_, _> = hyperparameters.into_iter().filter(|(key, _)| key.contains("clip")).collect();
        let config = json!({"class_name": "Adamax", "config": clips});
        match ParamsAdamax::from_keras_json(&config.to_string()) {
            Err(error) if error.to_string().contains("null beside `clip") => Ok(()),
            Err(error) => bail!("expected an error that names two clips, got: {error}"),
            Ok(_) => bail!("two clips at once were accepted"),
        }
    }
}

struct Quantity<'c> {
    what: &'static str,
    got: Vec<f64>,
    recorded: &'c Array,
}
