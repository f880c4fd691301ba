//! Rotations of pairs of numbers.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel};

/// Which numbers of a head are a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pairs {
    /// `x[i]` and `x[i + d / 2]`
    Halves,
    /// `x[2 i]` and `x[2 i + 1]`
    Neighbours,
}

/// Rotates the pairs of each head: `(x1 cos - x2 sin, x1 sin + x2 cos)`, by the opposite angle where `back` is set.
///
/// For the head at `i` of the result, `place(i)` is where it begins in `x`, and where its row begins in cos and sin.
pub(crate) fn rotate<T: Element>(
    pairs: Pairs,
    x: &[T],
    (cos, sin): (&[T], &[T]),
    (heads, d): (usize, usize),
    back: bool,
    place: impl Fn(usize) -> (usize, [usize; 2]) + Sync,
) -> Vec<T> {
    let mut out = vec![T::zero(); heads * d];
    let sign = if back { -T::Wide::ONE } else { T::Wide::ONE };
    let half = d / 2;
    parallel::pieces(
        &mut out,
        d,
        #[inline(always)]
        |(start, out)| {
            let mut rooms = [const { Vec::new() }; 4];
            let [x_room, cos_room, sin_room, out_room] = &mut rooms;
            for (i, out) in out.chunks_mut(d.max(1)).enumerate() {
                let (x_at, [cos_at, sin_at]) = place(start / d + i);
                let x = T::widen(&x[x_at..x_at + d], x_room);
                let cos = T::widen(&cos[cos_at..cos_at + half], cos_room);
                let sin = T::widen(&sin[sin_at..sin_at + half], sin_room);
                T::narrow(
                    out,
                    out_room,
                    #[inline(always)]
                    |out| match pairs {
                        Pairs::Halves => {
                            let ((x1, x2), (y1, y2)) = (x.split_at(half), out.split_at_mut(half));
                            lanes::map!(y1, x1 in x1, x2 in x2, cos in cos, sin in sin => {
                                x1 * cos - x2 * (sign * sin)
                            });
                            lanes::map!(y2, x1 in x1, x2 in x2, cos in cos, sin in sin => {
                                x1 * (sign * sin) + x2 * cos
                            });
                        }
                        Pairs::Neighbours => {
                            let (x, out) = (x.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
                            for (((x, out), cos), sin) in x.iter().zip(out).zip(cos).zip(sin) {
                                let sin = sign * *sin;
                                *out = [x[0] * *cos - x[1] * sin, x[0] * sin + x[1] * *cos];
                            }
                        }
                    },
                );
            }
        },
    );
    out
}
