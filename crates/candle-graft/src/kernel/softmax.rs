//! The softmax of rows and its logarithm.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel};

/// Writes `exp(x - max(x)) / sum` to `out`.
#[inline(always)]
pub(super) fn row<W: Real>(x: &[W], out: &mut [W]) {
    let max = lanes::max(x);
    lanes::map!(out, x in x => (x - max).exp_neg());
    let sum: W = lanes::sums!(e in out => sum: e);
    let scale = W::ONE / sum;
    lanes::update!(e in out => e * scale);
}

/// Writes `y (g - sum(y g))` to `out`: the gradient of the argument, where y is the softmax.
#[inline(always)]
pub(super) fn row_backward<W: Real>(y: &[W], g: &[W], out: &mut [W]) {
    let mean: W = lanes::sums!(y in y, g in g => sum: y * g);
    lanes::map!(out, y in y, g in g => y * (g - mean));
}

/// The largest number of a row, and the logarithm of the sum of `exp(x - max)`.
#[inline(always)]
pub(super) fn log_sum_exp<W: Real>(x: &[W]) -> (W, W) {
    let max = lanes::max(x);
    let sum: W = lanes::sums!(x in x => sum: (x - max).exp_neg());
    (max, sum.ln())
}

/// Computes each row of a result, as `out`, from the rows of the inputs.
macro_rules! rows {
    ($t:ident, $len:ident, $x:ident $(, $grad:ident)? => |$out:ident| $code:expr) => {{
        let mut out = vec![$t::zero(); $x.len()];
        parallel::pieces(&mut out, $len, #[inline(always)] |(start, out)| {
            let mut rooms = [const { Vec::new() }; 3];
            let [x_room, _grad_room, out_room] = &mut rooms;
            for (i, out) in out.chunks_mut($len.max(1)).enumerate() {
                let at = start + i * $len..start + (i + 1) * $len;
                $(let $grad = $t::widen(&$grad[at.clone()], _grad_room);)?
                let $x = $t::widen(&$x[at], x_room);
                $t::narrow(out, out_room, #[inline(always)] |$out| $code);
            }
        });
        out
    }};
}

/// The softmax of each row of `len` elements.
pub(crate) fn forward<T: Element>(x: &[T], len: usize) -> Vec<T> {
    rows!(T, len, x => |out| row(x, out))
}

/// The gradient of the argument, where `y` is the result.
pub(crate) fn backward<T: Element>(y: &[T], grad: &[T], len: usize) -> Vec<T> {
    rows!(T, len, y, grad => |out| row_backward(y, grad, out))
}

/// The gradient of the argument, where `x` is the argument.
pub(crate) fn backward_anew<T: Element>(x: &[T], grad: &[T], len: usize) -> Vec<T> {
    rows!(T, len, x, grad => |out| {
        row(x, out);
        let mean: T::Wide = lanes::sums!(y in out, g in grad => sum: y * g);
        lanes::update!(y in out, g in grad => y * (g - mean));
    })
}

/// The logarithm of the softmax of each row.
pub(crate) fn log_forward<T: Element>(x: &[T], len: usize) -> Vec<T> {
    rows!(T, len, x => |out| {
        let (max, log) = log_sum_exp(x);
        lanes::map!(out, x in x => (x - max) - log);
    })
}

/// The gradient of the argument of the logarithm: `g - softmax(x) sum(g)`.
pub(crate) fn log_backward<T: Element>(x: &[T], grad: &[T], len: usize) -> Vec<T> {
    rows!(T, len, x, grad => |out| {
        row(x, out);
        let sum: T::Wide = lanes::sums!(g in grad => sum: g);
        lanes::update!(p in out, g in grad => g - p * sum);
    })
}
