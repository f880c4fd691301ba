//! Models, gradients and comparisons for the tests of checkpoints. Everything is a function of names and counts, so
//! that two runs have the same bits.

use anyhow::Result;
use candle_adamax::{Adamax, Counters, GradScalerState, ParamGroup, ParamsAdamax, Plateau, Snapshot};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;

pub(crate) const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

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
        let var = |(name, dims): &(&str, &[usize])| {
            Ok((name.to_string(), Var::from_tensor(&numbers(name, 0, dims, dtype)?)?))
        };
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
                grads.insert(var, numbers(name, call + 1, var.dims(), var.dtype())?);
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
    pub(crate) fn bits(&self) -> Result<Vec<(String, Vec<u64>)>> {
        let mut bits = self.0.iter().map(|(name, var)| Ok((name.clone(), bits(var)?))).collect::<Result<Vec<_>>>()?;
        bits.sort();
        Ok(bits)
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
fn numbers(name: &str, call: u64, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let seed = name.bytes().fold(call.wrapping_mul(7919), |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let count: usize = dims.iter().product();
    let values = (0..count as u64).map(|i| {
        let bits = seed.wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        (bits as f64 / f64::from(1 << 23) - 1.0) * 0.7
    });
    Ok(Tensor::from_vec(values.collect::<Vec<_>>(), dims, &Device::Cpu)?.to_dtype(dtype)?)
}

/// The bits of every element.
pub(crate) fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        // f16 and bf16 are exact in f32.
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits().into()).collect(),
    })
}

/// All state of an optimizer in a form that compares: settings as JSON, tensors as dtype, dimensions and bits.
#[derive(Debug, PartialEq)]
pub(crate) struct Fingerprint {
    params: String,
    groups: String,
    counters: Counters,
    grad_scaler: Option<GradScalerState>,
    plateau: Option<Plateau>,
    vars: Vec<(String, String, u64, u64, Vec<Numbers>)>,
}

type Numbers = (&'static str, DType, Vec<usize>, Vec<u64>);

pub(crate) fn fingerprint(optimizer: &Adamax) -> Result<Fingerprint> {
    fingerprint_of(&optimizer.snapshot()?)
}

pub(crate) fn fingerprint_of(snapshot: &Snapshot) -> Result<Fingerprint> {
    let Snapshot { params, groups, counters, grad_scaler, plateau, vars } = snapshot;
    let numbers = |what, tensor: &Tensor| Ok((what, tensor.dtype(), tensor.dims().to_vec(), bits(tensor)?));
    let vars = vars.iter().map(|(name, var)| {
        let accumulated = var.accumulated.as_ref();
        let tensors = [
            ("exp_avg", Some(&var.exp_avg)),
            ("exp_inf", Some(&var.exp_inf)),
            ("ema", var.ema.as_ref()),
            ("accumulated", accumulated.and_then(|(sum, _)| sum.dense())),
        ];
        let tensors = tensors.into_iter().filter_map(|(what, tensor)| Some(numbers(what, tensor?)));
        let calls = accumulated.map_or(0, |(_, calls)| *calls);
        Ok((name.clone(), var.group.clone(), var.step, calls, tensors.collect::<Result<_>>()?))
    });
    Ok(Fingerprint {
        params: serde_json::to_string(params)?,
        groups: serde_json::to_string(groups)?,
        counters: *counters,
        grad_scaler: *grad_scaler,
        plateau: *plateau,
        vars: vars.collect::<Result<_>>()?,
    })
}
