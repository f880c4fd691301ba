//! The options of the command line.

use std::path::PathBuf;

use candle_adamax::Rounding;
use candle_core::DType;
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::device::Place;
use crate::model::Pooling;
use crate::options::{self, Sparse, State, at_least, at_least_one};

/// Fine-tunes a BERT encoder for text classification with Adamax.
#[derive(Parser)]
pub(crate) struct Args {
    /// A folder with config.json, tokenizer.json and model.safetensors, as Hugging Face has them. Without it, a small
    /// encoder with fresh weights.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,

    /// A file in UTF-8 with a line for each text: its class, a tab, the text. Without it, lines of the files that this program
    /// was built beside: which of them are Rust, CUDA C++, Markdown, TOML?
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,

    /// The folder of the trained model, which --model takes, of the checkpoint and of the learning curves.
    #[arg(long, value_name = "DIR", default_value = "finetune-output")]
    pub(crate) out: PathBuf,

    /// Continue from the checkpoint in the output folder, with the same options and data.
    #[arg(long)]
    pub(crate) resume: bool,

    /// Save a checkpoint after this step and end, for --resume to go on.
    #[arg(long, value_name = "STEP", value_parser = at_least_one)]
    pub(crate) stop_after: Option<usize>,

    /// Threads for matrix products and updates. By default as many as `RAYON_NUM_THREADS` says; else with --model as many
    /// as the machine has, and with the small encoder one, which gains nothing from a second. Operations on elements have
    /// one, or as many as `CANDLE_NUM_THREADS` says: their threads wait for each other in a loop, and lose much where
    /// another program has the core of one.
    #[arg(long, value_parser = options::threads)]
    pub(crate) threads: Option<usize>,

    #[command(flatten)]
    pub(crate) settings: Settings,
}

impl Args {
    /// How many threads to compute with, where that is not left to candle.
    pub(crate) fn threads(&self) -> Option<usize> {
        let is_said = std::env::var_os("RAYON_NUM_THREADS").is_some();
        self.threads.or((!is_said && self.model.is_none()).then_some(1))
    }
}

/// What a trained model depends on, apart from the model and the data.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Decides the split, fresh weights, the order of the texts, dropout and stochastic rounding.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,

    /// Where to train and to evaluate.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: Place,

    /// The type of weights, activations and gradients. Softmax, layer normalization and the loss are computed in f32.
    #[arg(long, value_enum, default_value_t = Float::F32)]
    pub(crate) dtype: Float,

    /// How the optimizer's moments are stored: in 8, 4, 4 or 2 bytes a weight.
    #[arg(long, value_enum, default_value_t = State::F32)]
    pub(crate) state: State,

    /// How weights of bf16 and f16 are rounded after a step.
    #[arg(long, value_enum, default_value_t = Round::Stochastic)]
    pub(crate) rounding: Round,

    /// Embed words by this crate's layer: a step costs what the words of its batch cost. Other words stay as they are
    /// (lazy, which is meant if no more is said), or move as with a dense table (exact).
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "lazy", require_equals = true)]
    pub(crate) sparse_embeddings: Option<Sparse>,

    /// What to train. The head is the classifier, and the pooler with --pooling cls.
    #[arg(long, value_enum, default_value_t = Train::All)]
    pub(crate) train: Train,

    /// What the classifier sees of a text. By default what the model's folder says: the mean for sentence models and
    /// for fresh weights, else the first token.
    #[arg(long, value_enum)]
    pub(crate) pooling: Option<Pooling>,

    /// How often each text is trained on.
    #[arg(long, default_value_t = 6, value_parser = at_least_one)]
    pub(crate) epochs: usize,

    /// Train for this many steps at most. The learning rate has fallen by then.
    #[arg(long, value_name = "STEPS", value_parser = at_least_one)]
    pub(crate) max_steps: Option<usize>,

    /// Texts in a batch.
    #[arg(long, default_value_t = 32, value_parser = at_least_one)]
    pub(crate) batch: usize,

    /// Batches in a step, which is what one batch of all their texts would be, with the memory of one of them.
    #[arg(long, value_name = "BATCHES", default_value_t = 1, value_parser = at_least_one)]
    pub(crate) accumulate: usize,

    /// Tokens of a text that are looked at, the special ones included.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = at_least_three)]
    pub(crate) max_length: usize,

    /// The share of the texts that is kept for the evaluation, of each class; one of each at least.
    #[arg(long, default_value_t = 0.2, value_parser = share, allow_negative_numbers = true)]
    pub(crate) test_share: f64,

    /// Evaluate and save a checkpoint after every so many steps. By default after each epoch.
    #[arg(long, value_name = "STEPS", value_parser = at_least_one)]
    pub(crate) evaluate_every: Option<usize>,

    /// The learning rate of the head at its peak. By default 2e-4 with --model and 2e-3 with fresh weights.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) lr: Option<f64>,

    /// The learning rate of each layer in terms of the one above it. By default 0.9 with --model and 1 with fresh
    /// weights.
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    pub(crate) layer_lr_decay: Option<f64>,

    /// The share of the steps in which the learning rate rises to its peak.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = share, allow_negative_numbers = true)]
    pub(crate) warmup: f64,

    /// How the learning rate falls to 0 afterwards.
    #[arg(long, value_enum, default_value_t = Schedule::Linear)]
    pub(crate) schedule: Schedule,

    /// Decoupled decay of all weights but biases and layer normalizations; a step takes lr times this share of them.
    #[arg(long, default_value_t = 0.01, allow_negative_numbers = true)]
    pub(crate) weight_decay: f64,

    /// Clip the gradients to this norm, all of them together.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) clip_norm: f64,

    /// The share of activations that dropout sets to 0 in training. By default what the model's config.json says, or
    /// 0.1.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_negative_numbers = true)]
    pub(crate) dropout: Option<f64>,
}

/// The type of weights.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Float {
    F32,
    Bf16,
    F16,
}

impl Float {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// PyTorch's name for it.
    pub(crate) fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

/// How weights are rounded.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Round {
    /// To the nearest value, so that small steps are lost.
    Nearest,
    /// Up or down at random, right in the mean.
    Stochastic,
    /// A copy in f32 is what is trained.
    Master,
}

impl Round {
    pub(crate) fn rounding(self) -> Rounding {
        match self {
            Self::Nearest => Rounding::Nearest,
            Self::Stochastic => Rounding::Stochastic,
            Self::Master => Rounding::Master,
        }
    }
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Train {
    All,
    Head,
}

/// How the learning rate changes after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Schedule {
    /// In a straight line.
    Linear,
    /// Along half a cosine wave.
    Cosine,
    /// It stays.
    Constant,
}

/// A text is at least one token between the first and the last one.
fn at_least_three(text: &str) -> Result<usize, String> {
    at_least(text, 3)
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("expected a number in [0, 1)".into()),
    }
}
