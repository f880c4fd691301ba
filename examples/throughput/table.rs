//! Tables of text.

use std::io::{Result, Write};

/// Columns of text: the first two are words, the others numbers.
const WORDS: usize = 2;

/// Prints a table as wide as its cells.
pub(crate) fn print(out: &mut impl Write, header: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let width = |column: usize| {
        let of_rows = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        of_rows.max(header[column].len())
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in std::iter::once(&header).chain(rows) {
        let cell = |(column, (cell, &width)): (usize, (&String, &usize))| match column < WORDS {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        };
        let cells: Vec<String> = row.iter().zip(&widths).enumerate().map(cell).collect();
        writeln!(out, "{}", cells.join("  "))?;
    }
    Ok(())
}

/// A number with so many digits behind the point, or a dash.
pub(crate) fn cell(number: Option<f64>, digits: usize) -> String {
    number.map_or("-".to_owned(), |number| format!("{number:.digits$}"))
}

/// A share in percent, or a dash.
pub(crate) fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}
