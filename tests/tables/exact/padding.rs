//! Padding rows stay as they are until something trains them.

use candle_adamax::{Adamax, Bags, Embedding, EmbeddingBag, ParamsAdamax, Pooling, Rounding, StateDType, WeightDecay};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::Module;

use super::{CPU, exact};
use crate::common::{bits, values};

fn decaying() -> ParamsAdamax {
    ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..exact() }
}

fn fives(dtype: DType) -> Result<Var> {
    Var::from_tensor(&Tensor::full(5f64, (6, 4), CPU)?.to_dtype(dtype)?)
}

fn row(var: &Var, row: usize) -> Vec<f64> {
    values(var)[4 * row..4 * row + 4].to_vec()
}

#[test]
fn a_padding_row_does_not_decay() -> Result<()> {
    for (dtype, state_dtype, rounding) in [
        (DType::F64, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::BF16, Rounding::Nearest),
        (DType::F32, StateDType::Q8, Rounding::Nearest),
        (DType::BF16, StateDType::F16, Rounding::Master),
        (DType::F16, StateDType::Q8, Rounding::Stochastic),
    ] {
        for rowwise_norm in [false, true] {
            // The layer is there before the optimizer has seen the table, or comes later.
            for comes_later in [false, true] {
                let params = ParamsAdamax { state_dtype, rounding, rowwise_norm, ..decaying() };
                let case = format!("{dtype:?} {state_dtype:?} rowwise {rowwise_norm}, later {comes_later}");
                stays(dtype, &params, comes_later, &case)?;
            }
        }
    }
    Ok(())
}

fn stays(dtype: DType, params: &ParamsAdamax, comes_later: bool, case: &str) -> Result<()> {
    let w = fives(dtype)?;
    let mut optimizer = Adamax::from_named([("w", w.clone())], params.clone())?;
    let plain = Embedding::new(w.as_tensor().clone())?;
    if comes_later {
        optimizer.backward_step(&plain.forward(&Tensor::new(&[1u32], CPU)?)?.sum_all()?)?;
    }
    let layer = Embedding::new(w.as_tensor().clone())?.padding_idx(0)?;
    let bag = EmbeddingBag::new(w.as_tensor().clone(), Pooling::Sum)?.padding_idx(5)?;
    // A padding row that was registered while it had missed decay keeps what it has.
    let (ids, bags) = (Tensor::new(&[0u32, 1, 2, 0], CPU)?, Bags::batch(&Tensor::new(&[[5u32, 1]], CPU)?)?);
    let step = |optimizer: &mut Adamax, layer: &Embedding, bag: &EmbeddingBag| {
        let loss = (layer.forward(&ids)?.sum_all()? + bag.pool(&bags)?.sum_all()?)?;
        optimizer.backward_step(&loss).map(drop)
    };
    for _ in 0..3 {
        step(&mut optimizer, &layer, &bag)?;
    }
    optimizer.catch_up()?;
    assert_eq!((row(&w, 0), row(&w, 5)), (vec![5.0; 4], vec![5.0; 4]), "{case}");
    assert!(row(&w, 3)[0] < 5.0, "other rows decay: {case}");

    // Also in an optimizer that knows nothing but a snapshot, with layers of its own, and with the bits of the first.
    let snapshot = optimizer.snapshot()?;
    let copy = Var::from_tensor(&w.as_tensor().copy()?)?;
    let mut resumed = Adamax::from_named([("w", copy.clone())], params.clone())?;
    resumed.restore(&snapshot)?;
    let other = Embedding::new(copy.as_tensor().clone())?.padding_idx(0)?;
    let other_bag = EmbeddingBag::new(copy.as_tensor().clone(), Pooling::Sum)?.padding_idx(5)?;
    for _ in 0..3 {
        step(&mut optimizer, &layer, &bag)?;
        step(&mut resumed, &other, &other_bag)?;
    }
    assert_eq!(bits(&layer.embeddings().unwrap()), bits(&other.embeddings().unwrap()), "{case}");
    assert_eq!((row(&copy, 0), row(&w, 5)), (vec![5.0; 4], vec![5.0; 4]), "{case}");

    // Another layer trains the row: from then on it is one like any other.
    optimizer.backward_step(&plain.forward(&Tensor::new(&[0u32], CPU)?)?.sum_all()?)?;
    let trained = row(&w, 0)[0];
    step(&mut optimizer, &layer, &bag)?;
    optimizer.catch_up()?;
    assert!(trained < 5.0 && row(&w, 0)[0] < trained, "{case}");
    assert_eq!(row(&w, 5), [5.0; 4], "{case}");
    // Row 0 goes where a dense optimizer would have put it.
    if dtype == DType::F64 && !params.rowwise_norm && !comes_later {
        let dense = fives(dtype)?;
        let params = ParamsAdamax { sparse_update: Default::default(), ..params.clone() };
        let mut reference = Adamax::from_named([("w", dense.clone())], params)?;
        for k in 0..8 {
            let mut grad = vec![0.0; 24];
            // While it was spared it is set back.
            if k == 6 {
                grad[..4].fill(1.0);
            }
            reference.apply_gradients([(&dense, &Tensor::from_vec(grad, (6, 4), CPU)?)])?;
            if k < 6 {
                dense.set(fives(dtype)?.as_tensor())?;
            }
        }
        assert!((row(&dense, 0)[0] - row(&w, 0)[0]).abs() < 1e-13, "{:?} for {:?}", row(&w, 0), row(&dense, 0));
    }
    Ok(())
}

/// Moments that were kept in f32 until then: a row shares the unit of its block with rows that have had gradients.
#[test]
fn a_padding_row_does_not_decay_after_another_encoding() -> Result<()> {
    for state_dtype in [StateDType::BF16, StateDType::F16, StateDType::Q8] {
        let w = Var::new(&[[5f32], [1.0], [2.0]], CPU)?;
        let layer = Embedding::new(w.as_tensor().clone())?.padding_idx(0)?;
        let mut optimizer = Adamax::from_named([("w", w.clone())], decaying())?;
        let ids = Tensor::new(&[0u32, 1], CPU)?;
        optimizer.backward_step(&layer.forward(&ids)?.sum_all()?)?;
        optimizer.set_params(ParamsAdamax { state_dtype, ..decaying() })?;
        optimizer.backward_step(&layer.forward(&ids)?.sum_all()?)?;
        optimizer.catch_up()?;
        assert_eq!(w.to_vec2::<f32>()?[0], [5.0], "{state_dtype:?}");
    }
    Ok(())
}
