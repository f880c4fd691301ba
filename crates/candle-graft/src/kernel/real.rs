//! Functions of real numbers: in f32 as arithmetic without branches, which the compiler turns into vector
//! instructions, in f64 from the libraries of mathematics.
//!
//! No step uses a fused multiplication and addition. The bits are therefore the same on all machines.

use std::ops::Neg;

use candle_core::WithDType;

/// The numbers that are computed with: f32 or f64.
pub(crate) trait Real: WithDType + Neg<Output = Self> {
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn of(x: f64) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;

    /// The exponential of a number that is not positive, or NaN.
    fn exp_neg(self) -> Self;

    fn tanh(self) -> Self;

    /// The distribution function of the normal distribution, and its derivative, the density.
    fn normal(self) -> (Self, Self);

    /// `1 / (1 + exp(-x))`
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let e = (-self.abs()).exp_neg();
        (if self < Self::ZERO { e } else { Self::ONE }) / (Self::ONE + e)
    }

    /// The larger one; `other` where one of them is NaN.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

/// `c[0] + c[1] x + c[2] x^2 ...`
#[inline(always)]
fn polynomial<const N: usize>(c: [f32; N], x: f32) -> f32 {
    let mut sum = 0.0;
    for i in (0..N).rev() {
        sum = sum * x + c[i];
    }
    sum
}

/// The exponential of `high + low`, where `high` is not positive and `low` is at most 0.06 away from 0.
#[inline(always)]
fn exp_sum(high: f32, low: f32) -> f32 {
    /// Where this is added, what is behind the point is rounded off.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    // ln 2 as the sum of a number with so few digits that its products with integers are exact, and the rest.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// `(e^r - 1 - r) / r^2` by the least relative error of `e^r`, 3e-9, for r of at most half of ln 2.
    const TAIL: [f32; 5] = [0.499_999_93, 0.166_665_21, 0.041_668_39, 0.008_368_717, 0.001_381_459_4];
    // The exponential of less is 0 in f32. NaN stays NaN.
    let high = if high < -104.0 { -104.0 } else { high };
    let shifted = high * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (high - n * LN_2_HIGH) - n * LN_2_LOW + low;
    let e = (r * r) * polynomial(TAIL, r) + r + 1.0;
    // 2^n in two steps, since n is down to -150, and f32 has numbers down to 2^-149 with the small ones inexact.
    let exponent = (shifted.to_bits().wrapping_sub(ROUND.to_bits())).wrapping_add(127 + 64);
    e * f32::from_bits(exponent << 23) * f32::from_bits((127 - 64) << 23)
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }

    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }

    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    #[inline(always)]
    fn exp_neg(self) -> f32 {
        exp_sum(self, 0.0)
    }

    #[inline(always)]
    fn tanh(self) -> f32 {
        /// `(tanh x - x) / x^3` as a function of x^2, by the least relative error of tanh, 5e-9, for x up to 0.63.
        const TAIL: [f32; 5] = [-0.333_332_8, 0.133_313_84, -0.053_733_997, 0.020_618_11, -0.005_679_293];
        let a = self.abs();
        let square = self * self;
        let small = self + self * square * polynomial(TAIL, square);
        let e = (-2.0 * a).exp_neg();
        let large = ((1.0 - e) / (1.0 + e)).copysign(self);
        if a < 0.625 { small } else { large }
    }

    #[inline(always)]
    fn normal(self) -> (f32, f32) {
        // With a = |x|, the part of the distribution beyond a is e^(-a^2 / 2) P(a) / Q(a), where the quotient has a
        // relative error of 6e-9 for a up to 14.5, beyond which the exponential is 0 in f32. All terms are positive.
        const P: [f32; 5] = [0.5, 0.438_303_83, 0.183_240_9, 0.040_634_926, 0.004_116_484_6];
        const Q: [f32; 6] = [1.0, 1.674_492_6, 1.202_529, 0.469_485_6, 0.101_863_09, 0.010_318_377];
        let a = self.abs();
        let a = if a > 15.0 { 15.0 } else { a };
        // The square to more digits than f32 has: `head` has 12 of them, so that its own square is exact.
        let head = f32::from_bits(a.to_bits() & 0xffff_f000);
        let e = exp_sum(-0.5 * head * head, -0.5 * (a - head) * (a + head));
        let beyond = e * (polynomial(P, a) / polynomial(Q, a));
        let phi = if self < 0.0 { beyond } else { 1.0 - beyond };
        (phi, e * 0.398_942_3) // 1 / sqrt(2 pi)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }

    #[inline(always)]
    fn abs(self) -> f64 {
        f64::abs(self)
    }

    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }

    #[inline(always)]
    fn exp_neg(self) -> f64 {
        f64::exp(self)
    }

    #[inline(always)]
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }

    #[inline(always)]
    fn normal(self) -> (f64, f64) {
        let phi = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (phi, (-0.5 * self * self).exp() / std::f64::consts::TAU.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares `ours`, in f32, with `exact`, in f64, at numbers from `from` to `to`: by how many units in the last
    /// place the relative error is at most, where the result is not so small that f32 has fewer digits.
    fn worst(from: f32, to: f32, ours: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let steps = 1_000_000;
        let mut worst = 0.0f64;
        for i in 0..=steps {
            let x = from + (to - from) * (i as f32 / steps as f32);
            let (ours, exact) = (f64::from(ours(x)), exact(f64::from(x)));
            let unit = exact.abs().max(f64::from(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON) / 2.0;
            worst = worst.max((ours - exact).abs() / unit);
        }
        worst
    }

    #[test]
    fn the_exponential() {
        let error = worst(-104.0, 0.0, Real::exp_neg, f64::exp);
        assert!(error < 1.5, "{error}");
        assert_eq!(0.0f32.exp_neg(), 1.0);
        assert_eq!(f32::NEG_INFINITY.exp_neg(), 0.0);
        assert_eq!(f32::MIN.exp_neg(), 0.0);
        assert!(f32::NAN.exp_neg().is_nan());
        assert!((-103.0f32).exp_neg() > 0.0);
    }

    #[test]
    fn the_normal_distribution() {
        let error = worst(-15.0, 15.0, |x| x.normal().0, |x| x.normal().0);
        assert!(error < 7.7, "{error}");
        let error = worst(-15.0, 15.0, |x| x.normal().1, |x| x.normal().1);
        assert!(error < 3.2, "{error}");
        for (x, phi) in [(f32::INFINITY, 1.0), (f32::NEG_INFINITY, 0.0), (0.0, 0.5), (1e30, 1.0), (-1e30, 0.0)] {
            assert_eq!(x.normal().0, phi, "{x}");
        }
        assert!(f32::NAN.normal().0.is_nan() && f32::NAN.normal().1.is_nan());
    }

    #[test]
    fn the_hyperbolic_tangent_and_the_sigmoid() {
        let error = worst(-12.0, 12.0, Real::tanh, f64::tanh);
        assert!(error < 2.5, "{error}");
        let error = worst(-0.01, 0.01, Real::tanh, f64::tanh);
        assert!(error < 2.5, "{error}");
        let error = worst(-90.0, 90.0, Real::sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        assert!(error < 3.0, "{error}");
        assert_eq!(
            [f32::tanh(1e30), Real::tanh(f32::NEG_INFINITY), Real::sigmoid(f32::NEG_INFINITY)],
            [1.0, -1.0, 0.0]
        );
        assert!(Real::tanh(f32::NAN).is_nan() && Real::sigmoid(f32::NAN).is_nan());
    }
}
