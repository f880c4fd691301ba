//! Files of PyTorch's state.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::common::parts::Parts;

/// The key of PyTorch's settings in a file's metadata.
pub(crate) const GROUPS: &str = "param_groups";

/// The state of one parameter in f32, all zeros, without settings.
pub(crate) fn of_one(name: &str, shape: &[usize]) -> Result<Parts> {
    let mut parts = Parts::default();
    let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
    parts.set(&format!("{name}.exp_avg"), &zeros)?;
    parts.set(&format!("{name}.exp_inf"), &zeros)?;
    parts.set(&format!("{name}.step"), &Tensor::new(3f32, &Device::Cpu)?)?;
    Ok(parts)
}

/// The settings in a file.
pub(crate) fn groups(path: &Path) -> Result<Value> {
    Parts::read(path)?.json(GROUPS)
}

/// The settings of one group, PyTorch's defaults.
pub(crate) fn group(params: &[&str]) -> Value {
    json!({
        "lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "maximize": false, "foreach": null,
        "capturable": false, "differentiable": false, "params": params,
    })
}
