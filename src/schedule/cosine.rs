//! Schedules along half a cosine wave; the restarts are found in whole numbers wherever these exist.

use std::f64::consts::PI;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::decay::{finite, power};
use super::{LearningRateSchedule, LinearWarmup, wire};
use crate::check;
use crate::error::Result;

/// A learning rate that falls along half a cosine wave to a share of its peak, with or without a linear warm-up.
///
/// ```text
/// warmup_target = None:      peak = initial_learning_rate,  s = step
/// warmup_target = Some(w):   peak = w,                      s = step - warmup_steps, and before that
///     lr = initial_learning_rate + (w - initial_learning_rate) * step / warmup_steps
///
/// p = min(s, decay_steps) / decay_steps
/// lr = peak * ((1 - alpha) * (1 + cos(pi * p)) / 2 + alpha)
/// ```
///
/// The whole takes `warmup_steps + decay_steps` steps; after that the rate stays at exactly `alpha * peak`. The peak
/// may be lower than `initial_learning_rate`.
///
/// Source: `keras.optimizers.schedules.CosineDecay`, after section 3 of [SGDR](https://arxiv.org/abs/1608.03983).
/// Departure: Keras ignores `warmup_steps` without a `warmup_target`; here that is an error.
///
/// ```
/// use candle_adamax::{CosineDecay, LearningRateSchedule};
///
/// let plain = CosineDecay { alpha: 0.1, ..CosineDecay::new(0.5, 100) };
/// assert_eq!([0, 50, 100, 101].map(|step| plain.learning_rate(step)), [0.5, 0.275, 0.05, 0.05]);
///
/// let warm = CosineDecay { warmup_target: Some(0.5), warmup_steps: 10, ..CosineDecay::new(0.0, 100) };
/// assert_eq!([0, 5, 10, 60, 110].map(|step| warm.learning_rate(step)), [0.0, 0.25, 0.5, 0.25, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineDecay {
    /// The learning rate of step 0: the peak, or where the warm-up begins.
    pub initial_learning_rate: f64,
    /// How many steps the decay takes, without the warm-up; at least 1.
    #[serde(deserialize_with = "wire::steps")]
    pub decay_steps: u64,
    /// The end value as a share of the peak, in [0, 1]; Keras's default is 0.
    #[serde(default)]
    pub alpha: f64,
    /// The peak at the end of the warm-up; Keras's default is none, no warm-up.
    #[serde(default)]
    pub warmup_target: Option<f64>,
    /// How many steps the warm-up takes; Keras's default is 0. Above 0 it needs a `warmup_target`.
    #[serde(default, deserialize_with = "wire::steps")]
    pub warmup_steps: u64,
}

impl CosineDecay {
    /// From `initial_learning_rate` to 0 in `decay_steps` steps, without a warm-up.
    pub fn new(initial_learning_rate: f64, decay_steps: u64) -> Self {
        Self { initial_learning_rate, decay_steps, alpha: 0.0, warmup_target: None, warmup_steps: 0 }
    }
}

impl LearningRateSchedule for CosineDecay {
    fn learning_rate(&self, step: u64) -> f64 {
        let (peak, step) = match self.warmup_target {
            None => (self.initial_learning_rate, step),
            Some(target) => match step.checked_sub(self.warmup_steps) {
                None => {
                    return LinearWarmup::new(self.initial_learning_rate, target, self.warmup_steps)
                        .learning_rate(step);
                }
                Some(step) => (target, step),
            },
        };
        let done = step.min(self.decay_steps) as f64 / self.decay_steps as f64;
        peak * ((1.0 - self.alpha) * half_wave(done) + self.alpha)
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::at_least_one("decay_steps", self.decay_steps)?;
        check::share("alpha", self.alpha)?;
        match self.warmup_target {
            Some(target) => check::not_negative("warmup_target", target),
            None => check::require(
                self.warmup_steps == 0,
                "warmup_target",
                format!("a learning rate for the {} warmup_steps to end at", self.warmup_steps),
                "none",
            ),
        }
    }
}

impl fmt::Display for CosineDecay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CosineDecay({}, {} steps", self.initial_learning_rate, self.decay_steps)?;
        if self.alpha != 0.0 {
            write!(f, ", alpha {}", self.alpha)?;
        }
        if let Some(target) = self.warmup_target {
            write!(f, ", warmup to {target} in {} steps", self.warmup_steps)?;
        }
        f.write_str(")")
    }
}

/// A learning rate that falls along half a cosine wave again and again, in cycles that may become longer and lower.
///
/// ```text
/// cycle i lasts  first_decay_steps * t_mul ^ i  steps, from  start(i) = first_decay_steps * (t_mul ^ i - 1) / (t_mul - 1)
/// (at t_mul = 1:  first_decay_steps * i)
///
/// p = (step - start(i)) / length(i)           with the i for which 0 <= p < 1
/// lr = initial_learning_rate * ((1 - alpha) * m_mul ^ i * (1 + cos(pi * p)) / 2 + alpha)
/// ```
///
/// As in Keras, `m_mul` does not scale the `alpha` at the bottom.
///
/// Source: `keras.optimizers.schedules.CosineDecayRestarts`, after section 3 of
/// [SGDR](https://arxiv.org/abs/1608.03983). Departures: Keras finds i from a logarithm whose last bit decides whether
/// the step of a restart is the first of a cycle (it is, here) or the last of the one before. For a whole `t_mul` all
/// is counted in whole numbers; for another one, a start that misses a whole number by no more than the rounding of
/// `t_mul` is that number, so that 100 steps and 1.1 restart at 100, 210 and 331. A `t_mul` below 1 is an error: the
/// cycles would end for good at `first_decay_steps / (1 - t_mul)`, after which Keras returns NaN.
///
/// ```
/// use candle_adamax::{CosineDecayRestarts, LearningRateSchedule};
///
/// let schedule = CosineDecayRestarts { m_mul: 0.5, ..CosineDecayRestarts::new(0.5, 10) };
/// assert_eq!([0, 5].map(|step| schedule.learning_rate(step)), [0.5, 0.25]);
/// assert_eq!([10, 20].map(|step| schedule.learning_rate(step)), [0.25, 0.125]); // 20 steps
/// assert_eq!([30, 50].map(|step| schedule.learning_rate(step)), [0.125, 0.0625]); // 40 steps
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineDecayRestarts {
    /// The learning rate of step 0.
    pub initial_learning_rate: f64,
    /// How many steps the first cycle takes; at least 1.
    #[serde(deserialize_with = "wire::steps")]
    pub first_decay_steps: u64,
    /// How much longer each cycle is than the one before; at least 1, and Keras's default is 2.
    #[serde(default = "CosineDecayRestarts::default_t_mul")]
    pub t_mul: f64,
    /// How much higher each cycle begins than the one before; not negative, and Keras's default is 1.
    #[serde(default = "CosineDecayRestarts::default_m_mul")]
    pub m_mul: f64,
    /// The bottom as a share of `initial_learning_rate`, in [0, 1]; Keras's default is 0.
    #[serde(default)]
    pub alpha: f64,
}

impl CosineDecayRestarts {
    /// Cycles from `initial_learning_rate` to 0, the first of `first_decay_steps` steps, each twice as long as the last.
    pub fn new(initial_learning_rate: f64, first_decay_steps: u64) -> Self {
        Self {
            initial_learning_rate,
            first_decay_steps,
            t_mul: Self::default_t_mul(),
            m_mul: Self::default_m_mul(),
            alpha: 0.0,
        }
    }

    fn default_t_mul() -> f64 {
        2.0
    }

    fn default_m_mul() -> f64 {
        1.0
    }

    /// The number of the cycle that `step` lies in, and the share of that cycle that lies behind; none if there are no
    /// cycles.
    fn cycle(&self, step: u64) -> Option<(u64, f64)> {
        let first = self.first_decay_steps;
        if first == 0 || self.t_mul < 1.0 || !self.t_mul.is_finite() {
            None
        } else if self.t_mul == 1.0 {
            Some((step / first, (step % first) as f64 / first as f64))
        } else if self.t_mul.fract() == 0.0 {
            Some(whole_cycle(first, self.t_mul as u128, step))
        } else {
            Some(fractional_cycle(first as f64, self.t_mul, step as f64))
        }
    }
}

impl LearningRateSchedule for CosineDecayRestarts {
    fn learning_rate(&self, step: u64) -> f64 {
        let Some((index, done)) = self.cycle(step) else {
            return f64::NAN;
        };
        let height = (1.0 - self.alpha) * power(self.m_mul, index as f64);
        finite(self.initial_learning_rate * (height * half_wave(done) + self.alpha))
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("initial_learning_rate", self.initial_learning_rate)?;
        check::at_least_one("first_decay_steps", self.first_decay_steps)?;
        check::require(
            self.t_mul.is_finite() && self.t_mul >= 1.0,
            "t_mul",
            "a finite number of at least 1",
            self.t_mul,
        )?;
        check::not_negative("m_mul", self.m_mul)?;
        check::share("alpha", self.alpha)
    }
}

impl fmt::Display for CosineDecayRestarts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { initial_learning_rate, first_decay_steps, t_mul, m_mul, alpha } = self;
        write!(f, "CosineDecayRestarts({initial_learning_rate}, {first_decay_steps} steps, t_mul {t_mul}")?;
        if *m_mul != 1.0 {
            write!(f, ", m_mul {m_mul}")?;
        }
        if *alpha != 0.0 {
            write!(f, ", alpha {alpha}")?;
        }
        f.write_str(")")
    }
}

/// From 1 at 0 to 0 at 1, both exactly: `cos(PI)` is -1 in f64, too.
pub(super) fn half_wave(done: f64) -> f64 {
    0.5 * (1.0 + (PI * done).cos())
}

/// [`CosineDecayRestarts::cycle`] for a whole `t_mul` of at least 2, without a rounding before the last division.
fn whole_cycle(first: u64, t_mul: u128, step: u64) -> (u64, f64) {
    let (mut index, mut since, mut length) = (0, u128::from(step), u128::from(first));
    // At most 64 rounds: each cycle is at least twice as long as the one before.
    while since >= length {
        since -= length;
        length = length.saturating_mul(t_mul);
        index += 1;
    }
    (index, since as f64 / length as f64)
}

/// [`CosineDecayRestarts::cycle`] for a `t_mul` above 1 that is no whole number.
fn fractional_cycle(first: f64, t_mul: f64, step: f64) -> (u64, f64) {
    let start = |index: u64| {
        let exact = first * geometric(t_mul, index).0;
        let nearest = exact.round();
        // `t_mul` is within half an ulp of what was meant, so its powers, and their sum, are within `index` half ulps;
        // the roundings of `geometric` are about as many. The rest covers its additions.
        let slack = (index as f64 + 4.0) * 2.0 * f64::EPSILON * exact;
        if (exact - nearest).abs() <= slack { nearest } else { exact }
    };
    // The start solved for the index. A logarithm can miss by one where it matters, at a start.
    let guess = ((step / first * (t_mul - 1.0)).ln_1p() / (t_mul - 1.0).ln_1p()) as u64;
    let index = if start(guess) > step {
        guess.saturating_sub(1)
    } else if start(guess + 1) <= step {
        guess + 1
    } else {
        guess
    };
    let length = first * geometric(t_mul, index).1;
    // The bounds bind where a start was moved to a whole number, and where a step is too large to be told from the next.
    (index, ((step - start(index)) / length).clamp(0.0, 1.0))
}

/// The sum of the first `count` powers of `ratio`, beginning with 1, and the power that comes next.
///
/// By doubling, `sum(2k) = sum(k) + ratio^k * sum(k)`: nothing cancels for a ratio close to 1, unlike in
/// `(ratio^count - 1) / (ratio - 1)`, and ratios such as 1.5 stay exact for as long as an f64 holds the result.
fn geometric(ratio: f64, count: u64) -> (f64, f64) {
    let (mut sum, mut power) = (0.0, 1.0);
    for bit in (0..u64::BITS - count.leading_zeros()).rev() {
        sum += power * sum;
        power *= power;
        if count >> bit & 1 == 1 {
            sum += power;
            power *= ratio;
        }
    }
    (sum, power)
}
