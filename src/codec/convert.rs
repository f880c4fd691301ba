//! Ways between encodings and plain numbers.

use super::unit::{POINT, log_of, move_unit, power_of_two, scale_of};
use super::{Encoding, Format, Limits};

/// The code of v in a unit that is some octaves larger.
pub(crate) fn in_unit<F: Format>(code: F::Norm, before: u32, after: u32) -> F::Norm {
    let octaves = i64::from((after - before) >> POINT);
    match octaves {
        0 => code,
        _ => F::narrow_norm(F::encode_norm(F::norm(F::widen_norm(code)) * power_of_two(-octaves))),
    }
}

/// m and u of a block.
pub(crate) fn decode_block<F: Format>(
    encoding: &Encoding,
    (moments, norms, log): (&[F::Code], &[F::Norm], u32),
    mut put: impl FnMut(f32, f32),
) {
    let (scale, limits) = (scale_of(log), encoding.limits());
    for (moment, norm) in moments.iter().zip(norms) {
        let u = F::norm(F::widen_norm(*norm)) * scale;
        put(F::decode(F::load(*moment, &limits), u + encoding.eps_outside as f32), u);
    }
}

/// What values that lie on a grid are multiplied with before they are rounded up: not to the next one.
const BELOW: f32 = 1.0 - 1.0 / 1_048_576.0;

/// Encodes m and u of a block, to the nearest quotient; the unit's logarithm.
///
/// Where v is rounded up, values that have been rounded before are not again: they keep their bits.
pub(crate) fn encode_block<F: Format>(
    encoding: &Encoding,
    (exp_avg, exp_inf): (&[f32], &[f32]),
    (moments, norms): (&mut [F::Code], &mut [F::Norm]),
) -> u32 {
    let largest = exp_inf.iter().copied().filter(|u| *u < f32::INFINITY).fold(0.0, f32::max);
    let (log, up) = match grid_of::<F>(exp_inf, largest) {
        Some(log) => (log, BELOW),
        None => (move_unit::<F>(0, 0, largest).0, F::UP),
    };
    let (scale, limits, eps) = (scale_of(log), encoding.limits(), encoding.eps_outside as f32);
    let per_unit = up / scale;
    for (((&m, &u), moment), norm) in exp_avg.iter().zip(exp_inf).zip(moments).zip(norms) {
        let code = F::encode_norm(u * per_unit);
        *norm = F::narrow_norm(code);
        *moment = encode_moment::<F>(m, F::norm(code) * scale + eps, &limits);
    }
    log
}

/// The unit in which all values of a block have codes already, if v is rounded up and there is one: they were decoded
/// then, and rounding them up once more would make them larger each time.
fn grid_of<F: Format>(exp_inf: &[f32], largest: f32) -> Option<u32> {
    /// The largest v in sixteenths: in the upper octave of a unit, or above it, where the smallest v needs the room.
    const SIXTEENTHS: [f32; 13] = [16.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 18.0, 20.0, 22.0, 24.0, 26.0];
    if F::UP == 1.0 || largest < f32::MIN_POSITIVE {
        return None;
    }
    let is_coded = |scale: f32, u: f32| {
        // Subnormals have lost their places; nobody misses those.
        let is_plain = (f32::MIN_POSITIVE..f32::INFINITY).contains(&u);
        !is_plain || F::norm(F::encode_norm(u * (BELOW / scale))) * scale == u
    };
    // Either side of the quotient: it is rounded, and so was the product that the largest one is.
    let scales = |sixteenths: f32| {
        let quotient = (largest / (sixteenths / 16.0)).to_bits();
        (quotient - 2..=quotient + 2).map(f32::from_bits)
    };
    let fitting = |scale: &f32| exp_inf.iter().all(|u| is_coded(*scale, *u));
    SIXTEENTHS.into_iter().flat_map(scales).filter(fitting).find_map(log_of)
}

/// The nearest code of m, where `denominator` is `u + eps`.
#[inline(always)]
pub(crate) fn encode_moment<F: Format>(m: f32, denominator: f32, limits: &Limits) -> F::Code {
    let ratio = if denominator == 0.0 { 0.0 } else { m / denominator };
    F::narrow(F::encode(m, F::bound(ratio, limits), limits, F::NEAREST))
}
