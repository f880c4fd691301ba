//! Rows that are pooled: what the forward pass of a bag costs, and what all of a training step does, beside the memory's
//! own speed.
//!
//! Every round has ids of its own. The memory's forward pass reads the rows of the ids and writes the pooled ones; its
//! training step reads and writes the touched rows of weights and moments besides, in order.

use anyhow::{Context, Result, bail, ensure};
use candle_adamax::{Adamax, EmbeddingBag, ParamsAdamax, Pooling};
use candle_core::{DType, Storage, Tensor, Var};
use candle_nn::{Module, Optimizer};
use clap::ValueEnum;
use serde::Serialize;

use crate::ids::{self, Batches};
use crate::lines::Line;
use crate::machine::{Machine, Times};
use crate::options::at_least_one;
use crate::support::rows::{self, Rows, Touched};
use crate::{MEMORY, OURS};

/// Steps before anything is timed: they touch most large pages of the moments.
const WARM_UP: usize = 5;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: Shape,
    /// Draw ids by Zipf's law with this exponent, instead of uniformly: the row of rank k in proportion to 1 / k^S. Ranks are
    /// dealt over the table.
    #[arg(long, value_name = "S")]
    zipf: Option<f64>,
    /// How often each is timed, after some steps to warm up.
    #[arg(long, default_value_t = 30, value_parser = at_least_one)]
    rounds: usize,
}

#[derive(clap::Args, Clone, Copy, Serialize)]
struct Shape {
    /// How many rows the table has.
    #[arg(long)]
    rows: usize,
    /// How many numbers a row has.
    #[arg(long, default_value_t = 64, value_parser = at_least_one)]
    dim: usize,
    /// How many bags a batch has.
    #[arg(long, default_value_t = 8192, value_parser = at_least_one)]
    bags: usize,
    /// How many ids a bag has.
    #[arg(long, default_value_t = 20, value_parser = at_least_one)]
    per_bag: usize,
    /// How the rows of a bag are pooled.
    #[arg(long, value_enum, default_value = "mean")]
    pooling: Pool,
}

#[derive(Clone, Copy, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Pool {
    Mean,
    Sum,
}

/// A table whose rows are pooled, and its optimizer.
struct Ours {
    bag: EmbeddingBag,
    optimizer: Adamax,
}

impl Ours {
    fn new(machine: &Machine, shape: Shape) -> Result<Self> {
        // Not random: what the values are does not matter, and drawing billions of them takes its time.
        let table = Var::ones((shape.rows, shape.dim), DType::F32, &machine.device)?;
        let pooling = match shape.pooling {
            Pool::Mean => Pooling::Mean,
            Pool::Sum => Pooling::Sum,
        };
        let bag = EmbeddingBag::new(table.as_tensor().clone(), pooling)?;
        Ok(Self { bag, optimizer: Adamax::new(vec![table], ParamsAdamax::default())? })
    }

    fn whole(&mut self, ids: &Tensor) -> candle_core::Result<()> {
        let loss = self.bag.forward(ids)?.sqr()?.mean_all()?;
        Ok(self.optimizer.backward_step(&loss).map(drop)?)
    }
}

/// The CPU's memory's own speed.
struct Memory {
    rows: Rows,
    shape: Shape,
    grads: Vec<f32>,
    pooled: Vec<u32>,
}

impl Memory {
    fn new(shape: Shape) -> Result<Self> {
        let grads = vec![0.5; shape.bags * shape.dim];
        Ok(Self { rows: Rows::new(shape.rows, shape.dim)?, shape, grads, pooled: Vec::new() })
    }

    /// Pools rows of `table`, so that the forward passes of both find the same in the caches.
    fn forward(&mut self, table: &[f32], ids: &[u32]) {
        rows::pool(bytemuck::cast_slice(table), self.shape.dim, ids, self.shape.per_bag, &mut self.pooled);
    }

    /// On rows of its own.
    fn whole(&mut self, ids: &[u32], touched: &Touched) {
        self.rows.pool(ids, self.shape.per_bag);
        self.rows.update(touched, &self.grads);
    }
}

/// The times of the forward pass, and of the whole step.
type BothTimes = [Times; 2];

fn measure(machine: &Machine, args: &Args) -> Result<(BothTimes, Option<BothTimes>)> {
    let &Args { shape, zipf, rounds } = args;
    let mut batches = Batches::new(shape.rows, shape.bags * shape.per_bag, zipf)?;
    let on_device = |ids: Vec<u32>| Tensor::from_vec(ids, (shape.bags, shape.per_bag), &machine.device);
    let touched = |ids: &[u32]| Touched::of_bags(ids, shape.per_bag);
    let mut ours = Ours::new(machine, shape)?;
    let mut memory = if machine.is_gpu() { None } else { Some(Memory::new(shape)?) };
    for _ in 0..WARM_UP.max(machine.warm_up()) {
        let ids = batches.draw();
        if let Some(memory) = &mut memory {
            memory.whole(&ids, &touched(&ids));
        }
        ours.whole(&on_device(ids)?)?;
    }
    let (mut of_ours, mut of_memory) = (BothTimes::default(), memory.as_ref().map(|_| BothTimes::default()));
    // One after the other: a step leaves other rows in the caches, and writes that are still under way.
    for _ in 0..rounds {
        let ids = on_device(batches.draw())?;
        machine.time(&mut of_ours[0], || ours.bag.forward(&ids).map(drop))?;
        if let Some((memory, times)) = memory.as_mut().zip(of_memory.as_mut()) {
            let ids = batches.draw();
            let weight = ours.bag.embeddings()?;
            let (storage, _) = weight.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { bail!("expected a table in host memory") };
            let table = storage.as_slice::<f32>()?;
            machine.time(&mut times[0], || {
                memory.forward(table, &ids);
                Ok(())
            })?;
        }
    }
    for _ in 0..rounds {
        let ids = on_device(batches.draw())?;
        machine.time(&mut of_ours[1], || ours.whole(&ids))?;
        machine.settle();
        if let Some((memory, times)) = memory.as_mut().zip(of_memory.as_mut()) {
            let ids = batches.draw();
            let touched = touched(&ids);
            machine.time(&mut times[1], || {
                memory.whole(&ids, &touched);
                Ok(())
            })?;
        }
    }
    Ok((of_ours, of_memory))
}

/// Times both and prints them.
pub(crate) fn run(machine: &Machine, args: &Args, json: bool) -> Result<()> {
    let Shape { rows, dim, bags, per_bag, .. } = args.shape;
    ids::check_table(rows, dim)?;
    let ids = bags.checked_mul(per_bag).filter(|&ids| u32::try_from(ids).is_ok());
    ids.with_context(|| format!("--bags, --per-bag: expected at most 4294967295 ids, got {bags} times {per_bag}"))?;
    ensure!(bags <= isize::MAX as usize / 4 / dim, "--bags, --dim: {bags} rows of {dim} numbers do not fit");
    let (ours, memory) = measure(machine, args)?;
    let mut lines = Vec::new();
    for (index, case) in ["bag forward", "bag whole"].into_iter().enumerate() {
        let memory = memory.as_ref().map(|times| &times[index]);
        lines.push(Line::new(machine, (case, OURS), &ours[index], memory, args.shape)?);
        if let Some(memory) = memory {
            lines.push(Line::new(machine, (case, MEMORY), memory, Some(memory), args.shape)?);
        }
    }
    let law = args.zipf.map_or("uniform".to_owned(), |exponent| format!("Zipf ({exponent})"));
    let head = format!("{bags} bags of {per_bag} {law} ids, a table of {rows} x {dim} f32, {}", machine.name()?);
    Line::print_all(&lines, json, &head, "per memory")?;
    if !json {
        println!("\nbag whole: forward, a mean of squares, backward, step");
    }
    Ok(())
}
