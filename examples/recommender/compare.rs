//! What a training step costs: with the rows of its batch, with dense tables, and candle's own way.
//!
//! The models are fresh and nobody has trained them; they are timed in turn, in one run. Their batches are those of
//! an epoch: in random order, and no batch comes twice, so that the rows of a batch are where training finds them, in
//! memory, and not in the caches of the step before.

use std::time::Instant;

use anyhow::Result;
use candle_core::Device;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand::seq::SliceRandom;

use crate::data::{Rating, Ratings};
use crate::random::{Stream, random};
use crate::settings::Settings;
use crate::split::Split;
use crate::train::Trainer;

/// The weights of a model that is compared take so many bytes at most; trained densely it takes some ten times as much.
const LIMIT: usize = 1 << 30;
/// Steps before anything is timed. They touch most of the pages of the moments.
const WARM_UP: usize = 20;
/// How often each is timed.
const ROUNDS: usize = 5;
/// Steps of rows in a round, each with a batch of its own. The first is not counted: the dense steps before it have taken
/// even the small weights out of the caches, which does not happen in training. The last batch is the dense steps', too.
const STEPS: usize = 5;

/// Median seconds of a training step: batch, forward, backward and the optimizer.
#[derive(Clone, Copy)]
pub(crate) struct Comparison {
    /// With this crate's tables and its Adamax.
    pub(crate) rows: f64,
    /// With candle's embeddings, whose gradients are dense, and this crate's Adamax.
    pub(crate) dense: f64,
    /// With candle's embeddings and candle's AdamW.
    pub(crate) candle: f64,
}

/// Times all three; none if the tables are too large for the dense ones.
pub(crate) fn compare(
    settings: &Settings,
    device: &Device,
    ratings: &Ratings,
    split: &Split,
) -> Result<Option<Comparison>> {
    let of_rows = Settings { dense: false, ema: None, ..settings.clone() };
    let of_all = Settings { dense: true, ..of_rows.clone() };
    let mut rows = Trainer::new(&of_rows, device, ratings, split)?;
    let numbers: usize = rows.varmap.all_vars().iter().map(|var| var.elem_count()).sum();
    if numbers * size_of::<f32>() > LIMIT {
        return Ok(None);
    }
    let mut dense = Trainer::new(&of_all, device, ratings, split)?;
    let mut adamw = AdamW::new(dense.varmap.all_vars(), ParamsAdamW::default())?;

    let rng = &mut random(settings.seed, Stream::Epoch(0));
    let mut order: Vec<&Rating> = split.train.iter().collect();
    order.shuffle(rng);
    let mut batches = order.chunks(settings.batch).cycle();
    for batch in batches.by_ref().take(WARM_UP) {
        rows.step(batch, rng)?;
    }
    let [mut of_rows, mut of_dense, mut of_candle] = [const { Vec::new() }; 3];
    for _ in 0..=ROUNDS {
        let mut last: &[&Rating] = &[];
        for (step, batch) in batches.by_ref().take(STEPS).enumerate() {
            let start = Instant::now();
            rows.step(batch, rng)?;
            if step > 0 {
                of_rows.push(start.elapsed().as_secs_f64());
            }
            last = batch;
        }
        let start = Instant::now();
        dense.step(last, rng)?;
        of_dense.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let drawn = dense.batch(last, rng)?;
        adamw.step(&dense.loss(&drawn)?.0.backward()?)?;
        device.synchronize()?;
        of_candle.push(start.elapsed().as_secs_f64());
    }
    // The first round of each makes its moments.
    let median = |mut seconds: Vec<f64>, per_round: usize| {
        seconds.drain(..per_round);
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    Ok(Some(Comparison { rows: median(of_rows, STEPS - 1), dense: median(of_dense, 1), candle: median(of_candle, 1) }))
}
