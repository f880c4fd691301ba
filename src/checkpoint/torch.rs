//! The state of `torch.optim.Adamax` as a safetensors file: `NAME.exp_avg`, `NAME.exp_inf` and `NAME.step` for each
//! parameter, and its `param_groups` as JSON in the metadata, with names where PyTorch has the numbers of parameters.
//!
//! `examples/exchange/pytorch.py` is the other side.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::header::Wanted;
use super::plain::{PlainVar, count, of_scalar};
use super::reading::{Room, TensorFile};
use super::{Destination, write_tensors};
use crate::error::{Error, Result};

/// The key of the JSON text in the metadata.
pub(crate) const PARAM_GROUPS: &str = "param_groups";
/// What may stand after a parameter's name in the name of a tensor.
const TENSORS: [&str; 3] = ["exp_avg", "exp_inf", "step"];
/// PyTorch counts in f32, in which this is the last number that can be counted to.
const LARGEST_STEP: u64 = 1 << f32::MANTISSA_DIGITS;

/// One of PyTorch's `param_groups`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TorchGroup {
    pub(crate) lr: f64,
    pub(crate) betas: [f64; 2],
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    pub(crate) maximize: bool,
    /// Which of PyTorch's implementations runs.
    #[serde(default)]
    foreach: Option<bool>,
    /// Whether a CUDA graph may capture it.
    #[serde(default)]
    capturable: bool,
    /// Whether autograd goes through it.
    #[serde(default)]
    differentiable: bool,
    /// Where one of PyTorch's schedulers began; the scheduler has state of its own.
    #[serde(default, skip_serializing)]
    #[allow(dead_code, reason = "a known key that means nothing here")]
    initial_lr: Option<f64>,
    /// The names of its parameters.
    pub(crate) params: Vec<String>,
}

impl TorchGroup {
    /// A group with these numbers.
    pub(crate) fn new(
        lr: f64,
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
        maximize: bool,
        params: Vec<String>,
    ) -> Self {
        Self {
            lr,
            betas,
            eps,
            weight_decay,
            maximize,
            foreach: None,
            capturable: false,
            differentiable: false,
            initial_lr: None,
            params,
        }
    }
}

/// What is in such a file.
#[derive(Debug)]
pub(crate) struct TorchState {
    pub(crate) groups: Vec<TorchGroup>,
    pub(crate) vars: BTreeMap<String, PlainVar>,
}

/// Writes the state; averages and gradients that wait have no place in it, and the caller has made sure of that.
pub(crate) fn write(state: &TorchState, to: &Destination<'_>) -> Result<()> {
    let steps = state.vars.iter().map(|(name, var)| {
        let key = format!("{name}.step");
        if var.step > LARGEST_STEP {
            let expected = format!("at most {LARGEST_STEP}, which is as far as PyTorch counts in f32");
            return Err(Error::checkpoint(key, expected, var.step));
        }
        Ok((key, of_scalar(var.step as f32)?))
    });
    let steps = steps.collect::<Result<Vec<_>>>()?;
    let moments = state
        .vars
        .iter()
        .flat_map(|(name, var)| [(format!("{name}.exp_avg"), &var.exp_avg), (format!("{name}.exp_inf"), &var.exp_inf)]);
    let groups = serde_json::to_string(&state.groups)
        .map_err(|error| Error::checkpoint(PARAM_GROUPS, "settings that JSON can hold", error))?;
    Room::of(state.vars.keys().map(String::as_str)).check(PARAM_GROUPS, &groups)?;
    let tensors = moments.chain(steps.iter().map(|(key, step)| (key.clone(), step)));
    write_tensors(to, tensors, Some((PARAM_GROUPS, groups)))
}

/// Reads the state of parameters of these names, which are in alphabetical order, and of no others.
pub(crate) fn read(path: &Path, names: &[&str]) -> Result<TorchState> {
    let is_var = |name: &str| names.binary_search(&name).is_ok();
    let is_tensor =
        |key: &str| key.rsplit_once('.').is_some_and(|(name, what)| TENSORS.contains(&what) && is_var(name));
    let wanted = Wanted { text: Some(PARAM_GROUPS), is_tensor: &is_tensor, room: Room::of(names.iter().copied()) };
    let mut file = TensorFile::open(path, &wanted)?;
    let groups = parse_groups(file.text(), names)?;
    file.no_surplus()?;
    let mut vars = BTreeMap::new();
    for &name in names {
        let mut take = |what: &str| {
            let key = format!("{name}.{what}");
            let tensor = file.take(&key)?;
            Ok::<_, Error>((key, tensor))
        };
        let (key, step) = take("step")?;
        let step = count(&key, &step)?;
        let ((_, exp_avg), (_, exp_inf)) = (take("exp_avg")?, take("exp_inf")?);
        vars.insert(name.to_owned(), PlainVar { exp_avg, exp_inf, step, ema: None, accumulated: None });
    }
    file.finish()?;
    Ok(TorchState { groups, vars })
}

/// The groups, which have each of the names once and no other.
fn parse_groups(json: Option<&str>, names: &[&str]) -> Result<Vec<TorchGroup>> {
    let Some(json) = json else {
        return Err(Error::checkpoint(PARAM_GROUPS, "the settings of torch.optim.Adamax, in the metadata", "none"));
    };
    let groups: Vec<TorchGroup> = serde_json::from_str(json)
        .map_err(|error| Error::checkpoint(PARAM_GROUPS, "the settings of torch.optim.Adamax", error))?;
    let mut listed: Vec<&str> = groups.iter().flat_map(|group| &group.params).map(String::as_str).collect();
    listed.sort_unstable();
    if let Some(twice) = listed.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::checkpoint(PARAM_GROUPS, format!("`{}` in one group", twice[0]), "in two"));
    }
    if let Some(surplus) = listed.iter().find(|name| names.binary_search(name).is_err()) {
        return Err(Error::checkpoint(PARAM_GROUPS, format!("no parameter `{surplus}`"), "a surplus one"));
    }
    if let Some(missing) = names.iter().find(|name| listed.binary_search(name).is_err()) {
        return Err(Error::checkpoint(PARAM_GROUPS, format!("a group of `{missing}`"), "none"));
    }
    Ok(groups)
}
