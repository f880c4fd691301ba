//! A data set that is always at hand: lines of the crate's own files, and which language they are in.
//!
//! The same idea is often written in two of them here (the kernels of `cuda/` mirror Rust files, statement for
//! statement), so that words alone do not tell.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rand::{rngs::StdRng, seq::SliceRandom};

/// Lines of each language, at most; there are far more of Rust than of any other.
const MOST: usize = 1000;
/// Shorter lines say little.
const LEAST_CHARACTERS: usize = 15;
/// Where to look; files that lie beside these folders are looked at, too.
const FOLDERS: [&str; 5] = ["benches", "cuda", "examples", "src", "tests"];

/// The crate's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Lines and their languages, from the files of the crate at `root`.
pub(crate) fn lines(root: &Path, rng: &mut StdRng) -> Result<Vec<(String, String)>> {
    let mut files = files_in(root, false)?;
    for folder in FOLDERS {
        files.extend(files_in(&root.join(folder), true)?);
    }
    let mut by_language = LANGUAGES.map(|language| (language.name, Vec::new()));
    for file in files {
        let Some(index) = LANGUAGES.iter().position(|language| language.is_of(&file)) else { continue };
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        by_language[index].1.extend(prose(&text, LANGUAGES[index].is_fenced));
    }
    let mut labelled = Vec::new();
    for (name, mut lines) in by_language {
        ensure!(
            !lines.is_empty(),
            "there are no lines of {name} in {}, beside which this program was built: give texts with --data",
            root.display()
        );
        lines.sort_unstable();
        lines.dedup();
        lines.shuffle(rng);
        lines.truncate(MOST);
        labelled.extend(lines.into_iter().map(|line| (name.to_owned(), line)));
    }
    Ok(labelled)
}

struct Language {
    name: &'static str,
    endings: &'static [&'static str],
    /// Whether what stands between fences is of another language.
    is_fenced: bool,
}

const LANGUAGES: [Language; 4] = [
    Language { name: "CUDA C++", endings: &["cu", "cuh"], is_fenced: false },
    Language { name: "Markdown", endings: &["md"], is_fenced: true },
    Language { name: "Rust", endings: &["rs"], is_fenced: false },
    // Cargo.lock is a file of TOML.
    Language { name: "TOML", endings: &["toml", "lock"], is_fenced: false },
];

impl Language {
    fn is_of(&self, file: &Path) -> bool {
        file.extension().and_then(|ending| ending.to_str()).is_some_and(|ending| self.endings.contains(&ending))
    }
}

/// The lines of a file that are long enough, without those between fences where that is asked for.
fn prose(text: &str, is_fenced: bool) -> impl Iterator<Item = String> {
    let mut inside = false;
    let lines = text.lines().map(str::trim).filter(move |line| {
        let is_fence = is_fenced && line.starts_with("```");
        inside ^= is_fence;
        !inside && !is_fence && line.chars().count() >= LEAST_CHARACTERS
    });
    lines.map(str::to_owned).collect::<Vec<_>>().into_iter()
}

/// The files of a folder in the order of their names, and with those of the folders in it if `all`.
fn files_in(folder: &Path, all: bool) -> Result<Vec<PathBuf>> {
    let list = || -> Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect() };
    let mut paths = list().with_context(|| {
        format!("cannot list {}, beside which this program was built: give texts with --data", folder.display())
    })?;
    paths.sort_unstable();
    let mut files = Vec::new();
    for path in paths {
        if path.is_file() {
            files.push(path);
        } else if all && path.is_dir() {
            files.extend(files_in(&path, true)?);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::data::Data;

    #[test]
    fn the_tree_has_lines_of_every_language_and_none_is_most() -> Result<()> {
        let lines = lines(&root(), &mut StdRng::seed_from_u64(1))?;
        let data = Data::new(lines.clone(), 0.2, &mut StdRng::seed_from_u64(1))?;
        assert_eq!(data.labels, ["CUDA C++", "Markdown", "Rust", "TOML"]);
        for count in data.counts(&data.train) {
            assert!((200..=800).contains(&count), "{:?}", data.counts(&data.train));
        }
        assert!(data.largest_class() < 0.4, "{}", data.largest_class());
        assert!(lines.iter().all(|(_, line)| line.len() >= LEAST_CHARACTERS));
        Ok(())
    }

    #[test]
    fn code_in_markdown_is_not_markdown() {
        let text =
            "A line of some prose.\n```rust\nlet code = within_fences;\n```\n    More of the prose here.\nshort\n";
        let lines = |is_fenced| prose(text, is_fenced).collect::<Vec<_>>();
        assert_eq!(lines(true), ["A line of some prose.", "More of the prose here."]);
        assert_eq!(lines(false).len(), 3);
    }

    #[test]
    fn where_there_are_no_files_the_error_says_what_to_do() {
        let error = lines(Path::new("/nowhere"), &mut StdRng::seed_from_u64(1)).expect_err("no such folder");
        assert!(error.to_string().contains("give texts with --data"), "{error}");
    }
}
