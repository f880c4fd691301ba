//! The gradients of all arguments of all functions against differences of the results, in f64.

mod common;

use anyhow::Result;
use candle_core::{D, Device, Tensor};
use candle_graft::{
    Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope, rope_i, rope_thd,
    sigmoid, silu, softmax, softmax_last_dim,
};
use common::{derive, flat, numbers};

type Function<'a> = &'a dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// Compares the gradients of `function` at each element of each argument with `(f(x + h) - f(x - h)) / 2h`.
fn check(name: &str, shapes: &[&[usize]], function: Function<'_>) -> Result<()> {
    let args = shapes.iter().enumerate().map(|(i, shape)| numbers(shape, i as u64)).collect::<Result<Vec<_>>>()?;
    let weights = numbers(function(&args)?.dims(), 99)?;
    let (y, grads) = derive(&args, Some(&weights), function)?;
    assert!(flat(&y)?.iter().all(|y| y.is_finite()), "{name}");
    let h = 1e-5;
    for (which, (arg, grad)) in args.iter().zip(&grads).enumerate() {
        assert_eq!(grad.dims(), arg.dims(), "{name}, argument {which}");
        let (at, grad) = (flat(arg)?, flat(grad)?);
        let size = grad.iter().fold(1.0, |size: f64, x| size.max(x.abs()));
        for i in 0..at.len() {
            let result = |h: f64| -> Result<f64> {
                let (mut args, mut moved) = (args.clone(), at.clone());
                moved[i] += h;
                args[which] = Tensor::from_vec(moved, arg.dims(), &Device::Cpu)?;
                Ok((function(&args)? * &weights)?.sum_all()?.to_scalar()?)
            };
            let expected = (result(h)? - result(-h)?) / (2.0 * h);
            let difference = (grad[i] - expected).abs();
            assert!(difference < 1e-6 * size, "{name}, argument {which} at {i}: {}, not {expected}", grad[i]);
        }
    }
    Ok(())
}

#[test]
fn the_normalizations() -> Result<()> {
    for x in [&[3, 5][..], &[2, 3, 16], &[2, 1, 2, 33], &[7], &[2, 1], &[40, 2]] {
        let n = &[x[x.len() - 1]][..];
        let eps = 0.01;
        check("layer_norm", &[x, n, n], &|args| layer_norm(&args[0], &args[1], Some(&args[2]), eps))?;
        check("layer_norm without bias", &[x, n], &|args| layer_norm(&args[0], &args[1], None, eps))?;
        check("rms_norm", &[x, n], &|args| rms_norm(&args[0], &args[1], eps))?;
    }
    check("layer_norm of a view", &[&[6, 4], &[6], &[6]], &|args| {
        layer_norm(&args[0].t()?, &args[1], Some(&args[2]), 0.01)
    })?;
    check("rms_norm of a view", &[&[3, 8], &[5]], &|args| rms_norm(&args[0].narrow(1, 2, 5)?, &args[1], 0.01))
}

#[test]
fn the_softmax_and_its_logarithm() -> Result<()> {
    for x in [&[3, 5][..], &[2, 3, 16], &[2, 1, 2, 19], &[7], &[2, 1]] {
        check("softmax_last_dim", &[x], &|args| softmax_last_dim(&args[0]))?;
        for dim in 0..x.len() {
            check("softmax", &[x], &|args| softmax(&args[0], dim))?;
            check("log_softmax", &[x], &|args| log_softmax(&args[0], dim))?;
        }
    }
    check("softmax of a view", &[&[3, 4, 2]], &|args| softmax(&args[0].transpose(0, 1)?, D::Minus1))?;
    check("log_softmax of a view", &[&[6, 4]], &|args| log_softmax(&args[0].narrow(0, 1, 3)?.t()?, 0))
}

#[test]
fn the_activations() -> Result<()> {
    for x in [&[3, 37][..], &[1], &[2, 1, 17]] {
        let wide = |args: &[Tensor]| &args[0] * 2.5; // numbers up to 5
        check("gelu", &[x], &|args| gelu(&wide(args)?))?;
        check("gelu_tanh", &[x], &|args| gelu_tanh(&wide(args)?))?;
        check("silu", &[x], &|args| silu(&wide(args)?))?;
        check("sigmoid", &[x], &|args| sigmoid(&wide(args)?))?;
    }
    check("gelu of a view", &[&[5, 3]], &|args| gelu(&args[0].t()?))?;
    check("silu of a view", &[&[5, 3]], &|args| silu(&args[0].narrow(1, 1, 2)?))
}

#[test]
fn the_linear_layer() -> Result<()> {
    for x in [&[3, 5][..], &[2, 3, 4], &[2, 1, 2, 3], &[7], &[2, 1], &[33, 2]] {
        let (outs, ins) = (6, x[x.len() - 1]);
        let weight = &[outs, ins][..];
        check("linear", &[x, weight, &[outs]], &|args| linear(&args[0], &args[1], Some(&args[2])))?;
        check("linear without bias", &[x, weight], &|args| linear(&args[0], &args[1], None))?;
    }
    check("linear of views", &[&[3, 4, 2], &[4, 5]], &|args| linear(&args[0].transpose(1, 2)?, &args[1].t()?, None))?;
    check("linear of a matrix that is a view", &[&[4, 3], &[5, 4]], &|args| linear(&args[0].t()?, &args[1], None))
}

#[test]
fn the_rotary_embeddings() -> Result<()> {
    for (name, form) in [("rope", rope as fn(&_, &_, &_) -> _), ("rope_i", rope_i), ("rope_thd", rope_thd)] {
        for x in [[2, 3, 3, 6], [1, 1, 1, 2], [2, 3, 3, 34]] {
            for cs in [&[3, x[3] / 2][..], &[5, x[3] / 2], &[x[0], 3, x[3] / 2], &[x[0], 4, x[3] / 2]] {
                check(name, &[&x, cs, cs], &|args| form(&args[0], &args[1], &args[2]))?;
                let [cos, sin] = [numbers(cs, 1)?, numbers(cs, 2)?];
                check(name, &[&x], &|args| form(&args[0], &cos, &sin))?;
            }
        }
        let cs = &[3, 2];
        check(name, &[&[1, 3, 3, 4], cs, cs], &|args| form(&args[0].transpose(1, 2)?, &args[1], &args[2]))?;
        check(name, &[&[3, 1, 3, 4], cs], &|args| form(&args[0].transpose(0, 1)?, &args[1], &args[1]))?;
        let [cos, sin] = [numbers(&[2, 3], 1)?.t()?, numbers(&[2, 3], 2)?.t()?];
        check(name, &[&[1, 4, 3, 3]], &|args| form(&args[0].transpose(1, 3)?.contiguous()?, &cos, &sin))?;
    }
    Ok(())
}

#[test]
fn the_cross_entropy() -> Result<()> {
    let targets = Tensor::new(&[1u32, 0, 6, 6, 3], &Device::Cpu)?;
    check("cross_entropy", &[&[5, 7]], &|args| cross_entropy(&args[0], &targets))?;
    check("cross_entropy of a view", &[&[33, 5]], &|args| cross_entropy(&args[0].t()?, &targets))?;
    let targets = targets.narrow(0, 1, 1)?.to_dtype(candle_core::DType::I64)?;
    check("cross_entropy of one", &[&[1, 1]], &|args| cross_entropy(&args[0], &targets))
}

#[test]
fn attention_of_all_kinds() -> Result<()> {
    let mask_shapes = [&[3, 4][..], &[1, 3, 4], &[2, 1, 1, 4], &[2, 4, 3, 4]];
    for (h, h_kv) in [(4, 2), (4, 4), (4, 1)] {
        let (q, k, v) = ([2, h, 3, 6], [2, h_kv, 4, 6], [2, h_kv, 4, 5]);
        let qkv = [&q[..], &k, &v];
        for softcap in [None, Some(1.5)] {
            for mask in [Mask::None, Mask::Causal { kv_offset: 0 }, Mask::Causal { kv_offset: 1 }] {
                let run = |args: &[Tensor], slopes: Option<&Tensor>| {
                    attention(&args[0], &args[1], &args[2], 0.4, &mask, softcap, slopes)
                };
                check(&format!("attention, {mask:?}, {softcap:?}"), &qkv, &|args| run(args, None))?;
                check("attention with ALiBi", &[&q, &k, &v, &[h]], &|args| run(args, Some(&args[3])))?;
            }
            for shape in mask_shapes {
                check("attention with a mask", &[&q, &k, &v, shape], &|args| {
                    attention(&args[0], &args[1], &args[2], 0.4, &Mask::Tensor(args[3].clone()), softcap, None)
                })?;
            }
        }
    }
    // Views as a model makes them of (b, s, h d).
    check("attention of views", &[&[2, 3, 4, 6], &[2, 5, 2, 6], &[2, 5, 2, 6]], &|args| {
        let [q, k, v] = [0, 1, 2].map(|i| args[i].transpose(1, 2));
        attention(&q?, &k?, &v?, 0.4, &Mask::Causal { kv_offset: 2 }, None, None)
    })
}
