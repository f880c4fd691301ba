//! Bases that change under a model, or whose weights lie in one storage.

mod common;

use std::collections::HashMap;

use anyhow::Result;
use candle_adapters::{Error, Lora, LoraConfig};
use candle_core::{DType, Tensor, Var, safetensors};
use candle_nn::{VarBuilder, VarMap};
use common::{Attention, CPU, base, bits, config, shake, tokens, weights};

fn one(name: &str) -> LoraConfig {
    LoraConfig { target_modules: [name].into(), ..LoraConfig::default() }
}

fn sum(tensor: &Tensor) -> Result<f32> {
    Ok(tensor.to_dtype(DType::F32)?.sum_all()?.to_scalar()?)
}

#[test]
fn a_base_that_is_loaded_after_the_build_counts() -> Result<()> {
    let path = std::env::temp_dir().join(format!("candle-adapters-{}-later.safetensors", std::process::id()));
    safetensors::save(&weights(DType::F32)?, &path)?;
    let expected = {
        let lora = Lora::new(config(), 3)?;
        let model = lora.build(base(DType::F32)?, Attention::load)?;
        bits(&model.forward(&tokens()?)?)?
    };
    for rebuilds in [false, true] {
        let map = VarMap::new();
        let vb = || VarBuilder::from_varmap(&map, DType::F32, CPU);
        let lora = Lora::new(config(), 3)?;
        let mut model = lora.build(vb(), Attention::load)?;
        lora.check(&model.loss(&tokens()?)?)?;
        map.clone().load(&path)?;
        let loss = model.loss(&tokens()?)?;
        assert!(matches!(lora.check(&loss), Err(Error::Stale { .. })));
        assert!(loss.backward().is_err());
        if rebuilds {
            model = lora.build(vb(), Attention::load)?;
        } else {
            lora.refresh()?;
        }
        assert_eq!(bits(&model.forward(&tokens()?)?)?, expected);
        let loss = model.loss(&tokens()?)?;
        lora.check(&loss)?;
        loss.backward()?;
    }
    std::fs::remove_file(path)?;
    Ok(())
}

#[test]
fn one_element_of_a_base_that_changes_is_noticed() -> Result<()> {
    // Of all types; with and without a rest behind the words and lanes of the stamp; transposed in memory.
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (rows, columns, is_transposed) in [(1, 1, false), (5, 7, false), (8, 16, false), (5, 7, true)] {
            let var = Var::ones((rows, columns), dtype, CPU)?;
            let tensor = var.as_detached_tensor();
            let shown = if is_transposed { tensor.t()? } else { tensor.clone() };
            let vb = VarBuilder::from_tensors([("fc.weight".into(), shown.clone())].into(), dtype, CPU);
            let lora = Lora::new(one("fc"), 3)?;
            let weight = lora.build(vb, |vb| vb.get(shown.shape(), "fc.weight"))?;
            for index in 0..rows * columns {
                let mut values = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                values[index] = 2.0;
                var.set(&Tensor::from_vec(values, (rows, columns), CPU)?.to_dtype(dtype)?)?;
                assert!(matches!(lora.check(&weight.sum_all()?), Err(Error::Stale { .. })), "{dtype:?} {index}");
                lora.refresh()?;
                assert_eq!(bits(&weight)?, bits(&shown)?);
            }
        }
    }
    Ok(())
}

#[test]
fn of_two_bases_in_one_storage_the_last_one_counts() -> Result<()> {
    let whole = Tensor::cat(&[Tensor::zeros((4, 4), DType::F32, CPU)?, Tensor::ones((4, 4), DType::F32, CPU)?], 0)?;
    let lora = Lora::new(one("query"), 3)?;
    let build = |tensor: &Tensor| -> Result<Tensor> {
        let vb = VarBuilder::from_tensors([("query.weight".into(), tensor.clone())].into(), DType::F32, CPU);
        Ok(lora.build(vb, |vb| vb.get((4, 4), "query.weight"))?)
    };
    for (start, expected) in [(0, 0.0), (4, 16.0), (2, 8.0)] {
        assert_eq!(sum(&build(&whole.narrow(0, start, 4)?)?)?, expected);
    }
    // The same storage and offset, transposed.
    let square = Tensor::arange(0f32, 16.0, CPU)?.reshape((4, 4))?;
    for tensor in [&square, &square.t()?] {
        assert_eq!(bits(&build(tensor)?)?, bits(tensor)?);
    }
    Ok(())
}

#[test]
fn heads_that_are_trained_keep_their_values() -> Result<()> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, CPU);
    let lora = Lora::new(LoraConfig { modules_to_save: vec!["head".into()], ..config() }, 3)?;
    lora.build(vb, Attention::load)?;
    shake(&lora)?;
    let head = |lora: &Lora| -> Result<Vec<u64>> {
        let vars: HashMap<_, _> = lora.saved_vars()?.into_iter().collect();
        Ok(bits(&vars["head.weight"])?)
    };
    let before = head(&lora)?;
    for var in map.all_vars() {
        var.set(&var.zeros_like()?)?;
    }
    lora.refresh()?;
    assert_eq!(head(&lora)?, before);
    Ok(())
}
