//! Updates of whole tensors, skipped updates, sums and averages.

use candle_core::{DType, Result, Var};

use super::*;
use crate::kernel::cuda::abi::{Control, Pair, PairArgs, UpdateLaunchArgs};
use crate::kernel::cuda::plan::{LEAVES, chunks, chunks_of_leaves, units_of_chunk};
use crate::kernel::{Source, Task, Update, cpu};
use crate::state::{Layout, Master, Place, Units};

/// Several updates of tensors of these shapes by both, compared after each.
fn check(shapes: &[Vec<usize>], keep: Keep) -> Result<()> {
    let encoding = Encoding::of(&hyper(&keep));
    let mut vars = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let var = Var::from_tensor(&tensor(shape, i as u64, keep.span, keep.dtypes.0)?)?;
        let layout = Layout::of(&var, keep.state, keep.units, keep.rowwise, encoding);
        let state = ParamState::zeros(&var, Place::Host, &layout, keep.rounding).map_err(candle_core::Error::from)?;
        vars.push((var, state));
    }
    for t in 1..=4u64 {
        let grads =
            shapes.iter().map(|shape| tensor(shape, 99 + t, keep.span, keep.dtypes.1)).collect::<Result<Vec<_>>>()?;
        let update_args = update_args(&keep, t, encoding);
        let mut devices =
            vars.iter().map(|(var, state)| arrays(var, state, keep.offset)).collect::<Result<Vec<_>>>()?;
        let tasks = vars.iter_mut().zip(&grads).map(|((var, state), grad)| Task {
            place: Place::Host,
            nth: 0,
            lent: Some(var.as_tensor()),
            read: Some(Source::Tensor(grad)),
            kind: Update { update_args, state },
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
                    scales: address(3),
                    master: address(4),
                    len: var.elem_count() as u64,
                    unit,
                    chunk: units_of_chunk(unit),
                    ..abi::Tensor::default()
                }
            })
            .collect();
        let chunks = chunks(tensors.iter().map(|t| (t.len.div_ceil(t.unit), t.chunk))).expect("little work");
        let (mut tensors, mut update_args) =
            (Memory::of(&tensors, 0), Memory::of(&[abi::UpdateArgs::new(&update_args)], 0));
        let blocks = chunks.len();
        let mut chunks = Memory::of(&chunks, 0);
        let args = UpdateLaunchArgs {
            tensors: tensors.address(),
            update_args: update_args.address(),
            chunks: chunks.address(),
            control: 0,
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
            check(&flat_shapes(), Keep { eps_mode: EpsMode::InsideMax, ..keep })?;
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
                let keep = Keep {
                    dtypes,
                    state: states,
                    rowwise,
                    units: if rowwise { Units::Blocks } else { Units::Rows },
                    span,
                    ..PLAIN
                };
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
fn a_skipped_update_writes_nothing() -> Result<()> {
    let update_args = [abi::UpdateArgs::new(&update_args(&PLAIN, 1, Encoding::of(&hyper(&PLAIN))))];
    let run = |skip: u32| {
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
        let (mut tensors, mut update_args) = (Memory::of(&[tensor], 0), Memory::of(&update_args, 0));
        let mut chunks = Memory::of(&chunks([(1, 16)]).expect("little work"), 0);
        let mut control = Memory::of(&[Control { skip, ..Control::default() }], 0);
        let [tensors, update_args, chunks] = [tensors.address(), update_args.address(), chunks.address()];
        launch(
            "update_f32_f32_full",
            1,
            &UpdateLaunchArgs { tensors, update_args, chunks, control: control.address() },
            false,
        );
        (w.read::<f32>(), m.read::<f32>(), u.read::<f32>())
    };
    assert_eq!(run(1), (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]));
    let (w, _, u) = run(0);
    // m / u is 0.1, and the step size is 0.01 / (1 - 0.9).
    approx::assert_relative_eq!(w[0], 1.0 - 0.01, max_relative = 1e-4);
    assert_eq!(u, [0.5, 0.25]);
    Ok(())
}

#[test]
fn sums_and_averages_have_the_bits_of_the_cpu() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for n in [1usize, 7, 8, 1023, 5000] {
            for (kind, factor, overwrites) in
                [("accumulate", 0.3, false), ("average", 0.99, false), ("average", 0.5, true), ("average", 0.0, false)]
            {
                for rounding in [Rounding::Nearest, Rounding::Stochastic, Rounding::Master] {
                    check_pass(dtype, n, kind, (factor, overwrites), rounding)?;
                }
            }
        }
    }
    Ok(())
}

/// One pass by both.
fn check_pass(dtype: DType, n: usize, kind: &str, (factor, overwrites): (f64, bool), rounding: Rounding) -> Result<()> {
    let what = format!("{kind} {dtype:?} {n} {rounding:?}");
    let (other, to) = (tensor(&[n], 1, 41, dtype)?, tensor(&[n], 2, 3, crate::state::arithmetic(dtype))?);
    let mut buffer = crate::state::Buffer::from_tensor(&to, &to, Place::Host).map_err(candle_core::Error::from)?;
    let (var, key) = (Var::from_tensor(&other)?, 0x9e37_79b9_7f4a);
    // Rests of all kinds: those of bf16 are those of other values, those of f16 its own with more digits, and foreign ones.
    let mut master = if !Master::is_kept(dtype, rounding) {
        None
    } else if dtype == DType::BF16 {
        let rests: Vec<i16> = (0..n).map(|i| (i * 40_503) as i16).collect();
        Some(Tensor::new(rests, &Device::Cpu)?)
    } else {
        Some((other.to_dtype(DType::F32)? * 1.000_2)?)
    }
    .map(|kept| Master::from_tensor(&kept, &var, Place::Host))
    .transpose()
    .map_err(candle_core::Error::from)?;
    let kept = |master: &Option<Master>| -> Result<Option<(Memory, DType)>> {
        let kept = master.as_ref().map(|master| master.to_tensor(var.shape())).transpose();
        kept.map_err(candle_core::Error::from)?.map(|kept| Ok((memory(&kept, 0)?, kept.dtype()))).transpose()
    };
    let mut kept_on_device = kept(&master)?;
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
            kind: crate::kernel::Average {
                momentum: factor,
                overwrite: overwrites,
                average: &mut buffer,
                master: master.as_mut(),
                rounding,
                key,
            },
        }])?,
    }
    let (mut device, mut param) = (memory(&to, 0)?, memory(&other, 2 * dtype.size_in_bytes())?);
    let pair = Pair {
        to: device.address(),
        other: param.address(),
        master: kept_on_device.as_mut().map_or(0, |(memory, _)| memory.address()),
        key,
        len: n as u64,
    };
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
        overwrites: if rounding == Rounding::Stochastic { 2 } else { 1 } * u32::from(overwrites),
    };
    launch(&format!("{kind}_{}", name(dtype)), blocks, &args, false);
    let expected = buffer.to_tensor(to.shape()).map_err(candle_core::Error::from)?;
    assert_eq!(numbers(&device, to.dtype()), numbers(&memory(&expected, 0)?, to.dtype()), "{what}");
    assert_eq!(numbers(&param, dtype), numbers(&memory(var.as_tensor(), 0)?, dtype), "{what}");
    let numbers_of = |kept: &Option<(Memory, DType)>| kept.as_ref().map(|(memory, dtype)| numbers(memory, *dtype));
    assert_eq!(numbers_of(&kept_on_device), numbers_of(&kept(&master)?), "{what}");
    Ok(())
}
