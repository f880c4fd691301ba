//! Some rows of an embedding table: what a lookup, a step and a whole training step cost, beside the memory's own speed
//! and candle's dense way.
//!
//! Every round has ids of its own, so neither caches nor a sorted order are left from the round before.

use std::io::Write;

use anyhow::{Result, ensure};
use candle_adamax::{Adamax, Embedding, ParamsAdamax, Rounding, SparseUpdate};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW};
use clap::ValueEnum;
use serde::Serialize;

use crate::ids::{self, Batches};
use crate::machine::{COPY_BYTES, Machine, Times};
use crate::support::case::{Case, Step};
use crate::support::rows::{Rows, Touched};
use crate::table::{cell, percent, print};
use crate::{ADAMW, COPY, MEMORY, OURS, State, median, ratio};

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
    /// Draw ids by Zipf's law with this exponent, instead of uniformly: the row of rank k in proportion to 1 / k^S. Ranks are
    /// dealt over the table.
    #[arg(long, value_name = "S")]
    zipf: Option<f64>,
    /// How often each is timed, after some steps to warm up.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// How moments are stored.
    #[arg(long, value_enum, default_value = "f32")]
    state: State,
    /// What becomes of rows without a gradient. `exact`, or moments other than f32, are timed beside `lazy` with f32, and
    /// the CPU's memory is left out.
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

    /// What an update reads and writes of a number of the table and its moments.
    fn bytes_of_a_number(&self) -> u64 {
        let (dtype, state, rounding) = (DType::F32, self.state.into(), Rounding::Nearest);
        Case { tensors: 1, elements: 1, dtype, state, rounding }.bytes() - size_of::<f32>() as u64
    }

    /// What a case cannot avoid, in bytes, if so many rows are touched; of `whole` it depends on what is fused.
    fn bytes(&self, case: &str, touched: usize) -> Option<u64> {
        let (of_rows, of_ids) = ((touched * self.dim) as u64, (self.batch * self.dim) as u64);
        match case {
            "lookup" => Some(4 * (of_rows + of_ids)),
            // The gradient has a row for each id.
            "step" => Some(self.bytes_of_a_number() * of_rows + 4 * of_ids),
            _ => None,
        }
    }

    fn table_bytes(&self) -> u64 {
        (self.rows as u64).saturating_mul(4 * self.dim as u64)
    }

    /// The memory that candle's dense way takes.
    fn bytes_of_dense(&self) -> u64 {
        DENSE_TABLES * self.table_bytes()
    }

    /// Whether those are the plain ones.
    fn is_plain(&self) -> bool {
        self.sparse == Sparse::Lazy && matches!(self.state, State::F32)
    }
}

/// Steps before anything is timed: they touch most large pages of the moments.
const WARM_UP: usize = 5;
/// candle's dense way takes seconds on a CPU, and is timed a few times only.
const DENSE_ROUNDS: usize = 3;
/// What candle's dense way holds at its worst, in tables: weights, two moments, a gradient, and the intermediate results
/// of a backward pass and of AdamW. With 8 tables of free memory it was killed.
const DENSE_TABLES: u64 = 12;

/// The three things that are timed.
const CASES: [&str; 3] = ["lookup", "step", "whole"];

/// The times of each of the [`CASES`].
type AllTimes = [Times; 3];

/// The CPU's memory's own speed.
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

    fn time(&mut self, machine: &Machine, batches: &mut Batches, times: &mut AllTimes) -> Result<()> {
        let [of_lookup, of_step, of_whole] = times;
        let ids = batches.draw();
        machine.time(of_lookup, || {
            self.rows.look_up(&ids);
            Ok(())
        })?;
        let rows = Touched::of(&batches.draw());
        machine.time(of_step, || {
            self.rows.update(&rows, &self.grads);
            Ok(())
        })?;
        of_whole.ms.extend(of_step.ms.last());
        of_whole.host_us.extend(of_step.host_us.last());
        Ok(())
    }
}

/// A table, a linear layer on its rows, and an optimizer of both.
struct Model<E, O> {
    embedding: E,
    linear: Linear,
    optimizer: O,
    target: Tensor,
    /// Where everything is, ids included.
    device: Device,
}

/// The variables of a model.
fn vars(args: &Args, device: &Device) -> Result<[Var; 3]> {
    // Not random: what the values are does not matter, and drawing billions of them takes its time.
    let table = Var::ones((args.rows, args.dim), DType::F32, device)?;
    let weight = Var::from_tensor(&Tensor::rand(-0.1f32, 0.1, (1, args.dim), device)?)?;
    Ok([table, weight, Var::zeros(1, DType::F32, device)?])
}

impl Model<Embedding, Adamax> {
    fn ours(machine: &Machine, args: &Args, params: ParamsAdamax) -> Result<Self> {
        let vars = vars(args, &machine.device)?;
        let embedding = Embedding::new(vars[0].as_tensor().clone())?;
        Self::new(args, vars, embedding, |vars| Adamax::new(vars, params))
    }
}

impl Model<candle_nn::Embedding, AdamW> {
    fn dense(machine: &Machine, args: &Args) -> Result<Self> {
        let vars = vars(args, &machine.device)?;
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
        let device = vars[0].device().clone();
        let target = Tensor::zeros((args.batch, 1), DType::F32, &device)?;
        Ok(Self { embedding, linear, optimizer: optimizer(vars.into())?, target, device })
    }

    fn forward_backward(&self, ids: &Tensor) -> candle_core::Result<GradStore> {
        let predicted = self.linear.forward(&self.embedding.forward(ids)?)?;
        (predicted - &self.target)?.sqr()?.mean_all()?.backward()
    }

    fn whole(&mut self, ids: &Tensor) -> candle_core::Result<()> {
        let grads = self.forward_backward(ids)?;
        self.optimizer.step(&grads)
    }

    /// Some steps before anything is timed; how many rows the last one touched.
    fn warm_up(&mut self, steps: usize, batches: &mut Batches) -> Result<usize> {
        let mut touched = 0;
        for _ in 0..steps {
            let ids = batches.draw();
            touched = Touched::of(&ids).len();
            self.whole(&Tensor::new(ids, &self.device)?)?;
        }
        Ok(touched)
    }

    /// Times every case once, with ids of its own.
    fn round(&mut self, machine: &Machine, batches: &mut Batches, times: &mut AllTimes) -> Result<()> {
        let [of_lookup, of_step, of_whole] = times;
        let mut draw = || Tensor::new(batches.draw(), &self.device);
        let [for_lookup, for_step, for_whole] = [draw()?, draw()?, draw()?];
        machine.time(of_lookup, || self.embedding.forward(&for_lookup).map(drop))?;
        let grads = self.forward_backward(&for_step)?;
        machine.settle();
        machine.time(of_step, || self.optimizer.step(&grads))?;
        drop(grads);
        machine.time(of_whole, || self.whole(&for_whole))?;
        machine.settle();
        Ok(())
    }
}

/// What has been measured.
#[derive(Default)]
struct Measured {
    /// How many rows a batch touches.
    touched: usize,
    /// What is said of the memory.
    used: String,
    ours: AllTimes,
    /// With f32 moments, where `ours` is not plain.
    lazy: Option<AllTimes>,
    /// The CPU's.
    memory: Option<AllTimes>,
    /// The GPU's.
    copy: Option<Times>,
    /// None if it is not wanted or does not fit.
    dense: Option<AllTimes>,
}

fn measure(machine: &Machine, args: &Args) -> Result<Measured> {
    let mut batches = Batches::new(args.rows, args.batch, args.zipf)?;
    let warm_up = WARM_UP.max(machine.warm_up());
    let before = machine.used_memory()?;
    let mut ours = Model::ours(machine, args, args.params())?;
    let touched = ours.warm_up(warm_up, &mut batches)?;
    // Before anybody else's arrays are there.
    let used = machine.describe_memory(machine.used_memory()?, before);
    let mut measured = Measured { touched, used, ..Measured::default() };
    let mut memory = match args.is_plain() && !machine.is_gpu() {
        true => Some(Memory::new(args, &mut batches)?),
        false => None,
    };
    let mut copy: Option<Step> = if machine.is_gpu() { Some(machine.copy()?) } else { None };
    let mut lazy = match args.is_plain() {
        true => None,
        false => Some(Model::ours(machine, args, ParamsAdamax::default())?),
    };
    if let Some(lazy) = &mut lazy {
        lazy.warm_up(warm_up, &mut batches)?;
    }
    for _ in 0..args.rounds {
        ours.round(machine, &mut batches, &mut measured.ours)?;
        if let Some(memory) = &mut memory {
            memory.time(machine, &mut batches, measured.memory.get_or_insert_default())?;
        }
        if let Some(lazy) = &mut lazy {
            lazy.round(machine, &mut batches, measured.lazy.get_or_insert_default())?;
        }
        if let Some(copy) = &mut copy {
            machine.time(measured.copy.get_or_insert_default(), copy)?;
        }
    }
    drop((ours, memory, lazy, copy));
    if !args.no_dense && machine.free_memory()?.is_none_or(|free| args.bytes_of_dense() < free) {
        let mut dense = Model::dense(machine, args)?;
        dense.warm_up(1, &mut batches)?;
        for _ in 0..if machine.is_gpu() { args.rounds } else { DENSE_ROUNDS } {
            dense.round(machine, &mut batches, measured.dense.get_or_insert_default())?;
        }
    }
    Ok(measured)
}

/// Times all cases and prints them.
pub(crate) fn run(machine: &Machine, args: &Args, json: bool) -> Result<()> {
    ensure!(args.dim > 0 && args.batch > 0 && args.rounds > 0, "--dim, --batch, --rounds: expected at least 1");
    ids::check_table(args.rows, args.dim)?;
    let measured = measure(machine, args)?;
    let lines = lines(machine, args, &measured)?;
    let mut out = std::io::stdout().lock();
    if json {
        for line in &lines {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        }
        return Ok(());
    }
    print_table(&mut out, machine, args, &lines)?;
    writeln!(out)?;
    print_notes(&mut out, args, &measured)
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    case: &'static str,
    implementation: &'static str,
    device: String,
    median_ms: f64,
    /// The time in terms of the CPU's memory's, or of lazy rows with f32 moments.
    #[serde(skip_serializing_if = "Option::is_none")]
    per_other: Option<f64>,
    /// What cannot be avoided, where that is known, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gb_per_s: Option<f64>,
    /// The bandwidth in terms of a copy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_copy: Option<f64>,
    /// How long the call took to return, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_us: Option<f64>,
    rows: usize,
    dim: usize,
    batch: usize,
    rounds: usize,
    threads: usize,
}

fn lines(machine: &Machine, args: &Args, measured: &Measured) -> Result<Vec<Line>> {
    let device = machine.name()?;
    let Measured { touched, ours, lazy, memory, copy, dense, .. } = measured;
    let line = |case, implementation, times: &Times, other: Option<&Times>, bytes: Option<u64>| {
        let bandwidth = |bytes| bytes as f64 / median(&times.ms) / 1e6;
        let of_copy = |(bytes, copy)| bytes as f64 / COPY_BYTES as f64 / ratio(times, copy);
        Line {
            case,
            implementation,
            device: device.clone(),
            median_ms: median(&times.ms),
            per_other: other.map(|other| ratio(times, other)),
            bytes,
            gb_per_s: bytes.map(bandwidth),
            of_copy: bytes.zip(copy.as_ref()).map(of_copy),
            host_us: machine.is_gpu().then(|| median(&times.host_us)),
            rows: args.rows,
            dim: args.dim,
            batch: args.batch,
            rounds: times.ms.len(),
            threads: rayon::current_num_threads(),
        }
    };
    let plain = Args { state: State::F32, ..*args };
    let mut lines = Vec::new();
    for (index, case) in CASES.into_iter().enumerate() {
        let [lazy, memory, dense] = [lazy, memory, dense].map(|all| all.as_ref().map(|times| &times[index]));
        let other = lazy.or(memory);
        let bytes = |of: &Args| if machine.is_gpu() { of.bytes(case, *touched) } else { None };
        lines.push(line(case, OURS, &ours[index], other, bytes(args)));
        lines.extend(dense.map(|dense| line(case, ADAMW, dense, other, None)));
        lines.extend(lazy.map(|lazy| line(case, LAZY, lazy, other, bytes(&plain))));
        lines.extend(memory.map(|memory| line(case, MEMORY, memory, other, None)));
    }
    lines.extend(copy.as_ref().map(|copy| line(COPY, "", copy, None, Some(COPY_BYTES))));
    Ok(lines)
}

fn print_table(out: &mut impl Write, machine: &Machine, args: &Args, lines: &[Line]) -> Result<()> {
    let Args { rows, dim, batch, .. } = args;
    let ParamsAdamax { state_dtype, sparse_update, .. } = args.params();
    let law = args.zipf.map_or("uniform".to_owned(), |exponent| format!("Zipf ({exponent})"));
    write!(out, "a table of {rows} x {dim} f32, {batch} {law} ids, {}", machine.name()?)?;
    writeln!(out, ", {sparse_update:?} with {state_dtype:?} moments")?;
    writeln!(out)?;
    let (is_gpu, is_plain) = (machine.is_gpu(), args.is_plain());
    let mut header = vec!["case", "implementation", "median ms"];
    if !is_gpu || !is_plain {
        header.push(if is_plain { "per memory" } else { "per lazy" });
    }
    if is_gpu {
        header.extend(["bytes per case", "GB/s", "of copy", "host us"]);
    }
    header.push("rounds");
    let row = |line: &Line| {
        let mut row = vec![line.case.to_owned(), line.implementation.to_owned()];
        row.push(cell(Some(line.median_ms), if is_gpu { 4 } else { 3 }));
        if !is_gpu || !is_plain {
            row.push(cell(line.per_other, 2));
        }
        if is_gpu {
            row.push(line.bytes.map_or("-".to_owned(), |bytes| bytes.to_string()));
            row.extend([cell(line.gb_per_s, 2), percent(line.of_copy), cell(line.host_us, 1)]);
        }
        row.push(line.rounds.to_string());
        row
    };
    Ok(print(out, &header, &lines.iter().map(row).collect::<Vec<_>>())?)
}

fn print_notes(out: &mut impl Write, args: &Args, measured: &Measured) -> Result<()> {
    if measured.dense.is_none() && !args.no_dense {
        writeln!(out, "{ADAMW} is left out: it would need {:.0} GB.", args.bytes_of_dense() as f64 / 1e9)?;
    }
    writeln!(
        out,
        "step: coalesce and update of the {} rows of a batch, {} bytes a number and 4 of its gradient",
        measured.touched,
        args.bytes_of_a_number(),
    )?;
    writeln!(out, "whole: lookup, a linear layer to one number, a mean of squares, backward, step")?;
    let table_bytes = args.table_bytes();
    let moments = match args.state {
        State::F32 => 2 * table_bytes,
        State::Bf16 | State::F16 => table_bytes + 4 * args.rows as u64,
        State::Q8 => table_bytes / 2 + 4 * args.rows as u64,
    };
    writeln!(
        out,
        "{}; the table is {:.0} MB, its moments would be {:.0} MB if all were touched",
        measured.used,
        table_bytes as f64 / 1e6,
        moments as f64 / 1e6,
    )?;
    Ok(())
}
