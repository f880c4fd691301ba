//! The loss scale: which one there is, and what a call makes of one that follows the gradients. Pure.
//!
//! Invariant: a scale that follows is a finite f32 above 0 whose reciprocal is one, too.

use serde::{Deserialize, Serialize};

use crate::check;
use crate::error::{Error, Result};

/// Factor of the loss before the backward pass. Gradients are divided by it before anything else.
///
/// ```
/// use candle_adamax::{GradScaler, LossScale, ParamsAdamax};
///
/// let params = ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..Default::default() };
/// params.validate()?;
/// # Ok::<(), candle_adamax::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LossScale {
    /// 1: the loss stays as it is.
    #[default]
    None,
    /// `Static(s)`: s, in `[2^-126, 2^126]`, by which the caller multiplies the loss. Keras's `loss_scale_factor`.
    Static(f64),
    /// A scale that follows the gradients, for f16: calls in which a gradient is not finite are skipped, as with
    /// [`skip_nonfinite`](crate::ParamsAdamax::skip_nonfinite). PyTorch's `torch.amp.GradScaler`.
    Dynamic(GradScaler),
}

impl LossScale {
    /// Checks the numbers.
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Self::None => Ok(()),
            // Its reciprocal multiplies gradients, in f32 for most of them, where it must not vanish nor overflow.
            Self::Static(scale) => {
                let is_in_range = (f64::from(SMALLEST)..=2f64.powi(126)).contains(&scale);
                check::require(is_in_range, "loss_scale", "a number in [2^-126, 2^126] for `Static`", scale)
            }
            Self::Dynamic(scaler) => scaler.validate().map_err(|error| error.within("loss_scale")),
        }
    }

    /// Settings by which the scale follows the gradients.
    pub(crate) fn scaler(self) -> Option<GradScaler> {
        match self {
            Self::Dynamic(scaler) => Some(scaler),
            Self::None | Self::Static(_) => None,
        }
    }

    /// The state before the first call.
    pub(crate) fn start(self) -> Option<GradScalerState> {
        self.scaler().map(|scaler| scaler.start())
    }

    /// The state for this setting in the place of `before`, with which a run has come to `state`.
    pub(crate) fn carried(self, before: Self, state: Option<GradScalerState>) -> Option<GradScalerState> {
        match (self.scaler(), before.scaler(), state) {
            (Some(scaler), Some(before), Some(state)) => Some(scaler.carried(&before, state)),
            _ => self.start(),
        }
    }

    /// The scale of all calls, unless it follows them.
    pub(crate) fn constant(self) -> f64 {
        match self {
            Self::Static(scale) => scale,
            Self::None | Self::Dynamic(_) => 1.0,
        }
    }
}

/// A loss scale that follows the gradients: PyTorch's `torch.amp.GradScaler`, with its defaults.
///
/// Gradients of f16 below 6e-8 vanish, and those of a small loss are small. So the loss is multiplied by a scale before
/// the backward pass, as large as the gradients allow, and the gradients are divided by it inside of the update:
///
/// ```text
/// some gradient is not finite:   scale = f32(scale * backoff_factor),  tracker = 0,  the call is skipped
/// all are:                       tracker += 1
///     tracker = growth_interval: scale = f32(scale * growth_factor) unless that is infinite,  tracker = 0
/// ```
///
/// With [`LossScale::Dynamic`] [`backward_step`](candle_nn::Optimizer::backward_step) does all of it. Where loss and step
/// are apart, [`Adamax::scale_loss`](crate::Adamax::scale_loss) is for the loss, and [`step`](candle_nn::Optimizer::step) takes the
/// gradients of the scaled loss. The state is in checkpoints.
///
/// Source: `torch.amp.GradScaler` and `torch._amp_update_scale_`, whose scales these are, bit for bit. Departures:
///
/// - PyTorch refuses gradients of f16 (`Attempting to unscale FP16 gradients`); here they are unscaled in f32.
/// - With `gradient_accumulation_steps` each call is checked, counted and, if it is bad, skipped on its own, where
///   PyTorch checks the sum once and loses all of it.
/// - The scale does not fall below 2^-126, whose reciprocal f32 still has; PyTorch's ends at 0 and never recovers.
/// - `init_scale` and the factors are checked.
///
/// ```
/// use candle_adamax::{Adamax, GradScaler, LossScale, ParamsAdamax};
/// use candle_core::{DType, Device, Var};
/// use candle_nn::Optimizer;
///
/// let w = Var::ones(4, DType::F16, &Device::Cpu)?;
/// let params = ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..Default::default() };
/// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
///
/// // 0.5 * 65536 is nothing that f16 has trouble with; 2 * 65536 is: the call is skipped, the scale halved.
/// optimizer.backward_step(&(w.to_dtype(DType::F32)? * 0.5)?.sum_all()?)?;
/// assert_eq!((optimizer.loss_scale(), optimizer.skipped()), (65536.0, 0));
/// optimizer.backward_step(&(w.to_dtype(DType::F32)? * 2.0)?.sum_all()?)?;
/// assert_eq!((optimizer.loss_scale(), optimizer.skipped()), (32768.0, 1));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GradScaler {
    /// The first scale, rounded to f32; in `[2^-126, 2^127]`. Default: 65536.
    pub init_scale: f64,
    /// What the scale grows by; finite and above 1. Default: 2.
    pub growth_factor: f64,
    /// What a bad call multiplies the scale by, in `(0, 1)`. Default: 0.5.
    pub backoff_factor: f64,
    /// After how many good calls in a row the scale grows; at least 1. Default: 2,000.
    pub growth_interval: u64,
}

impl Default for GradScaler {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

/// What a [`GradScaler`] has come to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradScalerState {
    /// What the next loss is multiplied by.
    pub scale: f32,
    /// Good calls since the scale has last changed, or tried to.
    pub growth_tracker: u64,
}

/// The smallest scale.
const SMALLEST: f32 = f32::MIN_POSITIVE;

impl GradScaler {
    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// The first one that is not allowed.
    pub fn validate(&self) -> Result<()> {
        let Self { init_scale, growth_factor, backoff_factor, growth_interval } = *self;
        let limits = f64::from(SMALLEST)..=2f64.powi(127);
        check::require(limits.contains(&init_scale), "init_scale", "a number in [2^-126, 2^127]", init_scale)?;
        let grows = growth_factor > 1.0 && growth_factor.is_finite();
        check::require(grows, "growth_factor", "a finite number above 1", growth_factor)?;
        let backs_off = backoff_factor > 0.0 && backoff_factor < 1.0;
        check::require(backs_off, "backoff_factor", "a number in (0, 1)", backoff_factor)?;
        check::at_least_one("growth_interval", growth_interval)
    }

    /// Before the first call.
    pub(crate) fn start(&self) -> GradScalerState {
        GradScalerState { scale: self.init_scale as f32, growth_tracker: 0 }
    }

    /// After a call with these settings.
    pub(crate) fn after(&self, state: GradScalerState, found_inf: bool) -> GradScalerState {
        let GradScalerState { scale, growth_tracker } = state;
        let times = |factor: f64| (f64::from(scale) * factor) as f32;
        if found_inf {
            return GradScalerState { scale: times(self.backoff_factor).max(SMALLEST), growth_tracker: 0 };
        }
        if growth_tracker + 1 < self.growth_interval {
            return GradScalerState { scale, growth_tracker: growth_tracker + 1 };
        }
        let grown = times(self.growth_factor);
        GradScalerState { scale: if grown.is_finite() { grown } else { scale }, growth_tracker: 0 }
    }

    /// The state for these settings in the place of `before`, with which a run has come to `state`: what it was, but for
    /// another first scale, from which it starts anew.
    pub(crate) fn carried(&self, before: &Self, state: GradScalerState) -> GradScalerState {
        if self.init_scale != before.init_scale {
            return self.start();
        }
        GradScalerState { growth_tracker: state.growth_tracker.min(self.growth_interval - 1), ..state }
    }

    /// Whether a run with these settings can have come to `state`.
    pub(crate) fn check(&self, state: &GradScalerState) -> Result<()> {
        let GradScalerState { scale, growth_tracker } = *state;
        if !(scale.is_finite() && scale >= SMALLEST) {
            return Err(Error::checkpoint("grad_scaler.scale", "a finite number of at least 2^-126", scale));
        }
        if growth_tracker >= self.growth_interval {
            let expected = format!("less than the growth interval, {}", self.growth_interval);
            return Err(Error::checkpoint("grad_scaler.growth_tracker", expected, growth_tracker));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(scale: f32, growth_tracker: u64) -> GradScalerState {
        GradScalerState { scale, growth_tracker }
    }

    #[test]
    fn a_scale_grows_after_an_interval_and_backs_off_at_once() {
        let scaler = GradScaler { growth_interval: 3, ..GradScaler::default() };
        assert_eq!(scaler.after(state(8.0, 0), false), state(8.0, 1));
        assert_eq!(scaler.after(state(8.0, 2), false), state(16.0, 0));
        assert_eq!(scaler.after(state(8.0, 2), true), state(4.0, 0));
    }

    #[test]
    fn a_scale_never_leaves_its_range() {
        let scaler = GradScaler { growth_interval: 1, growth_factor: 1e300, ..GradScaler::default() };
        assert_eq!(scaler.after(state(8.0, 0), false), state(8.0, 0));
        assert_eq!(scaler.after(state(SMALLEST, 0), true), state(SMALLEST, 0));
        assert!((1.0 / SMALLEST).is_finite() && 1.0 / f32::MAX > 0.0);
    }

    #[test]
    fn other_settings_carry_on_or_begin_anew() {
        let before = GradScaler::default();
        let shorter = GradScaler { growth_interval: 5, ..before };
        assert_eq!(shorter.carried(&before, state(8.0, 1999)), state(8.0, 4));
        let other = GradScaler { init_scale: 32.0, ..before };
        assert_eq!(other.carried(&before, state(8.0, 7)), state(32.0, 0));
    }
}
