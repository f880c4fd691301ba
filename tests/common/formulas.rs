//! The formulas of the optimizer once more: plain loops in f64, with the error that a faster implementation may make.
//!
//! One call is computed from the optimizer's own state before it, so that rounding does not add up over the calls and
//! the bounds stay as sharp as one rounding is. Written from the frameworks' formulas, not from the crate's source.

use std::collections::{BTreeMap, BTreeSet};

use candle_adamax::{
    Clip, EpsMode, Gradient, GroupLr, LossScale, NormType, ParamsAdamax, Snapshot, StepCount, WeightDecay,
};
use candle_core::{DType, Var};

use super::gradients::Whole;
use super::values;

/// A number, and how far from it one may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Bound {
    /// Whether `got` is near enough. What is not finite has to be the same; a NaN error allows everything.
    pub(crate) fn allows(self, got: f64) -> bool {
        if self.error.is_nan() {
            return true;
        }
        got == self.value || (got.is_nan() && self.value.is_nan()) || (got - self.value).abs() <= self.error
    }
}

/// What one variable and its state should be after the call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    pub(crate) w: Vec<Bound>,
    pub(crate) m: Vec<Bound>,
    pub(crate) u: Vec<Bound>,
    pub(crate) ema: Option<Vec<Bound>>,
    pub(crate) accumulated: Option<Vec<Bound>>,
    /// The rows that gradients were accumulated for, if not for all.
    pub(crate) accumulated_rows: Option<BTreeSet<usize>>,
    pub(crate) step: u64,
}

/// What the call should leave behind.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) vars: BTreeMap<String, Expected>,
    pub(crate) total_norm: Option<Bound>,
    pub(crate) updated: bool,
}

/// Half a place of `dtype` at `x`, and the smallest number of the arithmetic's type.
fn rounding(dtype: DType, x: f64) -> f64 {
    let (bits, smallest) = match dtype {
        DType::F16 => (11, -24),
        DType::BF16 => (8, -133),
        DType::F32 => (24, -149),
        _ => (53, -1074),
    };
    if x == 0.0 || !x.is_finite() {
        return 0.0;
    }
    let exponent = x.abs().log2().floor() as i32;
    2f64.powi((exponent - bits).max(smallest - 1))
}

/// The largest number of `dtype`.
pub(crate) fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f64(),
        DType::BF16 => half::bf16::MAX.to_f64(),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}

/// The norm of several tensors together. NaN if one element is NaN.
pub(crate) fn norm(grads: &[&[f64]], norm_type: NormType) -> f64 {
    let all = || grads.iter().flat_map(|grad| grad.iter());
    match norm_type {
        NormType::L1 => sum(all().map(|g| g.abs())),
        NormType::L2 => {
            // In units of the largest one, a power of two, whose squares are in range.
            let largest = norm(grads, NormType::Inf);
            if largest == 0.0 || !largest.is_finite() {
                return largest;
            }
            let unit = f64::from_bits(largest.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE);
            sum(all().map(|g| (g / unit) * (g / unit))).sqrt() * unit
        }
        NormType::Inf => all().fold(0.0, |a: f64, g| if a.is_nan() || g.is_nan() { f64::NAN } else { a.max(g.abs()) }),
        _ => unreachable!("no other one is made here"),
    }
}

/// A sum whose rounding does not grow with the number of its terms (Kahan, Neumaier).
fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0);
    for x in terms {
        let next = sum + x;
        lost += if sum.abs() >= x.abs() { (sum - next) + x } else { (x - next) + sum };
        sum = next;
    }
    if sum.is_finite() { sum + lost } else { sum }
}

/// One clipped gradient: what `params.clip` makes of `g`, of a variable with the norm `own`.
pub(crate) fn clipped(params: &ParamsAdamax, g: f64, own: f64, total: f64) -> f64 {
    match params.clip {
        None => g,
        Some(Clip::Value(_)) if g.is_nan() => g,
        Some(Clip::Value(c)) => g.max(-c).min(c),
        Some(Clip::Norm(c)) if own <= c => g,
        Some(Clip::Norm(c)) => g * (c / own),
        Some(Clip::GlobalNorm(_)) if !total.is_finite() => f64::NAN,
        Some(Clip::GlobalNorm(c)) if total <= c => g,
        Some(Clip::GlobalNorm(c)) => g * (c / total),
        Some(Clip::GradNorm { max_norm, .. }) if max_norm / (total + 1e-6) > 1.0 => g,
        Some(Clip::GradNorm { max_norm, .. }) => g * (max_norm / (total + 1e-6)),
        Some(clip) => panic!("no formula for {clip:?}"),
    }
}

/// Whether whole components of `name` are `part`, which has no `*`.
pub(crate) fn is_part(part: &str, name: &str) -> bool {
    format!(".{name}.").contains(&format!(".{part}."))
}

/// The norm that the settings clip by.
pub(crate) fn norm_of_clip(params: &ParamsAdamax) -> Option<NormType> {
    match params.clip? {
        Clip::Norm(_) | Clip::GlobalNorm(_) => Some(NormType::L2),
        Clip::GradNorm { norm_type, .. } => Some(norm_type),
        _ => None,
    }
}

/// One call of `step`, from the state in `before`. Rows without a gradient keep their weights and their state.
///
/// `norm_error` is the relative error that a norm may have (candle sums f32 in f32).
pub(crate) fn call<'g, G>(
    before: &Snapshot,
    weights: &BTreeMap<String, Var>,
    grads: &'g BTreeMap<String, G>,
    norm_error: f64,
) -> Call
where
    &'g G: Into<Gradient<'g>>,
{
    let Snapshot { params, groups, counters, vars, .. } = before;
    let lr = params.lr.at(counters.calls).unwrap();
    let unscale = match params.loss_scale {
        LossScale::Static(scale) => 1.0 / scale,
        _ => 1.0,
    };
    let steps = params.gradient_accumulation_steps;
    // A call without any gradient is none: it does nothing.
    let counts = !grads.is_empty();
    let updated = counts && counters.pending + 1 == steps;

    // Unscale and accumulate.
    let mut mean: BTreeMap<&str, Whole> = BTreeMap::new();
    let mut expected: BTreeMap<String, Expected> = BTreeMap::new();
    for (name, state) in vars {
        let eps = epsilon_of(weights[name].dtype());
        let shape = weights[name].dims();
        let grad = grads.get(name).map(|grad| Whole::of(grad, shape).scaled(unscale));
        let sum = state.accumulated.as_ref().map(|(sum, _)| Whole::accumulated(sum, shape));
        let entry = expected.entry(name.clone()).or_default();
        let mut sum = match (grad, sum) {
            (Some(grad), Some(sum)) => grad.plus(&sum),
            (Some(sum), None) | (None, Some(sum)) => sum,
            (None, None) => continue,
        };
        // The bounds below have room for the rounding of some terms; that of more grows with their number.
        let many = ((sum.terms + 4) as f64 / 8.0).max(1.0);
        sum.size.iter_mut().for_each(|size| *size *= many);
        if updated {
            mean.insert(name, sum.scaled(1.0 / steps as f64));
        } else {
            let of = |(&value, &size): (&f64, &f64)| Bound { value, error: 4.0 * eps * size + 1e-44 };
            entry.accumulated = Some(sum.g.iter().zip(&sum.size).map(of).collect());
            entry.accumulated_rows = sum.rows;
        }
    }

    // Norms.
    let norm_type = norm_of_clip(params);
    let all: Vec<&[f64]> = mean.values().map(|mean| mean.g.as_slice()).collect();
    let total = norm(&all, norm_type.unwrap_or_default());
    // A norm of sums knows them as well only as they were rounded, each in the arithmetic of its own variable.
    let error_of_norm = |names: &[&str]| {
        if steps == 1 && names.iter().all(|name| mean[name].rows.is_none()) {
            return norm_error;
        }
        let rounding = |name: &&str| {
            let dtype = weights[*name].dtype();
            mean[name].size.iter().map(|size| epsilon_of(dtype) * size + tiny_of(dtype)).collect::<Vec<f64>>()
        };
        let grads: Vec<&[f64]> = names.iter().map(|name| mean[name].g.as_slice()).collect();
        let roundings: Vec<Vec<f64>> = names.iter().map(rounding).collect();
        let roundings: Vec<&[f64]> = roundings.iter().map(Vec::as_slice).collect();
        let of = |rows: &[&[f64]]| norm(rows, norm_type.unwrap_or_default());
        let norm = of(&grads);
        norm_error + if norm == 0.0 { 0.0 } else { 4.0 * of(&roundings) / norm }
    };
    let error_of_total =
        if norm_type.is_some() { error_of_norm(&mean.keys().copied().collect::<Vec<_>>()) } else { 0.0 };

    for (name, state) in vars {
        let var = &weights[name];
        let dtype = var.dtype();
        let eps = epsilon_of(dtype);
        let tiny = tiny_of(dtype);
        let group = groups.iter().find(|group| group.name == state.group).unwrap();
        let lr = match &group.lr {
            GroupLr::Inherit => lr,
            GroupLr::Factor(factor) => lr * factor,
            GroupLr::Own(own) => own.at(counters.calls).unwrap(),
            _ => unreachable!("no other one is made here"),
        };
        let (beta1, beta2) = (group.beta1.unwrap_or(params.beta1), group.beta2.unwrap_or(params.beta2));
        let epsilon = group.eps.unwrap_or(params.eps);
        let (inside, outside) = match params.eps_mode {
            EpsMode::InsideMax => (epsilon, 0.0),
            EpsMode::AddToNorm => (0.0, epsilon),
            _ => unreachable!("no other one is made here"),
        };
        let spared = params.no_decay.iter().any(|part| is_part(part, name));
        let (l2, decoupled) = match group.weight_decay.unwrap_or(params.weight_decay) {
            _ if spared => (0.0, 0.0),
            WeightDecay::None => (0.0, 0.0),
            WeightDecay::L2(lambda) => (lambda, 0.0),
            WeightDecay::Decoupled(lambda) => (0.0, lambda),
            _ => unreachable!("no other one is made here"),
        };
        let (w, m, u) = (values(var), values(&state.exp_avg), values(&state.exp_inf));
        let entry = expected.entry(name.clone()).or_default();
        entry.step = state.step;
        let exact = |xs: &[f64]| xs.iter().map(|&value| Bound { value, error: 0.0 }).collect::<Vec<_>>();
        let Some(grad) = mean.get(name.as_str()) else {
            (entry.w, entry.m, entry.u) = (exact(&w), exact(&m), exact(&u));
            continue;
        };
        entry.step += 1;
        let t = match params.step_count {
            StepCount::Shared => counters.updates + 1,
            StepCount::PerVar => state.step + 1,
            _ => unreachable!("no other one is made here"),
        };
        let step_size = lr / (1.0 - (0..t).fold(1.0, |power, _| power * beta1));
        let own = norm(&[&grad.g], norm_type.unwrap_or_default());
        let eps_of_g = match norm_type {
            None => eps,
            Some(_) if matches!(params.clip, Some(Clip::Norm(_))) => eps + error_of_norm(&[name.as_str()]),
            Some(_) => eps + error_of_total,
        };
        for i in 0..w.len() {
            if !grad.touches(i, var.dims()) {
                entry.w.push(Bound { value: w[i], error: 0.0 });
                entry.m.push(Bound { value: m[i], error: 0.0 });
                entry.u.push(Bound { value: u[i], error: 0.0 });
                continue;
            }
            let mut g = clipped(params, grad.g[i], own, total);
            // How much of the gradient's size the clip has left.
            let kept = if grad.g[i] == 0.0 { 1.0 } else { (g / grad.g[i]).abs() };
            if params.maximize {
                g = -g;
            }
            if l2 != 0.0 {
                g += l2 * w[i];
            }
            let size = grad.size[i] * kept + l2 * w[i].abs();
            let new_m = beta1 * m[i] + (1.0 - beta1) * g;
            let m_error = 8.0 * (eps * beta1 * m[i].abs() + eps_of_g * (1.0 - beta1) * size) + tiny;
            let seen = g.abs() + inside;
            let decayed = beta2 * u[i];
            let new_u = if decayed.is_nan() || seen.is_nan() { f64::NAN } else { decayed.max(seen) };
            let u_error = 8.0 * (eps * new_u + eps_of_g * size) + tiny;
            let denominator = new_u + outside;
            let ratio = if denominator == 0.0 { 0.0 } else { new_m / denominator };
            let kept_w = if decoupled * lr == 0.0 { w[i] } else { w[i] - decoupled * lr * w[i] };
            let new_w = kept_w - step_size * ratio;
            let w_error = if u_error >= 0.5 * denominator {
                // Nothing is known of a quotient of two numbers that are all rounding.
                f64::NAN
            } else {
                let ratio_error = (m_error + ratio.abs() * u_error) / denominator + 8.0 * eps * ratio.abs();
                8.0 * eps * w[i].abs() * (1.0 + decoupled * lr) + 2.0 * step_size * ratio_error + tiny
            };
            let w_error = if step_size == 0.0 && !new_w.is_nan() { 8.0 * eps * w[i].abs() } else { w_error };
            entry.w.push(rounded(Bound { value: new_w, error: w_error }, dtype));
            entry.m.push(overflowing(Bound { value: new_m, error: m_error }, accumulator(dtype)));
            entry.u.push(overflowing(Bound { value: new_u, error: u_error }, accumulator(dtype)));
        }
    }

    // Averages: of the weights as they are stored.
    if let Some(average) = params.ema {
        for (name, state) in vars {
            let dtype = weights[name].dtype();
            let eps = epsilon_of(dtype);
            let entry = expected.get_mut(name).unwrap();
            let old = state.ema.as_ref().map(values);
            if !counts {
                entry.ema = old.map(|old| old.into_iter().map(|value| Bound { value, error: 0.0 }).collect());
                continue;
            }
            // An average begins with the first update in which its variable has a gradient.
            if old.is_none() && entry.step == 0 {
                continue;
            }
            // As the arithmetic has it, before `1 - momentum` is made of it, which is what Keras does.
            let momentum = match dtype {
                _ if old.is_none() => 0.0,
                DType::F64 => average.momentum,
                _ => f64::from(average.momentum as f32),
            };
            let of = |(i, w): (usize, &Bound)| {
                let old = old.as_ref().map_or(0.0, |old| old[i]);
                let value = match momentum {
                    0.0 => w.value,
                    1.0 => old,
                    _ => momentum * old + (1.0 - momentum) * w.value,
                };
                let size = momentum * old.abs() + (1.0 - momentum) * w.value.abs();
                Bound { value, error: 4.0 * eps * size + (1.0 - momentum) * w.error + 1e-44 }
            };
            let ema: Vec<Bound> = entry.w.iter().enumerate().map(of).collect();
            if average.overwrite_frequency.is_some_and(|f| (counters.updates + 1).is_multiple_of(f)) {
                entry.w = ema.iter().map(|average| rounded(*average, dtype)).collect();
            }
            entry.ema = Some(ema);
        }
    }
    // Where the squares of an f64 vanish, a norm may be 0.
    let total_norm = Bound { value: total, error: (1e-15 + error_of_total) * total + 1e-150 };
    Call { vars: expected, total_norm: norm_type.filter(|_| updated).map(|_| total_norm), updated }
}

/// Half a place of the type that a variable of `dtype` is computed with, relative.
fn epsilon_of(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}

/// Two of the smallest numbers of that type: what is rounded may be subnormal.
fn tiny_of(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-323,
        _ => 3e-45,
    }
}

fn accumulator(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// What a number becomes in this type.
fn rounded(bound: Bound, dtype: DType) -> Bound {
    // At the largest number that it may be, where places may be wider.
    let error = bound.error + rounding(dtype, bound.value.abs() + bound.error);
    overflowing(Bound { error, ..bound }, dtype)
}

/// What is nearer to the next power of two than to the largest number of a type is infinity; where the error leaves open
/// whether it is, it may be.
fn overflowing(bound: Bound, dtype: DType) -> Bound {
    let (size, end) = (bound.value.abs(), largest(dtype) + rounding(dtype, largest(dtype)));
    if !size.is_finite() || bound.error.is_nan() || size + bound.error < end {
        bound
    } else if size - bound.error >= end {
        Bound { value: f64::INFINITY.copysign(bound.value), error: 0.0 }
    } else {
        Bound { error: f64::INFINITY, ..bound }
    }
}

impl Call {
    /// The first thing in which the optimizer's state after the call differs, in words.
    pub(crate) fn mismatch(&self, after: &Snapshot, weights: &BTreeMap<String, Var>) -> Option<String> {
        for (name, expected) in &self.vars {
            let state = &after.vars[name];
            if state.step != expected.step {
                return Some(format!("{name}.step: expected {}, got {}", expected.step, state.step));
            }
            let mut pairs = vec![
                ("m", &expected.m, values(&state.exp_avg)),
                ("u", &expected.u, values(&state.exp_inf)),
                ("w", &expected.w, values(&weights[name])),
            ];
            match (&expected.ema, &state.ema) {
                (Some(expected), Some(ema)) => pairs.push(("ema", expected, values(ema))),
                (None, None) => {}
                _ => return Some(format!("{name}.ema: expected {:?}, got {:?}", expected.ema, state.ema)),
            }
            match (&expected.accumulated, &state.accumulated) {
                (Some(bounds), Some((sum, _))) => {
                    let sum = Whole::accumulated(sum, weights[name].dims());
                    if sum.rows != expected.accumulated_rows {
                        let (rows, got) = (&expected.accumulated_rows, sum.rows);
                        return Some(format!("{name}.accumulated: expected the rows {rows:?}, got {got:?}"));
                    }
                    pairs.push(("accumulated", bounds, sum.g));
                }
                (None, None) => {}
                _ => {
                    return Some(format!("{name}.accumulated: expected {:?}, got {:?}", expected.accumulated, state));
                }
            }
            for (what, bounds, got) in pairs {
                if bounds.len() != got.len() {
                    return Some(format!("{name}.{what}: expected {} elements, got {}", bounds.len(), got.len()));
                }
                if let Some(i) = (0..got.len()).find(|&i| !bounds[i].allows(got[i])) {
                    let Bound { value, error } = bounds[i];
                    return Some(format!("{name}.{what}[{i}]: expected {value:e} +- {error:e}, got {:e}", got[i]));
                }
            }
        }
        None
    }
}
