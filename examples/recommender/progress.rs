//! How far a run has come: what is saved beside the weights and the optimizer's state.
//!
//! Nothing else has to be saved for a resumed run to end with the same bits as an unbroken one. The learning rate
//! follows from the optimizer's count of calls, the split and the data from the settings; and the random numbers of an
//! epoch depend on nothing but the seed and the epoch.

use anyhow::{Result, ensure};
use candle_adamax::Adamax;
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};

use crate::checkpoints::{Checkpoints, check_same_options};
use crate::data::Ratings;
use crate::evaluate::Epoch;
use crate::settings::Settings;

/// How far a run has come, and which run it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    settings: Settings,
    /// [`Ratings::fingerprint`].
    data: u64,
    pub(crate) history: Vec<Epoch>,
}

impl Progress {
    /// A run that has not begun.
    pub(crate) fn new(settings: &Settings, ratings: &Ratings) -> Self {
        Self { settings: settings.clone(), data: ratings.fingerprint(), history: Vec::new() }
    }

    /// Takes weights and optimizer back to the last checkpoint of the run that this is the beginning of.
    pub(crate) fn resume(self, checkpoints: &Checkpoints, varmap: &mut VarMap, optimizer: &mut Adamax) -> Result<Self> {
        let saved = checkpoints.load(|saved| self.check_continues(saved), varmap, optimizer)?;
        Ok(Self { history: saved.history, ..self })
    }

    /// Checks that a run that began as `saved` would have gone on as this one does.
    fn check_continues(&self, saved: &Self) -> Result<()> {
        let longer = !self.settings.schedule.depends_on_epochs() && self.settings.epochs >= saved.history.len();
        check_same_options(&self.settings, &saved.settings, |name| name == "epochs" && longer)?;
        ensure!(self.data == saved.data, "the checkpoint is of a run on other data");
        Ok(())
    }
}
