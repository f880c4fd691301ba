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
    let is_in_project = |folder: &Path| folder.ancestors().any(|folder| folder.join("Cargo.toml").is_file());
    let parent = dir.parent().unwrap_or(dir);
    let around = parent.ancestors().find(|folder| folder.is_dir()).unwrap_or(parent);
    if is_in_project(around) {
        return locate(around, None);
    }
    // Outside of all projects a folder that does not exist may be a misspelled one.
    ensure!(parent.is_dir(), "the folder {} does not exist, and there is no Cargo.toml around it", parent.display());
    ensure!(is_in_project(&current), "there is no Cargo.toml around {} or {}", parent.display(), current.display());
    locate(&current, None)
}

fn locate(folder: &Path, manifest: Option<&Path>) -> Result<PathBuf> {
    let mut command = cargo(folder);
    command.args(["locate-project", "--workspace", "--message-format", "plain"]);
    if let Some(manifest) = manifest {
        command.arg("--manifest-path").arg(manifest);
    }
    let asked = manifest.unwrap_or(folder).display();
    let manifest = PathBuf::from(answer(&mut command).with_context(|| format!("no project was found at {asked}"))?);
    Ok(manifest.parent().map(Path::to_owned).unwrap_or(manifest))
}

/// The folder of the candle-nn that the workspace at `root` takes from a path; none where cargo cannot tell, as before
/// that folder is written.
pub(crate) fn folder_of_candle_nn(root: &Path, version: &str) -> Option<PathBuf> {
    let mut command = cargo(root);
    command.args(["pkgid", "--offline", &format!("candle-nn@{version}")]);
    // path+file:///folder#candle-nn@0.11.1, or without the name where the folder has it.
    let id = answer(&mut command).ok()?;
    Some(PathBuf::from(id.strip_prefix("path+file://")?.split('#').next()?))
}

/// Whether the workspace at `root` takes `folder`, which lies in it, for one of its members.
pub(crate) fn has_member(root: &Path, folder: &Path) -> bool {
    let mut command = cargo(root);
    command.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]);
    match answer(&mut command) {
        Ok(_) => false,
        Err(error) => error.to_string().contains(&folder.join("Cargo.toml").display().to_string()),
    }
}

/// What cargo prints, or its errors.
fn answer(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
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
