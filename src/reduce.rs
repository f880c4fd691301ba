//! Norms by **one fixed tree**. Pure; knows nothing of tensors or threads.
//!
//! A row of numbers is cut into leaves of [`LEAF`]. In a leaf, lane j of [`LANES`] takes the elements j, j + LANES, ...
//! in order; then the lanes fold in halves: j with j + 16, j + 8, 4, 2, 1. The leaves' results are again a row of
//! numbers, reduced in the same way until one is left. (On a GPU a leaf is a warp: a lane is a thread, the fold is its
//! shuffles.)
//!
//! Invariant: the tree depends on the number of elements alone, never on threads, vector width or device; so the same
//! gradient has the same norm, bit for bit, everywhere. Everything is f64: squares of f32 neither overflow nor vanish.

use serde::{Deserialize, Serialize};

use crate::element::{Arithmetic, Element};
use crate::rule::maximum;

/// Elements of a leaf.
pub(crate) const LEAF: usize = 1024;
/// Partial results that a leaf keeps.
pub(crate) const LANES: usize = 32;

/// Which norm of a gradient is meant: L1, L2 (Euclidean) or the largest magnitude.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The norm, from what the tree has summed up.
    pub(crate) fn finish(self, reduced: f64) -> f64 {
        match self {
            Self::L2 => reduced.sqrt(),
            Self::L1 | Self::Inf => reduced,
        }
    }

    /// The norm of several tensors together, from the norms of each, in the order given. Scaled, so that
    /// nothing overflows.
    pub(crate) fn join(self, norms: &[f64]) -> f64 {
        let largest = norms.iter().copied().fold(0.0, maximum);
        match self {
            Self::Inf => largest,
            Self::L1 => tree::<Magnitudes>(norms.to_vec()),
            Self::L2 if largest == 0.0 || !largest.is_finite() => largest,
            Self::L2 => {
                // A power of two scales without rounding; where the exponent is that of subnormals, any small one does.
                let scale = f64::from_bits(largest.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE);
                let squares = norms.iter().map(|norm| (norm / scale) * (norm / scale)).collect();
                scale * tree::<Squares>(squares).sqrt()
            }
        }
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

/// The sum of the products of two rows of the same length, by the lanes of one leaf, however long. Products of f32 are exact.
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
            let xs: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 64.0).collect();
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
            let got = NormType::L2.finish(norm::<Squares>(&[scale; 4]));
            assert_eq!(got, 2.0 * f64::from(scale));
        }
        for scale in [2f64.powi(900), 2f64.powi(-900), f64::MIN_POSITIVE / 1024.0] {
            assert_eq!(NormType::L2.join(&[3.0 * scale, 4.0 * scale]), 5.0 * scale);
        }
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
            assert!(kind.join(&[1.0, f64::NAN, 2.0]).is_nan());
            assert_eq!(kind.join(&[1.0, f64::INFINITY]), f64::INFINITY);
            assert_eq!(kind.join(&[]), 0.0);
        }
    }
}
