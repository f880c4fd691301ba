//! Accumulation of gradients of rows: the sum stays one of rows, and the update is that of the mean of all calls.

use std::collections::BTreeMap;

use candle_adamax::{
    AccumulatedGrad, Adamax, Clip, Kernel, LossScale, MissingGradients, NormType, ParamsAdamax, WeightDecay,
};
use candle_core::{DType, Tensor, Var};

use crate::common::folder::Folder;
use crate::common::gradients::Grad;
use crate::common::{DTYPES, Fingerprint, KERNELS, ids, noise, tensor, values, var};
use crate::support::{Checked, coarse, grads, noisy, scatter, sparse};

fn accumulating(steps: u64) -> ParamsAdamax {
    ParamsAdamax {
        lr: 0.05.into(),
        gradient_accumulation_steps: steps,
        missing_gradients: MissingGradients::Allow,
        ..Default::default()
    }
}

const SHAPE: [usize; 2] = [9, 2];

/// The ids of each of eight calls; in the third there are none.
const CALLS: [Option<&[u32]>; 8] = [
    Some(&[8, 1, 8]),
    Some(&[1, 3]),
    None,
    Some(&[0]),
    Some(&[5, 5, 5, 5]),
    Some(&[]),
    Some(&[7, 2]),
    Some(&[2, 8, 7]),
];

/// What a call gives to the table, in multiples of 1/256.
fn of_call(call: usize, dtype: DType) -> Option<Grad> {
    CALLS[call].map(|of| Grad::Sparse(sparse(of, &coarse(call as u64, of.len() * 2), &[2], dtype)))
}

/// An optimizer of a table and a dense variable, which has a gradient in every call.
fn table_and_bias(dtype: DType, kernel: Kernel, params: ParamsAdamax) -> Checked {
    Checked::new(&[("bias", &[3], DType::F32), ("table", &SHAPE, dtype)], params, kernel)
}

fn with_bias(call: usize, table: Option<Grad>) -> BTreeMap<String, Grad> {
    let bias = Grad::Dense(tensor(&coarse(50 + call as u64, 3), &[3], DType::F32));
    match table {
        Some(table) => grads([("bias", bias), ("table", table)]),
        None => grads([("bias", bias)]),
    }
}

#[test]
fn what_waits_is_a_sum_of_rows() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            let mut checked = table_and_bias(dtype, kernel, accumulating(4));
            let (mut all_ids, mut all_values) = (Vec::new(), Vec::new());
            for (call, of) in CALLS.iter().enumerate().take(3) {
                checked.step(&with_bias(call, of_call(call, dtype)), &format!("{dtype:?}, {kernel:?}, call {call}"));
                if let Some(of) = of {
                    all_ids.extend_from_slice(of);
                    all_values.extend(coarse(call as u64, of.len() * 2));
                }
                let expected = scatter(&all_ids, &all_values, SHAPE[0], SHAPE[1]);
                let sum = match checked.optimizer.state("table").unwrap().accumulated {
                    Some(AccumulatedGrad::Rows(sum)) => sum,
                    other => panic!("expected a sum of rows, got {other:?}"),
                };
                let rows: Vec<usize> = values(&sum.indices).into_iter().map(|row| row as usize).collect();
                assert_eq!(rows, expected.rows.into_iter().collect::<Vec<_>>(), "each once, ascending");
                let of_rows: Vec<f64> = rows.iter().flat_map(|row| expected.g[row * 2..][..2].to_vec()).collect();
                assert_eq!(values(&sum.values), of_rows, "{dtype:?}, {kernel:?}");
                assert!(checked.optimizer.state("bias").unwrap().accumulated.unwrap().dense().is_some());
            }
            checked.step(&with_bias(3, of_call(3, dtype)), "the update");
            assert!(checked.optimizer.state("table").unwrap().accumulated.is_none());
            // The next one begins with nothing.
            checked.step(&with_bias(6, of_call(6, dtype)), "after the update");
            let sum = checked.optimizer.state("table").unwrap().accumulated.unwrap();
            assert_eq!(values(&sum.rows().unwrap().indices), [2.0, 7.0]);
        }
    }
}

#[test]
fn the_update_is_that_of_the_mean() {
    let clip = Some(Clip::GradNorm { max_norm: 0.05, norm_type: NormType::L2 });
    let settings = [
        ParamsAdamax::default(),
        ParamsAdamax { clip, ..Default::default() },
        ParamsAdamax { clip: Some(Clip::Value(0.1)), weight_decay: WeightDecay::L2(0.1), ..Default::default() },
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), maximize: true, ..Default::default() },
    ];
    for dtype in DTYPES {
        for kernel in KERNELS {
            for (params, n) in settings.iter().flat_map(|params| [(params, 2), (params, 4), (params, 8)]) {
                let params = |steps| {
                    ParamsAdamax { lr: 0.05.into(), missing_gradients: MissingGradients::Allow, ..params.clone() }
                        .accumulate(steps)
                };
                let mut in_parts = table_and_bias(dtype, kernel, params(n as u64));
                let mut at_once = table_and_bias(dtype, kernel, params(1));
                for update in 0..8 / n {
                    let (mut all_ids, mut all_values, mut bias) = (Vec::new(), Vec::new(), vec![0.0; 3]);
                    for (call, of) in CALLS.iter().enumerate().skip(update * n).take(n) {
                        let context = format!("{dtype:?}, {kernel:?}, {n} calls, call {call}");
                        in_parts.step(&with_bias(call, of_call(call, dtype)), &context);
                        let of_bias = coarse(50 + call as u64, 3);
                        bias.iter_mut().zip(of_bias).for_each(|(sum, g)| *sum += g / n as f64);
                        let Some(of) = of else { continue };
                        all_ids.extend_from_slice(of);
                        all_values.extend(coarse(call as u64, of.len() * 2).into_iter().map(|g| g / n as f64));
                    }
                    // The mean of a power of two of multiples of 1/256 is exact in f32.
                    let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
                    let mean = Grad::Sparse(sparse(&all_ids, &all_values, &[2], wide));
                    let bias = Grad::Dense(tensor(&bias, &[3], DType::F32));
                    at_once.step(&grads([("bias", bias), ("table", mean)]), "all at once");
                    let (got, expected) = (in_parts.fingerprint(), at_once.fingerprint());
                    assert_eq!(got.bits(), expected.bits(), "{dtype:?}, {kernel:?}, {n} calls");
                }
            }
        }
    }
}

/// Settings with another number of accumulation steps.
trait Accumulate {
    fn accumulate(self, steps: u64) -> Self;
}

impl Accumulate for ParamsAdamax {
    fn accumulate(self, steps: u64) -> Self {
        Self { gradient_accumulation_steps: steps, ..self }
    }
}

#[test]
fn calls_of_both_kinds_follow_the_formulas() {
    let dense = |call: u64, dtype| Grad::Dense(tensor(&noise(call, 18), &SHAPE, dtype));
    let rows = |call: u64, dtype| Grad::Sparse(noisy(&[4, call as u32 % 9, 4], call, &[2], dtype));
    for dtype in DTYPES {
        for kernel in KERNELS {
            for loss_scale in [LossScale::None, LossScale::Static(8.0)] {
                let params = ParamsAdamax { loss_scale, clip: Some(Clip::Norm(0.2)), ..accumulating(3) };
                let mut checked = table_and_bias(dtype, kernel, params);
                // Rows first, a dense one first, dense ones only, rows only, and calls without any in between.
                let kinds = ["rdr", "drr", "r.d", "d.r", "ddd", "rrr", "...", "..r", "r..", ".d."];
                for (call, kind) in (0u64..).zip(kinds.iter().flat_map(|kinds| kinds.chars())) {
                    let table = match kind {
                        'r' => Some(rows(call, dtype)),
                        'd' => Some(dense(call, dtype)),
                        _ => None,
                    };
                    let context = format!("{dtype:?}, {kernel:?}, call {call} ({kind})");
                    checked.step(&with_bias(call as usize, table), &context);
                }
                assert_eq!(checked.optimizer.updates(), 10);
                // "..." is no update of the table.
                assert_eq!(checked.optimizer.state("table").unwrap().step, 9);
            }
        }
    }
}

#[test]
fn a_run_that_was_interrupted_in_the_middle_has_the_same_bits() {
    let folder = Folder::new();
    for dtype in DTYPES {
        for kernel in KERNELS {
            // How the state goes from one optimizer to the next: not at all, in memory, through a file.
            let runs = [0, 1, 2].map(|way| {
                let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(0.3)), ..accumulating(3) };
                let mut checked = table_and_bias(dtype, kernel, params.clone());
                for call in 0..8 {
                    checked.step(&with_bias(call, of_call(call, dtype)), &format!("way {way}, call {call}"));
                    let vars = checked.weights.clone();
                    let mut fresh = Adamax::from_named(vars, params.clone()).unwrap();
                    fresh.set_kernel(kernel).unwrap();
                    match way {
                        0 => continue,
                        1 => fresh.restore(&checked.optimizer.snapshot().unwrap()).unwrap(),
                        _ => {
                            let file = folder.file(format!("{dtype:?}-{kernel:?}-{call}.safetensors"));
                            checked.optimizer.save(&file).unwrap();
                            let tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
                            let waits = checked.optimizer.state("table").unwrap().accumulated.is_some();
                            assert_eq!(tensors.contains_key("table.accumulated.indices"), waits);
                            assert_eq!(tensors.contains_key("table.accumulated.values"), waits);
                            assert!(!tensors.contains_key("table.accumulated"));
                            fresh.load(&file).unwrap();
                        }
                    }
                    let interrupted = checked.fingerprint();
                    checked.optimizer = fresh;
                    assert_eq!(checked.fingerprint(), interrupted);
                }
                checked.fingerprint()
            });
            assert!(runs[0] == runs[1] && runs[0] == runs[2], "{dtype:?}, {kernel:?}");
        }
    }
}

#[test]
fn another_kernel_takes_the_sum_over() {
    for (first, second) in [(Kernel::Auto, Kernel::Portable), (Kernel::Portable, Kernel::Auto)] {
        let mut checked = table_and_bias(DType::F32, first, accumulating(4));
        for call in [0, 1] {
            checked.step(&with_bias(call, of_call(call, DType::F32)), "before");
        }
        let before = checked.fingerprint();
        checked.optimizer.set_kernel(second).unwrap();
        assert_eq!(checked.fingerprint(), before);
        for call in [3, 4] {
            checked.step(&with_bias(call, of_call(call, DType::F32)), "after");
        }
        assert_eq!(checked.optimizer.updates(), 1);
    }
}

#[test]
fn a_call_that_is_skipped_leaves_the_sum_as_it_was() {
    for kernel in KERNELS {
        let vars: [(String, Var); 1] = [("w".to_owned(), var(&noise(1, 18), &SHAPE, DType::F32))];
        let params = ParamsAdamax { skip_nonfinite: true, ..accumulating(3) };
        let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let good = noisy(&[2, 4], 1, &[2], DType::F32);
        let bad = sparse(&[2, 7], &[1.0, f64::INFINITY, 1.0, 1.0], &[2], DType::F32);
        optimizer.apply_gradients([(&vars[0].1, &good)]).unwrap();
        let before = Fingerprint::of(&optimizer, &vars);
        optimizer.apply_gradients([(&vars[0].1, &bad)]).unwrap();
        assert!(optimizer.report().skipped());
        assert_eq!(Fingerprint::of(&optimizer, &vars).bits(), before.bits());
    }
}

#[test]
fn snapshots_of_rows_that_do_not_fit_change_nothing() {
    let w = var(&noise(1, 18), &SHAPE, DType::F32);
    let vars = [("w".to_owned(), w.clone())];
    let mut optimizer = Adamax::from_named(vars.clone(), accumulating(3)).unwrap();
    optimizer.apply_gradients([(&w, &noisy(&[2, 4, 2], 1, &[2], DType::F32))]).unwrap();
    let (before, snapshot) = (Fingerprint::of(&optimizer, &vars), optimizer.snapshot().unwrap());
    let with = |indices: Tensor, values: Tensor| {
        let mut changed = snapshot.clone();
        let sum = AccumulatedGrad::Rows(candle_adamax::SparseGrad { indices, values });
        changed.vars.get_mut("w").unwrap().accumulated = Some((sum, 1));
        changed
    };
    let rows = |n: usize| tensor(&vec![1.0; n * 2], &[n, 2], DType::F32);
    for (wrong, text) in [
        (
            with(ids(&[2, 9]), rows(2)),
            "id 9 at position [1] of the indices of `w` is out of range: the table has 9 rows, so ids are 0 to 8",
        ),
        (with(ids(&[2, 4]), rows(3)), "accumulated shape mismatch for `w`: expected [2, 2], got [3, 2]"),
        (
            with(ids(&[2]), tensor(&[1.0; 2], &[1, 2], DType::F64)),
            "accumulated dtype mismatch for `w`: expected F32, got F64",
        ),
    ] {
        assert_eq!(optimizer.restore(&wrong).unwrap_err().to_string(), format!("Adamax: {text}"));
        assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    }
}
