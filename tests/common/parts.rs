//! Safetensors files taken apart, edited and put together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result};
use candle_core::Tensor;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The dtype, the shape and the bytes of each tensor.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A safetensors file.
#[derive(Clone, Default)]
pub(crate) struct Parts {
    /// The texts of its metadata.
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: Tensors,
}

impl Parts {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let tensors = SafeTensors::deserialize(&bytes)?.tensors().into_iter();
        Ok(Self {
            metadata: header.metadata().iter().flatten().map(|(key, text)| (key.clone(), text.clone())).collect(),
            tensors: tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect(),
        })
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| Ok((name.clone(), TensorView::new(*dtype, shape.clone(), data)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata: HashMap<_, _> = self.metadata.clone().into_iter().collect();
        Ok(safetensors::serialize_to_file(views, (!metadata.is_empty()).then_some(metadata), path)?)
    }

    /// The text `key` of the metadata as JSON.
    pub(crate) fn json(&self, key: &str) -> Result<Value> {
        let text = self.metadata.get(key).with_context(|| format!("no `{key}` in the metadata"))?;
        Ok(serde_json::from_str(text)?)
    }

    /// Puts a text in place of all metadata.
    pub(crate) fn set_text(&mut self, key: &str, text: impl ToString) {
        self.metadata = BTreeMap::from([(key.to_owned(), text.to_string())]);
    }

    pub(crate) fn set(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let bytes = safetensors::serialize([("t", tensor)], None)?;
        let parts = SafeTensors::deserialize(&bytes)?;
        let view = parts.tensor("t")?;
        self.tensors.insert(name.into(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        Ok(())
    }
}

/// The bytes of a file with this header, and so many zeros after it.
pub(crate) fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}
