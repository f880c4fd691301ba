//! How gradients are clipped, and what each gradient is multiplied with for that. Pure; its mirror is `clipped` in
//! `cuda/summary.cu`.

use serde::{Deserialize, Serialize};

use crate::check;
use crate::error::Result;
use crate::reduce::{Norm, NormType};

/// How gradients are clipped: each limit c is a finite number above 0.
///
/// Norms are those of the true gradients: after unscaling, and of their mean where several calls are accumulated.
///
/// ```
/// use candle_adamax::{Clip, ParamsAdamax};
///
/// let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
/// params.validate()?;
/// # Ok::<(), candle_adamax::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub enum Clip {
    /// `Value(c)` clips each element: `g = min(max(g, -c), c)`. Keras's `clipvalue`.
    Value(f64),
    /// `Norm(c)` clips the L2 norm of each variable's gradient: `g = g * c / max(norm(g), c)`. Keras's `clipnorm`.
    Norm(f64),
    /// `GlobalNorm(c)` clips the L2 norm of all gradients together: `g = g * c / max(norm(all), c)`. Keras's
    /// `global_clipnorm`. A norm that is not finite makes every gradient NaN, as there.
    GlobalNorm(f64),
    /// Clips the norm of all gradients together: `g = g * min(max_norm / (norm(all) + 1e-6), 1)`. PyTorch's
    /// `clip_grad_norm_`.
    GradNorm {
        /// The limit.
        max_norm: f64,
        /// Which norm.
        norm_type: NormType,
    },
}

impl Clip {
    /// Checks the limit.
    pub(crate) fn validate(self) -> Result<()> {
        let (variant, limit) = match self {
            Self::Value(limit) => ("Value", limit),
            Self::Norm(limit) => ("Norm", limit),
            Self::GlobalNorm(limit) => ("GlobalNorm", limit),
            Self::GradNorm { max_norm, .. } => ("GradNorm", max_norm),
        };
        let expected = format!("a finite number above 0 for `{variant}`");
        check::require(limit > 0.0 && limit.is_finite(), "clip", expected, limit)
    }

    /// The norm that has to be measured.
    pub(crate) fn norm_type(self) -> Option<NormType> {
        match self {
            Self::Value(_) => None,
            Self::Norm(_) | Self::GlobalNorm(_) => Some(NormType::L2),
            Self::GradNorm { norm_type, .. } => Some(norm_type),
        }
    }

    /// What the gradient of norm `own`, where all together have norm `total`, is multiplied with: clipped, and times
    /// `scale`.
    pub(crate) fn scale(self, scale: f64, own: Norm, total: Norm) -> f64 {
        let (norm, limit) = match self {
            Self::Value(_) => return scale,
            Self::Norm(limit) => (own, limit),
            Self::GlobalNorm(limit) | Self::GradNorm { max_norm: limit, .. } => (total, limit),
        };
        // Such a norm is above any limit.
        if norm.is_beyond() { norm.clip_beyond(scale, limit) } else { scale * self.factor(norm.to_f64()) }
    }

    /// The factor for gradients of this norm.
    fn factor(self, norm: f64) -> f64 {
        match self {
            Self::Value(_) => 1.0,
            Self::Norm(limit) => keras_factor(norm, limit),
            Self::GlobalNorm(_) if !norm.is_finite() => f64::NAN,
            Self::GlobalNorm(limit) => keras_factor(norm, limit),
            Self::GradNorm { max_norm, .. } => {
                let factor = max_norm / (norm + 1e-6);
                if factor > 1.0 { 1.0 } else { factor }
            }
        }
    }
}

/// 1 up to the limit, exactly; a NaN norm gives NaN.
fn keras_factor(norm: f64, limit: f64) -> f64 {
    if norm <= limit { 1.0 } else { limit / norm }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn torch(max_norm: f64) -> Clip {
        Clip::GradNorm { max_norm, norm_type: NormType::L2 }
    }

    #[test]
    fn factors_are_those_of_the_frameworks() {
        let factor = |clip: Clip, own: f64, total: f64| clip.scale(1.0, Norm::of(own), Norm::of(total));
        assert_eq!(factor(Clip::Norm(1.0), 4.0, 100.0), 0.25);
        assert_eq!(factor(Clip::Norm(1.0), 1.0, 100.0), 1.0);
        assert_eq!(factor(Clip::Norm(1.0), 0.0, 0.0), 1.0);
        assert_eq!(factor(Clip::Norm(1.0), f64::INFINITY, f64::INFINITY), 0.0);
        assert!(factor(Clip::Norm(1.0), f64::NAN, f64::NAN).is_nan());
        assert_eq!(factor(Clip::GlobalNorm(2.0), 4.0, 8.0), 0.25);
        assert!(factor(Clip::GlobalNorm(2.0), 1.0, f64::INFINITY).is_nan());
        assert!(factor(Clip::GlobalNorm(2.0), 1.0, f64::NAN).is_nan());
        assert_eq!(factor(torch(1.0), 1.0, 4.0), 1.0 / (4.0 + 1e-6));
        assert_eq!(factor(torch(1.0), 1.0, 0.5), 1.0);
        assert_eq!(factor(torch(1.0), 1.0, f64::INFINITY), 0.0);
        assert!(factor(torch(1.0), 1.0, f64::NAN).is_nan());
        assert_eq!(factor(Clip::Value(1.0), 5.0, f64::NAN), 1.0);
    }

    #[test]
    fn a_norm_beyond_f64_gives_a_finite_factor() {
        // 2^1030, of gradients that a scale of 2^100 has yet to be divided out of.
        let (norm, scale) = (Norm::product(2f64.powi(1000), 2f64.powi(30)), 2f64.powi(-100));
        let limit = 2f64.powi(20);
        for clip in [Clip::Norm(limit), Clip::GlobalNorm(limit), torch(limit)] {
            assert_eq!(clip.scale(1.0, norm, norm), 2f64.powi(-1010));
            assert_eq!(clip.scale(1.0 / scale, norm, norm), 2f64.powi(-910));
        }
    }
}
