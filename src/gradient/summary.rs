//! Norms of the gradients, and what clipping makes of them: one factor for each variable.
//!
//! Gradients are never rewritten; the factor reaches the kernel as `grad_scale`. Invariant: norms are those of the
//! true gradients, that is after unscaling, and joined in the order of the variables' names.

use crate::clip::Clip;
use crate::error::Result;
use crate::kernel::{Context, Measured, Source};
use crate::params::ParamsAdamax;
use crate::reduce::{Norm, NormType};
use crate::state::Place;

/// What is known of the gradients of one update.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Summary {
    norms: Vec<Norm>,
    total_norm: Option<Norm>,
    /// Whether the norm is one that was asked for, and not only the check of `skip_nonfinite`.
    reported: bool,
    clip: Clip,
    unscale: f64,
}

impl Summary {
    /// Whether every element is finite: the largest magnitude tells.
    pub(crate) fn check(context: &mut Context, grads: &[(Source<'_>, Place)]) -> Result<bool> {
        Ok(context.measure(grads, NormType::Inf)?.iter().all(|norm| norm.is_finite()))
    }

    /// Whether anything asks for the gradients to be measured.
    pub(crate) fn is_measured(params: &ParamsAdamax) -> bool {
        params.norm_type().is_some() || params.skips_nonfinite()
    }

    /// Measures the gradients, if clipping, `measure_norm` or `skip_nonfinite` asks for it.
    ///
    /// `unscale` is what each gradient still has to be multiplied by to be the true one.
    pub(crate) fn measure<'s>(
        context: &mut Context,
        grads: impl FnOnce() -> Result<Vec<(Source<'s>, Place)>>,
        params: &ParamsAdamax,
        unscale: f64,
    ) -> Result<Self> {
        let clip = clip_of(params);
        let reported = params.norm_type().is_some();
        // The norm that is asked for shows as well as the largest magnitude whether all elements are finite.
        let measured = params.norm_type().or(params.skips_nonfinite().then_some(NormType::Inf));
        let Some(norm_type) = measured else {
            return Ok(Self { norms: Vec::new(), total_norm: None, reported, clip, unscale });
        };
        let mut norms = context.measure(&grads()?, norm_type)?;
        norms.iter_mut().for_each(|norm| *norm = norm.times(unscale.abs()));
        let total_norm = Some(norm_type.join(&norms));
        Ok(Self { norms, total_norm, reported, clip, unscale })
    }

    /// The summary of gradients that the update measures by itself, where that is on the device of all of them, and how.
    pub(crate) fn of_update(params: &ParamsAdamax, unscale: f64) -> (Self, Option<Measured>) {
        let summary = Self { norms: Vec::new(), total_norm: None, reported: false, clip: Clip::None, unscale };
        let skips = params.skips_nonfinite();
        let reported = params.norm_type().is_some();
        let norm = params.norm_type().or(skips.then_some(NormType::Inf));
        let (clip, unscale) = (clip_of(params), unscale.abs());
        let measured = norm.map(|norm| Measured { norm, reported, clip, unscale, skips, late: Vec::new() });
        (summary, measured)
    }

    /// Whether every element is finite, as far as was measured.
    pub(crate) fn is_finite(&self) -> bool {
        self.total_norm.is_none_or(Norm::is_finite)
    }

    /// The norm of all gradients together, where it was asked for.
    pub(crate) fn total_norm(&self) -> Option<f64> {
        self.total_norm.filter(|_| self.reported).map(Norm::to_f64)
    }

    /// What the kernel multiplies gradient `index` with: unscaled and clipped.
    pub(crate) fn grad_scale(&self, index: usize) -> f64 {
        let own = self.norms.get(index).copied().unwrap_or_default();
        self.clip.scale(self.unscale, own, self.total_norm.unwrap_or_default())
    }
}

/// How these settings clip.
fn clip_of(params: &ParamsAdamax) -> Clip {
    match (params.clip_norm, params.clip_global_norm, params.clip_grad_norm) {
        (Some(limit), _, _) => Clip::Each(limit),
        (_, Some(limit), _) => Clip::Global(limit),
        (_, _, Some(clip)) => Clip::Torch(clip.max_norm),
        _ => Clip::None,
    }
}
