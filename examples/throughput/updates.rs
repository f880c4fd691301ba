//! Dense gradients: a step of this crate's optimizer, candle-nn's AdamW and the memory's own speed, in turn.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use candle_adamax::{Adamax, ParamsAdamax, Rounding, StateDType};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde::Serialize;

use crate::machine::{COPY_BYTES, Machine, Times, Used};
use crate::support::case::{Case, Step};
use crate::table::{cell, percent, print};
use crate::{ADAMW, COPY, Common, MEMORY, OURS, median, of_neighbors};

/// From here on AdamW takes seconds on a CPU, and is timed a few times only.
const LARGE: usize = 4_000_000;
const ADAMW_ROUNDS_IF_LARGE: usize = 7;

/// What AdamW keeps, in arrays of the size of all variables: variables, gradients and two moments.
const ADAMW_KEEPS: u64 = 4;
/// The intermediate results that it has of one variable at its worst.
const ADAMW_HOLDS: u64 = 8;

/// What is updated.
pub(crate) struct Work {
    name: &'static str,
    shapes: Vec<Vec<usize>>,
    dtype: DType,
    state: StateDType,
    rounding: Rounding,
}

impl Work {
    /// As many elements as memory could have.
    pub(crate) fn new(name: &'static str, shapes: Vec<Vec<usize>>, common: &Common) -> Result<Self> {
        let len = |shape: &Vec<usize>| shape.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim));
        let total = shapes.iter().try_fold(0usize, |sum, shape| sum.checked_add(len(shape)?));
        let total = total.filter(|&total| total <= isize::MAX as usize / 64);
        let total = total.with_context(|| format!("the elements of {} tensors fit into no memory", shapes.len()))?;
        ensure!(total > 0, "--elements: expected at least 1, got 0");
        let (dtype, state, rounding) = (common.dtype.into(), common.state.into(), common.rounding.into());
        Ok(Self { name, shapes, dtype, state, rounding })
    }

    fn total(&self) -> usize {
        self.shapes.iter().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// As many elements in one row, with moments that are stored in this way.
    fn in_a_row(&self, state: StateDType) -> Case {
        Case { tensors: 1, elements: self.total(), dtype: self.dtype, state, rounding: self.rounding }
    }

    /// Variables on a device, and a gradient for each.
    fn vars_and_grads(&self, device: &Device) -> Result<(Vec<Var>, GradStore)> {
        let (mut vars, mut grads) = (Vec::with_capacity(self.shapes.len()), GradStore::default());
        for shape in &self.shapes {
            let case = Case { elements: shape.iter().product(), ..self.in_a_row(self.state) };
            let (made, of_made) = case.vars_and_grads()?;
            for made in made {
                let grad = of_made.get(&made).context("expected a gradient for each variable")?;
                let placed = |tensor: &Tensor| tensor.reshape(shape.as_slice())?.to_device(device);
                let grad = placed(grad)?;
                // Where it can stay it is not copied: that would show in the peak memory.
                let stays = device.is_cpu() && made.dims() == shape.as_slice();
                let var = if stays { made } else { Var::from_tensor(&placed(&made)?)? };
                grads.insert(&var, grad);
                vars.push(var);
            }
        }
        Ok((vars, grads))
    }

    /// A step of this crate's optimizer.
    fn adamax(&self, state_dtype: StateDType, device: &Device) -> Result<Step> {
        let (vars, grads) = self.vars_and_grads(device)?;
        let params = ParamsAdamax { state_dtype, rounding: self.rounding, ..ParamsAdamax::default() };
        let mut optimizer = Adamax::new(vars, params)?;
        Ok(Box::new(move || Ok(optimizer.step(&grads).map(drop)?)))
    }

    /// A step of candle-nn's optimizer, on variables of its own.
    fn adamw(&self, device: &Device) -> Result<Step> {
        let (vars, grads) = self.vars_and_grads(device)?;
        let mut optimizer = AdamW::new(vars, ParamsAdamW::default())?;
        Ok(Box::new(move || optimizer.step(&grads)))
    }

    /// The bytes that the latter takes.
    fn bytes_of_adamw(&self) -> u64 {
        let largest = self.shapes.iter().map(|shape| shape.iter().product::<usize>()).max().unwrap_or(0);
        let elements = ADAMW_KEEPS * self.total() as u64 + ADAMW_HOLDS * largest as u64;
        elements * self.dtype.size_in_bytes() as u64
    }
}

/// The shapes of BERT-base's parameters without the pooler.
pub(crate) fn bert() -> Vec<Vec<usize>> {
    const LAYERS: usize = 12;
    const HIDDEN: usize = 768;
    const INTERMEDIATE: usize = 3072;
    const VOCABULARY: usize = 30_522;
    const POSITIONS: usize = 512;
    let norm = || [vec![HIDDEN], vec![HIDDEN]];
    let linear = |inputs, outputs| [vec![outputs, inputs], vec![outputs]];
    let mut shapes: Vec<_> = [VOCABULARY, POSITIONS, 2].map(|rows| vec![rows, HIDDEN]).into();
    shapes.extend(norm());
    for _ in 0..LAYERS {
        for _ in 0..4 {
            shapes.extend(linear(HIDDEN, HIDDEN)); // query, key, value, output
        }
        shapes.extend(norm());
        shapes.extend(linear(HIDDEN, INTERMEDIATE));
        shapes.extend(linear(INTERMEDIATE, HIDDEN));
        shapes.extend(norm());
    }
    shapes
}

/// One of those that take turns.
struct Contender {
    name: &'static str,
    state: StateDType,
    bytes: u64,
    /// None when it has run in all of its rounds, and has given its memory back.
    step: Option<Step>,
    rounds: usize,
    times: Times,
}

impl Contender {
    /// Its first steps, which are not timed.
    fn warm_up(&mut self, machine: &Machine) -> Result<()> {
        for _ in 0..machine.warm_up() {
            if let Some(step) = &mut self.step {
                step()?;
            }
        }
        Ok(())
    }

    fn round(&mut self, machine: &Machine) -> Result<()> {
        if let Some(step) = &mut self.step {
            machine.time(&mut self.times, step)?;
        }
        if self.times.ms.len() == self.rounds {
            self.step = None;
        }
        Ok(())
    }
}

/// What has been measured.
struct Measured {
    ours: Contender,
    /// What the memory can do; on a GPU a copy.
    memory: Contender,
    /// With moments as they are, if those of `ours` are encoded.
    full: Option<Contender>,
    /// None if its memory does not fit.
    adamw: Option<Contender>,
    /// Before anything was there.
    before: Option<Used>,
    /// With `ours` alone.
    used: Option<Used>,
}

/// Times one step of each in turn.
fn measure(machine: &Machine, work: &Work, rounds: usize) -> Result<Measured> {
    let contender = |name, state, step| -> Result<Contender> {
        let bytes = work.in_a_row(state).bytes();
        let mut contender = Contender { name, state, bytes, step: Some(step), rounds, times: Times::default() };
        contender.warm_up(machine)?;
        Ok(contender)
    };
    let (state, device) = (work.state, &machine.device);
    let before = machine.used_memory()?;
    let mut ours = contender(OURS, state, work.adamax(state, device)?)?;
    let used = machine.used_memory()?;
    let mut memory = match machine.is_gpu() {
        false => contender(MEMORY, state, work.in_a_row(state).memory()?)?,
        true => Contender { bytes: COPY_BYTES, ..contender(COPY, state, machine.copy()?)? },
    };
    let mut full = match state {
        StateDType::F32 => None,
        _ => Some(contender("  f32 moments", StateDType::F32, work.adamax(StateDType::F32, device)?)?),
    };
    let mut adamw = match machine.free_memory()?.is_none_or(|free| work.bytes_of_adamw() < free) {
        false => None,
        true => Some(contender(ADAMW, state, work.adamw(device)?)?),
    };
    if let Some(adamw) = &mut adamw
        && !machine.is_gpu()
        && work.total() >= LARGE
    {
        adamw.rounds = rounds.min(ADAMW_ROUNDS_IF_LARGE);
    }
    for _ in 0..rounds {
        for contender in [&mut ours, &mut memory].into_iter().chain(&mut full) {
            contender.round(machine)?;
        }
        if let Some(adamw) = &mut adamw {
            adamw.round(machine)?;
            machine.settle();
        }
    }
    Ok(Measured { ours, memory, full, adamw, before, used })
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    case: &'static str,
    implementation: &'static str,
    device: String,
    median_ms: f64,
    /// How long the call took to return; on the CPU that is all of its time.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_us: Option<f64>,
    /// What an update of Adamax in these types cannot avoid; the same for all, so that GB/s compare as times do. Of a
    /// copy, what it reads and writes.
    bytes: u64,
    gb_per_s: f64,
    /// The time in terms of the memory's; on a GPU, of a copy that moves as many bytes.
    per_memory: f64,
    /// The bandwidth in terms of the copy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_copy: Option<f64>,
    tensors: usize,
    /// Of all tensors.
    elements: usize,
    dtype: &'static str,
    state: String,
    rounds: usize,
    threads: usize,
}

impl Measured {
    /// The time in terms of the memory's. Noise that lasts longer than a round is in both, and cancels, where there
    /// are as many rounds of both.
    fn per_memory(&self, machine: &Machine, contender: &Contender) -> f64 {
        let (times, memory) = (&contender.times.ms, &self.memory.times.ms);
        let ratio = match times.len() == memory.len() {
            true => of_neighbors(times, memory),
            false => median(times) / median(memory),
        };
        // The CPU's memory moves what `ours` does.
        if machine.is_gpu() { ratio * self.memory.bytes as f64 / contender.bytes as f64 } else { ratio }
    }

    fn lines(&self, machine: &Machine, work: &Work) -> Result<Vec<Line>> {
        let device = machine.name()?;
        let of_gpu = |number| machine.is_gpu().then_some(number);
        let line = |contender: &Contender| {
            let Contender { name, state, bytes, times, .. } = contender;
            let per_memory = self.per_memory(machine, contender);
            Line {
                case: work.name,
                implementation: name,
                device: device.clone(),
                median_ms: median(&times.ms),
                host_us: of_gpu(median(&times.host_us)),
                bytes: *bytes,
                gb_per_s: *bytes as f64 / median(&times.ms) / 1e6,
                per_memory,
                of_copy: of_gpu(1.0 / per_memory),
                tensors: work.shapes.len(),
                elements: work.total(),
                dtype: work.dtype.as_str(),
                state: format!("{state:?}"),
                rounds: times.ms.len(),
                threads: rayon::current_num_threads(),
            }
        };
        Ok([&self.ours].into_iter().chain(&self.full).chain(&self.adamw).chain([&self.memory]).map(line).collect())
    }
}

/// Times all of them and prints it.
pub(crate) fn run(machine: &Machine, work: &Work, rounds: Option<usize>, json: bool) -> Result<()> {
    let of_large = if machine.is_gpu() { 50 } else { 15 };
    let rounds = rounds.unwrap_or(if work.total() < 1_000_000 { 200 } else { of_large });
    ensure!(rounds > 0, "--rounds: expected at least 1, got 0");
    let measured = measure(machine, work, rounds)?;
    let lines = measured.lines(machine, work)?;
    let mut out = std::io::stdout().lock();
    if json {
        for line in &lines {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        }
        return Ok(());
    }
    print_head(&mut out, machine, work)?;
    print_table(&mut out, machine, &lines)?;
    writeln!(out)?;
    print_ratios(&mut out, machine, work, &measured)
}

fn print_head(out: &mut impl Write, machine: &Machine, work: &Work) -> Result<()> {
    let Work { shapes, dtype, state, rounding, .. } = work;
    let tensors = if shapes.len() == 1 { "tensor" } else { "tensors" };
    write!(out, "{} {tensors}, {} elements of {} in all", shapes.len(), work.total(), dtype.as_str())?;
    write!(out, ", {state:?} moments, {}", machine.name()?)?;
    match rounding {
        Rounding::Nearest => writeln!(out)?,
        _ => writeln!(out, ", {rounding:?} rounding")?,
    }
    Ok(writeln!(out)?)
}

fn print_table(out: &mut impl Write, machine: &Machine, lines: &[Line]) -> Result<()> {
    let numbers = |line: &Line| match machine.is_gpu() {
        false => vec![format!("{:.2}", line.per_memory)],
        true => vec![percent(line.of_copy), cell(line.host_us, 1)],
    };
    let row = |line: &Line| {
        let mut row = vec![line.case.to_owned(), line.implementation.to_owned()];
        row.push(format!("{:.*}", if machine.is_gpu() { 4 } else { 3 }, line.median_ms));
        row.extend([line.bytes.to_string(), format!("{:.2}", line.gb_per_s)]);
        row.extend(numbers(line));
        row.push(line.rounds.to_string());
        row
    };
    let more: &[&str] = if machine.is_gpu() { &["of copy", "host us"] } else { &["per memory"] };
    let header = [&["case", "implementation", "median ms", "bytes per step", "GB/s"], more, &["rounds"]].concat();
    Ok(print(out, &header, &lines.iter().map(row).collect::<Vec<_>>())?)
}

fn print_ratios(out: &mut impl Write, machine: &Machine, work: &Work, measured: &Measured) -> Result<()> {
    let Measured { ours, full, adamw, .. } = measured;
    let per_memory = measured.per_memory(machine, ours);
    match machine.is_gpu() {
        false => writeln!(out, "{OURS} / {MEMORY}: {per_memory:.2} (median of the rounds' ratios)")?,
        true => writeln!(
            out,
            "{OURS}: {} of the copy's bandwidth (median of the rounds' ratios)",
            percent(Some(1.0 / per_memory))
        )?,
    }
    if let Some(full) = full {
        let ratio = of_neighbors(&ours.times.ms, &full.times.ms);
        writeln!(out, "{:?} moments / f32 moments: {ratio:.2} (median of the rounds' ratios)", work.state)?;
    }
    writeln!(out, "{}", machine.describe_memory(measured.used, measured.before))?;
    match adamw {
        Some(adamw) => {
            writeln!(out, "{ADAMW} / {OURS}: {:.1}", median(&adamw.times.ms) / median(&ours.times.ms))?;
        }
        None => writeln!(out, "{ADAMW} is left out: it would need {:.1} GB.", work.bytes_of_adamw() as f64 / 1e9)?,
    }
    match machine.is_gpu() {
        false if work.shapes.len() > 1 => {
            writeln!(
                out,
                "The memory's line is the bytes of all {} tensors in one row: four large arrays.",
                work.shapes.len()
            )?;
        }
        false => {}
        true => writeln!(out, "host us: how long the call takes to return, the GPU being idle at first.")?,
    }
    Ok(())
}
