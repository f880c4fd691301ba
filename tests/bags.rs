//! Bags: what they pool, and the gradients that reach tables and weights, against lookups and candle's own operations.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_adamax::{Adamax, Bags, Embedding, EmbeddingBag, ParamsAdamax, Pooling};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, Optimizer};
use common::{DTYPES, bits, noise, tensor, values, var};
use proptest::prelude::*;

const ROWS: usize = 9;
const DIM: usize = 4;

fn table(dtype: DType) -> Var {
    var(&noise(11, ROWS * DIM), &[ROWS, DIM], dtype)
}

fn bag(var: &Var, pooling: Pooling) -> EmbeddingBag {
    EmbeddingBag::new(var.as_tensor().clone(), pooling).unwrap()
}

fn row(values: &[u32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// The gradient that a step gives the optimizer for a table: m after one step with `beta1` 0.
fn gradient(var: &Var, loss: &Tensor) -> Vec<f64> {
    let params = ParamsAdamax { beta1: 0.0, allow_no_gradients: true, lr: 0.0.into(), ..Default::default() };
    let mut optimizer = Adamax::from_named([("table", var.clone())], params).unwrap();
    optimizer.step(&loss.backward().unwrap()).unwrap();
    values(&optimizer.state("table").unwrap().exp_avg)
}

/// One number of a result, in which every element has a factor of its own.
fn loss(pooled: &Tensor) -> Tensor {
    let factors = tensor(&noise(5, pooled.elem_count()), pooled.dims(), pooled.dtype());
    (pooled * factors).unwrap().sum_all().unwrap()
}

/// The bags of `ids` with candle's operations, one after another; zeros for empty ones.
fn reference(weight: &Tensor, ids: &[u32], starts: &[usize], pooling: Pooling, factors: Option<&Tensor>) -> Tensor {
    let pool = |bag: &[usize]| -> Result<Tensor> {
        if bag[0] == bag[1] {
            return Tensor::zeros(DIM, weight.dtype(), &Device::Cpu);
        }
        let mut rows = weight.index_select(&row(&ids[bag[0]..bag[1]]), 0)?;
        if let Some(factors) = factors {
            rows = rows.broadcast_mul(&factors.narrow(0, bag[0], bag[1] - bag[0])?.unsqueeze(1)?)?;
        }
        match pooling {
            Pooling::Sum => rows.sum(0),
            Pooling::Mean => rows.mean(0),
            Pooling::Max => rows.max(0),
        }
    };
    Tensor::stack(&starts.windows(2).map(pool).collect::<Result<Vec<_>>>().unwrap(), 0).unwrap()
}

#[track_caller]
fn assert_near(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance, "{what}[{i}]: expected {expected}, got {got}");
    }
}

/// What a few roundings of sums of numbers below 1 come to.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-14,
        DType::F32 => 1e-5,
        DType::F16 => 2e-2,
        _ => 1e-1,
    }
}

proptest! {
    #[test]
    fn bags_equal_lookups_and_candles_operations(
        lists in prop::collection::vec(prop::collection::vec(0u32..ROWS as u32, 0..6), 1..8),
        pooling in prop::sample::select(vec![Pooling::Sum, Pooling::Mean, Pooling::Max]),
        dtype in prop::sample::select(DTYPES.to_vec()),
    ) {
        let mut lists = lists;
        if pooling == Pooling::Max {
            // Of equals, candle gives the gradient to each.
            lists.iter_mut().for_each(|list| { list.sort(); list.dedup(); });
        }
        let (ids, mut starts) = (lists.concat(), vec![0]);
        starts.extend(lists.iter().scan(0, |end, list| { *end += list.len(); Some(*end) }));
        prop_assume!(!ids.is_empty());
        let (ours, theirs) = (table(dtype), table(dtype));
        let offsets: Vec<i64> = starts[..lists.len()].iter().map(|&start| start as i64).collect();
        let bags = Bags::offsets(&row(&ids), &Tensor::new(offsets, &Device::Cpu).unwrap()).unwrap();
        let pooled = bag(&ours, pooling).pool(&bags).unwrap();
        let expected = reference(&theirs, &ids, &starts, pooling, None);
        assert_near("pooled", &values(&pooled), &values(&expected), tolerance(dtype));
        let grads = loss(&expected).backward().unwrap();
        let expected = grads.get(&theirs).map_or(vec![0.0; ROWS * DIM], values);
        assert_near("gradient", &gradient(&ours, &loss(&pooled)), &expected, tolerance(dtype));
    }

    #[test]
    fn weights_scale_rows_and_get_their_gradient(
        lists in prop::collection::vec(prop::collection::vec(0u32..ROWS as u32, 0..6), 1..8),
        dtype in prop::sample::select(DTYPES.to_vec()),
        frozen in any::<bool>(),
    ) {
        let (ids, mut starts) = (lists.concat(), vec![0]);
        starts.extend(lists.iter().scan(0, |end, list| { *end += list.len(); Some(*end) }));
        prop_assume!(!ids.is_empty());
        let (ours, theirs) = (table(dtype), table(dtype));
        // Weights come from other layers, here from a square.
        let roots = || var(&noise(17, ids.len()), &[ids.len()], dtype);
        let (our_roots, their_roots) = (roots(), roots());
        let offsets: Vec<u32> = starts[..lists.len()].iter().map(|&start| start as u32).collect();
        let bags = Bags::offsets(&row(&ids), &row(&offsets)).unwrap().weights(&our_roots.sqr().unwrap()).unwrap();
        let layer = match frozen {
            false => bag(&ours, Pooling::Sum),
            true => EmbeddingBag::new(ours.as_tensor().copy().unwrap().detach(), Pooling::Sum).unwrap(),
        };
        let pooled = layer.pool(&bags).unwrap();
        let expected = reference(&theirs, &ids, &starts, Pooling::Sum, Some(&their_roots.sqr().unwrap()));
        assert_near("pooled", &values(&pooled), &values(&expected), tolerance(dtype));
        let (our_grads, their_grads) = (loss(&pooled).backward().unwrap(), loss(&expected).backward().unwrap());
        let of = |grads: &candle_core::backprop::GradStore, var: &Var| values(grads.get(var).unwrap());
        assert_near("weights", &of(&our_grads, &our_roots), &of(&their_grads, &their_roots), 4.0 * tolerance(dtype));
        if !frozen {
            assert_near("table", &gradient(&ours, &loss(&pooled)), &of(&their_grads, &theirs), tolerance(dtype));
        }
    }
}

#[test]
fn a_batch_equals_offsets_and_lookups_summed_by_candle() -> Result<()> {
    let var = table(DType::F64);
    let ids = Tensor::new(&[[1u32, 2, 1], [0, 8, 3]], &Device::Cpu)?;
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        let batch = bag(&var, pooling).forward(&ids)?;
        let offsets = bag(&var, pooling).pool(&Bags::offsets(&ids.flatten_all()?, &row(&[0, 3]))?)?;
        assert_eq!(bits(&batch), bits(&offsets));
        assert_eq!(gradient(&var, &loss(&batch)), gradient(&var, &loss(&offsets)));
    }
    let sums = Embedding::new(var.as_tensor().clone())?.forward(&ids)?.sum(1)?;
    let batch = bag(&var, Pooling::Sum).forward(&ids)?;
    assert_near("sum", &values(&batch), &values(&sums), 1e-15);
    assert_eq!(gradient(&var, &loss(&batch)), gradient(&var, &loss(&sums)));
    Ok(())
}

#[test]
fn empty_bags_are_zeros_without_a_gradient() -> Result<()> {
    let var = table(DType::F32);
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        let layer = bag(&var, pooling);
        let none = layer.pool(&Bags::offsets(&row(&[]), &row(&[0, 0]))?)?;
        assert_eq!(none.to_vec2::<f32>()?, [[0.0; DIM]; 2]);
        assert!(gradient(&var, &loss(&none)).iter().all(|&g| g == 0.0));
        assert_eq!(layer.pool(&Bags::offsets(&row(&[]), &row(&[]))?)?.dims(), [0, DIM]);
        assert_eq!(
            layer.forward(&Tensor::zeros((3, 0), DType::U32, &Device::Cpu)?)?.to_vec2::<f32>()?,
            [[0.0; DIM]; 3]
        );
    }
    Ok(())
}

#[test]
fn padding_is_left_out() -> Result<()> {
    let var = table(DType::F64);
    let padded = Tensor::new(&[[1u32, 0, 2], [0, 0, 0]], &Device::Cpu)?;
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        let got = bag(&var, pooling).padding_idx(0)?.forward(&padded)?;
        let expected = bag(&var, pooling).pool(&Bags::offsets(&row(&[1, 2]), &row(&[0, 2]))?)?;
        assert_eq!(bits(&got), bits(&expected), "{pooling:?}");
        let got = gradient(&var, &loss(&got));
        assert_eq!(got, gradient(&var, &loss(&expected)));
        assert!(got[..DIM].iter().all(|&g| g == 0.0));
    }
    // A factor of what is left out has a gradient of zero.
    let factors = Var::from_tensor(&tensor(&noise(3, 6), &[2, 3], DType::F64))?;
    let pooled = bag(&var, Pooling::Sum).padding_idx(0)?.pool(&Bags::batch(&padded)?.weights(&factors)?)?;
    let grads = loss(&pooled).backward()?;
    let of_factors = values(grads.get(&factors).unwrap());
    assert_eq!(of_factors.iter().map(|&g| g != 0.0).collect::<Vec<_>>(), [true, false, true, false, false, false]);
    // A lookup has the row, and its gradient has not.
    let rows = Embedding::new(var.as_tensor().clone())?.padding_idx(0)?.forward(&padded)?;
    assert_eq!(bits(&rows), bits(&Embedding::new(var.as_tensor().clone())?.forward(&padded)?));
    let got = gradient(&var, &loss(&rows));
    let all = gradient(&var, &loss(&Embedding::new(var.as_tensor().clone())?.forward(&padded)?));
    assert!(got[..DIM].iter().all(|&g| g == 0.0) && all[..DIM].iter().all(|&g| g != 0.0));
    assert_eq!(got[DIM..], all[DIM..]);
    Ok(())
}

#[test]
fn rows_above_the_norm_are_scaled_down_where_they_are_looked_up() -> Result<()> {
    for dtype in DTYPES {
        let var = table(dtype);
        let norm = |i: usize| values(&var).as_slice()[i * DIM..(i + 1) * DIM].iter().map(|x| x * x).sum::<f64>().sqrt();
        // Between the norms of rows, so that some are above it and some are not.
        let mut norms: Vec<f64> = (0..ROWS).map(norm).collect();
        let before = (bits(&var), norms.clone());
        norms.sort_by(f64::total_cmp);
        let max_norm = (norms[ROWS / 2] + norms[ROWS / 2 - 1]) / 2.0;
        let looked_up = [0u32, 3, 3, 4, 7, 8];
        let layer = Embedding::new(var.as_tensor().clone())?.max_norm(max_norm)?;
        let rows = layer.forward(&row(&looked_up))?;
        assert_eq!(bits(&rows), bits(&var.index_select(&row(&looked_up), 0)?), "what is returned is what is left");
        let mut scaled = 0;
        for i in 0..ROWS {
            let (now, then) = (&bits(&var)[i * DIM..(i + 1) * DIM], &before.0[i * DIM..(i + 1) * DIM]);
            if before.1[i] > max_norm && looked_up.contains(&(i as u32)) {
                // PyTorch adds 1e-7 to the norm that it divides by.
                assert!(
                    (norm(i) / max_norm - 1.0).abs() < tolerance(dtype).max(1e-6),
                    "{dtype:?} row {i}: {}",
                    norm(i)
                );
                scaled += 1;
            } else {
                assert_eq!(now, then, "{dtype:?} row {i}");
            }
        }
        assert!(scaled > 0);
        let mut pooled = EmbeddingBag::new(table(dtype).as_tensor().clone(), Pooling::Sum)?.max_norm(max_norm)?;
        let got = pooled.forward(&row(&looked_up).unsqueeze(0)?)?;
        let expected = bag(&var, Pooling::Sum).forward(&row(&looked_up).unsqueeze(0)?)?;
        assert_eq!(bits(&got), bits(&expected));
        pooled = pooled.padding_idx(1)?;
        assert_eq!(bits(&pooled.forward(&row(&looked_up).unsqueeze(0)?)?), bits(&expected));
    }
    Ok(())
}

#[test]
fn halves_are_summed_in_f32_and_rounded_once() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        // 1 + 300 * 2^-12: summed in halves, every one of the small ones would be lost.
        let var = var(&[1.0, 2f64.powi(-12)], &[2, 1], dtype);
        let ids: Vec<u32> = std::iter::once(0).chain([1; 300]).collect();
        let pooled = bag(&var, Pooling::Sum).pool(&Bags::offsets(&row(&ids), &row(&[0]))?)?;
        let expected = tensor(&[1.0 + 300.0 * 2f64.powi(-12)], &[1, 1], dtype);
        assert_eq!(bits(&pooled), bits(&expected));
        assert_ne!(values(&pooled), [1.0]);
    }
    Ok(())
}

#[test]
fn a_maximum_is_the_first_of_equals_and_nan_if_there_is_one() -> Result<()> {
    let var = var(&[1.0, 5.0, 3.0, 5.0, f64::NAN, 2.0], &[3, 2], DType::F32);
    let layer = bag(&var, Pooling::Max);
    let pooled = layer.forward(&Tensor::new(&[[0u32, 1, 0]], &Device::Cpu)?)?;
    assert_eq!(pooled.to_vec2::<f32>()?, [[3.0, 5.0]]);
    // Of the two 5 the first one has the gradient.
    assert_eq!(gradient(&var, &pooled.sum_all()?), [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
    for ids in [[1u32, 2], [2, 1]] {
        let pooled = layer.forward(&Tensor::new(&[ids], &Device::Cpu)?)?.to_vec2::<f32>()?;
        assert!(pooled[0][0].is_nan() && pooled[0][1] == 5.0, "{pooled:?}");
    }
    Ok(())
}
