//! The recorded runs, and the same model in candle.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_adamax::Adamax;
use candle_core::{DType, Device, Tensor, Var};

use crate::common;

/// By how much a run that moved may differ from one that did not.
pub(crate) const TOLERANCE: f64 = 1e-6;

/// A file of a recorded case.
pub(crate) fn recorded(name: &str) -> PathBuf {
    common::recorded("exchange").join(name)
}

/// Where files for the other side are left.
pub(crate) fn left(name: &str) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exchange");
    std::fs::create_dir_all(&folder)?;
    Ok(folder.join(name))
}

pub(crate) fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}

/// What was recorded of a run: 100 calls of it.
pub(crate) struct Run {
    case: &'static str,
    tensors: HashMap<String, Tensor>,
    /// The last bias has no gradient in so many calls.
    frozen: u64,
}

impl Run {
    pub(crate) fn read(case: &'static str, frozen: u64) -> Result<Self> {
        Ok(Self { case, tensors: load(&recorded(&format!("{case}_run.safetensors")))?, frozen })
    }

    /// The state after 50 calls.
    pub(crate) fn state(&self) -> PathBuf {
        recorded(&format!("{}.safetensors", self.case))
    }

    /// The model with the weights of the beginning (`init`) or after 50 calls (`at_50`).
    pub(crate) fn model(&self, at: &str) -> Result<Model> {
        let of = |name: &String| name.strip_prefix(at)?.strip_prefix('.').map(str::to_owned);
        let vars = self.tensors.iter().filter_map(|(key, tensor)| Some((of(key)?, tensor)));
        let vars = vars.map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor.copy()?)?)));
        Ok(Model(vars.collect::<Result<_>>()?))
    }

    /// Calls `calls` of the run with this optimizer, counted from 0.
    pub(crate) fn go(&self, model: &Model, optimizer: &mut Adamax, calls: std::ops::Range<u64>) -> Result<()> {
        for call in calls {
            let grads = model.loss(&self.tensors["x"], &self.tensors["y"])?.backward()?;
            let is_frozen = |name: &str| call < self.frozen && name == "fc2.bias";
            let pairs = model.0.iter().filter(|(name, _)| !is_frozen(name));
            let pairs = pairs.map(|(name, var)| Ok((var, grads.get(var).with_context(|| name.clone())?)));
            optimizer.apply_gradients(pairs.collect::<Result<Vec<_>>>()?)?;
        }
        Ok(())
    }

    /// Calls 51 to 100, each compared with what was recorded; gives the largest difference.
    pub(crate) fn compare_the_rest(&self, model: &Model, optimizer: &mut Adamax) -> Result<f64> {
        let (mut largest, mut moved) = (0f64, 0f64);
        for call in 50..100 {
            self.go(model, optimizer, call..call + 1)?;
            for (name, var) in &model.0 {
                let expected = self.tensors[&format!("after.{name}")].get(call as usize - 50)?;
                largest = largest.max(difference(var, &expected)?);
                moved = moved.max(difference(var, &self.tensors[&format!("at_50.{name}")])?);
            }
        }
        // A run that stands still is no evidence.
        ensure!(moved > 0.05, "{}: the weights moved by {moved:e} only", self.case);
        println!("{}: calls 51 to 100 differ by up to {largest:.2e}, weights moved by up to {moved:.2e}", self.case);
        Ok(largest)
    }
}

/// `y = tanh(x W1 + b1) W2 + b2`. A `weight` is the transpose of a `kernel`.
pub(crate) struct Model(pub(crate) BTreeMap<String, Var>);

impl Model {
    pub(crate) fn vars(&self) -> Vec<(String, Var)> {
        self.0.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    fn layer(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let of = |what: &str| self.0.iter().find(|(key, _)| key.contains(name) && key.ends_with(what));
        let bias = of("bias").context("no bias")?.1;
        let product = match (of("weight"), of("kernel")) {
            (Some((_, weight)), _) => x.matmul(&weight.t()?)?,
            (_, Some((_, kernel))) => x.matmul(kernel)?,
            _ => anyhow::bail!("no weight in {name}"),
        };
        Ok(product.broadcast_add(bias)?)
    }

    fn loss(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let output = self.layer("fc2", &self.layer("fc1", x)?.tanh()?)?;
        Ok(output.sub(y)?.sqr()?.mean_all()?)
    }

    /// Leaves the weights for the other side.
    pub(crate) fn leave(&self, name: &str) -> Result<()> {
        let tensors: HashMap<_, _> = self.0.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok(candle_core::safetensors::save(&tensors, left(name)?)?)
    }
}

/// The largest difference between two tensors of the same shape.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    ensure!(a.dims() == b.dims(), "{:?} and {:?}", a.dims(), b.dims());
    let (a, b) = (a.to_dtype(DType::F64)?.flatten_all()?, b.to_dtype(DType::F64)?.flatten_all()?);
    let differences = a.to_vec1::<f64>()?.into_iter().zip(b.to_vec1::<f64>()?).map(|(a, b)| (a - b).abs());
    Ok(differences.fold(0.0, |largest: f64, x| if x > largest || x.is_nan() { x } else { largest }))
}

/// Whether two files have the same tensors: names, and values up to `tolerance`.
#[track_caller]
pub(crate) fn assert_same_tensors(got: &Path, expected: &Path, tolerance: f64) -> Result<()> {
    let (got, expected) = (load(got)?, load(expected)?);
    let names = |tensors: &HashMap<String, Tensor>| {
        let mut names: Vec<_> = tensors.keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(&got), names(&expected));
    for (name, tensor) in &got {
        let difference = difference(tensor, &expected[name])?;
        assert!(difference <= tolerance, "{name}: {difference:e}");
    }
    Ok(())
}
