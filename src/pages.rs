//! Zeroed arrays that take memory only where they are written.
//!
//! Large ones come from the system as a mapping of their own, which asks for large pages: an update of a table jumps
//! from row to row, and with pages of 4 KB nearly every row costs a miss in the cache of addresses, too. Invariant: a
//! page that nobody has written is the system's zero page, and costs nothing.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// From so many bytes on an array is a mapping of its own: some large pages of 2 MB each.
const MAPPED: usize = 16 << 20;
/// What is compared with zero at once when an array is filled; a divisor of all page sizes.
const BLOCK: usize = 1024;

/// An array of a fixed length.
pub(crate) struct Pages<T>(Memory<T>);

enum Memory<T> {
    Heap(Vec<T>),
    Mapped { map: MmapMut, len: usize, of: PhantomData<T> },
}

impl<T: Pod> Pages<T> {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let bytes = len.saturating_mul(size_of::<T>());
        if bytes >= MAPPED
            && let Ok(map) = MmapMut::map_anon(bytes)
        {
            // A wish; the array is as good without it, only slower.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            return Self(Memory::Mapped { map, len, of: PhantomData });
        }
        Self(Memory::Heap(vec![T::zeroed(); len]))
    }

    /// A copy of `values`. Blocks of zeros are not written, so that they take no memory here either.
    pub(crate) fn of(values: &[T]) -> Self {
        Self::extended(values, values.len())
    }

    /// A copy of `values` with zeros after them, `len` in all.
    pub(crate) fn extended(values: &[T], len: usize) -> Self {
        let mut pages = Self::zeros(len);
        for (to, from) in pages.chunks_mut(BLOCK).zip(values.chunks(BLOCK)) {
            if bytemuck::cast_slice::<T, u8>(from).iter().any(|&byte| byte != 0) {
                to[..from.len()].copy_from_slice(from);
            }
        }
        pages
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Memory::Heap(values) => values,
            Memory::Mapped { map, len, .. } => &bytemuck::cast_slice(map)[..*len],
        }
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Heap(values) => values,
            Memory::Mapped { map, len, .. } => &mut bytemuck::cast_slice_mut(map)[..*len],
        }
    }
}

/// Asks the system for large pages under memory that somebody else has allocated; small amounts stay as they are.
///
/// Measured: 8,192 rows of a table of 10M x 64 are looked up in 1.4 ms less when it is on pages of 2 MB. What is there
/// already is moved, which takes 0.2 s a gigabyte.
pub(crate) fn advise_huge_pages<T>(values: &[T]) {
    #[cfg(target_os = "linux")]
    if size_of_val(values) >= MAPPED {
        linux::advise_huge_pages(values.as_ptr().addr(), size_of_val(values));
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "no safe crate advises on memory that it has not mapped itself")]
mod linux {
    /// On x86-64, and on AArch64 with pages of 4 KB; where large pages are larger, the system refuses.
    const LARGE: usize = 2 << 20;

    /// For the whole large pages in the `len` bytes from `address` on.
    pub(super) fn advise_huge_pages(address: usize, len: usize) {
        let (from, to) = (address.next_multiple_of(LARGE), (address + len) / LARGE * LARGE);
        if from >= to {
            return;
        }
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
            // SAFETY: neither advice changes what is in the memory, nor whether it may be read or written; of an
            // address that is not mapped the system only says so. A refusal leaves the pages as they are.
            let _ = unsafe { libc::madvise(std::ptr::without_provenance_mut(from), to - from, advice) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_pages_hold_the_same_values() {
        let values: Vec<u32> = (0..MAPPED as u32 / 2).collect();
        advise_huge_pages(&values);
        advise_huge_pages(&values[..7]);
        assert!(values.iter().zip(0..).all(|(&value, i)| value == i));
    }

    #[test]
    fn small_and_large_arrays_are_zeroed_and_hold_what_is_written() {
        for len in [0, 1, 1000, MAPPED / 4, MAPPED / 4 + 3] {
            let mut pages = Pages::<f32>::zeros(len);
            assert_eq!(pages.len(), len);
            assert!(pages.iter().all(|&x| x.to_bits() == 0));
            if let Some(last) = pages.last_mut() {
                *last = -0.0;
            }
            let copy = Pages::of(&pages);
            assert_eq!(copy.len(), len);
            assert_eq!(copy.last().map(|x| x.to_bits()), pages.last().map(|x| x.to_bits()));
        }
        assert!(matches!(Pages::<f64>::zeros(MAPPED / 8).0, Memory::Mapped { .. }));
    }

    /// The resident memory of this process, in bytes.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_not_written_takes_no_memory() {
        const LEN: usize = 1 << 30;
        let before = resident();
        let mut pages = Pages::<f32>::zeros(LEN);
        pages[LEN / 2] = 1.0;
        assert_eq!(pages[LEN - 1], 0.0);
        assert!(resident() < before + (64 << 20), "{before} before, {} after", resident());
    }
}
