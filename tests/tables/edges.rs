//! Tables at their edges: gradients that lose what they came with, shapes without elements, views, several users of one
//! weight, and what is not finite.

use candle_adamax::{
    AccumulatedGrad, Adamax, Bags, Clip, Embedding, EmbeddingBag, EpsMode, Gradient, ParamsAdamax, Pooling, SparseGrad,
    Table, TouchedRows, WeightDecay,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module as _;

use crate::common::gradients::Grad;
use crate::common::{DTYPES, ID_DTYPES, KERNELS, bits, ids, noise, tensor, values, var};
use crate::support::{Checked, assert_near, coarse, grads, ids_of, noisy, received, scatter, sparse};

/// Factors that tell the elements of `n` rows of 3 apart.
fn factors(seed: u64, n: usize) -> Tensor {
    tensor(&coarse(seed, n * 3), &[n, 3], DType::F32)
}

/// A table of 20 rows of 3, with its values.
fn table_of_20() -> (Var, Table, Vec<f64>) {
    let weights = coarse(1, 60);
    let w = var(&weights, &[20, 3], DType::F32);
    let table = Table::new(&w).unwrap();
    (w, table, weights)
}

#[test]
fn two_losses_of_many_lookups_are_merged_when_their_graphs_are_gone() {
    // 10 small batches of 8 lookups: what `GradStore::extend` adds up is detached from everything that led to it.
    let (w, table, weights) = table_of_20();
    let (mut all_ids, mut all_values) = (Vec::new(), Vec::new());
    let mut grads = GradStore::default();
    for batch in 0..10u32 {
        let lists: Vec<[u32; 2]> = (0..8).map(|i| [i, (i + batch) % 20]).collect();
        let lookups: Vec<Tensor> = lists.iter().map(|of| table.lookup(&ids(of)).unwrap()).collect();
        let sum = |loss: &dyn Fn(&Tensor) -> Tensor| lookups.iter().map(loss).reduce(|a, b| (a + b).unwrap()).unwrap();
        grads.extend(sum(&|rows| rows.sum_all().unwrap()).backward().unwrap()).unwrap();
        grads.extend(sum(&|rows| rows.sqr().unwrap().sum_all().unwrap()).backward().unwrap()).unwrap();
        for row in lists.concat() {
            all_ids.push(row);
            all_values.extend(weights[row as usize * 3..][..3].iter().map(|w| 1.0 + 2.0 * w));
        }
    }
    assert_eq!(received(&w, &grads), Some(scatter(&all_ids, &all_values, 20, 3)));
}

#[test]
fn two_losses_of_large_lookups_are_merged_when_their_graphs_are_gone() {
    let w = var(&[0.0; 4], &[4, 1], DType::F32);
    let table = Table::new(&w).unwrap();
    let mut grads = GradStore::default();
    for row in 0..3 {
        let loss = table.lookup(&ids(&vec![row; 600_000])).unwrap().sum_all().unwrap();
        grads.extend(loss.backward().unwrap()).unwrap();
        grads.extend(loss.backward().unwrap()).unwrap();
    }
    assert_eq!(received(&w, &grads).unwrap().g, [1.2e6, 1.2e6, 1.2e6, 0.0]);
}

#[test]
fn merged_gradients_outlive_the_layer() {
    let w = var(&noise(1, 60), &[20, 3], DType::F32);
    let mut grads = GradStore::default();
    let layer = Embedding::new(w.as_tensor().clone()).unwrap();
    let loss = (layer.forward(&ids(&[3, 4])).unwrap() * factors(1, 2)).unwrap().sum_all().unwrap();
    grads.extend(loss.backward().unwrap()).unwrap();
    grads.extend(loss.backward().unwrap()).unwrap();
    drop((layer, loss));
    let twice = [coarse(1, 6), coarse(1, 6)].concat();
    assert_eq!(received(&w, &grads), Some(scatter(&[3, 4, 3, 4], &twice, 20, 3)));
}

#[test]
fn gradients_of_a_loss_count_where_they_are_in_the_store() {
    let (w, table, _) = table_of_20();
    let loss = table.lookup(&ids(&[1])).unwrap().sum_all().unwrap();
    let _elsewhere = loss.backward().unwrap();
    assert_eq!(received(&w, &GradStore::default()), None);
    let detached = table.lookup(&ids(&[1])).unwrap().detach().sum_all().unwrap();
    assert_eq!(received(&w, &detached.backward().unwrap()), None);
}

#[test]
fn each_optimizer_takes_the_gradients_of_its_own_tables() {
    let ((v, a, _), (w, b, _)) = (table_of_20(), table_of_20());
    let one = |table: &Table, row: u32, seed: u64| {
        (table.lookup(&ids(&[row])).unwrap() * factors(seed, 1)).unwrap().sum_all().unwrap()
    };
    let grads = (one(&a, 1, 1) + one(&b, 2, 2)).unwrap().backward().unwrap();
    // Each of them twice: to take a gradient does not use it up.
    for _ in 0..2 {
        assert_eq!(received(&v, &grads), Some(scatter(&[1], &coarse(1, 3), 20, 3)));
        assert_eq!(received(&w, &grads), Some(scatter(&[2], &coarse(2, 3), 20, 3)));
    }
}

#[test]
fn lookups_and_some_rows_of_a_dense_gradient_are_added() {
    let (w, table, _) = table_of_20();
    let ours = (table.lookup(&ids(&[1, 2])).unwrap() * factors(1, 2)).unwrap().sum_all().unwrap();
    let candles = (w.index_select(&ids(&[2, 3]), 0).unwrap() * factors(2, 2)).unwrap().sum_all().unwrap();
    let grads = (ours + candles).unwrap().backward().unwrap();
    // m is the gradient, and u is not 0 where there was one.
    let params = ParamsAdamax { beta1: 0.0, eps: 1.0, eps_mode: EpsMode::InsideMax, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    optimizer.step_rows(&grads, [(&w, TouchedRows::NonZero)]).unwrap();
    let expected = scatter(&[1, 2, 2, 3], &[coarse(1, 6), coarse(2, 6)].concat(), 20, 3);
    let state = optimizer.state("w").unwrap();
    assert_eq!(values(&state.exp_avg), expected.g);
    let updated =
        values(&state.exp_inf).chunks(3).enumerate().filter(|(_, u)| u[0] != 0.0).map(|(row, _)| row).collect();
    assert_eq!(expected.rows, updated);
}

#[test]
fn tables_come_and_go_while_others_train() {
    let w = var(&noise(1, 60), &[20, 3], DType::F32);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    Table::new(&w).unwrap().lookup(&ids(&[1])).unwrap();
                }
            });
        }
        for seed in 0..500 {
            let rows = Table::new(&w).unwrap().lookup(&ids(&[4, 5])).unwrap();
            let grads = (rows * factors(seed, 2)).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(received(&w, &grads), Some(scatter(&[4, 5], &coarse(seed, 6), 20, 3)));
        }
    });
}

#[test]
fn steps_and_lookups_that_write_take_turns() {
    let w = var(&noise(1, 60), &[20, 3], DType::F32);
    let layer = Embedding::new(w.as_tensor().clone()).unwrap().max_norm(0.5).unwrap();
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..2_000).for_each(|i| drop(layer.forward(&ids(&[i % 20, 7])).unwrap())));
        }
        (0..500).for_each(|seed| {
            optimizer.apply_gradients([(&w, &noisy(&[7, 3], seed, &[3], DType::F32))]).map(drop).unwrap();
        });
    });
    layer.forward(&ids(&[7])).unwrap();
    let norm = values(&layer.embeddings().unwrap())[21..24].iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!(norm <= 0.5 + 1e-6, "{norm}");
    assert_eq!(optimizer.updates(), 500);
}

#[test]
fn dense_gradients_without_elements_have_no_rows() {
    for shape in [&[0usize, 3][..], &[4, 0], &[0], &[0, 2, 2]] {
        let (w, none) = (var(&[], shape, DType::F32), tensor(&[], shape, DType::F32));
        let grad = SparseGrad::touched_rows(&none, &ids(&[])).unwrap();
        assert_eq!((grad.indices.dims(), &grad.values.dims()[1..]), (&[0][..], &shape[1..]));
        let grad = SparseGrad::nonzero_rows(&none).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
        assert_eq!((grad.indices.dims(), &grad.values.dims()[1..]), (&[0][..], &shape[1..]));
        let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
        let mut grads = GradStore::default();
        grads.insert(&w, none);
        optimizer.step_rows(&grads, [(&w, TouchedRows::NonZero)]).unwrap();
        assert_eq!(optimizer.updates(), 1);
    }
}

#[test]
fn variables_without_rows_are_named_in_errors() {
    let w = var(&[1.0], &[], DType::F32);
    let mut optimizer = Adamax::from_named([("layer.scale", w.clone())], ParamsAdamax::default()).unwrap();
    let mut grads = GradStore::default();
    grads.insert(&w, tensor(&[1.0], &[], DType::F32));
    for error in [
        optimizer.reset_rows("layer.scale", &ids(&[0])).unwrap_err(),
        optimizer.append_rows("layer.scale", &tensor(&[1.0], &[1], DType::F32)).unwrap_err(),
        optimizer.apply_gradients([(&w, &sparse(&[0], &[1.0], &[], DType::F32))]).unwrap_err(),
        optimizer.step_rows(&grads, [(&w, TouchedRows::NonZero)]).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("layer.scale") && text.contains("a scalar"), "{text}");
    }
}

#[test]
fn rows_of_no_columns_are_pooled() {
    let none = var(&[], &[4, 0], DType::F32);
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        let layer = EmbeddingBag::new(none.as_tensor().clone(), pooling).unwrap();
        let bags = Bags::offsets(&ids(&[1, 3, 3]), &ids(&[0, 1])).unwrap();
        assert_eq!(layer.pool(&bags).unwrap().dims(), [2, 0]);
    }
}

#[test]
fn offsets_have_any_integer_dtype_and_may_be_views() {
    let layer = EmbeddingBag::new(table_of_20().0.as_tensor().clone(), Pooling::Mean).unwrap();
    let of = ids(&[1, 2, 3, 4]);
    let expected = bits(&layer.pool(&Bags::offsets(&of, &ids(&[0, 1, 1, 3])).unwrap()).unwrap());
    for dtype in ID_DTYPES {
        let columns = ids_of(&[0, 9, 1, 9, 1, 9, 3, 9], &[4, 2], dtype);
        let offsets = columns.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
        assert!(!offsets.is_contiguous());
        assert_eq!(bits(&layer.pool(&Bags::offsets(&of, &offsets).unwrap()).unwrap()), expected, "{dtype:?}");
    }
}

#[test]
fn weights_of_bags_may_be_views() {
    for dtype in [DType::F64, DType::F32] {
        let w = var(&noise(1, 24), &[8, 3], dtype);
        let layer = EmbeddingBag::new(w.as_tensor().clone(), Pooling::Sum).unwrap();
        let of = Tensor::new(&[[1u32, 2, 3], [1, 1, 7]], &Device::Cpu).unwrap();
        let (columns, up) = (var(&noise(5, 6), &[3, 2], dtype), tensor(&noise(9, 6), &[2, 3], dtype));
        let weights = columns.t().unwrap();
        let loss = |pooled: Tensor| (pooled * &up).unwrap().sum_all().unwrap();
        let ours = loss(layer.pool(&Bags::batch(&of).unwrap().weights(&weights).unwrap()).unwrap());
        let rows = w.index_select(&of.flatten_all().unwrap(), 0).unwrap().reshape((2, 3, 3)).unwrap();
        let candles = loss(rows.broadcast_mul(&weights.unsqueeze(2).unwrap()).unwrap().sum(1).unwrap());
        let (ours, candles) = (ours.backward().unwrap(), candles.backward().unwrap());
        let of_weights = |grads: &GradStore| values(grads.get(&columns).unwrap());
        assert_near(&of_weights(&ours), &of_weights(&candles), 1e-6, "gradient of the weights");
        assert_near(&received(&w, &ours).unwrap().g, &values(candles.get(&w).unwrap()), 1e-6, "gradient of the rows");
    }
}

#[test]
fn weights_of_bags_need_not_be_trained() {
    let (w, table, _) = table_of_20();
    let bags = |of: &[u32], weights: &Tensor| Bags::offsets(&ids(of), &ids(&[0])).unwrap().weights(weights).unwrap();
    let weights = tensor(&[0.5, 2.0, -1.0], &[3], DType::F32);
    let layer = EmbeddingBag::new(table.weight().unwrap(), Pooling::Sum).unwrap();
    let loss = layer.pool(&bags(&[1, 1, 2], &weights)).unwrap().sum_all().unwrap();
    let expected = scatter(&[1, 1, 2], &[0.5, 0.5, 0.5, 2.0, 2.0, 2.0, -1.0, -1.0, -1.0], 20, 3);
    assert_eq!(received(&w, &loss.backward().unwrap()), Some(expected));
    let frozen = EmbeddingBag::new(w.copy().unwrap().detach(), Pooling::Sum).unwrap();
    let loss = frozen.pool(&bags(&[1, 1, 2], &weights)).unwrap().sum_all().unwrap();
    assert_eq!(loss.backward().unwrap().get_ids().count(), 1, "only the loss itself");
    let none = var(&[], &[0], DType::F32);
    let loss = layer.pool(&bags(&[], &none)).unwrap().sum_all().unwrap();
    assert_eq!(loss.backward().unwrap().get(&none).unwrap().dims(), [0]);
}

#[test]
fn a_lookup_that_fails_scales_no_row_down() {
    for dtype in DTYPES {
        let w = var(&[3.0, 4.0, 0.0, 0.0, 0.3, 0.4], &[3, 2], dtype);
        let layer = Embedding::new(w.as_tensor().clone()).unwrap().max_norm(1.0).unwrap();
        let before = bits(&w);
        layer.forward(&ids(&[0, 9])).unwrap_err();
        assert_eq!(bits(&w), before);
        assert_eq!(bits(&layer.embeddings().unwrap()), before);
        layer.forward(&ids(&[0, 0, 1, 2])).unwrap();
        assert_eq!(bits(&w), before, "a lookup does not write");
        let seen = layer.embeddings().unwrap();
        assert_eq!(bits(&w), before, "looking does not write");
        assert_eq!(bits(&seen)[2..], before[2..], "a row of zeros, and one below the norm");
        assert_near(&values(&seen)[..2], &[0.6, 0.8], 4e-3, "scaled");
    }
}

#[test]
fn set_rows_takes_a_single_id_no_id_and_views() {
    let (w, table, before) = table_of_20();
    table.set_rows(&ids_of(&[3], &[], DType::I64), &tensor(&[1.0, 2.0, 3.0], &[3], DType::F32)).unwrap();
    table.set_rows(&ids(&[]), &tensor(&[], &[0, 3], DType::F32)).unwrap();
    let columns = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2], DType::F32);
    table.set_rows(&ids(&[0, 1]), &columns.t().unwrap()).unwrap();
    // Rows of the table itself.
    table.set_rows(&ids(&[4]), &w.narrow(0, 7, 1).unwrap()).unwrap();
    let expected = [&[1.0, 3.0, 5.0, 2.0, 4.0, 6.0], &before[6..9], &[1.0, 2.0, 3.0], &before[21..24], &before[15..]];
    assert_eq!(values(&w), expected.concat());
}

#[test]
fn rows_are_added_to_none_and_from_views() {
    for kernel in KERNELS {
        let none = var(&[], &[0, 3], DType::F32);
        let mut optimizer = Adamax::from_named([("w", none)], ParamsAdamax::default()).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let first = optimizer.append_rows("w", &tensor(&noise(1, 6), &[2, 3], DType::F32)).unwrap();
        optimizer.apply_gradients([(&first, &noisy(&[1], 3, &[3], DType::F32))]).unwrap();
        // A row of the variable itself, then columns.
        let second = optimizer.append_rows("w", &first.narrow(0, 1, 1).unwrap()).unwrap();
        assert_eq!(bits(&second)[3..6], bits(&second)[6..9]);
        let columns = tensor(&noise(2, 6), &[3, 2], DType::F32);
        let third = optimizer.append_rows("w", &columns.t().unwrap()).unwrap();
        assert_eq!(bits(&third)[9..], bits(&columns.t().unwrap())[..]);
        // It is known whose memory is whose.
        let error = optimizer.apply_gradients([(&third, third.as_tensor())]).unwrap_err().to_string();
        assert!(error.contains("shares the storage of the var `w`"), "{error}");
        optimizer.add_var("second", second).unwrap();
        assert!(optimizer.add_var("third", third).unwrap_err().to_string().contains("are the same memory"));
    }
}

#[test]
fn a_norm_that_is_not_finite_makes_touched_rows_nan() {
    for kernel in KERNELS {
        let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
        let vars: [(&str, &[usize], DType); 2] = [("dense", &[2], DType::F32), ("table", &[6, 2], DType::F32)];
        let mut checked = Checked::new(&vars, params, kernel);
        let dense = Grad::Dense(tensor(&[1.0, 2.0], &[2], DType::F32));
        let rows = sparse(&[1, 3, 1], &[1.0, 2.0, f64::INFINITY, 1.0, 0.0, 1.0], &[2], DType::F32);
        checked.step(&grads([("dense", dense), ("table", Grad::Sparse(rows))]), &format!("{kernel:?}"));
        let nan: Vec<usize> = (0..12).filter(|&i| values(&checked.weights["table"])[i].is_nan()).collect();
        assert_eq!(nan, [2, 3, 6, 7]);
    }
}

#[test]
fn sums_of_rows_that_overflow_are_skipped() {
    for kernel in KERNELS {
        let w = var(&[8.0; 3], &[3], DType::F32);
        let params = ParamsAdamax { gradient_accumulation_steps: 2, skip_nonfinite: true, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let mut step = |rows: &[u32], of: &[f64]| {
            optimizer.apply_gradients([(&w, &sparse(rows, of, &[], DType::F32))]).unwrap();
            (optimizer.report().skipped(), optimizer.state("w").unwrap())
        };
        // Of two calls, which are dropped together; and within one call, which is dropped alone.
        step(&[1], &[3e38]);
        let (skipped, state) = step(&[1], &[3e38]);
        assert!(skipped && state.accumulated.is_none(), "{kernel:?}");
        step(&[1], &[1.0]);
        let (skipped, state) = step(&[1, 2, 1], &[3e38, 1.0, 3e38]);
        let sum = state.accumulated.as_ref().and_then(AccumulatedGrad::rows).unwrap();
        assert!(skipped && values(&sum.indices) == [1.0] && values(&sum.values) == [1.0], "{kernel:?}");
        let (_, state) = step(&[1], &[3.0]);
        assert_eq!(values(&state.exp_inf), [0.0, 2.0, 0.0]);
    }
}

#[test]
fn zeros_keep_their_sign() {
    for kernel in KERNELS {
        let run = |as_rows: bool| {
            let w = var(&[-0.0, 0.0, 1.0], &[3, 1], DType::F32);
            let params = ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..Default::default() };
            let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            let dense = tensor(&[-0.0, -0.0, 0.0], &[3, 1], DType::F32);
            let rows = SparseGrad { indices: ids(&[0, 1, 2]), values: dense.clone() };
            let grad = if as_rows { Gradient::Sparse(&rows) } else { Gradient::Dense(&dense) };
            optimizer.apply_gradients([(&w, grad)]).unwrap();
            let state = optimizer.state("w").unwrap();
            [bits(&w), bits(&state.exp_avg), bits(&state.exp_inf)]
        };
        assert_eq!(run(true), run(false), "{kernel:?}");
    }
}

#[test]
fn tables_may_move_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<AccumulatedGrad>();
    check::<Bags>();
    check::<Embedding>();
    check::<EmbeddingBag>();
    check::<Gradient<'_>>();
    check::<SparseGrad>();
    check::<Table>();
    check::<TouchedRows<'_>>();
}
