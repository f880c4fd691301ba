//! Checkpoints: the weights, the optimizer's state and the progress of the same moment, together or not at all.
//!
//! How a checkpoint is complete or not there is the business of `folders.rs`.
//!
//! Nothing else has to be saved for a resumed run to end with the same bits as an unbroken one. The learning rate
//! follows from the optimizer's count of calls, the split and the data from the settings; and the random numbers of an
//! epoch depend on nothing but the seed and the epoch.

use std::fs;

use anyhow::{Result, ensure};
use candle_adamax::Adamax;
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::Ratings;
use crate::evaluate::Epoch;
use crate::folders::Folders;
use crate::settings::Settings;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PROGRESS: &str = "progress.json";

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

    /// Checks that a run that began as `saved` would have gone on as this one does.
    fn check_continues(&self, saved: &Self) -> Result<()> {
        let longer = !self.settings.schedule.depends_on_epochs() && self.settings.epochs >= saved.history.len();
        let (now, then) = (serde_json::to_value(&self.settings)?, serde_json::to_value(&saved.settings)?);
        for (name, value) in now.as_object().into_iter().flatten() {
            let then = then.get(name).unwrap_or(&Value::Null);
            ensure!(
                value == then || (name == "epochs" && longer),
                "the checkpoint is of a run with --{option} {then}, and this one has --{option} {value}: \
                 give the same options, or leave --resume out to start again",
                option = name.replace('_', "-"),
            );
        }
        ensure!(self.data == saved.data, "the checkpoint is of a run on other data");
        Ok(())
    }
}

/// Saves a checkpoint and removes those before it.
pub(crate) fn save(folders: &Folders, progress: &Progress, varmap: &VarMap, optimizer: &Adamax) -> Result<()> {
    folders.save(|folder| {
        // Rows of tables may owe updates; whoever reads the weights from the file will not know of that.
        optimizer.catch_up()?;
        varmap.save(folder.join(WEIGHTS))?;
        optimizer.save(folder.join(OPTIMIZER))?;
        Ok(fs::write(folder.join(PROGRESS), serde_json::to_string_pretty(progress)?)?)
    })
}

/// Takes weights and optimizer back to the last checkpoint of the run that `progress` is the beginning of.
pub(crate) fn load(
    folders: &Folders,
    progress: Progress,
    varmap: &mut VarMap,
    optimizer: &mut Adamax,
) -> Result<Progress> {
    folders.load(|folder| {
        let saved: Progress = serde_json::from_slice(&fs::read(folder.join(PROGRESS))?)?;
        progress.check_continues(&saved)?;
        varmap.load(folder.join(WEIGHTS))?;
        optimizer.load(folder.join(OPTIMIZER))?;
        Ok(Progress { history: saved.history, ..progress })
    })
}
