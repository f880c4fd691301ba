//! The learning curves: of predicted ratings, and of rankings.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::RGBColor;

use crate::chart::{BLUE, Curve, GRAY, ORANGE, Panel, draw, values};
use crate::evaluate::{Baselines, Epoch};

/// Draws the curves of `epochs` into the file `path`.
pub(crate) fn draw_all(path: &Path, epochs: &[Epoch], baselines: &Baselines) -> Result<()> {
    let last = epochs.len() as f64;
    let learned = |label, color, value: fn(&Epoch) -> f64| {
        Curve::measured(label, color, epochs.iter().map(|epoch| (epoch.epoch as f64, value(epoch))).collect())
    };
    let baseline = |label, color: RGBColor, value| Curve::baseline(label, color, value, last);
    let ratings = vec![
        learned("test", BLUE, |epoch| epoch.quality.test_rmse),
        learned("train", ORANGE, |epoch| epoch.train_rmse),
        baseline("mean and offsets", GRAY, baselines.test_rmse),
    ];
    let ranking = vec![
        learned("HR@10", BLUE, |epoch| epoch.quality.ranking.hit_rate),
        baseline("popularity", BLUE, baselines.ranking.hit_rate),
        learned("NDCG@10", ORANGE, |epoch| epoch.quality.ranking.ndcg),
        baseline("popularity", ORANGE, baselines.ranking.ndcg),
    ];
    let panel = |title, unit, curves: Vec<Curve>| {
        let (low, high) =
            (values(&curves).fold(f64::INFINITY, f64::min), values(&curves).fold(f64::NEG_INFINITY, f64::max));
        let margin = 0.06 * (high - low).max(1e-3);
        Panel { title, unit, range: (low - margin, high + margin), written: |value| format!("{value:.2}"), curves }
    };
    let panels = [
        panel("Predicted ratings: lower is better", "RMSE", ratings),
        panel("Ranking of the item chosen next: higher is better", "mean over users", ranking),
    ];
    draw(path, &panels, last)
}
