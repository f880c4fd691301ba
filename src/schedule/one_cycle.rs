//! The schedule of super-convergence: up, and down further than it began.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::cosine::half_wave;
use super::warmup::lerp;
use super::{LearningRateSchedule, wire};
use crate::check;
use crate::error::Result;

/// Along which curve a [`OneCycle`] goes from one learning rate to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnnealStrategy {
    /// Half a cosine wave.
    #[default]
    Cos,
    /// A straight line.
    Linear,
}

/// A learning rate that rises to a maximum and falls far below where it began, once.
///
/// ```text
/// initial = max_lr / div_factor,  final = initial / final_div_factor
///
/// two phases:    initial -> max_lr   up to step pct_start * total_steps - 1
///                max_lr -> final     up to step total_steps - 1
/// three_phase:   initial -> max_lr   up to step pct_start * total_steps - 1
///                max_lr -> initial   up to step 2 * pct_start * total_steps - 2
///                initial -> final    up to step total_steps - 1
///
/// from a to b with share p of the phase:  b + (a - b) * (1 + cos(pi * p)) / 2,  or  a + (b - a) * p
/// ```
///
/// After `total_steps` it stays at the final rate. The ends of phases need not be whole steps.
///
/// Source: `torch.optim.lr_scheduler.OneCycleLR`, after [Smith & Topin](https://arxiv.org/abs/1708.07120). Departures:
/// the momentum does not cycle (PyTorch's `cycle_momentum`, which for Adamax is beta1: all that is known of `|m| / u`
/// rests on a beta1 that stays); steps after the last one are not an error; three phases that do not fit into the steps
/// are. A first phase that ends at step 0 is its end, where PyTorch divides by zero.
///
/// ```
/// use candle_adamax::{LearningRateSchedule, OneCycle};
///
/// let schedule = OneCycle { pct_start: 0.5, ..OneCycle::new(0.1, 22) };
/// let rates = [0, 10, 21, 22].map(|step| schedule.learning_rate(step));
/// assert_eq!(rates, [0.1 / 25.0, 0.1, 0.1 / 25.0 / 1e4, 0.1 / 25.0 / 1e4]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneCycle {
    /// The highest learning rate.
    pub max_lr: f64,
    /// How many steps the whole takes; at least 2.
    #[serde(deserialize_with = "wire::steps")]
    pub total_steps: u64,
    /// The share of the steps that the rise takes, in `[0, 1]`, or `[0, 0.5]` with three phases. Default: 0.3.
    #[serde(default = "OneCycle::default_pct_start")]
    pub pct_start: f64,
    /// The curve of each phase. Default: half a cosine wave.
    #[serde(default)]
    pub anneal_strategy: AnnealStrategy,
    /// How far below `max_lr` it begins; at least 1. Default: 25.
    #[serde(default = "OneCycle::default_div_factor")]
    pub div_factor: f64,
    /// How far below its beginning it ends; positive, and so large that the end is finite. Default: 1e4.
    #[serde(default = "OneCycle::default_final_div_factor")]
    pub final_div_factor: f64,
    /// Whether it comes back to where it began before it falls further. Default: false.
    #[serde(default)]
    pub three_phase: bool,
}

impl OneCycle {
    /// PyTorch's defaults: up in 3 of 10 steps from `max_lr / 25`, and down to `max_lr / 250_000`, along cosines.
    pub fn new(max_lr: f64, total_steps: u64) -> Self {
        Self {
            max_lr,
            total_steps,
            pct_start: Self::default_pct_start(),
            anneal_strategy: AnnealStrategy::Cos,
            div_factor: Self::default_div_factor(),
            final_div_factor: Self::default_final_div_factor(),
            three_phase: false,
        }
    }

    fn default_pct_start() -> f64 {
        0.3
    }

    fn default_div_factor() -> f64 {
        25.0
    }

    fn default_final_div_factor() -> f64 {
        1e4
    }

    /// Where it begins.
    fn initial(&self) -> f64 {
        self.max_lr / self.div_factor
    }

    /// Where it ends.
    fn last(&self) -> f64 {
        self.initial() / self.final_div_factor
    }

    fn anneal(&self, from: f64, to: f64, share: f64) -> f64 {
        match self.anneal_strategy {
            AnnealStrategy::Cos => lerp(from, to, 1.0 - half_wave(share)),
            AnnealStrategy::Linear => lerp(from, to, share),
        }
    }
}

impl LearningRateSchedule for OneCycle {
    fn learning_rate(&self, step: u64) -> f64 {
        let (initial, last) = (self.initial(), self.last());
        if step >= self.total_steps.saturating_sub(1) {
            return if self.pct_start == 1.0 { self.max_lr } else { last };
        }
        let (step, total) = (step as f64, self.total_steps as f64);
        let rise = (self.pct_start * total - 1.0, self.max_lr);
        let fall = (2.0 * self.pct_start * total - 2.0, initial);
        let (mut begin, mut from) = (0.0, initial);
        for (end, to) in [Some(rise), self.three_phase.then_some(fall)].into_iter().flatten() {
            if step <= end {
                let share = if end > begin { (step - begin) / (end - begin) } else { 1.0 };
                return self.anneal(from, to, share);
            }
            (begin, from) = (end, to);
        }
        self.anneal(from, last, (step - begin) / (total - 1.0 - begin))
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("max_lr", self.max_lr)?;
        check::require(self.total_steps >= 2, "total_steps", "at least 2 steps", self.total_steps)?;
        let (limit, expected) = if self.three_phase {
            (0.5, "a number in [0, 0.5] with `three_phase`")
        } else {
            (1.0, "a number in [0, 1]")
        };
        check::require((0.0..=limit).contains(&self.pct_start), "pct_start", expected, self.pct_start)?;
        let at_least_one = self.div_factor >= 1.0 && self.div_factor.is_finite();
        check::require(at_least_one, "div_factor", "a finite number of at least 1", self.div_factor)?;
        let is_positive = self.final_div_factor > 0.0 && self.final_div_factor.is_finite();
        check::require(is_positive, "final_div_factor", "a finite number above 0", self.final_div_factor)?;
        let expected = "a number so large that max_lr / div_factor / final_div_factor is finite";
        check::require(self.last().is_finite(), "final_div_factor", expected, self.final_div_factor)
    }
}

impl fmt::Display for OneCycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { max_lr, total_steps, pct_start, div_factor, final_div_factor, .. } = self;
        write!(f, "OneCycle({max_lr}, {total_steps} steps, up in {pct_start} of them from 1/{div_factor}")?;
        write!(f, ", down to 1/{final_div_factor} of that")?;
        if self.anneal_strategy == AnnealStrategy::Linear {
            f.write_str(", linear")?;
        }
        f.write_str(if self.three_phase { ", three phases)" } else { ")" })
    }
}
