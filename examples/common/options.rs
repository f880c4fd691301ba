//! Options that several programs have.

use candle_adamax::{SparseUpdate, StateDType};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How moments are stored, in bytes a weight: 8, 4, 4, 2.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    F32,
    Bf16,
    F16,
    Q8,
}

impl State {
    pub(crate) fn dtype(self) -> StateDType {
        match self {
            Self::F32 => StateDType::F32,
            Self::Bf16 => StateDType::BF16,
            Self::F16 => StateDType::F16,
            Self::Q8 => StateDType::Q8,
        }
    }
}

/// What becomes of rows of a table without a gradient.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sparse {
    /// Nothing.
    Lazy,
    /// What an optimizer of dense tables would do to them.
    Exact,
}

impl Sparse {
    pub(crate) fn update(self) -> SparseUpdate {
        match self {
            Self::Lazy => SparseUpdate::Lazy,
            Self::Exact => SparseUpdate::Exact,
        }
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    at_least(text, 1)
}

/// The size of a pool of threads.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    const MOST: usize = 1024;
    match at_least_one(text)? {
        threads if threads > MOST => Err(format!("expected at most {MOST}")),
        threads => Ok(threads),
    }
}

pub(crate) fn at_least(text: &str, least: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if number >= least => Ok(number),
        Ok(_) => Err(format!("expected at least {least}")),
        Err(error) => Err(format!("expected a whole number, at least {least}: {error}")),
    }
}
