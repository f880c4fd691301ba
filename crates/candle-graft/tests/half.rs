//! bf16 and f16 against f64: the result of the same arguments is rounded once.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_graft::{
    Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope, rope_i, rope_thd,
    sigmoid, silu, softmax_last_dim,
};
use common::{derive, flat, numbers};

/// Compares results and gradients in both types with those in f64 of the same arguments.
///
/// The error is at most half of a unit in the last place; that of f32, in which the numbers are computed, is a
/// millionth of the largest number.
fn check(name: &str, shapes: &[&[usize]], function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>) -> Result<()> {
    for (dtype, unit, smallest) in [(DType::BF16, 2f64.powi(-8), 0.0), (DType::F16, 2f64.powi(-11), 2f64.powi(-25))] {
        let args = (shapes.iter().enumerate()).map(|(i, shape)| Ok(numbers(shape, i as u64)?.to_dtype(dtype)?));
        let args = args.collect::<Result<Vec<_>>>()?;
        let weights = numbers(function(&args)?.dims(), 99)?.to_dtype(dtype)?;
        let exact = args.iter().map(|arg| arg.to_dtype(DType::F64)).collect::<candle_core::Result<Vec<_>>>()?;
        let (y, grads) = derive(&args, Some(&weights), &function)?;
        let (exact_y, exact_grads) = derive(&exact, Some(&weights.to_dtype(DType::F64)?), &function)?;
        for (i, (ours, exact)) in [y].iter().chain(&grads).zip([exact_y].iter().chain(&exact_grads)).enumerate() {
            assert_eq!(ours.dtype(), dtype, "{name} {i}");
            let (ours, exact) = (flat(ours)?, flat(exact)?);
            let size = exact.iter().fold(0.0, |size: f64, x| size.max(x.abs()));
            for (a, e) in ours.iter().zip(&exact) {
                let allowed = unit * e.abs() + 2e-6 * size + smallest;
                assert!((a - e).abs() <= allowed, "{name} in {dtype:?}, {i}: {a} instead of {e}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_normalizations() -> Result<()> {
    check("layer_norm", &[&[70, 33], &[33], &[33]], |a| layer_norm(&a[0], &a[1], Some(&a[2]), 1e-5))?;
    check("layer_norm", &[&[9, 5], &[5]], |a| layer_norm(&a[0], &a[1], None, 1e-5))?;
    check("rms_norm", &[&[70, 33], &[33]], |a| rms_norm(&a[0], &a[1], 1e-5))
}

#[test]
fn the_softmax_and_its_logarithm() -> Result<()> {
    check("softmax", &[&[7, 50]], |a| softmax_last_dim(&(&a[0] * 4.0)?))?;
    check("log_softmax", &[&[7, 50]], |a| log_softmax(&(&a[0] * 4.0)?, 1))?;
    check("log_softmax", &[&[7, 50]], |a| log_softmax(&a[0], 0))
}

#[test]
fn the_activations() -> Result<()> {
    check("gelu", &[&[1100]], |a| gelu(&(&a[0] * 4.0)?))?;
    check("gelu_tanh", &[&[1100]], |a| gelu_tanh(&(&a[0] * 4.0)?))?;
    check("silu", &[&[1100]], |a| silu(&(&a[0] * 4.0)?))?;
    check("sigmoid", &[&[1100]], |a| sigmoid(&(&a[0] * 4.0)?))
}

#[test]
fn the_linear_layer() -> Result<()> {
    check("linear", &[&[2, 300, 20], &[7, 20], &[7]], |a| linear(&a[0], &a[1], Some(&a[2])))?;
    check("linear", &[&[20, 6], &[7, 20]], |a| linear(&a[0].t()?, &a[1], None))
}

#[test]
fn a_sum_of_many_does_not_stop_growing() -> Result<()> {
    let [x, weight] = [[4096, 1], [1, 1]].map(|shape| Tensor::zeros(&shape, DType::BF16, &Device::Cpu));
    let bias = candle_core::Var::zeros(1, DType::BF16, &Device::Cpu)?;
    let grads = linear(&x?, &weight?, Some(&bias))?.sum_all()?.backward()?;
    // A sum in bf16 ends at 256.
    assert_eq!(grads.get(&bias).map(flat).transpose()?, Some(vec![4096.0]));
    Ok(())
}

#[test]
fn the_rotary_embeddings() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[2, 3, 3, 8], &[3, 4], &[3, 4]];
    let [cos, sin] = [1, 2].map(|seed| numbers(&[3, 4], seed));
    // Numbers that both types have.
    let (cos, sin) = (cos?.to_dtype(DType::BF16)?, sin?.to_dtype(DType::BF16)?);
    for (name, form) in [("rope", rope as fn(&_, &_, &_) -> _), ("rope_i", rope_i), ("rope_thd", rope_thd)] {
        check(name, &shapes, |a| form(&a[0], &a[1], &a[2]))?;
        check(name, &shapes[..1], |a| form(&a[0], &cos.to_dtype(a[0].dtype())?, &sin.to_dtype(a[0].dtype())?))?;
    }
    Ok(())
}

#[test]
fn the_cross_entropy() -> Result<()> {
    let targets = Tensor::new(&[1u32, 0, 6, 49, 3], &Device::Cpu)?;
    check("cross_entropy", &[&[5, 50]], |a| cross_entropy(&(&a[0] * 4.0)?, &targets))
}

#[test]
fn attention_of_groups() -> Result<()> {
    for mask in [Mask::None, Mask::Causal { kv_offset: 2 }] {
        check("attention", &[&[2, 4, 5, 8], &[2, 2, 7, 8], &[2, 2, 7, 8]], |a| {
            attention(&a[0], &a[1], &a[2], 0.5, &mask, Some(3.0), None)
        })?;
    }
    Ok(())
}
