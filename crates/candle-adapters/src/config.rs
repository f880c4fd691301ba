//! The settings of an adapter, under PEFT's names, and `adapter_config.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::rules::Rules;

/// Modules by name, as PEFT's `target_modules` and `exclude_modules` have them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// Names of modules, or their last parts: `"query"` is every module whose name is `query` or ends with `.query`.
    Names(Vec<String>),
    /// A regular expression that has to match a module's whole name. As a target, `"all-linear"` stands for the weights
    /// of all linear layers but the head: see [`LoraConfig::target_modules`].
    Pattern(String),
}

impl<const N: usize> From<[&str; N]> for Modules {
    fn from(names: [&str; N]) -> Self {
        Self::Names(names.map(str::to_owned).to_vec())
    }
}

impl From<Vec<String>> for Modules {
    fn from(names: Vec<String>) -> Self {
        Self::Names(names)
    }
}

impl From<&str> for Modules {
    fn from(pattern: &str) -> Self {
        Self::Pattern(pattern.to_owned())
    }
}

impl Modules {
    fn to_json(&self) -> Value {
        match self {
            Self::Names(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
        }
    }
}

/// The values that a new adapter begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLora {
    /// `true` in the file. `lora_A` is uniform in ±1/√in (Kaiming's with a = √5) and `lora_B` is zero; of an embedding,
    /// `lora_embedding_A` is zero and `lora_embedding_B` is normal with deviation 1. The model begins as it was.
    #[default]
    Default,
    /// `"gaussian"` in the file. `lora_A` is normal with deviation 1/r and `lora_B` is zero; embeddings as in
    /// `Default`.
    Gaussian,
    /// `false` in the file. Both are random, so the model does not begin as it was: for tests. `lora_A` and `lora_B`
    /// are uniform in ±1/√in and ±1/√r, those of an embedding are normal with deviation 1.
    Random,
}

/// The settings of an adapter: PEFT's `LoraConfig`, with its names and defaults.
///
/// ```
/// use candle_adapters::LoraConfig;
///
/// let config = LoraConfig { r: 4, lora_alpha: 8.0, target_modules: ["query", "value"].into(), ..Default::default() };
/// config.validate()?;
/// # Ok::<(), candle_adapters::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank of an adapter, at least 1.
    pub r: usize,
    /// The scale's numerator: an adapter adds `lora_alpha / r * B A`. Finite and positive.
    pub lora_alpha: f64,
    /// The share of input features that a linear layer's adapter does not see while training, in [0, 1). It differs
    /// from PEFT's: see the [crate's documentation](crate#dropout).
    pub lora_dropout: f64,
    /// The modules that get adapters. `Modules::Pattern("all-linear")` are all weights of two dimensions that belong
    /// neither to an embedding nor to a head (`lm_head`, `embed_out`, `predictions.decoder`, and for the task `SEQ_CLS`
    /// `score` and `classifier`). A module that matches and whose weight has not two dimensions is an error, as in
    /// PEFT.
    pub target_modules: Modules,
    /// The modules that get none, although they match.
    pub exclude_modules: Option<Modules>,
    /// The numbers of the layers that get adapters; empty means all. Not with a pattern as target.
    pub layers_to_transform: Vec<usize>,
    /// The names that stand before a layer's number; empty means any. Needs `layers_to_transform`.
    pub layers_pattern: Vec<String>,
    /// Other ranks for some modules. A key is a regular expression that has to match a name, or its last parts, whole;
    /// the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other values of `lora_alpha` for some modules, chosen as in `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the scale is `lora_alpha / √r` (Kalajdzievski 2023, arXiv 2312.03732) instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// Whether adapted weights, but for those of embeddings, are stored as [in, out], as GPT-2's are.
    pub fan_in_fan_out: bool,
    /// Modules that are trained whole and saved with the adapter, such as a head: names end with one of these. A weight
    /// that the base model does not have is made as by a `VarMap`, but reproducibly.
    pub modules_to_save: Vec<String>,
    /// The values that a new adapter begins with.
    pub init_lora_weights: InitLora,
    /// Modules, by names or their last parts, whose weights are tables of embeddings. PEFT sees this from the module's
    /// class; a `VarBuilder` does not know it. `None` takes the modules that are built by `candle_nn::embedding`, and
    /// those whose name's last part contains `embed` or `embd` or is `wte`, `wpe` or `shared`. Not in PEFT's file, and
    /// not asked where an adapter is loaded: the file tells the kind of each.
    pub embedding_modules: Option<Vec<String>>,
    /// The base model's name, for whoever reads the file.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision, for whoever reads the file.
    pub revision: Option<String>,
    /// PEFT's name of the task, such as `CAUSAL_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`.
    pub task_type: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Modules::Names(Vec::new()),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            fan_in_fan_out: false,
            modules_to_save: Vec::new(),
            init_lora_weights: InitLora::Default,
            embedding_modules: None,
            base_model_name_or_path: None,
            revision: None,
            task_type: None,
        }
    }
}

impl LoraConfig {
    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// The first one that is not allowed, with its name and value.
    pub fn validate(&self) -> Result<()> {
        Rules::new(self).map(drop)
    }

    /// Reads the text of an `adapter_config.json`.
    ///
    /// # Errors
    ///
    /// Text that is not such a file; settings that are not allowed; settings that change the numbers and that this
    /// crate does not support, such as `use_dora`; unknown keys that are neither null, false nor empty.
    pub fn from_json(text: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_str(text).map_err(|error| {
            Error::config("adapter_config.json", "the settings of a LoRA adapter", error.to_string())
        })?;
        let config = raw.into_config()?;
        config.validate()?;
        Ok(config)
    }

    /// The text of an `adapter_config.json` with these settings, which every version of PEFT that has them reads.
    pub fn to_json(&self) -> String {
        let list = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
        let mut file = json!({
            "peft_type": "LORA",
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": true,
            "init_lora_weights": match self.init_lora_weights {
                InitLora::Default => json!(true),
                InitLora::Gaussian => json!("gaussian"),
                InitLora::Random => json!(false),
            },
            "layers_pattern": list(&self.layers_pattern),
            "layers_to_transform":
                if self.layers_to_transform.is_empty() { Value::Null } else { json!(self.layers_to_transform) },
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": list(&self.modules_to_save),
            "r": self.r,
            "revision": self.revision,
            "target_modules": self.target_modules.to_json(),
            "task_type": self.task_type,
            "use_rslora": self.use_rslora,
        });
        // serde_json sorts the keys, as PEFT does.
        let ranks: Map<_, _> = self.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect();
        let alphas: Map<_, _> = self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect();
        file["rank_pattern"] = ranks.into();
        file["alpha_pattern"] = alphas.into();
        // A key that older versions do not have.
        if let Some(excluded) = &self.exclude_modules {
            file["exclude_modules"] = excluded.to_json();
        }
        format!("{file:#}\n")
    }
}

/// A whole number as PEFT writes it, without a point.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// One value or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    Many(Vec<T>),
    One(T),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::Many(values) => values,
            Self::One(value) => vec![value],
        }
    }
}

/// A mapping in the order of the file, where the first pattern that matches counts.
struct Patterns<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping from patterns to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Patterns(entries))
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
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

/// What is in the file.
#[derive(Deserialize)]
struct Raw {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
    task_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    lora_dropout: Option<f64>,
    target_modules: Option<Modules>,
    exclude_modules: Option<Modules>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    rank_pattern: Option<Patterns<usize>>,
    alpha_pattern: Option<Patterns<f64>>,
    use_rslora: Option<bool>,
    fan_in_fan_out: Option<bool>,
    modules_to_save: Option<Vec<String>>,
    init_lora_weights: Option<Value>,
    bias: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl Raw {
    fn into_config(self) -> Result<LoraConfig> {
        if self.peft_type != "LORA" {
            return Err(Error::config("peft_type", "\"LORA\"", self.peft_type));
        }
        if let Some(bias) = self.bias.filter(|bias| bias != "none") {
            return Err(Error::config("bias", "\"none\"", bias));
        }
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(values) => values.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            _ => false,
        };
        for (key, value) in &self.others {
            if !IGNORED.contains(&key.as_str()) && !is_off(value) {
                let expected = "null, false or nothing, because this crate does not support the key";
                return Err(Error::Config { field: key.clone(), expected: expected.into(), got: value.to_string() });
            }
        }
        let init_lora_weights = match &self.init_lora_weights {
            None | Some(Value::Null | Value::Bool(true)) => InitLora::Default,
            Some(Value::Bool(false)) => InitLora::Random,
            Some(Value::String(init)) if init == "gaussian" => InitLora::Gaussian,
            // They leave the base as it is, and the file has what they gave.
            Some(Value::String(init)) if init == "eva" || init == "orthogonal" => InitLora::Default,
            // The others change the base's weights, or freeze a part of the adapter.
            Some(other) => {
                let expected = "true, false, \"gaussian\", \"eva\" or \"orthogonal\"";
                return Err(Error::Config {
                    field: "init_lora_weights".into(),
                    expected: expected.into(),
                    got: other.to_string(),
                });
            }
        };
        let default = LoraConfig::default();
        Ok(LoraConfig {
            r: self.r.unwrap_or(default.r),
            lora_alpha: self.lora_alpha.unwrap_or(default.lora_alpha),
            lora_dropout: self.lora_dropout.unwrap_or(default.lora_dropout),
            target_modules: self.target_modules.unwrap_or(default.target_modules),
            exclude_modules: self.exclude_modules,
            layers_to_transform: self.layers_to_transform.map(OneOrMany::into_vec).unwrap_or_default(),
            layers_pattern: self.layers_pattern.map(OneOrMany::into_vec).unwrap_or_default(),
            rank_pattern: self.rank_pattern.map(|patterns| patterns.0).unwrap_or_default(),
            alpha_pattern: self.alpha_pattern.map(|patterns| patterns.0).unwrap_or_default(),
            use_rslora: self.use_rslora.unwrap_or(false),
            fan_in_fan_out: self.fan_in_fan_out.unwrap_or(false),
            modules_to_save: self.modules_to_save.unwrap_or_default(),
            init_lora_weights,
            embedding_modules: None,
            base_model_name_or_path: self.base_model_name_or_path,
            revision: self.revision,
            task_type: self.task_type,
        })
    }
}
