//! Training: a model, its optimizer, and one step after another.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_adamax::Adamax;
use candle_core::backprop::GradStore;
use candle_nn::{Optimizer, VarMap, loss};
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
    /// An epoch, and its batches.
    pub(crate) order: Option<(usize, Vec<Vec<usize>>)>,
}

/// How many steps there are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Length {
    pub(crate) steps: usize,
    pub(crate) steps_per_epoch: usize,
}

impl Length {
    /// Of `texts`. Batches at the end of an epoch that are too few for a step are left out.
    pub(crate) fn new(settings: &Settings, texts: usize) -> Result<Self> {
        let batches = texts.div_ceil(settings.batch);
        let steps_per_epoch = batches / settings.accumulate;
        ensure!(
            steps_per_epoch > 0,
            "--accumulate: expected at most the {batches} batches of an epoch, got {}",
            settings.accumulate
        );
        let steps = (steps_per_epoch * settings.epochs).min(settings.max_steps.unwrap_or(usize::MAX));
        Ok(Self { steps, steps_per_epoch })
    }
}

/// How often the loss scale is halved for one batch: from its first value, 2^16, to far below 1.
const HALVINGS: usize = 24;

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Step {
    /// The mean cross-entropy of its texts, before they were trained on.
    pub(crate) loss: f64,
    /// The learning rate of the head.
    pub(crate) lr: f64,
    /// The norm of all gradients together, before it was clipped.
    pub(crate) norm: Option<f64>,
}

impl Trainer {
    /// Step `step`, counted from 0: its batches, and the update.
    pub(crate) fn step(&mut self, step: usize) -> Result<Step> {
        let (epoch, first) = (step / self.length.steps_per_epoch, step % self.length.steps_per_epoch);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let rng = &mut random(self.settings.seed, Stream::Epoch(epoch));
            self.order = Some((epoch, batch::epoch(&self.train, self.settings.batch, rng)));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, batches)| batches);
        let accumulate = self.settings.accumulate;
        let batches: Vec<Vec<usize>> = order.iter().skip(first * accumulate).take(accumulate).cloned().collect();

        let rng = &mut random(self.settings.seed, Stream::Dropout(step));
        let mut losses = 0.0;
        for texts in &batches {
            let mut loss = self.train_on(step, texts, rng)?;
            // The scale of f16's losses is searched from above: a batch whose gradients overflow goes again, with half of it. So
            // every step has all of its batches, and the update comes with the last of them.
            for _ in 0..HALVINGS {
                if !self.optimizer.report().skipped() {
                    break;
                }
                loss = self.train_on(step, texts, rng)?;
            }
            let is_skipped = self.optimizer.report().skipped();
            ensure!(
                !is_skipped,
                "the gradients are not finite in step {}, at any loss scale: try a lower --lr",
                step + 1
            );
            losses += loss;
        }
        let report = self.optimizer.report();
        Ok(Step { loss: losses / batches.len() as f64, lr: report.lr(), norm: report.total_norm() })
    }

    /// One batch of step `step`: its loss, and a call of the optimizer.
    fn train_on(&mut self, step: usize, texts: &[usize], rng: &mut StdRng) -> Result<f64> {
        let start = Instant::now();
        let texts: Vec<&Encoded> = texts.iter().map(|&index| &self.train[index]).collect();
        let batch = self.batcher.batch(&texts)?;
        let batched = Instant::now();
        let loss = loss::cross_entropy(&self.model.forward(&batch, Pass::Training(rng))?, &batch.labels)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        ensure!(value.is_finite(), "the loss is {value} in step {}: try a lower --lr", step + 1);
        let forwarded = Instant::now();
        let grads = self.optimizer.scale(&loss)?.backward()?;
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
