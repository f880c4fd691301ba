//! Where weights come from: the file of a Hugging Face directory, or random numbers of a seed.
//!
//! Invariant: every weight is a variable in the `VarMap`, under the name that `BertForSequenceClassification` has for
//! it. Layers get the variable itself where it is trained, and where it is not, a tensor on the same memory that no
//! graph knows of.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::PoisonError;

use anyhow::{Context, Result, bail, ensure};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use rand::{Rng, rngs::StdRng};

use super::layers::{Linear, Norm};

/// The file's name.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// What stands before the names of the encoder and the pooler.
const ENCODER: &str = "bert.";
/// Prefixes that wrappers put before all names of a model: PyTorch's `DataParallel` and `compile`, Lightning,
/// sentence-transformers.
const WRAPPERS: [&str; 5] = ["module.", "_orig_mod.", "model.", "0.", "auto_model."];

/// Which weights are trained, by name.
pub(crate) type IsTrained = fn(&str) -> bool;

/// Hands out weights by name.
pub(crate) struct Weights {
    /// What was read; `None` if all weights are fresh.
    file: Option<Source>,
    varmap: VarMap,
    dtype: DType,
    device: Device,
    rng: StdRng,
    deviation: f64,
    is_trained: IsTrained,
    /// The names of weights that the file did not have.
    pub(crate) fresh: Vec<String>,
}

/// A file of tensors. Only those that are asked for are made, since files have others of types that candle lacks.
struct Source {
    tensors: BufferedSafetensors,
    /// Tensors that nobody has taken: the names in the file by those without wrappers.
    names: HashMap<String, String>,
}

impl Source {
    fn read(model: &Path) -> Result<Self> {
        let path = model.join(WEIGHTS);
        let read = || -> Result<Self> {
            let tensors = BufferedSafetensors::new(fs::read(&path)?)?;
            let mut all: Vec<String> = tensors.tensors().into_iter().map(|(name, _)| name).collect();
            // Where a file has a name with and without a wrapper, the shorter one counts.
            all.sort_unstable_by_key(|name| std::cmp::Reverse(name.len()));
            let names = all.into_iter().map(|name| (unwrapped(&name).to_owned(), name)).collect();
            Ok(Self { tensors, names })
        };
        read().with_context(|| format!("cannot read the weights of the model, {}", path.display()))
    }

    /// Takes the weight `name` out, however the file spells it.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(spelling) = spellings(name).into_iter().find_map(|spelling| self.names.remove(&spelling)) else {
            return Ok(None);
        };
        let view = self.tensors.get(&spelling)?;
        let (got, dtype) = (view.shape(), view.dtype());
        ensure!(got == shape, "{name}: expected the shape {shape:?}, got {got:?}");
        let is_float = DType::try_from(dtype).is_ok_and(|dtype| dtype.is_float());
        ensure!(is_float, "{name}: expected floating point, got {dtype:?}");
        Ok(Some(self.tensors.load(&spelling, &Device::Cpu)?))
    }

    /// Some of the names that nobody has taken, as an error tells them.
    fn some_names(&self) -> String {
        let mut names: Vec<&str> = self.names.values().map(String::as_str).collect();
        names.sort_unstable();
        let more = if names.len() > 3 { ", .." } else { "" };
        names.truncate(3);
        if names.is_empty() { String::new() } else { format!("; others are `{}`{more}", names.join("`, `")) }
    }
}

/// What a fresh weight begins with.
#[derive(Clone, Copy)]
pub(crate) enum Fresh {
    /// Uniform random numbers of the standard deviation that the configuration says.
    Random,
    Zeros,
    Ones,
}

impl Weights {
    /// Fresh weights, but for those that `model` has, a folder.
    pub(crate) fn new(
        model: Option<&Path>,
        varmap: &VarMap,
        (dtype, device): (DType, &Device),
        (rng, deviation): (StdRng, f64),
        is_trained: IsTrained,
    ) -> Result<Self> {
        Ok(Self {
            file: model.map(Source::read).transpose()?,
            varmap: varmap.clone(),
            dtype,
            device: device.clone(),
            rng,
            deviation,
            is_trained,
            fresh: Vec::new(),
        })
    }

    /// Forgets a weight that the file has, so that it is fresh.
    pub(crate) fn forget(&mut self, name: &str) {
        if let Some(file) = &mut self.file {
            file.names.remove(name);
        }
    }

    /// The weight `name`. One of the encoder has to be in the file, if there is one; those on top of it need not.
    pub(crate) fn get(&mut self, name: &str, shape: &[usize], fresh: Fresh) -> Result<Tensor> {
        let found = match &mut self.file {
            None => None,
            Some(file) => file.take(name, shape)?,
        };
        let tensor = match found {
            Some(tensor) => tensor,
            None if self.file.is_some() && !super::is_on_top(name) => {
                let others = self.file.as_ref().map_or(String::new(), Source::some_names);
                bail!(
                    "{WEIGHTS} of the model: expected a tensor `{name}`, with or without `{ENCODER}`, got none{others}"
                )
            }
            None => {
                self.fresh.push(name.to_owned());
                match fresh {
                    Fresh::Random => self.random(shape)?,
                    Fresh::Zeros => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
                    Fresh::Ones => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
                }
            }
        };
        let tensor = tensor.to_dtype(self.dtype).with_context(|| name.to_owned())?;
        let var = Var::from_tensor(&tensor.to_device(&self.device)?)?;
        let weight = if (self.is_trained)(name) { var.as_tensor().clone() } else { var.as_tensor().detach() };
        self.varmap.data().lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), var);
        Ok(weight)
    }

    /// A linear layer.
    pub(super) fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &[outputs, inputs], Fresh::Random)?;
        Ok(Linear { weight, bias: self.get(&format!("{name}.bias"), &[outputs], Fresh::Zeros)? })
    }

    /// A layer normalization.
    pub(super) fn norm(&mut self, name: &str, size: usize, eps: f64) -> Result<Norm> {
        let weight = self.get(&format!("{name}.weight"), &[size], Fresh::Ones)?;
        Ok(Norm { weight, bias: self.get(&format!("{name}.bias"), &[size], Fresh::Zeros)?, eps })
    }

    fn random(&mut self, shape: &[usize]) -> Result<Tensor> {
        let bound = 3f64.sqrt() * self.deviation;
        let numbers = (0..shape.iter().product()).map(|_| (bound * self.rng.random_range(-1.0..1.0)) as f32);
        Ok(Tensor::from_iter(numbers, &Device::Cpu)?.reshape(shape)?)
    }
}

/// A name without what wrappers put before it.
fn unwrapped(name: &str) -> &str {
    WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)).map_or(name, unwrapped)
}

/// How files spell a name: models without a head leave `bert.` out, and the oldest files call the weights of layer
/// normalizations gamma and beta.
fn spellings(name: &str) -> Vec<String> {
    let old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
    let without = |name: &str| name.strip_prefix(ENCODER).unwrap_or(name).to_owned();
    vec![name.to_owned(), without(name), without(&old), old]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_wrappers() {
        let name = "bert.embeddings.LayerNorm.gamma";
        for wrapper in ["", "module.", "_orig_mod.module.", "model."] {
            assert_eq!(unwrapped(&format!("{wrapper}{name}")), name);
        }
        assert_eq!(unwrapped("0.auto_model.embeddings.LayerNorm.bias"), "embeddings.LayerNorm.bias");
        assert_eq!(unwrapped("module.classifier.bias"), "classifier.bias");
    }

    #[test]
    fn names_have_four_spellings() {
        assert_eq!(
            spellings("bert.embeddings.LayerNorm.bias"),
            [
                "bert.embeddings.LayerNorm.bias",
                "embeddings.LayerNorm.bias",
                "embeddings.LayerNorm.beta",
                "bert.embeddings.LayerNorm.beta"
            ]
        );
    }
}
