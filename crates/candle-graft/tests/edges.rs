//! Arguments at the edge of what is allowed, and beyond it.

mod common;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_graft::{
    Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope, rope_i, rope_thd,
    sigmoid, silu, softmax, softmax_last_dim,
};
use common::{derive, flat, numbers};

const CPU: Device = Device::Cpu;

type Function = fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// The message of the error, which has all of `parts`.
fn refused(result: candle_core::Result<Tensor>, parts: &[&str]) {
    let message = result.map(|y| y.shape().clone()).expect_err("this is not allowed").to_string();
    for part in parts {
        assert!(message.contains(part), "{message} lacks {part}");
    }
}

#[test]
fn tensors_without_elements_have_results_and_gradients_without() -> Result<()> {
    for shape in [&[0, 5][..], &[3, 0], &[2, 0, 4]] {
        let last = &shape[shape.len() - 1..];
        let run = |shapes: &[&[usize]], f: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>| -> Result<Vec<Tensor>> {
            let args = shapes.iter().map(|shape| numbers(shape, 1)).collect::<Result<Vec<_>>>()?;
            let (y, mut grads) = derive(&args, None, f)?;
            for (grad, arg) in grads.iter().zip(&args) {
                assert_eq!(grad.dims(), arg.dims());
            }
            grads.insert(0, y);
            Ok(grads)
        };
        for f in [softmax_last_dim, gelu, gelu_tanh, silu, sigmoid] {
            assert_eq!(run(&[shape], &|a| f(&a[0]))?[0].dims(), shape);
        }
        for dim in 0..shape.len() {
            run(&[shape], &|a| softmax(&a[0], dim))?;
            run(&[shape], &|a| log_softmax(&a[0], dim))?;
        }
        let all = run(&[shape, last, last], &|a| layer_norm(&a[0], &a[1], Some(&a[2]), 0.1))?;
        assert!(flat(&all[2])?.iter().chain(&flat(&all[3])?).all(|x| *x == 0.0));
        run(&[shape, last], &|a| rms_norm(&a[0], &a[1], 0.1))?;
        let all = run(&[shape, &[3, last[0]], &[3]], &|a| linear(&a[0], &a[1], Some(&a[2])))?;
        assert_eq!(all[0].dims()[shape.len() - 1], 3);
    }
    // No inputs: the bias alone.
    let [x, weight] = [[2, 0], [3, 0]].map(|shape| Tensor::zeros(&shape, DType::F64, &CPU));
    let y = linear(&x?, &weight?, Some(&Tensor::new(&[1f64, 2.0, 3.0], &CPU)?))?;
    assert_eq!(y.to_vec2::<f64>()?, [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]);
    let cs = numbers(&[0, 2], 1)?;
    for form in [rope as fn(&_, &_, &_) -> candle_core::Result<Tensor>, rope_i, rope_thd] {
        assert_eq!(form(&numbers(&[0, 0, 0, 4], 1)?, &cs, &cs)?.dims(), [0, 0, 0, 4]);
    }
    // No keys: zeros.
    let (q, kv) = (numbers(&[1, 2, 3, 4], 1)?, numbers(&[1, 2, 0, 4], 2)?);
    let y = attention(&q, &kv, &kv, 1.0, &Mask::None, None, None)?;
    assert_eq!(flat(&y)?, [0.0; 24]);
    Ok(())
}

#[test]
fn minus_infinity_in_a_softmax() -> Result<()> {
    let inf = f32::NEG_INFINITY;
    let x = Tensor::new(&[[inf, 1.0, inf, 1.0], [inf, inf, inf, inf], [-1e30, 0.0, -1e30, 0.0]], &CPU)?;
    let y = softmax_last_dim(&x)?.to_vec2::<f32>()?;
    assert_eq!([&y[0], &y[2]], [&[0.0, 0.5, 0.0, 0.5]; 2]);
    assert!(y[1].iter().all(|p| p.is_nan())); // as candle has it
    let y = log_softmax(&x, 1)?.to_vec2::<f32>()?;
    assert_eq!((y[0][0], y[0][1], y[2][0]), (inf, -std::f32::consts::LN_2, -1e30));
    let nan = softmax_last_dim(&Tensor::new(&[1.0, f32::NAN, 0.0], &CPU)?)?.to_vec1::<f32>()?;
    assert!(nan.iter().all(|p| p.is_nan()));
    // Masks of -1e30 for whole rows give neither NaN nor infinite gradients.
    let (_, grads) = derive(&[Tensor::full(-1e30f32, (2, 40), &CPU)?], None, |a| softmax_last_dim(&a[0]))?;
    assert!(flat(&grads[0])?.iter().all(|g| g.is_finite()));
    Ok(())
}

#[test]
fn a_query_that_sees_no_key_has_zeros() -> Result<()> {
    let args = [numbers(&[1, 2, 3, 4], 1)?, numbers(&[1, 2, 5, 4], 2)?, numbers(&[1, 2, 5, 4], 3)?];
    let rows = [0.0, f64::NEG_INFINITY, -1e30].map(|x| [x; 5]);
    let mask = Mask::Tensor(Tensor::new(&rows, &CPU)?);
    let (y, grads) = derive(&args, None, |a| attention(&a[0], &a[1], &a[2], 1.0, &mask, None, None))?;
    let y = y.squeeze(0)?.to_vec3::<f64>()?;
    assert!(y.iter().all(|head| head[1].iter().all(|x| *x == 0.0) && head[0].iter().all(|x| *x != 0.0)));
    for grad in &grads {
        assert!(flat(grad)?.iter().all(|g| g.is_finite()));
    }
    let of_q = grads[0].squeeze(0)?.to_vec3::<f64>()?;
    assert!(of_q.iter().all(|head| head[1].iter().all(|g| *g == 0.0) && head[0].iter().all(|g| *g != 0.0)));
    Ok(())
}

#[test]
fn attention_passes_nan_on() -> Result<()> {
    let kv = numbers(&[1, 1, 3, 2], 2)?;
    let q = Tensor::new(&[[[[f64::NAN, 1.0], [1.0, 2.0]]]], &CPU)?;
    let is_nan = |y: Tensor| -> Result<Vec<bool>> { Ok(flat(&y)?.iter().map(|x| x.is_nan()).collect()) };
    let y = attention(&q, &kv, &kv, 1.0, &Mask::None, None, None)?;
    assert_eq!(is_nan(y)?, [true, true, false, false]);
    let q = numbers(&[1, 1, 2, 2], 1)?;
    assert_eq!(is_nan(attention(&q, &kv, &kv, f64::NAN, &Mask::None, None, None)?)?, [true; 4]);
    let mask = Mask::Tensor(Tensor::new(&[[0.0, 0.0, 0.0], [f64::NAN, f64::NEG_INFINITY, f64::NEG_INFINITY]], &CPU)?);
    assert_eq!(is_nan(attention(&q, &kv, &kv, 1.0, &mask, None, None)?)?, [false, false, true, true]);
    Ok(())
}

#[test]
fn an_offset_as_large_as_it_may_be_shows_every_key() -> Result<()> {
    let (q, kv) = (numbers(&[1, 2, 3, 4], 1)?, numbers(&[1, 2, 5, 4], 2)?);
    let all = flat(&attention(&q, &kv, &kv, 1.0, &Mask::None, None, None)?)?;
    for kv_offset in [5, usize::MAX - 1, usize::MAX] {
        let y = attention(&q, &kv, &kv, 1.0, &Mask::Causal { kv_offset }, None, None)?;
        assert_eq!(flat(&y)?, all, "{kv_offset}");
    }
    Ok(())
}

#[test]
fn activations_of_numbers_far_away() -> Result<()> {
    let x = Tensor::new(&[-1e30f32, -200.0, 0.0, 200.0, 1e30], &CPU)?;
    for f in [gelu, gelu_tanh, silu] {
        let (y, grads) = derive(std::slice::from_ref(&x), None, |a| f(&a[0]))?;
        assert_eq!(y.abs()?.to_vec1::<f32>()?, [0.0, 0.0, 0.0, 200.0, 1e30]);
        assert_eq!(grads[0].abs()?.to_vec1::<f32>()?, [0.0, 0.0, 0.5, 1.0, 1.0]);
    }
    let (y, grads) = derive(&[x], None, |a| sigmoid(&a[0]))?;
    assert_eq!(y.to_vec1::<f32>()?, [0.0, 0.0, 0.5, 1.0, 1.0]);
    assert_eq!(grads[0].to_vec1::<f32>()?, [0.0, 0.0, 0.25, 0.0, 0.0]);
    Ok(())
}

#[test]
fn only_what_is_tracked_has_a_gradient() -> Result<()> {
    let x = |shape: &[usize]| numbers(shape, 1);
    let cases: [(&str, Vec<Vec<usize>>, Function); 8] = [
        ("layer_norm", vec![vec![2, 4], vec![4], vec![4]], |a| layer_norm(&a[0], &a[1], Some(&a[2]), 0.1)),
        ("layer_norm without bias", vec![vec![2, 4], vec![4]], |a| layer_norm(&a[0], &a[1], None, 0.1)),
        ("rms_norm", vec![vec![2, 4], vec![4]], |a| rms_norm(&a[0], &a[1], 0.1)),
        ("linear", vec![vec![2, 4], vec![3, 4], vec![3]], |a| linear(&a[0], &a[1], Some(&a[2]))),
        ("linear without bias", vec![vec![2, 4], vec![3, 4]], |a| linear(&a[0], &a[1], None)),
        ("rope", vec![vec![1, 2, 3, 4], vec![3, 2], vec![3, 2]], |a| rope(&a[0], &a[1], &a[2])),
        ("attention", vec![vec![1, 2, 3, 4]; 3], |a| attention(&a[0], &a[1], &a[2], 1.0, &Mask::None, None, None)),
        ("a mask", vec![vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![3, 3]], |a| {
            attention(&a[0], &a[1], &a[2], 1.0, &Mask::Tensor(a[3].clone()), Some(1.0), None)
        }),
    ];
    for (name, shapes, function) in cases {
        let args = shapes.iter().map(|shape| x(shape)).collect::<Result<Vec<_>>>()?;
        assert!(!function(&args)?.track_op(), "{name}");
        for tracked in 0..args.len() {
            let mut args = args.clone();
            args[tracked] = Var::from_tensor(&args[tracked])?.into_inner();
            let grads = function(&args)?.sqr()?.sum_all()?.backward()?;
            for (i, arg) in args.iter().enumerate() {
                assert_eq!(grads.get(arg).is_some(), i == tracked, "{name}, {i} where {tracked} is tracked");
            }
            // Nor does a gradient begin a graph.
            assert!(grads.get(&args[tracked]).is_some_and(|grad| !grad.track_op()), "{name}");
        }
    }
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_errors() -> Result<()> {
    let f = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU);
    let (x, w, int) = (f(&[2, 3])?, f(&[3])?, Tensor::zeros((2, 3), DType::U32, &CPU)?);
    let scalar = Tensor::new(1f32, &CPU)?;
    refused(layer_norm(&x, &f(&[4])?, None, 0.1), &["layer_norm", "weight", "[4]", "[3]"]);
    refused(layer_norm(&x, &w, Some(&f(&[1, 3])?), 0.1), &["layer_norm", "bias", "[1, 3]", "[3]"]);
    refused(layer_norm(&scalar, &w, None, 0.1), &["layer_norm", "x is a scalar"]);
    refused(rms_norm(&x, &w.to_dtype(DType::F64)?, 0.1), &["rms_norm", "weight", "F64", "F32"]);
    refused(rms_norm(&int, &w, 0.1), &["rms_norm", "x is of type U32", "f32, f64, f16 or bf16"]);
    refused(softmax(&x, 2), &["softmax", "2"]);
    refused(softmax_last_dim(&int), &["softmax", "U32"]);
    refused(softmax_last_dim(&scalar), &["softmax"]);
    refused(log_softmax(&scalar, D::Minus1), &["log_softmax"]);
    refused(gelu(&int), &["gelu", "U32"]);
    refused(linear(&x, &w, None), &["linear", "weight", "[3]", "(out, in)"]);
    refused(linear(&x, &f(&[5, 2])?, None), &["linear", "[2, 3]", "[5, 2]"]);
    refused(linear(&x, &f(&[5, 3])?, Some(&w)), &["linear", "bias", "[3]", "[5]"]);
    refused(linear(&scalar, &f(&[5, 3])?, None), &["linear", "x is a scalar"]);
    let (head, cs) = (f(&[2, 3, 5, 4])?, f(&[5, 2])?);
    refused(rope(&x, &cs, &cs), &["rope", "x", "[2, 3]", "(b, h, t, d)"]);
    refused(rope_thd(&x, &cs, &cs), &["rope_thd", "(b, t, h, d)"]);
    refused(rope_i(&f(&[2, 3, 5, 3])?, &cs, &cs), &["rope_i", "even", "[2, 3, 5, 3]"]);
    refused(rope(&head, &f(&[4, 2])?, &cs), &["rope", "cos", "[4, 2]", "at least 5"]);
    refused(rope(&head, &cs, &f(&[3, 5, 2])?), &["rope", "sin", "[3, 5, 2]", "(2, n, 2)"]);
    refused(rope(&head, &cs, &cs.to_dtype(DType::BF16)?), &["rope", "sin", "BF16", "F32"]);
    let logits = f(&[2, 3])?;
    let ids = |ids: &[i64]| Tensor::new(ids, &CPU);
    refused(cross_entropy(&logits, &ids(&[1, 3])?), &["cross_entropy", "target at 1 is 3", "less than 3"]);
    refused(cross_entropy(&logits, &ids(&[-100, 0])?), &["cross_entropy", "target at 0 is -100"]);
    refused(cross_entropy(&logits, &ids(&[1])?), &["cross_entropy", "targets", "[1]", "[2]"]);
    refused(cross_entropy(&logits, &f(&[2])?), &["cross_entropy", "F32", "u8, u32 or i64"]);
    refused(cross_entropy(&w, &ids(&[1])?), &["cross_entropy", "logits", "[3]", "(n, classes)"]);
    let (q, kv) = (f(&[1, 4, 3, 8])?, f(&[1, 2, 5, 8])?);
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, cap| attention(q, k, v, 1.0, &mask, cap, None);
    refused(attend(&x, &kv, &kv, Mask::None, None), &["attention", "q", "[2, 3]", "(b, h, s, d)"]);
    refused(attend(&q, &f(&[1, 2, 5, 4])?, &kv, Mask::None, None), &["attention", "k", "[1, 2, 5, 4]", "[1, 2, 5, 8]"]);
    refused(attend(&q, &kv, &f(&[1, 2, 4, 8])?, Mask::None, None), &["attention", "v", "[1, 2, 4, 8]"]);
    refused(attend(&q, &f(&[1, 3, 5, 8])?, &f(&[1, 3, 5, 8])?, Mask::None, None), &["attention", "4 heads", "3 heads"]);
    refused(attend(&q, &kv, &kv, Mask::Tensor(f(&[5, 3])?), None), &["attention", "mask", "[5, 3]", "[1, 4, 3, 5]"]);
    refused(attend(&q, &kv, &kv, Mask::Tensor(int), None), &["attention", "mask", "U32"]);
    refused(attend(&q, &kv, &kv, Mask::None, Some(0.0)), &["attention", "softcap is 0"]);
    refused(attention(&q, &kv, &kv, 1.0, &Mask::None, None, Some(&w)), &["attention", "alibi_slopes", "[3]", "[4]"]);
    Ok(())
}
