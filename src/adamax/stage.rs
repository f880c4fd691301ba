//! A stage of training whose schedule begins now.

use super::Adamax;
use crate::error::Result;
use crate::params::ParamsAdamax;
use crate::schedule::{LearningRateSchedule, Schedule};

impl Adamax {
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
        schedule.validate().map_err(|error| self.own(error.within("lr")))?;
        self.settle(true).map_err(|error| self.own(error))?;
        let lr = schedule.starting_at(self.counters.calls).into();
        self.set_params(ParamsAdamax { lr, ..self.params.clone() })?;
        if let Some(plateau) = &mut self.plateau {
            plateau.lr_factor = 1.0;
        }
        Ok(())
    }
}
