//! Models, gradients and comparisons for the tests of checkpoints. Everything is a function of names and counts, so
//! that two runs have the same bits.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use crate::common::{bits, noise, tensor};

/// Names and shapes: with dots, with what looks like a key of the format, not ASCII, a scalar, and nothing in it.
const VARS: [(&str, &[usize]); 6] = [
    ("encoder.layers.0.fc1.weight", &[3, 5]),
    ("encoder.layers.0.fc1.weight.exp_avg", &[7]),
    ("empty", &[0, 3]),
    ("scalar", &[]),
    ("größe \"β\"", &[2, 1, 2]),
    ("large", &[41, 33]),
];

/// Named variables of one dtype.
#[derive(Clone)]
pub(crate) struct Model(pub(crate) Vec<(String, Var)>);

impl Model {
    /// The variables of [`VARS`].
    pub(crate) fn new(dtype: DType) -> Result<Self> {
        let var =
            |(name, dims): &(&str, &[usize])| Ok((name.to_string(), Var::from_tensor(&numbers(name, 0, dims, dtype))?));
        Ok(Self(VARS.iter().map(var).collect::<Result<_>>()?))
    }

    /// Other variables with the same names and values, in another order: another process has its own.
    pub(crate) fn copy(&self) -> Result<Self> {
        let var = |(name, var): &(String, Var)| Ok((name.clone(), Var::from_tensor(&var.copy()?)?));
        Ok(Self(self.0.iter().rev().map(var).collect::<Result<_>>()?))
    }

    pub(crate) fn optimizer(&self, params: ParamsAdamax) -> Result<Adamax> {
        Ok(Adamax::from_named(self.0.clone(), params)?)
    }

    /// Two groups beside the one for the rest.
    pub(crate) fn grouped(&self, params: ParamsAdamax) -> Result<Adamax> {
        let group = |part: &str| self.0.iter().filter(|(name, _)| group_of(name) == part).cloned().collect::<Vec<_>>();
        let groups = [
            ParamGroup::new("fc").vars(group("fc")).lr_factor(0.5).beta1(0.8),
            ParamGroup::new("large").vars(group("large")).lr(0.03),
            ParamGroup::new("default").vars(group("default")),
        ];
        Ok(Adamax::from_groups(groups, params)?)
    }

    /// Gradients for call `call`: now and then a variable has none.
    pub(crate) fn grads(&self, call: u64) -> Result<GradStore> {
        let mut grads = GradStore::default();
        for (name, var) in &self.0 {
            if !(call + name.len() as u64).is_multiple_of(4) {
                grads.insert(var, numbers(name, call + 1, var.dims(), var.dtype()));
            }
        }
        Ok(grads)
    }

    /// Calls `calls` of a run; in call 2 one gradient is not finite, if `nan` is set.
    pub(crate) fn run(&self, optimizer: &mut Adamax, calls: std::ops::Range<u64>, nan: bool) -> Result<()> {
        for call in calls {
            let mut grads = self.grads(call)?;
            if nan && call == 2 {
                let (_, var) = &self.0[0];
                grads.insert(var, (var.zeros_like()? + f64::NAN)?);
            }
            optimizer.step(&grads)?;
        }
        Ok(())
    }

    /// The bits of all variables, by name.
    pub(crate) fn bits(&self) -> BTreeMap<&str, Vec<u64>> {
        self.0.iter().map(|(name, var)| (name.as_str(), bits(var))).collect()
    }
}

fn group_of(name: &str) -> &'static str {
    match name {
        "large" => "large",
        name if name.contains("fc1") => "fc",
        _ => "default",
    }
}

/// Numbers of both signs that depend on all arguments.
fn numbers(name: &str, call: u64, dims: &[usize], dtype: DType) -> Tensor {
    let seed = name.bytes().fold(call.wrapping_mul(7919), |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let values: Vec<f64> = noise(seed, dims.iter().product()).into_iter().map(|x| 0.7 * x).collect();
    tensor(&values, dims, dtype)
}
