//! The updates that the elements of one row have missed.

use super::unit::{move_unit, scale_of};
use super::{Format, Limits, Moment};
use crate::element::Arithmetic;
use crate::ledger::Missed;
use crate::rounding::Randoms;

/// Whether a block is one where no gradient has been.
#[inline(always)]
fn is_blank<F: Format>(moments: &[F::Code], norms: &[F::Norm], log: u32) -> bool {
    log == 0 && is_zero::<F>(moments, norms)
}

/// Whether all moments of a block are zero, whatever its unit: the unit of a row may come from a block with other rows.
#[inline(always)]
pub(crate) fn is_zero<F: Format>(moments: &[F::Code], norms: &[F::Norm]) -> bool {
    moments.iter().all(|moment| F::load_plain(*moment) == 0.0) && norms.iter().all(|norm| F::widen_norm(*norm) == 0)
}

/// Applies missed updates to a block of elements that share a scale.
#[inline(always)]
pub(crate) fn catch_up_block<F: Format>(
    missed: &Missed<'_, f32>,
    limits: &Limits,
    key: u32,
    params: &mut [f32],
    (moments, norms, log): (&mut [F::Code], &mut [F::Norm], &mut u32),
) {
    // Where no gradient has been there is no unit yet, and none begins.
    let is_blank = is_blank::<F>(moments, norms, *log);
    let before = scale_of(*log);
    let (moved, rebase) = move_unit::<F>(*log, missed.shrunk, 0.0);
    let after = scale_of(moved);
    let decoded = |moment: F::Code, norm: F::Norm| {
        let u = F::norm(F::widen_norm(norm)) * before;
        (F::decode(F::load(moment, limits), u + missed.eps_outside), u)
    };
    let is_series = params.iter().zip(&*moments).zip(&*norms).all(|((_, moment), norm)| {
        let (m, u) = decoded(*moment, *norm);
        missed.is_series(m, u)
    });
    for (((w, moment), norm), random) in params.iter_mut().zip(moments).zip(norms).zip(Randoms::new(key)) {
        let (m, u) = decoded(*moment, *norm);
        let gained = m * F::GAIN;
        *w = if is_series { missed.weight(*w, gained, u) } else { missed.weight_one_by_one(*w, gained, u) };
        let (m, _) = missed.moments(m, u);
        let code = F::encode_norm(F::norm(F::widen_norm(*norm)) * rebase);
        *norm = F::narrow_norm(code);
        let denominator = F::norm(code) * after + missed.eps_outside;
        let ratio = if denominator == 0.0 { 0.0 } else { m / denominator };
        *moment = F::narrow(F::encode(m, F::bound(ratio, limits), limits, random));
    }
    if !is_blank {
        *log = moved;
    }
}

/// Applies missed updates to a row whose elements share one u.
#[inline(always)]
pub(crate) fn catch_up_row<A: Arithmetic, M: Moment<A>>(
    missed: &Missed<'_, A>,
    limits: &Limits,
    key: u32,
    params: &mut [A],
    (moments, norm): (&mut [M::Code], &mut A),
) {
    let u = *norm;
    let (_, after) = missed.moments(A::ZERO, u);
    let is_series = missed.is_series(after, u);
    for ((w, moment), random) in params.iter_mut().zip(moments).zip(Randoms::new(key)) {
        let m = M::decode(M::load(*moment, limits), u + missed.eps_outside);
        *w = if is_series { missed.weight(*w, m, u) } else { missed.weight_one_by_one(*w, m, u) };
        let (m, _) = missed.moments(m, u);
        let denominator = after + missed.eps_outside;
        let ratio = if denominator == A::ZERO { A::ZERO } else { m / denominator };
        *moment = M::narrow(M::encode(m, ratio, limits, random));
    }
    *norm = after;
}
