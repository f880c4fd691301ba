//! Rounding of what is stored in fewer bits than it is computed in: stochastic, from a counter; and what a nearest
//! rounding leaves over. Pure.
//!
//! Invariant: a random number is a function of the seed, the variable's name, the update and the element's place, and
//! of nothing else: no thread, no order, no other variable changes it.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::element::{self, Element};

/// How f16 and bf16 parameters are rounded after an update; f32 and f64 ones need none.
///
/// A step of Adamax is about `lr`, and bf16 has 8 bits: a weight between 1 and 2 moves by 0.008 or not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Rounding {
    /// To the nearest value. Updates under half a unit in the last place are lost, all of them: with bf16 and the learning
    /// rates of a fine-tuning nearly all, as the [guide](crate::guide::precision) has measured.
    #[default]
    Nearest,
    /// Up or down at random, so that the mean is exact: a weight that is moved by a tenth of a unit in the last place
    /// goes one up in one step of ten. Costs no memory. The random numbers are those of a counter: seed, update, the
    /// variable's name and the element's place. An average that replaces a parameter is rounded like this, too, with
    /// numbers of its own: the counter has the call in place of the update.
    Stochastic,
    /// A master copy in f32 is what is updated; the parameter is its nearest value. For bf16 the copy takes 2 bytes an
    /// element, since its other half is the parameter itself (ties are rounded up there, not to even); for f16, 4
    /// bytes.
    ///
    /// A parameter that somebody else writes (`Var::set`, `VarMap::load`, a mask) is the new master, within half a unit in
    /// its last place: for bf16 the copy's other half stays, and for f16 the copy stays where it still rounds to the
    /// parameter. No write makes the master NaN or infinite, unless it writes such a value. Where this crate writes
    /// parameters, the master is exactly what was written: the average that
    /// [`finalize_ema`](crate::Adamax::finalize_ema) and [`overwrite_frequency`](crate::Ema::overwrite_frequency) write,
    /// rows of [`Table::set_rows`](crate::Table::set_rows), rows that `max_norm` scales.
    Master,
}

/// Mixes all bits of `x` (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", variant 13).
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A key from a key and a number.
pub(crate) fn derive(key: u64, number: u64) -> u64 {
    mix(key.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// The key of a variable, from its name.
pub(crate) fn key_of(name: &str) -> u64 {
    name.bytes().fold(name.len() as u64, |key, byte| derive(key, u64::from(byte)))
}

/// 32 random bits for each element of a block, in their order; the upper ones are the better ones.
///
/// Weyl's sequence and one round of multiplication, as little as leaves no pattern that a mean over neighbors or over
/// updates would show (see the tests): these numbers are a good part of what an update in few bits costs. The sequence is
/// added up, which in a vectorized loop is an addition where element numbers would be multiplied.
pub(crate) struct Randoms(u32);

impl Randoms {
    /// Those of the block that has this key.
    #[inline(always)]
    pub(crate) fn new(key: u32) -> Self {
        Self(key)
    }
}

impl Iterator for Randoms {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        let x = self.0;
        self.0 = x.wrapping_add(0x9e37_79b1);
        Some((x ^ (x >> 15)).wrapping_mul(0x846c_a68b))
    }
}

/// 2^32.
pub(crate) const TWO_32: f32 = 4_294_967_296.0;

/// A random number between -2^31 and 2^31.
#[inline(always)]
pub(crate) fn centered(random: u32) -> f32 {
    random as i32 as f32
}

/// A type of 16 bits that f32 is rounded to.
pub(crate) trait Half: Element<Acc = f32> {
    /// What a master copy keeps beside the value.
    type Residual: bytemuck::Pod + Send + Sync;

    /// The value of a code that is as wide as f32.
    fn widen_bits(bits: u32) -> f32;

    /// The bits of the nearest value.
    fn nearest(x: f32) -> u32;

    /// The bits of a neighbor, up or down, so that the mean over `random` is `x`. What is exact stays exact, and a NaN
    /// a NaN.
    fn stochastic(x: f32, random: u32) -> u32;

    /// The same of a number that is not NaN.
    fn stochastic_plain(x: f32, random: u32) -> u32;

    /// The bits of a nearest value of a number in the range that is not negative; ties, and what would be a subnormal,
    /// are rounded up.
    fn nearest_plain(x: f32) -> u32;

    /// The value of bits whose upper half is zero.
    fn of_bits(bits: u32) -> Self;

    /// A nearest value, and what is left.
    fn split(x: f32) -> (Self, Self::Residual);

    /// Undoes [`split`](Self::split). The value may have been written by somebody else since then: the result is always
    /// within half a unit in the last place of it, and it is NaN or infinite only if the value is.
    fn join(self, rest: Self::Residual) -> f32;
}

impl Half for bf16 {
    type Residual = i16;

    #[inline(always)]
    fn widen_bits(bits: u32) -> f32 {
        element::bf16_to_f32(bits)
    }

    #[inline(always)]
    fn nearest(x: f32) -> u32 {
        element::f32_to_bf16(x)
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }

    #[inline(always)]
    fn stochastic(x: f32, random: u32) -> u32 {
        let nan = (x.to_bits() >> 16) | 0x0040;
        if x.is_nan() { nan } else { Self::stochastic_plain(x, random) }
    }

    #[inline(always)]
    fn stochastic_plain(x: f32, random: u32) -> u32 {
        x.to_bits().wrapping_add(random >> 16) >> 16
    }

    #[inline(always)]
    fn nearest_plain(x: f32) -> u32 {
        x.to_bits().wrapping_add(0x8000) >> 16
    }

    #[inline(always)]
    fn split(x: f32) -> (Self, i16) {
        let bits = x.to_bits();
        // Ties go up: what is left is then -32768 to 32767, and the 32 bits can be put together again.
        let rounded = bits.wrapping_add(0x8000) >> 16;
        let nan = (bits >> 16) | 0x0040;
        let rest = if x.is_nan() { 0 } else { bits as i16 };
        (Self::from_bits(if x.is_nan() { nan } else { rounded } as u16), rest)
    }

    #[inline(always)]
    fn join(self, rest: i16) -> f32 {
        let own = u32::from(self.to_bits()) << 16;
        let joined = f32::from_bits(own.wrapping_add(i32::from(rest) as u32));
        // A zero with a negative rest and an infinity with a positive one were never split: somebody else wrote the
        // value, and the sum leaves the numbers. Every other sum has the sign of the value and is within half a unit of it.
        if joined.is_nan() { f32::from_bits(own) } else { joined }
    }
}

/// From f32's bias to f16's.
const F16_BIAS: u32 = 15u32.wrapping_sub(127) << 23;
/// f16's smallest normal number, 2^-14, in f32's bits.
const F16_NORMAL: u32 = 0x3880_0000;
const TWO_23: f32 = 8_388_608.0;
const TWO_24: f32 = 16_777_216.0;

/// The bits of a subnormal f16 beside `x`, which is not negative: in units of 2^-24, a random number less one half is
/// added, and f32's own end rounds the sum to a whole number.
#[inline(always)]
fn subnormal(x: f32, random: u32) -> u32 {
    let noise = centered(random ^ (1 << 31)) * (1.0 / TWO_32);
    let units = x * TWO_24 + noise;
    ((if units > 0.0 { units } else { 0.0 }) + TWO_23).to_bits() & 0x7ff
}

impl Half for f16 {
    type Residual = f32;

    #[inline(always)]
    fn widen_bits(bits: u32) -> f32 {
        element::f16_to_f32(bits)
    }

    #[inline(always)]
    fn nearest(x: f32) -> u32 {
        element::f32_to_f16(x)
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }

    #[inline(always)]
    fn stochastic(x: f32, random: u32) -> u32 {
        const OVERFLOW: u32 = 0x4780_0000; // 2^16
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let sign = (x.to_bits() >> 16) & 0x8000;
        // A whole number of the smallest steps stays one.
        let units = f32::from_bits(magnitude) * TWO_24;
        let is_whole = magnitude < F16_NORMAL && (units + TWO_23) - TWO_23 == units;
        let random = if is_whole { 1 << 31 } else { random };
        let finite = Self::stochastic_plain(f32::from_bits(magnitude), random);
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        sign | if magnitude >= OVERFLOW { special } else { finite }
    }

    #[inline(always)]
    fn stochastic_plain(x: f32, random: u32) -> u32 {
        let sign = (x.to_bits() >> 16) & 0x8000;
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let normal = magnitude.wrapping_add(F16_BIAS).wrapping_add(random >> 19) >> 13;
        sign | if magnitude < F16_NORMAL { subnormal(f32::from_bits(magnitude), random) } else { normal }
    }

    #[inline(always)]
    fn nearest_plain(x: f32) -> u32 {
        let normal = x.to_bits().wrapping_add(F16_BIAS + 0x1000) >> 13;
        let rounded = x + 0.5;
        let up = u32::from(rounded - 0.5 < x);
        let subnormal = rounded.to_bits().wrapping_sub(0.5f32.to_bits()) + up;
        if x.to_bits() < F16_NORMAL { subnormal } else { normal }
    }

    #[inline(always)]
    fn split(x: f32) -> (Self, f32) {
        (Self::narrow(x), x)
    }

    #[inline(always)]
    fn join(self, rest: f32) -> f32 {
        let own = self.widen();
        if Self::narrow(rest).to_bits() == self.to_bits() { rest } else { own }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all magnitudes and signs.
    fn sweep() -> impl Iterator<Item = f32> {
        (0..=u32::MAX).step_by(64_997).map(f32::from_bits)
    }

    #[test]
    fn a_master_is_put_together_again() {
        for x in sweep() {
            let (value, rest) = <bf16 as Half>::split(x);
            assert_eq!(value.is_nan(), x.is_nan(), "{x:e}");
            if !x.is_nan() {
                assert_eq!(value.join(rest).to_bits(), x.to_bits(), "{x:e}");
                let nearest = <bf16 as Element>::narrow(x);
                let is_tie = x.to_bits() & 0xffff == 0x8000;
                assert!(is_tie || value.to_bits() == nearest.to_bits(), "{x:e}");
            }
            let (value, rest) = <f16 as Half>::split(x);
            if !x.is_nan() {
                assert_eq!(value.join(rest).to_bits(), x.to_bits(), "{x:e}");
            }
            // A weight that somebody has set is no longer what was split.
            assert_eq!(f16::from_f32(7.0).join(1.0), 7.0);
        }
    }

    /// All bf16 values with all rests, whether `split` made the pair or somebody else wrote the value.
    #[test]
    fn a_value_of_bf16_and_any_rest_are_a_master() {
        use rayon::prelude::*;
        (0..=u16::MAX).into_par_iter().for_each(|bits| {
            let value = bf16::from_bits(bits);
            let (own, exact) = (u32::from(bits) << 16, value.to_f32());
            if value.is_nan() {
                assert!((i16::MIN..=i16::MAX).all(|rest| value.join(rest).is_nan()), "{bits:#06x}");
                return;
            }
            let (least, most) = match bits & 0x7fff {
                0 => (0, i16::MAX),
                0x7f80 => (i16::MIN, 0),
                _ => (i16::MIN, i16::MAX),
            };
            let is_right = |rest: i16| {
                let joined = value.join(rest);
                if (least..=most).contains(&rest) {
                    let (again, rest_again) = <bf16 as Half>::split(joined);
                    joined.to_bits() == own.wrapping_add(i32::from(rest) as u32)
                        && (again.to_bits(), rest_again) == (bits, rest)
                } else {
                    joined.to_bits() == own
                }
            };
            assert!((i16::MIN..=i16::MAX).all(is_right), "{bits:#06x}");
            // The bits of all sums are consecutive, so that those of the largest rests are the farthest away. An infinity
            // counts as 2^128.
            let number = |x: f32| if x.is_infinite() { 2f64.powi(128).copysign(x.into()) } else { f64::from(x) };
            let next = f64::from(f32::from_bits((own & 0x7fff_ffff) + if exact.is_finite() { 1 << 16 } else { 0 }));
            let unit = if next.is_finite() { next - f64::from(exact.abs()) } else { 2f64.powi(120) };
            for rest in [i16::MIN, -1, 0, 1, i16::MAX] {
                let joined = value.join(rest);
                assert!((number(joined) - number(exact)).abs() <= unit / 2.0, "{bits:#06x} {rest}");
                assert!(joined.is_finite() || exact.is_infinite(), "{bits:#06x} {rest}");
                assert!(joined.is_sign_positive() == exact.is_sign_positive(), "{bits:#06x} {rest}");
            }
        });
    }

    #[test]
    fn a_value_of_f16_and_any_copy_are_a_master() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let exact = value.to_f32();
            for copy in sweep().step_by(64).chain([0.0, -0.0, f32::INFINITY, f32::NAN, exact, exact * 1.000_4, -exact])
            {
                let joined = value.join(copy);
                assert_eq!(joined.is_nan(), value.is_nan(), "{bits:#06x} {copy:e}");
                if !value.is_nan() {
                    assert_eq!(f16::narrow(joined).to_bits(), bits, "{copy:e}");
                    assert!(joined.to_bits() == copy.to_bits() || joined.to_bits() == exact.to_bits());
                }
            }
        }
    }

    #[test]
    fn stochastic_rounding_takes_a_neighbor_and_keeps_what_is_exact() {
        for x in sweep() {
            for random in [0, 0x1fff_0000, 0x7fff_ffff, u32::MAX, 0x8000_8000] {
                let (b, h) = (
                    bf16::of_bits(<bf16 as Half>::stochastic(x, random)),
                    f16::of_bits(<f16 as Half>::stochastic(x, random)),
                );
                if x.is_nan() {
                    assert!(b.is_nan() && h.is_nan());
                    continue;
                }
                let (b, h) = (b.to_f32(), h.to_f32());
                assert!(b.is_infinite() || (b - x).abs() <= x.abs() * 2f32.powi(-7) + 1e-40, "bf16 {x:e} {b:e}");
                let spacing = (x.abs() * 2f32.powi(-10)).max(2f32.powi(-24));
                assert!(h.is_infinite() || (h - x).abs() <= spacing, "f16 {x:e} {h:e}");
                assert!(b.is_sign_positive() == x.is_sign_positive() && h.is_sign_positive() == x.is_sign_positive());
            }
        }
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            for random in [0, u32::MAX] {
                if !b.is_nan() {
                    assert_eq!(bf16::of_bits(<bf16 as Half>::stochastic(b.to_f32(), random)).to_bits(), bits);
                }
                if !h.is_nan() {
                    assert_eq!(
                        f16::of_bits(<f16 as Half>::stochastic(h.to_f32(), random)).to_bits(),
                        bits,
                        "{h:e} {random:#x}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_mean_of_stochastic_rounding_is_exact() {
        let n = 100_000;
        for x in [1.001f32, -0.3, 3e-5, 1.2e-7, 1000.3] {
            let mean = |round: &dyn Fn(u32) -> f32| {
                Randoms::new(7).take(n).map(|r| f64::from(round(r))).sum::<f64>() / n as f64
            };
            let b = mean(&|random| bf16::of_bits(<bf16 as Half>::stochastic(x, random)).to_f32());
            let h = mean(&|random| f16::of_bits(<f16 as Half>::stochastic(x, random)).to_f32());
            let x = f64::from(x);
            // Three standard deviations of a mean of n draws of one spacing or none.
            assert!((b - x).abs() < x.abs() / 128.0 * 1.5 / (n as f64).sqrt(), "bf16 {x} {b}");
            let spacing = (x.abs() / 1024.0).max(2f64.powi(-24));
            assert!((h - x).abs() < spacing * 1.5 / (n as f64).sqrt(), "f16 {x} {h}");
        }
    }

    #[test]
    fn keys_and_random_numbers_differ() {
        let mut seen = std::collections::HashSet::new();
        for (i, random) in Randoms::new(1).take(10_000).enumerate() {
            assert!(seen.insert(random), "element {i}");
        }
        assert_ne!(key_of("a.weight"), key_of("b.weight"));
        assert_ne!(key_of("ab"), key_of("ba"));
        assert_ne!(derive(1, 2), derive(2, 1));
        let ones: u32 = Randoms::new(3).take(10_000).map(u32::count_ones).sum();
        assert!((159_000..161_000).contains(&ones), "{ones}");
    }
}
