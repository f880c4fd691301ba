//! What is printed.

use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::Result;
use candle_adamax::Adamax;
use candle_nn::VarMap;

use crate::compare::Comparison;
use crate::data::Ratings;
use crate::evaluate::{Baselines, Epoch, Quality, RankingQuality};
use crate::program::grouped;
use crate::split::Split;

/// What there is to train on.
pub(crate) fn data(path: Option<&Path>, ratings: &Ratings, split: &Split) {
    let source = path.map_or("made up".to_owned(), |path| path.display().to_string());
    let Ratings { list, users, items } = ratings;
    println!("{} ratings of {} users and {} items: {source}", grouped(list.len()), grouped(*users), grouped(*items));
    println!(
        "{} to train on, {} to test the ratings, the latest of {} users to rank",
        grouped(split.train.len()),
        grouped(split.test.len()),
        grouped(split.rankings.len()),
    );
}

/// How long training and evaluation took.
#[derive(Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) training: Duration,
    pub(crate) evaluation: Duration,
}

pub(crate) fn epoch_header() {
    println!(
        "{:>5}  {:>8}  {:>10}  {:>9}  {:>6}  {:>7}  {:>8}  {:>10}",
        "epoch", "lr", "train RMSE", "test RMSE", "HR@10", "NDCG@10", "training", "evaluation"
    );
}

/// One line an epoch; one of an earlier run has no `times`.
pub(crate) fn epoch(epoch: &Epoch, times: Option<Times>) {
    let Epoch { epoch, lr, train_rmse, quality: Quality { test_rmse, ranking: RankingQuality { hit_rate, ndcg } } } =
        epoch;
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let [training, evaluation] = match times {
        Some(times) => [times.training, times.evaluation].map(seconds),
        None => ["earlier", "earlier"].map(str::to_owned),
    };
    print!("{epoch:>5}  {lr:>8.6}  {train_rmse:>10.4}  {test_rmse:>9.4}  {hit_rate:>6.4}  {ndcg:>7.4}");
    println!("  {training:>8}  {evaluation:>10}");
}

/// Where the time of the whole program went.
pub(crate) fn time(Times { training, evaluation }: Times, total: Duration) {
    let rest = total.saturating_sub(training + evaluation);
    println!();
    for (part, time) in [("training", training), ("evaluation", evaluation), ("everything else", rest)] {
        let share = 100.0 * time.as_secs_f64() / total.as_secs_f64();
        println!("{part:<30}  {:>7.2} s  {share:>6.1} %", time.as_secs_f64());
    }
}

/// The result.
pub(crate) fn quality(baselines: &Baselines, quality: Quality, ema: Option<f64>) {
    let ranking = |ranking: RankingQuality| format!("{:>8.4}  {:>8.4}", ranking.hit_rate, ranking.ndcg);
    let model = if ema.is_some() { "this model, averaged weights" } else { "this model" };
    println!("\n{:<30}  {:>9}  {:>8}  {:>8}", "", "test RMSE", "HR@10", "NDCG@10");
    println!("{:<30}  {:>9.4}", "mean and offsets", baselines.test_rmse);
    println!("{:<30}  {:>9}  {}", "popularity", "", ranking(baselines.ranking));
    println!("{model:<30}  {:>9.4}  {}", quality.test_rmse, ranking(quality.ranking));
}

/// What a training step costs with tables of rows and with dense ones.
pub(crate) fn comparison(comparison: Option<Comparison>) {
    let Some(Comparison { rows, dense, candle }) = comparison else {
        println!("\nThe tables are too large to compare with dense ones.");
        return;
    };
    println!("\n{:<30}  {:>9}  {:>8}", "a training step, all of it", "median ms", "ratio");
    for (name, seconds) in
        [("rows of the batch, Adamax", rows), ("dense tables, Adamax", dense), ("dense tables, candle's AdamW", candle)]
    {
        println!("{name:<30}  {:>9.2}  {:>8.1}", seconds * 1e3, seconds / rows);
    }
}

/// How much there is to update, and what the optimizer keeps for it.
pub(crate) fn memory(optimizer: &Adamax, varmap: &VarMap) -> Result<()> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let elements = |name: &str| vars.get(name).map_or(0, |var| var.elem_count());
    let kib = |bytes: usize| format!("{} KiB", grouped(bytes.div_ceil(1024)));
    println!("\n{:<30}  {:>9}  {:>8}  {:>8}  {:>8}", "", "numbers", "weights", "moments", "a number");
    for (part, is_mlp) in [("embeddings and biases", false), ("MLP and heads", true)] {
        let (mut numbers, mut moments) = (0, 0);
        for name in optimizer.names().filter(|name| name.starts_with("mlp") == is_mlp) {
            numbers += elements(name);
            moments += optimizer.state_bytes(name)?;
        }
        let weights = numbers * size_of::<f32>();
        let each = moments as f64 / numbers.max(1) as f64;
        println!("{part:<30}  {:>9}  {:>8}  {:>8}  {each:>6.2} B", grouped(numbers), kib(weights), kib(moments));
    }
    Ok(())
}
