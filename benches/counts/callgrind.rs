//! The count of one call, by valgrind's callgrind.
//!
//! The program runs itself under valgrind, with a case to run; callgrind counts inside of [`counted`] only.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::case::{CALLS, Work};

/// The option with which the program runs one case: its name and its size follow.
pub(crate) const RUN: &str = "--run";

/// Lets glibc copy and fill with vectors, whatever the size. The instructions that it has for more than 2 KB, `rep movsb`
/// and `rep stosb`, count once for each byte: a fourth of what the recommender's step would seem to take.
const COPIES: &str = "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824";

/// The calls of a case, of which the last one is counted.
pub(crate) fn run(mut work: Work) -> Result<()> {
    for _ in 1..CALLS {
        work()?;
    }
    counted(&mut work)
}

/// The function that callgrind counts, by its name.
#[unsafe(no_mangle)]
#[inline(never)]
fn counted(work: &mut Work) -> Result<()> {
    work()
}

/// How many instructions the counted call of a case takes; `out` is a file for callgrind.
pub(crate) fn count(name: &str, size: usize, out: &Path) -> Result<u64> {
    let program = std::env::current_exe()?;
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=counted"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(&program)
        .args([RUN, name, &size.to_string()])
        // A thread that waits in a loop would be counted.
        .envs([("RAYON_NUM_THREADS", "1"), ("CANDLE_NUM_THREADS", "1")])
        .env("GLIBC_TUNABLES", COPIES)
        .output()
        .context("cannot run valgrind, which counts: install the package `valgrind`")?;
    if !run.status.success() {
        bail!("{name}: {}\n{}", run.status, String::from_utf8_lossy(&run.stderr));
    }
    let profile = fs::read_to_string(out).with_context(|| format!("{name}: no counts in {}", out.display()))?;
    fs::remove_file(out)?;
    let total = profile.lines().find_map(|line| line.strip_prefix("totals: "));
    let total = total.with_context(|| format!("{name}: callgrind wrote no total"))?.trim().parse()?;
    ensure!(total > 0, "{name}: nothing was counted: is the program stripped of its symbols?");
    Ok(total)
}
