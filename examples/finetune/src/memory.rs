//! What training keeps in memory, beside the activations.

use std::collections::HashMap;
use std::sync::PoisonError;

use anyhow::Result;
use candle_adamax::Adamax;
use candle_nn::VarMap;

use crate::model::{WORDS, is_on_top};

/// The memory of a part of the model, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Memory {
    /// How many numbers it has.
    pub(crate) numbers: usize,
    pub(crate) weights: usize,
    /// Those of one batch.
    pub(crate) gradients: usize,
    /// The optimizer's moments, and the masters if there are any.
    pub(crate) moments: usize,
}

impl std::ops::AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        self.numbers += other.numbers;
        self.weights += other.weights;
        self.gradients += other.gradients;
        self.moments += other.moments;
    }
}

/// The parts, from the text up.
pub(crate) const PARTS: [&str; 4] = ["embeddings of words", "other embeddings", "layers", "head"];

/// What each of the [`PARTS`] takes, and all of them.
pub(crate) fn measure(
    varmap: &VarMap,
    optimizer: &Adamax,
    gradient_bytes: &HashMap<String, usize>,
) -> Result<([Memory; 4], Memory)> {
    let (mut parts, mut total) = ([Memory::default(); 4], Memory::default());
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let trained: Vec<&str> = optimizer.names().collect();
    for (name, var) in vars.iter() {
        let is_trained = trained.binary_search(&name.as_str()).is_ok();
        let memory = Memory {
            numbers: var.elem_count(),
            weights: var.elem_count() * var.dtype().size_in_bytes(),
            gradients: gradient_bytes.get(name).copied().unwrap_or(0),
            moments: if is_trained { optimizer.state_bytes(name)? } else { 0 },
        };
        let part = match name.as_str() {
            WORDS => 0,
            name if name.starts_with("bert.embeddings.") => 1,
            name if is_on_top(name) => 3,
            _ => 2,
        };
        parts[part] += memory;
        total += memory;
    }
    Ok((parts, total))
}
