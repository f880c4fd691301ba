//! The kernels of `cuda/`, compiled for the host and compared with the CPU's, bit for bit.
//!
//! A C++ compiler makes a library of them, in which the threads of a block are fibers (`tests/cuda/host.h`); it is given the
//! structures and the plans that a GPU would be given, with addresses of host memory. So everything is compared here but
//! what only a GPU has: its compiler, its arithmetic units, and blocks that run at the same time.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use bytemuck::Pod;
use candle_core::{DType, Device, Result, Tensor, Var};
use half::{bf16, f16};
use libloading::{Library, Symbol};

use super::abi::{self, Address, Control, Gradient, JoinArgs, Late, LeavesArgs, NormsArgs, Pair, PairArgs, UpdateArgs};
use super::plan::{LEAVES, blocks, blocks_of_rows, blocks_of_units, chunks, chunks_of_leaves, units_of_chunk};
use crate::clip::Clip;
use crate::codec::{Encoding, StateDType};
use crate::kernel::{Contribution, Orders, PayTask, RowGrad, RowTask, RowValues, Source, Task, Update, cpu};
use crate::ledger::{Ledger, Record, Terms};
use crate::reduce::{LEAF, NormType};
use crate::rounding::Rounding;
use crate::rule::{Coefficients, Epsilon, Hyperparameters, WeightDecay};
use crate::state::{Layout, ParamState, Place};

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
    epsilon: Epsilon,
    clamp: f64,
    state: StateDType,
    rowwise: bool,
    by_rows: bool,
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
    epsilon: Epsilon::Outside,
    clamp: f64::INFINITY,
    state: StateDType::F32,
    rowwise: false,
    by_rows: false,
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
        stored.units.as_ref().map_or(Ok(None), |units| own(units, 0))?,
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
    Hyperparameters { beta1: 0.9, beta2: 0.999, eps: 1e-7, epsilon: keep.epsilon, weight_decay: keep.decay }
}

fn orders(keep: &Keep, t: u64, encoding: Encoding) -> Orders {
    let coefficients = Coefficients { clamp: keep.clamp, ..Coefficients::of_update(&hyper(keep), 0.01, t) };
    Orders {
        coefficients,
        encoding,
        shrink: 24_000 * t,
        rounding: keep.rounding,
        key: t.wrapping_mul(0x9e37_79b9_7f4a),
    }
}

/// Several updates of tensors of these shapes by both, compared after each.
fn check(shapes: &[Vec<usize>], keep: Keep) -> Result<()> {
    let encoding = Encoding::of(&hyper(&keep));
    let mut vars = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let var = Var::from_tensor(&tensor(shape, i as u64, keep.span, keep.dtypes.0)?)?;
        let layout = Layout::of(&var, keep.state, keep.by_rows, keep.rowwise, encoding);
        let state = ParamState::zeros(&var, Place::Host, &layout, keep.rounding).map_err(candle_core::Error::from)?;
        vars.push((var, state));
    }
    for t in 1..=4u64 {
        let grads =
            shapes.iter().map(|shape| tensor(shape, 99 + t, keep.span, keep.dtypes.1)).collect::<Result<Vec<_>>>()?;
        let orders = orders(&keep, t, encoding);
        let mut devices =
            vars.iter().map(|(var, state)| arrays(var, state, keep.offset)).collect::<Result<Vec<_>>>()?;
        let tasks = vars.iter_mut().zip(&grads).map(|((var, state), grad)| Task {
            place: Place::Host,
            nth: 0,
            lent: Some(var.as_tensor()),
            read: Some(Source::Tensor(grad)),
            kind: Update { orders, state },
        });
        cpu::run(tasks.collect())?;

        let mut grads = grads
            .iter()
            .map(|grad| memory(grad, keep.offset * grad.dtype().size_in_bytes()))
            .collect::<Result<Vec<_>>>()?;
        let tensors: Vec<abi::Tensor> = devices
            .iter_mut()
            .zip(&mut grads)
            .zip(&vars)
            .map(|((arrays, grad), (var, state))| {
                let mut address = |i: usize| arrays[i].as_mut().map_or(0, |(memory, _)| memory.address());
                let unit = state.moments.layout.unit as u64;
                abi::Tensor {
                    param: address(0),
                    grad: grad.address(),
                    exp_avg: address(1),
                    exp_inf: address(2),
                    units: address(3),
                    master: address(4),
                    len: var.elem_count() as u64,
                    unit,
                    chunk: units_of_chunk(unit),
                    ..abi::Tensor::default()
                }
            })
            .collect();
        let chunks = chunks(tensors.iter().map(|t| (t.len.div_ceil(t.unit), t.chunk))).expect("little work");
        let (mut tensors, mut orders) = (Memory::of(&tensors, 0), Memory::of(&[abi::Orders::new(&orders)], 0));
        let blocks = chunks.len();
        let mut chunks = Memory::of(&chunks, 0);
        let args = UpdateArgs {
            tensors: tensors.address(),
            orders: orders.address(),
            chunks: chunks.address(),
            late: Late::default(),
        };
        launch(&kernel_of(&keep), blocks, &args, keep.reversed);

        for ((var, state), got) in vars.iter().zip(&devices) {
            let expected = arrays(var, state, keep.offset)?;
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                if let (Some((got, dtype)), Some((expected, _))) = (got, expected) {
                    let (got, expected) = (numbers(got, *dtype), numbers(expected, *dtype));
                    let first = got.iter().zip(&expected).position(|(a, b)| a != b);
                    assert_eq!(first, None, "{keep:?}, shape {:?}, array {i}, update {t}", var.dims());
                }
            }
        }
    }
    Ok(())
}

fn flat_shapes() -> Vec<Vec<usize>> {
    [0, 1, 7, 8, 9, 15, 31, 33, 255, 256, 257, 1000, 1023, 1024, 1025, 2500, 17_000].map(|n| vec![n]).to_vec()
}

fn row_shapes() -> Vec<Vec<usize>> {
    [[1, 1], [40, 1], [7, 3], [5, 8], [33, 24], [9, 64], [3, 100], [2, 256], [2, 1000], [70, 2]].map(Vec::from).to_vec()
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
        size_of::<abi::Orders>(),
        size_of::<abi::Chunk>(),
        size_of::<Control>(),
        size_of::<Late>(),
        size_of::<UpdateArgs>(),
        size_of::<Gradient>(),
        size_of::<LeavesArgs>(),
        size_of::<NormsArgs>(),
        size_of::<JoinArgs>(),
        size_of::<Pair>(),
        size_of::<PairArgs>(),
        size_of::<abi::GatherArgs>(),
        size_of::<Contribution>(),
        size_of::<abi::Part>(),
        size_of::<abi::SumArgs>(),
        size_of::<Record>(),
        size_of::<Terms>(),
        size_of::<abi::PayArgs>(),
        size_of::<abi::MarkArgs>(),
    ];
    let mut got = [0u64; 22];
    type Sizes = unsafe extern "C" fn(*mut u64);
    // SAFETY: `host.cpp` has this function, of this type.
    let host_sizes: Symbol<'_, Sizes> = unsafe { library().get(b"host_sizes") }.expect("host_sizes");
    // SAFETY: it writes as many numbers as the array has.
    unsafe { host_sizes(got.as_mut_ptr()) };
    assert_eq!(got.map(|size| size as usize), sizes);
}

#[test]
fn updates_have_the_bits_of_the_cpu() -> Result<()> {
    for dtypes in DTYPES {
        for state in STATES {
            let states = if dtypes.0 == DType::F64 && state != StateDType::F32 { continue } else { state };
            for (span, decay) in [
                (2, WeightDecay::None),
                (2, WeightDecay::Decoupled(0.1)),
                (2, WeightDecay::L2(0.1)),
                (41, WeightDecay::None),
                (41, WeightDecay::L2(0.1)),
            ] {
                check(&flat_shapes(), Keep { dtypes, state: states, span, decay, ..PLAIN })?;
            }
        }
    }
    Ok(())
}

#[test]
fn epsilon_clamps_and_roundings_too() -> Result<()> {
    for (dtypes, state) in [(DTYPES[1], StateDType::F32), (DTYPES[3], StateDType::F16), (DTYPES[4], StateDType::Q8)] {
        for span in [3, 41] {
            let keep = Keep { dtypes, state, span, ..PLAIN };
            check(&flat_shapes(), Keep { epsilon: Epsilon::Inside, ..keep })?;
            check(&flat_shapes(), Keep { clamp: 0.25, ..keep })?;
            for rounding in [Rounding::Stochastic, Rounding::Master] {
                check(&flat_shapes(), Keep { rounding, decay: WeightDecay::Decoupled(0.01), ..keep })?;
                check(&row_shapes(), Keep { rounding, rowwise: true, ..keep })?;
            }
        }
    }
    Ok(())
}

#[test]
fn rows_norms_of_rows_and_unaligned_starts_too() -> Result<()> {
    for dtypes in DTYPES {
        for state in STATES {
            let states = if dtypes.0 == DType::F64 && state != StateDType::F32 { continue } else { state };
            for (rowwise, span) in [(false, 2), (true, 2), (true, 41)] {
                let keep = Keep { dtypes, state: states, rowwise, by_rows: !rowwise, span, ..PLAIN };
                check(&row_shapes(), Keep { decay: WeightDecay::L2(0.1), ..keep })?;
                check(&row_shapes(), Keep { offset: 3, ..keep })?;
                check(&row_shapes(), Keep { reversed: true, ..keep })?;
            }
            check(&flat_shapes(), Keep { dtypes, state: states, offset: 1, reversed: true, ..PLAIN })?;
        }
    }
    Ok(())
}

#[test]
fn late_orders_and_skipped_calls() -> Result<()> {
    let encoding = Encoding::of(&hyper(&PLAIN));
    let all: Vec<abi::Orders> = (1..=3).map(|t| abi::Orders::new(&orders(&PLAIN, t, encoding))).collect();
    let run = |control: Control, heard: u64| {
        let (mut w, mut g) = (Memory::of(&[1.0f32, -2.0], 0), Memory::of(&[0.5f32, 0.25], 0));
        let (mut m, mut u) = (Memory::zeros::<f32>(2), Memory::zeros::<f32>(2));
        let tensor = abi::Tensor {
            param: w.address(),
            grad: g.address(),
            exp_avg: m.address(),
            exp_inf: u.address(),
            len: 2,
            unit: 1024,
            chunk: units_of_chunk(1024),
            ..abi::Tensor::default()
        };
        let (mut tensors, mut orders) = (Memory::of(&[tensor], 0), Memory::of(&all, 0));
        let mut chunks = Memory::of(&chunks([(1, 16)]).expect("little work"), 0);
        let mut control = Memory::of(&[control], 0);
        let late = Late { control: control.address(), heard, orders: 1, padding: 0 };
        let args = UpdateArgs { tensors: tensors.address(), orders: orders.address(), chunks: chunks.address(), late };
        launch("update_f32_f32_full", 1, &args, false);
        w.read::<f32>()
    };
    let of = |skipped, skip| Control { skipped, skip, ..Control::default() };
    assert_eq!(run(of(7, 1), 7), [1.0, -2.0]);
    let steps: Vec<f32> = (0..3).map(|late| 1.0 - run(of(5 + late, 0), 5)[0]).collect();
    // m / u is 0.1; the step size is 0.01 / (1 - 0.9^t) with t as many as the orders are late.
    for (step, t) in steps.iter().zip(1..) {
        approx::assert_relative_eq!(f64::from(*step), 1e-3 / (1.0 - 0.9f64.powi(t)), max_relative = 1e-4);
    }
    Ok(())
}

/// The norms of gradients by the kernels, and the orders that they leave.
fn summarize(
    grads: &[Tensor],
    norm: NormType,
    clip: Clip,
    skips: bool,
    reversed: bool,
) -> Result<(Vec<f64>, Control, Vec<f64>)> {
    let dtype = grads.first().map_or(DType::F32, Tensor::dtype);
    let mut values = grads.iter().map(|grad| memory(grad, 0)).collect::<Result<Vec<_>>>()?;
    let (mut gradients, mut first) = (Vec::new(), 0);
    for (values, grad) in values.iter_mut().zip(grads) {
        let len = grad.elem_count() as u64;
        gradients.push(Gradient { values: values.address(), count: 0, len, first });
        first += len.div_ceil(LEAF as u64);
    }
    let chunks = chunks_of_leaves(gradients.iter().map(|g| g.len)).expect("little work");
    let blocks = chunks.len();
    let (mut gradients, mut chunks) = (Memory::of(&gradients, 0), Memory::of(&chunks, 0));
    let (mut leaves, mut folded) = (Memory::zeros::<f64>(first as usize), Memory::zeros::<f64>(first as usize));
    let (mut norms, mut squares) = (Memory::zeros::<f64>(grads.len()), Memory::zeros::<f64>(2 * grads.len()));
    let base = orders(&PLAIN, 1, Encoding::of(&hyper(&PLAIN)));
    let mut all = Memory::of(&vec![abi::Orders::new(&base); grads.len()], 0);
    let mut control = Memory::of(&[Control { skipped: 2, ..Control::default() }], 0);
    let args = LeavesArgs {
        gradients: gradients.address(),
        chunks: chunks.address(),
        leaves: leaves.address(),
        norm: abi::norm(norm),
        chunk_units: LEAVES,
    };
    launch(&format!("summary_leaves_{}", name(dtype)), blocks, &args, reversed);
    let args = NormsArgs {
        gradients: gradients.address(),
        leaves: leaves.address(),
        folded: folded.address(),
        norms: norms.address(),
        unscale: 1.0,
        norm: abi::norm(norm),
        padding: 0,
    };
    launch("summary_norms", grads.len(), &args, reversed);
    let (clip, limit) = abi::clip(clip);
    let args = JoinArgs {
        norms: norms.address(),
        squares: squares.address(),
        orders: all.address(),
        control: control.address(),
        limit,
        n: grads.len() as u32,
        orders_n: grads.len() as u32,
        norm: abi::norm(norm),
        clip,
        skips: u32::from(skips),
        padding: 0,
    };
    launch("summary_join", 1, &args, reversed);
    let scales = all.read::<abi::Orders>();
    for orders in &scales {
        assert!(orders.wide.grad_scale.is_nan() || orders.narrow.grad_scale == orders.wide.grad_scale as f32);
    }
    Ok((norms.read(), control.read()[0], scales.iter().map(|orders| orders.wide.grad_scale).collect()))
}

#[test]
fn norms_and_factors_have_the_bits_of_the_cpu() -> Result<()> {
    let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    let sizes = [0, 1, 31, 32, 33, 1023, 1024, 1025, 40_000, 1_100_000];
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (span, sizes) in [(3, &sizes[..]), (41, &sizes[..8])] {
            let grads = sizes.iter().map(|&n| tensor(&[n], n as u64, span, dtype)).collect::<Result<Vec<_>>>()?;
            for norm in [NormType::L1, NormType::L2, NormType::Inf] {
                let place = Place::Host;
                let sources: Vec<_> = grads.iter().map(|grad| (Source::Tensor(grad), place)).collect();
                let expected =
                    crate::kernel::Context::default().measure(&sources, norm).map_err(candle_core::Error::from)?;
                let total = norm.join(&expected);
                for clip in [Clip::None, Clip::Each(0.5), Clip::Global(2.0), Clip::Torch(1.0)] {
                    let reversed = clip == Clip::None;
                    let (norms, control, scales) = summarize(&grads, norm, clip, true, reversed)?;
                    assert!(norms.iter().zip(&expected).all(|(a, b)| same(*a, *b)), "{dtype:?} {norm:?}");
                    assert!(same(control.total_norm, total), "{dtype:?} {norm:?}");
                    let skip = !total.is_finite();
                    assert_eq!((control.skip, control.skipped), (u32::from(skip), 2 + u64::from(skip)));
                    for (scale, own) in scales.iter().zip(&expected) {
                        assert!(same(*scale, clip.factor(*own, total)), "{clip:?} {own}");
                    }
                }
            }
        }
    }
    let none = summarize(&[], NormType::L2, Clip::Global(1.0), true, false)?;
    assert_eq!((none.1.total_norm, none.1.skip), (0.0, 0));
    Ok(())
}

#[test]
fn sums_and_averages_have_the_bits_of_the_cpu() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for n in [1usize, 7, 8, 1023, 5000] {
            let (other, to) = (tensor(&[n], 1, 41, dtype)?, tensor(&[n], 2, 3, crate::state::arithmetic(dtype))?);
            for (kind, factor, overwrites) in
                [("accumulate", 0.3, false), ("average", 0.99, false), ("average", 0.5, true), ("average", 0.0, false)]
            {
                let own = || crate::state::Buffer::from_tensor(&to, &to, Place::Host).map_err(candle_core::Error::from);
                let (mut buffer, var) = (own()?, Var::from_tensor(&other)?);
                match kind {
                    "accumulate" => cpu::run(vec![Task {
                        place: Place::Host,
                        nth: 0,
                        lent: None,
                        read: Some(Source::Tensor(&other)),
                        kind: crate::kernel::Accumulate { unscale: factor, sum: &mut buffer },
                    }])?,
                    _ => cpu::run(vec![Task {
                        place: Place::Host,
                        nth: 0,
                        lent: Some(var.as_tensor()),
                        read: None,
                        kind: crate::kernel::Average { momentum: factor, overwrite: overwrites, average: &mut buffer },
                    }])?,
                }
                let (mut device, mut param) = (memory(&to, 0)?, memory(&other, 2 * dtype.size_in_bytes())?);
                let pair = Pair { to: device.address(), other: param.address(), len: n as u64 };
                let chunks = chunks_of_leaves([n as u64]).expect("little work");
                let (mut pairs, blocks) = (Memory::of(&[pair], 0), chunks.len());
                let mut chunks = Memory::of(&chunks, 0);
                let args = PairArgs {
                    pairs: pairs.address(),
                    chunks: chunks.address(),
                    control: 0,
                    factor,
                    other_factor: 1.0 - factor,
                    chunk_units: LEAVES,
                    overwrites: u32::from(overwrites),
                };
                launch(&format!("{kind}_{}", name(dtype)), blocks, &args, false);
                let expected = buffer.to_tensor(to.shape()).map_err(candle_core::Error::from)?;
                assert_eq!(
                    numbers(&device, to.dtype()),
                    numbers(&memory(&expected, 0)?, to.dtype()),
                    "{kind} {dtype:?}"
                );
                assert_eq!(numbers(&param, dtype), numbers(&memory(var.as_tensor(), 0)?, dtype), "{kind} {dtype:?}");
            }
        }
    }
    Ok(())
}

/// Touched rows of a table: their numbers, and of which contributions each gradient is the sum.
fn row_grad(rows: &[u32], row_len: usize, parts: &[Tensor]) -> RowGrad<'static> {
    let (mut starts, mut contributions) = (vec![0], Vec::new());
    for (k, _) in rows.iter().enumerate() {
        for nth in 0..=(k * k % 4) {
            let part = (k + nth) % parts.len();
            let source = ((3 * k + nth) % parts[part].dims()[0]) as u32;
            let scale = if nth == 1 { 0.3 } else { 1.0 };
            contributions.push(Contribution { part: part as u32, source, scale });
        }
        starts.push(contributions.len() as u32);
    }
    let parts = parts.iter().map(|part| std::borrow::Cow::Owned(part.clone())).collect();
    RowGrad { rows: rows.to_vec(), row_len, values: RowValues::Lazy { starts, contributions, parts } }
}

#[test]
fn touched_rows_have_the_bits_of_the_cpu() -> Result<()> {
    let rows = [0u32, 2, 3, 7, 8, 30, 31, 99];
    for (dtype, state, row_len) in [
        (DType::F32, StateDType::F32, 64),
        (DType::F32, StateDType::Q8, 24),
        (DType::BF16, StateDType::Q8, 64),
        (DType::F16, StateDType::BF16, 5),
        (DType::F64, StateDType::F32, 33),
        (DType::F32, StateDType::F16, 300),
    ] {
        let keep = Keep { dtypes: (dtype, crate::state::arithmetic(dtype)), state, by_rows: true, ..PLAIN };
        let encoding = Encoding::of(&hyper(&keep));
        let var = Var::from_tensor(&tensor(&[100, row_len], 5, 2, dtype)?)?;
        let layout = Layout::of(&var, state, true, false, encoding);
        let mut own =
            ParamState::zeros(&var, Place::Host, &layout, Rounding::Nearest).map_err(candle_core::Error::from)?;
        for t in 1..=3u64 {
            let mut parts = vec![tensor(&[9, row_len], t, 3, dtype)?, tensor(&[4, row_len], t + 50, 3, dtype)?];
            if dtype != DType::F64 {
                parts.push(tensor(&[6, row_len], t + 70, 3, DType::F32)?);
            }
            let grad = row_grad(&rows, row_len, &parts);
            let orders = orders(&keep, t, encoding);
            let mut devices = arrays(&var, &own, 0)?;
            cpu::update_rows(vec![RowTask { nth: 0, var: &var, grad: &grad, orders, state: &mut own }])?;

            let RowValues::Lazy { starts, contributions, .. } = &grad.values else { panic!("not lazy") };
            let mut values = parts.iter().map(|part| memory(part, 0)).collect::<Result<Vec<_>>>()?;
            let of_parts: Vec<abi::Part> = values
                .iter_mut()
                .zip(&parts)
                .map(|(memory, part)| abi::Part::new(memory.address(), part.dtype()))
                .collect();
            let (mut starts, mut contributions) = (Memory::of(starts, 0), Memory::of(contributions, 0));
            let mut of_parts = Memory::of(&of_parts, 0);
            let arithmetic = crate::state::arithmetic(dtype);
            let mut sums = Memory::zeros::<u8>(rows.len() * row_len * arithmetic.size_in_bytes());
            let (n, len) = (rows.len() as u64, row_len as u64);
            let args = abi::SumArgs {
                starts: starts.address(),
                contributions: contributions.address(),
                parts: of_parts.address(),
                out: sums.address(),
                n,
                row_len: len,
            };
            launch(&format!("rows_sum_{}", name(arithmetic)), blocks_of_rows(n, len) as usize, &args, t == 2);
            let mut address = |i: usize| devices[i].as_mut().map_or(0, |(memory, _)| memory.address());
            let (mut numbers_of_rows, mut count) = (Memory::of(&rows, 0), Memory::of(&[rows.len() as u32], 0));
            let tensor = abi::Tensor {
                param: address(0),
                grad: sums.address(),
                exp_avg: address(1),
                exp_inf: address(2),
                units: address(3),
                rows: numbers_of_rows.address(),
                count: count.address(),
                len: var.elem_count() as u64,
                unit: len,
                chunk: units_of_chunk(len),
                ..abi::Tensor::default()
            };
            let chunks = chunks([(n, tensor.chunk)]).expect("little work");
            let (mut tensors, mut orders) = (Memory::of(&[tensor], 0), Memory::of(&[abi::Orders::new(&orders)], 0));
            let (blocks, mut chunks) = (chunks.len(), Memory::of(&chunks, 0));
            let (tensors, orders) = (tensors.address(), orders.address());
            let args = UpdateArgs { tensors, orders, chunks: chunks.address(), late: Late::default() };
            launch(&kernel_of(&keep), blocks, &args, t == 3);

            for (i, (got, expected)) in devices.iter().zip(&arrays(&var, &own, 0)?).enumerate() {
                if let (Some((got, dtype)), Some((expected, _))) = (got, expected) {
                    assert!(numbers(got, *dtype) == numbers(expected, *dtype), "{keep:?}, array {i}, update {t}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_gathered() -> Result<()> {
    let ids = [3u32, 0, 3, 19, 7];
    for row_len in [1u64, 2, 5, 33, 100] {
        let table: Vec<u16> = (0..20 * row_len as u16 * 8).collect();
        for (word, kernel) in [(2, "rows_gather_2"), (4, "rows_gather_4"), (8, "rows_gather_8"), (16, "rows_gather_16")]
        {
            let units = row_len as usize * word / 2;
            let (mut from, mut to) = (Memory::of(&table, 0), Memory::zeros::<u16>(ids.len() * units));
            let mut of_ids = Memory::of(&ids, 0);
            let args = abi::GatherArgs {
                ids: of_ids.address(),
                table: from.address(),
                out: to.address(),
                n: ids.len() as u64,
                row_len,
            };
            launch(kernel, blocks_of_rows(args.n, row_len) as usize, &args, word == 4);
            let expected: Vec<u16> =
                ids.iter().flat_map(|&id| table[id as usize * units..][..units].iter().copied()).collect();
            assert_eq!(to.read::<u16>(), expected, "{kernel} {row_len}");
        }
    }
    Ok(())
}

/// A table of which some rows were updated now and then, and what they owe.
struct Owing {
    var: Var,
    state: ParamState,
    ledger: Ledger,
    /// After which update each row was up to date; the upper bit says that its moments are zero.
    marks: Vec<u32>,
}

const EMPTY: u32 = 1 << 31;

impl Owing {
    fn new(keep: &Keep, row_len: usize, span: i32) -> Result<Self> {
        let (rows, encoding) = (40, Encoding::of(&hyper(keep)));
        let var = Var::from_tensor(&tensor(&[rows, row_len], 5, 2, keep.dtypes.0)?)?;
        let layout = Layout::of(&var, keep.state, true, keep.rowwise, encoding);
        let state = ParamState::zeros(&var, Place::Host, &layout, keep.rounding).map_err(candle_core::Error::from)?;
        let mut owing = Self { var, state, ledger: Ledger::new(&hyper(keep)), marks: vec![EMPTY; rows] };
        for t in 1..=900u64 {
            let base = orders(keep, t, encoding);
            if [1, 2, 300, 500, 899].contains(&t) {
                let touched: Vec<u32> = (0..rows as u32 - 3).filter(|row| (row + t as u32).is_multiple_of(3)).collect();
                let grad = row_grad(&touched, row_len, &[tensor(&[9, row_len], t, span, keep.dtypes.1)?]);
                cpu::update_rows(vec![RowTask {
                    nth: 0,
                    var: &owing.var,
                    grad: &grad,
                    orders: base,
                    state: &mut owing.state,
                }])?;
                owing.ledger.book(&base.coefficients, base.shrink);
                touched.iter().for_each(|&row| owing.marks[row as usize] = owing.ledger.now() as u32);
            } else {
                owing.ledger.book(&base.coefficients, 24_000);
            }
        }
        Ok(owing)
    }

    fn owes(&self, row: u32) -> Option<(u32, u32)> {
        let (since, is_empty) = (self.marks[row as usize] & !EMPTY, self.marks[row as usize] & EMPTY != 0);
        let owes = since < self.ledger.now() as u32 && (!is_empty || self.ledger.decays_since(since as usize));
        owes.then_some((row, since))
    }
}

#[test]
fn rows_pay_what_they_owe_with_the_bits_of_the_cpu() -> Result<()> {
    use DType::{BF16, F16, F32, F64};
    let decay = WeightDecay::Decoupled(0.02);
    let rounded = [Rounding::Stochastic, Rounding::Master];
    let mut keeps =
        vec![Keep { dtypes: (F64, F64), ..PLAIN }, Keep { dtypes: (F64, F64), decay, rowwise: true, ..PLAIN }];
    for state in STATES {
        for dtype in [F32, F16, BF16] {
            for rowwise in [false, true] {
                keeps.push(Keep { dtypes: (dtype, F32), state, rowwise, ..PLAIN });
                keeps.push(Keep { dtypes: (dtype, F32), state, rowwise, decay, epsilon: Epsilon::Inside, ..PLAIN });
            }
        }
        keeps.extend(rounded.map(|rounding| Keep { dtypes: (BF16, F32), state, decay, rounding, ..PLAIN }));
    }
    for (nth, keep) in keeps.into_iter().enumerate() {
        // Of all magnitudes: for some elements the series does not suffice.
        let (row_len, span) = ([24, 5, 64, 300][nth % 4], if nth % 2 == 0 { 3 } else { 12 });
        let Owing { var, mut state, ledger, mut marks } = Owing::new(&keep, row_len, span)?;
        let owing =
            Owing { var: var.clone(), state: ParamState::nothing(&state.moments.layout), ledger, marks: marks.clone() };
        let ledger = &owing.ledger;
        let mut devices = arrays(&var, &state, 0)?;
        let is_all = nth % 3 == 0;
        // Rows that are named several times, and the id of nothing.
        let named: Vec<u32> = vec![7, 3, 3, 39, 20, u32::MAX, 7, 0, 21, 22, 3];
        let mut rows: Vec<u32> = if is_all { (0..40).collect() } else { named[..].to_vec() };
        rows.retain(|row| *row < 40);
        rows.sort_unstable();
        rows.dedup();
        let paying: Vec<(u32, u32)> = rows.iter().filter_map(|&row| owing.owes(row)).collect();
        let (rounding, key, layout) = (keep.rounding, 77, state.moments.layout);
        let task = PayTask { var: &var, row_len, ledger, rounding, key, state: &mut state };
        cpu::pay_rows(task, &paying)?;

        let mut address = |i: usize| devices[i].as_mut().map_or(0, |(memory, _)| memory.address());
        let (mut of_marks, mut of_rows) = (Memory::of(&marks, 0), Memory::of(&named, 0));
        let mut entries = Memory::of(&ledger.records(0).1, 0);
        let n = if is_all { 40 } else { named.len() as u64 };
        let args = abi::PayArgs {
            tensor: abi::Tensor {
                param: address(0),
                exp_avg: address(1),
                exp_inf: address(2),
                units: address(3),
                master: address(4),
                rows: if is_all { 0 } else { of_rows.address() },
                len: var.elem_count() as u64,
                unit: row_len as u64,
                ..abi::Tensor::default()
            },
            marks: of_marks.address(),
            entries: entries.address(),
            terms: ledger.terms(),
            n,
            all: 40,
            key,
            limits: layout.encoding.limits().as_array(),
            rounding: u32::from(rounding == Rounding::Stochastic),
            now: ledger.now() as u32,
            mark: ledger.now() as u32,
        };
        let kernel = super::source::pay_kernel(keep.dtypes.0, layout.dtype, layout.rowwise);
        launch(&kernel, blocks_of_units(n, row_len as u64) as usize, &args, nth % 2 == 0);
        for (i, (got, expected)) in devices.iter().zip(&arrays(&var, &state, 0)?).enumerate() {
            if let (Some((got, dtype)), Some((expected, _))) = (got, expected) {
                assert!(numbers(got, *dtype) == numbers(expected, *dtype), "{keep:?}, array {i}, span {span}");
            }
        }
        for (row, _) in paying {
            let mark = &mut marks[row as usize];
            *mark = ledger.now() as u32 | (*mark & EMPTY);
        }
        assert_eq!(of_marks.read::<u32>(), marks, "{keep:?}");
    }
    Ok(())
}

#[test]
fn rows_are_marked() {
    let (mut marks, mut rows) = (Memory::of(&[EMPTY, EMPTY | 5, 9, 4], 0), Memory::of(&[3u32, 1, 99, 1], 0));
    let args = abi::MarkArgs { marks: marks.address(), rows: rows.address(), n: 4, all: 4, kept: 0, added: 7 };
    launch("rows_mark", blocks(4) as usize, &args, false);
    assert_eq!(marks.read::<u32>(), [EMPTY, 7, 9, 7]);
    let args = abi::MarkArgs { marks: marks.address(), rows: 0, n: 4, all: 4, kept: EMPTY, added: 0 };
    launch("rows_mark", blocks(4) as usize, &args, false);
    assert_eq!(marks.read::<u32>(), [EMPTY, 0, 0, 0]);
}
