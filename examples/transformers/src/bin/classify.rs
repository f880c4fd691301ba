//! Fine-tunes a BERT of candle-transformers, all layers, to tell the labels of lines of text.
//!
//! ```sh
//! cargo run --release --bin classify                        # a small model with new weights, which reads bytes
//! cargo run --release --bin classify -- --model all-MiniLM-L6-v2 --lr 4e-4
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use candle_adamax::{Adamax, Clip, ParamsAdamax};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder, VarMap, linear, loss};
use candle_transformers::models::bert::{BertModel, Config};
use clap::Parser;
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

/// Fine-tunes a BERT of candle-transformers, all layers, to tell the labels of lines of text.
#[derive(Parser)]
struct Args {
    /// A folder with config.json, model.safetensors and tokenizer.json, as Hugging Face has it [default: a small model
    /// with new weights]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Lines of a label (0, 1, ..), a tab and a text
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/reviews.tsv"))]
    data: PathBuf,
    /// How many steps
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// The learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::Cpu;
    let (texts, labels) = read(&args.data)?;
    let classes = labels.iter().max().with_context(|| format!("{} has no lines", args.data.display()))? + 1;
    ensure!(
        classes as usize <= labels.len(),
        "labels are numbers from 0 up to {}: there are {} lines",
        classes - 1,
        labels.len()
    );
    let labels = Tensor::new(labels, &device)?;
    let (config, ids, mask) = match &args.model {
        Some(folder) => tokenize(folder, texts, &device)?,
        None => bytes(&texts, &device)?,
    };

    // The model, with all weights as variables, and a head.
    let mut varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let model = BertModel::load(vb.clone(), &config)?;
    if let Some(folder) = &args.model {
        varmap.load(folder.join("model.safetensors"))?; // before the head, which the file does not have
    }
    let head = linear(config.hidden_size, classes as usize, vb.pp("head"))?;

    let params = ParamsAdamax { lr: args.lr.into(), clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
    let mut optimizer = Adamax::from_varmap(&varmap, params)?;
    for step in 1..=args.steps {
        let hidden = model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        // The mean over the tokens that are no padding.
        let weights = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let mean = hidden.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&weights.sum(1)?)?;
        let loss = loss::cross_entropy(&head.forward(&mean)?, &labels)?;
        let grads = loss.backward()?;
        if step == 1 {
            println!("{}", optimizer.audit(&grads)?);
        }
        optimizer.step(&grads)?;
        println!("step {step}: loss {:.4}, {}", loss.to_scalar::<f32>()?, optimizer.report());
    }
    Ok(())
}

/// Texts and labels.
fn read(path: &Path) -> Result<(Vec<String>, Vec<u32>)> {
    let content = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let line = |line: &str| {
        let (label, text) = line.split_once('\t').with_context(|| format!("no tab in {line:?}"))?;
        Ok((text.to_owned(), label.parse::<u32>().with_context(|| format!("no label in {line:?}"))?))
    };
    content.lines().map(line).collect()
}

/// The configuration of a model, and for the texts ids and a mask that is 0 where there is padding.
fn tokenize(folder: &Path, texts: Vec<String>, device: &Device) -> Result<(Config, Tensor, Tensor)> {
    let path = folder.join("config.json");
    let config = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Config = serde_json::from_str(&config).with_context(|| path.display().to_string())?;
    let path = folder.join("tokenizer.json");
    let mut tokenizer =
        Tokenizer::from_file(&path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
    tokenizer.with_padding(Some(PaddingParams::default()));
    let truncation = TruncationParams { max_length: config.max_position_embeddings, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(anyhow::Error::msg)?;
    let encodings = tokenizer.encode_batch(texts, true).map_err(anyhow::Error::msg)?;
    let ids: Vec<_> = encodings.iter().map(|encoding| encoding.get_ids()).collect();
    let mask: Vec<_> = encodings.iter().map(|encoding| encoding.get_attention_mask()).collect();
    Ok((config, Tensor::new(ids, device)?, Tensor::new(mask, device)?))
}

/// The same for a small model that reads bytes.
fn bytes(texts: &[String], device: &Device) -> Result<(Config, Tensor, Tensor)> {
    const LENGTH: usize = 64;
    ensure!(texts.iter().all(|text| !text.is_empty()), "a text is empty");
    let config = Config {
        vocab_size: 256,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 128,
        max_position_embeddings: LENGTH,
        ..Config::default()
    };
    let byte = |text: &String, i: usize| text.as_bytes().get(i).copied();
    let all = || texts.iter().flat_map(|text| (0..LENGTH).map(move |i| byte(text, i)));
    let shape = (texts.len(), LENGTH);
    let ids: Vec<_> = all().map(|byte| u32::from(byte.unwrap_or(0))).collect();
    let mask: Vec<_> = all().map(|byte| u32::from(byte.is_some())).collect();
    Ok((config, Tensor::from_vec(ids, shape, device)?, Tensor::from_vec(mask, shape, device)?))
}
