//! One golden file: its metadata and its tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::common::parts::Parts;

/// All that a case may say about itself, and which kinds say it.
const KEYS: [(&str, &[&str]); 4] = [
    ("", &["format", "name", "kind", "family", "framework", "versions", "seed", "description", "notes"] as &[&str]),
    ("", &["dtype", "steps", "tolerance", "verified", "expect_mismatch"]),
    (
        "optimizer",
        &[
            "learning_rate",
            "hyperparameters",
            "effective",
            "vars",
            "state_dict",
            "final_iterations",
            "optimizer_variables",
            "grad_dtype",
            "state_dtype",
            "jit",
            "variant",
            "e2e",
            "embedding_gradient_type",
        ],
    ),
    ("other", &["class_name", "config", "tf_keras_identical_f32", "parameters", "inputs", "hyperparameters"]),
];

/// The numbers of one tensor, widened to f64 without rounding.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Array {
    fn new(dtype: Dtype, shape: Vec<usize>, bytes: &[u8]) -> Result<Self> {
        fn all<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)).collect()
        }
        let values = match dtype {
            Dtype::F64 => all(bytes, f64::from_le_bytes),
            Dtype::F32 => all(bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => all(bytes, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => all(bytes, |b| bf16::from_le_bytes(b).to_f64()),
            Dtype::I64 => all(bytes, |b| i64::from_le_bytes(b) as f64),
            Dtype::I32 => all(bytes, |b| i32::from_le_bytes(b).into()),
            Dtype::U8 => all(bytes, |[b]| b.into()),
            other => bail!("tensors of dtype {other:?} are not understood"),
        };
        Ok(Self { dtype, shape, values })
    }

    /// The dtype, as candle calls it.
    pub(crate) fn dtype(&self) -> Result<DType> {
        Ok(DType::try_from(self.dtype)?)
    }

    /// Number `k` of the first axis.
    pub(crate) fn at(&self, k: usize) -> Result<&[f64]> {
        let steps = *self.shape.first().context("expected a first axis of steps")?;
        ensure!(k < steps, "expected more than {k} steps, got {steps}");
        let n = self.shape[1..].iter().product::<usize>();
        Ok(&self.values[k * n..(k + 1) * n])
    }

    /// Number `k` of the first axis as a tensor of this dtype.
    pub(crate) fn tensor_at(&self, k: usize) -> Result<Tensor> {
        Ok(crate::common::tensor(self.at(k)?, &self.shape[1..], self.dtype()?))
    }

    /// All of it as a tensor.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        Ok(crate::common::tensor(&self.values, &self.shape, self.dtype()?))
    }
}

/// A golden file.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) json: Value,
    pub(crate) tensors: BTreeMap<String, Array>,
}

impl Case {
    /// Reads a file; none if its metadata holds no case.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        let parts = Parts::read(path)?;
        if !parts.metadata.contains_key("case") {
            return Ok(None);
        }
        let json = parts.json("case").context("the metadata `case`")?;
        let tensors = parts.tensors.into_iter().map(|(name, (dtype, shape, bytes))| {
            let array = Array::new(dtype, shape, &bytes).with_context(|| format!("tensor `{name}`"))?;
            Ok((name, array))
        });
        Ok(Some(Self { json, tensors: tensors.collect::<Result<_>>()? }))
    }

    /// Fails on an entry that no part of this runner knows.
    pub(crate) fn check_keys(&self) -> Result<()> {
        let format = self.get("format")?;
        ensure!(*format == 1, "unknown format {format}");
        let optimizer = self.json.get("vars").is_some();
        let of_kind = |(who, _): &&(&str, _)| who.is_empty() || (*who == "optimizer") == optimizer;
        let known: Vec<&str> = KEYS.iter().filter(of_kind).flat_map(|(_, keys)| keys.iter().copied()).collect();
        let unknown = self.map()?.keys().find(|key| !known.contains(&key.as_str()));
        ensure!(unknown.is_none(), "unknown entry `{}`", unknown.map_or("", String::as_str));
        Ok(())
    }

    fn map(&self) -> Result<&Map<String, Value>> {
        self.json.as_object().context("the case is no JSON object")
    }

    /// An entry that has to be there.
    pub(crate) fn get(&self, key: &str) -> Result<&Value> {
        self.json.get(key).with_context(|| format!("no entry `{key}`"))
    }

    /// An entry that is an object; an empty one if it is missing.
    pub(crate) fn object(&self, key: &str) -> Result<Map<String, Value>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map.clone()),
            Some(other) => bail!("expected an object as `{key}`, got {other}"),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        self.get(key)?.as_str().with_context(|| format!("expected a text as `{key}`"))
    }

    pub(crate) fn kind(&self) -> Result<&str> {
        self.text("kind")
    }

    pub(crate) fn family(&self) -> Result<&str> {
        self.text("family")
    }

    pub(crate) fn dtype(&self) -> Result<DType> {
        Ok(match self.text("dtype")? {
            "float64" => DType::F64,
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            other => bail!("unknown dtype `{other}`"),
        })
    }

    pub(crate) fn steps(&self) -> Result<usize> {
        Ok(self.get("steps")?.as_u64().context("expected a number as `steps`")? as usize)
    }

    pub(crate) fn notes(&self) -> impl Iterator<Item = &str> {
        self.json.get("notes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }

    /// A number of the advice on tolerance, none if there is no advice.
    pub(crate) fn tolerance(&self, metric: &str, what: &str) -> Result<Option<f64>> {
        let of = self.get("tolerance")?.get(metric);
        match of.and_then(|of| if what.is_empty() { Some(of) } else { of.get(what) }) {
            None => Ok(None),
            Some(value) => super::number(value),
        }
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<&Array> {
        self.tensors.get(name).with_context(|| format!("no tensor `{name}`"))
    }
}

/// All `.safetensors` files of a folder and its subfolders, in order.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(self::files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
