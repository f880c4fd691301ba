//! What the tests share.
#![allow(dead_code, unreachable_pub)] // each test uses a part

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor, Var};

/// Numbers between -2 and 2 that look random, different for each seed, in f64.
pub fn numbers(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = move || {
        // The generator splitmix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 51) as f64 - 2.0
    };
    let numbers: Vec<f64> = (0..shape.iter().product()).map(|_| next()).collect();
    Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?)
}

/// The elements as f64.
pub fn flat(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The result of `function` for `args` as variables, and the gradients of all of them where `weights` is the gradient
/// of the result.
pub fn derive(
    args: &[Tensor],
    weights: Option<&Tensor>,
    function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) -> Result<(Tensor, Vec<Tensor>)> {
    let vars = args.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = function(&tensors)?;
    let loss = match weights {
        Some(weights) => (&y * weights)?.sum_all()?,
        None => y.sum_all()?,
    };
    let grads = loss.backward()?;
    let grad = |(i, var): (usize, &Var)| grads.get(var).cloned().with_context(|| format!("argument {i}: no gradient"));
    Ok((y.detach(), vars.iter().enumerate().map(grad).collect::<Result<_>>()?))
}

/// Fails unless all numbers differ by at most `allowed` times the size of the largest of `expected`.
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, allowed: f64) -> Result<()> {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let (actual, expected) = (flat(actual)?, flat(expected)?);
    let size = expected.iter().fold(0.0, |size: f64, x| size.max(x.abs()));
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() <= allowed * size, "{what}: at {i}, {a} instead of {e}, allowed {allowed} of {size}");
    }
    Ok(())
}
