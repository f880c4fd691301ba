//! Fine-tunes a BERT encoder of candle-transformers beside PyTorch: the same weights, the same batches, the same losses.
//!
//! ```text
//! cargo run --release --bin minilm                                    a small encoder with made-up weights
//! cargo run --release --bin minilm -- --model DIR                     a model as Hugging Face has it
//! cargo run --release --bin minilm -- --model DIR --compare FILE      beside the losses that PyTorch has recorded
//! cargo run --release --bin minilm -- --model DIR --time              seconds of a forward and a backward pass
//! ```
//!
//! `benches/peers/minilm.py` is the program for PyTorch. A linear classifier stands on the mean of the tokens of a text.
//! There is no dropout. Tokens, lengths and made-up weights come from a linear congruential generator of 64 bits, which
//! is as short in any language.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear, loss};
use candle_transformers::models::bert::{BertModel, Config};
use clap::Parser;
use serde::Deserialize;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h: the time in ms after which free memory goes back to the kernel; -1 is never.
const PURGE_DELAY: i32 = 15;

const CLASSES: usize = 4;

#[derive(Parser)]
#[command(about = "Fine-tunes a BERT encoder of candle-transformers beside PyTorch")]
struct Args {
    /// A folder with config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Updates, or rounds with --time.
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Learning rate: 3e-3, or 5e-5 with --model.
    #[arg(long)]
    lr: Option<f64>,
    /// Texts in a batch: 8, or 32 with --time.
    #[arg(long)]
    texts: Option<usize>,
    /// Tokens of the longest text: 32, or 48 with --time.
    #[arg(long)]
    tokens: Option<usize>,
    /// Losses that benches/peers/minilm.py has written. A loss that differs by more than 5e-5 is an error.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Times passes and trains nothing.
    #[arg(long)]
    time: bool,
}

/// A recording of PyTorch's run.
#[derive(Deserialize)]
struct Recording {
    lr: f64,
    texts: usize,
    tokens: usize,
    losses: Vec<f32>,
}

/// A linear congruential generator (Knuth's MMIX).
struct Numbers(u64);

impl Numbers {
    /// 31 bits.
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize
    }

    /// Numbers between -bound and bound, around `center`.
    fn uniform(&mut self, shape: &[usize], bound: f64, center: f32) -> candle_core::Result<Tensor> {
        let numbers = (0..shape.iter().product())
            .map(|_| ((self.next() as f64 / f64::from(1u32 << 30) - 1.0) * bound) as f32 + center);
        Tensor::from_iter(numbers, &Device::Cpu)?.reshape(shape)
    }
}

/// Ids, mask and classes of texts. A token in three is one of the fifty of its text's class.
struct Batch {
    ids: Tensor,
    mask: Tensor,
    classes: Tensor,
}

impl Batch {
    fn new(step: usize, texts: usize, tokens: usize, vocabulary: usize) -> candle_core::Result<Self> {
        let mut numbers = Numbers(step as u64);
        let (mut ids, mut mask) = (vec![0u32; texts * tokens], vec![0f32; texts * tokens]);
        for (text, (ids, mask)) in ids.chunks_mut(tokens).zip(mask.chunks_mut(tokens)).enumerate() {
            let length = tokens / 2 + numbers.next() % (tokens - tokens / 2 + 1);
            for id in &mut ids[..length] {
                let (is_of_class, number) = (numbers.next().is_multiple_of(3), numbers.next());
                let (first, count) =
                    if is_of_class { (200 + 50 * (text % CLASSES), 50) } else { (400, vocabulary - 400) };
                *id = (first + number % count) as u32;
            }
            mask[..length].fill(1.0);
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, (texts, tokens), &Device::Cpu)?,
            mask: Tensor::from_vec(mask, (texts, tokens), &Device::Cpu)?,
            classes: Tensor::from_iter((0..texts).map(|text| (text % CLASSES) as u32), &Device::Cpu)?,
        })
    }
}

/// The encoder with its classifier.
struct Model {
    varmap: VarMap,
    encoder: BertModel,
    classifier: Linear,
    vocabulary: usize,
}

impl Model {
    fn new(folder: Option<&Path>) -> Result<Self> {
        let config: Config = match folder {
            Some(folder) => {
                let path = folder.join("config.json");
                let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                serde_json::from_str(&text).with_context(|| path.display().to_string())?
            }
            None => Config {
                vocab_size: 1200,
                hidden_size: 64,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                intermediate_size: 128,
                max_position_embeddings: 64,
                ..Config::default()
            },
        };
        let mut varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let encoder = BertModel::load(vb.clone(), &config)?;
        match folder {
            Some(folder) => varmap.load(folder.join("model.safetensors"))?,
            None => make_up(&varmap)?,
        }
        let classifier = linear(config.hidden_size, CLASSES, vb.pp("classifier"))?;
        let weight = Numbers(1).uniform(&[CLASSES, config.hidden_size], 0.05, 0.0)?;
        varmap.set_one("classifier.weight", weight)?;
        varmap.set_one("classifier.bias", Tensor::zeros(CLASSES, DType::F32, &Device::Cpu)?)?;
        Ok(Self { varmap, encoder, classifier, vocabulary: config.vocab_size })
    }

    fn loss(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let x = self.encoder.forward(&batch.ids, &batch.ids.zeros_like()?, Some(&batch.mask))?;
        let weights = batch.mask.unsqueeze(2)?;
        let mean = x.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&weights.sum(1)?)?;
        loss::cross_entropy(&self.classifier.forward(&mean)?, &batch.classes)
    }
}

/// Gives every weight numbers that follow from its name.
fn make_up(varmap: &VarMap) -> Result<()> {
    let vars = varmap.data().lock().map_err(|_| anyhow::anyhow!("a thread that held the weights has panicked"))?;
    for (name, var) in vars.iter() {
        let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let center = if name.ends_with("LayerNorm.weight") { 1.0 } else { 0.0 };
        var.set(&Numbers(seed).uniform(var.dims(), 0.08, center)?)?;
    }
    Ok(())
}

/// Trains, prints losses, and compares them with a recording.
fn train(args: &Args, model: &Model) -> Result<()> {
    let recording = args.compare.as_deref().map(read).transpose()?;
    let from_recording = |number: fn(&Recording) -> usize, default| recording.as_ref().map_or(default, number);
    let texts = args.texts.unwrap_or(from_recording(|recording| recording.texts, 8));
    let tokens = args.tokens.unwrap_or(from_recording(|recording| recording.tokens, 32));
    let lr = recording.as_ref().map_or(if args.model.is_some() { 5e-5 } else { 3e-3 }, |recording| recording.lr);
    let params = ParamsAdamax { lr: args.lr.unwrap_or(lr).into(), ..ParamsAdamax::pytorch() };
    let mut optimizer = Adamax::from_varmap(&model.varmap, params)?;
    let mut largest = 0f32;
    for step in 0..args.steps {
        let loss = model.loss(&Batch::new(step, texts, tokens, model.vocabulary)?)?;
        optimizer.backward_step(&loss)?;
        let loss = loss.to_scalar::<f32>()?;
        let recorded = recording.as_ref().and_then(|recording| recording.losses.get(step));
        largest = recorded.map_or(largest, |recorded| largest.max((loss - recorded).abs()));
        if step % 10 == 0 || step + 1 == args.steps {
            match recorded {
                Some(recorded) => println!("step {step:3} loss {loss:.4} PyTorch {recorded:.4}"),
                None => println!("step {step:3} loss {loss:.4}"),
            }
        }
    }
    if recording.is_some() {
        println!("largest difference of {} losses: {largest:.1e}", args.steps);
        ensure!(largest < 5e-5, "a loss differs from PyTorch's by {largest:e}; at most 5e-5 is allowed");
    }
    Ok(())
}

fn read(path: &Path) -> Result<Recording> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// Prints the medians of passes on one batch.
fn time(args: &Args, model: &Model) -> Result<()> {
    let batch = Batch::new(0, args.texts.unwrap_or(32), args.tokens.unwrap_or(48), model.vocabulary)?;
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..=args.steps {
        let begin = Instant::now();
        let loss = model.loss(&batch)?;
        let middle = Instant::now();
        drop(loss.backward()?);
        forward.push(middle - begin);
        backward.push(middle.elapsed());
    }
    let [forward, backward] = [forward, backward].map(|mut times| {
        let times = &mut times[1..]; // the first round warms up
        times.sort();
        times[times.len() / 2].as_secs_f64()
    });
    println!("forward {forward:.4} s, backward {backward:.4} s");
    Ok(())
}

fn main() -> Result<()> {
    // Memory that comes from the kernel is filled with zeros first: a third of a backward pass.
    // SAFETY: the number is an option of the mimalloc that is linked, and its options may be set at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    let args = Args::parse();
    for (name, number) in [("steps", Some(args.steps)), ("texts", args.texts), ("tokens", args.tokens)] {
        ensure!(number != Some(0), "--{name} is 0; it must be at least 1");
    }
    let model = Model::new(args.model.as_deref())?;
    if args.time { time(&args, &model) } else { train(&args, &model) }
}
