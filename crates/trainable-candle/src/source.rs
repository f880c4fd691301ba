//! The sources of a release of candle-nn, and the changed copy.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use crate::insertions::{ADDED_FILE, CHANGED};
use crate::workspace::cargo;

/// Files of a copy: paths below the folder of the output, with `/`, and contents.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// Marks that cargo leaves in the folders of packages. They are no part of a package.
const CARGO_MARKS: [&str; 2] = [".cargo-ok", ".cargo-checksum.json"];

/// The folder with the sources of this release of candle-nn: where cargo has unpacked it, or else where cargo says after
/// it has fetched it for a project in `root`, which may use vendored sources.
pub(crate) fn find(version: &str, root: &Path) -> Result<PathBuf> {
    if let Some(folder) = unpacked(version) {
        return Ok(folder);
    }
    let project = env::temp_dir().join(format!("trainable-candle-{}", std::process::id()));
    let found = fetch(version, root, &project);
    let _ = fs::remove_dir_all(&project); // the error of the fetch says more
    found.with_context(|| format!("cannot fetch candle-nn {version}"))
}

/// The folder in cargo's registry.
fn unpacked(version: &str) -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")))?;
    let registries = fs::read_dir(home.join("registry/src")).ok()?;
    let folders = registries.flatten().map(|registry| registry.path().join(format!("candle-nn-{version}")));
    // Cargo writes the mark when the folder is complete.
    folders.into_iter().find(|folder| folder.join(".cargo-ok").is_file())
}

/// Lets cargo fetch the release for a project of its own, since the user's may depend on a copy that is not written yet.
/// The folder of the command is the user's, so that the settings in its `.cargo` hold.
fn fetch(version: &str, root: &Path, project: &Path) -> Result<PathBuf> {
    fs::create_dir_all(project.join("src"))?;
    fs::write(project.join("src/lib.rs"), "")?;
    let manifest = project.join("Cargo.toml");
    let package = "[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n";
    fs::write(&manifest, format!("{package}\n[dependencies]\ncandle-nn = \"={version}\"\n"))?;
    // The versions of everything else are those that the user has.
    if root.join("Cargo.lock").is_file() {
        fs::copy(root.join("Cargo.lock"), project.join("Cargo.lock"))?;
    }
    let output = cargo(root).args(["metadata", "--format-version", "1", "--manifest-path"]).arg(&manifest).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let candle_nn = packages.iter().find(|package| package["name"] == "candle-nn" && package["version"] == version);
    let candle_nn = candle_nn.context("cargo metadata names no candle-nn")?;
    ensure!(candle_nn["source"].is_string(), "a [patch] in the settings of cargo replaces it");
    let manifest = candle_nn["manifest_path"].as_str().context("cargo metadata names no path")?;
    Path::new(manifest).parent().map(Path::to_owned).context("cargo metadata names no folder")
}

/// All files of `candle-nn` in the output, from the release in `folder`.
pub(crate) fn changed_copy(folder: &Path, version: usize) -> Result<Files> {
    let mut files = read_folder(folder, &CARGO_MARKS)?;
    for changed in CHANGED.iter().filter(|file| file.is_in(version)) {
        let content = files.iter_mut().find(|(path, _)| path == changed.path).map(|(_, content)| content);
        let content = content.with_context(|| format!("{} has no {}", folder.display(), changed.path))?;
        *content = changed
            .apply(version, content)
            .with_context(|| {
                let folder = folder.display();
                format!(
                    "the sources in {folder} are not those of the release; delete {folder}, and cargo unpacks it anew"
                )
            })?
            .into_bytes();
    }
    files.push((ADDED_FILE.0.to_owned(), ADDED_FILE.1.as_bytes().to_owned()));
    for (path, _) in &mut files {
        path.insert_str(0, "candle-nn/");
    }
    Ok(files)
}

/// All files below a folder, in the order of their paths.
pub(crate) fn read_folder(folder: &Path, except: &[&str]) -> Result<Files> {
    let mut files = Files::new();
    let mut folders = vec![String::new()];
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(folder.join(&below))? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a name that is not UTF-8")?;
            let path = if below.is_empty() { name } else { format!("{below}/{name}") };
            if entry.path().is_dir() {
                folders.push(path);
            } else if !except.contains(&path.as_str()) {
                files.push((path, fs::read(entry.path())?));
            }
        }
    }
    files.sort();
    Ok(files)
}
