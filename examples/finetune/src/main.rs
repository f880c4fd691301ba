//! Fine-tunes a BERT encoder for text classification with Adamax; README.md beside `Cargo.toml` says what to do with it.
//!
//! | file | what it does |
//! | --- | --- |
//! | `settings.rs` | the options of the command line |
//! | `setup.rs` | what they ask for: texts, tokenizer, model, optimizer |
//! | `data/` | texts and their classes, from a file or from the crate's own tree; the split |
//! | `tokenizer.rs`, `batch.rs` | texts become numbers, and batches of about the same length |
//! | `model/` | the encoder with a backward pass for every part, and its weights by name |
//! | `optim.rs` | the optimizer's settings: warm-up and decay, a group for each layer |
//! | `train.rs` | one step: batches, loss, gradients, update |
//! | `evaluate.rs` | loss and accuracy on the texts that were kept |
//! | `progress.rs`, `../../common/checkpoints.rs` | weights, optimizer and progress, together or not at all |
//! | `memory.rs`, `report.rs`, `curves.rs` | what is kept in memory, what is printed, the learning curves |
//! | `../../common/` | what other programs have, too: the device, options, files, progress, charts, times |

#[path = "../../common/bar.rs"]
mod bar;
mod batch;
#[path = "../../common/chart.rs"]
mod chart;
#[path = "../../common/checkpoints.rs"]
mod checkpoints;
mod curves;
mod data;
#[path = "../../common/device.rs"]
mod device;
mod evaluate;
#[path = "../../common/files.rs"]
mod files;
#[path = "../../common/laps.rs"]
mod laps;
mod memory;
mod model;
mod optim;
#[path = "../../common/options.rs"]
mod options;
#[path = "../../common/program.rs"]
mod program;
mod progress;
mod report;
mod settings;
mod setup;
#[cfg(test)]
mod tests;
#[path = "../../common/text.rs"]
mod text;
mod tokenizer;
mod train;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rand::rngs::StdRng;

use crate::bar::Bar;
use crate::checkpoints::Checkpoints;
use crate::settings::Args;
use crate::setup::{Setup, setup};
use crate::train::Step;

fn main() -> ExitCode {
    let args = Args::parse();
    program::start(args.threads(), || run(&args))
}

fn run(args: &Args) -> Result<()> {
    let settings = &args.settings;
    if let (Some(model), true) = (&args.model, args.out.exists()) {
        let same = model.canonicalize().is_ok_and(|model| args.out.canonicalize().is_ok_and(|out| out == model));
        ensure!(!same, "--out: expected another folder than that of --model, which would be overwritten");
    }
    let Setup { data, tokenizer, config, mut trainer, mut progress } = setup(args)?;
    let (mut checkpoints, length) = (Checkpoints::new(&args.out), trainer.length);
    if args.resume {
        let check = |saved: &_| progress.check_continues(saved);
        let saved = checkpoints.load(check, &mut trainer.varmap, &mut trainer.optimizer)?;
        progress = progress.resumed(saved);
        println!("resumed after step {} from {}", progress.steps.len(), args.out.display());
    }

    let bar = Bar::new(30, ("steps", "texts"), length.steps as u64, progress.steps.len() as u64)?;
    report::evaluation_header();
    (0..progress.evaluations.len()).for_each(|index| report::evaluation(&progress, index, length, None));
    let every = settings.evaluate_every.unwrap_or(length.steps_per_epoch);
    let last = args.stop_after.unwrap_or(length.steps).min(length.steps);
    let mut start = Instant::now();
    for done in progress.steps.len() + 1..=last {
        let step = trainer.step(done - 1)?;
        progress.steps.push(step);
        bar.advance(step.texts, message(&step));
        if done.is_multiple_of(length.steps_per_epoch) || done == last {
            bar.speak();
        }
        if done.is_multiple_of(every) || done == length.steps {
            progress.evaluations.push(trainer.evaluate(done)?);
            let index = progress.evaluations.len() - 1;
            bar.suspend(|| report::evaluation(&progress, index, length, Some(start.elapsed())));
            start = Instant::now();
        } else if done != last {
            continue;
        }
        checkpoints.save(&progress, &trainer.varmap, &trainer.optimizer)?;
    }
    bar.finish();
    checkpoints.finish()?;
    if progress.steps.len() < length.steps {
        println!("\nstopped after step {}: --resume goes on from {}", progress.steps.len(), args.out.display());
        return Ok(());
    }

    let evaluation = progress.evaluations.last().context("there is no evaluation to report")?;
    report::confusion(&data, evaluation);
    trainer.laps.print("a batch", 24);
    let (parts, total) = memory::measure(&trainer.varmap, &trainer.optimizer, &trainer.gradient_bytes)?;
    report::memory(settings, &parts, &total);

    fs::create_dir_all(&args.out)?;
    trainer.optimizer.catch_up()?;
    model::save_weights(&trainer.varmap, &args.out)?;
    config.save(&args.out, settings.dtype.torch())?;
    tokenizer::save(&tokenizer, &args.out)?;
    let curves = args.out.join("learning-curves.svg");
    curves::draw_all(&curves, &progress, length, data.largest_class())?;
    println!("\nmodel: {}, learning curves: {}", args.out.display(), curves.display());
    Ok(())
}

/// What the progress bar says of a step.
fn message(step: &Step) -> String {
    let norm = step.norm.map_or(String::new(), |norm| format!(", gradient norm {norm:.2}"));
    format!("loss {:.3}, lr {:.1e}{norm}", step.loss, step.lr)
}

/// What random numbers are for. Each purpose has a stream of its own, and each epoch and step, so that they draw the
/// same numbers whether or not those before them ran in the same process.
#[derive(Clone, Copy)]
enum Stream {
    Split,
    Weights,
    Epoch(usize),
    Dropout(usize),
}

/// The random numbers of one purpose.
fn random(seed: u64, stream: Stream) -> StdRng {
    let (purpose, number) = match stream {
        Stream::Split => (0, 0),
        Stream::Weights => (1, 0),
        Stream::Epoch(epoch) => (2, epoch as u64),
        Stream::Dropout(step) => (3, step as u64),
    };
    program::random(&[seed, purpose, number])
}
