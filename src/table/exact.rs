//! State of tables with `SparseUpdate::Exact`, shared by the optimizer and by lookups. Each row has the number of the last
//! update that it has seen, and is brought up to date just before it is read or written. The optimizer records every update
//! in the ledger.
//!
//! Invariant: whoever reads or writes a weight or a moment of such a table holds its lock, and the rows are up to date. The
//! table belongs to one optimizer: rows catch up when that lets go of it, whoever else still holds the state.
//! Whenever all rows are up to date the ledger begins anew, so that what comes after depends on weights and moments
//! only, and not on whether this process or another one made them.
//!
//! Weights that somebody else writes while rows have missed updates would be moved by them. Rows that were updated, or have caught up
//! for themselves, have a checksum of their weights in their marks, so that most such writes are noticed. When all rows
//! have caught up there are no checksums: a write is right then, and cannot be told from a later one.

use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{Device, Tensor, TensorId};

use super::records::{self, lock};
use crate::checkpoint::MissedUpdates;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::row_len;
use crate::kernel::{self, CatchUpTask, GpuMarks, HostIds, Limit, LookupIds, RowGrad, Touched, UpdateArgs, Written};
use crate::ledger::{FULL, Ledger};
use crate::maps::IdMap;
use crate::mark::{Checksum, Mark};
use crate::rounding::{Rounding, derive};
use crate::rule::Hyperparameters;
use crate::state::{ParamState, Place};

/// All that belong to an optimizer, by their variables.
static EXACT_TABLES: LazyLock<Mutex<IdMap<TensorId, Weak<ExactTable>>>> = LazyLock::new(Mutex::default);

/// One table with a ledger.
pub(crate) struct ExactTable {
    var: Tensor,
    row_len: usize,
    inner: Mutex<ExactState>,
}

/// State that the lock protects.
pub(crate) struct ExactState {
    pub(crate) state: ParamState,
    ledger: Ledger,
    marks: Marks,
    /// Checksums of the rows that an update has touched last.
    checksums: Vec<Checksum>,
    rounding: Rounding,
    key: u64,
    /// Whether the optimizer has let go of it: the table may belong to another one by now.
    is_released: bool,
}

/// The mark of each row.
enum Marks {
    Host(Vec<Mark>),
    Gpu(Box<GpuMarks>),
}

impl Marks {
    /// The ledger is another one from now on.
    fn forget(&mut self) {
        if let Self::Gpu(marks) = self {
            marks.forget();
        }
    }

    /// Update `now` has updated these rows, which have caught up last; their checksums, where there are any.
    fn set(&mut self, rows: &[u32], now: usize, checksums: &[Checksum]) -> Result<()> {
        match self {
            Self::Gpu(marks) => return marks.mark_named(Mark::PADDING, now as u32),
            Self::Host(marks) => {
                for (k, &row) in rows.iter().enumerate() {
                    let mark = &mut marks[row as usize];
                    *mark = mark.updated(now, checksums.get(k).copied());
                }
            }
        }
        Ok(())
    }

    /// From now on all rows are up to date in a ledger that begins anew, and keep these flags of their marks.
    fn begin_anew(&mut self, kept: u32) -> Result<()> {
        match self {
            Self::Gpu(marks) => {
                marks.forget();
                return marks.mark_all(kept, 0);
            }
            Self::Host(marks) => marks.iter_mut().for_each(|mark| *mark = mark.anew(kept)),
        }
        Ok(())
    }

    /// From now on this is a padding row.
    fn pad(&mut self, row: u32) -> Result<()> {
        match self {
            Self::Gpu(marks) => {
                marks.name(&Touched::Rows(&[row]))?;
                return marks.mark_named(u32::MAX, Mark::PADDING);
            }
            Self::Host(marks) => {
                if let Some(mark) = marks.get_mut(row as usize) {
                    *mark = mark.with(Mark::PADDING);
                }
            }
        }
        Ok(())
    }
}

/// The optimizer's hold on a table with a ledger.
pub(crate) struct Owner(Arc<ExactTable>);

impl Owner {
    /// A table whose rows have missed nothing, for a state that it [adopts](Self::adopt) later.
    ///
    /// # Errors
    ///
    /// Another optimizer has it; no memory for the marks.
    pub(crate) fn new(
        var: &Tensor,
        state: &ParamState,
        hyper: &Hyperparameters,
        rounding: Rounding,
        key: u64,
    ) -> Result<Self> {
        let flags = if state.step == 0 { Mark::EMPTY } else { 0 };
        let marks = match state.place() {
            Place::Cuda => Marks::Gpu(Box::new(GpuMarks::new(var, flags)?)),
            Place::Host | Place::Device => {
                Marks::Host(vec![Mark::new(flags); var.dims().first().copied().unwrap_or(1)])
            }
        };
        let nothing = ParamState::nothing(&state.moments.layout);
        let (ledger, checksums) = (Ledger::new(hyper), Vec::new());
        let inner = ExactState { state: nothing, ledger, marks, checksums, rounding, key, is_released: false };
        let table = Arc::new(ExactTable { var: var.clone(), row_len: row_len(var), inner: Mutex::new(inner) });
        let mut all = lock(&EXACT_TABLES);
        check_free(&all, var.id())?;
        all.insert(var.id(), Arc::downgrade(&table));
        drop(all);
        let owner = Self(table);
        let mut inner = owner.lock();
        records::paddings(var.id()).into_iter().try_for_each(|row| inner.marks.pad(row))?;
        drop(inner);
        Ok(owner)
    }

    /// Takes the state, and leaves nothing in its place.
    pub(crate) fn adopt(&self, state: &mut ParamState) {
        std::mem::swap(&mut self.lock().state, state);
    }
}

impl Deref for Owner {
    type Target = ExactTable;

    fn deref(&self) -> &ExactTable {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut inner = self.lock();
        // Nobody is left to be told of an error; memory has been there for every row before.
        let _ = self.catch_up_all(&mut inner);
        inner.is_released = true;
        // Under the lock: a lookup that finds this one released finds it gone, too.
        let mut all = lock(&EXACT_TABLES);
        if all.get(&self.var.id()).is_some_and(|table| std::ptr::eq(table.as_ptr(), Arc::as_ptr(&self.0))) {
            all.remove(&self.var.id());
        }
    }
}

impl ExactTable {
    /// The state, locked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ExactState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings rows up to date, or all of them, which begins the ledger anew.
    ///
    /// # Errors
    ///
    /// A row that somebody has written, if that is refused. Nothing has changed then.
    pub(crate) fn catch_up(&self, inner: &mut ExactState, rows: Option<&Touched<'_>>, written: Written) -> Result<()> {
        let now = inner.ledger.now() as u32;
        if let (Marks::Gpu(marks), Some(rows)) = (&mut inner.marks, rows) {
            marks.name(rows)?;
        }
        if now == 0 {
            return Ok(());
        }
        let ExactState { state, ledger, rounding, key, marks, .. } = inner;
        // A row catches up once between two updates; updates themselves have keys of another kind.
        let (rounding, key) = (*rounding, derive(!*key, state.step));
        let task = CatchUpTask { var: &self.var, row_len: self.row_len, ledger, rounding, key, state };
        match marks {
            Marks::Gpu(marks) => marks.catch_up(task, rows.is_none(), now)?,
            Marks::Host(marks) => {
                let mut behind: Vec<(u32, Mark)> = match rows {
                    Some(Touched::Rows(rows)) => rows.iter().filter_map(|&row| behind(ledger, marks, row)).collect(),
                    Some(Touched::OnGpu(_)) => {
                        return Err(candle_core::Error::msg("expected rows in host memory").into());
                    }
                    None => (0..marks.len() as u32).filter_map(|row| behind(ledger, marks, row)).collect(),
                };
                if let Some(row) = kernel::catch_up(task, &mut behind, written)? {
                    return Err(ErrorKind::WrittenRow { row: row as usize, shape: self.var.dims().to_vec() }.into());
                }
                if written == Written::Sought {
                    return Ok(());
                }
                behind.into_iter().for_each(|(row, mark)| marks[row as usize] = mark);
            }
        }
        if rows.is_none() { inner.begin_anew(Mark::EMPTY | Mark::PADDING) } else { Ok(()) }
    }

    /// Brings all rows up to date; those that somebody has written stand as they are.
    pub(crate) fn catch_up_all(&self, inner: &mut ExactState) -> Result<()> {
        self.catch_up(inner, None, Written::Stands)
    }

    /// Scales noted rows down, which are ascending, after they have caught up.
    pub(crate) fn scale_down(&self, inner: &mut ExactState, noted: &[(u32, Limit)]) -> Result<()> {
        let rows: Vec<u32> = noted.iter().map(|&(row, _)| row).collect();
        self.catch_up(inner, Some(&Touched::Rows(&rows)), Written::Stands)?;
        let scaled = kernel::scale_down(&self.var, self.row_len, noted)?;
        self.rewritten(inner, &scaled)
    }

    /// Rows that have caught up were written by the crate: their checksums are those of what they are now. Where all rows are up to date
    /// there are none, and nothing has to be said.
    fn rewritten(&self, inner: &mut ExactState, rows: &[u32]) -> Result<()> {
        let Marks::Host(marks) = &mut inner.marks else { return Ok(()) };
        if inner.ledger.now() == 0 {
            return Ok(());
        }
        let checksums = kernel::checksums(&self.var, self.row_len, rows)?;
        for (&row, checksum) in rows.iter().zip(checksums) {
            let mark = &mut marks[row as usize];
            *mark = mark.with_checksum(checksum);
        }
        Ok(())
    }

    /// Copies of weight and state whose rows have all caught up, so that nothing else notices. `None` if no row has missed an update;
    /// on a GPU the rows themselves catch up.
    pub(crate) fn caught_up(&self, inner: &mut ExactState) -> Result<Option<(Tensor, ParamState)>> {
        if !inner.is_on_host() {
            self.catch_up_all(inner)?;
        }
        let ExactState { state, ledger, rounding, key, marks: Marks::Host(marks), .. } = &*inner else {
            return Ok(None);
        };
        let mut behind: Vec<(u32, Mark)> =
            (0..marks.len() as u32).filter_map(|row| behind(ledger, marks, row)).collect();
        if behind.is_empty() {
            return Ok(None);
        }
        let weight = self.var.detach().copy()?;
        let master = state.master.as_ref().map(|master| master.grown(&self.var)).transpose()?;
        let mut copy = ParamState { moments: state.moments.grown(&self.var)?, master, step: state.step };
        let (rounding, key) = (*rounding, derive(!*key, state.step));
        let task = CatchUpTask { var: &weight, row_len: self.row_len, ledger, rounding, key, state: &mut copy };
        kernel::catch_up(task, &mut behind, Written::Stands)?;
        Ok(Some((weight, copy)))
    }

    /// m and u as they are once all rows have caught up.
    pub(crate) fn moments(&self, inner: &mut ExactState) -> Result<(Tensor, Tensor)> {
        match self.caught_up(inner)? {
            Some((_, state)) => state.moments.to_tensors(self.var.shape()),
            None => inner.state.moments.to_tensors(self.var.shape()),
        }
    }

    /// The updates that rows have missed, as plain data; on a GPU the rows catch up.
    pub(crate) fn missed(&self, inner: &mut ExactState) -> Result<Option<MissedUpdates>> {
        if !inner.is_on_host() {
            self.catch_up_all(inner)?;
        }
        let updates = inner.ledger.updates();
        match &inner.marks {
            Marks::Host(marks) if !updates.is_empty() => {
                let marks: Vec<u32> = marks.iter().map(|mark| mark.bits()).collect();
                let (rows, n) = (marks.len(), updates.len());
                let updates = updates.concat();
                Ok(Some(MissedUpdates {
                    last_update: Tensor::from_vec(marks, rows, &Device::Cpu)?,
                    updates: Tensor::from_vec(updates, (n, 3), &Device::Cpu)?,
                }))
            }
            _ => Ok(None),
        }
    }

    /// Takes state and missed updates out of a snapshot.
    pub(crate) fn restore(&self, state: ParamState, missed: RestoredLedger) {
        let inner = &mut *self.lock();
        (inner.state, inner.ledger, inner.marks) = (state, missed.ledger, Marks::Host(missed.marks));
    }

    /// Books an update of the rows of a gradient, which have caught up last, or of all.
    pub(crate) fn record(
        &self,
        inner: &mut ExactState,
        update_args: &UpdateArgs,
        grad: Option<&RowGrad<'_>>,
    ) -> Result<()> {
        inner.rounding = update_args.rounding;
        let Some(grad) = grad else {
            return inner.begin_anew(Mark::PADDING);
        };
        inner.ledger.record(&update_args.coefficients, update_args.shrink);
        let now = inner.ledger.now();
        inner.marks.set(grad.rows().unwrap_or_default(), now, &inner.checksums)?;
        if now >= FULL { self.catch_up_all(inner) } else { Ok(()) }
    }

    /// From now on updates are made with other numbers; all rows are up to date.
    pub(crate) fn renew(&self, hyper: &Hyperparameters, key: u64) {
        let inner = &mut *self.lock();
        inner.key = key;
        if !inner.ledger.is_for(hyper) {
            inner.ledger = Ledger::new(hyper);
            inner.marks.forget();
        }
    }

    /// No row has missed an update any more, because weights and moments will be replaced.
    pub(crate) fn forget(&self) {
        self.lock().ledger.clear();
    }
}

impl ExactState {
    /// The state, and where an update in host memory puts the checksums of the rows that it touches.
    pub(crate) fn parts(&mut self) -> (&mut ParamState, Option<&mut Vec<Checksum>>) {
        let is_on_host = self.is_on_host();
        (&mut self.state, is_on_host.then_some(&mut self.checksums))
    }

    /// Whether the table is in host memory.
    pub(crate) fn is_on_host(&self) -> bool {
        matches!(self.marks, Marks::Host(_))
    }

    /// How many bytes it takes to know which updates each row has missed.
    pub(crate) fn ledger_bytes(&self) -> usize {
        let marks = match &self.marks {
            Marks::Host(marks) => size_of_val::<[Mark]>(marks),
            Marks::Gpu(marks) => marks.bytes(),
        };
        marks + self.ledger.bytes()
    }

    /// All rows are up to date, and keep these flags of their marks.
    fn begin_anew(&mut self, kept: u32) -> Result<()> {
        self.ledger.clear();
        self.marks.begin_anew(kept)
    }
}

/// The row and its mark, if it has missed an update.
fn behind(ledger: &Ledger, marks: &[Mark], row: u32) -> Option<(u32, Mark)> {
    let mark = marks[row as usize];
    let is_spared = || mark.is_empty() && (mark.is_padding() || !ledger.decays_since(mark.since()));
    (mark.since() < ledger.now() && !is_spared()).then_some((row, mark))
}

/// Missed updates of a snapshot, checked.
pub(crate) struct RestoredLedger {
    ledger: Ledger,
    marks: Vec<Mark>,
}

impl RestoredLedger {
    /// `None` if no run can have made such updates, which [have the shapes](MissedUpdates::have_shapes) of some.
    pub(crate) fn of(missed: &MissedUpdates, hyper: &Hyperparameters) -> Result<Option<Self>> {
        let MissedUpdates { last_update, updates } = missed;
        let n = updates.dim(0)?;
        let updates: Vec<[f64; 3]> =
            updates.to_vec2::<f64>()?.iter().filter_map(|row| row[..].try_into().ok()).collect();
        let marks: Vec<Mark> = last_update.to_vec1::<u32>()?.into_iter().map(Mark::of_bits).collect();
        let Some(ledger) = Ledger::of_updates(hyper, &updates) else { return Ok(None) };
        Ok((n > 0 && marks.iter().all(|mark| mark.since() <= n)).then_some(Self { ledger, marks }))
    }
}

/// A copy of the weight of a variable with all rows up to date; `None` if they are.
pub(super) fn caught_up(var: TensorId) -> Result<Option<Tensor>> {
    let mut weight = None;
    with(var, |table, inner| {
        weight = table.caught_up(inner)?.map(|(weight, _)| weight);
        Ok(())
    })?;
    Ok(weight)
}

/// Does something with the table of a variable, if it has any.
fn with(var: TensorId, f: impl FnOnce(&ExactTable, &mut ExactState) -> Result<()>) -> Result<()> {
    loop {
        let Some(table) = lock(&EXACT_TABLES).get(&var).and_then(Weak::upgrade) else { return Ok(()) };
        let mut inner = table.lock();
        // Another optimizer may have come while this waited for the lock.
        if !inner.is_released {
            return f(&table, &mut inner);
        }
    }
}

/// Brings rows of a variable up to date, which are ascending, before they are written by the crate.
pub(super) fn catch_up_before_writing(var: TensorId, rows: &[u32]) -> Result<()> {
    with(var, |table, inner| table.catch_up(inner, Some(&Touched::Rows(rows)), Written::Stands))
}

/// Whether there is any table with a ledger.
pub(crate) fn is_any() -> bool {
    !lock(&EXACT_TABLES).is_empty()
}

/// Refuses a variable that another optimizer has with `Exact`.
pub(crate) fn check_alone(var: TensorId) -> Result<()> {
    check_free(&lock(&EXACT_TABLES), var)
}

fn check_free(all: &IdMap<TensorId, Weak<ExactTable>>, var: TensorId) -> Result<()> {
    if all.get(&var).is_some_and(|table| table.strong_count() > 0) {
        let got = "another one that has it, too";
        return Err(Error::invalid("sparse_update", "one optimizer with `Exact` for a table", got));
    }
    Ok(())
}

/// Writes rows of a variable, which are ascending. Where they have missed updates, they catch up first, and from then on until they
/// have their new checksums no row catches up and no update is recorded: a lookup would take the new weights for somebody else's.
pub(super) fn write(var: TensorId, rows: &[u32], write: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut write = Some(write);
    with(var, |table, inner| {
        table.catch_up(inner, Some(&Touched::Rows(rows)), Written::Stands)?;
        write.take().map_or(Ok(()), |write| write())?;
        table.rewritten(inner, rows)
    })?;
    write.map_or(Ok(()), |write| write())
}

/// Scales noted rows of a variable down, which are ascending, after they have caught up.
pub(super) fn scale_down(var: &Tensor, noted: &[(u32, Limit)]) -> Result<()> {
    let mut is_done = false;
    with(var.id(), |table, inner| {
        is_done = true;
        table.scale_down(inner, noted)
    })?;
    if is_done { Ok(()) } else { kernel::scale_down(var, row_len(var), noted).map(drop) }
}

/// A layer over the variable has this padding row.
pub(super) fn pad(var: TensorId, row: u32) -> Result<()> {
    with(var, |_, inner| inner.marks.pad(row))
}

/// Brings the rows of a list up to date, before they are looked up.
pub(super) fn catch_up_rows(var: TensorId, rows: &HostIds) -> Result<()> {
    with(var, |table, inner| table.catch_up(inner, Some(&Touched::Rows(&rows.unique())), Written::Refused))
}

/// Brings the rows of a lookup up to date.
pub(super) fn catch_up_lookup(var: TensorId, lookup_ids: &LookupIds) -> Result<()> {
    match lookup_ids {
        LookupIds::Host(rows) => catch_up_rows(var, rows),
        LookupIds::Gpu(ids) => with(var, |table, inner| table.catch_up(inner, Some(&ids.touched()), Written::Refused)),
    }
}
