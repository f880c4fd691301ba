//! Training: an epoch of batches, each of a few ratings and some items that the users have not rated.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_adamax::Adamax;
use candle_core::{Device, Tensor};
use candle_nn::{VarMap, loss};
use rand::{rngs::StdRng, seq::SliceRandom};

use crate::bar::Bar;
use crate::data::{Rating, Ratings};
use crate::evaluate::{self, Quality};
use crate::laps::Laps;
use crate::model::{Prediction, Recommender};
use crate::random::{Stream, random};
use crate::settings::Settings;
use crate::split::Split;

const DIVERGED: &str = "try a lower --lr, or --clip-norm 1";

/// A model in training.
pub(crate) struct Trainer<'a> {
    settings: &'a Settings,
    device: &'a Device,
    split: &'a Split,
    pub(crate) steps_per_epoch: usize,
    model: Recommender,
    pub(crate) varmap: VarMap,
    pub(crate) optimizer: Adamax,
    pub(crate) laps: Laps,
}

/// The first of the pairs of `users` and `items` are those of `ratings`; the others have not been rated.
pub(crate) struct Batch<'a> {
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    /// What the users of `ratings` rated before.
    histories: Vec<&'a [u32]>,
}

impl<'a> Trainer<'a> {
    /// A model that knows nothing yet.
    pub(crate) fn new(settings: &'a Settings, device: &'a Device, ratings: &Ratings, split: &'a Split) -> Result<Self> {
        let mean = evaluate::mean(&split.train);
        let varmap = VarMap::new();
        let rng = &mut random(settings.seed, Stream::Weights);
        let model = Recommender::new(settings, device, (ratings.users, ratings.items), mean, &varmap, rng)?;
        let steps_per_epoch = split.train.len().div_ceil(settings.batch);
        let optimizer = Adamax::from_varmap(&varmap, settings.adamax(steps_per_epoch))?;
        Ok(Self { settings, device, split, steps_per_epoch, model, varmap, optimizer, laps: Laps::default() })
    }

    /// The learning rate of the last step.
    pub(crate) fn last_lr(&self) -> f64 {
        self.optimizer.report().lr()
    }

    /// How good the model is now, on what was kept out of training.
    pub(crate) fn evaluate(&self) -> Result<Quality> {
        let quality = evaluate::quality(&self.model, self.split, self.settings.history)?;
        ensure!(quality.test_rmse.is_finite(), "the predicted ratings are not finite: {DIVERGED}");
        Ok(quality)
    }

    /// Trains on every rating once. Returns the RMSE of the ratings, each as it was predicted before it was trained on.
    pub(crate) fn epoch(&mut self, epoch: usize, bar: &Bar) -> Result<f64> {
        let rng = &mut random(self.settings.seed, Stream::Epoch(epoch));
        let mut order: Vec<&Rating> = self.split.train.iter().collect();
        order.shuffle(rng);
        let mut squares = 0.0;
        for ratings in order.chunks(self.settings.batch) {
            let mse = self.step(ratings, rng)?;
            ensure!(mse.is_finite(), "the loss is {mse} in epoch {epoch}: {DIVERGED}");
            squares += mse * ratings.len() as f64;
            bar.advance(ratings.len(), format!("epoch {epoch}, RMSE {:.3}", mse.sqrt()));
        }
        Ok((squares / order.len() as f64).sqrt())
    }

    /// One step of the optimizer. Returns the mean squared error of the ratings.
    pub(crate) fn step(&mut self, ratings: &[&Rating], rng: &mut StdRng) -> Result<f64> {
        let start = Instant::now();
        let batch = self.batch(ratings, rng)?;
        let batched = Instant::now();
        let (loss, mse) = self.loss(&batch)?;
        let mse = mse.to_scalar::<f32>()?;
        let forwarded = Instant::now();
        let grads = loss.backward()?;
        self.device.synchronize()?;
        let differentiated = Instant::now();
        self.optimizer.step(&grads)?;
        self.device.synchronize()?;

        self.laps.batch.push(batched - start);
        self.laps.forward.push(forwarded - batched);
        self.laps.backward.push(differentiated - forwarded);
        self.laps.step.push(differentiated.elapsed());
        Ok(f64::from(mse))
    }

    /// What is minimized, and the mean squared error of the ratings, which is a part of it.
    pub(crate) fn loss(&self, batch: &Batch<'_>) -> Result<(Tensor, Tensor)> {
        let ratings = batch.ratings.elem_count();
        let prediction = self.model.forward(&batch.users, &batch.items, &batch.histories)?;
        let mse = loss::mse(&prediction.ratings.narrow(0, 0, ratings)?, &batch.ratings)?;
        let interactions = interaction_loss(&prediction, ratings)?;
        Ok(((&mse + (interactions * self.settings.interaction_weight)?)?, mse))
    }

    /// The pairs of `ratings`, followed by as many with unrated items, and again, `negatives` times.
    ///
    /// Unrated is what the training data does not have. What is kept for the evaluation may be drawn like any other
    /// item: to spare it would give it away.
    pub(crate) fn batch(&self, ratings: &[&Rating], rng: &mut StdRng) -> Result<Batch<'a>> {
        let users: Vec<u32> = ratings.iter().map(|rating| rating.user).collect();
        let mut items: Vec<u32> = ratings.iter().map(|rating| rating.item).collect();
        for _ in 0..self.settings.negatives {
            items.extend(users.iter().map(|&user| self.split.trained.draw_missing(user, rng)));
        }
        let users = users.repeat(1 + self.settings.negatives);
        let values: Vec<f32> = ratings.iter().map(|rating| rating.value).collect();
        let Self { split, settings, .. } = self;
        let history = |rating: &&Rating| split.histories.before(rating.user, rating.time, settings.history);
        Ok(Batch {
            users: self.model.ids(users)?,
            items: self.model.ids(items)?,
            ratings: Tensor::new(values, self.device)?,
            histories: ratings.iter().map(history).collect(),
        })
    }
}

/// The binary cross-entropy of "the user turned to this item", which holds for the first `positives` pairs; the sum over
/// all pairs, divided by `positives`.
///
/// With label y it is `softplus(x) - y * x` for a logit x. candle's `binary_cross_entropy_with_logit` takes logarithms
/// of rounded sigmoids, which is infinite for a logit of 20; `max(x, 0) + ln(1 + exp(-|x|))` is right for every x.
fn interaction_loss(prediction: &Prediction, positives: usize) -> candle_core::Result<Tensor> {
    let logits = &prediction.logits;
    let softplus = (logits.relu()? + (logits.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let chosen = logits.narrow(0, 0, positives)?;
    (softplus.sum_all()? - chosen.sum_all()?)? / positives as f64
}
