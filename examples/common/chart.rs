//! Learning curves, as an SVG file of panels in rows.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::files;

pub(crate) const BLUE: RGBColor = RGBColor(31, 105, 173);
pub(crate) const ORANGE: RGBColor = RGBColor(217, 104, 28);
pub(crate) const GRAY: RGBColor = RGBColor(120, 128, 138);
const TEXT: RGBColor = RGBColor(51, 56, 62);
const GRID: RGBColor = RGBColor(228, 231, 235);
/// Of a panel, in pixels.
const SIZE: (u32, u32) = (720, 600);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// One line of a panel.
pub(crate) struct Curve {
    /// Empty for one that the legend leaves out.
    pub(crate) label: &'static str,
    pub(crate) color: RGBColor,
    pub(crate) width: u32,
    /// Whether there is a dot at each point.
    pub(crate) dots: bool,
    pub(crate) dashes: bool,
    /// Epochs and values.
    pub(crate) points: Vec<(f64, f64)>,
}

impl Curve {
    /// What was measured now and then.
    pub(crate) fn measured(label: &'static str, color: RGBColor, points: Vec<(f64, f64)>) -> Self {
        Self { label, color, width: 3, dots: true, dashes: false, points }
    }

    /// What needs no model, from beginning to end.
    pub(crate) fn baseline(label: &'static str, color: RGBColor, value: f64, last: f64) -> Self {
        Self { label, color, width: 2, dots: false, dashes: true, points: vec![(0.0, value), (last, value)] }
    }
}

/// Curves with axes of their own.
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) range: (f64, f64),
    /// How its values are written.
    pub(crate) written: fn(&f64) -> String,
    pub(crate) curves: Vec<Curve>,
}

/// The values of all points.
pub(crate) fn values(curves: &[Curve]) -> impl Iterator<Item = f64> {
    curves.iter().flat_map(|curve| &curve.points).map(|&(_, value)| value)
}

/// Draws panels of the first `last` epochs into the file `path`, two in a row.
pub(crate) fn draw(path: &Path, panels: &[Panel], last: f64) -> Result<()> {
    let rows = panels.len().div_ceil(2);
    let draw = |path: &Path| -> Drawn {
        let root = SVGBackend::new(path, (2 * SIZE.0, rows as u32 * SIZE.1)).into_drawing_area();
        root.fill(&WHITE)?;
        root.split_evenly((rows, 2)).iter().zip(panels).try_for_each(|(area, panel)| draw_panel(area, panel, last))?;
        root.present()
    };
    files::write(path, |path| Ok(draw(path)?))
}

/// The most ticks that an axis of `last` epochs may have, so that all of them are whole epochs; parts of one where there
/// is no whole one.
fn most_ticks(last: f64) -> usize {
    const MOST: usize = 12;
    if last < 1.0 { MOST } else { MOST.min(last as usize + 1) }
}

/// Draws a title, a legend that no curve can run into, and the curves.
fn draw_panel(area: &Area<'_>, panel: &Panel, last: f64) -> Drawn {
    let (head, plot) = area.split_vertically(96);
    let title = ("sans-serif", 26).into_font().style(FontStyle::Bold).color(&TEXT);
    head.draw(&Text::new(panel.title, (92, 24), title))?;
    let mut x = 92;
    for curve in panel.curves.iter().filter(|curve| !curve.label.is_empty()) {
        let sample = [(x, 74), (x + 34, 74)];
        if curve.dashes {
            head.draw(&DashedPathElement::new(sample, 8, 5, curve.color.stroke_width(curve.width)))?;
        } else {
            head.draw(&PathElement::new(sample, curve.color.stroke_width(curve.width)))?;
        }
        if curve.dots {
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
        .x_labels(most_ticks(last))
        .y_labels(8)
        .x_label_formatter(&|epoch| format!("{epoch}"))
        .y_label_formatter(&panel.written)
        .label_style(("sans-serif", 19).into_font().color(&TEXT))
        .axis_desc_style(("sans-serif", 21).into_font().color(&TEXT))
        .x_desc("epoch")
        .y_desc(panel.unit)
        .draw()?;
    for Curve { color, width, dots, dashes, points, .. } in &panel.curves {
        let style = color.stroke_width(*width);
        if *dashes {
            chart.draw_series(DashedLineSeries::new(points.iter().copied(), 8, 5, style))?;
        } else {
            chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        }
        if *dots {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, color.filled())))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use plotters::coord::ranged1d::Ranged;
    use plotters::coord::types::RangedCoordf64;

    use super::*;

    #[test]
    fn ticks_are_whole_epochs() {
        let ticks = |last: f64| RangedCoordf64::from(0.0..last).key_points(most_ticks(last));
        for last in (1..=100).map(f64::from).chain([1.5, 2.75, 11.9]) {
            let ticks = ticks(last);
            assert!(ticks.len() > 1 && ticks.iter().all(|epoch| epoch.fract() == 0.0), "{last}: {ticks:?}");
        }
        assert_eq!(ticks(3.0), [0.0, 1.0, 2.0, 3.0]);
        assert!(ticks(0.25).len() > 1);
    }
}
