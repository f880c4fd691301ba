//! The learning curves, as an SVG file of four panels: loss, accuracy, learning rate, norm of the gradients.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::checkpoint::Progress;
use crate::evaluate::Evaluation;
use crate::train::{Length, Step};

const BLUE: RGBColor = RGBColor(31, 105, 173);
const ORANGE: RGBColor = RGBColor(217, 104, 28);
const PALE_ORANGE: RGBColor = RGBColor(244, 208, 184);
const GRAY: RGBColor = RGBColor(120, 128, 138);
const TEXT: RGBColor = RGBColor(51, 56, 62);
const GRID: RGBColor = RGBColor(228, 231, 235);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// One line of a panel.
struct Curve {
    /// Empty for one that the legend leaves out.
    label: &'static str,
    color: RGBColor,
    look: Look,
    /// Epochs and values.
    points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Look {
    Thin,
    Thick,
    /// Thick, with a dot at each point.
    Dotted,
    Dashed,
}

struct Panel {
    title: &'static str,
    unit: &'static str,
    range: (f64, f64),
    /// How its values are written.
    written: fn(&f64) -> String,
    curves: Vec<Curve>,
}

/// Draws the curves of a run into the file `path`; `largest_class` is the accuracy that needs no model.
pub(crate) fn draw(path: &Path, progress: &Progress, length: Length, largest_class: f64) -> Result<()> {
    let epoch = |step: usize| step as f64 / length.steps_per_epoch as f64;
    let last = epoch(length.steps);
    let panels = panels(progress, epoch, last, largest_class);
    let draw = || -> Drawn {
        let root = SVGBackend::new(path, (1440, 1060)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((2, 2)).iter().zip(&panels) {
            draw_panel(area, panel, last)?;
        }
        root.present()
    };
    draw().with_context(|| format!("cannot write {}", path.display()))
}

fn panels(progress: &Progress, epoch: impl Fn(usize) -> f64, last: f64, largest_class: f64) -> [Panel; 4] {
    let of_steps = |value: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        let values = progress.steps.iter().enumerate();
        values.filter_map(|(index, step)| Some((epoch(index + 1), value(step)?))).collect()
    };
    let losses = of_steps(|step| Some(step.loss));
    let norms = of_steps(|step| step.norm);
    let tests = |value: fn(&Evaluation) -> f64| -> Vec<(f64, f64)> {
        progress.evaluations.iter().map(|evaluation| (epoch(evaluation.step), value(evaluation))).collect()
    };
    let curve = |label, color, look, points| Curve { label, color, look, points };
    let from_zero = |curves: &[Curve]| (0.0, 1.05 * values(curves).fold(1e-9, f64::max));
    let loss = vec![
        curve("", PALE_ORANGE, Look::Thin, losses.clone()),
        curve("train, smoothed", ORANGE, Look::Thick, smoothed(&losses)),
        curve("test", BLUE, Look::Dotted, tests(|evaluation| evaluation.loss)),
    ];
    let accuracy = vec![
        curve("test", BLUE, Look::Dotted, tests(Evaluation::accuracy)),
        curve("largest class", GRAY, Look::Dashed, vec![(0.0, largest_class), (last, largest_class)]),
    ];
    let lr = vec![curve("", BLUE, Look::Thick, of_steps(|step| Some(step.lr)))];
    let norm = vec![
        curve("", PALE_ORANGE, Look::Thin, norms.clone()),
        curve("smoothed", ORANGE, Look::Thick, smoothed(&norms)),
    ];
    // A whole tenth below all of them.
    let lowest = (10.0 * values(&accuracy).fold(1.0, f64::min)).floor() / 10.0;
    [
        Panel {
            title: "Loss: lower is better",
            unit: "cross-entropy",
            range: from_zero(&loss),
            written: |loss| format!("{loss:.2}"),
            curves: loss,
        },
        Panel {
            title: "Accuracy: higher is better",
            unit: "share of the test",
            range: (lowest, 1.0),
            written: |accuracy| format!("{accuracy:.2}"),
            curves: accuracy,
        },
        Panel {
            title: "Learning rate",
            unit: "of the head",
            range: from_zero(&lr),
            written: |lr| format!("{lr:.1e}"),
            curves: lr,
        },
        Panel {
            title: "Norm of the gradients before clipping",
            unit: "L2, all together",
            range: from_zero(&norm),
            written: |norm| format!("{norm:.1}"),
            curves: norm,
        },
    ]
}

/// The values of all points.
fn values(curves: &[Curve]) -> impl Iterator<Item = f64> {
    curves.iter().flat_map(|curve| &curve.points).map(|&(_, value)| value)
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

/// Draws a title, a legend that no curve can run into, and the curves.
fn draw_panel(area: &Area<'_>, panel: &Panel, last: f64) -> Drawn {
    let (head, plot) = area.split_vertically(96);
    let title = ("sans-serif", 26).into_font().style(FontStyle::Bold).color(&TEXT);
    head.draw(&Text::new(panel.title, (92, 24), title))?;
    let mut x = 92;
    for curve in panel.curves.iter().filter(|curve| !curve.label.is_empty()) {
        let sample = [(x, 74), (x + 34, 74)];
        if curve.look == Look::Dashed {
            head.draw(&DashedPathElement::new(sample, 8, 5, curve.color.stroke_width(2)))?;
        } else {
            head.draw(&PathElement::new(sample, curve.color.stroke_width(3)))?;
        }
        if curve.look == Look::Dotted {
            head.draw(&Circle::new((x + 17, 74), 5, curve.color.filled()))?;
        }
        head.draw(&Text::new(curve.label, (x + 42, 66), ("sans-serif", 20).into_font().color(&TEXT)))?;
        // Nobody knows yet how wide the text will be; the letters of common fonts are about 10 wide at this size.
        x += 66 + 10 * curve.label.len() as i32;
    }

    let (low, high) = panel.range;
    let mut chart = ChartBuilder::on(&plot)
        .margin_left(16)
        .margin_right(28)
        .margin_bottom(16)
        .x_label_area_size(56)
        .y_label_area_size(84)
        .build_cartesian_2d(0.0..last, low..high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRAY)
        .x_labels(8)
        .y_labels(6)
        .x_label_formatter(&|epoch| format!("{epoch}"))
        .y_label_formatter(&panel.written)
        .label_style(("sans-serif", 19).into_font().color(&TEXT))
        .axis_desc_style(("sans-serif", 21).into_font().color(&TEXT))
        .x_desc("epoch")
        .y_desc(panel.unit)
        .draw()?;
    for Curve { color, look, points, .. } in &panel.curves {
        match look {
            Look::Thin => chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(1)))?,
            Look::Thick | Look::Dotted => {
                chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(3)))?
            }
            Look::Dashed => {
                let line = DashedLineSeries::new(points.iter().copied(), 8, 5, color.stroke_width(2));
                chart.draw_series(line)?
            }
        };
        if *look == Look::Dotted {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, color.filled())))?;
        }
    }
    Ok(())
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
