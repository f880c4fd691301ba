//! Files that are complete or not there, where the user has put them and with the mode that the user's umask gives.
//!
//! safetensors 0.8 and candle write through temporary files of their own: of mode 600, and a symbolic link becomes a
//! file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};

/// The most symbolic links that lead to a file, as in Linux.
const MOST_LINKS: usize = 40;

/// Lets `write` make a file and puts it at `path`, or where a symbolic link at `path` leads.
///
/// The file gets the mode of the one that it replaces, or 666 less the umask. It is made beside its place, synced and
/// renamed: a process that is killed leaves the old file as it was. An error names `path`.
pub(crate) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    replace(path, write).with_context(|| format!("cannot write {}", path.display()))
}

fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let target = behind_links(path)?;
    let replaced = match fs::metadata(&target) {
        Ok(metadata) => {
            ensure!(metadata.is_file(), "{} is there, and is no file", target.display());
            Some(metadata.permissions())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let mut name = OsString::from(".");
    name.push(target.file_name().context("expected the path of a file")?);
    // Two processes that write to the same path do not write into each other's file.
    name.push(format!(".{}-{}.partial", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
    let partial = target.with_file_name(name);
    // Its mode is what the umask leaves; whatever `write` puts in its place gets the same.
    let permissions = OpenOptions::new().write(true).create_new(true).open(&partial)?.metadata()?.permissions();
    let written = write(&partial).and_then(|()| {
        File::open(&partial)?.sync_all()?;
        fs::set_permissions(&partial, replaced.unwrap_or(permissions))?;
        Ok(fs::rename(&partial, &target)?)
    });
    if written.is_err() {
        let _ = fs::remove_file(&partial); // a full disk must not stay full; the cause is told anyway
    }
    written
}

/// The path that `path` leads to, whether or not a file is there.
fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            // A relative link counts from its own folder; an absolute one replaces all of the path.
            Ok(link) => path = path.parent().unwrap_or(Path::new("")).join(link),
            Err(_) => return Ok(path), // no link, or nothing there
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> Result<PathBuf> {
        let folder = std::env::temp_dir().join(format!("candle-adamax-files-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    fn files_in(folder: &Path) -> Result<usize> {
        Ok(fs::read_dir(folder)?.count())
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() -> Result<()> {
        let folder = folder("failed")?;
        let path = folder.join("file");
        write(&path, |path| Ok(fs::write(path, "old")?))?;
        let error = write(&path, |path| {
            fs::write(path, "half")?;
            anyhow::bail!("the disk is full")
        });
        let error = format!("{:#}", error.expect_err("a failed write"));
        assert_eq!(error, format!("cannot write {}: the disk is full", path.display()));
        assert_eq!((fs::read_to_string(&path)?, files_in(&folder)?), ("old".to_owned(), 1));
        let error = write(&folder, |path| Ok(fs::write(path, "new")?)).expect_err("a folder");
        assert!(format!("{error:#}").ends_with("is there, and is no file"), "{error:#}");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn modes_are_the_umasks_or_those_of_the_replaced_files() -> Result<()> {
        use std::os::unix::fs::PermissionsExt;

        let folder = folder("modes")?;
        let mode = |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
        // A writer that replaces the file by one of mode 600, as safetensors does.
        let private = |path: &Path| -> Result<()> {
            let other = path.with_extension("other");
            fs::write(&other, "new")?;
            fs::set_permissions(&other, fs::Permissions::from_mode(0o600))?;
            Ok(fs::rename(other, path)?)
        };
        let (path, plain) = (folder.join("file"), folder.join("plain"));
        File::create(&plain)?;
        write(&path, private)?;
        assert_eq!(mode(&path)?, mode(&plain)?);
        for kept in [0o664, 0o640, 0o600] {
            fs::set_permissions(&path, fs::Permissions::from_mode(kept))?;
            write(&path, private)?;
            assert_eq!(mode(&path)?, kept);
        }
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_what_it_leads_to_is_written() -> Result<()> {
        use std::os::unix::fs::symlink;

        let folder = folder("links")?;
        fs::create_dir_all(folder.join("elsewhere"))?;
        symlink("elsewhere/file", folder.join("one"))?; // nothing is there yet
        symlink(folder.join("one"), folder.join("two"))?;
        symlink("round", folder.join("round"))?;
        for text in ["first", "second"] {
            write(&folder.join("two"), |path| Ok(fs::write(path, text)?))?;
            assert_eq!(fs::read_to_string(folder.join("elsewhere/file"))?, text);
        }
        assert!(fs::symlink_metadata(folder.join("one"))?.is_symlink());
        assert!(fs::symlink_metadata(folder.join("two"))?.is_symlink());
        assert_eq!(files_in(&folder.join("elsewhere"))?, 1);
        let error = write(&folder.join("round"), |path| Ok(fs::write(path, "")?)).expect_err("a loop");
        assert!(format!("{error:#}").contains("too many symbolic links"), "{error:#}");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
