//! The curves and the table, as an SVG file.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::task::EVERY;
use crate::{Line, Outcome, files};

/// One for each encoding.
const COLORS: [RGBColor; 5] = [
    RGBColor(51, 56, 62),
    RGBColor(31, 105, 173),
    RGBColor(38, 140, 90),
    RGBColor(133, 80, 170),
    RGBColor(217, 104, 28),
];
/// Curves that lie on each other are all to be seen: the first ones are broad.
const WIDTHS: [u32; 5] = [9, 6, 4, 2, 3];
const TEXT: RGBColor = RGBColor(51, 56, 62);
const GRAY: RGBColor = RGBColor(120, 128, 138);
const GRID: RGBColor = RGBColor(228, 231, 235);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws curves above, and the table below.
pub(crate) fn draw(path: &Path, outcomes: &[Outcome], lines: &[Line], steps: u64) -> Result<()> {
    let draw = |path: &Path| -> Drawn {
        let root = SVGBackend::new(path, (1080, 900)).into_drawing_area();
        root.fill(&WHITE)?;
        let (above, below) = root.split_vertically(610);
        curves(&above, outcomes, steps)?;
        table(&below, lines)?;
        root.present()
    };
    files::write(path, |path| Ok(draw(path)?))
}

/// For each encoding the mean over the seeds, and each seed as a thin line behind it.
fn curves(area: &Area<'_>, outcomes: &[Outcome], steps: u64) -> Drawn {
    let (head, plot) = area.split_vertically(84);
    let title = ("sans-serif", 26).into_font().style(FontStyle::Bold).color(&TEXT);
    head.draw(&Text::new(
        "The loss of a network whose gradients fall, in each encoding of the moments",
        (44, 22),
        title,
    ))?;
    let mut x = 44;
    for ((outcome, color), width) in outcomes.iter().zip(COLORS).zip(WIDTHS) {
        head.draw(&PathElement::new([(x, 68), (x + 34, 68)], color.stroke_width(width)))?;
        head.draw(&Text::new(outcome.name, (x + 42, 60), ("sans-serif", 20).into_font().color(&TEXT)))?;
        x += 76 + 10 * outcome.name.len() as i32;
    }
    let all = || outcomes.iter().flat_map(|outcome| &outcome.runs).flat_map(|run| run.losses.iter().copied());
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let mut chart = ChartBuilder::on(&plot)
        .margin_left(16)
        .margin_right(32)
        .x_label_area_size(60)
        .y_label_area_size(84)
        .build_cartesian_2d(0..steps, (low * 0.8..high * 1.25).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRAY)
        .y_label_formatter(&|value| format!("{value:.0e}"))
        .label_style(("sans-serif", 19).into_font().color(&TEXT))
        .axis_desc_style(("sans-serif", 21).into_font().color(&TEXT))
        .x_desc("step")
        .y_desc("mean squared error")
        .draw()?;
    let point = |(i, loss): (usize, f64)| ((i as u64 + 1) * EVERY, loss);
    for (outcome, color) in outcomes.iter().zip(COLORS) {
        for run in &outcome.runs {
            let points = run.losses.iter().copied().enumerate().map(point);
            chart.draw_series(LineSeries::new(points, color.mix(0.18)))?;
        }
    }
    for ((outcome, color), width) in outcomes.iter().zip(COLORS).zip(WIDTHS) {
        let recorded = outcome.runs.first().map_or(0, |run| run.losses.len());
        let mean = |i: usize| {
            let logs: f64 = outcome.runs.iter().map(|run| run.losses[i].ln()).sum();
            (logs / outcome.runs.len() as f64).exp()
        };
        chart.draw_series(LineSeries::new((0..recorded).map(|i| point((i, mean(i)))), color.stroke_width(width)))?;
    }
    Ok(())
}

fn table(area: &Area<'_>, lines: &[Line]) -> Drawn {
    const COLUMNS: [i32; 4] = [60, 300, 540, 780];
    let font = |style| ("sans-serif", 20).into_font().style(style).color(&TEXT);
    let heads = ["moments", "bytes a parameter", "final loss", "times f32's, same seeds"];
    for (head, x) in heads.into_iter().zip(COLUMNS) {
        area.draw(&Text::new(head, (x, 24), font(FontStyle::Bold)))?;
    }
    area.draw(&PathElement::new([(44, 54), (1036, 54)], GRAY))?;
    for (row, (line, color)) in lines.iter().zip(COLORS).enumerate() {
        let y = 66 + 30 * row as i32;
        area.draw(&Circle::new((50, y + 9), 5, color.filled()))?;
        let cells = [
            line.name.to_owned(),
            format!("{:.2}", line.bytes),
            format!("{:.2e}", line.loss),
            format!("{:.2}", line.to_f32),
        ];
        for (cell, x) in cells.into_iter().zip(COLUMNS) {
            area.draw(&Text::new(cell, (x, y), font(FontStyle::Normal)))?;
        }
    }
    let spread = lines.first().map_or(1.0, |line| line.spread);
    let note = format!(
        "One standard deviation between the seeds of f32 is a factor of {spread:.2}; losses are geometric means."
    );
    area.draw(&Text::new(note, (44, 76 + 30 * lines.len() as i32), ("sans-serif", 18).into_font().color(&GRAY)))
}
