//! Gradients of rows through every setting of the optimizer, against the formulas in f64; and what holds for the bits.

use std::collections::{BTreeMap, BTreeSet};

use candle_adamax::{
    AccumulatedGrad, Adamax, Clip, Ema, EpsMode, ErrorKind, Gradient, Kernel, LossScale, MissingGradients, NormType,
    ParamGroup, ParamsAdamax, SparseGrad, StepCount, WeightDecay,
};
use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use crate::common::folder::Folder;
use crate::common::gradients::Grad;
use crate::common::property::config;
use crate::common::{DTYPES, Fingerprint, bits, formulas, noise, pool, tensor, values, var};
use crate::support::noisy;

const ROWS: usize = 12;
const DIM: usize = 5;

fn params() -> ParamsAdamax {
    ParamsAdamax { lr: 0.05.into(), missing_gradients: MissingGradients::Allow, ..Default::default() }
}

/// A table and a dense variable.
fn vars(dtype: DType) -> BTreeMap<String, Var> {
    let table = var(&noise(1, ROWS * DIM), &[ROWS, DIM], dtype);
    let dense = var(&noise(2, 7), &[7], dtype);
    BTreeMap::from([("table.weight".to_owned(), table), ("dense.bias".to_owned(), dense)])
}

/// The gradients of call `k`: the table has rows in most of the calls, two of them all rows, and sometimes none.
fn grads(k: usize, dtype: DType) -> BTreeMap<String, Grad> {
    const LISTS: [&[u32]; 6] = [&[3, 1, 3], &[11], &[], &[5, 1, 0, 5, 5], &[1, 2], &[8, 3]];
    let dense = Grad::Dense(tensor(&noise(50 + k as u64, 7), &[7], dtype));
    let table = match k % 7 {
        4 => None,
        6 => Some(Grad::Dense(tensor(&noise(90 + k as u64, ROWS * DIM), &[ROWS, DIM], dtype))),
        _ => Some(Grad::Sparse(noisy(LISTS[k % 6], 70 + k as u64, &[DIM], dtype))),
    };
    table.map(|grad| ("table.weight".to_owned(), grad)).into_iter().chain([("dense.bias".to_owned(), dense)]).collect()
}

fn pairs<'a>(
    vars: &'a BTreeMap<String, Var>,
    grads: &'a BTreeMap<String, Grad>,
) -> impl Iterator<Item = (&'a Var, Gradient<'a>)> {
    grads.iter().map(|(name, grad)| (&vars[name], grad.into()))
}

/// Which rows of the table an update may change: those of all gradients since the last one.
fn touched(grads: &BTreeMap<String, Grad>, so_far: &mut BTreeSet<usize>) {
    match grads.get("table.weight") {
        Some(Grad::Sparse(grad)) => so_far.extend(values(&grad.indices).into_iter().map(|row| row as usize)),
        Some(Grad::Dense(_)) => so_far.extend(0..ROWS),
        None => {}
    }
}

/// Twelve calls with these settings, each compared with the formulas; and nothing else changes, not by a bit.
#[track_caller]
fn follow(params: &ParamsAdamax, dtype: DType, kernel: Kernel) {
    let what = format!("{dtype:?} {kernel:?} {params:?}");
    let vars = vars(dtype);
    let groups = [
        ParamGroup::new("tables").var("table.weight", &vars["table.weight"]).lr_factor(3.0),
        ParamGroup::new("dense").var("dense.bias", &vars["dense.bias"]),
    ];
    let mut optimizer = Adamax::from_groups(groups, params.clone()).unwrap();
    optimizer.set_kernel(kernel).unwrap();
    let state = |optimizer: &Adamax| {
        let state = optimizer.state("table.weight").unwrap();
        [&vars["table.weight"].as_tensor().clone(), &state.exp_avg, &state.exp_inf].map(bits)
    };
    let mut rows = BTreeSet::new();
    for k in 0..12 {
        let grads = grads(k, dtype);
        let norm_error = if kernel == Kernel::Portable { 1e-5 } else { 0.0 };
        let expected = formulas::call(&optimizer.snapshot().unwrap(), &vars, &grads, norm_error);
        let before = state(&optimizer);
        optimizer.apply_gradients(pairs(&vars, &grads)).unwrap();
        if let Some(mismatch) = expected.mismatch(&optimizer.snapshot().unwrap(), &vars) {
            panic!("{what}: call {k}: {mismatch}");
        }
        touched(&grads, &mut rows);
        for (before, after) in before.iter().zip(&state(&optimizer)) {
            let changed = (0..ROWS * DIM).find(|i| before[*i] != after[*i] && !rows.contains(&(i / DIM)));
            assert_eq!(changed, None, "{what}: call {k} changed a row without a gradient");
        }
        if optimizer.report().updated() {
            rows.clear();
        }
    }
}

#[test]
fn every_setting_follows_the_formulas() {
    let base = params();
    let grad_norm = Clip::GradNorm { max_norm: 0.5, norm_type: NormType::L1 };
    let all = [
        base.clone(),
        ParamsAdamax { lr: 0.05.into(), missing_gradients: MissingGradients::Allow, ..ParamsAdamax::pytorch() },
        ParamsAdamax { clip: Some(Clip::Value(0.3)), ..base.clone() },
        ParamsAdamax { clip: Some(Clip::Norm(0.5)), ..base.clone() },
        ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), ..base.clone() },
        ParamsAdamax { clip: Some(grad_norm), ..base.clone() },
        ParamsAdamax { measure_norm: true, ..base.clone() },
        ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..base.clone() },
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..base.clone() },
        ParamsAdamax {
            weight_decay: WeightDecay::Decoupled(0.1),
            no_decay: vec!["table".into()],
            eps_mode: EpsMode::InsideMax,
            ..base.clone()
        },
        ParamsAdamax { step_count: StepCount::PerVar, ..base.clone() },
        ParamsAdamax { maximize: true, loss_scale: LossScale::Static(8.0), ..base.clone() },
        ParamsAdamax { gradient_accumulation_steps: 3, ..base.clone() },
        ParamsAdamax {
            gradient_accumulation_steps: 5,
            clip: Some(Clip::GlobalNorm(0.2)),
            loss_scale: LossScale::Static(4.0),
            step_count: StepCount::PerVar,
            skip_nonfinite: true,
            ..base
        },
    ];
    for params in &all {
        for dtype in DTYPES {
            for kernel in [Kernel::Auto, Kernel::Portable] {
                follow(params, dtype, kernel);
            }
        }
    }
}

#[test]
fn equal_rows_are_summed_in_f32_in_order_of_occurrence() {
    // In halves every 1 is lost beside 2048 (or 256), in f32 none; and what f32 loses depends on the order.
    for (dtype, all, expected) in [
        (DType::F16, [2048.0, 1.0, 1.0, 1.0], 2051.0),
        (DType::BF16, [256.0, 1.0, 1.0, 1.0], 259.0),
        (DType::F32, [1.0, 2f64.powi(-25), 2f64.powi(-25), -1.0], 0.0),
        (DType::F32, [2f64.powi(-25), 2f64.powi(-25), 1.0, -1.0], 0.0),
        (DType::F32, [1.0, -1.0, 2f64.powi(-25), 2f64.powi(-25)], 2f64.powi(-24)),
        (DType::F64, [1.0, 2f64.powi(-25), 2f64.powi(-25), -1.0], 2f64.powi(-24)),
    ] {
        let table = var(&[0.0; 4], &[4, 1], dtype);
        let params = ParamsAdamax { beta1: 0.0, ..params() };
        let mut optimizer = Adamax::from_named([("table", table.clone())], params).unwrap();
        let indices = Tensor::new(&[2u32; 4], &Device::Cpu).unwrap();
        let grad = SparseGrad { indices, values: tensor(&all, &[4, 1], dtype) };
        optimizer.apply_gradients([(&table, &grad)]).unwrap();
        assert_eq!(values(&optimizer.state("table").unwrap().exp_avg), [0.0, 0.0, expected, 0.0], "{dtype:?} {all:?}");
    }
}

#[test]
fn a_nan_in_one_row_skips_the_call_or_stays_in_its_row() {
    for skip in [true, false] {
        let vars = vars(DType::F32);
        let params = ParamsAdamax { skip_nonfinite: skip, ..params() };
        let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
        let named: Vec<(String, Var)> = vars.clone().into_iter().collect();
        let mut grads = grads(0, DType::F32);
        let Some(Grad::Sparse(grad)) = grads.get_mut("table.weight") else { panic!("no rows") };
        let mut poisoned = values(&grad.values);
        poisoned[DIM + 2] = f64::NAN; // of row 1
        grad.values = tensor(&poisoned, &[3, DIM], DType::F32);
        let before = Fingerprint::of(&optimizer, &named);
        optimizer.apply_gradients(pairs(&vars, &grads)).unwrap();
        assert_eq!(optimizer.report().skipped(), skip);
        assert_eq!(optimizer.skipped(), u64::from(skip));
        if skip {
            assert_eq!(Fingerprint::of(&optimizer, &named).bits(), before.bits());
        } else {
            let is_nan: Vec<usize> =
                values(&vars["table.weight"]).iter().enumerate().filter(|(_, w)| w.is_nan()).map(|(i, _)| i).collect();
            assert_eq!(is_nan, [DIM + 2]);
        }
    }
}

#[test]
fn accumulated_rows_stay_rows_and_survive_a_restart() {
    let params = ParamsAdamax { gradient_accumulation_steps: 3, ..params() };
    let folder = Folder::new();
    let file = folder.file("state.safetensors");
    for dtype in DTYPES {
        let run = |restart: bool| {
            let vars = vars(dtype);
            let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
            for k in 0..9 {
                optimizer.apply_gradients(pairs(&vars, &grads(k, dtype))).unwrap();
                let sum = optimizer.state("table.weight").unwrap().accumulated;
                if k == 1 {
                    let Some(AccumulatedGrad::Rows(sum)) = sum else { panic!("{sum:?}") };
                    assert_eq!(values(&sum.indices), [1.0, 3.0, 11.0]);
                    assert_eq!(sum.values.dims(), [3, DIM]);
                } else if k % 3 == 2 {
                    assert!(sum.is_none());
                }
                if restart {
                    optimizer.save(&file).unwrap();
                    optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
                    optimizer.load(&file).unwrap();
                    let snapshot = optimizer.snapshot().unwrap();
                    optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
                    optimizer.restore(&snapshot).unwrap();
                }
            }
            Fingerprint::of(&optimizer, &vars.into_iter().collect::<Vec<_>>())
        };
        assert_eq!(run(true), run(false), "{dtype:?}");
    }
}

#[test]
fn an_average_of_a_table_is_refused() {
    let vars = vars(DType::F32);
    let params = ParamsAdamax { ema: Some(Ema::default()), ..params() };
    let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
    let named: Vec<(String, Var)> = vars.clone().into_iter().collect();
    let before = Fingerprint::of(&optimizer, &named);
    let error = optimizer.apply_gradients(pairs(&vars, &grads(0, DType::F32))).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidArgument { field, .. } if field == "ema"), "{error}");
    assert!(error.to_string().contains("`table.weight`"), "{error}");
    assert_eq!(Fingerprint::of(&optimizer, &named), before);
    // A dense gradient of the same table is as good as any.
    optimizer.apply_gradients(pairs(&vars, &grads(6, DType::F32))).unwrap();
}

#[test]
fn a_dense_and_a_sparse_gradient_of_one_var_are_added() {
    let run = |split: bool| {
        let vars = vars(DType::F64);
        let table = &vars["table.weight"];
        let mut optimizer = Adamax::from_named([("table", table.clone())], params()).unwrap();
        let dense = tensor(&noise(4, ROWS * DIM), &[ROWS, DIM], DType::F64);
        let rows = noisy(&[2, 9], 5, &[DIM], DType::F64);
        if split {
            optimizer.apply_gradients([(table, Gradient::Dense(&dense)), (table, Gradient::Sparse(&rows))]).unwrap();
        } else {
            let sum = dense.index_add(&rows.indices, &rows.values, 0).unwrap();
            optimizer.apply_gradients([(table, &sum)]).unwrap();
        }
        bits(table)
    };
    assert_eq!(run(true), run(false));
}

/// The bits of weights and moments after three calls.
fn run(params: &ParamsAdamax, dtype: DType, table: &[usize; 2], calls: &[Grad]) -> [Vec<u64>; 3] {
    let table = var(&noise(3, table.iter().product()), table, dtype);
    let mut optimizer = Adamax::from_named([("table", table.clone())], params.clone()).unwrap();
    for grad in calls {
        optimizer.apply_gradients([(&table, grad)]).unwrap();
    }
    let state = optimizer.state("table").unwrap();
    [bits(&table), bits(&state.exp_avg), bits(&state.exp_inf)]
}

#[test]
fn threads_do_not_change_a_bit() {
    const LARGE: [usize; 2] = [30_000, 64];
    let ids: Vec<u32> = (0..20_000u32).map(|i| i.wrapping_mul(2_654_435_761) % 30_000).collect();
    let calls: Vec<Grad> = (0..2).map(|seed| Grad::Sparse(noisy(&ids, seed, &[64], DType::F32))).collect();
    let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..params() };
    let with = |threads: usize| pool(threads).install(|| run(&params, DType::F32, &LARGE, &calls));
    let expected = with(1);
    for threads in [2, 3, 8] {
        assert!(with(threads) == expected, "{threads} threads");
    }
}

fn settings() -> impl Strategy<Value = ParamsAdamax> {
    let clip = prop_oneof![
        Just(params()),
        Just(ParamsAdamax { clip: Some(Clip::Value(0.4)), ..params() }),
        Just(ParamsAdamax { clip: Some(Clip::Norm(0.7)), ..params() }),
        Just(ParamsAdamax { clip: Some(Clip::GlobalNorm(0.7)), ..params() }),
    ];
    let decay = prop_oneof![Just(WeightDecay::None), Just(WeightDecay::L2(0.1)), Just(WeightDecay::Decoupled(0.1)),];
    (clip, decay, 1u64..3).prop_map(|(clip, weight_decay, gradient_accumulation_steps)| ParamsAdamax {
        weight_decay,
        gradient_accumulation_steps,
        ..clip
    })
}

proptest! {
    #![proptest_config(config(2000))]

    /// A gradient that lists every row once is a dense one.
    #[test]
    fn all_rows_in_any_order_equal_a_dense_gradient(
        params in settings(),
        dtype in prop::sample::select(DTYPES.to_vec()),
        rows in 1usize..60,
        dim in 1usize..40,
        seed in 0u64..1000,
    ) {
        let mut order: Vec<u32> = (0..rows as u32).collect();
        order.sort_by_key(|row| row.wrapping_mul(2_654_435_761).rotate_left(seed as u32 % 32));
        let dense: Vec<Tensor> =
            (0..3).map(|k| tensor(&noise(seed + k, rows * dim), &[rows, dim], dtype)).collect();
        let indices = Tensor::new(order, &Device::Cpu).unwrap();
        let as_rows = |grad: &Tensor| {
            Grad::Sparse(SparseGrad { values: grad.index_select(&indices, 0).unwrap(), indices: indices.clone() })
        };
        let sparse: Vec<Grad> = dense.iter().map(as_rows).collect();
        let dense: Vec<Grad> = dense.into_iter().map(Grad::Dense).collect();
        prop_assert_eq!(run(&params, dtype, &[rows, dim], &sparse), run(&params, dtype, &[rows, dim], &dense));
    }

    /// Multiples of 1/256 are summed without rounding, and then nothing depends on the order.
    #[test]
    fn the_order_of_ids_matters_only_where_sums_round(
        params in settings(),
        dtype in prop::sample::select(DTYPES.to_vec()),
        ids in prop::collection::vec(0u32..10, 1..80),
        shuffle in any::<u32>(),
    ) {
        let row = |position: usize| (0..3).map(move |i| f64::from((position * 7 + i * 5) as u32 % 17) / 256.0 - 0.03125);
        let mut order: Vec<usize> = (0..ids.len()).collect();
        let grad = |order: &[usize]| {
            let indices: Vec<u32> = order.iter().map(|&position| ids[position]).collect();
            let values: Vec<f64> = order.iter().flat_map(|&position| row(position)).collect();
            let indices = Tensor::new(indices, &Device::Cpu).unwrap();
            vec![Grad::Sparse(SparseGrad { indices, values: tensor(&values, &[order.len(), 3], dtype) })]
        };
        let expected = run(&params, dtype, &[10, 3], &grad(&order));
        order.sort_by_key(|&position| (position as u32).wrapping_mul(2_654_435_761) ^ shuffle);
        prop_assert_eq!(run(&params, dtype, &[10, 3], &grad(&order)), expected);
    }
}
