//! The functions of candle-nn that `trainable-candle` changes: where an argument needs a gradient they compute the same as
//! where none does, in the same type and shape, and every such argument gets a gradient.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::attention::cpu_flash::{causal, standard};
use candle_nn::attention::{AttnMask, flash_attn, flash_attn_varlen_cpu};
use candle_nn::kv_cache::{ConcatKvCache, InterleavedKvCache, KvCache, RotatingKvCache, ScatteredCacheBuilder};
use candle_nn::rotary_emb::{rope, rope_i, rope_thd};
use candle_nn::{Activation, LayerNorm, Linear, RmsNorm, loss, ops};

/// Numbers of about 1 that look random.
fn numbers(shape: &[usize], seed: f64) -> Result<Tensor> {
    let number = |i: usize| ((i as f64 + seed) * 12.9898).sin() + ((i as f64 - seed) * 4.1414).cos();
    let numbers: Vec<_> = (0..shape.iter().product()).map(number).collect();
    Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(DType::F32)?)
}

fn max_abs(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// Compares the results of a function for constants with those for variables of the same values, all of them variables
/// and each one alone.
fn same(args: &[&Tensor], function: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) -> Result<()> {
    let constants: Vec<_> = args.iter().map(|&arg| arg.clone()).collect();
    let expected = function(&constants)?;
    let vars = args.iter().map(|arg| Ok(Var::from_tensor(arg)?)).collect::<Result<Vec<_>>>()?;
    for tracked in (0..args.len()).map(Some).chain([None]) {
        // A view of the constant or of the variable, with its layout.
        let is_tracked = |i: usize| tracked.is_none_or(|tracked| tracked == i);
        let given: Vec<_> = (0..args.len())
            .map(|i| if is_tracked(i) { vars[i].as_tensor().clone() } else { constants[i].clone() })
            .collect();
        let results = function(&given)?;
        ensure!(results.len() == expected.len());
        let mut total = None;
        for (i, (result, expected)) in results.iter().zip(&expected).enumerate() {
            ensure!(result.dims() == expected.dims() && result.dtype() == expected.dtype(), "result {i}: {result:?}");
            let (size, apart) = (max_abs(expected)?, max_abs(&(result.detach() - expected)?)?);
            // A type of 16 bits has three or two digits.
            let allowed = if expected.dtype() == DType::F32 { 2e-6 } else { 1e-2 };
            ensure!(size > 0.01 && apart < allowed * size.max(1.0), "result {i}: {apart} of {size} apart");
            let part = (result.to_dtype(DType::F32)? * numbers(result.dims(), 0.7)?)?.sum_all()?;
            total = Some(match total {
                None => part,
                Some(total) => (total + part)?,
            });
        }
        let grads = total.context("no result")?.backward()?;
        for (i, var) in vars.iter().enumerate().filter(|(i, _)| is_tracked(*i)) {
            let grad = grads.get(var.as_tensor()).with_context(|| format!("no gradient for argument {i}"))?;
            ensure!(max_abs(grad)? > 1e-4, "argument {i}: {grad:?}");
        }
    }
    Ok(())
}

/// The same for a function of one result.
fn same1(args: &[&Tensor], function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>) -> Result<()> {
    same(args, |args| Ok(vec![function(args)?]))
}

#[test]
fn softmax_and_activations() -> Result<()> {
    let x = numbers(&[2, 3, 5], 0.0)?;
    for dim in 0..3 {
        same1(&[&x], |x| ops::softmax(&x[0], dim))?;
        same1(&[&x], |x| ops::log_softmax(&x[0], dim))?;
    }
    same1(&[&x], |x| ops::softmax_last_dim(&x[0]))?;
    same1(&[&x], |x| ops::silu(&x[0]))?;
    for activation in [
        Activation::Gelu,
        Activation::NewGelu,
        Activation::GeluPytorchTanh,
        Activation::Silu,
        Activation::Swish,
        Activation::Relu,
        Activation::Sigmoid,
        Activation::Mish,
    ] {
        same1(&[&x], |x| activation.forward(&x[0]))?;
    }
    Ok(())
}

#[test]
fn normalization() -> Result<()> {
    let (x, weight, bias) = (numbers(&[2, 3, 8], 0.0)?, numbers(&[8], 0.3)?, numbers(&[8], 0.6)?);
    same1(&[&x, &weight, &bias], |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-5))?;
    same1(&[&x, &weight], |x| ops::rms_norm(&x[0], &x[1], 1e-5))?;
    // Views that are not contiguous, too.
    for view in [|x: &Tensor| Ok(x.clone()), |x: &Tensor| x.transpose(0, 1)] {
        let layer_norm = |x: &[Tensor]| LayerNorm::new(x[1].clone(), x[2].clone(), 1e-5).forward(&view(&x[0])?);
        same1(&[&x, &weight, &bias], layer_norm)?;
        same1(&[&x, &weight], |x| LayerNorm::new_no_bias(x[1].clone(), 1e-5).forward(&view(&x[0])?))?;
        same1(&[&x, &weight], |x| LayerNorm::rms_norm(x[1].clone(), 1e-5).forward(&view(&x[0])?))?;
        same1(&[&x, &weight], |x| RmsNorm::new(x[1].clone(), 1e-5).forward(&view(&x[0])?))?;
        same1(&[&x, &weight], |x| RmsNorm::new(x[1].clone(), 1e-5).forward_diff(&view(&x[0])?))?;
    }
    Ok(())
}

#[test]
fn linear_and_cross_entropy() -> Result<()> {
    let (weight, bias) = (numbers(&[5, 8], 0.3)?, numbers(&[5], 0.6)?);
    for shape in [&[3, 8][..], &[2, 3, 8], &[2, 2, 3, 8]] {
        let x = numbers(shape, 0.0)?;
        same1(&[&x, &weight], |x| Linear::new(x[1].clone(), None).forward(&x[0]))?;
        same1(&[&x, &weight, &bias], |x| Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0]))?;
    }
    let x = numbers(&[3, 2, 8], 0.0)?;
    let of_a_view = |x: &[Tensor]| Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0].transpose(0, 1)?);
    same1(&[&x, &weight, &bias], of_a_view)?;
    // Parameters that are broadcast.
    let x = numbers(&[3, 5, 8], 0.0)?;
    for shape in [&[1][..], &[1, 5], &[5, 5]] {
        let bias = numbers(shape, 0.6)?;
        same1(&[&x, &weight, &bias], |x| Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0]))?;
    }
    same1(&[&x, &numbers(&[1], 0.6)?], |x| LayerNorm::new_no_bias(x[1].clone(), 1e-5).forward(&x[0]))?;
    let targets = Tensor::new(&[4u32, 0, 7], &Device::Cpu)?;
    same1(&[&numbers(&[3, 8], 0.0)?], |x| loss::cross_entropy(&x[0], &targets))
}

#[test]
fn rotary_embeddings() -> Result<()> {
    // Tables of more positions than there are, and tables of each sequence.
    for shape in [&[7, 3][..], &[2, 5, 3]] {
        let (cos, sin) = (numbers(shape, 0.3)?, numbers(shape, 0.6)?);
        let x = numbers(&[2, 4, 5, 6], 0.0)?;
        same1(&[&x, &cos, &sin], |x| rope(&x[0], &x[1], &x[2]))?;
        same1(&[&x, &cos, &sin], |x| rope_i(&x[0], &x[1], &x[2]))?;
        let x = numbers(&[2, 5, 4, 6], 0.0)?;
        same1(&[&x, &cos, &sin], |x| rope_thd(&x[0], &x[1], &x[2]))?;
    }
    Ok(())
}

/// Queries, keys and values with half as many heads of keys and values.
fn qkv(b: usize, s: usize, s_kv: usize) -> Result<[Tensor; 3]> {
    Ok([numbers(&[b, s, 4, 8], 0.0)?, numbers(&[b, s_kv, 2, 8], 0.3)?, numbers(&[b, s_kv, 2, 8], 0.6)?])
}

#[test]
fn flash_attention() -> Result<()> {
    for (b, s, s_kv) in [(1, 4, 4), (1, 4, 7), (1, 1, 7), (2, 4, 4), (2, 4, 7), (2, 1, 7)] {
        let [q, k, v] = qkv(b, s, s_kv)?;
        let causal = AttnMask::causal_with_offset(s_kv - s);
        for (mask, max_bias) in [(AttnMask::None, None), (causal.clone(), None), (causal, Some(8.0))] {
            let attention = |x: &[Tensor]| flash_attn::<f32>(&x[0], &x[1], &x[2], 0.4, mask.clone(), max_bias, None);
            same1(&[&q, &k, &v], attention).with_context(|| format!("{b} {s} {s_kv} {mask:?} {max_bias:?}"))?;
        }
    }
    // Several sequences have ALiBi without a mask; one has not.
    for b in [1, 2] {
        let [q, k, v] = qkv(b, 4, 4)?;
        let attention = |x: &[Tensor]| flash_attn::<f32>(&x[0], &x[1], &x[2], 0.4, AttnMask::None, Some(8.0), None);
        same1(&[&q, &k, &v], attention)?;
    }
    // Capped scores, and a mask that is a tensor: for one sequence.
    let [q, k, v] = qkv(1, 4, 6)?;
    let causal = AttnMask::causal_with_offset(2);
    let capped = |x: &[Tensor]| flash_attn::<f32>(&x[0], &x[1], &x[2], 0.4, causal.clone(), None, Some(3.0));
    same1(&[&q, &k, &v], capped)?;
    let mask = numbers(&[1, 1, 4, 6], 0.9)?;
    for (max_bias, softcap) in [(None, None), (Some(8.0), None), (None, Some(3.0))] {
        let masked =
            |x: &[Tensor]| flash_attn::<f32>(&x[0], &x[1], &x[2], 0.4, AttnMask::Mask(x[3].clone()), max_bias, softcap);
        same1(&[&q, &k, &v, &mask], masked)?;
    }
    Ok(())
}

#[test]
fn flash_attention_in_16_bits() -> Result<()> {
    for b in [1, 2] {
        let [q, k, v] = qkv(b, 4, 4)?;
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F16));
        let attention =
            |x: &[Tensor]| flash_attn::<half::f16>(&x[0], &x[1], &x[2], 0.4, AttnMask::causal(), None, None);
        same1(&[&q?, &k?, &v?], attention)?;
    }
    Ok(())
}

#[test]
fn the_kernels_of_flash_attention() -> Result<()> {
    let [q, k, v] = qkv(1, 4, 6)?;
    let run = |x: &[Tensor]| causal::run_causal_attn_cpu::<f32>(&x[0], &x[1], &x[2], 0.4, 2, Some(8.0), None);
    same1(&[&q, &k, &v], run)?;
    same1(&[&q, &k, &v], |x| standard::run_flash_attn_cpu::<f32>(&x[0], &x[1], &x[2], None, 0.4, None, None))?;
    let mask = numbers(&[4, 6], 0.9)?;
    let run = |x: &[Tensor]| standard::run_flash_attn_cpu::<f32>(&x[0], &x[1], &x[2], Some(&x[3]), 0.4, None, None);
    same1(&[&q, &k, &v, &mask], run)
}

#[test]
fn flash_attention_of_packed_sequences() -> Result<()> {
    let lens = |lens: [u32; 3]| Tensor::new(&lens, &Device::Cpu);
    let (q, k, v) = (numbers(&[7, 4, 8], 0.0)?, numbers(&[9, 2, 8], 0.3)?, numbers(&[9, 2, 8], 0.6)?);
    let slopes = numbers(&[4], 0.2)?.abs()?;
    for (causal, left, right) in [
        (false, None, None),
        (true, None, None),
        (false, Some(1), Some(2)),
        (false, Some(1), None),
        (true, Some(2), Some(1)),
    ] {
        let (lens_q, lens_k) = (lens([3, 0, 4])?, lens([4, 0, 5])?);
        let attention = |x: &[Tensor]| {
            let slopes = x.get(3);
            flash_attn_varlen_cpu(&x[0], &x[1], &x[2], slopes, &lens_q, &lens_k, 4, 5, 0.4, causal, left, right)
        };
        same1(&[&q, &k, &v], attention).with_context(|| format!("{causal} {left:?} {right:?}"))?;
        same1(&[&q, &k, &v, &slopes], attention).with_context(|| format!("ALiBi, {causal} {left:?} {right:?}"))?;
    }
    // Queries that have no keys.
    let (lens_q, lens_k) = (lens([3, 2, 2])?, lens([4, 0, 5])?);
    same1(&[&q, &k, &v], |x| {
        flash_attn_varlen_cpu(&x[0], &x[1], &x[2], None, &lens_q, &lens_k, 3, 5, 0.4, false, None, None)
    })
}

/// The kernel is Metal's: without a gradient there is none for the CPU.
#[test]
fn fused_attention() -> Result<()> {
    let [q, k, v] = qkv(2, 3, 5)?.map(|x| x.transpose(1, 2)?.contiguous());
    let [q, k, v] = [Var::from_tensor(&q?)?, Var::from_tensor(&k?)?, Var::from_tensor(&v?)?];
    let mask = numbers(&[2, 4, 3, 5], 0.9)?;
    let (b, h, s, d) = q.dims4()?;
    let repeat =
        |x: &Var| -> candle_core::Result<Tensor> { x.unsqueeze(2)?.repeat((1, 1, 2, 1, 1))?.reshape((b, h, 5, d)) };
    let scores = (q.matmul(&repeat(&k)?.t()?)? * 0.5)?;
    let causal: Vec<_> = (0..s * 5).map(|at| if at % 5 > at / 5 + 2 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let causal = Tensor::from_vec(causal, (1, 1, s, 5), &Device::Cpu)?;
    for (is_causal, mask, cap) in [(false, None, 1.0), (false, Some(&mask), 1.0), (true, None, 3.0)] {
        let result = ops::sdpa(&q, &k, &v, mask, is_causal, 0.5, cap)?;
        let scores = if cap == 1.0 { scores.clone() } else { ((&scores / f64::from(cap))?.tanh()? * f64::from(cap))? };
        let scores = match mask {
            Some(mask) => (scores + mask)?,
            None if is_causal => scores.broadcast_add(&causal)?,
            None => scores,
        };
        let expected = ops::softmax_last_dim(&scores)?.matmul(&repeat(&v)?)?;
        ensure!(max_abs(&(&result - expected)?)? < 2e-6);
        let grads = result.sqr()?.sum_all()?.backward()?;
        ensure!([&q, &k, &v].iter().all(|x| grads.get(x.as_tensor()).is_some()));
    }
    let refused = ops::sdpa(&q, &k, &v, Some(&mask), true, 0.5, 1.0);
    ensure!(refused.is_err_and(|error| error.to_string().contains("a mask and do_causal")));
    Ok(())
}

/// Keys and values of four calls.
fn appended(lens: [usize; 4]) -> Result<Vec<Tensor>> {
    let part = |(i, len): (usize, usize)| numbers(&[1, 2, len, 4], i as f64);
    lens.into_iter().enumerate().map(part).collect()
}

#[test]
fn caches() -> Result<()> {
    let parts = appended([2, 1, 3, 1])?;
    let parts: Vec<_> = parts.iter().collect();
    same(&parts, |parts| {
        // Less room than needed.
        let mut cache = KvCache::new(2, 5);
        let all = parts.iter().map(|x| Ok(<[Tensor; 2]>::from(cache.append(x, &(x * 2.0)?)?)));
        Ok(all.collect::<Result<Vec<_>>>()?.concat())
    })?;
    same(&parts, |parts| {
        let mut cache = ConcatKvCache::new(2);
        let all = parts.iter().map(|x| Ok(<[Tensor; 2]>::from(cache.append(x, &(x * 2.0)?)?)));
        Ok(all.collect::<Result<Vec<_>>>()?.concat())
    })
}

#[test]
fn a_rotating_cache() -> Result<()> {
    for lens in [[2, 1, 3, 1], [3, 3, 3, 3], [1, 6, 2, 5], [4, 4, 1, 2]] {
        let parts = appended(lens)?;
        same(&parts.iter().collect::<Vec<_>>(), |parts| {
            let mut cache = RotatingKvCache::new(2, 4);
            let mut all = Vec::new();
            for x in parts {
                let (k, v) = cache.append(x, &(x * 2.0)?)?;
                // Without gradients these may share memory that the next call writes to.
                all.extend([k.copy()?, v.copy()?]);
                all.push(Tensor::new(&[cache.offset() as f32, cache.current_seq_len() as f32], &Device::Cpu)?);
                all.extend(cache.k()?.map(|k| k.copy()).transpose()?);
            }
            Ok(all)
        })
        .with_context(|| format!("{lens:?}"))?;
    }
    Ok(())
}

#[test]
fn caches_without_a_backward_pass_refuse() -> Result<()> {
    let x = Var::from_tensor(&numbers(&[1, 2, 1, 4], 0.0)?)?;
    let error = InterleavedKvCache::new(4).append(&x, &x).unwrap_err().to_string();
    ensure!(error.contains("InterleavedKvCache has no backward pass"), "{error}");
    ensure!(InterleavedKvCache::new(4).append(&x.as_detached_tensor(), &x.as_detached_tensor()).is_ok());

    let mut builder = ScatteredCacheBuilder::new(1, 5, DType::F32, &Device::Cpu)?;
    let mut cache = builder.make_cache(2, 4)?;
    let at = builder.indices_and_mask(1, &[true])?;
    let error = cache.append(&x, &x, &at).unwrap_err().to_string();
    ensure!(error.contains("ScatteredKvCache has no backward pass"), "{error}");
    let detached = x.as_detached_tensor();
    ensure!(cache.append(&detached, &detached, &at).is_ok());
    Ok(())
}
