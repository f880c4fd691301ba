//! How the rows of a tensor are shared among threads.

use std::ops::Range;

use rayon::prelude::*;

use super::element::Element;
use super::real::Real;

/// How many elements are worth a task of their own.
const SHARE: usize = 1 << 15;

/// The largest number of blocks of rows whose sums are computed apart.
const BLOCKS: usize = 64;

/// A call of `body`. Unlike a closure, it is certain to be compiled into the function that allows vector instructions.
struct Call<'a, B, A> {
    body: &'a B,
    args: A,
}

impl<B: Fn(A), A> pulp::NullaryFnOnce for Call<'_, B, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        (self.body)(self.args);
    }
}

/// Whether `elements` are worth more than one thread.
fn worth_threads(elements: usize) -> bool {
    elements > SHARE && rayon::current_num_threads() > 1
}

/// Calls `body` for pieces of `out` with the index of their first element. A piece is a multiple of `unit` elements.
/// Where there are many elements, pieces are computed in parallel.
#[inline(always)]
pub(crate) fn pieces<T: Send>(out: &mut [T], unit: usize, body: impl Fn((usize, &mut [T])) + Sync) {
    let unit = unit.max(1);
    let size = (SHARE / unit).max(1) * unit;
    let call = |args| pulp::Arch::new().dispatch(Call { body: &body, args });
    if worth_threads(out.len()) {
        out.par_chunks_mut(size).enumerate().for_each(|(i, piece)| call((i * size, piece)));
    } else {
        call((0, out));
    }
}

/// Calls `body` for blocks of `rows` rows of `len` elements, with their indices, their part of `out`, and `width` sums,
/// which begin as zeros. Returns the sums over all blocks. `out` has all rows, or none where the caller wants none.
///
/// The blocks do not depend on the number of threads, and are added in their order: neither do the bits.
#[inline(always)]
pub(crate) fn blocks<T: Element>(
    out: &mut [T],
    (rows, len): (usize, usize),
    width: usize,
    body: impl Fn((Range<usize>, &mut [T], &mut [T::Wide])) + Sync,
) -> Vec<T::Wide> {
    // One more number than asked for, since a slice is not split into parts of length 0.
    let stride = width + 1;
    let size = rows.div_ceil(BLOCKS).max(SHARE / 2 / len.max(1)).max(1);
    let count = rows.div_ceil(size);
    let mut partial = vec![T::Wide::ZERO; count * stride];
    let mut outs = out.chunks_mut((size * len).max(1));
    let tasks: Vec<_> =
        partial.chunks_mut(stride).enumerate().map(|(i, sums)| (i, outs.next().unwrap_or_default(), sums)).collect();
    let call = |(i, out, sums): (usize, &mut [T], &mut [T::Wide])| {
        let range = i * size..rows.min((i + 1) * size);
        pulp::Arch::new().dispatch(Call { body: &body, args: (range, out, &mut sums[..width]) });
    };
    if worth_threads(rows * len) {
        tasks.into_par_iter().for_each(call);
    } else {
        tasks.into_iter().for_each(call);
    }
    let mut sums = vec![T::Wide::ZERO; width];
    for part in partial.chunks(stride) {
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum += *part;
        }
    }
    sums
}
