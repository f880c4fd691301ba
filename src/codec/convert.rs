//! Ways between encodings and plain numbers.

use super::unit::{POINT, move_unit, power_of_two, scale_of};
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

/// Encodes m and u of a block, to the nearest quotient; the unit's logarithm.
pub(crate) fn encode_block<F: Format>(
    encoding: &Encoding,
    (exp_avg, exp_inf): (&[f32], &[f32]),
    (moments, norms): (&mut [F::Code], &mut [F::Norm]),
) -> u32 {
    let largest = exp_inf.iter().copied().filter(|u| *u < f32::INFINITY).fold(0.0, f32::max);
    let (log, _) = move_unit::<F>(0, 0, largest);
    let (scale, limits, eps) = (scale_of(log), encoding.limits(), encoding.eps_outside as f32);
    let per_unit = F::UP / scale;
    for (((&m, &u), moment), norm) in exp_avg.iter().zip(exp_inf).zip(moments).zip(norms) {
        let code = F::encode_norm(u * per_unit);
        *norm = F::narrow_norm(code);
        *moment = encode_moment::<F>(m, F::norm(code) * scale + eps, &limits);
    }
    log
}

/// The nearest code of m, where `denominator` is `u + eps`.
#[inline(always)]
pub(crate) fn encode_moment<F: Format>(m: f32, denominator: f32, limits: &Limits) -> F::Code {
    let ratio = if denominator == 0.0 { 0.0 } else { m / denominator };
    F::narrow(F::encode(m, F::bound(ratio, limits), limits, F::NEAREST))
}
