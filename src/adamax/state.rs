//! The state of one variable, wherever it is, and how rows of tables catch up.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

use candle_core::Tensor;

use super::Adamax;
use super::grads::Grad;
use super::settings::ResolvedGroup;
use super::vars::Param;
use crate::checkpoint::MissedUpdates;
use crate::error::Result;
use crate::ids::row_len;
use crate::kernel::{self, Touched, UpdateArgs, Written};
use crate::mark::Checksum;
use crate::params::SparseUpdate;
use crate::rounding::derive;
use crate::state::{Moments, ParamState, Units};
use crate::table::exact::{ExactState, ExactTable, Owner};
use crate::table::limits;

/// The state of one variable: the optimizer's own, or that of a table with [`SparseUpdate::Exact`], which lookups share.
pub(super) enum StateCell {
    Own(ParamState),
    Table(Owner),
}

/// The state of one variable, to be written. A table is locked as long as this lives.
pub(super) enum StateGuard<'a> {
    Own(&'a mut ParamState),
    Table(&'a ExactTable, MutexGuard<'a, ExactState>),
}

impl StateCell {
    /// Looks at the state.
    pub(super) fn read<R>(&self, look: impl FnOnce(&ParamState) -> R) -> R {
        match self {
            Self::Own(state) => look(state),
            Self::Table(table) => look(&table.lock().state),
        }
    }

    pub(super) fn lock(&mut self) -> StateGuard<'_> {
        match self {
            Self::Own(state) => StateGuard::Own(state),
            Self::Table(table) => StateGuard::Table(table, table.lock()),
        }
    }

    /// Whether it is a table whose rows can have missed updates.
    pub(super) fn is_table(&self) -> bool {
        matches!(self, Self::Table(_))
    }

    /// m and u in the shape of `var`, of rows that have all caught up. Looking at them changes nothing, but on a GPU.
    pub(super) fn moments(&self, var: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Own(state) => state.moments.to_tensors(var.shape()),
            Self::Table(table) => table.moments(&mut table.lock()),
        }
    }

    /// The updates that rows have missed; on a GPU rows catch up.
    pub(super) fn missed(&self) -> Result<Option<MissedUpdates>> {
        match self {
            Self::Own(_) => Ok(None),
            Self::Table(table) => table.missed(&mut table.lock()),
        }
    }

    /// Brings all rows up to date.
    pub(super) fn catch_up(&self) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Table(table) => table.catch_up_all(&mut table.lock()),
        }
    }
}

impl StateGuard<'_> {
    /// Brings all rows up to date; those that somebody has written stand as they are.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Table(table, inner) => table.catch_up_all(inner),
        }
    }

    /// Brings rows up to date; those that somebody has written stand as they are.
    pub(super) fn catch_up_rows(&mut self, rows: &[u32]) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Table(table, inner) => table.catch_up(inner, Some(&Touched::Rows(rows)), Written::Stands),
        }
    }

    /// Refuses a gradient of rows that somebody has written while they had missed updates. On a GPU it cannot be known.
    pub(super) fn seek_written(&mut self, grad: &Grad<'_>, var: &Tensor) -> Result<()> {
        match self {
            Self::Table(table, inner) if inner.is_on_host() => {
                Self::catch_up_for(table, inner, grad, var, Written::Sought)
            }
            _ => Ok(()),
        }
    }

    /// Gets the rows of a gradient of `var` ready for their update: they are brought up to date, and those that lookups
    /// have found above their `max_norm` are scaled down.
    pub(super) fn prepare(&mut self, grad: &Grad<'_>, var: &Tensor) -> Result<()> {
        if let Self::Table(table, inner) = self {
            Self::catch_up_for(table, inner, grad, var, Written::Refused)?;
        }
        let noted = limits::take(var.id());
        match self {
            _ if noted.is_empty() => Ok(()),
            Self::Own(_) => kernel::scale_down(var, row_len(var), &noted).map(drop),
            Self::Table(table, inner) => table.scale_down(inner, &noted),
        }
    }

    fn catch_up_for(
        table: &ExactTable,
        inner: &mut ExactState,
        grad: &Grad<'_>,
        var: &Tensor,
        written: Written,
    ) -> Result<()> {
        match grad {
            Grad::Rows(grad) => table.catch_up(inner, Some(&grad.touched(var.device())?), written),
            Grad::Dense(_) => table.catch_up(inner, None, written),
        }
    }

    /// The state, and the place for the checksums of the rows that an update touches, if they are wanted.
    pub(super) fn parts(&mut self) -> (&mut ParamState, Option<&mut Vec<Checksum>>) {
        match self {
            Self::Own(state) => (state, None),
            Self::Table(_, inner) => inner.parts(),
        }
    }

    /// Records an update in the ledger of a table.
    pub(super) fn record(&mut self, update_args: &UpdateArgs, grad: &Grad<'_>) -> Result<()> {
        match (self, grad) {
            (Self::Own(_), _) => Ok(()),
            (Self::Table(table, inner), Grad::Rows(grad)) => table.record(inner, update_args, Some(grad)),
            (Self::Table(table, inner), Grad::Dense(_)) => table.record(inner, update_args, None),
        }
    }
}

impl Deref for StateGuard<'_> {
    type Target = ParamState;

    fn deref(&self) -> &ParamState {
        match self {
            Self::Own(state) => state,
            Self::Table(_, inner) => &inner.state,
        }
    }
}

impl DerefMut for StateGuard<'_> {
    fn deref_mut(&mut self) -> &mut ParamState {
        match self {
            Self::Own(state) => state,
            Self::Table(_, inner) => &mut inner.state,
        }
    }
}

/// New parts of a state for gradients of rows: moments with scales by rows, and a ledger for `Exact`.
pub(super) struct RowState {
    moments: Option<Moments>,
    owner: Option<Owner>,
}

impl RowState {
    /// Makes it, and leaves the state as it is. `None` if nothing has to change.
    pub(super) fn prepare(param: &Param, group: &ResolvedGroup, seed: u64) -> Result<Option<Self>> {
        let Param { info, state: cell, .. } = param;
        let var = info.var.as_tensor();
        let wanted = group.layout(var, Units::Rows);
        let moments = cell.read(|state| match state.step {
            _ if state.moments.layout == wanted => Ok(None),
            // Nothing is there yet that could be converted.
            0 => Moments::zeros(var, info.place, &wanted).map(Some),
            _ => state.moments.converted(&wanted).map(Some),
        })?;
        let owner = match (cell, group.storage.sparse_update) {
            (StateCell::Own(state), SparseUpdate::Exact) => {
                let (hyper, rounding, key) = (info.hyper(group), group.storage.rounding, derive(seed, info.key));
                Some(Owner::new(var, state, hyper, rounding, key)?)
            }
            _ => None,
        };
        Ok((moments.is_some() || owner.is_some()).then_some(Self { moments, owner }))
    }

    /// Puts it in the place of the state as it was.
    pub(super) fn install(self, cell: &mut StateCell) {
        if let Some(moments) = self.moments {
            cell.lock().moments = moments;
        }
        if let (Some(owner), StateCell::Own(state)) = (self.owner, &mut *cell) {
            owner.adopt(state);
            *cell = StateCell::Table(owner);
        }
    }
}

impl Adamax {
    /// Brings every weight up to date: rows of tables with [`SparseUpdate::Exact`] catch up for the updates
    /// that they missed, and rows that a layer with [`max_norm`](crate::Embedding::max_norm) has looked up are scaled. Call
    /// it before weights are read as a whole other than by this crate, by an operation on the `Var` or by `VarMap::save`, and
    /// before they are written, by `Var::set` or `VarMap::load`. After it no row has missed an update: what is read is up to
    /// date, and what is written before the next step stands as it is, and later steps start from it. A second call in a row
    /// costs nothing. Catching up in two parts rounds differently from catching up once, so a call is part of the run.
    ///
    /// A row that was written too early and [noticed](crate::ErrorKind::WrittenRow) stands as it is, too: its moments
    /// catch up, its weights do not. The same holds where all rows catch up without this call: when the optimizer is dropped,
    /// when it is saved in a format of PyTorch or Keras, and when settings are replaced.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, SparseUpdate, Table};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// let weight = Var::ones((1000, 4), DType::F32, &Device::Cpu)?;
    /// let table = Table::new(&weight)?;
    /// let params = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("weight", weight.clone())], params)?;
    /// for row in 0..10u32 {
    ///     optimizer.backward_step(&table.lookup(&Tensor::new(&[row], &Device::Cpu)?)?.sum_all()?)?;
    /// }
    /// optimizer.catch_up()?; // rows 0 to 8 have gone on moving by their momentum
    /// let w = weight.to_vec2::<f32>()?;
    /// assert!(w[0][0] < w[8][0] && w[8][0] < w[9][0]);
    ///
    /// weight.set(&weight.zeros_like()?)?; // no row has missed an update
    /// assert_eq!(table.lookup(&Tensor::new(&[0u32], &Device::Cpu)?)?.to_vec2::<f32>()?, [[0.0; 4]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// None that a step would not have had before.
    pub fn catch_up(&self) -> Result<()> {
        self.vars.iter().try_for_each(|param| param.state.catch_up()).map_err(|error| self.own(error))?;
        self.scale_down()
    }

    /// Scales rows down in their weights that lookups have found above their `max_norm`.
    pub(super) fn scale_down(&self) -> Result<()> {
        self.vars.iter().try_for_each(|info| limits::scale_down(&info.var)).map_err(|error| self.own(error))
    }
}
