//! The state of one variable, wherever it is: the optimizer's own, or shared with the lookups of a table.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

use candle_core::Tensor;

use super::{Accumulated, Adamax, GradRef, Param};
use crate::codec::Encoding;
use crate::error::{Error, Result};
use crate::gradient::sparse::row_len;
use crate::group::GroupSettings;
use crate::kernel::{self, Kernel, Orders, Touched, Written};
use crate::mark::Checksum;
use crate::params::{Keeping, ParamsAdamax, SparseUpdate};
use crate::rounding::derive;
use crate::rule::{Hyperparameters, WeightDecay};
use crate::state::{Layout, Master, Moments, ParamState, Place};
use crate::table::debts::{Account, Debts, Owner};
use crate::table::limits;

/// The state of one variable.
pub(super) enum Held {
    Own(ParamState),
    /// Of a table whose rows may owe something.
    Shared(Owner),
}

/// The state, to be read.
pub(super) enum StateRef<'a> {
    Own(&'a ParamState),
    Shared(MutexGuard<'a, Account>),
}

/// The state, to be written.
pub(super) enum StateMut<'a> {
    Own(&'a mut ParamState),
    Shared(&'a Debts, MutexGuard<'a, Account>),
}

impl Held {
    pub(super) fn get(&self) -> StateRef<'_> {
        match self {
            Self::Own(state) => StateRef::Own(state),
            Self::Shared(debts) => StateRef::Shared(debts.lock()),
        }
    }

    pub(super) fn get_mut(&mut self) -> StateMut<'_> {
        match self {
            Self::Own(state) => StateMut::Own(state),
            Self::Shared(debts) => StateMut::Shared(debts, debts.lock()),
        }
    }

    /// m and u in the shape of `var`, of rows that have all caught up. Looking at them changes nothing, but on a GPU.
    pub(super) fn moments(&self, var: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Own(state) => state.moments.to_tensors(var.shape()),
            Self::Shared(debts) => debts.moments(&mut debts.lock()),
        }
    }

    /// Lets all rows pay what they owe.
    pub(super) fn pay_all(&self) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Shared(debts) => debts.pay_all(&mut debts.lock()),
        }
    }
}

impl StateMut<'_> {
    /// Lets all rows pay; those that somebody has written stand as they are.
    pub(super) fn pay_all(&mut self) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Shared(debts, account) => debts.pay_all(account),
        }
    }

    /// Lets rows pay; those that somebody has written stand as they are.
    pub(super) fn pay(&mut self, rows: &[u32]) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Shared(debts, account) => debts.pay(account, Some(&Touched::Rows(rows)), Written::Stands),
        }
    }

    /// Makes sure that nobody has written weights of `var` that a gradient will let pay.
    pub(super) fn seek_written(&mut self, grad: &GradRef<'_>, var: &Tensor) -> Result<()> {
        match self {
            // On a GPU it cannot be known.
            Self::Shared(_, account) if !account.is_on_host() => Ok(()),
            _ => self.pay_for(grad, var, Written::Sought),
        }
    }

    /// Scales rows of `var` down in its weight that lookups have found above their `max_norm`.
    pub(super) fn scale_down(&mut self, var: &Tensor) -> Result<()> {
        let noted = limits::take(var.id());
        match self {
            _ if noted.is_empty() => Ok(()),
            Self::Own(_) => kernel::scale_down(var, row_len(var), &noted).map(drop),
            Self::Shared(debts, account) => debts.scale_down(account, &noted),
        }
    }

    /// Lets the rows of a gradient of `var` pay, before they are updated.
    pub(super) fn pay_touched(&mut self, grad: &GradRef<'_>, var: &Tensor) -> Result<()> {
        self.pay_for(grad, var, Written::Refused)
    }

    fn pay_for(&mut self, grad: &GradRef<'_>, var: &Tensor, written: Written) -> Result<()> {
        match (self, grad) {
            (Self::Own(_), _) => Ok(()),
            (Self::Shared(debts, account), GradRef::Rows(grad)) => {
                debts.pay(account, Some(&grad.touched(var.device())?), written)
            }
            (Self::Shared(debts, account), GradRef::Dense(_)) => debts.pay(account, None, written),
        }
    }

    /// The state, and where an update puts the checksums of the rows that it touches, if they are wanted.
    pub(super) fn parts(&mut self) -> (&mut ParamState, Option<&mut Vec<Checksum>>) {
        match self {
            Self::Own(state) => (state, None),
            Self::Shared(_, account) => account.parts(),
        }
    }

    /// Books an update.
    pub(super) fn book(&mut self, orders: &Orders, grad: GradRef<'_>) -> Result<()> {
        match (self, grad) {
            (Self::Own(_), _) => Ok(()),
            (Self::Shared(debts, account), GradRef::Rows(grad)) => debts.book(account, orders, Some(grad)),
            (Self::Shared(debts, account), GradRef::Dense(_)) => debts.book(account, orders, None),
        }
    }
}

impl Deref for StateRef<'_> {
    type Target = ParamState;

    fn deref(&self) -> &ParamState {
        match self {
            Self::Own(state) => state,
            Self::Shared(account) => &account.state,
        }
    }
}

impl Deref for StateMut<'_> {
    type Target = ParamState;

    fn deref(&self) -> &ParamState {
        match self {
            Self::Own(state) => state,
            Self::Shared(_, account) => &account.state,
        }
    }
}

impl DerefMut for StateMut<'_> {
    fn deref_mut(&mut self) -> &mut ParamState {
        match self {
            Self::Own(state) => state,
            Self::Shared(_, account) => &mut account.state,
        }
    }
}

/// How the state of the variables of one group is to be.
pub(super) struct GroupPlan {
    pub(super) hyper: Hyperparameters,
    pub(super) keeping: Keeping,
}

impl GroupPlan {
    pub(super) fn of(params: &ParamsAdamax, group: &GroupSettings) -> Result<Self> {
        Ok(Self { hyper: group.hyperparameters(params), keeping: group.keeping(params)? })
    }

    /// The layout of one variable's moments.
    pub(super) fn layout(&self, var: &Tensor, by_rows: bool) -> Layout {
        let Keeping { state_dtype, rowwise_norm, .. } = self.keeping;
        Layout::of(var, state_dtype, by_rows, rowwise_norm, Encoding::of(&self.hyper))
    }

    /// The numbers of a variable that decays or not.
    pub(super) fn hyper(&self, decays: bool) -> Hyperparameters {
        let weight_decay = if decays { self.hyper.weight_decay } else { WeightDecay::None };
        Hyperparameters { weight_decay, ..self.hyper }
    }

    /// Whether the kernel of `place` can keep state in this way.
    pub(super) fn check(&self, place: Place) -> Result<()> {
        let Keeping { state_dtype, rowwise_norm, rounding, sparse_update } = self.keeping;
        let plain = ParamsAdamax::default().keeping();
        let is_operations = place == Place::Device;
        let got: [(&str, &dyn std::fmt::Debug, bool); 4] = [
            ("state_dtype", &state_dtype, state_dtype == plain.state_dtype),
            ("rowwise_norm", &rowwise_norm, rowwise_norm == plain.rowwise_norm),
            ("rounding", &rounding, rounding == plain.rounding),
            ("sparse_update", &sparse_update, sparse_update == plain.sparse_update),
        ];
        match got.into_iter().find(|(_, _, is_plain)| is_operations && !is_plain) {
            Some((field, got, _)) => {
                let expected = "the default for variables that candle's tensor operations update, on this device";
                Err(Error::invalid(field, expected, format!("{got:?}")))
            }
            None => Ok(()),
        }
    }
}

impl Adamax {
    /// Brings every weight up to date: rows of tables with [`SparseUpdate::Exact`] pay what they owe for the updates
    /// that they missed, and rows that a layer with [`max_norm`](crate::Embedding::max_norm) has looked up are scaled. Call
    /// it before weights are read as a whole other than by this crate, by an operation on the `Var` or by `VarMap::save`, and
    /// before they are written, by `Var::set` or `VarMap::load`. After it no row has missed an update: what is read is up to
    /// date, and what is written before the next step stands as it is, and later steps start from it. A second call in a row
    /// costs nothing. Catching up in two parts rounds differently from catching up once, so a call is part of the run.
    ///
    /// A row that was written too early and [noticed](crate::ErrorKind::WrittenRow) stands as it is, too: its moments
    /// catch up, its weights do not. The same holds where all rows catch up without this call: when the optimizer is saved or
    /// dropped, when its state or [`Table::weight`](crate::Table::weight) is read, and when settings are replaced.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, SparseUpdate, Table};
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_nn::Optimizer;
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
        self.vars.iter().try_for_each(|param| param.state.pay_all()).map_err(|error| self.own(error))?;
        self.scale_down()
    }

    /// Scales rows down in their weights that lookups have found above their `max_norm`.
    pub(super) fn scale_down(&self) -> Result<()> {
        self.vars.iter().try_for_each(|param| limits::scale_down(&param.var)).map_err(|error| self.own(error))
    }

    /// The plans of all groups, checked against the variables in them.
    pub(super) fn plans(
        &self,
        params: &ParamsAdamax,
        groups: &[GroupSettings],
        kernel: Kernel,
    ) -> Result<Vec<GroupPlan>> {
        let plans = groups.iter().map(|group| GroupPlan::of(params, group)).collect::<Result<Vec<_>>>()?;
        for param in &self.vars {
            plans[param.group].check(kernel.place(&param.var))?;
        }
        Ok(plans)
    }

    /// The states of all variables as these plans want them, for those that have to change.
    pub(super) fn replanned(&self, plans: &[GroupPlan]) -> Result<Vec<Option<ParamState>>> {
        self.vars.iter().map(|param| param.replanned(&plans[param.group])).collect()
    }

    /// Takes over what [`replanned`](Self::replanned) has made.
    pub(super) fn take_states(&mut self, states: Vec<Option<ParamState>>, plans: &[GroupPlan]) {
        for (param, state) in self.vars.iter_mut().zip(states) {
            match (state, &param.state) {
                (Some(state), _) => param.state = Held::Own(state),
                (None, Held::Shared(debts)) => {
                    debts.renew(&plans[param.group].hyper(param.decays), derive(self.params.seed, param.key));
                }
                (None, Held::Own(_)) => {}
            }
        }
    }
}

impl Param {
    /// What an update reads and writes; the state stays locked as long as the result lives.
    pub(super) fn unlock(&mut self) -> (&Tensor, Option<&Accumulated>, StateMut<'_>) {
        (self.var.as_tensor(), self.accumulated.as_ref(), self.state.get_mut())
    }

    fn replanned(&self, plan: &GroupPlan) -> Result<Option<ParamState>> {
        self.state.pay_all()?;
        let state = self.state.get();
        let layout = plan.layout(&self.var, state.moments.layout.by_rows);
        let is_kept = Master::is_kept(self.var.dtype(), plan.keeping.rounding);
        let stays_shared = matches!(self.state, Held::Own(_)) || plan.keeping.sparse_update == SparseUpdate::Exact;
        if layout == state.moments.layout && is_kept == state.master.is_some() && stays_shared {
            return Ok(None);
        }
        // A master that stays keeps what it has.
        let master = match &state.master {
            Some(old) if is_kept => Some(old.grown(&self.var)?),
            _ => Master::zeros(&self.var, state.place(), plan.keeping.rounding)?,
        };
        Ok(Some(ParamState { moments: state.moments.converted(&layout)?, master, step: state.step }))
    }

    /// Gets ready for gradients of some rows: units by rows, and a ledger if there is to be one.
    pub(super) fn prepare_rows(&mut self, plan: &GroupPlan, key: u64) -> Result<()> {
        let var = self.var.as_tensor();
        let wanted = plan.layout(var, true);
        let layout = self.state.get().moments.layout;
        if layout != wanted {
            let mut state = self.state.get_mut();
            state.moments = match state.step {
                // Nothing is there yet that could be converted.
                0 => Moments::zeros(var, state.place(), &wanted)?,
                _ => state.moments.converted(&wanted)?,
            };
        }
        if let (Held::Own(state), SparseUpdate::Exact) = (&mut self.state, plan.keeping.sparse_update) {
            let (hyper, rounding) = (plan.hyper(self.decays), plan.keeping.rounding);
            self.state = Held::Shared(Owner::new(var, row_len(var), state, &hyper, rounding, key)?);
        }
        Ok(())
    }
}
