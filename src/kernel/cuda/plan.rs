//! Pure: sizes of tensors -> the blocks of a launch.
//!
//! Invariant: every unit of every tensor is in exactly one chunk, and every chunk is one block's.

use super::abi::{Address, Chunk, Sorting, THREADS, WARP};
use crate::error::{Error, Result};
#[cfg(test)]
use crate::reduce::LEAF;

/// Elements that a thread works on at a time, as in `cuda/abi.cuh`.
const GROUP: u64 = 8;
/// How many units a thread works on, one after another: enough for loads of the next to begin while the last ones wait, few
/// enough for the last blocks of a launch to end together.
const ROUNDS: u32 = 2;
/// Units that are leaves of a sum, or of that size: a warp for each.
pub(crate) const LEAVES: u32 = THREADS / WARP * ROUNDS;

/// How many units of `unit` elements a chunk has.
pub(crate) fn units_of_chunk(unit: u64) -> u32 {
    THREADS / lanes_of(unit) * ROUNDS
}

/// The threads that work on a unit of `unit` elements.
fn lanes_of(unit: u64) -> u32 {
    unit.div_ceil(GROUP).next_power_of_two().clamp(1, u64::from(WARP)) as u32
}

/// The most blocks of a launch whose threads go on to further rows.
const BLOCKS: u64 = 4096;

/// How many blocks go over `n` things, a thread for each.
pub(crate) fn blocks(n: u64) -> u32 {
    n.div_ceil(u64::from(THREADS)).clamp(1, BLOCKS) as u32
}

/// How many blocks gather `rows` rows of `row_len` columns.
pub(crate) fn blocks_of_rows(rows: u64, row_len: u64) -> u32 {
    let lanes = row_len.next_power_of_two().clamp(1, u64::from(WARP));
    blocks(rows.saturating_mul(lanes))
}

/// How many blocks go over `n` things, a warp for each.
pub(crate) fn blocks_of_warps(n: u64) -> u32 {
    blocks(n.saturating_mul(u64::from(WARP)))
}

/// Positions that a block of a sort ranks at a time, as in `cuda/sort.cu`.
const TILE: u64 = 1024;
/// The most blocks that sort the ids of one table: their counts are added up by one block.
const SORT_BLOCKS: u64 = 512;
/// Digits of a pass of a sort, and their bits.
const DIGITS: u64 = 256;
const DIGIT_BITS: u32 = 8;

/// The sort of `n` ids of a table that has `all` rows of `row_len` elements, and the sums of its rows in elements of `size`
/// bytes: everything but the parts, in memory from `base` on. And how many bytes of it.
pub(crate) fn sorting(base: Address, (n, all, (row_len, size)): (u32, u32, (u64, u64))) -> (Sorting, u64) {
    let mut end = base;
    let mut room = |elements: u64, size: u64| {
        let begin = end;
        end += (elements * size).next_multiple_of(16);
        begin
    };
    let tiles = u64::from(n).div_ceil(TILE).max(1);
    let tiles_of_block = tiles.div_ceil(SORT_BLOCKS);
    let blocks = tiles.div_ceil(tiles_of_block);
    let mut numbers = |elements: u64| room(elements, 4);
    let n_most = u64::from(n.min(all));
    let sorting = Sorting {
        parts: 0,
        keys: [numbers(n.into()), numbers(n.into())],
        places: [numbers(n.into()), numbers(n.into())],
        counts: numbers((blocks + 1) * DIGITS),
        heads: numbers(blocks),
        rows: numbers(n_most),
        starts: numbers(n_most + 1),
        count: numbers(1),
        sums: room(n_most * row_len, size),
        row_len,
        n,
        all,
        parts_n: 0,
        // `all` itself stands for no row.
        passes: (u32::BITS - all.leading_zeros()).div_ceil(DIGIT_BITS),
        blocks: blocks as u32,
        tiles: tiles_of_block as u32,
        chunk: sums_of_chunk(row_len),
        padding: 0,
    };
    (sorting, end - base)
}

/// How many sums of rows of `row_len` columns a block makes.
pub(crate) fn sums_of_chunk(row_len: u64) -> u32 {
    THREADS / row_len.next_power_of_two().clamp(1, u64::from(THREADS)) as u32 * ROUNDS
}

/// How many blocks go over `units` units of `unit` elements, as an update does.
pub(crate) fn blocks_of_units(units: u64, unit: u64) -> u32 {
    blocks(units.saturating_mul(u64::from(lanes_of(unit))))
}

/// The chunks of tensors, each of which has so many units, `of_chunk` of them in a chunk.
///
/// # Errors
///
/// More than 2^31 - 1 chunks, which is as many blocks as a launch can have.
pub(crate) fn chunks(tensors: impl IntoIterator<Item = (u64, u32)>) -> Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    for ((units, of_chunk), tensor) in tensors.into_iter().zip(0u32..) {
        let n = units.div_ceil(u64::from(of_chunk));
        if chunks.len() as u64 + n > i32::MAX as u64 || units > u64::from(u32::MAX) {
            return Err(Error::invalid("vars", "at most 2147483647 blocks of work on one device", units));
        }
        chunks.extend((0..n as u32).map(|i| Chunk { tensor, first: i * of_chunk }));
    }
    Ok(chunks)
}

/// The chunks of tensors of so many elements, by leaves.
#[cfg(test)]
pub(crate) fn chunks_of_leaves(lens: impl IntoIterator<Item = u64>) -> Result<Vec<Chunk>> {
    chunks(lens.into_iter().map(|len| (len.div_ceil(LEAF as u64), LEAVES)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_units_share_a_warp() {
        assert_eq!(units_of_chunk(1024), 16);
        assert_eq!(units_of_chunk(256), 16);
        assert_eq!(units_of_chunk(128), 32);
        assert_eq!(units_of_chunk(64), 64);
        assert_eq!(units_of_chunk(65), 32);
        assert_eq!(units_of_chunk(1), 512);
    }

    #[test]
    fn rows_have_threads_up_to_a_limit() {
        assert_eq!(blocks_of_rows(0, 64), 1);
        assert_eq!(blocks_of_rows(8192, 64), 1024);
        assert_eq!(blocks_of_rows(8192, 3), 128);
        assert_eq!(blocks_of_rows(1 << 40, 1), 4096);
        assert_eq!(blocks_of_units(8192, 64), 256);
        assert_eq!(blocks_of_units(u64::MAX, 64), 4096);
    }

    #[test]
    fn sorts_have_as_many_passes_as_rows_have_bytes() {
        let passes = |all| sorting(0, (10, all, (1, 4))).0.passes;
        assert_eq!([1, 255, 256, 65_535, 65_536, u32::MAX].map(passes), [1, 1, 2, 2, 3, 4]);
        let blocks = |n| {
            let sorting = sorting(0, (n, 100, (1, 4))).0;
            (sorting.blocks, sorting.tiles)
        };
        assert_eq!([0, 1, 1024, 1025, 65_536].map(blocks), [(1, 1), (1, 1), (1, 1), (2, 1), (64, 1)]);
        assert_eq!([512 * 1024, 512 * 1024 + 1, u32::MAX].map(blocks), [(512, 1), (257, 2), (512, 8192)]);
        assert_eq!([1, 64, 100, 1000].map(sums_of_chunk), [512, 8, 4, 2]);
    }

    #[test]
    fn too_much_for_a_launch_is_an_error() {
        assert!(chunks([(u64::from(u32::MAX), 1)]).is_err());
        assert!(chunks([(1 << 33, 1 << 20)]).is_err());
        assert_eq!(chunks([]).expect("nothing fits"), []);
    }

    proptest! {
        #[test]
        fn every_unit_is_in_one_chunk(tensors in prop::collection::vec((0u64..5000, 1u64..2000), 0..40)) {
            let tensors: Vec<(u64, u32)> = tensors.into_iter().map(|(units, unit)| (units, units_of_chunk(unit))).collect();
            let chunks = chunks(tensors.iter().copied()).expect("little work");
            let mut expected = Vec::new();
            for (&(units, of_chunk), tensor) in tensors.iter().zip(0u32..) {
                expected.extend((0..units as u32).step_by(of_chunk as usize).map(|first| Chunk { tensor, first }));
            }
            prop_assert_eq!(chunks, expected);
        }
    }
}
