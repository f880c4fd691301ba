//! The training step of the example `recommender`: batch, forward, backward and step, with the rows of its batch and
//! with dense tables; and its evaluation.
//!
//! The settings are the example's own. Every step has a batch of its own, so that its rows are where training finds
//! them, in memory.

use std::mem::take;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::Device;
use clap::Parser;
use rand::{rngs::StdRng, seq::SliceRandom};
use serde::Serialize;

use crate::OURS;
use crate::data::{Rating, Ratings};
use crate::device::Place;
use crate::laps::Laps;
use crate::lines::Line;
use crate::machine::{Machine, Times};
use crate::options::at_least_one;
use crate::random::{Stream, random};
use crate::settings::{self, Settings, enough_items};
use crate::split::Split;
use crate::synthetic;
use crate::trainer::Trainer;

const DENSE: &str = "  dense tables";

/// Steps before anything is timed. They touch most of the pages of the moments.
const WARM_UP: usize = 20;
/// Steps in a round. The first is not counted: what ran before it has taken even the small weights out of the caches,
/// which does not happen in training.
const STEPS: usize = 5;

/// A user takes half a millisecond to make up.
const MOST_USERS: usize = 100_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many users there are.
    #[arg(long, default_value_t = synthetic::USERS, value_parser = number_of_users)]
    users: usize,
    /// How many items there are, such as 1000000; most of many items are never rated.
    #[arg(long, default_value_t = synthetic::ITEMS, value_parser = enough_items)]
    items: usize,
    /// Ratings in a batch; the sampled items come on top.
    #[arg(long, default_value_t = 512, value_parser = at_least_one)]
    batch: usize,
    /// Threads for matrix products and updates. Operations on elements have one, or as many as `CANDLE_NUM_THREADS`
    /// says.
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub(crate) threads: usize,
    /// How often each is timed: one evaluation, and 4 steps a round.
    #[arg(long, default_value_t = 10, value_parser = at_least_one)]
    rounds: usize,
    /// Leave dense tables out. With a million items they take a gigabyte.
    #[arg(long)]
    no_dense: bool,
}

fn number_of_users(text: &str) -> Result<usize, String> {
    match at_least_one(text)? {
        users @ ..=MOST_USERS => Ok(users),
        _ => Err(format!("expected at most {MOST_USERS}")),
    }
}

impl Args {
    /// The example's settings, but for what is an option here.
    fn settings(&self, device: Place, dense: bool) -> Result<Settings> {
        let defaults = settings::Args::try_parse_from(["recommender"])?.settings;
        Ok(Settings { device, dense, batch: self.batch, ..defaults })
    }
}

/// What is timed, in the order in which it happens; `whole` is all of a step.
const CASES: [&str; 6] = ["batch", "forward", "backward", "step", "whole", "evaluation"];

/// The times of each of the [`CASES`].
type AllTimes = [Times; CASES.len()];

/// What an epoch goes through.
struct Epoch<'a> {
    order: Vec<&'a Rating>,
    next: usize,
    batch: usize,
    rng: StdRng,
}

impl<'a> Epoch<'a> {
    fn new(split: &'a Split, settings: &Settings) -> Self {
        let mut rng = random(settings.seed, Stream::Epoch(1));
        let mut order: Vec<&Rating> = split.train.iter().collect();
        order.shuffle(&mut rng);
        Self { order, next: 0, batch: settings.batch, rng }
    }

    /// Trains on the next batch; after the last one, on the first.
    fn step(&mut self, trainer: &mut Trainer<'_>) -> Result<()> {
        let batches = self.order.chunks(self.batch);
        let batch = batches.clone().nth(self.next % batches.len()).unwrap_or_default();
        self.next += 1;
        trainer.step(batch, &mut self.rng)?;
        Ok(())
    }
}

/// Runs one round of steps and an evaluation.
fn round(trainer: &mut Trainer<'_>, epoch: &mut Epoch<'_>, times: &mut AllTimes) -> Result<()> {
    for step in 0..STEPS {
        trainer.laps = Laps::default();
        epoch.step(trainer)?;
        let Laps { batch, forward, backward, step: update } = take(&mut trainer.laps);
        let parts = [batch, forward, backward, update].map(|laps| laps.iter().map(|lap| lap.as_secs_f64() * 1e3).sum());
        let whole: f64 = parts.iter().sum();
        if step > 0 {
            times.iter_mut().zip(parts.into_iter().chain([whole])).for_each(|(times, ms)| times.ms.push(ms));
        }
    }
    let start = Instant::now();
    trainer.evaluate()?;
    times[CASES.len() - 1].ms.push(start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// What a line says of the shape.
#[derive(Clone, Copy, Serialize)]
struct Shape {
    users: usize,
    items: usize,
    dim: usize,
    batch: usize,
    /// Pairs of a user and an item in a step, or in an evaluation.
    pairs: usize,
}

/// Times all cases and prints them.
pub(crate) fn run(machine: &Machine, place: Place, args: &Args, json: bool) -> Result<()> {
    let ratings = synthetic::ratings(args.users, args.items);
    let (of_rows, of_all) = (args.settings(place, false)?, args.settings(place, true)?);
    let split = Split::new(&ratings, &mut random(of_rows.seed, Stream::Split))?;
    ensure!(
        args.batch <= split.train.len(),
        "--batch: expected at most {}, the ratings that there are to train on, got {}",
        split.train.len(),
        args.batch
    );
    let mut ours = Contender::new(&of_rows, &machine.device, &ratings, &split)?;
    let mut dense = match args.no_dense {
        true => None,
        false => Some(Contender::new(&of_all, &machine.device, &ratings, &split)?),
    };
    for _ in 0..args.rounds {
        ours.round()?;
        dense.as_mut().map_or(Ok(()), Contender::round)?;
    }

    let asked = split.test.len() + split.rankings.iter().map(|ranking| ranking.candidates.len()).sum::<usize>();
    let Settings { dim, batch, negatives, .. } = of_rows;
    let mut lines = Vec::new();
    for (index, case) in CASES.into_iter().enumerate() {
        let pairs = if case == "evaluation" { asked } else { batch * (1 + negatives) };
        let shape = Shape { users: ratings.users, items: ratings.items, dim, batch, pairs };
        let ours = &ours.times[index];
        lines.push(Line::new(machine, (case, OURS), ours, None, shape)?);
        if let Some(dense) = &dense {
            lines.push(Line::new(machine, (case, DENSE), &dense.times[index], Some(ours), shape)?);
        }
    }
    let (users, items) = (ratings.users, ratings.items);
    let head = format!("a recommender of {users} users and {items} items, batches of {batch}, {}", machine.name()?);
    Line::print_all(&lines, json, &head, "per rows")?;
    if !json {
        println!("\n{} pairs of a user and an item a step, {asked} in an evaluation", batch * (1 + negatives));
        let per_pair = |times: &Times, pairs: usize| crate::median(&times.ms) * 1e6 / pairs as f64;
        let (step, evaluation) = (&ours.times[CASES.len() - 2], &ours.times[CASES.len() - 1]);
        println!(
            "{OURS}, a pair: {:.0} ns of training, {:.0} ns of evaluation",
            per_pair(step, batch * (1 + negatives)),
            per_pair(evaluation, asked)
        );
    }
    Ok(())
}

/// One of those that take turns.
struct Contender<'a> {
    trainer: Trainer<'a>,
    epoch: Epoch<'a>,
    times: AllTimes,
}

impl<'a> Contender<'a> {
    fn new(settings: &'a Settings, device: &'a Device, ratings: &Ratings, split: &'a Split) -> Result<Self> {
        let mut trainer = Trainer::new(settings, device, ratings, split)?;
        let mut epoch = Epoch::new(split, settings);
        for _ in 0..WARM_UP {
            epoch.step(&mut trainer)?;
        }
        Ok(Self { trainer, epoch, times: AllTimes::default() })
    }

    fn round(&mut self) -> Result<()> {
        round(&mut self.trainer, &mut self.epoch, &mut self.times)
    }
}
