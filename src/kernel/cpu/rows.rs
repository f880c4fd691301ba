//! The rows of tables: updated, gathered and pooled, with the rows to come fetched ahead.
//!
//! Invariant: a row is written by one thread, from beginning to end, so any number of threads gives the same bits.

use candle_core::{Tensor, bail};
use rayon::prelude::*;

use super::isa::prefetch;
use super::{ElementsMut, Isa, Pass};
use crate::element::{Arithmetic, Element};
use crate::kernel::lend::{Borrowed, lend};
use crate::kernel::rows::{RowGrad, RowsView, Summand};
use crate::rule::{self, Coefficients};
use crate::state::{Buffer, ParamState};

/// Up to so many elements one thread is faster; less than for a dense pass, since rows wait for the memory longer.
const SEQUENTIAL: usize = 64 * 1024;
/// More pieces than threads, so that a late thread holds up little.
const PIECES_PER_THREAD: usize = 4;
/// How far ahead of the row that is worked on another one is asked for, in bytes of one array: enough to hide the
/// memory's latency, few enough for the line buffers.
const AHEAD: usize = 2048;

/// The update of the touched rows of one table.
pub(crate) struct RowTask<'a> {
    pub(crate) var: &'a Tensor,
    pub(crate) grad: &'a RowGrad<'a>,
    pub(crate) coefficients: Coefficients<f64>,
    pub(crate) state: &'a mut ParamState,
}

/// Updates the touched rows of all tables.
pub(crate) fn update_rows(tasks: Vec<RowTask<'_>>) -> candle_core::Result<()> {
    let (isa, threads) = (Isa::detect(), rayon::current_num_threads());
    tasks.into_iter().try_for_each(|task| update_table(task, isa, threads))
}

fn update_table(task: RowTask<'_>, isa: Isa, threads: usize) -> candle_core::Result<()> {
    let RowTask { var, grad, coefficients: c, state } = task;
    let borrowed: Vec<Borrowed<'_>> = grad.borrow()?;
    let view = grad.view(&borrowed)?;
    lend(var, |w| match (w, &mut state.exp_avg, &mut state.exp_inf) {
        (ElementsMut::F64(w), Buffer::F64(m), Buffer::F64(u)) => Rows::whole(&view, &c, w, m, u).update(isa, threads),
        (ElementsMut::F32(w), Buffer::F32(m), Buffer::F32(u)) => Rows::whole(&view, &c, w, m, u).update(isa, threads),
        (ElementsMut::F16(w), Buffer::F32(m), Buffer::F32(u)) => Rows::whole(&view, &c, w, m, u).update(isa, threads),
        (ElementsMut::BF16(w), Buffer::F32(m), Buffer::F32(u)) => Rows::whole(&view, &c, w, m, u).update(isa, threads),
        _ => bail!("no CPU kernel for this combination of dtypes"),
    })
}

/// Some of the touched rows, and the part of the table that they are in.
struct Rows<'x, P: Element> {
    view: &'x RowsView<'x>,
    coefficients: Coefficients<P::Acc>,
    /// From which of the touched rows to which.
    from: usize,
    to: usize,
    /// Which row of the table the slices begin with.
    first: usize,
    param: &'x mut [P],
    exp_avg: &'x mut [P::Acc],
    exp_inf: &'x mut [P::Acc],
}

impl<'x, P: Element> Rows<'x, P>
where
    P::Acc: Summand,
{
    fn whole(
        view: &'x RowsView<'x>,
        coefficients: &Coefficients<f64>,
        param: &'x mut [P],
        exp_avg: &'x mut [P::Acc],
        exp_inf: &'x mut [P::Acc],
    ) -> Self {
        let coefficients = coefficients.round();
        Self { view, coefficients, from: 0, to: view.rows.len(), first: 0, param, exp_avg, exp_inf }
    }

    fn update(self, isa: Isa, threads: usize) -> candle_core::Result<()> {
        let (rows, row_len) = (self.view.rows.len(), self.view.row_len);
        if rows == 0 || row_len == 0 {
            return Ok(());
        }
        if threads <= 1 || rows * row_len <= SEQUENTIAL {
            isa.run(self);
        } else {
            let piece = rows.div_ceil(threads * PIECES_PER_THREAD);
            self.cut(piece).into_par_iter().with_max_len(1).for_each(|rows| isa.run(rows));
        }
        Ok(())
    }

    /// Cuts into pieces of `piece` touched rows: rows ascend, so the slices can be cut between any two.
    fn cut(self, piece: usize) -> Vec<Self> {
        let Self { view, coefficients, from, to, first: mut begin, mut param, mut exp_avg, mut exp_inf } = self;
        let mut pieces = Vec::with_capacity((to - from).div_ceil(piece));
        for from in (from..to).step_by(piece) {
            let to = to.min(from + piece);
            let (first, end) = (view.rows[from] as usize, view.rows[to - 1] as usize + 1);
            let (skipped, taken) = ((first - begin) * view.row_len, (end - first) * view.row_len);
            let (w, m, u);
            (w, param) = param.split_at_mut(skipped).1.split_at_mut(taken);
            (m, exp_avg) = exp_avg.split_at_mut(skipped).1.split_at_mut(taken);
            (u, exp_inf) = exp_inf.split_at_mut(skipped).1.split_at_mut(taken);
            begin = end;
            pieces.push(Self { view, coefficients, from, to, first, param: w, exp_avg: m, exp_inf: u });
        }
        pieces
    }
}

impl<P: Element> Pass for Rows<'_, P>
where
    P::Acc: Summand,
{
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { view, coefficients, from, to, first, param, exp_avg, exp_inf } = self;
        let row_len = view.row_len;
        let mut scratch = vec![P::Acc::ZERO; row_len];
        let ahead = rows_ahead(row_len * size_of::<P::Acc>());
        let place = |k: usize| (view.rows[k] as usize - first) * row_len;
        let fetch = |k: usize, param: &[P], exp_avg: &[P::Acc], exp_inf: &[P::Acc]| {
            let place = place(k);
            prefetch(&param[place..place + row_len]);
            prefetch(&exp_avg[place..place + row_len]);
            prefetch(&exp_inf[place..place + row_len]);
            if let Some(grad) = view.first::<P::Acc>(k) {
                prefetch(grad);
            }
        };
        for k in from..to.min(from + ahead) {
            fetch(k, param, exp_avg, exp_inf);
        }
        for k in from..to {
            if k + ahead < to {
                fetch(k + ahead, param, exp_avg, exp_inf);
            }
            let place = place(k);
            let grads = view.row(k, &mut scratch);
            let w = &mut param[place..place + row_len];
            let m = &mut exp_avg[place..place + row_len];
            let u = &mut exp_inf[place..place + row_len];
            for (((w, &g), m), u) in w.iter_mut().zip(grads).zip(m).zip(u) {
                let next;
                (next, *m, *u) = rule::update(&coefficients, w.widen(), g, *m, *u);
                *w = P::narrow(next);
            }
        }
    }
}

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
            prefetch(row(next));
        }
        gathered.extend_from_slice(row(id));
    }
    gathered
}

/// One row for each bag: the sum of its rows, each times its factor, in order, divided by `divisors`; zeros if empty.
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
    pub(crate) fn pooled(self) -> Vec<E> {
        Isa::detect().run(self)
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
                    prefetch(row(next));
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

/// For each id the product of its row with the gradient of its bag: the gradient of its factor.
pub(crate) fn dot_rows<E: Element>(
    table: &[E],
    grad: &[E],
    row_len: usize,
    ids: &[u32],
    bags: impl Iterator<Item = u32>,
) -> Vec<E> {
    let dots = ids.iter().zip(bags).map(|(&id, bag)| {
        let row = &table[id as usize * row_len..][..row_len];
        let grad = &grad[bag as usize * row_len..][..row_len];
        // In f64, where products of f32 are exact: nothing is lost in a long row.
        let dot: f64 = row.iter().zip(grad).map(|(x, g)| x.widen().to_f64() * g.widen().to_f64()).sum();
        E::narrow(E::Acc::from_f64(dot))
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

/// Scales the rows `ids` whose L2 norm is above `max_norm` down to it: `w * max_norm / (norm + 1e-7)`, as PyTorch does.
pub(crate) fn renormalize<E: Element>(table: &mut [E], row_len: usize, ids: &[u32], max_norm: f64) {
    for &id in ids {
        let row = &mut table[id as usize * row_len..][..row_len];
        let norm = row.iter().map(|x| x.widen().to_f64() * x.widen().to_f64()).sum::<f64>().sqrt();
        if norm > max_norm {
            let factor = E::Acc::from_f64(max_norm / (norm + 1e-7));
            row.iter_mut().for_each(|x| *x = E::narrow(x.widen() * factor));
        }
    }
}
