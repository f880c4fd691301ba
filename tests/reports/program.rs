//! Programs of this repository, and what they leave.

use std::path::Path;
use std::process::{Command, Output};

/// The permissions of a file.
#[cfg(unix)]
pub(crate) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap_or_else(|error| panic!("{path:?}: {error}")).permissions().mode() & 0o777
}

/// The mode that the umask gives a new file, here one in `folder`.
#[cfg(unix)]
pub(crate) fn usual_mode(folder: &Path) -> u32 {
    let plain = folder.join("plain");
    std::fs::write(&plain, "").unwrap();
    mode(&plain)
}

/// Runs a program, with one thread and without a terminal.
pub(crate) fn run(program: &Path, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).env("RAYON_NUM_THREADS", "1").output();
    output.unwrap_or_else(|error| panic!("{program:?}: {error}"))
}

/// What a program printed, if it ended well.
#[track_caller]
pub(crate) fn printed(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// The error that a program printed, if it ended with one and did not panic.
#[track_caller]
pub(crate) fn refused(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "the program ended well");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}
