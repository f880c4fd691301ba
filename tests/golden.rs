//! The numbers of other frameworks: every recorded case in `tests/golden`, or in the folder that the environment
//! variable `ADAMAX_GOLDEN_DIR` names, on each path that updates can take.
//!
//! The cases' metadata say what they are, so that cases can be added without code. See the README beside them for the
//! format and for who recorded what; a case that is not understood fails.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
mod golden_support;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use candle_adamax::Kernel;
use golden_support::{Case, Outcome, run, run_folder};
use serde_json::json;

fn folder() -> PathBuf {
    match std::env::var_os("ADAMAX_GOLDEN_DIR") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
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

/// A case of this repository, whatever folder the others come from.
#[track_caller]
fn case(name: &str) -> Case {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.safetensors"));
    Case::read(&path).unwrap().unwrap()
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
        ("clip/tf_clip_by_norm_f16", "huge"),
    ] {
        match run(&case(name), Kernel::Auto) {
            Ok(Outcome::Own(got)) => assert!(got.contains(reason), "{name}: {got}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    let sparse = run(&case("keras3/sparse_unique_f32"), Kernel::Auto).unwrap();
    assert_eq!(sparse, Outcome::NotCompared("not yet run: sparse gradients".into()));
}
