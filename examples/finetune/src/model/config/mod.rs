//! What an encoder is made of: `config.json` of a Hugging Face directory.

mod read;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files;

/// The file's name.
pub(crate) const CONFIG: &str = "config.json";

/// The settings of a BERT encoder, by the names that `transformers` gives them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub(crate) struct Config {
    pub(crate) model_type: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) hidden_act: Activation,
    pub(crate) hidden_dropout_prob: f64,
    pub(crate) attention_probs_dropout_prob: f64,
    /// Dropout before the classifier; `None` for that of the encoder.
    pub(crate) classifier_dropout: Option<f64>,
    pub(crate) max_position_embeddings: usize,
    pub(crate) type_vocab_size: usize,
    /// The standard deviation of fresh weights.
    pub(crate) initializer_range: f64,
    pub(crate) layer_norm_eps: f64,
    /// A negative one counts from the end, and some models have none.
    pub(crate) pad_token_id: Option<i64>,
    pub(crate) position_embedding_type: String,
    /// What the classifier sees of a text; `ModernBERT`'s name for it. BERT itself has [`Pooling::Cls`] only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) classifier_pooling: Option<Pooling>,
    /// The classes, by their numbers as text.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) id2label: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) label2id: BTreeMap<String, u32>,
    /// What else the file has, which is kept.
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

/// The function between the two layers of a feed-forward block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum Activation {
    /// `x * Phi(x)`, with the exact error function.
    #[default]
    #[serde(rename = "gelu", alias = "gelu_python")]
    Gelu,
    /// The same by a hyperbolic tangent.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluTanh,
    #[serde(rename = "relu")]
    Relu,
}

/// What the classifier sees of a text.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pooling {
    /// The first token, through a layer with a hyperbolic tangent (the pooler): BERT's.
    Cls,
    /// The mean of all tokens: that of sentence models.
    Mean,
}

impl Config {
    /// A small encoder for fresh weights.
    pub(crate) fn small(vocab_size: usize, pad_token_id: u32) -> Self {
        Self {
            model_type: "bert".into(),
            vocab_size,
            hidden_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            intermediate_size: 512,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            max_position_embeddings: 128,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            pad_token_id: Some(pad_token_id.into()),
            position_embedding_type: "absolute".into(),
            classifier_pooling: Some(Pooling::Mean),
            id2label: BTreeMap::new(),
            label2id: BTreeMap::new(),
            other: Map::new(),
        }
    }

    /// Reads `config.json` of the folder `model`. Where it does not say what the classifier sees, the file of a
    /// sentence model beside it may.
    pub(crate) fn read(model: &Path) -> Result<Self> {
        let path = model.join(CONFIG);
        let mut config: Self = read_json(&path)?;
        config.check().with_context(|| path.display().to_string())?;
        let sentence = model.join("1_Pooling").join(CONFIG);
        if config.classifier_pooling.is_none() && sentence.exists() {
            let pooling: Value = read_json(&sentence)?;
            let is_mean = pooling.get("pooling_mode_mean_tokens") == Some(&Value::Bool(true));
            config.classifier_pooling = is_mean.then_some(Pooling::Mean);
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let Self { model_type, position_embedding_type, hidden_size, num_attention_heads: heads, .. } = self;
        ensure!(model_type == "bert", "model_type: expected \"bert\", got {model_type:?}");
        ensure!(
            position_embedding_type == "absolute",
            "position_embedding_type: expected \"absolute\", got {position_embedding_type:?}"
        );
        ensure!(
            *heads > 0 && hidden_size.is_multiple_of(*heads),
            "num_attention_heads: expected a divisor of hidden_size, {hidden_size}, got {heads}"
        );
        let is_decoder = self.other.get("is_decoder") == Some(&Value::Bool(true));
        ensure!(!is_decoder, "is_decoder: expected false, since this encoder sees all of a text, got true");
        for (name, p) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.classifier_dropout.unwrap_or(0.0)),
        ] {
            ensure!((0.0..1.0).contains(&p), "{name}: expected a number in [0, 1), got {p}");
        }
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", *hidden_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ] {
            ensure!(size > 0, "{name}: expected at least 1, got 0");
        }
        let (words, padding) = (self.vocab_size as i64, self.pad_token_id.unwrap_or(0));
        ensure!(
            (-words..words).contains(&padding),
            "pad_token_id: expected a token below vocab_size, {words}, got {padding}"
        );
        Ok(())
    }

    /// The token that fills up short texts. It may be any, since it is not looked at.
    pub(crate) fn padding(&self) -> u32 {
        let padding = self.pad_token_id.unwrap_or(0);
        (if padding < 0 { padding + self.vocab_size as i64 } else { padding }) as u32
    }

    /// What the classifier sees of a text.
    pub(crate) fn pooling(&self) -> Pooling {
        self.classifier_pooling.unwrap_or(Pooling::Cls)
    }

    /// Says which classes there are, in the order of their numbers.
    pub(crate) fn set_labels(&mut self, labels: &[String]) {
        self.id2label = labels.iter().enumerate().map(|(id, label)| (id.to_string(), label.clone())).collect();
        self.label2id = (0..).zip(labels).map(|(id, label)| (label.clone(), id)).collect();
        self.other.insert("architectures".into(), vec![Value::from("BertForSequenceClassification")].into());
        self.other.remove("num_labels"); // that of the classes is what counts
        if let Some(problem) = self.other.get_mut("problem_type") {
            *problem = "single_label_classification".into();
        }
    }

    /// Whether the model tells exactly these classes apart, in this order.
    pub(crate) fn has_labels(&self, labels: &[String]) -> bool {
        self.id2label.len() == labels.len()
            && labels.iter().enumerate().all(|(id, label)| self.id2label.get(&id.to_string()) == Some(label))
    }

    /// Writes the file into the folder `model`, for weights of this dtype.
    ///
    /// The dtype stands in one field, that of the file that was read: `transformers` called it `torch_dtype` up to 4.55
    /// and calls it `dtype` since. It still reads the older name, so files that had neither get that one.
    pub(crate) fn save(&self, model: &Path, dtype: &str) -> Result<()> {
        let mut config = self.clone();
        let field = if config.other.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.other.remove("torch_dtype");
        config.other.insert(field.into(), dtype.into());
        config.other.remove("quantization_config"); // the weights are plain numbers
        let json = serde_json::to_string_pretty(&config)? + "\n";
        files::write(&model.join(CONFIG), |path| Ok(fs::write(path, json)?))
    }
}

/// Reads a file of JSON, with or without a byte order mark; the error names it.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let read = || -> Result<T> {
        let json = fs::read(path)?;
        Ok(serde_json::from_slice(json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&json))?)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}
