//! Learning-rate schedules: against Keras's recorded values, by hand at the boundaries, and through JSON.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use candle_adamax::{
    Adamax, AnnealStrategy, Constant, CosineDecay, CosineDecayRestarts, ErrorKind, ExponentialDecay, InverseTimeDecay,
    Join, LearningRate, LearningRateSchedule, LinearWarmup, OneCycle, ParamGroup, ParamsAdamax, PiecewiseConstantDecay,
    PolynomialDecay, Schedule,
};
use candle_core::{Device, Var};
use proptest::prelude::*;
use serde_json::Value;

use crate::common::folder::Folder;
use crate::common::parts::Parts;
use crate::common::property::config;
use crate::common::recorded;

/// The largest distance from Keras's f64 value, as a share of the largest value of the case.
const TOLERANCE: f64 = 1e-13;
/// Steps that no training reaches.
const HUGE: [u64; 6] = [1 << 31, 1 << 53, (1 << 53) + 1, u64::MAX / 2, u64::MAX - 1, u64::MAX];

/// A schedule with a change: shorter than a structure with `..`, where there are many of them.
fn with<S>(mut schedule: S, change: impl FnOnce(&mut S)) -> S {
    change(&mut schedule);
    schedule
}

// === Joins of joins ===

/// A file of settings that can be written can be read, however its schedules are nested.
#[test]
fn joins_in_joins_can_be_saved_or_are_refused() {
    let nested = |depth: usize| (0..depth).fold(Schedule::from(0.5), |inner, _| Join::new([inner], []).into());
    let optimizer = |depth| {
        let var = Var::new(&[1f32], &Device::Cpu).unwrap();
        Adamax::from_groups([ParamGroup::new("group").var("w", &var).lr(nested(depth))], ParamsAdamax::default())
    };
    let folder = Folder::new();
    let path = folder.file("state");
    let mut deepest = optimizer(32).unwrap();
    deepest.save(&path).unwrap();
    deepest.load(&path).unwrap();
    let error = optimizer(33).unwrap_err().to_string();
    assert!(error.contains("`groups.group.lr.schedules`: expected at most 32 `Join`s one in another"), "{error}");
}

// === Recorded values ===

#[test]
fn golden() {
    let directory = recorded("schedules");
    let mut classes = BTreeSet::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            classes.insert(check_golden(&path));
        }
    }
    // The directory is not empty, and holds every class that Keras and this crate have in common.
    let expected = [
        "CosineDecay",
        "CosineDecayRestarts",
        "ExponentialDecay",
        "InverseTimeDecay",
        "PiecewiseConstantDecay",
        "PolynomialDecay",
    ];
    assert!(classes.iter().eq(expected.iter()), "{classes:?}");
}

/// Compares one file and returns the class it is about.
fn check_golden(path: &Path) -> String {
    let parts = Parts::read(path).unwrap();
    let case = parts.json("case").unwrap();
    // As it was recorded, with the fields of `case` that are none of Keras's, and the `name` in the config.
    let schedule: Schedule = serde_json::from_value(case.clone()).unwrap();
    schedule.validate().unwrap();

    let column = |name: &str| parts.tensors[name].2.as_chunks().0.to_vec();
    let steps = column("steps").into_iter().map(u64::from_le_bytes);
    let expected: Vec<f64> = column("lr_f64").into_iter().map(f64::from_le_bytes).collect();
    let on_a_restart = &parts.tensors["restart_sensitive"].2;
    let peak = expected.iter().copied().fold(0.0, f64::max);

    for ((step, &expected), on_a_restart) in steps.zip(&expected).zip(on_a_restart) {
        let got = schedule.learning_rate(step);
        let same = (got - expected).abs() <= TOLERANCE * peak;
        // There Keras may still be at the bottom of the cycle before; here it is always the top of the next one.
        let restarted = *on_a_restart == 1 && got > schedule.learning_rate(step - 1).max(expected);
        assert!(same || restarted, "{path:?}, step {step}: expected {expected:e}, got {got:e}");
    }
    case["class_name"].as_str().unwrap().to_owned()
}

#[test]
fn one_cycle_is_pytorchs() {
    let path = recorded("pytorch/one_cycle.json");
    let recorded: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let form = serde_json::json!({"class_name": "OneCycle", "config": case["settings"]});
        let schedule: Schedule = serde_json::from_value(form).unwrap();
        schedule.validate().unwrap();
        let rates = case["lr"].as_array().unwrap();
        assert_eq!(rates.len() as u64, case["settings"]["total_steps"].as_u64().unwrap());
        let peak = rates.iter().filter_map(Value::as_f64).fold(0.0, f64::max);
        for (step, expected) in rates.iter().enumerate() {
            let (expected, got) = (expected.as_f64().unwrap(), schedule.learning_rate(step as u64));
            assert!((got - expected).abs() <= TOLERANCE * peak, "{}, step {step}: {expected:e}, {got:e}", case["name"]);
        }
        // After the last step it stays.
        let last = schedule.learning_rate(rates.len() as u64 - 1);
        assert!(HUGE.iter().all(|&step| schedule.learning_rate(step) == last), "{schedule}");
    }
}

// === Boundaries, by hand ===

#[track_caller]
fn assert_rates<const N: usize>(schedule: &dyn LearningRateSchedule, expected: [(u64, f64); N]) {
    schedule.validate().unwrap();
    for (step, rate) in expected {
        assert_eq!(schedule.learning_rate(step), rate, "{schedule:?} at step {step}");
    }
}

#[test]
fn staircases_fall_at_multiples() {
    let exponential = with(ExponentialDecay::new(1.0, 10, 0.5), |s| s.staircase = true);
    assert_rates(
        &exponential,
        [(0, 1.0), (9, 1.0), (10, 0.5), (19, 0.5), (20, 0.25), (639, 0.5_f64.powi(63)), (640, 0.5_f64.powi(64))],
    );
    let inverse = with(InverseTimeDecay::new(1.0, 10, 1.0), |s| s.staircase = true);
    assert_rates(&inverse, [(9, 1.0), (10, 0.5), (29, 1.0 / 3.0), (30, 0.25)]);
}

#[test]
fn staircases_are_exact_where_a_quotient_rounds() {
    // An f64 does not tell these two steps apart: it would fall one step early.
    let n = (1 << 60) / 3;
    let schedule = with(InverseTimeDecay::new(n as f64, 3 * n, 1.0), |s| s.staircase = true);
    assert_rates(&schedule, [(3 * n - 1, n as f64), (3 * n, n as f64 / 2.0)]);
}

#[test]
fn decay_rates_of_zero_and_above_one() {
    assert_rates(&ExponentialDecay::new(0.5, 10, 0.0), [(0, 0.5), (1, 0.0), (u64::MAX, 0.0)]);
    assert_rates(&InverseTimeDecay::new(0.5, 10, 0.0), [(0, 0.5), (u64::MAX, 0.5)]);
    assert_rates(&ExponentialDecay::new(0.5, 10, 2.0), [(10, 1.0), (20, 2.0), (u64::MAX, f64::MAX / 2.0)]);
    // Not 0 times infinity.
    assert_rates(&ExponentialDecay::new(0.0, 10, 2.0), [(u64::MAX, 0.0)]);
}

#[test]
fn polynomial_ends_are_exact() {
    // By Keras's formula the first one is an ulp below.
    let [from, to] = [0.01, 0.001];
    assert_ne!((from - to) + to, from);
    let line = with(PolynomialDecay::new(from, 7), |s| s.end_learning_rate = to);
    assert_rates(&line, [(0, from), (7, to), (8, to), (u64::MAX, to)]);

    let cycle = with(line.clone(), |s| s.cycle = true);
    assert_rates(&cycle, [(0, from), (7, to), (14, to), (7 * (u64::MAX / 7), to)]);
    // One step into the second way, which is twice as long: 6 of 14 steps remain.
    assert!((cycle.learning_rate(8) - (to + (from - to) * 6.0 / 14.0)).abs() < 1e-17);

    let constant = with(line, |s| s.power = 0.0);
    assert_rates(&constant, [(0, from), (3, from), (7, from), (8, from)]);

    let rising = with(PolynomialDecay::new(0.25, 4), |s| s.end_learning_rate = 0.75);
    assert_rates(&rising, [(0, 0.25), (1, 0.375), (2, 0.5), (4, 0.75)]);
}

#[test]
fn polynomial_is_exact_near_the_end_of_a_long_decay() {
    // One step remains, and 1 - s / d is off by an eighth.
    let d = 3 << 50;
    assert_eq!(1.0 - (d - 1) as f64 / d as f64, 1.125 / d as f64);
    let schedule = with(PolynomialDecay::new(1.0, d), |s| {
        s.end_learning_rate = 0.0;
        s.power = 0.5;
    });
    let expected = (1.0 / d as f64).sqrt();
    assert!((schedule.learning_rate(d - 1) - expected).abs() <= f64::EPSILON * expected);
}

#[test]
fn cosine_ends_are_exact() {
    let schedule = with(CosineDecay::new(0.3, 7), |s| s.alpha = 0.1);
    assert_rates(&schedule, [(0, 0.3), (7, 0.3 * 0.1), (8, 0.3 * 0.1), (u64::MAX, 0.3 * 0.1)]);
    assert_rates(&CosineDecay::new(0.3, 10), [(5, 0.15), (10, 0.0), (11, 0.0)]);

    let warm = with(CosineDecay::new(0.1, 10), |s| {
        s.warmup_target = Some(0.3);
        s.warmup_steps = 5;
    });
    assert_rates(&warm, [(0, 0.1), (5, 0.3), (10, 0.15), (15, 0.0), (16, 0.0)]);
    // Warm-up and decay together may be longer than any step.
    let long = with(CosineDecay::new(0.0, u64::MAX), |s| {
        s.warmup_target = Some(0.5);
        s.warmup_steps = u64::MAX;
    });
    assert_rates(&long, [(0, 0.0), (u64::MAX / 2 + 1, 0.25), (u64::MAX, 0.5)]);
    // Without a warm-up, the target is the peak all the same, as in Keras.
    let jump = with(CosineDecay::new(0.1, 10), |s| s.warmup_target = Some(0.5));
    assert_rates(&jump, [(0, 0.5), (5, 0.25)]);
}

#[test]
fn piecewise_keeps_the_left_value_on_a_boundary() {
    let schedule = PiecewiseConstantDecay::new([0.0, 2.7, 9.0], [4.0, 3.0, 2.0, 1.0]);
    assert_rates(&schedule, [(0, 4.0), (1, 3.0), (2, 3.0), (3, 2.0), (9, 2.0), (10, 1.0), (u64::MAX, 1.0)]);
    assert_rates(&PiecewiseConstantDecay::new([2.2, 2.7], [3.0, 2.0, 1.0]), [(2, 3.0), (3, 1.0)]);
    assert_rates(&PiecewiseConstantDecay::new([1e300], [2.0, 1.0]), [(u64::MAX, 2.0)]);
    assert_rates(&PiecewiseConstantDecay::new([], [0.5]), [(0, 0.5), (u64::MAX, 0.5)]);
}

#[test]
fn warmup_ends_are_exact() {
    let [from, to] = [0.2, 0.9];
    assert_ne!(from + (to - from), to);
    assert_rates(&LinearWarmup::new(from, to, 5), [(0, from), (5, to), (6, to), (u64::MAX, to)]);
    assert_rates(&LinearWarmup::new(0.75, 0.25, 4), [(0, 0.75), (1, 0.625), (3, 0.375), (4, 0.25)]);
    assert_rates(&LinearWarmup::new(from, to, 0), [(0, to)]);
}

#[test]
fn one_cycle_ends_are_exact() {
    let (max, initial, last) = (0.3, 0.3 / 25.0, 0.3 / 25.0 / 1e4);
    for anneal_strategy in [AnnealStrategy::Cos, AnnealStrategy::Linear] {
        let two = OneCycle { pct_start: 0.5, anneal_strategy, ..OneCycle::new(max, 22) };
        assert_rates(&two, [(0, initial), (10, max), (21, last), (22, last), (u64::MAX, last)]);
        let three = OneCycle { pct_start: 0.25, three_phase: true, anneal_strategy, ..OneCycle::new(max, 44) };
        assert_rates(&three, [(0, initial), (10, max), (20, initial), (43, last), (44, last)]);
        let only_up = OneCycle { pct_start: 1.0, anneal_strategy, ..OneCycle::new(max, 22) };
        assert_rates(&only_up, [(0, initial), (21, max), (22, max), (u64::MAX, max)]);
        // The rise is over at step 0, where PyTorch divides by zero.
        let jump = OneCycle { pct_start: 0.1, anneal_strategy, ..OneCycle::new(max, 10) };
        assert_rates(&jump, [(0, max), (9, last)]);
    }
}

#[test]
fn join_counts_from_each_boundary() {
    let ramp = |from: f64| LinearWarmup::new(from, from + 100.0, 100).into();
    let schedule = Join::new([ramp(0.0), ramp(1000.0), ramp(2000.0)], [3, 5]);
    assert_rates(
        &schedule,
        [(0, 0.0), (2, 2.0), (3, 1000.0), (4, 1001.0), (5, 2000.0), (6, 2001.0), (u64::MAX, 2100.0)],
    );

    let without_first = Join::new([ramp(0.0), ramp(1000.0)], [0]);
    assert_rates(&without_first, [(0, 1000.0), (1, 1001.0)]);

    let nested = Join::new([schedule.into(), ramp(5000.0)], [4]);
    assert_rates(&nested, [(2, 2.0), (3, 1000.0), (4, 5000.0), (5, 5001.0)]);

    // Warm-up by Join and Keras's warm-up are the same.
    let joined = Join::new([LinearWarmup::new(0.1, 0.3, 20).into(), CosineDecay::new(0.3, 50).into()], [20]);
    let keras = with(CosineDecay::new(0.1, 50), |s| {
        s.warmup_target = Some(0.3);
        s.warmup_steps = 20;
    });
    for step in 0..100 {
        assert_eq!(joined.learning_rate(step), keras.learning_rate(step), "step {step}");
    }
}

// === Restarts ===

fn restarts(first_decay_steps: u64, t_mul: f64, m_mul: f64) -> CosineDecayRestarts {
    with(CosineDecayRestarts::new(1.0, first_decay_steps), |s| {
        s.t_mul = t_mul;
        s.m_mul = m_mul;
    })
}

/// The first step of a cycle has the cycle's full height, and the step before is at the end of a cycle.
#[track_caller]
fn assert_restart(schedule: &CosineDecayRestarts, start: u64, cycle: i32) {
    let height = schedule.m_mul.powi(cycle);
    let [before, at] = [start - 1, start].map(|step| schedule.learning_rate(step));
    assert_eq!(at, height, "cycle {cycle} of {schedule} at step {start}");
    assert!(before < height, "cycle {cycle} of {schedule} before step {start}: {before}");
}

#[test]
fn restarts_of_a_whole_t_mul_are_exact() {
    for t_mul in [1_u64, 2, 3, 10] {
        for first in [5_u64, 7, 10, 1000, 12_345] {
            // Falling heights, so that the height tells the cycle.
            let schedule = restarts(first, t_mul as f64, 0.5);
            let (mut start, mut length) = (0_u64, first);
            let mut cycles = 0;
            while cycles < 1000 {
                let Some(next) = start.checked_add(length) else { break };
                (start, cycles) = (next, cycles + 1);
                assert_restart(&schedule, start, cycles);
                let Some(longer) = length.checked_mul(t_mul) else { break };
                length = longer;
            }
            assert!(cycles >= 15, "{schedule}: {cycles}");
        }
    }
}

#[test]
fn restarts_of_a_dyadic_t_mul_are_exact() {
    // Cycle i begins at first * (3^i - 2^i) * 2 / 2^i for 3/2, and at first * (5^i - 4^i) * 4 / 4^i for 5/4.
    for (numerator, denominator) in [(3_u128, 2_u128), (5, 4)] {
        let step_up = denominator / (numerator - denominator);
        for first in [7_u64, 10, 16, 1 << 20] {
            let schedule = restarts(first, numerator as f64 / denominator as f64, 1.0);
            for cycle in 1..30 {
                let scaled = u128::from(first) * (numerator.pow(cycle) - denominator.pow(cycle)) * step_up;
                let unit = denominator.pow(cycle);
                let start = scaled.div_ceil(unit) as u64;
                if scaled % unit == 0 {
                    assert_restart(&schedule, start, cycle as i32);
                }
                // Between two steps: the first of the cycle is the share of a step into it.
                let length = u128::from(first) * numerator.pow(cycle);
                let done = (u128::from(start) * unit - scaled) as f64 / length as f64;
                let expected = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
                let got = schedule.learning_rate(start);
                assert!((got - expected).abs() < 1e-13, "{schedule} at {start}: {expected}, got {got}");
                assert!(schedule.learning_rate(start - 1) < 0.1, "{schedule} before {start}");
            }
        }
    }
}

#[test]
fn restarts_of_a_decimal_t_mul_are_those_meant() {
    // f64 has no 1.1: as it is rounded, the second cycle of 100 steps and 1.1 would end after step 210.
    let first = 100_000_u64;
    for (unit, numerators) in [(10, 11..50), (100, 101..150), (1000, 1001..1020)] {
        for numerator in numerators.filter(|numerator| numerator % unit != 0) {
            let schedule = restarts(first, numerator as f64 / unit as f64, 0.5);
            let (mut start, mut length) = (0, first);
            for cycle in 1.. {
                start += length;
                assert_restart(&schedule, start, cycle);
                if length * numerator % unit != 0 {
                    break;
                }
                length = length * numerator / unit;
            }
        }
    }
    for (start, cycle) in [(100, 1), (210, 2), (331, 3)] {
        assert_restart(&restarts(100, 1.1, 0.5), start, cycle);
    }
}

#[test]
fn restarts_do_not_trust_the_logarithm() {
    // So long that the logarithms of a restart's step and of the step before round to the same cycle: too early with
    // some of these settings, too late with others.
    for t_mul in [1.25, 1.5, 2.5, 3.5, 6.5, 10.5] {
        for first in ((1 << 52) - 100)..(1 << 52) {
            assert_restart(&restarts(first, t_mul, 0.5), first, 1);
        }
    }
}

#[test]
fn restarts_with_growing_height_and_alpha() {
    let schedule = with(restarts(10, 1.0, 1.0), |s| {
        s.m_mul = 2.0;
        s.alpha = 0.5;
    });
    assert_rates(&schedule, [(0, 1.0), (5, 0.75), (10, 1.5), (15, 1.0), (20, 2.5)]);
    let flat = restarts(10, 1.0, 0.0);
    assert_rates(&flat, [(0, 1.0), (5, 0.5), (10, 0.0), (u64::MAX, 0.0)]);
}

// === Any settings, any step ===

/// Settings that `validate` refuses must not panic either: the caller may not have called it.
#[test]
fn refused_settings_do_not_panic() {
    let numbers = [f64::NAN, f64::INFINITY, -1.0, 0.0, 0.5, 1.0, 1e300];
    for a in numbers {
        for b in numbers {
            for steps in [0, 1, u64::MAX] {
                for (flag, step) in [(false, 0), (true, 1), (false, u64::MAX), (true, u64::MAX)] {
                    for schedule in all_schedules(a, b, steps, flag) {
                        schedule.learning_rate(step);
                        let _ = schedule.validate();
                        let _ = LearningRate::from(schedule).at(step);
                    }
                }
            }
        }
    }
    for schedule in [
        Schedule::from(PiecewiseConstantDecay::new([], [])),
        PiecewiseConstantDecay::new([5.0, f64::NAN, -1.0], [0.1]).into(),
        Join::new([], []).into(),
        Join::new([], [5, 3]).into(),
        Join::new([CosineDecay::new(0.1, 0).into()], [7, 3, 9]).into(),
    ] {
        for step in 0..12 {
            schedule.learning_rate(step);
        }
        assert!(schedule.validate().is_err(), "{schedule}");
    }
}

/// Every schedule with two numbers, one number of steps and one flag for all their settings.
fn all_schedules(a: f64, b: f64, steps: u64, flag: bool) -> Vec<Schedule> {
    let warm = with(CosineDecay::new(a, steps), |s| {
        s.alpha = b;
        s.warmup_target = flag.then_some(b);
        s.warmup_steps = if flag { steps } else { 0 };
    });
    vec![
        Constant::new(a).into(),
        with(ExponentialDecay::new(a, steps, b), |s| s.staircase = flag).into(),
        with(InverseTimeDecay::new(a, steps, b), |s| s.staircase = flag).into(),
        with(PolynomialDecay::new(a, steps), |s| {
            s.cycle = flag;
            s.power = b;
        })
        .into(),
        with(PolynomialDecay::new(a, steps), |s| {
            s.cycle = flag;
            s.end_learning_rate = b;
        })
        .into(),
        warm.clone().into(),
        with(CosineDecayRestarts::new(a, steps), |s| {
            s.t_mul = if flag { 1.5 } else { b };
            s.alpha = b;
        })
        .into(),
        with(CosineDecayRestarts::new(a, steps), |s| {
            s.t_mul = 1.0 + b;
            s.m_mul = b;
        })
        .into(),
        PiecewiseConstantDecay::new([b], [a, b]).into(),
        LinearWarmup::new(a, b, steps).into(),
        with(OneCycle::new(a, steps), |s| {
            s.pct_start = b;
            s.three_phase = flag;
            s.anneal_strategy = if flag { AnnealStrategy::Linear } else { AnnealStrategy::Cos };
        })
        .into(),
        with(OneCycle::new(a, steps), |s| {
            s.pct_start = b / 2.0;
            s.three_phase = flag;
            s.div_factor = 1.0 + b;
        })
        .into(),
        Join::new([warm.into(), LinearWarmup::new(a, b, steps).into()], [steps]).into(),
    ]
}

#[test]
fn huge_steps_are_finite() {
    for steps in [1, 3, 1000, u64::MAX / 3, u64::MAX] {
        for flag in [false, true] {
            for schedule in all_schedules(0.3, 0.9, steps, flag) {
                if schedule.validate().is_err() {
                    continue; // t_mul 0.9, a rise of 0.9 in three phases, a cycle of one step
                }
                for step in HUGE {
                    let rate = schedule.learning_rate(step);
                    assert!((0.0..=0.9).contains(&rate), "{schedule} at {step}: {rate}");
                }
            }
            let near_one = [1.0, 1.0 + f64::EPSILON, 1.0 + 1e-9, 1.1];
            let far_from_it = [1.5, 2.0, 2.5, 3.0, 1e15 + 0.5, 1e300];
            for t_mul in near_one.into_iter().chain(far_from_it) {
                for step in HUGE {
                    let rate = restarts(steps, t_mul, 0.99).learning_rate(step);
                    assert!((0.0..=1.0).contains(&rate), "t_mul {t_mul}, {steps} steps, at {step}: {rate}");
                }
            }
        }
    }
}

/// Steps of every magnitude.
fn any_step() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64_u32).prop_map(|(bits, shift)| bits >> shift)
}

fn any_rate() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1e-300), 1e-9..1e-2, 0.0..1e3]
}

/// Numbers at the edges of what an f64 holds, ordinary ones, and some that no setting may be.
fn edge_number() -> impl Strategy<Value = f64> {
    let edges = [0.0, -0.0, 5e-324, f64::MIN_POSITIVE, f64::EPSILON, 0.5, 1.0, 2.0, 1e15 + 0.5, 1e300, f64::MAX];
    let near_one = [1.0 - f64::EPSILON / 2.0, 1.0 + f64::EPSILON, 1.0 + 1e-9];
    let none = [-5e-324, -1.0, f64::INFINITY, f64::NAN];
    prop_oneof![
        8 => prop::sample::select(edges.to_vec()),
        3 => prop::sample::select(near_one.to_vec()),
        1 => prop::sample::select(none.to_vec()),
        3 => 0.0..1.0_f64,
        2 => 1.0..5.0_f64,
        2 => any::<f64>().prop_map(f64::abs),
    ]
}

fn edge_steps() -> impl Strategy<Value = u64> {
    let edges =
        [0, 1, 2, 3, 10, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, u64::MAX / 2, u64::MAX - 2, u64::MAX - 1, u64::MAX];
    prop_oneof![prop::sample::select(edges.to_vec()), any_step()]
}

/// A schedule of every kind, with settings of every kind.
fn edge_schedules() -> impl Strategy<Value = Vec<Schedule>> {
    let numbers = prop::array::uniform4(edge_number());
    let strategies = (any::<bool>(), any::<bool>());
    (numbers, edge_steps(), edge_steps(), strategies).prop_map(|([a, b, c, d], steps, more, (flag, other))| {
        let anneal_strategy = if other { AnnealStrategy::Linear } else { AnnealStrategy::Cos };
        vec![
            a.into(),
            ExponentialDecay { staircase: flag, ..ExponentialDecay::new(a, steps, b) }.into(),
            InverseTimeDecay { staircase: flag, ..InverseTimeDecay::new(a, steps, b) }.into(),
            PolynomialDecay { end_learning_rate: b, power: c, cycle: flag, ..PolynomialDecay::new(a, steps) }.into(),
            with(CosineDecay::new(a, steps), |s| {
                s.alpha = b;
                s.warmup_target = flag.then_some(c);
                s.warmup_steps = if flag { more } else { 0 };
            })
            .into(),
            CosineDecayRestarts { t_mul: b, m_mul: c, alpha: d, ..CosineDecayRestarts::new(a, steps) }.into(),
            CosineDecayRestarts { t_mul: 1.0 + b, m_mul: c, ..CosineDecayRestarts::new(a, steps) }.into(),
            PiecewiseConstantDecay::new([c, d], [a, b, a]).into(),
            LinearWarmup::new(a, b, steps).into(),
            with(OneCycle::new(a, steps), |s| {
                (s.pct_start, s.div_factor, s.final_div_factor) = (b, c, d);
                (s.three_phase, s.anneal_strategy) = (flag, anneal_strategy);
            })
            .into(),
            OneCycle { pct_start: b, three_phase: flag, anneal_strategy, ..OneCycle::new(a, steps) }.into(),
        ]
    })
}

/// A rate of a valid schedule, as it is and in a file: finite, and not negative.
fn assert_valid_rates(schedule: &Schedule, steps: &[u64]) {
    let read: Schedule = serde_json::from_str(&serde_json::to_string(schedule).unwrap()).unwrap();
    let lr = LearningRate::from(read);
    for &step in steps {
        let rate = schedule.learning_rate(step);
        assert!(rate.is_finite() && rate >= 0.0, "{schedule} at {step}: {rate}");
        assert_eq!(lr.at(step).unwrap().to_bits(), rate.to_bits(), "{schedule} at {step}");
    }
}

#[test]
fn rates_that_an_f64_cannot_hold_are_its_largest() {
    let growing = ExponentialDecay::new(4.0, 1, 2.0);
    assert_rates(&growing, [(1, 8.0), (1020, 2f64.powi(1022)), (1022, f64::MAX), (u64::MAX, f64::MAX)]);
    let joined = Join::new([Constant::new(1.0).into(), growing.into()], [5]);
    assert_rates(&joined, [(4, 1.0), (5, 4.0), (1 << 40, f64::MAX)]);
    let rising = with(CosineDecayRestarts::new(1e300, 10), |s| (s.t_mul, s.m_mul) = (1.0, 1e10));
    assert_rates(&rising, [(0, 1e300), (10, f64::MAX), (1000, f64::MAX)]);
    // The end of a cycle that is too high is still its end.
    assert!(rising.learning_rate(15).is_finite());

    let cycle = OneCycle { div_factor: 1.0, final_div_factor: 0.125, ..OneCycle::new(1e308, 10) };
    assert_eq!(
        cycle.validate().unwrap_err().to_string(),
        "invalid `final_div_factor`: expected a number so large that max_lr / div_factor / final_div_factor is finite, \
         got 0.125"
    );
}

#[test]
fn a_file_with_an_invalid_schedule_is_refused_by_name() {
    let cosine = r#"{"class_name": "CosineDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 0}}"#;
    let join = format!(r#"{{"class_name": "Join", "config": {{"schedules": [0.5, {cosine}], "boundaries": [5]}}}}"#);
    let nested = join.replace("0.5, ", r#"{"class_name": "Constant", "config": {"learning_rate": 0.5}}, "#);
    for text in [cosine, &nested] {
        let error = serde_json::from_str::<Schedule>(text).unwrap_err().to_string();
        assert!(error.contains("invalid `decay_steps`: expected at least 1 step, got 0"), "{error}");
        assert!(serde_json::from_str::<LearningRate>(text).is_err());
    }
    assert!(serde_json::from_str::<Schedule>(&join).is_err());
    let negative = r#"{"class_name": "Constant", "config": {"learning_rate": -0.5}}"#;
    let error = serde_json::from_str::<Schedule>(negative).unwrap_err().to_string();
    assert!(error.starts_with("invalid `learning_rate`: expected a finite number that is not negative, got -0.5"));
    let error = Constant::new(f64::NAN).validate().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidArgument { field, .. } if field == "learning_rate"));
}

#[test]
fn a_schedule_may_start_at_any_step() {
    assert_rates(&Constant::new(0.5), [(0, 0.5), (u64::MAX, 0.5)]);
    let cosine = || Schedule::from(CosineDecay::new(0.5, 100));
    assert_rates(&cosine().starting_at(1000), [(0, 0.5), (1000, 0.5), (1050, 0.25), (1100, 0.0), (u64::MAX, 0.0)]);
    assert_rates(&cosine().starting_at(0), [(0, 0.5), (50, 0.25), (100, 0.0)]);
    assert_rates(&cosine().starting_at(u64::MAX), [(0, 0.5), (u64::MAX, 0.5)]);
    assert_eq!(cosine().starting_at(7).to_string(), "Join(Constant(0.5), from step 7 CosineDecay(0.5, 100 steps))");
}

proptest! {
    #![proptest_config(config(20_000))]

    /// Whatever is accepted, at whatever step.
    #[test]
    fn accepted_schedules_give_finite_rates(
        schedules in edge_schedules(), boundary in edge_steps(), steps in prop::array::uniform4(edge_steps()),
    ) {
        for schedule in &schedules {
            if schedule.validate().is_err() {
                // Neither does JSON bring it in. (Infinity and NaN become null there, which may be allowed.)
                let read = serde_json::from_str::<Schedule>(&serde_json::to_string(schedule).unwrap());
                prop_assert!(read.is_err() || read.is_ok_and(|read| read != *schedule && read.validate().is_ok()));
                continue;
            }
            assert_valid_rates(schedule, &steps);
            assert_valid_rates(schedule, &HUGE);
            assert_valid_rates(&schedule.clone().starting_at(boundary), &steps);
        }
        let valid: Vec<_> = schedules.into_iter().filter(|schedule| schedule.validate().is_ok()).take(3).collect();
        let boundaries: Vec<u64> = (1..valid.len() as u64).map(|i| (boundary >> 1) + i).collect();
        if !valid.is_empty() {
            assert_valid_rates(&Join::new(valid, boundaries).into(), &steps);
        }
    }
}

proptest! {
    #![proptest_config(config(2000))]

    /// Without a tolerance: rounding must not step over an end.
    #[test]
    fn values_stay_within_the_ends(
        from in any_rate(), to in any_rate(), share in 0.0..=1.0_f64, power in 0.0..4.0_f64, t_mul in 1.0..5.0_f64,
        steps in any_step(), more in any_step(), step in any_step(), flag: bool,
    ) {
        let steps = steps.max(1);
        let within = |schedule: Schedule, low: f64, high: f64| {
            schedule.validate().unwrap();
            let rate = schedule.learning_rate(step);
            prop_assert!(low <= rate && rate <= high, "{schedule} at {step}: {rate} is not in [{low}, {high}]");
            prop_assert_eq!(LearningRate::from(schedule).at(step).unwrap().to_bits(), rate.to_bits());
            Ok(())
        };
        let (low, high) = (from.min(to), from.max(to));
        within(with(ExponentialDecay::new(from, steps, share), |s| s.staircase = flag).into(), 0.0, from)?;
        within(with(InverseTimeDecay::new(from, steps, power), |s| s.staircase = flag).into(), 0.0, from)?;
        let polynomial = with(PolynomialDecay::new(from, steps), |s| { s.end_learning_rate = to; s.power = power; s.cycle = flag; });
        within(polynomial.into(), low, high)?;
        within(with(CosineDecay::new(from, steps), |s| s.alpha = share).into(), share * from, from)?;
        let warm = with(CosineDecay::new(from, steps), |s| { s.alpha = share; s.warmup_target = Some(to); s.warmup_steps = more; });
        within(warm.into(), from.min(share * to), high)?;
        for t_mul in [t_mul, t_mul.floor(), 1.0 + share] {
            let again = with(CosineDecayRestarts::new(from, steps), |s| { s.t_mul = t_mul; s.m_mul = share; s.alpha = share; });
            within(again.into(), share * from, from)?;
        }
        let line: Schedule = LinearWarmup::new(from, to, more).into();
        within(line.clone(), low, high)?;
        within(PiecewiseConstantDecay::new([steps as f64], [from, to]).into(), low, high)?;
        within(Join::new([line.clone(), line], [steps]).into(), low, high)?;
    }

    /// The cycle of a fractional `t_mul` against cycles added up one by one.
    #[test]
    fn restarts_agree_with_cycles_in_a_row(first in 1..1000_u64, t_mul in 1.05..4.0, step in 0..1_000_000_u64) {
        let (mut start, mut length) = (0.0, first as f64);
        while start + length <= step as f64 {
            start += length;
            length *= t_mul;
        }
        let done = (step as f64 - start) / length;
        // Right at a start the sum of roundings decides; that is what the tests above are for.
        prop_assume!((1e-9..1.0 - 1e-9).contains(&done));
        let expected = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        let got = restarts(first, t_mul, 1.0).learning_rate(step);
        prop_assert!((got - expected).abs() < 1e-11, "{} and {}", got, expected);
    }

    /// Every bit of every number survives the file.
    #[test]
    fn json_round_trip_is_bit_exact(a in any_rate(), b in 0.0..=1.0, steps: u64, flag: bool) {
        for schedule in all_schedules(a, b, steps, flag) {
            let text = serde_json::to_string(&schedule).unwrap();
            let read = serde_json::from_str::<Schedule>(&text);
            if let Err(refused) = schedule.validate() {
                let error = read.unwrap_err().to_string();
                prop_assert!(error.starts_with(&refused.to_string()), "{error}");
                continue; // no steps, t_mul 0.9, a rise of 0.9 in three phases, a cycle of one step
            }
            prop_assert_eq!(&read.unwrap(), &schedule);
            let lr: LearningRate = serde_json::from_str(&text).unwrap();
            prop_assert!(matches!(lr, LearningRate::Schedule(read) if read == schedule));
        }
        let text = serde_json::to_string(&LearningRate::from(a)).unwrap();
        let lr: LearningRate = serde_json::from_str(&text).unwrap();
        prop_assert!(matches!(lr, LearningRate::Constant(read) if read.to_bits() == a.to_bits()));
    }
}
