//! The recorded end-to-end models, built anew: what is compared is the loss and what training makes of the variables.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use candle_adamax::{Adamax, Embedding, TouchedRows};
use candle_core::{DType, Tensor, Var};
use candle_nn::{Module, loss};

use super::Case;
use super::compare::check;
use crate::common::values;

/// One model, with one kind of layer for its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    shape: Shape,
    layer: Layer,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    /// One lookup of the table.
    Single,
    /// Two.
    Shared,
    /// One, and the table is the matrix of the output, too.
    Tied,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layer {
    /// The crate's `Embedding`, with `step`.
    OfRows,
    /// `candle_nn`'s, whose gradients are dense, with `step_rows`.
    Dense,
}

/// Whether a tensor of this name is an input or a result of a model.
pub(crate) fn uses(case: &Case, tensor: &str) -> bool {
    case.json.get("variant").is_some() && ["ids", "target", "labels", "loss"].contains(&tensor)
}

impl Model {
    /// The ways to build the model of a case; none if it has no model.
    pub(crate) fn all(case: &Case) -> Result<Vec<Self>> {
        let is_model = case.kind()? == "tf_legacy_e2e";
        ensure!(is_model == case.json.get("variant").is_some(), "a model without its `variant`, or the reverse");
        if !is_model {
            return Ok(Vec::new());
        }
        let shape = match case.text("variant")? {
            "single" => Shape::Single,
            "shared" => Shape::Shared,
            "tied" => Shape::Tied,
            other => bail!("unknown model `{other}`"),
        };
        Ok([Layer::OfRows, Layer::Dense].map(|layer| Self { shape, layer }).to_vec())
    }

    /// Call `k`: forward, backward and a step of the optimizer. Compares the loss, too.
    pub(crate) fn call(
        self,
        case: &Case,
        optimizer: &mut Adamax,
        vars: &BTreeMap<String, Var>,
        k: usize,
    ) -> Result<()> {
        let var = |name: &str| vars.get(name).with_context(|| format!("a model without `{name}`"));
        let (table, ids) = (var("emb")?, case.tensor("ids")?.tensor_at(k)?);
        let weight = table.as_tensor().clone();
        let layer: Box<dyn Module> = match self.layer {
            Layer::OfRows => Box::new(Embedding::new(weight)?),
            Layer::Dense => Box::new(candle_nn::Embedding::new(weight, table.dim(1)?)),
        };
        let mut hidden = layer.forward(&ids)?.mean(1)?;
        if self.shape == Shape::Shared {
            hidden = (hidden + layer.forward(&ids.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?)?;
        }
        let hidden = hidden.matmul(var("kernel")?)?.broadcast_add(var("bias")?)?.tanh()?;
        let loss = match self.shape {
            Shape::Tied => loss::cross_entropy(&hidden.matmul(&table.t()?)?, &case.tensor("labels")?.tensor_at(k)?)?,
            _ => loss::mse(&hidden, &case.tensor("target")?.tensor_at(k)?)?,
        };
        check_loss(case, &loss, k)?;
        let grads = loss.backward()?;
        if self.layer == Layer::OfRows {
            let dense = grads.get(table).is_some();
            ensure!(dense == (self.shape == Shape::Tied), "a dense gradient of the table: {dense}");
        }
        if self.layer == Layer::Dense && self.shape != Shape::Tied {
            return Ok(optimizer.step_rows(&grads, [(table, TouchedRows::Ids(&ids))]).map(drop)?);
        }
        Ok(optimizer.step(&grads).map(drop)?)
    }
}

/// A loss is recorded without a tolerance: it is a number of the parameters, so theirs holds.
fn check_loss(case: &Case, loss: &Tensor, k: usize) -> Result<()> {
    let recorded = &case.tensor("loss")?.values;
    let expected = *recorded.get(k).context("too few losses")?;
    let largest = recorded[..=k].iter().fold(0.0, |largest: f64, loss| largest.max(loss.abs()));
    let rtol = case.tolerance("rtol", "param")?.context("no tolerance for `param`")?;
    let atol = case.tolerance("atol", "")?.context("no `atol`")?;
    ensure!(loss.dtype() == case.dtype()? && loss.dtype() != DType::BF16, "a loss of another dtype");
    check(&format!("loss of call {k}"), &values(loss), &[expected], |_| rtol * largest + atol)
}
