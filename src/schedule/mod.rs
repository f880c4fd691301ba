//! Learning-rate schedules: pure functions of the number of calls.
//!
//! A schedule holds settings and no state, so that a checkpoint needs only the call counter beside them ([`plateau`] is
//! the exception: it follows a metric). The formulas are those of Keras in f64, and PyTorch's where Keras has none. Where Keras's rounding decides on which side of a boundary a step falls, whole numbers
//! decide here: a staircase, a cycle or a restart begins at its step on every machine.

mod constant;
mod cosine;
mod decay;
mod join;
mod learning_rate;
mod one_cycle;
mod piecewise;
mod plateau;
mod warmup;
mod wire;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::constant::Constant;
pub use self::cosine::{CosineDecay, CosineDecayRestarts};
pub use self::decay::{ExponentialDecay, InverseTimeDecay, PolynomialDecay};
pub use self::join::Join;
pub use self::learning_rate::LearningRate;
pub use self::one_cycle::{AnnealStrategy, OneCycle};
pub use self::piecewise::PiecewiseConstantDecay;
pub use self::plateau::{Plateau, PlateauMode, ReduceLrOnPlateau, ThresholdMode};
pub use self::warmup::LinearWarmup;
use crate::error::Result;

/// A learning rate as a function of the number of calls of the optimizer.
///
/// Implement it for a schedule that [`Schedule`] does not have, and hand it over as [`LearningRate::Custom`].
///
/// ```
/// use std::sync::Arc;
///
/// use candle_adamax::{LearningRate, LearningRateSchedule};
///
/// /// The schedule of "Attention Is All You Need", without its factor for the model's width.
/// #[derive(Debug)]
/// struct Noam {
///     warmup_steps: u64,
/// }
///
/// impl LearningRateSchedule for Noam {
///     fn learning_rate(&self, step: u64) -> f64 {
///         let (step, warmup_steps) = (step as f64 + 1.0, self.warmup_steps as f64);
///         step.powf(-0.5).min(step * warmup_steps.powf(-1.5))
///     }
/// }
///
/// let lr = LearningRate::Custom(Arc::new(Noam { warmup_steps: 100 }));
/// assert_eq!(lr.at(399)?, 0.05); // 400 to the power -0.5
/// # Ok::<(), candle_adamax::Error>(())
/// ```
pub trait LearningRateSchedule: fmt::Debug + Send + Sync {
    /// The learning rate of the call that `step` calls came before: the first call has `step` 0.
    ///
    /// The result is a fraction of the gradient's unit, finite and not negative if [`validate`](Self::validate) passes.
    /// With settings that `validate` refuses it may be anything, NaN too, but must not panic.
    fn learning_rate(&self, step: u64) -> f64;

    /// Checks the settings; the optimizer calls it once, before the first step.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) with the field, what is allowed and what was
    /// given. The provided method accepts everything.
    fn validate(&self) -> Result<()> {
        Ok(())
    }
}

/// One of the schedules of this crate, as plain data.
///
/// Its serde form is Keras's, `{"class_name": .., "config": {..}}`, and what `keras.optimizers.schedules.serialize`
/// writes can be read: the `name` in a config (a label of TensorFlow graphs) is dropped, other surplus fields of a
/// config are errors, and a number of steps may be written `100.0`. [`Constant`],
/// [`LinearWarmup`], [`OneCycle`] and [`Join`] have the same form, but Keras has no such classes. Reading checks the settings
/// as [`validate`](LearningRateSchedule::validate) does, so that a schedule from a file is a valid one.
///
/// The rate of a valid schedule is finite and not negative at every step. A rate that a formula makes too large for an f64
/// is [`f64::MAX`].
///
/// ```
/// use candle_adamax::{ExponentialDecay, LearningRateSchedule, Schedule};
///
/// let keras = r#"{
///     "module": "keras.optimizers.schedules",
///     "class_name": "ExponentialDecay",
///     "config": {"initial_learning_rate": 0.5, "decay_steps": 10, "decay_rate": 0.5, "name": "ExponentialDecay"},
///     "registered_name": null
/// }"#;
/// let schedule: Schedule = serde_json::from_str(keras)?;
/// assert_eq!(schedule, ExponentialDecay::new(0.5, 10, 0.5).into());
/// assert_eq!(schedule.learning_rate(20), 0.125);
/// assert_eq!(schedule.to_string(), "ExponentialDecay(0.5, times 0.5 every 10 steps)");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "class_name", content = "config")]
#[non_exhaustive]
pub enum Schedule {
    /// The same at each step.
    #[serde(deserialize_with = "wire::keras_config")]
    Constant(Constant),
    /// Falls by a factor every so many steps.
    #[serde(deserialize_with = "wire::keras_config")]
    ExponentialDecay(ExponentialDecay),
    /// Constant between boundaries.
    #[serde(deserialize_with = "wire::keras_config")]
    PiecewiseConstantDecay(PiecewiseConstantDecay),
    /// Falls along a power of the steps that remain.
    #[serde(deserialize_with = "wire::keras_config")]
    PolynomialDecay(PolynomialDecay),
    /// Falls like one over the number of steps.
    #[serde(deserialize_with = "wire::keras_config")]
    InverseTimeDecay(InverseTimeDecay),
    /// Falls along half a cosine wave, with or without a warm-up.
    #[serde(deserialize_with = "wire::keras_config")]
    CosineDecay(CosineDecay),
    /// Falls along half a cosine wave again and again.
    #[serde(deserialize_with = "wire::keras_config")]
    CosineDecayRestarts(CosineDecayRestarts),
    /// Rises (or falls) along a line, then constant.
    #[serde(deserialize_with = "wire::keras_config")]
    LinearWarmup(LinearWarmup),
    /// Rises to a maximum and falls far below where it began, once.
    #[serde(deserialize_with = "wire::keras_config")]
    OneCycle(OneCycle),
    /// One schedule after another.
    #[serde(deserialize_with = "wire::keras_config")]
    Join(Join),
}

/// Evaluates an expression for the structure in a [`Schedule`], whichever it is.
macro_rules! for_each {
    ($schedule:expr, $inner:ident => $result:expr) => {
        match $schedule {
            Schedule::Constant($inner) => $result,
            Schedule::ExponentialDecay($inner) => $result,
            Schedule::PiecewiseConstantDecay($inner) => $result,
            Schedule::PolynomialDecay($inner) => $result,
            Schedule::InverseTimeDecay($inner) => $result,
            Schedule::CosineDecay($inner) => $result,
            Schedule::CosineDecayRestarts($inner) => $result,
            Schedule::LinearWarmup($inner) => $result,
            Schedule::OneCycle($inner) => $result,
            Schedule::Join($inner) => $result,
        }
    };
}

impl Schedule {
    /// The schedule that holds its first rate for `call` steps and counts its own steps from there: what a second stage of
    /// training needs, since an optimizer counts all of its calls. It is a [`Join`] of a [`Constant`] and this schedule.
    ///
    /// ```text
    /// lr = schedule(0)             before step `call`
    /// lr = schedule(step - call)   from there on
    /// ```
    ///
    /// [`Adamax::start_schedule`](crate::Adamax::start_schedule) sets one that starts at the next call.
    ///
    /// ```
    /// use candle_adamax::{CosineDecay, LearningRateSchedule, Schedule};
    ///
    /// let schedule = Schedule::from(CosineDecay::new(0.5, 100)).starting_at(1000);
    /// let rates = [0, 1000, 1050, 1100].map(|step| schedule.learning_rate(step));
    /// assert_eq!(rates, [0.5, 0.5, 0.25, 0.0]);
    /// ```
    #[must_use]
    pub fn starting_at(self, call: u64) -> Self {
        let first = self.learning_rate(0);
        Join::new([first.into(), self], [call]).into()
    }
}

impl LearningRateSchedule for Schedule {
    fn learning_rate(&self, step: u64) -> f64 {
        for_each!(self, schedule => schedule.learning_rate(step))
    }

    fn validate(&self) -> Result<()> {
        for_each!(self, schedule => schedule.validate())
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for_each!(self, schedule => schedule.fmt(f))
    }
}

macro_rules! from {
    ($($schedule:ident),+ $(,)?) => {$(
        impl From<$schedule> for Schedule {
            fn from(schedule: $schedule) -> Self {
                Self::$schedule(schedule)
            }
        }

        impl From<$schedule> for LearningRate {
            fn from(schedule: $schedule) -> Self {
                Self::Schedule(schedule.into())
            }
        }
    )+};
}

from!(
    Constant,
    ExponentialDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
    InverseTimeDecay,
    CosineDecay,
    CosineDecayRestarts,
    LinearWarmup,
    OneCycle,
    Join,
);
