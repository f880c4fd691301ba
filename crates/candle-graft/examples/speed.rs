//! How fast the functions are, beside those of candle-nn, on one thread:
//!
//! ```sh
//! RAYON_NUM_THREADS=1 cargo run --release -p candle-graft --example speed
//! ```
//!
//! Each line has the medians of runs that alternate. `forward` is the function without a graph, beside candle-nn's
//! fast function. `backward` is the backward pass from the sum of the result, beside that of the function as candle-nn
//! composes it of differentiable operations. The shapes are those of `all-MiniLM-L6-v2`, with 32 texts of 48 tokens,
//! and those of a small Llama with 256 tokens. Words on the command line choose lines by their names.

use std::time::Instant;

use anyhow::Result;
use candle_core::{D, DType, Device, Module as _, Tensor, Var};
use candle_graft::{Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, rms_norm, rope, silu};
use candle_nn::{loss, ops, rotary_emb};

/// candle allocates every intermediate result anew, which the system's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Function<'a> = &'a dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// Random arguments of these shapes.
fn randn(shapes: &[&[usize]]) -> Result<Vec<Tensor>> {
    Ok(shapes.iter().map(|&shape| Tensor::randn(0f32, 1.0, shape, &Device::Cpu)).collect::<candle_core::Result<_>>()?)
}

/// The medians of the times of both, in milliseconds, from runs that alternate.
fn medians(mut run: impl FnMut(usize) -> Result<f64>) -> Result<[f64; 2]> {
    let mut times = [const { Vec::new() }; 2];
    let begin = Instant::now();
    while times[0].len() < 9 || begin.elapsed().as_secs_f64() < 1.0 {
        for (which, times) in times.iter_mut().enumerate() {
            times.push(run(which)? * 1e3);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

/// Prints a line. All arguments are tracked in the backward pass except for those from `constants` on.
fn line(
    name: &str,
    args: &[Tensor],
    constants: usize,
    ours: Function<'_>,
    fast: Function<'_>,
    slow: Function<'_>,
) -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.is_empty() && !words.iter().any(|word| name.contains(word)) {
        return Ok(());
    }
    let forward = medians(|which| {
        let begin = Instant::now();
        let y = [ours, fast][which](args)?;
        let time = begin.elapsed().as_secs_f64();
        drop(y);
        Ok(time)
    })?;
    let vars = args[..constants].iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> =
        vars.iter().map(|var| var.as_tensor().clone()).chain(args[constants..].iter().cloned()).collect();
    let backward = medians(|which| {
        let loss = [ours, slow][which](&tracked)?.sum_all()?;
        let begin = Instant::now();
        let grads = loss.backward()?;
        let time = begin.elapsed().as_secs_f64();
        drop(grads);
        Ok(time)
    })?;
    let ratio = |[ours, theirs]: [f64; 2]| format!("{ours:>9.3} {theirs:>9.3} {:>6.2}", theirs / ours);
    println!("{name:<34} {} {}", ratio(forward), ratio(backward));
    Ok(())
}

fn softmaxed_attention(args: &[Tensor], scale: f64) -> candle_core::Result<Tensor> {
    let scores = (args[0].matmul(&args[1].t()?)? * scale)?;
    ops::softmax(&scores, D::Minus1)?.matmul(&args[2])
}

fn main() -> Result<()> {
    println!("{:<34} {:^26} {:^26}", "", "forward, ms", "backward, ms");
    println!("{0:<34} {1:>9} {2:>9} {3:>6} {1:>9} {2:>9} {3:>6}", "", "here", "candle", "ratio");
    let eps = 1e-12;
    for (model, rows, n) in [("MiniLM", &[32, 48][..], 384), ("Llama", &[1, 256], 2048)] {
        let x = [rows, &[n]].concat();
        line(
            &format!("layer_norm {model} {x:?}"),
            &randn(&[&x, &[n], &[n]])?,
            3,
            &|a| layer_norm(&a[0], &a[1], Some(&a[2]), eps),
            &|a| ops::layer_norm(&a[0], &a[1], &a[2], eps as f32),
            &|a| ops::layer_norm_slow(&a[0], &a[1], &a[2], eps as f32),
        )?;
        line(
            &format!("rms_norm {model} {x:?}"),
            &randn(&[&x, &[n]])?,
            2,
            &|a| rms_norm(&a[0], &a[1], eps),
            &|a| ops::rms_norm(&a[0], &a[1], eps as f32),
            &|a| ops::rms_norm_slow(&a[0], &a[1], eps as f32),
        )?;
    }
    for x in [&[32, 12, 48, 48][..], &[1, 32, 256, 256]] {
        line(
            &format!("softmax {x:?}"),
            &randn(&[x])?,
            1,
            &|a| candle_graft::softmax_last_dim(&a[0]),
            &|a| ops::softmax_last_dim(&a[0]),
            &|a| ops::softmax(&a[0], D::Minus1),
        )?;
    }
    for x in [&[32, 48, 1536][..], &[1, 256, 5632]] {
        let args = randn(&[x])?;
        line(&format!("gelu {x:?}"), &args, 1, &|a| gelu(&a[0]), &|a| a[0].gelu_erf(), &|a| a[0].gelu_erf())?;
        line(&format!("gelu_tanh {x:?}"), &args, 1, &|a| gelu_tanh(&a[0]), &|a| a[0].gelu(), &|a| a[0].gelu())?;
        line(&format!("silu {x:?}"), &args, 1, &|a| silu(&a[0]), &|a| a[0].silu(), &|a| a[0].silu())?;
    }
    for (x, out) in [([32, 48, 384], 384), ([32, 48, 384], 1536), ([32, 48, 1536], 384), ([1, 256, 2048], 2048)] {
        let theirs = |a: &[Tensor]| candle_nn::Linear::new(a[1].clone(), Some(a[2].clone())).forward(&a[0]);
        line(
            &format!("linear {x:?} to {out}"),
            &randn(&[&x, &[out, x[2]], &[out]])?,
            3,
            &|a| linear(&a[0], &a[1], Some(&a[2])),
            &theirs,
            &theirs,
        )?;
    }
    let x = [1, 32, 256, 64];
    line(
        &format!("rope {x:?}"),
        &randn(&[&x, &[256, 32], &[256, 32]])?,
        1,
        &|a| rope(&a[0], &a[1], &a[2]),
        &|a| rotary_emb::rope(&a[0], &a[1], &a[2]),
        &|a| rotary_emb::rope_slow(&a[0], &a[1], &a[2]),
    )?;
    let targets = (Tensor::rand(0f32, 8192.0, 256, &Device::Cpu)?).to_dtype(DType::U32)?;
    line(
        "cross_entropy [256, 8192]",
        &randn(&[&[256, 8192]])?,
        1,
        &|a| cross_entropy(&a[0], &targets),
        &|a| loss::cross_entropy(&a[0], &targets),
        &|a| loss::cross_entropy(&a[0], &targets),
    )?;
    for x in [&[32, 12, 48, 32][..], &[1, 32, 256, 64]] {
        let scale = 1.0 / (x[3] as f64).sqrt();
        let fast = |a: &[Tensor]| {
            let scores = (a[0].matmul(&a[1].t()?)? * scale)?;
            ops::softmax_last_dim(&scores)?.matmul(&a[2])
        };
        line(
            &format!("attention {x:?}"),
            &randn(&[x, x, x])?,
            3,
            &|a| attention(&a[0], &a[1], &a[2], scale, &Mask::None, None, None),
            &fast,
            &|a| softmaxed_attention(a, scale),
        )?;
    }
    Ok(())
}
