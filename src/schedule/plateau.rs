//! A learning rate that falls when a metric stops getting better: the only one with a state, which is a type of its own.

use serde::{Deserialize, Serialize};

use crate::check;
use crate::error::{Error, Result};

/// Which metrics are better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlateauMode {
    /// Lower ones, such as a loss.
    #[default]
    Min,
    /// Higher ones, such as an accuracy.
    Max,
}

/// Whether `threshold` is a share or an amount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ThresholdMode {
    /// A share of the best metric's magnitude: `best - threshold * |best|` is to be undercut (`Max`:
    /// `best + threshold * |best|` exceeded). A metric may be negative, such as a log-likelihood: PyTorch takes the share of
    /// `best` itself there, so that a metric that stands still counts as better for ever. Where the best metric is 0, any
    /// metric beyond 0 is better.
    #[default]
    Relative,
    /// An amount in the metric's unit: `best - threshold` is to be undercut (`Max`: `best + threshold` exceeded).
    Absolute,
}

/// Lower learning rates once a metric has stopped getting better: PyTorch's `ReduceLROnPlateau`, with its defaults.
///
/// Set [`ParamsAdamax::plateau`](crate::ParamsAdamax::plateau) and hand each metric, once an epoch, say, to
/// [`Adamax::observe_metric`](crate::Adamax::observe_metric). After more than `patience` metrics in a row that were no better than the
/// best one, the learning rates of all groups are multiplied by `factor`, on top of what their schedules say:
///
/// ```text
/// lr = max(scheduled * lr_factor, min(scheduled, min_lr))
/// ```
///
/// The state is a [`Plateau`], which is in checkpoints.
///
/// Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`. Departures: it multiplies what a schedule gives in place of the
/// last learning rate; one `eps` decides for all groups, by the optimizer's own learning rate; an infinite metric is never
/// the best one; a [relative threshold](ThresholdMode::Relative) is right for negative metrics, too.
///
/// ```
/// use candle_adamax::{Adamax, ParamsAdamax, ReduceLrOnPlateau};
/// use candle_nn::Optimizer;
///
/// let plateau = ReduceLrOnPlateau { patience: 1, ..Default::default() };
/// let params = ParamsAdamax { lr: 0.5.into(), plateau: Some(plateau), ..Default::default() };
/// let mut optimizer = Adamax::new(vec![], params)?;
/// let reduced = [3.0, 2.0, 2.0, 2.1].map(|loss| optimizer.observe_metric(loss).unwrap());
/// assert_eq!(reduced, [false, false, false, true]);
/// assert_eq!(optimizer.learning_rate(), 0.05);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReduceLrOnPlateau {
    /// Which metrics are better. Default: lower ones.
    pub mode: PlateauMode,
    /// What learning rates are multiplied by, in `[0, 1)`. Default: 0.1.
    pub factor: f64,
    /// How many metrics in a row may be no better. Default: 10.
    pub patience: u64,
    /// By how much a metric has to be better to count; not negative. Default: 1e-4.
    pub threshold: f64,
    /// Whether that is a share of the best metric's magnitude or an amount. Default: a share.
    pub threshold_mode: ThresholdMode,
    /// For how many metrics after a reduction none is counted as no better. Default: 0.
    pub cooldown: u64,
    /// Below which no learning rate is brought; not negative. Default: 0.
    pub min_lr: f64,
    /// A reduction by no more than this is left out; not negative. Default: 1e-8.
    pub eps: f64,
}

impl Default for ReduceLrOnPlateau {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self {
            mode: PlateauMode::Min,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::Relative,
            cooldown: 0,
            min_lr: 0.0,
            eps: 1e-8,
        }
    }
}

impl ReduceLrOnPlateau {
    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// The first one that is not allowed.
    pub fn validate(&self) -> Result<()> {
        check::require((0.0..1.0).contains(&self.factor), "factor", "a number in [0, 1)", self.factor)?;
        check::not_negative("threshold", self.threshold)?;
        check::not_negative("min_lr", self.min_lr)?;
        check::not_negative("eps", self.eps)
    }

    /// Whether `metric` is better than `best`.
    fn is_better(&self, metric: f64, best: Option<f64>) -> bool {
        let Some(best) = best else { return metric.is_finite() };
        // PyTorch's products, bit for bit, where the best metric is not negative; mirrored where it is.
        let share = if best < 0.0 { -self.threshold } else { self.threshold };
        metric.is_finite()
            && match (self.mode, self.threshold_mode) {
                (PlateauMode::Min, ThresholdMode::Relative) => metric < best * (1.0 - share),
                (PlateauMode::Min, ThresholdMode::Absolute) => metric < best - self.threshold,
                (PlateauMode::Max, ThresholdMode::Relative) => metric > best * (1.0 + share),
                (PlateauMode::Max, ThresholdMode::Absolute) => metric > best + self.threshold,
            }
    }
}

/// What a [`ReduceLrOnPlateau`] has come to: plain data, to look at and to keep.
///
/// An optimizer has its own, in [`Snapshot::plateau`](crate::Snapshot::plateau). Without an optimizer:
///
/// ```
/// use candle_adamax::{Plateau, ReduceLrOnPlateau};
///
/// let settings = ReduceLrOnPlateau { patience: 0, factor: 0.5, min_lr: 0.3, ..Default::default() };
/// let mut plateau = Plateau::default();
/// let rates = [1.0, 1.0, 1.0, 1.0].map(|metric| {
///     plateau.observe(&settings, metric, 1.0);
///     plateau.reduced(&settings, 1.0)
/// });
/// assert_eq!(rates, [1.0, 0.5, 0.3, 0.3]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plateau {
    /// The best metric; none before the first finite one.
    #[serde(deserialize_with = "Option::deserialize")]
    pub best: Option<f64>,
    /// How many metrics in a row were no better.
    pub num_bad: u64,
    /// For how many metrics more none is counted as no better.
    pub cooldown: u64,
    /// What scheduled learning rates are multiplied by, in `[0, 1]`.
    pub lr_factor: f64,
}

impl Default for Plateau {
    /// Before the first metric.
    fn default() -> Self {
        Self { best: None, num_bad: 0, cooldown: 0, lr_factor: 1.0 }
    }
}

impl Plateau {
    /// Takes a metric, and tells whether it has lowered the learning rate, which would be `scheduled` without any
    /// plateau. A metric that is not finite is no better than any.
    pub fn observe(&mut self, settings: &ReduceLrOnPlateau, metric: f64, scheduled: f64) -> bool {
        if settings.is_better(metric, self.best) {
            (self.best, self.num_bad) = (Some(metric), 0);
        } else {
            self.num_bad = self.num_bad.saturating_add(1);
        }
        if self.cooldown > 0 {
            (self.cooldown, self.num_bad) = (self.cooldown - 1, 0);
        }
        if self.num_bad <= settings.patience {
            return false;
        }
        (self.cooldown, self.num_bad) = (settings.cooldown, 0);
        let after = Self { lr_factor: self.lr_factor * settings.factor, ..*self };
        let is_lower = self.reduced(settings, scheduled) - after.reduced(settings, scheduled) > settings.eps;
        if is_lower {
            *self = after;
        }
        is_lower
    }

    /// What a learning rate that would be `scheduled` has become.
    pub fn reduced(&self, settings: &ReduceLrOnPlateau, scheduled: f64) -> f64 {
        (scheduled * self.lr_factor).max(scheduled.min(settings.min_lr))
    }

    /// Whether a run can have come to this.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.best.is_none_or(f64::is_finite) {
            return Err(Error::checkpoint("plateau.best", "a finite number", self.best.unwrap_or(f64::NAN)));
        }
        if !(0.0..=1.0).contains(&self.lr_factor) {
            return Err(Error::checkpoint("plateau.lr_factor", "a number in [0, 1]", self.lr_factor));
        }
        Ok(())
    }
}
