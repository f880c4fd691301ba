//! The exchange with PEFT: `peft.py` wrote the files in `peft/`, and reads what these tests write.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_adapters::{Error, InitLora, Lora, LoraConfig};
use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::{Linear, Module, VarBuilder, linear};
use candle_transformers::models::bert::{BertModel, Config as BertConfig};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

const CPU: &Device = &Device::Cpu;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft").join(name)
}

fn tensors(path: PathBuf) -> Result<HashMap<String, Tensor>> {
    Ok(safetensors::load(path, CPU)?)
}

fn base(name: &str) -> Result<VarBuilder<'static>> {
    Ok(VarBuilder::from_tensors(tensors(folder(name).join("base.safetensors"))?, DType::F32, CPU))
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

/// The classifier: candle-transformers has its encoder.
struct Bert {
    encoder: BertModel,
    pooler: Linear,
    classifier: Linear,
}

enum Model {
    Bert(Box<Bert>),
    Llama(Box<Llama>, candle_transformers::models::llama::Config),
}

impl Model {
    fn load(name: &str, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        if name == "bert" {
            let config = BertConfig {
                vocab_size: 40,
                hidden_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                intermediate_size: 48,
                max_position_embeddings: 16,
                ..BertConfig::default()
            };
            Ok(Self::Bert(Box::new(Bert {
                encoder: BertModel::load(vb.pp("bert"), &config)?,
                pooler: linear(32, 32, vb.pp("bert.pooler.dense"))?,
                classifier: linear(32, 3, vb.pp("classifier"))?,
            })))
        } else {
            let config = LlamaConfig {
                hidden_size: 32,
                intermediate_size: 48,
                vocab_size: 40,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                num_key_value_heads: Some(2),
                rms_norm_eps: 1e-6,
                rope_theta: 10_000.0,
                bos_token_id: None,
                eos_token_id: None,
                rope_scaling: None,
                max_position_embeddings: 16,
                tie_word_embeddings: Some(name == "tied"),
            };
            let config = config.into_config(false);
            Ok(Self::Llama(Box::new(Llama::load(vb, &config)?), config))
        }
    }

    fn outputs(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Bert(bert) => {
                let hidden = bert.encoder.forward(tokens, &tokens.zeros_like()?, None)?;
                let pooled = bert.pooler.forward(&hidden.narrow(1, 0, 1)?.squeeze(1)?)?.tanh()?;
                bert.classifier.forward(&pooled)
            }
            Self::Llama(llama, config) => llama.forward(tokens, 0, &mut Cache::new(false, DType::F32, config, CPU)?),
        }
    }
}

/// The outputs that PEFT had, from its files.
fn reads(name: &str) -> Result<()> {
    let case = tensors(folder(name).join("case.safetensors"))?;
    let tokens = &case["tokens"];
    let plain = Model::load(name, base(name)?)?.outputs(tokens)?;
    assert!(distance(&plain, &case["base"])? < 1e-5, "the models differ without an adapter");

    let lora = Lora::load(folder(name))?;
    // Before a model is built: the matrices are the file's.
    let merged = lora.build_merged(base(name)?, |vb| Model::load(name, vb))?.outputs(tokens)?;
    let from_map = lora.merge(&tensors(folder(name).join("base.safetensors"))?)?;
    let from_map = Model::load(name, VarBuilder::from_tensors(from_map, DType::F32, CPU))?.outputs(tokens)?;
    let adapted = lora.build(base(name)?, |vb| Model::load(name, vb))?.outputs(tokens)?;
    let moved = distance(&adapted, &plain)?;
    let error = distance(&adapted, &case["outputs"])?;
    println!("{name}: differs from PEFT by {error:.1e}, where the adapter moves outputs by {moved:.3}");
    assert!(error < 1e-5 && moved > 0.1, "{error} {moved}");
    for other in [merged, from_map, lora.build_merged(base(name)?, |vb| Model::load(name, vb))?.outputs(tokens)?] {
        assert_eq!(distance(&other, &adapted)?, 0.0);
    }

    // A file that is written from it is read as the same.
    let copy = tempdir(&format!("copy-{name}"))?;
    lora.save(&copy)?;
    let (ours, theirs) = ["adapter_model.safetensors"; 2].map(|file| (copy.join(file), folder(name).join(file))).into();
    let (ours, theirs) = (tensors(ours.0)?, tensors(theirs.1)?);
    assert_eq!(ours.len(), theirs.len());
    for (key, tensor) in &theirs {
        assert_eq!(distance(tensor, &ours[key])?, 0.0, "{key}");
    }
    let mut config = lora.config().clone();
    config.modules_to_save.dedup();
    let mut read = Lora::load(&copy)?.config().clone();
    read.modules_to_save.dedup();
    assert_eq!(config, read);
    std::fs::remove_dir_all(copy)?;
    Ok(())
}

#[test]
fn a_classifier_of_peft_has_its_outputs() -> Result<()> {
    reads("bert")
}

#[test]
fn a_decoder_of_peft_has_its_outputs() -> Result<()> {
    reads("llama")
}

fn tempdir(name: &str) -> Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("candle-adapters-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

/// Writes an adapter of its own for `peft.py read`, and reads it.
fn writes(name: &str, config: LoraConfig) -> Result<()> {
    let (out, is_kept) = match std::env::var_os("CANDLE_ADAPTERS_OUT") {
        Some(folder) => (PathBuf::from(folder), true),
        None => (tempdir(&format!("out-{name}"))?, false),
    };
    let written = out.join(name);
    let tokens = &tensors(folder(name).join("case.safetensors"))?["tokens"];
    // Both matrices random.
    let lora = Lora::new(LoraConfig { init_lora_weights: InitLora::Random, ..config }, 5)?;
    let outputs = lora.build(base(name)?, |vb| Model::load(name, vb))?.outputs(tokens)?;
    lora.save(&written)?;
    lora.save_merged(&[folder(name).join("base.safetensors")], written.join("merged.safetensors"))?;
    safetensors::save(&HashMap::from([("outputs", outputs.clone())]), written.join("outputs.safetensors"))?;

    let again = Lora::load(&written)?.build(base(name)?, |vb| Model::load(name, vb))?.outputs(tokens)?;
    assert_eq!(distance(&again, &outputs)?, 0.0);
    let merged = tensors(written.join("merged.safetensors"))?;
    let merged = Model::load(name, VarBuilder::from_tensors(merged, DType::F32, CPU))?.outputs(tokens)?;
    assert_eq!(distance(&merged, &outputs)?, 0.0);
    if !is_kept {
        std::fs::remove_dir_all(out)?;
    }
    Ok(())
}

#[test]
fn a_classifier_is_written_for_peft() -> Result<()> {
    writes(
        "bert",
        LoraConfig {
            r: 3,
            lora_alpha: 1.5,
            task_type: Some("SEQ_CLS".into()),
            target_modules: ["key", "intermediate.dense", "position_embeddings"].into(),
            rank_pattern: vec![("layer.0.intermediate.dense".into(), 5)],
            alpha_pattern: vec![(r"1\.attention.self.key".into(), 0.75)],
            modules_to_save: vec!["classifier".into()],
            ..LoraConfig::default()
        },
    )
}

#[test]
fn a_decoder_is_written_for_peft() -> Result<()> {
    let (task_type, use_rslora) = (Some("CAUSAL_LM".into()), true);
    writes(
        "llama",
        LoraConfig {
            lora_alpha: 2.0,
            use_rslora,
            task_type,
            target_modules: "all-linear".into(),
            ..Default::default()
        },
    )
}

#[test]
fn a_tied_decoder_is_written_for_peft() -> Result<()> {
    writes(
        "tied",
        LoraConfig {
            target_modules: ["q_proj", "embed_tokens"].into(),
            lora_alpha: 0.25,
            ensure_weight_tying: true,
            task_type: Some("CAUSAL_LM".into()),
            ..Default::default()
        },
    )?;
    // PEFT writes the head's adapter as well, which nothing in a candle model asks for.
    let lora = Lora::load(folder("tied"))?;
    assert!(lora.config().ensure_weight_tying);
    let text = lora.build(base("tied")?, |vb| Model::load("tied", vb)).err().map(|error| error.to_string());
    assert!(text.as_deref().is_some_and(|text| text.contains("unexpected: lm_head.lora_A.weight")), "{text:?}");
    Ok(())
}

#[test]
fn names_that_do_not_fit_are_listed_together() -> Result<()> {
    let lora = Lora::load(folder("bert"))?;
    let config = BertConfig {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 48,
        max_position_embeddings: 16,
        ..BertConfig::default()
    };
    // Without the head.
    let built = lora.build(base("bert")?, |vb| BertModel::load(vb.pp("bert"), &config));
    let text = built.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains("2 unexpected: classifier.bias, classifier.weight"), "{text}");
    assert!(!text.contains("missing"), "{text}");

    // With a layer that the adapter does not know, and a shape that it does not have.
    let mut more = tensors(folder("bert").join("base.safetensors"))?;
    let names: Vec<_> = more.keys().filter(|name| name.contains("layer.1.")).cloned().collect();
    for name in names {
        let tensor = more[&name].clone();
        more.insert(name.replace("layer.1.", "layer.2."), tensor);
    }
    let name = "bert.encoder.layer.1.output.dense.weight";
    let wider = Tensor::cat(&[&more[name], &more[name]], 1)?;
    more.insert(name.into(), wider);
    let vb = || VarBuilder::from_tensors(more.clone(), DType::F32, CPU);
    let ask = |vb: VarBuilder<'_>| -> candle_core::Result<()> {
        for name in ["bert.embeddings.word_embeddings", "classifier"] {
            vb.get_unchecked(&format!("{name}.weight"))?;
        }
        for layer in 0..3 {
            for name in ["attention.self.query", "attention.self.value", "output.dense"] {
                vb.get_unchecked(&format!("bert.encoder.layer.{layer}.{name}.weight"))?;
            }
        }
        vb.get_unchecked("classifier.bias").map(drop)
    };
    let built = lora.build(vb(), |vb| Ok::<_, Error>(ask(vb)?));
    let Err(Error::Names { missing, unexpected, mismatched }) = built else { panic!("{built:?}") };
    let parts = ["attention.self.query", "attention.self.value", "output.dense"];
    let absent = |part| ["A", "B"].map(|letter| format!("bert.encoder.layer.2.{part}.lora_{letter}.weight"));
    assert_eq!(missing, parts.map(absent).concat());
    assert!(unexpected.is_empty(), "{unexpected:?}");
    assert_eq!(mismatched, ["bert.encoder.layer.1.output.dense.lora_A.weight [3, 48] for [3, 96]"]);
    let merged = lora.build_merged(vb(), |vb| Ok::<_, Error>(ask(vb)?));
    assert!(matches!(&merged, Err(Error::Names { missing, .. }) if missing.len() == 6), "{merged:?}");

    // Nothing has changed: the adapter still fits its model.
    let tokens = &tensors(folder("bert").join("case.safetensors"))?["tokens"];
    lora.build(base("bert")?, |vb| Model::load("bert", vb))?.outputs(tokens)?;
    Ok(())
}
