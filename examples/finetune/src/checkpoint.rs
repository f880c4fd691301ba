//! Checkpoints: the weights, the optimizer's state and the progress of the same moment, together or not at all.
//!
//! Nothing else has to be saved for a resumed run to end with the same bits as an unbroken one: the order of the texts
//! and the numbers of dropout depend on nothing but the seed, the epoch and the step.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_adamax::Adamax;
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::evaluate::Evaluation;
use crate::folders::Folders;
use crate::model::Config;
use crate::settings::Settings;
use crate::train::Step;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PROGRESS: &str = "progress.json";

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

    /// Checks that a run that began as `saved` would have gone on as this one does.
    fn check_continues(&self, saved: &Self) -> Result<()> {
        let (now, then) = (serde_json::to_value(&self.settings)?, serde_json::to_value(&saved.settings)?);
        for (name, value) in now.as_object().into_iter().flatten() {
            let then = then.get(name).unwrap_or(&Value::Null);
            ensure!(
                value == then,
                "the checkpoint is of a run with {}, and this one has {}: give the same options, or leave --resume out \
                 to start again",
                option(name, then),
                option(name, value),
            );
        }
        ensure!(self.data == saved.data, "the checkpoint is of a run on other texts, or with another tokenizer");
        ensure!(self.config == saved.config, "the checkpoint is of another model");
        Ok(())
    }
}

/// An option as it is given on the command line.
fn option(name: &str, value: &Value) -> String {
    let name = name.replace('_', "-");
    match value {
        Value::Null => format!("no --{name}"),
        Value::String(value) => format!("--{name} {value}"),
        value => format!("--{name} {value}"),
    }
}

/// Saves a checkpoint and removes those before it.
pub(crate) fn save(folders: &Folders, progress: &Progress, varmap: &VarMap, optimizer: &Adamax) -> Result<()> {
    folders.save(|folder| {
        // Rows of words may owe updates; whoever reads the weights from the file will not know of that.
        optimizer.catch_up()?;
        varmap.save(folder.join(WEIGHTS))?;
        optimizer.save(folder.join(OPTIMIZER))?;
        Ok(fs::write(folder.join(PROGRESS), serde_json::to_string(progress)?)?)
    })
}

/// Takes weights and optimizer back to the last checkpoint of the run that `progress` is the beginning of.
pub(crate) fn load(
    folders: &Folders,
    progress: &Progress,
    varmap: &mut VarMap,
    optimizer: &mut Adamax,
) -> Result<Progress> {
    folders.load(|folder: &Path| {
        let saved: Progress = serde_json::from_slice(&fs::read(folder.join(PROGRESS))?)?;
        progress.check_continues(&saved)?;
        varmap.load(folder.join(WEIGHTS))?;
        optimizer.load(folder.join(OPTIMIZER))?;
        Ok(saved)
    })
}
