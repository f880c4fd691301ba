//! Rows of tables that are looked up: gathered, pooled by bags, and scaled down to a norm, with the rows to come fetched ahead.

use super::isa::prefetch_early;
use super::rows::{PIECES_PER_THREAD, threads_for};
use super::team::Team;
use super::{Isa, Pass};
use crate::element::{Arithmetic, Element};
use crate::kernel::Limit;
use crate::reduce::{Norm, NormType, dot, unit_of};

/// How far ahead of the row that is read another one is asked for, in bytes, into the second cache, which holds more of them
/// until their turn.
const AHEAD: usize = 8192;

/// How many rows of so many bytes ahead to fetch.
fn rows_ahead(bytes: usize) -> usize {
    (AHEAD / bytes.max(1)).clamp(1, 64)
}

/// The rows `ids` of a table, one after another.
pub(crate) fn gather<E: Element>(table: &[E], row_len: usize, ids: &[u32]) -> Vec<E> {
    let row = |id: u32| &table[id as usize * row_len..][..row_len];
    let ahead = rows_ahead(row_len * size_of::<E>());
    let mut gathered = Vec::with_capacity(ids.len() * row_len);
    for (k, &id) in ids.iter().enumerate() {
        if let Some(&next) = ids.get(k + ahead) {
            prefetch_early(row(next));
        }
        gathered.extend_from_slice(row(id));
    }
    gathered
}

/// One row for each bag: the sum of its rows, each times its factor, in order, divided by `divisors`; zeros if empty.
#[derive(Clone, Copy)]
pub(crate) struct Pool<'x, E: Element> {
    pub(crate) table: &'x [E],
    pub(crate) row_len: usize,
    pub(crate) ids: &'x [u32],
    /// The ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    pub(crate) starts: &'x [u32],
    pub(crate) factors: Option<&'x [f64]>,
    /// Whether sums become means.
    pub(crate) mean: bool,
}

impl<E: Element> Pool<'_, E> {
    /// All bags, one after another.
    pub(crate) fn pooled(self) -> candle_core::Result<Vec<E>> {
        let (isa, bags) = (Isa::detect(), self.starts.len().saturating_sub(1));
        let threads = threads_for(self.ids.len() * self.row_len).min(bags);
        if threads <= 1 {
            return Ok(isa.run(self));
        }
        let piece = bags.div_ceil(threads * PIECES_PER_THREAD);
        let part = |from| Self { starts: &self.starts[from..=bags.min(from + piece)], ..self };
        let mut parts: Vec<_> = (0..bags).step_by(piece).map(|from| (part(from), Vec::new())).collect();
        Team::run(threads, |team| {
            team.pieces(parts.iter_mut().collect(), |(part, pooled)| *pooled = isa.run(*part));
            Ok(())
        })?;
        Ok(parts.into_iter().map(|(_, pooled)| pooled).collect::<Vec<_>>().concat())
    }
}

impl<E: Element> Pass for Pool<'_, E> {
    type Output = Vec<E>;

    #[inline(always)]
    fn run(self) -> Vec<E> {
        let Self { table, row_len, ids, starts, factors, mean } = self;
        let row = |id: u32| &table[id as usize * row_len..][..row_len];
        let ahead = rows_ahead(row_len * size_of::<E>());
        let mut pooled = Vec::with_capacity(starts.len().saturating_sub(1) * row_len);
        let mut sums = vec![E::Acc::ZERO; row_len];
        for bag in starts.windows(2) {
            let (from, to) = (bag[0] as usize, bag[1] as usize);
            sums.fill(E::Acc::ZERO);
            for k in from..to {
                if let Some(&next) = ids.get(k + ahead) {
                    prefetch_early(row(next));
                }
                let factor = E::Acc::from_f64(factors.map_or(1.0, |factors| factors[k]));
                for (sum, x) in sums.iter_mut().zip(row(ids[k])) {
                    let x = x.widen() * factor;
                    *sum = if k == from { x } else { *sum + x };
                }
            }
            let count = E::Acc::from_f64((to - from) as f64);
            pooled.extend(sums.iter().map(|&sum| E::narrow(if mean && to > from { sum / count } else { sum })));
        }
        pooled
    }
}

/// For each of the `rows` of a lookup the product with the gradient of its bag: the gradient of its factor.
pub(crate) fn dot_rows<E: Element>(rows: &[E], grad: &[E], row_len: usize, bags: impl Iterator<Item = u32>) -> Vec<E> {
    let dots = bags.enumerate().map(|(position, bag)| {
        let row = &rows[position * row_len..][..row_len];
        let grad = &grad[bag as usize * row_len..][..row_len];
        E::narrow(E::Acc::from_f64(dot(row, grad)))
    });
    dots.collect()
}

/// The position, in `rows`, of the largest element of each column of each bag; the first of several, and a NaN is the
/// largest. `u32::MAX` where a bag is empty.
pub(crate) fn largest<E: Element>(rows: &[E], row_len: usize, starts: &[u32]) -> Vec<u32> {
    let mut positions = Vec::with_capacity(starts.len().saturating_sub(1) * row_len);
    for bag in starts.windows(2) {
        let begin = positions.len();
        positions.resize(begin + row_len, u32::MAX);
        for k in bag[0]..bag[1] {
            let row = &rows[k as usize * row_len..][..row_len];
            for (column, (best, x)) in positions[begin..].iter_mut().zip(row).enumerate() {
                let (x, is_first) = (x.widen(), *best == u32::MAX);
                let old = if is_first { x } else { rows[*best as usize * row_len + column].widen() };
                #[expect(clippy::eq_op, reason = "only a NaN differs from itself")]
                let (old_is_nan, x_is_nan) = (old != old, x != x);
                if is_first || (!old_is_nan && (x > old || x_is_nan)) {
                    *best = k;
                }
            }
        }
    }
    positions
}

/// Scales the rows in `rows`, which are copies of the rows `ids`, down to the L2 norm `max_norm`. Returns the ids of
/// those that were above it, with their norms.
pub(crate) fn limit<E: Element>(rows: &mut [E], row_len: usize, ids: &[u32], max_norm: f64) -> Vec<(u32, Norm)> {
    let mut above = Vec::new();
    if row_len > 0 {
        for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(row_len)) {
            let norm = norm_of(row);
            if norm.is_beyond() || norm.to_f64() > max_norm {
                let factor = factor_of::<E>(norm, max_norm);
                row.iter_mut().for_each(|x| *x = E::narrow(x.widen() * factor));
                above.push((id, norm));
            }
        }
    }
    above
}

/// Scales noted rows of a table down, each if it still has the norm that was noted. Returns their numbers. `changed` gets
/// the row and the column of each element that has another value then.
pub(crate) fn scale_noted<E: Element>(
    table: &mut [E],
    row_len: usize,
    noted: &[(u32, Limit)],
    mut changed: impl FnMut(u32, usize),
) -> Vec<u32> {
    let mut scaled = Vec::with_capacity(noted.len());
    for &(id, Limit { norm, max_norm }) in noted {
        let row = &mut table[id as usize * row_len..][..row_len];
        if norm_of(row) == norm {
            let factor = factor_of::<E>(norm, max_norm);
            for (column, x) in row.iter_mut().enumerate() {
                let old = std::mem::replace(x, E::narrow(x.widen() * factor));
                if old.widen() != x.widen() {
                    changed(id, column);
                }
            }
            scaled.push(id);
        }
    }
    scaled
}

fn norm_of<E: Element>(row: &[E]) -> Norm {
    let squares = |unit: f64| row.iter().map(|x| x.widen().to_f64() / unit).map(|x| x * x).sum::<f64>();
    let sum = squares(1.0);
    if !NormType::L2.is_out_of_range(sum) {
        return NormType::L2.finish(sum, 1.0);
    }
    // Squares of f64 elements leave the range where the elements do not.
    let largest = row.iter().map(|x| x.widen().to_f64().abs()).fold(0.0, f64::max);
    if largest == 0.0 || largest == f64::INFINITY {
        return Norm::of(largest);
    }
    let unit = unit_of(largest);
    NormType::L2.finish(squares(unit), unit)
}

/// A row is scaled down as PyTorch does: `w * max_norm / (norm + 1e-7)`.
fn factor_of<E: Element>(norm: Norm, max_norm: f64) -> E::Acc {
    E::Acc::from_f64(match norm.is_beyond() {
        true => norm.clip_beyond(1.0, max_norm),
        false => max_norm / (norm.to_f64() + 1e-7),
    })
}
