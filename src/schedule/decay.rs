//! Schedules that fall by a formula of `step / decay_steps`; every division of whole numbers rounds once.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::warmup::lerp;
use super::{LearningRateSchedule, wire};
use crate::check;
use crate::error::Result;

/// A learning rate that is multiplied by a factor every so many steps.
///
/// ```text
/// lr = initial_learning_rate * decay_rate ^ (step / decay_steps)
/// ```
///
/// With `staircase`, `step / decay_steps` is a division of whole numbers and the rate falls at multiples of
/// `decay_steps` only. A `decay_rate` above 1 grows up to [`f64::MAX`], where it stays.
///
/// Source: `keras.optimizers.schedules.ExponentialDecay`. Departure: Keras takes the floor of a rounded quotient, which
/// in f32 is wrong from step 2^24 on.
///
/// ```
/// use candle_adamax::{ExponentialDecay, LearningRateSchedule};
///
/// let smooth = ExponentialDecay::new(0.5, 10, 0.25);
/// assert_eq!([0, 5, 10].map(|step| smooth.learning_rate(step)), [0.5, 0.25, 0.125]);
///
/// let stairs = ExponentialDecay { staircase: true, ..smooth };
/// assert_eq!([0, 9, 10].map(|step| stairs.learning_rate(step)), [0.5, 0.5, 0.125]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExponentialDecay {
    /// The learning rate of step 0.
    pub initial_learning_rate: f64,
    /// How many steps it takes to be multiplied by `decay_rate` once; at least 1.
    #[serde(deserialize_with = "wire::steps")]
    pub decay_steps: u64,
    /// The factor; finite and not negative.
    pub decay_rate: f64,
    /// Whether to fall at multiples of `decay_steps` only; Keras's default is not to.
    #[serde(default)]
    pub staircase: bool,
}

impl ExponentialDecay {
    /// Smooth decay from `initial_learning_rate` by `decay_rate` every `decay_steps` steps.
    pub fn new(initial_learning_rate: f64, decay_steps: u64, decay_rate: f64) -> Self {
        Self { initial_learning_rate, decay_steps, decay_rate, staircase: false }
    }
}

impl LearningRateSchedule for ExponentialDecay {
    fn learning_rate(&self, step: u64) -> f64 {
        finite(self.initial_learning_rate * power(self.decay_rate, quotient(step, self.decay_steps, self.staircase)))
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::at_least_one("decay_steps", self.decay_steps)?;
        check::not_negative("decay_rate", self.decay_rate)
    }
}

impl fmt::Display for ExponentialDecay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { initial_learning_rate, decay_steps, decay_rate, staircase } = self;
        write!(f, "ExponentialDecay({initial_learning_rate}, times {decay_rate} every {decay_steps} steps")?;
        f.write_str(if *staircase { ", staircase)" } else { ")" })
    }
}

/// A learning rate that falls like one over the number of steps.
///
/// ```text
/// lr = initial_learning_rate / (1 + decay_rate * step / decay_steps)
/// ```
///
/// With `staircase`, `step / decay_steps` is a division of whole numbers and the rate falls at multiples of
/// `decay_steps` only.
///
/// Source: `keras.optimizers.schedules.InverseTimeDecay`. Departure: as [`ExponentialDecay`]'s.
///
/// ```
/// use candle_adamax::{InverseTimeDecay, LearningRateSchedule};
///
/// let smooth = InverseTimeDecay::new(0.5, 10, 2.0);
/// assert_eq!([0, 5, 15].map(|step| smooth.learning_rate(step)), [0.5, 0.25, 0.125]);
///
/// let stairs = InverseTimeDecay { decay_rate: 1.0, staircase: true, ..smooth };
/// assert_eq!([9, 10, 30].map(|step| stairs.learning_rate(step)), [0.5, 0.25, 0.125]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InverseTimeDecay {
    /// The learning rate of step 0.
    pub initial_learning_rate: f64,
    /// How many steps add `decay_rate` to the divisor once; at least 1.
    #[serde(deserialize_with = "wire::steps")]
    pub decay_steps: u64,
    /// What is added to the divisor; finite and not negative.
    pub decay_rate: f64,
    /// Whether to fall at multiples of `decay_steps` only; Keras's default is not to.
    #[serde(default)]
    pub staircase: bool,
}

impl InverseTimeDecay {
    /// Smooth decay from `initial_learning_rate`, whose divisor grows by `decay_rate` every `decay_steps` steps.
    pub fn new(initial_learning_rate: f64, decay_steps: u64, decay_rate: f64) -> Self {
        Self { initial_learning_rate, decay_steps, decay_rate, staircase: false }
    }
}

impl LearningRateSchedule for InverseTimeDecay {
    fn learning_rate(&self, step: u64) -> f64 {
        self.initial_learning_rate / (1.0 + self.decay_rate * quotient(step, self.decay_steps, self.staircase))
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::at_least_one("decay_steps", self.decay_steps)?;
        check::not_negative("decay_rate", self.decay_rate)
    }
}

impl fmt::Display for InverseTimeDecay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { initial_learning_rate, decay_steps, decay_rate, staircase } = self;
        write!(f, "InverseTimeDecay({initial_learning_rate}, rate {decay_rate} every {decay_steps} steps")?;
        f.write_str(if *staircase { ", staircase)" } else { ")" })
    }
}

/// A learning rate that falls to an end value along a power of the steps that remain.
///
/// ```text
/// lr = end_learning_rate + (initial_learning_rate - end_learning_rate) * (1 - s / d) ^ power
///
/// cycle = false:  s = min(step, decay_steps),  d = decay_steps
/// cycle = true:   s = step,                    d = decay_steps * max(1, ceil(step / decay_steps))
/// ```
///
/// Without `cycle` the end value stays. With it, the way to the end becomes longer by `decay_steps` whenever it is
/// over: the step after it jumps up again, less high each time. A `power` of 0 is `initial_learning_rate` throughout.
///
/// Source: `keras.optimizers.schedules.PolynomialDecay`. Departure: the steps that remain are counted in whole numbers,
/// so that both ends are exact, and so are the last steps of a long decay, where `1 - s / d` cancels.
///
/// ```
/// use candle_adamax::{LearningRateSchedule, PolynomialDecay};
///
/// let line = PolynomialDecay { end_learning_rate: 0.1, ..PolynomialDecay::new(0.5, 4) };
/// assert_eq!([0, 2, 4, 9].map(|step| line.learning_rate(step)), [0.5, 0.3, 0.1, 0.1]);
///
/// let cycles = PolynomialDecay { end_learning_rate: 0.0, cycle: true, ..line };
/// assert_eq!([0, 4, 6, 8].map(|step| cycles.learning_rate(step)), [0.5, 0.0, 0.125, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolynomialDecay {
    /// The learning rate of step 0.
    pub initial_learning_rate: f64,
    /// How many steps it takes to the end value; at least 1.
    #[serde(deserialize_with = "wire::steps")]
    pub decay_steps: u64,
    /// The end value; Keras's default is 1e-4.
    #[serde(default = "PolynomialDecay::default_end")]
    pub end_learning_rate: f64,
    /// The exponent, finite and not negative; Keras's default is 1, a straight line.
    #[serde(default = "PolynomialDecay::default_power")]
    pub power: f64,
    /// Whether to begin again after the end; Keras's default is not to.
    #[serde(default)]
    pub cycle: bool,
}

impl PolynomialDecay {
    /// A straight line from `initial_learning_rate` to 1e-4 in `decay_steps` steps.
    pub fn new(initial_learning_rate: f64, decay_steps: u64) -> Self {
        Self {
            initial_learning_rate,
            decay_steps,
            end_learning_rate: Self::default_end(),
            power: Self::default_power(),
            cycle: false,
        }
    }

    fn default_end() -> f64 {
        1e-4
    }

    fn default_power() -> f64 {
        1.0
    }

    /// The share of the way that lies ahead of `step`, from 1 down to 0; NaN if there is no way.
    fn remaining(&self, step: u64) -> f64 {
        if self.decay_steps == 0 {
            return f64::NAN;
        }
        let ways = if self.cycle { step.div_ceil(self.decay_steps).max(1) } else { 1 };
        // Twice as wide as a step: the last multiple of `decay_steps` may lie beyond the last u64.
        let way = u128::from(self.decay_steps) * u128::from(ways);
        way.saturating_sub(u128::from(step)) as f64 / way as f64
    }
}

impl LearningRateSchedule for PolynomialDecay {
    fn learning_rate(&self, step: u64) -> f64 {
        let fraction = self.remaining(step).powf(self.power);
        lerp(self.end_learning_rate, self.initial_learning_rate, fraction)
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::at_least_one("decay_steps", self.decay_steps)?;
        check::not_negative("end_learning_rate", self.end_learning_rate)?;
        check::not_negative("power", self.power)
    }
}

impl fmt::Display for PolynomialDecay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { initial_learning_rate, decay_steps, end_learning_rate, power, cycle } = self;
        write!(f, "PolynomialDecay({initial_learning_rate} to {end_learning_rate}, {decay_steps} steps")?;
        if *power != 1.0 {
            write!(f, ", power {power}")?;
        }
        f.write_str(if *cycle { ", cycle)" } else { ")" })
    }
}

/// `step / decay_steps`, in whole numbers for a staircase; NaN or infinite if there are no steps to divide by.
fn quotient(step: u64, decay_steps: u64, staircase: bool) -> f64 {
    if staircase {
        step.checked_div(decay_steps).map_or(f64::NAN, |stairs| stairs as f64)
    } else {
        step as f64 / decay_steps as f64
    }
}

/// A learning rate, but finite: the largest f64 in the place of infinity. A NaN stays one.
pub(super) fn finite(rate: f64) -> f64 {
    if rate == f64::INFINITY { f64::MAX } else { rate }
}

/// `base ^ exponent`, but finite: a learning rate of 0 times a factor that has overflowed is 0, not NaN.
pub(super) fn power(base: f64, exponent: f64) -> f64 {
    base.powf(exponent).clamp(0.0, f64::MAX)
}
