//! The version of candle-nn that a lock file names.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::insertions::VERSIONS;

/// A candle-nn in a lock file.
#[derive(Debug, PartialEq)]
pub(crate) struct Locked {
    /// The index of its version in [`VERSIONS`].
    pub(crate) version: usize,
    /// Whether it lies at a path.
    pub(crate) is_path: bool,
}

/// The candle-nn that the lock file at `path` names.
pub(crate) fn candle_nn(path: &Path) -> Result<Locked> {
    let text = std::fs::read_to_string(path).with_context(|| match path.exists() {
        true => format!("cannot read {}", path.display()),
        false => format!("there is no {}; `cargo generate-lockfile` writes it", path.display()),
    })?;
    known_version(&text).with_context(|| path.display().to_string())
}

fn known_version(lock: &str) -> Result<Locked> {
    let packages = packages(lock);
    if let Some((version, source)) =
        packages.iter().find(|(_, source)| source.is_some_and(|source| !is_registry(source)))
    {
        let source = source.unwrap_or_default();
        bail!("names candle-nn {version} from {source}, but only releases from crates.io are known");
    }
    let versions: Vec<_> = packages.iter().map(|(version, _)| *version).collect();
    // Without a source the package lies at a path, such as the copy that an earlier call has written.
    let known = packages.iter().filter_map(|(version, source)| {
        let version = VERSIONS.iter().position(|known| known == version)?;
        Some(Locked { version, is_path: source.is_none() })
    });
    let mut known: Vec<_> = known.collect();
    match (versions.as_slice(), known.len()) {
        (_, 1) => Ok(known.remove(0)),
        ([], _) => bail!("names no candle-nn: `cargo add candle-nn` makes the project depend on it"),
        _ => bail!(
            "names candle-nn {}, but the known releases are {}. Within one series, `cargo update -p candle-nn --precise {}` \
             selects a known one; a newer release needs a newer trainable-candle",
            versions.join(" and "),
            VERSIONS.join(" and "),
            VERSIONS[VERSIONS.len() - 1],
        ),
    }
}

fn is_registry(source: &str) -> bool {
    source.starts_with("registry+") || source.starts_with("sparse+")
}

/// Version and source of each package with the name candle-nn.
fn packages(lock: &str) -> Vec<(&str, Option<&str>)> {
    let tables = lock.split("\n[[package]]").skip(1);
    let candle_nn = tables.filter_map(|table| {
        // The last package is followed by tables with other names.
        let table = table.split("\n[").next()?;
        let value = |key: &str| {
            let line = table.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            Some(line?.trim_matches('"'))
        };
        (value("name")? == "candle-nn").then_some((value("version")?, value("source")))
    });
    candle_nn.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTRY: &str = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";

    fn lock(versions: &[(&str, &str)]) -> String {
        let mut text =
            String::from("# generated\nversion = 4\n\n[[package]]\nname = \"candle-core\"\nversion = \"0.9.9\"\n");
        for (version, source) in versions {
            text += &format!(
                "\n[[package]]\nname = \"candle-nn\"\nversion = \"{version}\"\n{source}\ndependencies = [\n \"half\",\n]\n"
            );
        }
        text + "\n[[patch.unused]]\nname = \"candle-nn\"\nversion = \"0.7.0\"\n"
    }

    #[test]
    fn a_release_and_a_copy_at_a_path_are_found() -> Result<()> {
        assert_eq!(known_version(&lock(&[("0.11.1", REGISTRY)]))?, Locked { version: 1, is_path: false });
        assert_eq!(known_version(&lock(&[("0.11.0", "")]))?, Locked { version: 0, is_path: true });
        Ok(())
    }

    #[test]
    fn of_two_versions_the_known_one_counts() -> Result<()> {
        let two = known_version(&lock(&[("0.9.1", REGISTRY), ("0.11.1", REGISTRY)]))?;
        assert_eq!(two, Locked { version: 1, is_path: false });
        let error = known_version(&lock(&[("0.11.0", REGISTRY), ("0.11.1", REGISTRY)])).unwrap_err().to_string();
        assert!(error.starts_with("names candle-nn 0.11.0 and 0.11.1, but"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_not_known_is_an_error_with_a_remedy() {
        let error = |lock: &str| known_version(lock).unwrap_err().to_string();
        let text = error(&lock(&[("0.12.3", REGISTRY)]));
        assert!(text.starts_with("names candle-nn 0.12.3, but the known releases are 0.11.0 and 0.11.1."), "{text}");
        assert!(text.contains("cargo update -p candle-nn --precise 0.11.1"), "{text}");
        assert!(error(&lock(&[])).contains("cargo add candle-nn"));
        let git = error(&lock(&[("0.11.1", "source = \"git+https://github.com/huggingface/candle#0123\"")]));
        assert!(git.contains("from git+https://github.com/huggingface/candle#0123"), "{git}");
    }
}
