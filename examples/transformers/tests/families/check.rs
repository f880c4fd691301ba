//! The checks of a family.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

/// A loss of one batch, computed anew at each call.
pub(crate) type Loss = Box<dyn FnMut() -> Result<Tensor>>;

/// A model with a loss, and what is known of it.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// The type of the weights. With f64 the model computes in f64 throughout.
    pub(crate) dtype: DType,
    pub(crate) load: fn(VarBuilder<'static>) -> Result<Loss>,
    /// Ends of names, and rows of these variables that the batch does not use: their gradient is 0.
    pub(crate) unused: &'static [(&'static str, &'static [Range<usize>])],
    /// Ends of names of biases that cancel: a number that is added to all scores of a softmax. Their gradient is 0 but
    /// for rounding.
    pub(crate) cancelled: &'static [&'static str],
    /// Ends of names of variables that get no gradient, since the model reads values out of the graph. The gradients of
    /// what is before them lack a part, too, so that they are not compared with differences.
    pub(crate) cut: &'static [&'static str],
}

/// The family checked: the state of every gradient, gradients against finite differences, and training.
pub(crate) fn check(family: &Family) -> Result<()> {
    let varmap = VarMap::new();
    let builder = || VarBuilder::from_varmap(&varmap, family.dtype, &Device::Cpu);
    // The first load creates the variables. The second reads their values, where a model derives others from them.
    drop((family.load)(builder())?);
    let vars = variables(&varmap);
    randomize(&vars)?;
    let mut loss = (family.load)(builder())?;
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax { lr: 0.003.into(), ..Default::default() })?;
    let grads = loss()?.backward()?;
    let with_gradient = vars.values().filter(|var| grads.get(var.as_tensor()).is_some()).count();
    println!("{} | {} variables | {with_gradient} with a gradient", family.name, vars.len());

    every_gradient(family, &vars, &grads, &optimizer)?;
    if family.cut.is_empty() {
        finite_differences(family, &vars, &grads, &mut loss)?;
    }
    training(family, &mut optimizer, &mut loss)
}

/// The variables in the order of their names.
fn variables(varmap: &VarMap) -> BTreeMap<String, Var> {
    let vars = varmap.data().lock().unwrap();
    vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// Numbers that look random, the same in each run.
struct Random(u64);

impl Random {
    /// A number between 0 and 1, by the generator splitmix64.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number of the standard normal distribution, by the method of Box and Muller.
    fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Weights that are like those of a trained model, so that no gradient is zero because of how a run begins: biases are
/// not 0, scales not 1, and results neither vanish nor grow.
fn randomize(vars: &BTreeMap<String, Var>) -> Result<()> {
    let mut random = Random(0);
    for (name, var) in vars {
        let fan_in: usize = var.dims().iter().skip(1).product();
        let (mean, deviation) = match var.rank() {
            1 if name.to_lowercase().contains("norm") && name.ends_with("weight") => (1.0, 0.2),
            1 => (0.0, 0.2),
            _ => (0.0, (fan_in as f64).sqrt().recip()),
        };
        let values: Vec<_> = (0..var.elem_count()).map(|_| mean + deviation * random.normal()).collect();
        set(var, &values)?;
    }
    Ok(())
}

fn set(var: &Var, values: &[f64]) -> Result<()> {
    Ok(var.set(&Tensor::from_slice(values, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Every variable has a gradient, but for those that are cut, and no row of one is zero, but for those that are unused.
fn every_gradient(family: &Family, vars: &BTreeMap<String, Var>, grads: &GradStore, optimizer: &Adamax) -> Result<()> {
    let is_one_of = |name: &str, ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let audit = optimizer.audit(grads)?;
    let cut: Vec<_> = vars.keys().filter(|name| is_one_of(name, family.cut)).collect();
    ensure!(audit.missing().eq(cut), "{}: {audit}", family.name);
    ensure!(audit.zero().all(|name| is_one_of(name, family.cancelled)), "{}: {audit}", family.name);
    let zero = audit.zero_slices().filter(|(name, _)| !is_one_of(name, family.cancelled));
    let unused = vars.keys().filter_map(|name| {
        let (_, rows) = family.unused.iter().find(|(end, _)| name.ends_with(end))?;
        Some((name.as_str(), *rows))
    });
    ensure!(zero.eq(unused), "{}: {audit}", family.name);
    for (name, var) in vars.iter().filter(|(name, _)| is_one_of(name, family.cancelled)) {
        let grad = values(grads.get(var.as_tensor()).context("no gradient")?)?;
        ensure!(largest(&grad) < 1e-6, "{}: the gradient of {name} does not cancel", family.name);
    }
    Ok(())
}

/// Gradients against differences of the loss: along the gradient of each variable, which all of its elements take part
/// in, and along single elements.
fn finite_differences(family: &Family, vars: &BTreeMap<String, Var>, grads: &GradStore, loss: &mut Loss) -> Result<()> {
    let mut random = Random(1);
    let limits = Limits::of(family.dtype);
    for (name, var) in vars {
        let Some(grad) = grads.get(var.as_tensor()) else { continue };
        let (grad, before) = (values(grad)?, values(var.as_tensor())?);
        let size = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        let top = (0..grad.len()).max_by(|&i, &j| grad[i].abs().total_cmp(&grad[j].abs())).context("no element")?;
        let other = (random.uniform() * grad.len() as f64) as usize;
        let unit = |at: usize| (0..grad.len()).map(|i| f64::from(u8::from(i == at))).collect::<Vec<_>>();
        let along_gradient: Vec<_> = grad.iter().map(|g| g / size.max(f64::MIN_POSITIVE)).collect();
        for (what, direction) in [("the gradient", along_gradient), ("the top", unit(top)), ("another", unit(other))] {
            let expected: f64 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let mut at = |t: f64| {
                let moved: Vec<_> = before.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
                set(var, &moved)?;
                Ok::<_, anyhow::Error>(loss()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
            };
            let h = limits.step;
            let central = (at(h)? - at(-h)?) / (2.0 * h);
            // Where rounding asks for a long step, a second one removes the error in the square of the step.
            let difference = match family.dtype {
                DType::F64 => central,
                _ => (4.0 * central - (at(2.0 * h)? - at(-2.0 * h)?) / (4.0 * h)) / 3.0,
            };
            let error = (difference - expected).abs();
            // An element is a sum of numbers that may be larger than itself.
            ensure!(
                error <= limits.relative * expected.abs().max(grad[top].abs()) + limits.absolute,
                "{}: {name} along {what}: gradient {expected:e}, difference {difference:e}",
                family.name
            );
        }
        set(var, &before)?;
    }
    Ok(())
}

/// How far gradients and differences may be apart.
struct Limits {
    step: f64,
    relative: f64,
    absolute: f64,
}

impl Limits {
    fn of(dtype: DType) -> Self {
        match dtype {
            // candle's own derivatives of the GELU have constants of six digits.
            DType::F64 => Self { step: 1e-5, relative: 1e-5, absolute: 1e-8 },
            // A loss of about 3 is known to 3 * 2^-24 times a few roundings, and the difference divides this by the step.
            _ => Self { step: 0.005, relative: 0.01, absolute: 1e-4 },
        }
    }
}

/// Twenty steps of Adamax lower the loss.
fn training(family: &Family, optimizer: &mut Adamax, loss: &mut Loss) -> Result<()> {
    let first = loss()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    for _ in 0..20 {
        optimizer.backward_step(&loss()?)?;
    }
    let last = loss()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    println!("{} | loss {first:.4} before, {last:.4} after 20 steps | {}", family.name, optimizer.report());
    ensure!(last < 0.9 * first, "{}: the loss went from {first} to {last}", family.name);
    Ok(())
}
