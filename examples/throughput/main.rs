//! How fast a step is: this crate, candle-nn's AdamW, and the memory's own speed, in one run.
//!
//! ```text
//! cargo run --release --example throughput -- dense --elements 100000000
//! cargo run --release --example throughput -- dense --elements 10000000 --dtype bf16
//! cargo run --release --example throughput -- dense --elements 100000000 --state q8
//! cargo run --release --example throughput -- small --tensors 1000 --elements 64
//! cargo run --release --example throughput -- bert
//! cargo run --release --example throughput -- sparse --rows 10000000 --dim 64 --batch 8192
//! cargo run --release --example throughput -- bag --rows 1000000 --bags 8192 --per-bag 20
//! cargo run --release --example throughput -- train --items 1000000
//! cargo run --release --features cuda --example throughput -- dense --elements 256000000 --device cuda
//! ```
//!
//! Gradients are recorded beforehand; there is no autograd in what is timed, but for `whole`, `bag` and `train`.
//! `memory` reads and writes the bytes of an update and computes nothing: no update can be faster, so the ratio to it is
//! what this program is about. The machine may be shared and noisy: rounds alternate between the implementations, times
//! are medians, and the ratio to the memory is the median of the ratios of neighbors. `--json` prints one object a line,
//! for other programs; `benches/peers/torch_cpu.py` prints the same for PyTorch.
//!
//! On a GPU, times are those of its events, from before the first kernel of a step to after its last; where the host is
//! slower than the GPU, the GPU's waiting is in them. The memory's own speed is that of a copy within its memory, which
//! takes its turn in every round. The host's time is how long the call takes to return.

use anyhow::Result;
use candle_adamax::{Rounding, StateDType};
use candle_core::DType;
use clap::{Args, Parser, Subcommand, ValueEnum};

mod bag;
#[path = "../common/device.rs"]
mod device;
mod gpu;
mod ids;
mod lines;
mod machine;
mod memory;
// With its allocator. candle allocates every intermediate result anew, and AdamW is made of a dozen of them. With the
// system's allocator each large one is mapped, page by page, and unmapped again, which costs more than the arithmetic;
// this one keeps some of them. A step of this crate allocates next to nothing; it gains from the pages, 2 MB each, that
// this allocator has large arrays put on (measured: some 15 % over pages of 4 KB).
#[allow(dead_code, reason = "other programs print and draw numbers with all of it")]
#[path = "../common/program.rs"]
mod program;
#[allow(dead_code, reason = "the recommender trains, evaluates and reads files with all of it")]
mod recommender;
mod sparse;
#[allow(dead_code, reason = "the benches make steps with all of it")]
#[path = "../../benches/support/mod.rs"]
mod support;
mod table;
mod train;
mod updates;

use std::process::ExitCode;

use machine::{Machine, Times};
// Its modules find each other at the root.
use recommender::{bar, data, evaluate, form, laps, model, options, random, settings, split, synthetic, text, trainer};
use updates::Work;

const OURS: &str = "candle-adamax";
const ADAMW: &str = "candle-nn AdamW";
const MEMORY: &str = "memory";
/// The memory's own speed on a GPU.
const COPY: &str = "copy";

/// Times a step of candle-adamax beside candle-nn's AdamW and the memory's own speed.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    case: CaseArgs,
    /// Where to compute.
    #[arg(long, global = true, value_enum, default_value_t)]
    device: device::Place,
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
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
        tensors: u32,
        /// How many elements each of them has.
        #[arg(long)]
        elements: usize,
        #[command(flatten)]
        common: Common,
    },
    /// The 197 parameters of BERT-base without the pooler.
    Bert {
        #[command(flatten)]
        common: Common,
    },
    /// Some rows of an embedding table of f32: a lookup, a step, and both with a backward pass between them.
    Sparse(sparse::Args),
    /// Rows of an embedding table that are pooled: a forward pass, and a whole training step.
    Bag(bag::Args),
    /// The training step of the example `recommender`, part by part, and its evaluation.
    Train(train::Args),
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
    /// How often each is timed, after some steps to warm up [default: 15, on a GPU 50; for less than a million elements
    /// 200].
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    match &cli.case {
        // As a program that trains: free memory is kept, and candle's operations on elements have one thread.
        CaseArgs::Bag(_) => program::start(None, || run(&cli)),
        CaseArgs::Train(args) => program::start(Some(args.threads), || run(&cli)),
        _ => program::end(run(&cli)),
    }
}

fn run(cli: &Cli) -> Result<()> {
    let &Cli { ref case, device, json } = cli;
    let machine = Machine::new(device)?;
    let (name, shapes, common) = match case {
        CaseArgs::Dense { elements, common } => ("dense", vec![vec![*elements]], common),
        CaseArgs::Small { tensors, elements, common } => ("small", vec![vec![*elements]; *tensors as usize], common),
        CaseArgs::Bert { common } => ("bert", updates::bert(), common),
        CaseArgs::Sparse(args) => return sparse::run(&machine, args, json),
        CaseArgs::Bag(args) => return bag::run(&machine, args, json),
        CaseArgs::Train(args) => return train::run(&machine, device, args, json),
    };
    updates::run(&machine, &Work::new(name, shapes, common)?, common.rounds, json)
}

/// The time in terms of another. Of neighbors where there are as many; noise that lasts longer than a round cancels.
fn ratio(times: &Times, other: &Times) -> f64 {
    match times.ms.len() == other.ms.len() {
        true => of_neighbors(&times.ms, &other.ms),
        false => median(&times.ms) / median(&other.ms),
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
