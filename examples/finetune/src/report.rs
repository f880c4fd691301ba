//! What is printed.

use std::path::Path;
use std::time::Duration;

use candle_adamax::Adamax;

use crate::data::Data;
use crate::evaluate::Evaluation;
use crate::memory::{Memory, PARTS};
use crate::model::{Config, Pooling};
use crate::program::grouped;
use crate::progress::Progress;
use crate::settings::Settings;
use crate::train::Length;

/// What there is to train on.
pub(crate) fn data(path: Option<&Path>, data: &Data) {
    let source = path.map_or("lines of the crate's own files".to_owned(), |path| path.display().to_string());
    let Data { labels, train, test, repeated, ambiguous } = data;
    println!("{} texts to train on, {} to test with: {source}", grouped(train.len()), grouped(test.len()));
    let left_out: Vec<String> = [(*repeated, "repeated"), (*ambiguous, "of several classes")]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, why)| format!("{} {why}", grouped(count)))
        .collect();
    if !left_out.is_empty() {
        println!("left out: {}", left_out.join(", "));
    }
    let counts = data.counts(train).into_iter().zip(data.counts(test));
    let classes: Vec<String> =
        labels.iter().zip(counts).map(|(label, (train, test))| format!("{label} {train} + {test}")).collect();
    println!("classes: {}", classes.join(", "));
}

/// What is trained.
pub(crate) fn model(path: Option<&Path>, config: &Config, fresh: &[String]) {
    let source = path.map_or("fresh weights".to_owned(), |path| path.display().to_string());
    println!(
        "an encoder of {} layers of {}, {} words, {}: {source}",
        config.num_hidden_layers,
        config.hidden_size,
        grouped(config.vocab_size),
        match config.pooling() {
            Pooling::Cls => "the first token is classified",
            Pooling::Mean => "the mean of the tokens is classified",
        }
    );
    if path.is_some() && !fresh.is_empty() {
        println!("not in the model, so fresh: {}", fresh.join(", "));
    }
}

/// How it is trained.
pub(crate) fn optimizer(optimizer: &Adamax, length: Length) {
    println!("{optimizer}");
    println!(
        "{} steps of {} texts, {} to an epoch\n",
        grouped(length.steps),
        grouped(length.texts),
        grouped(length.steps_per_epoch)
    );
}

pub(crate) fn evaluation_header() {
    println!(
        "{:>6}  {:>6}  {:>8}  {:>10}  {:>9}  {:>8}  {:>7}",
        "step", "epoch", "lr", "train loss", "test loss", "accuracy", "time"
    );
}

/// One line an evaluation; one of an earlier run has no `time`.
pub(crate) fn evaluation(progress: &Progress, index: usize, length: Length, time: Option<Duration>) {
    let Evaluation { step, loss, .. } = progress.evaluations[index];
    let before = index.checked_sub(1).map_or(0, |before| progress.evaluations[before].step);
    let steps = &progress.steps[before..step];
    let texts: usize = steps.iter().map(|step| step.texts).sum();
    let train = steps.iter().map(|step| step.loss * step.texts as f64).sum::<f64>() / texts as f64;
    let lr = steps.last().map_or(0.0, |step| step.lr);
    let time = time.map_or("earlier".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()));
    println!(
        "{step:>6}  {:>6.2}  {lr:>8.1e}  {train:>10.4}  {loss:>9.4}  {:>8.4}  {time:>7}",
        step as f64 / length.steps_per_epoch as f64,
        progress.evaluations[index].accuracy(),
    );
}

/// The result: which classes were taken for which.
pub(crate) fn confusion(data: &Data, evaluation: &Evaluation) {
    let width = data.labels.iter().map(|label| label.chars().count()).max().unwrap_or(0).clamp(8, 24);
    let name = |label: &str| label.chars().take(width).collect::<String>();
    print!("\n{:<width$}", "");
    data.labels.iter().for_each(|label| print!("  {:>width$}", name(label)));
    println!("  {:>8}", "found");
    for (class, row) in evaluation.confusion.iter().enumerate() {
        print!("{:<width$}", name(&data.labels[class]));
        row.iter().for_each(|count| print!("  {:>width$}", grouped(*count)));
        println!("  {:>6.1} %", 100.0 * row[class] as f64 / row.iter().sum::<usize>() as f64);
    }
    println!(
        "\naccuracy {:.4} after {} steps; of always naming the largest class {:.4}",
        evaluation.accuracy(),
        grouped(evaluation.step),
        data.largest_class()
    );
}

/// What is kept in memory, beside the activations.
pub(crate) fn memory(settings: &Settings, parts: &[Memory], total: &Memory) {
    let kib = |bytes: usize| format!("{} KiB", grouped(bytes.div_ceil(1024)));
    println!("\n{:<24}  {:>12}  {:>12}  {:>12}  {:>12}", "memory", "numbers", "weights", "gradients", "optimizer");
    let lines = PARTS.into_iter().zip(parts).chain([("together", total)]);
    for (name, Memory { numbers, weights, gradients, moments }) in lines {
        let [weights, gradients, moments] = [*weights, *gradients, *moments].map(kib);
        println!("{name:<24}  {:>12}  {weights:>12}  {gradients:>12}  {moments:>12}", grouped(*numbers));
    }
    if settings.accumulate > 1 {
        println!("With --accumulate the optimizer also keeps the sums of gradients, in f32.");
    }
}
