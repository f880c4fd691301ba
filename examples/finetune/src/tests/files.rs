//! The files of a run, as users' tools make them and want them.

use candle_core::Device;

use super::*;

#[cfg(unix)]
#[test]
fn files_have_the_modes_of_the_umask_and_links_stay() -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let folder = Folder::new("modes")?;
    let mode = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.permissions().mode() & 0o777);
    let usual = mode(&folder.0.join("texts.tsv"))?;
    fs::create_dir_all(folder.0.join("out"))?;
    symlink(folder.0.join("elsewhere.safetensors"), folder.0.join("out/model.safetensors"))?;
    fs::write(folder.0.join("out/config.json"), "old")?;
    fs::set_permissions(folder.0.join("out/config.json"), fs::Permissions::from_mode(0o664))?;
    folder.run("out", &["--max-steps", "1"])?;

    ensure!(fs::symlink_metadata(folder.0.join("out/model.safetensors"))?.is_symlink(), "the link is gone");
    ensure!(mode(&folder.0.join("out/config.json"))? == 0o664, "the replaced file's mode is gone");
    let checkpoint = folder.checkpoint("out")?;
    for path in [
        folder.0.join("elsewhere.safetensors"),
        folder.0.join("out/tokenizer.json"),
        folder.0.join("out/learning-curves.svg"),
        checkpoint.join("weights.safetensors"),
        checkpoint.join("progress.json"),
    ] {
        let got = mode(&path)?;
        ensure!(got == usual, "{} has the mode {got:o}, and the umask gives {usual:o}", path.display());
    }
    Ok(())
}

#[test]
fn texts_of_other_systems_train_the_same_model() -> Result<()> {
    let folder = Folder::new("systems")?;
    folder.run("plain", &["--max-steps", "2"])?;
    let texts = String::from_utf8(folder.read("texts.tsv")?)?;
    fs::write(folder.0.join("texts.tsv"), format!("\u{feff}{}\r\n", texts.replace('\n', "\r\n")))?;
    folder.run("marked", &["--max-steps", "2"])?;
    for file in ["model.safetensors", "config.json"] {
        ensure!(folder.read(Path::new("plain").join(file))? == folder.read(Path::new("marked").join(file))?, "{file}");
    }
    Ok(())
}

#[test]
fn a_model_s_files_may_have_more_than_is_needed() -> Result<()> {
    let folder = Folder::new("needed")?;
    folder.run("model", &["--max-steps", "1"])?;
    let config: serde_json::Value = serde_json::from_slice(&folder.read("model/config.json")?)?;
    let mut config = config.as_object().context("an object")?.clone();
    config.remove("torch_dtype");
    config.insert("dtype".into(), "float16".into());
    config.insert("pad_token_id".into(), serde_json::Value::Null);
    fs::write(folder.0.join("model/config.json"), serde_json::to_string(&config)?)?;

    let weights = candle_core::safetensors::load(folder.0.join("model/model.safetensors"), &Device::Cpu)?;
    let query = "bert.encoder.layer.0.attention.self.query.bias";
    let with = |name: &str, dtype: safetensors::Dtype| -> Result<()> {
        // The data of one view has to live as long as the others'.
        let (bytes, mut owned) = (vec![0u8; 128], Vec::new());
        for (name, tensor) in &weights {
            let data = tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes);
            owned.push((name.clone(), tensor.dims().to_vec(), data.collect::<Vec<u8>>()));
        }
        let mut views = Vec::new();
        for (other, shape, data) in owned.iter().filter(|(other, ..)| other != name) {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data)?;
            views.push((other.clone(), view));
        }
        views.push((name.to_owned(), safetensors::tensor::TensorView::new(dtype, vec![128], &bytes)?));
        Ok(safetensors::serialize_to_file(views, None, &folder.0.join("model/model.safetensors"))?)
    };
    let model = folder.text("model");
    let train = || folder.run("out", &["--model", &model, "--max-steps", "1"]);
    for dtype in [safetensors::Dtype::BOOL, safetensors::Dtype::I8] {
        with("bert.embeddings.mask", dtype)?;
        train()?;
        with(query, dtype)?;
        let error = format!("{:#}", train().expect_err("no numbers"));
        ensure!(error == format!("{query}: expected floating point, got {dtype:?}"), "{error}");
    }
    let saved: serde_json::Value = serde_json::from_slice(&folder.read("out/config.json")?)?;
    ensure!(saved["dtype"] == "float32" && saved.get("torch_dtype").is_none(), "{saved}");
    ensure!(saved["pad_token_id"].is_null(), "{saved}");
    Ok(())
}

#[test]
fn weights_may_be_those_of_a_wrapped_model() -> Result<()> {
    let folder = Folder::new("wrapped")?;
    folder.run("model", &["--max-steps", "1"])?;
    let (path, model) = (folder.0.join("model/model.safetensors"), folder.text("model"));
    let weights = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let train = |out: &str| folder.run(out, &["--model", &model, "--max-steps", "1"]);
    let renamed = |rename: &dyn Fn(&str) -> String| -> Result<()> {
        let renamed = weights.iter().map(|(name, weight)| (rename(name), weight.clone())).collect();
        Ok(candle_core::safetensors::save(&renamed, &path)?)
    };
    train("expected")?;
    for wrapper in ["module.", "_orig_mod.module.", "model."] {
        renamed(&|name| format!("{wrapper}{name}"))?;
        train("wrapped")?;
        ensure!(folder.read("wrapped/model.safetensors")? == folder.read("expected/model.safetensors")?, "{wrapper}");
    }
    renamed(&|name| format!("another.{name}"))?;
    let error = format!("{:#}", train("refused").expect_err("other names"));
    let expected = "got none; others are `another.bert.embeddings.LayerNorm.bias`, ";
    ensure!(error.contains(expected) && error.ends_with("`, .."), "{error}");
    Ok(())
}
