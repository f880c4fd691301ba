//! Ten thousand calls with half parameters and gradients: moments in every encoding have to follow those in f64.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use candle_adamax::{Adamax, Kernel, ParamsAdamax, StateDType};
use candle_core::Var;

use super::{Case, Outcome, number};
use crate::common::values;

pub(crate) fn run(case: &Case, kernel: Kernel) -> Result<Outcome> {
    let hyperparameters = case.object("hyperparameters")?;
    let unknown = hyperparameters.keys().find(|key| !["lr", "beta_1", "beta_2", "epsilon"].contains(&key.as_str()));
    ensure!(unknown.is_none(), "unknown hyperparameter {unknown:?}");
    let get = |key: &str| {
        hyperparameters.get(key).and_then(|value| number(value).ok()?).with_context(|| format!("no number `{key}`"))
    };
    let params = ParamsAdamax {
        lr: get("lr")?.into(),
        beta1: get("beta_1")?,
        beta2: get("beta_2")?,
        eps: get("epsilon")?,
        ..ParamsAdamax::pytorch()
    };
    let rtol = case.tolerance("rtol", "u")?.context("no tolerance for u")?;
    // One rounding of v; Q8 rounds up, to 3 bits.
    let encodings = [
        (StateDType::F32, 1.0 - rtol..1.0 + rtol),
        (StateDType::BF16, 1.0 - 2f64.powi(-8)..1.0 + 2f64.powi(-8)),
        (StateDType::F16, 1.0 - 2f64.powi(-11)..1.0 + 2f64.powi(-11)),
        (StateDType::Q8, 1.0..1.13),
    ];
    for (state_dtype, allowed) in encodings {
        if state_dtype == StateDType::F32 || kernel == Kernel::Auto {
            run_with(case, kernel, ParamsAdamax { state_dtype, ..params.clone() }, &allowed)?;
        }
    }
    Ok(Outcome::Compared)
}

/// Runs the stream; u in terms of the one in f64 has to be in `allowed` at every recorded step.
fn run_with(case: &Case, kernel: Kernel, params: ParamsAdamax, allowed: &Range<f64>) -> Result<()> {
    let encoding = params.state_dtype;
    let var = Var::from_tensor(&case.tensor("init")?.tensor()?)?;
    let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
    optimizer.set_kernel(kernel)?;
    let (grads, at) = (case.tensor("grad")?, case.tensor("at")?);
    ensure!(var.dtype() == case.dtype()?, "expected parameters of the case's dtype");
    let expected = case.tensor("u_f64")?;
    let mut recorded = 0;
    for k in 0..case.steps()? {
        optimizer.apply_gradients([(&var, &grads.tensor_at(k)?)])?;
        if at.values.get(recorded) != Some(&(k as f64)) {
            continue;
        }
        let got = values(&optimizer.state("w")?.exp_inf);
        for (i, (&got, &expected)) in got.iter().zip(expected.at(recorded)?).enumerate() {
            ensure!(
                allowed.contains(&(got / expected)),
                "{encoding:?}, call {k}, u[{i}]: expected {expected:e} times {allowed:?}, got {got:e}"
            );
        }
        recorded += 1;
    }
    ensure!(recorded == at.values.len(), "only {recorded} of {} recorded steps were reached", at.values.len());
    Ok(())
}
