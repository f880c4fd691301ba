//! The learning curves, as an SVG file of two panels.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::evaluate::{Baselines, Epoch};

const BLUE: RGBColor = RGBColor(31, 105, 173);
const ORANGE: RGBColor = RGBColor(217, 104, 28);
const GRAY: RGBColor = RGBColor(120, 128, 138);
const TEXT: RGBColor = RGBColor(51, 56, 62);
const GRID: RGBColor = RGBColor(228, 231, 235);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One line of a panel.
struct Curve {
    label: &'static str,
    color: RGBColor,
    values: Values,
}

enum Values {
    /// One value an epoch, from the first on.
    Learned(Vec<f64>),
    /// The same value from beginning to end, drawn with dashes.
    Baseline(f64),
}

impl Curve {
    fn learned(label: &'static str, color: RGBColor, epochs: &[Epoch], value: fn(&Epoch) -> f64) -> Self {
        Self { label, color, values: Values::Learned(epochs.iter().map(value).collect()) }
    }

    fn baseline(label: &'static str, color: RGBColor, value: f64) -> Self {
        Self { label, color, values: Values::Baseline(value) }
    }

    /// Its points, as epoch and value.
    fn points(&self, epochs: usize) -> Vec<(usize, f64)> {
        match &self.values {
            Values::Learned(values) => (1..).zip(values.iter().copied()).collect(),
            Values::Baseline(value) => vec![(0, *value), (epochs, *value)],
        }
    }
}

/// Draws the curves of `epochs` into the file `path`.
pub(crate) fn draw(path: &Path, epochs: &[Epoch], baselines: &Baselines) -> Result<()> {
    let ratings = [
        Curve::learned("test", BLUE, epochs, |epoch| epoch.quality.test_rmse),
        Curve::learned("train", ORANGE, epochs, |epoch| epoch.train_rmse),
        Curve::baseline("mean and offsets", GRAY, baselines.test_rmse),
    ];
    let ranking = [
        Curve::learned("HR@10", BLUE, epochs, |epoch| epoch.quality.ranking.hit_rate),
        Curve::baseline("popularity", BLUE, baselines.ranking.hit_rate),
        Curve::learned("NDCG@10", ORANGE, epochs, |epoch| epoch.quality.ranking.ndcg),
        Curve::baseline("popularity", ORANGE, baselines.ranking.ndcg),
    ];
    let draw = || -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let root = SVGBackend::new(path, (1440, 600)).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, right) = root.split_horizontally(720);
        panel(&left, "Predicted ratings: lower is better", "RMSE", epochs.len(), &ratings)?;
        panel(&right, "Ranking of the item chosen next: higher is better", "mean over users", epochs.len(), &ranking)?;
        root.present()
    };
    draw().with_context(|| format!("cannot write {}", path.display()))
}

/// Draws one panel: a title, a legend that no curve can run into, and the curves.
fn panel(
    area: &Area<'_>,
    title: &str,
    unit: &str,
    epochs: usize,
    curves: &[Curve],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let (head, plot) = area.split_vertically(96);
    head.draw(&Text::new(
        title.to_owned(),
        (84, 24),
        ("sans-serif", 26).into_font().style(FontStyle::Bold).color(&TEXT),
    ))?;
    let mut x = 84;
    for curve in curves {
        let sample = [(x, 74), (x + 34, 74)];
        match curve.values {
            Values::Learned(_) => {
                head.draw(&PathElement::new(sample, curve.color.stroke_width(3)))?;
                head.draw(&Circle::new((x + 17, 74), 5, curve.color.filled()))?;
            }
            Values::Baseline(_) => {
                head.draw(&DashedPathElement::new(sample, 8, 5, curve.color.stroke_width(2)))?;
            }
        }
        head.draw(&Text::new(curve.label, (x + 42, 66), ("sans-serif", 20).into_font().color(&TEXT)))?;
        // Nobody knows yet how wide the text will be; the letters of common fonts are about 10 wide at this size.
        x += 66 + 10 * curve.label.len() as i32;
    }

    let values = || curves.iter().flat_map(|curve| curve.points(epochs)).map(|(_, value)| value);
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let margin = 0.06 * (high - low).max(1e-3);
    let mut chart = ChartBuilder::on(&plot)
        .margin_left(16)
        .margin_right(28)
        .margin_bottom(16)
        .x_label_area_size(56)
        .y_label_area_size(68)
        .build_cartesian_2d(0..epochs, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRAY)
        .x_labels(epochs.min(12) + 1)
        .y_labels(8)
        .y_label_formatter(&|value| format!("{value:.2}"))
        .label_style(("sans-serif", 19).into_font().color(&TEXT))
        .axis_desc_style(("sans-serif", 21).into_font().color(&TEXT))
        .x_desc("epoch")
        .y_desc(unit)
        .draw()?;
    for curve in curves {
        let points = curve.points(epochs);
        match curve.values {
            Values::Learned(_) => {
                chart.draw_series(LineSeries::new(points.clone(), curve.color.stroke_width(3)))?;
                chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, curve.color.filled())))?;
            }
            Values::Baseline(_) => {
                chart.draw_series(DashedLineSeries::new(points, 8, 5, curve.color.stroke_width(2)))?;
            }
        }
    }
    Ok(())
}
