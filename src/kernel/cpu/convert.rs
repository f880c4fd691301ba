//! Conversions of slices between types of 16 bits and f32, to nearest even.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::isa::F16c;
use crate::element::Element;
use crate::rounding::Half;

/// A type of 16 bits.
pub(super) trait Convert: Half {
    /// Widens all of `from`; the slices are of equal length.
    #[inline(always)]
    fn widen_all(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    /// Narrows all of `from`; the slices are of equal length.
    #[inline(always)]
    fn narrow_all(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::narrow(*from);
        }
    }
}

impl Convert for bf16 {}

/// x86-64 has an instruction for eight of them, if it has AVX2.
#[cfg(target_arch = "x86_64")]
impl Convert for f16 {
    #[inline(always)]
    fn widen_all(from: &[Self], to: &mut [f32]) {
        let done = F16c::detect().map_or(0, |f16c| f16c.widen(from, to));
        for (to, from) in to[done..].iter_mut().zip(&from[done..]) {
            *to = from.widen();
        }
    }

    #[inline(always)]
    fn narrow_all(from: &[f32], to: &mut [Self]) {
        let done = F16c::detect().map_or(0, |f16c| f16c.narrow(from, to));
        for (to, from) in to[done..].iter_mut().zip(&from[done..]) {
            *to = <f16 as Element>::narrow(*from);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Convert for f16 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_converted_as_elements_are() {
        // More than a multiple of the width, with every f16 and numbers of all magnitudes on either side of ties.
        let halves: Vec<f16> = (0..=u16::MAX).chain(0..5).map(f16::from_bits).collect();
        let mut wide = vec![0.0; halves.len()];
        f16::widen_all(&halves, &mut wide);
        for (half, wide) in halves.iter().zip(&wide) {
            let expected = Element::widen(*half);
            assert!(wide.to_bits() == expected.to_bits() || (wide.is_nan() && expected.is_nan()), "{half:?} {wide}");
        }
        let ties = wide.iter().flat_map(|x| [0, 1, 0xfff, 0x1000, 0x1001].map(|d| x.to_bits().wrapping_add(d)));
        let numbers: Vec<f32> = ties.chain((0..u32::MAX).step_by(100_003)).map(f32::from_bits).collect();
        let mut narrow = vec![f16::ZERO; numbers.len()];
        f16::narrow_all(&numbers, &mut narrow);
        for (x, narrow) in numbers.iter().zip(&narrow) {
            let expected = <f16 as Element>::narrow(*x);
            assert!(
                narrow.to_bits() == expected.to_bits() || (narrow.is_nan() && expected.is_nan()),
                "{x:e} {narrow:?}"
            );
        }
    }
}
