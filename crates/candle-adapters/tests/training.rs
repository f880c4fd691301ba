//! Gradients, and weights that follow their adapters.

mod common;

use std::collections::HashMap;

use anyhow::Result;
use candle_adamax::{Adamax, ParamGroup, ParamsAdamax};
use candle_adapters::{Error, InitLora, Lora, LoraConfig};
use candle_core::{DType, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use common::{Attention, CPU, DIM, WORDS, base, bits, config, distance, shake, tokens, values, weights};

/// Adapters with values that are nowhere 0, and their model.
fn shaken(config: LoraConfig, dtype: DType) -> Result<(Lora, Attention)> {
    let lora = Lora::new(config, 3)?;
    let model = lora.build(base(dtype)?, Attention::load)?;
    shake(&lora)?;
    lora.refresh()?;
    Ok((lora, model))
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    for lora_dropout in [0.0, 0.4] {
        let (lora, model) = shaken(LoraConfig { lora_dropout, ..config() }, DType::F64)?;
        lora.eval()?;
        if lora_dropout > 0.0 {
            // From here on the masks stay, because evaluation and training draw none.
            lora.train()?;
        }
        let tokens = tokens()?;
        let grads = model.loss(&tokens)?.backward()?;
        let vars = lora.named_vars()?;
        assert_eq!(vars.len(), 10);
        let loss = || -> Result<f64> {
            lora.train()?;
            Ok(model.loss(&tokens)?.to_scalar()?)
        };
        for (name, var) in vars {
            let grad = grads.get(&var).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
            let grad = grad.flatten_all()?.to_vec1::<f64>()?;
            let start = var.flatten_all()?.to_vec1::<f64>()?;
            for index in 0..start.len() {
                let moved = |by: f64| -> Result<f64> {
                    let mut values = start.clone();
                    values[index] += by;
                    var.set(&Tensor::from_vec(values, var.shape(), CPU)?)?;
                    loss()
                };
                let step = 1e-5;
                let numeric = (moved(step)? - moved(-step)?) / (2.0 * step);
                let error = (numeric - grad[index]).abs() / grad[index].abs().max(1.0);
                assert!(error < 1e-7, "{name} {index}: {numeric} {}", grad[index]);
            }
            var.set(&Tensor::from_vec(start, var.shape(), CPU)?)?;
        }
    }
    Ok(())
}

/// The weights as candle's operations on the variables.
fn composed(lora: &Lora, dtype: DType) -> Result<HashMap<String, Tensor>> {
    let vars: HashMap<_, _> = lora.named_vars()?.into_iter().collect();
    let scale = lora.config().lora_alpha / lora.config().r as f64;
    let mut weights = weights(dtype)?;
    for module in lora.modules()? {
        let name = format!("{module}.weight");
        let delta = match vars.get(&format!("{module}.lora_A.weight")) {
            Some(a) => vars[&format!("{module}.lora_B.weight")].matmul(a)?,
            None => {
                let [a, b] = ["A", "B"].map(|letter| &vars[&format!("{module}.lora_embedding_{letter}")]);
                b.matmul(a)?.t()?
            }
        };
        let sum = (weights[&name].to_dtype(delta.dtype())? + (delta * scale)?)?.to_dtype(dtype)?;
        weights.insert(name, sum);
    }
    Ok(weights)
}

#[test]
fn outputs_and_gradients_are_those_of_the_composed_graph() -> Result<()> {
    for (dtype, adapter, tolerance) in
        [(DType::F64, DType::F64, 1e-14), (DType::F32, DType::F32, 1e-6), (DType::BF16, DType::F32, 2e-2)]
    {
        let (lora, model) = shaken(config(), dtype)?;
        let explicit = Attention::load(VarBuilder::from_tensors(composed(&lora, dtype)?, dtype, CPU))?;
        let tokens = tokens()?;
        let size = |tensor: &Tensor| distance(tensor, &tensor.zeros_like()?);
        let (output, expected) = (model.forward(&tokens)?, explicit.forward(&tokens)?);
        assert!(distance(&output, &expected)? <= tolerance * size(&expected)?);
        let grads = model.loss(&tokens)?.backward()?;
        let expected = explicit.loss(&tokens)?.backward()?;
        for (name, var) in lora.named_vars()? {
            assert_eq!(var.dtype(), adapter, "{name}");
            let (grad, expected) = (grads.get(&var).unwrap(), expected.get(&var).unwrap());
            assert_eq!(grad.dtype(), adapter, "{name}");
            let (error, size) = (distance(grad, expected)?, size(expected)?);
            assert!(size > 1e-3 && error <= 10.0 * tolerance * size, "{name} {dtype:?}: {error} of {size}");
        }
    }
    Ok(())
}

#[test]
fn a_sum_beside_a_base_in_half_precision_is_rounded_once() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let config = LoraConfig { r: 2, lora_alpha: 2.0, target_modules: ["fc"].into(), ..Default::default() };
        let base = values(4, &[5, 3], dtype)?;
        let vb = VarBuilder::from_tensors([("fc.weight".into(), base.clone())].into(), dtype, CPU);
        let lora = Lora::new(config, 3)?;
        let weight = lora.build(vb, |vb| Ok::<_, Error>(vb.get((5, 3), "fc.weight")?))?;
        shake(&lora)?;
        lora.refresh()?;
        let vars = lora.named_vars()?;
        let delta = vars[1].1.to_dtype(DType::F64)?.matmul(&vars[0].1.to_dtype(DType::F64)?)?;
        let exact = (base.to_dtype(DType::F64)? + delta)?;
        assert_eq!(bits(&weight)?, bits(&exact.to_dtype(DType::F32)?.to_dtype(dtype)?)?);
    }
    Ok(())
}

#[test]
fn the_base_is_frozen_and_has_no_gradient() -> Result<()> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, CPU);
    Attention::load(vb.clone())?;
    let lora = Lora::new(config(), 3)?;
    let model = lora.build(vb, Attention::load)?;
    shake(&lora)?;
    lora.refresh()?;
    let grads = model.loss(&tokens()?)?.backward()?;
    assert_eq!(map.all_vars().len(), 9);
    assert!(map.all_vars().iter().all(|var| grads.get(var).is_none()));
    assert!(lora.named_vars()?.iter().all(|(_, var)| grads.get(var).is_some()));
    Ok(())
}

#[test]
fn a_new_adapter_leaves_the_model_as_it_was() -> Result<()> {
    let plain = Attention::load(base(DType::F32)?)?.forward(&tokens()?)?;
    for init_lora_weights in [InitLora::Default, InitLora::Gaussian, InitLora::Random] {
        let lora = Lora::new(LoraConfig { init_lora_weights, ..config() }, 3)?;
        let adapted = lora.build(base(DType::F32)?, Attention::load)?.forward(&tokens()?)?;
        assert_eq!(distance(&plain, &adapted)? == 0.0, init_lora_weights != InitLora::Random);
        let vars: HashMap<_, _> = lora.named_vars()?.into_iter().collect();
        let spread = |name: &str| -> Result<f32> { Ok(vars[name].abs()?.max_all()?.to_scalar::<f32>()?) };
        let a = spread("encoder.layers.0.output.lora_A.weight")?;
        let bound = 1.0 / ((DIM + 2) as f32).sqrt();
        if init_lora_weights == InitLora::Gaussian {
            assert!(a > bound, "{a}");
        } else {
            assert!(a <= bound && a > 0.8 * bound, "{a}");
        }
        let (table_a, table_b) = (spread("embed_tokens.lora_embedding_A")?, spread("embed_tokens.lora_embedding_B")?);
        assert_eq!(table_a == 0.0, init_lora_weights != InitLora::Random);
        assert!(table_b > 1.0);
        assert_eq!(vars["embed_tokens.lora_embedding_A"].dims(), [2, WORDS]);
        assert_eq!(vars["embed_tokens.lora_embedding_B"].dims(), [DIM, 2]);
        assert_eq!(vars["encoder.layers.0.value.lora_A.weight"].dims(), [2, DIM]);
        assert_eq!(vars["encoder.layers.0.value.lora_B.weight"].dims(), [DIM + 2, 2]);
    }
    Ok(())
}

#[test]
fn values_depend_on_the_seed_and_the_name_alone() -> Result<()> {
    let ask = |seed: u64, order: [usize; 3]| -> Result<Vec<(String, Vec<u64>)>> {
        let lora = Lora::new(LoraConfig { target_modules: ["q", "k", "v"].into(), ..Default::default() }, seed)?;
        lora.build(VarBuilder::zeros(DType::F32, CPU), |vb| {
            order
                .iter()
                .try_for_each(|&i| linear(16, 16, vb.pp(format!("layers.{i}")).pp(["q", "k", "v"][i])).map(drop))
        })?;
        lora.named_vars()?.into_iter().map(|(name, var)| Ok((name, bits(&var)?))).collect()
    };
    let first = ask(7, [0, 1, 2])?;
    assert_eq!(first, ask(7, [2, 0, 1])?);
    assert_ne!(first, ask(8, [0, 1, 2])?);
    assert_ne!(first[0].1, first[2].1);
    Ok(())
}

#[test]
fn refresh_and_rebuild_follow_a_step_with_the_same_bits() -> Result<()> {
    let train = |rebuilds: bool| -> Result<(Vec<u64>, Vec<u64>)> {
        let (lora, mut model) = shaken(config(), DType::F32)?;
        let mut adamax =
            Adamax::from_named(lora.named_vars()?, ParamsAdamax { lr: 0.01.into(), ..Default::default() })?;
        let tokens = tokens()?;
        let mut losses = Vec::new();
        for _ in 0..5 {
            let loss = model.loss(&tokens)?;
            losses.extend(bits(&loss)?);
            adamax.backward_step(&loss)?;
            if rebuilds {
                model = lora.build(base(DType::F32)?, Attention::load)?;
            } else {
                lora.refresh()?;
            }
        }
        assert!(f64::from_bits(losses[4]) < f64::from_bits(losses[0]));
        let vars =
            lora.named_vars()?.into_iter().map(|(_, var)| bits(&var)).collect::<candle_core::Result<Vec<_>>>()?;
        Ok((losses, vars.concat()))
    };
    assert_eq!(train(false)?, train(true)?);
    Ok(())
}

#[test]
fn a_step_without_refresh_is_an_error_of_the_next_backward_pass() -> Result<()> {
    let lora = Lora::new(config(), 3)?;
    let model = lora.build(base(DType::F32)?, Attention::load)?;
    let mut adamax = Adamax::from_named(lora.named_vars()?, ParamsAdamax::default())?;
    let tokens = tokens()?;
    adamax.backward_step(&model.loss(&tokens)?)?;
    let before: Vec<_> =
        lora.named_vars()?.into_iter().map(|(_, var)| bits(&var)).collect::<candle_core::Result<_>>()?;
    for _ in 0..2 {
        let error = adamax.backward_step(&model.loss(&tokens)?).unwrap_err().to_string();
        assert!(error.contains("call `refresh()` after each step"), "{error}");
        assert!(matches!(lora.check(&model.loss(&tokens)?), Err(Error::Stale { .. })));
    }
    let after: Vec<_> =
        lora.named_vars()?.into_iter().map(|(_, var)| bits(&var)).collect::<candle_core::Result<_>>()?;
    assert_eq!(before, after);
    lora.refresh()?;
    adamax.backward_step(&model.loss(&tokens)?)?;
    Ok(())
}

#[test]
fn one_element_that_changes_is_noticed() -> Result<()> {
    for index in [0, 1] {
        let (lora, model) = shaken(config(), DType::F32)?;
        let (_, var) = &lora.named_vars()?[index];
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        let last = values.len() - 1;
        values[last] = f32::from_bits(values[last].to_bits() ^ 1);
        var.set(&Tensor::from_vec(values, var.shape(), CPU)?)?;
        assert!(model.loss(&tokens()?)?.backward().is_err());
    }
    Ok(())
}

/// A model that keeps a copy of its weight.
struct Copying(Tensor);

impl Copying {
    fn load(vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        Ok(Self(vb.pp("query").get((DIM, DIM), "weight")?.t()?.contiguous()?))
    }

    fn loss(&self) -> candle_core::Result<Tensor> {
        values(1, &[2, DIM], DType::F32)?.matmul(&self.0)?.sqr()?.sum_all()
    }
}

#[test]
fn copies_are_found_and_follow_a_rebuild() -> Result<()> {
    let config = LoraConfig { target_modules: ["query"].into(), ..Default::default() };
    let vb = || {
        Ok::<_, candle_core::Error>(VarBuilder::from_tensors(
            [("query.weight".into(), values(2, &[DIM, DIM], DType::F32)?)].into(),
            DType::F32,
            CPU,
        ))
    };
    let lora = Lora::new(config, 3)?;
    let mut model = lora.build(vb()?, Copying::load)?;
    let mut adamax = Adamax::from_named(lora.named_vars()?, ParamsAdamax::default())?;
    lora.check(&model.loss()?)?;
    adamax.backward_step(&model.loss()?)?;
    lora.refresh()?;
    let Err(Error::Copied { module, shape, copies }) = lora.check(&model.loss()?) else { panic!("no copy was found") };
    assert_eq!((module.as_str(), shape, copies), ("query", vec![DIM, DIM], 1));
    let mut losses = Vec::new();
    for _ in 0..3 {
        model = lora.build(vb()?, Copying::load)?;
        let loss = model.loss()?;
        lora.check(&loss)?;
        losses.push(loss.to_scalar::<f32>()?);
        adamax.backward_step(&loss)?;
    }
    assert!(losses[2] < losses[1] && losses[1] < losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn views_are_no_copies() -> Result<()> {
    let (lora, model) = shaken(config(), DType::F32)?;
    for _ in 0..3 {
        lora.check(&model.loss(&tokens()?)?)?;
        shake(&lora)?;
        lora.refresh()?;
    }
    Ok(())
}

#[test]
fn a_weight_that_is_asked_for_twice_is_one_tensor() -> Result<()> {
    let lora = Lora::new(LoraConfig { target_modules: ["tied"].into(), ..Default::default() }, 3)?;
    let base = || {
        VarBuilder::from_tensors(
            [("tied.weight".into(), Tensor::ones((4, 4), DType::F32, CPU).unwrap())].into(),
            DType::F32,
            CPU,
        )
    };
    let [first, second] =
        lora.build(base(), |vb| Ok::<_, Error>([vb.get((4, 4), "tied.weight")?, vb.get_unchecked("tied.weight")?]))?;
    assert_eq!(first.id(), second.id());
    let grads = (first + second)?.sum_all()?.backward()?;
    let (_, b) = &lora.named_vars()?[1];
    let once = lora.build(base(), |vb| Ok::<_, Error>(vb.get((4, 4), "tied.weight")?))?.sum_all()?.backward()?;
    assert_eq!(bits(&(once.get(b).unwrap() * 2.0)?)?, bits(grads.get(b).unwrap())?);
    Ok(())
}

#[test]
fn dropout_leaves_input_features_out_and_draws_anew() -> Result<()> {
    const FEATURES: usize = 400;
    let config =
        LoraConfig { r: 2, lora_alpha: 2.0, lora_dropout: 0.25, target_modules: ["fc"].into(), ..Default::default() };
    let lora = Lora::new(LoraConfig { init_lora_weights: InitLora::Random, ..config.clone() }, 9)?;
    let vb = || VarBuilder::zeros(DType::F32, CPU);
    let weight = lora.build(vb(), |vb| Ok::<_, Error>(vb.get((3, FEATURES), "fc.weight")?))?;
    let full = lora.build_merged(vb(), |vb| Ok::<_, Error>(vb.get((3, FEATURES), "fc.weight")?))?;
    // With a base of 0 a column is 0, or 4/3 of what it is without the dropout.
    let left_out = |weight: &Tensor| -> Result<Vec<bool>> {
        let (columns, full) = (weight.t()?.to_vec2::<f32>()?, full.t()?.to_vec2::<f32>()?);
        Ok(columns
            .iter()
            .zip(&full)
            .map(|(column, full)| {
                let is_zero = column.iter().all(|value| *value == 0.0);
                let is_scaled = column.iter().zip(full).all(|(value, full)| (value - full / 0.75).abs() < 1e-6);
                assert!(is_zero != is_scaled, "{column:?} {full:?}");
                is_zero
            })
            .collect())
    };
    let first = left_out(&weight)?;
    let share = first.iter().filter(|is_out| **is_out).count() as f64 / FEATURES as f64;
    assert!((share - 0.25).abs() < 0.07, "{share}");
    let grads = weight.sum_all()?.backward()?;
    let a_grad = grads.get(&lora.named_vars()?[0].1).unwrap().t()?.to_vec2::<f32>()?;
    for (column, is_out) in a_grad.iter().zip(&first) {
        assert_eq!(column.iter().all(|value| *value == 0.0), *is_out);
    }
    lora.refresh()?;
    let second = left_out(&weight)?;
    assert_ne!(first, second);

    lora.eval()?;
    assert!(!lora.is_training());
    assert_eq!(bits(&weight)?, bits(&full)?);
    lora.refresh()?;
    assert_eq!(bits(&weight)?, bits(&full)?);
    // The masks of before, because evaluation draws none.
    lora.train()?;
    assert_eq!(left_out(&weight)?, second);

    // The same run again has the same masks.
    let again = Lora::new(LoraConfig { init_lora_weights: InitLora::Random, ..config }, 9)?;
    let weight = again.build(vb(), |vb| Ok::<_, Error>(vb.get((3, FEATURES), "fc.weight")?))?;
    assert_eq!(left_out(&weight)?, first);
    // Building again draws, too.
    again.build(vb(), |vb| Ok::<_, Error>(vb.get((3, FEATURES), "fc.weight")?))?;
    assert_eq!(left_out(&weight)?, second);
    Ok(())
}

#[test]
fn heads_are_trained_whole_beside_the_adapters() -> Result<()> {
    let config = LoraConfig { modules_to_save: vec!["head".into()], ..config() };
    let lora = Lora::new(config, 3)?;
    let model = lora.build(base(DType::F32)?, Attention::load)?;
    let names = |vars: Vec<(String, Var)>| vars.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(lora.saved_vars()?), ["head.bias", "head.weight"]);
    assert_eq!(lora.named_vars()?.len(), 12);
    let groups = [
        ParamGroup::new("adapters").vars(lora.adapter_vars()?),
        ParamGroup::new("head").vars(lora.saved_vars()?).lr_factor(0.5),
    ];
    let mut adamax = Adamax::from_groups(groups, ParamsAdamax { lr: 0.01.into(), ..Default::default() })?;
    let (tokens, before) = (tokens()?, weights(DType::F32)?);
    let first = model.loss(&tokens)?.to_scalar::<f32>()?;
    for _ in 0..5 {
        adamax.backward_step(&model.loss(&tokens)?)?;
        lora.refresh()?;
    }
    assert!(model.loss(&tokens)?.to_scalar::<f32>()? < first);
    for (name, var) in lora.saved_vars()? {
        assert!(distance(&var, &before[&name])? > 0.0);
    }
    // The map that the base came from is as it was.
    assert_eq!(bits(&before["head.weight"])?, bits(&weights(DType::F32)?["head.weight"])?);
    Ok(())
}

#[test]
fn a_head_that_the_base_lacks_is_made_from_the_seed() -> Result<()> {
    let config = LoraConfig { modules_to_save: vec!["head".into()], ..config() };
    let head = |seed: u64| -> Result<(Vec<u64>, Vec<u64>)> {
        let mut encoder = weights(DType::F32)?;
        encoder.retain(|name, _| !name.starts_with("head"));
        let vb = VarBuilder::from_tensors(encoder, DType::F32, CPU);
        let lora = Lora::new(config.clone(), seed)?;
        lora.build(vb, |vb| {
            assert!(!vb.contains_tensor("head.weight") && vb.contains_tensor("embed_tokens.weight"));
            let model = Attention::load(vb.clone())?;
            assert!(vb.contains_tensor("head.weight"));
            Ok::<_, candle_core::Error>(model)
        })?;
        let vars: HashMap<_, _> = lora.saved_vars()?.into_iter().collect();
        Ok((bits(&vars["head.weight"])?, bits(&vars["head.bias"])?))
    };
    let (weight, bias) = head(1)?;
    assert_eq!((weight.clone(), bias.clone()), head(1)?);
    assert_ne!(weight, head(2)?.0);
    // What `candle_nn::linear` asks for: Kaiming's weights, and a bias in ±1/√in.
    assert!(bias.iter().all(|bits| f64::from_bits(*bits).abs() <= 1.0 / (DIM as f64).sqrt()));
    assert!(weight.iter().any(|bits| f64::from_bits(*bits).abs() > 0.2));
    Ok(())
}

#[test]
fn prefixes_give_whole_names() -> Result<()> {
    let mut tensors = HashMap::new();
    for (name, tensor) in weights(DType::F32)? {
        tensors.insert(format!("model.{name}"), tensor);
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, CPU).pp("model");
    let lora = Lora::new(config(), 3)?;
    lora.build(vb, Attention::load)?;
    assert_eq!(lora.modules()?[1], "model.encoder.layers.0.key");
    Ok(())
}

#[test]
fn bases_of_all_kinds_give_the_same_model() -> Result<()> {
    let path = std::env::temp_dir().join(format!("candle-adapters-{}-base.safetensors", std::process::id()));
    candle_core::safetensors::save(&weights(DType::F32)?, &path)?;
    let bytes = std::fs::read(&path)?;
    let varmap = VarMap::new();
    Attention::load(VarBuilder::from_varmap(&varmap, DType::F32, CPU))?;
    let mut map = varmap.clone();
    map.load(&path)?;
    // SAFETY: nothing else opens the file.
    let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, CPU)? };
    let bases = [
        base(DType::F32)?,
        mapped,
        VarBuilder::from_buffered_safetensors(bytes, DType::F32, CPU)?,
        VarBuilder::from_varmap(&varmap, DType::F32, CPU),
    ];
    let mut outputs = Vec::new();
    for vb in bases {
        let lora = Lora::new(config(), 3)?;
        let model = lora.build(vb.clone(), Attention::load)?;
        shake(&lora)?;
        lora.refresh()?;
        outputs.push(bits(&model.forward(&tokens()?)?)?);
        // What is not there is the base's error.
        let message = |vb: VarBuilder<'_>| {
            let error = vb.pp("no").get(3, "where").err().map(|error| error.to_string());
            error.map(|text| text.lines().next().unwrap_or_default().to_owned())
        };
        assert_eq!(message(lora.var_builder(vb.clone())), message(vb.clone()));
        assert_eq!(vb.contains_tensor("head.bias"), lora.var_builder(vb.clone()).contains_tensor("head.bias"));
        assert_eq!(vb.contains_tensor("head"), lora.var_builder(vb).contains_tensor("head"));
    }
    assert!(outputs.iter().all(|other| *other == outputs[0]));
    std::fs::remove_file(path)?;
    Ok(())
}

#[test]
fn weights_stored_as_in_by_out_are_adapted_transposed() -> Result<()> {
    let config = LoraConfig { fan_in_fan_out: true, target_modules: ["c_attn"].into(), ..Default::default() };
    let base = values(5, &[4, 7], DType::F32)?;
    let lora = Lora::new(config, 3)?;
    let vb = VarBuilder::from_tensors([("c_attn.weight".into(), base.clone())].into(), DType::F32, CPU);
    let weight = lora.build(vb, |vb| Ok::<_, Error>(vb.get((4, 7), "c_attn.weight")?))?;
    shake(&lora)?;
    lora.refresh()?;
    let vars = lora.named_vars()?;
    let (a, b) = (&vars[0].1, &vars[1].1);
    assert_eq!((a.dims(), b.dims()), (&[8, 4][..], &[7, 8][..]));
    assert!(distance(&weight, &(base + b.matmul(a)?.t()?)?)? < 1e-6);
    let x = values(6, &[3, 4], DType::F32)?;
    let grads = x.matmul(&weight)?.sqr()?.sum_all()?.backward()?;
    let explicit = x.matmul(&weight.detach())?;
    let explicit = ((explicit - x.matmul(&b.matmul(a)?.t()?.detach())?)? + x.matmul(&b.matmul(a)?.t()?)?)?;
    let expected = explicit.sqr()?.sum_all()?.backward()?;
    for var in [a, b] {
        assert!(distance(grads.get(var).unwrap(), expected.get(var).unwrap())? < 1e-3);
    }
    Ok(())
}

#[test]
fn what_cannot_be_adapted_is_an_error_that_names_it() -> Result<()> {
    let norm = || VarBuilder::zeros(DType::F32, CPU);
    let lora = Lora::new(LoraConfig { target_modules: ["norm"].into(), ..Default::default() }, 3)?;
    let error = lora.build(norm(), |vb| Ok::<_, Error>(vb.get(4, "norm.weight")?)).unwrap_err().to_string();
    assert_eq!(error, "weight \"norm.weight\": expected two dimensions, because `target_modules` matches, got [4]");

    let error = lora.build(norm(), |vb| Ok::<_, Error>(vb.get((4, 4), "fc.weight")?)).unwrap_err().to_string();
    assert_eq!(
        error,
        "no module of the model matches `target_modules` = [\"norm\"]; it has 1 weights of two dimensions: fc"
    );
    assert!(matches!(lora.named_vars(), Err(Error::NotBuilt)));
    assert!(matches!(lora.refresh(), Err(Error::NotBuilt)));

    // A base that leads to variables itself.
    let var = Var::ones((4, 4), DType::F32, CPU)?;
    let tracked = VarBuilder::from_tensors([("norm.weight".into(), (var.as_tensor() * 2.0)?)].into(), DType::F32, CPU);
    let error = lora.build(tracked, |vb| Ok::<_, Error>(vb.get((4, 4), "norm.weight")?)).unwrap_err().to_string();
    assert!(error.contains("the result of tracked operations"), "{error}");

    let integers = VarBuilder::from_tensors(
        [("norm.weight".into(), Tensor::ones((4, 4), DType::U8, CPU)?)].into(),
        DType::U8,
        CPU,
    );
    let error = lora.build(integers, |vb| Ok::<_, Error>(vb.get((4, 4), "norm.weight")?)).unwrap_err().to_string();
    assert!(error.contains("expected f32, f64, f16 or bf16, got U8"), "{error}");
    Ok(())
}

#[test]
fn a_build_that_fails_leaves_the_adapters_as_they_were() -> Result<()> {
    let (lora, model) = shaken(LoraConfig { lora_dropout: 0.5, ..config() }, DType::F32)?;
    let before = bits(&model.forward(&tokens()?)?)?;
    let other = || -> Result<VarBuilder<'static>> {
        let mut other = weights(DType::F32)?;
        other.insert("more.query.weight".into(), values(1, &[3, 3], DType::F32)?);
        other.insert("embed_tokens.weight".into(), values(77, &[WORDS, DIM], DType::F32)?);
        Ok(VarBuilder::from_tensors(other, DType::F32, CPU))
    };
    let failed = lora.build(other()?, |vb| {
        vb.get((3, 3), "more.query.weight")?;
        Attention::load(vb.clone())?;
        vb.get(1, "nothing")
    });
    assert!(failed.is_err());
    assert_eq!(lora.named_vars()?.len(), 10);
    assert_eq!(bits(&model.forward(&tokens()?)?)?, before);
    model.loss(&tokens()?)?.backward()?;
    Ok(())
}

#[test]
fn other_threads_may_build_and_run() -> Result<()> {
    let lora = Lora::new(config(), 3)?;
    // One base, so that no weight is written again.
    let vb = base(DType::F32)?;
    let model = lora.build(vb.clone(), Attention::load)?;
    shake(&lora)?;
    lora.refresh()?;
    let expected = bits(&model.forward(&tokens()?)?)?;
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<u64>> {
                    let model = lora.clone().build(vb.clone(), Attention::load)?;
                    model.loss(&tokens()?)?.backward()?;
                    Ok(bits(&model.forward(&tokens()?)?)?)
                })
            })
            .collect();
        for run in runs {
            assert_eq!(run.join().unwrap().unwrap(), expected);
        }
    });
    Ok(())
}

#[test]
fn a_layer_of_a_user_with_a_head_of_its_own_trains() -> Result<()> {
    // The head comes from a map, beside the adapters.
    let map = VarMap::new();
    let head: Linear = linear(3, 2, VarBuilder::from_varmap(&map, DType::F32, CPU))?;
    let lora = Lora::new(config(), 3)?;
    let model = lora.build(base(DType::F32)?, Attention::load)?;
    shake(&lora)?;
    lora.refresh()?;
    let grads = head.forward(&model.forward(&tokens()?)?)?.sqr()?.sum_all()?.backward()?;
    let vars = lora.named_vars()?.into_iter().map(|(_, var)| var).chain(map.all_vars());
    assert_eq!(vars.filter(|var| grads.get(var).is_some()).count(), 12);
    Ok(())
}
