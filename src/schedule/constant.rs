//! A learning rate that stays.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{LearningRateSchedule, Schedule};
use crate::check;
use crate::error::Result;

/// A learning rate that is the same at each step: a part of a [`Join`](crate::Join), to hold a rate for a while.
///
/// ```text
/// lr = learning_rate
/// ```
///
/// Alone, a number is enough: `lr: 0.1.into()`. A number also becomes a [`Schedule`] by `into()`. The values are those of
/// `optax.constant_schedule`; Keras has no such class.
///
/// ```
/// use candle_adamax::{Constant, CosineDecay, Join, LearningRateSchedule};
///
/// let hold_then_fall = Join::new([Constant::new(0.5).into(), CosineDecay::new(0.5, 100).into()], [50]);
/// let rates = [0, 49, 50, 100, 150].map(|step| hold_then_fall.learning_rate(step));
/// assert_eq!(rates, [0.5, 0.5, 0.5, 0.25, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// The learning rate of every step.
    pub learning_rate: f64,
}

impl Constant {
    /// `learning_rate` at every step.
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate }
    }
}

impl LearningRateSchedule for Constant {
    fn learning_rate(&self, _: u64) -> f64 {
        self.learning_rate
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("learning_rate", self.learning_rate)
    }
}

impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Constant({})", self.learning_rate)
    }
}

impl From<f64> for Schedule {
    fn from(learning_rate: f64) -> Self {
        Constant::new(learning_rate).into()
    }
}
