//! Reads golden files, whatever they hold, and compares the crate with them. `main.rs` runs them.
//!
//! Everything is interpreted from a file's metadata; what is not understood there is an error, never passed over.

mod case;
mod clip;
mod compare;
mod drift;
mod hyper;
mod model;
mod optimizer;
mod rates;
mod recording;
mod rows;
mod schedule;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::Kernel;

pub(crate) use case::Case;
#[allow(unused_imports, reason = "one of the test files looks at it")]
pub(crate) use rows::Untouched;

/// What became of a case that did not fail.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// The crate gives what was recorded.
    Compared,
    /// The crate means to differ from the recording, for this reason, and does what it documents instead.
    Own(String),
    /// Not compared, for this reason.
    NotCompared(String),
}

/// Compares one case.
pub(crate) fn run(case: &Case, kernel: Kernel) -> Result<Outcome> {
    case.check_keys()?;
    match (case.kind()?, case.family()?) {
        ("schedules", "schedule") => schedule::run(case),
        ("clip", "clip") => clip::run(case, kernel),
        ("drift", "drift") => drift::run(case, kernel),
        ("keras3", "keras3")
        | ("optax_adamax", "optax")
        | ("pytorch", "torch")
        | ("tf_legacy_dense" | "tf_legacy_sparse" | "tf_legacy_e2e", "tf_legacy")
        | ("tf_raw", "tf_raw") => optimizer::run(case, kernel),
        (kind, family) => bail!("unknown kind `{kind}` of family `{family}`"),
    }
}

/// What became of the cases of a folder.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) outcomes: BTreeMap<String, Outcome>,
    pub(crate) failures: BTreeMap<String, String>,
    /// The families, as which kinds, and how many of their cases give what was recorded.
    pub(crate) families: BTreeMap<String, usize>,
    /// Files without a case in their metadata.
    pub(crate) others: Vec<String>,
}

/// Compares all cases of a folder and its subfolders.
pub(crate) fn run_folder(folder: &Path, kernel: Kernel) -> Result<Summary> {
    let mut summary = Summary::default();
    for path in case::files(folder)? {
        let name = path.strip_prefix(folder)?.with_extension("").display().to_string();
        let outcome = match Case::read(&path) {
            Ok(None) => {
                summary.others.push(name);
                continue;
            }
            Ok(Some(case)) => {
                let outcome = run(&case, kernel);
                if let (Ok(kind), Ok(family)) = (case.kind(), case.family()) {
                    let compared = summary.families.entry(format!("{family} ({kind})")).or_default();
                    *compared += usize::from(matches!(outcome, Ok(Outcome::Compared)));
                }
                outcome
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok(outcome) => drop(summary.outcomes.insert(name, outcome)),
            Err(error) => drop(summary.failures.insert(name, format!("{error:#}"))),
        }
    }
    ensure!(!summary.outcomes.is_empty() || !summary.failures.is_empty(), "no case in {}", folder.display());
    Ok(summary)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let folder_of = |name: &str| name.rsplit_once('/').map_or(".", |(folder, _)| folder).to_owned();
        let mut counts: BTreeMap<String, [usize; 4]> = BTreeMap::new();
        for (name, outcome) in &self.outcomes {
            let index = match outcome {
                Outcome::Compared => 0,
                Outcome::Own(_) => 1,
                Outcome::NotCompared(_) => 2,
            };
            counts.entry(folder_of(name)).or_default()[index] += 1;
        }
        for name in self.failures.keys() {
            counts.entry(folder_of(name)).or_default()[3] += 1;
        }
        for (folder, [compared, own, not, failed]) in &counts {
            writeln!(f, "  {folder}: {compared} compared, {own} by own rules, {not} not compared, {failed} failed")?;
        }
        for (name, outcome) in &self.outcomes {
            match outcome {
                Outcome::Compared => {}
                Outcome::Own(reason) => writeln!(f, "  by own rules: {name}: {reason}")?,
                Outcome::NotCompared(reason) => writeln!(f, "  not compared: {name}: {reason}")?,
            }
        }
        for name in &self.others {
            writeln!(f, "  no case in the metadata of {name}")?;
        }
        for (name, error) in &self.failures {
            writeln!(f, "  FAILED: {name}: {error}")?;
        }
        Ok(())
    }
}

/// A number of the JSON, where what is not finite is a string; none for null.
fn number(value: &serde_json::Value) -> Result<Option<f64>> {
    Ok(match value {
        serde_json::Value::Null => None,
        serde_json::Value::String(text) => Some(text.parse().with_context(|| format!("`{text}` is no number"))?),
        other => Some(other.as_f64().with_context(|| format!("{other} is no number"))?),
    })
}
