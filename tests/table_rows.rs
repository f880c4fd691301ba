//! Ids and rows: what may be looked up, rows that begin anew, rows that are added, and every mistake as an error that
//! changes nothing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_adamax::{
    AccumulatedGrad, Adamax, Bags, Embedding, EmbeddingBag, Kernel, ParamsAdamax, Pooling, SparseGrad, Table,
    TouchedRows, embedding,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
use common::{Fingerprint, bits, noise, tensor, values, var};

const CPU: Device = Device::Cpu;

fn params() -> ParamsAdamax {
    ParamsAdamax { lr: 0.1.into(), allow_no_gradients: true, ..Default::default() }
}

fn table(rows: usize) -> Var {
    var(&noise(21, rows * 4), &[rows, 4], DType::F32)
}

fn optimizer(var: &Var) -> Adamax {
    Adamax::from_named([("emb", var.clone())], params()).unwrap()
}

fn sparse(indices: &[u32], seed: u64) -> SparseGrad {
    let values = tensor(&noise(seed, indices.len() * 4), &[indices.len(), 4], DType::F32);
    SparseGrad { indices: Tensor::new(indices, &CPU).unwrap(), values }
}

#[test]
fn ids_have_any_shape_and_any_integer_dtype() -> Result<()> {
    let var = table(10);
    let layer = Embedding::new(var.as_tensor().clone())?;
    let all = Tensor::new(&[3u32, 0, 9, 3, 1, 2], &CPU)?;
    let expected = bits(&var.index_select(&all, 0)?);
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let ids = all.to_dtype(dtype)?;
        for shape in [vec![6], vec![2, 3], vec![3, 1, 2]] {
            let rows = layer.forward(&ids.reshape(shape.as_slice())?)?;
            assert_eq!(rows.dims(), [shape.as_slice(), &[4]].concat());
            assert_eq!(bits(&rows), expected, "{dtype:?} {shape:?}");
        }
        let turned = layer.forward(&ids.reshape((2, 3))?.t()?)?;
        assert_eq!(bits(&turned), bits(&var.index_select(&all.reshape((2, 3))?.t()?.flatten_all()?, 0)?));
        assert_eq!(layer.forward(&ids.get(2)?)?.dims(), [4]);
        assert_eq!(layer.forward(&ids.narrow(0, 0, 0)?)?.dims(), [0, 4]);
    }
    Ok(())
}

#[test]
fn rows_have_any_rank() -> Result<()> {
    for shape in [vec![6], vec![6, 2, 3], vec![6, 0]] {
        let row_len: usize = shape[1..].iter().product();
        for kernel in [Kernel::Auto, Kernel::Portable] {
            let var = var(&noise(1, 6 * row_len), &shape, DType::F64);
            let dense = Var::from_tensor(&var.copy()?)?;
            let mut optimizers = [optimizer(&var), optimizer(&dense)];
            optimizers.iter_mut().try_for_each(|optimizer| optimizer.set_kernel(kernel))?;
            let ids = Tensor::new(&[4u32, 1, 4], &CPU)?;
            let rows = Table::new(&var)?.lookup(&ids)?;
            assert_eq!(rows.dims()[1..], shape[1..]);
            let factors = tensor(&noise(2, 3 * row_len), rows.dims(), DType::F64);
            optimizers[0].step(&(rows * &factors)?.sum_all()?.backward()?)?;
            let values = factors;
            optimizers[1].apply_gradients([(&dense, &SparseGrad { indices: ids, values })])?;
            assert_eq!(bits(&var), bits(&dense));
            assert_eq!(optimizers[0].updates(), 1);
        }
    }
    Ok(())
}

#[test]
fn tables_of_billions_of_rows_are_counted_right() -> Result<()> {
    // Rows without elements take no memory.
    let var = Var::zeros((3_000_000_000, 0), DType::F32, &CPU)?;
    let table = Table::new(&var)?;
    assert_eq!(table.lookup(&Tensor::new(&[2_999_999_999u32, 2_147_483_648], &CPU)?)?.dims(), [2, 0]);
    assert_error(
        table.lookup(&Tensor::new(&[3_000_000_000i64], &CPU)?),
        "id 3000000000 at position [0] of ids is out of range: the table has 3000000000 rows, so ids are 0 to 2999999999",
    );
    let larger = Var::zeros((5_000_000_000, 0), DType::F32, &CPU)?;
    assert_error(Table::new(&larger), "invalid `rows`: expected at most 4294967295 rows, got 5000000000");
    let mut adamax = optimizer(&var);
    let rows = Tensor::zeros((2_000_000_000, 0), DType::F32, &CPU)?;
    let error = "Adamax: invalid `rows`: expected at most 4294967295 rows in all, got 5000000000";
    assert_error(adamax.append_rows("emb", &rows), error);
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
    for (rows, dim) in [(5_000_000_000, 1), (4_000_000_000, usize::MAX / 2)] {
        let error = embedding(rows, dim, vb.clone()).unwrap_err().to_string();
        assert!(
            error.starts_with("invalid `rows`: expected at most 4294967295 rows") && error.ends_with(&rows.to_string()),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn set_rows_writes_the_last_of_equal_ids() -> Result<()> {
    let var = table(6);
    let before = var.to_vec2::<f32>()?;
    let new = tensor(&noise(9, 12), &[3, 4], DType::F32);
    Table::new(&var)?.set_rows(&Tensor::new(&[5i64, 2, 5], &CPU)?, &new)?;
    let (after, new) = (var.to_vec2::<f32>()?, new.to_vec2::<f32>()?);
    assert_eq!([&after[2], &after[5]], [&new[1], &new[2]]);
    assert_eq!([&after[0], &after[4]], [&before[0], &before[4]]);
    Ok(())
}

#[test]
fn reset_rows_begin_anew() -> Result<()> {
    for (kernel, steps) in [(Kernel::Auto, 1), (Kernel::Portable, 1), (Kernel::Auto, 4), (Kernel::Portable, 4)] {
        let var = table(6);
        let params = ParamsAdamax { gradient_accumulation_steps: steps, ..params() };
        let mut adamax = Adamax::from_named([("emb", var.clone())], params)?;
        adamax.set_kernel(kernel)?;
        for seed in 0..6 {
            adamax.apply_gradients([(&var, &sparse(&[0, 1, 2, 3], seed))])?;
        }
        let weights = bits(&var);
        let before = adamax.state("emb")?;
        adamax.reset_rows("emb", &Tensor::new(&[[3u8], [1], [3], [5]], &CPU)?)?;
        let after = adamax.state("emb")?;
        for (before, after) in [(&before.exp_avg, &after.exp_avg), (&before.exp_inf, &after.exp_inf)] {
            let (before, after) = (before.to_vec2::<f32>()?, after.to_vec2::<f32>()?);
            assert_eq!([&after[1], &after[3]], [&[0.0; 4]; 2]);
            assert_eq!([&after[0], &after[2]], [&before[0], &before[2]]);
            assert!(before[1].iter().any(|&x| x != 0.0));
        }
        if let Some(AccumulatedGrad::Rows(sum)) = after.accumulated {
            assert_eq!(values(&sum.indices), [0.0, 2.0]);
        } else {
            assert_eq!(steps, 1);
        }
        assert_eq!(bits(&var), weights);
        adamax.apply_gradients([(&var, &sparse(&[1], 77))])?;
    }
    Ok(())
}

#[test]
fn appended_rows_leave_the_old_ones_as_they_are() -> Result<()> {
    for (kernel, steps) in [(Kernel::Auto, 1), (Kernel::Portable, 1), (Kernel::Auto, 3), (Kernel::Portable, 3)] {
        let params = ParamsAdamax { gradient_accumulation_steps: steps, ..params() };
        let new = tensor(&noise(9, 8), &[2, 4], DType::F32);
        // One that has all rows from the beginning.
        let whole = Var::from_tensor(&Tensor::cat(&[table(6).as_tensor(), &new], 0)?)?;
        let mut of_whole = Adamax::from_named([("emb", whole.clone())], params.clone())?;
        let mut var = table(6);
        let mut growing = Adamax::from_named([("emb", var.clone())], params.clone())?;
        growing.set_kernel(kernel)?;
        of_whole.set_kernel(kernel)?;
        for seed in 0..8 {
            if seed == 4 {
                var = growing.append_rows("emb", &new)?;
                assert_eq!(var.dims(), [8, 4]);
            }
            let rows: &[u32] = if seed < 4 { &[0, 5, 0] } else { &[5, 7, 1] };
            growing.apply_gradients([(&var, &sparse(rows, seed))])?;
            of_whole.apply_gradients([(&whole, &sparse(rows, seed))])?;
        }
        let named = |var: &Var| [("emb".to_owned(), var.clone())];
        assert_eq!(Fingerprint::of(&growing, &named(&var)), Fingerprint::of(&of_whole, &named(&whole)), "{kernel:?}");
        // A layer on the new variable reaches the optimizer, and a new optimizer takes the state.
        let mut fresh = Adamax::from_named([("emb", var.clone())], params)?;
        fresh.set_kernel(kernel)?;
        fresh.restore(&growing.snapshot()?)?;
        let loss = Embedding::new(var.as_tensor().clone())?.forward(&Tensor::new(&[7u32], &CPU)?)?.sum_all()?;
        fresh.step(&loss.backward()?)?;
        assert_eq!(fresh.report().missing().count(), 0);
    }
    Ok(())
}

#[test]
fn models_with_candles_embedding_step_by_rows() -> Result<()> {
    let ids = Tensor::new(&[[3u32, 1], [3, 6]], &CPU)?;
    let factors = tensor(&noise(4, 16), &[2, 2, 4], DType::F32);
    let run = |touched: Option<TouchedRows<'_>>| -> Result<Vec<u64>> {
        let var = table(8);
        let mut adamax = optimizer(&var);
        for _ in 0..3 {
            let rows = match touched {
                None => Embedding::new(var.as_tensor().clone())?.forward(&ids)?,
                Some(_) => candle_nn::Embedding::new(var.as_tensor().clone(), 4).forward(&ids)?,
            };
            let grads = (rows * &factors)?.sum_all()?.backward()?;
            match touched {
                None => adamax.step(&grads)?,
                Some(touched) => adamax.step_rows(&grads, [(&var, touched)])?,
            }
        }
        let state = adamax.state("emb")?;
        Ok([bits(&var), bits(&state.exp_avg), bits(&state.exp_inf)].concat())
    };
    let ours = run(None)?;
    assert_eq!(run(Some(TouchedRows::Ids(&ids)))?, ours);
    assert_eq!(run(Some(TouchedRows::NonZero))?, ours);
    let dense = tensor(&[0.0, 0.0, 1.0, 0.0, -0.0, 0.0, f64::NAN, 0.0], &[4, 2], DType::F32);
    assert_eq!(values(&SparseGrad::nonzero_rows(&dense)?.indices), [1.0, 3.0]);
    let some = SparseGrad::touched_rows(&dense, &Tensor::new(&[3i64, 0, 3], &CPU)?)?;
    assert_eq!(values(&some.indices), [0.0, 3.0]);
    assert_eq!(bits(&some.values), bits(&dense.index_select(&Tensor::new(&[0u32, 3], &CPU)?, 0)?));
    Ok(())
}

#[track_caller]
fn assert_error<T>(result: candle_adamax::Result<T>, text: &str) {
    match result {
        Ok(_) => panic!("expected the error: {text}"),
        Err(error) => assert_eq!(error.to_string(), text),
    }
}

#[test]
fn wrong_ids_are_errors_that_name_them() -> Result<()> {
    let var = table(10);
    let layer = Embedding::new(var.as_tensor().clone())?;
    let bag = EmbeddingBag::new(var.as_tensor().clone(), Pooling::Sum)?;
    let before = bits(&var);
    let text = |id: i64, position: &str| {
        format!("id {id} at position {position} of ids is out of range: the table has 10 rows, so ids are 0 to 9")
    };
    for id in [10, -1, 1 << 31, (1 << 32) + 1, i64::MIN, i64::MAX] {
        let ids = Tensor::new(&[[0i64, 1, 2], [3, id, 4]], &CPU)?;
        assert_error(layer.table().lookup(&ids), &text(id, "[1, 1]"));
        assert_eq!(layer.forward(&ids).unwrap_err().to_string(), text(id, "[1, 1]"));
        assert_error(bag.pool(&Bags::batch(&ids)?), &text(id, "[1, 1]"));
    }
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let ids = Tensor::new(&[9u32, 10], &CPU)?.to_dtype(dtype)?;
        assert_error(layer.table().lookup(&ids), &text(10, "[1]"));
    }
    let floats = Tensor::new(&[1f32], &CPU)?;
    let text = "ids dtype mismatch for `ids`: expected an integer dtype, got F32";
    assert_error(layer.table().lookup(&floats), text);
    assert_error(bag.pool(&Bags::offsets(&floats, &Tensor::new(&[0u32], &CPU)?)?), text);
    let none = Table::new(&Tensor::zeros((0, 4), DType::F32, &CPU)?)?;
    let text = "id 0 at position [] of ids is out of range: the table has no rows";
    assert_error(none.lookup(&Tensor::new(0u32, &CPU)?), text);
    assert_eq!(bits(&var), before);
    Ok(())
}

#[test]
fn wrong_layers_and_bags_are_errors() -> Result<()> {
    let row = |values: &[i64]| Tensor::new(values, &CPU).unwrap();
    let ids = row(&[1, 2, 3]);
    let offsets = |offsets: &[i64]| Bags::offsets(&ids, &row(offsets));
    assert_error(offsets(&[1, 2]), "invalid `offsets[0]`: expected 0, where the first bag begins, got 1");
    assert_error(offsets(&[0, 2, 1]), "invalid `offsets[2]`: expected at least 2, where the bag before begins, got 1");
    assert_error(offsets(&[0, 4]), "invalid `offsets[1]`: expected at most 3, the number of ids, got 4");
    assert_error(offsets(&[0, -1]), "invalid `offsets[1]`: expected at least 0, where the bag before begins, got -1");
    assert_error(offsets(&[]), "invalid `offsets`: expected an offset for the bag of the 3 ids, got none");
    let floats = Tensor::new(&[0f32], &CPU)?;
    let text = "offsets dtype mismatch for `offsets`: expected an integer dtype, got F32";
    assert_error(Bags::offsets(&ids, &floats), text);
    let text = "invalid `offsets`: expected a row, [n], got [1, 1]";
    assert_error(Bags::offsets(&ids, &row(&[0]).unsqueeze(0)?), text);
    assert_error(Bags::batch(&ids), "invalid `ids`: expected a matrix, [bags, n], got [3]");

    let text = "weights shape mismatch for `bags`: expected [3], got [2]";
    assert_error(offsets(&[0])?.weights(&Tensor::new(&[1f32, 2.0], &CPU)?), text);
    let weighted = |dtype| offsets(&[0])?.weights(&Tensor::ones(3, dtype, &CPU)?);
    let bag = |pooling| EmbeddingBag::new(table(10).as_tensor().clone(), pooling);
    let text = "invalid `weights`: expected none, but for Pooling::Sum, got Pooling::Mean";
    assert_error(bag(Pooling::Mean)?.pool(&weighted(DType::F32)?), text);
    let text = "invalid `weights`: expected none, but for Pooling::Sum, got Pooling::Max";
    assert_error(bag(Pooling::Max)?.pool(&weighted(DType::F32)?), text);
    let text = "weights dtype mismatch for `bags`: expected F32, as the table, got F64";
    assert_error(bag(Pooling::Sum)?.pool(&weighted(DType::F64)?), text);

    let layer = || Embedding::new(table(10).as_tensor().clone()).unwrap();
    let text = "invalid `padding_idx`: expected an id below the 10 rows, got 10";
    assert_error(layer().padding_idx(10), text);
    assert_error(bag(Pooling::Sum)?.padding_idx(10), text);
    for max_norm in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let text = format!("invalid `max_norm`: expected a finite number above 0, got {max_norm}");
        assert_error(layer().max_norm(max_norm), &text);
    }
    let frozen = Embedding::new(Tensor::zeros((3, 2), DType::F32, &CPU)?)?;
    let text = "invalid `max_norm`: expected none for a weight that is no variable in host memory, got 1";
    assert_error(frozen.max_norm(1.0), text);
    for shape in [vec![3], vec![3, 2, 2]] {
        let text = format!("invalid `weight`: expected a matrix, [rows, dim], got the shape {shape:?}");
        assert_error(Embedding::new(Tensor::zeros(shape.as_slice(), DType::F32, &CPU)?), &text);
    }
    let text = "table dtype mismatch for `weight`: expected F64, F32, F16 or BF16, got U32";
    assert_error(Table::new(&Tensor::zeros((3, 2), DType::U32, &CPU)?), text);
    let text = "invalid `table`: expected a tensor with rows, that is of rank 1 or more, got a scalar";
    assert_error(Table::new(&Tensor::zeros((), DType::F32, &CPU)?), text);
    Ok(())
}

#[test]
fn wrong_gradients_and_rows_change_nothing() -> Result<()> {
    let (var, other) = (table(10), table(3));
    let mut adamax = optimizer(&var);
    adamax.apply_gradients([(&var, &sparse(&[1, 4], 1))])?;
    let named = [("emb".to_owned(), var.clone())];
    let before = Fingerprint::of(&adamax, &named);
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    let ids = |ids: &[i64]| Tensor::new(ids, &CPU).unwrap();
    let mut check = |text: &str, run: &dyn Fn(&mut Adamax) -> candle_adamax::Result<()>| {
        assert_error(run(&mut adamax), text);
        assert_eq!(Fingerprint::of(&adamax, &named), before, "{text}");
    };
    let grads = |indices: Tensor, values: Tensor| SparseGrad { indices, values };
    for (text, grad) in [
        (
            "id 10 at position [1] of the indices of `emb` is out of range: the table has 10 rows, so ids are 0 to 9",
            grads(ids(&[2, 10]), zeros(&[2, 4], DType::F32)),
        ),
        (
            "id -3 at position [0] of the indices of `emb` is out of range: the table has 10 rows, so ids are 0 to 9",
            grads(ids(&[-3]), zeros(&[1, 4], DType::F32)),
        ),
        (
            "values shape mismatch for `emb`: expected [2, 4], got [2, 3]",
            grads(ids(&[1, 2]), zeros(&[2, 3], DType::F32)),
        ),
        ("values shape mismatch for `emb`: expected [2, 4], got [8]", grads(ids(&[1, 2]), zeros(&[8], DType::F32))),
        (
            "values shape mismatch for `emb`: expected [2, 4], got [3, 4]",
            grads(ids(&[1, 2]), zeros(&[3, 4], DType::F32)),
        ),
        ("values dtype mismatch for `emb`: expected F32, got F64", grads(ids(&[1, 2]), zeros(&[2, 4], DType::F64))),
        (
            "indices shape mismatch for `emb`: expected [2], got [1, 2]",
            grads(ids(&[1, 2]).unsqueeze(0)?, zeros(&[2, 4], DType::F32)),
        ),
        (
            "ids dtype mismatch for `the indices of `emb``: expected an integer dtype, got F32",
            grads(zeros(&[2], DType::F32), zeros(&[2, 4], DType::F32)),
        ),
        (
            "the gradient of `emb` shares the storage of the var `emb`: expected a tensor of its own, such as `grad.copy()`",
            grads(ids(&[1, 2]), var.narrow(0, 0, 2)?),
        ),
    ] {
        check(&format!("Adamax: {text}"), &|adamax| adamax.apply_gradients([(&var, &grad)]));
    }
    let grad = sparse(&[1], 2);
    let twice = "Adamax: two gradients for `emb`; give their sum";
    check(twice, &|adamax| adamax.apply_gradients([(&var, &grad), (&var, &grad)]));
    let foreign = "Adamax: the var of pair 1, of shape [3, 4], is not one of this optimizer's; add it first";
    check(foreign, &|adamax| adamax.apply_gradients([(&var, &grad), (&other, &grad)]));

    let none = GradStore::default();
    let nonzero = TouchedRows::NonZero;
    check(foreign, &|adamax| adamax.step_rows(&none, [(&var, nonzero), (&other, nonzero)]));
    check(twice, &|adamax| adamax.step_rows(&none, [(&var, nonzero), (&var, nonzero)]));
    let dense = var.sum_all()?.backward()?;
    let outside = ids(&[3, 11]);
    let text = "Adamax: id 11 at position [1] of the touched rows of `emb` is out of range: the table has 10 rows, so ids are 0 to 9";
    check(text, &|adamax| adamax.step_rows(&dense, [(&var, TouchedRows::Ids(&outside))]));

    let unknown = "Adamax: unknown var `nobody`; known are: emb";
    check(unknown, &|adamax| adamax.reset_rows("nobody", &outside));
    let text = "Adamax: id 11 at position [1] of ids is out of range: the table has 10 rows, so ids are 0 to 9";
    check(text, &|adamax| adamax.reset_rows("emb", &outside));
    let append =
        |name: &'static str, rows: Tensor| move |adamax: &mut Adamax| adamax.append_rows(name, &rows).map(drop);
    check(unknown, &append("nobody", zeros(&[1, 4], DType::F32)));
    let text = "Adamax: rows shape mismatch for `emb`: expected [2, 4], got [2, 3]";
    check(text, &append("emb", zeros(&[2, 3], DType::F32)));
    let text = "Adamax: rows shape mismatch for `emb`: expected [4, 4], got [4]";
    check(text, &append("emb", zeros(&[4], DType::F32)));
    let text = "Adamax: rows dtype mismatch for `emb`: expected F32, got F64";
    check(text, &append("emb", zeros(&[2, 4], DType::F64)));

    let own = Table::new(&var)?;
    let set = |rows: Tensor, values: Tensor| {
        let own = own.clone();
        move |_: &mut Adamax| own.set_rows(&rows, &values)
    };
    let text = "id 10 at position [0] of ids is out of range: the table has 10 rows, so ids are 0 to 9";
    check(text, &set(ids(&[10]), zeros(&[1, 4], DType::F32)));
    let text = "values shape mismatch for `weight`: expected [1, 4], got [4]";
    check(text, &set(ids(&[1]), zeros(&[4], DType::F32)));
    let text = "values dtype mismatch for `weight`: expected F32, got BF16";
    check(text, &set(ids(&[1]), zeros(&[1, 4], DType::BF16)));
    let frozen = Table::new(&zeros(&[3, 4], DType::F32))?;
    let text = "invalid `weight`: expected a variable, got a tensor that cannot be changed";
    assert_error(frozen.set_rows(&ids(&[1]), &zeros(&[1, 4], DType::F32)), text);
    Ok(())
}
