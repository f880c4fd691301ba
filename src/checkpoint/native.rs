//! The crate's own format: a safetensors file. Its tensors are `NAME.exp_avg`, `NAME.exp_inf` and, where there is one,
//! `NAME.scales`, `NAME.master`, `NAME.ema`, `NAME.accumulated` (of some rows: `NAME.accumulated.indices` and
//! `.values`) and, for rows that have missed updates, `NAME.missed.last_update` and `.updates`; everything else is one JSON text in its metadata, under `candle_adamax`.
//!
//! Invariant: reading accepts exactly what writing makes. Whatever is missing or surplus is an error that names it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::path::Path;

use candle_core::Tensor;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::reading::{HeaderLimits, TensorFile, Tensors};
use super::{AccumulatedGrad, AtomicFile, Counters, MissedUpdates, Snapshot, VarSnapshot, names, write_tensors};
use crate::error::{Error, Result};
use crate::gradient::SparseGrad;
use crate::group::GroupSettings;
use crate::params::ParamsAdamax;
use crate::scaler::GradScalerState;
use crate::schedule::Plateau;

/// The key of the JSON text in the metadata.
const METADATA: &str = "candle_adamax";
/// Raised when an older reader would misunderstand the file.
const FORMAT_VERSION: u64 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format_version: u64,
    params: ParamsAdamax,
    groups: Vec<GroupSettings>,
    counters: Counters,
    // As fields that may be left out, they would be none then.
    #[serde(deserialize_with = "Option::deserialize")]
    grad_scaler: Option<GradScalerState>,
    #[serde(deserialize_with = "Option::deserialize")]
    plateau: Option<Plateau>,
    vars: BTreeMap<String, VarHeader>,
}

/// One variable. Tensors that it does not have are left out.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VarHeader {
    group: String,
    step: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    scales: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    by_rows: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    master: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    ema: bool,
    /// Of how many calls the accumulated gradient is; there is none if 0.
    #[serde(default, skip_serializing_if = "is_default")]
    accumulated: u64,
    /// Whether that is of some rows only.
    #[serde(default, skip_serializing_if = "is_default")]
    accumulated_rows: bool,
    /// Whether its rows have missed updates.
    #[serde(default, skip_serializing_if = "is_default")]
    missed: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads the format's version and nothing else, whatever that version's header looks like.
#[derive(Deserialize)]
struct Version {
    format_version: u64,
}

/// Writes a snapshot.
pub(crate) fn write(snapshot: &Snapshot, file: AtomicFile) -> Result<()> {
    let Snapshot { params, groups, counters, grad_scaler, plateau, vars } = snapshot;
    let mut tensors: Vec<(String, &Tensor)> = Vec::with_capacity(2 * vars.len());
    let mut headers = BTreeMap::new();
    for (name, var) in vars {
        tensors.push((format!("{name}.exp_avg"), &var.exp_avg));
        tensors.push((format!("{name}.exp_inf"), &var.exp_inf));
        for (what, tensor) in [("scales", &var.scales), ("master", &var.master), ("ema", &var.ema)] {
            tensors.extend(tensor.iter().map(|tensor| (format!("{name}.{what}"), tensor)));
        }
        match &var.accumulated {
            None => {}
            Some((AccumulatedGrad::Dense(sum), _)) => tensors.push((format!("{name}.accumulated"), sum)),
            Some((AccumulatedGrad::Rows(SparseGrad { indices, values }), _)) => {
                tensors.push((format!("{name}.accumulated.indices"), indices));
                tensors.push((format!("{name}.accumulated.values"), values));
            }
        }
        if let Some(MissedUpdates { last_update, updates }) = &var.missed {
            tensors.push((format!("{name}.missed.last_update"), last_update));
            tensors.push((format!("{name}.missed.updates"), updates));
        }
        let header = VarHeader {
            group: var.group.clone(),
            step: var.step,
            scales: var.scales.is_some(),
            by_rows: var.by_rows,
            master: var.master.is_some(),
            ema: var.ema.is_some(),
            accumulated: var.accumulated.as_ref().map_or(0, |(_, calls)| *calls),
            accumulated_rows: matches!(var.accumulated, Some((AccumulatedGrad::Rows(_), _))),
            missed: var.missed.is_some(),
        };
        headers.insert(name.clone(), header);
    }
    let header = Header {
        format_version: FORMAT_VERSION,
        params: params.clone(),
        groups: groups.clone(),
        counters: *counters,
        grad_scaler: *grad_scaler,
        plateau: *plateau,
        vars: headers,
    };
    let json = to_json(&header)?;
    HeaderLimits::of(vars.keys().map(String::as_str)).check(METADATA, &json)?;
    write_tensors(file, tensors, Some((METADATA, json)))
}

/// Makes sure that a file has room for these settings, whatever variables there are.
pub(crate) fn check_settings(params: &ParamsAdamax, groups: &[GroupSettings]) -> Result<()> {
    HeaderLimits::of([]).check(METADATA, &to_json(&(params, groups))?)
}

/// Reads what [`write()`] has written for variables of these names, which are in alphabetical order, or for any.
///
/// `check` sees the snapshot before any tensor is read, with [outlines](TensorFile::assemble) for tensors.
pub(crate) fn read(
    path: &Path,
    names: Option<&[&str]>,
    check: impl FnOnce(&Snapshot) -> Result<()>,
) -> Result<Snapshot> {
    try_read(path, names, check).map_err(|error| error.in_file(path))
}

fn try_read(path: &Path, names: Option<&[&str]>, check: impl FnOnce(&Snapshot) -> Result<()>) -> Result<Snapshot> {
    let limits = names.map(|names| HeaderLimits::of(names.iter().copied()));
    let file = TensorFile::open(path, Some(METADATA), limits)?;
    let Some(json) = file.text() else {
        return Err(Error::checkpoint(METADATA, "metadata of a checkpoint of this crate", "none"));
    };
    let header = parse(json)?;
    if let Some(names) = names {
        let theirs: Vec<_> = header.vars.keys().map(String::as_str).collect();
        names::check(names, &theirs, names::Source::File)?;
    }
    file.assemble(|tensors| header.snapshot(tensors), check)
}

impl Header {
    /// The snapshot, of which the header has everything but the tensors.
    fn snapshot(&self, tensors: &mut Tensors<'_>) -> Result<Snapshot> {
        let Self { params, groups, counters, grad_scaler, plateau, vars, .. } = self;
        let vars = vars.iter().map(|(name, header)| Ok((name.clone(), header.snapshot(name, tensors)?)));
        Ok(Snapshot {
            params: params.clone(),
            groups: groups.clone(),
            counters: *counters,
            grad_scaler: *grad_scaler,
            plateau: *plateau,
            vars: vars.collect::<Result<_>>()?,
        })
    }
}

impl VarHeader {
    fn snapshot(&self, name: &str, tensors: &mut Tensors<'_>) -> Result<VarSnapshot> {
        let mut take = |what: &str| tensors.take(&format!("{name}.{what}"));
        Ok(VarSnapshot {
            group: self.group.clone(),
            step: self.step,
            exp_avg: take("exp_avg")?,
            exp_inf: take("exp_inf")?,
            scales: self.scales.then(|| take("scales")).transpose()?,
            by_rows: self.by_rows,
            master: self.master.then(|| take("master")).transpose()?,
            ema: self.ema.then(|| take("ema")).transpose()?,
            accumulated: match (self.accumulated, self.accumulated_rows) {
                (0, _) => None,
                (calls, false) => Some((AccumulatedGrad::Dense(take("accumulated")?), calls)),
                (calls, true) => {
                    let indices = take("accumulated.indices")?;
                    let values = take("accumulated.values")?;
                    Some((AccumulatedGrad::Rows(SparseGrad { indices, values }), calls))
                }
            },
            missed: match self.missed {
                false => None,
                true => {
                    Some(MissedUpdates { last_update: take("missed.last_update")?, updates: take("missed.updates")? })
                }
            },
        })
    }
}

/// The JSON text of the metadata.
fn parse(json: &str) -> Result<Header> {
    let malformed = |error| Error::checkpoint(METADATA, "the header of a checkpoint", error);
    let Version { format_version } = serde_json::from_str(json).map_err(malformed)?;
    if format_version != FORMAT_VERSION {
        return Err(Error::checkpoint("format_version", format!("{FORMAT_VERSION}"), format_version));
    }
    let header: Header = serde_json::from_str(json).map_err(malformed)?;
    // Elsewhere, what is left out has its default, and what Keras writes beside a schedule is passed over. Here, something
    // was lost or does not belong there.
    let written = serde_json::to_value(&header).map_err(malformed)?;
    let same = SameKeys { entry: None, written: &written };
    let difference = same.deserialize(&mut serde_json::Deserializer::from_str(json)).map_err(malformed)?;
    match difference {
        Some(Difference::Missing(entry)) => Err(Error::checkpoint(entry, "a setting", "none")),
        Some(Difference::Surplus(entry)) => Err(Error::checkpoint(entry, "no such setting", "a surplus one")),
        None => Ok(header),
    }
}

fn to_json(settings: &impl Serialize) -> Result<String> {
    serde_json::to_string(settings).map_err(|error| Error::checkpoint(METADATA, "settings that JSON can hold", error))
}

/// The first entry of a JSON text that writing would not have made, or would have made, too.
enum Difference {
    Missing(String),
    Surplus(String),
}

/// Looks for keys that a JSON text does not have in common with `written`.
struct SameKeys<'w> {
    /// Where in the text this is.
    entry: Option<&'w str>,
    written: &'w Value,
}

impl SameKeys<'_> {
    fn entry_of(&self, key: impl Display) -> String {
        self.entry.map_or_else(|| key.to_string(), |parent| format!("{parent}.{key}"))
    }
}

impl<'de> DeserializeSeed<'de> for SameKeys<'_> {
    type Value = Option<Difference>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Self::Value, D::Error> {
        match self.written {
            Value::Object(_) | Value::Array(_) => deserializer.deserialize_any(self),
            _ => deserializer.deserialize_ignored_any(IgnoredAny).map(|_| None),
        }
    }
}

impl<'de> Visitor<'de> for SameKeys<'_> {
    type Value = Option<Difference>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let (mut found, mut difference) = (BTreeSet::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            let entry = self.entry_of(&key);
            match self.written.get(&key) {
                Some(written) if found.insert(key) => {
                    let inner = map.next_value_seed(SameKeys { entry: Some(&entry), written })?;
                    difference = difference.or(inner);
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    difference.get_or_insert(Difference::Surplus(entry));
                }
            }
        }
        let missing = || self.written.as_object()?.keys().find(|key| !found.contains(*key));
        Ok(difference.or_else(|| missing().map(|key| Difference::Missing(self.entry_of(key)))))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self::Value, A::Error> {
        let mut difference = None;
        let elements = self.written.as_array().into_iter().flatten();
        for (index, written) in elements.enumerate() {
            let entry = self.entry_of(index);
            match seq.next_element_seed(SameKeys { entry: Some(&entry), written })? {
                Some(inner) => difference = difference.or(inner),
                None => return Ok(difference.or(Some(Difference::Missing(entry)))),
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {
            difference.get_or_insert_with(|| Difference::Surplus(self.entry_of("..")));
        }
        Ok(difference)
    }
}
