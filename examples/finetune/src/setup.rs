//! Everything that a run begins with: texts, tokenizer, model, optimizer.

use anyhow::Result;
use candle_core::Device;
use candle_nn::VarMap;
use tokenizers::Tokenizer;

use crate::batch::Batcher;
use crate::data::{self, Data};
use crate::laps::Laps;
use crate::model::{Classifier, Config, IsTrained, Weights, is_on_top};
use crate::progress::Progress;
use crate::settings::{Args, Train};
use crate::train::{Length, Trainer};
use crate::{Stream, optim, random, report, tokenizer};

/// A run that has not begun.
pub(crate) struct Setup {
    pub(crate) data: Data,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) config: Config,
    pub(crate) trainer: Trainer,
    pub(crate) progress: Progress,
}

/// Reads and makes what the command line asks for, and says what it is.
pub(crate) fn setup(args: &Args) -> Result<Setup> {
    let settings = &args.settings;
    let device = settings.device.open()?;
    let (data, random_split) = (args.data.as_deref(), &mut random(settings.seed, Stream::Split));
    let labelled = match data {
        Some(path) => data::read(path)?,
        None => data::tree::lines(&data::tree::root(), random_split)?,
    };
    let data = Data::new(labelled, settings.test_share, random_split)?;
    report::data(args.data.as_deref(), &data);

    let (mut config, tokenizer) = match args.model.as_deref() {
        Some(model) => {
            let config = Config::read(model)?;
            let longest = settings.max_length.min(config.max_position_embeddings);
            (config, tokenizer::read(model, longest)?)
        }
        None => {
            let texts = data.train.iter().map(|example| example.text.as_str());
            let tokenizer = tokenizer::train(texts, settings.max_length)?;
            let mut config = Config::small(tokenizer::size(&tokenizer), tokenizer::padding(&tokenizer)?);
            config.max_position_embeddings = settings.max_length;
            (config, tokenizer)
        }
    };
    if let Some(dropout) = settings.dropout {
        (config.hidden_dropout_prob, config.attention_probs_dropout_prob) = (dropout, dropout);
        config.classifier_dropout = None;
    }
    config.classifier_pooling = Some(settings.pooling.unwrap_or(config.pooling()));
    let keep_classifier = config.has_labels(&data.labels);
    config.set_labels(&data.labels);
    let train = tokenizer::encode(&tokenizer, &data.train, config.vocab_size)?;
    let test = tokenizer::encode(&tokenizer, &data.test, config.vocab_size)?;

    let is_trained: IsTrained = match settings.train {
        Train::All => |_| true,
        Train::Head => is_on_top,
    };
    let (varmap, sparse) = (VarMap::new(), settings.sparse_embeddings.is_some());
    let fresh = (random(settings.seed, Stream::Weights), config.initializer_range);
    let types = (settings.dtype.dtype(), &device);
    let mut weights = Weights::new(args.model.as_deref(), &varmap, types, fresh, is_trained)?;
    let model = Classifier::new(&config, data.labels.len(), (sparse, keep_classifier), &mut weights)?;
    report::model(args.model.as_deref(), &config, &weights.fresh);

    let length = Length::new(settings, train.len());
    let model_is = (config.num_hidden_layers, args.model.is_some());
    let optimizer = optim::adamax(settings, &varmap, is_trained, length, model_is)?;
    report::optimizer(&optimizer, length);

    let progress = Progress::new(settings, &config, tokenizer::fingerprint(train.iter().chain(&test)));
    let ids = if sparse { Device::Cpu } else { device.clone() };
    let trainer = Trainer {
        settings: settings.clone(),
        model,
        varmap,
        optimizer,
        batcher: Batcher { padding: config.padding(), device, ids },
        train,
        test,
        labels: data.labels.len(),
        length,
        laps: Laps::default(),
        gradient_bytes: [].into(),
        order: None,
    };
    Ok(Setup { data, tokenizer, config, trainer, progress })
}
