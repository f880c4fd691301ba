//! Reports that concern the program `finetune`: its data, the models that it reads and writes, its accumulation.
//!
//! A test of the package `finetune`, which builds the program. See `main.rs` for the form.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/folder.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod folder;
#[path = "../common/parts.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod parts;
mod program;

use std::path::{Path, PathBuf};
use std::process::Output;

use folder::Folder;
use parts::Parts;
use program::{printed, refused};
use safetensors::Dtype;
use serde_json::{Value, json};

fn run(args: &[&str]) -> Output {
    program::run(Path::new(env!("CARGO_BIN_EXE_finetune")), args)
}

/// Texts of two classes that a word tells apart.
fn texts(n: usize) -> String {
    let line = |i: usize| {
        let (class, word) = [("calm", "lake"), ("wild", "storm")][i % 2];
        format!("{class}\tthe {word} is number {i} {}\n", "and again ".repeat(i % 4))
    };
    (0..n).map(line).collect()
}

/// A run on `data`, into the folder `out`.
fn train(folder: &Folder, data: &Path, out: &str, more: &[&str]) -> Output {
    let (data, out) = (data.display().to_string(), folder.file(out).display().to_string());
    let always = ["--data", &data, "--out", &out, "--epochs", "1", "--max-length", "16"];
    // The last of two options that are the same holds.
    let given = |option: &str| more.contains(&option);
    let always: Vec<&str> = always.chunks(2).filter(|pair| !given(pair[0])).flatten().copied().collect();
    run(&[&always, more].concat())
}

/// The steps of a run, as its checkpoint has them.
fn steps(folder: &Folder, out: &str) -> Vec<Value> {
    let entries = std::fs::read_dir(folder.file(out)).unwrap().map(|entry| entry.unwrap().path());
    let checkpoint = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("checkpoint-");
    let checkpoint = entries.into_iter().find(checkpoint).unwrap();
    let progress: Value = serde_json::from_slice(&std::fs::read(checkpoint.join("progress.json")).unwrap()).unwrap();
    progress["steps"].as_array().unwrap().clone()
}

fn number(step: &Value, field: &str) -> f64 {
    step[field].as_f64().unwrap_or_else(|| panic!("{field} of {step}"))
}

/// A trained model, with another `config.json` and other weights.
fn model(folder: &Folder, name: &str, config: impl FnOnce(&mut Value), weights: &[(&str, Dtype, &[u8])]) -> PathBuf {
    let made = folder.file("made");
    if !made.exists() {
        printed(&train(folder, &folder.write("made.tsv", texts(24)), "made", &["--batch", "8"]));
    }
    let path = folder.file(name);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::copy(made.join("tokenizer.json"), path.join("tokenizer.json")).unwrap();
    let mut value: Value = serde_json::from_slice(&std::fs::read(made.join("config.json")).unwrap()).unwrap();
    config(&mut value);
    std::fs::write(path.join("config.json"), value.to_string()).unwrap();
    let mut parts = Parts::read(&made.join("model.safetensors")).unwrap();
    parts.metadata.clear();
    for &(name, dtype, bytes) in weights {
        let elements = bytes.len() * 8 / dtype.bitsize();
        parts.tensors.insert(name.to_owned(), (dtype, vec![elements], bytes.to_vec()));
    }
    parts.write(&path.join("model.safetensors")).unwrap();
    path
}

/// A run that begins with a model.
fn tune(folder: &Folder, model: &Path, out: &str) -> Output {
    let model = model.display().to_string();
    train(folder, &folder.write("tune.tsv", texts(24)), out, &["--model", &model, "--batch", "8"])
}

// NatLibFi/Annif#307, dotnet/machinelearning#544
#[test]
fn a_byte_order_mark_makes_no_class_of_its_own() {
    let folder = Folder::new();
    let of = |out: &str, text: String| {
        let output = train(&folder, &folder.write(&format!("{out}.tsv"), text), out, &["--batch", "8"]);
        let lines = printed(&output);
        lines.lines().find(|line| line.starts_with("classes:")).unwrap().to_owned()
    };
    let expected = of("plain", texts(24));
    assert_eq!(of("mark", format!("\u{feff}{}", texts(24))), expected);
    assert_eq!(of("lines", format!("{}\r\n\r\n", texts(24).replace('\n', "\r\n"))), expected);
}

// RUCAIBox/RecBole#965, RUCAIBox/RecBole#1822
#[test]
fn another_encoding_is_named_with_its_line() {
    let folder = Folder::new();
    let data = folder.write("latin.tsv", [texts(6).as_bytes(), b"calm\tcaf\xe9\n"].concat());
    let error = refused(&train(&folder, &data, "out", &[]));
    assert!(error.contains("latin.tsv:7") && error.contains("UTF-8"), "{error}");
}

// ml-explore/mlx-lm#1413, unslothai/unsloth-zoo#6
#[test]
fn a_step_of_unequal_batches_is_the_step_of_all_their_texts() {
    let folder = Folder::new();
    // One text of each class is kept for the evaluation, and three are left to train on.
    let data = folder.write("few.tsv", texts(5));
    let first = |out: &str, more: &[&str]| {
        let always = ["--dropout", "0", "--warmup", "0", "--test-share", "0.2"];
        printed(&train(&folder, &data, out, &[&always, more].concat()));
        let steps = steps(&folder, out);
        assert_eq!(steps.len(), 1, "{steps:?}");
        (number(&steps[0], "loss"), number(&steps[0], "norm"))
    };
    let (loss, norm) = first("whole", &["--batch", "3"]);
    for (out, more) in
        [("two", ["--batch", "2", "--accumulate", "2"]), ("three", ["--batch", "1", "--accumulate", "3"])]
    {
        let (got_loss, got_norm) = first(out, &more);
        assert!((got_loss - loss).abs() <= 1e-6 * loss, "{out}: loss {got_loss}, expected {loss}");
        assert!((got_norm - norm).abs() <= 1e-5 * norm, "{out}: norm {got_norm}, expected {norm}");
    }
}

// keras-team/keras#19990
#[test]
fn the_learning_rate_follows_steps_and_not_their_batches() {
    let folder = Folder::new();
    let data = folder.write("texts.tsv", texts(121));
    let rates = |out: &str, more: &[&str]| -> Vec<f64> {
        let always = ["--lr", "2e-3", "--warmup", "0.25", "--max-steps", "12"];
        printed(&train(&folder, &data, out, &[&always, more].concat()));
        steps(&folder, out).iter().map(|step| number(step, "lr")).collect()
    };
    let whole = rates("whole", &["--batch", "8"]);
    assert_eq!(whole.len(), 12);
    let peak = whole.iter().copied().fold(0.0, f64::max);
    assert!((peak - 2e-3).abs() < 1e-9, "{whole:?}");
    assert_eq!(rates("parts", &["--batch", "4", "--accumulate", "2"]), whole);
}

// huggingface/transformers#38837, Lightning-AI/pytorch-lightning#19987
#[test]
fn the_last_incomplete_accumulation_of_an_epoch_is_used() {
    let folder = Folder::new();
    // 12 batches of 8 in groups of 5: two whole steps and one of two batches.
    let data = folder.write("texts.tsv", texts(120));
    printed(&train(&folder, &data, "out", &["--batch", "8", "--accumulate", "5"]));
    let steps = steps(&folder, "out");
    assert_eq!(steps.len(), 3, "{steps:?}");
}

// EricLBuehler/mistral.rs#615
#[test]
fn fields_of_config_json_may_be_null_or_of_another_type() {
    let folder = Folder::new();
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 6] = [
        ("pad", |config| config["pad_token_id"] = Value::Null),
        ("dropout", |config| config["hidden_dropout_prob"] = Value::Null),
        ("unused", |config| config["bos_token_id"] = json!([1, 2])),
        ("pooling", |config| config["classifier_dropout"] = Value::Null),
        ("labels", |config| config["id2label"] = Value::Null),
        ("dtype", |config| config["torch_dtype"] = Value::Null),
    ];
    for (name, change) in changes {
        let model = model(&folder, name, change, &[]);
        printed(&tune(&folder, &model, &format!("{name}-out")));
    }
}

// huggingface/transformers#13246, ModelCloud/GPTQModel#1804
#[test]
fn config_json_names_one_dtype_under_the_key_that_it_had() {
    let folder = Folder::new();
    for (key, other) in [("dtype", "torch_dtype"), ("torch_dtype", "dtype")] {
        let change = |config: &mut Value| {
            config.as_object_mut().unwrap().remove(other);
            config[key] = json!("float16");
        };
        let model = model(&folder, key, change, &[]);
        printed(&tune(&folder, &model, &format!("{key}-out")));
        let written = std::fs::read(folder.file(format!("{key}-out/config.json"))).unwrap();
        let written: Value = serde_json::from_slice(&written).unwrap();
        assert_eq!(written[key], "float32", "{written}");
        assert!(written.get(other).is_none(), "{written}");
    }
}

// huggingface/candle#1622
#[test]
fn a_tensor_that_nobody_needs_may_have_any_dtype() {
    let folder = Folder::new();
    let extra: [(&str, Dtype, &[u8]); 2] =
        [("masked_bias", Dtype::BOOL, &[1, 0]), ("position_ids", Dtype::I8, &[0, 1, 2])];
    let surplus = model(&folder, "surplus", |_| (), &extra);
    printed(&tune(&folder, &surplus, "surplus-out"));
    // One that is needed is named.
    let needed = model(&folder, "needed", |_| (), &[("classifier.bias", Dtype::BOOL, &[1, 0])]);
    let error = refused(&tune(&folder, &needed, "needed-out"));
    assert!(error.contains("classifier.bias"), "{error}");
}

// safetensors/safetensors#782, UKPLab/sentence-transformers#4010
#[cfg(unix)]
#[test]
fn the_files_of_a_run_have_the_mode_of_the_umask() {
    let folder = Folder::new();
    printed(&train(&folder, &folder.write("texts.tsv", texts(24)), "out", &["--batch", "8"]));
    let (mut folders, mut seen) = (vec![folder.file("out")], 0);
    while let Some(path) = folders.pop() {
        if path.is_dir() {
            folders.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            assert_eq!(program::mode(&path), program::usual_mode(folder.path()), "{path:?}");
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen}");
}
