//! The loss scale that follows the gradients: against PyTorch's recorded series, and against runs without one.

use candle_adamax::{
    Adamax, Clip, Embedding, ErrorKind, GradScaler, GradScalerState, Kernel, LossScale, MissingGradients, NormType,
    ParamGroup, ParamsAdamax, Rounding, SparseGrad, SparseUpdate, StateDType, TouchedRows,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use serde_json::Value;

use crate::common::folder::Folder;
use crate::common::{DTYPES, Fingerprint, noise, recorded, tensor, values, var};

fn scaler(init_scale: f64, growth_interval: u64) -> GradScaler {
    GradScaler { init_scale, growth_interval, ..GradScaler::default() }
}

fn with(scaler: GradScaler) -> ParamsAdamax {
    ParamsAdamax { loss_scale: LossScale::Dynamic(scaler), ..ParamsAdamax::pytorch() }
}

/// A loss whose gradient is `grad`.
fn loss(var: &Var, grad: &Tensor) -> Tensor {
    (var.as_tensor() * grad).unwrap().sum_all().unwrap()
}

// === PyTorch's series ===

fn number(value: &Value) -> f64 {
    match value.as_str() {
        Some("nan") => f64::NAN,
        Some(text) => text.parse().unwrap(),
        None => value.as_f64().unwrap(),
    }
}

#[test]
fn scales_and_skipped_steps_are_pytorchs() {
    let path = recorded("pytorch/grad_scaler.json");
    let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (mut calls, mut skips, mut grown) = (0, 0, 0);
    for kernel in [Kernel::Auto, Kernel::Portable] {
        for case in recorded["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let dtype = if case["dtype"] == "bfloat16" { DType::BF16 } else { DType::F32 };
            let numbers = |value: &Value| value.as_array().unwrap().iter().map(number).collect::<Vec<_>>();
            let w = var(&numbers(&case["init"]), &[2], dtype);
            let loss_scale = LossScale::Dynamic(serde_json::from_value(case["settings"].clone()).unwrap());
            let lr = number(&case["lr"]).into();
            let params = ParamsAdamax { lr, loss_scale, ..ParamsAdamax::pytorch() };
            let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            for (k, grad) in case["gradients"].as_array().unwrap().iter().enumerate() {
                let at = format!("{name}, call {k}, {kernel:?}");
                // Before its first call PyTorch tells the number that it will round to f32.
                let expected = f64::from(number(&case["scale"][k]) as f32);
                assert_eq!(optimizer.loss_scale(), expected, "{at}: the scale");
                optimizer.backward_step(&loss(&w, &tensor(&numbers(grad), &[2], dtype))).unwrap();
                assert_eq!(optimizer.report().skipped(), case["skipped"][k].as_bool().unwrap(), "{at}: skipped");
                let after = case["scale_after"][k].as_f64().unwrap();
                let state = GradScalerState {
                    scale: after as f32,
                    growth_tracker: case["growth_tracker_after"][k].as_u64().unwrap(),
                };
                assert_eq!(optimizer.snapshot().unwrap().grad_scaler, Some(state), "{at}: after it");
                assert_eq!(f64::from(state.scale), after, "{at}: recorded in f32");
                grown += u64::from(after > expected);
                calls += 1;
            }
            skips += optimizer.skipped();
            let expected = numbers(&case["weights_final"]);
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.02 };
            for (got, expected) in values(&w).into_iter().zip(expected) {
                assert!((got - expected).abs() <= tolerance, "{name}: {got}, expected {expected}");
            }
        }
    }
    // The series hold what they are for.
    assert!(calls > 10_000 && skips > 400 && grown > 200, "{calls} calls, {skips} skipped, {grown} grown");
}

// === Runs without a scale ===

const CALLS: u64 = 24;

/// Whether call `call` is a bad one, and by what.
fn bad(call: u64) -> Option<f64> {
    match call {
        3 => Some(f64::INFINITY),
        4 | 11 => Some(f64::NAN),
        19 => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// Gradients that survive a scale of 2^4 to 2^8 in every dtype without a rounding.
fn gradient(seed: u64, n: usize) -> Vec<f64> {
    noise(seed, n).into_iter().map(|x| (x * 64.0).round() / 256.0).collect()
}

/// What comes out of a run with scaled gradients, some of them bad, and of one without the bad calls or any scale, is the
/// same, bit for bit: the scale is a power of two.
#[track_caller]
fn assert_no_difference(dtype: DType, params: &ParamsAdamax, kernel: Kernel) {
    let run = |scaled: bool| {
        let vars: Vec<(String, Var)> =
            [7usize, 1025].into_iter().map(|n| (format!("w{n}"), var(&noise(n as u64, n), &[n], dtype))).collect();
        let loss_scale = if scaled { LossScale::Dynamic(scaler(16.0, 3)) } else { LossScale::None };
        let params = ParamsAdamax { loss_scale, ..params.clone() };
        let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        for call in 0..CALLS {
            let mut losses = Vec::new();
            for (name, var) in &vars {
                let mut grad = gradient(call * 31 + name.len() as u64, var.elem_count());
                if let Some(bad) = bad(call).filter(|_| name == "w1025") {
                    grad[1000] = bad;
                }
                losses.push(loss(var, &tensor(&grad, var.dims(), dtype)).to_dtype(DType::F32).unwrap());
            }
            if scaled || bad(call).is_none() {
                optimizer.backward_step(&(&losses[0] + &losses[1]).unwrap()).unwrap();
            }
        }
        let skipped = optimizer.skipped();
        assert_eq!(skipped, if scaled { 4 } else { 0 });
        assert_eq!(optimizer.calls(), CALLS - 4);
        Fingerprint::of(&optimizer, &vars).bits().clone()
    };
    assert_eq!(run(true), run(false), "{dtype:?}, {params:?}, {kernel:?}");
}

#[test]
fn makes_no_difference_to_any_var_state_or_rounding() {
    for dtype in DTYPES {
        for state_dtype in [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8] {
            for rounding in [Rounding::Nearest, Rounding::Stochastic, Rounding::Master] {
                let params = ParamsAdamax { state_dtype, rounding, ..Default::default() };
                assert_no_difference(dtype, &params, Kernel::Auto);
            }
        }
        assert_no_difference(dtype, &ParamsAdamax::pytorch(), Kernel::Portable);
    }
}

#[test]
fn makes_no_difference_to_clips_and_norms() {
    let keras = ParamsAdamax::default;
    let clip = Some(Clip::GradNorm { max_norm: 0.5, norm_type: NormType::L1 });
    for params in [
        ParamsAdamax { clip: Some(Clip::Value(0.1)), ..keras() },
        ParamsAdamax { clip: Some(Clip::Norm(0.5)), ..keras() },
        ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), ..keras() },
        ParamsAdamax { clip, ..keras() },
        ParamsAdamax { ema: Some(Default::default()), ..keras() },
        ParamsAdamax { gradient_accumulation_steps: 3, ..keras() },
    ] {
        for dtype in [DType::F32, DType::F16] {
            assert_no_difference(dtype, &params, Kernel::Auto);
        }
    }
}

#[test]
fn reports_the_norm_of_the_true_gradient() {
    let w = var(&[1.0, 1.0], &[2], DType::F32);
    let params = ParamsAdamax { measure_norm: true, ..with(GradScaler::default()) };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    optimizer.backward_step(&loss(&w, &tensor(&[3.0, 4.0], &[2], DType::F32))).unwrap();
    assert_eq!(optimizer.report().total_norm(), Some(5.0));
}

#[test]
fn makes_no_difference_to_tables() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (sparse_update, state_dtype) in [
            (SparseUpdate::Lazy, StateDType::F32),
            (SparseUpdate::Lazy, StateDType::Q8),
            (SparseUpdate::Exact, StateDType::F32),
            (SparseUpdate::Exact, StateDType::BF16),
        ] {
            let run = |scaled: bool| {
                let table = var(&noise(1, 40), &[10, 4], dtype);
                let layer = Embedding::new(table.as_tensor().clone()).unwrap();
                let loss_scale = if scaled { LossScale::Dynamic(scaler(16.0, 3)) } else { LossScale::None };
                let params = ParamsAdamax { sparse_update, state_dtype, loss_scale, ..Default::default() };
                let vars = vec![("table".to_owned(), table)];
                let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
                for call in 0..CALLS {
                    if !scaled && bad(call).is_some() {
                        continue;
                    }
                    // The same row twice: contributions are summed before anything is checked.
                    let ids: Vec<u32> = [call % 10, call * 7 % 10, call % 10].map(|id| id as u32).into();
                    let rows = layer.forward(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
                    let mut grad = gradient(call, 12);
                    grad[5] = bad(call).unwrap_or(grad[5]);
                    let loss = (rows * tensor(&grad, &[3, 4], dtype)).unwrap().to_dtype(DType::F32).unwrap();
                    optimizer.backward_step(&loss.sum_all().unwrap()).unwrap();
                }
                assert_eq!(optimizer.skipped(), if scaled { 4 } else { 0 });
                optimizer.catch_up().unwrap();
                Fingerprint::of(&optimizer, &vars).bits().clone()
            };
            let (scaled, plain) = (run(true), run(false));
            if sparse_update == SparseUpdate::Exact {
                // Rows catch up at a lookup, and those of a bad call are lookups, too: they catch up in other parts.
                let weights = |all: &std::collections::BTreeMap<String, Vec<Vec<u64>>>| {
                    all["table"][0].iter().map(|&bits| f64::from_bits(bits)).collect::<Vec<_>>()
                };
                let near = weights(&scaled).into_iter().zip(weights(&plain)).map(|(a, b)| (a - b).abs());
                let worst = near.fold(0.0, f64::max);
                let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.02 };
                assert!(worst <= tolerance, "{dtype:?}, {state_dtype:?}: {worst:e}");
            } else {
                assert_eq!(scaled, plain, "{dtype:?}, {state_dtype:?}");
            }
        }
    }
}

// === What it is for ===

#[test]
fn finds_gradients_that_f16_has_not() {
    for (loss_scale, moves) in [(LossScale::None, false), (LossScale::Dynamic(GradScaler::default()), true)] {
        let w = var(&[1.0], &[1], DType::F16);
        let params = ParamsAdamax { lr: 0.01.into(), loss_scale, ..ParamsAdamax::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        // In f16 1e-4 * 1e-4 is nothing.
        let small = tensor(&[1e-4], &[1], DType::F16);
        let loss = ((w.as_tensor() * &small).unwrap().to_dtype(DType::F32).unwrap() * 1e-4).unwrap();
        optimizer.backward_step(&loss.sum_all().unwrap()).unwrap();
        assert_eq!(optimizer.skipped(), 0);
        assert_eq!(values(&w)[0] < 1.0, moves);
    }
}

#[test]
fn a_loss_of_f16_is_scaled_in_f32() {
    let w = var(&[2.0, 3.0], &[2], DType::F16);
    let mut optimizer = Adamax::from_named([("w", w.clone())], with(GradScaler::default())).unwrap();
    let loss = loss(&w, &tensor(&[1.0, 1.0], &[2], DType::F16));
    let scaled = optimizer.scale_loss(&loss).unwrap();
    assert_eq!((scaled.dtype(), scaled.to_scalar::<f32>().unwrap()), (DType::F32, 5.0 * 65536.0));
    // Its own gradient is the scale, which f16 has not: found, as by PyTorch, and put right with the first call.
    optimizer.backward_step(&loss).unwrap();
    optimizer.backward_step(&loss).unwrap();
    assert_eq!((optimizer.loss_scale(), optimizer.skipped(), optimizer.calls()), (32768.0, 1, 1));
}

#[test]
fn a_backward_pass_of_ones_own_is_the_same() {
    let run = |own: bool| {
        let vars = vec![("w".to_owned(), var(&noise(1, 9), &[9], DType::F32))];
        let mut optimizer = Adamax::from_named(vars.clone(), with(scaler(3.0, 2))).unwrap();
        for call in 0..10 {
            let mut grad = noise(call, 9);
            grad[2] = if call == 5 { f64::NAN } else { grad[2] };
            let loss = loss(&vars[0].1, &tensor(&grad, &[9], DType::F32));
            match (own, call % 2) {
                (false, _) => optimizer.backward_step(&loss).map(drop).unwrap(),
                (true, 0) => {
                    let grads = optimizer.scale_loss(&loss).unwrap().backward().unwrap();
                    optimizer.step(&grads).unwrap();
                }
                (true, _) => {
                    let grads = (loss * optimizer.loss_scale()).unwrap().backward().unwrap();
                    let grad = grads.get(&vars[0].1).unwrap();
                    optimizer.apply_gradients([(&vars[0].1, grad)]).unwrap();
                }
            }
        }
        Fingerprint::of(&optimizer, &vars)
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn rows_that_a_caller_has_are_checked_too() {
    let table = var(&noise(1, 8), &[4, 2], DType::F32);
    let mut optimizer = Adamax::from_named([("table", table.clone())], with(scaler(4.0, 2))).unwrap();
    let indices = Tensor::new(&[1u32, 3], &Device::Cpu).unwrap();
    let mut step = |grad: f64| {
        let values = tensor(&[4.0, grad, 4.0, 4.0], &[2, 2], DType::F32);
        let before = values_of(&table);
        optimizer.apply_gradients([(&table, &SparseGrad { indices: indices.clone(), values })]).unwrap();
        (optimizer.loss_scale(), values_of(&table) != before)
    };
    assert_eq!(step(1.0), (4.0, true));
    assert_eq!(step(f64::INFINITY), (2.0, false));
    // And the rows of a gradient of the table's size.
    let grad = tensor(&[f64::NAN; 8], &[4, 2], DType::F32);
    let mut grads = candle_core::backprop::GradStore::default();
    grads.insert(&table, grad);
    optimizer.step_rows(&grads, [(&table, TouchedRows::Ids(&indices))]).unwrap();
    assert_eq!((optimizer.loss_scale(), optimizer.skipped()), (1.0, 2));
}

fn values_of(var: &Var) -> Vec<f64> {
    values(var.as_tensor())
}

// === Accumulation, checkpoints, settings ===

#[test]
fn with_accumulation_each_call_is_checked_on_its_own() {
    let w = var(&[0.0], &[1], DType::F32);
    let params = ParamsAdamax { gradient_accumulation_steps: 2, measure_norm: true, ..with(scaler(16.0, 3)) };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    let mut call = |grad: f64| {
        optimizer.backward_step(&loss(&w, &tensor(&[grad], &[1], DType::F32))).unwrap();
        (optimizer.loss_scale(), optimizer.updates(), optimizer.skipped(), optimizer.report().total_norm())
    };
    assert_eq!(call(3.0), (16.0, 0, 0, None));
    // The bad one is not among those that the mean is of, nor does it end the sum.
    assert_eq!(call(f64::INFINITY), (8.0, 0, 1, None));
    assert_eq!(call(5.0), (8.0, 1, 1, Some(4.0)));
    // Calls count for the scale, and the sum has the gradients of different scales.
    assert_eq!(call(1.0), (8.0, 1, 1, None));
    assert_eq!(call(1.0), (16.0, 2, 1, Some(1.0)));
}

#[test]
fn goes_on_in_the_middle_of_an_interval() {
    let folder = Folder::new();
    let params = ParamsAdamax {
        loss_scale: LossScale::Dynamic(GradScaler {
            init_scale: 1000.1,
            growth_factor: 1.7,
            backoff_factor: 0.3,
            growth_interval: 4,
        }),
        ..ParamsAdamax::default()
    };
    // Whether a call is bad depends on the scale.
    let grad = |call: u64| tensor(&noise(call, 5).iter().map(|x| x * 2e35).collect::<Vec<_>>(), &[5], DType::F32);
    let make = || vec![("w".to_owned(), var(&noise(9, 5), &[5], DType::F32))];
    let run = |optimizer: &mut Adamax, vars: &[(String, Var)], calls: std::ops::Range<u64>| {
        for call in calls {
            optimizer.backward_step(&loss(&vars[0].1, &grad(call))).unwrap();
        }
    };
    let vars = make();
    let mut whole = Adamax::from_named(vars.clone(), params.clone()).unwrap();
    run(&mut whole, &vars, 0..40);
    assert!(whole.skipped() > 2 && whole.calls() > 20, "{} {}", whole.skipped(), whole.calls());
    for at in [1, 6, 7, 23] {
        let before = make();
        let mut first = Adamax::from_named(before.clone(), params.clone()).unwrap();
        run(&mut first, &before, 0..at);
        first.save(folder.file("state")).unwrap();
        // Settings come from the file, too.
        let mut second = Adamax::from_named(before.clone(), ParamsAdamax::default()).unwrap();
        second.load(folder.file("state")).unwrap();
        run(&mut second, &before, at..40);
        assert_eq!(Fingerprint::of(&second, &before), Fingerprint::of(&whole, &vars), "saved after {at}");
    }
}

#[test]
fn settings_carry_on_or_begin_anew() {
    let w = var(&[0.0], &[1], DType::F32);
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
    let state = |optimizer: &Adamax| optimizer.snapshot().unwrap().grad_scaler.map(|s| (s.scale, s.growth_tracker));
    let good = |optimizer: &mut Adamax| {
        optimizer.backward_step(&loss(&w, &tensor(&[1.0], &[1], DType::F32))).map(drop).unwrap();
    };
    good(&mut optimizer);
    assert_eq!((state(&optimizer), optimizer.loss_scale()), (None, 1.0));

    optimizer.set_params(with_keras(scaler(4.0, 10))).unwrap();
    assert_eq!(state(&optimizer), Some((4.0, 0)));
    (0..5).for_each(|_| good(&mut optimizer));
    // A shorter interval is over with the next good call, where PyTorch's would never be.
    optimizer.set_params(with_keras(scaler(4.0, 3))).unwrap();
    assert_eq!(state(&optimizer), Some((4.0, 2)));
    good(&mut optimizer);
    assert_eq!(state(&optimizer), Some((8.0, 0)));
    // A first scale is a new beginning.
    optimizer.set_params(with_keras(scaler(32.0, 3))).unwrap();
    assert_eq!(state(&optimizer), Some((32.0, 0)));
    // What is refused changes nothing.
    assert!(optimizer.set_params(with_keras(scaler(-1.0, 3))).is_err());
    assert_eq!((state(&optimizer), optimizer.loss_scale()), (Some((32.0, 0)), 32.0));

    optimizer.set_params(ParamsAdamax { loss_scale: LossScale::Static(3.0), ..Default::default() }).unwrap();
    assert_eq!((state(&optimizer), optimizer.loss_scale()), (None, 3.0));
    let scaled = optimizer.scale_loss(&tensor(&[2.0], &[1], DType::F32)).unwrap();
    assert_eq!(values(&scaled), [6.0]);
}

fn with_keras(scaler: GradScaler) -> ParamsAdamax {
    ParamsAdamax { loss_scale: LossScale::Dynamic(scaler), ..ParamsAdamax::default() }
}

#[test]
fn a_call_that_fails_leaves_the_scale() {
    let (w, other) = (var(&[0.0], &[1], DType::F32), var(&[0.0], &[1], DType::F32));
    let mut optimizer = Adamax::from_named([("w", w.clone())], with(scaler(4.0, 1))).unwrap();
    let before = optimizer.snapshot().unwrap();
    let error = optimizer.backward_step(&loss(&other, &tensor(&[1.0], &[1], DType::F32))).unwrap_err();
    assert!(error.to_string().contains("none of the 1 vars had a gradient"), "{error}");
    let wrong = tensor(&[1.0, 2.0], &[2], DType::F32);
    let error = optimizer.apply_gradients([(&w, &wrong)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ShapeMismatch { .. }), "{error}");
    assert_eq!(optimizer.snapshot().unwrap().grad_scaler, before.grad_scaler);
}

#[test]
fn a_call_without_gradients_says_nothing_about_the_scale() {
    let (w, other) = (var(&[0.0], &[1], DType::F32), var(&[0.0], &[1], DType::F32));
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..with(scaler(4.0, 1)) };
    let mut optimizer = Adamax::from_named([("w", w)], params).unwrap();
    optimizer.backward_step(&loss(&other, &tensor(&[1.0], &[1], DType::F32))).unwrap();
    assert_eq!((optimizer.loss_scale(), optimizer.calls()), (4.0, 0));
}

#[test]
fn a_flush_says_something_about_the_scale_where_it_is_skipped() {
    let w = var(&[8.0], &[1], DType::F32);
    let params = ParamsAdamax { gradient_accumulation_steps: 3, ..with(scaler(4.0, 10)) };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    // Each is finite, and their sum is not; the gradients are four times what is added.
    for _ in 0..2 {
        optimizer.apply_gradients([(&w, &tensor(&[3e38], &[1], DType::F32))]).unwrap();
    }
    optimizer.flush_gradients().unwrap();
    assert_eq!((optimizer.loss_scale(), optimizer.updates()), (4.0, 1));
    let params = ParamsAdamax { loss_scale: LossScale::Dynamic(scaler(1.0, 10)), ..optimizer.params().clone() };
    optimizer.set_params(params).unwrap();
    for _ in 0..2 {
        optimizer.apply_gradients([(&w, &tensor(&[3e38], &[1], DType::F32))]).unwrap();
    }
    assert!(optimizer.flush_gradients().unwrap());
    assert!(optimizer.report().skipped() && optimizer.pending() == 0);
    assert_eq!((optimizer.loss_scale(), optimizer.updates(), optimizer.skipped()), (0.5, 1, 1));
}

#[test]
fn recovers_from_any_number_of_bad_calls() {
    let w = var(&[0.0], &[1], DType::F32);
    let mut optimizer = Adamax::from_named([("w", w.clone())], with(scaler(4.0, 1))).unwrap();
    for _ in 0..200 {
        optimizer.backward_step(&loss(&w, &tensor(&[f64::NAN], &[1], DType::F32))).unwrap();
    }
    assert_eq!((optimizer.loss_scale(), optimizer.skipped()), (f64::from(f32::MIN_POSITIVE), 200));
    optimizer.backward_step(&loss(&w, &tensor(&[1.0], &[1], DType::F32))).unwrap();
    assert_eq!(optimizer.loss_scale(), 2.0 * f64::from(f32::MIN_POSITIVE));
    assert!(values(&w)[0] < 0.0);
}

#[test]
fn goes_with_groups() {
    let (a, b) = (var(&[1.0], &[1], DType::F16), var(&[1.0], &[1], DType::F32));
    let groups = [
        ParamGroup::new("half").var("a", &a).rounding(Rounding::Master).state_dtype(StateDType::Q8),
        ParamGroup::new("full").var("b", &b).lr_factor(0.5),
    ];
    let mut optimizer = Adamax::from_groups(groups, with(scaler(16.0, 2))).unwrap();
    let both = |grad: f64| {
        let a = loss(&a, &tensor(&[1.0], &[1], DType::F16)).to_dtype(DType::F32).unwrap();
        (a + loss(&b, &tensor(&[grad], &[1], DType::F32))).unwrap()
    };
    // What is bad in one group is skipped in all.
    optimizer.backward_step(&both(f64::NAN)).unwrap();
    assert_eq!((values(&a), values(&b), optimizer.loss_scale()), (vec![1.0], vec![1.0], 8.0));
    optimizer.backward_step(&both(1.0)).unwrap();
    assert!(values(&a)[0] < 1.0 && values(&b)[0] < 1.0);
}
