//! Checkpoints: the weights, the optimizer's state and the progress of the same moment, together or not at all.
//!
//! A checkpoint is a folder `checkpoint-N` with three files. It is written under another name, synced, and renamed:
//! whoever finds a folder of this name finds all of it. Only then are the others removed, so that at any moment the
//! one with the highest number is complete and the newest.
//!
//! Nothing else has to be saved for a resumed run to end with the same bits as an unbroken one. The learning rate
//! follows from the optimizer's count of calls, the split and the data from the settings; and the random numbers of an
//! epoch depend on nothing but the seed and the epoch.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_adamax::Adamax;
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::Ratings;
use crate::evaluate::Epoch;
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

/// The checkpoints of one output folder.
pub(crate) struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Saves a checkpoint and removes those before it.
    pub(crate) fn save(&self, progress: &Progress, varmap: &VarMap, optimizer: &Adamax) -> Result<()> {
        let number = self.numbers()?.into_iter().max().unwrap_or(0) + 1;
        let path = self.path(number);
        let write = || -> Result<()> {
            fs::create_dir_all(&self.folder)?;
            let partial = path.with_extension("partial");
            if partial.exists() {
                fs::remove_dir_all(&partial)?; // of a run that was killed
            }
            fs::create_dir(&partial)?;
            // Rows of tables may owe updates; whoever reads the weights from the file will not know of that.
            optimizer.catch_up()?;
            varmap.save(partial.join(WEIGHTS))?;
            optimizer.save(partial.join(OPTIMIZER))?;
            fs::write(partial.join(PROGRESS), serde_json::to_string_pretty(progress)?)?;
            for file in [WEIGHTS, OPTIMIZER, PROGRESS] {
                File::options().write(true).open(partial.join(file))?.sync_all()?;
            }
            sync_folder(&partial)?;
            fs::rename(&partial, &path)?;
            sync_folder(&self.folder)?;
            self.numbers()?
                .into_iter()
                .filter(|&other| other != number)
                .try_for_each(|other| Ok(fs::remove_dir_all(self.path(other))?))
        };
        write().with_context(|| format!("cannot save the checkpoint {}", path.display()))
    }

    /// Takes weights and optimizer back to the last checkpoint of the run that `progress` is the beginning of.
    pub(crate) fn load(&self, progress: Progress, varmap: &mut VarMap, optimizer: &mut Adamax) -> Result<Progress> {
        let Some(number) = self.numbers()?.into_iter().max() else {
            bail!("there is no checkpoint in {} to resume from", self.folder.display());
        };
        let path = self.path(number);
        let read = || -> Result<Progress> {
            let saved: Progress = serde_json::from_slice(&fs::read(path.join(PROGRESS))?)?;
            progress.check_continues(&saved)?;
            varmap.load(path.join(WEIGHTS))?;
            optimizer.load(path.join(OPTIMIZER))?;
            Ok(Progress { history: saved.history, ..progress })
        };
        read().with_context(|| format!("cannot resume from {}", path.display()))
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("checkpoint-{number}"))
    }

    /// The numbers of the complete checkpoints.
    fn numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        if !self.folder.exists() {
            return Ok(numbers);
        }
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.strip_prefix("checkpoint-")?.parse::<u64>().ok()));
        }
        Ok(numbers)
    }
}

/// Makes renames in a folder last, on systems where one has to ask for that.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
