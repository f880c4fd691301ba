//! A step of several batches is what one batch of all their texts would be.

use super::*;
use crate::train::Step;

/// All steps of a run without dropout, and the trained classifier.
fn steps(folder: &Folder, options: &[&str]) -> Result<(Vec<Step>, Vec<f32>)> {
    let options = [&["--dropout", "0", "--epochs", "1"], options].concat();
    let mut trainer = setup(&folder.parse("out", &options)?)?.trainer;
    let steps = (0..trainer.length.steps).map(|step| trainer.step(step)).collect::<Result<_>>()?;
    let vars = trainer.varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let classifier = vars["classifier.weight"].flatten_all()?.to_vec1()?;
    Ok((steps, classifier))
}

/// Checks that a run with `options` takes the steps of one with `batch`, up to rounding.
fn check_same(folder: &Folder, batch: &[&str], options: &[&str]) -> Result<Vec<Step>> {
    let ((expected, expected_weights), (got, weights)) = (steps(folder, batch)?, steps(folder, options)?);
    ensure!(expected.len() == got.len(), "{options:?}: {} steps, and {} of {batch:?}", got.len(), expected.len());
    let near = |a: f64, b: f64, allowed: f64| (a - b).abs() <= allowed * b.abs();
    for (index, (expected, got)) in expected.iter().zip(&got).enumerate() {
        let (norm, expected_norm) = (got.norm.unwrap_or(f64::NAN), expected.norm.unwrap_or(f64::NAN));
        let is_same = (got.texts, got.lr) == (expected.texts, expected.lr)
            && near(got.loss, expected.loss, 1e-6)
            && near(norm, expected_norm, 2e-6);
        ensure!(is_same, "step {index} of {options:?}: {got:?}, and {expected:?} of {batch:?}");
    }
    let furthest = weights.iter().zip(&expected_weights).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    ensure!(furthest < 1e-5, "{options:?}: the classifier differs by {furthest}");
    Ok(got)
}

#[test]
fn a_lone_text_counts_as_any_other() -> Result<()> {
    let folder = Folder::new("three")?;
    let texts = "a\tone\na\tanother text that is longer\nb\tthree of them\nb\tfour\nb\tand five, at last\n";
    fs::write(folder.0.join("texts.tsv"), texts)?;
    let always = ["--warmup", "0", "--test-share", "0.1"];
    let of = |batch, accumulate| [&always[..], &["--batch", batch, "--accumulate", accumulate]].concat();
    for (batch, accumulate) in [("2", "2"), ("1", "3"), ("2", "3"), ("1", "1000")] {
        let steps = check_same(&folder, &of("3", "1"), &of(batch, accumulate))?;
        ensure!(steps.len() == 1 && steps[0].texts == 3, "{steps:?}");
    }
    Ok(())
}

#[test]
fn steps_have_their_learning_rates_and_texts_however_many_batches_they_have() -> Result<()> {
    let folder = Folder::new("accumulate")?;
    for (batch, accumulate) in [("4", "2"), ("2", "4"), ("3", "3")] {
        let batches = ["--warmup", "0.25", "--batch", batch, "--accumulate", accumulate];
        let size = if batch == "3" { "9" } else { "8" };
        let steps = check_same(&folder, &["--warmup", "0.25", "--batch", size], &batches)?;
        let peak = steps.iter().map(|step| step.lr).fold(0.0, f64::max);
        ensure!(peak == 2e-3 || size == "9", "the highest learning rate is {peak}");
        ensure!(steps.iter().map(|step| step.texts).sum::<usize>() == 96, "{steps:?}");
    }
    Ok(())
}

#[test]
fn a_step_of_fewer_texts_than_calls_is_taken_too() -> Result<()> {
    let folder = Folder::new("rest")?;
    // 96 texts: five steps of 19, and one text.
    for more in [&[][..], &["--sparse-embeddings"], &["--sparse-embeddings=exact"]] {
        let of = |options: &[&'static str]| [more, options].concat();
        check_same(&folder, &of(&["--batch", "19"]), &of(&["--batch", "1", "--accumulate", "19"]))?;
    }
    Ok(())
}
