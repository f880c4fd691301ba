//! The element types of parameters and gradients, and the type in which each is computed with.
//!
//! f16 and bf16 are widened to f32, worked with, and rounded once, to nearest even. The conversions have no branch and
//! no call, so that a loop over them vectorises: those of `half` ask for the CPU's features at every element.
//! Invariant: they give the bits of `half`'s for every value that is not a NaN, and a NaN for a NaN.

use half::{bf16, f16};

/// A type that parameters and gradients are stored in.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// The type of the arithmetic on it, which is also the type of its moments.
    type Acc: Arithmetic;

    /// The same value in the arithmetic's type; exact.
    fn widen(self) -> Self::Acc;

    /// The nearest value of this type, ties to even.
    fn narrow(x: Self::Acc) -> Self;
}

/// A type that the update is computed in: f32 or f64.
pub(crate) trait Arithmetic:
    Element<Acc = Self>
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
{
    /// Zero.
    const ZERO: Self;

    /// The largest finite number.
    const LARGEST: f64;

    /// The absolute value; a NaN stays one.
    fn abs(self) -> Self;

    /// The nearest value of this type.
    fn from_f64(x: f64) -> Self;

    /// The same value; exact.
    fn to_f64(self) -> f64;
}

macro_rules! arithmetic {
    ($t:ty) => {
        impl Element for $t {
            type Acc = $t;

            #[inline(always)]
            fn widen(self) -> $t {
                self
            }

            #[inline(always)]
            fn narrow(x: $t) -> $t {
                x
            }
        }

        impl Arithmetic for $t {
            const ZERO: Self = 0.0;
            const LARGEST: f64 = <$t>::MAX as f64;

            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}

arithmetic!(f32);
arithmetic!(f64);

impl Element for bf16 {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        bf16_to_f32(u32::from(self.to_bits()))
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_bits(f32_to_bf16(x) as u16)
    }
}

impl Element for f16 {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f16_to_f32(u32::from(self.to_bits()))
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_bits(f32_to_f16(x) as u16)
    }
}

/// The value of a bf16's bits.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// The bits of the nearest bf16.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    // Adding just under half of the last kept place, and the last kept bit itself, rounds ties to even.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // The addition could carry a NaN's payload into infinity; a quiet bit keeps it a NaN.
    let nan = (bits >> 16) | 0x0040;
    if x.is_nan() { nan } else { rounded }
}

/// The value of an f16's bits.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u32) -> f32 {
    const INFINITE: u32 = 0x7c00 << 13; // f16's largest exponent, in f32's place
    const SMALLEST_NORMAL: f32 = 6.103_515_6e-5; // 2^-14
    let sign = (bits & 0x8000) << 16;
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + ((127 - 15) << 23);
    // A subnormal is put behind the smallest normal's exponent, which the subtraction takes away again: exact.
    let subnormal = (f32::from_bits(magnitude + (113 << 23)) - SMALLEST_NORMAL).to_bits();
    let special = magnitude | 0x7f80_0000;
    let finite = if magnitude < 1 << 23 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude >= INFINITE { special } else { finite })
}

/// The bits of the nearest f16.
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u32 {
    const OVERFLOW: u32 = 0x4780_0000; // 2^16: everything from here on is infinite
    const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
    const INFINITE: u32 = 0x7c00;
    let sign = (x.to_bits() >> 16) & 0x8000;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    // As for bf16; the exponent is moved from f32's bias to f16's in the same addition. From 65520 on this gives infinity.
    let normal =
        magnitude.wrapping_add((15u32.wrapping_sub(127) << 23).wrapping_add(0xfff)).wrapping_add((magnitude >> 13) & 1)
            >> 13;
    // Adding one half leaves f16's subnormal places, 2^-24 apart, as the last bits of the sum, rounded to even.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { INFINITE };
    sign | if magnitude >= OVERFLOW { special } else { finite }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_value() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert_eq!(Element::widen(h).is_nan(), h.is_nan());
            assert_eq!(Element::widen(b).is_nan(), b.is_nan());
            if !h.is_nan() {
                assert_eq!(Element::widen(h).to_bits(), h.to_f32().to_bits(), "f16 {bits:#06x}");
            }
            if !b.is_nan() {
                assert_eq!(Element::widen(b).to_bits(), b.to_f32().to_bits(), "bf16 {bits:#06x}");
            }
        }
    }

    #[test]
    fn narrowing_rounds_as_half_does() {
        // A prime stride meets every exponent with mantissas of all kinds; then all ties and their neighbours.
        let sweep = (0..=u32::MAX).step_by(1009);
        let ties = (0..=u16::MAX).flat_map(|bits| {
            [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()].into_iter().flat_map(|x| {
                [0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001].map(|d| x.to_bits().wrapping_add(d))
            })
        });
        for bits in sweep.chain(ties) {
            let x = f32::from_bits(bits);
            let (h, b) = (<f16 as Element>::narrow(x), <bf16 as Element>::narrow(x));
            assert_eq!(h.is_nan(), x.is_nan(), "{bits:#010x}");
            assert_eq!(b.is_nan(), x.is_nan(), "{bits:#010x}");
            if !x.is_nan() {
                assert_eq!(h.to_bits(), f16::from_f32(x).to_bits(), "f16 from {bits:#010x}");
                assert_eq!(b.to_bits(), bf16::from_f32(x).to_bits(), "bf16 from {bits:#010x}");
            }
        }
    }
}
