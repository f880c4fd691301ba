//! The options of the command line, and the optimizer's settings that follow from them.

use std::path::PathBuf;

use candle_adamax::{
    Clip, CosineDecay, Ema, ExponentialDecay, LearningRate, ParamsAdamax, PolynomialDecay, WeightDecay,
};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::device::Place;
use crate::options::{self, Sparse, State, at_least_one};
use crate::synthetic;

/// Trains a neural recommender with Adamax: embeddings of users and items, an MLP, and two heads, one for ratings and
/// one for what a user turns to next.
#[derive(Parser)]
pub(crate) struct Args {
    /// A file of MovieLens ratings: u.data, ratings.dat or ratings.csv. Without it, ratings are made up.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,

    /// How many items there are where ratings are made up, such as 1000000.
    #[arg(long, value_name = "N", conflicts_with = "data", value_parser = enough_items)]
    pub(crate) items: Option<usize>,

    /// The folder of the checkpoint and the learning curves.
    #[arg(long, value_name = "DIR", default_value = "recommender-output")]
    pub(crate) out: PathBuf,

    /// Continue from the checkpoint in the output folder, with the same options and data.
    #[arg(long)]
    pub(crate) resume: bool,

    /// Threads for matrix products and updates. The default sizes gain nothing from a second one. The results are the
    /// same. By default as many as `RAYON_NUM_THREADS` says, or one. Operations on elements have one, or as many as
    /// `CANDLE_NUM_THREADS` says: their threads wait for each other in a loop.
    #[arg(long, default_value_t = default_threads(), hide_default_value = true, value_parser = options::threads)]
    pub(crate) threads: usize,

    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// What a trained model depends on, apart from the data.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Decides the split, the first weights, the order of the ratings and the unrated items that are sampled.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,

    /// Where to train and to evaluate.
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub(crate) device: Place,

    /// How often each rating is trained on.
    #[arg(long, default_value_t = 10, value_parser = at_least_one)]
    pub(crate) epochs: usize,

    /// Ratings in a batch; the sampled items come on top.
    #[arg(long, default_value_t = 512, value_parser = at_least_one)]
    pub(crate) batch: usize,

    /// The learning rate, at its peak. It is high, since a row of a table has a gradient only now and then.
    #[arg(long, default_value_t = 0.02, allow_negative_numbers = true)]
    pub(crate) lr: f64,

    /// How the learning rate falls.
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    pub(crate) schedule: Schedule,

    /// Decoupled weight decay of all weights but the biases; a step takes lr times this share of them away, in tables of
    /// the rows of its batch.
    #[arg(long, default_value_t = 0.4, allow_negative_numbers = true)]
    pub(crate) weight_decay: f64,

    /// What is added to the norm that steps are divided by. By default Keras's 1e-7.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) eps: Option<f64>,

    /// Clip the gradients to this norm, all of them together.
    #[arg(long, value_name = "NORM", allow_negative_numbers = true)]
    pub(crate) clip_norm: Option<f64>,

    /// Evaluate moving averages of the weights at the end, which keep this share of themselves in a step, such as 0.99.
    /// They cost all of a table at each step, so they are for --dense.
    #[arg(long, value_name = "MOMENTUM", allow_negative_numbers = true, requires = "dense")]
    pub(crate) ema: Option<f64>,

    /// Use candle's own embeddings, whose gradients are as large as the tables, for the same model.
    #[arg(long)]
    pub(crate) dense: bool,

    /// How the optimizer's moments are stored.
    #[arg(long, value_enum, default_value_t = State::F32)]
    pub(crate) state: State,

    /// What becomes of the rows of tables that a batch does not touch. Dense tables have no such rows.
    #[arg(long, value_enum, default_value_t = Sparse::Lazy, conflicts_with = "dense")]
    pub(crate) sparse: Sparse,

    /// How many of the items that a user rated last are part of what is known of the user.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) history: usize,

    /// The size of the embeddings.
    #[arg(long, default_value_t = 32, value_parser = at_least_one)]
    pub(crate) dim: usize,

    /// The width of the MLP's first layer; the second has half of it.
    #[arg(long, default_value_t = 32, value_parser = at_least_one)]
    pub(crate) hidden: usize,

    /// Unrated items that are sampled for each rating.
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    pub(crate) negatives: usize,

    /// What the loss of the interactions counts for beside that of the ratings.
    #[arg(long, default_value_t = 0.7, value_parser = weight, allow_negative_numbers = true)]
    pub(crate) interaction_weight: f64,
}

/// How the learning rate changes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Schedule {
    /// It does not.
    Constant,
    /// Along half a cosine wave to 0 at the end of the last epoch.
    Cosine,
    /// By a fifth in each epoch, a little in each step.
    Exponential,
    /// In a straight line to 0 at the end of the last epoch.
    Linear,
}

impl Schedule {
    /// Whether the learning rate of a step depends on how many epochs there will be.
    pub(crate) fn depends_on_epochs(self) -> bool {
        matches!(self, Self::Cosine | Self::Linear)
    }
}

impl Settings {
    /// The settings of the optimizer.
    pub(crate) fn adamax(&self, steps_per_epoch: usize) -> ParamsAdamax {
        let epoch = steps_per_epoch as u64;
        let total = epoch.saturating_mul(self.epochs as u64);
        let lr: LearningRate = match self.schedule {
            Schedule::Constant => self.lr.into(),
            Schedule::Cosine => CosineDecay::new(self.lr, total).into(),
            Schedule::Exponential => ExponentialDecay::new(self.lr, epoch, 0.8).into(),
            Schedule::Linear => {
                PolynomialDecay { end_learning_rate: 0.0, ..PolynomialDecay::new(self.lr, total) }.into()
            }
        };
        let defaults = ParamsAdamax::default();
        ParamsAdamax {
            lr,
            eps: self.eps.unwrap_or(defaults.eps),
            weight_decay: WeightDecay::Decoupled(self.weight_decay),
            // The tables of biases are named so, too.
            no_decay: vec!["bias".into()],
            clip: self.clip_norm.map(Clip::GlobalNorm),
            state_dtype: self.state.dtype(),
            sparse_update: self.sparse.update(),
            ema: self.ema.map(|momentum| Ema { momentum, overwrite_frequency: None }),
            ..defaults
        }
    }
}

fn default_threads() -> usize {
    std::env::var("RAYON_NUM_THREADS").ok().and_then(|number| at_least_one(&number).ok()).unwrap_or(1)
}

/// The weight of a loss: a finite number that is not negative.
fn weight(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("expected a finite number that is not negative".into()),
    }
}

/// Enough for users to leave some unrated.
pub(crate) fn enough_items(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ synthetic::ITEMS..=100_000_000) => Ok(number),
        Ok(_) => Err(format!("expected {} to 100000000", synthetic::ITEMS)),
        Err(error) => Err(format!("expected a whole number: {error}")),
    }
}
