//! Bags: what is pooled, and what gradients reach the optimizer and the weights of the ids, beside candle's own
//! lookups, sums, means and maxima on a variable of their own in f64.

use std::collections::{BTreeMap, BTreeSet};

use candle_adamax::{
    AccumulatedGrad, Adamax, Bags, Embedding, EmbeddingBag, MissingGradients, ParamsAdamax, Pooling, SparseGrad, Table,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module as _, Optimizer as _};
use proptest::prelude::*;

use crate::common::property::config;
use crate::common::{DTYPES, ID_DTYPES, bits, ids as ids_of, noise, pool, tensor, values, var};

const POOLINGS: [Pooling; 3] = [Pooling::Sum, Pooling::Mean, Pooling::Max];
const ROWS: usize = 12;
const DIM: usize = 3;

/// The gradient of each row that has one.
type OfRows = BTreeMap<usize, Vec<f64>>;

/// What reaches an optimizer of `weight`.
#[track_caller]
fn reaching(weight: &Var, grads: &GradStore) -> OfRows {
    // The sum of the first of two calls is the gradient as it is.
    let params = ParamsAdamax {
        gradient_accumulation_steps: 2,
        missing_gradients: MissingGradients::Allow,
        ..ParamsAdamax::default()
    };
    let mut optimizer = Adamax::from_named([("w", weight.clone())], params).unwrap();
    optimizer.step(grads).unwrap();
    if optimizer.report().missing().count() == 1 {
        return OfRows::new();
    }
    let Some(AccumulatedGrad::Rows(SparseGrad { indices, values: sums })) = optimizer.state("w").unwrap().accumulated
    else {
        panic!("no gradient of rows");
    };
    let (rows, sums) = (values(&indices), values(&sums));
    let len = weight.elem_count() / weight.dim(0).unwrap();
    let of_rows: OfRows =
        rows.iter().enumerate().map(|(k, &row)| (row as usize, sums[k * len..][..len].to_vec())).collect();
    assert_eq!(of_rows.len(), rows.len(), "a row is there twice");
    // And without accumulation: m is the gradient if beta1 is 0, and nothing moves if the learning rate is.
    let params = ParamsAdamax { lr: 0.0.into(), beta1: 0.0, ..ParamsAdamax::default() };
    let mut optimizer = Adamax::from_named([("w", weight.clone())], params).unwrap();
    optimizer.step(grads).unwrap();
    let m = values(&optimizer.state("w").unwrap().exp_avg);
    for (row, m) in m.chunks(len).enumerate() {
        assert_eq!(m, of_rows.get(&row).cloned().unwrap_or(vec![0.0; len]), "row {row}");
    }
    of_rows
}

/// As far as the arithmetic of `dtype` may be from a number around 1: it is f32's for halves.
fn arithmetic_error(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-14 } else { 2e-6 }
}

/// Half a place of `dtype`, relative.
fn half_place(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.0,
    }
}

/// That `got` is `want`, made in the arithmetic of its dtype and rounded once.
#[track_caller]
fn assert_rounded_once(got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims());
    let dtype = got.dtype();
    for (i, (got, want)) in values(got).into_iter().zip(values(want)).enumerate() {
        let error = half_place(dtype) * want.abs() + arithmetic_error(dtype);
        assert!((got - want).abs() <= error, "{dtype:?} [{i}]: expected {want}, got {got}");
    }
}

/// That the gradients of `rows`, and of no other rows, are those of the whole table in `want`, in the arithmetic's type.
#[track_caller]
fn assert_gradient(got: &OfRows, rows: &BTreeSet<usize>, want: Option<&Tensor>, dtype: DType) {
    assert_eq!(&got.keys().copied().collect::<BTreeSet<_>>(), rows);
    // candle has no gradient at all where no row was looked up.
    let Some(want) = want else { return assert!(rows.is_empty()) };
    let len = want.elem_count() / want.dim(0).unwrap();
    for (row, want) in values(want).chunks(len).enumerate() {
        let got = got.get(&row).cloned().unwrap_or(vec![0.0; len]);
        let near = |(got, want): (&f64, &f64)| (got - want).abs() <= 4.0 * arithmetic_error(dtype);
        assert!(got.iter().zip(want).all(near), "{dtype:?} row {row}: expected {want:?}, got {got:?}");
    }
}

/// A table of numbers that all differ, in every dtype.
fn table(seed: u64, dtype: DType) -> Var {
    let n = ROWS * DIM;
    let order = noise(seed, n);
    let rank = |x: &f64| order.iter().filter(|&y| y < x).count() as f64;
    let numbers: Vec<f64> = order.iter().map(|x| (rank(x) - n as f64 / 2.0) / 16.0).collect();
    var(&numbers, &[ROWS, DIM], dtype)
}

fn widened(tensor: &Tensor) -> Var {
    Var::from_tensor(&tensor.detach().to_dtype(DType::F64).unwrap()).unwrap()
}

/// Bags of candle's operations, one after another, of lookups that are multiplied with `factors`, `[n]`.
fn reference(weight: &Tensor, bags: &[Vec<u32>], pooling: Pooling, factors: Option<&Tensor>) -> Tensor {
    let mut begin = 0;
    let bag = |ids: &Vec<u32>| {
        let n = ids.len();
        begin += n;
        if n == 0 {
            return Tensor::zeros(weight.dim(1)?, weight.dtype(), &Device::Cpu);
        }
        let mut rows = weight.index_select(&ids_of(ids), 0)?;
        if let Some(factors) = factors {
            rows = rows.broadcast_mul(&factors.narrow(0, begin - n, n)?.unsqueeze(1)?)?;
        }
        match pooling {
            Pooling::Sum => rows.sum(0),
            Pooling::Mean => rows.mean(0),
            Pooling::Max => rows.max(0),
            _ => unreachable!("no other one is made here"),
        }
    };
    let all: candle_core::Result<Vec<Tensor>> = bags.iter().map(bag).collect();
    Tensor::stack(&all.unwrap(), 0).unwrap()
}

fn offsets(bags: &[Vec<u32>]) -> Bags {
    let begins: Vec<u32> = bags.iter().scan(0, |at, ids| Some(std::mem::replace(at, *at + ids.len() as u32))).collect();
    Bags::offsets(&ids_of(&bags.concat()), &ids_of(&begins)).unwrap()
}

fn rows_of(bags: &[Vec<u32>]) -> BTreeSet<usize> {
    bags.concat().into_iter().map(|id| id as usize).collect()
}

/// A loss with another factor for each element, so that no two gradients are the same.
fn loss(pooled: &Tensor) -> Tensor {
    let factors = tensor(&noise(77, pooled.elem_count()), pooled.dims(), DType::BF16);
    (pooled * factors.to_dtype(pooled.dtype()).unwrap()).unwrap().sum_all().unwrap()
}

/// Compares values and gradients; each result is of the variable beside it. The gradients of both are returned.
#[track_caller]
fn compare(
    (got, weight): (&Tensor, &Var),
    (want, own): (&Tensor, &Var),
    rows: &BTreeSet<usize>,
) -> (GradStore, GradStore) {
    assert_rounded_once(got, want);
    let (grads, of_candle) = (loss(got).backward().unwrap(), loss(want).backward().unwrap());
    assert_gradient(&reaching(weight, &grads), rows, of_candle.get(own), weight.dtype());
    (grads, of_candle)
}

/// Values and gradients of `bags` beside candle's.
#[track_caller]
fn assert_as_candle(bags: &[Vec<u32>], pooling: Pooling, dtype: DType, arranged: &Bags) {
    let weight = table(3, dtype);
    let own = widened(&weight);
    let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
    let got = layer.pool(arranged).unwrap();
    let want = reference(&own, bags, pooling, None);
    assert_eq!(got.dtype(), dtype);
    let (grads, _) = compare((&got, &weight), (&want, &own), &rows_of(bags));
    assert!(grads.get(&weight).is_none(), "a gradient of the size of the table");
}

#[test]
fn bags_are_lookups_and_a_sum_a_mean_or_a_maximum() {
    let bags = [vec![5, 1, 7], vec![2], vec![1, 11, 0, 5]];
    let square = vec![vec![5, 1, 7], vec![2, 0, 5], vec![1, 11, 0], vec![9, 8, 6]];
    let ids = Tensor::new(&[[5i64, 1, 7], [2, 0, 5], [1, 11, 0], [9, 8, 6]], &Device::Cpu).unwrap();
    for dtype in DTYPES {
        for pooling in POOLINGS {
            assert_as_candle(&bags, pooling, dtype, &offsets(&bags));
            assert_as_candle(&square, pooling, dtype, &offsets(&square));
            assert_as_candle(&square, pooling, dtype, &Bags::batch(&ids).unwrap());
            // What is not contiguous is read in its own order.
            let transposed = ids.t().unwrap().contiguous().unwrap().t().unwrap();
            assert!(!transposed.is_contiguous());
            assert_as_candle(&square, pooling, dtype, &Bags::batch(&transposed).unwrap());
        }
        // An id that is there several times counts each time; in a maximum, candle shares it out otherwise.
        for pooling in [Pooling::Sum, Pooling::Mean] {
            let bags = vec![vec![4, 4, 1, 4], vec![1, 1], vec![4]];
            assert_as_candle(&bags, pooling, dtype, &offsets(&bags));
        }
    }
}

#[test]
fn a_matrix_and_offsets_are_the_same_bags() {
    let ids = Tensor::new(&[[5u32, 1, 7], [5, 5, 0]], &Device::Cpu).unwrap();
    let flat = ids.flatten_all().unwrap();
    for dtype in DTYPES {
        for pooling in POOLINGS {
            let weight = table(4, dtype);
            let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
            let batch = layer.pool(&Bags::batch(&ids).unwrap()).unwrap();
            let of_batch = reaching(&weight, &loss(&batch).backward().unwrap());
            assert_eq!(bits(&layer.forward(&ids).unwrap()), bits(&batch));
            for dtype in ID_DTYPES {
                let offsets = Tensor::new(&[0u32, 3], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let other = layer.pool(&Bags::offsets(&flat, &offsets).unwrap()).unwrap();
                assert_eq!(bits(&other), bits(&batch), "{dtype:?}");
                assert_eq!(reaching(&weight, &loss(&other).backward().unwrap()), of_batch, "{dtype:?}");
            }
        }
    }
}

#[test]
fn weights_of_ids() {
    let bags = vec![vec![5, 1, 7], vec![], vec![2, 2], vec![1, 11, 0, 5]];
    let n = bags.concat().len();
    for dtype in DTYPES {
        let weight = table(5, dtype);
        let own = widened(&weight);
        let factors = var(&noise(6, n), &[n], dtype);
        let own_factors = widened(&factors);
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Sum).unwrap();
        let got = layer.pool(&offsets(&bags).weights(&factors).unwrap()).unwrap();
        let want = reference(&own, &bags, Pooling::Sum, Some(&own_factors));
        let (grads, of_candle) = compare((&got, &weight), (&want, &own), &rows_of(&bags));
        assert_rounded_once(grads.get(&factors).unwrap(), of_candle.get(&own_factors).unwrap());

        // A weight that is frozen takes no gradient, but the weights of the ids do.
        let frozen = EmbeddingBag::new(weight.as_tensor().detach(), Pooling::Sum).unwrap();
        let pooled = frozen.pool(&offsets(&bags).weights(&factors).unwrap()).unwrap();
        assert_eq!(bits(&pooled), bits(&got));
        let of_frozen = loss(&pooled).backward().unwrap();
        assert_eq!(bits(of_frozen.get(&factors).unwrap()), bits(grads.get(&factors).unwrap()));
        assert!(of_frozen.get(&weight).is_none());
        let mut optimizer = Adamax::new(vec![weight.clone()], ParamsAdamax::default()).unwrap();
        assert!(optimizer.step(&of_frozen).is_err(), "a frozen weight had a gradient");
    }
}

/// Attention: the weights are what another layer makes of something, and that layer is trained, too.
#[test]
fn weights_from_another_layer() {
    let bags = vec![vec![5, 1, 7], vec![2, 2, 0]];
    let ids = Tensor::new(&[[5u32, 1, 7], [2, 2, 0]], &Device::Cpu).unwrap();
    for dtype in [DType::F64, DType::F32] {
        let (weight, inner) = (table(5, dtype), var(&noise(8, 6), &[2, 3], dtype));
        let (own, own_inner) = (widened(&weight), widened(&inner));
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Sum).unwrap();
        let input = |dtype| tensor(&noise(9, 4), &[2, 2], dtype);
        let attend = |inner: &Tensor, dtype| candle_nn::ops::softmax(&input(dtype).matmul(inner).unwrap(), 1).unwrap();
        let factors = attend(&inner, dtype);
        let own_factors = attend(&own_inner, DType::F64);
        let want = reference(&own, &bags, Pooling::Sum, Some(&own_factors.flatten_all().unwrap()));
        // Once as they come, and once transposed in memory.
        let turned = factors.t().unwrap().contiguous().unwrap().t().unwrap();
        assert!(!turned.is_contiguous());
        for factors in [factors, turned] {
            let got = layer.pool(&Bags::batch(&ids).unwrap().weights(&factors).unwrap()).unwrap();
            let (grads, of_candle) = compare((&got, &weight), (&want, &own), &rows_of(&bags));
            assert_rounded_once(grads.get(&inner).unwrap(), of_candle.get(&own_inner).unwrap());
        }
    }
}

#[test]
fn empty_bags_are_zeros_and_have_no_gradient() {
    let bags = vec![vec![], vec![3, 1], vec![], vec![], vec![1], vec![]];
    for dtype in DTYPES {
        for pooling in POOLINGS {
            assert_as_candle(&bags, pooling, dtype, &offsets(&bags));
            // Not one id: zeros, and not one row moves.
            let weight = table(3, dtype);
            let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
            let none: [Vec<u32>; 3] = Default::default();
            let no_columns = Tensor::zeros((3, 0), DType::U32, &Device::Cpu).unwrap();
            for empty in [offsets(&none), Bags::batch(&no_columns).unwrap()] {
                let pooled = layer.pool(&empty).unwrap();
                assert_eq!(bits(&pooled), [0; 3 * DIM]);
                let grads = loss(&pooled).backward().unwrap();
                assert!(reaching(&weight, &grads).is_empty());
                // Nothing was looked up, so nothing is counted.
                let mut optimizer = Adamax::new(vec![weight.clone()], ParamsAdamax::default()).unwrap();
                let error = optimizer.step(&grads).unwrap_err().to_string();
                assert!(error.contains("none of the 1 vars had a gradient"), "{error}");
                assert_eq!((optimizer.calls(), optimizer.updates()), (0, 0));
                assert_eq!(bits(&weight), bits(&table(3, dtype)));
            }
            // And not one bag.
            let no_bags = layer.pool(&offsets(&[])).unwrap();
            assert_eq!((no_bags.dims(), no_bags.dtype()), ([0, DIM].as_slice(), dtype));
            let no_rows = Tensor::zeros((0, 4), DType::I64, &Device::Cpu).unwrap();
            assert_eq!(layer.forward(&no_rows).unwrap().dims(), [0, DIM]);
        }
    }
}

#[test]
fn padding() {
    let bags = vec![vec![5, 1, 7], vec![1, 1], vec![2, 1], vec![], vec![1, 0, 5, 1]];
    let without: Vec<Vec<u32>> = bags.iter().map(|ids| ids.iter().copied().filter(|&id| id != 1).collect()).collect();
    for dtype in DTYPES {
        let weight = table(3, dtype);
        let own = widened(&weight);
        for pooling in POOLINGS {
            let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap().padding_idx(1).unwrap();
            // As if they were not there: a mean does not count them, and a bag of nothing else is empty.
            let (got, want) = (layer.pool(&offsets(&bags)).unwrap(), reference(&own, &without, pooling, None));
            compare((&got, &weight), (&want, &own), &rows_of(&without));
        }

        // The weights of ids that are left out have a gradient, and it is 0.
        let n = bags.concat().len();
        let factors = var(&noise(6, n), &[n], dtype);
        let own_factors = widened(&factors);
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Sum).unwrap().padding_idx(1).unwrap();
        let got = layer.pool(&offsets(&bags).weights(&factors).unwrap()).unwrap();
        // For candle the row of the padding is one of zeros.
        let mask = Tensor::ones((ROWS, 1), DType::F64, &Device::Cpu).unwrap();
        mask.slice_set(&Tensor::zeros((1, 1), DType::F64, &Device::Cpu).unwrap(), 0, 1).unwrap();
        let masked = own.broadcast_mul(&mask).unwrap();
        let want = reference(&masked, &bags, Pooling::Sum, Some(&own_factors));
        let (grads, of_candle) = compare((&got, &weight), (&want, &own), &rows_of(&without));
        let of_factors = grads.get(&factors).unwrap();
        assert_rounded_once(of_factors, of_candle.get(&own_factors).unwrap());
        for (of_factor, id) in values(of_factors).into_iter().zip(bags.concat()) {
            assert_eq!(of_factor == 0.0, id == 1);
        }

        // An embedding looks the row up as it is, but the row gets no gradient.
        let layer = Embedding::new(weight.as_tensor().clone()).unwrap().padding_idx(1).unwrap();
        let ids = Tensor::new(&[[1u32, 5, 1], [5, 2, 1]], &Device::Cpu).unwrap();
        let got = layer.forward(&ids).unwrap();
        let flat = ids.flatten_all().unwrap();
        let lookup = |weight: &Tensor| weight.index_select(&flat, 0).unwrap().reshape((2, 3, DIM)).unwrap();
        assert_eq!(bits(&got), bits(&lookup(&weight)));
        let of_candle = loss(&lookup(&masked)).backward().unwrap();
        let of_rows = reaching(&weight, &loss(&got).backward().unwrap());
        assert_gradient(&of_rows, &BTreeSet::from([2, 5]), of_candle.get(&own), dtype);
    }
}

#[test]
fn halves_are_summed_in_f32() {
    // Beside `large`, one more 1 is lost in the dtype itself; 301 and 2051 are no numbers of theirs.
    for (dtype, large, ones) in [(DType::BF16, 256.0, 301u32), (DType::F16, 2048.0, 2051)] {
        let weight = var(&[large, 1.0], &[2, 1], dtype);
        let many = large as usize;
        let ids: Vec<u32> = [vec![0], vec![1; many]].concat();
        let of = |pooling| {
            let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
            values(&layer.pool(&offsets(std::slice::from_ref(&ids))).unwrap())[0]
        };
        assert_eq!(of(Pooling::Sum), 2.0 * large);
        let mean = tensor(&[2.0 * large / (large + 1.0)], &[1], dtype);
        assert_eq!(of(Pooling::Mean), values(&mean)[0]);
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Sum).unwrap();
        let factors = Tensor::ones(ids.len(), dtype, &Device::Cpu).unwrap();
        let weighted = layer.pool(&offsets(std::slice::from_ref(&ids)).weights(&factors).unwrap()).unwrap();
        assert_eq!(values(&weighted), [2.0 * large]);

        // The gradient of a row that is in many bags, each of which gives it a 1.
        let pooled = layer.pool(&offsets(&vec![vec![1]; ones as usize])).unwrap();
        let grads = pooled.sum_all().unwrap().backward().unwrap();
        assert_eq!(reaching(&weight, &grads), OfRows::from([(1, vec![f64::from(ones)])]));
    }
}

#[test]
fn of_equal_values_the_first_has_the_gradient_of_a_maximum() {
    for dtype in DTYPES {
        // Columns: all equal; the second and third; the last two; 0 and -0, which are equal.
        let numbers = [2.0, 1.0, -3.0, -0.0, 2.0, 5.0, -2.0, 0.0, 2.0, 5.0, -2.0, -1.0];
        let weight = var(&numbers, &[3, 4], dtype);
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Max).unwrap();
        let grad_of = |ids: &[u32]| {
            let pooled = layer.pool(&offsets(&[ids.to_vec()])).unwrap();
            assert_eq!(values(&pooled), [2.0, 5.0, -2.0, 0.0]);
            let factors = tensor(&[1.0, 2.0, 4.0, 8.0], &[1, 4], dtype);
            reaching(&weight, &(pooled * factors).unwrap().sum_all().unwrap().backward().unwrap())
        };
        let first = [(0, vec![1.0, 0.0, 0.0, 8.0]), (1, vec![0.0, 2.0, 4.0, 0.0]), (2, vec![0.0; 4])];
        assert_eq!(grad_of(&[0, 1, 2]), OfRows::from(first));
        let reversed = [(1, vec![0.0, 0.0, 0.0, 8.0]), (2, vec![1.0, 2.0, 4.0, 0.0])];
        assert_eq!(grad_of(&[2, 1, 1]), OfRows::from(reversed));
    }
}

#[test]
fn what_is_not_finite() {
    let (inf, low) = (f64::INFINITY, f64::NEG_INFINITY);
    for dtype in DTYPES {
        let weight = var(&[low, low, inf, 1.0, low, -7.0], &[3, 2], dtype);
        let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Max).unwrap();
        let pooled = layer.pool(&offsets(&[vec![0, 2], vec![2, 1, 0], vec![0], vec![]])).unwrap();
        assert_eq!(values(&pooled), [low, -7.0, inf, 1.0, low, low, 0.0, 0.0]);
        // A NaN in a bag is what comes out, and what has the gradient.
        let weight = var(&[1.0, 2.0, f64::NAN, 3.0, 9.0, f64::NAN], &[3, 2], dtype);
        for (ids, nan) in [([0u32, 1], [true, false]), ([1, 0], [true, false]), ([2, 1], [true, true])] {
            for pooling in POOLINGS {
                let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
                let pooled = layer.pool(&offsets(&[ids.to_vec()])).unwrap();
                let got: Vec<bool> = values(&pooled).iter().map(|x| x.is_nan()).collect();
                assert_eq!(got, nan, "{pooling:?} of {ids:?}");
                if pooling == Pooling::Max {
                    let of_rows = reaching(&weight, &pooled.sum_all().unwrap().backward().unwrap());
                    let to = |column: usize| ids.iter().copied().find(|&id| of_rows[&(id as usize)][column] == 1.0);
                    assert_eq!(to(0), Some(1), "the NaN has the gradient");
                }
            }
        }
    }
}

/// One variable under an embedding, three kinds of bags and a table: all of their gradients are summed.
#[test]
fn layers_on_the_same_variable() {
    for dtype in DTYPES {
        let weight = table(3, dtype);
        let own = widened(&weight);
        let bags = vec![vec![5, 1, 7], vec![1, 2]];
        let pooled = |pooling| {
            let layer = EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap();
            loss(&layer.pool(&offsets(&bags)).unwrap()).to_dtype(DType::F64).unwrap()
        };
        let ids = ids_of(&[0, 5, 5]);
        let looked_up = Embedding::new(weight.as_tensor().clone()).unwrap().forward(&ids).unwrap();
        let again = Table::new(&weight).unwrap().lookup(&ids).unwrap();
        let mut sum = (loss(&looked_up).to_dtype(DType::F64).unwrap() + loss(&again).to_dtype(DType::F64)).unwrap();
        let rows = loss(&own.index_select(&ids, 0).unwrap());
        let mut of_candle = (&rows + &rows).unwrap();
        for pooling in POOLINGS {
            sum = (sum + pooled(pooling)).unwrap();
            of_candle = (of_candle + loss(&reference(&own, &bags, pooling, None))).unwrap();
        }
        let (grads, of_candle) = (sum.backward().unwrap(), of_candle.backward().unwrap());
        let rows = BTreeSet::from([0, 1, 2, 5, 7]);
        assert_gradient(&reaching(&weight, &grads), &rows, of_candle.get(&own), dtype);
    }
}

proptest! {
    #![proptest_config(config(2000))]

    #[test]
    fn any_bags_are_as_candle_pools_them(
        mut bags in prop::collection::vec(prop::collection::vec(0..ROWS as u32, 0..7), 1..9),
        kind in 0usize..3,
        dtype in 0usize..4,
    ) {
        if POOLINGS[kind] == Pooling::Max {
            // candle gives a maximum that is there twice its gradient twice.
            for ids in &mut bags {
                ids.sort();
                ids.dedup();
            }
        }
        assert_as_candle(&bags, POOLINGS[kind], DTYPES[dtype], &offsets(&bags));
    }
}

#[test]
fn threads_make_no_difference_to_pooling() {
    // Enough elements to be shared, in bags of all lengths; the last piece has fewer bags than the others.
    let (rows, bags) = (500, 1_501);
    let weight = var(&noise(1, rows * 64), &[rows, 64], DType::F32);
    let lengths = (0..bags).map(|bag| bag % 4);
    let ids: Vec<u32> = (0..lengths.clone().sum()).map(|i| (i * 7_919 % rows) as u32).collect();
    let starts = lengths.scan(0, |end, length| Some(std::mem::replace(end, *end + length) as u32));
    let bags = Bags::offsets(&ids_of(&ids), &ids_of(&starts.collect::<Vec<_>>())).unwrap();
    let layer = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Mean).unwrap();
    let pooled = |threads: usize| pool(threads).install(|| bits(&layer.pool(&bags).unwrap()));
    let expected = pooled(1);
    assert!((2..6).all(|threads| pooled(threads) == expected));
}
