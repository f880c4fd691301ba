//! Files that are complete or not there: the one way in which this crate writes a file.

use std::fs::{self, File, Metadata};
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// The names of files that are not complete yet: this, a part that no other save has, and [`SUFFIX`].
const PREFIX: &str = ".candle-adamax-";
const SUFFIX: &str = ".saving";
/// The number of names that are tried, and of links that are followed.
const TRIES: usize = 64;

/// A file that takes its place when it is [committed](Self::commit), and is gone if it is dropped before.
///
/// It is written under a name of its own in the folder of `path`, synced, and renamed; the rename is synced with the
/// folder. A process that is killed in between leaves the old file as it was, and a file that the next save into the
/// folder removes: a lock tells it from one that is being written.
///
/// - A new file has mode 666 less the umask. A file that is replaced leaves its mode and, where the system permits it, its
///   owner and group to the new one.
/// - A symbolic link is followed, also to a file that is not there. Other hard links of a file keep the old content.
/// - A file that may not be written is not replaced. The folder has to be writable, too.
/// - What is neither a file nor a folder, such as a pipe, is written as it is.
pub(crate) struct AtomicFile {
    /// The path that was given.
    path: PathBuf,
    /// None of what is written as it is.
    beside: Option<Beside>,
    writer: BufWriter<File>,
}

/// A file on its way to its place, which is removed when this is dropped.
struct Beside {
    temporary: PathBuf,
    target: PathBuf,
}

impl AtomicFile {
    /// Begins the file that is to be at `path`. Whatever forbids it is an error here, before there is anything to write.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        Self::open(path).map_err(failed("writing", path))
    }

    fn open(path: &Path) -> io::Result<Self> {
        let existing = match fs::metadata(path) {
            Ok(existing) => Some(existing),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if existing.as_ref().is_some_and(Metadata::is_dir) {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "expected the path of a file, got a folder"));
        }
        if existing.is_some() {
            // Opening is how the system says whether the file may be written. It changes nothing of a file.
            let in_place = File::options().write(true).open(path)?;
            if existing.as_ref().is_some_and(|existing| !existing.is_file()) {
                return Ok(Self { path: path.to_owned(), beside: None, writer: BufWriter::new(in_place) });
            }
        }
        let target = follow(path)?;
        // `file_name` passes over what stands behind it in `name/` and `name/.`, which a rename does not.
        let ends_with_name =
            |name: &std::ffi::OsStr| target.as_os_str().as_encoded_bytes().ends_with(name.as_encoded_bytes());
        if !target.file_name().is_some_and(ends_with_name) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected the path of a file"));
        }
        let folder = folder_of(&target);
        sweep(folder);
        let (file, temporary) = create_unique(folder, existing.is_some())?;
        let beside = Beside { temporary, target };
        if let Some(existing) = existing {
            take_over(&file, &existing)?;
        }
        Ok(Self { path: path.to_owned(), beside: Some(beside), writer: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Puts the file in its place.
    pub(crate) fn commit(self) -> Result<()> {
        let Self { path, beside, writer } = self;
        let file = writer.into_inner().map_err(|error| failed("writing", &path)(error.into_error()))?;
        let Some(mut beside) = beside else { return Ok(()) };
        file.sync_all().map_err(failed("syncing", &path))?;
        fs::rename(&beside.temporary, &beside.target).map_err(failed("renaming to", &path))?;
        beside.temporary.clear();
        sync_folder(folder_of(&beside.target)).map_err(failed("syncing the folder of", &path))
    }

    /// Writes bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(failed("writing", &self.path))
    }

    /// The path that was given.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // A full disk must not stay full. If the file cannot be removed, the next save tries again.
        if self.temporary != Path::new("") {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The file that `path` leads to by symbolic links, which may not be there.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    for _ in 0..TRIES {
        match fs::read_link(&target) {
            Ok(link) => target = folder_of(&target).join(link),
            // No link, or nothing.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                return Ok(target);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "too many symbolic links"))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// A file under a name that no other thread, process or machine uses, locked for as long as it is open.
fn create_unique(folder: &Path, is_private: bool) -> io::Result<(File, PathBuf)> {
    static SAVES: AtomicU64 = AtomicU64::new(0);
    let mut options = File::options();
    options.write(true).create_new(true);
    if is_private {
        // The content may be meant for few; `take_over` gives it the mode of the file that it replaces.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    for _ in 0..TRIES {
        // Containers that share a folder have the same process ids.
        let random = std::hash::RandomState::new().build_hasher().finish();
        let (process, save) = (std::process::id(), SAVES.fetch_add(1, Ordering::Relaxed));
        let path = folder.join(format!("{PREFIX}{process}-{save}-{random:016x}{SUFFIX}"));
        let file = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let message =
                    format!("the folder has to be writable, since a file is written beside this one: {error}");
                return Err(io::Error::new(error.kind(), message));
            }
            file => file?,
        };
        // A sweep may have come between: then the file is gone, or will be.
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => continue,
            // Where there are no locks, nothing is swept.
            Ok(()) | Err(fs::TryLockError::Error(_)) => {}
        }
        if is_linked(&file)? {
            return Ok((file, path));
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "no name was free for a file beside it"))
}

/// Removes what saves of killed processes have left in a folder; those that are going on hold locks.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
        if is_ours
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = File::options().read(true).write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            // If it cannot be removed, no harm is done.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a file still has a name.
fn is_linked(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    return Ok(std::os::unix::fs::MetadataExt::nlink(&file.metadata()?) > 0);
    #[cfg(not(unix))]
    return Ok(file.metadata().is_ok());
}

/// Gives a file the owner, group and mode of the one that it replaces.
#[cfg(unix)]
fn take_over(file: &File, existing: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};

    let own = file.metadata()?;
    let (owner, group) = (existing.uid(), existing.gid());
    let mut mode = existing.mode() & 0o7777;
    if (own.uid(), own.gid()) != (owner, group) && fchown(file, Some(owner), Some(group)).is_err() {
        mode &= 0o777;
        if own.gid() != group && fchown(file, None, Some(group)).is_err() {
            // Another group must not be allowed what this one was.
            mode = mode & 0o707 | (mode & 0o007) << 3;
        }
    }
    // Some file systems have one mode for all files, and refuse to set any.
    if file.metadata()?.mode() & 0o7777 == mode {
        return Ok(());
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
}

/// Other systems have no modes.
#[cfg(not(unix))]
fn take_over(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// Makes a rename in `folder` last.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    // The file is in its place: a folder that may not be read, or cannot be synced, is no failure.
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// Other systems do not open folders as files; their renames are as durable as they make them.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| ErrorKind::Io { action, path, source }.into()
}
