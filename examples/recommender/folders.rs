//! Checkpoints as numbered folders, of this example and of `finetune`: complete or not there.
//!
//! A checkpoint is a folder `checkpoint-N`. It is written under another name, synced, and renamed: whoever finds a
//! folder of this name finds all of it. Only then are the others removed, so that at any moment the one with the
//! highest number is complete and the newest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkpoints of one output folder.
pub(crate) struct Folders {
    folder: PathBuf,
}

impl Folders {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Saves a checkpoint, whose files `write` makes in the folder that it is given, and removes those before it.
    pub(crate) fn save(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let number = self.numbers()?.into_iter().max().unwrap_or(0) + 1;
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

    /// Reads the newest checkpoint by `read`, which is given its folder.
    pub(crate) fn load<T>(&self, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let newest = self.numbers()?.into_iter().max();
        let number =
            newest.with_context(|| format!("there is no checkpoint in {} to resume from", self.folder.display()))?;
        let path = self.path(number);
        read(&path).with_context(|| format!("cannot resume from {}", path.display()))
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
