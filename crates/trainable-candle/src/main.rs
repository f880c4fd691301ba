//! Writes a copy of the candle-nn that a project uses, whose layers have a backward pass.
//!
//! See the README of this package on what is changed, and why.

mod graft;
mod insertions;
mod lock;
mod output;
mod source;
mod workspace;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::lock::Locked;
use crate::output::Outcome;

/// Writes a copy of the candle-nn that a project uses, whose layers have a backward pass.
///
/// candle-nn computes normalizations, softmax, rotary embeddings and attention with kernels that have no backward pass:
/// parameters in front of them get no gradient, and nothing says so. In the copy, tensors that need a gradient take
/// another path. Everything else is as in the release.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The folder to write: DIR/candle-nn and DIR/candle-graft. Either new, or one that this command has written.
    dir: PathBuf,
    /// The Cargo.toml of the project [default: that of the folder with DIR, or of the current folder]
    #[arg(long, value_name = "PATH", conflicts_with = "lock")]
    manifest_path: Option<PathBuf>,
    /// The Cargo.lock of the project [default: that of its workspace]
    #[arg(long, value_name = "PATH")]
    lock: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // A link is followed: the folder that it leads to is written.
    let dir = args.dir.canonicalize().or_else(|_| std::path::absolute(&args.dir))?;
    let lock = match args.lock {
        Some(lock) => std::path::absolute(lock)?,
        None => workspace::root(args.manifest_path.as_deref(), &dir)?.join("Cargo.lock"),
    };
    let root = lock.parent().unwrap_or(&lock);
    let Locked { version, is_path } = lock::candle_nn(&lock)?;
    if is_path && let Some(folder) = workspace::folder_of_candle_nn(root, insertions::VERSIONS[version]) {
        ensure!(
            folder.parent().is_some_and(output::is_written),
            "{} takes candle-nn from {}, which this command has not written. Only releases from crates.io are known, and \
             [patch] does not replace a path",
            lock.display(),
            folder.display()
        );
    }
    let source = source::find(insertions::VERSIONS[version], root)?;
    println!("candle-nn {} as {} names it, from {}", insertions::VERSIONS[version], lock.display(), source.display());

    let mut files = source::changed_copy(&source, version)?;
    let changed = insertions::CHANGED.iter().filter(|file| file.is_in(version)).count();
    let copied = files.len() - 1 - changed;
    files.extend(graft::files()?);
    let outcome = output::write(&dir, insertions::VERSIONS[version], files)?;
    let is_member = workspace::has_member(root, &dir);
    let dir = workspace::relative(root, &dir)?;
    match outcome {
        Outcome::Written => println!(
            "Wrote {dir}/candle-nn ({changed} files changed, 1 added, {copied} as they were) and {dir}/candle-graft",
        ),
        Outcome::Unchanged => println!("{dir} holds this already: nothing was written"),
    }
    println!("\nLines for {}:\n", root.join("Cargo.toml").display());
    println!("[patch.crates-io]\ncandle-nn = {{ path = {} }}", quoted(&format!("{dir}/candle-nn")));
    if is_member {
        println!("\nand, since a pattern of its members matches {dir}, in its section [workspace]:\n");
        println!("exclude = [{}]", quoted(&dir));
    }
    Ok(())
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\u{:04X}", u32::from(c)),
        c => c.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}
