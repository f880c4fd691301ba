//! How far a run has come: what is saved beside the weights and the optimizer's state.
//!
//! Nothing else has to be saved for a resumed run to end with the same bits as an unbroken one: the order of the texts
//! and the numbers of dropout depend on nothing but the seed, the epoch and the step.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::checkpoints::check_same_options;
use crate::evaluate::Evaluation;
use crate::model::Config;
use crate::settings::{Schedule, Settings};
use crate::train::Step;

/// How far a run has come, and which run it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    settings: Settings,
    config: Config,
    /// [`crate::tokenizer::fingerprint`].
    data: u64,
    pub(crate) steps: Vec<Step>,
    pub(crate) evaluations: Vec<Evaluation>,
}

impl Progress {
    /// A run that has not begun.
    pub(crate) fn new(settings: &Settings, config: &Config, data: u64) -> Self {
        let (settings, config) = (settings.clone(), config.clone());
        Self { settings, config, data, steps: Vec::new(), evaluations: Vec::new() }
    }

    /// Goes on from `saved`.
    pub(crate) fn resumed(self, saved: Self) -> Self {
        Self { steps: saved.steps, evaluations: saved.evaluations, ..self }
    }

    /// Checks that a run that began as `saved` would have gone on as this one does.
    pub(crate) fn check_continues(&self, saved: &Self) -> Result<()> {
        // Only a learning rate that never changes is the same for another number of steps.
        let Settings { schedule, warmup, .. } = self.settings;
        let is_constant = schedule == Schedule::Constant && warmup == 0.0;
        let may_differ = |name: &str| is_constant && ["epochs", "max_steps"].contains(&name);
        check_same_options(&self.settings, &saved.settings, may_differ)?;
        ensure!(self.data == saved.data, "the checkpoint is of a run on other texts, or with another tokenizer");
        ensure!(self.config == saved.config, "the checkpoint is of another model");
        Ok(())
    }
}
