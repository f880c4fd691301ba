//! Moments in 4 and in 2 bytes: u has to stay within one rounding of the recurrence in f64 at every step of runs of all
//! kinds, and a step within its bound, whatever the gradients are.

use std::ops::Range;

use candle_adamax::{
    Adamax, Clip, EpsMode, ErrorKind, Kernel, ParamGroup, ParamsAdamax, Rounding, SparseGrad, StateDType, StepCount,
    WeightDecay,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

use crate::common::folder::Folder;
use crate::common::property::config;
use crate::common::{Random, bits, pool, values};

const CODED: [StateDType; 3] = [StateDType::BF16, StateDType::F16, StateDType::Q8];

/// What u may be in terms of the exact one.
fn allowed(encoding: StateDType) -> Range<f64> {
    match encoding {
        StateDType::BF16 => 1.0 - 2f64.powi(-8)..1.0 + 2f64.powi(-8),
        StateDType::F16 => 1.0 - 2f64.powi(-11)..1.0 + 2f64.powi(-11),
        StateDType::Q8 => 1.0..1.13,
        _ => 1.0 - 1e-5..1.0 + 1e-5,
    }
}

/// How far below the largest of its block a u may be for that to hold.
fn in_range(encoding: StateDType) -> f64 {
    match encoding {
        StateDType::F16 => 2f64.powi(-27),
        StateDType::Q8 => 2f64.powi(-29),
        _ => 0.0,
    }
}

fn params(state_dtype: StateDType) -> ParamsAdamax {
    ParamsAdamax { state_dtype, ..Default::default() }
}

fn state_of(optimizer: &Adamax) -> (Vec<f64>, Vec<f64>) {
    let state = optimizer.state("w").unwrap();
    (values(&state.exp_avg), values(&state.exp_inf))
}

/// Asserts that `got` is in the range of what it may be, where it is in its block's range.
fn assert_norms(encoding: StateDType, what: &str, got: &[f64], exact: &[f64], unit: usize) {
    let allowed = allowed(encoding);
    for (block, (got, exact)) in got.chunks(unit).zip(exact.chunks(unit)).enumerate() {
        let largest = exact.iter().copied().fold(0.0, f64::max);
        for (i, (&got, &exact)) in got.iter().zip(exact).enumerate() {
            // Below that, f32 itself has no precision left.
            if exact > largest * in_range(encoding) && exact > 1e-35 {
                let ratio = got / exact;
                assert!(
                    allowed.contains(&ratio),
                    "{encoding:?}, {what}, u[{}]: {got:e} for {exact:e}",
                    block * unit + i
                );
            } else if exact > 0.0 {
                assert!(got >= exact * allowed.start * 0.999, "{encoding:?}, {what}: {got:e} for {exact:e}");
            }
        }
    }
}

/// A run with missing gradients, other betas on the way, and gradients that jump from 1e-3 to 1e30 and back.
#[test]
fn u_follows_the_recurrence_for_ever() -> Result<()> {
    const N: usize = 1500; // one whole block and a part of one
    for encoding in CODED {
        let var = Var::zeros(N, DType::F32, &Device::Cpu)?;
        let mut optimizer =
            Adamax::from_named([("w", var.clone())], ParamsAdamax { lr: 0.0.into(), ..params(encoding) })?;
        let (mut random, mut exact) = (Random(7), vec![0.0f64; N]);
        for step in 0..6000 {
            let beta2 = match step / 1000 {
                0 | 3 => 0.999,
                1 => 0.99,
                2 => 0.9999,
                4 => 0.95,
                _ => 0.99999,
            };
            if step % 1000 == 0 {
                optimizer.set_params(ParamsAdamax { beta2, lr: 0.0.into(), ..params(encoding) })?;
            }
            if random.next() < 0.1 {
                continue; // no gradient: u stands
            }
            let (from, to) = if step % 2500 == 2499 { (28.0, 30.0) } else { (-3.0, 1.0) };
            let grads: Vec<f32> = (0..N).map(|_| random.gradient(from, to)).collect();
            for (u, g) in exact.iter_mut().zip(&grads) {
                *u = (*u * beta2).max(f64::from(g.abs()));
            }
            optimizer.apply_gradients([(&var, &Tensor::new(grads, &Device::Cpu)?)])?;
            if step % 50 == 0 || step % 2500 > 2490 {
                assert_norms(encoding, &format!("step {step}"), &state_of(&optimizer).1, &exact, 1024);
            }
        }
    }
    Ok(())
}

/// The stated range, at its edge: a unit that is as large as it can be for the largest value of its block.
#[test]
fn u_is_exact_down_to_the_stated_part_of_the_largest() -> Result<()> {
    const N: usize = 1000;
    for (encoding, edge) in [(StateDType::F16, -27), (StateDType::Q8, -29)] {
        let var = Var::zeros(N, DType::F32, &Device::Cpu)?;
        let params = ParamsAdamax { beta2: 0.9999, ..params(encoding) };
        let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
        let mut step = |largest: f32, of: &dyn Fn(usize) -> f32| -> Result<Vec<f32>> {
            let mut grads: Vec<f32> = (0..N).map(of).collect();
            grads[0] = largest;
            optimizer.apply_gradients([(&var, &Tensor::new(grads.as_slice(), &Device::Cpu)?)])?;
            Ok(grads)
        };
        // The unit is 2, and shrinks by a trifle; then it has to move by two octaves, and is nearly 8.
        step(1.0, &|_| 0.0)?;
        // Half of them just inside the range, up to twice its edge; half of them outside, down to half of it.
        let exact = step(2.0, &|i| 2.0 * 2f32.powi(edge) * (0.5 + i as f32 / 500.0).max(2f32.powi(-8)))?;
        let got = state_of(&optimizer).1;
        let is_allowed = |i: usize| {
            let ratio = got[i] / f64::from(exact[i]);
            let range = allowed(encoding);
            // A rounding of f32 more than that of the code.
            ratio >= range.start * (1.0 - 1e-6) && ratio <= range.end * (1.0 + 1e-6)
        };
        let inside = (1..N).filter(|&i| f64::from(exact[i]) >= 2.0 * 2f64.powi(edge));
        let outside = (1..N).filter(|&i| f64::from(exact[i]) < 2.0 * 2f64.powi(edge) * 0.8);
        for i in inside {
            assert!(is_allowed(i), "{encoding:?}: {} for {}", got[i], exact[i]);
        }
        assert!(outside.filter(|&i| !is_allowed(i)).count() > 100, "{encoding:?}");
    }
    Ok(())
}

/// What the rounding of the quotient adds to m, and to the way of weights whose gradients are nothing but noise.
#[test]
fn noise_of_the_quotient_is_what_is_stated() -> Result<()> {
    const N: usize = 3000;
    const UPDATES: usize = 600;
    let run = |encoding: StateDType, beta1: f64, beta2: f64| -> Result<_> {
        let var = Var::zeros(N, DType::F32, &Device::Cpu)?;
        let params = ParamsAdamax { lr: 1e-3.into(), beta1, beta2, ..params(encoding) };
        let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
        let mut random = Random(5);
        for _ in 0..UPDATES {
            // About normal.
            let noise = |random: &mut Random| (0..12).map(|_| random.next()).sum::<f64>() - 6.0;
            let grads: Vec<f32> = (0..N).map(|_| noise(&mut random) as f32).collect();
            optimizer.apply_gradients([(&var, &Tensor::new(grads, &Device::Cpu)?)])?;
        }
        let (m, u) = state_of(&optimizer);
        Ok((values(&var), m, u))
    };
    let rms = |x: &mut dyn Iterator<Item = f64>| (x.map(|x| x * x).sum::<f64>() / N as f64).sqrt();
    let mut wrong = Vec::new();
    for (beta1, beta2, way_of_q8, way_of_bf16) in WAYS {
        let (way, exact, _) = run(StateDType::F32, beta1, beta2)?;
        for encoding in [StateDType::Q8, StateDType::BF16, StateDType::F16] {
            let (coded, m, u) = run(encoding, beta1, beta2)?;
            let off = rms(&mut way.iter().zip(&coded).map(|(a, b)| a - b)) / rms(&mut way.iter().copied());
            let noise = rms(&mut (0..N).map(|i| (m[i] - exact[i]) / u[i]));
            let c = (1.0 - beta1) / (1.0 - beta1 / beta2);
            let stated = c / 311.0 / (1.0 - beta1 * beta1).sqrt();
            let holds = match encoding {
                StateDType::Q8 => (noise / stated - 1.0).abs() < 0.1 && (off / way_of_q8 - 1.0).abs() < 0.1,
                StateDType::BF16 => (off / way_of_bf16 - 1.0).abs() < 0.2,
                _ => off < way_of_bf16 / 6.0,
            };
            if !holds {
                wrong.push(format!(
                    "{beta1} {beta2} {encoding:?}: {off:.5} of the way, noise {noise:.5}, not {stated:.5}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// beta1, beta2; how far weights end from those of f32, in terms of the way: in Q8, in BF16.
const WAYS: [(f64, f64, f64, f64); 5] = [
    (0.5, 0.999, 0.029, 0.0021),
    (0.9, 0.999, 0.080, 0.005),
    (0.95, 0.999, 0.159, 0.007),
    (0.99, 0.999, 0.825, 0.016),
    (0.9, 0.95, 0.095, 0.005),
];

/// Rows of a table have clocks of their own.
#[test]
fn rows_of_a_lazy_table_decay_by_their_own_touches() -> Result<()> {
    const ROWS: usize = 40;
    const DIM: usize = 6;
    for encoding in CODED {
        let var = Var::zeros((ROWS, DIM), DType::F32, &Device::Cpu)?;
        let mut optimizer = Adamax::from_named([("w", var.clone())], params(encoding))?;
        let (mut random, mut exact) = (Random(11), vec![0.0f64; ROWS * DIM]);
        // It begins as any variable does, so that scales of blocks have to become scales of rows.
        for _ in 0..20 {
            let grads: Vec<f32> = (0..ROWS * DIM).map(|_| random.gradient(-4.0, 0.0)).collect();
            exact.iter_mut().zip(&grads).for_each(|(u, g)| *u = (*u * 0.999).max(f64::from(g.abs())));
            optimizer.apply_gradients([(&var, &Tensor::from_vec(grads, (ROWS, DIM), &Device::Cpu)?)])?;
        }
        for step in 0..4000 {
            // Some rows often, some hardly ever.
            let mut rows: Vec<u32> = (0..3).map(|_| (random.next().powi(3) * ROWS as f64) as u32).collect();
            rows.sort_unstable();
            rows.dedup();
            let scale = if step < 2000 { 0.0 } else { -3.0 };
            let grads: Vec<f32> = (0..rows.len() * DIM).map(|_| random.gradient(scale - 2.0, scale)).collect();
            for (row, grads) in rows.iter().zip(grads.chunks(DIM)) {
                for (u, g) in exact[*row as usize * DIM..].iter_mut().zip(grads) {
                    *u = (*u * 0.999).max(f64::from(g.abs()));
                }
            }
            let grad = SparseGrad {
                values: Tensor::from_vec(grads, (rows.len(), DIM), &Device::Cpu)?,
                indices: Tensor::new(rows, &Device::Cpu)?,
            };
            optimizer.apply_gradients([(&var, &grad)])?;
            if step % 100 == 99 {
                assert_norms(encoding, &format!("step {step}"), &state_of(&optimizer).1, &exact, DIM);
            }
        }
        // A dense gradient moves all clocks again.
        let ones = Tensor::full(1e-6f32, (ROWS, DIM), &Device::Cpu)?;
        exact.iter_mut().for_each(|u| *u = (*u * 0.999).max(f64::from(1e-6f32)));
        optimizer.apply_gradients([(&var, &ones)])?;
        assert_norms(encoding, "a dense step", &state_of(&optimizer).1, &exact, DIM);
    }
    Ok(())
}

/// The quotient is unbiased: over many draws, m is what it is in f64.
#[test]
fn m_is_right_on_average() -> Result<()> {
    const N: usize = 20_000;
    for encoding in CODED {
        let var = Var::zeros(N, DType::F32, &Device::Cpu)?;
        let mut optimizer = Adamax::from_named([("w", var.clone())], params(encoding))?;
        // A gradient that would get lost in the rounding of m: it changes it by less than half a unit.
        let (mut m, mut u) = (0.0, 0.0f64);
        for step in 0..60 {
            let g = if step < 20 { 0.3 } else { 0.29 };
            (m, u) = (0.9 * m + 0.1 * g, (0.999 * u).max(g));
            optimizer.apply_gradients([(&var, &Tensor::full(g as f32, N, &Device::Cpu)?)])?;
        }
        let (got, _) = state_of(&optimizer);
        let mean = got.iter().sum::<f64>() / N as f64;
        // Each step adds at most one code of noise, of which a tenth is left after some ten more.
        let code = if encoding == StateDType::Q8 { u / 100.0 } else { u / 128.0 };
        assert!((mean - m).abs() < 6.0 * 2.3 * code / (N as f64).sqrt(), "{encoding:?}: {mean} for {m}");
        assert!(got.iter().any(|&x| (x - mean).abs() > 1e-9), "{encoding:?}: the noise is the same everywhere");
    }
    Ok(())
}

/// Gradients of every kind: zero, subnormal, ordinary, huge, infinite, NaN.
fn any_gradient() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => Just(0.0f32),
        2 => (-45.0f64..-38.0).prop_map(|e| 10f64.powf(e) as f32),
        4 => (-30.0f64..30.0).prop_map(|e| 10f64.powf(e) as f32),
        4 => -1.0f32..1.0,
        1 => Just(1e30f32),
        1 => Just(-1e-30f32),
        1 => Just(f32::MAX),
    ]
}

proptest! {
    #![proptest_config(config(1000))]

    /// `|dw| <= C * lr / (1 - beta1^t)`, whatever comes, and nothing that is not finite comes from what is.
    #[test]
    fn no_step_of_q8_exceeds_its_bound(
        steps in prop::collection::vec(prop::collection::vec(any_gradient(), 9), 1..40),
        beta1 in prop_oneof![Just(0.9f64), Just(0.0), Just(0.99)],
        beta2 in prop_oneof![Just(0.999f64), Just(0.9999), Just(0.992)],
        eps in prop_oneof![Just(1e-7f64), Just(0.0)],
        eps_mode in prop_oneof![Just(EpsMode::AddToNorm), Just(EpsMode::InsideMax)],
        sparse: bool,
        rowwise_norm: bool,
    ) {
        let lr = 0.125;
        let var = Var::zeros((3, 3), DType::F32, &Device::Cpu).unwrap();
        let params = ParamsAdamax { lr: lr.into(), beta1, beta2, eps, eps_mode, rowwise_norm, ..params(StateDType::Q8) };
        let mut optimizer = Adamax::from_named([("w", var.clone())], params).unwrap();
        let c = (1.0 - beta1) / (1.0 - beta1 / beta2);
        let mut before = vec![0.0f64; 9];
        for (t, grads) in (1..).zip(steps) {
            let grads = Tensor::from_vec(grads, (3, 3), &Device::Cpu).unwrap();
            if sparse {
                let indices = Tensor::new(&[0u32, 1, 2], &Device::Cpu).unwrap();
                optimizer.apply_gradients([(&var, &SparseGrad { indices, values: grads })]).unwrap();
            } else {
                optimizer.apply_gradients([(&var, &grads)]).unwrap();
            }
            let after = values(&var);
            let bound = c * lr / (1.0 - beta1.powi(t)) * (1.0 + 1e-5);
            for (a, b) in before.iter().zip(&after) {
                let rounding = 2.0 * f64::from(f32::EPSILON) * a.abs().max(b.abs());
                prop_assert!((a - b).abs() <= bound + rounding, "step {}: from {} to {}, bound {}", t, a, b, bound);
            }
            before = after;
        }
    }

    /// Infinity and NaN stay what and where they are, and the elements beside them do not notice.
    #[test]
    fn what_is_not_finite_stays_so(
        steps in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 4), 1..10),
        encoding in prop_oneof![Just(StateDType::BF16), Just(StateDType::F16), Just(StateDType::Q8)],
        at in 0usize..10,
    ) {
        let n = 4;
        let var = Var::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let full = Var::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let mut optimizer = Adamax::from_named([("w", var.clone())], params(encoding)).unwrap();
        let mut reference = Adamax::from_named([("w", full.clone())], params(StateDType::F32)).unwrap();
        let at = at % steps.len();
        for (step, mut grads) in steps.into_iter().enumerate() {
            if step == at {
                (grads[0], grads[1], grads[2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            }
            let grads = Tensor::new(grads, &Device::Cpu).unwrap();
            optimizer.apply_gradients([(&var, &grads)]).unwrap();
            reference.apply_gradients([(&full, &grads)]).unwrap();
            let ((m, u), (full_m, full_u)) = (state_of(&optimizer), state_of(&reference));
            for i in 0..3 {
                let same = |a: f64, b: f64| a.is_nan() == b.is_nan() && (a.is_finite() || a.is_nan() || a == b);
                prop_assert!(same(u[i], full_u[i]), "{:?} u[{}]: {} for {}", encoding, i, u[i], full_u[i]);
                prop_assert!(same(m[i], full_m[i]), "{:?} m[{}]: {} for {}", encoding, i, m[i], full_m[i]);
                prop_assert_eq!(values(&var)[i].is_nan(), values(&full)[i].is_nan());
            }
            prop_assert!(u[3].is_finite() && values(&var)[3].is_finite());
            prop_assert!(allowed(encoding).contains(&(u[3] / full_u[3])) || full_u[3] == 0.0);
        }
    }
}

/// The steps of a run are those of f32, but for noise of a known size.
#[test]
fn weights_go_where_those_of_f32_go() -> Result<()> {
    const N: usize = 4000;
    let start: Vec<f32> = (0..N).map(|i| (i as f32 * 0.37).sin()).collect();
    let run = |encoding: StateDType, params: ParamsAdamax| -> Result<Vec<f64>> {
        let var = Var::from_vec(start.clone(), N, &Device::Cpu)?;
        let params = ParamsAdamax { state_dtype: encoding, lr: 0.01.into(), ..params };
        let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
        let mut random = Random(3);
        for _ in 0..150 {
            let noise: Vec<f32> = (0..N).map(|_| 0.3 * (random.next() as f32 - 0.5)).collect();
            let grad = (var.as_tensor().detach() + Tensor::new(noise, &Device::Cpu)?)?;
            optimizer.apply_gradients([(&var, &grad)])?;
        }
        Ok(values(&var))
    };
    for settings in [
        ParamsAdamax::default(),
        ParamsAdamax { eps: 0.1, weight_decay: WeightDecay::Decoupled(0.1), ..ParamsAdamax::default() },
        ParamsAdamax { clip: Some(Clip::Norm(1.0)), weight_decay: WeightDecay::L2(0.01), ..ParamsAdamax::pytorch() },
        ParamsAdamax { maximize: true, clip: Some(Clip::Value(0.2)), ..ParamsAdamax::pytorch() },
    ] {
        let full = run(StateDType::F32, settings.clone())?;
        for (encoding, limit) in [(StateDType::BF16, 0.01), (StateDType::F16, 0.003), (StateDType::Q8, 0.12)] {
            let coded = run(encoding, settings.clone())?;
            let travelled: f64 = full.iter().zip(&start).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>();
            let off: f64 = full.iter().zip(&coded).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            assert!((off / travelled).sqrt() < limit, "{encoding:?}: {}", (off / travelled).sqrt());
            assert!(off > 0.0);
        }
    }
    Ok(())
}

#[test]
fn bytes_are_those_that_are_promised() -> Result<()> {
    let bytes = |params: ParamsAdamax, dtype: DType| -> Result<usize> {
        let var = Var::zeros((1000, 100), dtype, &Device::Cpu)?;
        Ok(Adamax::from_named([("w", var)], params)?.state("w")?.bytes)
    };
    let n = 100_000;
    let scales = 4 * n / 1024 + 4; // rounded up
    assert_eq!(bytes(params(StateDType::F32), DType::F32)?, 8 * n);
    assert_eq!(bytes(params(StateDType::BF16), DType::F32)?, 4 * n + scales - scales % 4);
    assert_eq!(bytes(params(StateDType::F16), DType::BF16)?, 4 * n + scales - scales % 4);
    assert_eq!(bytes(params(StateDType::Q8), DType::F16)?, 2 * n + scales - scales % 4);
    // f64 keeps f64.
    assert_eq!(bytes(params(StateDType::Q8), DType::F64)?, 16 * n);
    let rowwise = |state_dtype| ParamsAdamax { rowwise_norm: true, ..params(state_dtype) };
    assert_eq!(bytes(rowwise(StateDType::F32), DType::F32)?, 4 * n + 4 * 1000);
    assert_eq!(bytes(rowwise(StateDType::Q8), DType::F32)?, n + 4 * 1000);
    let master = ParamsAdamax { rounding: Rounding::Master, ..params(StateDType::F32) };
    assert_eq!(bytes(master.clone(), DType::BF16)?, 8 * n + 2 * n);
    assert_eq!(bytes(master.clone(), DType::F16)?, 8 * n + 4 * n);
    assert_eq!(bytes(master, DType::F32)?, 8 * n);
    Ok(())
}

/// Weights whose steps are a hundredth of a unit in the last place.
#[test]
fn small_steps_are_lost_only_by_rounding_to_nearest() -> Result<()> {
    const N: usize = 4096;
    const STEPS: usize = 400;
    for (dtype, ulp) in [(DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
        for state_dtype in [StateDType::F32, StateDType::Q8] {
            let moved = |rounding: Rounding| -> Result<Vec<f64>> {
                let var = Var::from_tensor(&Tensor::full(1.5f32, N, &Device::Cpu)?.to_dtype(dtype)?)?;
                let lr = ulp / 100.0;
                let params = ParamsAdamax { lr: lr.into(), rounding, eps: 0.0, ..params(state_dtype) };
                let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
                let grad = Tensor::full(0.5f32, N, &Device::Cpu)?;
                for _ in 0..STEPS {
                    optimizer.apply_gradients([(&var, &grad)])?;
                }
                Ok(values(&var).into_iter().map(|w| (1.5 - w) / ulp).collect())
            };
            // m / u is 1 but for Q8's rounding up of u, so each step is a hundredth, or up to a tenth less than that.
            let expected = if state_dtype == StateDType::F32 { 3.9..4.1 } else { 3.5..4.1 };
            assert!(moved(Rounding::Nearest)?.iter().all(|&x| x == 0.0), "{dtype:?}: nearest stands still");
            let master = moved(Rounding::Master)?;
            assert!(master.iter().all(|&x| (3.0..=4.0).contains(&x)), "{dtype:?} {state_dtype:?}: {}", master[0]);
            let stochastic = moved(Rounding::Stochastic)?;
            let mean = stochastic.iter().sum::<f64>() / N as f64;
            assert!(expected.contains(&mean), "{dtype:?} {state_dtype:?}: the mean is {mean}");
            assert!(stochastic.iter().any(|&x| x != stochastic[0]), "{dtype:?}: each element for itself");
        }
    }
    Ok(())
}

/// A master is the f32 run: its parameter is that run's, rounded.
#[test]
fn a_master_is_the_run_in_f32() -> Result<()> {
    const N: usize = 700;
    let start = Tensor::from_vec((0..N).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>(), N, &Device::Cpu)?;
    for dtype in [DType::BF16, DType::F16] {
        let half = Var::from_tensor(&start.to_dtype(dtype)?)?;
        let full = Var::from_tensor(&start.to_dtype(dtype)?.to_dtype(DType::F32)?)?;
        let with_master = ParamsAdamax { rounding: Rounding::Master, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", half.clone())], with_master)?;
        let mut reference = Adamax::from_named([("w", full.clone())], ParamsAdamax::default())?;
        let mut random = Random(5);
        for _ in 0..50 {
            let grads: Vec<f32> = (0..N).map(|_| random.next() as f32 - 0.4).collect();
            let grads = Tensor::new(grads, &Device::Cpu)?;
            optimizer.apply_gradients([(&half, &grads)])?;
            reference.apply_gradients([(&full, &grads)])?;
        }
        let rounded = full.as_tensor().to_dtype(dtype)?;
        assert_eq!(bits(&half), bits(&rounded), "{dtype:?}");
        // Somebody sets the weight: that is the master then.
        half.set(&Tensor::full(3.0f32, N, &Device::Cpu)?.to_dtype(dtype)?)?;
        optimizer.apply_gradients([(&half, &Tensor::zeros(N, DType::F32, &Device::Cpu)?)])?;
        assert!(values(&half).iter().all(|w| (w - 3.0).abs() < 0.02));
    }
    Ok(())
}

/// Stochastic rounding is a function of seed, name, update and place.
#[test]
fn random_numbers_are_those_of_a_counter() -> Result<()> {
    let run = |names: &[&str], seed: u64, threads: usize| -> Result<Vec<Vec<u64>>> {
        let pool = pool(threads);
        let mut vars = Vec::new();
        for name in names {
            let values = (0..300_000).map(|i| (i as f32 * 0.1).sin()).collect::<Vec<_>>();
            vars.push((
                name.to_string(),
                Var::from_tensor(&Tensor::new(values, &Device::Cpu)?.to_dtype(DType::BF16)?)?,
            ));
        }
        let params = ParamsAdamax { seed, rounding: Rounding::Stochastic, ..params(StateDType::Q8) };
        let mut optimizer = Adamax::from_named(vars.clone(), params)?;
        for _ in 0..3 {
            let grads: Vec<Tensor> = vars.iter().map(|(_, var)| var.as_tensor().copy()).collect::<Result<_>>()?;
            let pairs = vars.iter().zip(&grads).map(|((_, var), grad)| (var, grad));
            pool.install(|| optimizer.apply_gradients(pairs.collect::<Vec<_>>()))?;
        }
        Ok(vars.iter().map(|(_, var)| bits(var)).collect())
    };
    let alone = run(&["b"], 0, 1)?;
    let among = run(&["a", "b", "c"], 0, 2)?;
    assert_eq!(alone[0], among[1], "other variables and threads change nothing");
    assert_ne!(among[0], among[1], "names do");
    assert_ne!(run(&["b"], 1, 1)?, alone, "and so does the seed");
    Ok(())
}

/// One norm for each row: no weight moves further than with a norm of its own.
#[test]
fn a_norm_of_a_row_is_its_largest() -> Result<()> {
    let (rows, dim) = (5, 7);
    for state_dtype in [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8] {
        for dtype in [DType::F32, DType::F64] {
            let params = ParamsAdamax { rowwise_norm: true, lr: 0.1.into(), ..params(state_dtype) };
            let var = Var::zeros((rows, dim), dtype, &Device::Cpu)?;
            let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
            let (mut random, mut exact) = (Random(9), vec![0.0f64; rows]);
            for step in 0..200 {
                let grads: Vec<f32> = (0..rows * dim).map(|_| random.gradient(-3.0, 0.0)).collect();
                let touched: Vec<usize> = if step % 2 == 0 { (0..rows).collect() } else { vec![1, 3] };
                for &row in &touched {
                    let largest = grads[row * dim..][..dim].iter().fold(0.0f32, |a, g| a.max(g.abs()));
                    exact[row] = (exact[row] * 0.999).max(f64::from(largest));
                }
                let all = Tensor::from_vec(grads, (rows, dim), &Device::Cpu)?.to_dtype(dtype)?;
                if step % 2 == 0 {
                    optimizer.apply_gradients([(&var, &all)])?;
                } else {
                    let indices = Tensor::new(&[1u32, 3], &Device::Cpu)?;
                    let values = all.index_select(&indices, 0)?;
                    optimizer.apply_gradients([(&var, &SparseGrad { indices, values })])?;
                }
            }
            let (m, u) = state_of(&optimizer);
            for (i, (m, u)) in m.iter().zip(&u).enumerate() {
                assert!((u / exact[i / dim] - 1.0).abs() < 1e-4, "{state_dtype:?} {dtype:?} u[{i}]: {u}");
                assert!(m.abs() <= 1.01 * u);
            }
        }
    }
    Ok(())
}

/// A changed setting takes the state along.
#[test]
fn moments_move_from_one_encoding_into_another() -> Result<()> {
    const N: usize = 3000;
    let all = [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8];
    for from in all {
        for to in all {
            let var = Var::zeros(N, DType::F32, &Device::Cpu)?;
            let mut optimizer = Adamax::from_named([("w", var.clone())], params(from))?;
            let mut random = Random(13);
            for _ in 0..30 {
                let grads: Vec<f32> = (0..N).map(|_| random.gradient(-2.0, 0.0)).collect();
                optimizer.apply_gradients([(&var, &Tensor::new(grads, &Device::Cpu)?)])?;
            }
            let (m, u) = state_of(&optimizer);
            optimizer.set_params(params(to))?;
            let (new_m, new_u) = state_of(&optimizer);
            if from == to {
                assert_eq!((&m, &u), (&new_m, &new_u));
            }
            let allowed = allowed(to);
            for (i, (u, new)) in u.iter().zip(&new_u).enumerate() {
                assert!(
                    from == to || *u == 0.0 || allowed.contains(&(new / u)),
                    "{from:?} to {to:?} u[{i}]: {new} for {u}"
                );
            }
            let unit = if to == StateDType::Q8 { 1.0 / 120.0 } else { 1.0 / 256.0 };
            for (i, (m, new)) in m.iter().zip(&new_m).enumerate() {
                assert!((m - new).abs() <= unit * new_u[i] + 1e-12, "{from:?} to {to:?} m[{i}]: {new} for {m}");
            }
        }
    }
    Ok(())
}

/// Another epsilon or other betas re-encode m, and leave u as it is, however often that happens.
#[test]
fn other_numbers_do_not_round_u_again() -> Result<()> {
    for encoding in CODED {
        let var = Var::zeros(2000, DType::F32, &Device::Cpu)?;
        let mut optimizer = Adamax::from_named([("w", var.clone())], params(encoding))?;
        let mut random = Random(17);
        let grads: Vec<f32> = (0..2000).map(|_| random.gradient(-2.0, 0.0)).collect();
        optimizer.apply_gradients([(&var, &Tensor::new(grads, &Device::Cpu)?)])?;
        let (m, u) = state_of(&optimizer);
        for round in 0..20 {
            let (eps, beta1) = if round % 2 == 0 { (1e-2, 0.95) } else { (1e-7, 0.9) };
            optimizer.set_params(ParamsAdamax { eps, beta1, ..params(encoding) })?;
        }
        let (new_m, new_u) = state_of(&optimizer);
        assert_eq!(u, new_u, "{encoding:?}");
        for (i, (m, new)) in m.iter().zip(&new_m).enumerate() {
            assert!((m - new).abs() <= 0.1 * u[i] + 1e-9, "{encoding:?} m[{i}]: {new} for {m}");
        }
    }
    Ok(())
}

/// Q8 rounds u up, and what it has rounded is not rounded again after a detour through f32, however often.
#[test]
fn there_and_back_keeps_every_bit() -> Result<()> {
    let var = Var::zeros((50, 60), DType::F32, &Device::Cpu)?;
    let mut optimizer = Adamax::from_named([("w", var.clone())], params(StateDType::Q8))?;
    let mut random = Random(29);
    for updates in [1, 30, 300] {
        for _ in 0..updates {
            let grads: Vec<f32> = (0..3000).map(|_| random.gradient(-6.0, 0.0)).collect();
            let grads = Tensor::from_vec(grads, (50, 60), &Device::Cpu)?;
            optimizer.apply_gradients([(&var, &grads)])?;
        }
        let before = state_of(&optimizer);
        for _ in 0..5 {
            optimizer.set_params(params(StateDType::F32))?;
            optimizer.set_params(params(StateDType::Q8))?;
            assert_eq!(before, state_of(&optimizer), "after {updates} updates");
        }
    }
    Ok(())
}

/// A file holds every code: the steps after it have the bits of an unbroken run.
#[test]
fn checkpoints_carry_every_encoding_bit_for_bit() -> Result<()> {
    let folder = Folder::new();
    let path = folder.file("state");
    for state_dtype in [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8] {
        for rounding in [Rounding::Nearest, Rounding::Stochastic, Rounding::Master] {
            for rowwise_norm in [false, true] {
                for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
                    let params = ParamsAdamax { rounding, rowwise_norm, seed: 5, ..params(state_dtype) };
                    let start = Tensor::full(0.5f32, (6, 300), &Device::Cpu)?.to_dtype(dtype)?;
                    let step = |optimizer: &mut Adamax, vars: &[Var; 2], k: u64| -> Result<()> {
                        let mut random = Random(k);
                        let grads: Vec<f32> = (0..1800).map(|_| random.gradient(-3.0, 0.0)).collect();
                        let dense = Tensor::from_vec(grads, (6, 300), &Device::Cpu)?.to_dtype(dtype)?;
                        let indices = Tensor::new(&[1u32, 4], &Device::Cpu)?;
                        let rows = SparseGrad { values: dense.index_select(&indices, 0)?, indices };
                        let pairs: [(&Var, candle_adamax::Gradient<'_>); 2] =
                            [(&vars[0], (&dense).into()), (&vars[1], (&rows).into())];
                        Ok(optimizer.apply_gradients(pairs).map(drop)?)
                    };
                    let make = |tensors: [&Tensor; 2]| -> Result<_> {
                        let vars = [Var::from_tensor(tensors[0])?, Var::from_tensor(tensors[1])?];
                        let named = [("dense", vars[0].clone()), ("table", vars[1].clone())];
                        Ok((Adamax::from_named(named, params.clone())?, vars))
                    };
                    let (mut unbroken, vars) = make([&start, &start])?;
                    for k in 0..5 {
                        step(&mut unbroken, &vars, k)?;
                    }
                    unbroken.save(&path)?;
                    let (mut resumed, others) = make([vars[0].as_tensor(), vars[1].as_tensor()])?;
                    resumed.load(&path)?;
                    for k in 5..9 {
                        step(&mut unbroken, &vars, k)?;
                        step(&mut resumed, &others, k)?;
                    }
                    let what = format!("{state_dtype:?} {rounding:?} rowwise {rowwise_norm} {dtype:?}");
                    for (a, b) in vars.iter().zip(&others) {
                        assert_eq!(bits(a), bits(b), "{what}");
                    }
                    for name in ["dense", "table"] {
                        let (a, b) = (unbroken.state(name)?, resumed.state(name)?);
                        assert_eq!(bits(&a.exp_avg), bits(&b.exp_avg), "{what} {name}");
                        assert_eq!(bits(&a.exp_inf), bits(&b.exp_inf), "{what} {name}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_snapshot_of_another_encoding_is_refused_by_name() -> Result<()> {
    let var = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let mut optimizer = Adamax::from_named([("w", var.clone())], params(StateDType::Q8))?;
    optimizer.apply_gradients([(&var, &Tensor::ones((2, 3), DType::F32, &Device::Cpu)?)])?;
    let good = optimizer.snapshot()?;
    let before = state_of(&optimizer);
    let mut check = |change: &dyn Fn(&mut candle_adamax::VarSnapshot), expected: &str| {
        let mut snapshot = good.clone();
        change(snapshot.vars.get_mut("w").unwrap());
        assert_eq!(optimizer.restore(&snapshot).unwrap_err().to_string(), expected);
    };
    let cpu = &Device::Cpu;
    check(
        &|w| w.exp_avg = Tensor::zeros((2, 3), DType::F32, cpu).unwrap(),
        "Adamax: exp_avg dtype mismatch for `w`: expected U8, got F32",
    );
    check(
        &|w| w.exp_inf = Tensor::zeros(2, DType::U8, cpu).unwrap(),
        "Adamax: exp_inf shape mismatch for `w`: expected [2, 3], got [2]",
    );
    check(&|w| w.scales = None, "Adamax: checkpoint entry `w.scales`: expected a tensor, got none");
    check(
        &|w| w.scales = Some(Tensor::zeros(2, DType::U32, cpu).unwrap()),
        "Adamax: scales shape mismatch for `w`: expected [1], got [2]",
    );
    // What writing makes ends below.
    for log in [253u32 << 24, u32::MAX] {
        check(
            &|w| w.scales = Some(Tensor::new(&[log], cpu).unwrap()),
            &format!("Adamax: checkpoint entry `w.scales`: expected logarithms below 4244635648, got {log}"),
        );
    }
    check(
        &|w| w.master = Some(Tensor::zeros((2, 3), DType::I16, cpu).unwrap()),
        "Adamax: checkpoint entry `w.master`: expected no such tensor, got a surplus one",
    );
    assert_eq!(state_of(&optimizer), before);
    let mut largest = good.clone();
    largest.vars.get_mut("w").unwrap().scales = Some(Tensor::new(&[(253u32 << 24) - 1], cpu)?);
    optimizer.restore(&largest)?;
    Ok(())
}

#[test]
fn settings_that_do_not_go_together() -> Result<()> {
    let var = Var::zeros(3, DType::F32, &Device::Cpu)?;
    let error = |params: ParamsAdamax| Adamax::from_named([("w", var.clone())], params).unwrap_err();
    for state_dtype in [StateDType::F16, StateDType::Q8] {
        let e = error(ParamsAdamax { beta1: 0.9, beta2: 0.9, ..params(state_dtype) });
        assert!(matches!(e.kind(), ErrorKind::InvalidArgument { field, .. } if field == "beta1"));
        let expected = format!(
            "Adamax: invalid `beta1`: expected a number below `beta2`, 0.9, for `state_dtype: {state_dtype:?}`, got 0.9"
        );
        assert_eq!(e.to_string(), expected);
    }
    // Its codes would be so coarse that their rounding moves weights more than their gradients do.
    let close = ParamsAdamax { beta1: 0.99, beta2: 0.9901, ..params(StateDType::Q8) };
    let message = "expected a number so far below `beta2`, 0.9901, that the rounding of `state_dtype: Q8` is at most 0.125 \
                   of the learning rate in a step, where it is 2.256 of it, got 0.99";
    assert_eq!(error(close.clone()).to_string(), format!("Adamax: invalid `beta1`: {message}"));
    Adamax::from_named([("w", var.clone())], ParamsAdamax { state_dtype: StateDType::F16, ..close.clone() })?;
    let group = ParamGroup::new("g").var("w", &var).state_dtype(StateDType::Q8).beta1(0.99).beta2(0.9901);
    let e = Adamax::from_groups([group], ParamsAdamax::default()).unwrap_err();
    assert_eq!(e.to_string(), format!("Adamax: invalid `groups.g.beta1`: {message}"));
    let mut optimizer = Adamax::from_named([("w", var.clone())], params(StateDType::Q8))?;
    assert!(optimizer.set_params(close).is_err());
    let mut snapshot = optimizer.snapshot()?;
    (snapshot.params.beta1, snapshot.params.beta2) = (0.99, 0.9901);
    assert_eq!(optimizer.restore(&snapshot).unwrap_err().to_string(), format!("Adamax: invalid `beta1`: {message}"));
    assert_eq!((optimizer.params().beta1, optimizer.params().beta2), (0.9, 0.999));
    // bf16 has the range for any quotient.
    Adamax::from_named([("w", var.clone())], ParamsAdamax { beta2: 0.5, ..params(StateDType::BF16) })?;
    let group = ParamGroup::new("g").var("w", &var).state_dtype(StateDType::Q8).beta2(0.8);
    let e = Adamax::from_groups([group], ParamsAdamax::default()).unwrap_err();
    assert_eq!(
        e.to_string(),
        "Adamax: invalid `groups.g.beta1`: expected a number below `beta2`, 0.8, for `state_dtype: Q8`, got 0.9"
    );
    let mut optimizer = Adamax::from_named([("w", var.clone())], params(StateDType::Q8))?;
    let e = optimizer.set_kernel(Kernel::Portable).unwrap_err();
    assert_eq!(
        e.to_string(),
        "Adamax: invalid `state_dtype`: expected the default for variables that candle's tensor operations update, on \
         this device, got Q8"
    );
    assert!(optimizer.set_params(ParamsAdamax { beta1: 0.9999, ..params(StateDType::Q8) }).is_err());
    assert_eq!(optimizer.params().beta1, 0.9);
    Ok(())
}

/// Each group as it is told; own clocks with PyTorch's counters.
#[test]
fn encodings_by_group() -> Result<()> {
    let vars = [(); 3].map(|()| Var::ones((4, 4), DType::F32, &Device::Cpu).unwrap());
    let groups = [
        ParamGroup::new("coded").var("a", &vars[0]).state_dtype(StateDType::Q8),
        ParamGroup::new("rows").var("b", &vars[1]).rowwise_norm(true),
    ];
    let params = ParamsAdamax { step_count: StepCount::PerVar, ..params(StateDType::BF16) };
    let mut optimizer = Adamax::from_groups(groups, params)?;
    optimizer.add_var("c", vars[2].clone())?;
    let bytes = |name: &str| optimizer.state(name).map(|state| state.bytes);
    assert_eq!((bytes("a")?, bytes("b")?, bytes("c")?), (2 * 16 + 4, 2 * 16 + 4 * 4, 4 * 16 + 4));
    let mut settings = optimizer.groups()[1].clone();
    settings.state_dtype = Some(StateDType::F32);
    optimizer.set_group(settings)?;
    assert_eq!(optimizer.state("a")?.bytes, 8 * 16);
    Ok(())
}
