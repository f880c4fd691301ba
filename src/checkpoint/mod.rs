//! A snapshot of an optimizer, and its ways into files and back: the crate's own, and those of PyTorch and Keras.

mod atomic;
mod header;
pub(crate) mod keras;
mod keras_config;
pub(crate) mod native;
pub(crate) mod plain;
mod reading;
pub(crate) mod torch;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Tensor;
use safetensors::SafeTensorError;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::gradient::SparseGrad;
use crate::group::GroupSettings;
use crate::params::ParamsAdamax;
use crate::scaler::GradScalerState;
use crate::schedule::Plateau;

/// What an optimizer has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Calls of `step` that were neither skipped nor failed.
    pub calls: u64,
    /// Updates.
    pub updates: u64,
    /// Calls that were skipped because something was not finite.
    pub skipped: u64,
    /// Calls since the last update, whose gradients are accumulated.
    pub pending: u64,
}

/// All state of an optimizer as plain data; [`Adamax::snapshot`](crate::Adamax::snapshot) makes it and
/// [`Adamax::restore`](crate::Adamax::restore) takes it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The settings.
    pub params: ParamsAdamax,
    /// The settings of the groups.
    pub groups: Vec<GroupSettings>,
    /// The counters.
    pub counters: Counters,
    /// The loss scale, where the settings have a [`GradScaler`](crate::GradScaler).
    pub grad_scaler: Option<GradScalerState>,
    /// What metrics have made of learning rates, where the settings have a
    /// [`ReduceLrOnPlateau`](crate::ReduceLrOnPlateau).
    pub plateau: Option<Plateau>,
    /// The state of each variable, by name.
    pub vars: BTreeMap<String, VarSnapshot>,
}

/// The state of one variable, bit for bit. Tensors are in host memory, in the variable's shape and in f64 for f64
/// variables, else f32, where nothing else is said. How moments are stored is a setting of the optimizer or the group
/// ([`StateDType`](crate::StateDType)).
#[derive(Clone, Debug)]
pub struct VarSnapshot {
    /// The name of its group.
    pub group: String,
    /// How many updates it has had.
    pub step: u64,
    /// m, the first moment; or its codes, of dtype BF16, F16 or, for Q8, U8.
    pub exp_avg: Tensor,
    /// u, the exponentially weighted infinity norm; or its codes; or one for each row.
    pub exp_inf: Tensor,
    /// The logarithms of the units of codes, of dtype U32: one for each row or block of 1,024 elements.
    pub units: Option<Tensor>,
    /// Whether units are those of rows.
    pub by_rows: bool,
    /// What master copies keep beside the variable: I16 for bf16, F32 for f16.
    pub master: Option<Tensor>,
    /// Its moving average, if one is kept.
    pub ema: Option<Tensor>,
    /// The sum of its unscaled gradients since the last update, and of how many calls they are.
    pub accumulated: Option<(AccumulatedGrad, u64)>,
}

/// A sum of gradients that waits for its update.
#[derive(Clone, Debug)]
pub enum AccumulatedGrad {
    /// In the variable's shape.
    Dense(Tensor),
    /// Of the rows that had a gradient: each once, ascending.
    Rows(SparseGrad),
}

impl AccumulatedGrad {
    /// The sum, if it is in the variable's shape.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(sum) => Some(sum),
            Self::Rows(_) => None,
        }
    }

    /// The sum, if it is of some rows.
    pub fn rows(&self) -> Option<&SparseGrad> {
        match self {
            Self::Dense(_) => None,
            Self::Rows(sum) => Some(sum),
        }
    }
}

impl From<Tensor> for AccumulatedGrad {
    fn from(sum: Tensor) -> Self {
        Self::Dense(sum)
    }
}

/// A file that is being made for a path.
pub(crate) struct Destination<'p> {
    path: &'p Path,
    file: &'p Path,
}

/// Lets `write` make a file for `path`: it is complete or not there. The file can be written when `write` is called, which may
/// change something then, such as letting rows of tables catch up.
pub(crate) fn save(path: &Path, write: impl FnOnce(&Destination<'_>) -> Result<()>) -> Result<()> {
    atomic::write(path, |file| write(&Destination { path, file }))
}

/// Writes a safetensors file of these tensors, with at most one text of metadata.
fn write_tensors<'t>(
    to: &Destination<'_>,
    tensors: impl IntoIterator<Item = (String, &'t Tensor)>,
    text: Option<(&str, String)>,
) -> Result<()> {
    let metadata = text.map(|(key, text)| HashMap::from([(key.to_owned(), text)]));
    safetensors::serialize_to_file(tensors, metadata, to.file).map_err(|error| unreadable(to.path, error))
}

fn unreadable(path: &Path, source: SafeTensorError) -> Error {
    let path = path.to_owned();
    match source {
        SafeTensorError::IoError(source) => ErrorKind::Io { action: "writing", path, source }.into(),
        source => ErrorKind::SafeTensors { path, source }.into(),
    }
}
