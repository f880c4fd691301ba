//! What can go wrong, one variant per cause; every message names the parameter, the value and what is allowed.

use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, DeviceLocation};

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate: its [kind](ErrorKind) and, where an optimizer raised it, that optimizer's name; of what is in a
/// file, that file's path, too.
///
/// It converts into [`candle_core::Error`] with `?`, so that functions with candle's signatures can pass it on.
///
/// ```
/// use candle_adamax::{Adamax, ErrorKind, ParamsAdamax};
///
/// let error = Adamax::from_named::<&str>([], ParamsAdamax { beta1: 1.0, ..Default::default() }).unwrap_err();
/// assert!(matches!(error.kind(), ErrorKind::InvalidArgument { field, .. } if field == "beta1"));
/// assert_eq!(error.to_string(), "Adamax: invalid `beta1`: expected a number in [0, 1), got 1");
/// ```
#[derive(Debug)]
pub struct Error {
    kind: Box<ErrorKind>,
    optimizer: Option<String>,
    file: Option<PathBuf>,
}

impl Error {
    /// The cause.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// The name of the optimizer that raised the error.
    pub fn optimizer(&self) -> Option<&str> {
        self.optimizer.as_deref()
    }

    /// The file that the error is about.
    pub fn path(&self) -> Option<&Path> {
        match &*self.kind {
            ErrorKind::Io { path, .. } | ErrorKind::SafeTensors { path, .. } => Some(path),
            _ => self.file.as_deref(),
        }
    }

    /// The same error, about what is in the file at `path`.
    pub(crate) fn in_file(mut self, path: &Path) -> Self {
        if self.path().is_none() {
            self.file = Some(path.to_owned());
        }
        self
    }

    /// The same error, as raised by the optimizer `name`.
    pub(crate) fn of_optimizer(mut self, name: &str) -> Self {
        self.optimizer.get_or_insert_with(|| name.to_owned());
        self
    }

    /// The same error about something that the field `parent` holds: it names `parent.field`.
    pub(crate) fn within(mut self, parent: impl fmt::Display) -> Self {
        if let ErrorKind::InvalidArgument { field, .. } = &mut *self.kind {
            *field = format!("{parent}.{field}");
        }
        self
    }

    /// An argument that is outside of what is allowed.
    pub(crate) fn invalid(field: impl Into<String>, expected: impl Into<String>, got: impl fmt::Display) -> Self {
        ErrorKind::InvalidArgument { field: field.into(), expected: expected.into(), got: got.to_string() }.into()
    }

    /// A checkpoint that cannot be taken over.
    pub(crate) fn checkpoint(entry: impl Into<String>, expected: impl Into<String>, got: impl fmt::Display) -> Self {
        ErrorKind::Checkpoint { entry: entry.into(), expected: expected.into(), got: got.to_string() }.into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.optimizer {
            write!(f, "{name}: ")?;
        }
        self.kind.fmt(f)?;
        match &self.file {
            Some(path) => write!(f, " (in {path:?})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.kind)
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { kind: Box::new(kind), optimizer: None, file: None }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        ErrorKind::Candle(error).into()
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match *error.kind {
            ErrorKind::Candle(inner) => inner,
            // Not by `wrap`, which would print a backtrace into the message.
            kind => candle_core::Error::Wrapped(Box::new(Error { kind: Box::new(kind), ..error })),
        }
    }
}

/// The causes of an [`Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    // === Configuration ===
    /// A setting is outside of its range.
    #[error("invalid `{field}`: expected {expected}, got {got}")]
    InvalidArgument {
        /// The setting, as it is spelled in the structure that holds it.
        field: String,
        /// What is allowed.
        expected: String,
        /// What was given.
        got: String,
    },

    // === Variables ===
    /// A variable was given twice, or two variables share their memory.
    #[error("var given twice: `{first}` and `{second}` are the same memory; give each var once")]
    DuplicateVar {
        /// The name it was given first.
        first: String,
        /// The name it was given again.
        second: String,
    },

    /// Two variables, or two groups, have the same name.
    #[error("name given twice: `{0}`; names are the keys of the state, so every var has its own, and every group")]
    DuplicateName(String),

    /// No variable, or no group, of that name.
    #[error("unknown {what} `{name}`; known are: {known}")]
    Unknown {
        /// What was looked for, "var" or "group".
        what: &'static str,
        /// The name that was looked for.
        name: String,
        /// The first few names that exist.
        known: String,
    },

    /// A pair of a variable and its gradient, of which the optimizer does not have the variable.
    #[error("the var of pair {position}, of shape {shape:?}, is not one of this optimizer's; add it first")]
    UnknownPair {
        /// The pair's position, from 0.
        position: usize,
        /// The variable's dimensions.
        shape: Vec<usize>,
    },

    /// The variable is the one that [`append_rows`](crate::Adamax::append_rows) has replaced.
    #[error(
        "{holder} has `{name}` as it was before `append_rows`, which trains nothing any more: use the var that \
         `append_rows` has returned"
    )]
    ReplacedVar {
        /// Who still has it, for instance a layer.
        holder: &'static str,
        /// The variable's name.
        name: String,
    },

    /// A variable was given two gradients.
    #[error("two gradients for `{0}`; give their sum")]
    DuplicateGradient(String),

    /// A checkpoint needs names, and this variable was given without one.
    #[error(
        "var {0} has no name, so a file cannot be matched to it; make the optimizer with `from_varmap` or `from_named`"
    )]
    UnnamedVar(usize),

    // === Rows ===
    /// An id, or an index of a sparse gradient, is not the number of a row.
    #[error("id {id} at position {position:?} of {what} is out of range: {}", rows_allowed(.rows))]
    IdOutOfRange {
        /// What the id is one of: "ids", or the indices of a variable's gradient.
        what: String,
        /// The id.
        id: i64,
        /// Its position, in the shape of the tensor it is in.
        position: Vec<usize>,
        /// How many rows the table has.
        rows: usize,
    },

    /// A row of a table with [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) has missed updates, and its weights are not
    /// those that it had when it missed them.
    #[error(
        "row {row} of a table of shape {shape:?} with `SparseUpdate::Exact` was written while it had missed updates, which \
         would move what was written: call `Adamax::catch_up` before weights are written, or now, to let them stand"
    )]
    WrittenRow {
        /// The row.
        row: usize,
        /// The table's dimensions.
        shape: Vec<usize>,
    },

    /// A gradient in the `GradStore` belongs to a lookup that is not known any more.
    #[error(
        "the rows of a lookup are not known any more: it was differentiated more than once, as were too many after it, \
         and its graph is gone; step earlier, or keep the losses until then"
    )]
    LostLookup,

    // === Gradients ===
    /// A gradient, or a tensor of a snapshot, has the wrong shape.
    #[error("{what} shape mismatch for `{name}`: expected {expected:?}, got {got:?}")]
    ShapeMismatch {
        /// Which tensor, for instance "gradient".
        what: &'static str,
        /// The variable's name.
        name: String,
        /// The variable's dimensions.
        expected: Vec<usize>,
        /// The tensor's dimensions.
        got: Vec<usize>,
    },

    /// A gradient, or a tensor of a snapshot, has the wrong dtype.
    #[error("{what} dtype mismatch{}: expected {expected}, got {got:?}", of_name(.name))]
    DTypeMismatch {
        /// Which tensor, for instance "gradient".
        what: &'static str,
        /// The variable's name; empty for a tensor that belongs to none, such as the ids of a lookup.
        name: String,
        /// The dtypes that are allowed.
        expected: String,
        /// The tensor's dtype.
        got: DType,
    },

    /// A gradient is on another device than its variable.
    #[error("{what} device mismatch for `{name}`: expected {expected:?}, got {got:?}")]
    DeviceMismatch {
        /// Which tensor, for instance "gradient".
        what: &'static str,
        /// The variable's name.
        name: String,
        /// The variable's device.
        expected: DeviceLocation,
        /// The tensor's device.
        got: DeviceLocation,
    },

    /// A gradient lives in the memory of a variable, which the update writes.
    #[error(
        "the gradient of `{name}` shares the storage of the var `{owner}`: expected a tensor of its own, such as `grad.copy()`"
    )]
    SharedStorage {
        /// The variable whose gradient it is.
        name: String,
        /// The variable whose memory it is.
        owner: String,
    },

    /// Fewer variables had a gradient than [`missing_gradients`](crate::ParamsAdamax::missing_gradients) asks for.
    #[error(
        "{with_gradient} of {vars} vars had a gradient, expected {expected}\nwithout one: {}\n{CUTS}\n{MEND}\n{MEANT}",
        listed(.missing.iter().map(String::as_str))
    )]
    MissingGradients {
        /// How many variables had a gradient, as the setting counts them.
        with_gradient: usize,
        /// How many variables count: all but those of frozen groups.
        vars: usize,
        /// How many have to have one.
        expected: &'static str,
        /// The others, in alphabetical order: names, or numbers and shapes of variables without names.
        missing: Vec<String>,
    },

    /// Not one of the variables had a gradient.
    #[error("{}", no_gradients(.vars))]
    NoGradients {
        /// How many variables the optimizer has.
        vars: usize,
    },

    // === Checkpoints ===
    /// An entry of a checkpoint or snapshot is missing, surplus or does not fit.
    #[error("checkpoint entry `{entry}`: expected {expected}, got {got}")]
    Checkpoint {
        /// The entry.
        entry: String,
        /// What this optimizer needs.
        expected: String,
        /// What was found.
        got: String,
    },

    /// A file could not be read or written.
    #[error("{action} {path:?}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },

    /// A file is not a readable safetensors file.
    #[error("{path:?} is not a readable safetensors file: {source}")]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// The reader's error.
        source: safetensors::SafeTensorError,
    },

    // === Wrapped ===
    /// An error of candle.
    #[error(transparent)]
    Candle(candle_core::Error),
}

fn of_name(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" for `{name}`") }
}

fn no_gradients(vars: &usize) -> String {
    match vars {
        0 => format!("the optimizer has no vars: was it made before they were, or from another `VarMap`?\n{MEANT}"),
        vars => format!(
            "none of the {vars} vars had a gradient: is the loss computed from them, through operations that have a \
             backward pass?\n{CUTS}\n{MEND}\n{MEANT}"
        ),
    }
}

/// The operations of candle 0.11 whose result has no graph.
const CUTS: &str = "no gradient passes these operations of candle, nor reaches what is before them: `LayerNorm`, \
                    `RmsNorm`, `softmax_last_dim`, `rope`, `rope_i`, `rope_thd`, `sdpa`, `flash_attn` on the CPU, \
                    `QMatMul`";
/// Where the user finds such operations with a backward pass.
const MEND: &str = "`cargo run -p trainable-candle` writes a candle-nn that trains: see the guide's page \"Fine-tuning \
                    candle-transformers\", `candle_adamax::guide::fine_tuning`";
/// How the user says that it is no mistake.
const MEANT: &str = "where this is meant, set `missing_gradients: MissingGradients::Allow`";

fn rows_allowed(rows: &usize) -> String {
    match rows {
        0 => "the table has no rows".to_owned(),
        rows => format!("the table has {rows} rows, so ids are 0 to {}", rows - 1),
    }
}

/// The first few of these names.
pub(crate) fn listed<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    /// The number of names that are shown, and of characters of each.
    const SHOWN: usize = 5;
    const LENGTH: usize = 80;

    let mut names = names.into_iter();
    let mut text = String::new();
    for name in names.by_ref().take(SHOWN) {
        let separator = if text.is_empty() { "" } else { ", " };
        let end = name.char_indices().nth(LENGTH).map_or(name.len(), |(end, _)| end);
        let dots = if end < name.len() { ".." } else { "" };
        text += &format!("{separator}`{}{dots}`", &name[..end]);
    }
    match (text.is_empty(), names.count()) {
        (true, _) => "none".to_owned(),
        (false, 0) => text,
        (false, more) => format!("{text} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_short() {
        assert_eq!(listed([]), "none");
        assert_eq!(listed(["a", "b"]), "`a`, `b`");
        assert_eq!(listed(["a"; 9]), "`a`, `a`, `a`, `a`, `a` and 4 more");
        let long = "ö".repeat(1000);
        assert!(listed([long.as_str()]).len() < 200);
    }
}
