//! The sources of candle-graft, which the output needs beside candle-nn.

use anyhow::{Context, Result};

use crate::source::Files;

/// The files of the crate, by their paths in its folder.
macro_rules! embedded {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!("../../candle-graft/", $path)))),*]
    };
}

const FILES: &[(&str, &str)] = embedded![
    "Cargo.toml",
    "src/activation.rs",
    "src/attention.rs",
    "src/check.rs",
    "src/composed.rs",
    "src/cpu.rs",
    "src/dropout.rs",
    "src/kernel/activation.rs",
    "src/kernel/columns.rs",
    "src/kernel/dropout.rs",
    "src/kernel/element.rs",
    "src/kernel/lanes.rs",
    "src/kernel/loss.rs",
    "src/kernel/mod.rs",
    "src/kernel/norm.rs",
    "src/kernel/parallel.rs",
    "src/kernel/probabilities.rs",
    "src/kernel/real.rs",
    "src/kernel/rope.rs",
    "src/kernel/softmax.rs",
    "src/lib.rs",
    "src/linear.rs",
    "src/loss.rs",
    "src/norm.rs",
    "src/probabilities.rs",
    "src/rope.rs",
    "src/softmax.rs",
];

/// The tables of the manifest that a package outside of this workspace can have.
const TABLES: [&str; 2] = ["[package]", "[dependencies]"];

/// All files of `candle-graft` in the output.
pub(crate) fn files() -> Result<Files> {
    let mut files = Files::new();
    for &(path, content) in FILES {
        let content = if path == "Cargo.toml" { manifest(content)? } else { content.to_owned() };
        files.push((format!("candle-graft/{path}"), content.into_bytes()));
    }
    Ok(files)
}

/// The manifest without what concerns tests and this workspace.
fn manifest(text: &str) -> Result<String> {
    let mut tables = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest[1..].find("\n[").map_or(rest.len(), |at| at + 2);
        let (table, after) = rest.split_at(end);
        let name = table.lines().next().context("a table without a name")?;
        if TABLES.contains(&name) {
            tables.push(table.trim_end());
        }
        rest = after;
    }
    Ok(tables.join("\n\n") + "\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn all_sources_are_embedded() -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../candle-graft/src");
        let present = crate::source::read_folder(&folder, &[])?;
        let present: Vec<_> = present.into_iter().map(|(path, _)| format!("src/{path}")).collect();
        let mut embedded: Vec<_> = FILES.iter().map(|(path, _)| *path).filter(|path| *path != "Cargo.toml").collect();
        embedded.sort();
        assert_eq!(embedded, present);
        Ok(())
    }

    #[test]
    fn the_manifest_stands_alone() -> Result<()> {
        let manifest = manifest(FILES[0].1)?;
        assert!(manifest.starts_with("[package]\nname = \"candle-graft\"\n"));
        assert!(manifest.contains("\n\n[dependencies]\n"));
        assert!(!manifest.contains("workspace"), "{manifest}");
        assert!(!manifest.contains("path = "), "{manifest}");
        Ok(())
    }
}
