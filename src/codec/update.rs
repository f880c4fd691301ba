//! One update of the elements that share a unit or a norm.

use super::unit::{move_unit, scale_of};
use super::{Format, Limits, Moment};
use crate::element::Arithmetic;
use crate::rounding::Randoms;
use crate::rule::{self, Coefficients};

/// What one update of encoded moments needs beside the [`Coefficients`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes {
    pub(crate) limits: Limits,
    /// Of [`shrinkage`](super::shrinkage).
    pub(crate) shrink: u64,
}

/// One update of a block of elements that share a unit, whose logarithm is `log`; `key` is for the random numbers.
#[inline(always)]
pub(crate) fn update_block<F: Format>(
    c: &Coefficients<f32>,
    codes: &Codes,
    key: u32,
    params: &mut [f32],
    grads: &[f32],
    (moments, norms, log): (&mut [F::Code], &mut [F::Norm], &mut u32),
) {
    let largest = largest_seen(c, params, grads);
    let (moved, rebase) = move_unit::<F>(*log, codes.shrink, largest.finite);
    let (before, after) = (scale_of(*log), scale_of(moved));
    let block = Block { c, limits: &codes.limits, key, before, after, rebase };
    if block.is_plain::<F>(&largest, norms) {
        if c.decay == 0.0 {
            block.update_plain::<F, false>(params, grads, moments, norms);
        } else {
            block.update_plain::<F, true>(params, grads, moments, norms);
        }
    } else {
        block.update::<F>(params, grads, moments, norms);
    }
    *log = moved;
}

/// What u of a block is compared with.
struct Largest {
    /// The largest that is finite.
    finite: f32,
    /// Whether all are.
    is_all: bool,
}

#[inline(always)]
fn largest_seen(c: &Coefficients<f32>, params: &[f32], grads: &[f32]) -> Largest {
    const INFINITE: u32 = f32::INFINITY.to_bits();
    // Of numbers that are not negative the bits have the same order, and the maximum of integers vectorises.
    if c.l2 == 0.0 {
        let largest = grads.iter().fold(0, |largest: u32, grad| largest.max(grad.abs().to_bits()));
        // Without the weights, what is seen grows with the gradient: the largest of one is that of the other.
        let seen = rule::magnitude(c, rule::gradient(c, 0.0, f32::from_bits(largest)));
        if largest < INFINITE && seen < f32::INFINITY {
            return Largest { finite: seen, is_all: true };
        }
    }
    let (mut finite, mut is_all) = (0, true);
    for (w, grad) in params.iter().zip(grads) {
        let seen = rule::magnitude(c, rule::gradient(c, *w, *grad)).to_bits();
        is_all &= seen < INFINITE;
        // Neither infinity nor NaN has a place in a range.
        finite = finite.max(if seen < INFINITE { seen } else { 0 });
    }
    Largest { finite: f32::from_bits(finite), is_all }
}

/// What all elements of a block have in common in one update.
struct Block<'c> {
    c: &'c Coefficients<f32>,
    limits: &'c Limits,
    key: u32,
    /// The unit before and after the update.
    before: f32,
    after: f32,
    /// What stored values are multiplied with in the new unit.
    rebase: f32,
}

impl Block<'_> {
    /// Whether [`update_plain`](Self::update_plain) may be used.
    #[inline(always)]
    fn is_plain<F: Format>(&self, largest: &Largest, norms: &[F::Norm]) -> bool {
        /// Products of three numbers of this range are numbers of f32's range.
        const MIDDLE: std::ops::Range<f32> = 1e-12..1e12;
        let Self { c, after, rebase, .. } = *self;
        let has_no_terms = c.l2 == 0.0 && c.clamp == f32::INFINITY && MIDDLE.contains(&c.grad_scale.abs());
        // Nothing is divided by zero, since u is at least its smallest code.
        let no_zero = c.eps_outside > 0.0 || F::SMALLEST > 0.0;
        let in_range = rebase == 1.0 && largest.is_all && largest.finite < 1e12 && MIDDLE.contains(&after);
        has_no_terms && no_zero && in_range && !norms.iter().fold(false, |any, norm| any | F::is_special(*norm))
    }

    /// Any case: with every term of the formula, infinities, NaN, zeros to divide by, and a unit that has moved.
    #[inline(always)]
    fn update<F: Format>(&self, params: &mut [f32], grads: &[f32], moments: &mut [F::Code], norms: &mut [F::Norm]) {
        let Self { c, limits, key, before, after, rebase } = *self;
        let per_unit = F::UP / after;
        let streams = params.iter_mut().zip(grads).zip(moments).zip(norms);
        for ((((w, grad), moment), norm), random) in streams.zip(Randoms::new(key)) {
            let stored = F::norm(F::widen_norm(*norm));
            let m = F::decode(F::load(*moment, limits), stored * before + c.eps_outside);
            let g = rule::gradient(c, *w, *grad);
            let m = rule::first_moment(c, m, g);
            let code = F::encode_norm(rule::maximum(stored * rebase, rule::magnitude(c, g) * per_unit));
            let ratio = F::bound(rule::normalized(c, m, F::norm(code) * after), limits);
            *w = rule::step_weight(c, *w, F::bound(ratio * F::GAIN, limits));
            *moment = F::narrow(F::encode(m, ratio, limits, random));
            *norm = F::narrow_norm(code);
        }
    }

    /// The same where nothing of that is, which is nearly everywhere: constants are multiplied beforehand, and nothing
    /// looks for what is not there. A rounding apart from [`update`](Self::update).
    #[inline(always)]
    fn update_plain<F: Format, const DECAYS: bool>(
        &self,
        params: &mut [f32],
        grads: &[f32],
        moments: &mut [F::Code],
        norms: &mut [F::Norm],
    ) {
        let Self { c, limits, key, before, after, .. } = *self;
        let per_unit = F::UP / after;
        // beta1 * m of a code of 1 is `v * unit_m + eps_m`.
        let (unit_m, eps_m) =
            (before * F::plain_unit(limits) * c.beta1, c.eps_outside * F::plain_unit(limits) * c.beta1);
        let scale_m = c.grad_scale * c.one_minus_beta1;
        let (scale_v, eps_v) = (c.grad_scale.abs() * per_unit, c.eps_inside * per_unit);
        let (unit_u, eps_u) = (after / F::GAIN, c.eps_outside / F::GAIN);
        let streams = params.iter_mut().zip(grads).zip(moments).zip(norms);
        for ((((w, grad), moment), norm), random) in streams.zip(Randoms::new(key)) {
            let kept = F::norm_plain(*norm);
            let m = F::load_plain(*moment) * (kept * unit_m + eps_m) + *grad * scale_m;
            let seen = grad.abs() * scale_v + eps_v;
            let (v, code) = F::round_plain_norm(if kept > seen { kept } else { seen });
            let gained = m / (v * unit_u + eps_u);
            let w_kept = if DECAYS { *w - c.decay * *w } else { *w };
            *w = w_kept - c.step_size * F::bound(gained, limits);
            *moment = F::narrow(F::encode_plain(gained, limits, random));
            *norm = F::narrow_norm(code);
        }
    }
}

/// One update of a row whose elements share one u: the largest of the row.
///
/// ```text
/// u = max(beta2 * u, |g_1|, |g_2|, ..)
/// ```
#[inline(always)]
pub(crate) fn update_row<A: Arithmetic, M: Moment<A>>(
    c: &Coefficients<A>,
    limits: &Limits,
    key: u32,
    params: &mut [A],
    grads: &[A],
    (moments, norm): (&mut [M::Code], &mut A),
) {
    let before = *norm;
    let mut after = c.beta2 * before;
    for (w, grad) in params.iter().zip(grads) {
        after = rule::maximum(after, rule::magnitude(c, rule::gradient(c, *w, *grad)));
    }
    for (((w, grad), moment), random) in params.iter_mut().zip(grads).zip(moments).zip(Randoms::new(key)) {
        let g = rule::gradient(c, *w, *grad);
        let m = rule::first_moment(c, M::decode(M::load(*moment, limits), before + c.eps_outside), g);
        let ratio = rule::normalized(c, m, after);
        *w = rule::step_weight(c, *w, ratio);
        *moment = M::narrow(M::encode(m, ratio, limits, random));
    }
    *norm = after;
}
