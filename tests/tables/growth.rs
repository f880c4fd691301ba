//! Rows that begin anew, rows that are added, and steps of some rows of candle's dense gradients.

use candle_adamax::{
    AccumulatedGrad, Adamax, Ema, Embedding, Kernel, MissingGradients, ParamsAdamax, StepCount, TouchedRows,
};
use candle_core::{DType, Var};
use candle_nn::{Module as _, VarMap};

use crate::common::folder::Folder;
use crate::common::{DTYPES, Fingerprint, ID_DTYPES, KERNELS, bits, ids, noise, tensor, values, var};
use crate::support::{coarse, ids_of, noisy, sparse};

fn params() -> ParamsAdamax {
    ParamsAdamax { lr: 0.05.into(), missing_gradients: MissingGradients::Allow, ..Default::default() }
}

/// An optimizer of one table of noise that has made two steps of all its rows.
#[track_caller]
fn trained(shape: &[usize], dtype: DType, kernel: Kernel, params: ParamsAdamax) -> (Adamax, Var) {
    let n = shape.iter().product();
    let w = var(&noise(1, n), shape, dtype);
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    optimizer.set_kernel(kernel).unwrap();
    for call in 0..2 {
        optimizer.apply_gradients([(&w, &tensor(&coarse(10 + call, n), shape, dtype))]).unwrap();
    }
    (optimizer, w)
}

/// The bits of weight and moments.
#[track_caller]
fn state(optimizer: &Adamax, w: &Var) -> [Vec<u64>; 3] {
    let state = optimizer.state("w").unwrap();
    [bits(w), bits(&state.exp_avg), bits(&state.exp_inf)]
}

#[test]
fn rows_that_begin_anew_have_no_moments() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            for (shape, len) in [(&[6usize][..], 1), (&[6, 3], 3), (&[6, 2, 2], 4)] {
                for id_dtype in ID_DTYPES {
                    let (mut optimizer, w) = trained(shape, dtype, kernel, params());
                    let before = state(&optimizer, &w);
                    optimizer.reset_rows("w", &ids_of(&[4, 1, 4, 4], &[2, 2], id_dtype)).unwrap();
                    let after = state(&optimizer, &w);
                    assert_eq!(after[0], before[0], "weights stay");
                    for (i, (before, after)) in before[1..].iter().zip(&after[1..]).enumerate() {
                        for (j, (&before, &after)) in before.iter().zip(after).enumerate() {
                            let expected = if [1, 4].contains(&(j / len)) { 0 } else { before };
                            assert_eq!(after, expected, "moment {i}, element {j}, {dtype:?}, {kernel:?}");
                        }
                    }
                    assert_eq!((optimizer.updates(), optimizer.state("w").unwrap().step), (2, 2));
                }
            }
        }
    }
}

#[test]
fn rows_that_begin_anew_drop_what_was_accumulated_for_them() {
    for kernel in KERNELS {
        for dense in [false, true] {
            let params = ParamsAdamax { gradient_accumulation_steps: 2, ..params() };
            let (mut optimizer, w) = trained(&[6, 2], DType::F32, kernel, params);
            let rows = sparse(&[5, 0, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2], DType::F32);
            optimizer.apply_gradients([(&w, &rows)]).unwrap();
            if dense {
                // The sum becomes one of all rows; the count of calls begins anew with the first update.
                optimizer.apply_gradients([(&w, &rows)]).unwrap();
                optimizer.apply_gradients([(&w, &tensor(&[1.0; 12], &[6, 2], DType::F32))]).unwrap();
            }
            optimizer.reset_rows("w", &ids(&[4, 1])).unwrap();
            match optimizer.state("w").unwrap().accumulated.unwrap() {
                AccumulatedGrad::Rows(sum) => {
                    assert!(!dense);
                    assert_eq!(values(&sum.indices), [0.0, 5.0]);
                    assert_eq!(values(&sum.values), [3.0, 4.0, 1.0, 2.0]);
                }
                AccumulatedGrad::Dense(sum) => {
                    assert!(dense);
                    assert_eq!(values(&sum), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
                }
                _ => unreachable!("no other one is made here"),
            }
            // The next call updates, also where nothing is left for a row.
            let before = bits(&w);
            optimizer.apply_gradients([(&w, &sparse(&[], &[], &[2], DType::F32))]).unwrap();
            let changed: Vec<usize> = (0..6).filter(|row| bits(&w)[row * 2..][..2] != before[row * 2..][..2]).collect();
            // A row of zeros among all others, with moments of zero, stays where it is.
            let expected: &[usize] = if dense { &[0, 2, 3, 5] } else { &[0, 5] };
            assert_eq!(changed, expected, "{kernel:?}");
        }
    }
}

#[test]
fn a_row_set_anew_trains_as_a_new_one() {
    // A row whose weights are set and whose moments begin anew is as one of an optimizer that has just been made, but for t.
    let w = var(&noise(1, 12), &[4, 3], DType::F32);
    let fresh = tensor(&coarse(5, 3), &[1, 3], DType::F32);
    let run_params = ParamsAdamax { step_count: StepCount::Shared, ..params() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], run_params).unwrap();
    let layer = Embedding::new(w.as_tensor().clone()).unwrap();
    for call in 0..3 {
        optimizer.apply_gradients([(&w, &noisy(&[0, 2], call, &[3], DType::F32))]).unwrap();
    }
    layer.table().set_rows(&ids(&[2]), &fresh).unwrap();
    optimizer.reset_rows("w", &ids(&[2])).unwrap();
    // Row 3 has never been touched: with the same weights it has to move as row 2 does.
    layer.table().set_rows(&ids(&[3]), &fresh).unwrap();
    let same = coarse(9, 3);
    optimizer.apply_gradients([(&w, &sparse(&[3, 2], &[same.clone(), same].concat(), &[3], DType::F32))]).unwrap();
    let after = bits(&w);
    assert_eq!(after[6..9], after[9..12]);
}

#[test]
fn added_rows_leave_the_old_ones_as_they_are() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            for (shape, len) in [(&[6usize][..], 1), (&[6, 3], 3), (&[6, 2, 2], 4)] {
                for added in [0, 1, 4] {
                    let (mut optimizer, w) = trained(shape, dtype, kernel, params());
                    let (mut unbroken, v) = trained(shape, dtype, kernel, params());
                    let dims: Vec<usize> = [added].iter().chain(&shape[1..]).copied().collect();
                    let rows = tensor(&coarse(3, added * len), &dims, dtype);
                    let before = state(&optimizer, &w);
                    let grown = optimizer.append_rows("w", &rows).unwrap();
                    assert_eq!(grown.dims()[0], 6 + added);
                    assert_eq!(bits(&w), before[0], "the old variable stays as it is");
                    let after = state(&optimizer, &grown);
                    for (what, (before, after)) in ["w", "m", "u"].iter().zip(before.iter().zip(&after)) {
                        assert_eq!(after[..before.len()], before[..], "{what}, {dtype:?}, {kernel:?}");
                    }
                    assert_eq!(after[0][6 * len..], bits(&rows)[..]);
                    assert!(after[1][6 * len..].iter().chain(&after[2][6 * len..]).all(|&bits| bits == 0));
                    assert_eq!(optimizer.state("w").unwrap().step, 2);

                    // Old rows train on as if nothing had happened, through layers on the new variable.
                    let layer = candle_adamax::Table::new(&grown).unwrap();
                    let old = candle_adamax::Table::new(&v).unwrap();
                    let mut lookup = vec![5u32, 0, 5];
                    let factors = coarse(4, (3 + added) * len);
                    let loss = |table: &candle_adamax::Table, of: &[u32]| {
                        let rows = table.lookup(&ids(of)).unwrap();
                        let factors = tensor(&factors[..of.len() * len], rows.dims(), dtype);
                        (rows * factors).unwrap().sum_all().unwrap()
                    };
                    unbroken.backward_step(&loss(&old, &lookup)).unwrap();
                    lookup.extend((6..6 + added).map(|row| row as u32));
                    optimizer.backward_step(&loss(&layer, &lookup)).unwrap();
                    let (grown_state, expected) = (state(&optimizer, &grown), state(&unbroken, &v));
                    for (got, expected) in grown_state.iter().zip(&expected) {
                        assert_eq!(got[..expected.len()], expected[..], "{dtype:?}, {kernel:?}");
                    }
                    if added > 0 {
                        assert_ne!(grown_state[0][6 * len..], after[0][6 * len..], "new rows are trained, too");
                    }
                    // The variable that was replaced is no longer the optimizer's.
                    let dense = tensor(&vec![1.0; w.elem_count()], shape, dtype);
                    let error = optimizer.apply_gradients([(&w, &dense)]).unwrap_err().to_string();
                    assert!(error.contains("`w` as it was before `append_rows`"), "{error}");
                }
            }
        }
    }
}

#[test]
fn added_rows_keep_what_waits_and_averages() {
    for kernel in KERNELS {
        let accumulating = ParamsAdamax { gradient_accumulation_steps: 2, ..params() };
        let (mut optimizer, w) = trained(&[3, 2], DType::F32, kernel, accumulating.clone());
        optimizer.apply_gradients([(&w, &sparse(&[2, 0], &[1.0, 2.0, 3.0, 4.0], &[2], DType::F32))]).unwrap();
        let grown = optimizer.append_rows("w", &tensor(&[7.0, 8.0], &[1, 2], DType::F32)).unwrap();
        let sum = optimizer.state("w").unwrap().accumulated.unwrap();
        assert_eq!(values(&sum.rows().unwrap().indices), [0.0, 2.0]);
        assert_eq!(values(&sum.rows().unwrap().values), [3.0, 4.0, 1.0, 2.0]);
        let before = bits(&grown);
        optimizer.apply_gradients([(&grown, &sparse(&[3], &[1.0, 1.0], &[2], DType::F32))]).unwrap();
        let changed: Vec<usize> = (0..4).filter(|row| bits(&grown)[row * 2..][..2] != before[row * 2..][..2]).collect();
        assert_eq!(changed, [0, 2, 3], "{kernel:?}");

        let (mut optimizer, w) = trained(&[3, 2], DType::F32, kernel, accumulating);
        optimizer.apply_gradients([(&w, &tensor(&[1.0; 6], &[3, 2], DType::F32))]).unwrap();
        optimizer.append_rows("w", &tensor(&[7.0, 8.0], &[1, 2], DType::F32)).unwrap();
        let sum = optimizer.state("w").unwrap().accumulated.unwrap();
        assert_eq!(values(sum.dense().unwrap()), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);

        let ema = Some(Ema { momentum: 0.5, overwrite_frequency: None });
        let (mut optimizer, _) = trained(&[3, 2], DType::F32, kernel, ParamsAdamax { ema, ..params() });
        let before = values(&optimizer.state("w").unwrap().ema.unwrap());
        optimizer.append_rows("w", &tensor(&[7.0, 8.0], &[1, 2], DType::F32)).unwrap();
        let after = values(&optimizer.state("w").unwrap().ema.unwrap());
        assert_eq!((&after[..6], &after[6..]), (&before[..], &[7.0, 8.0][..]));
    }
}

#[test]
fn a_grown_optimizer_is_saved_and_loaded() {
    let folder = Folder::new();
    let file = folder.file("state.safetensors");
    let (mut optimizer, _) = trained(&[3, 2], DType::F32, Kernel::Auto, params());
    let grown = optimizer.append_rows("w", &tensor(&[7.0, 8.0], &[1, 2], DType::F32)).unwrap();
    optimizer.save(&file).unwrap();
    let vars = [("w".to_owned(), grown)];
    let mut other = Adamax::from_named(vars.clone(), params()).unwrap();
    other.load(&file).unwrap();
    assert_eq!(Fingerprint::of(&other, &vars), Fingerprint::of(&optimizer, &vars));
}

#[test]
fn some_rows_of_a_gradient_that_is_not_there_are_missing() {
    let (mut optimizer, w) = trained(&[4, 2], DType::F32, Kernel::Auto, params());
    let before = state(&optimizer, &w);
    for rows in [TouchedRows::Ids(&ids(&[1])), TouchedRows::NonZero] {
        optimizer.step_rows(&candle_core::backprop::GradStore::default(), [(&w, rows)]).unwrap();
        assert_eq!(optimizer.report().missing().collect::<Vec<_>>(), ["w"]);
    }
    assert_eq!(state(&optimizer, &w), before);
}

#[test]
fn a_varmap_of_layers_trains_without_further_words() {
    let varmap = VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&varmap, DType::F32, &candle_core::Device::Cpu);
    let user = candle_adamax::embedding(7, 3, vb.pp("user")).unwrap();
    let items = candle_adamax::embedding_bag(9, 3, candle_adamax::Pooling::Sum, vb.pp("items")).unwrap();
    let mut optimizer = Adamax::from_varmap(&varmap, params()).unwrap();
    assert_eq!(optimizer.names().collect::<Vec<_>>(), ["items.weight", "user.weight"]);
    let before = [bits(&user.embeddings().unwrap()), bits(&items.embeddings().unwrap())];
    let (u, i) = (user.forward(&ids(&[2])).unwrap(), items.forward(&ids(&[3, 3, 8]).reshape((1, 3)).unwrap()).unwrap());
    optimizer.backward_step(&(u * i).unwrap().sum_all().unwrap()).unwrap();
    let rows = |before: &[u64], after: &[u64]| -> Vec<usize> {
        (0..before.len() / 3).filter(|row| before[row * 3..][..3] != after[row * 3..][..3]).collect()
    };
    assert_eq!(rows(&before[0], &bits(&user.embeddings().unwrap())), [2]);
    assert_eq!(rows(&before[1], &bits(&items.embeddings().unwrap())), [3, 8]);
}
