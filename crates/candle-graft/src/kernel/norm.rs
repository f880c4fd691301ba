//! Layer normalization and RMS normalization.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel};

/// A normalization: of `x` minus its mean, or of `x` as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) centered: bool,
    pub(crate) eps: f64,
}

impl Norm {
    /// The mean of a row, and what its deviations from the mean are multiplied by.
    #[inline(always)]
    fn moments<W: Real>(self, x: &[W]) -> (W, W) {
        let n = W::of(x.len() as f64);
        let sum: W = if self.centered { lanes::sums!(x in x => sum: x) } else { W::ZERO };
        let mean = sum / n;
        let squares: W = lanes::sums!(x in x => sum: (x - mean) * (x - mean));
        (mean, W::ONE / (squares / n + W::of(self.eps)).sqrt())
    }

    pub(crate) fn forward<T: Element>(self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        let len = weight.len();
        parallel::pieces(
            &mut out,
            len,
            #[inline(always)]
            |(start, out)| {
                let mut rooms = [const { Vec::new() }; 4];
                let [x_room, weight_room, bias_room, out_room] = &mut rooms;
                let weight = T::widen(weight, weight_room);
                let bias = T::widen(bias.unwrap_or_default(), bias_room);
                for (i, out) in out.chunks_mut(len.max(1)).enumerate() {
                    let x = T::widen(&x[start + i * len..][..len], x_room);
                    let (mean, scale) = self.moments(x);
                    T::narrow(
                        out,
                        out_room,
                        #[inline(always)]
                        |out| {
                            if bias.is_empty() {
                                lanes::map!(out, x in x, w in weight => (x - mean) * scale * w);
                            } else {
                                lanes::map!(out, x in x, w in weight, b in bias => (x - mean) * scale * w + b);
                            }
                        },
                    );
                }
            },
        );
        out
    }

    /// The gradient of `x` where it is wanted, and where those are wanted the gradients of the weight and of the bias.
    ///
    /// With `y` the normalized row, `g` the gradient of the result and `h = g weight`, the gradient of x is
    /// `(h - mean(h) - y mean(h y)) scale`, without `mean(h)` for the RMS norm. The gradient of the weight is the sum
    /// of `g y` over the rows, that of the bias the sum of `g`.
    pub(crate) fn backward<T: Element>(
        self,
        [x, weight, grad]: [&[T]; 3],
        of_x: bool,
        of_weight: bool,
    ) -> (Vec<T>, [Vec<T::Wide>; 2]) {
        let len = weight.len();
        let rows = x.len().checked_div(len).unwrap_or(0);
        let mut out = if of_x { vec![T::zero(); x.len()] } else { Vec::new() };
        let width = if of_weight { 2 * len } else { 0 };
        let mut sums = parallel::blocks(
            &mut out,
            (rows, len),
            width,
            #[inline(always)]
            |(range, out, sums)| {
                let mut rooms = [const { Vec::new() }; 4];
                let [x_room, weight_room, grad_room, out_room] = &mut rooms;
                let weight = T::widen(weight, weight_room);
                let (weight_sum, bias_sum) = sums.split_at_mut(width / 2);
                for (i, row) in range.enumerate() {
                    let at = row * len..(row + 1) * len;
                    let (x, g) = (T::widen(&x[at.clone()], x_room), T::widen(&grad[at], grad_room));
                    let (mean, scale) = self.moments(x);
                    if of_weight {
                        lanes::update!(sum in weight_sum, x in x, g in g => sum + g * ((x - mean) * scale));
                        lanes::update!(sum in bias_sum, g in g => sum + g);
                    }
                    if of_x {
                        let (h, hy): (T::Wide, T::Wide) = lanes::sums!(
                            x in x, w in weight, g in g => h: g * w, hy: g * w * ((x - mean) * scale)
                        );
                        let n = T::Wide::of(len as f64);
                        let (h, hy) = (if self.centered { h / n } else { T::Wide::ZERO }, hy / n);
                        T::narrow(
                            &mut out[i * len..(i + 1) * len],
                            out_room,
                            #[inline(always)]
                            |out| {
                                lanes::map!(out, x in x, w in weight, g in g => {
                                    (g * w - h - (x - mean) * scale * hy) * scale
                                });
                            },
                        );
                    }
                }
            },
        );
        let of_bias = sums.split_off(width / 2);
        (out, [sums, of_bias])
    }
}
