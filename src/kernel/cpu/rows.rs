//! Updates of the touched rows of tables, with the rows to come fetched ahead.
//!
//! Invariant: a row is written by one thread, from beginning to end, so any number of threads gives the same bits.

use candle_core::{Tensor, bail};

use super::chunk::{Lane, ParamChunk};
use super::isa::prefetch;
use super::team::Team;
use super::unit_op::{UpdateArgs, UpdateUnit};
use super::{Isa, Pass};
use crate::kernel::lend::{Borrowed, lend};
use crate::kernel::rows::{RowGrad, RowsView};
use crate::mark::Checksum;
use crate::state::ParamState;

/// Up to so many elements one thread is faster; less than for a dense pass, since rows wait for the memory longer.
pub(super) const SEQUENTIAL: usize = 64 * 1024;
/// More pieces than threads, so that a late thread holds up little.
pub(super) const PIECES_PER_THREAD: usize = 4;
/// How far ahead of the row that is worked on another one is asked for, in bytes of one array: enough to hide the
/// memory's latency, few enough for the line buffers.
const AHEAD: usize = 2048;

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
pub(super) fn threads_for(elements: usize) -> usize {
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
        let chunk = ParamChunk::new(params, state)?;
        if !chunk.has_units_of(row_len) {
            bail!("expected moments by rows");
        }
        let checksums = checksums.map(|checksums| &mut checksums[..]);
        let all = Rows { view: &view, update_args, from: 0, to: rows, chunk: chunk.in_units_of(row_len), checksums };
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
    chunk: ParamChunk<'x>,
    /// One for each of them, if they are wanted.
    checksums: Option<&'x mut [Checksum]>,
}

impl<'x> Rows<'x> {
    /// Cuts into pieces of `piece` touched rows: rows ascend, so the chunk can be cut between any two.
    fn cut(self, piece: usize) -> Vec<Self> {
        let Self { view, update_args, from, to, mut chunk, mut checksums } = self;
        let mut pieces = Vec::with_capacity((to - from).div_ceil(piece));
        for from in (from..to).step_by(piece) {
            let to = to.min(from + piece);
            let (part, rest) = chunk.rows(view.rows[from], view.rows[to - 1]);
            chunk = rest;
            let own = checksums.as_mut().and_then(|checksums| checksums.split_off_mut(..to - from));
            pieces.push(Self { view, update_args, from, to, chunk: part, checksums: own });
        }
        pieces
    }

    #[inline(always)]
    fn update<A: Lane>(self) {
        let Self { view, update_args, from, to, mut chunk, mut checksums } = self;
        let update_args = update_args.prepare::<A>();
        let row_len = view.row_len;
        let (mut scratch, mut sums) = (vec![A::ZERO; row_len], vec![A::ZERO; row_len]);
        let ahead = rows_ahead(row_len * size_of::<A>());
        let first = chunk.first;
        let place = |k: usize| view.rows[k] as usize - first;
        let fetch = |k: usize, chunk: &ParamChunk<'_>| {
            chunk.prefetch(place(k));
            if let Some(grad) = view.first::<A>(k) {
                prefetch(grad);
            }
        };
        for k in from..to.min(from + ahead) {
            fetch(k, &chunk);
        }
        for k in from..to {
            if k + ahead < to {
                fetch(k + ahead, &chunk);
            }
            let op = UpdateUnit { update_args: &update_args, grads: view.row(k, &mut sums) };
            A::update(&mut chunk, &op, place(k), &mut scratch);
            if let Some(checksums) = &mut checksums {
                checksums[k - from] = chunk.checksum(place(k));
            }
        }
    }
}

impl Pass for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.chunk.is_f64() { self.update::<f64>() } else { self.update::<f32>() }
    }
}

/// How many rows of so many bytes ahead to fetch.
pub(super) fn rows_ahead(bytes: usize) -> usize {
    (AHEAD / bytes.max(1)).clamp(1, 64)
}
