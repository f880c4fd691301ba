//! The cross entropy of rows of logits.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel, softmax};

/// The mean of `-log softmax(row)[target]` over the rows, of `classes` elements each.
pub(crate) fn forward<T: Element>(logits: &[T], targets: &[usize], classes: usize) -> T::Wide {
    let sums = parallel::blocks::<T>(
        &mut [],
        (targets.len(), classes),
        1,
        #[inline(always)]
        |(range, _, sums)| {
            let mut room = Vec::new();
            for row in range {
                let x = T::widen(&logits[row * classes..(row + 1) * classes], &mut room);
                let (max, log) = softmax::log_sum_exp(x);
                sums[0] += log - (x[targets[row]] - max);
            }
        },
    );
    sums[0] / T::Wide::of(targets.len() as f64)
}

/// The gradient of the logits, where `grad` is that of the mean: `(softmax(row) - 1 at the target) grad / rows`.
pub(crate) fn backward<T: Element>(logits: &[T], targets: &[usize], classes: usize, grad: T::Wide) -> Vec<T> {
    let mut out = vec![T::zero(); logits.len()];
    let grad = grad / T::Wide::of(targets.len() as f64);
    parallel::pieces(
        &mut out,
        classes,
        #[inline(always)]
        |(start, out)| {
            let (mut room, mut out_room) = (Vec::new(), Vec::new());
            for (i, out) in out.chunks_mut(classes.max(1)).enumerate() {
                let at = start + i * classes;
                let x = T::widen(&logits[at..at + classes], &mut room);
                let target = targets[at / classes];
                T::narrow(
                    out,
                    &mut out_room,
                    #[inline(always)]
                    |out| {
                        softmax::row(x, out);
                        out[target] -= T::Wide::ONE;
                        lanes::update!(x in out => x * grad);
                    },
                );
            }
        },
    );
    out
}
