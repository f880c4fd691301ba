//! What clipping makes of norms: one factor for each gradient. Pure; its mirror is `factor` in `cuda/summary.cu`.

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
    /// The factor for a gradient of norm `own`, where all together have norm `total`.
    pub(crate) fn factor(self, own: f64, total: f64) -> f64 {
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
