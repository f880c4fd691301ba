//! The optimizer's settings: a learning rate that rises and falls, and one group of weights for each layer.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError};

use anyhow::Result;
use candle_adamax::{
    Adamax, Clip, CosineDecay, GradScaler, Join, LearningRate, LearningRateSchedule, LinearWarmup, LossScale,
    ParamGroup, ParamsAdamax, PolynomialDecay, Schedule as Decay, WeightDecay,
};
use candle_core::Var;
use candle_nn::VarMap;

use crate::model::IsTrained;
use crate::settings::{Float, Schedule, Settings};
use crate::train::Length;

/// The optimizer of the trained weights of a model of so many `layers`. `pretrained` weights are moved less, and those
/// near the text least.
pub(crate) fn adamax(
    settings: &Settings,
    varmap: &VarMap,
    is_trained: IsTrained,
    length: Length,
    (layers, pretrained): (usize, bool),
) -> Result<Adamax> {
    let decay = settings.layer_lr_decay.unwrap_or(if pretrained { 0.9 } else { 1.0 });
    let mut groups: BTreeMap<usize, Vec<(String, Var)>> = BTreeMap::new();
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    for (name, var) in vars.iter().filter(|(name, _)| is_trained(name)) {
        groups.entry(height(name, layers)).or_default().push((name.clone(), var.clone()));
    }
    // Where the head alone is trained there is no normalization to spare, and a pattern that spares nothing is an error.
    let mut params = params(settings, length, pretrained);
    let has = |part: &str, name: &str| name.split('.').any(|component| component == part);
    params.no_decay.retain(|part| groups.values().flatten().any(|(name, _)| has(part, name)));
    let groups = groups.into_iter().map(|(height, vars)| {
        let name = match height {
            0 => "embeddings".to_owned(),
            top if top == layers + 1 => "head".to_owned(),
            layer => format!("layer.{}", layer - 1),
        };
        let group = ParamGroup::new(name).vars(vars).lr_factor(decay.powi((layers + 1 - height) as i32));
        match settings.sparse_embeddings.filter(|_| height == 0) {
            Some(sparse) => group.sparse_update(sparse.update()),
            None => group,
        }
    });
    Ok(Adamax::from_groups(groups, params)?)
}

/// How far above the text a weight is: 0 for the embeddings, 1 for the first layer, `layers + 1` for the head.
fn height(name: &str, layers: usize) -> usize {
    if name.starts_with("bert.embeddings.") {
        return 0;
    }
    let layer = name.strip_prefix("bert.encoder.layer.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.map_or(layers + 1, |layer| layer + 1)
}

fn params(settings: &Settings, length: Length, pretrained: bool) -> ParamsAdamax {
    ParamsAdamax {
        lr: learning_rate(settings, length, settings.lr.unwrap_or(if pretrained { 2e-4 } else { 2e-3 })),
        weight_decay: WeightDecay::Decoupled(settings.weight_decay),
        no_decay: vec!["bias".into(), "LayerNorm".into()],
        clip: Some(Clip::GlobalNorm(settings.clip_norm)),
        gradient_accumulation_steps: length.calls as u64,
        // Small gradients vanish in f16.
        loss_scale: match settings.dtype {
            Float::F16 => LossScale::Dynamic(GradScaler::default()),
            _ => LossScale::None,
        },
        state_dtype: settings.state.dtype(),
        rounding: settings.rounding.rounding(),
        seed: settings.seed,
        ..Default::default()
    }
}

/// From 0 to `peak` and back.
fn learning_rate(settings: &Settings, length: Length, peak: f64) -> LearningRate {
    let steps = length.steps;
    let warmup = ((settings.warmup * steps as f64).round() as usize).min(steps.saturating_sub(1));
    let (warmup, rest) = (warmup as u64, (steps - warmup) as u64);
    let decay: Decay = match settings.schedule {
        Schedule::Linear => PolynomialDecay { end_learning_rate: 0.0, ..PolynomialDecay::new(peak, rest) }.into(),
        Schedule::Cosine => CosineDecay::new(peak, rest).into(),
        Schedule::Constant => LinearWarmup::new(peak, peak, 0).into(),
    };
    let schedule = Join::new([LinearWarmup::new(0.0, peak, warmup).into(), decay], [warmup]).into();
    match length.calls {
        1 => LearningRate::Schedule(schedule),
        calls => LearningRate::Custom(Arc::new(BySteps { schedule, calls: calls as u64 })),
    }
}

/// A schedule that counts steps. Those of the crate count calls of the optimizer, and with accumulation the one that
/// updates is the last of a step's.
struct BySteps {
    schedule: Decay,
    calls: u64,
}

impl LearningRateSchedule for BySteps {
    fn learning_rate(&self, call: u64) -> f64 {
        self.schedule.learning_rate(call / self.calls)
    }

    fn validate(&self) -> candle_adamax::Result<()> {
        self.schedule.validate()
    }
}

impl fmt::Debug for BySteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, in steps of {} calls", self.schedule, self.calls)
    }
}

#[cfg(test)]
mod tests {
    use candle_adamax::GroupLr;
    use candle_core::{DType, Device};
    use clap::Parser;

    use super::*;
    use crate::model::is_on_top;
    use crate::settings::Args;

    fn settings(options: &[&str]) -> Result<Settings> {
        Ok(Args::try_parse_from([&["finetune"], options].concat())?.settings)
    }

    /// Ten steps of so many calls.
    fn length(calls: usize) -> Length {
        Length { steps: 10, steps_per_epoch: 10, texts: 8, calls }
    }

    fn vars(names: &[&str]) -> Result<VarMap> {
        let varmap = VarMap::new();
        for name in names {
            let var = Var::zeros(4, DType::F32, &Device::Cpu)?;
            varmap.data().lock().unwrap_or_else(PoisonError::into_inner).insert((*name).to_owned(), var);
        }
        Ok(varmap)
    }

    const NAMES: [&str; 5] = [
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.11.attention.output.LayerNorm.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
    ];

    fn factors(optimizer: &Adamax) -> Vec<(&str, f64)> {
        let factor = |lr: &GroupLr| if let GroupLr::Factor(factor) = lr { *factor } else { f64::NAN };
        let groups = optimizer.groups().iter().filter(|group| group.name != "default");
        groups.map(|group| (group.name.as_str(), factor(&group.lr))).collect()
    }

    #[test]
    fn the_learning_rate_falls_from_the_head_to_the_embeddings() -> Result<()> {
        let (varmap, model) = (vars(&NAMES)?, (12, true));
        let optimizer = adamax(&settings(&["--layer-lr-decay", "0.5"])?, &varmap, |_| true, length(1), model)?;
        let expected =
            [("embeddings", 0.5f64.powi(13)), ("layer.0", 0.5f64.powi(12)), ("layer.11", 0.5), ("head", 1.0)];
        assert_eq!(factors(&optimizer), expected);

        let optimizer = adamax(&settings(&[])?, &varmap, is_on_top, length(1), model)?;
        assert_eq!(factors(&optimizer), [("head", 1.0)]);
        assert_eq!(optimizer.names().collect::<Vec<_>>(), NAMES[3..]);
        Ok(())
    }

    #[test]
    fn warm_up_and_decay_count_steps_whatever_a_step_is_made_of() -> Result<()> {
        for calls in [1, 4] {
            let lr = |schedule: &str, step: u64| -> Result<f64> {
                let settings = settings(&["--lr", "0.5", "--warmup", "0.2", "--schedule", schedule])?;
                let lr = learning_rate(&settings, length(calls), 0.5);
                lr.validate()?;
                let (first, last) = (lr.at(step * calls as u64)?, lr.at((step + 1) * calls as u64 - 1)?);
                assert_eq!(first, last);
                Ok(last)
            };
            for (schedule, expected) in [
                ("linear", [0.0, 0.25, 0.5, 0.25, 0.0]),
                ("cosine", [0.0, 0.25, 0.5, 0.25, 0.0]),
                ("constant", [0.0, 0.25, 0.5, 0.5, 0.5]),
            ] {
                let lrs = [0, 1, 2, 6, 10].into_iter().map(|step| lr(schedule, step)).collect::<Result<Vec<_>>>()?;
                lrs.iter().zip(expected).for_each(|(lr, expected)| assert!((lr - expected).abs() < 1e-12, "{lrs:?}"));
            }
        }
        // Even a single step has a learning rate.
        let one = Length { steps: 1, ..length(1) };
        assert_eq!(learning_rate(&settings(&["--warmup", "0.9"])?, one, 0.5).at(0)?, 0.5);
        Ok(())
    }

    #[test]
    fn biases_and_normalizations_do_not_decay() -> Result<()> {
        let varmap = vars(&NAMES)?;
        for var in varmap.all_vars() {
            var.set(&var.ones_like()?)?;
        }
        let options = ["--lr", "0.5", "--weight-decay", "0.1", "--warmup", "0", "--layer-lr-decay", "1"];
        let mut optimizer = adamax(&settings(&options)?, &varmap, |_| true, length(1), (12, true))?;
        let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner).clone();
        let zeros = vars.values().map(|var| Ok((var, var.zeros_like()?))).collect::<Result<Vec<_>>>()?;
        optimizer.apply_gradients(zeros.iter().map(|(var, grad)| (*var, grad)))?;
        for name in NAMES {
            let expected = if name.contains("bias") || name.contains("LayerNorm") { 1.0 } else { 0.95 };
            let weights = vars[name].to_vec1::<f32>()?;
            assert!(weights.iter().all(|weight| (weight - expected).abs() < 1e-6), "{name}: {weights:?}");
        }
        Ok(())
    }

    #[test]
    fn a_mistake_names_the_setting() -> Result<()> {
        let refused = |options: &[&str]| -> Result<String> {
            let optimizer = adamax(&settings(options)?, &vars(&NAMES)?, |_| true, length(1), (12, true));
            Ok(optimizer.err().map(|error| error.to_string()).unwrap_or_default())
        };
        assert!(refused(&["--clip-norm", "-1"])?.contains("`clip`"));
        assert!(refused(&["--layer-lr-decay", "-1"])?.contains("groups.embeddings.lr_factor"));
        assert!(refused(&["--lr", "-1"])?.contains("got -1"));
        Ok(())
    }
}
