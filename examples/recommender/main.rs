//! A neural recommender, trained with Adamax.
//!
//! ```text
//! cargo run --release --example recommender                             ratings that the example makes up
//! cargo run --release --example recommender -- --data ml-100k/u.data    MovieLens, in any of its three forms
//! cargo run --release --example recommender -- --items 1000000          a million items, most of them never rated
//! cargo run --release --example recommender -- --dense                  with candle's own embeddings
//! cargo run --release --example recommender -- --state q8               moments of 2 bytes a weight
//! cargo run --release --example recommender -- --sparse exact           rows move as in dense tables
//! cargo run --release --features cuda --example recommender -- --device cuda
//! cargo run --release --example recommender -- --help                   all options
//! ```
//!
//! **The task** has two halves: which rating will a user give to an item, and which item will they turn to next? A
//! model that has only learned the first does not know the second: it has seen nothing but items that somebody chose,
//! and what it rates highest is often what nobody looks at. So one model has two heads, which share everything below
//! them, and both losses are minimized at once by one optimizer:
//!
//! ```text
//! loss = mean (rating - predicted rating)^2                         over the ratings of a batch
//!      + 0.7 * binary cross-entropy (chosen or not, logit)          over the same, and 4 unrated items to each
//! ```
//!
//! The second half is the sampled loss of He et al., "Neural Collaborative Filtering" (2017). Sharing pays: what people
//! choose says much about how they rate. On MovieLens 100K the error of the ratings is 0.905 with the second half, and
//! 0.924 without it.
//!
//! **The evaluation** follows the same paper where it ranks: each user's latest rating is kept out of training, and its
//! item is ranked among 99 that the user has never rated. HR@10 is the share of users for whom it is among the first
//! ten, NDCG@10 gives more for a higher place. The baseline ranks the same candidates by how often they occur in the
//! training data. For the error of ratings (RMSE) a random tenth of them is kept out, too; the baseline there is the
//! mean with an offset for each user and item. What the table says is said of the last epoch, and no epoch is chosen
//! by looking at the results.
//!
//! **A run can be killed** at any moment, and the same command with `--resume` ends with the same bits as one that
//! was left alone. See `progress.rs` for what this takes.
//!
//! | file | what it does |
//! | --- | --- |
//! | `settings.rs` | the options, and the optimizer's settings that follow from them |
//! | `data.rs`, `form.rs`, `synthetic.rs` | ratings, read from a file or made up |
//! | `split.rs` | what is trained on and what is kept for the evaluation |
//! | `model.rs` | embeddings, MLP, two heads |
//! | `train.rs` | one epoch: batches, loss, step; `examples/throughput` times it, too |
//! | `compare.rs` | the time of a step, with the rows of its batch and with dense tables |
//! | `evaluate.rs` | RMSE, HR@10, NDCG@10, and the baselines |
//! | `progress.rs`, `../common/checkpoints.rs` | weights and optimizer, together or not at all |
//! | `random.rs` | a stream of random numbers for each purpose |
//! | `report.rs`, `curves.rs` | what is printed, and the learning curves |
//! | `../common/` | what other programs have, too: the device, options, files, progress, charts, times |

#[path = "../common/bar.rs"]
mod bar;
#[path = "../common/chart.rs"]
mod chart;
#[path = "../common/checkpoints.rs"]
mod checkpoints;
mod compare;
mod curves;
mod data;
#[path = "../common/device.rs"]
mod device;
mod evaluate;
#[path = "../common/files.rs"]
mod files;
mod form;
#[path = "../common/laps.rs"]
mod laps;
mod model;
#[path = "../common/options.rs"]
mod options;
#[path = "../common/program.rs"]
mod program;
mod progress;
mod random;
mod report;
mod settings;
mod split;
mod synthetic;
#[path = "../common/text.rs"]
mod text;
mod train;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;

use crate::bar::Bar;
use crate::checkpoints::Checkpoints;
use crate::data::Ratings;
use crate::evaluate::{Baselines, Epoch};
use crate::progress::Progress;
use crate::random::{Stream, random};
use crate::report::Times;
use crate::settings::Args;
use crate::split::Split;
use crate::train::Trainer;

fn main() -> ExitCode {
    let args = Args::parse();
    program::start(Some(args.threads), || run(&args))
}

fn run(args: &Args) -> Result<()> {
    let (begin, mut spent) = (Instant::now(), Times::default());
    let settings = &args.settings;
    let device = settings.device.open()?;
    let ratings = match &args.data {
        Some(path) => Ratings::read(path)?,
        None => synthetic::ratings(synthetic::USERS, args.items.unwrap_or(synthetic::ITEMS)),
    };
    let split = Split::new(&ratings, &mut random(settings.seed, Stream::Split))?;
    let baselines = Baselines::new(&ratings, &split);
    report::data(args.data.as_deref(), &ratings, &split);

    let mut trainer = Trainer::new(settings, &device, &ratings, &split)?;
    let mut checkpoints = Checkpoints::new(&args.out);
    let mut progress = Progress::new(settings, &ratings);
    if args.resume {
        progress = progress.resume(&checkpoints, &mut trainer.varmap, &mut trainer.optimizer)?;
        println!("resumed after epoch {} from {}", progress.history.len(), args.out.display());
    }
    println!("{}\n", trainer.optimizer);

    let done = progress.history.len();
    let steps = trainer.steps_per_epoch as u64;
    let bar = Bar::new(40, ("steps", "ratings"), steps.saturating_mul(settings.epochs as u64), steps * done as u64)?;
    report::epoch_header();
    progress.history.iter().for_each(|epoch| report::epoch(epoch, None));
    for epoch in done + 1..=settings.epochs {
        let start = Instant::now();
        let train_rmse = trainer.epoch(epoch, &bar)?;
        bar.speak();
        let trained = Instant::now();
        let lr = trainer.last_lr();
        progress.history.push(Epoch { epoch, lr, train_rmse, quality: trainer.evaluate()? });
        let times = Times { training: trained - start, evaluation: trained.elapsed() };
        spent.training += times.training;
        spent.evaluation += times.evaluation;
        checkpoints.save(&progress, &trainer.varmap, &trainer.optimizer)?;
        bar.suspend(|| report::epoch(&progress.history[epoch - 1], Some(times)));
    }
    bar.finish();
    checkpoints.finish()?;

    let mut quality = progress.history.last().context("there is no epoch to report")?.quality;
    if settings.ema.is_some() {
        // From here on the weights are their moving averages; the checkpoint still holds both.
        trainer.optimizer.finalize_ema()?;
        quality = trainer.evaluate()?;
    }
    report::quality(&baselines, quality, settings.ema);
    trainer.laps.print("", 30);
    report::comparison(compare::compare(settings, &device, &ratings, &split)?);
    report::memory(&trainer.optimizer, &trainer.varmap)?;
    let curves = args.out.join("learning-curves.svg");
    curves::draw_all(&curves, &progress.history, &baselines)?;
    report::time(spent, begin.elapsed());
    println!("\nlearning curves: {}", curves.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use anyhow::ensure;

    use super::*;

    /// Runs the example on a small file of ratings in `folder`.
    fn train(folder: &Path, out: &str, options: &[&str]) -> Result<()> {
        let data = folder.join("u.data");
        if !data.exists() {
            // 30 users with 8 ratings each.
            let line = |i| format!("{}\t{}\t{}\t{i}\n", i / 8, 3 * (i % 8) + i / 8 % 3, 1 + i % 5);
            fs::write(&data, (0..240).map(line).collect::<String>())?;
        }
        let (data, out) = (data.display().to_string(), folder.join(out).display().to_string());
        let always = ["recommender", "--batch", "32", "--dim", "4", "--hidden", "4", "--data", &data, "--out", &out];
        run(&Args::try_parse_from(always.iter().chain(options))?)
    }

    #[test]
    fn a_resumed_run_has_the_bits_of_an_unbroken_one() -> Result<()> {
        resume("rows", &["--schedule", "exponential", "--clip-norm", "1"])?;
        resume("exact", &["--schedule", "exponential", "--sparse", "exact", "--state", "q8"])?;
        resume("dense", &["--schedule", "exponential", "--clip-norm", "1", "--dense", "--ema", "0.9"])
    }

    fn resume(name: &str, options: &[&'static str]) -> Result<()> {
        let folder = std::env::temp_dir().join(format!("candle-adamax-recommender-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let epochs = |number, more: &[&'static str]| [options, &["--epochs", number], more].concat();

        train(&folder, "unbroken", &epochs("3", &[]))?;
        train(&folder, "resumed", &epochs("1", &[]))?;
        // What a process leaves behind that was killed while it wrote.
        fs::create_dir(folder.join("resumed/checkpoint-2.partial"))?;
        fs::write(folder.join("resumed/checkpoint-2.partial/weights.safetensors"), "incomplete")?;
        train(&folder, "resumed", &epochs("3", &["--resume"]))?;

        for file in
            ["checkpoint-3/weights.safetensors", "checkpoint-3/optimizer.safetensors", "checkpoint-3/progress.json"]
        {
            let read = |out: &str| fs::read(folder.join(out).join(file));
            ensure!(read("unbroken")? == read("resumed")?, "{file} differs");
        }
        ensure!(fs::read_dir(folder.join("resumed"))?.count() == 2, "expected one checkpoint and the curves");

        #[cfg(unix)]
        for file in ["learning-curves.svg", "checkpoint-3/weights.safetensors", "checkpoint-3/progress.json"] {
            use std::os::unix::fs::PermissionsExt;
            // The mode of a file that nobody asked to be private.
            let mode = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.permissions().mode());
            let (got, expected) = (mode(&folder.join("resumed").join(file))?, mode(&folder.join("u.data"))?);
            ensure!(got == expected, "{file} has the mode {got:o}, and the umask gives {expected:o}");
        }

        // A learning rate that does not depend on the number of epochs goes on for more of them.
        train(&folder, "resumed", &epochs("4", &["--resume"]))?;
        train(&folder, "longer", &epochs("4", &[]))?;
        let weights = |out: &str| fs::read(folder.join(out).join("checkpoint-4/weights.safetensors"));
        ensure!(weights("resumed")? == weights("longer")?, "more epochs are not those of a longer run");
        let error = train(&folder, "resumed", &epochs("3", &["--resume"])).expect_err("fewer epochs");
        ensure!(format!("{error:#}").contains("--epochs 4, and this one has --epochs 3"), "{error:#}");

        let error = train(&folder, "resumed", &epochs("4", &["--resume", "--seed", "2"])).expect_err("another seed");
        ensure!(format!("{error:#}").contains("--seed 1, and this one has --seed 2"), "{error:#}");
        let error = train(&folder, "nowhere", &epochs("3", &["--resume"])).expect_err("no checkpoint");
        ensure!(format!("{error:#}").contains("there is no checkpoint"), "{error:#}");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_a_gpu_is_refused() -> Result<()> {
        let error = run(&Args::try_parse_from(["recommender", "--device", "cuda"])?).expect_err("no feature");
        ensure!(format!("{error:#}").contains("built without the feature `cuda`"), "{error:#}");
        Ok(())
    }
}
