//! States change their encoding or their place.

use super::Adamax;
use super::settings::ResolvedGroup;
use super::state::StateCell;
use super::sums::Sum;
use super::vars::Param;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::params::SparseUpdate;
use crate::rounding::derive;
use crate::state::{Buffer, Master, ParamState, Place};

impl Adamax {
    /// Chooses another kernel and moves the state to where it needs it.
    ///
    /// # Errors
    ///
    /// The device has no memory for the state; nothing has changed then.
    pub fn set_kernel(&mut self, kernel: Kernel) -> Result<()> {
        self.named(|adamax| {
            adamax.sync()?;
            let resolved = adamax.resolve(&adamax.params, &adamax.groups, kernel)?;
            adamax.catch_up()?;
            let moved = (0..adamax.vars.len()).map(|index| adamax.moved(index, kernel.place(&adamax.vars[index].var)));
            let moved = moved.collect::<Result<Vec<_>>>()?;
            for (index, Moved { place, state, sum, average }) in moved.into_iter().enumerate() {
                let param = &mut adamax.vars[index];
                param.info.place = place;
                if let Some(state) = state {
                    param.state = StateCell::Own(state);
                }
                if let Some(sum) = sum {
                    param.sum.sum = Some(Sum::Dense(sum));
                }
                param.average = average;
            }
            adamax.kernel = kernel;
            adamax.resolved = resolved;
            Ok(())
        })
    }

    fn moved(&self, index: usize, place: Place) -> Result<Moved> {
        let Param { info, state, sum, average, .. } = &*self.vars[index];
        let var = info.var.as_tensor();
        let buffer = |buffer: &Buffer| Buffer::from_tensor(&buffer.to_tensor(var.shape())?, var, place);
        // A state that stays need not be copied.
        let state = state.read(|state| (state.place() != place).then(|| state.moved(var, place)));
        // Sums of rows are in host memory anyway.
        let sum = match &sum.sum {
            Some(Sum::Dense(sum)) => Some(buffer(sum)?),
            _ => None,
        };
        let average = average.as_ref().map(buffer).transpose()?;
        Ok(Moved { place, state: state.transpose()?, sum, average })
    }

    /// The states of all variables as these settings want them, for those that have to change. Rows of tables catch up.
    pub(super) fn converted(&self, resolved: &[ResolvedGroup]) -> Result<Vec<Option<ParamState>>> {
        let converted = self.vars.iter().map(|param| {
            let Param { info, state: cell, .. } = &**param;
            cell.catch_up()?;
            let group = &resolved[info.group];
            let stays_table = !cell.is_table() || group.storage.sparse_update == SparseUpdate::Exact;
            cell.read(|state| {
                let layout = group.layout(&info.var, state.moments.layout.units);
                let is_kept = Master::is_kept(info.var.dtype(), group.storage.rounding);
                if layout == state.moments.layout && is_kept == state.master.is_some() && stays_table {
                    return Ok(None);
                }
                // A master that stays keeps what it has.
                let master = match &state.master {
                    Some(old) if is_kept => Some(old.grown(&info.var)?),
                    _ => Master::zeros(&info.var, info.place, group.storage.rounding)?,
                };
                Ok(Some(ParamState { moments: state.moments.converted(&layout)?, master, step: state.step }))
            })
        });
        converted.collect()
    }

    /// Takes over settings, and the states that are [converted](Self::converted) for them.
    pub(super) fn take_converted(&mut self, states: Vec<Option<ParamState>>, resolved: Vec<ResolvedGroup>) {
        for (param, state) in self.vars.iter_mut().zip(states) {
            let Param { info, state: cell, .. } = &mut **param;
            match (state, &*cell) {
                (Some(state), _) => *cell = StateCell::Own(state),
                (None, StateCell::Table(table)) => {
                    table.renew(info.hyper(&resolved[info.group]), derive(self.params.seed, info.key));
                }
                (None, StateCell::Own(_)) => {}
            }
        }
        self.resolved = resolved;
    }
}

/// All that is kept for one variable, where another kernel needs it.
struct Moved {
    place: Place,
    state: Option<ParamState>,
    sum: Option<Buffer>,
    average: Option<Buffer>,
}
