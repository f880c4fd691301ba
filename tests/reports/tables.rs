//! Embedding tables.

use candle_adamax::{
    Adamax, Bags, Embedding, EmbeddingBag, ParamsAdamax, Pooling, SparseUpdate, StateDType, WeightDecay,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;

use crate::common::{bits, ids, tensor, values, var};

// pytorch/pytorch#26596
#[test]
fn max_norm_does_not_change_a_weight_that_the_graph_has_used() {
    let w = var(&[3.0, 4.0, 0.3, 0.4], &[2, 2], DType::F64);
    let layer = Embedding::new(w.as_tensor().clone()).unwrap().max_norm(1.0).unwrap();
    let mut optimizer =
        Adamax::from_named([("w", w.clone())], ParamsAdamax { beta1: 0.0, ..Default::default() }).unwrap();
    let dense = (w.sqr().unwrap() / 2.0).unwrap().sum_all().unwrap();
    let looked_up = layer.forward(&ids(&[0])).unwrap();
    assert!(values(&looked_up).iter().zip([0.6, 0.8]).all(|(got, want)| (got - want).abs() < 1e-6));
    let loss = (dense + looked_up.sum_all().unwrap()).unwrap();
    optimizer.step(&loss.backward().unwrap()).unwrap();
    // With beta1 = 0 the first moment is the gradient: the weight itself, and 1 for the row that was looked up.
    assert_eq!(values(&optimizer.state("w").unwrap().exp_avg), [4.0, 5.0, 0.3, 0.4]);
}

// pytorch/pytorch#188467, pytorch/FBGEMM#1186
#[test]
fn a_table_may_have_more_elements_than_an_i32_counts() {
    const ROWS: usize = (1 << 25) + 3;
    const DIM: usize = 64;
    let w = Var::zeros((ROWS, DIM), DType::BF16, &Device::Cpu).unwrap();
    assert!(w.elem_count() > i32::MAX as usize);
    let params = ParamsAdamax { state_dtype: StateDType::Q8, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    let last = (ROWS - 1) as i32;
    let ids = Tensor::new(&[0i32, last, last - 1, last], &Device::Cpu).unwrap();
    let layer = Embedding::new(w.as_tensor().clone()).unwrap();
    optimizer.backward_step(&layer.forward(&ids).unwrap().sum_all().unwrap()).unwrap();
    let row = |id: i32| values(&layer.forward(&Tensor::new(&[id], &Device::Cpu).unwrap()).unwrap());
    let moved = row(0);
    assert!(moved.iter().all(|&x| x < 0.0) && row(last) == moved && row(last - 1) == moved);
    assert!(row(1).iter().chain(&row(last - 2)).all(|&x| x == 0.0));
    // The maximum of rows beyond and below 2^31 elements.
    let bag = EmbeddingBag::new(w.as_tensor().clone(), Pooling::Max).unwrap();
    let bags = Bags::batch(&Tensor::new(&[[last, 1], [last, 0]], &Device::Cpu).unwrap()).unwrap();
    let pooled = values(&bag.pool(&bags).unwrap());
    assert!(pooled[..DIM].iter().all(|&x| x == 0.0) && pooled[DIM..] == moved);
}

// pytorch/pytorch#4169
#[test]
fn empty_bags_in_the_middle_and_at_the_end_are_zeros() {
    let weight = || var(&[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], &[3, 2], DType::F32);
    let expected = [
        (Pooling::Sum, [-6.0, -8.0, 0.0, 0.0, -3.0, -4.0, 0.0, 0.0]),
        (Pooling::Mean, [-3.0, -4.0, 0.0, 0.0, -3.0, -4.0, 0.0, 0.0]),
        (Pooling::Max, [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0, 0.0, 0.0]),
    ];
    for (pooling, expected) in expected {
        let w = weight();
        let bag = EmbeddingBag::new(w.as_tensor().clone(), pooling).unwrap();
        let bags = Bags::offsets(&ids(&[0, 2, 1]), &ids(&[0, 2, 2, 3])).unwrap();
        let pooled = bag.pool(&bags).unwrap();
        assert_eq!(values(&pooled), expected, "{pooling:?}");
        let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
        optimizer.backward_step(&pooled.sum_all().unwrap()).unwrap();
        assert!(values(&w).iter().all(|x| x.is_finite()));
    }
}

// pytorch/pytorch#53368, told in pytorch/pytorch#49237
#[test]
fn a_padding_row_that_is_not_zero_stays_as_it_is() {
    for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
        for max_norm in [false, true] {
            let w = var(&[5.0, 5.0, 1.0, 1.0, 2.0, 2.0], &[3, 2], DType::F32);
            let layer = Embedding::new(w.as_tensor().clone()).unwrap().padding_idx(0).unwrap();
            let layer = if max_norm { layer.max_norm(100.0).unwrap() } else { layer };
            let params = ParamsAdamax {
                lr: 0.1.into(),
                weight_decay: WeightDecay::Decoupled(0.1),
                sparse_update,
                ..Default::default()
            };
            let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
            for batch in [[0, 1], [0, 2], [1, 1]] {
                optimizer.backward_step(&layer.forward(&ids(&batch)).unwrap().sum_all().unwrap()).unwrap();
            }
            assert_eq!(values(&layer.forward(&ids(&[0])).unwrap()), [5.0, 5.0], "{sparse_update:?}");
            optimizer.catch_up().unwrap();
            assert_eq!(values(&w)[..2], [5.0, 5.0], "{sparse_update:?}");
            assert!(values(&w)[2..].iter().all(|&x| x < 2.0 && x != 1.0), "{sparse_update:?}");
        }
    }
}

// DeepRec-AI/DeepRec#1003
#[test]
fn ids_that_are_no_rows_are_errors_with_their_position() {
    let w = var(&[1.0; 8], &[4, 2], DType::F32);
    let layer = Embedding::new(w.as_tensor().clone()).unwrap();
    let before = bits(&w);
    for id in [-1, i64::MIN, 4, 1 << 32, i64::MAX] {
        let error = layer.forward(&Tensor::new(&[[0, 1], [id, 2]], &Device::Cpu).unwrap()).unwrap_err().to_string();
        assert!(error.contains(&id.to_string()) && error.contains("[1, 0]"), "{error}");
    }
    let error = layer.forward(&tensor(&[1.0], &[1], DType::F32)).unwrap_err().to_string();
    assert!(error.contains("integer"), "{error}");
    assert_eq!(bits(&w), before);
}
