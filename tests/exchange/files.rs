//! Files taken apart, edited and put together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// A safetensors file.
#[derive(Clone, Default)]
pub(crate) struct Parts {
    pub(crate) text: Option<(String, String)>,
    pub(crate) tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
        let text = metadata.metadata().as_ref().and_then(|map| map.iter().next());
        let tensors = SafeTensors::deserialize(&bytes)?.tensors().into_iter();
        Ok(Self {
            text: text.map(|(key, text)| (key.clone(), text.clone())),
            tensors: tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect(),
        })
    }

    /// PyTorch's state of one parameter in f32, all zeros, without settings.
    pub(crate) fn of_one(name: &str, shape: &[usize]) -> Result<Self> {
        let mut parts = Self::default();
        let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        parts.set(&format!("{name}.exp_avg"), &zeros)?;
        parts.set(&format!("{name}.exp_inf"), &zeros)?;
        parts.set(&format!("{name}.step"), &Tensor::new(3f32, &Device::Cpu)?)?;
        Ok(parts)
    }

    pub(crate) fn set(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let bytes = safetensors::serialize([("t", tensor)], None)?;
        let parts = SafeTensors::deserialize(&bytes)?;
        let view = parts.tensor("t")?;
        self.tensors.insert(name.into(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| Ok((name.clone(), TensorView::new(*dtype, shape.clone(), data)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = self.text.clone().map(|text| HashMap::from([text]));
        Ok(safetensors::serialize_to_file(views, metadata, path)?)
    }
}

/// The JSON text in a file's metadata.
pub(crate) fn metadata(path: &Path) -> Result<Value> {
    let (_, text) = Parts::read(path)?.text.context("no metadata")?;
    Ok(serde_json::from_str(&text)?)
}

/// One of PyTorch's groups, with its defaults.
pub(crate) fn group(params: &[&str]) -> Value {
    json!({
        "lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "maximize": false, "foreach": null,
        "capturable": false, "differentiable": false, "params": params,
    })
}

/// A file with this header, and so many bytes after it.
pub(crate) fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    bytes
}
