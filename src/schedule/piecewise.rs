//! A learning rate that is constant between boundaries.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::LearningRateSchedule;
use crate::check;
use crate::error::Result;

/// A learning rate that is constant up to and including each boundary.
///
/// ```text
/// lr = values[i]   with the first i for which step <= trunc(boundaries[i]), else the last value
/// ```
///
/// `values[0]` serves steps 0 to `boundaries[0]`, which is one step more than `boundaries[0]` in number. A fraction is
/// cut off, so a value between the boundaries 2.2 and 2.7 serves no step.
///
/// Source: `keras.optimizers.schedules.PiecewiseConstantDecay`. Departures: boundaries that are not in order are an
/// error, as are negative ones; one value without boundaries is a constant.
///
/// ```
/// use candle_adamax::{LearningRateSchedule, PiecewiseConstantDecay};
///
/// let schedule = PiecewiseConstantDecay::new([100.0, 110.0], [1.0, 0.5, 0.1]);
/// let rates = [0, 100, 101, 110, 111].map(|step| schedule.learning_rate(step));
/// assert_eq!(rates, [1.0, 1.0, 0.5, 0.5, 0.1]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PiecewiseConstantDecay {
    /// The last step of each value but the last; finite, not negative and strictly increasing.
    pub boundaries: Vec<f64>,
    /// The learning rates, one more than `boundaries`.
    pub values: Vec<f64>,
}

impl PiecewiseConstantDecay {
    /// `values[i]` up to and including step `boundaries[i]`, and the last value after that.
    pub fn new(boundaries: impl Into<Vec<f64>>, values: impl Into<Vec<f64>>) -> Self {
        Self { boundaries: boundaries.into(), values: values.into() }
    }
}

impl LearningRateSchedule for PiecewiseConstantDecay {
    fn learning_rate(&self, step: u64) -> f64 {
        // The cast truncates, and makes a boundary that no step can reach the largest step.
        let index = self.boundaries.partition_point(|&boundary| step > boundary as u64);
        self.values.get(index).copied().unwrap_or(f64::NAN)
    }

    fn validate(&self) -> Result<()> {
        check::require(!self.values.is_empty(), "values", "at least one value", "none")?;
        for (index, &value) in self.values.iter().enumerate() {
            check::not_negative(format!("values[{index}]"), value)?;
        }
        check::require(
            self.boundaries.len() == self.values.len() - 1,
            "boundaries",
            format!("{} boundaries, one less than there are values", self.values.len() - 1),
            self.boundaries.len(),
        )?;
        for (index, &boundary) in self.boundaries.iter().enumerate() {
            check::not_negative(format!("boundaries[{index}]"), boundary)?;
        }
        check::strictly_increasing(&self.boundaries)
    }
}

impl fmt::Display for PiecewiseConstantDecay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PiecewiseConstantDecay(")?;
        for (boundary, value) in self.boundaries.iter().zip(&self.values) {
            write!(f, "{value} to step {boundary}, ")?;
        }
        match self.values.last() {
            Some(value) => write!(f, "{value})"),
            None => f.write_str(")"),
        }
    }
}
