//! What each encoding stores of an element.

use bytemuck::Pod;
use half::{bf16, f16};

use super::Limits;
use crate::element::Arithmetic;
use crate::rounding::{Half, TWO_32, centered};
use crate::rule;

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

    /// The same, where both are finite, from the quotient times the [gain](Format::GAIN) of the format.
    fn encode_plain(gained: A, limits: &Limits, random: u32) -> Self::Wide;

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
    fn encode_plain(m: A, _: &Limits, _: u32) -> A {
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

    /// What steps are multiplied with, within their bound, because u is rounded up: so they are right on average.
    const GAIN: f32;

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

/// What is stored of m: the quotient. Where both are infinite that is NaN, and the sign is stored instead, times which
/// u is m again.
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
            fn encode_plain(ratio: f32, _: &Limits, random: u32) -> u32 {
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
            const GAIN: f32 = 1.0;
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
    pub(super) const LARGEST: f32 = 126.99;
    /// The code of a quotient that is NaN.
    const NAN: i32 = -128;
    /// Codes of v: `2^(code >> 3) * (1 + (code & 7) / 8)` in units of `2^-LOWEST`, up to FINITE, then infinity and NaN.
    /// There is no zero: where no gradient has been, m is zero, and then it does not matter what u is.
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
        let code = Self::encode_plain(ratio * Self::GAIN, limits, random);
        #[expect(clippy::eq_op, reason = "only a NaN differs from itself")]
        let is_nan = ratio != ratio;
        if is_nan { Self::NAN as u32 } else { code }
    }

    #[inline(always)]
    fn encode_plain(gained: f32, limits: &Limits, random: u32) -> u32 {
        // f32 has no places behind the point from 2^23 on: the addition rounds, and its last byte is the whole number.
        // Here the point is 32 places higher, where the random numbers have it.
        const ROUND: f32 = 12_582_912.0 * TWO_32;
        ((gained * limits.codes + centered(random)) + ROUND).to_bits()
    }
}

impl Format for Q8 {
    type Norm = u8;

    const TOP: Option<i64> = Some(0);
    /// Above what the clock's dither can take away, so that u is never below the exact one.
    const UP: f32 = 1.0 + 1.0 / 8192.0;
    /// A number whose logarithm is equally likely to be anywhere is rounded up to `1 / 0.9562` of it on average: the
    /// mean of `x / up(x)` is `(1/9 + 1/10 + .. + 1/16) / ln 2`, less [`UP`](Self::UP).
    const GAIN: f32 = 1.0458;
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
