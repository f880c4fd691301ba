//! What a model has to be: differentiable everywhere, and equal to the one whose weights it reads.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::{Device, Var};
use candle_nn::{VarBuilder, loss};
use candle_transformers::models::bert::{self, BertModel};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::config::Activation;
use super::*;
use crate::batch::Batcher;
use crate::tokenizer::Encoded;

fn config() -> Config {
    let mut config = Config::small(19, 0);
    config.hidden_size = 8;
    config.num_attention_heads = 2;
    config.num_hidden_layers = 3;
    config.intermediate_size = 12;
    config.max_position_embeddings = 10;
    config
}

/// A model of 3 classes, and its weights; none of them is 0 or 1 by chance of its kind.
fn model(config: &Config, sparse: bool, dtype: DType, is_trained: IsTrained) -> Result<(Classifier, VarMap)> {
    let (varmap, rng) = (VarMap::new(), StdRng::seed_from_u64(1));
    let mut weights = Weights::new(None, &varmap, (dtype, &Device::Cpu), (rng, 0.3), is_trained)?;
    let model = Classifier::new(config, 3, (sparse, false), &mut weights)?;
    let mut rng = StdRng::seed_from_u64(2);
    let sorted: BTreeMap<String, Var> = named(&varmap).into_iter().collect();
    for (_, var) in sorted {
        let noise: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-0.2..0.2)).collect();
        let noise = Tensor::from_vec(noise, var.shape(), &Device::Cpu)?.to_dtype(dtype)?;
        var.set(&(var.as_tensor() + noise)?)?;
    }
    Ok((model, varmap))
}

fn named(varmap: &VarMap) -> HashMap<String, Var> {
    varmap.data().lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Texts of several lengths.
fn batch() -> candle_core::Result<Batch> {
    let text = |label, length: u32| Encoded { label, ids: (0..length).map(|i| 1 + (5 * i + length) % 18).collect() };
    let texts = [text(0, 7), text(1, 3), text(2, 10), text(1, 5)];
    Batcher { padding: 0, device: Device::Cpu, ids: Device::Cpu }.batch(&texts.iter().collect::<Vec<_>>())
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.max_all()?.to_scalar()?)
}

#[test]
fn every_weight_has_a_gradient() -> Result<()> {
    for pooling in [Pooling::Cls, Pooling::Mean] {
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let config = Config { classifier_pooling: Some(pooling), hidden_act: activation, ..config() };
                let (model, varmap) = model(&config, false, dtype, |_| true)?;
                let logits = model.forward(&batch()?, Pass::Training(&mut StdRng::seed_from_u64(3)))?;
                let grads = loss::cross_entropy(&logits, &batch()?.labels)?.backward()?;
                for (name, var) in named(&varmap) {
                    let what = format!("{name} {pooling:?} {activation:?} {dtype:?}");
                    let grad = grads.get(&var).with_context(|| what.clone())?.to_dtype(DType::F32)?;
                    let norm = grad.sqr()?.sum_all()?.to_scalar::<f32>()?;
                    assert!(norm.is_finite(), "{what}: {norm}");
                    // The softmax does not see what is the same for all keys, so the bias of the keys moves nothing:
                    // its gradient is what rounding leaves.
                    assert!(norm > 0.0 || name.contains("key.bias"), "{what}: {norm}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn embeddings_of_rows_have_the_logits_and_the_gradients_of_dense_ones() -> Result<()> {
    let of = |sparse| -> Result<(Tensor, Tensor)> {
        let (model, varmap) = model(&config(), sparse, DType::F32, |_| true)?;
        let logits = model.forward(&batch()?, Pass::Evaluation)?;
        let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
        optimizer.backward_step(&loss::cross_entropy(&logits, &batch()?.labels)?)?;
        assert_eq!(optimizer.report().missing().count(), 0);
        // After one step u is the magnitude of the gradient.
        Ok((logits, optimizer.state(WORDS)?.exp_inf))
    };
    let (dense, sparse) = (of(false)?, of(true)?);
    assert_eq!(largest_difference(&dense.0, &sparse.0)?, 0.0);
    assert!(dense.1.max_all()?.to_scalar::<f32>()? > 1e-3);
    assert!(largest_difference(&dense.1, &sparse.1)? < 1e-7);
    Ok(())
}

/// How far the encoder is from candle-transformers' with the same weights, and the largest number of that one.
fn compare(model: &Classifier, config: &Config, varmap: &VarMap, batch: &Batch) -> Result<(f32, f32)> {
    let ours = model.encoder.forward(&batch.ids, &batch.mask, &mut Pass::Evaluation)?;
    let mut json = serde_json::to_value(config)?;
    json["hidden_act"] = "gelu".into(); // it has other names for the other two
    let hidden_act = match config.hidden_act {
        Activation::Gelu => bert::HiddenAct::Gelu,
        Activation::GeluTanh => bert::HiddenAct::GeluApproximate,
        Activation::Relu => bert::HiddenAct::Relu,
    };
    let reference = bert::Config { hidden_act, ..serde_json::from_value(json)? };
    let tensors = named(varmap).into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let reference = BertModel::load(weights.pp("bert"), &reference)?;
    let theirs = reference.forward(&batch.ids, &batch.ids.zeros_like()?, Some(&batch.mask))?;
    assert_eq!(ours.dims(), theirs.dims());
    Ok((largest_difference(&ours, &theirs)?, theirs.abs()?.max_all()?.to_scalar()?))
}

#[test]
fn the_encoder_is_that_of_candle_transformers() -> Result<()> {
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let config = Config { hidden_act: activation, ..config() };
        let (model, varmap) = model(&config, false, DType::F32, |_| true)?;
        let (difference, size) = compare(&model, &config, &varmap, &batch()?)?;
        assert!(size > 1.0 && difference < 2e-6, "{activation:?}: {difference} of {size}");
    }
    Ok(())
}

#[test]
fn low_precision_is_near() -> Result<()> {
    let logits = |dtype| -> Result<Tensor> {
        let (model, _) = model(&config(), false, dtype, |_| true)?;
        Ok(model.forward(&batch()?, Pass::Evaluation)?)
    };
    let exact = logits(DType::F32)?;
    for (dtype, allowed) in [(DType::F16, 0.02), (DType::BF16, 0.1)] {
        let difference = largest_difference(&exact, &logits(dtype)?)?;
        assert!(difference > 0.0 && difference < allowed, "{dtype:?}: {difference}");
    }
    Ok(())
}

#[test]
fn what_fills_up_a_batch_changes_nothing() -> Result<()> {
    for pooling in [Pooling::Cls, Pooling::Mean] {
        let (model, _) = model(&Config { classifier_pooling: Some(pooling), ..config() }, false, DType::F32, |_| true)?;
        let batcher = Batcher { padding: 0, device: Device::Cpu, ids: Device::Cpu };
        let (short, long) = (Encoded { label: 0, ids: vec![4, 5, 6] }, Encoded { label: 0, ids: (1..10).collect() });
        let alone = model.forward(&batcher.batch(&[&short])?, Pass::Evaluation)?;
        let beside = model.forward(&batcher.batch(&[&long, &short])?, Pass::Evaluation)?.narrow(0, 1, 1)?;
        assert!(largest_difference(&alone, &beside)? < 1e-6);
    }
    Ok(())
}

#[test]
fn dropout_is_drawn_from_its_seed_and_only_in_training() -> Result<()> {
    let (model, _) = model(&config(), false, DType::F32, |_| true)?;
    let training = |seed| model.forward(&batch()?, Pass::Training(&mut StdRng::seed_from_u64(seed)));
    let evaluation = || model.forward(&batch()?, Pass::Evaluation);
    assert_eq!(largest_difference(&training(1)?, &training(1)?)?, 0.0);
    assert!(largest_difference(&training(1)?, &training(2)?)? > 1e-3);
    assert_eq!(largest_difference(&evaluation()?, &evaluation()?)?, 0.0);
    assert!(largest_difference(&training(1)?, &evaluation()?)? > 1e-3);
    Ok(())
}

#[test]
fn of_a_frozen_encoder_no_graph_is_kept() -> Result<()> {
    for sparse in [false, true] {
        let (model, varmap) = model(&config(), sparse, DType::F32, is_on_top)?;
        let batch = batch()?;
        let hidden = model.encoder.forward(&batch.ids, &batch.mask, &mut Pass::Evaluation)?;
        assert!(!hidden.track_op());
        let grads = loss::cross_entropy(&model.forward(&batch, Pass::Evaluation)?, &batch.labels)?.backward()?;
        let with_gradient: BTreeSet<String> =
            named(&varmap).into_iter().filter(|(_, var)| grads.get(var).is_some()).map(|(name, _)| name).collect();
        assert_eq!(with_gradient, ["classifier.bias", "classifier.weight"].map(str::to_owned).into());
    }
    Ok(())
}

/// A folder for one test.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("finetune-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

#[test]
fn files_with_older_names_and_without_a_head_are_read_and_others_are_not() -> Result<()> {
    let folder = folder("names")?;
    let config = Config { classifier_pooling: Some(Pooling::Cls), ..config() };
    let (_, varmap) = model(&config, false, DType::F32, |_| true)?;
    let old = |name: &str| {
        let name = name.trim_start_matches("bert.");
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let encoder = named(&varmap).into_iter().filter(|(name, _)| !is_on_top(name));
    let mut tensors: HashMap<String, Tensor> =
        encoder.map(|(name, var)| (old(&name), var.as_tensor().clone())).collect();
    let read = |tensors: &HashMap<String, Tensor>| -> Result<(VarMap, Vec<String>)> {
        candle_core::safetensors::save(tensors, folder.join(WEIGHTS))?;
        let (varmap, rng) = (VarMap::new(), StdRng::seed_from_u64(7));
        let types = (DType::F32, &Device::Cpu);
        let mut weights = Weights::new(Some(&folder), &varmap, types, (rng, 0.3), |_| true)?;
        Classifier::new(&config, 3, (false, false), &mut weights)?;
        Ok((varmap, weights.fresh))
    };
    let (loaded, fresh) = read(&tensors)?;
    let on_top = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"];
    assert_eq!(fresh, on_top);
    let loaded = named(&loaded);
    for (name, var) in named(&varmap).into_iter().filter(|(name, _)| !is_on_top(name)) {
        assert_eq!(largest_difference(&var, &loaded[&name])?, 0.0, "{name}");
    }

    let refused =
        |tensors: &HashMap<String, Tensor>| read(tensors).err().map(|error| error.to_string()).unwrap_or_default();
    let query = "encoder.layer.1.attention.self.query.bias";
    let bias = tensors.insert(query.into(), Tensor::zeros(9, DType::F32, &Device::Cpu)?);
    assert_eq!(refused(&tensors), format!("bert.{query}: expected the shape [8], got [9]"));
    tensors.insert(query.into(), Tensor::zeros(8, DType::U32, &Device::Cpu)?);
    assert_eq!(refused(&tensors), format!("bert.{query}: expected floating point, got U32"));
    tensors.remove(query);
    assert!(refused(&tensors).contains(&format!("expected a tensor `bert.{query}`")), "{}", refused(&tensors));
    assert!(bias.is_some());
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn a_saved_model_is_read_again_with_its_classifier() -> Result<()> {
    let folder = folder("saved")?;
    let (model, varmap) = model(&config(), false, DType::BF16, |_| true)?;
    save_weights(&varmap, &folder)?;
    let read = |keep_classifier| -> Result<(Classifier, Vec<String>)> {
        let (varmap, rng) = (VarMap::new(), StdRng::seed_from_u64(7));
        let types = (DType::BF16, &Device::Cpu);
        let mut weights = Weights::new(Some(&folder), &varmap, types, (rng, 0.3), |_| true)?;
        Ok((Classifier::new(&config(), 3, (false, keep_classifier), &mut weights)?, weights.fresh))
    };
    let logits = |model: &Classifier| model.forward(&batch()?, Pass::Evaluation).map_err(anyhow::Error::from);
    let (same, fresh) = read(true)?;
    assert!(fresh.is_empty());
    assert_eq!(largest_difference(&logits(&model)?, &logits(&same)?)?, 0.0);
    let (other, fresh) = read(false)?;
    assert_eq!(fresh, ["classifier.weight", "classifier.bias"]);
    assert!(largest_difference(&logits(&model)?, &logits(&other)?)? > 1e-3);
    fs::remove_dir_all(&folder)?;
    Ok(())
}
