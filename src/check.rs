//! Checks that several settings share; each names the field, what is allowed and what was given.

use std::fmt::Display;

use crate::error::{Error, Result};

/// What a learning rate, a factor or a power may be.
pub(crate) const NOT_NEGATIVE: &str = "a finite number that is not negative";

/// Whether `value` is [`NOT_NEGATIVE`].
pub(crate) fn is_not_negative(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

pub(crate) fn not_negative(field: impl Into<String>, value: f64) -> Result<()> {
    require(is_not_negative(value), field, NOT_NEGATIVE, value)
}

/// A share of something.
pub(crate) fn share(field: &str, value: f64) -> Result<()> {
    require((0.0..=1.0).contains(&value), field, "a number in [0, 1]", value)
}

/// A number of steps that is divided by.
pub(crate) fn at_least_one(field: &str, steps: u64) -> Result<()> {
    require(steps > 0, field, "at least 1 step", steps)
}

/// Boundaries, each above the one before.
pub(crate) fn strictly_increasing<T: PartialOrd + Display>(boundaries: &[T]) -> Result<()> {
    boundaries.windows(2).enumerate().try_for_each(|(index, pair)| {
        require(
            pair[0] < pair[1],
            format!("boundaries[{}]", index + 1),
            format!("a number above boundaries[{index}], which is {}", pair[0]),
            &pair[1],
        )
    })
}

pub(crate) fn require(
    holds: bool,
    field: impl Into<String>,
    expected: impl Into<String>,
    got: impl Display,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(field, expected, got)) }
}
