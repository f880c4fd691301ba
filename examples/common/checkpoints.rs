//! Checkpoints as numbered folders: weights, optimizer and progress of the same moment, together or not at all.
//!
//! A checkpoint is a folder `checkpoint-N`. It is written under another name, synced, and renamed: whoever finds a
//! folder of this name finds all of it. Only then are the others removed, so that at any moment the one with the
//! highest number is complete and the newest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_adamax::Adamax;
use candle_nn::VarMap;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::files;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PROGRESS: &str = "progress.json";

/// Those of one output folder.
pub(crate) struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Saves a checkpoint and removes those before it.
    pub(crate) fn save(&self, progress: &impl Serialize, varmap: &VarMap, optimizer: &Adamax) -> Result<()> {
        self.write(|folder| {
            // Rows of tables may owe updates; whoever reads the weights from the file will not know of that.
            optimizer.catch_up()?;
            files::write(&folder.join(WEIGHTS), |path| Ok(varmap.save(path)?))?;
            optimizer.save(folder.join(OPTIMIZER))?;
            Ok(fs::write(folder.join(PROGRESS), serde_json::to_string_pretty(progress)?)?)
        })
    }

    /// Takes weights and optimizer back to the newest checkpoint, if `check` finds its progress to be that of this run.
    pub(crate) fn load<P: DeserializeOwned>(
        &self,
        check: impl FnOnce(&P) -> Result<()>,
        varmap: &mut VarMap,
        optimizer: &mut Adamax,
    ) -> Result<P> {
        self.read(|folder| {
            let saved: P = serde_json::from_slice(&fs::read(folder.join(PROGRESS))?)?;
            check(&saved)?;
            varmap.load(folder.join(WEIGHTS))?;
            optimizer.load(folder.join(OPTIMIZER))?;
            Ok(saved)
        })
    }

    fn write(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let newest = self.numbers()?.into_iter().max().unwrap_or(0);
        let free = (newest..u64::MAX).map(|number| number + 1).find(|&number| !self.path(number).exists());
        let number =
            free.with_context(|| format!("no number is left for a checkpoint in {}", self.folder.display()))?;
        let path = self.path(number);
        let save = || -> Result<()> {
            fs::create_dir_all(&self.folder)?;
            let partial = path.with_extension("partial");
            if partial.exists() {
                fs::remove_dir_all(&partial)?; // of a run that was killed
            }
            fs::create_dir(&partial)?;
            write(&partial)?;
            for file in fs::read_dir(&partial)? {
                File::options().write(true).open(file?.path())?.sync_all()?;
            }
            sync_folder(&partial)?;
            fs::rename(&partial, &path)?;
            sync_folder(&self.folder)?;
            self.numbers()?
                .into_iter()
                .filter(|&other| other != number)
                .try_for_each(|other| Ok(fs::remove_dir_all(self.path(other))?))
        };
        save().with_context(|| format!("cannot save the checkpoint {}", path.display()))
    }

    fn read<T>(&self, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let newest = self.numbers()?.into_iter().max();
        let number =
            newest.with_context(|| format!("there is no checkpoint in {} to resume from", self.folder.display()))?;
        let path = self.path(number);
        read(&path).with_context(|| format!("cannot resume from {}", path.display()))
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("checkpoint-{number}"))
    }

    /// The numbers of the complete checkpoints. Those of other programs may have the same names, such as
    /// `checkpoint-500` of the `Trainer` of `transformers`: they are neither read nor removed.
    fn numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        if !self.folder.exists() {
            return Ok(numbers);
        }
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("checkpoint-")?.parse::<u64>().ok());
            numbers.extend(number.filter(|&number| {
                let path = self.path(number); // another one where the name has zeros before the number
                path.file_name() == Some(&name)
                    && [WEIGHTS, OPTIMIZER, PROGRESS].iter().all(|file| path.join(file).is_file())
            }));
        }
        Ok(numbers)
    }
}

/// Makes renames in a folder last, on systems where one has to ask for that.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Checks that a run with the options `then` would have gone on as one with the options `now` does; `may_differ` says of
/// which option that does not depend.
pub(crate) fn check_same_options(
    now: &impl Serialize,
    then: &impl Serialize,
    may_differ: impl Fn(&str) -> bool,
) -> Result<()> {
    let (now, then) = (serde_json::to_value(now)?, serde_json::to_value(then)?);
    for (name, value) in now.as_object().into_iter().flatten() {
        let then = then.get(name).unwrap_or(&Value::Null);
        ensure!(
            value == then || may_differ(name),
            "the checkpoint is of a run with {}, and this one has {}: give the same options, or leave --resume out to \
             start again",
            option(name, then),
            option(name, value),
        );
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use candle_adamax::ParamsAdamax;
    use candle_nn::Optimizer;

    use super::*;

    #[test]
    fn what_other_programs_call_a_checkpoint_is_left_alone() -> Result<()> {
        let folder = std::env::temp_dir().join(format!("candle-adamax-checkpoints-{}", std::process::id()));
        let foreign = ["checkpoint-2", "checkpoint-007", "checkpoint-500", "checkpoint-18446744073709551615"];
        for name in foreign {
            fs::create_dir_all(folder.join(name))?;
            fs::write(folder.join(name).join("model.safetensors"), "another program's")?;
        }
        let (checkpoints, varmap) = (Checkpoints::new(&folder), VarMap::new());
        let optimizer = Adamax::new(vec![], ParamsAdamax::default())?;
        let nothing = checkpoints.read(|_| Ok(())).expect_err("no checkpoint");
        ensure!(nothing.to_string().starts_with("there is no checkpoint"), "{nothing:#}");
        for expected in [vec![1], vec![3], vec![4]] {
            checkpoints.save(&"progress", &varmap, &optimizer)?;
            ensure!(checkpoints.numbers()? == expected, "{:?}", checkpoints.numbers()?);
        }
        ensure!(foreign.iter().all(|name| folder.join(name).join("model.safetensors").is_file()), "one was removed");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
