//! The learning rates of an optimizer: of each call and group, by schedules and by what a metric has made of them.

use super::Adamax;
use super::held::GroupPlan;
use crate::error::{Error, Result};
use crate::rule::Coefficients;

/// The learning rate of one call, for the optimizer and for each group, with the group's other numbers.
pub(super) struct Rates {
    pub(super) base: f64,
    pub(super) groups: Vec<GroupRates>,
}

pub(super) struct GroupRates {
    pub(super) lr: f64,
    pub(super) plan: GroupPlan,
    /// `-log2(beta2)`.
    pub(super) octaves: f64,
}

/// The coefficients that were asked for last, and for what.
pub(super) type Last = Option<((usize, bool, u64), Coefficients<f64>)>;

impl Rates {
    /// The coefficients of update `t` in a group. Neighbors mostly ask for the same, which `last` remembers.
    pub(super) fn coefficients(&self, group: usize, decays: bool, t: u64, last: &mut Last) -> Coefficients<f64> {
        let key = (group, decays, t);
        if let Some((of, coefficients)) = *last
            && of == key
        {
            return coefficients;
        }
        let GroupRates { lr, plan, .. } = &self.groups[group];
        let coefficients = Coefficients::of_update(&plan.hyper(decays), *lr, t);
        *last = Some((key, coefficients));
        coefficients
    }
}

impl Adamax {
    /// The learning rates of call `call`.
    pub(super) fn rates(&self, call: u64) -> Result<Rates> {
        let base = self.params.lr.at(call)?;
        let groups = self.groups.iter().map(|group| {
            let plan = GroupPlan::of(&self.params, group)?;
            let octaves = -plan.hyper.beta2.log2();
            Ok(GroupRates { lr: self.reduced(group.lr(base, call)?), plan, octaves })
        });
        Ok(Rates { base: self.reduced(base), groups: groups.collect::<Result<_>>()? })
    }

    /// The learning rate of call `call`, before groups.
    pub(super) fn rate(&self, call: u64) -> Result<f64> {
        Ok(self.reduced(self.params.lr.at(call)?))
    }

    /// What metrics have made of a learning rate that would be `scheduled`.
    pub(super) fn reduced(&self, scheduled: f64) -> f64 {
        match (&self.params.plateau, &self.plateau) {
            (Some(settings), Some(plateau)) => plateau.reduced(settings, scheduled),
            _ => scheduled,
        }
    }

    /// The learning rate of the next call for the variables of a group.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
    ///
    /// let params = ParamsAdamax { lr: 0.5.into(), ..Default::default() };
    /// let optimizer = Adamax::from_groups([ParamGroup::new("head").lr_factor(0.5)], params)?;
    /// assert_eq!(optimizer.group_learning_rate("head")?, 0.25);
    /// assert_eq!(optimizer.group_learning_rate("default")?, 0.5);
    /// # Ok::<(), candle_adamax::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No group has this name; a learning rate that the next step would refuse.
    pub fn group_learning_rate(&self, name: &str) -> Result<f64> {
        let group = &self.groups[self.group_index(name)?];
        let call = self.settled_counters().calls;
        let lr = self.params.lr.at(call).and_then(|base| group.lr(base, call));
        lr.map(|lr| self.reduced(lr)).map_err(|error| self.own(error))
    }

    /// Takes a metric, such as the loss of an epoch on data that are not trained on, and tells whether it has lowered the
    /// learning rates: see [`ReduceLrOnPlateau`](crate::ReduceLrOnPlateau).
    ///
    /// # Errors
    ///
    /// No [`plateau`](crate::ParamsAdamax::plateau) is set; a learning rate that the next step would refuse. Nothing has
    /// changed then.
    pub fn observe(&mut self, metric: f64) -> Result<bool> {
        let Some(settings) = self.params.plateau else {
            let expected = "the settings of a plateau, for a metric to be observed";
            return Err(self.own(Error::invalid("plateau", expected, "none")));
        };
        let scheduled = self.params.lr.at(self.settled_counters().calls).map_err(|error| self.own(error))?;
        Ok(self.plateau.get_or_insert_default().observe(&settings, metric, scheduled))
    }
}
