//! How fast a step is: this crate, candle-nn's AdamW, and the memory's own speed, in one run.
//!
//! ```text
//! cargo run --release --example throughput -- dense --elements 100000000
//! cargo run --release --example throughput -- dense --elements 10000000 --dtype bf16
//! cargo run --release --example throughput -- dense --elements 100000000 --state q8
//! cargo run --release --example throughput -- small --tensors 1000 --elements 64
//! cargo run --release --example throughput -- sparse --rows 10000000 --dim 64 --batch 8192
//! ```
//!
//! Gradients are recorded beforehand; there is no autograd in what is timed. `memory` reads and writes the bytes of an
//! update and computes nothing: no update can be faster, so the ratio to it is what this program is about. The machine
//! may be shared and noisy: rounds alternate between the implementations, times are medians, and the ratio to the
//! memory is the median of the ratios of neighbors. `--json` prints one object a line, for other programs.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_adamax::{Rounding, StateDType};
use candle_core::DType;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

mod memory;
mod sparse;
#[path = "../../benches/support/mod.rs"]
mod support;

use memory::peak_memory;
use support::case::{Case, Step};

/// candle allocates every intermediate result anew, and AdamW is made of a dozen of them. With the system's allocator
/// each large one is mapped, page by page, and unmapped again, which costs more than the arithmetic; this one keeps
/// some of them. A step of this crate allocates next to nothing; it gains from the pages, 2 MB each, that this allocator
/// has large arrays put on (measured: some 15 % over pages of 4 KB).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const OURS: &str = "candle-adamax";
const ADAMW: &str = "candle-nn AdamW";
const MEMORY: &str = "memory";

/// From here on AdamW takes seconds, and is timed a few times only.
const LARGE: usize = 4_000_000;
const ADAMW_ROUNDS_IF_LARGE: usize = 7;

/// After an operation the threads of candle's own pool spin for a millisecond or so before they sleep, on the cores that
/// the next step wants (`CANDLE_BARRIER_POOL_SPIN_LIMIT` sets how long). What comes after AdamW waits until they sleep.
const AFTER_ADAMW: Duration = Duration::from_millis(5);

/// Times a step of candle-adamax beside candle-nn's AdamW and the memory's own speed.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    case: CaseArgs,
    /// Print one JSON object a line and nothing else.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum CaseArgs {
    /// One large tensor.
    Dense {
        /// How many elements it has.
        #[arg(long)]
        elements: usize,
        #[command(flatten)]
        common: Common,
    },
    /// Many small tensors. The memory's line is as many bytes in one row.
    Small {
        /// How many tensors.
        #[arg(long)]
        tensors: usize,
        /// How many elements each of them has.
        #[arg(long)]
        elements: usize,
        #[command(flatten)]
        common: Common,
    },
    /// Some rows of an embedding table of f32: a lookup, a step, and both with a backward pass between them.
    Sparse(sparse::Args),
}

#[derive(Args)]
struct Common {
    /// The type of parameters and gradients.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Float,
    /// How moments are stored (those of f64 are f64). Other than f32, a step with f32 moments is timed beside it.
    #[arg(long, value_enum, default_value = "f32")]
    state: State,
    /// How f16 and bf16 parameters are rounded.
    #[arg(long, value_enum, default_value = "nearest")]
    rounding: Round,
    /// How often each is timed, after one step to warm up [default: 15, or 200 for less than a million elements].
    #[arg(long)]
    rounds: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Float {
    F32,
    F64,
    F16,
    Bf16,
}

impl From<Float> for DType {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => DType::F32,
            Float::F64 => DType::F64,
            Float::F16 => DType::F16,
            Float::Bf16 => DType::BF16,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum State {
    F32,
    Bf16,
    F16,
    Q8,
}

impl From<State> for StateDType {
    fn from(state: State) -> Self {
        match state {
            State::F32 => Self::F32,
            State::Bf16 => Self::BF16,
            State::F16 => Self::F16,
            State::Q8 => Self::Q8,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Round {
    Nearest,
    Stochastic,
    Master,
}

impl From<Round> for Rounding {
    fn from(round: Round) -> Self {
        match round {
            Round::Nearest => Self::Nearest,
            Round::Stochastic => Self::Stochastic,
            Round::Master => Self::Master,
        }
    }
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    case: &'static str,
    implementation: &'static str,
    median_ms: f64,
    /// What an update of Adamax in these types cannot avoid; the same for all, so that GB/s compare as times do.
    bytes: u64,
    gb_per_s: f64,
    /// The time in terms of the memory's.
    per_memory: f64,
    tensors: usize,
    elements: usize,
    dtype: &'static str,
    state: String,
    rounds: usize,
    threads: usize,
}

fn main() -> Result<()> {
    let Cli { case, json } = Cli::parse();
    let (name, tensors, elements, common) = match case {
        CaseArgs::Dense { elements, common } => ("dense", 1, elements, common),
        CaseArgs::Small { tensors, elements, common } => ("small", tensors, elements, common),
        CaseArgs::Sparse(args) => return sparse::run(&args, json),
    };
    ensure!(tensors > 0, "--tensors: expected at least 1, got 0");
    ensure!(elements > 0, "--elements: expected at least 1, got 0");
    let total = tensors.checked_mul(elements).filter(|&total| total <= isize::MAX as usize / 64);
    let total =
        total.with_context(|| format!("{tensors} tensors of {elements} elements do not fit into any memory"))?;
    let rounds = common.rounds.unwrap_or(if total < 1_000_000 { 200 } else { 15 });
    ensure!(rounds > 0, "--rounds: expected at least 1, got 0");
    let (dtype, state, rounding) = (common.dtype.into(), common.state.into(), common.rounding.into());
    let case = Case { tensors, elements, dtype, state, rounding };

    let times = measure(&case, rounds)?;
    let lines = times.lines(name, &case);
    let mut out = std::io::stdout().lock();
    if json {
        for line in &lines {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        }
        return Ok(());
    }
    print_table(&mut out, &case, &lines)?;
    writeln!(out)?;
    writeln!(out, "{OURS} / {MEMORY}: {:.2} (median of the rounds' ratios)", times.ours_per_memory())?;
    if !times.full.is_empty() {
        let ratio = of_neighbors(&times.ours, &times.full);
        writeln!(out, "{:?} moments / f32 moments: {ratio:.2} (median of the rounds' ratios)", case.state)?;
        writeln!(out, "peak memory with {:?} moments: {}", case.state, times.peak())?;
    }
    writeln!(out, "{ADAMW} / {OURS}: {:.1}", median(&times.adamw) / median(&times.ours))?;
    if tensors > 1 {
        writeln!(out, "The memory's line is the bytes of all {tensors} tensors in one row: four large arrays.")?;
    }
    Ok(())
}

/// Seconds of each round.
#[derive(Default)]
struct Times {
    ours: Vec<f64>,
    /// With moments as they are, if those of `ours` are encoded.
    full: Vec<f64>,
    memory: Vec<f64>,
    adamw: Vec<f64>,
    /// The most memory that the process had with `ours` alone, in bytes, where the system tells.
    peak: Option<u64>,
}

/// Times one step of each in turn. AdamW gives its memory back after its last round.
fn measure(case: &Case, rounds: usize) -> Result<Times> {
    let mut ours = case.adamax()?;
    seconds(&mut ours)?;
    seconds(&mut ours)?;
    // Before the others' arrays are there.
    let peak = peak_memory();
    let (mut memory, mut adamw) = (case.memory()?, adamw(case)?);
    let mut full = if case.state == StateDType::F32 { None } else { Some(with_full_moments(case).adamax()?) };
    for step in [&mut memory, &mut adamw].into_iter().chain(&mut full) {
        seconds(step)?;
    }
    let adamw_rounds = if case.total() < LARGE { rounds } else { rounds.min(ADAMW_ROUNDS_IF_LARGE) };
    let mut adamw = Some(adamw);
    let mut times = Times { peak, ..Times::default() };
    for round in 0..rounds {
        times.ours.push(seconds(&mut ours)?);
        times.memory.push(seconds(&mut memory)?);
        if let Some(full) = &mut full {
            times.full.push(seconds(full)?);
        }
        if let Some(step) = &mut adamw {
            times.adamw.push(seconds(step)?);
            std::thread::sleep(AFTER_ADAMW);
        }
        if round + 1 == adamw_rounds {
            adamw = None;
        }
    }
    Ok(times)
}

/// The same case with moments as they are.
fn with_full_moments(case: &Case) -> Case {
    Case { state: StateDType::F32, ..*case }
}

/// A step of candle-nn's optimizer, on variables of its own.
fn adamw(case: &Case) -> Result<Step> {
    let (vars, grads) = case.vars_and_grads()?;
    let mut optimizer = AdamW::new(vars, ParamsAdamW::default())?;
    Ok(Box::new(move || optimizer.step(&grads)))
}

fn seconds(step: &mut Step) -> Result<f64> {
    let start = Instant::now();
    step()?;
    Ok(start.elapsed().as_secs_f64())
}

impl Times {
    /// Noise that lasts longer than a round is in both, and cancels.
    fn ours_per_memory(&self) -> f64 {
        of_neighbors(&self.ours, &self.memory)
    }

    fn peak(&self) -> String {
        self.peak.map_or("unknown".to_owned(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6))
    }

    fn lines(&self, name: &'static str, case: &Case) -> Vec<Line> {
        let memory = median(&self.memory);
        let line = |implementation, times: &[f64], per_memory| Line {
            case: name,
            implementation,
            median_ms: median(times) * 1e3,
            bytes: case.bytes(),
            gb_per_s: case.bytes() as f64 / median(times) / 1e9,
            per_memory,
            tensors: case.tensors,
            elements: case.elements,
            dtype: case.dtype.as_str(),
            state: format!("{:?}", case.state),
            rounds: times.len(),
            threads: rayon::current_num_threads(),
        };
        let mut lines = vec![line(OURS, &self.ours, self.ours_per_memory())];
        if !self.full.is_empty() {
            let full = line("  f32 moments", &self.full, of_neighbors(&self.full, &self.memory));
            let (bytes, state) = (with_full_moments(case).bytes(), "F32".to_owned());
            lines.push(Line { bytes, gb_per_s: bytes as f64 / median(&self.full) / 1e9, state, ..full });
        }
        lines.push(line(ADAMW, &self.adamw, median(&self.adamw) / memory));
        lines.push(line(MEMORY, &self.memory, 1.0));
        lines
    }
}

/// The median of the ratios of neighbors.
fn of_neighbors(times: &[f64], others: &[f64]) -> f64 {
    median(&times.iter().zip(others).map(|(time, other)| time / other).collect::<Vec<_>>())
}

/// The middle one, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => sorted[middle.saturating_sub(1)..=middle].iter().sum::<f64>() / 2.0,
        _ => sorted[middle],
    }
}

fn print_table(out: &mut impl Write, case: &Case, lines: &[Line]) -> Result<()> {
    let Case { tensors, elements, dtype, state, rounding } = case;
    let (dtype, threads) = (dtype.as_str(), rayon::current_num_threads());
    write!(out, "{tensors} x {elements} elements of {dtype}, {state:?} moments, {threads} threads")?;
    writeln!(
        out,
        "{}",
        if *rounding == Rounding::Nearest { String::new() } else { format!(", {rounding:?} rounding") }
    )?;
    writeln!(out)?;
    writeln!(
        out,
        "{:<6} {:<16} {:>12} {:>15} {:>8} {:>10} {:>7}",
        "case", "implementation", "median ms", "bytes per step", "GB/s", "per memory", "rounds"
    )?;
    for Line { case, implementation, median_ms, bytes, gb_per_s, per_memory, rounds, .. } in lines {
        writeln!(
            out,
            "{case:<6} {implementation:<16} {median_ms:>12.3} {bytes:>15} {gb_per_s:>8.2} {per_memory:>10.2} {rounds:>7}"
        )?;
    }
    Ok(())
}
