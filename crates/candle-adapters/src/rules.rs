//! Which modules are adapted, and how: PEFT's rules, compiled.

use candle_nn::Init;
use fancy_regex::Regex;

use crate::config::{LoraConfig, Modules};
use crate::error::{Error, Result};

/// Heads that `all-linear` leaves out; the second list for the task `SEQ_CLS`.
const HEADS: [&str; 3] = ["lm_head", "embed_out", "predictions.decoder"];
const SEQ_CLS_HEADS: [&str; 2] = ["score", "classifier"];

/// The elements that a module's A and B may have however small its weight is.
const FREE_ELEMENTS: usize = 1 << 24;

/// Whether the module's name is one of the names or ends with it after a point.
fn is_named<S: AsRef<str>>(names: &[S], module: &str) -> bool {
    names.iter().any(|name| {
        let rest = module.strip_suffix(name.as_ref());
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

/// A pattern of the settings in the expression that makes it match as PEFT does.
#[derive(Debug)]
struct Pattern {
    field: &'static str,
    text: String,
    regex: Regex,
}

impl Pattern {
    fn new(field: &'static str, text: &str, expression: &str) -> Result<Self> {
        // Alone first, so that a position in the message is one of the text.
        let regex = Regex::new(text).and_then(|_| Regex::new(expression));
        let regex = regex.map_err(|error| Self::error(field, text, "regular expressions", error))?;
        Ok(Self { field, text: text.to_owned(), regex })
    }

    fn error(field: &str, text: &str, expected: &str, error: fancy_regex::Error) -> Error {
        Error::Config { field: field.into(), expected: expected.into(), got: format!("{text:?}: {error}") }
    }

    /// An error is a search that takes too long.
    fn decided<T>(&self, found: fancy_regex::Result<T>) -> Result<T> {
        found.map_err(|error| Self::error(self.field, &self.text, "patterns that can be decided", error))
    }

    fn finds(&self, module: &str) -> Result<bool> {
        self.decided(self.regex.is_match(module))
    }
}

/// Whether a weight is in a module whose name ends with this one.
fn is_within(name: &str, weight: &str) -> bool {
    weight.match_indices('.').any(|(end, _)| weight[..end].ends_with(name))
}

fn require(holds: bool, field: &str, expected: &str, got: impl std::fmt::Debug) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::config(field, expected, got)) }
}

#[derive(Debug)]
enum Chosen {
    Names(Vec<String>),
    Pattern(Pattern),
    AllLinear,
}

impl Chosen {
    fn new(field: &'static str, modules: &Modules) -> Result<Self> {
        match modules {
            Modules::Names(names) => {
                require(!names.is_empty(), field, "at least one name, or a pattern", names)?;
                require(!names.iter().any(String::is_empty), field, "names that are not empty", names)?;
                Ok(Self::Names(names.clone()))
            }
            Modules::Pattern(pattern) => {
                Ok(Self::Pattern(Pattern::new(field, pattern, &format!(r"\A(?:{pattern})\z"))?))
            }
        }
    }

    fn has(&self, module: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(is_named(names, module)),
            Self::Pattern(pattern) => pattern.finds(module),
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
    not_adapted: Vec<Pattern>,
    layers: Vec<usize>,
    layer_patterns: Vec<Pattern>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
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
            Pattern::new("layers_pattern", pattern, &format!(r"\A(?:|.*?\.)(?:{pattern})\.(?P<index>\d+)\."))
        };
        let layer_patterns = if patterns.is_empty() {
            vec![Pattern::new("layers_pattern", "", r"\A.*?\.[^.]*\.(?P<index>\d+)\.")?]
        } else {
            patterns.iter().map(layer).collect::<Result<_>>()?
        };
        let tail = |field, key: &str| Pattern::new(field, key, &format!(r"\A(.*\.)?({key})\z"));
        let ranks = config.rank_pattern.iter().map(|(key, rank)| {
            require(*rank >= 1, "rank_pattern", "ranks of at least 1", (key, rank))?;
            Ok((tail("rank_pattern", key)?, *rank))
        });
        let alphas = config.alpha_pattern.iter().map(|(key, alpha)| {
            require(is_alpha(*alpha), "alpha_pattern", "finite numbers above 0", (key, alpha))?;
            Ok((tail("alpha_pattern", key)?, *alpha))
        });
        let within = |name: &String| Pattern::new("modules_to_save", name, &format!(r"\A(|.*\.)(?:{name})(\z|\.)"));
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
        for pattern in &self.not_adapted {
            if pattern.finds(module)? {
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
        for pattern in &self.layer_patterns {
            if let Some(captures) = pattern.decided(pattern.regex.captures(module))? {
                return Ok(captures.name("index").and_then(|index| index.as_str().parse().ok()));
            }
        }
        Ok(None)
    }

    /// The rank and the scale of a module's adapter.
    pub(crate) fn adapter(&self, module: &str) -> Result<Adapter> {
        fn first<T: Copy>(patterns: &[(Pattern, T)], module: &str, default: T) -> Result<T> {
            for (pattern, value) in patterns {
                if pattern.finds(module)? {
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

    /// Refuses a rank whose matrices nobody could mean: PEFT's may be larger than the weight's dimensions.
    pub(crate) fn check_rank(&self, module: &str, rank: usize, [inputs, outputs]: [usize; 2]) -> Result<()> {
        let allowed = inputs.saturating_mul(outputs).saturating_mul(4).max(FREE_ELEMENTS);
        let most = allowed / inputs.saturating_add(outputs).max(1);
        let field = if rank == self.rank { "r" } else { "rank_pattern" };
        let expected = format!("at most {most} for {module:?}, whose matrices are [r, {inputs}] and [{outputs}, r]");
        require(rank <= most, field, &expected, rank)
    }

    /// The entries that none of a model's modules matches; `whole` are its weights that are saved whole.
    ///
    /// `layers_pattern` has alternatives, of which one is enough.
    pub(crate) fn unmatched(&self, modules: &[&str], whole: &[&str]) -> Result<Vec<String>> {
        let mut entries = Vec::new();
        let mut add = |field: &str, entry: &dyn std::fmt::Debug, is_matched: bool| {
            if !is_matched {
                entries.push(format!("`{field}` {entry:?}"));
            }
        };
        let any = |holds: &dyn Fn(&str) -> Result<bool>| -> Result<bool> {
            modules.iter().try_fold(false, |found, module| Ok(found || holds(module)?))
        };
        let named = |name: &String| any(&|module| Ok(is_named(&[name], module)));
        let chosen = [("target_modules", Some(&self.target)), ("exclude_modules", self.exclude.as_ref())];
        let chosen = chosen.into_iter().filter_map(|(field, chosen)| Some((field, chosen?)));
        let patterns =
            self.ranks.iter().map(|(pattern, _)| pattern).chain(self.alphas.iter().map(|(pattern, _)| pattern));
        for (field, chosen) in chosen {
            match chosen {
                Chosen::Names(names) => {
                    for name in names {
                        add(field, name, named(name)?);
                    }
                }
                Chosen::Pattern(pattern) => add(field, &pattern.text, any(&|module| pattern.finds(module))?),
                Chosen::AllLinear => {}
            }
        }
        for number in &self.layers {
            add("layers_to_transform", number, any(&|module| Ok(self.layer(module)? == Some(*number)))?);
        }
        for pattern in patterns {
            add(pattern.field, &pattern.text, any(&|module| pattern.finds(module))?);
        }
        for name in &self.saved {
            add("modules_to_save", name, whole.iter().any(|weight| is_within(name, weight)));
        }
        for name in self.embeddings.iter().flatten() {
            add("embedding_modules", name, named(name)?);
        }
        Ok(entries)
    }

    /// Whether a weight belongs to a module that is trained and saved whole.
    pub(crate) fn saves(&self, weight: &str) -> bool {
        self.saved.iter().any(|name| is_within(name, weight))
    }

    /// Whether a module is a table of embeddings, as far as the way in which it is built and its name tell.
    pub(crate) fn is_embedding(&self, module: &str, init: Option<Init>) -> bool {
        if let Some(names) = &self.embeddings {
            return is_named(names, module);
        }
        let last = module.rsplit('.').next().unwrap_or(module);
        match init {
            // The initialization of `candle_nn::embedding`.
            Some(Init::Randn { mean: 0.0, stdev: 1.0 }) => true,
            // That of `candle_nn::linear`.
            Some(Init::Kaiming { .. }) => false,
            _ => last.contains("embed") || last.contains("embd") || ["wte", "wpe", "shared"].contains(&last),
        }
    }
}
