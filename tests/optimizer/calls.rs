//! What calls leave alone: variables without a gradient, calls without any, gradients that wait, and calls that are
//! refused.

use candle_adamax::{
    Adamax, Clip, Ema, Embedding, ErrorKind, ExponentialDecay, GradScaler, Kernel, LossScale, MissingGradients,
    ParamsAdamax, Rounding, SparseGrad, SparseUpdate, StateDType, StepCount, Table, TouchedRows, WeightDecay,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, Optimizer, VarMap};

use crate::common::folder::Folder;
use crate::common::{Fingerprint, KERNELS, bits, noise, tensor, values, var};

fn scalar(value: f64) -> Var {
    var(&[value], &[1], DType::F32)
}

fn ema(momentum: f64, overwrite_frequency: Option<u64>) -> Option<Ema> {
    Some(Ema { momentum, overwrite_frequency })
}

fn give(optimizer: &mut Adamax, var: &Var, grad: f64) {
    let grad = (var.ones_like().unwrap() * grad).unwrap();
    optimizer.apply_gradients([(var, &grad)]).unwrap();
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.collect()
}

// === Variables without a gradient ===

#[test]
fn an_average_leaves_alone_what_is_not_trained() -> Result<()> {
    for kernel in KERNELS {
        let (w, counter) = (scalar(1.0), scalar(0.0));
        let params = ParamsAdamax { ema: ema(0.9, Some(1)), ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone()), ("counter", counter.clone())], params)?;
        optimizer.set_kernel(kernel)?;
        for k in 0..10 {
            counter.set(&tensor(&[f64::from(k)], &[1], DType::F32))?;
            optimizer.backward_step(&w.sum_all()?)?;
        }
        assert_eq!(values(&counter), [9.0]);
        optimizer.finalize_ema()?;
        assert_eq!(values(&counter), [9.0]);
        assert!(optimizer.state("counter")?.ema.is_none() && optimizer.state("w")?.ema.is_some());
        assert_eq!(optimizer.bytes().averages, 4);
    }
    Ok(())
}

#[test]
fn nothing_acts_on_what_is_not_trained() -> Result<()> {
    let base = || ParamsAdamax { lr: 0.1.into(), ema: ema(0.5, Some(2)), ..Default::default() };
    let all = [
        base(),
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.5), maximize: true, ..base() },
        ParamsAdamax { weight_decay: WeightDecay::L2(0.5), clip: Some(Clip::GlobalNorm(0.1)), ..base() },
        ParamsAdamax { rounding: Rounding::Master, state_dtype: StateDType::Q8, ..base() },
        ParamsAdamax { rounding: Rounding::Stochastic, gradient_accumulation_steps: 2, ..base() },
        ParamsAdamax { skip_nonfinite: true, rowwise_norm: true, ..base() },
        ParamsAdamax { sparse_update: SparseUpdate::Exact, weight_decay: WeightDecay::Decoupled(0.5), ..base() },
        ParamsAdamax { step_count: StepCount::PerVar, gradient_accumulation_steps: 3, ..base() },
    ];
    for (i, params) in all.into_iter().enumerate() {
        for dtype in [DType::BF16, DType::F32] {
            let (w, rest) = (var(&[1.0, 2.0], &[2, 1], dtype), var(&noise(7, 6), &[3, 2], dtype));
            let vars = [("w", w.clone()), ("rest", rest.clone())];
            let mut optimizer = Adamax::from_named(vars, params.clone())?;
            let before = bits(&rest);
            for call in 0..7 {
                give(&mut optimizer, &w, f64::from(call) - 2.0);
                if call == 3 {
                    let snapshot = optimizer.snapshot()?;
                    assert!(snapshot.vars["rest"].ema.is_none());
                    optimizer.restore(&snapshot)?;
                    optimizer.set_params(ParamsAdamax { lr: 0.2.into(), ..params.clone() })?;
                }
            }
            optimizer.flush_gradients()?;
            optimizer.finalize_ema()?;
            assert_eq!(bits(&rest), before, "settings {i}, {dtype:?}");
            assert_eq!(names(optimizer.report().untrained()), ["rest"]);
        }
    }
    Ok(())
}

#[test]
fn an_average_begins_with_the_first_update_of_its_variable() -> Result<()> {
    for step_count in [StepCount::Shared, StepCount::PerVar] {
        let (a, b, late) = (scalar(1.0), scalar(1.0), scalar(1.0));
        let params = ParamsAdamax { lr: 0.5.into(), eps: 0.0, ema: ema(0.5, None), step_count, ..Default::default() };
        let mut optimizer = Adamax::from_named([("a", a.clone()), ("b", b.clone())], params)?;
        give(&mut optimizer, &a, 1.0);
        assert!(optimizer.state("b")?.ema.is_none());
        b.set(&tensor(&[8.0], &[1], DType::F32))?;
        give(&mut optimizer, &b, 1.0);
        let average = |optimizer: &Adamax, name| values(&optimizer.state(name).unwrap().ema.unwrap())[0];
        // A copy of the weight after the update, whatever it was before.
        assert_eq!(average(&optimizer, "b"), values(&b)[0]);
        assert!(values(&b)[0] < 8.0);
        // Then it moves in every call, also without a gradient, as Keras's does.
        assert_eq!(average(&optimizer, "a"), values(&a)[0]);
        a.set(&tensor(&[3.0], &[1], DType::F32))?;
        let before = average(&optimizer, "a");
        give(&mut optimizer, &b, 1.0);
        assert_eq!(average(&optimizer, "a"), 0.5 * before + 1.5);
        optimizer.add_var("late", late.clone())?;
        give(&mut optimizer, &a, 1.0);
        assert!(optimizer.state("late")?.ema.is_none());
        give(&mut optimizer, &late, 1.0);
        assert_eq!(average(&optimizer, "late"), values(&late)[0]);
    }
    Ok(())
}

#[test]
fn an_average_begins_with_the_update_and_not_with_a_gradient_that_waits() -> Result<()> {
    let (a, b, c) = (scalar(1.0), scalar(1.0), scalar(1.0));
    let params =
        ParamsAdamax { lr: 0.5.into(), ema: ema(0.5, Some(1)), gradient_accumulation_steps: 2, ..Default::default() };
    let vars = [("a", a.clone()), ("b", b.clone()), ("c", c.clone())];
    let mut optimizer = Adamax::from_named(vars, params)?;
    give(&mut optimizer, &b, 1.0);
    assert!(["a", "b", "c"].iter().all(|name| optimizer.state(name).unwrap().ema.is_none()));
    // The gradient of the first call of two counts.
    give(&mut optimizer, &a, 1.0);
    let has = |name: &str| optimizer.state(name).unwrap().ema.is_some();
    assert_eq!(["a", "b", "c"].map(has), [true, true, false]);
    assert_eq!(values(&optimizer.state("b")?.ema.unwrap()), values(&b));
    assert_eq!(values(&c), [1.0]);
    Ok(())
}

#[test]
fn averages_of_untrained_variables_in_older_files_are_passed_over() -> Result<()> {
    let (w, counter) = (scalar(1.0), scalar(0.0));
    let params = ParamsAdamax { ema: ema(0.9, Some(1)), ..Default::default() };
    let vars = || [("w", w.clone()), ("counter", counter.clone())];
    let mut optimizer = Adamax::from_named(vars(), params.clone())?;
    give(&mut optimizer, &w, 1.0);
    let mut snapshot = optimizer.snapshot()?;
    snapshot.vars.get_mut("counter").unwrap().ema = Some(tensor(&[5.0], &[1], DType::F32));
    let mut optimizer = Adamax::from_named(vars(), params)?;
    optimizer.restore(&snapshot)?;
    assert!(optimizer.state("counter")?.ema.is_none() && optimizer.state("w")?.ema.is_some());
    optimizer.finalize_ema()?;
    assert_eq!(values(&counter), [0.0]);
    // One of another shape is still an error.
    snapshot.vars.get_mut("counter").unwrap().ema = Some(tensor(&[5.0, 5.0], &[2], DType::F32));
    assert!(optimizer.restore(&snapshot).is_err());
    Ok(())
}

#[test]
fn rows_that_are_added_to_an_untrained_table_have_no_average() -> Result<()> {
    let (w, rest) = (scalar(1.0), var(&[1.0, 2.0], &[2, 1], DType::F32));
    let params = ParamsAdamax { ema: ema(0.5, Some(1)), ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone()), ("rest", rest)], params)?;
    give(&mut optimizer, &w, 1.0);
    let grown = optimizer.append_rows("rest", &tensor(&[3.0], &[1, 1], DType::F32))?;
    give(&mut optimizer, &w, 1.0);
    assert_eq!(values(&grown), [1.0, 2.0, 3.0]);
    assert_eq!(names(optimizer.report().untrained()), ["rest"]);
    assert!(optimizer.report().missing().next().is_none());
    Ok(())
}

#[test]
fn a_report_names_what_stopped_and_what_never_began() -> Result<()> {
    let (a, b, rest) = (scalar(1.0), scalar(1.0), scalar(1.0));
    let vars = [("a", a.clone()), ("b", b.clone()), ("rest", rest.clone())];
    let mut optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default())?;
    assert_eq!(names(optimizer.report().untrained()), ["a", "b", "rest"]);
    let both = (a.sum_all()? + b.sum_all()?)?;
    optimizer.backward_step(&both)?;
    // The first call tells of all: a graph that is cut shows at once.
    assert_eq!(names(optimizer.report().missing()), ["rest"]);
    assert_eq!(names(optimizer.report().untrained()), ["rest"]);
    optimizer.backward_step(&both)?;
    assert_eq!(names(optimizer.report().missing()), [""; 0]);
    assert_eq!(names(optimizer.report().untrained()), ["rest"]);
    give(&mut optimizer, &a, 1.0);
    assert_eq!(names(optimizer.report().missing()), ["b"]);
    // Both know it of the calls before a checkpoint, too.
    let snapshot = optimizer.snapshot()?;
    let mut resumed = Adamax::from_named(vars, ParamsAdamax::default())?;
    resumed.restore(&snapshot)?;
    give(&mut resumed, &a, 1.0);
    assert_eq!((names(resumed.report().missing()), names(resumed.report().untrained())), (vec!["b"], vec!["rest"]));
    // A variable that comes later has a first call of its own.
    optimizer.add_var("late", scalar(1.0))?;
    give(&mut optimizer, &a, 1.0);
    assert_eq!(names(optimizer.report().missing()), ["b", "late"]);
    give(&mut optimizer, &a, 1.0);
    assert_eq!(names(optimizer.report().missing()), ["b"]);
    give(&mut optimizer, &rest, 1.0);
    assert_eq!(names(optimizer.report().missing()), ["a", "b"]);
    assert_eq!(names(optimizer.report().untrained()), ["late"]);
    Ok(())
}

// === Calls without any gradient ===

#[test]
fn calls_without_any_gradient_do_nothing() -> Result<()> {
    for kernel in KERNELS {
        let w = scalar(1.0);
        let params = ParamsAdamax {
            lr: ExponentialDecay::new(0.1, 1, 0.5).into(),
            missing_gradients: MissingGradients::Allow,
            ema: ema(0.5, Some(1)),
            loss_scale: LossScale::Dynamic(GradScaler { init_scale: 1.0, growth_interval: 1, ..GradScaler::default() }),
            ..Default::default()
        };
        let vars = [("w".to_owned(), w.clone())];
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        optimizer.set_kernel(kernel)?;
        let before = Fingerprint::of(&optimizer, &vars);
        for _ in 0..10 {
            optimizer.step(&GradStore::default())?;
            assert!(!optimizer.report().updated() && !optimizer.report().skipped());
            assert_eq!((optimizer.report().lr(), optimizer.report().total_norm()), (0.1, None));
            assert_eq!(names(optimizer.report().missing()), ["w"]);
        }
        assert_eq!(Fingerprint::of(&optimizer, &vars), before);
        give(&mut optimizer, &w, 1.0);
        // The first step of all: the learning rate, in full.
        assert!((values(&w)[0] - 0.9).abs() < 1e-6, "{:?}", values(&w));
        assert_eq!((optimizer.calls(), optimizer.updates(), optimizer.loss_scale()), (1, 1, 2.0));
        // And none of those between steps counts.
        let before = Fingerprint::of(&optimizer, &vars);
        optimizer.step(&GradStore::default())?;
        assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    }
    Ok(())
}

#[test]
fn a_call_without_any_gradient_is_none_of_the_n() -> Result<()> {
    let w = scalar(0.0);
    let params = ParamsAdamax {
        lr: 1.0.into(),
        beta1: 0.0,
        gradient_accumulation_steps: 2,
        missing_gradients: MissingGradients::Allow,
        ..Default::default()
    };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    give(&mut optimizer, &w, 2.0);
    for _ in 0..3 {
        optimizer.step(&GradStore::default())?;
    }
    assert_eq!((optimizer.pending(), optimizer.updates(), optimizer.calls()), (1, 0, 1));
    give(&mut optimizer, &w, 4.0);
    assert_eq!((optimizer.pending(), optimizer.updates(), optimizer.calls()), (0, 1, 2));
    assert_eq!(values(&optimizer.state("w")?.exp_avg), [3.0]);
    Ok(())
}

// === Gradients that wait ===

/// Settings under which every part of an update shows.
fn busy(steps: u64) -> ParamsAdamax {
    ParamsAdamax {
        lr: ExponentialDecay::new(0.1, 1, 0.5).into(),
        gradient_accumulation_steps: steps,
        clip: Some(Clip::GlobalNorm(0.5)),
        weight_decay: WeightDecay::Decoupled(0.1),
        loss_scale: LossScale::Static(2.0),
        ..Default::default()
    }
}

/// Makes this call with a gradient of its own.
fn call(optimizer: &mut Adamax, w: &Var, rows: bool, seed: u64) {
    if rows {
        let indices = Tensor::new(&[seed as u32 % 3, 1], &Device::Cpu).unwrap();
        let grad = SparseGrad { indices, values: tensor(&noise(seed, 4), &[2, 2], DType::F32) };
        optimizer.apply_gradients([(w, &grad)]).unwrap();
    } else {
        optimizer.apply_gradients([(w, &tensor(&noise(seed, 8), &[4, 2], DType::F32))]).unwrap();
    }
}

#[test]
fn a_flush_is_an_update_of_fewer_calls() -> Result<()> {
    for kernel in KERNELS {
        for rows in [false, true] {
            for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
                if kernel == Kernel::Portable && sparse_update == SparseUpdate::Exact {
                    continue;
                }
                let make = |steps| -> Result<(Var, Adamax)> {
                    let w = var(&noise(1, 8), &[4, 2], DType::F32);
                    let params = ParamsAdamax { sparse_update, ..busy(steps) };
                    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
                    optimizer.set_kernel(kernel)?;
                    Ok((w, optimizer))
                };
                let ((a, mut flushed), (b, mut whole)) = (make(4)?, make(3)?);
                for round in 0..2 {
                    for seed in 0..3 {
                        call(&mut flushed, &a, rows, 10 * round + seed);
                        call(&mut whole, &b, rows, 10 * round + seed);
                    }
                    assert_eq!(flushed.pending(), 3);
                    assert!(flushed.to_string().ends_with("accumulated: 3 of 4 calls)"), "{flushed}");
                    assert!(flushed.flush_gradients()?);
                    let what = format!("{kernel:?}, rows: {rows}, {sparse_update:?}, round {round}");
                    assert!(flushed.report().updated(), "{what}");
                    assert_eq!(flushed.report().lr(), whole.report().lr(), "{what}");
                    assert_eq!(flushed.report().total_norm(), whole.report().total_norm(), "{what}");
                    assert_eq!(names(flushed.report().missing()), [""; 0]);
                    let of = |optimizer: &Adamax, w: &Var| Fingerprint::of(optimizer, &[("w".to_owned(), w.clone())]);
                    assert_eq!(of(&flushed, &a).bits(), of(&whole, &b).bits(), "{what}");
                    let counts = |optimizer: &Adamax| (optimizer.calls(), optimizer.updates(), optimizer.pending());
                    assert_eq!(counts(&flushed), counts(&whole), "{what}");
                    assert!(!flushed.flush_gradients()?);
                    assert_eq!(counts(&flushed), counts(&whole), "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_waits_is_named_and_can_be_used_or_dropped() -> Result<()> {
    let make = || -> Result<(Var, Adamax)> {
        let w = scalar(8.0);
        let params = ParamsAdamax { gradient_accumulation_steps: 4, ..ParamsAdamax::pytorch() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        (0..6).for_each(|_| give(&mut optimizer, &w, 1.0));
        Ok((w, optimizer))
    };
    let folder = Folder::new();
    let file = folder.file("state");
    let drops: [fn(&mut Adamax) -> u64; 2] = [
        |optimizer| u64::from(optimizer.flush_gradients().unwrap()),
        |optimizer| optimizer.discard_gradients().unwrap(),
    ];
    for (drop, (result, updates)) in drops.into_iter().zip([(1, 2), (2, 1)]) {
        let (_, mut optimizer) = make()?;
        let other = ParamsAdamax { gradient_accumulation_steps: 2, ..optimizer.params().clone() };
        let refused = [
            optimizer.save_torch(&file).unwrap_err().to_string(),
            optimizer.set_params(other.clone()).unwrap_err().to_string(),
        ];
        for error in refused {
            assert!(error.contains("`flush_gradients`") && error.contains("`discard_gradients`"), "{error}");
        }
        assert_eq!(drop(&mut optimizer), result);
        assert_eq!((optimizer.pending(), optimizer.updates(), optimizer.calls()), (0, updates, 6));
        assert!(optimizer.state("w")?.accumulated.is_none());
        optimizer.save_torch(&file)?;
        optimizer.set_params(other)?;
        assert_eq!(optimizer.discard_gradients()?, 0);
    }
    Ok(())
}

#[test]
fn what_was_dropped_is_not_in_the_next_sum() -> Result<()> {
    let w = scalar(0.0);
    let params = ParamsAdamax { beta1: 0.0, gradient_accumulation_steps: 2, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    give(&mut optimizer, &w, 100.0);
    optimizer.discard_gradients()?;
    give(&mut optimizer, &w, 1.0);
    give(&mut optimizer, &w, 3.0);
    assert_eq!(values(&optimizer.state("w")?.exp_avg), [2.0]);
    Ok(())
}

#[test]
fn a_flush_after_a_checkpoint_has_the_same_bits() -> Result<()> {
    for rows in [false, true] {
        let (a, b) = (var(&noise(1, 8), &[4, 2], DType::F32), var(&noise(1, 8), &[4, 2], DType::F32));
        let mut through = Adamax::from_named([("w", a.clone())], busy(4))?;
        (0..6).for_each(|seed| call(&mut through, &a, rows, seed));
        let folder = Folder::new();
        let file = folder.file("state");
        through.save(&file)?;
        let mut resumed = Adamax::from_named([("w", b.clone())], busy(4))?;
        resumed.load(&file)?;
        b.set(&a)?;
        assert_eq!(resumed.pending(), 2);
        assert!(through.flush_gradients()? && resumed.flush_gradients()?);
        let of = |optimizer: &Adamax, w: &Var| Fingerprint::of(optimizer, &[("w".to_owned(), w.clone())]);
        assert_eq!(of(&through, &a), of(&resumed, &b));
    }
    Ok(())
}

#[test]
fn a_flush_moves_averages_and_counts_for_overwriting() -> Result<()> {
    let w = scalar(1.0);
    let params = ParamsAdamax {
        lr: 0.5.into(),
        eps: 0.0,
        ema: ema(0.5, Some(2)),
        gradient_accumulation_steps: 4,
        ..Default::default()
    };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    give(&mut optimizer, &w, 1.0);
    optimizer.flush_gradients()?;
    // The first update: an average that is a copy.
    assert_eq!((values(&w), values(&optimizer.state("w")?.ema.unwrap())), (vec![0.5], vec![0.5]));
    give(&mut optimizer, &w, 1.0);
    optimizer.flush_gradients()?;
    // The second one ends with the average in place of the weight.
    let average = values(&optimizer.state("w")?.ema.unwrap());
    assert_eq!(values(&w), average);
    assert!((average[0] - 0.25).abs() < 1e-6, "{average:?}");
    Ok(())
}

#[test]
fn a_flush_that_is_refused_or_skipped() -> Result<()> {
    let w = scalar(1.0);
    let vars = [("w".to_owned(), w.clone())];
    let params = ParamsAdamax { gradient_accumulation_steps: 3, skip_nonfinite: true, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    (0..2).for_each(|_| give(&mut optimizer, &w, 3e38));
    optimizer.set_learning_rate(-1.0);
    let before = Fingerprint::of(&optimizer, &vars);
    let error = optimizer.flush_gradients().unwrap_err();
    assert!(error.to_string().starts_with("Adamax: invalid `lr`"), "{error}");
    assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    optimizer.set_learning_rate(0.1);
    // The sum overflows, and is dropped.
    assert!(optimizer.flush_gradients()?);
    assert!(optimizer.report().skipped() && !optimizer.report().updated());
    assert_eq!((values(&w), optimizer.pending(), optimizer.skipped(), optimizer.updates()), (vec![1.0], 0, 1, 0));
    assert!(optimizer.state("w")?.accumulated.is_none());
    // The variable of the gradients that wait is gone.
    give(&mut optimizer, &w, 1.0);
    optimizer.remove_var("w")?;
    assert!(!optimizer.flush_gradients()?);
    assert_eq!((optimizer.pending(), optimizer.updates()), (0, 0));
    Ok(())
}

#[test]
fn keras_is_told_of_what_its_counter_can_hold() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("state");
    for (lr, is_refused) in [(0.1.into(), false), (ExponentialDecay::new(0.1, 1, 0.5).into(), true)] {
        let w = scalar(1.0);
        let params = ParamsAdamax { lr, gradient_accumulation_steps: 4, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params.clone())?;
        (0..6).for_each(|_| give(&mut optimizer, &w, 1.0));
        optimizer.save_keras(&file)?;
        optimizer.flush_gradients()?;
        match optimizer.save_keras(&file) {
            Ok(()) => {
                let mut back = Adamax::from_named([("w", w.clone())], params)?;
                back.load_keras(&file)?;
                // Updates and calls that wait are right; Keras would make one of each otherwise.
                assert_eq!((back.updates(), back.pending(), is_refused), (2, 0, false));
            }
            Err(error) => assert!(is_refused && error.to_string().contains("counters.calls"), "{error}"),
        }
    }
    Ok(())
}

// === Calls that are refused ===

fn rows_of(ids: &[u32], value: f32) -> SparseGrad {
    let values = Tensor::full(value, (ids.len(), 2), &Device::Cpu).unwrap();
    SparseGrad { indices: Tensor::new(ids, &Device::Cpu).unwrap(), values }
}

#[test]
fn a_refused_call_leaves_sums_alone() -> Result<()> {
    let w = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
    let params = ParamsAdamax {
        lr: 0.5.into(),
        sparse_update: SparseUpdate::Exact,
        weight_decay: WeightDecay::Decoupled(4.0),
        gradient_accumulation_steps: 2,
        ..Default::default()
    };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    let grad = rows_of(&[1], 1.0);
    optimizer.apply_gradients([(&w, &grad)])?;
    let vars = [("w".to_owned(), w.clone())];
    let (before, bytes) = (Fingerprint::of(&optimizer, &vars), optimizer.bytes());
    for _ in 0..2 {
        let error = optimizer.apply_gradients([(&w, &grad)]).unwrap_err().to_string();
        assert!(error.contains("less than 1 of the weight to decay"), "{error}");
        let error = optimizer.flush_gradients().unwrap_err().to_string();
        assert!(error.contains("less than 1 of the weight to decay"), "{error}");
        assert_eq!(Fingerprint::of(&optimizer, &vars), before);
        assert_eq!((optimizer.bytes(), optimizer.pending()), (bytes, 1));
    }
    optimizer.restore(&optimizer.snapshot()?)?;
    // With a learning rate that is allowed the sum is that of two calls, and no more.
    optimizer.set_learning_rate(0.125);
    optimizer.apply_gradients([(&w, &grad)])?;
    assert!((values(&optimizer.state("w")?.exp_avg)[2] - 0.1).abs() < 1e-7);
    Ok(())
}

/// Moments of the variable as they are stored.
fn stored(optimizer: &Adamax) -> (bool, Vec<u64>, Vec<u64>, Vec<u64>) {
    let snapshot = optimizer.snapshot().unwrap();
    let w = &snapshot.vars["w"];
    (w.by_rows, bits(&w.exp_avg), bits(&w.exp_inf), w.scales.as_ref().map(bits).unwrap_or_default())
}

#[test]
fn a_refused_first_step_of_rows_encodes_nothing_anew() -> Result<()> {
    for steps_before in [0, 2] {
        let w = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
        let params = ParamsAdamax {
            lr: 0.5.into(),
            sparse_update: SparseUpdate::Exact,
            state_dtype: StateDType::Q8,
            weight_decay: WeightDecay::Decoupled(4.0),
            ..Default::default()
        };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        for seed in 0..steps_before {
            optimizer.apply_gradients([(&w, &tensor(&noise(seed, 8), &[4, 2], DType::F32))])?;
        }
        let (before, bytes, weights) = (stored(&optimizer), optimizer.bytes(), bits(&w));
        let error = optimizer.apply_gradients([(&w, &rows_of(&[1], 1.0))]).unwrap_err().to_string();
        assert!(error.contains("less than 1 of the weight to decay"), "{error}");
        assert_eq!((stored(&optimizer), optimizer.bytes(), bits(&w)), (before, bytes, weights));
        assert_eq!((optimizer.bytes().missed, optimizer.updates()), (0, steps_before));
        optimizer.set_learning_rate(0.125);
        optimizer.apply_gradients([(&w, &rows_of(&[1], 1.0))])?;
        assert!(optimizer.bytes().missed > 0);
    }
    Ok(())
}

#[test]
fn an_optimizer_without_exact_is_refused_beside_one_that_has_it() -> Result<()> {
    let w = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
    let exact = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..Default::default() };
    let mut first = Adamax::from_named([("w", w.clone())], exact)?;
    first.apply_gradients([(&w, &rows_of(&[0], 1.0))])?;
    let mut second = Adamax::from_named([("w", w.clone())], ParamsAdamax::default())?;
    let before = w.to_vec2::<f32>()?;
    for _ in 0..2 {
        let of_rows = second.apply_gradients([(&w, &rows_of(&[1], 1.0))]).unwrap_err().to_string();
        let dense = second.apply_gradients([(&w, &w.ones_like()?)]).unwrap_err().to_string();
        for error in [of_rows, dense] {
            assert!(error.contains("one optimizer with `Exact` for a table"), "{error}");
        }
    }
    assert_eq!((w.to_vec2::<f32>()?, second.updates()), (before, 0));
    drop(first);
    second.apply_gradients([(&w, &rows_of(&[1], 1.0))])?;
    assert_eq!(second.updates(), 1);
    Ok(())
}

#[test]
fn a_second_optimizer_of_an_exact_table_is_refused_before_it_writes() -> Result<()> {
    for steps in [1, 2] {
        let w = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
        let other = scalar(1.0);
        let exact =
            ParamsAdamax { sparse_update: SparseUpdate::Exact, state_dtype: StateDType::Q8, ..Default::default() };
        let mut first = Adamax::from_named([("w", w.clone())], exact.clone())?;
        first.apply_gradients([(&w, &rows_of(&[0], 1.0))])?;
        let params = ParamsAdamax { gradient_accumulation_steps: steps, ..exact };
        let vars = [("other".to_owned(), other.clone()), ("w".to_owned(), w.clone())];
        let mut second = Adamax::from_named(vars.clone(), params)?;
        for _ in 1..steps {
            second.apply_gradients([(&w, &rows_of(&[1], 1.0))])?;
        }
        let (before, all, bytes) = (stored(&second), Fingerprint::of(&second, &vars), second.bytes());
        for _ in 0..2 {
            let error = second.apply_gradients([(&w, &rows_of(&[1], 1.0))]).unwrap_err().to_string();
            assert!(error.contains("one optimizer with `Exact` for a table"), "{error}");
            assert_eq!((stored(&second), second.bytes()), (before.clone(), bytes));
            assert_eq!(Fingerprint::of(&second, &vars), all);
            second.restore(&second.snapshot()?)?;
        }
        // With the first one gone the step is made, once.
        drop(first);
        second.apply_gradients([(&w, &rows_of(&[1], 1.0))])?;
        assert_eq!(second.updates(), 1);
    }
    Ok(())
}

// === Variables that were replaced ===

#[test]
fn a_layer_with_the_old_variable_is_an_error_of_the_step() -> Result<()> {
    let w = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
    let (lookups, dense) =
        (Embedding::new(w.as_tensor().clone())?, candle_nn::Embedding::new(w.as_tensor().clone(), 2));
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default())?;
    let ids = Tensor::new(&[1u32, 2], &Device::Cpu)?;
    optimizer.backward_step(&lookups.forward(&ids)?.sum_all()?)?;
    let grown = optimizer.append_rows("w", &Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?)?;
    let again = optimizer.append_rows("w", &Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?)?;
    let vars = [("w".to_owned(), again.clone())];
    let before = Fingerprint::of(&optimizer, &vars);
    let text = "has `w` as it was before `append_rows`, which trains nothing any more: use the var that `append_rows` \
                has returned";
    let middle = Table::new(&grown)?.lookup(&ids)?.sum_all()?;
    let new = Table::new(&again)?.lookup(&ids)?.sum_all()?;
    let losses = [lookups.forward(&ids)?.sum_all()?, dense.forward(&ids)?.sum_all()?, middle];
    for loss in &losses {
        // Also where the new one has gradients, too.
        for loss in [loss.clone(), (loss + &new)?] {
            let error = optimizer.step(&loss.backward()?).unwrap_err().to_string();
            assert!(error.contains(&format!("a layer with a gradient {text}")), "{error}");
        }
    }
    let pair: [(&Var, &SparseGrad); 1] = [(&w, &rows_of(&[1], 1.0))];
    let error = optimizer.apply_gradients(pair).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ReplacedVar { name, .. } if name == "w"), "{error:?}");
    let error = optimizer.step_rows(&GradStore::default(), [(&w, TouchedRows::NonZero)]).unwrap_err();
    assert_eq!(error.to_string(), format!("Adamax: a pair {text}"));
    assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    optimizer.backward_step(&new)?;
    // An old one may be given to the optimizer again, and a name that is gone has no old ones.
    optimizer.add_var("old", w.clone())?;
    optimizer.backward_step(&lookups.forward(&ids)?.sum_all()?)?;
    optimizer.remove_var("w")?;
    optimizer.backward_step(&(&losses[0] + &losses[2])?)?;
    Ok(())
}

#[test]
fn a_varmap_is_given_the_rows_too() -> Result<()> {
    let varmap = VarMap::new();
    varmap.get((4, 2), "w", candle_nn::Init::Const(1.0), DType::F32, &Device::Cpu)?;
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
    let rows = Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?;
    let grown = optimizer.append_rows_in(&varmap, "w", &rows)?;
    assert_eq!(varmap.data().lock().unwrap()["w"].id(), grown.id());
    assert_eq!(grown.dims(), [6, 2]);
    // What is refused has changed neither.
    let error = optimizer.append_rows_in(&varmap, "w", &Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ShapeMismatch { .. }), "{error}");
    assert_eq!(varmap.data().lock().unwrap()["w"].id(), grown.id());
    let text = "Adamax: invalid `varmap`: expected a `VarMap` that has the optimizer's var under `w`, got none";
    assert_eq!(optimizer.append_rows_in(&VarMap::new(), "w", &rows).unwrap_err().to_string(), text);
    let again = optimizer.append_rows("w", &rows)?;
    let error = optimizer.append_rows_in(&varmap, "w", &rows).unwrap_err().to_string();
    assert!(error.ends_with("got another one"), "{error}");
    assert_eq!((again.dims(), optimizer.state("w")?.exp_avg.dims()), (&[8, 2][..], &[8, 2][..]));
    Ok(())
}

#[test]
fn looking_at_an_exact_table_changes_no_bit_of_the_run() -> Result<()> {
    let run = |looks: bool| -> Result<Vec<Vec<f32>>> {
        let w = Var::from_tensor(&Tensor::arange(0f32, 24.0, &Device::Cpu)?.reshape((12, 2))?)?;
        let params = ParamsAdamax {
            lr: 0.05.into(),
            sparse_update: SparseUpdate::Exact,
            weight_decay: WeightDecay::Decoupled(0.1),
            state_dtype: StateDType::BF16,
            ..Default::default()
        };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        let table = Table::new(&w)?;
        for step in 0..60u32 {
            optimizer.apply_gradients([(&w, &rows_of(&[step % 5, 7 + step % 3], (step as f32).sin()))])?;
            if looks && step % 7 == 0 {
                let seen = optimizer.moment_statistics("w")?.exp_avg.max;
                let m = optimizer.state("w")?.exp_avg.max_all()?.to_scalar::<f32>()?;
                assert_eq!(seen as f32, m);
                assert!(optimizer.bytes().total() > 0 && !optimizer.to_string().is_empty());
                assert!(optimizer.snapshot()?.vars["w"].missed.is_some());
                let (stored, caught_up) = (w.to_vec2::<f32>()?, table.weight()?);
                assert_ne!(caught_up.to_vec2::<f32>()?, stored);
                // The copy is the variable to a graph.
                let grads = caught_up.sqr()?.sum_all()?.backward()?;
                let grad = grads.get(&w).unwrap().to_vec2::<f32>()?;
                assert_eq!(grad, (caught_up * 2.0)?.to_vec2::<f32>()?);
            }
        }
        // The moments that are seen are those of rows that have caught up.
        let seen = optimizer.state("w")?.exp_avg.to_vec2::<f32>()?;
        optimizer.catch_up()?;
        assert_eq!(optimizer.state("w")?.exp_avg.to_vec2::<f32>()?, seen);
        w.to_vec2()
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}
