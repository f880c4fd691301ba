//! The kernels of `cuda/`, compiled for the host and compared with the CPU's, bit for bit.
//!
//! A C++ compiler makes a library of them, in which the threads of a block are fibers (`tests/cuda/host.h`); it is given the
//! structures and the plans that a GPU would be given, with addresses of host memory. So everything is compared here but
//! what only a GPU has: its compiler, its arithmetic units, and blocks that run at the same time.

mod exact;
mod norms;
mod pool;
mod rows;
mod sort;
mod updates;

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use bytemuck::Pod;
use candle_core::{DType, Device, Result, Tensor, Var};
use half::{bf16, f16};
use libloading::{Library, Symbol};

use super::abi::{self, Address};
use crate::codec::{Encoding, StateDType};
use crate::kernel::UpdateArgs;
use crate::ledger::{Record, Terms};
use crate::rounding::Rounding;
use crate::rule::{Coefficients, EpsMode, Hyperparameters, WeightDecay};
use crate::state::{ParamState, Units};

/// The library, compiled once for all tests.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let out = std::env::temp_dir().join(format!("candle-adamax-kernels-{}.so", std::process::id()));
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let output = Command::new(&compiler)
            // No fused multiply-add, as on the GPU and in Rust.
            .args(["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"])
            // Pragmas that only the GPU's compiler knows, and functions of headers that one kernel needs and another does not.
            .args(["-Wno-unknown-pragmas", "-Wno-unused-function", "-shared", "-fPIC", "-o"])
            .arg(&out)
            .arg(root.join("tests/cuda/host.cpp"))
            .output()
            .unwrap_or_else(|error| panic!("the tests need a C++ compiler; `{compiler}` (or $CXX): {error}"));
        assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
        #[expect(unsafe_code, reason = "a library that was compiled for this test")]
        // SAFETY: the library has no initialization that runs code.
        let library = unsafe { Library::new(&out) };
        // It stays loaded without its file.
        let _ = std::fs::remove_file(&out);
        library.expect("the library that was just compiled")
    })
}

/// Runs a kernel with these arguments, its threads in their order or in the reverse one.
#[expect(unsafe_code, reason = "calls into the library of kernels")]
pub(super) fn launch<A: Pod>(kernel: &str, blocks: usize, args: &A, reversed: bool) {
    type Kernel = unsafe extern "C" fn(*const u8);
    type Launch = unsafe extern "C" fn(Kernel, u32, u32, *const u8, i32) -> i32;
    // The fibers of a run are static.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: `host.cpp` has a function of this type for every kernel.
    let kernel_symbol: std::result::Result<Symbol<'_, Kernel>, _> = unsafe { library().get(kernel.as_bytes()) };
    let kernel_symbol = kernel_symbol.unwrap_or_else(|_| panic!("no kernel {kernel}"));
    // SAFETY: `host.h` has this function, of this type.
    let launch: Symbol<'_, Launch> = unsafe { library().get(b"host_launch") }.expect("host_launch");
    let args = bytemuck::bytes_of(args).as_ptr();
    // SAFETY: the arguments are the kernel's structure, whose size the test `structures_are_laid_out_alike` compares; the
    // addresses in it are those of memory that the caller holds, as the plans that it made say.
    let result = unsafe { launch(*kernel_symbol, blocks as u32, abi::THREADS, args, i32::from(reversed)) };
    assert_eq!(result, 0, "{kernel}: threads wait for each other for ever");
}

/// Memory of an imagined device, at an address that is `offset` bytes above a multiple of 16.
pub(super) struct Memory {
    words: Vec<u128>,
    offset: usize,
    len: usize,
}

impl Memory {
    pub(super) fn of<T: Pod>(values: &[T], offset: usize) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // A word more on each side, which nobody may write.
        let mut words = vec![u128::MAX; (bytes.len() + offset).div_ceil(16) + 2];
        bytemuck::cast_slice_mut::<u128, u8>(&mut words)[16 + offset..][..bytes.len()].copy_from_slice(bytes);
        Self { words, offset, len: bytes.len() }
    }

    pub(super) fn zeros<T: Pod>(n: usize) -> Self {
        Self::of(&vec![T::zeroed(); n], 0)
    }

    pub(super) fn address(&mut self) -> Address {
        self.words.as_mut_ptr().addr() as u64 + 16 + self.offset as u64
    }

    pub(super) fn read<T: Pod>(&self) -> Vec<T> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let (before, rest) = bytes.split_at(16 + self.offset);
        let (own, behind) = rest.split_at(self.len);
        assert!(before.iter().chain(behind).all(|&byte| byte == u8::MAX), "written outside of the memory");
        own.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

/// The elements of a tensor, as they are in memory.
pub(super) fn memory(tensor: &Tensor, offset: usize) -> Result<Memory> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => Memory::of(&flat.to_vec1::<f64>()?, offset),
        DType::F32 => Memory::of(&flat.to_vec1::<f32>()?, offset),
        DType::BF16 => Memory::of(&bits16(&flat.to_vec1::<bf16>()?, bf16::to_bits), offset),
        DType::F16 => Memory::of(&bits16(&flat.to_vec1::<f16>()?, f16::to_bits), offset),
        DType::I16 => Memory::of(&flat.to_vec1::<i16>()?, offset),
        DType::U32 => Memory::of(&flat.to_vec1::<u32>()?, offset),
        DType::U8 => Memory::of(&flat.to_vec1::<u8>()?, offset),
        other => candle_core::bail!("no memory of {other:?}"),
    })
}

fn bits16<T: Copy>(values: &[T], bits: fn(T) -> u16) -> Vec<u16> {
    values.iter().copied().map(bits).collect()
}

/// The same as numbers, or as integers, in which any NaN equals any other.
fn numbers(memory: &Memory, dtype: DType) -> Vec<u64> {
    let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
    match dtype {
        DType::F64 => memory.read::<f64>().into_iter().map(bits).collect(),
        DType::F32 => memory.read::<f32>().into_iter().map(|x| bits(f64::from(x))).collect(),
        DType::BF16 => memory.read::<u16>().into_iter().map(|x| bits(f64::from(bf16::from_bits(x)))).collect(),
        DType::F16 => memory.read::<u16>().into_iter().map(|x| bits(f64::from(f16::from_bits(x)))).collect(),
        DType::I16 | DType::U32 | DType::U8 => memory.read::<u8>().into_iter().map(u64::from).collect(),
        other => panic!("no numbers of {other:?}"),
    }
}

/// Values of all magnitudes, with zeros and denormals, and a NaN and an infinity near the end of long ones; `span` is the
/// range of their exponents.
fn wild(n: usize, seed: u64, span: i32) -> Vec<f64> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) as f64 / f64::from(1u32 << 31) - 0.5
    };
    let mut values: Vec<f64> = (0..n).map(|i| next() * 10f64.powi(i as i32 % (2 * span + 1) - span)).collect();
    if span > 10 {
        for (i, special) in [0.0, -0.0, 1e-42, f64::NAN, f64::NEG_INFINITY].into_iter().enumerate() {
            if n > 10 * (i + 1) {
                values[n - 3 * (i + 1)] = special;
            }
        }
    }
    values
}

fn tensor(shape: &[usize], seed: u64, span: i32, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(wild(shape.iter().product(), seed, span), shape, &Device::Cpu)?.to_dtype(dtype)
}

/// How the parameters of a test are kept and updated.
#[derive(Clone, Copy, Debug)]
struct Keep {
    dtypes: (DType, DType),
    decay: WeightDecay,
    eps_mode: EpsMode,
    clamp: f64,
    state: StateDType,
    rowwise: bool,
    units: Units,
    rounding: Rounding,
    /// Range of the exponents of all values.
    span: i32,
    /// By how many elements parameters and gradients are off a multiple of 16 bytes.
    offset: usize,
    reversed: bool,
}

const PLAIN: Keep = Keep {
    dtypes: (DType::F32, DType::F32),
    decay: WeightDecay::None,
    eps_mode: EpsMode::AddToNorm,
    clamp: f64::INFINITY,
    state: StateDType::F32,
    rowwise: false,
    units: Units::Blocks,
    rounding: Rounding::Nearest,
    span: 2,
    offset: 0,
    reversed: false,
};

/// The arrays of one parameter: parameter, moments, units, master.
fn arrays(var: &Var, state: &ParamState, offset: usize) -> Result<Vec<Option<(Memory, DType)>>> {
    let stored = state.moments.to_stored(var.shape()).map_err(candle_core::Error::from)?;
    let master = state.master.as_ref().map(|master| master.to_tensor(var.shape())).transpose();
    let master = master.map_err(candle_core::Error::from)?;
    let own = |tensor: &Tensor, offset: usize| -> Result<Option<(Memory, DType)>> {
        Ok(Some((memory(tensor, offset)?, tensor.dtype())))
    };
    Ok(vec![
        own(var.as_tensor(), offset * var.dtype().size_in_bytes())?,
        own(&stored.exp_avg, 0)?,
        own(&stored.exp_inf, 0)?,
        stored.scales.as_ref().map_or(Ok(None), |scales| own(scales, 0))?,
        master.as_ref().map_or(Ok(None), |master| own(master, 0))?,
    ])
}

pub(super) fn name(dtype: DType) -> &'static str {
    dtype.as_str()
}

fn kernel_of(keep: &Keep) -> String {
    super::source::update_kernel(keep.dtypes.0, keep.dtypes.1, keep.state, keep.rowwise)
}

fn hyper(keep: &Keep) -> Hyperparameters {
    Hyperparameters { beta1: 0.9, beta2: 0.999, eps: 1e-7, eps_mode: keep.eps_mode, weight_decay: keep.decay }
}

fn update_args(keep: &Keep, t: u64, encoding: Encoding) -> UpdateArgs {
    let coefficients = Coefficients { clamp: keep.clamp, ..Coefficients::of_update(&hyper(keep), 0.01, t) };
    UpdateArgs {
        coefficients,
        encoding,
        shrink: 24_000 * t,
        rounding: keep.rounding,
        key: t.wrapping_mul(0x9e37_79b9_7f4a),
    }
}

const DTYPES: [(DType, DType); 6] = [
    (DType::F64, DType::F64),
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F32),
];
const STATES: [StateDType; 4] = [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8];

#[test]
#[expect(unsafe_code, reason = "calls into the library of kernels")]
fn structures_are_laid_out_alike() {
    let sizes = [
        size_of::<abi::Tensor>(),
        size_of::<abi::Wide>(),
        size_of::<abi::Narrow>(),
        size_of::<abi::UpdateArgs>(),
        size_of::<abi::Chunk>(),
        size_of::<abi::Control>(),
        size_of::<abi::UpdateLaunchArgs>(),
        size_of::<abi::Gradient>(),
        size_of::<abi::LeavesArgs>(),
        size_of::<abi::NormsArgs>(),
        size_of::<abi::JoinArgs>(),
        size_of::<abi::Pair>(),
        size_of::<abi::PairArgs>(),
        size_of::<abi::GatherArgs>(),
        size_of::<abi::IdsArgs>(),
        size_of::<abi::LookupGrad>(),
        size_of::<abi::Sorting>(),
        size_of::<abi::SortArgs>(),
        size_of::<Record>(),
        size_of::<Terms>(),
        size_of::<abi::CatchUpArgs>(),
        size_of::<abi::MarkArgs>(),
        size_of::<abi::PoolArgs>(),
        size_of::<abi::DotArgs>(),
        size_of::<abi::LargestArgs>(),
        size_of::<abi::BagsArgs>(),
    ];
    let mut got = [0u64; 26];
    type Sizes = unsafe extern "C" fn(*mut u64);
    // SAFETY: `host.cpp` has this function, of this type.
    let host_sizes: Symbol<'_, Sizes> = unsafe { library().get(b"host_sizes") }.expect("host_sizes");
    // SAFETY: it writes as many numbers as the array has.
    unsafe { host_sizes(got.as_mut_ptr()) };
    assert_eq!(got.map(|size| size as usize), sizes);
}
