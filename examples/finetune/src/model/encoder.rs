//! The encoder of BERT (Devlin et al. 2019): embeddings, and layers of attention and a feed-forward block, each followed
//! by a sum and a layer normalization.
//!
//! ```text
//! x      = norm(words[id] + types[0] + positions[place])
//! x      = norm(x + out(attention(x)))                       attention = softmax(q k^T / sqrt(d)) v, by heads
//! x      = norm(x + down(gelu(up(x))))
//! ```
//!
//! Its numbers are those of candle-transformers' `BertModel`, which has no dropout, and whose words cannot be a table of
//! candle-adamax. All texts are of type 0, since each stands alone.

use anyhow::Result;
use candle_core::{D, Tensor};
use candle_nn::Module;

use super::config::{Activation, Config};
use super::layers::{Linear, Norm, Pass, attention_bias, softmax};
use super::weights::{Fresh, Weights};

/// The encoder.
pub(super) struct Encoder {
    words: Box<dyn Module>,
    positions: Tensor,
    types: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
    dropout: f64,
}

impl Encoder {
    /// Weights by name; `sparse` embeddings of words have gradients of the rows that a batch looks up.
    pub(super) fn new(config: &Config, sparse: bool, weights: &mut Weights) -> Result<Self> {
        let size = config.hidden_size;
        let mut table =
            |name: &str, rows| weights.get(&format!("bert.embeddings.{name}.weight"), &[rows, size], Fresh::Random);
        let words = table("word_embeddings", config.vocab_size)?;
        let positions = table("position_embeddings", config.max_position_embeddings)?;
        let types = table("token_type_embeddings", config.type_vocab_size)?;
        let norm = weights.norm("bert.embeddings.LayerNorm", size, config.layer_norm_eps)?;
        let layers = (0..config.num_hidden_layers).map(|index| Layer::new(config, index, weights));
        Ok(Self {
            words: match sparse {
                true => Box::new(candle_adamax::Embedding::new(words)?),
                false => Box::new(candle_nn::Embedding::new(words, size)),
            },
            positions,
            types,
            norm,
            layers: layers.collect::<Result<_>>()?,
            dropout: config.hidden_dropout_prob,
        })
    }

    /// What the tokens `ids`, `[texts, tokens]`, become: `[texts, tokens, hidden]`. `mask` is 1 for a token and 0 for
    /// padding.
    pub(super) fn forward(&self, ids: &Tensor, mask: &Tensor, pass: &mut Pass<'_>) -> candle_core::Result<Tensor> {
        let (texts, tokens) = ids.dims2()?;
        let places = self.positions.narrow(0, 0, tokens)?.broadcast_add(&self.types.narrow(0, 0, 1)?)?;
        // From here on a row for each token, since all layers but attention take each by itself.
        let x = self.words.forward(ids)?.broadcast_add(&places)?.flatten(0, 1)?;
        let mut x = pass.dropout(&self.norm.forward(&x)?, self.dropout)?;
        let bias = attention_bias(mask)?;
        for layer in &self.layers {
            x = layer.forward(&x, (texts, tokens), &bias, pass)?;
        }
        x.reshape((texts, tokens, ()))
    }
}

struct Layer {
    attention: Attention,
    attention_out: Linear,
    attention_norm: Norm,
    up: Linear,
    activation: Activation,
    down: Linear,
    norm: Norm,
    dropout: f64,
}

impl Layer {
    fn new(config: &Config, index: usize, weights: &mut Weights) -> Result<Self> {
        let name = |part: &str| format!("bert.encoder.layer.{index}.{part}");
        let &Config { hidden_size: size, intermediate_size: inner, layer_norm_eps: eps, .. } = config;
        Ok(Self {
            attention: Attention {
                query: weights.linear(&name("attention.self.query"), size, size)?,
                key: weights.linear(&name("attention.self.key"), size, size)?,
                value: weights.linear(&name("attention.self.value"), size, size)?,
                heads: config.num_attention_heads,
                dropout: config.attention_probs_dropout_prob,
            },
            attention_out: weights.linear(&name("attention.output.dense"), size, size)?,
            attention_norm: weights.norm(&name("attention.output.LayerNorm"), size, eps)?,
            up: weights.linear(&name("intermediate.dense"), size, inner)?,
            activation: config.hidden_act,
            down: weights.linear(&name("output.dense"), inner, size)?,
            norm: weights.norm(&name("output.LayerNorm"), size, eps)?,
            dropout: config.hidden_dropout_prob,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        shape: (usize, usize),
        bias: &Tensor,
        pass: &mut Pass<'_>,
    ) -> candle_core::Result<Tensor> {
        let attended = self.attention_out.forward(&self.attention.forward(x, shape, bias, pass)?)?;
        let x = self.attention_norm.forward(&(x + pass.dropout(&attended, self.dropout)?)?)?;
        let inner = self.up.forward(&x)?;
        let inner = match self.activation {
            Activation::Gelu => candle_graft::gelu(&inner)?,
            Activation::GeluTanh => candle_graft::gelu_tanh(&inner)?,
            Activation::Relu => inner.relu()?,
        };
        let inner = self.down.forward(&inner)?;
        self.norm.forward(&(x + pass.dropout(&inner, self.dropout)?)?)
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    heads: usize,
    dropout: f64,
}

impl Attention {
    /// `x` has a row for each of the `tokens` of each of the `texts`.
    fn forward(
        &self,
        x: &Tensor,
        (texts, tokens): (usize, usize),
        bias: &Tensor,
        pass: &mut Pass<'_>,
    ) -> candle_core::Result<Tensor> {
        let size = x.dim(1)? / self.heads;
        let by_heads = |layer: &Linear| {
            layer.forward(x)?.reshape((texts, tokens, self.heads, size))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (by_heads(&self.query)?, by_heads(&self.key)?, by_heads(&self.value)?);
        let scores = (query / (size as f64).sqrt())?.matmul(&key.transpose(D::Minus1, D::Minus2)?)?;
        let shares = pass.dropout(&softmax(&scores, bias)?, self.dropout)?;
        shares.matmul(&value)?.transpose(1, 2)?.contiguous()?.reshape((texts * tokens, ()))
    }
}
