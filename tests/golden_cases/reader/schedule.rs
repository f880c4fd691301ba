//! Learning-rate schedules of Keras: the whole recorded curve in f64.

use anyhow::{Context as _, Result, ensure};
use candle_adamax::{LearningRateSchedule as _, Schedule};
use serde_json::{Value, json};

use super::{Case, Outcome, number};

/// How far from Keras's f64 evaluation a rate may be, as a share of the largest one.
const TOLERANCE: f64 = 1e-12;

pub(crate) fn run(case: &Case) -> Result<Outcome> {
    let (class_name, config) = (case.text("class_name")?, case.get("config")?);
    let form = json!({"class_name": class_name, "config": config});
    let schedule: Schedule = serde_json::from_value(form).with_context(|| format!("{class_name} {config}"))?;
    if let Some(reason) = refused(class_name, config)? {
        ensure!(schedule.validate().is_err(), "{schedule} was accepted, but {reason}");
        return Ok(Outcome::Own(format!("an error: {reason}")));
    }
    schedule.validate().context("validating the schedule")?;
    let (steps, exact, rounded) = (case.tensor("steps")?, case.tensor("lr_f64")?, case.tensor("lr_f32")?);
    let sensitive = case.tensor("restart_sensitive")?;
    let peak = exact.values.iter().fold(0.0, |peak: f64, lr| peak.max(lr.abs()));
    let tolerance_f32 = case.tolerance("rtol", "lr_f32")?.context("no tolerance for `lr_f32`")?;
    let mut compared = 0;
    for (i, &step) in steps.values.iter().enumerate() {
        if sensitive.values[i] == 1.0 {
            continue;
        }
        let got = schedule.learning_rate(step as u64);
        let all = [("f64", exact.values[i], TOLERANCE), ("f32", rounded.values[i], tolerance_f32)];
        for (what, expected, tolerance) in all {
            let off = (got - expected).abs() / peak;
            ensure!(off <= tolerance || got == expected, "step {step}, {what}: expected {expected:e}, got {got:e}");
        }
        compared += 1;
    }
    ensure!(compared > 0, "no step to compare");
    Ok(Outcome::Compared)
}

/// What Keras accepts and the crate documents to be an error.
fn refused(class_name: &str, config: &Value) -> Result<Option<&'static str>> {
    let get = |key: &str| number(config.get(key).unwrap_or(&Value::Null));
    Ok(match class_name {
        "CosineDecay" if get("warmup_target")?.is_none() && get("warmup_steps")?.unwrap_or(0.0) > 0.0 => {
            Some("Keras ignores `warmup_steps` without a `warmup_target`")
        }
        "CosineDecayRestarts" if get("t_mul")?.is_some_and(|t_mul| t_mul < 1.0) => {
            Some("with a `t_mul` below 1 Keras ends in NaN")
        }
        _ => None,
    })
}
