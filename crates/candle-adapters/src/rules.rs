//! Which modules are adapted, and how: PEFT's rules, compiled.

use candle_nn::Init;
use fancy_regex::Regex;

use crate::config::{LoraConfig, Modules};
use crate::error::{Error, Result};

/// Heads that `all-linear` leaves out; the second list for the task `SEQ_CLS`.
const HEADS: [&str; 3] = ["lm_head", "embed_out", "predictions.decoder"];
const SEQ_CLS_HEADS: [&str; 2] = ["score", "classifier"];

/// Whether the module's name is one of the names or ends with it after a point.
fn is_named<S: AsRef<str>>(names: &[S], module: &str) -> bool {
    names.iter().any(|name| {
        let rest = module.strip_suffix(name.as_ref());
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

/// A pattern in the expression that makes it match as PEFT does.
fn compile(field: &str, pattern: &str, expression: &str) -> Result<Regex> {
    let invalid = |error| Error::config(field, "regular expressions", format!("{pattern:?}: {error}"));
    Regex::new(expression).map_err(invalid)
}

/// Whether it matches. An error is a search that takes too long.
fn finds(regex: &Regex, module: &str) -> Result<bool> {
    let too_long =
        |error| Error::config("target_modules", "patterns that can be decided", format!("{regex:?}: {error}"));
    regex.is_match(module).map_err(too_long)
}

fn require(holds: bool, field: &str, expected: &str, got: impl std::fmt::Debug) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::config(field, expected, got)) }
}

#[derive(Debug)]
enum Chosen {
    Names(Vec<String>),
    Pattern(Regex),
    AllLinear,
}

impl Chosen {
    fn new(field: &str, modules: &Modules) -> Result<Self> {
        match modules {
            Modules::Names(names) => {
                require(!names.is_empty(), field, "at least one name, or a pattern", names)?;
                require(!names.iter().any(String::is_empty), field, "names that are not empty", names)?;
                Ok(Self::Names(names.clone()))
            }
            Modules::Pattern(pattern) => Ok(Self::Pattern(compile(field, pattern, &format!(r"\A(?:{pattern})\z"))?)),
        }
    }

    fn has(&self, module: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(is_named(names, module)),
            Self::Pattern(regex) => finds(regex, module),
            Self::AllLinear => Ok(true),
        }
    }
}

/// A module's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Adapter {
    pub(crate) rank: usize,
    pub(crate) scale: f64,
}

/// The settings, checked and compiled.
#[derive(Debug)]
pub(crate) struct Rules {
    target: Chosen,
    exclude: Option<Chosen>,
    saved: Vec<String>,
    not_adapted: Vec<Regex>,
    layers: Vec<usize>,
    layer_patterns: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    rank: usize,
    alpha: f64,
    is_rank_stabilized: bool,
    embeddings: Option<Vec<String>>,
    is_classifier: bool,
}

impl Rules {
    pub(crate) fn new(config: &LoraConfig) -> Result<Self> {
        let is_alpha = |alpha: f64| alpha.is_finite() && alpha > 0.0;
        require(config.r >= 1, "r", "at least 1", config.r)?;
        require(is_alpha(config.lora_alpha), "lora_alpha", "a finite number above 0", config.lora_alpha)?;
        let dropout = config.lora_dropout;
        require((0.0..1.0).contains(&dropout), "lora_dropout", "a number in [0, 1)", dropout)?;
        let target = match &config.target_modules {
            Modules::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => Chosen::AllLinear,
            modules => Chosen::new("target_modules", modules)?,
        };
        let exclude = match &config.exclude_modules {
            Some(Modules::Names(names)) if names.is_empty() => None,
            other => other.as_ref().map(|modules| Chosen::new("exclude_modules", modules)).transpose()?,
        };
        let has_names = matches!(target, Chosen::Names(_));
        let layers = &config.layers_to_transform;
        require(
            layers.is_empty() || has_names,
            "layers_to_transform",
            "none, because the target is a pattern",
            layers,
        )?;
        let patterns = &config.layers_pattern;
        require(
            patterns.is_empty() || !layers.is_empty(),
            "layers_pattern",
            "none, because there is no `layers_to_transform`",
            patterns,
        )?;
        let saved = &config.modules_to_save;
        require(!saved.iter().any(String::is_empty), "modules_to_save", "names that are not empty", saved)?;
        // A layer's number is the first one after a dot, not that of an expert within it.
        let layer = |pattern: &String| {
            compile("layers_pattern", pattern, &format!(r"\A(?:|.*?\.)(?:{pattern})\.(?P<index>\d+)\."))
        };
        let layer_patterns = if patterns.is_empty() {
            vec![compile("layers_pattern", "", r"\A.*?\.[^.]*\.(?P<index>\d+)\.")?]
        } else {
            patterns.iter().map(layer).collect::<Result<_>>()?
        };
        let tail = |field: &str, key: &str| compile(field, key, &format!(r"\A(.*\.)?({key})\z"));
        let ranks = config.rank_pattern.iter().map(|(key, rank)| {
            require(*rank >= 1, "rank_pattern", "ranks of at least 1", (key, rank))?;
            Ok((tail("rank_pattern", key)?, *rank))
        });
        let alphas = config.alpha_pattern.iter().map(|(key, alpha)| {
            require(is_alpha(*alpha), "alpha_pattern", "finite numbers above 0", (key, alpha))?;
            Ok((tail("alpha_pattern", key)?, *alpha))
        });
        let within = |name: &String| compile("modules_to_save", name, &format!(r"\A(|.*\.)(?:{name})(\z|\.)"));
        Ok(Self {
            target,
            exclude,
            saved: saved.clone(),
            not_adapted: saved.iter().map(within).collect::<Result<_>>()?,
            layers: layers.clone(),
            layer_patterns,
            ranks: ranks.collect::<Result<_>>()?,
            alphas: alphas.collect::<Result<_>>()?,
            rank: config.r,
            alpha: config.lora_alpha,
            is_rank_stabilized: config.use_rslora,
            embeddings: config.embedding_modules.clone(),
            is_classifier: config.task_type.as_deref() == Some("SEQ_CLS"),
        })
    }

    /// Whether a module's weight gets an adapter.
    pub(crate) fn adapts(&self, module: &str, dims: &[usize], is_embedding: bool) -> Result<bool> {
        if let Some(exclude) = &self.exclude
            && exclude.has(module)?
        {
            return Ok(false);
        }
        for regex in &self.not_adapted {
            if finds(regex, module)? {
                return Ok(false);
            }
        }
        if !self.target.has(module)? {
            return Ok(false);
        }
        match &self.target {
            Chosen::AllLinear => {
                let is_head = is_named(&HEADS, module) || (self.is_classifier && is_named(&SEQ_CLS_HEADS, module));
                Ok(dims.len() == 2 && !is_embedding && !is_head)
            }
            Chosen::Names(names) if !self.layers.is_empty() && !names.iter().any(|name| name == module) => {
                Ok(self.layer(module)?.is_some_and(|layer| self.layers.contains(&layer)))
            }
            _ => Ok(true),
        }
    }

    /// The number of the layer that a module is in.
    fn layer(&self, module: &str) -> Result<Option<usize>> {
        for regex in &self.layer_patterns {
            let too_long =
                |error| Error::config("layers_pattern", "patterns that can be decided", format!("{regex:?}: {error}"));
            if let Some(captures) = regex.captures(module).map_err(too_long)? {
                return Ok(captures.name("index").and_then(|index| index.as_str().parse().ok()));
            }
        }
        Ok(None)
    }

    /// The rank and the scale of a module's adapter.
    pub(crate) fn adapter(&self, module: &str) -> Result<Adapter> {
        fn first<T: Copy>(patterns: &[(Regex, T)], module: &str, default: T) -> Result<T> {
            for (regex, value) in patterns {
                if finds(regex, module)? {
                    return Ok(*value);
                }
            }
            Ok(default)
        }
        let rank = first(&self.ranks, module, self.rank)?;
        let alpha = first(&self.alphas, module, self.alpha)?;
        let divisor = if self.is_rank_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Adapter { rank, scale: alpha / divisor })
    }

    /// Whether a weight belongs to a module that is trained and saved whole.
    pub(crate) fn saves(&self, weight: &str) -> bool {
        let modules = weight.match_indices('.').map(|(end, _)| &weight[..end]);
        let is_saved = |module: &str| self.saved.iter().any(|name| module.ends_with(name.as_str()));
        modules.into_iter().any(is_saved)
    }

    /// Whether a module is a table of embeddings, as far as its name and the way in which it is built tell.
    pub(crate) fn is_embedding(&self, module: &str, init: Option<Init>) -> bool {
        if let Some(names) = &self.embeddings {
            return is_named(names, module);
        }
        let last = module.rsplit('.').next().unwrap_or(module);
        // The initialization of `candle_nn::embedding`.
        let is_built_so = matches!(init, Some(Init::Randn { mean: 0.0, stdev: 1.0 }));
        is_built_so || last.contains("embed") || last.contains("embd") || ["wte", "wpe", "shared"].contains(&last)
    }
}
