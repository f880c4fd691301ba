//! How moments are stored in 4 and in 2 bytes. Pure; its mirror is `cuda/codec.cuh`.
//!
//! Two facts of Adamax make it possible.
//!
//! 1. `u = max_i |g_i| * beta2^(n - i)`: the norm is a maximum of values that only shrink, all by the same factor. What
//!    is stored is the **un-decayed** `v = u / 2^L` in a unit `2^L` that shrinks instead, one for a block of elements.
//!    So v is rounded when a new maximum comes, once, and never again: rounding `beta2 * u` at each step would leave it
//!    where it is for ever (in bf16 for all beta2 above 0.998).
//! 2. `|m| / (u + eps) <= C = (1 - beta1) / (1 - beta1 / beta2)`, always: what is stored for m is that quotient, whose
//!    range is known, so it needs no scale. It is rounded stochastically, since its changes of a tenth a step would get
//!    lost.
//!
//! `L` is a [fixed-point number](scale_of) of 8 bits before and 24 behind the point: a table has one for each row,
//! which is the row's own clock, and other tensors have one for each 1,024 elements, so that it costs nothing to look
//! for the largest value of a block before anything is written: a spike moves its block's unit, and nothing saturates.
//!
//! | | ratio | v | range of v | u in terms of the exact one | down to |
//! | --- | --- | --- | --- | --- | --- |
//! | [`Bf16`] | bf16 | bf16, nearest | that of f32 | within 2^-8 | |
//! | [`F16`] | f16 | f16, nearest | 2^29, subnormal over 2^39 | within 2^-11 | 2^-27 |
//! | [`Q8`] | 8 bits, linear in `[-C, C]` | 5 bits of exponent, 3 of mantissa, rounded up | 2^31 | 1 to 1.13 | 2^-29 |
//!
//! The last column is in terms of the largest u of the block. It is two octaves less than the range of v: a unit moves by
//! whole octaves, from any fraction of one, so the largest v may be as small as a quarter of the largest code.
//!
//! Since [`Q8`] rounds u up, its steps are multiplied by what that takes away from them on average, within their bound.
//! (Measured on MovieLens: without it decoupled decay wins over steps that are 4 % too small, and the error of the
//! ratings grows by 0.002. An 8-bit quotient with an exact u costs nothing there, and one that is finer near zero gains
//! nothing.)
//!
//! What lies below its block's range becomes the smallest code, so its u is too large and its steps too small, never
//! the reverse up to 1e38, where the largest unit ends. Infinity and NaN have codes.

mod catch_up;
mod convert;
mod format;
#[cfg(test)]
mod tests;
mod unit;
mod update;

use serde::{Deserialize, Serialize};

use crate::rounding::TWO_32;
use crate::rule::{EpsMode, Hyperparameters};

pub(crate) use catch_up::{catch_up_block, catch_up_row, is_zero};
pub(crate) use convert::{decode_block, encode_block, encode_moment, in_unit};
pub(crate) use format::{Bf16, F16, Format, Moment, Plain, Q8};
pub(crate) use unit::{LARGEST as LARGEST_LOG, POINT, scale_of, shrinkage};
pub(crate) use update::{Codes, update_block, update_row};

/// How the moments of f32, f16 and bf16 variables are stored; those of f64 variables are f64.
///
/// Two things are stored for each element: the quotient `m / (u + eps)`, rounded stochastically, and the un-decayed
/// norm, in a unit that shrinks by `beta2` each update, so that u decays in any number of bits. The unit is 4 bytes for
/// each row of a table and for each 1,024 elements of any other variable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StateDType {
    /// m and u in f32: 8 bytes an element.
    #[default]
    F32,
    /// 4 bytes an element: 8 bits of precision, the range of f32. u is within 2^-8 of the exact one.
    BF16,
    /// 4 bytes an element: 11 bits of precision. u is within 2^-11 of the exact one while it is at least 2^-27 of the
    /// largest one in its block. Below that it is rounded up, by at most 2^-37 of the largest one, and below 2^-37 it is too
    /// large and steps are too small. So one gradient of 1e30 slows down its whole block
    /// until the unit has shrunk again, for some 50,000 updates where gradients are about 1: clip such gradients, or use
    /// [`BF16`](Self::BF16), whose blocks have f32's range.
    F16,
    /// 2 bytes an element: the quotient in 8 bits, the norm in 8 bits rounded up. u is 1 to 1.13 times the exact one
    /// while it is at least 2^-29 of the largest one in its block; below, it is too large, and never too small up to 1e38.
    /// A gradient of 1e30 slows down its block as with [`F16`](Self::F16). No weight moves by more than
    /// `(1 - beta1) / (1 - beta1 / beta2)` times `lr / (1 - beta1^t)` in a step; within that, steps are multiplied by
    /// 1.046, which is what rounding u up takes away from them on average.
    ///
    /// The 8 bits span that bound, C, so the closer beta1 is to beta2, the coarser they are. Their rounding is random, with
    /// a mean of zero, and m carries it along: a step is off by
    ///
    /// ```text
    /// C / 311 / sqrt(1 - beta1^2)  times lr      with  C = (1 - beta1) / (1 - beta1 / beta2)
    /// ```
    ///
    /// (one standard deviation; 311 is 127 codes times the square root of 6). That is 0.0075 for betas of 0.9 and 0.999,
    /// 0.025 for 0.99 and 0.999. Where it is more than 0.125, the settings are an error. Gradients that are mostly noise
    /// make steps much smaller than lr, and there about `0.008 / (1 - beta1 / beta2)` of the way is noise of this rounding:
    /// 0.08 by default, most of it with 0.99 and 0.999. Use [`F16`](Self::F16) or [`BF16`](Self::BF16) with such betas: the
    /// rounding of their quotients is a share of the quotient, whatever beta2 is.
    ///
    /// Moments that are converted into Q8 have their u rounded up, but those that have come from it keep their bits;
    /// [`set_params`](crate::Adamax::set_params) names the exception.
    Q8,
}

/// Elements that share a unit, where these are not the rows of a table.
pub(crate) const BLOCK: usize = 1024;
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
        let eps_outside = match hyper.eps_mode {
            EpsMode::AddToNorm => hyper.eps,
            EpsMode::InsideMax => 0.0,
        };
        Self { eps_outside, limit: max_ratio(hyper.beta1, hyper.beta2) }
    }

    pub(crate) fn limits(&self) -> Limits {
        let limit = self.limit as f32;
        Limits { limit, per_code: limit / Q8::LARGEST, codes: Q8::LARGEST / limit / Q8::GAIN * TWO_32 }
    }
}

/// The largest `|m| / u` there can be: `(1 - beta1) / (1 - beta1 / beta2)`; infinite unless `beta1 < beta2`.
pub(crate) fn max_ratio(beta1: f64, beta2: f64) -> f64 {
    if beta1 < beta2 { (1.0 - beta1) / (1.0 - beta1 / beta2) } else { f64::INFINITY }
}

/// The largest [noise](q8_noise) that is allowed.
pub(crate) const LARGEST_NOISE: f64 = 0.125;

/// The standard deviation of what the rounding of [`Q8`]'s quotient adds to a step, in learning rates.
///
/// Each update rounds at random to one of two neighboring codes, with a variance of a sixth of a code's square on average,
/// and m keeps `beta1` of all that was added before.
pub(crate) fn q8_noise(beta1: f64, beta2: f64) -> f64 {
    max_ratio(beta1, beta2) / f64::from(Q8::LARGEST) / (6.0 * (1.0 - beta1 * beta1)).sqrt()
}

/// [`Encoding::limit`] in the forms that kernels use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    limit: f32,
    /// What a code of [`Q8`] stands for; and its reciprocal in units of 2^-32, without the gain.
    per_code: f32,
    codes: f32,
}

impl Limits {
    /// In the order of the fields, which is that of `cuda/codec.cuh`.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn as_array(&self) -> [f32; 3] {
        [self.limit, self.per_code, self.codes]
    }
}
