//! What several test files share: tensors in and out of `f64`, bits to compare, and the formulas once more.
#![allow(dead_code, reason = "every test file compiles its own copy and uses a part of it")]

pub(crate) mod folder;
pub(crate) mod formulas;
pub(crate) mod gradients;
pub(crate) mod process;

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_adamax::{AccumulatedGrad, Adamax, Snapshot, SparseGrad};
use candle_core::{DType, Device, Tensor, Var};

/// The dtypes that variables may have.
pub(crate) const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

thread_local! {
    static DEVICE: RefCell<Device> = const { RefCell::new(Device::Cpu) };
}

/// Where this thread's tensors are made.
pub(crate) fn device() -> Device {
    DEVICE.with_borrow(Device::clone)
}

/// Runs a test with its tensors made on a device.
pub(crate) fn on<R>(device: &Device, test: impl FnOnce() -> R) -> R {
    let before = DEVICE.replace(device.clone());
    let result = test();
    DEVICE.set(before);
    result
}

/// A tensor of `values`, each rounded once to `dtype`.
#[track_caller]
pub(crate) fn tensor(values: &[f64], shape: &[usize], dtype: DType) -> Tensor {
    let cpu = &Device::Cpu;
    // Through f32 a half would be rounded twice.
    match dtype {
        DType::F16 => Tensor::from_vec(values.iter().map(|&x| half::f16::from_f64(x)).collect(), shape, cpu),
        DType::BF16 => Tensor::from_vec(values.iter().map(|&x| half::bf16::from_f64(x)).collect(), shape, cpu),
        _ => Tensor::from_slice(values, shape, cpu).and_then(|tensor| tensor.to_dtype(dtype)),
    }
    .and_then(|tensor| tensor.to_device(&device()))
    .unwrap()
}

/// A variable of `values`.
#[track_caller]
pub(crate) fn var(values: &[f64], shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&tensor(values, shape, dtype)).unwrap()
}

/// The elements of a tensor, widened without rounding.
#[track_caller]
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The elements of a tensor as bits; every NaN is the same, since its payload is not promised.
#[track_caller]
pub(crate) fn bits(tensor: &Tensor) -> Vec<u64> {
    let canonical = |x: f64| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() };
    values(tensor).into_iter().map(canonical).collect()
}

/// Everything that a call of `step` may change: the bits of each variable and of its state, and the counters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fingerprint(BTreeMap<String, Vec<Vec<u64>>>, String);

impl Fingerprint {
    #[track_caller]
    pub(crate) fn of(optimizer: &Adamax, vars: &[(String, Var)]) -> Self {
        let Snapshot { params, groups, counters, grad_scaler, plateau, vars: states } = optimizer.snapshot().unwrap();
        let of_var = |(name, var): &(String, Var)| {
            let state = &states[name];
            let mut all = vec![bits(var), bits(&state.exp_avg), bits(&state.exp_inf), vec![state.step]];
            all.push(state.ema.as_ref().map(bits).unwrap_or_default());
            all.extend(state.accumulated.iter().flat_map(|(sum, calls)| {
                let tensors = match sum {
                    AccumulatedGrad::Dense(sum) => vec![sum],
                    AccumulatedGrad::Rows(SparseGrad { indices, values }) => vec![indices, values],
                };
                tensors.into_iter().map(bits).chain([vec![*calls]]).collect::<Vec<_>>()
            }));
            (name.clone(), all)
        };
        Self(
            vars.iter().map(of_var).collect(),
            format!("{params:?} {groups:?} {counters:?} {grad_scaler:?} {plateau:?}"),
        )
    }

    /// The bits alone, for optimizers whose settings differ.
    pub(crate) fn bits(&self) -> &BTreeMap<String, Vec<Vec<u64>>> {
        &self.0
    }
}

/// Numbers from -1 to 1 that look random and are the same everywhere.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as i64 as f64 / 2f64.powi(63)
    };
    (0..n).map(|_| next()).collect()
}
