//! Tables whose untouched rows owe what a dense optimizer would have done to them: their state, shared by the
//! optimizer, which books what it did, and by lookups, before which rows pay.
//!
//! Invariant: whoever reads or writes a weight or a moment of such a table holds its lock, and the rows have paid. What
//! is owed is paid when the last owner leaves. Whenever all rows are up to date the ledger begins anew, so that what
//! comes after depends on weights and moments only, and not on whether this process or another one made them.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{Tensor, TensorId};

use super::records::lock;
use crate::error::{Error, Result};
use crate::kernel::{self, GpuMarks, Limit, Listed, Occurrences, Orders, PayTask, RowGrad, Touched};
use crate::ledger::{FULL, Ledger};
use crate::rounding::{Rounding, derive};
use crate::rule::Hyperparameters;
use crate::state::{ParamState, Place};

/// All of them, by their variables.
static DEBTS: LazyLock<Mutex<HashMap<TensorId, Weak<Debts>>>> = LazyLock::new(Mutex::default);

/// The moments of the row are zero: it owes decay at most. Paying leaves such moments as they are, so that it makes no
/// difference to any bit whether this is known of a row or not.
const EMPTY: u32 = 1 << 31;

/// One table with a ledger.
pub(crate) struct Debts {
    var: Tensor,
    row_len: usize,
    account: Mutex<Account>,
}

/// What the lock protects.
pub(crate) struct Account {
    pub(crate) state: ParamState,
    ledger: Ledger,
    marks: Marks,
    rounding: Rounding,
    key: u64,
}

/// After which update each row was up to date, and whether its moments are zero.
pub(crate) enum Marks {
    Host(Vec<u32>),
    Gpu(Box<GpuMarks>),
}

impl Marks {
    /// The ledger is another one from now on.
    fn forget(&mut self) {
        if let Self::Gpu(marks) = self {
            marks.forget();
        }
    }

    /// From now on the rows that have paid last, which are these, have this mark.
    fn set(&mut self, rows: &[u32], mark: u32) -> Result<()> {
        match self {
            Self::Gpu(marks) => return marks.mark_named(mark),
            Self::Host(marks) => rows.iter().for_each(|&row| marks[row as usize] = mark),
        }
        Ok(())
    }

    /// From now on all rows are up to date in a ledger that begins anew, and keep these bits of their marks.
    fn begin_anew(&mut self, kept: u32) -> Result<()> {
        match self {
            Self::Gpu(marks) => {
                marks.forget();
                return marks.mark_all(kept, 0);
            }
            Self::Host(marks) => marks.iter_mut().for_each(|mark| *mark &= kept),
        }
        Ok(())
    }
}

impl Debts {
    /// Gets ready for a variable to have debts, with this state.
    ///
    /// # Errors
    ///
    /// It has some already; no memory for the marks.
    pub(crate) fn prepare(var: &Tensor, state: &ParamState) -> Result<Marks> {
        check_alone(var.id())?;
        let mark = if state.step == 0 { EMPTY } else { 0 };
        Ok(match state.place() {
            Place::Cuda => Marks::Gpu(Box::new(GpuMarks::new(var, mark)?)),
            Place::Host | Place::Device => Marks::Host(vec![mark; var.dims().first().copied().unwrap_or(1)]),
        })
    }

    /// A table that owes nothing.
    pub(crate) fn new(
        var: &Tensor,
        row_len: usize,
        (state, marks): (ParamState, Marks),
        hyper: &Hyperparameters,
        rounding: Rounding,
        key: u64,
    ) -> Arc<Self> {
        let ledger = Ledger::new(hyper);
        let account = Account { state, ledger, marks, rounding, key };
        let debts = Arc::new(Self { var: var.clone(), row_len, account: Mutex::new(account) });
        lock(&DEBTS).insert(var.id(), Arc::downgrade(&debts));
        debts
    }

    /// The state, locked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets rows pay.
    pub(crate) fn pay(&self, account: &mut Account, rows: &Touched<'_>) -> Result<()> {
        self.settle(account, Some(rows))
    }

    /// Lets all rows pay; the ledger begins anew.
    pub(crate) fn pay_all(&self, account: &mut Account) -> Result<()> {
        self.settle(account, None)
    }

    fn settle(&self, account: &mut Account, rows: Option<&Touched<'_>>) -> Result<()> {
        let now = account.ledger.now() as u32;
        if let (Marks::Gpu(marks), Some(rows)) = (&mut account.marks, rows) {
            marks.name(rows)?;
        }
        if now == 0 {
            return Ok(());
        }
        let Account { state, ledger, rounding, key, marks } = account;
        // A row pays once between two updates; updates themselves have keys of another kind.
        let (rounding, key) = (*rounding, derive(!*key, state.step));
        let task = PayTask { var: &self.var, row_len: self.row_len, ledger, rounding, key, state };
        match marks {
            Marks::Gpu(marks) => marks.pay(task, rows.is_none(), now)?,
            Marks::Host(since) => {
                let owing: Vec<(u32, u32)> = match rows {
                    Some(Touched::Rows(rows)) => rows.iter().filter_map(|&row| owing(ledger, since, row)).collect(),
                    Some(Touched::OnGpu(_)) => {
                        return Err(candle_core::Error::msg("expected rows in host memory").into());
                    }
                    None => (0..since.len() as u32).filter_map(|row| owing(ledger, since, row)).collect(),
                };
                kernel::pay(task, &owing)?;
                for (row, _) in owing {
                    let old = &mut since[row as usize];
                    *old = now | (*old & EMPTY);
                }
            }
        }
        if rows.is_none() { account.begin_anew(EMPTY) } else { Ok(()) }
    }

    /// Scales noted rows down, which are ascending, after they have caught up.
    pub(crate) fn scale_down(&self, account: &mut Account, noted: &[(u32, Limit)]) -> Result<()> {
        let rows: Vec<u32> = noted.iter().map(|&(row, _)| row).collect();
        self.pay(account, &Touched::Rows(&rows))?;
        kernel::scale_down(&self.var, self.row_len, noted).map(drop)
    }

    /// Books an update of the rows of a gradient, which have paid last, or of all.
    pub(crate) fn book(&self, account: &mut Account, orders: &Orders, grad: Option<&RowGrad<'_>>) -> Result<()> {
        account.rounding = orders.rounding;
        let Some(grad) = grad else {
            return account.begin_anew(0);
        };
        account.ledger.book(&orders.coefficients, orders.shrink);
        let now = account.ledger.now();
        account.marks.set(grad.rows().unwrap_or_default(), now as u32)?;
        if now >= FULL { self.pay_all(account) } else { Ok(()) }
    }

    /// From now on updates are made with other numbers; all rows have paid.
    pub(crate) fn renew(&self, hyper: &Hyperparameters, key: u64) {
        let account = &mut *self.lock();
        account.key = key;
        if !account.ledger.is_for(hyper) {
            account.ledger = Ledger::new(hyper);
            account.marks.forget();
        }
    }

    /// Nothing is owed any more, because weights and moments will be replaced.
    pub(crate) fn forget(&self) {
        self.lock().ledger.clear();
    }
}

impl Account {
    /// How many bytes it takes to know what each row owes.
    pub(crate) fn bytes_owed(&self) -> usize {
        let marks = match &self.marks {
            Marks::Host(marks) => size_of_val::<[u32]>(marks),
            Marks::Gpu(marks) => marks.bytes(),
        };
        marks + self.ledger.bytes()
    }

    /// All rows are up to date, and keep these bits of their marks.
    fn begin_anew(&mut self, kept: u32) -> Result<()> {
        self.ledger.clear();
        self.marks.begin_anew(kept)
    }
}

/// The row and after which update it was up to date, if it owes anything.
fn owing(ledger: &Ledger, marks: &[u32], row: u32) -> Option<(u32, u32)> {
    let mark = marks[row as usize];
    let since = mark & !EMPTY;
    let owes = since < ledger.now() as u32 && (mark & EMPTY == 0 || ledger.decays_since(since as usize));
    owes.then_some((row, since))
}

impl Drop for Debts {
    fn drop(&mut self) {
        let mut all = lock(&DEBTS);
        if all.get(&self.var.id()).is_some_and(|debts| debts.strong_count() == 0) {
            all.remove(&self.var.id());
        }
        drop(all);
        let mut account = self.lock();
        // Nobody is left to be told of an error; memory has been there for every payment before.
        let _ = self.pay_all(&mut account);
    }
}

/// The debts of a variable, if it has any.
pub(super) fn of(var: TensorId) -> Option<Arc<Debts>> {
    lock(&DEBTS).get(&var).and_then(Weak::upgrade)
}

/// Refuses a variable that has debts already, before another optimizer gives it some.
pub(crate) fn check_alone(var: TensorId) -> Result<()> {
    match of(var) {
        None => Ok(()),
        Some(_) => {
            let got = "another one that has it, too";
            Err(Error::invalid("sparse_update", "one optimizer with `Exact` for a table", got))
        }
    }
}

/// Lets rows of a variable pay, which are ascending, before they are read or written.
pub(super) fn pay(var: TensorId, rows: &[u32]) -> Result<()> {
    match of(var) {
        Some(debts) => debts.pay(&mut debts.lock(), &Touched::Rows(rows)),
        None => Ok(()),
    }
}

/// Lets the rows of a list pay.
pub(super) fn pay_listed(var: TensorId, rows: &Listed) -> Result<()> {
    match of(var) {
        Some(debts) => debts.pay(&mut debts.lock(), &Touched::Rows(&rows.unique())),
        None => Ok(()),
    }
}

/// Lets the rows of a lookup pay.
pub(super) fn pay_occurrences(var: TensorId, occurrences: &Occurrences) -> Result<()> {
    match (occurrences, of(var)) {
        (Occurrences::Host(rows), _) => pay_listed(var, rows),
        (Occurrences::Gpu(ids), Some(debts)) => debts.pay(&mut debts.lock(), &ids.touched()),
        (Occurrences::Gpu(_), None) => Ok(()),
    }
}

/// Lets all rows of a variable pay.
pub(super) fn pay_all(var: TensorId) -> Result<()> {
    match of(var) {
        Some(debts) => debts.pay_all(&mut debts.lock()),
        None => Ok(()),
    }
}
