//! Training: a model, its optimizer, and one step after another.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use candle_adamax::Adamax;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::{VarMap, loss};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use crate::batch::{self, Batch, Batcher};
use crate::evaluate::{Evaluation, evaluate};
use crate::laps::Laps;
use crate::model::{Classifier, Pass, WORDS};
use crate::settings::Settings;
use crate::tokenizer::Encoded;
use crate::{Stream, random};

/// A model in training.
pub(crate) struct Trainer {
    pub(crate) settings: Settings,
    pub(crate) model: Classifier,
    pub(crate) varmap: VarMap,
    pub(crate) optimizer: Adamax,
    pub(crate) batcher: Batcher,
    pub(crate) train: Vec<Encoded>,
    pub(crate) test: Vec<Encoded>,
    pub(crate) labels: usize,
    pub(crate) length: Length,
    pub(crate) laps: Laps,
    /// The bytes of the gradient of each weight: the most that there were in any batch.
    pub(crate) gradient_bytes: HashMap<String, usize>,
    /// An epoch, and the texts of its steps.
    pub(crate) order: Option<(usize, Vec<Vec<usize>>)>,
}

/// How many steps there are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Length {
    pub(crate) steps: usize,
    pub(crate) steps_per_epoch: usize,
    /// Texts of a step; one of each epoch has fewer where they do not come out even.
    pub(crate) texts: usize,
    /// Batches of a step, with a call of the optimizer for each.
    pub(crate) calls: usize,
}

impl Length {
    /// The division of `all` texts.
    pub(crate) fn new(settings: &Settings, all: usize) -> Self {
        let texts = settings.batch.saturating_mul(settings.accumulate).min(all);
        let steps_per_epoch = all.div_ceil(texts);
        let steps = steps_per_epoch.saturating_mul(settings.epochs).min(settings.max_steps.unwrap_or(usize::MAX));
        Self { steps, steps_per_epoch, texts, calls: texts.div_ceil(settings.batch) }
    }
}

/// The texts of a step in `calls` batches as even as can be, each with what its mean loss counts for, where the mean over
/// the calls is to be that over the texts.
///
/// Where there are fewer texts than calls, the first one stands in for those that are missing and counts for nothing:
/// the optimizer updates on the last of its calls.
fn parts(texts: &[usize], calls: usize) -> impl Iterator<Item = (&[usize], f64)> {
    (0..calls).map(move |call| {
        let part = &texts[call * texts.len() / calls..(call + 1) * texts.len() / calls];
        let weight = (part.len() * calls) as f64 / texts.len() as f64;
        (if part.is_empty() { &texts[..1] } else { part }, weight)
    })
}

/// How often the loss scale is halved for one batch: from its first value, 2^16, to far below 1.
const HALVINGS: usize = 24;

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) texts: usize,
    /// The mean cross-entropy of its texts, before they were trained on.
    pub(crate) loss: f64,
    /// The learning rate of the head.
    pub(crate) lr: f64,
    /// The norm of all gradients together, before it was clipped.
    pub(crate) norm: Option<f64>,
}

impl Trainer {
    /// Step `step`, counted from 0: its batches, and the update.
    ///
    /// All of its texts count the same, whichever batches they are in.
    pub(crate) fn step(&mut self, step: usize) -> Result<Step> {
        let (epoch, index) = (step / self.length.steps_per_epoch, step % self.length.steps_per_epoch);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let rng = &mut random(self.settings.seed, Stream::Epoch(epoch));
            self.order = Some((epoch, batch::epoch(&self.train, self.length.texts, rng)));
        }
        let texts = self.order.as_ref().map_or(Vec::new(), |(_, steps)| steps[index].clone());

        let rng = &mut random(self.settings.seed, Stream::Dropout(step));
        let mut loss = 0.0;
        for (part, weight) in parts(&texts, self.length.calls) {
            loss += weight * self.train_until_finite(step, part, weight, rng)?;
        }
        let report = self.optimizer.report();
        let loss = loss / self.length.calls as f64;
        Ok(Step { texts: texts.len(), loss, lr: report.lr(), norm: report.total_norm() })
    }

    /// One batch of step `step`. The scale of f16's losses is searched from above: a batch whose gradients overflow goes
    /// again, with half of it. So every step has all of its batches, and the update comes with the last of them.
    fn train_until_finite(&mut self, step: usize, texts: &[usize], weight: f64, rng: &mut StdRng) -> Result<f64> {
        for _ in 0..=HALVINGS {
            let loss = self.train_on(step, texts, weight, rng)?;
            if !self.optimizer.report().skipped() {
                return Ok(loss);
            }
        }
        bail!("the gradients are not finite in step {}, at any loss scale: try a lower --lr", step + 1)
    }

    /// A call of the optimizer with the gradients of a batch's mean loss, times `weight`. Returns that loss.
    fn train_on(&mut self, step: usize, texts: &[usize], weight: f64, rng: &mut StdRng) -> Result<f64> {
        let start = Instant::now();
        let texts: Vec<&Encoded> = texts.iter().map(|&index| &self.train[index]).collect();
        let batch = self.batcher.batch(&texts)?;
        let batched = Instant::now();
        let loss = loss::cross_entropy(&self.model.forward(&batch, Pass::Training(rng))?, &batch.labels)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        ensure!(value.is_finite(), "the loss is {value} in step {}: try a lower --lr", step + 1);
        let forwarded = Instant::now();
        // Not by a plain number: candle ends the graph where that is 0.
        let weight = Tensor::new(weight as f32, loss.device())?;
        let loss = (loss * weight)?;
        let grads = self.optimizer.scale_loss(&loss)?.backward()?;
        self.batcher.device.synchronize()?;
        let differentiated = Instant::now();
        self.optimizer.step(&grads)?;
        self.batcher.device.synchronize()?;
        self.laps.step.push(differentiated.elapsed());
        self.laps.backward.push(differentiated - forwarded);
        self.laps.forward.push(forwarded - batched);
        self.laps.batch.push(batched - start);
        self.measure(&grads, &batch);
        Ok(value)
    }

    /// How good the model is after `step` steps, on what was kept out of training.
    pub(crate) fn evaluate(&self, step: usize) -> Result<Evaluation> {
        evaluate(&self.model, &self.batcher, &self.test, self.labels, step)
    }

    /// Notes how many bytes the gradients take.
    fn measure(&mut self, grads: &GradStore, batch: &Batch) {
        let vars = self.varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
        for name in self.optimizer.names() {
            let Some(var) = vars.get(name) else { continue };
            let numbers = match grads.get(var) {
                Some(grad) => grad.elem_count(),
                // A row for each token; they are in the store under another name, that of the lookup's result.
                None if name == WORDS && self.settings.sparse_embeddings.is_some() => {
                    batch.ids.elem_count() * var.elem_count() / var.dims()[0]
                }
                None => 0,
            };
            let most = self.gradient_bytes.entry(name.to_owned()).or_default();
            *most = numbers.saturating_mul(var.dtype().size_in_bytes()).max(*most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_all_calls_and_its_texts_count_the_same() {
        for (texts, calls) in [(8, 2), (7, 2), (3, 2), (3, 3), (2, 3), (1, 5), (33, 5), (9, 1)] {
            let texts: Vec<usize> = (0..texts).collect();
            let parts: Vec<(&[usize], f64)> = parts(&texts, calls).collect();
            assert_eq!(parts.len(), calls);
            let mut counts = vec![0.0; texts.len()];
            for (part, weight) in &parts {
                assert!(!part.is_empty() && part.len() <= texts.len().div_ceil(calls));
                part.iter().for_each(|&text| counts[text] += weight / (part.len() * calls) as f64);
            }
            let share = 1.0 / texts.len() as f64;
            assert!(counts.iter().all(|count| (count - share).abs() < 1e-15), "{counts:?}");
        }
        assert!(parts(&[4, 5, 6, 7], 2).all(|(part, weight)| part.len() == 2 && weight == 1.0));
    }
}
