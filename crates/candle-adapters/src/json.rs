//! Reading `adapter_config.json`.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::config::{InitLora, LoraConfig, Modules};
use crate::error::{Error, Result};

/// The settings in a text, which are not checked yet.
pub(crate) fn read(text: &str) -> Result<LoraConfig> {
    let invalid = |error: serde_json::Error| Error::Config {
        field: "adapter_config.json".into(),
        expected: "an object of JSON".into(),
        got: error.to_string(),
    };
    let Entries(entries) = serde_json::from_str(text).map_err(invalid)?;
    Raw(entries).into_config()
}

/// A mapping in the order of the file.
struct Entries<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visit<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Visit<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Visit(PhantomData))
    }
}

/// A value of the file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Node {
    /// Of patterns, the first that matches counts.
    Object(Entries<Value>),
    Other(Value),
}

impl Node {
    fn to_json(&self) -> Value {
        match self {
            Self::Object(Entries(entries)) => entries.iter().cloned().collect::<Map<_, _>>().into(),
            Self::Other(value) => value.clone(),
        }
    }

    /// Whether it is what a key has that is not used.
    fn is_off(&self) -> bool {
        match self {
            Self::Object(Entries(entries)) => entries.is_empty(),
            Self::Other(Value::Null | Value::Bool(false)) => true,
            Self::Other(Value::String(text)) => text.is_empty(),
            Self::Other(Value::Array(values)) => values.is_empty(),
            Self::Other(_) => false,
        }
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn whole_number(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| number.try_into().ok())
}

/// All values of a list.
fn list<T>(value: &Value, item: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(item).collect()
}

/// One value or several.
fn one_or_more<T>(value: &Value, item: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    list(value, &item).or_else(|| item(value).map(|value| vec![value]))
}

fn modules(value: &Value) -> Option<Modules> {
    list(value, text).map(Modules::Names).or_else(|| text(value).map(Modules::Pattern))
}

/// Keys without influence on the numbers of an adapter that is loaded. Those of initializations matter only together
/// with a value of `init_lora_weights` that is refused.
const IGNORED: [&str; 10] = [
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
];

/// What is in the file and has not been taken.
struct Raw(Vec<(String, Node)>);

impl Raw {
    fn take_node(&mut self, key: &str) -> Option<Node> {
        let index = self.0.iter().rposition(|(name, _)| name == key)?;
        let (_, node) = self.0.remove(index);
        // Of several, Python takes the last.
        self.0.retain(|(name, _)| name != key);
        Some(node)
    }

    /// The value of a key; nothing where it is null or not there.
    fn take<T>(&mut self, key: &str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.take_node(key).map(|node| node.to_json()) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(&value).map(Some).ok_or_else(|| Error::json(key, expected, &value)),
        }
    }

    /// The patterns of a key.
    fn take_patterns<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.take_node(key) {
            None | Some(Node::Other(Value::Null)) => Ok(Vec::new()),
            Some(Node::Object(Entries(entries))) => {
                let value = |(pattern, value): (String, Value)| match read(&value) {
                    Some(number) => Ok((pattern, number)),
                    None => Err(Error::json(key, expected, &json!({ pattern: value }))),
                };
                entries.into_iter().map(value).collect()
            }
            Some(other) => Err(Error::json(key, expected, &other.to_json())),
        }
    }

    fn into_config(mut self) -> Result<LoraConfig> {
        let no_null = |value: &Value| Some(value.clone());
        let kind = self.take("peft_type", "", no_null)?.unwrap_or_default();
        if kind != "LORA" {
            return Err(Error::json("peft_type", "\"LORA\"", &kind));
        }
        let bias = self.take("bias", "", no_null)?;
        if let Some(bias) = bias.filter(|bias| bias != "none") {
            return Err(Error::json("bias", "\"none\"", &bias));
        }
        let init_lora_weights = match self.take("init_lora_weights", "", no_null)? {
            None | Some(Value::Bool(true)) => InitLora::Default,
            Some(Value::Bool(false)) => InitLora::Random,
            Some(Value::String(init)) if init == "gaussian" => InitLora::Gaussian,
            // They leave the base as it is, and the file has what they gave.
            Some(Value::String(init)) if init == "eva" || init == "orthogonal" => InitLora::Default,
            // The others change the base's weights, or freeze a part of the adapter.
            Some(other) => {
                let expected = "true, false, \"gaussian\", \"eva\" or \"orthogonal\"";
                return Err(Error::json("init_lora_weights", expected, &other));
            }
        };
        let default = LoraConfig::default();
        let (names, count, yes_no) = ("a list of names", "a whole number or several", "true or false");
        let name_or_list = "names or a pattern";
        let config = LoraConfig {
            r: self.take("r", "a whole number of at least 1", whole_number)?.unwrap_or(default.r),
            lora_alpha: self.take("lora_alpha", "a number", Value::as_f64)?.unwrap_or(default.lora_alpha),
            lora_dropout: self.take("lora_dropout", "a number", Value::as_f64)?.unwrap_or(default.lora_dropout),
            target_modules: self.take("target_modules", name_or_list, modules)?.unwrap_or(default.target_modules),
            exclude_modules: self.take("exclude_modules", name_or_list, modules)?,
            layers_to_transform: self
                .take("layers_to_transform", count, |value| one_or_more(value, whole_number))?
                .unwrap_or_default(),
            layers_pattern: self.take("layers_pattern", names, |value| one_or_more(value, text))?.unwrap_or_default(),
            rank_pattern: self.take_patterns("rank_pattern", "whole numbers by pattern", whole_number)?,
            alpha_pattern: self.take_patterns("alpha_pattern", "numbers by pattern", Value::as_f64)?,
            use_rslora: self.take("use_rslora", yes_no, Value::as_bool)?.unwrap_or(false),
            fan_in_fan_out: self.take("fan_in_fan_out", yes_no, Value::as_bool)?.unwrap_or(false),
            ensure_weight_tying: self.take("ensure_weight_tying", yes_no, Value::as_bool)?.unwrap_or(false),
            modules_to_save: self.take("modules_to_save", names, |value| list(value, text))?.unwrap_or_default(),
            init_lora_weights,
            embedding_modules: None,
            base_model_name_or_path: self.take("base_model_name_or_path", "a text", text)?,
            revision: self.take("revision", "a text", text)?,
            task_type: self.take("task_type", "a text", text)?,
        };
        let is_refused = |(key, value): &&(String, Node)| !IGNORED.contains(&key.as_str()) && !value.is_off();
        match self.0.iter().find(is_refused) {
            None => Ok(config),
            Some((key, value)) => {
                let expected = "null, false or nothing, because this crate does not support the key";
                Err(Error::json(key, expected, &value.to_json()))
            }
        }
    }
}
