//! One recorded run of an optimizer: what its metadata and its tensors say.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{EpsMode, Kernel, LossScale, MissingGradients, ParamsAdamax, SparseGrad, StepCount, WeightDecay};
use candle_core::DType;
use serde_json::{Map, Value};

use super::compare::epsilon;
use super::hyper::{Effective, Hyper};
use super::model::{self, Model};
use super::rates::Rate;
use super::{Case, clip};
use crate::common::formulas::norm_of_clip;
use crate::common::gradients::{Grad, Whole};
use crate::common::tensor as tensor_of;

/// Why clipping of gradients of rows differs, in the calls that have a row several times.
pub(crate) const CLIP_OF_SUMS: &str = "TensorFlow clips the values of a row before it sums them, we clip the sum";

pub(crate) struct RecordedVar {
    pub(crate) name: String,
    pub(crate) sparse: bool,
    pub(crate) overrides: Map<String, Value>,
}

/// One recorded run, understood.
pub(crate) struct Recording<'c> {
    pub(crate) case: &'c Case,
    pub(crate) family: &'c str,
    pub(crate) kernel: Kernel,
    pub(crate) dtype: DType,
    pub(crate) steps: usize,
    pub(crate) vars: Vec<RecordedVar>,
    pub(crate) hyper: Hyper,
    /// The numbers after the framework's rounding, unless that is the rounding of the optimizer's own arithmetic.
    pub(crate) effective: Option<Effective>,
    /// Whether the settings as the user wrote them give the recorded numbers, too, with a tolerance for the rounding.
    pub(crate) visible: bool,
    pub(crate) rate: Rate,
    /// What the gradients come from; the recorded ones are used if there is none.
    pub(crate) model: Option<Model>,
}

impl<'c> Recording<'c> {
    pub(crate) fn read(case: &'c Case, kernel: Kernel) -> Result<Self> {
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
            model: None,
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
                Some(what) => known.contains(&what) || self.is_of_rows(name, what),
                None => name == "lr" || name == "beta1_power" || model::uses(self.case, name),
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

    pub(crate) fn has_grad(&self, var: &RecordedVar, k: usize) -> Result<bool> {
        match self.case.tensors.get(&format!("{}.has_grad", var.name)) {
            Some(has) => Ok(has.values.get(k).context("`has_grad` is too short")? != &0.0),
            None => Ok(true),
        }
    }

    /// Whether a tensor of this name holds the rows of some call.
    fn is_of_rows(&self, name: &str, what: &str) -> bool {
        let call = what.strip_prefix("idx.").or(what.strip_prefix("val.")).and_then(|call| call.parse().ok());
        let of_sparse = self.vars.iter().any(|var| var.sparse && name.starts_with(&format!("{}.", var.name)));
        of_sparse && call.is_some_and(|call: usize| call < self.steps)
    }

    pub(crate) fn shape(&self, var: &RecordedVar) -> Result<&'c [usize]> {
        Ok(&self.case.tensor(&format!("{}.init", var.name))?.shape)
    }

    fn grad(&self, var: &RecordedVar, k: usize) -> Result<Option<Grad>> {
        if !self.has_grad(var, k)? {
            return Ok(None);
        }
        let tensor = |what: &str| self.case.tensor(&format!("{}.{what}", var.name));
        if !var.sparse {
            return Ok(Some(Grad::Dense(tensor("grad")?.tensor_at(k)?)));
        }
        let (indices, values) = (tensor(&format!("idx.{k:03}"))?, tensor(&format!("val.{k:03}"))?);
        let grad = SparseGrad { indices: indices.tensor()?, values: values.tensor()? };
        match self.family {
            "tf_legacy" => Ok(Some(Grad::Sparse(grad))),
            // Keras 3 moves all rows, as with zeros for those that are not listed.
            "keras3" => {
                let shape = self.shape(var)?;
                let whole = tensor_of(&Whole::of(&grad, shape).g, shape, values.dtype()?);
                Ok(Some(Grad::Dense(whole)))
            }
            other => bail!("gradients of some rows in the family `{other}`"),
        }
    }

    pub(crate) fn grads(&self, k: usize) -> Result<BTreeMap<String, Grad>> {
        let grads = self.vars.iter().filter_map(|var| match self.grad(var, k) {
            Ok(grad) => grad.map(|grad| Ok((var.name.clone(), grad))),
            Err(error) => Some(Err(error)),
        });
        grads.collect()
    }

    /// A gradient written out in the shape of its variable.
    pub(crate) fn whole(&self, var: &RecordedVar, k: usize) -> Result<Option<Whole>> {
        let shape = self.shape(var)?;
        Ok(self.grad(var, k)?.map(|grad| Whole::of(&grad, shape)))
    }

    /// Whether call `k` has a row several times.
    pub(crate) fn repeats_rows(&self, k: usize) -> Result<bool> {
        self.vars.iter().try_fold(false, |any, var| Ok(any || self.whole(var, k)?.is_some_and(|grad| grad.terms > 1)))
    }

    /// Why the crate means to differ from this recording, if it does.
    pub(crate) fn departure(&self) -> Result<Option<String>> {
        let note = self.case.notes().find(|note| note.contains("not a model to follow"));
        if let Some(note) = note {
            return Ok(Some(note.to_owned()));
        }
        if self.case.json.get("expect_mismatch") == Some(&Value::Bool(true)) {
            return Ok(Some("recorded as a mismatch".into()));
        }
        let params = self.params(0, false)?;
        let norms = norm_of_clip(&params).is_some();
        let n = self.hyper.accumulation as usize;
        let mut sums: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for k in 0..self.steps {
            let last = (k + 1) % n == 0;
            for var in &self.vars {
                let Some(Whole { g: grad, terms, .. }) = self.whole(var, k)? else {
                    if last && n > 1 && sums.contains_key(var.name.as_str()) {
                        let reason = "Keras forgets what it has accumulated where the last gradient is missing";
                        return Ok(Some(reason.into()));
                    }
                    continue;
                };
                if terms > 1 && !self.hyper.clips.is_empty() {
                    return Ok(Some(CLIP_OF_SUMS.into()));
                }
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
    pub(crate) fn params(&self, k: usize, rounded: bool) -> Result<ParamsAdamax> {
        let Hyper { maximize, ema, loss_scale, accumulation, .. } = self.hyper;
        let family = match self.family {
            "torch" => ParamsAdamax::pytorch(),
            "optax" => {
                let step_count = StepCount::Shared;
                ParamsAdamax { eps_mode: EpsMode::InsideMax, step_count, ..ParamsAdamax::default() }
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
            clip: self.hyper.clips.first().copied(),
            loss_scale: loss_scale.map_or(LossScale::None, LossScale::Static),
            ema,
            gradient_accumulation_steps: accumulation,
            missing_gradients: MissingGradients::Allow,
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

    pub(crate) fn decay(&self, decay: Option<f64>) -> WeightDecay {
        match decay {
            None | Some(0.0) => WeightDecay::None,
            Some(decay) if self.family == "torch" => WeightDecay::L2(decay),
            Some(decay) => WeightDecay::Decoupled(decay),
        }
    }

    /// The largest magnitude that takes part in call `k`, for each element.
    pub(crate) fn magnitudes(&self, var: &RecordedVar, what: &str, k: usize) -> Result<Vec<f64>> {
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
        let grad = self.whole(var, k)?.map_or_else(|| vec![0.0; new.len()], |grad| grad.size);
        let accumulated = match self.case.tensors.get(&format!("{}.acc", var.name)) {
            Some(accumulated) if k > 0 => accumulated.at(k - 1)?.to_vec(),
            _ => vec![0.0; new.len()],
        };
        let magnitude = |i: usize| {
            let grad = part * grad[i].max(accumulated[i].abs());
            [old[i].abs(), new[i].abs(), grad].into_iter().filter(|x| x.is_finite()).fold(0.0, f64::max)
        };
        Ok((0..new.len()).map(magnitude).collect())
    }
}

impl RecordedVar {
    pub(crate) fn read(json: &Value) -> Result<Self> {
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
    pub(crate) fn is_spared(&self) -> bool {
        self.overrides.len() == 1 && self.overrides.get("weight_decay").is_some_and(Value::is_null)
    }
}
