//! Pure: sizes of tensors -> pieces of work for a parallel pass over all of them.
//!
//! Invariant: every element is in exactly one piece; pieces begin at multiples of [`ALIGNMENT`].

use std::ops::Range;

use crate::reduce::LEAF;

/// Pieces begin at multiples of this many elements, so that a reduction's leaves stay whole.
const ALIGNMENT: usize = LEAF;
/// Up to so much work one thread is faster than several: another one that sleeps is late, and the threads of candle's
/// own pool spin for about a millisecond after an operation, on the cores that others want. Measured on two cores: a
/// thousand tensors of 64 elements take 0.23 ms with one thread and 0.40 ms with two.
const SEQUENTIAL: usize = 256 * 1024;
/// More pieces than threads, so that a thread that is late holds up little; few enough to stay cheap.
const PIECES_PER_THREAD: usize = 8;
/// A piece is large enough for the memory's prefetchers to run, and small enough to share.
const PIECE: Range<usize> = 16 * 1024..1024 * 1024;
/// Tensors of up to so many elements stay whole: to share one costs as much as it gains.
const WHOLE: usize = 128 * 1024;
/// What finding, locking and starting one tensor costs, in elements. Measured: 0.14 us, and 64 elements take 0.06 us.
const TENSOR_COST: usize = 128;

/// Who does what in a pass over tensors of given sizes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Large tensors, cut into pieces: the tensor's index and the elements of each of its pieces but the last.
    pub(crate) cut: Vec<(usize, usize)>,
    /// Small tensors, bundled: the indices of each bundle.
    pub(crate) bundles: Vec<Vec<usize>>,
}

impl Plan {
    /// Cuts and bundles tensors of `sizes` elements for `threads` threads.
    pub(crate) fn new(sizes: &[usize], threads: usize) -> Self {
        let cost: usize = sizes.iter().map(|size| size + TENSOR_COST).sum();
        if threads <= 1 || cost <= SEQUENTIAL {
            let all: Vec<usize> = (0..sizes.len()).collect();
            return Self { cut: Vec::new(), bundles: if all.is_empty() { Vec::new() } else { vec![all] } };
        }
        // Every cut tensor is shared by all threads while no other one is worked on.
        let piece = |cost: usize| (cost / (threads * PIECES_PER_THREAD)).clamp(PIECE.start, PIECE.end);
        let whole = WHOLE.max(cost / (threads * PIECES_PER_THREAD));
        let (large, small): (Vec<usize>, Vec<usize>) = (0..sizes.len()).partition(|&index| sizes[index] > whole);
        let cut = large.into_iter().map(|index| {
            let pieces = sizes[index].div_ceil(piece(sizes[index]));
            (index, sizes[index].div_ceil(pieces).next_multiple_of(ALIGNMENT))
        });
        let mut plan = Self { cut: cut.collect(), bundles: Vec::new() };
        let cost: usize = small.iter().map(|&index| sizes[index] + TENSOR_COST).sum();
        let limit = if cost <= SEQUENTIAL { cost } else { piece(cost) };
        let (mut bundle, mut bundled) = (Vec::new(), 0);
        for index in small {
            bundle.push(index);
            bundled += sizes[index] + TENSOR_COST;
            if bundled >= limit {
                plan.bundles.push(std::mem::take(&mut bundle));
                bundled = 0;
            }
        }
        if !bundle.is_empty() {
            plan.bundles.push(bundle);
        }
        plan
    }

    /// Whether there is anything to share among threads.
    pub(crate) fn is_parallel(&self) -> bool {
        !self.cut.is_empty() || self.bundles.len() > 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn little_work_stays_on_one_thread() {
        assert_eq!(Plan::new(&[], 8), Plan::default());
        let plan = Plan::new(&[10, 20, 30], 8);
        assert_eq!(plan, Plan { cut: vec![], bundles: vec![vec![0, 1, 2]] });
        assert!(!plan.is_parallel());
        assert!(!Plan::new(&[100_000_000], 1).is_parallel());
    }

    #[test]
    fn a_large_tensor_uses_all_threads() {
        let plan = Plan::new(&[100_000_000], 2);
        assert_eq!(plan.bundles, Vec::<Vec<usize>>::new());
        let [(0, piece)] = plan.cut[..] else { panic!("{plan:?}") };
        assert!(100_000_000_usize.div_ceil(piece) >= 2 * PIECES_PER_THREAD);
    }

    #[test]
    fn many_small_ones_are_shared_evenly() {
        assert!(!Plan::new(&[64; 1000], 2).is_parallel());
        let plan = Plan::new(&[64; 5000], 2);
        assert!(plan.cut.is_empty() && plan.bundles.len() >= 4, "{plan:?}");
        assert!(plan.is_parallel());
        let sizes: Vec<usize> = plan.bundles.iter().map(Vec::len).collect();
        assert!(sizes.iter().max() < sizes.iter().sum::<usize>().checked_div(2).as_ref(), "{sizes:?}");
    }

    proptest! {
        #[test]
        fn every_tensor_is_planned_once(sizes in prop::collection::vec(0usize..3_000_000, 0..80), threads in 1usize..130) {
            let plan = Plan::new(&sizes, threads);
            let mut seen: Vec<usize> = plan.cut.iter().map(|&(index, _)| index).collect();
            seen.extend(plan.bundles.iter().flatten());
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..sizes.len()).collect::<Vec<_>>());
            for &(index, piece) in &plan.cut {
                prop_assert!(piece > 0 && piece % ALIGNMENT == 0 && piece <= PIECE.end + ALIGNMENT);
                prop_assert!(sizes[index] > WHOLE);
            }
            prop_assert!(plan.bundles.iter().all(|bundle| !bundle.is_empty()));
        }
    }
}
