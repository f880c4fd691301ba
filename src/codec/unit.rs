//! The units of un-decayed norms: `2^L`, where L is stored as a fixed-point number.

use super::Format;
use crate::rounding::derive;

/// The bits behind the point of a unit's logarithm.
pub(crate) const POINT: u32 = 24;
/// The whole part of a unit's logarithm is stored with this added.
const BIAS: i64 = 126;
/// The largest whole part that is stored.
pub(crate) const LARGEST: u32 = 2 * BIAS as u32;

/// By how much a unit's logarithm falls in update `t`: `octaves = -log2(beta2)`, rounded so that the error does not
/// grow.
///
/// Units that take part in every update get the whole numbers between its multiples, which are never more than one
/// apart from the sum. Rows of tables take part in some: rounded up or down at random, by `key`, their error is a
/// random walk, 3e-6 of u after 20,000 updates.
pub(crate) fn shrinkage(octaves: f64, t: u64, key: Option<u64>) -> u64 {
    /// More than any unit can hold; -log2(0) is infinite.
    const ALL: f64 = (1u64 << 40) as f64;
    let exact = octaves * f64::from(1u32 << POINT);
    if exact >= ALL {
        return ALL as u64;
    }
    match key {
        Some(key) => (exact + (derive(key, t) >> 11) as f64 / (1u64 << 53) as f64) as u64,
        None => {
            // In parts, since f64 has no places left for the product of a large t. (None is negative, so that a cast is
            // their floor, which x86-64 has no instruction for before SSE 4.1.)
            let whole = exact as u64;
            let part = exact - whole as f64;
            let multiple = |t: u64| (part * t as f64) as u64;
            whole + multiple(t) - multiple(t - 1)
        }
    }
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

/// The stored logarithm of a unit of exactly this size; `None` outside the range.
pub(super) fn log_of(scale: f32) -> Option<u32> {
    let log = (f64::from(scale).log2() + BIAS as f64) * f64::from(1u32 << POINT);
    // Logarithms lie closer than sizes do.
    // (What is infinite or zero has none: the casts saturate, and so must the sums.)
    let log = log.round() as i64;
    let near = log.saturating_sub(2).max(0)..=log.saturating_add(2);
    near.filter_map(|log| u32::try_from(log).ok()).find(|log| log >> POINT <= LARGEST && scale_of(*log) == scale)
}

/// `2^exponent`; 0 below f32's smallest normal number.
#[inline(always)]
pub(super) fn power_of_two(exponent: i64) -> f32 {
    if exponent < -126 { 0.0 } else { f32::from_bits(((exponent.min(127) + 127) as u32) << 23) }
}

/// A unit's logarithm after `shrink`, raised so far that `largest` fits; and what stored values are multiplied with
/// then.
#[inline(always)]
pub(super) fn move_unit<F: Format>(log: u32, shrink: u64, largest: f32) -> (u32, f32) {
    let shrunk = i64::from(log) - shrink as i64;
    let whole = shrunk >> POINT;
    let wanted = match F::TOP {
        // `largest < 2^(e + 1)` has to be at most `2^TOP` units.
        Some(top) => {
            let e = i64::from(largest.to_bits() >> 23) - 127;
            (e + 1 - top + BIAS).clamp(0, i64::from(LARGEST))
        }
        None => BIAS,
    };
    let octaves = (wanted - whole).max(0);
    ((shrunk + (octaves << POINT)) as u32, power_of_two(-octaves))
}
