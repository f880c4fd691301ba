//! The results against those of candle-nn as released.

mod common;

use anyhow::Result;
use candle_core::{D, DType, Device, Module as _, Tensor};
use candle_graft::{
    Mask, alibi_slopes, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope,
    rope_i, rope_thd, sigmoid, silu, softmax, softmax_last_dim,
};
use candle_nn::attention::{AttnMask, flash_attn, flash_attn_varlen_cpu};
use candle_nn::{Linear, loss, ops, rotary_emb};
use common::{assert_close, numbers};

/// Some units in the last place of the largest number.
const ALLOWED: f64 = 1e-6;

fn randoms<const N: usize>(shapes: [&[usize]; N]) -> Result<[Tensor; N]> {
    let mut tensors = Vec::new();
    for (i, shape) in shapes.into_iter().enumerate() {
        tensors.push(numbers(shape, i as u64)?.to_dtype(DType::F32)?);
    }
    tensors.try_into().map_err(|_| anyhow::anyhow!("as many as shapes"))
}

/// Compares both, and wants no graph where no argument is tracked.
fn check(name: &str, ours: candle_core::Result<Tensor>, theirs: candle_core::Result<Tensor>) -> Result<()> {
    let ours = ours?;
    assert!(!ours.track_op(), "{name}");
    assert_close(name, &ours, &theirs?, ALLOWED)
}

#[test]
fn the_normalizations() -> Result<()> {
    for shape in [&[3, 5, 64][..], &[2, 33], &[1, 1, 384]] {
        let n = &shape[shape.len() - 1..];
        let [x, weight, bias] = randoms([shape, n, n])?;
        let eps = 1e-5;
        let theirs = ops::layer_norm(&x, &weight, &bias, eps as f32);
        check("layer_norm", layer_norm(&x, &weight, Some(&bias), eps), theirs)?;
        let no_bias = candle_nn::LayerNorm::new_no_bias(weight.clone(), eps).forward(&x);
        check("layer_norm without bias", layer_norm(&x, &weight, None, eps), no_bias)?;
        check("rms_norm", rms_norm(&x, &weight, eps), ops::rms_norm(&x, &weight, eps as f32))?;
    }
    Ok(())
}

#[test]
fn the_softmax_and_its_logarithm() -> Result<()> {
    for shape in [&[3, 5, 64][..], &[2, 33], &[1, 1, 300], &[2, 1]] {
        let [x] = randoms([shape])?;
        let x = (x * 5.0)?;
        check("softmax_last_dim", softmax_last_dim(&x), ops::softmax_last_dim(&x))?;
        check("softmax", softmax(&x, 0), ops::softmax(&x, 0))?;
        check("log_softmax", log_softmax(&x, D::Minus1), ops::log_softmax(&x, D::Minus1))?;
        check("log_softmax", log_softmax(&x, 0), ops::log_softmax(&x, 0))?;
    }
    Ok(())
}

#[test]
fn the_activations() -> Result<()> {
    let x = Tensor::arange(-9f32, 9.0, &Device::Cpu)?.affine(1.01, 0.003)?;
    check("gelu", gelu(&x), x.gelu_erf())?;
    check("gelu_tanh", gelu_tanh(&x), x.gelu())?;
    check("silu", silu(&x), x.silu())?;
    check("sigmoid", sigmoid(&x), ops::sigmoid(&x))
}

#[test]
fn the_linear_layer() -> Result<()> {
    for shape in [&[2, 3, 5, 24][..], &[7, 24], &[4, 1, 24]] {
        let [x, weight, bias] = randoms([shape, &[17, 24], &[17]])?;
        let theirs = Linear::new(weight.clone(), Some(bias.clone())).forward(&x);
        check("linear", linear(&x, &weight, Some(&bias)), theirs)?;
        check("linear", linear(&x, &weight, None), Linear::new(weight, None).forward(&x))?;
    }
    Ok(())
}

#[test]
fn the_rotary_embeddings() -> Result<()> {
    for (cs, t) in [(&[5, 8][..], 5), (&[9, 8], 5), (&[2, 5, 8], 5), (&[5, 8], 1), (&[2, 1, 8], 1)] {
        let [x, cos, sin] = randoms([&[2, 3, t, 16], cs, cs])?;
        check("rope", rope(&x, &cos, &sin), rotary_emb::rope(&x, &cos, &sin))?;
        check("rope_i", rope_i(&x, &cos, &sin), rotary_emb::rope_i(&x, &cos, &sin))?;
        let x = x.transpose(1, 2)?.contiguous()?;
        check("rope_thd", rope_thd(&x, &cos, &sin), rotary_emb::rope_thd(&x, &cos, &sin))?;
    }
    Ok(())
}

#[test]
fn the_cross_entropy() -> Result<()> {
    let [logits] = randoms([&[5, 50]])?;
    let targets = Tensor::new(&[1u32, 0, 49, 49, 3], &Device::Cpu)?;
    for dtype in [DType::U32, DType::I64, DType::U8] {
        let targets = targets.to_dtype(dtype)?;
        check("cross_entropy", cross_entropy(&logits, &targets), loss::cross_entropy(&logits, &targets))?;
    }
    Ok(())
}

/// candle's shape of queries, keys and values from `(b, h, s, d)`, and the reverse.
fn swap(x: &Tensor) -> candle_core::Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

#[test]
fn attention_as_flash_attn_computes_it() -> Result<()> {
    let scale = 0.4;
    for b in [1, 2] {
        let [q, k, v] = randoms([&[b, 4, 5, 16], &[b, 2, 7, 16], &[b, 2, 7, 16]])?;
        let (q2, k2, v2) = (swap(&q)?, swap(&k)?, swap(&v)?);
        for softcap in [None, Some(1.5)].iter().take(3 - b) {
            for (mask, theirs) in
                [(Mask::None, AttnMask::None), (Mask::Causal { kv_offset: 2 }, AttnMask::Causal { kv_offset: 2 })]
            {
                let theirs =
                    flash_attn::<f32>(&q2, &k2, &v2, scale as f32, theirs, None, softcap.map(|cap| cap as f32));
                check("flash_attn", attention(&q, &k, &v, scale, &mask, *softcap, None), theirs)?;
            }
        }
        // ALiBi: candle has it in causal attention, and for several sequences in attention without a mask.
        let slopes = alibi_slopes(4, 8.0, &Device::Cpu)?;
        let causal = flash_attn::<f32>(&q2, &k2, &v2, scale as f32, AttnMask::Causal { kv_offset: 2 }, Some(8.0), None);
        let ours = attention(&q, &k, &v, scale, &Mask::Causal { kv_offset: 2 }, None, Some(&slopes));
        check("flash_attn with ALiBi", ours, causal)?;
        if b > 1 {
            let theirs = flash_attn::<f32>(&q2, &k2, &v2, scale as f32, AttnMask::None, Some(8.0), None);
            check("ALiBi", attention(&q, &k, &v, scale, &Mask::None, None, Some(&slopes)), theirs)?;
        }
    }
    let [q, k, v, mask] = randoms([&[1, 4, 5, 16], &[1, 2, 7, 16], &[1, 2, 7, 16], &[5, 7]])?;
    let theirs = AttnMask::Mask(mask.clone());
    let theirs = flash_attn::<f32>(&swap(&q)?, &swap(&k)?, &swap(&v)?, scale as f32, theirs, None, None);
    check("flash_attn with a mask", attention(&q, &k, &v, scale, &Mask::Tensor(mask), None, None), theirs)
}

#[test]
fn attention_of_sequences_of_several_lengths() -> Result<()> {
    let slopes = alibi_slopes(4, 8.0, &Device::Cpu)?;
    let (lens_q, lens_k) = ([2u32, 3], [4u32, 3]);
    let [q, k, v] = randoms([&[5, 4, 8], &[7, 2, 8], &[7, 2, 8]])?;
    for (causal, window) in [(false, None), (true, None), (true, Some(1))] {
        let theirs = flash_attn_varlen_cpu(
            &q,
            &k,
            &v,
            Some(&slopes),
            &Tensor::new(&lens_q, &Device::Cpu)?,
            &Tensor::new(&lens_k, &Device::Cpu)?,
            3,
            4,
            0.4,
            causal,
            window,
            window.map(|_| 0),
        )?;
        let (mut from_q, mut from_k, mut parts) = (0, 0, Vec::new());
        for (s, s_kv) in lens_q.into_iter().zip(lens_k).map(|(q, k)| (q as usize, k as usize)) {
            let one = |x: &Tensor, from, len| x.narrow(0, from, len)?.transpose(0, 1)?.unsqueeze(0);
            let (q, k, v) = (one(&q, from_q, s)?, one(&k, from_k, s_kv)?, one(&v, from_k, s_kv)?);
            let offset = s_kv - s;
            let mask = match window {
                None if causal => Mask::Causal { kv_offset: offset },
                None => Mask::None,
                Some(left) => {
                    let number = |at: usize| {
                        let (i, j) = (at / s_kv + offset, at % s_kv);
                        if j > i || i - j > left { f32::NEG_INFINITY } else { 0.0 }
                    };
                    Mask::Tensor(Tensor::from_iter((0..s * s_kv).map(number), &Device::Cpu)?.reshape((s, s_kv))?)
                }
            };
            let y = attention(&q, &k, &v, 0.4, &mask, None, Some(&slopes))?;
            parts.push(y.squeeze(0)?.transpose(0, 1)?);
            (from_q, from_k) = (from_q + s, from_k + s_kv);
        }
        assert_close("flash_attn_varlen_cpu", &Tensor::cat(&parts, 0)?, &theirs, ALLOWED)?;
    }
    Ok(())
}
