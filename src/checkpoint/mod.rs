//! A snapshot of an optimizer, and its ways into files and back: the crate's own, and those of PyTorch and Keras.

mod atomic;
mod header;
pub(crate) mod keras;
mod keras_config;
pub(crate) mod names;
pub(crate) mod native;
pub(crate) mod plain;
mod reading;
pub(crate) mod torch;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo, View};
use serde::{Deserialize, Serialize};

pub(crate) use self::atomic::AtomicFile;
pub use self::torch::TorchOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::SparseGrad;
use crate::group::GroupSettings;
use crate::params::ParamsAdamax;
use crate::scaler::GradScalerState;
use crate::schedule::Plateau;
use crate::state::Units;

/// The most bytes of a header that readers of safetensors files take.
const LARGEST_HEADER: usize = 100_000_000;

/// What an optimizer has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Calls of `step` that were neither skipped nor failed nor without any gradient.
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

impl Snapshot {
    /// Reads a file that [`Adamax::save`](crate::Adamax::save) or [`write`](Self::write) wrote, whatever variables are in it:
    /// to look at, to edit, or to take a part of it by [`restore_matching`](crate::Adamax::restore_matching).
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, Snapshot};
    /// use candle_core::{Device, Var};
    ///
    /// let path = std::env::temp_dir().join(format!("candle-adamax-snapshot-{}.safetensors", std::process::id()));
    /// let w = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    /// Adamax::from_named([("module.w", w.clone())], ParamsAdamax::default())?.save(&path)?;
    ///
    /// // Other names, and other settings, for the next run.
    /// let mut snapshot = Snapshot::read(&path)?;
    /// let vars = std::mem::take(&mut snapshot.vars).into_iter();
    /// snapshot.vars = vars.map(|(name, var)| (name.trim_start_matches("module.").to_owned(), var)).collect();
    /// snapshot.params.lr = 0.01.into();
    /// snapshot.write(&path)?;
    /// Adamax::from_named([("w", w)], ParamsAdamax::default())?.load(&path)?;
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A file that is missing, truncated or not such a checkpoint. Whether settings and counters are allowed, and tensors as
    /// an optimizer needs them, is checked by whoever takes the snapshot.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        native::read(path.as_ref(), None, |_| Ok(()))
    }

    /// Writes the file that [`Adamax::save`](crate::Adamax::save) would have written, in the same way: it is complete or not
    /// there.
    ///
    /// # Errors
    ///
    /// Settings of more than a mebibyte, or of more than some 65,000 values; the system's errors.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        native::write(self, AtomicFile::create(path.as_ref())?)
    }
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
    /// The logarithms of the scales of codes, of dtype U32: one for each row or block of 1,024 elements.
    pub scales: Option<Tensor>,
    /// Whether scales are those of rows.
    pub by_rows: bool,
    /// What master copies keep beside the variable: I16 for bf16, F32 for f16.
    pub master: Option<Tensor>,
    /// Its moving average, if one is kept and has begun: with the first update in which the variable had a gradient.
    pub ema: Option<Tensor>,
    /// The sum of its unscaled gradients since the last update, and of how many calls they are.
    pub accumulated: Option<(AccumulatedGrad, u64)>,
    /// The updates that its rows have missed, with [`SparseUpdate::Exact`](crate::SparseUpdate::Exact): moments, masters
    /// and weights are those before these updates.
    pub missed: Option<MissedUpdates>,
}

impl VarSnapshot {
    /// The elements that share a scale.
    pub(crate) fn units(&self) -> Units {
        if self.by_rows { Units::Rows } else { Units::Blocks }
    }
}

/// Updates that rows of a table have missed, since all of them were last up to date.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MissedUpdates {
    /// One number for each row, of dtype U32: in bits 0 to 16 the number of the last update that the row has seen, 0 if that
    /// was before all of `updates`; above them what else the optimizer knows of the row.
    pub last_update: Tensor,
    /// The updates, `[n, 3]` of dtype F64: step size, decay of the weights, and shrinkage of the scales of codes.
    pub updates: Tensor,
}

impl MissedUpdates {
    /// Whether the tensors can be those of a table of so many rows.
    pub(crate) fn have_shapes(&self, rows: usize) -> bool {
        let Self { last_update, updates } = self;
        let of_rows = last_update.dtype() == DType::U32 && last_update.dims() == [rows];
        of_rows && updates.dtype() == DType::F64 && matches!(updates.dims(), [_, 3])
    }
}

/// A sum of gradients that waits for its update.
#[derive(Clone, Debug)]
#[non_exhaustive]
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

/// Fills a safetensors file with these tensors and at most one text of metadata, and puts it in its place.
///
/// The bytes are those that `safetensors::serialize` gives, which would hold all of them in memory.
fn write_tensors<'t>(
    mut file: AtomicFile,
    tensors: impl IntoIterator<Item = (String, &'t Tensor)>,
    text: Option<(&str, String)>,
) -> Result<()> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    // Wide elements first, so that all are aligned.
    tensors.sort_by(|(a, left), (b, right)| View::dtype(right).cmp(&View::dtype(left)).then_with(|| a.cmp(b)));
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (View::dtype(tensor), tensor.dims().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let infos = infos.collect();
    let metadata = text.map(|(key, text)| HashMap::from([(key.to_owned(), text)]));
    let metadata = Metadata::new(metadata, infos).map_err(|error| unreadable(file.path(), error))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| unreadable(file.path(), error.into()))?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    if header.len() > LARGEST_HEADER {
        return Err(unreadable(file.path(), SafeTensorError::HeaderTooLarge));
    }
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(&header)?;
    for (_, tensor) in &tensors {
        file.write(&tensor.data())?;
    }
    file.commit()
}

fn unreadable(path: &Path, source: SafeTensorError) -> Error {
    let path = path.to_owned();
    match source {
        SafeTensorError::IoError(source) => ErrorKind::Io { action: "writing", path, source }.into(),
        source => ErrorKind::SafeTensors { path, source }.into(),
    }
}
