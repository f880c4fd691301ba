//! The program as users run it: what it prints, and how it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Result, ensure};

/// A folder for one test.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("finetune-program-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Runs the program on `texts` for one step.
fn finetune(folder: &Path, texts: &[u8]) -> Result<Output> {
    let data = folder.join("texts.tsv");
    fs::write(&data, texts)?;
    let mut program = Command::new(env!("CARGO_BIN_EXE_finetune"));
    program.arg("--data").arg(data).arg("--out").arg(folder.join("out")).args(["--max-steps", "1"]);
    Ok(program.output()?)
}

#[test]
fn a_mistake_in_the_texts_is_one_line_that_names_its_cause() -> Result<()> {
    let folder = folder("mistakes")?;
    let swapped: String = (0..8).map(|i| format!("text number {i}\t{}\n", ["good", "bad"][i % 2])).collect();
    for (texts, expected) in [
        (swapped.as_bytes(), "are the columns swapped?"),
        (b"good\tone\nbad\tcaf\xe9\n", "texts.tsv:2: this is not UTF-8"),
        (b"good\tone\nbad,two\n", "texts.tsv:2: expected a class, a tab and a text"),
        (b"label\ttext\na\t1\na\t2\nb\t3\nb\t4\n", "if the first line is a header, take it out"),
    ] {
        let output = finetune(&folder, texts)?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success() && stderr.contains(expected) && stderr.lines().count() == 1, "{stderr}");
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn what_was_left_out_is_told_where_something_was() -> Result<()> {
    let folder = folder("told")?;
    let texts: String = (0..40).map(|i| format!("{}\ttext number {i}\n", ["good", "bad"][i % 2])).collect();
    for (more, expected) in [
        ("", ""),
        ("good\ttext number 0\n", "left out: 1 repeated\n"),
        ("bad\ttext number 0\n", "left out: 1 repeated, 1 of several classes\n"),
    ] {
        let output = finetune(&folder, format!("\u{feff}{texts}{more}").as_bytes())?;
        let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure!(output.status.success(), "{stderr}");
        let (before, after) = stdout.split_once("classes: bad ").unwrap_or_default();
        ensure!(before.ends_with(&format!("texts.tsv\n{expected}")) && after.contains("good "), "{stdout}");
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn without_a_terminal_there_is_a_line_after_each_epoch() -> Result<()> {
    let folder = folder("lines")?;
    let data = folder.join("texts.tsv");
    fs::write(&data, (0..50).map(|i| format!("{}\ttext number {i}\n", ["good", "bad"][i % 2])).collect::<String>())?;
    let mut program = Command::new(env!("CARGO_BIN_EXE_finetune"));
    program.arg("--data").arg(data).arg("--out").arg(folder.join("out"));
    let output = program.args(["--max-steps", "5", "--epochs", "3", "--batch", "20"]).output()?;
    let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success() && stdout.contains("an epoch"), "{stdout}{stderr}");
    // Two steps to an epoch, and the last step of all. More lines come where ten seconds have gone by.
    for step in [2, 4, 5] {
        let line = stderr.lines().find(|line| line.starts_with(&format!("{step}/5 steps, "))).unwrap_or_default();
        ensure!(line.contains(" left, loss ") && line.ends_with(" texts a second"), "{step}: {stderr}");
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn a_reader_that_goes_away_ends_the_program_without_a_panic() -> Result<()> {
    let folder = folder("reader")?;
    let data = folder.join("texts.tsv");
    fs::write(&data, (0..8).map(|i| format!("{}\ttext number {i}\n", ["good", "bad"][i % 2])).collect::<String>())?;
    let mut program = Command::new(env!("CARGO_BIN_EXE_finetune"));
    program.arg("--data").arg(data).arg("--out").arg(folder.join("out")).args(["--max-steps", "1"]);
    let mut program = program.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(program.stdout.take());
    let output = program.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && stderr.starts_with("error: failed printing to stdout"), "{stderr}");
    ensure!(stderr.lines().count() == 1, "{stderr}");
    fs::remove_dir_all(&folder)?;
    Ok(())
}
