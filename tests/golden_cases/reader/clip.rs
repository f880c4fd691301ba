//! Gradient clipping: one call of the optimizer with `beta1` 0, so that the first moment is the clipped gradient.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{Adamax, Clip, Kernel, NormType, ParamsAdamax, SparseGrad};
use candle_core::{DType, Var};
use serde_json::Value;

use super::case::Array;
use super::compare::{epsilon, same};
use super::{Case, Outcome, number};
use crate::common::formulas::{clipped, largest, norm, norm_of_clip};
use crate::common::gradients::{Grad, Whole};
use crate::common::{device, values};

pub(crate) fn run(case: &Case, kernel: Kernel) -> Result<Outcome> {
    let params = ParamsAdamax { beta1: 0.0, lr: 0.125.into(), ..ParamsAdamax::default() };
    let Some(params) = with_clip(params, case)? else {
        return Ok(Outcome::NotCompared("a norm other than L1, L2 and the largest magnitude".into()));
    };
    let rtol = case.tolerance("rtol", "")?.context("no tolerance")?;
    let overflowing = case.get("verified")?.get("differs_from_float64_formula").and_then(Value::as_array);
    let overflowing: Vec<&str> = overflowing.into_iter().flatten().filter_map(Value::as_str).collect();
    let (mut own, mut summed): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    let inputs = case.object("inputs")?;
    for label in inputs.keys() {
        let (grads, recorded) = (list(case, label, "in")?, list(case, label, "out")?);
        ensure!(!grads.is_empty() && grads.len() == recorded.len(), "{label}: no gradients");
        let (clipped, total) = clip(&params, &grads, kernel)?;
        let (formula, true_total) = formula(&params, &grads);
        // What overflows in the framework's type was recorded, but is not required: our norms are f64, and those of f64
        // are right beyond where squares are.
        let beyond_squares = ["huge", "tiny"].contains(&label.as_str()) && grads[0].dtype == DType::F64;
        let overflows = overflowing.contains(&label.as_str()) || beyond_squares;
        let repeated = grads.iter().any(|grad| grad.whole.terms > 1);
        if overflows {
            own.push(label);
        } else if repeated {
            summed.push(label);
        }
        let recorded_counts = !overflows && !repeated;
        let expected: Vec<&[f64]> = match recorded_counts {
            true => recorded.iter().map(|list| list.whole.g.as_slice()).collect(),
            false => formula.iter().map(Vec::as_slice).collect(),
        };
        for (i, (got, expected)) in clipped.iter().zip(&expected).enumerate() {
            let top = expected.iter().filter(|x| x.is_finite()).fold(0.0, |top: f64, x| top.max(x.abs()));
            for (j, (&got, &expected)) in got.iter().zip(*expected).enumerate() {
                let near = same(got, expected) || (got - expected).abs() <= rtol * top;
                ensure!(near, "{label}.{i}[{j}]: expected {expected:e}, got {got:e}");
            }
        }
        if let Some(recorded) = case.tensors.get(&format!("{label}.norm")) {
            let expected = if recorded_counts { recorded.values[0] } else { true_total };
            let got = total.context("no total norm in the report")?;
            let near = same(got, expected) || (got - expected).abs() <= rtol * expected.abs();
            ensure!(near, "{label}.norm: expected {expected:e}, got {got:e}");
        }
    }
    let reasons = [(own, "our norms are f64"), (summed, "we sum the values of a row before we clip")];
    let reasons = reasons.iter().filter(|(labels, _)| !labels.is_empty());
    let reasons: Vec<String> =
        reasons.map(|(labels, why)| format!("`{}` by the formula, since {why}", labels.join("`, `"))).collect();
    Ok(match reasons.is_empty() {
        true => Outcome::Compared,
        false => Outcome::Own(format!("compared, but {}", reasons.join("; "))),
    })
}

/// The settings that do what the recorded function does; none if there are none.
fn with_clip(params: ParamsAdamax, case: &Case) -> Result<Option<ParamsAdamax>> {
    let parameters = case.object("parameters")?;
    let unknown = parameters.keys().find(|key| !["threshold", "max_norm", "norm_type"].contains(&key.as_str()));
    ensure!(unknown.is_none(), "unknown parameter {unknown:?}");
    let get = |key: &str| number(parameters.get(key).unwrap_or(&Value::Null));
    let threshold = get("threshold")?;
    Ok(Some(match case.text("framework")? {
        "tf.clip_by_norm" | "keras3._clip_by_norm" => ParamsAdamax { clip: threshold.map(Clip::Norm), ..params },
        "tf.clip_by_value" | "keras3 ops.clip (clipvalue)" => {
            ParamsAdamax { clip: threshold.map(Clip::Value), ..params }
        }
        "tf.clip_by_global_norm" | "keras3.clip_by_global_norm" => {
            ParamsAdamax { clip: threshold.map(Clip::GlobalNorm), ..params }
        }
        "torch.nn.utils.clip_grad_norm_" => {
            let max_norm = get("max_norm")?.context("no `max_norm`")?;
            let norm_type = match get("norm_type")?.unwrap_or(2.0) {
                1.0 => NormType::L1,
                2.0 => NormType::L2,
                f64::INFINITY => NormType::Inf,
                _ => return Ok(None),
            };
            ParamsAdamax { clip: Some(Clip::GradNorm { max_norm, norm_type }), ..params }
        }
        other => bail!("unknown clipping function `{other}`"),
    }))
}

/// A gradient, before or after it is clipped.
struct Item {
    dtype: DType,
    shape: Vec<usize>,
    grad: Grad,
    whole: Whole,
}

/// The tensors `LABEL.WHAT`, or `LABEL.WHAT.0` and so on. The first is of the rows `LABEL.indices` if there are any.
fn list(case: &Case, label: &str, what: &str) -> Result<Vec<Item>> {
    let one = case.tensors.get(&format!("{label}.{what}"));
    let many = (0..).map_while(|i| case.tensors.get(&format!("{label}.{what}.{i}")));
    let indices = case.tensors.get(&format!("{label}.indices"));
    let item = |(i, array): (usize, &Array)| {
        let (mut shape, values) = (array.shape.clone(), array.tensor()?);
        let grad = match indices.filter(|_| i == 0) {
            None => Grad::Dense(values),
            Some(indices) => {
                // One more row than there are gradients for.
                shape[0] = indices.values.iter().fold(0, |rows, &row| rows.max(row as usize + 2));
                Grad::Sparse(SparseGrad { indices: indices.tensor()?, values })
            }
        };
        Ok(Item { dtype: array.dtype()?, whole: Whole::of(&grad, &shape), grad, shape })
    };
    one.into_iter().chain(many).enumerate().map(item).collect()
}

/// The clipped gradients and the total norm, by the optimizer.
fn clip(params: &ParamsAdamax, items: &[Item], kernel: Kernel) -> Result<(Vec<Vec<f64>>, Option<f64>)> {
    let var = |item: &Item| Var::zeros(item.shape.as_slice(), item.dtype, &device());
    let vars: Vec<(String, Var)> =
        items.iter().enumerate().map(|(i, item)| Ok((format!("{i:03}"), var(item)?))).collect::<Result<_>>()?;
    let mut optimizer = Adamax::from_named(vars.clone(), params.clone())?;
    optimizer.set_kernel(kernel)?;
    optimizer.apply_gradients(vars.iter().zip(items).map(|((_, var), item)| (var, &item.grad)))?;
    let moments = vars.iter().map(|(name, _)| Ok(values(&optimizer.state(name)?.exp_avg)));
    Ok((moments.collect::<Result<_>>()?, optimizer.report().total_norm()))
}

/// The clipped gradients and the total norm, by the formulas in f64.
fn formula(params: &ParamsAdamax, items: &[Item]) -> (Vec<Vec<f64>>, f64) {
    let norm_type = norm_of_clip(params).unwrap_or_default();
    let all: Vec<&[f64]> = items.iter().map(|item| item.whole.g.as_slice()).collect();
    let total = norm(&all, norm_type);
    let clip = |grad: &&[f64]| {
        let own = norm(&[grad], norm_type);
        grad.iter().map(|&g| clipped(params, g, own, total)).collect()
    };
    (all.iter().map(clip).collect(), total)
}

/// The steps in which the framework's norm, whose squares are summed in `dtype`, is not the true one.
pub(crate) fn overflows(params: &ParamsAdamax, grads: &BTreeMap<&str, Vec<f64>>, dtype: DType) -> bool {
    if dtype == DType::F64 {
        return false;
    }
    let too_large = |norm: f64| norm.is_finite() && norm * norm > 0.5 * largest(dtype) * (1.0 - epsilon(dtype));
    let of_each = || grads.values().map(|grad| norm(&[grad], NormType::L2));
    let all: Vec<&[f64]> = grads.values().map(Vec::as_slice).collect();
    match params.clip {
        Some(Clip::Norm(_)) => of_each().any(too_large),
        Some(Clip::GlobalNorm(_)) => too_large(norm(&all, NormType::L2)),
        _ => false,
    }
}
