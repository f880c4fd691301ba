//! What an encoder is made of: `config.json` of a Hugging Face directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The file's name.
pub(crate) const CONFIG: &str = "config.json";

/// The settings of a BERT encoder, by the names that `transformers` gives them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Config {
    #[serde(default = "bert")]
    pub(crate) model_type: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) intermediate_size: usize,
    #[serde(default)]
    pub(crate) hidden_act: Activation,
    #[serde(default = "tenth")]
    pub(crate) hidden_dropout_prob: f64,
    #[serde(default = "tenth")]
    pub(crate) attention_probs_dropout_prob: f64,
    pub(crate) max_position_embeddings: usize,
    pub(crate) type_vocab_size: usize,
    /// The standard deviation of fresh weights.
    #[serde(default = "deviation")]
    pub(crate) initializer_range: f64,
    #[serde(default = "eps")]
    pub(crate) layer_norm_eps: f64,
    #[serde(default)]
    pub(crate) pad_token_id: u32,
    #[serde(default = "absolute")]
    pub(crate) position_embedding_type: String,
    /// What the classifier sees of a text; `ModernBERT`'s name for it. BERT itself has [`Pooling::Cls`] only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) classifier_pooling: Option<Pooling>,
    /// The classes, by their numbers as text.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) id2label: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
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
    #[serde(rename = "gelu")]
    Gelu,
    /// The same by a hyperbolic tangent.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
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
            model_type: bert(),
            vocab_size,
            hidden_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            intermediate_size: 512,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: tenth(),
            attention_probs_dropout_prob: tenth(),
            max_position_embeddings: 128,
            type_vocab_size: 2,
            initializer_range: deviation(),
            layer_norm_eps: eps(),
            pad_token_id,
            position_embedding_type: absolute(),
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
            let is_mean = pooling["pooling_mode_mean_tokens"] == Value::Bool(true);
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
        for (name, p) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
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
        Ok(())
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
    }

    /// Whether the model tells exactly these classes apart, in this order.
    pub(crate) fn has_labels(&self, labels: &[String]) -> bool {
        self.id2label.len() == labels.len()
            && labels.iter().enumerate().all(|(id, label)| self.id2label.get(&id.to_string()) == Some(label))
    }

    /// Writes the file into the folder `model`, for weights of this dtype.
    pub(crate) fn save(&self, model: &Path, dtype: &str) -> Result<()> {
        let mut config = self.clone();
        config.other.insert("torch_dtype".into(), dtype.into());
        let path = model.join(CONFIG);
        fs::write(&path, serde_json::to_string_pretty(&config)? + "\n").with_context(|| path.display().to_string())
    }
}

/// Reads a file of JSON; the error names it.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let read = || -> Result<T> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn bert() -> String {
    "bert".into()
}

fn absolute() -> String {
    "absolute".into()
}

fn tenth() -> f64 {
    0.1
}

fn deviation() -> f64 {
    0.02
}

fn eps() -> f64 {
    1e-12
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn complete() -> Value {
        json!({
            "architectures": ["BertModel"], "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 7, "type_vocab_size": 2,
            "hidden_act": "gelu_new", "transformers_version": "4.8.2"
        })
    }

    #[test]
    fn what_is_not_understood_is_an_error_that_names_it() -> Result<()> {
        let refused = |field: &str, value: Value| -> Result<String> {
            let mut config = complete();
            config[field] = value;
            let config: Config = serde_json::from_value(config)?;
            Ok(config.check().expect_err("refused").to_string())
        };
        assert_eq!(refused("model_type", json!("roberta"))?, r#"model_type: expected "bert", got "roberta""#);
        assert!(refused("position_embedding_type", json!("relative_key"))?.contains("relative_key"));
        let heads = "num_attention_heads: expected a divisor of hidden_size, 8, got";
        assert_eq!(refused("num_attention_heads", json!(3))?, format!("{heads} 3"));
        assert_eq!(refused("num_attention_heads", json!(0))?, format!("{heads} 0"));
        assert_eq!(
            refused("hidden_dropout_prob", json!(1.0))?,
            "hidden_dropout_prob: expected a number in [0, 1), got 1"
        );
        assert_eq!(refused("vocab_size", json!(0))?, "vocab_size: expected at least 1, got 0");

        let mut config = complete();
        config["hidden_act"] = json!("swish");
        let error = serde_json::from_value::<Config>(config).expect_err("refused").to_string();
        assert!(error.contains("swish") && error.contains("gelu_new"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_not_said_is_the_default_of_transformers_and_what_is_not_known_is_kept() -> Result<()> {
        let config: Config = serde_json::from_value(complete())?;
        config.check()?;
        assert_eq!((config.hidden_act, config.layer_norm_eps), (Activation::GeluTanh, 1e-12));
        assert_eq!((config.hidden_dropout_prob, config.pad_token_id), (0.1, 0));
        assert_eq!(serde_json::to_value(&config)?["transformers_version"], "4.8.2");
        Ok(())
    }

    #[test]
    fn classes_have_an_order() -> Result<()> {
        let labels: Vec<String> = (0..12).map(|i| format!("class {i}")).collect();
        let mut config: Config = serde_json::from_value(complete())?;
        assert!(!config.has_labels(&labels));
        config.set_labels(&labels);
        assert!(config.has_labels(&labels) && !config.has_labels(&labels[..11]));
        let saved: Config = serde_json::from_value(serde_json::to_value(&config)?)?;
        assert!(saved.has_labels(&labels));
        let swapped: Vec<String> = labels.iter().rev().cloned().collect();
        assert!(!saved.has_labels(&swapped));
        assert_eq!(serde_json::to_value(&config)?["id2label"]["10"], "class 10");
        Ok(())
    }
}
