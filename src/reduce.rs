//! Norms by **one fixed tree**. Pure; knows nothing of tensors or threads.
//!
//! A row of numbers is cut into leaves of [`LEAF`]. In a leaf, lane j of [`LANES`] takes the elements j, j + LANES, ...
//! in order; then the lanes fold in halves: j with j + 16, j + 8, 4, 2, 1. The leaves' results are again a row of
//! numbers, reduced in the same way until one is left. (On a GPU a leaf is a warp: a lane is a thread, the fold is its
//! shuffles.)
//!
//! Invariant: the tree depends on the number of elements alone, never on threads, vector width or device; so the same
//! gradient has the same norm, bit for bit, everywhere. Everything is f64: squares of f32 neither overflow nor vanish.
//! Those of f64 do, and so the same tree then goes over the elements [in units](leaf_in_units) of the largest one's size.

use serde::{Deserialize, Serialize};

use crate::element::{Arithmetic, Element};
use crate::rule::maximum;

/// Elements of a leaf.
pub(crate) const LEAF: usize = 1024;
/// Partial results that a leaf keeps.
pub(crate) const LANES: usize = 32;

/// Which norm of a gradient is meant: L1, L2 (Euclidean) or the largest magnitude.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NormType {
    /// The sum of the magnitudes.
    L1,
    /// The square root of the sum of the squares.
    #[default]
    L2,
    /// The largest magnitude.
    Inf,
}

impl NormType {
    /// Whether the sum of the tree is none to make a norm of: too large for an f64, or of squares that have vanished or
    /// lost places.
    pub(crate) fn is_out_of_range(self, reduced: f64) -> bool {
        /// Squares that have lost places are so far below this that no number of them matters.
        const SMALLEST: f64 = f64::from_bits((1023 - 960) << 52);
        match self {
            Self::L2 => reduced < SMALLEST || reduced == f64::INFINITY,
            Self::L1 => reduced == f64::INFINITY,
            Self::Inf => false,
        }
    }

    /// The norm, from what the tree has summed up of elements in units of `unit`, a power of two.
    pub(crate) fn finish(self, reduced: f64, unit: f64) -> Norm {
        Norm::product(unit, if self == Self::L2 { reduced.sqrt() } else { reduced })
    }

    /// The norm of several tensors together, from the norms of each, in the order given. Scaled, so that
    /// nothing overflows.
    pub(crate) fn join(self, norms: &[Norm]) -> Norm {
        let unit = if norms.iter().any(|norm| norm.is_beyond()) { BEYOND } else { 1.0 };
        let joined = self.join_in(unit, norms);
        let is_infinite = joined == f64::INFINITY && norms.iter().all(|norm| norm.is_finite());
        let (unit, joined) = if is_infinite { (BEYOND, self.join_in(BEYOND, norms)) } else { (unit, joined) };
        Norm::product(unit, joined)
    }

    /// The same in units of `unit`.
    fn join_in(self, unit: f64, norms: &[Norm]) -> f64 {
        let norms: Vec<f64> = norms.iter().map(|norm| norm.in_units(unit)).collect();
        let largest = norms.iter().copied().fold(0.0, maximum);
        match self {
            Self::Inf => largest,
            Self::L1 => tree::<Magnitudes>(norms),
            Self::L2 if largest == 0.0 || !largest.is_finite() => largest,
            Self::L2 => {
                let scale = unit_of(largest);
                let squares = norms.iter().map(|norm| (norm / scale) * (norm / scale)).collect();
                scale * tree::<Squares>(squares).sqrt()
            }
        }
    }
}

/// The unit of norms that no f64 is large enough for, `2^200`. Norms of f64 elements stay below `2^1024` of it, also times
/// the reciprocal of the smallest loss scale.
const BEYOND: f64 = f64::from_bits((1023 + 200) << 52);

/// The power of two at or below `largest`, which is finite and above 0: elements are divided by it without rounding. (For
/// subnormal numbers, which have none of their own, the smallest normal number does.)
pub(crate) fn unit_of(largest: f64) -> f64 {
    f64::from_bits(largest.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE)
}

/// A norm. That of finite numbers may be larger than any f64: then what is stored is negative, in units of [`BEYOND`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Norm(f64);

impl Norm {
    /// From a number as it is stored on a GPU: negative for a norm that is larger than any f64.
    pub(crate) fn of(stored: f64) -> Self {
        Self(stored)
    }

    /// As a number, which may be negative: as it is stored on a GPU.
    #[cfg(test)]
    pub(crate) fn stored(self) -> f64 {
        self.0
    }

    /// `a * b`, where `a` is finite and above 0.
    pub(crate) fn product(a: f64, b: f64) -> Self {
        let product = a * b;
        if product == f64::INFINITY && b.is_finite() { Self(-(a / BEYOND * b)) } else { Self(product) }
    }

    /// The norm of gradients that are multiplied by `unscale`, which is above 0.
    pub(crate) fn times(self, unscale: f64) -> Self {
        if self.is_beyond() {
            // Back in the range of f64, if it is there.
            let units = -self.0 * unscale;
            Self(if units * BEYOND == f64::INFINITY { -units } else { units * BEYOND })
        } else {
            Self::product(unscale, self.0)
        }
    }

    /// Whether it is larger than any f64.
    pub(crate) fn is_beyond(self) -> bool {
        self.0 < 0.0
    }

    /// Whether the norm is a number, however large.
    pub(crate) fn is_finite(self) -> bool {
        self.0.is_finite()
    }

    /// In units of `unit`: 1 or [`BEYOND`].
    pub(crate) fn in_units(self, unit: f64) -> f64 {
        if self.is_beyond() { -self.0 * (BEYOND / unit) } else { self.0 / unit }
    }

    /// The nearest f64: infinity if it is larger than any.
    pub(crate) fn to_f64(self) -> f64 {
        if self.is_beyond() { f64::INFINITY } else { self.0 }
    }

    /// `scale * limit / norm`, for a norm that is larger than any f64: in this order no product leaves the range.
    pub(crate) fn clip_beyond(self, scale: f64, limit: f64) -> f64 {
        scale * (limit / BEYOND) / -self.0
    }
}

/// What is made of an element, and how two results become one.
pub(crate) trait Statistic {
    fn of(x: f64) -> f64;
    fn join(a: f64, b: f64) -> f64;
}

/// For [`NormType::L2`].
pub(crate) struct Squares;
/// For [`NormType::L1`].
pub(crate) struct Magnitudes;
/// For [`NormType::Inf`]; a NaN anywhere makes it NaN.
pub(crate) struct Largest;

impl Statistic for Squares {
    #[inline(always)]
    fn of(x: f64) -> f64 {
        x * x
    }

    #[inline(always)]
    fn join(a: f64, b: f64) -> f64 {
        a + b
    }
}

impl Statistic for Magnitudes {
    #[inline(always)]
    fn of(x: f64) -> f64 {
        x.abs()
    }

    #[inline(always)]
    fn join(a: f64, b: f64) -> f64 {
        a + b
    }
}

impl Statistic for Largest {
    #[inline(always)]
    fn of(x: f64) -> f64 {
        x.abs()
    }

    #[inline(always)]
    fn join(a: f64, b: f64) -> f64 {
        maximum(a, b)
    }
}

/// The result of one leaf: at most [`LEAF`] elements.
#[inline(always)]
pub(crate) fn leaf<S: Statistic, E: Element>(elements: &[E]) -> f64 {
    fold_lanes::<S, E>(elements, |x| S::of(x.widen().to_f64()))
}

/// The same of f64 elements in units of `unit`.
pub(crate) fn leaf_in_units<S: Statistic>(elements: &[f64], unit: f64) -> f64 {
    fold_lanes::<S, f64>(elements, |x| S::of(x / unit))
}

/// The result of a whole row, from the results of its leaves. 0 for an empty row.
pub(crate) fn tree<S: Statistic>(mut leaves: Vec<f64>) -> f64 {
    while leaves.len() > 1 {
        leaves = leaves.chunks(LEAF).map(|row| fold_lanes::<S, f64>(row, |x| x)).collect();
    }
    leaves.first().copied().unwrap_or(0.0)
}

#[inline(always)]
fn fold_lanes<S: Statistic, E: Element>(row: &[E], value: impl Fn(E) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = S::join(*lane, value(x));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = S::join(*lane, value(x));
    }
    fold_halves::<S>(lanes)
}

#[inline(always)]
fn fold_halves<S: Statistic>(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] = S::join(lanes[j], lanes[j + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of the products of two rows of the same length, by the lanes of one leaf, however long. Products of f32 are
/// exact. Products of f64 overflow and vanish, as those of a matrix product do.
#[inline(always)]
pub(crate) fn dot<E: Element>(a: &[E], b: &[E]) -> f64 {
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a.widen().to_f64() * b.widen().to_f64();
        }
    }
    fold_halves::<Magnitudes>(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm<S: Statistic>(xs: &[f32]) -> f64 {
        tree::<S>(xs.chunks(LEAF).map(leaf::<S, f32>).collect())
    }

    #[test]
    fn equals_the_plain_sums() {
        for n in [0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 5000, 1024 * 1024 + 3] {
            let xs: Vec<f32> = (0..n).map(|i: u64| ((i * 7919 % 1009) as f32 - 504.0) / 64.0).collect();
            let plain = |f: fn(f64) -> f64| xs.iter().map(|&x| f(f64::from(x))).sum::<f64>();
            // Multiples of 1/4096 this small add up without rounding, in any order.
            assert_eq!(norm::<Squares>(&xs), plain(|x| x * x), "{n}");
            assert_eq!(norm::<Magnitudes>(&xs), plain(f64::abs), "{n}");
            assert_eq!(norm::<Largest>(&xs), xs.iter().fold(0.0, |a, &x| f64::from(x.abs()).max(a)), "{n}");
        }
    }

    #[test]
    fn extremes_neither_overflow_nor_vanish() {
        for scale in [1e-30f32, 1e30, 1e-45, 3e38] {
            let sum = norm::<Squares>(&[scale; 4]);
            assert!(!NormType::L2.is_out_of_range(sum));
            assert_eq!(NormType::L2.finish(sum, 1.0), Norm(2.0 * f64::from(scale)));
        }
        for scale in [2f64.powi(900), 2f64.powi(-900), f64::MIN_POSITIVE / 1024.0] {
            assert_eq!(NormType::L2.join(&[Norm(3.0 * scale), Norm(4.0 * scale)]), Norm(5.0 * scale));
        }
    }

    #[test]
    fn norms_beyond_f64_keep_their_size() {
        let half = Norm::of(2f64.powi(1023));
        // Twice 2^1023 and five times 3 * 2^1022 are too large; a 2^-200th of them is not.
        let two = NormType::L2.join(&[half; 4]);
        assert_eq!((two, two.to_f64()), (Norm(-2f64.powi(824)), f64::INFINITY));
        assert!(two.is_finite() && two.is_beyond());
        assert_eq!(NormType::L1.join(&[half, half]), two);
        assert_eq!(NormType::L1.join(&[two, two, Norm::of(1.0)]), Norm(-2f64.powi(825)));
        assert_eq!(NormType::L2.join(&[two, Norm::of(1e300), two, two, two]).to_f64(), f64::INFINITY);
        assert_eq!(NormType::Inf.join(&[half, half, Norm::of(3.0)]), half);
        // Unscaling brings them back, or there.
        assert_eq!(two.times(0.25), Norm(2f64.powi(1022)));
        assert_eq!(two.times(4.0), Norm(-2f64.powi(826)));
        assert_eq!(half.times(8.0).times(0.125), half);
        assert_eq!(two.clip_beyond(-1.0, 2f64.powi(1000)), -2f64.powi(-24));
        // What is not finite is not taken for one.
        for kind in [NormType::L1, NormType::L2] {
            assert_eq!(kind.join(&[two, Norm::of(f64::INFINITY)]), Norm(f64::INFINITY));
            assert!(kind.join(&[two, Norm::of(f64::NAN)]).0.is_nan());
        }
        assert_eq!(Norm::of(f64::INFINITY).times(0.5), Norm(f64::INFINITY));
    }

    #[test]
    fn non_finite_elements_show() {
        for position in [0, 5, 1500] {
            let mut xs = vec![1.0f32; 2000];
            xs[position] = f32::NAN;
            assert!(norm::<Squares>(&xs).is_nan() && norm::<Magnitudes>(&xs).is_nan() && norm::<Largest>(&xs).is_nan());
            xs[position] = f32::NEG_INFINITY;
            assert_eq!(norm::<Squares>(&xs), f64::INFINITY);
            assert_eq!(norm::<Largest>(&xs), f64::INFINITY);
        }
        for kind in [NormType::L1, NormType::L2, NormType::Inf] {
            assert!(kind.join(&[1.0, f64::NAN, 2.0].map(Norm)).0.is_nan());
            assert_eq!(kind.join(&[1.0, f64::INFINITY].map(Norm)), Norm(f64::INFINITY));
            assert_eq!(kind.join(&[]), Norm(0.0));
        }
    }
}
