//! The settings of an adapter, under PEFT's names, and `adapter_config.json`.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::json;
use crate::rules::Rules;

/// Modules by name, as PEFT's `target_modules` and `exclude_modules` have them.
#[derive(Clone, Debug, PartialEq)]
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
    /// Whether PEFT gives a head that is tied to an adapted table the table's adapter. A model of candle always does:
    /// see the [crate's documentation](crate#tied-tables).
    pub ensure_weight_tying: bool,
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
            ensure_weight_tying: false,
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
        let config = json::read(text)?;
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
        // Keys that older versions do not have.
        if self.ensure_weight_tying {
            file["ensure_weight_tying"] = json!(true);
        }
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
