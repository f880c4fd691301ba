//! Some rows of an embedding table: what a lookup, a step and a whole training step cost, beside the memory's own speed
//! and candle's dense way.
//!
//! Every round has ids of its own, drawn uniformly, so neither caches nor a sorted order are left from the round before.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_adamax::{Adamax, Embedding, ParamsAdamax, SparseUpdate};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW};
use clap::ValueEnum;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use crate::memory::{available_memory, peak_memory};
use crate::support::rows::{Rows, Touched};
use crate::{ADAMW, AFTER_ADAMW, MEMORY, OURS, State, median, of_neighbors};

const LAZY: &str = "lazy, f32";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many rows the table has.
    #[arg(long)]
    rows: usize,
    /// How many numbers a row has.
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// How many ids are looked up.
    #[arg(long, default_value_t = 8192)]
    batch: usize,
    /// How often each is timed, after some steps to warm up.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// How moments are stored.
    #[arg(long, value_enum, default_value = "f32")]
    state: State,
    /// What becomes of rows without a gradient. `exact`, or moments other than f32, are timed beside `lazy` with f32, and
    /// the memory is left out.
    #[arg(long, value_enum, default_value = "lazy")]
    sparse: Sparse,
    /// Leave candle's dense way out, which takes seconds a step and a dozen tables of memory.
    #[arg(long)]
    no_dense: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Sparse {
    Lazy,
    Exact,
}

impl Args {
    /// The settings that were asked for.
    fn params(&self) -> ParamsAdamax {
        let sparse_update = match self.sparse {
            Sparse::Lazy => SparseUpdate::Lazy,
            Sparse::Exact => SparseUpdate::Exact,
        };
        ParamsAdamax { sparse_update, state_dtype: self.state.into(), ..ParamsAdamax::default() }
    }

    /// Whether those are the plain ones.
    fn is_plain(&self) -> bool {
        self.sparse == Sparse::Lazy && matches!(self.state, State::F32)
    }
}

/// Steps before anything is timed: they touch most large pages of the moments.
const WARM_UP: usize = 5;
/// candle's dense way takes seconds, and is timed a few times only.
const DENSE_ROUNDS: usize = 3;
/// What candle's dense way holds at its worst, in tables: weights, two moments, a gradient, and the intermediate results
/// of a backward pass and of AdamW. With 8 tables of free memory it was killed.
const DENSE_TABLES: u64 = 12;

/// The three things that are timed.
const CASES: [&str; 3] = ["lookup", "step", "whole"];

/// One line of the result.
#[derive(Serialize)]
struct Line {
    case: &'static str,
    implementation: &'static str,
    median_ms: f64,
    /// The time in terms of the memory's, or of lazy rows with f32 moments.
    per_other: f64,
    rows: usize,
    dim: usize,
    batch: usize,
    rounds: usize,
    threads: usize,
}

impl<E: Module, O: Optimizer> Model<E, O> {
    /// Some steps before anything is timed; how many rows the last one touched.
    fn warm_up(&mut self, batches: &mut Batches) -> Result<usize> {
        let mut touched = 0;
        for _ in 0..WARM_UP {
            let ids = batches.draw();
            touched = Touched::of(&ids).len();
            self.whole(&Tensor::new(ids, &Device::Cpu)?)?;
        }
        Ok(touched)
    }

    /// Times every case once, with ids of its own.
    fn draw_and_time(&mut self, batches: &mut Batches, times: &mut Times) -> Result<()> {
        let mut draw = || Tensor::new(batches.draw(), &Device::Cpu);
        let tensors = [draw()?, draw()?, draw()?];
        self.round(tensors.each_ref(), times)
    }
}

/// The memory's own speed.
struct Memory {
    rows: Rows,
    grads: Vec<f32>,
}

impl Memory {
    fn new(args: &Args, batches: &mut Batches) -> Result<Self> {
        let mut memory = Self { rows: Rows::new(args.rows, args.dim)?, grads: vec![0.5; args.batch * args.dim] };
        for _ in 0..WARM_UP {
            memory.rows.update(&Touched::of(&batches.draw()), &memory.grads);
        }
        Ok(memory)
    }

    fn time(&mut self, batches: &mut Batches, times: &mut Times) -> Result<()> {
        let ids = batches.draw();
        times[0].push(milliseconds(|| {
            self.rows.look_up(&ids);
            Ok(())
        })?);
        let rows = Touched::of(&batches.draw());
        let update = milliseconds(|| {
            self.rows.update(&rows, &self.grads);
            Ok(())
        })?;
        times[1].push(update);
        times[2].push(update);
        Ok(())
    }
}

/// Milliseconds of each round, for each of the [`CASES`].
type Times = [Vec<f64>; 3];

/// Ids for the rounds.
struct Batches {
    rng: StdRng,
    rows: u32,
    batch: usize,
}

impl Batches {
    fn new(args: &Args) -> Self {
        Self { rng: StdRng::seed_from_u64(2015), rows: args.rows as u32, batch: args.batch }
    }

    fn draw(&mut self) -> Vec<u32> {
        (0..self.batch).map(|_| self.rng.random_range(0..self.rows)).collect()
    }
}

/// A table, a linear layer on its rows, and an optimizer of both.
struct Model<E, O> {
    embedding: E,
    linear: Linear,
    optimizer: O,
    target: Tensor,
}

/// The variables of a model.
fn vars(args: &Args) -> Result<[Var; 3]> {
    let device = &Device::Cpu;
    // Not random: what the values are does not matter, and drawing billions of them takes its time.
    let table = Var::ones((args.rows, args.dim), DType::F32, device)?;
    let weight = Var::from_tensor(&Tensor::rand(-0.1f32, 0.1, (1, args.dim), device)?)?;
    Ok([table, weight, Var::zeros(1, DType::F32, device)?])
}

impl Model<Embedding, Adamax> {
    fn ours(args: &Args, params: ParamsAdamax) -> Result<Self> {
        let vars = vars(args)?;
        let embedding = Embedding::new(vars[0].as_tensor().clone())?;
        Self::new(args, vars, embedding, |vars| Adamax::new(vars, params))
    }
}

impl Model<candle_nn::Embedding, AdamW> {
    fn dense(args: &Args) -> Result<Self> {
        let vars = vars(args)?;
        let embedding = candle_nn::Embedding::new(vars[0].as_tensor().clone(), args.dim);
        Self::new(args, vars, embedding, |vars| AdamW::new(vars, ParamsAdamW::default()))
    }
}

impl<E: Module, O: Optimizer> Model<E, O> {
    fn new(
        args: &Args,
        vars: [Var; 3],
        embedding: E,
        optimizer: impl FnOnce(Vec<Var>) -> candle_core::Result<O>,
    ) -> Result<Self> {
        let linear = Linear::new(vars[1].as_tensor().clone(), Some(vars[2].as_tensor().clone()));
        let target = Tensor::zeros((args.batch, 1), DType::F32, &Device::Cpu)?;
        Ok(Self { embedding, linear, optimizer: optimizer(vars.into())?, target })
    }

    fn forward_backward(&self, ids: &Tensor) -> candle_core::Result<GradStore> {
        let predicted = self.linear.forward(&self.embedding.forward(ids)?)?;
        (predicted - &self.target)?.sqr()?.mean_all()?.backward()
    }

    fn whole(&mut self, ids: &Tensor) -> candle_core::Result<()> {
        let grads = self.forward_backward(ids)?;
        self.optimizer.step(&grads)
    }

    /// Times every case once.
    fn round(&mut self, [for_lookup, for_step, for_whole]: [&Tensor; 3], times: &mut Times) -> Result<()> {
        times[0].push(milliseconds(|| self.embedding.forward(for_lookup).map(drop))?);
        let grads = self.forward_backward(for_step)?;
        std::thread::sleep(AFTER_ADAMW); // until candle's threads sleep
        times[1].push(milliseconds(|| self.optimizer.step(&grads))?);
        drop(grads);
        times[2].push(milliseconds(|| self.whole(for_whole))?);
        std::thread::sleep(AFTER_ADAMW);
        Ok(())
    }
}

fn milliseconds(run: impl FnOnce() -> candle_core::Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Times all cases and prints them.
pub(crate) fn run(args: &Args, json: bool) -> Result<()> {
    ensure!(args.rows > 0 && u32::try_from(args.rows).is_ok(), "--rows: expected 1 to 4294967295, got {}", args.rows);
    ensure!(args.dim > 0 && args.batch > 0 && args.rounds > 0, "--dim, --batch, --rounds: expected at least 1");
    let table_bytes = (args.rows as u64).saturating_mul(4 * args.dim as u64);
    ensure!(isize::try_from(4 * table_bytes).is_ok(), "--rows: a table of {table_bytes} bytes does not fit");
    let mut batches = Batches::new(args);
    let mut ours = Model::ours(args, args.params())?;
    let touched = ours.warm_up(&mut batches)?;
    // Before anybody else's arrays are there.
    let peak = peak_memory();
    let (mut our_times, mut other_times) = (Times::default(), Times::default());
    if args.is_plain() {
        let mut memory = Memory::new(args, &mut batches)?;
        for _ in 0..args.rounds {
            ours.draw_and_time(&mut batches, &mut our_times)?;
            memory.time(&mut batches, &mut other_times)?;
        }
    } else {
        let mut lazy = Model::ours(args, ParamsAdamax::default())?;
        lazy.warm_up(&mut batches)?;
        for _ in 0..args.rounds {
            ours.draw_and_time(&mut batches, &mut our_times)?;
            lazy.draw_and_time(&mut batches, &mut other_times)?;
        }
    }
    drop(ours);

    let fits = available_memory().is_none_or(|available| DENSE_TABLES * table_bytes < available);
    let mut dense_times = Times::default();
    if fits && !args.no_dense {
        let mut dense = Model::dense(args)?;
        dense.whole(&Tensor::new(batches.draw(), &Device::Cpu)?)?;
        for _ in 0..DENSE_ROUNDS {
            let ids = Tensor::new(batches.draw(), &Device::Cpu)?;
            dense.round([&ids; 3], &mut dense_times)?;
        }
    }
    let mut out = std::io::stdout().lock();
    let lines = lines(args, &our_times, &dense_times, &other_times);
    if json {
        for line in &lines {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        }
        return Ok(());
    }
    print_table(&mut out, args, &lines)?;
    writeln!(out)?;
    if !fits && !args.no_dense {
        writeln!(out, "{ADAMW} is left out: it would need {:.0} GB.", (DENSE_TABLES * table_bytes) as f64 / 1e9)?;
    }
    writeln!(
        out,
        "step: coalesce and update of the {touched} rows of a batch, 24 bytes a number and 4 of its gradient"
    )?;
    writeln!(out, "whole: lookup, a linear layer to one number, a mean of squares, backward, step")?;
    if let Some(peak) = peak {
        let moments = match args.state {
            State::F32 => 2 * table_bytes,
            State::Bf16 | State::F16 => table_bytes + 4 * args.rows as u64,
            State::Q8 => table_bytes / 2 + 4 * args.rows as u64,
        };
        writeln!(
            out,
            "peak memory with {OURS}: {:.0} MB; the table is {:.0} MB, its moments would be {:.0} MB if all were touched",
            peak as f64 / 1e6,
            table_bytes as f64 / 1e6,
            moments as f64 / 1e6,
        )?;
    }
    Ok(())
}

fn lines(args: &Args, ours: &Times, dense: &Times, other: &Times) -> Vec<Line> {
    let mut lines = Vec::new();
    for (index, case) in CASES.into_iter().enumerate() {
        let other_name = if args.is_plain() { MEMORY } else { LAZY };
        for (implementation, times) in [(OURS, ours), (ADAMW, dense), (other_name, other)] {
            if times[index].is_empty() {
                continue;
            }
            // Neighbors where there are as many; noise that lasts longer than a round cancels.
            let per_other = match times[index].len() == other[index].len() {
                true => of_neighbors(&times[index], &other[index]),
                false => median(&times[index]) / median(&other[index]),
            };
            lines.push(Line {
                case,
                implementation,
                median_ms: median(&times[index]),
                per_other,
                rows: args.rows,
                dim: args.dim,
                batch: args.batch,
                rounds: times[index].len(),
                threads: rayon::current_num_threads(),
            });
        }
    }
    lines
}

fn print_table(out: &mut impl Write, args: &Args, lines: &[Line]) -> Result<()> {
    let Args { rows, dim, batch, .. } = args;
    let threads = rayon::current_num_threads();
    let ParamsAdamax { state_dtype, sparse_update, .. } = args.params();
    write!(out, "a table of {rows} x {dim} f32, {batch} uniform ids, {threads} threads")?;
    writeln!(out, ", {sparse_update:?} with {state_dtype:?} moments")?;
    let per_other = if args.is_plain() { "per memory" } else { "per lazy" };
    writeln!(out)?;
    writeln!(out, "{:<8} {:<16} {:>12} {:>12} {:>7}", "case", "implementation", "median ms", per_other, "rounds")?;
    for Line { case, implementation, median_ms, per_other, rounds, .. } in lines {
        writeln!(out, "{case:<8} {implementation:<16} {median_ms:>12.3} {per_other:>12.2} {rounds:>7}")?;
    }
    Ok(())
}
