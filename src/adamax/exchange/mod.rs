//! Moving in from other frameworks, and out: their state is made a snapshot, so that what fits is checked in one place.

mod keras;
mod torch;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::held::GroupPlan;
use super::late::without;
use super::{Adamax, Param, Sum};
use crate::checkpoint::plain::{PlainVar, check_norm, widened};
use crate::checkpoint::{Counters, Snapshot, VarSnapshot};
use crate::codec::{Encoding, StateDType};
use crate::error::{Error, Result};
use crate::gradient::sparse::densify;
use crate::group::GroupSettings;
use crate::params::ParamsAdamax;
use crate::rule::Epsilon;
use crate::schedule::Plateau;
use crate::state::{Layout, Master, MomentTensors, Moments, Place, arithmetic};

impl Adamax {
    /// The counters, and the state of every variable without its moments: zeros stand for them until it is known that nothing
    /// refuses the state, since rows of tables with `SparseUpdate::Exact` have to catch up for the moments.
    fn plain(&self) -> Result<(Counters, BTreeMap<String, PlainVar>)> {
        let late = self.late();
        let plain = self.vars.iter().map(|param| {
            let shape = param.var.shape();
            let zeros = Tensor::zeros((), arithmetic(param.var.dtype()), &Device::Cpu)?.broadcast_as(shape)?;
            let ema = param.ema.as_ref().map(|ema| ema.to_tensor(shape)).transpose()?;
            let accumulated = param.accumulated.as_ref().filter(|accumulated| accumulated.calls > 0);
            let accumulated = accumulated.map(|accumulated| {
                let sum = match &accumulated.sum {
                    Sum::Dense(sum) => sum.to_tensor(shape)?,
                    Sum::Rows(rows) => densify(None, rows, 1.0, &param.var)?,
                };
                Ok::<_, Error>((sum, accumulated.calls))
            });
            let step = self.settled_step(&param.name, param.state.get().step, late);
            let plain =
                PlainVar { exp_avg: zeros.clone(), exp_inf: zeros, step, ema, accumulated: accumulated.transpose()? };
            Ok((param.name.clone(), plain))
        });
        Ok((without(&self.counters, late), plain.collect::<Result<_>>()?))
    }

    /// Adds m and u as they are, decoded where they are encoded. All rows catch up.
    fn add_moments(&self, vars: &mut BTreeMap<String, PlainVar>) -> Result<()> {
        for param in &self.vars {
            param.state.pay_all()?;
            if let Some(plain) = vars.get_mut(&param.name) {
                (plain.exp_avg, plain.exp_inf) = param.state.get().moments.to_tensors(param.var.shape())?;
            }
        }
        Ok(())
    }

    /// Takes state from elsewhere, with these settings, as [`restore`](Self::restore) does.
    fn restore_plain(
        &mut self,
        params: ParamsAdamax,
        groups: Vec<GroupSettings>,
        counters: Counters,
        vars: &BTreeMap<String, PlainVar>,
    ) -> Result<()> {
        params.validate()?;
        let plans = self.plans(&params, &groups, self.kernel)?;
        let vars = self.vars.iter().map(|param| {
            let Some(plain) = vars.get(&param.name) else {
                return Err(Error::checkpoint(&param.name, "the state of this var", "none"));
            };
            let mut var = param.stored(plain, &plans[param.group], groups[param.group].name.clone())?;
            // Before the first call an average is nothing yet, whatever stands for it elsewhere.
            var.ema = var.ema.filter(|_| counters.calls > 0);
            Ok((param.name.clone(), var))
        });
        let vars = vars.collect::<Result<_>>()?;
        // Loss scale and plateau belong to the training loop there, and begin anew: what metrics have made of a learning rate
        // is in the file's, unless that is a schedule's.
        let grad_scaler = params.grad_scaler.map(|scaler| scaler.start());
        let plateau = params.plateau.map(|_| Plateau::default());
        self.try_restore(&Snapshot { params, groups, counters, grad_scaler, plateau, vars })
    }

    /// Makes sure that epsilon stands where the framework has it, since u holds something else otherwise.
    fn require_epsilon(&self, expected: Epsilon, framework: &str) -> Result<()> {
        let own = self.params.epsilon;
        if own == expected {
            return Ok(());
        }
        Err(Error::checkpoint(
            "epsilon",
            format!("{expected:?}, which is {framework}'s convention"),
            format!("{own:?}"),
        ))
    }
}

impl Param {
    /// State from elsewhere as a snapshot has it for this variable.
    fn stored(&self, plain: &PlainVar, plan: &GroupPlan, group: String) -> Result<VarSnapshot> {
        let (name, var) = (self.name.as_str(), self.var.as_tensor());
        let widened = |what: &'static str, tensor: &Tensor| widened(name, what, tensor, var);
        let exp_inf = widened("exp_inf", &plain.exp_inf)?;
        check_norm(&format!("{name}.exp_inf"), &exp_inf)?;
        let tensors = MomentTensors { exp_avg: widened("exp_avg", &plain.exp_avg)?, exp_inf, units: None };
        let as_they_are = Layout::of(var, StateDType::F32, false, false, Encoding::of(&plan.hyper));
        let layout = plan.layout(var, false);
        let MomentTensors { exp_avg, exp_inf, units } = if layout == as_they_are {
            tensors
        } else {
            let moments = Moments::from_stored(&tensors, var, Place::Host, &as_they_are)?;
            moments.converted(&layout)?.to_stored(var.shape())?
        };
        // The weights come from elsewhere, so that a master copy begins as they are.
        let master = Master::zeros(var, Place::Host, plan.keeping.rounding)?;
        let accumulated = plain.accumulated.as_ref().map(|(sum, calls)| {
            let sum = widened("accumulated", sum)?;
            Ok::<_, Error>((sum.into(), *calls))
        });
        Ok(VarSnapshot {
            group,
            step: plain.step,
            exp_avg,
            exp_inf,
            units,
            by_rows: layout.by_rows,
            master: master.map(|master| master.to_tensor(var.shape())).transpose()?,
            ema: plain.ema.as_ref().map(|ema| widened("ema", ema)).transpose()?,
            accumulated: accumulated.transpose()?,
        })
    }
}
