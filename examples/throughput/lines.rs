//! Lines for the parts of a case: a table to read, or JSON.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::machine::{Machine, Times};
use crate::table::{cell, print};
use crate::{median, ratio};

/// One line of the result. `S` is the shape of the case, whose fields are keys of the line, too.
#[derive(Serialize)]
pub(crate) struct Line<S> {
    case: &'static str,
    implementation: &'static str,
    device: String,
    median_ms: f64,
    /// The time in terms of another implementation's.
    #[serde(skip_serializing_if = "Option::is_none")]
    per_other: Option<f64>,
    #[serde(flatten)]
    shape: S,
    rounds: usize,
    threads: usize,
}

impl<S: Serialize> Line<S> {
    pub(crate) fn new(
        machine: &Machine,
        (case, implementation): (&'static str, &'static str),
        times: &Times,
        other: Option<&Times>,
        shape: S,
    ) -> Result<Self> {
        Ok(Self {
            case,
            implementation,
            device: machine.name()?,
            median_ms: median(&times.ms),
            per_other: other.map(|other| ratio(times, other)),
            shape,
            rounds: times.ms.len(),
            threads: rayon::current_num_threads(),
        })
    }

    /// Prints JSON, or a table under `head`, whose ratios are called `per_other`.
    pub(crate) fn print_all(lines: &[Self], json: bool, head: &str, per_other: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if json {
            for line in lines {
                writeln!(out, "{}", serde_json::to_string(line)?)?;
            }
            return Ok(());
        }
        writeln!(out, "{head}\n")?;
        let row = |line: &Self| {
            let words = [line.case, line.implementation].map(str::to_owned);
            let numbers = [cell(Some(line.median_ms), 3), cell(line.per_other, 2), line.rounds.to_string()];
            [&words[..], &numbers].concat()
        };
        let header = ["case", "implementation", "median ms", per_other, "rounds"];
        Ok(print(&mut out, &header, &lines.iter().map(row).collect::<Vec<_>>())?)
    }
}
