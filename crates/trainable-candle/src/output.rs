//! The folder that is written.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::source::{Files, read_folder};

/// The file that marks a folder as written by this command.
const MARK: &str = "trainable-candle.txt";
/// The first words of the mark.
const MARKED: &str = "Written by trainable-candle";

/// Whether anything had to be written.
#[derive(Debug, PartialEq)]
pub(crate) enum Outcome {
    /// The folder is new, or its content has changed.
    Written,
    /// The folder had this content, and has kept its times, so that cargo builds nothing anew.
    Unchanged,
}

/// Writes the folder `dir`, whole or not at all. Only a folder that this command has written is replaced.
pub(crate) fn write(dir: &Path, version: &str, mut files: Files) -> Result<Outcome> {
    let mark = format!(
        "{MARKED} from candle-nn {version}.\nThe next call replaces this folder: changes to its files are lost.\n"
    );
    files.push((MARK.to_owned(), mark.into_bytes()));
    files.sort();
    let old = may_be_replaced(dir)?;
    if old && read_folder(dir, &[]).is_ok_and(|present| present == files) {
        return Ok(Outcome::Unchanged);
    }
    let (new, aside) = (beside(dir, "new")?, beside(dir, "old")?);
    let result = write_all(&new, &files).and_then(|()| {
        if !old {
            // An empty folder, perhaps.
            let _ = fs::remove_dir(dir);
            return fs::rename(&new, dir);
        }
        fs::rename(dir, &aside)?;
        fs::rename(&new, dir).inspect_err(|_| {
            let _ = fs::rename(&aside, dir);
        })
    });
    if let Err(error) = result {
        let _ = fs::remove_dir_all(&new);
        return Err(error).with_context(|| format!("cannot write {}", dir.display()));
    }
    if old {
        fs::remove_dir_all(&aside).with_context(|| format!("{} is left over", aside.display()))?;
    }
    Ok(Outcome::Written)
}

/// Whether there is something to replace, which must be an earlier output.
fn may_be_replaced(dir: &Path) -> Result<bool> {
    let refuse = |why: &str| bail!("{} {why}: name a new folder, or delete this one", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("cannot read the folder {}", dir.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    if names.is_empty() {
        return Ok(false);
    }
    if !is_written(dir) {
        return refuse(&format!("holds files that trainable-candle has not written (there is no {MARK})"));
    }
    match names.iter().find(|name| ![MARK, "candle-nn", "candle-graft"].contains(&name.as_str())) {
        Some(name) => refuse(&format!("holds {name}, which trainable-candle has not written")),
        None => Ok(true),
    }
}

/// Whether this command has written a folder.
pub(crate) fn is_written(dir: &Path) -> bool {
    fs::read_to_string(dir.join(MARK)).is_ok_and(|mark| mark.starts_with(MARKED))
}

/// A path in the same folder, and so on the same disk.
fn beside(dir: &Path, what: &str) -> Result<PathBuf> {
    let name = dir.file_name().with_context(|| format!("{} is not the name of a folder", dir.display()))?;
    Ok(dir.with_file_name(format!(".{}.{what}-{}", name.to_string_lossy(), std::process::id())))
}

fn write_all(folder: &Path, files: &Files) -> io::Result<()> {
    for (path, content) in files {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, content)?;
    }
    Ok(())
}
