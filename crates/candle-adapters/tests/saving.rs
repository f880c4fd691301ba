//! Files: the same bits, whole or not there, and errors that name what is wrong.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use candle_adamax::{Adamax, ParamsAdamax};
use candle_adapters::{Error, Lora, LoraConfig};
use candle_core::{DType, Tensor, safetensors};
use candle_nn::VarBuilder;
use common::{Attention, CPU, DIM, base, bits, config, distance, shake, tokens, values, weights};

/// A folder that is removed.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("candle-adapters-{}-saving-{name}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        Ok(safetensors::load(self.0.join("adapter_model.safetensors"), CPU)?)
    }

    fn write(&self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        Ok(safetensors::save(tensors, self.0.join("adapter_model.safetensors"))?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn with_head() -> LoraConfig {
    LoraConfig { modules_to_save: vec!["head".into()], ..config() }
}

#[test]
fn an_adapter_is_read_with_the_same_bits() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let folder = Folder::new(&format!("bits-{dtype:?}"))?;
        let inner = folder.0.join("a/folder/of/its/own");
        let lora = Lora::new(with_head(), 1)?;
        let model = lora.build(base(dtype)?, Attention::load)?;
        shake(&lora)?;
        lora.refresh()?;
        lora.save(&inner)?;
        let read = Lora::load(&inner)?;
        assert!(!read.is_training());
        assert!(matches!(read.named_vars(), Err(Error::NotBuilt)));
        assert!(matches!(read.save(folder.0.join("other")), Err(Error::NotBuilt)));
        let again = read.build(base(dtype)?, Attention::load)?;
        assert_eq!(bits(&model.forward(&tokens()?)?)?, bits(&again.forward(&tokens()?)?)?);
        for ((name, var), (read_name, read_var)) in lora.named_vars()?.iter().zip(read.named_vars()?) {
            assert_eq!(*name, read_name);
            assert_eq!(var.dtype(), read_var.dtype(), "{name}");
            assert_eq!(bits(var)?, bits(&read_var)?, "{name}");
        }
    }
    Ok(())
}

#[test]
fn nothing_but_the_two_files_is_left() -> Result<()> {
    let folder = Folder::new("two")?;
    let lora = Lora::new(with_head(), 1)?;
    assert!(matches!(lora.save(&folder.0), Err(Error::NotBuilt)));
    assert!(folder.files()?.is_empty());
    lora.build(base(DType::F32)?, Attention::load)?;
    for _ in 0..2 {
        lora.save(&folder.0)?;
        assert_eq!(folder.files()?, ["adapter_config.json", "adapter_model.safetensors"]);
    }
    let expected = [
        "embed_tokens.lora_embedding_A",
        "embed_tokens.lora_embedding_B",
        "encoder.layers.0.key.lora_A.weight",
        "encoder.layers.0.key.lora_B.weight",
        "encoder.layers.0.output.lora_A.weight",
        "encoder.layers.0.output.lora_B.weight",
        "encoder.layers.0.query.lora_A.weight",
        "encoder.layers.0.query.lora_B.weight",
        "encoder.layers.0.value.lora_A.weight",
        "encoder.layers.0.value.lora_B.weight",
        "head.bias",
        "head.weight",
    ];
    let mut names: Vec<_> = folder.tensors()?.into_keys().collect();
    names.sort();
    assert_eq!(names, expected.map(|name| format!("base_model.model.{name}")));

    // The same bytes each time, for all who may read new files.
    let before = fs::read(folder.0.join("adapter_model.safetensors"))?;
    for _ in 0..4 {
        lora.save(&folder.0)?;
        assert!(fs::read(folder.0.join("adapter_model.safetensors"))? == before);
    }
    fs::write(folder.0.join("other"), b"")?;
    let permissions = |name: &str| Ok::<_, std::io::Error>(fs::metadata(folder.0.join(name))?.permissions());
    assert_eq!(permissions("adapter_model.safetensors")?, permissions("other")?);
    fs::remove_file(folder.0.join("other"))?;

    // A folder stands where a file has to go: the other file stays as it was.
    let before = fs::read(folder.0.join("adapter_model.safetensors"))?;
    fs::remove_file(folder.0.join("adapter_config.json"))?;
    fs::create_dir(folder.0.join("adapter_config.json"))?;
    shake(&lora)?;
    assert!(matches!(lora.save(&folder.0), Err(Error::Io { .. })));
    assert_eq!(folder.files()?, ["adapter_config.json", "adapter_model.safetensors"]);
    assert!(fs::read(folder.0.join("adapter_model.safetensors"))? == before);
    Ok(())
}

#[test]
fn a_run_with_dropout_goes_on_with_the_same_bits() -> Result<()> {
    let config = LoraConfig { lora_dropout: 0.3, ..with_head() };
    let params = || ParamsAdamax { lr: 0.01.into(), gradient_accumulation_steps: 2, ..Default::default() };
    let tokens = tokens()?;
    // Rebuilds or refreshes; saves before that or after it; stops behind a step, or in the middle of an accumulation.
    for case in 0..8 {
        let (rebuilds, saves_first, last) = (case & 1 != 0, case & 2 != 0, 3 + case / 4);
        let folder = Folder::new(&format!("resume-{case}"))?;
        let state = folder.0.join("optimizer.safetensors");
        let follow = |lora: &Lora, model: &mut Attention| -> Result<()> {
            if rebuilds {
                *model = lora.build(base(DType::F32)?, Attention::load)?;
            } else {
                lora.refresh()?;
            }
            Ok(())
        };
        let step = |model: &Attention, adamax: &mut Adamax| -> Result<u64> {
            let loss = model.loss(&tokens)?;
            adamax.backward_step(&loss)?;
            Ok(bits(&loss)?[0])
        };
        let lora = Lora::new(config.clone(), 11)?;
        let mut model = lora.build(base(DType::F32)?, Attention::load)?;
        shake(&lora)?;
        follow(&lora, &mut model)?;
        let mut adamax = Adamax::from_named(lora.named_vars()?, params())?;
        let mut losses = Vec::new();
        // Every second call of the optimizer is a step.
        for call in 0..8 {
            losses.push(step(&model, &mut adamax)?);
            let is_update = call % 2 == 1;
            let is_last = call == last;
            if is_last && saves_first {
                lora.save(&folder.0)?;
                adamax.save(&state)?;
            }
            if is_update {
                follow(&lora, &mut model)?;
            }
            if is_last && !saves_first {
                lora.save(&folder.0)?;
                adamax.save(&state)?;
            }
        }
        let lora = Lora::load(&folder.0)?;
        lora.train()?;
        let mut model = lora.build(base(DType::F32)?, Attention::load)?;
        let mut adamax = Adamax::from_named(lora.named_vars()?, params())?;
        adamax.load(&state)?;
        for (call, expected) in losses.iter().enumerate().skip(last + 1) {
            assert_eq!(step(&model, &mut adamax)?, *expected, "call {call} of case {case}");
            if call % 2 == 1 {
                follow(&lora, &mut model)?;
            }
        }
        assert_ne!(losses[0], losses[2]);
    }
    Ok(())
}

#[test]
fn merged_weights_are_those_of_the_adapted_model() -> Result<()> {
    for dtype in [DType::F32, DType::F16] {
        let folder = Folder::new(&format!("merged-{dtype:?}"))?;
        let lora = Lora::new(LoraConfig { lora_dropout: 0.5, ..with_head() }, 1)?;
        assert!(matches!(lora.merge(&weights(dtype)?), Err(Error::NotBuilt)));
        let adapted = lora.build(base(dtype)?, Attention::load)?;
        shake(&lora)?;
        lora.eval()?;
        let tokens = tokens()?;
        let expected = bits(&adapted.forward(&tokens)?)?;
        lora.train()?;
        assert_ne!(bits(&adapted.forward(&tokens)?)?, expected);
        let merged = lora.build_merged(base(dtype)?, Attention::load)?.forward(&tokens)?;
        assert!(!merged.track_op());
        assert_eq!(bits(&merged)?, expected);
        let map = lora.merge(&weights(dtype)?)?;
        assert_eq!(map.len(), weights(dtype)?.len());
        assert!(map.values().all(|tensor| !tensor.track_op() && tensor.dtype() == dtype));
        let merged = Attention::load(VarBuilder::from_tensors(map, dtype, CPU))?.forward(&tokens)?;
        assert_eq!(bits(&merged)?, expected);
        let (source, target) = (folder.0.join("base.safetensors"), folder.0.join("merged.safetensors"));
        safetensors::save(&weights(dtype)?, &source)?;
        lora.save_merged(&[&source], &target)?;
        assert_eq!(folder.files()?, ["base.safetensors", "merged.safetensors"]);
        let map = safetensors::load(&target, CPU)?;
        let merged = Attention::load(VarBuilder::from_tensors(map, dtype, CPU))?.forward(&tokens)?;
        assert_eq!(bits(&merged)?, expected);

        let mut part = weights(dtype)?;
        part.remove("embed_tokens.weight");
        part.insert("encoder.layers.0.query.weight".into(), values(0, &[DIM, DIM + 1], dtype)?);
        let Err(Error::Names { missing, unexpected, mismatched }) = lora.merge(&part) else { panic!("it fits") };
        assert_eq!(missing, ["embed_tokens.weight"]);
        assert!(unexpected.is_empty());
        assert_eq!(mismatched, ["encoder.layers.0.query.lora_A.weight [2, 6] for [2, 7]"]);
        // A model without a layer that is adapted.
        let error = lora.build_merged(base(dtype)?, |vb| Ok::<_, Error>(vb.get((3, DIM), "head.weight")?)).unwrap_err();
        assert!(matches!(&error, Error::Names { unexpected, .. } if unexpected.len() == 11), "{error}");
    }
    Ok(())
}

#[test]
fn files_that_are_no_adapter_are_refused_with_all_names() -> Result<()> {
    let folder = Folder::new("wrong")?;
    let lora = Lora::new(with_head(), 1)?;
    lora.build(base(DType::F32)?, Attention::load)?;
    lora.save(&folder.0)?;
    let good = folder.tensors()?;
    let key = |name: &str| format!("base_model.model.encoder.layers.0.{name}");
    let mut wrong = good.clone();
    wrong.remove(&key("query.lora_A.weight"));
    wrong.insert(key("query.lora_magnitude_vector"), values(0, &[DIM], DType::F32)?);
    wrong.insert("encoder.layers.0.key.lora_A.weight".into(), values(0, &[2, DIM], DType::F32)?);
    wrong.insert(key("value.lora_A.weight"), values(0, &[3, DIM], DType::F32)?);
    wrong.insert(key("output.lora_B.weight"), Tensor::zeros((DIM, 2), DType::U8, CPU)?);
    folder.write(&wrong)?;
    let Err(Error::Content { path, source }) = Lora::load(&folder.0) else { panic!("it is read") };
    assert_eq!(path, folder.0.join("adapter_model.safetensors"));
    let Error::Names { missing, unexpected, mismatched } = *source else { panic!("{source}") };
    assert_eq!(missing, [key("output.lora_B.weight"), key("query.lora_A.weight")]);
    assert_eq!(unexpected, [key("query.lora_magnitude_vector"), "encoder.layers.0.key.lora_A.weight".into()]);
    let [a, b] = [key("value.lora_A.weight"), key("value.lora_B.weight")];
    let ranks = format!("{a} [3, 6] and {b} [8, 2] for rank 2");
    assert_eq!(mismatched, [format!("{} U8 [6, 2]", key("output.lora_B.weight")), ranks]);

    // Half of what the model needs, in the order in which it asks.
    let mut half = good.clone();
    half.retain(|name, _| !name.contains("query") && !name.contains("head"));
    folder.write(&half)?;
    let lora = Lora::load(&folder.0)?;
    let error = lora.build(base(DType::F32)?, Attention::load).err().map(|error| error.to_string());
    let expected = "the adapter does not fit the model: 4 missing: encoder.layers.0.query.lora_A.weight, \
                    encoder.layers.0.query.lora_B.weight, head.weight, head.bias";
    assert_eq!(error.as_deref(), Some(expected));
    // Without collecting, the first is an error of the builder.
    let error = Attention::load(lora.var_builder(base(DType::F32)?)).err().map(|error| error.to_string());
    assert_eq!(error.as_deref(), Some(expected.replace("4 missing", "2 missing").split(", head").next().unwrap()));

    fs::write(folder.0.join("adapter_model.safetensors"), b"nonsense")?;
    assert!(
        matches!(Lora::load(&folder.0), Err(Error::Format { path, .. }) if path.ends_with("adapter_model.safetensors"))
    );
    fs::write(folder.0.join("adapter_config.json"), b"nonsense")?;
    let error = Lora::load(&folder.0).unwrap_err();
    let path = folder.0.join("adapter_config.json");
    assert!(error.to_string().starts_with(&format!("{path:?}: invalid `adapter_config.json`: ")), "{error}");
    assert!(matches!(&error, Error::Content { source, .. } if matches!(**source, Error::Config { .. })), "{error}");
    let nowhere = Lora::load(folder.0.join("nowhere"));
    assert!(matches!(nowhere, Err(Error::Io { path, .. }) if path.ends_with("adapter_config.json")));
    Ok(())
}

#[test]
fn half_precision_is_read_as_f32_and_weights_that_stand_for_the_base_count() -> Result<()> {
    let folder = Folder::new("half")?;
    let lora = Lora::new(config(), 1)?;
    lora.build(base(DType::F32)?, Attention::load)?;
    shake(&lora)?;
    lora.save(&folder.0)?;
    let mut tensors = folder.tensors()?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::BF16)?;
    }
    // A table that has grown by two rows, which is adapted, and a weight that is not.
    let table = values(50, &[common::WORDS + 2, DIM], DType::F32)?;
    tensors.insert("base_model.model.embed_tokens.base_layer.weight".into(), table.clone());
    tensors.insert(
        "base_model.model.embed_tokens.lora_embedding_A".into(),
        values(51, &[2, common::WORDS + 2], DType::F32)?,
    );
    tensors.insert("base_model.model.head.bias".into(), values(52, &[3], DType::F32)?);
    folder.write(&tensors)?;
    let lora = Lora::load(&folder.0)?;
    let table_only = |vb: VarBuilder<'_>| -> candle_core::Result<[Tensor; 2]> {
        for name in ["query", "key"] {
            vb.get((DIM, DIM), &format!("encoder.layers.0.{name}.weight"))?;
        }
        vb.get((DIM + 2, DIM), "encoder.layers.0.value.weight")?;
        vb.get((DIM, DIM + 2), "encoder.layers.0.output.weight")?;
        Ok([vb.get((common::WORDS + 2, DIM), "embed_tokens.weight")?, vb.get(3, "head.bias")?])
    };
    let [weight, bias] = lora.build(base(DType::F32)?, table_only)?;
    let vars: HashMap<_, _> = lora.named_vars()?.into_iter().collect();
    assert!(vars.values().all(|var| var.dtype() == DType::F32));
    let delta = vars["embed_tokens.lora_embedding_B"].matmul(&vars["embed_tokens.lora_embedding_A"])?.t()?;
    assert!(distance(&weight, &(table + (delta * 1.5)?)?)? < 1e-6);
    assert_eq!(bits(&bias)?, bits(&values(52, &[3], DType::F32)?)?);
    assert!(lora.saved_vars()?.is_empty());

    // They are written again.
    lora.save(&folder.0)?;
    let again = folder.tensors()?;
    assert_eq!(again.len(), tensors.len());
    let name = "base_model.model.embed_tokens.base_layer.weight";
    assert_eq!(bits(&again[name])?, bits(&tensors[name])?);
    let merged = Lora::load(&folder.0)?.merge(&weights(DType::F32)?)?;
    assert_eq!(bits(&merged["embed_tokens.weight"])?, bits(&weight)?);
    assert_eq!(bits(&merged["head.bias"])?, bits(&bias)?);
    Ok(())
}
