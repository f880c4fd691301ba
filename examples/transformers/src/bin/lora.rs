//! LoRA on a sentence encoder: adapters on query and value in a group of their own, and a head in another.
//!
//! ```sh
//! cargo run --release --bin lora                                   # a small encoder with random weights
//! cargo run --release --bin lora -- --model all-MiniLM-L6-v2       # a folder with config, tokenizer and weights
//! cargo run --release --bin lora -- --stop-after 7                 # in the middle of an accumulation
//! cargo run --release --bin lora -- --resume                       # goes on with the same bits
//! ```
//!
//! It tells sentences on food from sentences on travel, prints how much memory the training takes beside that of all
//! weights, and writes the adapter in PEFT's files and the merged model.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
use candle_adapters::{Lora, LoraConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, safetensors};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear, loss};
use candle_transformers::models::bert::{BertModel, Config};
use clap::Parser;
use tokenizers::Tokenizer;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CPU: &Device = &Device::Cpu;
const BATCH: usize = 8;
const CLASSES: usize = 2;

#[derive(Parser)]
struct Args {
    /// A folder with `config.json`, `tokenizer.json` and `model.safetensors` of a BERT encoder.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where the adapter, the merged model and the state of the optimizer are written.
    #[arg(long, default_value = "lora-output")]
    out: PathBuf,
    /// Updates of the weights; each is of two batches.
    #[arg(long, default_value_t = 40)]
    steps: u64,
    /// The learning rate of the adapters; the head's is twice that.
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
    /// Stops after so many batches, and saves what a run needs to go on.
    #[arg(long)]
    stop_after: Option<u64>,
    /// Goes on where a run stopped.
    #[arg(long)]
    resume: bool,
}

/// Sentences of a few words; the last one makes the class.
struct Data {
    sentences: Vec<String>,
    tokenizer: Option<Tokenizer>,
    words: Vec<String>,
}

impl Data {
    fn new(tokenizer: Option<Tokenizer>) -> Self {
        let nouns = [
            "soup", "bread", "cheese", "salad", "pasta", "cake", "train", "harbour", "airport", "ticket", "bridge",
            "hotel",
        ];
        let mut sentences = Vec::new();
        for noun in nouns {
            for who in ["brother", "friend", "aunt", "teacher"] {
                for does in ["remembered", "described", "forgot"] {
                    sentences.push(format!("my {who} {does} the {noun}"));
                }
            }
        }
        let words: BTreeSet<_> = sentences.iter().flat_map(|text| text.split(' ')).map(str::to_owned).collect();
        Self { sentences, tokenizer, words: words.into_iter().collect() }
    }

    /// Number 0 is padding.
    fn vocabulary(&self) -> usize {
        self.words.len() + 1
    }

    /// Token numbers, which of them count, and classes, of some sentences.
    fn examples(&self, indices: impl Iterator<Item = usize>) -> Result<[Tensor; 3]> {
        let (mut rows, mut classes) = (Vec::new(), Vec::new());
        for index in indices {
            let text = &self.sentences[index];
            rows.push(match &self.tokenizer {
                Some(tokenizer) => {
                    let encoding = tokenizer.encode(text.as_str(), true).map_err(|error| anyhow!("{error}"))?;
                    encoding.get_ids().to_vec()
                }
                None => {
                    let number =
                        |word| self.words.binary_search_by(|other| other.as_str().cmp(word)).map(|at| at as u32 + 1);
                    text.split(' ').map(|word| number(word).unwrap_or(0)).collect()
                }
            });
            classes.push((index * CLASSES / self.sentences.len()) as u32);
        }
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        let counts: Vec<_> =
            rows.iter().flat_map(|row| (0..length).map(|at| f32::from(u8::from(at < row.len())))).collect();
        let tokens: Vec<_> =
            rows.iter().flat_map(|row| (0..length).map(|at| row.get(at).copied().unwrap_or(0))).collect();
        let shape = (rows.len(), length);
        let classes = Tensor::new(classes, CPU)?;
        Ok([Tensor::from_vec(tokens, shape, CPU)?, Tensor::from_vec(counts, shape, CPU)?, classes])
    }

    /// The batch of a call of the optimizer: a function of its number, so that a run can go on.
    fn batch(&self, call: u64) -> Result<[Tensor; 3]> {
        let first = call as usize * BATCH;
        // 37 and the number of sentences have no common factor.
        self.examples((first..first + BATCH).map(|at| at * 37 % self.sentences.len()))
    }
}

/// The mean of the encoder's vectors, and a head.
struct Classifier {
    encoder: BertModel,
    head: Linear,
}

impl Classifier {
    fn load(vb: VarBuilder<'_>, config: &Config) -> candle_core::Result<Self> {
        let head = linear(config.hidden_size, CLASSES, vb.pp("classifier"))?;
        Ok(Self { encoder: BertModel::load(vb, config)?, head })
    }

    fn logits(&self, tokens: &Tensor, counts: &Tensor) -> candle_core::Result<Tensor> {
        let vectors = self.encoder.forward(tokens, &tokens.zeros_like()?, Some(counts))?;
        let counts = counts.unsqueeze(2)?;
        let mean = vectors.broadcast_mul(&counts)?.sum(1)?.broadcast_div(&counts.sum(1)?)?;
        self.head.forward(&mean)
    }

    fn loss(&self, [tokens, counts, classes]: &[Tensor; 3]) -> candle_core::Result<Tensor> {
        loss::cross_entropy(&self.logits(tokens, counts)?, classes)
    }
}

/// The configuration of a small encoder, and the file with its weights.
fn small(out: &Path, vocabulary: usize) -> Result<(Config, PathBuf)> {
    let config = Config {
        vocab_size: vocabulary,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 128,
        max_position_embeddings: 16,
        ..Config::default()
    };
    let path = out.join("base.safetensors");
    if !path.exists() {
        let map = VarMap::new();
        BertModel::load(VarBuilder::from_varmap(&map, DType::F32, CPU), &config)?;
        let vars = map.data().lock().map_err(|error| anyhow!("{error}"))?.clone();
        let mut tensors = HashMap::new();
        for (name, var) in vars {
            let seed = name.bytes().fold(0u64, |seed, byte| (seed * 31 + u64::from(byte)) % 65_521) as f64;
            let value = |at: usize| match name.as_str() {
                name if name.ends_with("LayerNorm.weight") => 1.0,
                name if name.ends_with("bias") => 0.0,
                _ => (((seed + at as f64) * 12.9898).sin() * 43_758.547).fract() as f32 * 0.1,
            };
            let values: Vec<f32> = (0..var.elem_count()).map(value).collect();
            tensors.insert(name, Tensor::from_vec(values, var.shape(), CPU)?);
        }
        safetensors::save(&tensors, &path)?;
    }
    Ok((config, path))
}

fn bytes<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> usize {
    tensors.into_iter().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
}

fn gradient_bytes(grads: &GradStore) -> usize {
    bytes(grads.get_ids().filter_map(|id| grads.get_id(*id)))
}

/// Prints what training takes: of the adapters, and of all weights.
fn print_memory(
    tensors: &HashMap<String, Tensor>,
    config: &Config,
    data: &Data,
    (lora, model, optimizer): (&Lora, &Classifier, &Adamax),
) -> Result<()> {
    let row = |what: &str, [weights, gradients, moments]: [usize; 3]| {
        let [a, b, c, d] =
            [weights, gradients, moments, weights + gradients + moments].map(|n| n as f64 / (1 << 20) as f64);
        println!("{what:<14} {a:>9.2} {b:>10.2} {c:>8.2} {d:>8.2}");
    };
    let batch = data.batch(0)?;
    println!("memory in MiB    weights  gradients  moments      all");
    let sums: Vec<_> = lora.modules()?.iter().filter_map(|module| tensors.get(&format!("{module}.weight"))).collect();
    let vars: Vec<_> = lora.named_vars()?.into_iter().map(|(_, var)| var).collect();
    // The base, the sums in the adapted layers, and the variables.
    let weights = bytes(tensors.values()) + bytes(sums) + bytes(vars.iter().map(Var::as_tensor));
    let gradients = gradient_bytes(&model.loss(&batch)?.backward()?);
    row("adapters", [weights, gradients, optimizer.bytes().moments]);

    let mut vars = Vec::new();
    for (name, tensor) in tensors {
        vars.push((name.clone(), Var::from_tensor(tensor)?));
    }
    for (name, var) in lora.saved_vars()? {
        vars.push((name, Var::from_tensor(&var.as_detached_tensor())?));
    }
    let all = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let full = Classifier::load(VarBuilder::from_tensors(all, DType::F32, CPU), config)?;
    let gradients = gradient_bytes(&full.loss(&batch)?.backward()?);
    let weights = bytes(vars.iter().map(|(_, var)| var.as_tensor()));
    let moments = Adamax::from_named(vars, ParamsAdamax::default())?.bytes().moments;
    row("full training", [weights, gradients, moments]);
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    fs::create_dir_all(&args.out)?;
    let mut tokenizer = match &args.model {
        Some(folder) => {
            let path = folder.join("tokenizer.json");
            let tokenizer = Tokenizer::from_file(&path);
            Some(tokenizer.map_err(|error| anyhow!("reading {}: {error}", path.display()))?)
        }
        None => None,
    };
    if let Some(tokenizer) = &mut tokenizer {
        // Rows are as long as the longest of their batch, whatever the file says.
        tokenizer.with_padding(None);
    }
    let data = Data::new(tokenizer);
    let (config, weights) = match &args.model {
        Some(folder) => {
            let path = folder.join("config.json");
            let context = || format!("reading {}", path.display());
            let text = fs::read_to_string(&path).with_context(context)?;
            (serde_json::from_str(&text).with_context(context)?, folder.join("model.safetensors"))
        }
        None => small(&args.out, data.vocabulary())?,
    };
    let mut tensors = safetensors::load(&weights, CPU).with_context(|| format!("reading {}", weights.display()))?;
    // Neither is in candle's encoder.
    tensors.retain(|name, tensor| tensor.dtype().is_float() && !name.starts_with("pooler"));
    let base = VarBuilder::from_tensors(tensors.clone(), DType::F32, CPU);

    let adapter = args.out.join("adapter");
    let state = args.out.join("optimizer.safetensors");
    let lora = if args.resume {
        let lora = Lora::load(&adapter)?;
        lora.train()?;
        lora
    } else {
        let settings = LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            target_modules: ["query", "value"].into(),
            modules_to_save: vec!["classifier".into()],
            ..LoraConfig::default()
        };
        Lora::new(settings, 42)?
    };
    let model = lora.build(base.clone(), |vb| Classifier::load(vb, &config))?;

    let groups = [
        ParamGroup::new("adapters").vars(lora.adapter_vars()?),
        ParamGroup::new("head").vars(lora.saved_vars()?).lr_factor(2.0),
    ];
    let params = ParamsAdamax { lr: args.lr.into(), gradient_accumulation_steps: 2, ..Default::default() };
    let mut optimizer = Adamax::from_groups(groups, params)?;
    if args.resume {
        optimizer.load(&state)?;
        println!("resumed after {} batches, {} of them pending", optimizer.calls(), optimizer.pending());
    } else {
        print_memory(&tensors, &config, &data, (&lora, &model, &optimizer))?;
    }

    let calls = args.stop_after.unwrap_or(u64::MAX).min(2 * args.steps);
    for call in optimizer.calls()..calls {
        let loss = model.loss(&data.batch(call)?)?;
        lora.check(&loss)?;
        optimizer.backward_step(&loss)?;
        // All digits, so that another run can be compared.
        println!("batch {:>3}: loss {:?}", call + 1, loss.to_scalar::<f32>()?);
        if optimizer.report().updated() {
            lora.refresh()?;
        }
    }
    lora.save(&adapter)?;
    optimizer.save(&state)?;
    if optimizer.calls() < 2 * args.steps {
        println!("stopped after {} batches, {} of them pending", optimizer.calls(), optimizer.pending());
        return Ok(());
    }

    lora.eval()?;
    let [tokens, counts, classes] = data.examples(0..data.sentences.len())?;
    let logits = model.logits(&tokens, &counts)?;
    let right = logits.argmax(1)?.eq(&classes)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    println!("{right} of {} sentences are classified right", data.sentences.len());
    let merged = lora.build_merged(base, |vb| Classifier::load(vb, &config))?.logits(&tokens, &counts)?;
    let difference = (merged - logits)?.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(difference < 1e-4, "the merged model's outputs differ by {difference}");
    lora.save_merged(&[&weights], args.out.join("merged.safetensors"))?;
    println!("the adapter is in {}, the merged model beside it", adapter.display());
    Ok(())
}
