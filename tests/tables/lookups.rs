//! What a lookup reads, what it leaves alone, and what can be asked about its gradient.
//!
//! The numbers of `max_norm` are those of PyTorch 2's `embedding_renorm_` (only above `max_norm`, and
//! `max_norm / (norm + 1e-7)`), worked out by hand.

use std::time::{Duration, Instant};

use candle_adamax::{
    Adamax, Bags, Clip, Embedding, EmbeddingBag, ErrorKind, Gradient, LossScale, NormType, ParamsAdamax, Pooling,
    Rounding, SparseGrad, SparseUpdate, Table,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module as _;

use crate::common::{DTYPES, bits, ids, noise, tensor, values, var};

const CPU: &Device = &Device::Cpu;

fn of(var: &Var) -> Tensor {
    var.as_tensor().clone()
}

fn optimizer(var: &Var, params: ParamsAdamax) -> Adamax {
    Adamax::from_named([("w", var.clone())], params).unwrap()
}

/// A step with a gradient of 0, which changes nothing but what a step changes anyway.
fn zero_gradient(rows: &[u32], dim: usize, dtype: DType) -> SparseGrad {
    SparseGrad { indices: ids(rows), values: Tensor::zeros((rows.len(), dim), dtype, CPU).unwrap() }
}

#[test]
fn a_weight_that_is_also_used_densely_has_the_gradient_of_what_the_graph_has_seen() {
    for (dtype, pooling) in DTYPES.into_iter().flat_map(|dtype| [(dtype, None), (dtype, Some(Pooling::Sum))]) {
        let w = var(&[3.0, 4.0, 0.3, 0.4], &[2, 2], dtype);
        let dense = (w.sqr().unwrap() / 2.0).unwrap().sum_all().unwrap();
        let rows = match pooling {
            None => Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap().forward(&ids(&[0])).unwrap(),
            Some(pooling) => {
                let bag = EmbeddingBag::new(of(&w), pooling).unwrap().max_norm(1.0).unwrap();
                bag.pool(&Bags::offsets(&ids(&[0]), &ids(&[0])).unwrap()).unwrap()
            }
        };
        let grads = (dense + rows.sum_all().unwrap()).unwrap().backward().unwrap();
        let params = ParamsAdamax { lr: 0.0.into(), beta1: 0.0, ..ParamsAdamax::default() };
        let mut adamax = optimizer(&w, params);
        adamax.step(&grads).unwrap();
        let m = values(&adamax.state("w").unwrap().exp_avg);
        for (got, want) in m.iter().zip([4.0, 5.0, 0.3, 0.4]) {
            assert!((got - want).abs() < 2e-3, "{dtype:?}: expected {want}, got {got}");
        }
        // The step has written the scaled row.
        assert!((values(&w)[0] - 0.6).abs() < 4e-3 && (values(&w)[2] - 0.3).abs() < 2e-3, "{dtype:?}");
    }
}

/// As a weight that is scaled at the lookup and then updated.
#[test]
fn an_update_is_made_of_the_scaled_row() {
    for (dtype, rounding) in
        DTYPES.into_iter().flat_map(|dtype| [Rounding::Nearest, Rounding::Master].map(|rounding| (dtype, rounding)))
    {
        for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
            let params = ParamsAdamax { lr: 0.1.into(), rounding, sparse_update, ..ParamsAdamax::default() };
            let start = tensor(&[3.0, 4.0, 6.0, 8.0, 0.3, 0.4], &[3, 2], dtype);
            let (w, plain) = (Var::from_tensor(&start).unwrap(), Var::from_tensor(&start).unwrap());
            let layer = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
            let mut adamax = optimizer(&w, params.clone());
            let mut expected = optimizer(&plain, params);
            // Row 1 is looked up, and has no gradient.
            let rows = layer.forward(&ids(&[0, 1, 0, 2])).unwrap();
            assert_eq!(bits(&w), bits(&start), "a lookup does not write");
            let own = rows.narrow(0, 2, 2).unwrap().sum_all().unwrap();
            let scaled = rows.detach().narrow(0, 0, 2).unwrap();
            Table::new(&plain).unwrap().set_rows(&ids(&[0, 1]), &scaled).unwrap();
            adamax.backward_step(&own).unwrap();
            let again = Embedding::new(of(&plain)).unwrap().forward(&ids(&[0, 1, 0, 2])).unwrap();
            expected.backward_step(&again.narrow(0, 2, 2).unwrap().sum_all().unwrap()).unwrap();
            assert_eq!(bits(&w), bits(&plain), "{dtype:?} {rounding:?} {sparse_update:?}");
            let near =
                |got: f64, want: f64| assert!((got - want).abs() < 8e-3, "{dtype:?}: expected {want}, got {got}");
            near(values(&w)[0], 0.6 - 0.1);
            near(values(&w)[3], 0.8);
        }
    }
}

#[test]
fn the_smallest_limit_holds_in_the_weight_and_each_layers_own_in_its_result() {
    let w = var(&[6.0, 8.0], &[1, 2], DType::F64);
    let layer = |max_norm| Embedding::new(of(&w)).unwrap().max_norm(max_norm).unwrap();
    let near = |got: &Tensor, want: f64| {
        let got = values(got)[0];
        assert!((got - want).abs() < 1e-6, "expected {want}, got {got}");
    };
    let of_layer = |max_norm| layer(max_norm).forward(&ids(&[0])).unwrap();
    let kept = layer(100.0);
    near(&of_layer(5.0), 3.0);
    near(&of_layer(1.0), 0.6);
    near(&of_layer(2.0), 1.2);
    near(&of_layer(100.0), 6.0);
    near(&w, 6.0);
    near(&kept.embeddings().unwrap(), 0.6);
    near(&w, 6.0);
    // A row that was written since then stays as it is.
    w.set(&tensor(&[9.0, 12.0], &[1, 2], DType::F64)).unwrap();
    near(&kept.embeddings().unwrap(), 9.0);
}

#[test]
fn a_row_that_was_written_after_its_lookup_stays_as_it_was_written() {
    for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
        let w = var(&[6.0, 8.0, 6.0, 8.0], &[2, 2], DType::F32);
        let layer = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
        let mut adamax = optimizer(&w, ParamsAdamax { sparse_update, ..ParamsAdamax::default() });
        layer.forward(&ids(&[0, 1])).unwrap();
        layer.table().set_rows(&ids(&[0]), &tensor(&[30.0, 40.0], &[1, 2], DType::F32)).unwrap();
        adamax.apply_gradients([(&w, &zero_gradient(&[0], 2, DType::F32))]).unwrap();
        assert_eq!(values(&w)[..2], [30.0, 40.0], "{sparse_update:?}");
        assert!((values(&w)[2] - 0.6).abs() < 1e-6, "{sparse_update:?}");
    }
}

/// A call that is refused, skipped or only accumulates leaves the weight; so does a step without a gradient for it.
#[test]
fn only_an_update_of_the_weight_writes_it() {
    let start = [6.0, 8.0, 0.3, 0.4];
    let w = var(&start, &[2, 2], DType::F32);
    let other = var(&[1.0], &[1], DType::F32);
    let layer = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
    let params = ParamsAdamax { gradient_accumulation_steps: 2, skip_nonfinite: true, ..ParamsAdamax::default() };
    let vars = [("w", w.clone()), ("other", other.clone())];
    let mut adamax = Adamax::from_named(vars, params).unwrap();
    let mut step = |gradient: f32| {
        let loss = (layer.forward(&ids(&[0])).unwrap().sum_all().unwrap() * f64::from(gradient)).unwrap();
        adamax.backward_step(&loss).map(drop)
    };
    step(f32::NAN).unwrap();
    assert_eq!(bits(&w), bits(&tensor(&start, &[2, 2], DType::F32)), "skipped");
    step(1.0).unwrap();
    assert_eq!(bits(&w), bits(&tensor(&start, &[2, 2], DType::F32)), "accumulated");
    step(1.0).unwrap();
    assert!((values(&w)[0] - 0.599).abs() < 1e-4, "{:?}", values(&w));

    let w = var(&start, &[2, 2], DType::F32);
    let layer = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
    let mut adamax = Adamax::from_named([("w", w.clone()), ("other", other.clone())], ParamsAdamax::default()).unwrap();
    layer.forward(&ids(&[0])).unwrap();
    adamax.step(&GradStore::default()).unwrap_err();
    adamax.backward_step(&other.sum_all().unwrap()).unwrap();
    assert_eq!(bits(&w), bits(&tensor(&start, &[2, 2], DType::F32)), "no gradient");
    adamax.catch_up().unwrap();
    assert!((values(&w)[0] - 0.6).abs() < 1e-6);
}

#[test]
fn what_is_saved_and_what_is_appended_to_is_scaled() {
    let scaled = |w: &Tensor| (values(w)[0] - 0.6).abs() < 1e-6;
    let looked_up = || {
        let w = var(&[6.0, 8.0, 0.3, 0.4], &[2, 2], DType::F32);
        let layer = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
        layer.forward(&ids(&[0])).unwrap();
        (optimizer(&w, ParamsAdamax::default()), w, layer)
    };
    let (adamax, w, _layer) = looked_up();
    adamax.snapshot().unwrap();
    assert!(scaled(&w));
    let (mut adamax, _, _layer) = looked_up();
    let grown = adamax.append_rows("w", &Tensor::zeros((1, 2), DType::F32, CPU).unwrap()).unwrap();
    assert!(scaled(&grown));
}

#[test]
fn the_padding_of_bags_is_scaled_too() {
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        let w = var(&[6.0, 8.0, 0.3, 0.4, 30.0, 40.0], &[3, 2], DType::F32);
        let bag = EmbeddingBag::new(of(&w), pooling).unwrap().max_norm(1.0).unwrap().padding_idx(0).unwrap();
        let pooled = bag.forward(&ids(&[0, 1]).unsqueeze(0).unwrap()).unwrap();
        assert_eq!(values(&pooled), values(&w.narrow(0, 1, 1).unwrap()));
        let after = values(&bag.embeddings().unwrap());
        assert!((after[0] - 0.6).abs() < 1e-6 && after[4] == 30.0, "{after:?}");
    }
}

/// candle's own operations copy the rows in the forward pass.
#[test]
fn weights_of_ids_have_the_gradient_of_the_rows_that_were_looked_up() {
    for dtype in DTYPES {
        for way in 0..4 {
            let w = var(&[3.0, 4.0, 1.0, 1.0], &[2, 2], dtype);
            let factors = var(&[1.0], &[1], dtype);
            let bag = EmbeddingBag::new(of(&w), Pooling::Sum).unwrap();
            let bag = if way == 3 { bag.max_norm(1.0).unwrap() } else { bag };
            let bags = Bags::offsets(&ids(&[0]), &ids(&[0])).unwrap().weights(&factors).unwrap();
            let loss = bag.pool(&bags).unwrap().sum_all().unwrap();
            match way {
                0 => {
                    let limited = Embedding::new(of(&w)).unwrap().max_norm(1.0).unwrap();
                    limited.forward(&ids(&[0])).unwrap();
                    limited.embeddings().unwrap();
                }
                1 => w.set(&w.affine(7.0, 0.0).unwrap()).unwrap(),
                2 => {
                    let grad = SparseGrad { indices: ids(&[0]), values: tensor(&[1.0, 1.0], &[1, 2], dtype) };
                    let params = ParamsAdamax { lr: 1.0.into(), ..ParamsAdamax::default() };
                    optimizer(&w, params).apply_gradients([(&w, &grad)]).unwrap();
                }
                _ => {}
            }
            factors.set(&tensor(&[5.0], &[1], dtype)).unwrap();
            let grads = loss.backward().unwrap();
            let (got, want) = (values(grads.get(&factors).unwrap())[0], if way == 3 { 1.4 } else { 7.0 });
            assert!((got - want).abs() < 8e-3, "{dtype:?}, way {way}: expected {want}, got {got}");
            // The rows' own gradient is that of the factors at the lookup.
            let grad = bag.table().gradient(&grads).unwrap().unwrap();
            assert_eq!(values(&grad.values), [1.0, 1.0]);
        }
    }
}

#[test]
fn lookups_without_ids_have_no_gradient() {
    let (w, bias) = (var(&[1.0, 2.0], &[1, 2], DType::F32), var(&[1.0, 1.0], &[2], DType::F32));
    let bag = EmbeddingBag::new(of(&w), Pooling::Sum).unwrap();
    let vars = [("w", w.clone()), ("bias", bias.clone())];
    let mut adamax = Adamax::from_named(vars, ParamsAdamax::default()).unwrap();
    let empty = bag.pool(&Bags::offsets(&ids(&[]), &ids(&[0, 0])).unwrap()).unwrap();
    let rows = bag.table().lookup(&ids(&[])).unwrap();
    assert_eq!((empty.dims(), rows.dims()), (&[2, 2][..], &[0, 2][..]));
    let loss = empty.broadcast_add(&bias).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    assert!(bag.table().gradient(&grads).unwrap().is_none());
    adamax.step(&grads).unwrap();
    assert_eq!(adamax.report().missing().collect::<Vec<_>>(), ["w"]);
    assert_eq!((adamax.state("w").unwrap().step, adamax.state("bias").unwrap().step), (0, 1));
    // An id that is padding is an id.
    let padded = Embedding::new(of(&w)).unwrap().padding_idx(0).unwrap();
    adamax.backward_step(&padded.forward(&ids(&[0])).unwrap().sum_all().unwrap()).unwrap();
    assert_eq!((adamax.state("w").unwrap().step, values(&w)), (1, vec![1.0, 2.0]));
}

/// Three lookups in one table, one of them pooled with factors, and a dense use of it.
fn losses(w: &Var, dense: bool) -> Tensor {
    let table = Table::new(w).unwrap();
    let factors = |rows: &Tensor, seed| tensor(&noise(seed, rows.elem_count()), rows.dims(), rows.dtype());
    let bag = EmbeddingBag::new(of(w), Pooling::Mean).unwrap();
    let weighted = EmbeddingBag::new(of(w), Pooling::Sum).unwrap();
    let bags = Bags::offsets(&ids(&[4, 4, 2]), &ids(&[0, 1])).unwrap();
    let weights = tensor(&[0.3, -2.0, 0.7], &[3], w.dtype());
    let all = [
        table.lookup(&ids(&[3, 1, 3])).unwrap(),
        bag.forward(&ids(&[3, 0, 5]).unsqueeze(0).unwrap()).unwrap(),
        weighted.pool(&bags.weights(&weights).unwrap()).unwrap(),
    ];
    let sums = (0..).zip(all).map(|(seed, rows)| (&rows * factors(&rows, seed)).unwrap().sum_all().unwrap());
    let sum = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
    if dense { (sum + w.sqr().unwrap().sum_all().unwrap()).unwrap() } else { sum }
}

#[test]
fn the_gradient_of_a_table_gives_the_bits_of_a_step() {
    for dtype in DTYPES {
        for dense in [false, true] {
            let start = tensor(&noise(1, 24), &[6, 4], dtype);
            let (w, own) = (Var::from_tensor(&start).unwrap(), Var::from_tensor(&start).unwrap());
            let params = ParamsAdamax { lr: 0.1.into(), clip: Some(Clip::GlobalNorm(0.5)), ..ParamsAdamax::default() };
            let (mut stepped, mut applied) = (optimizer(&w, params.clone()), optimizer(&own, params));
            for _ in 0..3 {
                stepped.backward_step(&losses(&w, dense)).unwrap();
                let grads = losses(&own, dense).backward().unwrap();
                let table = Table::new(&own).unwrap();
                let sparse = table.gradient(&grads).unwrap().unwrap();
                assert_eq!(values(&sparse.indices), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
                let of_dense = grads.get(&own).map(|grad| (&own, Gradient::from(grad)));
                assert_eq!(of_dense.is_some(), dense);
                let norms = applied.gradient_norms(&grads, NormType::L2).unwrap();
                applied.apply_gradients(of_dense.into_iter().chain([(&own, Gradient::from(&sparse))])).unwrap();
                assert_eq!(bits(&w), bits(&own), "{dtype:?}, dense: {dense}");
                assert_eq!(norms, [("w".to_owned(), applied.report().total_norm().unwrap())]);
            }
        }
    }
}

#[test]
fn norms_by_variable_have_tables_and_are_unscaled() {
    let (w, bias) = (var(&[0.0; 8], &[4, 2], DType::F32), var(&[0.0; 2], &[2], DType::F32));
    let unused = var(&[1.0], &[1], DType::F32);
    let vars = [("w", w.clone()), ("unused", unused), ("bias", bias.clone())];
    let params = ParamsAdamax { loss_scale: LossScale::Static(8.0), ..ParamsAdamax::default() };
    let adamax = Adamax::from_named(vars, params).unwrap();
    let rows = Table::new(&w).unwrap().lookup(&ids(&[1, 1, 3])).unwrap();
    let loss = (rows.broadcast_add(&bias).unwrap().sum_all().unwrap() * 8.0).unwrap();
    let grads = loss.backward().unwrap();
    let norms = |norm| adamax.gradient_norms(&grads, norm).unwrap();
    let expect = |bias, w| [("bias".to_owned(), bias), ("w".to_owned(), w)];
    assert_eq!(norms(NormType::L1), expect(6.0, 6.0));
    assert_eq!(norms(NormType::Inf), expect(3.0, 2.0));
    assert_eq!(norms(NormType::L2), expect(18f64.sqrt(), 10f64.sqrt()));
    assert!(adamax.gradient_norms(&GradStore::default(), NormType::L2).unwrap().is_empty());
}

/// A step asks for the ids in its own gradients only.
#[test]
fn lookups_that_were_differentiated_twice_do_not_slow_steps_down() {
    let w = var(&[0.0; 4], &[4], DType::F32);
    let mut adamax = optimizer(&w, ParamsAdamax::default());
    let grads = w.sum_all().unwrap().backward().unwrap();
    let mut fastest = || {
        let one = || {
            let start = Instant::now();
            (0..20).for_each(|_| adamax.step(&grads).map(drop).unwrap());
            start.elapsed()
        };
        std::iter::repeat_with(one).take(50).min().unwrap_or(Duration::MAX)
    };
    let before = fastest();
    let other = var(&[0.0; 4], &[2, 2], DType::F32);
    let table = Table::new(&other).unwrap();
    for _ in 0..70_000 {
        let loss = table.lookup(&ids(&[0, 1])).unwrap().sum_all().unwrap();
        let mut twice = loss.backward().unwrap();
        twice.extend(loss.backward().unwrap()).unwrap();
    }
    let after = fastest();
    // It was 400 times as long.
    assert!(after < before * 4, "{before:?} before, {after:?} after");
    println!("{:?} a step before, {:?} after", before / 20, after / 20);
    let known = (0..5_000).map(|_| {
        let loss = table.lookup(&ids(&[0, 1])).unwrap().sum_all().unwrap();
        let mut twice = loss.backward().unwrap();
        twice.extend(loss.backward().unwrap()).unwrap();
        twice
    });
    let known: Vec<GradStore> = known.collect();
    let error = table.gradient(&known[0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::LostLookup), "{error}");
    assert_eq!(values(&table.gradient(&known[4_999]).unwrap().unwrap().values), [2.0; 4]);
    // A gradient that belongs to another optimizer's table is none of this one's.
    let mut grads = w.sum_all().unwrap().backward().unwrap();
    for id in known[0].get_ids() {
        grads.insert_id(*id, known[0].get_id(*id).unwrap().clone());
    }
    adamax.step(&grads).unwrap();
    let mut of_other = optimizer(&other, ParamsAdamax::default());
    assert!(of_other.step(&grads).unwrap_err().to_string().contains("differentiated more than once"));
}

/// Rows of f64 whose squares are too large or too small for an f64, and one whose norm itself is too large.
#[test]
fn norms_of_rows_neither_overflow_nor_vanish() {
    for (x, max_norm) in [(1e160, 1.0), (1e200, 1e190), (1e-170, 1e-180), (1.5e308, 1.0), (1.5e308, 1e308)] {
        let w = var(&[x, x, 0.0], &[3, 1], DType::F64);
        let w = Var::from_tensor(&w.reshape((1, 3)).unwrap()).unwrap();
        let layer = Embedding::new(of(&w)).unwrap().max_norm(max_norm).unwrap();
        // PyTorch's formula, with a norm that is always in the range.
        let norm = x / 2.0 * 2f64.sqrt() + 0.5e-7;
        let expected = x * (max_norm / 2.0 / norm);
        let rows = layer.forward(&ids(&[0])).unwrap();
        for got in [values(&rows), values(&layer.embeddings().unwrap())] {
            assert!((got[0] - expected).abs() <= 1e-14 * expected, "{x:e}, {max_norm:e}: {expected:e}, got {got:?}");
            assert_eq!((got[1], got[2]), (got[0], 0.0));
        }
    }
}
