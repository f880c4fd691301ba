//! **The formula**: Adamax's update of one element, and the numbers that it needs. Pure; knows nothing of tensors.
//!
//! Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", section 7.1, with the settings in which the
//! frameworks differ expressed as numbers, so that one statement serves all of them:
//!
//! ```text
//! g  = clamp(grad_scale * grad, -clamp, clamp) + l2 * w
//! m  = beta1 * m + (1 - beta1) * g
//! u  = max(beta2 * u, |g| + eps_inside)
//! w  = w - decay * w - step_size * m / (u + eps_outside)
//! ```
//!
//! Invariants: every operation rounds once (no fused multiply-add), so that any vector width and any machine gives the
//! same bits; a NaN in the gradient reaches m, u and w; 0 / 0 counts as 0.

use serde::{Deserialize, Serialize};

use crate::element::Arithmetic;

/// Where epsilon stands; `u` means something else in each, so a state cannot move from one to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EpsMode {
    /// Added to the norm: `u = max(beta2 * u, |g|)`, `w -= step_size * m / (u + eps)`. TensorFlow and Keras.
    #[default]
    AddToNorm,
    /// Inside the maximum: `u = max(beta2 * u, |g| + eps)`, `w -= step_size * m / u`. PyTorch and optax.
    InsideMax,
}

/// How weights decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum WeightDecay {
    /// Not at all.
    #[default]
    None,
    /// `L2(lambda)` adds `lambda * w` to the gradient, after clipping, so that it enters both moments. PyTorch's
    /// `weight_decay`.
    L2(f64),
    /// `Decoupled(lambda)` subtracts `lr * lambda * w` beside the update, from the weight before it. Keras's
    /// `weight_decay`, optax's `adamaxw` (AdamaxW; Loshchilov & Hutter 2019).
    Decoupled(f64),
}

/// What a group of parameters is updated with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Hyperparameters {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) eps_mode: EpsMode,
    pub(crate) weight_decay: WeightDecay,
}

/// The numbers of one parameter's update `t`: computed in f64 and [rounded](Self::round) once to the type of the
/// arithmetic. Kernels receive nothing else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Coefficients<A> {
    pub(crate) grad_scale: A,
    pub(crate) clamp: A,
    pub(crate) l2: A,
    pub(crate) beta1: A,
    pub(crate) one_minus_beta1: A,
    pub(crate) beta2: A,
    pub(crate) eps_inside: A,
    pub(crate) eps_outside: A,
    pub(crate) decay: A,
    pub(crate) step_size: A,
}

impl Coefficients<f64> {
    /// The coefficients of update number `t`, from 1: `step_size = lr / (1 - beta1^t)`. None is infinite but `clamp`.
    pub(crate) fn of_update(hyper: &Hyperparameters, lr: f64, t: u64) -> Self {
        let (eps_inside, eps_outside) = match hyper.eps_mode {
            EpsMode::InsideMax => (hyper.eps, 0.0),
            EpsMode::AddToNorm => (0.0, hyper.eps),
        };
        let (l2, decay) = match hyper.weight_decay {
            WeightDecay::None => (0.0, 0.0),
            WeightDecay::L2(lambda) => (lambda, 0.0),
            WeightDecay::Decoupled(lambda) => (0.0, (lr * lambda).min(f64::MAX)),
        };
        let bias_correction = 1.0 - hyper.beta1.powf(t as f64);
        Self {
            grad_scale: 1.0,
            clamp: f64::INFINITY,
            l2,
            beta1: hyper.beta1,
            one_minus_beta1: 1.0 - hyper.beta1,
            beta2: hyper.beta2,
            eps_inside,
            eps_outside,
            decay,
            step_size: (lr / bias_correction).min(f64::MAX),
        }
    }

    /// The same numbers in the type of the arithmetic, each rounded once. What f32 has no room for is its largest number:
    /// infinity times a weight, a gradient or a moment of 0 would be NaN.
    pub(crate) fn round<A: Arithmetic>(&self) -> Coefficients<A> {
        let finite = |x: f64| A::from_f64(x.min(A::LARGEST));
        Coefficients {
            grad_scale: A::from_f64(self.grad_scale),
            clamp: A::from_f64(self.clamp),
            l2: finite(self.l2),
            beta1: A::from_f64(self.beta1),
            one_minus_beta1: A::from_f64(self.one_minus_beta1),
            beta2: A::from_f64(self.beta2),
            eps_inside: finite(self.eps_inside),
            eps_outside: finite(self.eps_outside),
            decay: finite(self.decay),
            step_size: finite(self.step_size),
        }
    }
}

impl<A: Arithmetic> Coefficients<A> {
    /// Calls `run` with these coefficients. Where the terms of L2 and of the limit are switched off, as mostly, these are
    /// constants in a copy of `run` that the compiler makes: it leaves them out, and tests nothing for each element.
    #[inline(always)]
    pub(crate) fn specialized(&self, mut run: impl FnMut(&Self)) {
        let infinity = A::from_f64(f64::INFINITY);
        if self.l2 != A::ZERO || self.clamp != infinity {
            run(self);
        } else if self.decay != A::ZERO {
            run(&Self { l2: A::ZERO, clamp: infinity, ..*self });
        } else {
            run(&Self { l2: A::ZERO, clamp: infinity, decay: A::ZERO, ..*self });
        }
    }
}

/// One update of one element: the new `(w, m, u)`.
///
/// A zero coefficient switches its term off altogether, so that an infinite weight without decay stays infinite
/// instead of becoming `0 * inf`; the comparison does not depend on the element, and compilers take it out of the loop.
#[inline(always)]
pub(crate) fn update<A: Arithmetic>(c: &Coefficients<A>, w: A, grad: A, m: A, u: A) -> (A, A, A) {
    let g = gradient(c, w, grad);
    let m = first_moment(c, m, g);
    let u = maximum(c.beta2 * u, magnitude(c, g));
    (step_weight(c, w, normalized(c, m, u)), m, u)
}

/// The gradient that enters the moments: scaled, clamped, with L2's share of the weight.
#[inline(always)]
pub(crate) fn gradient<A: Arithmetic>(c: &Coefficients<A>, w: A, grad: A) -> A {
    let g = clamp(grad * c.grad_scale, c.clamp);
    if c.l2 == A::ZERO { g } else { g + c.l2 * w }
}

/// The new m.
#[inline(always)]
pub(crate) fn first_moment<A: Arithmetic>(c: &Coefficients<A>, m: A, g: A) -> A {
    c.beta1 * m + c.one_minus_beta1 * g
}

/// What the decayed u is compared with.
#[inline(always)]
pub(crate) fn magnitude<A: Arithmetic>(c: &Coefficients<A>, g: A) -> A {
    g.abs() + c.eps_inside
}

/// By how many step sizes the weight moves.
#[inline(always)]
pub(crate) fn normalized<A: Arithmetic>(c: &Coefficients<A>, m: A, u: A) -> A {
    let denominator = u + c.eps_outside;
    if denominator == A::ZERO { A::ZERO } else { m / denominator }
}

/// The new weight: decayed, and moved.
#[inline(always)]
pub(crate) fn step_weight<A: Arithmetic>(c: &Coefficients<A>, w: A, normalized: A) -> A {
    let w = if c.decay == A::ZERO { w } else { w - c.decay * w };
    w - c.step_size * normalized
}

/// `x` moved into `[-limit, limit]`; a NaN stays one, infinities become the limits. In this form each comparison is one
/// instruction, a minimum and a maximum that give their second operand where one is NaN.
#[inline(always)]
pub(crate) fn clamp<A: Arithmetic>(x: A, limit: A) -> A {
    let x = if limit < x { limit } else { x };
    if -limit > x { -limit } else { x }
}

/// The larger one, or NaN if one is NaN (`f32::max` would drop it).
#[inline(always)]
pub(crate) fn maximum<A: PartialOrd + Copy>(a: A, b: A) -> A {
    #[expect(clippy::eq_op, reason = "only a NaN differs from itself")]
    let a_is_nan = a != a;
    if a > b || a_is_nan { a } else { b }
}

/// One micro-step of gradient accumulation: the new sum.
#[inline(always)]
pub(crate) fn accumulate<A: Arithmetic>(unscale: A, sum: A, grad: A) -> A {
    sum + grad * unscale
}

/// One step of the weights' exponential moving average, of Keras: the new average. A share of 0 leaves its term out,
/// whatever it is.
#[inline(always)]
pub(crate) fn average<A: Arithmetic>(momentum: A, one_minus_momentum: A, average: A, w: A) -> A {
    if momentum == A::ZERO {
        w
    } else if one_minus_momentum == A::ZERO {
        average
    } else {
        momentum * average + one_minus_momentum * w
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERAS: Hyperparameters = Hyperparameters {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-7,
        eps_mode: EpsMode::AddToNorm,
        weight_decay: WeightDecay::None,
    };

    fn close(got: f64, expected: f64) {
        approx::assert_relative_eq!(got, expected, max_relative = 1e-15);
    }

    #[test]
    fn two_updates_by_hand() {
        // t = 1, g = 0.5: m = 0.05, u = 0.5, step_size = 0.01 / 0.1, w = 1 - 0.1 * 0.05 / 0.5 = 0.99.
        let hyper = Hyperparameters { eps: 0.0, ..KERAS };
        let (w, m, u) = update(&Coefficients::of_update(&hyper, 0.01, 1), 1.0, 0.5, 0.0, 0.0);
        close(m, 0.05);
        close(u, 0.5);
        close(w, 0.99);
        // t = 2, g = -0.1: m = 0.045 - 0.01, u = 0.4995, step_size = 0.01 / 0.19.
        let (w, m, u) = update(&Coefficients::of_update(&hyper, 0.01, 2), w, -0.1, m, u);
        close(m, 0.035);
        close(u, 0.4995);
        close(w, 0.99 - 0.01 / 0.19 * 0.035 / 0.4995);
    }

    #[test]
    fn epsilon_stands_where_it_is_told() {
        let keras = Hyperparameters { eps: 0.5, ..KERAS };
        let (w, _, u) = update(&Coefficients::of_update(&keras, 1.0, 1), 0.0, 1.0, 0.0, 0.0);
        close(u, 1.0);
        close(w, -1.0 / 1.5);
        let torch = Hyperparameters { eps_mode: EpsMode::InsideMax, ..keras };
        let (w, _, u) = update(&Coefficients::of_update(&torch, 1.0, 1), 0.0, 1.0, 0.0, 0.0);
        close(u, 1.5);
        close(w, -1.0 / 1.5);
        // The difference shows when the gradient ends: PyTorch's u decays with its epsilon inside.
        let (_, _, u) = update(&Coefficients::of_update(&torch, 1.0, 2), w, 0.0, 0.1, u);
        close(u, 0.999 * 1.5);
    }

    #[test]
    fn decay_is_coupled_or_decoupled() {
        let l2 = Hyperparameters { weight_decay: WeightDecay::L2(0.1), eps: 0.0, ..KERAS };
        let (_, m, u) = update(&Coefficients::of_update(&l2, 0.01, 1), 2.0, 1.0, 0.0, 0.0);
        close(m, 0.12);
        close(u, 1.2);
        let decoupled = Hyperparameters { weight_decay: WeightDecay::Decoupled(0.1), eps: 0.0, ..KERAS };
        let (w, m, u) = update(&Coefficients::of_update(&decoupled, 0.01, 1), 2.0, 1.0, 0.0, 0.0);
        close(m, 0.1);
        close(u, 1.0);
        close(w, 2.0 - 2.0 * 0.001 - 0.01);
    }

    #[test]
    fn scale_comes_before_the_clamp() {
        let c = Coefficients { grad_scale: -2.0, clamp: 3.0, ..Coefficients::of_update(&KERAS, 0.1, 1) };
        assert_eq!(update(&c, 0.0, 1.0, 0.0, 0.0).2, 2.0);
        let (_, m, u) = update(&c, 0.0, 5.0, 0.0, 0.0);
        assert_eq!(u, 3.0);
        assert!(m < 0.0);
        assert_eq!(update(&c, 0.0, f64::INFINITY, 0.0, 0.0).2, 3.0);
        assert!(update(&c, 0.0, f64::NAN, 0.0, 0.0).2.is_nan());
    }

    #[test]
    fn nan_reaches_everything_and_zero_over_zero_is_zero() {
        let c = Coefficients::of_update(&KERAS, 0.1, 1).round::<f32>();
        let (w, m, u) = update(&c, 1.0, f32::NAN, 0.0, 1.0);
        assert!(w.is_nan() && m.is_nan() && u.is_nan());
        assert!(update(&c, 1.0, 1.0, 0.0, f32::NAN).2.is_nan());
        let no_eps = Coefficients::of_update(&Hyperparameters { eps: 0.0, ..KERAS }, 0.1, 1);
        assert_eq!(update(&no_eps, 1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0));
        assert_eq!(update(&no_eps, f64::INFINITY, 0.0, 0.0, 0.0).0, f64::INFINITY);
    }

    #[test]
    fn coefficients_are_rounded_once() {
        let c = Coefficients::of_update(&KERAS, 0.001, 3).round::<f32>();
        assert_eq!(c.one_minus_beta1, (1.0f64 - 0.9) as f32);
        assert_ne!(c.one_minus_beta1, 1.0f32 - 0.9f32);
        assert_eq!(c.step_size, (0.001 / (1.0 - 0.9f64.powf(3.0))) as f32);
        // Far beyond where beta1^t has vanished, at any count of updates.
        assert_eq!(Coefficients::of_update(&KERAS, 0.001, u64::MAX).step_size, 0.001);
        // Too large for the type, and so its largest: an element without a gradient does not move.
        let hyper = Hyperparameters { eps: f64::MAX, weight_decay: WeightDecay::Decoupled(f64::MAX), ..KERAS };
        let c = Coefficients::of_update(&hyper, 1e308, 1);
        assert_eq!((c.step_size, c.decay), (f64::MAX, f64::MAX));
        let c = c.round::<f32>();
        assert_eq!((c.step_size, c.decay, c.eps_outside), (f32::MAX, f32::MAX, f32::MAX));
        assert_eq!(update(&c, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0));
        let beta1_zero = Hyperparameters { beta1: 0.0, ..KERAS };
        assert_eq!(Coefficients::of_update(&beta1_zero, 0.001, 1).step_size, 0.001);
    }
}
