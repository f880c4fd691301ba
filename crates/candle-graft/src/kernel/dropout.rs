//! Factors of dropout, which are computed from the place of an element.

use super::element::Element;
use super::parallel;
use super::real::Real;

/// How many elements share a key, which comes from the seed and the number of their block.
const BLOCK: usize = 1024;

/// The factors of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    /// A draw of 32 bits below it is a 0.
    bound: u32,
    /// The factor of the others.
    factor: f64,
    seed: u64,
}

impl Factors {
    pub(crate) fn new(p: f64, seed: u64) -> Self {
        Self { bound: (p * 2f64.powi(32)) as u32, factor: 1.0 / (1.0 - p), seed }
    }

    /// `x` times the factors.
    pub(crate) fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        let (bound, factor) = (self.bound, T::Wide::of(self.factor));
        let mut out = vec![T::zero(); x.len()];
        parallel::pieces(
            &mut out,
            BLOCK,
            #[inline(always)]
            |(start, out)| {
                let [mut x_room, mut out_room] = [const { Vec::new() }; 2];
                for (i, out) in out.chunks_mut(BLOCK).enumerate() {
                    let at = start + i * BLOCK;
                    let key = mixed(self.seed ^ mixed((at / BLOCK) as u64));
                    let x = T::widen(&x[at..][..out.len()], &mut x_room);
                    T::narrow(
                        out,
                        &mut out_room,
                        #[inline(always)]
                        |out| {
                            for (k, (out, x)) in (0u32..).zip(out.iter_mut().zip(x)) {
                                *out = if draw(key, k) < bound { T::Wide::ZERO } else { *x * factor };
                            }
                        },
                    );
                }
            },
        );
        out
    }
}

/// The output function of `SplitMix64` (Steele, Lea & Flood 2014).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// 32 bits for an element of a block: the finalizer of `MurmurHash3` over its place, between the halves of the key. It is
/// of 32 bits since these vectorize.
#[inline(always)]
fn draw(key: u64, place: u32) -> u32 {
    let x = place.wrapping_mul(0x9e37_79b9) ^ key as u32;
    let x = (x ^ x >> 16).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35) ^ (key >> 32) as u32;
    let x = (x ^ x >> 16).wrapping_mul(0x85eb_ca6b);
    x ^ x >> 15
}
