//! Functions of one number.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel};

/// How many numbers are computed at a time: few enough for the fastest memory.
const BLOCK: usize = 1024;

/// A function of one number, with its derivative.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Activation {
    Gelu,
    GeluTanh,
    Silu,
    Sigmoid,
}

/// Writes a value of each number of `x` to a vector; also of those of `grad`, where it is given.
macro_rules! each {
    ($t:ident, $x:ident $(, $grad:ident)? => $value:expr) => {{
        let mut out = vec![$t::zero(); $x.len()];
        parallel::pieces(&mut out, BLOCK, #[inline(always)] |(start, out)| {
            let mut rooms = [const { Vec::new() }; 3];
            let [x_room, _grad_room, out_room] = &mut rooms;
            for (i, out) in out.chunks_mut(BLOCK).enumerate() {
                let at = start + i * BLOCK..start + i * BLOCK + out.len();
                $(let $grad = $t::widen(&$grad[at.clone()], _grad_room);)?
                let $x = $t::widen(&$x[at], x_room);
                $t::narrow(out, out_room, #[inline(always)] |out| {
                    lanes::map!(out, $x in $x $(, $grad in $grad)? => $value);
                });
            }
        });
        out
    }};
}

/// `f(x)` for each number of `x`.
pub(crate) fn forward<T: Element>(activation: Activation, x: &[T]) -> Vec<T> {
    match activation {
        Activation::Gelu => each!(T, x => x * x.normal().0),
        Activation::GeluTanh => each!(T, x => x * gate(x).0),
        Activation::Silu => each!(T, x => x * x.sigmoid()),
        Activation::Sigmoid => each!(T, x => x.sigmoid()),
    }
}

/// `f'(x) grad` for each number of `x`.
pub(crate) fn backward<T: Element>(activation: Activation, x: &[T], grad: &[T]) -> Vec<T> {
    match activation {
        Activation::Gelu => each!(T, x, grad => {
            let (phi, density) = x.normal();
            grad * (phi + x * density)
        }),
        Activation::GeluTanh => each!(T, x, grad => {
            let (s, slope) = gate(x);
            grad * (s + x * s * (T::Wide::ONE - s) * slope)
        }),
        Activation::Silu => each!(T, x, grad => {
            let s = x.sigmoid();
            grad * (s + x * s * (T::Wide::ONE - s))
        }),
        Activation::Sigmoid => each!(T, x, grad => {
            let s = x.sigmoid();
            grad * s * (T::Wide::ONE - s)
        }),
    }
}

/// The GELU by the hyperbolic tangent is `x (1 + tanh u) / 2`, which is `x sigmoid(2 u)`: that sigmoid, and the
/// derivative of `2 u` by x.
#[inline(always)]
fn gate<W: Real>(x: W) -> (W, W) {
    let scale = W::of(2.0 * std::f64::consts::FRAC_2_PI.sqrt());
    let cubic = W::of(0.044715);
    let square = x * x;
    let u = scale * x * (W::ONE + cubic * square);
    // Far away the sigmoid is constant, and the derivative must not be infinite: it is multiplied by 0.
    let square = if square > W::of(400.0) { W::of(400.0) } else { square };
    (u.sigmoid(), scale * (W::ONE + W::of(3.0) * cubic * square))
}
