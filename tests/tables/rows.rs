//! Rows of tables: looked up by ids of every kind, set, scaled, reset, appended and stepped, beside candle's dense
//! operations and beside optimizers that come by the same state another way.

use candle_adamax::{
    AccumulatedGrad, Adamax, Bags, Ema, Embedding, EmbeddingBag, Gradient, Kernel, MissingGradients, ParamsAdamax,
    Pooling, SparseGrad, Table, TouchedRows,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module as _;

use crate::common::folder::Folder;
use crate::common::{DTYPES, Fingerprint, ID_DTYPES, KERNELS, bits, ids as ids_of, noise, tensor, values, var};

const CPU: &Device = &Device::Cpu;
/// A loss with another factor for each element, so that no two gradients are the same.
fn loss(rows: &Tensor) -> Tensor {
    let factors = tensor(&noise(77, rows.elem_count()), rows.dims(), rows.dtype());
    (rows * factors).unwrap().sum_all().unwrap()
}

fn optimizer(var: &Var, params: ParamsAdamax, kernel: Kernel) -> (Adamax, Vec<(String, Var)>) {
    let vars = vec![("w".to_owned(), var.clone())];
    let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
    optimizer.set_kernel(kernel).unwrap();
    (optimizer, vars)
}

/// That a lookup has candle's values, and that the step after it is the one of candle's dense gradient, bit for bit:
/// from a state of zeros, a row with a gradient of zero stays as it is.
#[track_caller]
fn assert_as_candle(weight: &Var, ids: &Tensor) {
    for kernel in KERNELS {
        let weight = Var::from_tensor(&weight.copy().unwrap()).unwrap();
        let own = Var::from_tensor(&weight.copy().unwrap()).unwrap();
        let table = Table::new(&weight).unwrap();
        let got = table.lookup(ids).unwrap();
        let shape: Vec<usize> = ids.dims().iter().chain(&weight.dims()[1..]).copied().collect();
        let flat = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
        let want = own.index_select(&flat, 0).unwrap().reshape(shape).unwrap();
        assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()));
        assert_eq!(bits(&got), bits(&want));
        let (mut optimizer_of_table, vars) = optimizer(&weight, ParamsAdamax::default(), kernel);
        let (mut optimizer_of_candle, own_vars) = optimizer(&own, ParamsAdamax::default(), kernel);
        optimizer_of_table.step(&loss(&got).backward().unwrap()).unwrap();
        optimizer_of_candle.step(&loss(&want).backward().unwrap()).unwrap();
        let expected = Fingerprint::of(&optimizer_of_candle, &own_vars);
        assert!(Fingerprint::of(&optimizer_of_table, &vars) == expected, "{kernel:?} {:?}", ids.dims());
    }
}

#[test]
fn ids_of_every_dtype_and_shape() {
    for dtype in ID_DTYPES {
        let weight = var(&noise(1, 30), &[10, 3], DType::F32);
        let all: Vec<i64> = (0..24).map(|i| i * 7 % 11 % 10).collect();
        let all = Tensor::new(all, CPU).unwrap().to_dtype(dtype).unwrap();
        for shape in [&[24usize] as &[usize], &[4, 6], &[2, 3, 4], &[2, 1, 3, 4], &[24, 1]] {
            assert_as_candle(&weight, &all.reshape(shape).unwrap());
        }
        assert_as_candle(&weight, &all.get(5).unwrap());
        // Transposed, and a part of something larger: elements that are not one after another.
        let matrix = all.reshape((4, 6)).unwrap();
        let parts =
            [matrix.t(), matrix.narrow(1, 2, 3), matrix.narrow(0, 1, 2), all.get(3).unwrap().broadcast_as((2, 2))];
        parts.into_iter().for_each(|ids| assert_as_candle(&weight, &ids.unwrap()));
        // Of no ids there are no rows, and no row is updated.
        let none = all.narrow(0, 0, 0).unwrap();
        for (ids, dims) in [(none.clone(), vec![0, 3]), (none.reshape((2, 0, 3)).unwrap(), vec![2, 0, 3, 3])] {
            let rows = Table::new(&weight).unwrap().lookup(&ids).unwrap();
            assert_eq!(rows.dims(), dims);
            let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..ParamsAdamax::default() };
            let (mut optimizer, _) = optimizer(&weight, params, Kernel::Auto);
            optimizer.step(&rows.sum_all().unwrap().backward().unwrap()).unwrap();
            assert_eq!(optimizer.report().missing().collect::<Vec<_>>(), ["w"]);
            assert_eq!(bits(&weight), bits(&tensor(&noise(1, 30), &[10, 3], DType::F32)));
        }
    }
}

#[test]
fn tables_of_every_rank() {
    let ids = Tensor::new(&[[1i64, 9, 3], [3, 0, 3]], CPU).unwrap();
    for dtype in DTYPES {
        for shape in [&[10usize] as &[usize], &[10, 3], &[10, 2, 3], &[10, 2, 1, 3]] {
            let n = shape.iter().product();
            let weight = var(&noise(1, n), shape, dtype);
            // Halves are summed in f32, which candle does not, so each row is there once.
            let once = Tensor::new(&[[1i64, 9], [3, 0]], CPU).unwrap();
            let is_half = dtype.size_in_bytes() == 2;
            assert_as_candle(&weight, if is_half { &once } else { &ids });

            // The same rows as a gradient from the outside.
            let mut dims = shape.to_vec();
            dims[0] = 3;
            let of_rows = tensor(&noise(3, n / 10 * 3), &dims, dtype);
            let grad = SparseGrad { indices: Tensor::new(&[7u8, 2, 4], CPU).unwrap(), values: of_rows.clone() };
            let whole = Tensor::zeros(shape, dtype, CPU).unwrap();
            for (k, row) in [7, 2, 4].into_iter().enumerate() {
                whole.slice_set(&of_rows.narrow(0, k, 1).unwrap().contiguous().unwrap(), 0, row).unwrap();
            }
            for kernel in KERNELS {
                let run = |grad: Gradient<'_>| {
                    let own = Var::from_tensor(&weight.copy().unwrap()).unwrap();
                    let (mut optimizer, vars) = optimizer(&own, ParamsAdamax::default(), kernel);
                    optimizer.apply_gradients([(&own, grad)]).unwrap();
                    Fingerprint::of(&optimizer, &vars)
                };
                assert!(run((&grad).into()) == run((&whole).into()), "{dtype:?} {shape:?} {kernel:?}");
            }
            // And found again in that of all rows.
            for found in [
                SparseGrad::nonzero_rows(&whole).unwrap(),
                SparseGrad::touched_rows(&whole, &Tensor::new(&[[4i32, 7], [2, 4]], CPU).unwrap()).unwrap(),
            ] {
                assert_eq!(values(&found.indices), [2.0, 4.0, 7.0]);
                assert_eq!(bits(&found.values), bits(&whole.index_select(&ids_of(&[2, 4, 7]), 0).unwrap()));
            }
        }
    }
}

#[test]
fn rows_that_are_set() {
    for dtype in DTYPES {
        for shape in [&[6usize] as &[usize], &[6, 2], &[6, 2, 2]] {
            let n: usize = shape.iter().product();
            let weight = var(&noise(1, n), shape, dtype);
            let table = Table::new(&weight).unwrap();
            let (mut optimizer, vars) = optimizer(&weight, ParamsAdamax::default(), Kernel::Auto);
            optimizer.apply_gradients([(&weight, &tensor(&noise(2, n), shape, dtype))]).unwrap();
            let state = optimizer.state("w").unwrap();
            let before = weight.copy().unwrap();
            let row = |of: &Tensor, i| bits(&of.narrow(0, i, 1).unwrap());

            // Of the three values for row 4 the last one stays.
            let ids = Tensor::new(&[[4i64, 1], [4, 4]], CPU).unwrap();
            let mut dims = shape.to_vec();
            dims[0] = 4;
            let rows = tensor(&noise(3, n / 6 * 4), &dims, dtype);
            let all: Vec<usize> = [2, 2].iter().chain(&shape[1..]).copied().collect();
            table.set_rows(&ids, &rows.reshape(all).unwrap()).unwrap();
            for i in 0..6 {
                let expected = match i {
                    4 => row(&rows, 3),
                    1 => row(&rows, 1),
                    i => row(&before, i),
                };
                assert_eq!(row(&weight, i), expected, "{dtype:?} {shape:?} row {i}");
            }

            // Values that are rows of the table itself are read before one is written.
            let before = weight.copy().unwrap();
            table.set_rows(&ids_of(&[1, 2, 3]), &weight.narrow(0, 0, 3).unwrap()).unwrap();
            let moved = before.index_select(&ids_of(&[0, 0, 1, 2, 4, 5]), 0).unwrap();
            assert_eq!(bits(&weight), bits(&moved));
            // No ids, no change.
            table.set_rows(&ids_of(&[]), &rows.narrow(0, 0, 0).unwrap()).unwrap();
            assert_eq!(bits(&weight), bits(&moved));
            // The moments are those before.
            let after = optimizer.state("w").unwrap();
            assert_eq!((bits(&after.exp_avg), bits(&after.exp_inf)), (bits(&state.exp_avg), bits(&state.exp_inf)));
            assert_eq!(Fingerprint::of(&optimizer, &vars).bits()["w"][0], bits(&moved));
        }
    }
    // Values that are not contiguous.
    let weight = Var::zeros((3, 2), DType::F32, CPU).unwrap();
    let turned = tensor(&[1.0, 2.0, 3.0, 4.0], &[2, 2], DType::F32).t().unwrap();
    Table::new(&weight).unwrap().set_rows(&ids_of(&[2, 0]), &turned).unwrap();
    assert_eq!(values(&weight), [2.0, 4.0, 0.0, 0.0, 1.0, 3.0]);
}

/// What a call does to a variable of `rows` rows: gradients of some of the first ten, or of all, with none elsewhere.
fn call(optimizer: &mut Adamax, weight: &Var, nth: u64, dense: bool) {
    let (rows, dtype) = (weight.dim(0).unwrap(), weight.dtype());
    if dense {
        let grad = tensor(&noise(50 + nth, 20), &[10, 2], dtype);
        let rest = Tensor::zeros((rows - 10, 2), dtype, CPU).unwrap();
        optimizer.apply_gradients([(weight, &Tensor::cat(&[grad, rest], 0).unwrap())]).unwrap();
    } else {
        let indices = Tensor::new(&[nth as i64 % 10, 3, 9, 3], CPU).unwrap();
        let values = tensor(&noise(50 + nth, 8), &[4, 2], dtype);
        optimizer.apply_gradients([(weight, &SparseGrad { indices, values })]).unwrap();
    }
}

/// Accumulation or not, gradients of rows or dense ones, both kernels, all dtypes.
fn ways() -> impl Iterator<Item = (ParamsAdamax, bool, Kernel, DType)> {
    [1, 3].into_iter().flat_map(move |gradient_accumulation_steps| {
        [false, true].into_iter().flat_map(move |dense| {
            KERNELS.into_iter().flat_map(move |kernel| {
                DTYPES.map(|dtype| {
                    let ema = dense.then_some(Ema { momentum: 0.5, overwrite_frequency: None });
                    let params = ParamsAdamax { gradient_accumulation_steps, ema, ..ParamsAdamax::default() };
                    (params, dense, kernel, dtype)
                })
            })
        })
    })
}

/// `of` with these rows set to zero.
fn cleared(of: &Tensor, rows: &[usize]) -> Tensor {
    let mask: Vec<f64> = (0..of.dim(0).unwrap()).map(|row| f64::from(!rows.contains(&row))).collect();
    let mask = tensor(&mask, &[mask.len(), 1], of.dtype());
    // A sum with 0 makes the products' -0 a 0.
    (of.broadcast_mul(&mask).unwrap() + 0.0).unwrap()
}

#[test]
fn rows_that_are_reset_begin_anew() {
    for (params, dense, kernel, dtype) in ways() {
        let weight = var(&noise(1, 20), &[10, 2], dtype);
        let (mut reset, vars) = optimizer(&weight, params.clone(), kernel);
        // Where three calls are accumulated, the last two of five are pending.
        (0..5).for_each(|nth| call(&mut reset, &weight, nth, dense));
        let own = Var::from_tensor(&weight.copy().unwrap()).unwrap();
        let (mut edited, own_vars) = optimizer(&own, params, kernel);
        let mut snapshot = reset.snapshot().unwrap();
        let state = snapshot.vars.get_mut("w").unwrap();
        state.exp_avg = cleared(&state.exp_avg, &[3, 4]);
        state.exp_inf = cleared(&state.exp_inf, &[3, 4]);
        match state.accumulated.as_mut().map(|(sum, _)| sum) {
            None => assert_eq!(snapshot.params.gradient_accumulation_steps, 1),
            Some(AccumulatedGrad::Dense(sum)) => *sum = cleared(sum, &[3, 4]),
            Some(AccumulatedGrad::Rows(sum)) => {
                assert_eq!(values(&sum.indices), [3.0, 4.0, 9.0]);
                sum.indices = sum.indices.narrow(0, 2, 1).unwrap();
                sum.values = sum.values.narrow(0, 2, 1).unwrap();
            }
            _ => unreachable!("no other one is made here"),
        }
        edited.restore(&snapshot).unwrap();
        reset.reset_rows("w", &Tensor::new(&[[3i64], [4], [3]], CPU).unwrap()).unwrap();
        assert!(Fingerprint::of(&reset, &vars) == Fingerprint::of(&edited, &own_vars), "{dense} {kernel:?} {dtype:?}");
        for nth in 5..10 {
            call(&mut reset, &weight, nth, dense);
            call(&mut edited, &own, nth, dense);
            let (got, expected) = (Fingerprint::of(&reset, &vars), Fingerprint::of(&edited, &own_vars));
            assert!(got == expected, "call {nth}, {dense} {kernel:?} {dtype:?}");
        }
        let before = Fingerprint::of(&reset, &vars);
        reset.reset_rows("w", &ids_of(&[])).unwrap();
        assert!(Fingerprint::of(&reset, &vars) == before);
    }
}

#[test]
fn rows_that_are_appended_continue_as_if_they_had_been_there() {
    for (params, dense, kernel, dtype) in ways() {
        let context = format!("{} steps, {dense} {kernel:?} {dtype:?}", params.gradient_accumulation_steps);
        let first = tensor(&noise(1, 20), &[10, 2], dtype);
        // Not contiguous, as it may come.
        let rest = tensor(&noise(2, 8), &[2, 4], dtype).t().unwrap();
        let old = Var::from_tensor(&first).unwrap();
        let large = Var::from_tensor(&Tensor::cat(&[&first, &rest], 0).unwrap()).unwrap();
        let (mut grown, _) = optimizer(&old, params.clone(), kernel);
        let (mut expected, large_vars) = optimizer(&large, params.clone(), kernel);
        for nth in 0..5 {
            call(&mut grown, &old, nth, dense);
            call(&mut expected, &large, nth, dense);
        }
        let new = grown.append_rows("w", &rest).unwrap();
        let vars = vec![("w".to_owned(), new.clone())];
        assert_eq!((new.dims(), new.dtype()), ([14, 2].as_slice(), dtype));
        let state = grown.state("w").unwrap();
        for moments in [&state.exp_avg, &state.exp_inf] {
            assert_eq!(bits(&moments.narrow(0, 10, 4).unwrap()), [0; 8]);
        }
        assert!(Fingerprint::of(&grown, &vars) == Fingerprint::of(&expected, &large_vars), "{context}");

        // A file of it is one of the large variable.
        let folder = Folder::new();
        let path = folder.file("state");
        grown.save(&path).unwrap();
        let loaded_var = Var::from_tensor(&new.copy().unwrap()).unwrap();
        let (mut loaded, loaded_vars) = optimizer(&loaded_var, params, kernel);
        loaded.load(&path).unwrap();

        for nth in 5..10 {
            // Of the new rows, too.
            let grad = SparseGrad {
                indices: Tensor::new(&[12u32, 3, 13, 12], CPU).unwrap(),
                values: tensor(&noise(90 + nth, 8), &[4, 2], dtype),
            };
            let all = [
                (&mut grown, &new, &vars),
                (&mut expected, &large, &large_vars),
                (&mut loaded, &loaded_var, &loaded_vars),
            ];
            let all = all.map(|(optimizer, weight, vars)| {
                call(optimizer, weight, nth, dense);
                if !dense {
                    optimizer.apply_gradients([(weight, &grad)]).unwrap();
                }
                Fingerprint::of(optimizer, vars)
            });
            assert!(all[0] == all[1], "call {nth}, {context}");
            assert!(all[2] == all[1], "call {nth} after the file, {context}");
        }

        // The old variable is nobody's any more, and its memory is free; that of the new one is not.
        let grad = tensor(&noise(9, 20), &[10, 2], dtype);
        let text = "Adamax: a pair has `w` as it was before `append_rows`, which trains nothing any more: use the var that \
                    `append_rows` has returned";
        assert_eq!(grown.apply_gradients([(&old, &grad)]).unwrap_err().to_string(), text);
        let part = |of: &Var| SparseGrad { indices: ids_of(&[0]), values: of.narrow(0, 0, 1).unwrap() };
        let text = "Adamax: the gradient of `w` shares the storage of the var `w`: expected a tensor of its own, such \
                    as `grad.copy()`";
        assert_eq!(grown.apply_gradients([(&new, &part(&new))]).unwrap_err().to_string(), text);
        if !dense {
            grown.apply_gradients([(&new, &part(&old))]).unwrap();
        }
    }
}

#[test]
fn rows_are_appended_to_any_rank_again_and_again() {
    for kernel in KERNELS {
        for shape in [&[2usize] as &[usize], &[2, 3], &[2, 3, 2], &[0, 3], &[2, 0]] {
            let n = shape.iter().product();
            let weight = var(&noise(1, n), shape, DType::F32);
            let (mut optimizer, _) = optimizer(&weight, ParamsAdamax::default(), kernel);
            let mut all = weight.as_tensor().copy().unwrap();
            for more in [0usize, 1, 5] {
                let mut dims = shape.to_vec();
                dims[0] = more;
                let rows = tensor(&noise(2, dims.iter().product()), &dims, DType::F32);
                let grown = optimizer.append_rows("w", &rows).unwrap();
                all = Tensor::cat(&[&all, &rows], 0).unwrap();
                assert_eq!(grown.dims(), all.dims());
                assert_eq!(bits(&grown), bits(&all));
            }
        }
    }
}

/// A model with a layer of candle's, and one with a layer of this crate's.
#[test]
fn steps_of_rows_are_those_of_this_crates_embedding() {
    for (params, dense, kernel, dtype) in ways() {
        if dense {
            continue;
        }
        for nonzero in [false, true] {
            let weight = var(&noise(1, 20), &[10, 2], dtype);
            let own = Var::from_tensor(&weight.copy().unwrap()).unwrap();
            let theirs = candle_nn::Embedding::new(weight.as_tensor().clone(), 2);
            let ours = Embedding::new(own.as_tensor().clone()).unwrap();
            let (mut stepped, vars) = optimizer(&weight, params.clone(), kernel);
            let (mut expected, own_vars) = optimizer(&own, params.clone(), kernel);
            for nth in 0..7u32 {
                // candle sums halves in their own dtype, so in those no row is there twice.
                let again = if dtype.size_in_bytes() == 2 { (nth + 5) % 10 } else { nth };
                let ids = Tensor::new(&[[nth, (nth + 3) % 10], [again, (nth + 4) % 10]], CPU).unwrap();
                let touched = if nonzero { TouchedRows::NonZero } else { TouchedRows::Ids(&ids) };
                let before = weight.copy().unwrap();
                let grads = loss(&theirs.forward(&ids).unwrap()).backward().unwrap();
                stepped.step_rows(&grads, [(&weight, touched)]).unwrap();
                expected.step(&loss(&ours.forward(&ids).unwrap()).backward().unwrap()).unwrap();
                let (got, want) = (Fingerprint::of(&stepped, &vars), Fingerprint::of(&expected, &own_vars));
                assert!(got == want, "step {nth} of {dtype:?}, {kernel:?}, {nonzero}");
                if params.gradient_accumulation_steps == 1 {
                    // The other rows are not touched, whatever their moments are.
                    let ids = values(&ids);
                    for row in (0..10).filter(|&row| !ids.contains(&(row as f64))) {
                        assert_eq!(bits(&weight.get(row).unwrap()), bits(&before.get(row).unwrap()));
                    }
                }
            }
            assert_ne!(bits(&weight), bits(&tensor(&noise(1, 20), &[10, 2], dtype)), "nothing was trained");
        }
    }
}

#[test]
fn rows_above_max_norm_are_scaled_where_they_are_looked_up() {
    // Norms: 5, 10, 13, 0.5, 15, 0.
    let numbers = [3.0, 4.0, -6.0, 8.0, 5.0, 12.0, 0.3, 0.4, 9.0, 12.0, 0.0, 0.0];
    let ids = [1u32, 0, 3, 1, 5, 2];
    for dtype in DTYPES {
        let half_place = match dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            _ => 0.0,
        };
        let before = tensor(&numbers, &[6, 2], dtype);
        for way in [None, Some(Pooling::Sum), Some(Pooling::Mean), Some(Pooling::Max)] {
            let weight = Var::from_tensor(&before).unwrap();
            let (own, table) = (weight.as_tensor().clone(), Table::new(&weight).unwrap());
            let got = match way {
                None => Embedding::new(own).unwrap().max_norm(5.0).unwrap().forward(&ids_of(&ids)),
                Some(pooling) => {
                    let bags = Bags::batch(&ids_of(&ids).unsqueeze(1).unwrap()).unwrap();
                    Ok(EmbeddingBag::new(own, pooling).unwrap().max_norm(5.0).unwrap().pool(&bags).unwrap())
                }
            };
            let got = got.unwrap();
            // The lookup leaves the weight alone, which a graph may have used; asking for it scales it.
            assert_eq!(bits(&weight), bits(&before), "{dtype:?} {way:?}");
            let weight = table.weight().unwrap();
            // At the limit, below it, or not looked up.
            for row in [0, 3, 4, 5] {
                assert_eq!(bits(&before.get(row).unwrap()), bits(&weight.get(row).unwrap()), "{dtype:?} row {row}");
            }
            for row in [1, 2] {
                let (old, new) = (before.get(row).unwrap(), weight.get(row).unwrap());
                let old = old.to_dtype(DType::F64).unwrap();
                let norm = old.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f64>().unwrap();
                let want = values(&old.affine(5.0 / norm, 0.0).unwrap());
                for (got, want) in values(&new).into_iter().zip(want) {
                    // PyTorch divides by the norm plus 1e-7.
                    let error = (half_place + 3e-7) * want.abs();
                    assert!((got - want).abs() <= error, "{dtype:?} row {row}: expected {want}, got {got}");
                }
            }
            // The lookup has had the rows as they are now.
            assert_eq!(bits(&got), bits(&weight.index_select(&ids_of(&ids), 0).unwrap()), "{dtype:?} {way:?}");
        }
        // Without it nothing is scaled, by another layer on the same weight.
        let weight = Var::from_tensor(&before).unwrap();
        let limited = Embedding::new(weight.as_tensor().clone()).unwrap().max_norm(5.0).unwrap();
        Embedding::new(weight.as_tensor().clone()).unwrap().forward(&ids_of(&ids)).unwrap();
        assert_eq!(bits(&weight), bits(&before));
        // The row of the padding is scaled as any other, as in PyTorch.
        let limited = limited.padding_idx(1).unwrap();
        let got = limited.forward(&ids_of(&[1, 1, 0])).unwrap();
        let want = limited.embeddings().unwrap().index_select(&ids_of(&[1, 1, 0]), 0).unwrap();
        assert_eq!(bits(&got), bits(&want));
        for (got, want) in values(&got).into_iter().zip([-3.0, 4.0]) {
            assert!((got - want).abs() < 0.02, "{dtype:?}: expected {want}, got {got}");
        }
        assert_eq!(bits(&weight.get(2).unwrap()), bits(&before.get(2).unwrap()), "a row that was not looked up");
    }
}
