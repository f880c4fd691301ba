//! The file of counts, and how counts may differ from it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// How much a count may differ from the file's, as a share of that.
pub(crate) const TOLERANCE: f64 = 0.03;

/// The counts, and the compiler that made the program.
#[derive(Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) compiler: String,
    /// By the name of the case.
    pub(crate) counts: BTreeMap<String, u64>,
}

/// The verdict on a count beside the file's; the number is the ratio of the two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Verdict {
    Same(f64),
    /// More instructions than the file allows.
    More(f64),
    /// So few that the file is out of date.
    Less(f64),
    /// The file does not have the case.
    New,
}

impl Record {
    /// The file of this architecture; none if there is none.
    pub(crate) fn read() -> Result<Option<Self>> {
        let path = path();
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).map(Some).with_context(|| path.display().to_string())
    }

    /// Writes the file of this architecture, and says where it is.
    pub(crate) fn write(&self) -> Result<PathBuf> {
        let path = path();
        fs::write(&path, self.text()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// A line for the compiler, and one for each case: its name, a tab, its count.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("{HEAD}{}\n", self.compiler);
        for (name, count) in &self.counts {
            let _ = writeln!(text, "{name}\t{count}"); // a String takes everything
        }
        text
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let compiler = lines.next().and_then(|line| line.strip_prefix(HEAD));
        let compiler = compiler.with_context(|| format!("expected a first line `{HEAD}..`"))?.to_owned();
        let mut counts = BTreeMap::new();
        for line in lines {
            let (name, count) = line.split_once('\t').with_context(|| format!("no tab in `{line}`"))?;
            let count = count.parse().with_context(|| format!("`{line}`"))?;
            ensure!(count > 0, "a count of 0 in `{line}`");
            ensure!(counts.insert(name.to_owned(), count).is_none(), "`{name}` is there twice");
        }
        Ok(Self { compiler, counts })
    }

    /// What to say of `count`.
    pub(crate) fn judge(&self, name: &str, count: u64) -> Verdict {
        let Some(&before) = self.counts.get(name) else { return Verdict::New };
        match count as f64 / before as f64 {
            ratio if ratio > 1.0 + TOLERANCE => Verdict::More(ratio),
            ratio if ratio < 1.0 - TOLERANCE => Verdict::Less(ratio),
            ratio => Verdict::Same(ratio),
        }
    }
}

const HEAD: &str = "# ";

fn path() -> PathBuf {
    let name = format!("benches/counts/{}.tsv", std::env::consts::ARCH);
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}
