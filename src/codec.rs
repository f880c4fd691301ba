//! How moments are stored in 4 and in 2 bytes. Pure; its mirror will be `cuda/codec.cuh`.
//!
//! Two facts of Adamax make it possible.
//!
//! 1. `u = max_i |g_i| * beta2^(n - i)`: the norm is a maximum of values that only shrink, all by the same factor. What
//!    is stored is the **un-decayed** `v = u / 2^L` in a unit `2^L` that shrinks instead, one for a block of elements. So v
//!    is rounded when a new maximum comes, once, and never again: rounding `beta2 * u` at each step would leave it where it
//!    is for ever (in bf16 for all beta2 above 0.998).
//! 2. `|m| / (u + eps) <= C = (1 - beta1) / (1 - beta1 / beta2)`, always: what is stored for m is that quotient, whose range
//!    is known, so it needs no scale. It is rounded stochastically, since its changes of a tenth a step would get lost.
//!
//! `L` is a [fixed-point number](scale_of) of 8 bits before and 24 behind the point: a table has one for each row, which is
//! the row's own clock, and other tensors have one for each 1,024 elements, so that it costs nothing to look for the largest
//! value of a block before anything is written: a spike moves its block's unit, and nothing saturates.
//!
//! | | ratio | v | range of v in a block | u in terms of the exact one |
//! | --- | --- | --- | --- | --- |
//! | [`Bf16`] | bf16 | bf16, nearest | that of f32 | within 2^-8 |
//! | [`F16`] | f16 | f16, nearest | 2^29, subnormal over 2^39 | within 2^-11 |
//! | [`Q8`] | 8 bits, linear in `[-C, C]` | 5 bits of exponent, 3 of mantissa, rounded up | 2^31 | 1 to 1.13 |
//!
//! What lies below its block's range becomes the smallest code, so its u is too large and its steps too small, never the
//! reverse. Infinity and NaN have codes.

use bytemuck::Pod;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::element::Arithmetic;
use crate::ledger::Debt;
use crate::rounding::{Half, centered, random};
use crate::rule::{self, Coefficients, Hyperparameters};

/// How the moments of f32, f16 and bf16 variables are stored; those of f64 variables are f64.
///
/// Two things are stored for each element: the quotient `m / (u + eps)`, rounded stochastically, and the un-decayed norm,
/// in a unit that shrinks by `beta2` each update, so that u decays in any number of bits. The unit is 4 bytes for each row
/// of a table and for each 1,024 elements of any other variable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StateDType {
    /// m and u in f32: 8 bytes an element.
    #[default]
    F32,
    /// 4 bytes an element: 8 bits of precision, the range of f32. u is within 2^-8 of the exact one.
    BF16,
    /// 4 bytes an element: 11 bits of precision. u is within 2^-11 of the exact one; elements whose u is less than 2^-29
    /// of the largest one in their block have less, and below 2^-39 their u is too large and their steps too small.
    F16,
    /// 2 bytes an element: the quotient in 8 bits, the norm in 8 bits rounded up. u is 1 to 1.13 times the exact one while
    /// it is above 2^-30 of the largest one in its block, and no weight moves by more than
    /// `(1 - beta1) / (1 - beta1 / beta2)` times `lr / (1 - beta1^t)` in a step.
    Q8,
}

/// Elements that share a unit, where these are not the rows of a table.
pub(crate) const BLOCK: usize = 1024;

/// The bits behind the point of a unit's logarithm.
const POINT: u32 = 24;
/// The whole part of a unit's logarithm is stored with this added.
const BIAS: i64 = 126;

/// What the encodings of a parameter depend on; a state that was encoded with others has to be encoded anew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Encoding {
    /// Beside u in the quotient.
    pub(crate) eps_outside: f64,
    /// The largest quotient, C.
    pub(crate) limit: f64,
}

impl Encoding {
    pub(crate) fn of(hyper: &Hyperparameters) -> Self {
        let eps_outside = match hyper.epsilon {
            rule::Epsilon::Outside => hyper.eps,
            rule::Epsilon::Inside => 0.0,
        };
        Self { eps_outside, limit: largest_ratio(hyper.beta1, hyper.beta2) }
    }

    pub(crate) fn limits(&self) -> Limits {
        let limit = self.limit as f32;
        Limits { limit, per_code: limit / Q8::LARGEST, codes: Q8::LARGEST / limit * TWO_32 }
    }
}

/// The largest `|m| / u` there can be: `(1 - beta1) / (1 - beta1 / beta2)`; infinite unless `beta1 < beta2`.
pub(crate) fn largest_ratio(beta1: f64, beta2: f64) -> f64 {
    if beta1 < beta2 { (1.0 - beta1) / (1.0 - beta1 / beta2) } else { f64::INFINITY }
}

/// [`Encoding::limit`] in the forms that kernels use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    limit: f32,
    /// What a code of [`Q8`] stands for, and its reciprocal in units of 2^-32.
    per_code: f32,
    codes: f32,
}

const TWO_32: f32 = 4_294_967_296.0;

/// By how much a unit's logarithm falls in update `t`: `octaves = -log2(beta2)`, rounded down or up at random, so that the
/// error of any number of updates stays that of a random walk: 3e-6 of u after 20,000 of them, 2e-5 after a million.
pub(crate) fn shrinkage(octaves: f64, key: u64, t: u64) -> u64 {
    /// More than any unit can hold; -log2(0) is infinite.
    const ALL: f64 = (1u64 << 40) as f64;
    let dither = (crate::rounding::derive(key, t) >> 11) as f64 / (1u64 << 53) as f64;
    (octaves * f64::from(1u32 << POINT) + dither).floor().min(ALL) as u64
}

/// A unit, `2^L`, of its stored logarithm.
///
/// The same polynomial on every machine, in f64 and rounded once: Taylor's for `e^y`, within 2e-10.
#[inline(always)]
pub(crate) fn scale_of(log: u32) -> f32 {
    let fraction = f64::from(log & ((1 << POINT) - 1)) / f64::from(1u32 << POINT);
    let y = (fraction - 0.5) * std::f64::consts::LN_2;
    let mut sum = 1.0;
    for n in [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0] {
        sum = 1.0 + y * sum * (1.0 / n);
    }
    (std::f64::consts::SQRT_2 * sum) as f32 * power_of_two(i64::from(log >> POINT) - BIAS)
}

/// `2^exponent`; 0 below f32's smallest normal number.
#[inline(always)]
fn power_of_two(exponent: i64) -> f32 {
    if exponent < -126 { 0.0 } else { f32::from_bits(((exponent.min(127) + 127) as u32) << 23) }
}

/// A unit's logarithm after `shrink`, raised so far that `largest` fits; and what stored values are multiplied with then.
#[inline(always)]
fn move_unit<F: Format>(log: u32, shrink: u64, largest: f32) -> (u32, f32) {
    let shrunk = i64::from(log) - shrink as i64;
    let whole = shrunk >> POINT;
    let wanted = match F::TOP {
        // `largest < 2^(e + 1)` has to be at most `2^TOP` units.
        Some(top) => {
            let e = i64::from(largest.to_bits() >> 23) - 127;
            (e + 1 - top + BIAS).clamp(0, BIAS + 126)
        }
        None => BIAS,
    };
    let octaves = (wanted - whole).max(0);
    ((shrunk + (octaves << POINT)) as u32, power_of_two(-octaves))
}

/// How m is stored.
///
/// A code is made in two steps, as wide as the arithmetic and then as narrow as it is stored, so that loops over either
/// have one width and vectorise.
pub(crate) trait Moment<A: Arithmetic> {
    type Code: Pod + Send + Sync;
    /// A code as wide as the arithmetic.
    type Wide: Pod;
    /// What rounds to the nearest code where a random number is asked for.
    const NEAREST: u32;

    /// What is stored, as a number.
    fn load(code: Self::Code, limits: &Limits) -> A;

    /// m, from what is stored and from `u + eps`.
    fn decode(stored: A, denominator: A) -> A;

    /// What is stored in units of [`plain_unit`](Self::plain_unit), if it is not NaN.
    fn load_plain(code: Self::Code) -> A;

    fn plain_unit(limits: &Limits) -> A;

    /// The code of m, where `ratio` is `m / (u + eps)`.
    fn encode(m: A, ratio: A, limits: &Limits, random: u32) -> Self::Wide;

    /// The same, where both are finite.
    fn encode_plain(m: A, ratio: A, limits: &Limits, random: u32) -> Self::Wide;

    fn narrow(code: Self::Wide) -> Self::Code;
}

/// m itself.
pub(crate) struct Plain;

impl<A: Arithmetic + Pod> Moment<A> for Plain {
    type Code = A;
    type Wide = A;
    const NEAREST: u32 = 0;

    #[inline(always)]
    fn load(code: A, _: &Limits) -> A {
        code
    }

    #[inline(always)]
    fn decode(stored: A, _: A) -> A {
        stored
    }

    #[inline(always)]
    fn load_plain(code: A) -> A {
        code
    }

    #[inline(always)]
    fn plain_unit(_: &Limits) -> A {
        A::from_f64(1.0)
    }

    #[inline(always)]
    fn narrow(code: A) -> A {
        code
    }

    #[inline(always)]
    fn encode(m: A, _: A, _: &Limits, _: u32) -> A {
        m
    }

    #[inline(always)]
    fn encode_plain(m: A, _: A, _: &Limits, _: u32) -> A {
        m
    }
}

/// How m and u are stored.
pub(crate) trait Format: Moment<f32> + 'static {
    /// The code of v; 0 is 0.
    type Norm: Pod + Send + Sync;

    /// A unit is so large that the largest value of its block is at most 2 to this power; none if v has f32's range.
    const TOP: Option<i64>;

    /// How much larger a new maximum is made before it is rounded.
    const UP: f32;

    /// The smallest v above zero.
    const SMALLEST: f32;

    /// A code of v, as wide as f32.
    fn widen_norm(code: Self::Norm) -> u32;

    /// v.
    fn norm(code: u32) -> f32;

    /// Of codes that are neither infinite nor NaN.
    fn norm_plain(code: Self::Norm) -> f32;

    /// The code of v, which is not negative; what is above zero is at least the smallest v.
    fn encode_norm(v: f32) -> u32;

    /// The same of a v in the range, with what it stands for.
    fn round_plain_norm(v: f32) -> (f32, u32);

    fn narrow_norm(code: u32) -> Self::Norm;

    /// Whether a code is infinite or NaN.
    fn is_special(code: Self::Norm) -> bool;

    /// A quotient, kept below the largest there can be.
    fn bound(ratio: f32, limits: &Limits) -> f32;
}

/// m, from the quotient; not above what is finite where u is not, though the quotient may have been rounded up.
#[inline(always)]
fn moment_of(ratio: f32, denominator: f32) -> f32 {
    let m = ratio * denominator;
    if denominator < f32::INFINITY { rule::clamp(m, f32::MAX) } else { m }
}

/// What is stored of m: the quotient. Where both are infinite that is NaN, and the sign is stored instead, times which u
/// is m again.
#[inline(always)]
fn storable(m: f32, ratio: f32) -> f32 {
    if m.abs() == f32::INFINITY { if m > 0.0 { 1.0 } else { -1.0 } } else { ratio }
}

macro_rules! halves {
    ($(#[$doc:meta])* $name:ident, $half:ty, $top:expr, $smallest:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl Moment<f32> for $name {
            type Code = u16;
            type Wide = u32;
            const NEAREST: u32 = 1 << 31;

            #[inline(always)]
            fn load(code: u16, _: &Limits) -> f32 {
                <$half as Half>::widen_bits(u32::from(code))
            }

            #[inline(always)]
            fn decode(stored: f32, denominator: f32) -> f32 {
                moment_of(stored, denominator)
            }

            #[inline(always)]
            fn load_plain(code: u16) -> f32 {
                <$half as Half>::widen_bits(u32::from(code))
            }

            #[inline(always)]
            fn plain_unit(_: &Limits) -> f32 {
                1.0
            }

            #[inline(always)]
            fn encode(m: f32, ratio: f32, _: &Limits, random: u32) -> u32 {
                <$half as Half>::stochastic(storable(m, ratio), random)
            }

            #[inline(always)]
            fn encode_plain(_: f32, ratio: f32, _: &Limits, random: u32) -> u32 {
                <$half as Half>::stochastic_plain(ratio, random)
            }

            #[inline(always)]
            fn narrow(code: u32) -> u16 {
                code as u16
            }
        }

        impl Format for $name {
            type Norm = u16;

            const TOP: Option<i64> = $top;
            const UP: f32 = 1.0;
            const SMALLEST: f32 = $smallest;

            #[inline(always)]
            fn widen_norm(code: u16) -> u32 {
                u32::from(code)
            }

            #[inline(always)]
            fn norm(code: u32) -> f32 {
                <$half as Half>::widen_bits(code)
            }

            #[inline(always)]
            fn norm_plain(code: u16) -> f32 {
                <$half as Half>::widen_bits(u32::from(code))
            }

            #[inline(always)]
            fn encode_norm(v: f32) -> u32 {
                let finite = <$half as Half>::nearest_plain(v);
                // A bf16 has a smallest value that f32 can be below.
                let finite = if v > 0.0 && finite == 0 { 1 } else { finite };
                if v < f32::INFINITY { finite } else { <$half as Half>::nearest(v) }
            }

            #[inline(always)]
            fn round_plain_norm(v: f32) -> (f32, u32) {
                let code = <$half as Half>::nearest_plain(v);
                (<$half as Half>::widen_bits(code), code)
            }

            #[inline(always)]
            fn narrow_norm(code: u32) -> u16 {
                code as u16
            }

            #[inline(always)]
            fn is_special(code: u16) -> bool {
                const INFINITE: u16 = <$half>::INFINITY.to_bits();
                code >= INFINITE
            }

            #[inline(always)]
            fn bound(ratio: f32, _: &Limits) -> f32 {
                ratio
            }
        }
    };
}

halves! {
    /// 4 bytes an element, of bf16.
    Bf16, bf16, None, 0.0
}
halves! {
    /// 4 bytes an element, of f16.
    F16, f16, Some(15), 0.0
}

/// 2 bytes an element.
pub(crate) struct Q8;

impl Q8 {
    /// C in codes; 127 is the largest one, which no random number can take it above.
    const LARGEST: f32 = 126.99;
    /// The code of a quotient that is NaN.
    const NAN: i32 = -128;
    /// Codes of v: `2^(code >> 3) * (1 + (code & 7) / 8)` in units of `2^-LOWEST`, up to FINITE, then infinity and NaN. There is
    /// no zero: where no gradient has been, m is zero, and then it does not matter what u is.
    const LOWEST: u32 = 31;
    const FINITE: u32 = 253;
    const INFINITE: u32 = 254;
    /// The places of an f32 that are not kept.
    const UNDER: u32 = 0x000f_ffff;
    /// The bits of the smallest v without those.
    const LOWEST_BITS: u32 = (127 - Self::LOWEST) << 3;
}

impl Moment<f32> for Q8 {
    type Code = i8;
    type Wide = u32;
    const NEAREST: u32 = 0;

    #[inline(always)]
    fn load(code: i8, limits: &Limits) -> f32 {
        let ratio = Self::load_plain(code) * limits.per_code;
        if i32::from(code) == Self::NAN { f32::NAN } else { ratio }
    }

    #[inline(always)]
    fn load_plain(code: i8) -> f32 {
        i32::from(code) as f32
    }

    #[inline(always)]
    fn plain_unit(limits: &Limits) -> f32 {
        limits.per_code
    }

    #[inline(always)]
    fn decode(stored: f32, denominator: f32) -> f32 {
        moment_of(stored, denominator)
    }

    #[inline(always)]
    fn narrow(code: u32) -> i8 {
        code as i8
    }

    #[inline(always)]
    fn encode(m: f32, ratio: f32, limits: &Limits, random: u32) -> u32 {
        let ratio = storable(m, ratio);
        let code = Self::encode_plain(m, ratio, limits, random);
        #[expect(clippy::eq_op, reason = "only a NaN differs from itself")]
        let is_nan = ratio != ratio;
        if is_nan { Self::NAN as u32 } else { code }
    }

    #[inline(always)]
    fn encode_plain(_: f32, ratio: f32, limits: &Limits, random: u32) -> u32 {
        // f32 has no places behind the point from 2^23 on: the addition rounds, and its last byte is the whole number.
        // Here the point is 32 places higher, where the random numbers have it.
        const ROUND: f32 = 12_582_912.0 * TWO_32;
        ((ratio * limits.codes + centered(random)) + ROUND).to_bits()
    }
}

impl Format for Q8 {
    type Norm = u8;

    const TOP: Option<i64> = Some(0);
    /// Above what the clock's dither can take away, so that u is never below the exact one.
    const UP: f32 = 1.0 + 1.0 / 8192.0;
    const SMALLEST: f32 = f32::from_bits(Self::LOWEST_BITS << 20);

    #[inline(always)]
    fn widen_norm(code: u8) -> u32 {
        u32::from(code)
    }

    #[inline(always)]
    fn norm(code: u32) -> f32 {
        let special = if code == Self::INFINITE { f32::INFINITY } else { f32::NAN };
        if code > Self::FINITE { special } else { f32::from_bits((code + Self::LOWEST_BITS) << 20) }
    }

    #[inline(always)]
    fn norm_plain(code: u8) -> f32 {
        f32::from_bits((u32::from(code) + Self::LOWEST_BITS) << 20)
    }

    #[inline(always)]
    fn encode_norm(v: f32) -> u32 {
        let special = if v == f32::INFINITY { Self::INFINITE } else { Self::INFINITE + 1 };
        // Up, in the order of the bits, which is that of the numbers.
        let up = v.to_bits().wrapping_add(Self::UNDER) >> 20;
        let finite = (up.max(Self::LOWEST_BITS) - Self::LOWEST_BITS).min(Self::FINITE);
        if v.to_bits() >= f32::INFINITY.to_bits() { special } else { finite }
    }

    #[inline(always)]
    fn round_plain_norm(v: f32) -> (f32, u32) {
        let up = v.to_bits().wrapping_add(Self::UNDER);
        (f32::from_bits(up & !Self::UNDER), (up >> 20).wrapping_sub(Self::LOWEST_BITS))
    }

    #[inline(always)]
    fn narrow_norm(code: u32) -> u8 {
        code as u8
    }

    #[inline(always)]
    fn is_special(code: u8) -> bool {
        u32::from(code) > Self::FINITE
    }

    #[inline(always)]
    fn bound(ratio: f32, limits: &Limits) -> f32 {
        rule::clamp(ratio, limits.limit)
    }
}

/// What one update of encoded moments needs beside the [`Coefficients`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes {
    pub(crate) limits: Limits,
    /// Of [`shrinkage`].
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
        let seen = rule::seen(c, rule::gradient(c, 0.0, f32::from_bits(largest)));
        if largest < INFINITE && seen < f32::INFINITY {
            return Largest { finite: seen, is_all: true };
        }
    }
    let (mut finite, mut is_all) = (0, true);
    for (w, grad) in params.iter().zip(grads) {
        let seen = rule::seen(c, rule::gradient(c, *w, *grad)).to_bits();
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
        for ((((w, grad), moment), norm), i) in streams.zip(0u32..) {
            let stored = F::norm(F::widen_norm(*norm));
            let m = F::decode(F::load(*moment, limits), stored * before + c.eps_outside);
            let g = rule::gradient(c, *w, *grad);
            let m = rule::first_moment(c, m, g);
            let code = F::encode_norm(rule::maximum(stored * rebase, rule::seen(c, g) * per_unit));
            let ratio = F::bound(rule::ratio(c, m, F::norm(code) * after), limits);
            *w = rule::apply(c, *w, ratio);
            *moment = F::narrow(F::encode(m, ratio, limits, random(key, i)));
            *norm = F::narrow_norm(code);
        }
    }

    /// The same where nothing of that is, which is nearly everywhere: constants are multiplied beforehand, and nothing looks
    /// for what is not there. A rounding apart from [`update`](Self::update).
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
        let streams = params.iter_mut().zip(grads).zip(moments).zip(norms);
        for ((((w, grad), moment), norm), i) in streams.zip(0u32..) {
            let kept = F::norm_plain(*norm);
            let m = F::load_plain(*moment) * (kept * unit_m + eps_m) + *grad * scale_m;
            let seen = grad.abs() * scale_v + eps_v;
            let (v, code) = F::round_plain_norm(if kept > seen { kept } else { seen });
            let ratio = F::bound(m / (v * after + c.eps_outside), limits);
            let w_kept = if DECAYS { *w - c.decay * *w } else { *w };
            *w = w_kept - c.step_size * ratio;
            *moment = F::narrow(F::encode_plain(m, ratio, limits, random(key, i)));
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
        after = rule::maximum(after, rule::seen(c, rule::gradient(c, *w, *grad)));
    }
    for (((w, grad), moment), i) in params.iter_mut().zip(grads).zip(moments).zip(0u32..) {
        let g = rule::gradient(c, *w, *grad);
        let m = rule::first_moment(c, M::decode(M::load(*moment, limits), before + c.eps_outside), g);
        let ratio = rule::ratio(c, m, after);
        *w = rule::apply(c, *w, ratio);
        *moment = M::narrow(M::encode(m, ratio, limits, random(key, i)));
    }
    *norm = after;
}

/// Pays what a block of elements owes that share a unit.
#[inline(always)]
pub(crate) fn pay_block<F: Format>(
    debt: &Debt<'_, f32>,
    limits: &Limits,
    key: u32,
    params: &mut [f32],
    (moments, norms, log): (&mut [F::Code], &mut [F::Norm], &mut u32),
) {
    let before = scale_of(*log);
    let (moved, rebase) = move_unit::<F>(*log, debt.shrunk, 0.0);
    let after = scale_of(moved);
    let decoded = |moment: F::Code, norm: F::Norm| {
        let u = F::norm(F::widen_norm(norm)) * before;
        (F::decode(F::load(moment, limits), u + debt.eps_outside), u)
    };
    let is_series = params.iter().zip(&*moments).zip(&*norms).all(|((_, moment), norm)| {
        let (m, u) = decoded(*moment, *norm);
        debt.is_series(m, u)
    });
    for (((w, moment), norm), i) in params.iter_mut().zip(moments).zip(norms).zip(0u32..) {
        let (m, u) = decoded(*moment, *norm);
        *w = if is_series { debt.weight(*w, m, u) } else { debt.weight_one_by_one(*w, m, u) };
        let (m, _) = debt.moments(m, u);
        let code = F::encode_norm(F::norm(F::widen_norm(*norm)) * rebase);
        *norm = F::narrow_norm(code);
        let denominator = F::norm(code) * after + debt.eps_outside;
        let ratio = if denominator == 0.0 { 0.0 } else { m / denominator };
        *moment = F::narrow(F::encode(m, F::bound(ratio, limits), limits, random(key, i)));
    }
    *log = moved;
}

/// Pays what a row owes whose elements share one u.
#[inline(always)]
pub(crate) fn pay_row<A: Arithmetic, M: Moment<A>>(
    debt: &Debt<'_, A>,
    limits: &Limits,
    key: u32,
    params: &mut [A],
    (moments, norm): (&mut [M::Code], &mut A),
) {
    let u = *norm;
    let (_, after) = debt.moments(A::ZERO, u);
    let is_series = debt.is_series(after, u);
    for ((w, moment), i) in params.iter_mut().zip(moments).zip(0u32..) {
        let m = M::decode(M::load(*moment, limits), u + debt.eps_outside);
        *w = if is_series { debt.weight(*w, m, u) } else { debt.weight_one_by_one(*w, m, u) };
        let (m, _) = debt.moments(m, u);
        let denominator = after + debt.eps_outside;
        let ratio = if denominator == A::ZERO { A::ZERO } else { m / denominator };
        *moment = M::narrow(M::encode(m, ratio, limits, random(key, i)));
    }
    *norm = after;
}

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
