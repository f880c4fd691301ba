//! Mistakes with tables: every error says what it is about, what was given and what is allowed, and whatever fails has
//! changed nothing, bit for bit.

use candle_adamax::{
    Adamax, Bags, Embedding, EmbeddingBag, ErrorKind, Gradient, Kernel, ParamsAdamax, Pooling, Result, SparseGrad,
    Table, TouchedRows,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module as _;

use crate::common::{Fingerprint, ID_DTYPES, KERNELS, bits, noise, tensor, var};

const CPU: &Device = &Device::Cpu;

fn integers(ids: &[i64], dtype: DType) -> Tensor {
    Tensor::new(ids, CPU).unwrap().to_dtype(dtype).unwrap()
}

fn sparse(ids: &[i64], shape: &[usize], dtype: DType) -> SparseGrad {
    let values = tensor(&noise(7, shape.iter().product()), shape, dtype);
    SparseGrad { indices: integers(ids, DType::I64), values }
}

/// Optimizers in the middle of their work: a table `items` of ten rows, and a bias `bias`.
fn trained() -> impl Iterator<Item = (Adamax, Vec<(String, Var)>)> {
    [1, 3].into_iter().flat_map(|steps| KERNELS.map(|kernel| (steps, kernel))).map(
        |(gradient_accumulation_steps, kernel)| {
            let items = var(&noise(1, 40), &[10, 4], DType::F32);
            let bias = var(&noise(2, 4), &[4], DType::F32);
            let vars = vec![("bias".to_owned(), bias.clone()), ("items".to_owned(), items.clone())];
            let params = ParamsAdamax { name: "Encoder".into(), gradient_accumulation_steps, ..Default::default() };
            let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            // Of four calls the last one is pending where three are accumulated.
            for call in 0..4 {
                let of_items = sparse(&[call, 3, 9], &[3, 4], DType::F32);
                let of_bias = tensor(&noise(5, 4), &[4], DType::F32);
                let pairs = [(&bias, Gradient::Dense(&of_bias)), (&items, (&of_items).into())];
                optimizer.apply_gradients(pairs).unwrap();
            }
            (optimizer, vars)
        },
    )
}

/// That `call` fails with this text, as the optimizer's, and has changed nothing.
#[track_caller]
fn assert_fails<T>(
    (optimizer, vars): &mut (Adamax, Vec<(String, Var)>),
    call: impl FnOnce(&mut Adamax) -> Result<T>,
    text: &str,
) {
    let before = Fingerprint::of(optimizer, vars);
    let error = call(optimizer).map(drop).unwrap_err();
    assert_eq!(error.to_string(), format!("Encoder: {text}"));
    assert_eq!(error.optimizer(), Some("Encoder"));
    assert!(Fingerprint::of(optimizer, vars) == before, "a call that failed has changed something");
}

#[track_caller]
fn assert_text<T>(result: Result<T>, text: &str) {
    assert_eq!(result.map(drop).unwrap_err().to_string(), text);
}

const OUT_OF_RANGE: &str = "is out of range: the table has 10 rows, so ids are 0 to 9";

#[test]
fn ids_out_of_range() {
    let weight = var(&noise(1, 40), &[10, 4], DType::F32);
    let before = bits(&weight);
    let own = || weight.as_tensor().clone();
    let embedding = Embedding::new(own()).unwrap().max_norm(0.01).unwrap();
    let table = Table::new(&weight).unwrap();
    let matrix = |id: i64, dtype| integers(&[1, 2, 3, 4, 5, 6, id, 8], dtype).reshape((2, 4)).unwrap();
    let everywhere = |ids: &Tensor, text: &str| {
        assert_text(table.lookup(ids), text);
        let error = table.lookup(ids).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::IdOutOfRange { rows: 10, .. }), "{error:?}");
        // Nothing is scaled down before all ids have been looked at.
        assert_eq!(embedding.forward(ids).unwrap_err().to_string(), text);
        for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
            let bag = EmbeddingBag::new(own(), pooling).unwrap().max_norm(0.01).unwrap();
            assert_text(bag.pool(&Bags::batch(ids).unwrap()), text);
        }
        let values = Tensor::ones((2, 4, 4), DType::F32, CPU).unwrap();
        assert_text(table.set_rows(ids, &values), text);
        assert_text(SparseGrad::touched_rows(&table.weight().unwrap().detach(), ids), text);
        assert_eq!(bits(&weight), before);
    };
    for dtype in ID_DTYPES {
        everywhere(&matrix(10, dtype), &format!("id 10 at position [1, 2] of ids {OUT_OF_RANGE}"));
        assert!(table.lookup(&matrix(9, dtype)).is_ok());
    }
    for dtype in [DType::I16, DType::I32, DType::I64] {
        everywhere(&matrix(-1, dtype), &format!("id -1 at position [1, 2] of ids {OUT_OF_RANGE}"));
    }
    // What is a row's number in its lower 32 bits alone, or with its sign turned.
    for id in [1 << 31, (1 << 32) + 1, 1 << 32, -(1 << 31), -(1 << 32) + 1, i64::MIN, i64::MAX, i64::MIN + 1] {
        everywhere(&matrix(id, DType::I64), &format!("id {id} at position [1, 2] of ids {OUT_OF_RANGE}"));
    }
    everywhere(
        &matrix(u32::MAX.into(), DType::U32),
        &format!("id 4294967295 at position [1, 2] of ids {OUT_OF_RANGE}"),
    );

    // The padding's number makes no other id allowed.
    let padded = Embedding::new(own()).unwrap().padding_idx(9).unwrap();
    let error = padded.forward(&integers(&[9, 10], DType::U32)).unwrap_err();
    assert_eq!(error.to_string(), format!("id 10 at position [1] of ids {OUT_OF_RANGE}"));
    let scalar = Tensor::new(12i64, CPU).unwrap();
    assert_text(table.lookup(&scalar), &format!("id 12 at position [] of ids {OUT_OF_RANGE}"));
    // A transposed matrix has its own positions, not those of its memory.
    let transposed = matrix(10, DType::I64).t().unwrap();
    assert_text(table.lookup(&transposed), &format!("id 10 at position [2, 1] of ids {OUT_OF_RANGE}"));
    let empty = Table::new(&Var::zeros((0, 4), DType::F32, CPU).unwrap()).unwrap();
    let text = "id 0 at position [0] of ids is out of range: the table has no rows";
    assert_text(empty.lookup(&integers(&[0], DType::U8)), text);
}

#[test]
fn ids_are_numbers_of_32_bits() {
    let huge = Table::new(&Tensor::zeros((3_000_000_000, 0), DType::F32, CPU).unwrap()).unwrap();
    assert_eq!(huge.rows(), 3_000_000_000);
    for dtype in [DType::U32, DType::I64] {
        // Not by candle's conversion, which need not know such numbers.
        let ids = |id: u32| match dtype {
            DType::U32 => Tensor::new(&[0, id], CPU).unwrap(),
            _ => Tensor::new(&[0, i64::from(id)], CPU).unwrap(),
        };
        assert_eq!(huge.lookup(&ids(2_999_999_999)).unwrap().dims(), [2, 0]);
        let text = "id 3000000000 at position [1] of ids is out of range: the table has 3000000000 rows, so ids are 0 \
                    to 2999999999";
        assert_text(huge.lookup(&ids(3_000_000_000)), text);
    }
    let text = "invalid `rows`: expected at most 4294967295 rows, got 5000000000";
    let too_large = Tensor::zeros((5_000_000_000, 0), DType::F32, CPU).unwrap();
    assert_text(Table::new(&too_large), text);
    assert_text(Embedding::new(too_large.clone()), text);
    assert_text(EmbeddingBag::new(too_large, Pooling::Sum), text);
}

#[test]
fn ids_that_are_no_integers() {
    let weight = var(&noise(1, 40), &[10, 4], DType::F32);
    let table = Table::new(&weight).unwrap();
    let bag = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Mean).unwrap();
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let ids = tensor(&[1.0, 2.0], &[1, 2], dtype);
        let text = format!("ids dtype mismatch: expected an integer dtype, got {dtype:?}");
        assert_text(table.lookup(&ids), &text);
        assert_text(bag.pool(&Bags::batch(&ids).unwrap()), &text);
        let values = Tensor::ones((1, 2, 4), DType::F32, CPU).unwrap();
        assert_text(table.set_rows(&ids, &values), &text);
        assert_text(SparseGrad::touched_rows(&values.reshape((2, 4)).unwrap(), &ids), &text);
        for mut optimizer in trained() {
            assert_fails(&mut optimizer, |optimizer| optimizer.reset_rows("items", &ids), &text);
        }
        let offsets = tensor(&[0.0], &[1], dtype);
        let text = format!("offsets dtype mismatch: expected an integer dtype, got {dtype:?}");
        assert_text(Bags::offsets(&integers(&[1, 2], DType::U32), &offsets), &text);
    }
}

#[test]
fn sparse_gradients_that_do_not_fit() {
    let good = tensor(&noise(5, 4), &[4], DType::F32);
    let with = |indices: Tensor, shape: &[usize], dtype| SparseGrad { indices, ..sparse(&[], shape, dtype) };
    let two = || integers(&[1, 9], DType::U32);
    let shape = |got: &str| format!("values shape mismatch for `items`: expected [2, 4], got {got}");
    let dtype = |got: &str| format!("values dtype mismatch for `items`: expected F32, got {got}");
    let index = |id: i64| format!("id {id} at position [1] of the indices of `items` {OUT_OF_RANGE}");
    let mut cases = vec![
        // Rank, dimensions of a row, count.
        (with(two(), &[2], DType::F32), shape("[2]")),
        (with(two(), &[8], DType::F32), shape("[8]")),
        (with(two(), &[2, 4, 1], DType::F32), shape("[2, 4, 1]")),
        (with(two(), &[2, 2, 2], DType::F32), shape("[2, 2, 2]")),
        (with(two(), &[2, 3], DType::F32), shape("[2, 3]")),
        (with(two(), &[4, 2], DType::F32), shape("[4, 2]")),
        (with(two(), &[3, 4], DType::F32), shape("[3, 4]")),
        (with(two(), &[1, 4], DType::F32), shape("[1, 4]")),
        (with(two(), &[0, 4], DType::F32), shape("[0, 4]")),
        (with(two(), &[10, 4], DType::F32), shape("[10, 4]")),
        (with(two(), &[], DType::F32), shape("[]")),
        (with(two(), &[2, 4], DType::F64), dtype("F64")),
        (with(two(), &[2, 4], DType::F16), dtype("F16")),
        (with(two(), &[2, 4], DType::BF16), dtype("BF16")),
        (
            with(two().reshape((1, 2)).unwrap(), &[2, 4], DType::F32),
            "indices shape mismatch for `items`: expected [2], got [1, 2]".to_owned(),
        ),
        (
            with(Tensor::new(1u32, CPU).unwrap(), &[1, 4], DType::F32),
            "indices shape mismatch for `items`: expected [1], got []".to_owned(),
        ),
        (
            with(tensor(&[1.0, 9.0], &[2], DType::F32), &[2, 4], DType::F32),
            "indices dtype mismatch for `items`: expected an integer dtype, got F32".to_owned(),
        ),
    ];
    for id in [-1, 10, 1 << 31, (1 << 32) + 1, i64::MIN] {
        cases.push((with(integers(&[1, id], DType::I64), &[2, 4], DType::F32), index(id)));
    }
    cases.extend(ID_DTYPES.map(|dtype| (with(integers(&[1, 10], dtype), &[2, 4], DType::F32), index(10))));
    for mut optimizer in trained() {
        let (bias, items) = (optimizer.1[0].1.clone(), optimizer.1[1].1.clone());
        for (bad, text) in &cases {
            let pairs = [(&bias, Gradient::Dense(&good)), (&items, bad.into())];
            assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients(pairs).map(drop), text);
        }
        // A dense gradient beside it, which is good, does not help.
        let dense = tensor(&noise(5, 40), &[10, 4], DType::F32);
        let pairs = [(&items, Gradient::Dense(&dense)), (&items, (&cases[0].0).into())];
        assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients(pairs).map(drop), &cases[0].1);
    }
    // Halves may have gradients of their own dtype or of f32, and a scalar has no rows.
    let half = var(&noise(1, 4), &[2, 2], DType::BF16);
    let mut optimizer = Adamax::from_named([("half", half.clone())], ParamsAdamax::default()).unwrap();
    let bad = sparse(&[1], &[1, 2], DType::F16);
    let text = "Adamax: values dtype mismatch for `half`: expected BF16 or F32, got F16";
    assert_text(optimizer.apply_gradients([(&half, &bad)]), text);
    for dtype in [DType::BF16, DType::F32] {
        optimizer.apply_gradients([(&half, &sparse(&[1], &[1, 2], dtype))]).unwrap();
    }
    let scalar = var(&[1.0], &[], DType::F32);
    let mut optimizer = Adamax::from_named([("scalar", scalar.clone())], ParamsAdamax::default()).unwrap();
    let text = "Adamax: invalid `scalar`: expected a tensor with rows, that is of rank 1 or more, got a scalar";
    assert_text(optimizer.apply_gradients([(&scalar, &sparse(&[0], &[1], DType::F32))]), text);
}

#[test]
fn sparse_gradients_in_the_memory_of_a_variable() {
    let text = "the gradient of `items` shares the storage of the var `items`: expected a tensor of its own, such as \
                `grad.copy()`";
    for mut optimizer in trained() {
        let (bias, items) = (optimizer.1[0].1.clone(), optimizer.1[1].1.clone());
        for values in [
            items.narrow(0, 0, 2),
            items.as_tensor().detach().narrow(0, 8, 2),
            items.get(1).unwrap().broadcast_as((2, 4)),
        ] {
            let bad = SparseGrad { indices: integers(&[1, 2], DType::U32), values: values.unwrap() };
            assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients([(&items, &bad)]).map(drop), text);
        }
        let values = bias.reshape((1, 4)).unwrap();
        let bad = SparseGrad { indices: integers(&[1], DType::U32), values };
        let text = text.replace("the var `items`", "the var `bias`");
        assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients([(&items, &bad)]).map(drop), &text);
    }
}

#[test]
fn pairs_of_gradients() {
    let (one, other) = (sparse(&[1], &[1, 4], DType::F32), sparse(&[2], &[1, 4], DType::F32));
    let stranger = var(&noise(1, 40), &[10, 4], DType::F32);
    for mut optimizer in trained() {
        let items = optimizer.1[1].1.clone();
        let pairs = [(&items, &one), (&items, &other)];
        let text = "two gradients for `items`; give their sum";
        assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients(pairs).map(drop), text);
        let pairs = [(&items, &one), (&stranger, &other)];
        let text = "the var of pair 1, of shape [10, 4], is not one of this optimizer's; add it first";
        assert_fails(&mut optimizer, |optimizer| optimizer.apply_gradients(pairs).map(drop), text);
    }
}

#[test]
fn steps_of_rows_that_do_not_fit() {
    let stranger = var(&noise(1, 40), &[10, 4], DType::F32);
    for mut optimizer in trained() {
        let (bias, items) = (optimizer.1[0].1.clone(), optimizer.1[1].1.clone());
        let rows = items.index_select(&integers(&[1, 2], DType::U32), 0).unwrap();
        let grads = rows.broadcast_mul(&bias).unwrap().sum_all().unwrap().backward().unwrap();
        let good = integers(&[1, 2], DType::U32);
        let ids = TouchedRows::Ids(&good);
        let listed = [(&items, ids), (&bias, TouchedRows::NonZero), (&items, TouchedRows::NonZero)];
        let text = "two gradients for `items`; give their sum";
        assert_fails(&mut optimizer, |optimizer| optimizer.step_rows(&grads, listed).map(drop), text);
        let listed = [(&items, ids), (&stranger, ids)];
        let text = "the var of pair 1, of shape [10, 4], is not one of this optimizer's; add it first";
        assert_fails(&mut optimizer, |optimizer| optimizer.step_rows(&grads, listed).map(drop), text);
        for (id, dtype) in
            ID_DTYPES.map(|dtype| (10, dtype)).into_iter().chain([(-1, DType::I64), (1 << 32, DType::I64)])
        {
            let bad = integers(&[1, 2, 3, id], dtype).reshape((2, 2)).unwrap();
            let text = format!("id {id} at position [1, 1] of the touched rows of `items` {OUT_OF_RANGE}");
            let listed = [(&items, TouchedRows::Ids(&bad))];
            assert_fails(&mut optimizer, |optimizer| optimizer.step_rows(&grads, listed).map(drop), &text);
        }
        let bad = tensor(&[1.0], &[1], DType::F32);
        let text = "touched rows dtype mismatch for `items`: expected an integer dtype, got F32";
        let listed = [(&items, TouchedRows::Ids(&bad))];
        assert_fails(&mut optimizer, |optimizer| optimizer.step_rows(&grads, listed).map(drop), text);
        optimizer.0.step_rows(&grads, [(&items, ids)]).unwrap();
    }
}

#[test]
fn rows_that_cannot_be_reset_or_appended() {
    let unknown = "unknown var `item`; known are: bias, items";
    for mut optimizer in trained() {
        let ids = integers(&[1, 2, 3, 10], DType::I64).reshape((2, 2)).unwrap();
        let text = format!("id 10 at position [1, 1] of ids {OUT_OF_RANGE}");
        assert_fails(&mut optimizer, |optimizer| optimizer.reset_rows("items", &ids), &text);
        let ids = integers(&[0, -1], DType::I32);
        let text = format!("id -1 at position [1] of ids {OUT_OF_RANGE}");
        assert_fails(&mut optimizer, |optimizer| optimizer.reset_rows("items", &ids), &text);
        assert_fails(&mut optimizer, |optimizer| optimizer.reset_rows("item", &integers(&[0], DType::U8)), unknown);

        for (shape, expected) in [
            (&[2usize, 3] as &[usize], "[2, 4]"),
            (&[4], "[4, 4]"),
            (&[2, 4, 1], "[2, 4]"),
            (&[1, 2, 4], "[1, 4]"),
            (&[], "[1, 4]"),
        ] {
            let rows = Tensor::ones(shape, DType::F32, CPU).unwrap();
            let text = format!("rows shape mismatch for `items`: expected {expected}, got {shape:?}");
            assert_fails(&mut optimizer, |optimizer| optimizer.append_rows("items", &rows), &text);
        }
        for dtype in [DType::F64, DType::F16, DType::U32] {
            let rows = Tensor::ones((2, 4), dtype, CPU).unwrap();
            let text = format!("rows dtype mismatch for `items`: expected F32, got {dtype:?}");
            assert_fails(&mut optimizer, |optimizer| optimizer.append_rows("items", &rows), &text);
        }
        let rows = Tensor::ones((2, 4), DType::F32, CPU).unwrap();
        assert_fails(&mut optimizer, |optimizer| optimizer.append_rows("item", &rows), unknown);
    }
    let huge = Var::zeros((3_000_000_000, 0), DType::F32, CPU).unwrap();
    let params = || ParamsAdamax { name: "Encoder".into(), ..Default::default() };
    let mut optimizer = Adamax::from_named([("huge", huge.clone())], params()).unwrap();
    let text = "Encoder: invalid `rows`: expected at most 4294967295 rows in all, got 6000000000";
    assert_text(optimizer.append_rows("huge", &huge), text);
    let scalar = var(&[1.0], &[], DType::F32);
    let mut optimizer = Adamax::from_named([("scalar", scalar.clone())], params()).unwrap();
    let text = "Encoder: invalid `scalar`: expected a tensor with rows, that is of rank 1 or more, got a scalar";
    assert_text(optimizer.append_rows("scalar", &scalar), text);
    assert_text(optimizer.reset_rows("scalar", &integers(&[0], DType::U8)), text);
}

#[test]
fn rows_that_cannot_be_set() {
    let weight = var(&noise(1, 40), &[10, 4], DType::F32);
    let before = bits(&weight);
    let table = Table::new(&weight).unwrap();
    let ids = integers(&[1, 2], DType::U32);
    for (shape, got) in
        [(&[2usize, 3] as &[usize], "[2, 3]"), (&[1, 4], "[1, 4]"), (&[8], "[8]"), (&[1, 2, 4], "[1, 2, 4]")]
    {
        let text = format!("values shape mismatch for `weight`: expected [2, 4], got {got}");
        assert_text(table.set_rows(&ids, &tensor(&vec![1.0; shape.iter().product()], shape, DType::F32)), &text);
    }
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        let text = format!("values dtype mismatch for `weight`: expected F32, got {dtype:?}");
        assert_text(table.set_rows(&ids, &Tensor::ones((2, 4), dtype, CPU).unwrap()), &text);
    }
    let one = Tensor::ones((2, 4), DType::F32, CPU).unwrap();
    let text = format!("id -3 at position [1] of ids {OUT_OF_RANGE}");
    assert_text(table.set_rows(&integers(&[1, -3], DType::I64), &one), &text);
    let frozen = Table::new(&weight.as_tensor().detach()).unwrap();
    let text = "invalid `weight`: expected a variable, got a tensor that cannot be changed";
    assert_text(frozen.set_rows(&ids, &one), text);
    assert_eq!(bits(&weight), before);
}

#[test]
fn bags_that_do_not_fit() {
    let ids = integers(&[1, 2, 3], DType::U32);
    let matrix = ids.reshape((1, 3)).unwrap();
    let of = |offsets: &[i64]| Bags::offsets(&ids, &integers(offsets, DType::I64));
    for (offsets, text) in [
        (&[0i64, 2, 1] as &[i64], "invalid `offsets[2]`: expected at least 2, where the bag before begins, got 1"),
        (&[0, 2, -1], "invalid `offsets[2]`: expected at least 2, where the bag before begins, got -1"),
        (&[0, 4], "invalid `offsets[1]`: expected at most 3, the number of ids, got 4"),
        (&[0, (1 << 32) + 1], "invalid `offsets[1]`: expected at most 3, the number of ids, got 4294967297"),
        (
            &[0, 1 << 63],
            "invalid `offsets[1]`: expected at least 0, where the bag before begins, got -9223372036854775808",
        ),
        (&[1, 2], "invalid `offsets[0]`: expected 0, where the first bag begins, got 1"),
        (&[-1], "invalid `offsets[0]`: expected 0, where the first bag begins, got -1"),
        (&[], "invalid `offsets`: expected an offset for the bag of the 3 ids, got none"),
    ] {
        assert_text(of(offsets), text);
    }
    assert_text(Bags::offsets(&matrix, &ids), "invalid `ids`: expected a row, [n], got [1, 3]");
    assert_text(Bags::offsets(&ids, &matrix), "invalid `offsets`: expected a row, [n], got [1, 3]");
    assert_text(Bags::batch(&ids), "invalid `ids`: expected a matrix, [bags, n], got [3]");
    let cube = matrix.unsqueeze(0).unwrap();
    assert_text(Bags::batch(&cube), "invalid `ids`: expected a matrix, [bags, n], got [1, 1, 3]");

    for (shape, got) in [(&[3usize] as &[usize], "[3]"), (&[3, 1], "[3, 1]"), (&[1, 2], "[1, 2]"), (&[], "[]")] {
        let weights = Tensor::ones(shape, DType::F32, CPU).unwrap();
        let text = format!("weights shape mismatch for `bags`: expected [1, 3], got {got}");
        assert_text(Bags::batch(&matrix).unwrap().weights(&weights), &text);
    }
    let weight = var(&noise(1, 40), &[10, 4], DType::F32);
    // Rows are not scaled down either by a lookup that fails.
    let layer = |pooling| EmbeddingBag::new(weight.as_tensor().clone(), pooling).unwrap().max_norm(0.01).unwrap();
    let with = |dtype| Bags::batch(&matrix).unwrap().weights(&Tensor::ones((1, 3), dtype, CPU).unwrap()).unwrap();
    for pooling in [Pooling::Mean, Pooling::Max] {
        let text = format!(
            "invalid `weights`: expected no weights with this pooling, since only Pooling::Sum takes any, got weights \
             with Pooling::{pooling:?}"
        );
        assert_text(layer(pooling).pool(&with(DType::F32)), &text);
    }
    for dtype in [DType::F64, DType::F16, DType::BF16, DType::U32] {
        let text = format!("weights dtype mismatch for `bags`: expected F32, as the table, got {dtype:?}");
        assert_text(layer(Pooling::Sum).pool(&with(dtype)), &text);
    }
    assert_eq!(bits(&weight), bits(&var(&noise(1, 40), &[10, 4], DType::F32)));
}

#[test]
fn layers_that_cannot_be() {
    let embedding = |shape: &[usize]| Embedding::new(Tensor::zeros(shape, DType::F32, CPU).unwrap());
    let bag = |shape: &[usize]| EmbeddingBag::new(Tensor::zeros(shape, DType::F32, CPU).unwrap(), Pooling::Sum);
    for (shape, got) in [(&[3usize] as &[usize], "[3]"), (&[3, 2, 1], "[3, 2, 1]"), (&[], "[]")] {
        let text = format!("invalid `weight`: expected a matrix, [rows, dim], got the shape {got}");
        assert_text(embedding(shape), &text);
        assert_text(bag(shape), &text);
    }
    for dtype in ID_DTYPES {
        let weight = Tensor::zeros((3, 2), dtype, CPU).unwrap();
        let text = format!("table dtype mismatch for `weight`: expected F64, F32, F16 or BF16, got {dtype:?}");
        assert_text(Table::new(&weight), &text);
        assert_text(Embedding::new(weight.clone()), &text);
        assert_text(EmbeddingBag::new(weight, Pooling::Max), &text);
    }
    let text = "invalid `weight`: expected a tensor with rows, that is of rank 1 or more, got a scalar";
    assert_text(Table::new(&tensor(&[1.0], &[], DType::F32)), text);
    let text = "invalid `gradient`: expected a tensor with rows, that is of rank 1 or more, got a scalar";
    assert_text(SparseGrad::nonzero_rows(&tensor(&[1.0], &[], DType::F32)), text);
    let ids = integers(&[0], DType::U32);
    assert_text(SparseGrad::touched_rows(&tensor(&[1.0], &[], DType::F32), &ids), text);

    let weight = var(&noise(1, 40), &[10, 4], DType::F32);
    let text = "invalid `weight`: expected a variable, or a tensor that needs no gradient, such as `weight.detach()`, \
                got one that is computed from variables";
    assert_text(Embedding::new((weight.as_tensor() * 2.0).unwrap()), text);
    let own = || weight.as_tensor().clone();
    for id in [10, usize::MAX, (1 << 32) + 1] {
        let text = format!("invalid `padding_idx`: expected an id below the 10 rows, got {id}");
        assert_text(Embedding::new(own()).unwrap().padding_idx(id), &text);
        assert_text(EmbeddingBag::new(own(), Pooling::Max).unwrap().padding_idx(id), &text);
    }
    for (max_norm, got) in
        [(0.0, "0"), (-0.0, "-0"), (-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")]
    {
        let text = format!("invalid `max_norm`: expected a finite number above 0, got {got}");
        assert_text(Embedding::new(own()).unwrap().max_norm(max_norm), &text);
        assert_text(EmbeddingBag::new(own(), Pooling::Mean).unwrap().max_norm(max_norm), &text);
    }
    let text =
        "invalid `max_norm`: expected no limit for a weight that is not a variable, since it cannot be scaled, got 1.5";
    assert_text(Embedding::new(own().detach()).unwrap().max_norm(1.5), text);
    assert_text(EmbeddingBag::new(own().detach(), Pooling::Sum).unwrap().max_norm(1.5), text);
}

/// Rows without columns have nothing to update, and that is no error.
#[test]
fn rows_of_no_columns() {
    let weight = Var::zeros((3_000_000_000, 0), DType::F32, CPU).unwrap();
    let layer = Embedding::new(weight.as_tensor().clone()).unwrap();
    let last = Tensor::new(&[2_999_999_999i64, 1], CPU).unwrap();
    for kernel in [Kernel::Portable, Kernel::Auto] {
        let mut optimizer = Adamax::from_named([("w", weight.clone())], ParamsAdamax::default()).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        optimizer.backward_step(&layer.forward(&last).unwrap().sum_all().unwrap()).unwrap();
        assert_eq!(optimizer.state("w").unwrap().step, 1);
    }
    layer.max_norm(1.0).unwrap().forward(&last).unwrap();
}
