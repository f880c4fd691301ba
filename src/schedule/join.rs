//! Schedules one after another, each with steps of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{LearningRateSchedule, Schedule};
use crate::check;
use crate::error::Result;

/// Schedules one after another, each of which counts its steps from where it begins.
///
/// ```text
/// lr = schedules[i](step - boundaries[i - 1])   with the last i for which boundaries[i - 1] <= step
/// lr = schedules[0](step)                       before boundaries[0]
/// ```
///
/// A `Join` may be a part of another one, up to 32 of them one in another: a checkpoint could not be read otherwise.
///
/// At a boundary the next schedule begins, with its step 0 (in [`PiecewiseConstantDecay`](crate::PiecewiseConstantDecay)
/// the value before still serves that step). A boundary of 0 leaves out the first schedule, so that a warm-up of no
/// steps can be written like any other.
///
/// Source: `optax.join_schedules`. Departure: boundaries that are not in order are an error.
///
/// ```
/// use candle_adamax::{CosineDecay, Join, LearningRateSchedule, LinearWarmup};
///
/// let schedule = Join::new([LinearWarmup::new(0.0, 0.5, 10).into(), CosineDecay::new(0.5, 100).into()], [10]);
/// let rates = [0, 5, 10, 60, 110].map(|step| schedule.learning_rate(step));
/// assert_eq!(rates, [0.0, 0.25, 0.5, 0.25, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// The schedules in their order; at least one.
    pub schedules: Vec<Schedule>,
    /// The step at which each schedule but the first begins; strictly increasing.
    pub boundaries: Vec<u64>,
}

/// How many joins may be one in another. A text of JSON is read to a depth of 128, of which each takes 3.
const NESTED: usize = 32;

impl Join {
    /// `schedules[0]` first, and `schedules[i]` from step `boundaries[i - 1]` on.
    pub fn new(schedules: impl Into<Vec<Schedule>>, boundaries: impl Into<Vec<u64>>) -> Self {
        Self { schedules: schedules.into(), boundaries: boundaries.into() }
    }

    /// How many joins are one in another, this one included.
    fn depth(&self) -> usize {
        let inner = self.schedules.iter().map(|schedule| match schedule {
            Schedule::Join(join) => join.depth(),
            _ => 0,
        });
        1 + inner.max().unwrap_or(0)
    }
}

impl LearningRateSchedule for Join {
    fn learning_rate(&self, step: u64) -> f64 {
        let index = self.boundaries.partition_point(|&boundary| boundary <= step);
        let begin = self.boundaries[..index].last().copied().unwrap_or(0);
        self.schedules.get(index).map_or(f64::NAN, |schedule| schedule.learning_rate(step - begin))
    }

    fn validate(&self) -> Result<()> {
        check::require(!self.schedules.is_empty(), "schedules", "at least one schedule", "none")?;
        check::require(
            self.boundaries.len() == self.schedules.len() - 1,
            "boundaries",
            format!("{} boundaries, one less than there are schedules", self.schedules.len() - 1),
            self.boundaries.len(),
        )?;
        check::strictly_increasing(&self.boundaries)?;
        let depth = self.depth();
        let expected = format!("at most {NESTED} `Join`s one in another, so that a file of the settings can be read");
        check::require(depth <= NESTED, "schedules", expected, depth)?;
        self.schedules.iter().enumerate().try_for_each(|(index, schedule)| {
            schedule.validate().map_err(|error| error.within(format_args!("schedules[{index}]")))
        })
    }
}

impl fmt::Display for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Join(")?;
        for (index, schedule) in self.schedules.iter().enumerate() {
            match index.checked_sub(1).and_then(|before| self.boundaries.get(before)) {
                Some(boundary) => write!(f, ", from step {boundary} {schedule}")?,
                None => write!(f, "{schedule}")?,
            }
        }
        f.write_str(")")
    }
}
