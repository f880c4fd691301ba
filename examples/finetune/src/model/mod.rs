//! The model: an encoder, what it makes of a text as a whole, and a linear classifier on top.
//!
//! ```text
//! Pooling::Cls     pooled = tanh(pooler(x[first token]))
//! Pooling::Mean    pooled = mean of x over the tokens
//! logits = classifier(dropout(pooled))                                  always in f32
//! ```

mod config;
mod encoder;
mod layers;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::PoisonError;

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_nn::VarMap;

pub(crate) use self::config::{Config, Pooling};
use self::encoder::Encoder;
use self::layers::Linear;
pub(crate) use self::layers::Pass;
pub(crate) use self::weights::{IsTrained, WEIGHTS, Weights};
use crate::batch::Batch;
use crate::files;

/// The name of the embeddings of words.
pub(crate) const WORDS: &str = "bert.embeddings.word_embeddings.weight";
const POOLER: &str = "bert.pooler";
const CLASSIFIER: &str = "classifier";

/// Whether a weight of this name belongs to the head, which stands on top of the encoder.
pub(crate) fn is_on_top(name: &str) -> bool {
    name.starts_with(POOLER) || name.starts_with(CLASSIFIER)
}

/// The model. Its weights are variables of a `VarMap`.
pub(crate) struct Classifier {
    encoder: Encoder,
    /// None where tokens are averaged.
    pooler: Option<Linear>,
    classifier: Linear,
    dropout: f64,
}

impl Classifier {
    /// A model that tells `labels` classes apart; its classifier is fresh unless `keep_classifier`.
    pub(crate) fn new(
        config: &Config,
        labels: usize,
        (sparse, keep_classifier): (bool, bool),
        weights: &mut Weights,
    ) -> Result<Self> {
        let size = config.hidden_size;
        if !keep_classifier {
            for part in ["weight", "bias"] {
                weights.forget(&format!("{CLASSIFIER}.{part}"));
            }
        }
        Ok(Self {
            encoder: Encoder::new(config, sparse, weights)?,
            pooler: match config.pooling() {
                Pooling::Cls => Some(weights.linear(&format!("{POOLER}.dense"), size, size)?),
                Pooling::Mean => None,
            },
            classifier: weights.linear(CLASSIFIER, size, labels)?,
            dropout: config.classifier_dropout.unwrap_or(config.hidden_dropout_prob),
        })
    }

    /// The logits of a batch, `[texts, labels]`, f32.
    pub(crate) fn forward(&self, batch: &Batch, mut pass: Pass<'_>) -> candle_core::Result<Tensor> {
        let x = self.encoder.forward(&batch.ids, &batch.mask, &mut pass)?;
        let pooled = match &self.pooler {
            Some(pooler) => pooler.forward(&x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?.tanh()?,
            None => mean(&x, &batch.mask)?,
        };
        self.classifier.forward(&pass.dropout(&pooled, self.dropout)?)?.to_dtype(DType::F32)
    }
}

/// The mean of the tokens of each text, computed in f32.
fn mean(x: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let shares = mask.broadcast_div(&mask.sum_keepdim(1)?)?.unsqueeze(1)?;
    shares.matmul(&x.to_dtype(DType::F32)?)?.squeeze(1)?.to_dtype(x.dtype())
}

/// Writes the weights as `transformers` reads them, into the folder `model`.
pub(crate) fn save_weights(varmap: &VarMap, model: &Path) -> Result<()> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let tensors: BTreeMap<&str, &Tensor> = vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor())).collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    files::write(&model.join(WEIGHTS), |path| Ok(safetensors::serialize_to_file(tensors, Some(metadata), path)?))
}
