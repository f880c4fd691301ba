//! The crate's own format: a safetensors file. Its tensors are `NAME.exp_avg`, `NAME.exp_inf` and, where there is one,
//! `NAME.units`, `NAME.master`, `NAME.ema` and `NAME.accumulated` (of some rows: `NAME.accumulated.indices` and
//! `.values`); everything else is one JSON text in its metadata, under `candle_adamax`.
//!
//! Invariant: reading accepts exactly what writing makes. Whatever is missing or surplus is an error that names it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::header::Wanted;
use super::reading::{Room, TensorFile};
use super::{AccumulatedGrad, Counters, Destination, Snapshot, VarSnapshot, write_tensors};
use crate::error::{Error, Result};
use crate::gradient::SparseGrad;
use crate::group::GroupSettings;
use crate::params::ParamsAdamax;
use crate::scaler::{GradScaler, GradScalerState};
use crate::schedule::{Plateau, ReduceLrOnPlateau};

/// The key of the JSON text in the metadata.
const METADATA: &str = "candle_adamax";
/// What may stand after a variable's name in the name of a tensor.
const TENSORS: [&str; 8] =
    ["exp_avg", "exp_inf", "units", "master", "ema", "accumulated", "accumulated.indices", "accumulated.values"];
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

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VarHeader {
    group: String,
    step: u64,
    units: bool,
    by_rows: bool,
    master: bool,
    ema: bool,
    /// Of how many calls the accumulated gradient is; there is none if 0.
    accumulated: u64,
    /// Whether that is of some rows only.
    accumulated_rows: bool,
}

/// Reads the format's version and nothing else, whatever that version's header looks like.
#[derive(Deserialize)]
struct Version {
    format_version: u64,
}

/// Writes a snapshot.
pub(crate) fn write(snapshot: &Snapshot, to: &Destination<'_>) -> Result<()> {
    let Snapshot { params, groups, counters, grad_scaler, plateau, vars } = snapshot;
    let mut tensors: Vec<(String, &Tensor)> = Vec::with_capacity(2 * vars.len());
    let mut headers = BTreeMap::new();
    for (name, var) in vars {
        tensors.push((format!("{name}.exp_avg"), &var.exp_avg));
        tensors.push((format!("{name}.exp_inf"), &var.exp_inf));
        for (what, tensor) in [("units", &var.units), ("master", &var.master), ("ema", &var.ema)] {
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
        let header = VarHeader {
            group: var.group.clone(),
            step: var.step,
            units: var.units.is_some(),
            by_rows: var.by_rows,
            master: var.master.is_some(),
            ema: var.ema.is_some(),
            accumulated: var.accumulated.as_ref().map_or(0, |(_, calls)| *calls),
            accumulated_rows: matches!(var.accumulated, Some((AccumulatedGrad::Rows(_), _))),
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
    let json = serde_json::to_string(&header)
        .map_err(|error| Error::checkpoint(METADATA, "settings that JSON can hold", error))?;
    Room::of(vars.keys().map(String::as_str)).check(METADATA, &json)?;
    write_tensors(to, tensors, Some((METADATA, json)))
}

/// Makes sure that settings are of a size that [`write()`] writes, before anything is made ready for it.
pub(crate) fn check_settings<'n>(
    params: &ParamsAdamax,
    groups: &[GroupSettings],
    names: impl IntoIterator<Item = &'n str>,
) -> Result<()> {
    let json = serde_json::to_string(&(params, groups))
        .map_err(|error| Error::checkpoint(METADATA, "settings that JSON can hold", error))?;
    Room::of(names).check(METADATA, &json)
}

/// Reads what [`write()`] has written for variables of these names, which are in alphabetical order.
pub(crate) fn read(path: &Path, names: &[&str]) -> Result<Snapshot> {
    let is_var = |name: &str| names.binary_search(&name).is_ok();
    let is_tensor = |key: &str| {
        TENSORS.iter().any(|what| {
            let name = key.strip_suffix(what).and_then(|key| key.strip_suffix('.'));
            name.is_some_and(is_var)
        })
    };
    let room = Room::of(names.iter().copied());
    let mut file = TensorFile::open(path, &Wanted { text: Some(METADATA), is_tensor: &is_tensor, room })?;
    let Some(json) = file.text() else {
        return Err(Error::checkpoint(METADATA, "metadata of a checkpoint of this crate", "none"));
    };
    let header = parse(json)?;
    if let Some(surplus) = header.vars.keys().find(|name| !is_var(name)) {
        return Err(Error::checkpoint(surplus, "no such var", "a surplus one"));
    }
    let mut vars = BTreeMap::new();
    for (name, header) in header.vars {
        let VarHeader { group, step, units, by_rows, master, ema, accumulated, accumulated_rows } = header;
        let mut take = |what: &str| file.take(&format!("{name}.{what}"));
        let var = VarSnapshot {
            group,
            step,
            exp_avg: take("exp_avg")?,
            exp_inf: take("exp_inf")?,
            units: units.then(|| take("units")).transpose()?,
            by_rows,
            master: master.then(|| take("master")).transpose()?,
            ema: ema.then(|| take("ema")).transpose()?,
            accumulated: match (accumulated, accumulated_rows) {
                (0, _) => None,
                (calls, false) => Some((AccumulatedGrad::Dense(take("accumulated")?), calls)),
                (calls, true) => {
                    let indices = take("accumulated.indices")?;
                    let values = take("accumulated.values")?;
                    Some((AccumulatedGrad::Rows(SparseGrad { indices, values }), calls))
                }
            },
        };
        vars.insert(name, var);
    }
    file.finish()?;
    let Header { params, groups, counters, grad_scaler, plateau, .. } = header;
    Ok(Snapshot { params, groups, counters, grad_scaler, plateau, vars })
}

/// The JSON text of the metadata.
fn parse(json: &str) -> Result<Header> {
    let malformed = |error| Error::checkpoint(METADATA, "the header of a checkpoint", error);
    let Version { format_version } = serde_json::from_str(json).map_err(malformed)?;
    if format_version != FORMAT_VERSION {
        return Err(Error::checkpoint("format_version", format!("{FORMAT_VERSION}"), format_version));
    }
    let fields: Value = serde_json::from_str(json).map_err(malformed)?;
    require_fields("params", &fields["params"], &ParamsAdamax::default())?;
    require_fields("params.grad_scaler", &fields["params"]["grad_scaler"], &GradScaler::default())?;
    require_fields("params.plateau", &fields["params"]["plateau"], &ReduceLrOnPlateau::default())?;
    for group in fields["groups"].as_array().into_iter().flatten() {
        require_fields("groups", group, &GroupSettings::new(""))?;
    }
    serde_json::from_str(json).map_err(malformed)
}

/// Refuses settings in which something is left out. Elsewhere that means its default; here, that something was lost.
fn require_fields(entry: &str, settings: &Value, complete: &impl Serialize) -> Result<()> {
    let complete = serde_json::to_value(complete).map_err(|error| Error::checkpoint(entry, "settings", error))?;
    let (Some(settings), Some(complete)) = (settings.as_object(), complete.as_object()) else {
        return Ok(()); // of another kind altogether, which is an error of its own
    };
    match complete.keys().find(|&field| !settings.contains_key(field)) {
        Some(field) => Err(Error::checkpoint(format!("{entry}.{field}"), "a setting", "none")),
        None => Ok(()),
    }
}
