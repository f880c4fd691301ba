//! Files that are complete or not there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{ErrorKind, Result};

/// Lets `write` make a file and puts it at `path`.
///
/// The file is made in a folder beside `path`, synced, renamed to `path`, and the rename is synced with the folder. A
/// process that is killed in between leaves the old file as it was, and a folder that the next save sweeps away.
pub(super) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    static SAVES: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(failed("writing", path)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "expected the path of a file",
        )));
    };
    if path.is_dir() {
        let error = io::Error::new(io::ErrorKind::IsADirectory, "expected the path of a file, got that of a folder");
        return Err(failed("writing", path)(error));
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut folder_name = std::ffi::OsString::from(".");
    folder_name.push(name);
    folder_name.push(".saving");
    let folder = parent.join(folder_name);
    // One save of this process at a time, since each sweeps the folder that another one would be writing in.
    static SAVING: Mutex<()> = Mutex::new(());
    let _saving = SAVING.lock().unwrap_or_else(PoisonError::into_inner);
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("writing", path)(error)),
        _ => {}
    }
    // Two processes that save to the same path at once do not write into each other's file.
    let file: PathBuf = folder.join(format!("{}-{}", std::process::id(), SAVES.fetch_add(1, Ordering::Relaxed)));
    // Before `write`, which may change something: what can fail for a path fails here.
    let created = File::create(&file).map(drop).map_err(failed("writing", path));
    let written = created.and_then(|()| write(&file)).and_then(|()| {
        File::options().write(true).open(&file).and_then(|file| file.sync_all()).map_err(failed("syncing", &file))?;
        fs::rename(&file, path).map_err(failed("renaming to", path))
    });
    // What is left in the folder are files of processes that were killed, and this one if it could not be written: a
    // full disk must not stay full. If it cannot be removed, no harm is done.
    let _ = fs::remove_dir_all(&folder);
    written?;
    sync_folder(parent).map_err(failed("syncing", parent))
}

/// Makes a rename in `folder` last.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Other systems do not open folders as files; their renames are as durable as they make them.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> crate::error::Error {
    let path = path.to_owned();
    move |source| ErrorKind::Io { action, path, source }.into()
}
