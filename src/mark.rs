//! The mark of one row of a table whose rows catch up on missed updates. Pure.
//!
//! | bits | meaning |
//! | --- | --- |
//! | 31 | the moments of the row are zero: it misses decay at most |
//! | 30 | the row is a padding row of some layer |
//! | 17 to 29 | a checksum of the row's weights, 0 if there is none |
//! | 0 to 16 | the update after which the row was last up to date |
//!
//! Catching up leaves zero moments as they are, so no bit of a result depends on whether bit 31 is set for such a row.
//! Marks on a GPU have no checksum.

use half::{bf16, f16};

use crate::ledger::FULL;
use crate::rounding::mix;

/// The bits of the number of an update.
const SINCE: u32 = (1 << 17) - 1;
/// Where the checksum begins.
const CHECKSUM: u32 = 17;
/// The largest checksum.
const LARGEST: u32 = (1 << 13) - 1;

// The number of every update of a ledger fits.
const _: () = assert!(FULL <= SINCE as usize);

/// After which update a row was up to date, and what else is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Mark(u32);

impl Mark {
    /// Its moments are zero.
    pub(crate) const EMPTY: u32 = 1 << 31;
    /// It is a padding row.
    pub(crate) const PADDING: u32 = 1 << 30;

    /// The mark of a row that was up to date when the ledger began, with these flags.
    pub(crate) fn new(flags: u32) -> Self {
        Self(flags)
    }

    /// The mark with these bits, such as a snapshot has.
    pub(crate) fn of_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// The update after which the row was up to date.
    pub(crate) fn since(self) -> usize {
        (self.0 & SINCE) as usize
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 & Self::EMPTY != 0
    }

    pub(crate) fn is_padding(self) -> bool {
        self.0 & Self::PADDING != 0
    }

    /// The checksum of its weights, if one was taken.
    pub(crate) fn checksum(self) -> Option<Checksum> {
        let checksum = (self.0 >> CHECKSUM) & LARGEST;
        (checksum != 0).then_some(Checksum(checksum))
    }

    /// The mark without a checksum.
    pub(crate) fn without_checksum(self) -> Self {
        Self(self.0 & !(LARGEST << CHECKSUM))
    }

    /// The mark with the checksum of weights that were written.
    pub(crate) fn with_checksum(self, checksum: Checksum) -> Self {
        Self(self.without_checksum().0 | checksum.0 << CHECKSUM)
    }

    /// The mark of the row once it has caught up to update `now`.
    pub(crate) fn caught_up(self, now: usize, checksum: Checksum) -> Self {
        Self(self.0 & (Self::EMPTY | Self::PADDING) | now as u32).with_checksum(checksum)
    }

    /// The mark of the row once update `now` has updated it with a gradient.
    pub(crate) fn updated(self, now: usize, checksum: Option<Checksum>) -> Self {
        let mark = Self(self.0 & Self::PADDING | now as u32);
        checksum.map_or(mark, |checksum| mark.with_checksum(checksum))
    }

    /// The mark in a ledger that begins anew: the flags of these that it has.
    pub(crate) fn anew(self, kept: u32) -> Self {
        Self(self.0 & kept)
    }

    /// The mark with flags added.
    pub(crate) fn with(self, flags: u32) -> Self {
        Self(self.0 | flags)
    }
}

/// A checksum of the weights of a row: 1 to 8191. Weights that differ have the same one in one case of 8191.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checksum(u32);

/// A type of weights.
pub(crate) trait Weight: Copy {
    /// Its bits.
    fn bits(self) -> u32;
}

impl Weight for f32 {
    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Weight for f64 {
    #[inline(always)]
    fn bits(self) -> u32 {
        (self.to_bits() as u32).wrapping_add((self.to_bits() >> 32) as u32)
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// So many sums a checksum is made of, so that a loop over weights vectorizes.
const LANES: usize = 16;
/// Odd numbers without a pattern, in which sums with signs would cancel out: those of a linear congruential generator.
const FACTORS: [u32; LANES] = {
    let mut factors = [0x85eb_ca6b; LANES];
    let mut i = 1;
    while i < LANES {
        let next =
            (factors[i - 1] as u64).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        factors[i] = (next >> 32) as u32 | 1;
        i += 1;
    }
    factors
};

impl Checksum {
    /// The checksum of the weights of one row.
    #[inline(always)]
    pub(crate) fn of<W: Weight>(weights: &[W]) -> Self {
        // A rotation tells the places of a lane apart, and an odd factor the lanes.
        let mut lanes = [0u32; LANES];
        let mut add = |weights: &[W]| {
            for (lane, weight) in lanes.iter_mut().zip(weights) {
                *lane = lane.rotate_left(5).wrapping_add(weight.bits());
            }
        };
        let chunks = weights.chunks_exact(LANES);
        let rest = chunks.remainder();
        chunks.for_each(&mut add);
        add(rest);
        let mut sum = 0u32;
        for (lane, factor) in lanes.iter().zip(FACTORS) {
            // The upper bits alone, such as those of signs, would get lost in a sum of products.
            let folded = lane ^ (lane >> 16);
            sum = sum.wrapping_add(folded.wrapping_mul(factor));
        }
        Self(((mix(u64::from(sum)) >> 51) as u32).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes that people make to rows. A checksum of 13 bits may miss one in some thousands.
    #[test]
    fn changed_weights_have_another_checksum() {
        let mut missed = 0;
        let mut tried = 0;
        for len in [1usize, 2, 3, 8, 64, 300] {
            for seed in 0..200u32 {
                let row: Vec<f32> = (0..len as u32).map(|i| ((seed * 977 + i * 31) as f32).sin()).collect();
                let changed: [Vec<f32>; 8] = [
                    row.iter().map(|w| -w).collect(),
                    row.iter().map(|w| w * 2.0).collect(),
                    row.iter().map(|w| w * 0.5).collect(),
                    row.iter().map(|w| w * 0.999).collect(),
                    row.iter().map(|w| w + 1.0).collect(),
                    vec![0.0; len],
                    vec![1.0; len],
                    row.iter()
                        .enumerate()
                        .map(|(i, w)| if i == 0 { f32::from_bits(w.to_bits() ^ 1) } else { *w })
                        .collect(),
                ];
                let of_row = Checksum::of(&row);
                let narrow = |row: &[f32]| Checksum::of(&row.iter().map(|w| bf16::from_f32(*w)).collect::<Vec<_>>());
                let wide = |row: &[f32]| Checksum::of(&row.iter().map(|w| f64::from(*w)).collect::<Vec<_>>());
                for changed in changed.iter().filter(|changed| **changed != row) {
                    tried += 2;
                    missed += usize::from(Checksum::of(changed) == of_row) + usize::from(wide(changed) == wide(&row));
                    if changed.iter().zip(&row).any(|(a, b)| bf16::from_f32(*a) != bf16::from_f32(*b)) {
                        tried += 1;
                        missed += usize::from(narrow(changed) == narrow(&row));
                    }
                }
                if len > 1 && row[0] != row[1] {
                    let mut swapped = row.clone();
                    swapped.swap(0, 1);
                    tried += 1;
                    missed += usize::from(Checksum::of(&swapped) == of_row);
                }
            }
        }
        assert!(missed * 2000 <= tried, "{missed} of {tried}");
    }

    #[test]
    fn parts_of_a_mark() {
        let checksum = Checksum::of(&[1.0f32]);
        let mark = Mark::new(Mark::EMPTY | Mark::PADDING).caught_up(FULL, checksum);
        assert!(mark.is_empty() && mark.is_padding() && mark.since() == FULL && mark.checksum() == Some(checksum));
        let updated = mark.updated(7, None);
        assert!(!updated.is_empty() && updated.is_padding() && updated.since() == 7 && updated.checksum().is_none());
        assert_eq!(mark.anew(Mark::EMPTY), Mark::new(Mark::EMPTY));
        assert_eq!(mark.without_checksum().checksum(), None);
    }
}
