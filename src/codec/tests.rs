use super::unit::move_unit;
use super::*;
use crate::rounding::Randoms;

fn limits(limit: f64) -> Limits {
    Encoding { eps_outside: 0.0, limit }.limits()
}

#[test]
fn every_code_of_v_stands_for_a_value_of_its_own() {
    fn check<F: Format>(codes: impl Iterator<Item = u32>) {
        let mut last = -1.0;
        for code in codes {
            let v = F::norm(code);
            assert!(v > last, "code {code}: {v:e} after {last:e}");
            assert_eq!(F::encode_norm(v), code, "{v:e}");
            if v > 0.0 {
                assert_eq!(F::round_plain_norm(v), (v, code));
                assert_eq!(F::norm_plain(F::narrow_norm(code)), v);
            }
            assert!(!F::is_special(F::narrow_norm(code)));
            last = v;
        }
        for special in [f32::INFINITY, f32::NAN] {
            let code = F::encode_norm(special);
            assert!(F::is_special(F::narrow_norm(code)));
            assert_eq!(F::norm(code).is_nan(), special.is_nan());
        }
    }
    check::<Bf16>(0..0x7f80);
    check::<F16>(0..0x7c00);
    check::<Q8>(0..254);
}

#[test]
fn v_is_rounded_as_each_format_says() {
    let mut x = 2f32.powi(-29);
    while x < 0.99 {
        let of = |code: u32, norm: fn(u32) -> f32| norm(code) / x;
        let q8 = of(Q8::encode_norm(x), Q8::norm);
        assert!((1.0..=1.125).contains(&q8), "{x:e}: {q8}");
        assert_eq!(Q8::round_plain_norm(x).1, Q8::encode_norm(x));
        let bf16 = of(Bf16::encode_norm(x), Bf16::norm);
        assert!((bf16 - 1.0).abs() <= 2f32.powi(-8), "{x:e}: {bf16}");
        // In the middle of f16's range; and up below it.
        let f16 = F16::norm(F16::encode_norm(x * 16.0)) / (x * 16.0);
        let is_normal = x * 16.0 >= 2f32.powi(-14);
        assert!(if is_normal { (f16 - 1.0).abs() <= 2f32.powi(-11) } else { f16 >= 1.0 }, "{x:e}: {f16}");
        x *= 1.000_37;
    }
    // Above the range it saturates, and what is above zero stays so.
    assert_eq!(Q8::encode_norm(f32::MAX), 253);
    assert_eq!(Q8::norm(Q8::encode_norm(1e-40)), 2f32.powi(-31));
    assert!(F16::norm(F16::encode_norm(1e-40)) > 0.0 && Bf16::norm(Bf16::encode_norm(1e-45)) > 0.0);
}

#[test]
fn quotients_round_up_and_down_with_the_right_mean() {
    let limits = limits(1.009);
    for ratio in [0.0f32, 1.009, -1.009, 0.5, -0.003, 0.0001] {
        let n = 40_000;
        let draw = |random| Q8::load(Q8::narrow(Q8::encode(0.0, ratio, &limits, random)), &limits);
        let drawn: Vec<f32> = Randoms::new(5).take(n).map(draw).collect();
        let mean = drawn.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
        let code = 1.009 / 127.0;
        assert!((mean - f64::from(ratio)).abs() < 3.0 * 0.5 * code / (n as f64).sqrt() + 1e-9, "{ratio}: {mean}");
        assert!(drawn.iter().all(|x| (x - ratio).abs() <= 1.0001 * code as f32), "{ratio}");
    }
    assert!(Q8::load(Q8::narrow(Q8::encode(f32::NAN, f32::NAN, &limits, 0)), &limits).is_nan());
    // Both are infinite: the sign is kept.
    let code = Q8::narrow(Q8::encode(f32::NEG_INFINITY, f32::NAN, &limits, 0));
    assert_eq!(Q8::decode(Q8::load(code, &limits), f32::INFINITY), f32::NEG_INFINITY);
}

#[test]
fn units_are_powers_of_two() {
    for log in (0..252u32 << 24).step_by(1_000_003) {
        let exact = (f64::from(log) / f64::from(1u32 << 24) - 126.0).exp2();
        let ratio = f64::from(scale_of(log)) / exact;
        assert!((ratio - 1.0).abs() < 1e-7, "{log:#x}: {ratio}");
    }
    assert_eq!(scale_of(126 << 24), 1.0);
}

#[test]
fn a_unit_makes_room_for_the_largest_and_shrinks_otherwise() {
    let one = 126u32 << 24;
    // Half an octave down, and no value to make room for.
    assert_eq!(move_unit::<Q8>(one, 1 << 23, 0.25), (one - (1 << 23), 1.0));
    for largest in [1e-30f32, 0.7, 1.0, 3.0, 1e30] {
        let (log, rebase) = move_unit::<Q8>(one, 0, largest);
        assert!(
            largest / scale_of(log) <= 1.0
                && Q8::norm(Q8::encode_norm(largest / scale_of(log))) >= largest / scale_of(log)
        );
        assert_eq!(scale_of(log) * rebase, 1.0, "{largest:e}");
        let (log, _) = move_unit::<F16>(one, 0, largest);
        assert!(largest / scale_of(log) <= 32768.0);
    }
    // bf16 has f32's range: its units stay between 1 and 2.
    let (log, rebase) = move_unit::<Bf16>(one, 1 << 23, 1e30);
    assert_eq!((log, rebase), (one + (1 << 23), 0.5));
    // As low as it can be; and shrinking by everything, which a beta2 of 0 does.
    assert_eq!(move_unit::<Q8>(5, 10, 0.0).0, (1 << 24) - 5);
    assert_eq!(move_unit::<Q8>(one, shrinkage(f64::INFINITY, 1, None), 0.0).1, 0.0);
}

#[test]
fn shrinkage_is_right_on_average() {
    let octaves = -0.999f64.log2();
    let n = 100_000;
    let exact = octaves * f64::from(1u32 << 24) * n as f64;
    let sum = |key| (1..=n).map(|t| shrinkage(octaves, t, key)).sum::<u64>() as f64;
    assert!((sum(None) - exact).abs() <= 1.0, "{} off", sum(None) - exact);
    let random = sum(Some(9));
    assert!((random - exact).abs() < 3.0 * 0.5 * (n as f64).sqrt(), "{} off", random - exact);
    assert_ne!(random, sum(None));
}

#[test]
fn the_largest_quotient() {
    assert!((max_ratio(0.9, 0.999) - 1.0091).abs() < 1e-4);
    assert_eq!(max_ratio(0.0, 0.9), 1.0);
    assert_eq!(max_ratio(0.9, 0.9), f64::INFINITY);
}

#[test]
fn what_comes_from_codes_goes_back_into_them() {
    let encoding = Encoding { eps_outside: 1e-7, limit: max_ratio(0.9, 0.999) };
    let random = |i: u32| crate::rounding::mix(u64::from(i)) as u32;
    for case in 0..4000u32 {
        // Units of any fraction; the largest and the smallest codes in some, and elements that have had no gradient.
        let log = (60 + random(case) % 160) << 24 | random(case + 90_000) >> 8;
        let (lowest, n) = (random(case + 7) % 240, 1 + random(case + 3) as usize % 40);
        let code = |i: u32| (lowest + random(case * 64 + i) % (254 - lowest)) as u8;
        let mut norms: Vec<u8> = (0..n as u32).map(code).collect();
        if case % 3 == 0 {
            norms[n / 2] = 0;
        }
        if case % 5 == 0 {
            norms[0] = Q8::narrow_norm(Q8::encode_norm([f32::INFINITY, f32::NAN][case as usize / 5 % 2]));
        }
        let moments: Vec<i8> = (0..n as u32).map(|i| (random(case * 64 + i + 40) % 255) as i32 as i8).collect();
        let decoded = |moments: &[i8], norms: &[u8], log| {
            let (mut m, mut u) = (Vec::new(), Vec::new());
            decode_block::<Q8>(&encoding, (moments, norms, log), |a, b| {
                m.push(a);
                u.push(b);
            });
            (m, u)
        };
        let bits = |x: &[f32]| x.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>();
        let (m, u) = decoded(&moments, &norms, log);
        let (mut again, mut norms_again) = (vec![0; n], vec![0; n]);
        let log_again = encode_block::<Q8>(&encoding, (&m, &u), (&mut again, &mut norms_again));
        let (m_again, u_again) = decoded(&again, &norms_again, log_again);
        assert_eq!(bits(&u_again), bits(&u), "case {case}: {norms:?} in the unit {log:#x}");
        assert_eq!(bits(&m_again), bits(&m), "case {case}");
    }
    // What does not is rounded up, once.
    let u = [0.3f32, 0.011, 0.7];
    let (mut moments, mut norms) = ([0; 3], [0; 3]);
    let log = encode_block::<Q8>(&encoding, (&[0.0; 3], &u), (&mut moments, &mut norms));
    assert_eq!(log, 126 << 24);
    assert!(norms.iter().zip(u).all(|(code, u)| (1.0..1.126).contains(&(Q8::norm_plain(*code) / u))));
}

#[test]
fn every_unit_has_its_logarithm() {
    for log in (0..253u32 << 24).step_by(777_767) {
        let found = unit::log_of(scale_of(log)).unwrap_or(u32::MAX);
        assert!(scale_of(found) == scale_of(log) && found.abs_diff(log) <= 3, "{log:#x}: {found:#x}");
    }
    assert_eq!([unit::log_of(0.0), unit::log_of(f32::INFINITY)], [None; 2]);
}

/// In every fraction of a unit, with the largest value where it is worst, just above half of a power of two and of it.
#[test]
fn u_is_as_exact_as_stated_down_to_the_stated_part_of_the_largest() {
    /// The worst quotients of u at and above `down_to` of the largest, and in the octave below.
    fn worst<F: Format>(down_to: i32) -> [(f64, f64); 2] {
        let mut worst = [(f64::MAX, 0.0f64); 2];
        for fraction in (0..1u32 << 24).step_by(32_749).chain([1, (1 << 24) - 1]) {
            for largest in [1.0f32, 1.0 + f32::EPSILON, 1.5, 2.0 - f32::EPSILON] {
                let (log, _) = move_unit::<F>(90 << 24 | fraction, 0, largest);
                let (scale, per_unit) = (scale_of(log), F::UP / scale_of(log));
                for (octave, worst) in [0, -1].into_iter().zip(&mut worst) {
                    let at = largest * 2f32.powi(down_to + octave);
                    for k in 0..200u16 {
                        let u = at * (1.0 + f32::from(k) / 200.0);
                        let ratio = f64::from(F::norm(F::encode_norm(u * per_unit)) * scale) / f64::from(u);
                        *worst = (worst.0.min(ratio), worst.1.max(ratio));
                    }
                }
            }
        }
        worst
    }
    let [inside, below] = worst::<Q8>(-29);
    assert!(inside.0 >= 1.0 && inside.1 < 1.13, "{inside:?}");
    assert!(below.0 >= 1.0 && below.1 > 1.9, "{below:?}");
    let [inside, below] = worst::<F16>(-27);
    // The product with the unit is rounded, too, in f32.
    let limit = 2f64.powi(-11) + 2f64.powi(-22);
    assert!(inside.0 >= 1.0 - limit && inside.1 <= 1.0 + limit, "{inside:?}");
    // Below it is rounded up.
    assert!(below.0 >= 1.0 - limit && below.1 > 1.0 + 1.5 * limit, "{below:?}");
    // The smallest code; what is below it is as large.
    let [inside, below] = worst::<F16>(-38);
    assert!(inside.0 >= 1.0 - limit && inside.1 < 2.01, "{inside:?}");
    assert!(below.1 > 3.9, "{below:?}");
}

#[test]
fn noise_of_q8_by_hand() {
    assert!((q8_noise(0.9, 0.999) - 0.00745).abs() < 5e-5, "{}", q8_noise(0.9, 0.999));
    assert!((q8_noise(0.99, 0.999) - 0.0253).abs() < 5e-4, "{}", q8_noise(0.99, 0.999));
    assert_eq!(q8_noise(0.9, 0.9), f64::INFINITY);
}
