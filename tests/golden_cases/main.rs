//! The numbers of other frameworks: every recorded case in `tests/golden`, or in the folder that the environment
//! variable `ADAMAX_GOLDEN_DIR` names, on each path that updates can take.
//!
//! The cases' metadata say what they are, so that cases can be added without code. See the README beside them for the
//! format and for who recorded what; a case that is not understood fails.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod reader;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use candle_adamax::{Adamax, Kernel, ParamsAdamax, SparseGrad};
use candle_core::{DType, Tensor, Var};
use common::gradients::Grad;
use common::{formulas, noise, recorded, tensor, values, var};
use reader::{Case, Outcome, Untouched, run, run_folder};
use serde_json::json;

fn folder() -> PathBuf {
    std::env::var_os("ADAMAX_GOLDEN_DIR").map_or_else(own_folder, PathBuf::from)
}

/// That of this repository, whatever folder the cases are to come from.
fn own_folder() -> PathBuf {
    recorded("")
}

/// Compares all cases. The summary is written past the test harness, which would keep that of a success to itself.
#[track_caller]
fn compare_all(kernel: Kernel) {
    let summary = run_folder(&folder(), kernel).unwrap();
    let text = format!("golden cases, kernel {kernel:?}:\n{summary}");
    std::io::stderr().lock().write_all(text.as_bytes()).unwrap();
    assert!(summary.failures.is_empty(), "{} cases failed:\n{summary}", summary.failures.len());
}

#[test]
fn all_cases_on_the_default_path() {
    compare_all(Kernel::Auto);
}

#[test]
fn all_cases_on_the_portable_path() {
    compare_all(Kernel::Portable);
}

#[test]
fn every_family_has_a_case_that_is_as_recorded() {
    let summary = run_folder(&folder(), Kernel::Auto).unwrap();
    for (family, compared) in &summary.families {
        assert!(*compared > 0, "no case of {family} gives what was recorded:\n{summary}");
    }
}

/// A case of this repository.
#[track_caller]
fn case(name: &str) -> Case {
    Case::read(&own_folder().join(format!("{name}.safetensors"))).unwrap().unwrap()
}

#[track_caller]
fn assert_fails(case: &Case, message: &str) {
    match run(case, Kernel::Auto) {
        Ok(outcome) => panic!("expected an error about {message:?}, got {outcome:?}"),
        Err(error) => assert!(format!("{error:#}").contains(message), "expected {message:?} in: {error:#}"),
    }
}

/// Changes the largest of the recorded numbers by a share of it.
#[track_caller]
fn perturb(case: &mut Case, tensor: &str, share: f64) {
    let values = &mut case.tensors.get_mut(tensor).unwrap().values;
    let largest = values.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
    *largest *= 1.0 + share;
}

#[test]
fn a_wrong_number_is_noticed() {
    let all = [
        (
            "keras3/combo_f32",
            &["kernel.param", "kernel.m", "kernel.u", "kernel.ema", "kernel.param_final"] as &[&str],
            1e-4,
        ),
        ("keras3/grad_acc_f32", &["kernel.acc"], 1e-4),
        ("keras3/default_f64", &["kernel.param", "kernel.m", "kernel.u"], 1e-12),
        ("pytorch/default_f64_single", &["kernel.param", "kernel.m", "kernel.u", "kernel.t"], 1e-12),
        ("keras3/f16_eps1e-3", &["kernel.param", "kernel.m", "kernel.u"], 0.25),
        ("pytorch/bf16_single", &["kernel.param", "kernel.m", "kernel.u"], 0.25),
        ("optax_adamax/adamaxw_f16_params_f16_values", &["kernel.param", "kernel.m", "kernel.u"], 1e-1),
        ("tf_legacy_sparse/sparse_two_tables_f32", &["user.param", "item.m", "user.u", "kernel.param"], 1e-4),
        ("tf_legacy_sparse/sparse_rank3_f32", &["emb.param", "emb.m", "emb.u"], 1e-4),
        ("tf_legacy_sparse/sparse_dyadic_f64", &["emb.param", "emb.m", "emb.u"], 1e-12),
        ("tf_legacy_sparse/sparse_f16", &["emb.param", "emb.m", "emb.u"], 0.25),
        ("keras3/sparse_unique_f32", &["emb.param", "emb.m", "emb.u"], 1e-4),
        ("tf_legacy_e2e/single_f64", &["emb.param", "emb.m", "emb.u", "kernel.param", "bias.u", "loss"], 1e-12),
        ("tf_legacy_e2e/shared_f32", &["emb.param", "emb.m", "emb.u", "loss"], 1e-3),
        ("tf_legacy_e2e/tied_f32", &["emb.param", "emb.m", "emb.u", "loss"], 1e-3),
        ("schedules/cosine_warmup", &["lr_f64"], 1e-9),
        ("clip/torch_clip_grad_norm_l1_f64", &["above.out.1", "below.norm"], 1e-9),
        ("clip/tf_clip_by_norm_f32", &["above.out"], 1e-3),
        ("drift/drop_10k", &["u_f64"], 1e-2),
    ];
    for (name, tensors, share) in all {
        let original = case(name);
        assert!(run(&original, Kernel::Auto).is_ok(), "{name}");
        for tensor in tensors {
            let mut wrong = original.clone();
            perturb(&mut wrong, tensor, share);
            let result = run(&wrong, Kernel::Auto);
            assert!(result.is_err(), "{name}: a wrong `{tensor}` went unnoticed: {result:?}");
        }
    }
}

#[test]
fn a_wrong_gradient_or_hyperparameter_is_noticed() {
    let mut wrong = case("keras3/lr_f32");
    perturb(&mut wrong, "kernel.grad", 0.01);
    assert_fails(&wrong, "kernel.");
    for (name, tensor) in [
        ("tf_legacy_sparse/sparse_f32", "emb.val.003"),
        ("tf_legacy_sparse/sparse_dyadic_f64", "emb.val.011"),
        ("keras3/sparse_unique_f32", "emb.val.003"),
    ] {
        let mut wrong = case(name);
        perturb(&mut wrong, tensor, 0.01);
        assert_fails(&wrong, "emb.");
    }
    for (name, tensor, message) in
        [("tf_legacy_sparse/sparse_f32", "emb.idx.004", "emb."), ("tf_legacy_e2e/single_f32", "ids", "loss of call 0")]
    {
        let mut wrong = case(name);
        wrong.tensors.get_mut(tensor).unwrap().values[0] = 8.0;
        assert_fails(&wrong, message);
    }
    for (key, value) in [
        ("beta_1", json!(0.91)),
        ("beta_2", json!(0.99)),
        ("epsilon", json!(1e-3)),
        ("weight_decay", json!(0.05)),
        ("clipnorm", json!(0.5)),
        ("clipvalue", json!(0.125)),
        ("maximize", json!(true)),
        ("loss_scale_factor", json!(2.0)),
        ("gradient_accumulation_steps", json!(2)),
    ] {
        let mut wrong = case("pytorch/hparams_f32_single");
        wrong.json["hyperparameters"][key] = value;
        assert!(run(&wrong, Kernel::Auto).is_err(), "another `{key}` went unnoticed");
    }
}

#[test]
fn what_is_not_understood_fails() {
    let original = case("keras3/weight_decay_exclude_f32");
    let with = |pointer: &str, key: &str| {
        let mut case = original.clone();
        case.json.pointer_mut(pointer).unwrap()[key] = json!(0.5);
        case
    };
    assert_fails(&with("", "momentum_mode"), "unknown entry `momentum_mode`");
    assert_fails(&with("/hyperparameters", "amsgrad"), "unknown hyperparameter `amsgrad`");
    assert_fails(&with("/effective", "beta_3"), "unknown effective hyperparameter `beta_3`");
    assert_fails(&with("/vars/0", "layout"), "of a variable");
    assert_fails(&with("/vars/0/hyperparameters", "beta_3"), "unknown hyperparameter `beta_3`");
    let mut kind = original.clone();
    kind.json["kind"] = json!("keras4");
    assert_fails(&kind, "unknown kind `keras4` of family `keras3`");
    let mut tensor = original.clone();
    tensor.tensors.insert("kernel.vhat".into(), tensor.tensors["kernel.u"].clone());
    assert_fails(&tensor, "unknown tensor `kernel.vhat`");
    let mut schedule = case("optax_adamax/adamax_schedule_f32");
    schedule.json["learning_rate"]["config"]["end_value"] = json!(0.01);
    assert_fails(&schedule, "`end_value` is not understood");
    schedule.json["learning_rate"]["class_name"] = json!("sgdr_schedule");
    assert_fails(&schedule, "unknown schedule `sgdr_schedule`");
    let mut rows = case("tf_legacy_sparse/sparse_none_f32");
    rows.tensors.insert("emb.idx.010".into(), rows.tensors["emb.idx.000"].clone());
    assert_fails(&rows, "unknown tensor `emb.idx.010`");
    rows.tensors.remove("emb.idx.010");
    rows.tensors.insert("bias.idx.000".into(), rows.tensors["emb.idx.000"].clone());
    assert_fails(&rows, "unknown tensor `bias.idx.000`");
    let mut model = case("tf_legacy_e2e/tied_f32");
    model.json["variant"] = json!("bag");
    assert_fails(&model, "unknown model `bag`");
    let mut clip = case("clip/tf_clip_by_norm_f32");
    clip.json["framework"] = json!("tf.clip_by_average_norm");
    assert_fails(&clip, "unknown clipping function");
}

#[test]
fn departures_are_named() {
    for (name, reason) in [
        ("keras3/bf16", "not a model to follow"),
        ("pytorch/f16_default_eps", "defect"),
        ("tf_legacy_dense/clipvalue_clipnorm_f32", "two clips"),
        ("tf_legacy_dense/nonfinite_f32", "pass over a NaN"),
        ("tf_legacy_sparse/sparse_bf16", "not a model to follow"),
        ("tf_legacy_sparse/sparse_clipnorm_f32", "we clip the sum"),
        ("tf_legacy_sparse/sparse_clipvalue_f32", "we clip the sum"),
        ("tf_legacy_sparse/sparse_global_clipnorm_f32", "we clip the sum"),
        ("keras3/sparse_duplicates_f32", "before duplicates are summed"),
        ("clip/tf_clip_by_norm_f16", "huge"),
        ("clip/tf_clip_by_norm_f64", "`sparse` by the formula, since we sum"),
        ("clip/tf_clip_by_global_norm_f64", "`sparse` by the formula, since we sum"),
    ] {
        match run(&case(name), Kernel::Auto) {
            Ok(Outcome::Own(got)) => assert!(got.contains(reason), "{name}: {got}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    // Apart from these, gradients of rows give what was recorded: nothing is passed over.
    for kernel in [Kernel::Auto, Kernel::Portable] {
        let summary = run_folder(&own_folder(), kernel).unwrap();
        let passed_over = summary.outcomes.iter().find(|(_, outcome)| matches!(outcome, Outcome::NotCompared(_)));
        assert_eq!(passed_over, None);
    }
}

#[test]
fn clipping_of_rows_that_are_listed_once_is_as_recorded() {
    // The calls with such rows follow our own rule and not the recording; those without have to follow both.
    for name in ["sparse_clipnorm_f32", "sparse_clipvalue_f32", "sparse_global_clipnorm_f32"] {
        let original = case(&format!("tf_legacy_sparse/{name}"));
        for tensor in ["emb.param", "emb.m", "emb.u", "bias.m"] {
            let mut wrong = original.clone();
            wrong.tensors.get_mut(tensor).unwrap().values.iter_mut().for_each(|x| *x *= 1.001);
            assert_fails(&wrong, "without repeated rows");
        }
    }
}

/// A table of 4 rows, and a gradient of two of them.
fn table() -> (BTreeMap<String, Var>, Adamax, SparseGrad) {
    let w = var(&noise(1, 8), &[4, 2], DType::F32);
    let optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
    let (indices, values) = (tensor(&[2.0, 0.0, 2.0], &[3], DType::U32), tensor(&noise(2, 6), &[3, 2], DType::F32));
    (BTreeMap::from([("w".to_owned(), w)]), optimizer, SparseGrad { indices, values })
}

#[test]
fn a_row_without_a_gradient_that_moves_is_noticed() {
    let (vars, mut optimizer, grad) = table();
    let grads = BTreeMap::from([("w".to_owned(), Grad::Sparse(grad.clone()))]);
    let untouched = Untouched::before(&optimizer, &vars, &grads).unwrap();
    optimizer.apply_gradients([(&vars["w"], &grad)]).unwrap();
    untouched.check(&optimizer, &vars).unwrap();
    let untouched = Untouched::before(&optimizer, &vars, &grads).unwrap();
    // Row 1 gets a change that no tolerance would show.
    let mut w = values(&vars["w"]);
    w[3] = f64::from((w[3] as f32).next_up());
    vars["w"].set(&tensor(&w, &[4, 2], DType::F32)).unwrap();
    let error = untouched.check(&optimizer, &vars).unwrap_err().to_string();
    assert!(error.starts_with("w.param: row 1 has no gradient"), "{error}");
}

#[test]
fn the_formulas_notice_other_rows() {
    let edits: [fn(&SparseGrad) -> SparseGrad; 3] = [
        // The last of the two gradients of row 2 in place of their sum.
        |grad| SparseGrad {
            indices: grad.indices.narrow(0, 1, 2).unwrap(),
            values: grad.values.narrow(0, 1, 2).unwrap(),
        },
        |grad| SparseGrad { values: (&grad.values * 1.001).unwrap(), ..grad.clone() },
        // A gradient of 0 for row 1, which is more than none.
        |grad| {
            let cat = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0).unwrap();
            let (row, zeros) = (tensor(&[1.0], &[1], DType::U32), tensor(&[0.0; 2], &[1, 2], DType::F32));
            SparseGrad { indices: cat(&grad.indices, &row), values: cat(&grad.values, &zeros) }
        },
    ];
    for (position, edit) in edits.into_iter().enumerate() {
        let (vars, mut optimizer, grad) = table();
        optimizer.apply_gradients([(&vars["w"], &tensor(&noise(3, 8), &[4, 2], DType::F32))]).unwrap();
        for (edited, is_noticed) in [(grad.clone(), false), (edit(&grad), true)] {
            let grads = BTreeMap::from([("w".to_owned(), Grad::Sparse(edited))]);
            let expected = formulas::call(&optimizer.snapshot().unwrap(), &vars, &grads, 0.0);
            optimizer.apply_gradients([(&vars["w"], &grad)]).unwrap();
            let mismatch = expected.mismatch(&optimizer.snapshot().unwrap(), &vars);
            assert_eq!(mismatch.is_some(), is_noticed, "edit {position}: {mismatch:?}");
        }
    }
}
