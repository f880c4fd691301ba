//! Weights that somebody else wrote.

use candle_adamax::{Adamax, Embedding, ParamsAdamax, Rounding, SparseUpdate, Table};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, Module, VarMap};

use crate::common::folder::Folder;
use crate::common::{bits, ids, tensor, values, var};

/// Steps of a variable in f32 and of one in bf16 with a master, between which `write` changes both.
fn beside_f32(write: impl Fn(&Var)) -> (Vec<f64>, Vec<f64>) {
    let run = |dtype| {
        let w = var(&[1.0, -1.0, 0.5, 3.0], &[4, 1], dtype);
        let params = ParamsAdamax { rounding: Rounding::Master, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        let step = |optimizer: &mut Adamax, gradient: f64| {
            optimizer.apply_gradients([(&w, &tensor(&[gradient; 4], &[4, 1], dtype))]).unwrap();
        };
        step(&mut optimizer, 1.0);
        write(&w);
        step(&mut optimizer, 0.0);
        values(&w)
    };
    (run(DType::F32), run(DType::BF16))
}

// NovaSky-AI/SkyRL#2149, NVIDIA/Megatron-LM#174, TimDettmers/sparse_learning#16
#[test]
fn pruned_and_loaded_weights_are_taken_over_beside_an_f32_master() {
    let write = |w: &Var, x: &[f64]| w.set(&tensor(x, &[4, 1], w.dtype())).unwrap();
    let prune = |w: &Var| w.set(&w.affine(0.0, 0.0).unwrap()).unwrap();
    let load = |w: &Var| {
        let folder = Folder::new();
        let path = folder.file("weights");
        Tensor::save_safetensors(&tensor(&[2.0, 0.0, -0.0, 1e-3], &[4, 1], w.dtype()), "w", &path).unwrap();
        let mut varmap = VarMap::new();
        varmap.data().lock().unwrap().insert("w".into(), w.clone());
        varmap.load(&path).unwrap();
    };
    let set_rows = |w: &Var| {
        let table = Table::new(w).unwrap();
        table.set_rows(&ids(&[0, 3]), &tensor(&[0.0, 0.0], &[2, 1], w.dtype())).unwrap();
    };
    let writes: [&dyn Fn(&Var); 6] = [
        &prune,
        &|w| write(w, &[0.0, -0.0, 0.0, 0.0]),
        &|w| write(w, &[0.0, 7.0, -1e-30, 100.0]),
        &|w| w.zero_set().unwrap(),
        &load,
        &set_rows,
    ];
    for (k, write) in writes.into_iter().enumerate() {
        let (full, half) = beside_f32(write);
        for (full, half) in full.iter().zip(&half) {
            // A unit in the last place of bf16, and of the movement if the weight is 0.
            let unit = full.abs().max(1e-6) * 2f64.powi(-7);
            assert!((full - half).abs() <= unit, "write {k}: f32 {full}, bf16 {half}");
        }
    }
}

// tensorflow/tensorflow#35634, keras-team/keras#12511
#[test]
fn early_stopping_puts_the_best_weights_back() {
    for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
        let w = Var::ones((2, 1), DType::F32, &Device::Cpu).unwrap();
        let table = Table::new(&w).unwrap();
        let params = ParamsAdamax { lr: 0.1.into(), sparse_update, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        let step = |optimizer: &mut Adamax, row: u32| {
            optimizer.backward_step(&table.lookup(&ids(&[row])).unwrap().sum_all().unwrap()).unwrap();
        };
        step(&mut optimizer, 0);
        let best = table.weight().unwrap().copy().unwrap();
        for _ in 0..5 {
            step(&mut optimizer, 1);
        }
        // Rows catch up before weights are written, so that the written ones stand.
        optimizer.catch_up().unwrap();
        w.set(&best).unwrap();
        let looked_up = table.lookup(&ids(&[0, 1])).unwrap();
        assert_eq!(bits(&looked_up), bits(&best), "{sparse_update:?}");
        drop(optimizer);
        assert_eq!(bits(&w), bits(&best), "{sparse_update:?}");
    }
}

// tensorflow/tensorflow#35634
#[test]
fn weights_that_are_put_back_too_early_are_an_error_where_it_shows() {
    let w = Var::ones((2, 1), DType::F32, &Device::Cpu).unwrap();
    let table = Table::new(&w).unwrap();
    let params = ParamsAdamax { lr: 0.1.into(), sparse_update: SparseUpdate::Exact, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    for row in [0, 1, 1] {
        optimizer.backward_step(&table.lookup(&ids(&[row])).unwrap().sum_all().unwrap()).unwrap();
    }
    // Row 0 has missed two updates when it is written.
    w.set(&Tensor::new(&[[5f32], [5.0]], &Device::Cpu).unwrap()).unwrap();
    let error = table.lookup(&ids(&[0])).unwrap_err().to_string();
    assert!(error.contains("catch_up"), "{error}");
    optimizer.catch_up().unwrap();
    assert_eq!(values(&table.lookup(&ids(&[0, 1])).unwrap()), [5.0, 5.0]);
}

// pytorch/pytorch#43706
#[test]
fn f32_moments_of_bf16_weights_keep_their_bits_when_they_are_loaded() {
    let folder = Folder::new();
    let path = folder.file("state");
    let w = var(&[1.0, 2.0, 3.0], &[3], DType::BF16);
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::pytorch()).unwrap();
    optimizer.apply_gradients([(&w, &tensor(&[0.1, 0.7, 1.0 / 3.0], &[3], DType::F32))]).unwrap();
    let state = optimizer.state("w").unwrap();
    // More bits than bf16 has.
    let as_bf16 = state.exp_avg.to_dtype(DType::BF16).unwrap();
    assert_ne!(bits(&state.exp_avg), bits(&as_bf16));
    type Through = fn(&Adamax, &mut Adamax, &std::path::Path);
    let ways: [Through; 2] = [
        |from, to, path| {
            from.save(path).unwrap();
            to.load(path).unwrap();
        },
        |from, to, path| {
            from.save_torch(path).unwrap();
            to.load_torch(path).unwrap();
        },
    ];
    for through in ways {
        let mut loaded = Adamax::from_named([("w", w.clone())], ParamsAdamax::pytorch()).unwrap();
        through(&optimizer, &mut loaded, &path);
        let loaded = loaded.state("w").unwrap();
        assert_eq!(bits(&loaded.exp_avg), bits(&state.exp_avg));
        assert_eq!(bits(&loaded.exp_inf), bits(&state.exp_inf));
        assert_eq!(loaded.exp_avg.dtype(), DType::F32);
    }
}

// huggingface/transformers#3519
#[test]
fn a_layer_that_holds_the_table_from_before_its_growth_is_noticed() {
    let varmap = VarMap::new();
    let weight = varmap.get((4, 2), "w", Init::Const(1.0), DType::F32, &Device::Cpu).unwrap();
    let old = Embedding::new(weight).unwrap();
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default()).unwrap();
    optimizer.backward_step(&old.forward(&ids(&[1])).unwrap().sum_all().unwrap()).unwrap();
    let grown = optimizer.append_rows("w", &Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let before = bits(&grown);
    let error = optimizer.backward_step(&old.forward(&ids(&[1])).unwrap().sum_all().unwrap()).unwrap_err().to_string();
    assert!(error.contains("`w`"), "{error}");
    assert_eq!(bits(&grown), before);
    // The layer of the grown variable trains.
    let new = Embedding::new(grown.as_tensor().clone()).unwrap();
    optimizer.backward_step(&new.forward(&ids(&[5])).unwrap().sum_all().unwrap()).unwrap();
    assert_ne!(bits(&grown), before);
}
