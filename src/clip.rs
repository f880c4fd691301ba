//! What clipping makes of norms: what each gradient is multiplied with. Pure; its mirror is `clipped` in `cuda/summary.cu`.

use crate::reduce::Norm;

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
    /// What the gradient of norm `own`, where all together have norm `total`, is multiplied with: clipped, and times
    /// `scale`.
    pub(crate) fn scale(self, scale: f64, own: Norm, total: Norm) -> f64 {
        let (norm, limit) = match self {
            Self::None => return scale,
            Self::Each(limit) => (own, limit),
            Self::Global(limit) | Self::Torch(limit) => (total, limit),
        };
        // Such a norm is above any limit.
        if norm.is_beyond() { norm.clip_beyond(scale, limit) } else { scale * self.factor(norm.to_f64()) }
    }

    /// The factor for gradients of this norm.
    fn factor(self, norm: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Each(limit) => keras_factor(norm, limit),
            Self::Global(_) if !norm.is_finite() => f64::NAN,
            Self::Global(limit) => keras_factor(norm, limit),
            Self::Torch(limit) => {
                let factor = limit / (norm + 1e-6);
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

    #[test]
    fn factors_are_those_of_the_frameworks() {
        let factor = |clip: Clip, own: f64, total: f64| clip.scale(1.0, Norm::of(own), Norm::of(total));
        assert_eq!(factor(Clip::Each(1.0), 4.0, 100.0), 0.25);
        assert_eq!(factor(Clip::Each(1.0), 1.0, 100.0), 1.0);
        assert_eq!(factor(Clip::Each(1.0), 0.0, 0.0), 1.0);
        assert_eq!(factor(Clip::Each(1.0), f64::INFINITY, f64::INFINITY), 0.0);
        assert!(factor(Clip::Each(1.0), f64::NAN, f64::NAN).is_nan());
        assert_eq!(factor(Clip::Global(2.0), 4.0, 8.0), 0.25);
        assert!(factor(Clip::Global(2.0), 1.0, f64::INFINITY).is_nan());
        assert!(factor(Clip::Global(2.0), 1.0, f64::NAN).is_nan());
        assert_eq!(factor(Clip::Torch(1.0), 1.0, 4.0), 1.0 / (4.0 + 1e-6));
        assert_eq!(factor(Clip::Torch(1.0), 1.0, 0.5), 1.0);
        assert_eq!(factor(Clip::Torch(1.0), 1.0, f64::INFINITY), 0.0);
        assert!(factor(Clip::Torch(1.0), 1.0, f64::NAN).is_nan());
        assert_eq!(factor(Clip::None, 5.0, f64::NAN), 1.0);
    }

    #[test]
    fn a_norm_beyond_f64_gives_a_finite_factor() {
        // 2^1030, of gradients that a scale of 2^100 has yet to be divided out of.
        let (norm, scale) = (Norm::product(2f64.powi(1000), 2f64.powi(30)), 2f64.powi(-100));
        for clip in [Clip::Each(2f64.powi(20)), Clip::Global(2f64.powi(20)), Clip::Torch(2f64.powi(20))] {
            assert_eq!(clip.scale(1.0, norm, norm), 2f64.powi(-1010));
            assert_eq!(clip.scale(1.0 / scale, norm, norm), 2f64.powi(-910));
        }
    }
}
