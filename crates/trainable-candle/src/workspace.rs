//! The workspace of the user's project.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A command of the cargo that runs this program, or of the one in the search path.
pub(crate) fn cargo(folder: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(folder);
    command
}

/// The folder of the workspace's Cargo.toml: of the workspace of `manifest`, or else of the one around `dir`, or else of
/// the one around the current folder.
pub(crate) fn root(manifest: Option<&Path>, dir: &Path) -> Result<PathBuf> {
    let current = std::env::current_dir()?;
    if let Some(manifest) = manifest {
        return locate(&current, Some(manifest));
    }
    let around = dir.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(&current);
    locate(around, None).or_else(|_| locate(&current, None))
}

fn locate(folder: &Path, manifest: Option<&Path>) -> Result<PathBuf> {
    let mut command = cargo(folder);
    command.args(["locate-project", "--workspace", "--message-format", "plain"]);
    if let Some(manifest) = manifest {
        command.arg("--manifest-path").arg(manifest);
    }
    let output = command.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "no project was found: {}", String::from_utf8_lossy(&output.stderr).trim());
    let manifest = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    Ok(manifest.parent().map(Path::to_owned).unwrap_or(manifest))
}

/// `path` as seen from the folder `from`, as Cargo.toml writes it. Both exist.
pub(crate) fn relative(from: &Path, path: &Path) -> Result<String> {
    let (from, path) = (from.canonicalize()?, path.canonicalize()?);
    let shared = from.components().zip(path.components()).take_while(|(a, b)| a == b).count();
    if shared == 0 {
        return Ok(path.display().to_string()); // another drive
    }
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    let parts = up.chain(path.components().skip(shared)).map(|part| part.as_os_str().to_string_lossy().into_owned());
    Ok(parts.collect::<Vec<_>>().join("/"))
}
