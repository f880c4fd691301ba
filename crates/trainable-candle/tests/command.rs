//! The command, as a user calls it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use anyhow::{Context, Result, ensure};

/// An empty folder.
fn empty_folder(name: &str) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// The text of a lock file that names one version of candle-nn.
fn lock(version: &str) -> String {
    format!(
        "version = 4\n\n[[package]]\nname = \"candle-nn\"\nversion = \"{version}\"\n\
         source = \"registry+https://github.com/rust-lang/crates.io-index\"\n"
    )
}

/// The folder of a project that depends on a version of candle-nn, and all else as this repository does.
fn project(name: &str, version: &str) -> Result<PathBuf> {
    let folder = empty_folder(name)?;
    fs::create_dir(folder.join("src"))?;
    fs::write(folder.join("src/lib.rs"), "pub use candle_nn::*;\n")?;
    // Besides candle-nn, what gives candle-core and the crates below it the features that they have in this test, so that
    // they are not compiled again.
    fs::write(
        folder.join("Cargo.toml"),
        format!(
            r#"[package]
name = "project"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
candle-nn = "={version}"
clap = {{ version = "4.6", features = ["derive"] }}
serde_json = {{ version = "1", features = ["float_roundtrip"] }}
tracing = "0.1"
"#
        ),
    )?;
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock"), folder.join("Cargo.lock"))?;
    Ok(folder)
}

fn cargo(folder: &Path, args: &[&str]) -> Result<()> {
    let output = Command::new(env!("CARGO")).args(args).current_dir(folder).output()?;
    ensure!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn trainable_candle(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainable-candle"));
    command.args(args).current_dir(folder).env("RUST_BACKTRACE", "0");
    command
}

fn succeed(mut command: Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    ensure!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8(stdout)?)
}

fn fail(mut command: Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    ensure!(!status.success() && stdout.is_empty(), "{}", String::from_utf8_lossy(&stdout));
    Ok(String::from_utf8(stderr)?)
}

/// All files below a folder.
fn files(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(below)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.strip_prefix(folder)?.to_owned(), fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

/// The release that the command says it has read.
fn source(stdout: &str) -> Result<PathBuf> {
    let line = stdout.lines().next().context("no output")?;
    Ok(PathBuf::from(line.split(", from ").nth(1).context("no source")?))
}

/// The lines that the command prints for the output in this folder of a project.
fn patch(dir: &str) -> String {
    format!("[patch.crates-io]\ncandle-nn = {{ path = \"{dir}/candle-nn\" }}\n")
}

/// Writes the copy of a release for a project, and compares it with the release.
fn write_and_compare(project: &Path, dir: &str) -> Result<()> {
    let stdout = succeed(trainable_candle(project, &[dir]))?;
    assert!(stdout.ends_with(&patch(dir)), "{stdout}");
    let mut copy = files(&project.join(dir).join("candle-nn"))?;
    assert!(copy.remove(Path::new("src/trainable.rs")).is_some());
    let mut changed = 0;
    for (path, original) in files(&source(&stdout)?)? {
        if [".cargo-ok", ".cargo-checksum.json"].map(Path::new).contains(&path.as_path()) {
            continue;
        }
        let written = copy.remove(&path).with_context(|| format!("{} is missing", path.display()))?;
        if written != original {
            changed += 1;
            let (written, original) = (String::from_utf8(written)?, String::from_utf8(original)?);
            assert!(written.contains("Inserted by trainable-candle."), "{}", path.display());
            // Lines have been inserted, and no others are gone.
            let mut lines = written.lines();
            assert!(original.lines().all(|line| lines.any(|l| l == line)), "{}", path.display());
        }
    }
    assert!(copy.is_empty(), "{:?}", copy.keys());
    assert!(stdout.contains(&format!("({changed} files changed, 1 added, ")), "{changed}: {stdout}");
    Ok(())
}

/// Compiles a project with the copy, in the folder where its dependencies have been compiled for this test. There cargo
/// tells packages at paths apart by these paths in their projects, so that no other project may use the same `dir`.
fn build(project: &Path, dir: &str) -> Result<()> {
    let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
    fs::write(project.join("Cargo.toml"), format!("{manifest}\n{}", patch(dir)))?;
    let profile = Path::new(env!("CARGO_BIN_EXE_trainable-candle")).parent().context("no profile")?;
    let target = profile.parent().and_then(Path::to_str).context("no target folder")?;
    let mut args = vec!["build", "--target-dir", target];
    if profile.ends_with("release") {
        args.push("--release");
    }
    cargo(project, &args)?;
    // Cargo has taken the copy, and a second call still knows the release.
    let lock = fs::read_to_string(project.join("Cargo.lock"))?;
    assert!(lock.contains("name = \"candle-graft\""), "{lock}");
    let stdout = succeed(trainable_candle(project, &[dir]))?;
    assert!(stdout.contains(&format!("{dir} holds this already: nothing was written")), "{stdout}");
    Ok(())
}

#[test]
fn release_0_11_1() -> Result<()> {
    let (project, dir) = (project("release_0_11_1", "0.11.1")?, "copy_of_0_11_1");
    write_and_compare(&project, dir)?;
    build(&project, dir)
}

#[test]
fn release_0_11_0() -> Result<()> {
    let (project, dir) = (project("release_0_11_0", "0.11.0")?, "copy_of_0_11_0");
    // The lock file of this repository names another release.
    cargo(&project, &["update", "candle-nn", "--precise", "0.11.0"])?;
    write_and_compare(&project, dir)?;
    build(&project, dir)
}

#[test]
fn a_second_call_writes_the_same_and_replaces_what_has_changed() -> Result<()> {
    let folder = empty_folder("second_call")?;
    fs::write(folder.join("Cargo.lock"), lock("0.11.1"))?;
    let call = |dir: &str| succeed(trainable_candle(&folder, &[dir, "--lock", "Cargo.lock"]));
    call("one")?;
    call("two/below")?;
    let one = files(&folder.join("one"))?;
    assert_eq!(one, files(&folder.join("two/below"))?);

    fs::write(folder.join("one/candle-nn/src/ops.rs"), "")?;
    fs::write(folder.join("one/candle-graft/src/another.rs"), "")?;
    let stdout = call("one")?;
    assert!(stdout.contains("Wrote one/candle-nn"), "{stdout}");
    assert_eq!(one, files(&folder.join("one"))?);

    let time = fs::metadata(folder.join("one/candle-nn/src/ops.rs"))?.modified()?;
    assert!(call("one")?.contains("nothing was written"));
    assert_eq!(time, fs::metadata(folder.join("one/candle-nn/src/ops.rs"))?.modified()?);
    assert_eq!(fs::read_dir(&folder)?.count(), 3); // the lock file, one, two
    Ok(())
}

#[test]
fn the_project_is_the_one_around_the_folder_unless_it_is_named() -> Result<()> {
    let project = project("the_project", "0.11.1")?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = project.join("not/yet/there");
    let dir = dir.to_str().context("not UTF-8")?;
    let stdout = succeed(trainable_candle(root, &[dir]))?;
    assert!(stdout.ends_with("candle-nn = { path = \"not/yet/there/candle-nn\" }\n"), "{stdout}");
    let outside = empty_folder("outside")?.join("trainable");
    let outside = outside.to_str().context("not UTF-8")?;
    let manifest = project.join("Cargo.toml");
    let manifest = manifest.to_str().context("not UTF-8")?;
    let stdout = succeed(trainable_candle(root, &[outside, "--manifest-path", manifest]))?;
    assert!(stdout.ends_with("candle-nn = { path = \"../outside/trainable/candle-nn\" }\n"), "{stdout}");
    Ok(())
}

#[test]
fn a_folder_of_no_project_is_an_error() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let outside = env::temp_dir().join(format!("trainable-candle-{}", std::process::id()));
    let misspelled = outside.join("my-projcet/trainable");
    let stderr = fail(trainable_candle(root, &[misspelled.to_str().context("not UTF-8")?]))?;
    assert!(stderr.contains("my-projcet does not exist, and there is no Cargo.toml around it"), "{stderr}");
    assert!(!outside.exists());
    // A project that cargo cannot read is not passed over.
    let project = project("unreadable", "0.11.1")?;
    fs::write(project.join("Cargo.toml"), "[package\n")?;
    let stderr = fail(trainable_candle(root, &[project.join("trainable").to_str().context("not UTF-8")?]))?;
    assert!(stderr.contains("no project was found at") && stderr.contains("unreadable"), "{stderr}");
    Ok(())
}

#[test]
fn a_candle_nn_of_somebody_else_at_a_path_is_an_error() -> Result<()> {
    let project = project("own_candle_nn", "0.11.1")?;
    // Outside of the project's folder, where a package would be a member of its workspace.
    let own = empty_folder("candle_nn_of_somebody_else")?;
    let source = source(&succeed(trainable_candle(&project, &["trainable"]))?)?;
    for (path, content) in files(&source)? {
        let path = own.join(path);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(path, content)?;
    }
    let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
    fs::write(
        project.join("Cargo.toml"),
        manifest.replace("\"=0.11.1\"", "{ path = \"../candle_nn_of_somebody_else\" }"),
    )?;
    cargo(&project, &["metadata", "--offline", "--format-version", "1"])?;
    let stderr = fail(trainable_candle(&project, &["trainable"]))?;
    assert!(stderr.contains("candle_nn_of_somebody_else, which this command has not written"), "{stderr}");
    Ok(())
}

#[test]
fn printed_lines_are_toml_that_the_workspace_takes() -> Result<()> {
    let project = project("pattern", "0.11.1")?;
    let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
    let workspace =
        |lines: &str| manifest.replace("[workspace]", &format!("[workspace]\nmembers = [\"more/*\"]\n{lines}"));
    fs::write(project.join("Cargo.toml"), workspace(""))?;
    let dir = "more/with \"quotes\"";
    let stdout = succeed(trainable_candle(&project, &[dir]))?;
    let exclude = r#"exclude = ["more/with \"quotes\""]"#;
    assert!(stdout.contains(r#"candle-nn = { path = "more/with \"quotes\"/candle-nn" }"#), "{stdout}");
    assert!(stdout.trim_end().ends_with(exclude), "{stdout}");
    let is_taken = |text: String| -> Result<bool> {
        fs::write(project.join("Cargo.toml"), text)?;
        Ok(cargo(&project, &["metadata", "--no-deps", "--offline", "--format-version", "1"]).is_ok())
    };
    assert!(!is_taken(workspace(""))?);
    assert!(is_taken(workspace(exclude))?);
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_link_leads_to_the_folder_that_is_written() -> Result<()> {
    let project = project("link", "0.11.1")?;
    fs::create_dir(project.join("there"))?;
    std::os::unix::fs::symlink("there", project.join("here"))?;
    for _ in 0..2 {
        succeed(trainable_candle(&project, &["here"]))?;
        assert!(project.join("here").is_symlink() && project.join("there/candle-nn/Cargo.toml").is_file());
        fs::write(project.join("there/candle-nn/src/lib.rs"), "changed")?;
    }
    Ok(())
}

#[test]
fn an_unknown_release_is_an_error() -> Result<()> {
    let folder = empty_folder("unknown_release")?;
    fs::write(folder.join("Cargo.lock"), lock("0.12.0"))?;
    let stderr = fail(trainable_candle(&folder, &["trainable", "--lock", "Cargo.lock"]))?;
    assert!(stderr.contains("names candle-nn 0.12.0, but the known releases are 0.11.0 and 0.11.1"), "{stderr}");
    assert!(stderr.contains("Cargo.lock"), "{stderr}");
    let stderr = fail(trainable_candle(&folder, &["trainable", "--lock", "no.lock"]))?;
    assert!(stderr.contains("no.lock; `cargo generate-lockfile` writes it"), "{stderr}");
    assert!(!folder.join("trainable").exists());
    Ok(())
}

/// A registry whose release of candle-nn someone has edited.
#[test]
fn a_changed_source_is_an_error_that_leaves_everything() -> Result<()> {
    let folder = empty_folder("changed_source")?;
    fs::write(folder.join("Cargo.lock"), lock("0.11.1"))?;
    let stdout = succeed(trainable_candle(&folder, &["trainable", "--lock", "Cargo.lock"]))?;
    let before = files(&folder.join("trainable"))?;

    let release = folder.join("home/registry/src/index/candle-nn-0.11.1");
    for (path, mut content) in files(&source(&stdout)?)? {
        if path.ends_with("src/linear.rs") {
            content.push(b'\n');
        }
        let path = release.join(path);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(path, content)?;
    }
    let mut command = trainable_candle(&folder, &["trainable", "--lock", "Cargo.lock"]);
    command.env("CARGO_HOME", folder.join("home"));
    let stderr = fail_after_first_line(command)?;
    assert!(stderr.contains("the sources in"), "{stderr}");
    assert!(stderr.contains(&format!("delete {}", release.display())), "{stderr}");
    assert!(stderr.contains("src/linear.rs is not the file of candle-nn 0.11.1"), "{stderr}");
    assert_eq!(before, files(&folder.join("trainable"))?);
    assert_eq!(fs::read_dir(&folder)?.count(), 3); // the lock file, trainable, home
    Ok(())
}

/// As [`fail`], where the command has already said what it reads.
fn fail_after_first_line(mut command: Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    ensure!(!status.success() && String::from_utf8_lossy(&stdout).lines().count() == 1);
    Ok(String::from_utf8(stderr)?)
}

#[test]
fn a_folder_of_others_is_an_error_that_leaves_it() -> Result<()> {
    let folder = empty_folder("folder_of_others")?;
    fs::write(folder.join("Cargo.lock"), lock("0.11.1"))?;
    let refused = |dir: &str| fail_after_first_line(trainable_candle(&folder, &[dir, "--lock", "Cargo.lock"]));
    fs::create_dir_all(folder.join("vendor/candle-nn"))?;
    fs::write(folder.join("vendor/candle-nn/mine.rs"), "mine")?;
    assert!(refused("vendor")?.contains("vendor holds files that trainable-candle has not written"));
    assert_eq!(files(&folder.join("vendor"))?.len(), 1);

    // Even where the command has written the rest.
    succeed(trainable_candle(&folder, &["trainable", "--lock", "Cargo.lock"]))?;
    fs::write(folder.join("trainable/notes.md"), "mine")?;
    assert!(refused("trainable")?.contains("holds notes.md, which trainable-candle has not written"));
    assert!(folder.join("trainable/notes.md").exists());

    fs::write(folder.join("file"), "mine")?;
    assert!(refused("file")?.contains("cannot read the folder"));

    // An empty folder is nobody's.
    fs::create_dir(folder.join("empty"))?;
    succeed(trainable_candle(&folder, &["empty", "--lock", "Cargo.lock"]))?;
    assert!(folder.join("empty/candle-nn/src/trainable.rs").exists());
    Ok(())
}
