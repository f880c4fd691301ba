//! The program `lora`: it learns, and a run that stops in the middle of an accumulation goes on with the same bits.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor, safetensors};

fn folder(name: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// The lines that the program prints.
fn run(out: &Path, options: &[&str]) -> Result<Vec<String>> {
    let output = Command::new(env!("CARGO_BIN_EXE_lora")).arg("--out").arg(out).args(options).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

fn losses(lines: &[String]) -> Vec<&String> {
    lines.iter().filter(|line| line.starts_with("batch ")).collect()
}

fn tensors(path: PathBuf) -> Result<HashMap<String, Tensor>> {
    Ok(safetensors::load(path, &Device::Cpu)?)
}

#[test]
fn a_run_goes_on_in_the_middle_of_an_accumulation_with_the_same_bits() -> Result<()> {
    let (whole, parts) = (folder("lora-whole")?, folder("lora-parts")?);
    let options = ["--steps", "12"];
    let expected = run(&whole, &options)?;
    let first = run(&parts, &[&options[..], &["--stop-after", "9"]].concat())?;
    assert_eq!(first.last().map(String::as_str), Some("stopped after 9 batches, 1 of them pending"));
    let second = run(&parts, &[&options[..], &["--resume"]].concat())?;
    assert_eq!(second[0], "resumed after 9 batches, 1 of them pending");
    assert_eq!([losses(&first), losses(&second)].concat(), losses(&expected));
    assert_eq!(losses(&expected).len(), 24);
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged.safetensors"] {
        assert!(fs::read(whole.join(file))? == fs::read(parts.join(file))?, "{file}");
    }
    Ok(())
}

#[test]
fn the_adapters_learn_and_are_written() -> Result<()> {
    let out = folder("lora-learn")?;
    let lines = run(&out, &["--steps", "40"])?;
    let sentences = lines.iter().find(|line| line.ends_with("classified right"));
    assert_eq!(sentences.map(String::as_str), Some("144 of 144 sentences are classified right"));

    // Adapters on query and value of both layers, and the head.
    let adapter = tensors(out.join("adapter/adapter_model.safetensors"))?;
    let mut names: Vec<_> = adapter.keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut expected =
        vec!["base_model.model.classifier.bias".to_owned(), "base_model.model.classifier.weight".to_owned()];
    for layer in 0..2 {
        for module in ["query", "value"] {
            for half in ["A", "B"] {
                expected
                    .push(format!("base_model.model.encoder.layer.{layer}.attention.self.{module}.lora_{half}.weight"));
            }
        }
    }
    assert_eq!(names, expected);

    // The merged model has the base's names and the head's; what has no adapter is as it was.
    let (base, merged) = (tensors(out.join("base.safetensors"))?, tensors(out.join("merged.safetensors"))?);
    assert_eq!(merged.len(), base.len() + 2);
    for (name, tensor) in base {
        let distance = (&merged[&name] - tensor)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let is_adapted = name.ends_with("query.weight") || name.ends_with("value.weight");
        assert_eq!(distance > 0.0, is_adapted, "{name}: {distance}");
    }
    Ok(())
}
