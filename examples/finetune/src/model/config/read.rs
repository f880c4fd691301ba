//! The fields of `config.json`, as `transformers` reads them.
//!
//! A field that is not there, or is null, has the default of its `BertConfig`. Fields that nobody needs here may be of
//! any type. An error names the field.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Config;

impl TryFrom<Map<String, Value>> for Config {
    type Error = String;

    fn try_from(fields: Map<String, Value>) -> Result<Self, String> {
        read(Fields(fields)).map_err(|error| format!("{error:#}"))
    }
}

fn read(mut fields: Fields) -> Result<Config> {
    Ok(Config {
        model_type: fields.any("model_type", "bert".into())?,
        vocab_size: fields.size("vocab_size", 30_522)?,
        hidden_size: fields.size("hidden_size", 768)?,
        num_hidden_layers: fields.size("num_hidden_layers", 12)?,
        num_attention_heads: fields.size("num_attention_heads", 12)?,
        intermediate_size: fields.size("intermediate_size", 3072)?,
        hidden_act: fields.any("hidden_act", Default::default())?,
        hidden_dropout_prob: fields.any("hidden_dropout_prob", 0.1)?,
        attention_probs_dropout_prob: fields.any("attention_probs_dropout_prob", 0.1)?,
        classifier_dropout: fields.any("classifier_dropout", None)?,
        max_position_embeddings: fields.size("max_position_embeddings", 512)?,
        type_vocab_size: fields.size("type_vocab_size", 2)?,
        initializer_range: fields.any("initializer_range", 0.02)?,
        layer_norm_eps: fields.any("layer_norm_eps", 1e-12)?,
        // The one field whose null is not its default: a model without a token that fills up.
        pad_token_id: fields.padding()?,
        position_embedding_type: fields.any("position_embedding_type", "absolute".into())?,
        classifier_pooling: fields.any("classifier_pooling", None)?,
        id2label: fields.map("id2label", |label| Some(label.as_str().map_or_else(|| label.to_string(), str::to_owned))),
        label2id: fields.map("label2id", |id| id.as_u64()?.try_into().ok()),
        other: fields.0,
    })
}

/// The fields that have not been read yet.
struct Fields(Map<String, Value>);

impl Fields {
    /// A field; `default` where it is not there.
    fn any<T: DeserializeOwned>(&mut self, name: &str, default: T) -> Result<T> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value(value).with_context(|| name.to_owned()),
        }
    }

    /// A whole number, which may be written `768.0`.
    fn size(&mut self, name: &str, default: usize) -> Result<usize> {
        let value: Value = self.any(name, default.into())?;
        let float = || value.as_f64().filter(|size| size.fract() == 0.0 && (0.0..2f64.powi(53)).contains(size));
        match value.as_u64().or_else(|| float().map(|size| size as u64)) {
            Some(size) => Ok(size as usize),
            None => bail!("{name}: expected a whole number, got {value}"),
        }
    }

    /// The token that fills up, which may be written `0.0`.
    fn padding(&mut self) -> Result<Option<i64>> {
        let value = match self.0.remove("pad_token_id") {
            None => return Ok(Some(0)),
            Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let float = || value.as_f64().filter(|token| token.fract() == 0.0 && token.abs() < 2f64.powi(53));
        match value.as_i64().or_else(|| float().map(|token| token as i64)) {
            Some(token) => Ok(Some(token)),
            None => bail!("pad_token_id: expected a whole number or null, got {value}"),
        }
    }

    /// A map; what has another type, or is null, is left out.
    fn map<T>(&mut self, name: &str, read: impl Fn(Value) -> Option<T>) -> BTreeMap<String, T> {
        let Some(Value::Object(map)) = self.0.remove(name) else { return BTreeMap::new() };
        map.into_iter().filter_map(|(key, value)| Some((key, read(value)?))).collect()
    }
}
