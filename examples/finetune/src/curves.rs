//! The learning curves: loss, accuracy, learning rate, norm of the gradients.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::RGBColor;

use crate::chart::{BLUE, Curve, GRAY, ORANGE, Panel, draw, values};
use crate::evaluate::Evaluation;
use crate::progress::Progress;
use crate::train::{Length, Step};

const PALE_ORANGE: RGBColor = RGBColor(244, 208, 184);

/// Draws the curves of a run into the file `path`; `largest_class` is the accuracy that needs no model.
pub(crate) fn draw_all(path: &Path, progress: &Progress, length: Length, largest_class: f64) -> Result<()> {
    let epoch = |step: usize| step as f64 / length.steps_per_epoch as f64;
    let last = epoch(length.steps);
    let of_steps = |value: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        let values = progress.steps.iter().enumerate();
        values.filter_map(|(index, step)| Some((epoch(index + 1), value(step)?))).collect()
    };
    let tests = |value: fn(&Evaluation) -> f64| {
        let points = progress.evaluations.iter().map(|evaluation| (epoch(evaluation.step), value(evaluation)));
        Curve::measured("test", BLUE, points.collect())
    };
    let loss = [noisy("train, smoothed", of_steps(|step| Some(step.loss))), vec![tests(|evaluation| evaluation.loss)]];
    let accuracy = vec![tests(Evaluation::accuracy), Curve::baseline("largest class", GRAY, largest_class, last)];
    let lr = vec![line("", BLUE, 3, of_steps(|step| Some(step.lr)))];
    let norm = noisy("smoothed", of_steps(|step| step.norm));
    // A whole tenth below all of them.
    let lowest = (10.0 * values(&accuracy).fold(1.0, f64::min)).floor() / 10.0;
    let from_zero = |title, unit, written, curves: Vec<Curve>| {
        let range = (0.0, 1.05 * values(&curves).fold(1e-9, f64::max));
        Panel { title, unit, range, written, curves }
    };
    let panels = [
        from_zero(
            "Loss: lower is better",
            "cross-entropy",
            |loss| format!("{loss:.2}"),
            loss.into_iter().flatten().collect(),
        ),
        Panel {
            title: "Accuracy: higher is better",
            unit: "share of the test",
            range: (lowest, 1.0),
            written: |accuracy| format!("{accuracy:.2}"),
            curves: accuracy,
        },
        from_zero("Learning rate", "of the head", |lr| format!("{lr:.1e}"), lr),
        from_zero("Norm of the gradients before clipping", "L2, all together", |norm| format!("{norm:.1}"), norm),
    ];
    draw(path, &panels, last)
}

fn line(label: &'static str, color: RGBColor, width: u32, points: Vec<(f64, f64)>) -> Curve {
    Curve { label, color, width, dots: false, dashes: false, points }
}

/// What jumps from step to step, with what is left of it when it is smoothed.
fn noisy(label: &'static str, points: Vec<(f64, f64)>) -> Vec<Curve> {
    let smooth = smoothed(&points);
    vec![line("", PALE_ORANGE, 1, points), line(label, ORANGE, 3, smooth)]
}

/// The mean of each point and those around it, a twentieth of them all.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let around = points.len() / 40;
    let mean = |index: usize| {
        let near = &points[index.saturating_sub(around)..points.len().min(index + around + 1)];
        near.iter().map(|(_, value)| value).sum::<f64>() / near.len() as f64
    };
    points.iter().enumerate().map(|(index, &(x, _))| (x, mean(index))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smoothed_curve_keeps_its_steps_and_its_mean() {
        let points: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = smoothed(&points);
        assert_eq!(smooth.len(), 400);
        assert!(smooth.iter().zip(&points).all(|(a, b)| a.0 == b.0));
        assert!(smooth[10..390].iter().all(|(_, value)| (value - 0.5).abs() < 0.03));
        assert_eq!(smoothed(&points[..3]), points[..3]);
    }
}
