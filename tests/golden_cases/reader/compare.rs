//! How near is near enough: the README's rules for trajectories and for single steps.

use anyhow::{Result, bail};
use candle_core::DType;

/// The same number, or both NaN.
pub(crate) fn same(got: f64, expected: f64) -> bool {
    got == expected || (got.is_nan() && expected.is_nan())
}

/// Checks a row of numbers, each against its bound.
///
/// In the first moment, where an infinite gradient leads to infinity or to NaN, either counts for the other, since
/// that depends on how a framework writes the same formula.
pub(crate) fn check(what: &str, got: &[f64], expected: &[f64], bound: impl Fn(usize) -> f64) -> Result<()> {
    if got.len() != expected.len() {
        bail!("{what}: expected {} elements, got {}", expected.len(), got.len());
    }
    let moment = what.rsplit('.').next().is_some_and(|last| last.starts_with("m "));
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let both_not_finite = moment && !got.is_finite() && !expected.is_finite();
        let bound = bound(i);
        if !same(got, expected)
            && !both_not_finite
            && (got - expected).abs().partial_cmp(&bound).is_none_or(|o| o.is_gt())
        {
            bail!("{what}, element {i}: expected {expected:e}, got {got:e}, which is more than {bound:e} off");
        }
    }
    Ok(())
}

/// The largest finite magnitudes of each element so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunningMaximum(Vec<f64>);

impl RunningMaximum {
    pub(crate) fn update(&mut self, expected: &[f64]) -> &[f64] {
        self.0.resize(expected.len(), 0.0);
        for (maximum, x) in self.0.iter_mut().zip(expected).filter(|(_, x)| x.is_finite()) {
            *maximum = maximum.max(x.abs());
        }
        &self.0
    }
}

/// Bits of the mantissa, the hidden one included, and the exponent of the smallest number.
fn places(dtype: DType) -> (i32, i32) {
    match dtype {
        DType::F16 => (11, -24),
        DType::BF16 => (8, -133),
        DType::F32 => (24, -149),
        _ => (53, -1074),
    }
}

/// The machine epsilon of a dtype.
pub(crate) fn epsilon(dtype: DType) -> f64 {
    2f64.powi(1 - places(dtype).0)
}

/// One unit in the last place of `dtype` at `x`.
pub(crate) fn ulp(x: f64, dtype: DType) -> f64 {
    let (bits, smallest) = places(dtype);
    if x == 0.0 || !x.is_finite() {
        return 2f64.powi(smallest);
    }
    2f64.powi((x.abs().log2().floor() as i32 + 1 - bits).max(smallest))
}
