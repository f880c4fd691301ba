//! Learning rates of an optimizer: by schedules, and as a metric has lowered them.

use super::Adamax;
use crate::error::{Error, Result};
use crate::params::ParamsAdamax;
use crate::schedule::{LearningRateSchedule, Schedule};

impl Adamax {
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
        let call = self.resolved().counters.calls;
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
    pub fn observe_metric(&mut self, metric: f64) -> Result<bool> {
        let Some(settings) = self.params.plateau else {
            let expected = "the settings of a plateau, for a metric to be observed";
            return Err(self.own(Error::invalid("plateau", expected, "none")));
        };
        let scheduled = self.params.lr.at(self.resolved().counters.calls).map_err(|error| self.own(error))?;
        Ok(self.plateau.get_or_insert_default().observe(&settings, metric, scheduled))
    }

    /// Sets a schedule whose step 0 is the next call, whatever number that call has: for a second stage of training.
    ///
    /// The learning rate becomes `schedule` [starting at](Schedule::starting_at) the current number of
    /// [calls](Self::calls), which is plain data, so that checkpoints carry it. (A schedule in
    /// [`set_params`](Self::set_params) counts all calls of the optimizer: a cosine of 100 steps that is set after 100
    /// calls is over.) What a [plateau](ParamsAdamax::plateau) has lowered learning rates by is forgotten, as in
    /// [`set_learning_rate`](candle_nn::Optimizer::set_learning_rate). Groups with learning rates of their own keep them.
    ///
    /// ```
    /// use candle_adamax::{Adamax, CosineDecay, ParamsAdamax};
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let w = Var::new(&[3.0f32, -2.0], &Device::Cpu)?;
    /// let params = ParamsAdamax { lr: CosineDecay::new(0.5, 100).into(), ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// for _ in 0..100 {
    ///     optimizer.backward_step(&w.sqr()?.sum_all()?)?;
    /// }
    /// assert_eq!(optimizer.learning_rate(), 0.0);
    ///
    /// optimizer.start_schedule(CosineDecay::new(0.25, 50))?; // the second stage
    /// assert_eq!(optimizer.learning_rate(), 0.25);
    /// for _ in 0..25 {
    ///     optimizer.backward_step(&w.sqr()?.sum_all()?)?;
    /// }
    /// assert_eq!(optimizer.learning_rate(), 0.125);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A setting of the schedule that is not allowed; a device that does not answer. Nothing has changed then.
    pub fn start_schedule(&mut self, schedule: impl Into<Schedule>) -> Result<()> {
        let schedule = schedule.into();
        self.named(|adamax| {
            schedule.validate().map_err(|error| error.within("lr"))?;
            adamax.sync()?;
            let lr = schedule.starting_at(adamax.progress.counters.calls).into();
            adamax.set_params(ParamsAdamax { lr, ..adamax.params.clone() })?;
            if let Some(plateau) = &mut adamax.plateau {
                plateau.lr_factor = 1.0;
            }
            Ok(())
        })
    }
}
