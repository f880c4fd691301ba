//! The state of `torch.optim.Adamax` as a safetensors file: `NAME.exp_avg`, `NAME.exp_inf` and `NAME.step` for each
//! parameter, and its `param_groups` as JSON in the metadata, with names where PyTorch has the numbers of parameters.
//!
//! `examples/exchange/pytorch.py` is the other side.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::names::{differences, hint};
use super::plain::{PlainVar, count, of_scalar};
use super::reading::{HeaderLimits, TensorFile, Tensors};
use super::{AtomicFile, write_tensors};
use crate::error::{Error, Result, listed};

/// The key of the JSON text in the metadata.
pub(crate) const PARAM_GROUPS: &str = "param_groups";
/// Keys that PyTorch itself keeps in the groups and no optimizer reads: those of its schedulers (`LRScheduler`, `SWALR`,
/// `OneCycleLR` and `CyclicLR`, which have state of their own) and the parameters' names.
const KNOWN_OTHERS: [&str; 7] =
    ["initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "param_names"];
/// PyTorch counts in f32, in which this is the last number that can be counted to.
const LARGEST_STEP: u64 = 1 << f32::MANTISSA_DIGITS;

/// One of PyTorch's `param_groups`.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// The names of its parameters.
    pub(crate) params: Vec<String>,
    /// All other keys, which PyTorch's optimizer does not read.
    #[serde(flatten, skip_serializing)]
    others: BTreeMap<String, IgnoredAny>,
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
            params,
            others: BTreeMap::new(),
        }
    }
}

/// Options of [`Adamax::load_torch_with`](crate::Adamax::load_torch_with).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TorchOptions {
    /// Whether keys of `param_groups` that are not known are left out, such as the `lr_scale` of layer-wise learning rates
    /// (their `lr` has been scaled already). Otherwise they are an error, since a setting may be lost with them. Those that
    /// PyTorch's own schedulers keep there are always left out. Default: false.
    pub ignore_unknown: bool,
}

/// What is in such a file.
#[derive(Debug)]
pub(crate) struct TorchState {
    pub(crate) groups: Vec<TorchGroup>,
    pub(crate) vars: BTreeMap<String, PlainVar>,
}

/// Makes sure that a file can hold the counts of these parameters and these groups.
pub(crate) fn check<'n>(steps: impl IntoIterator<Item = (&'n str, u64)>, groups: &[TorchGroup]) -> Result<()> {
    for (name, step) in steps {
        if step > LARGEST_STEP {
            let expected = format!("at most {LARGEST_STEP}, which is as far as PyTorch counts in f32");
            return Err(Error::checkpoint(format!("{name}.step"), expected, step));
        }
    }
    let names = groups.iter().flat_map(|group| &group.params).map(String::as_str);
    HeaderLimits::of(names).check(PARAM_GROUPS, &to_json(groups)?)
}

fn to_json(groups: &[TorchGroup]) -> Result<String> {
    serde_json::to_string(groups).map_err(|error| Error::checkpoint(PARAM_GROUPS, "settings that JSON can hold", error))
}

/// Writes a state that has been [checked](check); averages and gradients that wait have no place in it.
pub(crate) fn write(state: &TorchState, file: AtomicFile) -> Result<()> {
    let steps = state.vars.iter().map(|(name, var)| Ok((format!("{name}.step"), of_scalar(var.step as f32)?)));
    let steps = steps.collect::<Result<Vec<_>>>()?;
    let moments = state
        .vars
        .iter()
        .flat_map(|(name, var)| [(format!("{name}.exp_avg"), &var.exp_avg), (format!("{name}.exp_inf"), &var.exp_inf)]);
    let tensors = moments.chain(steps.iter().map(|(key, step)| (key.clone(), step)));
    write_tensors(file, tensors, Some((PARAM_GROUPS, to_json(&state.groups)?)))
}

/// Reads the state of parameters of these names, which are in alphabetical order, and of no others. `check` sees it before
/// the moments are read, with [outlines](TensorFile::assemble) for them.
///
/// Errors do not name the file yet: what its state does not fit is found later.
pub(crate) fn read(
    path: &Path,
    names: &[&str],
    options: TorchOptions,
    check: impl FnOnce(&TorchState) -> Result<()>,
) -> Result<TorchState> {
    let limits = HeaderLimits::of(names.iter().copied());
    let file = TensorFile::open(path, Some(PARAM_GROUPS), Some(limits))?;
    let groups = parse_groups(file.text(), names, options)?;
    let assemble = |tensors: &mut Tensors<'_>| {
        let vars = names.iter().map(|&name| {
            let step_key = format!("{name}.step");
            let step = count(&step_key, &tensors.take(&step_key)?)?;
            let mut take = |what: &str| tensors.take(&format!("{name}.{what}"));
            let (exp_avg, exp_inf) = (take("exp_avg")?, take("exp_inf")?);
            Ok((name.to_owned(), PlainVar { exp_avg, exp_inf, step, ema: None, accumulated: None }))
        });
        Ok(TorchState { groups: groups.clone(), vars: vars.collect::<Result<_>>()? })
    };
    file.assemble(assemble, check)
}

/// The groups, which have each of the names once and no other.
fn parse_groups(json: Option<&str>, names: &[&str], options: TorchOptions) -> Result<Vec<TorchGroup>> {
    let Some(json) = json else {
        return Err(Error::checkpoint(PARAM_GROUPS, "the settings of torch.optim.Adamax, in the metadata", "none"));
    };
    let groups: Vec<TorchGroup> = serde_json::from_str(json)
        .map_err(|error| Error::checkpoint(PARAM_GROUPS, "the settings of torch.optim.Adamax", error))?;
    let mut others = groups.iter().flat_map(|group| group.others.keys()).map(String::as_str);
    if let Some(other) = others.find(|key| !options.ignore_unknown && !KNOWN_OTHERS.contains(key)) {
        let expected = "the settings of torch.optim.Adamax (`load_torch_with` and `ignore_unknown` leave out others)";
        return Err(Error::checkpoint(PARAM_GROUPS, expected, format!("unknown field {}", listed([other]))));
    }
    let mut theirs: Vec<&str> = groups.iter().flat_map(|group| &group.params).map(String::as_str).collect();
    theirs.sort_unstable();
    if let Some(twice) = theirs.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::checkpoint(PARAM_GROUPS, format!("`{}` in one group", twice[0]), "in two"));
    }
    let (expected, got) = match differences(names, &theirs) {
        (Some(surplus), _) => (format!("no parameter `{surplus}`"), "a surplus one"),
        (None, Some(missing)) => (format!("a group of `{missing}`"), "none"),
        (None, None) => return Ok(groups),
    };
    Err(Error::checkpoint(PARAM_GROUPS, expected, format!("{got}{}", hint(names, &theirs, "file"))))
}
