//! Checkpoints as numbered folders: weights, optimizer and progress of the same moment, together or not at all.
//!
//! A checkpoint is a folder `checkpoint-N`. It is written under another name, synced, and renamed: whoever finds a
//! folder of this name finds all of it. Only then are the others removed, so that at any moment the one with the
//! highest number is complete and the newest.
//!
//! Training does not wait for the disk: the training thread takes copies, and another thread writes them. One checkpoint
//! is written at a time.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use candle_adamax::{Adamax, Snapshot};
use candle_core::{Device, Tensor, Var};
use candle_nn::VarMap;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::files;

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PROGRESS: &str = "progress.json";

/// Those of one output folder.
pub(crate) struct Checkpoints {
    folder: Folder,
    /// Writes the last one that was saved.
    writer: Option<JoinHandle<Result<()>>>,
}

impl Checkpoints {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: Folder(folder.to_owned()), writer: None }
    }

    /// Takes a checkpoint. Another thread writes it and then removes those before it.
    ///
    /// The one that was saved before is complete when this returns. If it could not be written, this is its error, and
    /// nothing is saved.
    pub(crate) fn save(&mut self, progress: &impl Serialize, varmap: &VarMap, optimizer: &Adamax) -> Result<()> {
        self.finish()?;
        let checkpoint = Checkpoint::take(progress, varmap, optimizer)?;
        self.write_later(move |folder| checkpoint.write(folder))
    }

    /// Waits until the checkpoint that was saved last is written. If it could not be, this is the error.
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.writer.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(written)) => written,
            Some(Err(_)) => bail!("the thread that writes checkpoints to {} has panicked", self.folder.0.display()),
        }
    }

    fn write_later(&mut self, write: impl FnOnce(&Path) -> Result<()> + Send + 'static) -> Result<()> {
        let folder = self.folder.clone();
        let writer = thread::Builder::new().name("checkpoints".to_owned()).spawn(move || folder.write(write));
        self.writer = Some(writer.context("cannot start a thread to write a checkpoint")?);
        Ok(())
    }

    /// Takes weights and optimizer back to the newest checkpoint, if `check` finds its progress to be that of this run.
    pub(crate) fn load<P: DeserializeOwned>(
        &self,
        check: impl FnOnce(&P) -> Result<()>,
        varmap: &mut VarMap,
        optimizer: &mut Adamax,
    ) -> Result<P> {
        self.folder.read(|folder| {
            let saved: P = serde_json::from_slice(&fs::read(folder.join(PROGRESS))?)?;
            check(&saved)?;
            varmap.load(folder.join(WEIGHTS))?;
            optimizer.load(folder.join(OPTIMIZER))?;
            Ok(saved)
        })
    }
}

impl Drop for Checkpoints {
    /// A program that ends by another error leaves no checkpoint half written.
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("error: {error:#}");
        }
    }
}

/// Copies of all that a checkpoint consists of.
struct Checkpoint {
    weights: HashMap<String, Tensor>,
    optimizer: Snapshot,
    progress: String,
}

impl Checkpoint {
    fn take(progress: &impl Serialize, varmap: &VarMap, optimizer: &Adamax) -> Result<Self> {
        // With `SparseUpdate::Exact` the snapshot has the updates that rows of these weights have missed.
        let optimizer = optimizer.snapshot()?;
        let copy = |var: &Var| match var.device() {
            Device::Cpu => var.as_detached_tensor().copy(),
            _ => var.as_detached_tensor().to_device(&Device::Cpu),
        };
        let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
        let weights = vars.iter().map(|(name, var)| Ok((name.clone(), copy(var)?))).collect::<Result<_>>()?;
        Ok(Self { weights, optimizer, progress: serde_json::to_string_pretty(progress)? })
    }

    fn write(&self, folder: &Path) -> Result<()> {
        files::write(&folder.join(WEIGHTS), |path| Ok(candle_core::safetensors::save(&self.weights, path)?))?;
        self.optimizer.write(folder.join(OPTIMIZER))?;
        files::write(&folder.join(PROGRESS), |path| Ok(fs::write(path, &self.progress)?))
    }
}

/// A folder of numbered folders.
#[derive(Clone)]
struct Folder(PathBuf);

impl Folder {
    /// Lets `write` fill a new checkpoint, and removes those before it. If it fails they stay.
    fn write(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let newest = self.numbers()?.into_iter().max().unwrap_or(0);
        let free = (newest..u64::MAX).map(|number| number + 1).find(|&number| !self.path(number).exists());
        let number = free.with_context(|| format!("no number is left for a checkpoint in {}", self.0.display()))?;
        let path = self.path(number);
        let save = || -> Result<()> {
            fs::create_dir_all(&self.0)?;
            let partial = path.with_extension("partial");
            if partial.exists() {
                fs::remove_dir_all(&partial)?; // of a run that was killed
            }
            fs::create_dir(&partial)?;
            write(&partial).inspect_err(|_| {
                let _ = fs::remove_dir_all(&partial); // a full disk must not stay full; the cause is told anyway
            })?;
            for file in fs::read_dir(&partial)? {
                File::options().write(true).open(file?.path())?.sync_all()?;
            }
            sync_folder(&partial)?;
            fs::rename(&partial, &path)?;
            sync_folder(&self.0)?;
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
            newest.with_context(|| format!("there is no checkpoint in {} to resume from", self.0.display()))?;
        let path = self.path(number);
        read(&path).with_context(|| format!("cannot resume from {}", path.display()))
    }

    fn path(&self, number: u64) -> PathBuf {
        self.0.join(format!("checkpoint-{number}"))
    }

    /// The numbers of the complete checkpoints. Those of other programs may have the same names, such as
    /// `checkpoint-500` of the `Trainer` of `transformers`: they are neither read nor removed.
    fn numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        if !self.0.exists() {
            return Ok(numbers);
        }
        for entry in fs::read_dir(&self.0)? {
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
    use candle_core::DType;
    use candle_nn::{Init, Optimizer};

    use super::*;

    /// A folder for the checkpoints of one test.
    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("candle-adamax-checkpoints-{name}-{}", std::process::id()))
    }

    /// A variable `w` with this value, and its optimizer.
    fn training(value: f32) -> Result<(VarMap, Adamax)> {
        let mut varmap = VarMap::new();
        varmap.get(1, "w", Init::Const(0.0), DType::F32, &Device::Cpu)?;
        varmap.set_one("w", Tensor::new(&[value], &Device::Cpu)?)?;
        let optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
        Ok((varmap, optimizer))
    }

    /// The weight, the updates and the progress of the newest checkpoint.
    fn newest(checkpoints: &Checkpoints) -> Result<(f32, u64, String)> {
        let (mut varmap, mut optimizer) = training(0.0)?;
        let progress = checkpoints.load(|_| Ok(()), &mut varmap, &mut optimizer)?;
        let weight = varmap.all_vars()[0].to_vec1::<f32>()?[0];
        Ok((weight, optimizer.updates(), progress))
    }

    #[test]
    fn what_other_programs_call_a_checkpoint_is_left_alone() -> Result<()> {
        let folder = folder("foreign");
        let foreign = ["checkpoint-2", "checkpoint-007", "checkpoint-500", "checkpoint-18446744073709551615"];
        for name in foreign {
            fs::create_dir_all(folder.join(name))?;
            fs::write(folder.join(name).join("model.safetensors"), "another program's")?;
        }
        let (mut checkpoints, varmap) = (Checkpoints::new(&folder), VarMap::new());
        let optimizer = Adamax::new(vec![], ParamsAdamax::default())?;
        let nothing = checkpoints.folder.read(|_| Ok(())).expect_err("no checkpoint");
        ensure!(nothing.to_string().starts_with("there is no checkpoint"), "{nothing:#}");
        for expected in [vec![1], vec![3], vec![4]] {
            checkpoints.save(&"progress", &varmap, &optimizer)?;
            checkpoints.finish()?;
            ensure!(checkpoints.folder.numbers()? == expected, "{:?}", checkpoints.folder.numbers()?);
        }
        ensure!(foreign.iter().all(|name| folder.join(name).join("model.safetensors").is_file()), "one was removed");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    #[test]
    fn a_checkpoint_is_of_the_moment_at_which_it_was_taken() -> Result<()> {
        let folder = folder("moment");
        let (varmap, mut optimizer) = training(2.0)?;
        let mut checkpoints = Checkpoints::new(&folder);
        let taken = Checkpoint::take(&"first", &varmap, &optimizer)?;
        // Training goes on before anything is written.
        optimizer.backward_step(&varmap.all_vars()[0].sqr()?)?;
        checkpoints.write_later(move |folder| taken.write(folder))?;
        checkpoints.finish()?;
        assert_eq!(newest(&checkpoints)?, (2.0, 0, "first".to_owned()));
        checkpoints.save(&"second", &varmap, &optimizer)?;
        drop(checkpoints); // which waits
        let (weight, updates, progress) = newest(&Checkpoints::new(&folder))?;
        assert!(weight < 2.0 && updates == 1 && progress == "second", "{weight}, {updates}, {progress}");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    #[test]
    fn a_failed_write_leaves_the_last_checkpoint_and_reaches_the_caller() -> Result<()> {
        let folder = folder("failed");
        let (varmap, optimizer) = training(2.0)?;
        let mut checkpoints = Checkpoints::new(&folder);
        checkpoints.save(&"good", &varmap, &optimizer)?;
        checkpoints.finish()?;
        let fail = |checkpoints: &mut Checkpoints| {
            checkpoints.write_later(|folder| {
                files::write(&folder.join(WEIGHTS), |path| {
                    fs::write(path, "half")?;
                    bail!("the disk is full")
                })
            })
        };
        for wait in [Checkpoints::finish, |checkpoints: &mut Checkpoints| {
            let (varmap, optimizer) = training(3.0)?;
            checkpoints.save(&"refused", &varmap, &optimizer)
        }] {
            fail(&mut checkpoints)?;
            let error = format!("{:#}", wait(&mut checkpoints).expect_err("a full disk"));
            let (path, file) = (folder.join("checkpoint-2"), folder.join("checkpoint-2.partial").join(WEIGHTS));
            let cause = format!("cannot write {}: the disk is full", file.display());
            assert_eq!(error, format!("cannot save the checkpoint {}: {cause}", path.display()));
            assert_eq!(newest(&checkpoints)?, (2.0, 0, "good".to_owned()));
            assert_eq!(fs::read_dir(&folder)?.count(), 1);
        }
        // The next one is written as if nothing had happened.
        checkpoints.save(&"next", &varmap, &optimizer)?;
        checkpoints.finish()?;
        assert_eq!(newest(&checkpoints)?.2, "next");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
