//! Rows of tables with `SparseUpdate::Exact` catch up on the updates that they have missed, and are compared with their
//! checksums before.

use candle_core::{Tensor, bail};

use super::chunk::{Lane, ParamChunk};
use super::rows::{PIECES_PER_THREAD, rows_ahead, threads_for};
use super::team::Team;
use super::unit_op::CatchUpRow;
use super::{Elements, Isa, Pass};
use crate::codec::Limits;
use crate::kernel::lend::lend;
use crate::ledger::Ledger;
use crate::mark::{Checksum, Mark, Weight};
use crate::rounding::Rounding;
use crate::state::ParamState;

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

/// Treatment of rows whose weights others have written since the rows were up to date.
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
            let chunk = ParamChunk::new(params, state)?;
            if !chunk.has_units_of(row_len) {
                bail!("expected moments by rows");
            }
            let chunk = chunk.in_units_of(row_len);
            team.pieces(rows.chunks_mut(piece).collect(), |rows| isa.run(CheckPass { rows, chunk: &chunk }));
            let found = rows.iter().find(|(_, mark)| mark.checksum().is_some()).map(|(row, _)| *row);
            match written {
                Written::Sought => return Ok(found),
                Written::Refused if found.is_some() => return Ok(found),
                Written::Refused | Written::Stands => {}
            }
            let pass = CatchUpPass { rows, ledger, limits, rounding, key, chunk };
            team.pieces(pass.cut(piece), |piece| isa.run(piece));
            Ok(None)
        })
    })
}

/// Compares weights with the checksums of their marks: afterwards only the marks of rows that were written have one.
struct CheckPass<'x> {
    rows: &'x mut [(u32, Mark)],
    chunk: &'x ParamChunk<'x>,
}

impl Pass for CheckPass<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { rows, chunk } = self;
        let ahead = rows_ahead(chunk.unit * size_of::<f32>());
        for k in 0..rows.len() {
            if let Some((next, _)) = rows.get(k + ahead) {
                chunk.prefetch_params(*next as usize);
            }
            let (row, mark) = rows[k];
            if let Some(checksum) = mark.checksum()
                && chunk.checksum(row as usize) == checksum
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
    chunk: ParamChunk<'x>,
}

impl<'x> CatchUpPass<'x> {
    fn cut(self, piece: usize) -> Vec<Self> {
        let Self { rows, ledger, limits, rounding, key, mut chunk } = self;
        let mut pieces = Vec::with_capacity(rows.len().div_ceil(piece));
        for rows in rows.chunks_mut(piece) {
            let (part, rest) = chunk.rows(rows[0].0, rows[rows.len() - 1].0);
            chunk = rest;
            pieces.push(Self { rows, ledger, limits, rounding, key, chunk: part });
        }
        pieces
    }

    #[inline(always)]
    fn catch_up<A: Lane>(self) {
        let Self { rows, ledger, limits, rounding, key, mut chunk } = self;
        let row_len = chunk.unit;
        let mut scratch = vec![A::ZERO; row_len];
        let ahead = rows_ahead(row_len * size_of::<A>());
        let first = chunk.first;
        let fetch = |(row, mark): (u32, Mark), chunk: &ParamChunk<'_>| {
            let place = row as usize - first;
            if mark.is_empty() { chunk.prefetch_params(place) } else { chunk.prefetch(place) }
        };
        for next in rows.iter().take(ahead) {
            fetch(*next, &chunk);
        }
        for k in 0..rows.len() {
            if let Some(next) = rows.get(k + ahead) {
                fetch(*next, &chunk);
            }
            let (row, mark) = rows[k];
            let place = row as usize - first;
            let mut missed = ledger.missed::<A>(mark.since());
            if mark.checksum().is_some() {
                chunk.drop_master(place);
                missed = missed.standing();
            }
            let (is_empty, is_padding) = (mark.is_empty(), mark.is_padding());
            let op = CatchUpRow { missed, is_empty, is_padding, limits, rounding, key };
            A::catch_up(&mut chunk, &op, place, &mut scratch);
            rows[k].1 = mark.caught_up(ledger.now(), chunk.checksum(place));
        }
    }
}

impl Pass for CatchUpPass<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.chunk.is_f64() { self.catch_up::<f64>() } else { self.catch_up::<f32>() }
    }
}
