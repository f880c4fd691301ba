//! The rows of tables: updated, gathered and pooled, with the rows to come fetched ahead.
//!
//! Invariant: a row is written by one thread, from beginning to end, so any number of threads gives the same bits.

use candle_core::{Tensor, bail};

use super::isa::{prefetch, prefetch_early};
use super::span::{CatchUpRow, Lane, Span, UpdateArgs, UpdateUnit};
use super::team::Team;
use super::{Elements, Isa, Pass};
use crate::codec::Limits;
use crate::element::{Arithmetic, Element};
use crate::kernel::Limit;
use crate::kernel::lend::{Borrowed, lend};
use crate::kernel::rows::{RowGrad, RowsView};
use crate::ledger::Ledger;
use crate::mark::{Checksum, Mark, Weight};
use crate::reduce::{Norm, NormType, dot, unit_of};
use crate::rounding::Rounding;
use crate::state::ParamState;

/// Up to so many elements one thread is faster; less than for a dense pass, since rows wait for the memory longer.
const SEQUENTIAL: usize = 64 * 1024;
/// More pieces than threads, so that a late thread holds up little.
const PIECES_PER_THREAD: usize = 4;
/// How far ahead of the row that is worked on another one is asked for, in bytes of one array: enough to hide the
/// memory's latency, few enough for the line buffers.
const AHEAD: usize = 2048;
/// The same for a loop that only reads rows, into the second cache, which holds more of them until their turn.
const AHEAD_OF_READING: usize = 8192;

/// The update of the touched rows of one table.
pub(crate) struct RowTask<'a> {
    /// Which of the call's gradients it has, in the order in which their norms are joined.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by the CUDA kernels"))]
    pub(crate) nth: usize,
    pub(crate) var: &'a Tensor,
    pub(crate) grad: &'a RowGrad<'a>,
    pub(crate) update_args: UpdateArgs,
    pub(crate) state: &'a mut ParamState,
    /// Where the checksums of the touched rows go, if they are wanted.
    pub(crate) checksums: Option<&'a mut Vec<Checksum>>,
}

impl RowTask<'_> {
    fn elements(&self) -> usize {
        self.grad.rows().map_or(0, <[u32]>::len) * self.grad.row_len
    }
}

/// Updates the touched rows of all tables, one after another.
pub(crate) fn update_rows(tasks: Vec<RowTask<'_>>) -> candle_core::Result<()> {
    let isa = Isa::detect();
    let threads = threads_for(tasks.iter().map(RowTask::elements).max().unwrap_or(0));
    Team::run(threads, |team| tasks.into_iter().try_for_each(|task| update_table(task, isa, threads, team)))
}

/// How many threads are to work on so many elements of rows.
fn threads_for(elements: usize) -> usize {
    if elements <= SEQUENTIAL { 1 } else { rayon::current_num_threads() }
}

fn update_table(task: RowTask<'_>, isa: Isa, threads: usize, team: Team) -> candle_core::Result<()> {
    let elements = task.elements();
    let RowTask { var, grad, update_args, state, mut checksums, .. } = task;
    if let Some(checksums) = &mut checksums {
        checksums.clear();
        checksums.resize(grad.rows().map_or(0, <[u32]>::len), Checksum::of::<f32>(&[]));
    }
    if elements == 0 {
        return Ok(());
    }
    lend(var, |params| {
        let borrowed: Vec<Borrowed<'_>> = grad.borrow()?;
        let view = grad.view(&borrowed)?;
        let (rows, row_len) = (view.rows.len(), view.row_len);
        let span = Span::new(params, state)?;
        if !span.has_units_of(row_len) {
            bail!("expected moments by rows");
        }
        let checksums = checksums.map(|checksums| &mut checksums[..]);
        let all = Rows { view: &view, update_args, from: 0, to: rows, span: span.in_units_of(row_len), checksums };
        if threads <= 1 || elements <= SEQUENTIAL {
            isa.run(all);
        } else {
            team.pieces(all.cut(rows.div_ceil(threads * PIECES_PER_THREAD)), |piece| isa.run(piece));
        }
        Ok(())
    })
}

/// Some of the touched rows, and the part of the table that they are in.
struct Rows<'x> {
    view: &'x RowsView<'x>,
    update_args: UpdateArgs,
    /// From which of the touched rows to which.
    from: usize,
    to: usize,
    span: Span<'x>,
    /// One for each of them, if they are wanted.
    checksums: Option<&'x mut [Checksum]>,
}

impl<'x> Rows<'x> {
    /// Cuts into pieces of `piece` touched rows: rows ascend, so the span can be cut between any two.
    fn cut(self, piece: usize) -> Vec<Self> {
        let Self { view, update_args, from, to, mut span, mut checksums } = self;
        let mut pieces = Vec::with_capacity((to - from).div_ceil(piece));
        for from in (from..to).step_by(piece) {
            let to = to.min(from + piece);
            let (part, rest) = span.rows(view.rows[from], view.rows[to - 1]);
            span = rest;
            let own = checksums.as_mut().and_then(|checksums| checksums.split_off_mut(..to - from));
            pieces.push(Self { view, update_args, from, to, span: part, checksums: own });
        }
        pieces
    }

    #[inline(always)]
    fn update<A: Lane>(self) {
        let Self { view, update_args, from, to, mut span, mut checksums } = self;
        let update_args = update_args.prepare::<A>();
        let row_len = view.row_len;
        let (mut scratch, mut sums) = (vec![A::ZERO; row_len], vec![A::ZERO; row_len]);
        let ahead = rows_ahead(row_len * size_of::<A>());
        let first = span.first;
        let place = |k: usize| view.rows[k] as usize - first;
        let fetch = |k: usize, span: &Span<'_>| {
            span.prefetch(place(k));
            if let Some(grad) = view.first::<A>(k) {
                prefetch(grad);
            }
        };
        for k in from..to.min(from + ahead) {
            fetch(k, &span);
        }
        for k in from..to {
            if k + ahead < to {
                fetch(k + ahead, &span);
            }
            let job = UpdateUnit { update_args: &update_args, grads: view.row(k, &mut sums) };
            A::update(&mut span, &job, place(k), &mut scratch);
            if let Some(checksums) = &mut checksums {
                checksums[k - from] = span.checksum(place(k));
            }
        }
    }
}

impl Pass for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.span.is_f64() { self.update::<f64>() } else { self.update::<f32>() }
    }
}

/// Applies the updates that rows of one table have missed.
pub(crate) struct CatchUpTask<'a> {
    pub(crate) var: &'a Tensor,
    pub(crate) row_len: usize,
    pub(crate) ledger: &'a Ledger,
    pub(crate) rounding: Rounding,
    /// Key of the random numbers, from seed, variable and the last update.
    pub(crate) key: u64,
    pub(crate) state: &'a mut ParamState,
}

/// What is done about rows whose weights have been written since they were up to date, other than by this crate.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Written {
    /// Nothing is changed, and the first of them is named.
    Refused,
    /// Nothing is changed, whether there is one, which is named, or not.
    Sought,
    /// Their weights stand as they are; their moments catch up.
    Stands,
}

/// Brings rows up to date, ascending, each with its mark, which becomes that of a row that is up to date. Returns the first row that
/// was found to be written, if that is refused. Whoever calls it may hold a mutex: nobody who works on the rows takes one,
/// and the caller takes no other tasks while it waits.
pub(crate) fn catch_up_rows(
    task: CatchUpTask<'_>,
    rows: &mut [(u32, Mark)],
    written: Written,
) -> candle_core::Result<Option<u32>> {
    let CatchUpTask { var, row_len, ledger, rounding, key, state } = task;
    let limits = state.moments.layout.encoding.limits();
    if rows.is_empty() || row_len == 0 {
        return Ok(None);
    }
    let (isa, threads) = (Isa::detect(), threads_for(rows.len() * row_len));
    let piece = rows.len().div_ceil(if threads <= 1 { 1 } else { threads * PIECES_PER_THREAD });
    Team::run(threads, |team| {
        lend(var, |params| {
            let span = Span::new(params, state)?;
            if !span.has_units_of(row_len) {
                bail!("expected moments by rows");
            }
            let span = span.in_units_of(row_len);
            team.pieces(rows.chunks_mut(piece).collect(), |rows| isa.run(CheckPass { rows, span: &span }));
            let found = rows.iter().find(|(_, mark)| mark.checksum().is_some()).map(|(row, _)| *row);
            match written {
                Written::Sought => return Ok(found),
                Written::Refused if found.is_some() => return Ok(found),
                Written::Refused | Written::Stands => {}
            }
            let pass = CatchUpPass { rows, ledger, limits, rounding, key, span };
            team.pieces(pass.cut(piece), |piece| isa.run(piece));
            Ok(None)
        })
    })
}

/// Compares weights with the checksums of their marks: afterwards only the marks of rows that were written have one.
struct CheckPass<'x> {
    rows: &'x mut [(u32, Mark)],
    span: &'x Span<'x>,
}

impl Pass for CheckPass<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { rows, span } = self;
        let ahead = rows_ahead(span.unit * size_of::<f32>());
        for k in 0..rows.len() {
            if let Some((next, _)) = rows.get(k + ahead) {
                span.prefetch_params(*next as usize);
            }
            let (row, mark) = rows[k];
            if let Some(checksum) = mark.checksum()
                && span.checksum(row as usize) == checksum
            {
                rows[k].1 = mark.without_checksum();
            }
        }
    }
}

/// The checksums of these rows of a table.
pub(crate) fn checksums(table: Elements<'_>, row_len: usize, rows: &[u32]) -> Vec<Checksum> {
    fn of<W: Weight>(table: &[W], row_len: usize, rows: &[u32]) -> Vec<Checksum> {
        rows.iter().map(|&row| Checksum::of(&table[row as usize * row_len..][..row_len])).collect()
    }
    match table {
        Elements::F64(table) => of(table, row_len, rows),
        Elements::F32(table) => of(table, row_len, rows),
        Elements::F16(table) => of(table, row_len, rows),
        Elements::BF16(table) => of(table, row_len, rows),
    }
}

/// Some of the rows that catch up, and the part of the table that they are in.
struct CatchUpPass<'x> {
    rows: &'x mut [(u32, Mark)],
    ledger: &'x Ledger,
    limits: Limits,
    rounding: Rounding,
    key: u64,
    span: Span<'x>,
}

impl<'x> CatchUpPass<'x> {
    fn cut(self, piece: usize) -> Vec<Self> {
        let Self { rows, ledger, limits, rounding, key, mut span } = self;
        let mut pieces = Vec::with_capacity(rows.len().div_ceil(piece));
        for rows in rows.chunks_mut(piece) {
            let (part, rest) = span.rows(rows[0].0, rows[rows.len() - 1].0);
            span = rest;
            pieces.push(Self { rows, ledger, limits, rounding, key, span: part });
        }
        pieces
    }

    #[inline(always)]
    fn catch_up<A: Lane>(self) {
        let Self { rows, ledger, limits, rounding, key, mut span } = self;
        let row_len = span.unit;
        let mut scratch = vec![A::ZERO; row_len];
        let ahead = rows_ahead(row_len * size_of::<A>());
        let first = span.first;
        let fetch = |(row, mark): (u32, Mark), span: &Span<'_>| {
            let place = row as usize - first;
            if mark.is_empty() { span.prefetch_params(place) } else { span.prefetch(place) }
        };
        for next in rows.iter().take(ahead) {
            fetch(*next, &span);
        }
        for k in 0..rows.len() {
            if let Some(next) = rows.get(k + ahead) {
                fetch(*next, &span);
            }
            let (row, mark) = rows[k];
            let place = row as usize - first;
            let mut missed = ledger.missed::<A>(mark.since());
            if mark.checksum().is_some() {
                span.drop_master(place);
                missed = missed.standing();
            }
            let (is_empty, is_padding) = (mark.is_empty(), mark.is_padding());
            let job = CatchUpRow { missed, is_empty, is_padding, limits, rounding, key };
            A::catch_up(&mut span, &job, place, &mut scratch);
            rows[k].1 = mark.caught_up(ledger.now(), span.checksum(place));
        }
    }
}

impl Pass for CatchUpPass<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.span.is_f64() { self.catch_up::<f64>() } else { self.catch_up::<f32>() }
    }
}

/// How many rows of so many bytes ahead to fetch.
fn rows_ahead(bytes: usize) -> usize {
    (AHEAD / bytes.max(1)).clamp(1, 64)
}

/// The same where they are only read.
fn rows_ahead_of_reading(bytes: usize) -> usize {
    (AHEAD_OF_READING / bytes.max(1)).clamp(1, 64)
}

/// The rows `ids` of a table, one after another.
pub(crate) fn gather<E: Element>(table: &[E], row_len: usize, ids: &[u32]) -> Vec<E> {
    let row = |id: u32| &table[id as usize * row_len..][..row_len];
    let ahead = rows_ahead_of_reading(row_len * size_of::<E>());
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
        let ahead = rows_ahead_of_reading(row_len * size_of::<E>());
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
