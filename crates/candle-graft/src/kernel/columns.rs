//! Sums of the columns of a matrix.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel};

/// The sum of the rows of `x`, which have `len` elements each.
pub(crate) fn sum<T: Element>(x: &[T], len: usize) -> Vec<T::Wide> {
    let rows = x.len().checked_div(len).unwrap_or(0);
    parallel::blocks::<T>(
        &mut [],
        (rows, len),
        len,
        #[inline(always)]
        |(range, _, sums)| {
            let mut room = Vec::new();
            for row in range {
                let row = T::widen(&x[row * len..][..len], &mut room);
                lanes::update!(sum in sums, x in row => sum + x);
            }
        },
    )
}

/// Adds `row` to each row of `x`.
pub(crate) fn add<T: Real + Element<Wide = T>>(x: &mut [T], row: &[T]) {
    parallel::pieces(
        x,
        row.len(),
        #[inline(always)]
        |(_, x)| {
            for x in x.chunks_exact_mut(row.len().max(1)) {
                lanes::update!(x in x, add in row => x + add);
            }
        },
    );
}
