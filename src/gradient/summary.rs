//! Norms of the gradients, and what clipping makes of them: one factor for each variable.
//!
//! Gradients are never rewritten; the factor reaches the kernel as `grad_scale`. Invariant: norms are those of the
//! true gradients, that is after unscaling, and joined in the order of the variables' names.

use crate::error::Result;
use crate::kernel::{self, Source};
use crate::params::ParamsAdamax;
use crate::reduce::NormType;
use crate::state::Place;

/// How norms become factors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Clip {
    /// Not at all.
    None,
    /// `c / max(norm, c)` for each variable's own norm. Keras `clipnorm`.
    Each(f64),
    /// `c / max(norm, c)` for the norm of all; NaN if that is not finite. Keras `global_clipnorm`.
    Global(f64),
    /// `min(c / (norm + 1e-6), 1)` for the norm of all. PyTorch `clip_grad_norm_`.
    Torch(f64),
}

impl Clip {
    pub(crate) fn of(params: &ParamsAdamax) -> Self {
        match (params.clip_norm, params.clip_global_norm, params.clip_grad_norm) {
            (Some(limit), _, _) => Self::Each(limit),
            (_, Some(limit), _) => Self::Global(limit),
            (_, _, Some(clip)) => Self::Torch(clip.max_norm),
            _ => Self::None,
        }
    }

    /// The factor for a gradient of norm `own`, where all together have norm `total`.
    fn factor(self, own: f64, total: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Each(limit) => keras_factor(own, limit),
            Self::Global(_) if !total.is_finite() => f64::NAN,
            Self::Global(limit) => keras_factor(total, limit),
            Self::Torch(limit) => {
                let factor = limit / (total + 1e-6);
                if factor > 1.0 { 1.0 } else { factor }
            }
        }
    }
}

/// 1 up to the limit, exactly; a NaN norm gives NaN.
fn keras_factor(norm: f64, limit: f64) -> f64 {
    if norm <= limit { 1.0 } else { limit / norm }
}

/// What is known of the gradients of one update.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Summary {
    norms: Vec<f64>,
    total_norm: Option<f64>,
    /// Whether the norm is one that was asked for, and not only the check of `skip_nonfinite`.
    reported: bool,
    clip: Clip,
    unscale: f64,
}

impl Summary {
    /// Whether every element is finite: the largest magnitude tells.
    pub(crate) fn check(grads: &[(Source<'_>, Place)]) -> Result<bool> {
        Ok(kernel::measure(grads, NormType::Inf)?.iter().all(|norm| norm.is_finite()))
    }

    /// Whether anything asks for the gradients to be measured.
    pub(crate) fn is_measured(params: &ParamsAdamax) -> bool {
        params.norm_type().is_some() || params.skip_nonfinite
    }

    /// Measures the gradients, if clipping, `measure_norm` or `skip_nonfinite` asks for it.
    ///
    /// `unscale` is what each gradient still has to be multiplied by to be the true one.
    pub(crate) fn measure<'s>(
        grads: impl FnOnce() -> Result<Vec<(Source<'s>, Place)>>,
        params: &ParamsAdamax,
        unscale: f64,
    ) -> Result<Self> {
        let clip = Clip::of(params);
        let reported = params.norm_type().is_some();
        // The norm that is asked for shows as well as the largest magnitude whether all elements are finite.
        let measured = params.norm_type().or(params.skip_nonfinite.then_some(NormType::Inf));
        let Some(norm_type) = measured else {
            return Ok(Self { norms: Vec::new(), total_norm: None, reported, clip, unscale });
        };
        let mut norms = kernel::measure(&grads()?, norm_type)?;
        norms.iter_mut().for_each(|norm| *norm *= unscale.abs());
        let total_norm = Some(norm_type.join(&norms));
        Ok(Self { norms, total_norm, reported, clip, unscale })
    }

    /// Whether every element is finite, as far as was measured.
    pub(crate) fn is_finite(&self) -> bool {
        self.total_norm.is_none_or(f64::is_finite)
    }

    /// The norm of all gradients together, where it was asked for.
    pub(crate) fn total_norm(&self) -> Option<f64> {
        self.total_norm.filter(|_| self.reported)
    }

    /// What the kernel multiplies gradient `index` with: unscaled and clipped.
    pub(crate) fn grad_scale(&self, index: usize) -> f64 {
        let own = self.norms.get(index).copied().unwrap_or(0.0);
        self.unscale * self.clip.factor(own, self.total_norm.unwrap_or(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_the_frameworks() {
        assert_eq!(Clip::Each(1.0).factor(4.0, 100.0), 0.25);
        assert_eq!(Clip::Each(1.0).factor(1.0, 100.0), 1.0);
        assert_eq!(Clip::Each(1.0).factor(0.0, 0.0), 1.0);
        assert_eq!(Clip::Each(1.0).factor(f64::INFINITY, f64::INFINITY), 0.0);
        assert!(Clip::Each(1.0).factor(f64::NAN, f64::NAN).is_nan());
        assert_eq!(Clip::Global(2.0).factor(4.0, 8.0), 0.25);
        assert!(Clip::Global(2.0).factor(1.0, f64::INFINITY).is_nan());
        assert!(Clip::Global(2.0).factor(1.0, f64::NAN).is_nan());
        assert_eq!(Clip::Torch(1.0).factor(1.0, 4.0), 1.0 / (4.0 + 1e-6));
        assert_eq!(Clip::Torch(1.0).factor(1.0, 0.5), 1.0);
        assert_eq!(Clip::Torch(1.0).factor(1.0, f64::INFINITY), 0.0);
        assert!(Clip::Torch(1.0).factor(1.0, f64::NAN).is_nan());
        assert_eq!(Clip::None.factor(5.0, f64::NAN), 1.0);
    }
}
