//! Encoders of text, with a linear head on the mean of the hidden states.

#![expect(clippy::single_range_in_vec_init, reason = "rows are lists of ranges, some of one")]

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Linear, VarBuilder, linear};
use candle_transformers::models::{bert, distilbert, modernbert, t5, xlm_roberta};
use serde_json::json;

use crate::check::{Family, Loss, check};
use crate::{HEADS, HIDDEN, VOCAB, cross_entropy, ids};

/// Tokens of the vocabulary that the batch does not have.
const UNSEEN: &[Range<usize>] = &[0..1, 10..VOCAB];

fn head(vb: &VarBuilder<'static>) -> Result<Linear> {
    Ok(linear(HIDDEN, 3, vb.pp("head"))?)
}

fn classify(head: &Linear, hidden: &Tensor) -> Result<Tensor> {
    Ok(cross_entropy(&head.forward(&hidden.mean(1)?)?)?)
}

fn token_types() -> Result<Tensor> {
    Ok(Tensor::new(&[[0u32, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]], &Device::Cpu)?)
}

/// The second sequence has a token less.
fn attention_mask() -> Result<Tensor> {
    Ok(Tensor::new(&[[1u32, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], &Device::Cpu)?)
}

fn load_bert(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: bert::Config = serde_json::from_value(json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "intermediate_size": 24, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 8,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }))?;
    let (model, head) = (bert::BertModel::load(vb.pp("bert"), &config)?, head(&vb)?);
    Ok(Box::new(move || classify(&head, &model.forward(&ids()?, &token_types()?, Some(&attention_mask()?))?)))
}

#[test]
fn bert() -> Result<()> {
    check(&Family {
        name: "BERT",
        dtype: DType::F64,
        load: load_bert,
        unused: &[("word_embeddings.weight", UNSEEN), ("position_embeddings.weight", &[6..8])],
        cancelled: &["key.bias"],
        cut: &[],
    })
}

fn load_distilbert(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: distilbert::Config = serde_json::from_value(json!({
        "vocab_size": VOCAB, "dim": HIDDEN, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 24, "activation": "gelu",
        "max_position_embeddings": 8, "initializer_range": 0.02, "pad_token_id": 0,
    }))?;
    let (model, head) = (distilbert::DistilBertModel::load(vb.pp("distilbert"), &config)?, head(&vb)?);
    let masked = attention_mask()?.eq(0u32)?.reshape((2, 1, 1, 6))?;
    Ok(Box::new(move || classify(&head, &model.forward(&ids()?, &masked)?)))
}

#[test]
fn distilbert() -> Result<()> {
    check(&Family {
        name: "DistilBERT",
        dtype: DType::F32,
        load: load_distilbert,
        unused: &[("word_embeddings.weight", UNSEEN), ("position_embeddings.weight", &[6..8])],
        cancelled: &["k_lin.bias"],
        cut: &[],
    })
}

fn load_xlm_roberta(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: xlm_roberta::Config = serde_json::from_value(json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "intermediate_size": 24, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "position_embedding_type": "absolute", "max_position_embeddings": 10, "type_vocab_size": 2,
        "layer_norm_eps": 1e-5, "pad_token_id": 0,
    }))?;
    let (model, head) = (xlm_roberta::XLMRobertaModel::new(&config, vb.pp("roberta"))?, head(&vb)?);
    Ok(Box::new(move || {
        classify(&head, &model.forward(&ids()?, &attention_mask()?, &token_types()?, None, None, None)?)
    }))
}

#[test]
fn xlm_roberta() -> Result<()> {
    check(&Family {
        name: "XLM-RoBERTa",
        dtype: DType::F32,
        load: load_xlm_roberta,
        // Positions are counted from the one behind that of padding.
        unused: &[("word_embeddings.weight", UNSEEN), ("position_embeddings.weight", &[0..1, 7..10])],
        cancelled: &["key.bias"],
        cut: &[],
    })
}

fn load_modernbert(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: modernbert::Config = serde_json::from_value(json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": HEADS,
        "intermediate_size": 24, "max_position_embeddings": 8, "layer_norm_eps": 1e-5, "pad_token_id": 0,
        // The first layer sees everything, the others the neighbours.
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_attention": 4, "local_rope_theta": 10000.0,
    }))?;
    let (model, head) = (modernbert::ModernBert::load(vb.clone(), &config)?, head(&vb)?);
    Ok(Box::new(move || classify(&head, &model.forward(&ids()?, &attention_mask()?)?)))
}

#[test]
fn modernbert() -> Result<()> {
    check(&Family {
        name: "ModernBERT",
        dtype: DType::F32,
        load: load_modernbert,
        unused: &[("tok_embeddings.weight", UNSEEN)],
        cancelled: &[],
        cut: &[],
    })
}

fn load_t5(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: t5::Config = serde_json::from_value(json!({
        "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": HEADS,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": false, "is_encoder_decoder": true, "pad_token_id": 0, "eos_token_id": 1,
    }))?;
    let mut model = t5::T5ForConditionalGeneration::load(vb, &config)?;
    let answers = Tensor::new(&[[0u32, 3, 4, 5], [0, 6, 7, 8]], &Device::Cpu)?;
    Ok(Box::new(move || {
        model.clear_kv_cache();
        Ok(cross_entropy(&model.forward(&ids()?, &answers)?)?)
    }))
}

#[test]
fn t5() -> Result<()> {
    check(&Family {
        name: "T5",
        dtype: DType::F32,
        load: load_t5,
        unused: &[
            ("embed_tokens.weight", &[10..VOCAB]),
            // Distances in buckets: 0 to 3 to the left, 4 to 7 to the right. The third is for distances from 6.
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", &[3..5, 7..8]),
            ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", &[3..8]),
        ],
        cancelled: &[],
        cut: &[],
    })
}
