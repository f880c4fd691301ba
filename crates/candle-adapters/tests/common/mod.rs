//! A small model whose operations all have a backward pass in candle-nn as released.

#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

use std::collections::HashMap;

use candle_adapters::{Lora, LoraConfig};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, Linear, Module, VarBuilder, embedding, linear, linear_no_bias, ops};

pub const CPU: &Device = &Device::Cpu;
pub const WORDS: usize = 11;
pub const DIM: usize = 6;

/// One layer of attention over a table of embeddings, and a head.
pub struct Attention {
    table: Embedding,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    head: Linear,
}

impl Attention {
    pub fn load(vb: VarBuilder<'_>) -> Result<Self> {
        let layer = vb.pp("encoder.layers.0");
        Ok(Self {
            table: embedding(WORDS, DIM, vb.pp("embed_tokens"))?,
            query: linear_no_bias(DIM, DIM, layer.pp("query"))?,
            key: linear_no_bias(DIM, DIM, layer.pp("key"))?,
            value: linear(DIM, DIM + 2, layer.pp("value"))?,
            output: linear(DIM + 2, DIM, layer.pp("output"))?,
            head: linear(DIM, 3, vb.pp("head"))?,
        })
    }

    /// Logits, [rows, 3], of tokens, [rows, length].
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = self.table.forward(tokens)?;
        let scores = self.query.forward(&x)?.matmul(&self.key.forward(&x)?.t()?)?;
        let weights = ops::softmax(&scores, 2)?;
        let mixed = weights.matmul(&self.value.forward(&x)?)?;
        self.head.forward(&(x + self.output.forward(&mixed)?.tanh()?)?.mean(1)?)
    }

    /// A loss with a gradient in every variable.
    pub fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        self.forward(tokens)?.sqr()?.mean_all()
    }
}

pub fn tokens() -> Result<Tensor> {
    Tensor::new(&[[1u32, 4, 10, 2], [0, 7, 7, 3]], CPU)
}

/// Reproducible values in ±1.
pub fn values(seed: usize, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let values: Vec<_> = (0..count).map(|i| ((i * 7919 + seed * 104_729 + 13) as f64 * 0.618).sin()).collect();
    Tensor::from_vec(values, shape, CPU)?.to_dtype(dtype)
}

/// The base model's weights.
pub fn weights(dtype: DType) -> Result<HashMap<String, Tensor>> {
    let shapes: [(&str, &[usize]); 9] = [
        ("embed_tokens.weight", &[WORDS, DIM]),
        ("encoder.layers.0.query.weight", &[DIM, DIM]),
        ("encoder.layers.0.key.weight", &[DIM, DIM]),
        ("encoder.layers.0.value.weight", &[DIM + 2, DIM]),
        ("encoder.layers.0.value.bias", &[DIM + 2]),
        ("encoder.layers.0.output.weight", &[DIM, DIM + 2]),
        ("encoder.layers.0.output.bias", &[DIM]),
        ("head.weight", &[3, DIM]),
        ("head.bias", &[3]),
    ];
    let named = shapes.iter().enumerate();
    named.map(|(seed, (name, shape))| Ok(((*name).to_owned(), values(seed, shape, dtype)?))).collect()
}

pub fn base(dtype: DType) -> Result<VarBuilder<'static>> {
    Ok(VarBuilder::from_tensors(weights(dtype)?, dtype, CPU))
}

/// Adapters of four linear layers and the table.
pub fn config() -> LoraConfig {
    LoraConfig {
        r: 2,
        lora_alpha: 3.0,
        target_modules: ["query", "key", "value", "output", "embed_tokens"].into(),
        ..LoraConfig::default()
    }
}

/// Gives every variable other values, so that A and B are nowhere 0.
pub fn shake(lora: &Lora) -> candle_adapters::Result<()> {
    for (seed, (_, var)) in lora.named_vars()?.into_iter().enumerate() {
        var.set(&values(100 + seed, var.dims(), var.dtype())?)?;
    }
    Ok(())
}

pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let values = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    Ok(values.into_iter().map(f64::to_bits).collect())
}

pub fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
}
