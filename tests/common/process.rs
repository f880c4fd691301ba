//! Tests that need a process of their own: this very program once more, told to run one test and nothing else.

use std::io;
#[cfg(unix)]
use std::path::Path;
use std::process::Command;

/// Set in processes that a test has started.
const CHILD: &str = "CANDLE_ADAMAX_TEST_CHILD";

/// A process for `test`, named as in the list of this program's tests; the test asks [`is_child`] on which side it is.
pub(crate) fn child(test: &str) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", test, "--nocapture"]).env(CHILD, "1");
    Ok(command)
}

/// A process as of [`child`], in a folder, after a shell script has prepared it.
#[cfg(unix)]
pub(crate) fn through_shell(script: &str, test: &str, folder: &Path) -> io::Result<Command> {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe()?).args(["--exact", test, "--nocapture"]);
    command.env(CHILD, "1").current_dir(folder);
    Ok(command)
}

/// Whether a test has started this process.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Whether `test` has passed in a process of its own, where no other test takes memory or time: in that process itself,
/// it has not yet.
#[track_caller]
pub(crate) fn has_passed_alone(test: &str) -> bool {
    if is_child() {
        return false;
    }
    let output = child(test).and_then(|mut child| child.output()).unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    // A name of no test would be a success of none.
    assert!(output.status.success() && stdout.contains("1 passed"), "{test}\n{stdout}\n{stderr}");
    true
}
