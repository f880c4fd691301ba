//! A linear way from one learning rate to another, alone ([`LinearWarmup`]) and for the schedules that contain one.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{LearningRateSchedule, wire};
use crate::check;
use crate::error::Result;

/// A straight line from one learning rate to another, which then stays.
///
/// ```text
/// s = min(step, warmup_steps)
/// lr = initial_learning_rate + (target_learning_rate - initial_learning_rate) * s / warmup_steps
/// ```
///
/// Step 0 has `initial_learning_rate` and step `warmup_steps` has `target_learning_rate`, both exactly; with
/// `warmup_steps` 0 it is `target_learning_rate` from the start. The target may be the lower one. The values are those
/// of `optax.linear_schedule`; Keras has a warm-up only as a part of [`CosineDecay`](crate::CosineDecay). Put it in
/// front of any other schedule with [`Join`](crate::Join).
///
/// ```
/// use candle_adamax::{LearningRateSchedule, LinearWarmup};
///
/// let schedule = LinearWarmup::new(0.0, 0.5, 4);
/// let rates: Vec<f64> = (0..6).map(|step| schedule.learning_rate(step)).collect();
/// assert_eq!(rates, [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearWarmup {
    /// The learning rate of step 0.
    pub initial_learning_rate: f64,
    /// The learning rate from step `warmup_steps` on.
    pub target_learning_rate: f64,
    /// How many steps the way takes.
    #[serde(deserialize_with = "wire::steps")]
    pub warmup_steps: u64,
}

impl LinearWarmup {
    /// From `initial_learning_rate` to `target_learning_rate` in `warmup_steps` steps.
    pub fn new(initial_learning_rate: f64, target_learning_rate: f64, warmup_steps: u64) -> Self {
        Self { initial_learning_rate, target_learning_rate, warmup_steps }
    }
}

impl LearningRateSchedule for LinearWarmup {
    fn learning_rate(&self, step: u64) -> f64 {
        if step >= self.warmup_steps {
            return self.target_learning_rate;
        }
        let done = step as f64 / self.warmup_steps as f64;
        lerp(self.initial_learning_rate, self.target_learning_rate, done)
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::not_negative("target_learning_rate", self.target_learning_rate)
    }
}

impl fmt::Display for LinearWarmup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { initial_learning_rate, target_learning_rate, warmup_steps } = self;
        write!(f, "LinearWarmup({initial_learning_rate} to {target_learning_rate}, {warmup_steps} steps)")
    }
}

/// `from + (to - from) * fraction` for a `fraction` in [0, 1], exactly `from` at 0 and exactly `to` at 1.
///
/// Measured from the nearer end: from one end alone, rounding can miss the other by an ulp or step over it.
pub(super) fn lerp(from: f64, to: f64, fraction: f64) -> f64 {
    if fraction < 0.5 { from + (to - from) * fraction } else { to - (to - from) * (1.0 - fraction) }
}
