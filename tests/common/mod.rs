//! What several test files share: tensors in and out of `f64`, bits to compare, and the formulas once more.
#![allow(dead_code, unused_imports, reason = "every test program compiles its own copy and uses a part of it")]

mod fingerprint;
pub(crate) mod folder;
pub(crate) mod formulas;
pub(crate) mod gradients;
pub(crate) mod parts;
pub(crate) mod process;
pub(crate) mod property;
mod random;

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use candle_adamax::Kernel;
use candle_core::{DType, Device, Tensor, Var};
use rayon::{ThreadPool, ThreadPoolBuilder};

pub(crate) use fingerprint::Fingerprint;
pub(crate) use random::{Random, noise, shuffled};

/// The dtypes that variables may have.
pub(crate) const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// The ways in which a step is computed.
pub(crate) const KERNELS: [Kernel; 2] = [Kernel::Auto, Kernel::Portable];

/// The dtypes that ids may have.
pub(crate) const ID_DTYPES: [DType; 5] = [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64];

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

/// A list of ids.
#[track_caller]
pub(crate) fn ids(of: &[u32]) -> Tensor {
    Tensor::from_slice(of, of.len(), &Device::Cpu).unwrap()
}

/// A pool of so many threads.
pub(crate) fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// The path of what other frameworks have recorded.
pub(crate) fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}
