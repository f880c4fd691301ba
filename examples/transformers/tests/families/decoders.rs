//! Decoders, which predict the token that follows.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma, gemma3, llama, mamba, mistral, mixtral, phi, qwen2, qwen3, stable_lm};
use serde_json::{Value, json};

use crate::check::{Family, Loss, check};
use crate::{HEADS, HIDDEN, VOCAB, cross_entropy, ids};

/// Tokens of the vocabulary that the batch does not have, for tables that are no output layer, too.
const UNSEEN: &[Range<usize>] = &[0..1, 10..VOCAB];

/// The settings that most of the models have, with two heads of keys and values, and others on top.
fn config(others: Value) -> Value {
    let mut config = json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu",
    });
    if let (Some(config), Value::Object(others)) = (config.as_object_mut(), others) {
        config.extend(others);
    }
    config
}

fn load_llama(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: llama::LlamaConfig = serde_json::from_value(config(json!({})))?;
    let config = config.into_config(false);
    let model = llama::Llama::load(vb, &config)?;
    Ok(Box::new(move || {
        let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
        Ok(cross_entropy(&model.forward(&ids()?, 0, &mut cache)?)?)
    }))
}

#[test]
fn llama() -> Result<()> {
    check(&Family {
        name: "Llama",
        dtype: DType::F32,
        load: load_llama,
        unused: &[("embed_tokens.weight", UNSEEN)],
        cancelled: &[],
        cut: &[],
    })
}

fn load_qwen2(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: qwen2::Config = serde_json::from_value(config(json!({
        "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": true, "use_sliding_window": false,
    })))?;
    let mut model = qwen2::ModelForCausalLM::new(&config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)
    }))
}

#[test]
fn qwen2() -> Result<()> {
    check(&Family { name: "Qwen2", dtype: DType::F64, load: load_qwen2, unused: &[], cancelled: &[], cut: &[] })
}

/// Qwen3 has candle's flash attention for the CPU, and a cache that detaches keys and values in candle's release.
fn load_qwen3(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: qwen3::Config = serde_json::from_value(config(json!({
        "head_dim": 6, "attention_bias": true, "max_window_layers": 2, "tie_word_embeddings": true,
        "use_sliding_window": false,
    })))?;
    let mut model = qwen3::ModelForCausalLM::new(&config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)
    }))
}

#[test]
fn qwen3() -> Result<()> {
    check(&Family { name: "Qwen3", dtype: DType::F32, load: load_qwen3, unused: &[], cancelled: &[], cut: &[] })
}

fn load_gemma(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: gemma::Config =
        serde_json::from_value(config(json!({ "attention_bias": false, "head_dim": 6, "hidden_act": "gelu" })))?;
    let mut model = gemma::Model::new(false, &config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)
    }))
}

#[test]
fn gemma() -> Result<()> {
    check(&Family { name: "Gemma", dtype: DType::F64, load: load_gemma, unused: &[], cancelled: &[], cut: &[] })
}

/// The window of half of the layers is shorter than the sequence, so that their caches rotate.
fn load_gemma3(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: gemma3::Config = serde_json::from_value(config(json!({
        "attention_bias": false, "head_dim": 6, "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 100.0,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 6, "sliding_window": 4,
        "sliding_window_pattern": 2, "num_key_value_heads": 1,
    })))?;
    let mut model = gemma3::Model::new(false, &config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)
    }))
}

#[test]
fn gemma3() -> Result<()> {
    check(&Family { name: "Gemma 3", dtype: DType::F64, load: load_gemma3, unused: &[], cancelled: &[], cut: &[] })
}

fn load_mistral(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: mistral::Config = serde_json::from_value(config(json!({ "sliding_window": 4 })))?;
    let mut model = mistral::Model::new(&config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)
    }))
}

#[test]
fn mistral() -> Result<()> {
    check(&Family {
        name: "Mistral",
        dtype: DType::F64,
        load: load_mistral,
        unused: &[("embed_tokens.weight", UNSEEN)],
        cancelled: &[],
        cut: &[],
    })
}

/// The model reads the weights of the experts out of the graph to choose some, and multiplies with the numbers read.
fn load_mixtral(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: mixtral::Config = serde_json::from_value(config(json!({
        "sliding_window": 4, "num_experts_per_tok": 2, "num_local_experts": 2, "use_flash_attn": false,
    })))?;
    let vb_ = vb.clone();
    let load = move || Ok::<_, anyhow::Error>(mixtral::Model::new(&config, vb_.clone())?);
    load()?;
    // The cache of this model cannot be cleared.
    Ok(Box::new(move || Ok(cross_entropy(&load()?.forward(&ids()?, 0)?.squeeze(1)?)?)))
}

#[test]
fn mixtral_has_gates_without_a_gradient() -> Result<()> {
    check(&Family {
        name: "Mixtral",
        dtype: DType::F32,
        load: load_mixtral,
        unused: &[("embed_tokens.weight", UNSEEN)],
        cancelled: &[],
        cut: &["gate.weight"],
    })
}

fn load_phi(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: phi::Config = serde_json::from_value(config(json!({
        "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": false, "partial_rotary_factor": 0.5,
        "qk_layernorm": false,
    })))?;
    let mut model = phi::Model::new(&config, vb)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?)?)?)
    }))
}

#[test]
fn phi() -> Result<()> {
    check(&Family {
        name: "Phi",
        dtype: DType::F32,
        load: load_phi,
        unused: &[("embed_tokens.weight", UNSEEN)],
        cancelled: &[],
        cut: &[],
    })
}

fn load_stable_lm(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: stable_lm::Config = serde_json::from_value(config(json!({
        "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "use_cache": false, "use_qkv_bias": true,
    })))?;
    let mut model = stable_lm::Model::new(&config, vb)?;
    Ok(Box::new(move || Ok(cross_entropy(&model.forward(&ids()?, 0)?.squeeze(1)?)?)))
}

#[test]
fn stable_lm() -> Result<()> {
    check(&Family {
        name: "StableLM",
        dtype: DType::F64,
        load: load_stable_lm,
        unused: &[("embed_tokens.weight", UNSEEN)],
        cancelled: &[],
        cut: &[],
    })
}

/// A model that takes one token of one sequence at a time, and keeps its state between.
fn load_mamba(vb: VarBuilder<'static>) -> Result<Loss> {
    let config = mamba::Config { d_model: HIDDEN, n_layer: 2, vocab_size: VOCAB, pad_vocab_size_multiple: 1 };
    let model = mamba::Model::new(&config, vb)?;
    Ok(Box::new(move || {
        let mut logits = Vec::new();
        for sequence in ids()?.to_vec2::<u32>()? {
            let mut state = mamba::State::new(1, &config, model.dtype(), &Device::Cpu)?;
            let mut last = None;
            for id in sequence {
                last = Some(model.forward(&Tensor::new(&[id], &Device::Cpu)?, &mut state)?);
            }
            logits.extend(last);
        }
        Ok(cross_entropy(&Tensor::cat(&logits, 0)?)?)
    }))
}

#[test]
fn mamba() -> Result<()> {
    check(&Family { name: "Mamba", dtype: DType::F64, load: load_mamba, unused: &[], cancelled: &[], cut: &[] })
}
