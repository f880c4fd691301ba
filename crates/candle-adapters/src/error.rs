//! What can go wrong; every message names the parameter, the value and what is allowed.

use std::fmt;
use std::path::{Path, PathBuf};

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. It converts into [`candle_core::Error`] with `?`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that is not allowed or not supported.
    #[error("invalid `{field}`: expected {expected}, got {got}")]
    Config {
        /// The field of [`LoraConfig`](crate::LoraConfig), or the key of `adapter_config.json`.
        field: String,
        /// What is allowed.
        expected: String,
        /// The value.
        got: String,
    },
    /// No model has been built whose adapters there could be.
    #[error("no model has been built with these adapters; call `build` first")]
    NotBuilt,
    /// Entries of new adapters' settings that have no effect, such as misspelled names.
    #[error("no module of the model matches {}; it has {}", .entries.join(", "), Listed(.seen, "modules"))]
    Unmatched {
        /// Each with its field of [`LoraConfig`](crate::LoraConfig).
        entries: Vec<String>,
        /// The modules of the model.
        seen: Vec<String>,
    },
    /// No weight of the model has an adapter.
    #[error(
        "no module of the model matches `target_modules` = {target}; it has {}",
        Listed(.seen, "weights of two dimensions")
    )]
    NoTarget {
        /// The setting.
        target: String,
        /// Modules of the model that could have been named.
        seen: Vec<String>,
    },
    /// Names or shapes in an adapter's file that are not those of the model.
    #[error("the adapter does not fit the model: {}", Misfit(.missing, .unexpected, .mismatched))]
    Names {
        /// Names that the model and the configuration need and that the adapter does not have.
        missing: Vec<String>,
        /// Names of the adapter that nothing has asked for.
        unexpected: Vec<String>,
        /// Names with both shapes.
        mismatched: Vec<String>,
    },
    /// A weight that cannot have an adapter, or not this one.
    #[error("weight {name:?}: expected {expected}, got {got}")]
    Weight {
        /// The weight's name.
        name: String,
        /// What is allowed.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A weight in a model that was computed from other values of the adapter, or of the base, than there are now.
    #[error(
        "the weight of {module:?} that the model holds is stale: its adapter or its base has changed since it was \
         computed; call `refresh()` after each step of the optimizer and after a change of the base, before the next \
         forward pass"
    )]
    Stale {
        /// The module's name.
        module: String,
    },
    /// A model that computes with a copy of a weight, which `refresh` cannot reach.
    #[error(
        "the model holds {copies} tensors that were computed from adapted weights before the last refresh, such as \
         contiguous copies or other dtypes; one has the shape {shape:?} and is from the weight of {module:?}; \
         `refresh()` does not reach them: build the model again by `build()` after each step"
    )]
    Copied {
        /// The name of a module.
        module: String,
        /// The shape of the copy.
        shape: Vec<usize>,
        /// The number of copies.
        copies: usize,
    },
    /// A file that cannot be read or written.
    #[error("{path:?}: {source}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path:?}: {message}")]
    Format {
        /// Its path.
        path: PathBuf,
        /// The cause.
        message: String,
    },
    /// What is wrong with the content of a file.
    #[error("{path:?}: {source}")]
    Content {
        /// Its path.
        path: PathBuf,
        /// The cause: [`Config`](Self::Config) or [`Names`](Self::Names).
        source: Box<Error>,
    },
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn config(field: impl Into<String>, expected: impl Into<String>, got: impl fmt::Debug) -> Self {
        Self::Config { field: field.into(), expected: expected.into(), got: format!("{got:?}") }
    }

    /// A value in `adapter_config.json`, as it stands there.
    pub(crate) fn json(key: &str, expected: &str, got: &serde_json::Value) -> Self {
        Self::Config { field: key.to_owned(), expected: expected.to_owned(), got: got.to_string() }
    }

    pub(crate) fn weight(name: &str, expected: impl Into<String>, got: impl fmt::Debug) -> Self {
        Self::Weight { name: name.to_owned(), expected: expected.into(), got: format!("{got:?}") }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn content(path: &Path) -> impl FnOnce(Self) -> Self {
        move |source| Self::Content { path: path.to_owned(), source: Box::new(source) }
    }

    pub(crate) fn format(path: &Path, message: impl fmt::Display) -> Self {
        Self::Format { path: path.to_owned(), message: message.to_string() }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            // Not by `wrap`, which would print a backtrace into the message.
            error => Self::Wrapped(Box::new(error)),
        }
    }
}

/// The number of names in a message; the fields of the error have all of them.
const SHOWN: usize = 10;

/// Names with a title, cut where there are many.
struct Listed<'a>(&'a [String], &'a str);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(names, title) = self;
        write!(f, "{} {title}", names.len())?;
        for (index, name) in names.iter().take(SHOWN).enumerate() {
            write!(f, "{}{name}", if index == 0 { ": " } else { ", " })?;
        }
        if names.len() > SHOWN { write!(f, ", and {} more", names.len() - SHOWN) } else { Ok(()) }
    }
}

/// The lists of [`Error::Names`] that are not empty.
struct Misfit<'a>(&'a [String], &'a [String], &'a [String]);

impl fmt::Display for Misfit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(missing, unexpected, mismatched) = self;
        let lists = [(missing, "missing"), (unexpected, "unexpected"), (mismatched, "of another shape or type")];
        let mut separator = "";
        for (names, title) in lists.into_iter().filter(|(names, _)| !names.is_empty()) {
            write!(f, "{separator}{}", Listed(names, title))?;
            separator = "; ";
        }
        Ok(())
    }
}
