//! Moving in from other frameworks, and out: their state is made a snapshot, so that what fits is checked in one place.

mod keras;
mod torch;

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Adamax;
use super::settings::ResolvedGroup;
use super::sums::Sum;
use super::vars::{Param, VarInfo};
use crate::checkpoint::plain::{PlainVar, check_norm};
use crate::checkpoint::{Counters, Snapshot, VarSnapshot};
use crate::codec::{Encoding, StateDType};
use crate::error::{Error, Result};
use crate::gradient::sparse::densify;
use crate::group::GroupSettings;
use crate::ids::row_len;
use crate::kernel::RowGrad;
use crate::params::ParamsAdamax;
use crate::rule::EpsMode;
use crate::schedule::Plateau;
use crate::state::{Layout, Master, MomentTensors, Moments, Place, Units, arithmetic};

impl Adamax {
    /// The state of every variable with m and u as they are, decoded where they are encoded, and the counters. With
    /// `SparseUpdate::Exact` all rows catch up.
    fn plain(&self) -> Result<(Counters, BTreeMap<String, PlainVar>)> {
        let counters = self.resolved().counters;
        self.scale_down()?;
        let plain = self.vars.iter().enumerate().map(|(index, param)| {
            let Param { info, state: cell, sum, .. } = &**param;
            let shape = info.var.shape();
            cell.catch_up()?;
            let (exp_avg, exp_inf) = cell.read(|state| state.moments.to_tensors(shape))?;
            let accumulated = match sum.get() {
                None => None,
                Some(Sum::Dense(dense)) => Some((dense.to_tensor(shape)?, sum.calls)),
                Some(Sum::Rows(rows)) => {
                    let rows = RowGrad::of_sums(rows.merged(), row_len(&info.var));
                    Some((densify(None, &rows, 1.0, &info.var)?, sum.calls))
                }
            };
            let (step, ema) = (self.step_of(index), self.average(index)?);
            Ok((info.name.clone(), PlainVar { exp_avg, exp_inf, step, ema, accumulated }))
        });
        Ok((counters, plain.collect::<Result<_>>()?))
    }

    /// Makes sure that state from elsewhere has the shapes and dtypes of the variables.
    fn check_plain(&self, vars: &BTreeMap<String, PlainVar>) -> Result<()> {
        let mut found = self.vars.iter().filter_map(|info| Some((info, vars.get(&info.name)?)));
        found.try_for_each(|(info, plain)| plain.check(&info.name, &info.var))
    }

    /// Takes [checked](Self::check_plain) state from elsewhere, with these settings, as [`restore`](Self::restore) does.
    fn restore_plain(
        &mut self,
        params: ParamsAdamax,
        groups: Vec<GroupSettings>,
        counters: Counters,
        vars: &BTreeMap<String, PlainVar>,
    ) -> Result<()> {
        params.validate()?;
        let resolved = self.resolve(&params, &groups, self.kernel)?;
        let vars = self.vars.iter().map(|info| {
            let Some(plain) = vars.get(&info.name) else {
                return Err(Error::checkpoint(&info.name, "the state of this var", "none"));
            };
            let mut var = info.stored(plain, &resolved[info.group], groups[info.group].name.clone())?;
            // Before the first call an average is nothing yet, whatever stands for it elsewhere.
            var.ema = var.ema.filter(|_| counters.calls > 0);
            Ok((info.name.clone(), var))
        });
        let vars = vars.collect::<Result<_>>()?;
        // Loss scale and plateau belong to the training loop there, and begin anew: what metrics have made of a learning rate
        // is in the file's, unless that is a schedule's.
        let grad_scaler = params.loss_scale.start();
        let plateau = params.plateau.map(|_| Plateau::default());
        self.try_restore(&Snapshot { params, groups, counters, grad_scaler, plateau, vars })
    }

    /// Makes sure that epsilon stands where the framework has it, since u holds something else otherwise.
    fn require_eps_mode(&self, expected: EpsMode, framework: &str) -> Result<()> {
        let own = self.params.eps_mode;
        if own == expected {
            return Ok(());
        }
        Err(Error::checkpoint(
            "eps_mode",
            format!("{expected:?}, which is {framework}'s convention"),
            format!("{own:?}"),
        ))
    }
}

impl VarInfo {
    /// State from elsewhere as a snapshot has it for this variable.
    fn stored(&self, plain: &PlainVar, resolved: &ResolvedGroup, group: String) -> Result<VarSnapshot> {
        let (name, var) = (self.name.as_str(), self.var.as_tensor());
        // Exact.
        let widened = |tensor: &Tensor| tensor.to_dtype(arithmetic(var.dtype()));
        let exp_inf = widened(&plain.exp_inf)?;
        check_norm(&format!("{name}.exp_inf"), &exp_inf)?;
        let tensors = MomentTensors { exp_avg: widened(&plain.exp_avg)?, exp_inf, scales: None };
        let as_they_are = Layout::of(var, StateDType::F32, Units::Blocks, false, Encoding::of(&resolved.hyper));
        let layout = resolved.layout(var, Units::Blocks);
        let MomentTensors { exp_avg, exp_inf, scales } = if layout == as_they_are {
            tensors
        } else {
            let moments = Moments::from_stored(&tensors, var, Place::Host, &as_they_are)?;
            moments.converted(&layout)?.to_stored(var.shape())?
        };
        // The weights come from elsewhere, so that a master copy begins as they are.
        let master = Master::zeros(var, Place::Host, resolved.storage.rounding)?;
        let accumulated = plain.accumulated.as_ref().map(|(sum, calls)| {
            let sum = widened(sum)?;
            Ok::<_, Error>((sum.into(), *calls))
        });
        Ok(VarSnapshot {
            group,
            step: plain.step,
            exp_avg,
            exp_inf,
            scales,
            by_rows: layout.units == Units::Rows,
            master: master.map(|master| master.to_tensor(var.shape())).transpose()?,
            ema: plain.ema.as_ref().map(widened).transpose()?,
            accumulated: accumulated.transpose()?,
            missed: None,
        })
    }
}
