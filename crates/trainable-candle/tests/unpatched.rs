//! The program that a new user writes, with candle-nn as released: its first step is an error.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_adamax::{Adamax, ErrorKind, MissingGradients, ParamsAdamax};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder, VarMap, linear, loss};
use candle_transformers::models::bert::{BertModel, Config, HiddenAct};

/// A BERT with as many variables as MiniLM, which are smaller, and a linear head.
struct Classifier {
    varmap: VarMap,
    model: BertModel,
    head: candle_nn::Linear,
}

impl Classifier {
    fn new() -> Result<Self> {
        let config = Config {
            vocab_size: 30,
            hidden_size: 16,
            num_hidden_layers: 6,
            num_attention_heads: 2,
            intermediate_size: 24,
            hidden_act: HiddenAct::Gelu,
            max_position_embeddings: 8,
            ..Config::default()
        };
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let model = BertModel::load(vb.clone(), &config)?;
        let head = linear(config.hidden_size, 2, vb.pp("head"))?;
        Ok(Self { varmap, model, head })
    }

    fn loss(&self) -> Result<Tensor> {
        let ids = Tensor::new(&[[1u32, 2, 3, 4], [5, 6, 7, 8]], &Device::Cpu)?;
        let labels = Tensor::new(&[0u32, 1], &Device::Cpu)?;
        let hidden = self.model.forward(&ids, &ids.zeros_like()?, None)?;
        Ok(loss::cross_entropy(&self.head.forward(&hidden.mean(1)?)?, &labels)?)
    }

    fn values(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let vars = self.varmap.data().lock().expect("no thread panics with the lock");
        vars.iter().map(|(name, var)| Ok((name.clone(), var.flatten_all()?.to_vec1()?))).collect()
    }
}

#[test]
fn the_first_step_is_an_error_that_names_what_stands_still() -> Result<()> {
    let classifier = Classifier::new()?;
    let mut optimizer = Adamax::from_varmap(&classifier.varmap, ParamsAdamax::default())?;
    let before = classifier.values()?;

    let grads = classifier.loss()?.backward()?;
    assert_eq!(optimizer.audit(&grads)?.missing().count(), 101);
    let error = optimizer.step_rows(&grads, []).unwrap_err();
    let ErrorKind::MissingGradients { with_gradient: 2, vars: 103, missing, .. } = error.kind() else {
        panic!("{error}");
    };
    assert!(missing.iter().all(|name| !name.starts_with("head.")) && missing.len() == 101, "{missing:?}");

    // The call of most programs.
    let error = optimizer.backward_step(&classifier.loss()?).unwrap_err().to_string();
    assert!(error.contains("2 of 103 vars had a gradient"), "{error}");
    assert!(error.contains("`embeddings.LayerNorm.bias`"), "{error}");
    assert!(error.contains("`LayerNorm`"), "{error}");
    assert_eq!(before, classifier.values()?);
    Ok(())
}

/// What the error prevents: all layers but the head stand still.
#[test]
fn where_missing_gradients_are_allowed_the_head_alone_trains() -> Result<()> {
    let classifier = Classifier::new()?;
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let mut optimizer = Adamax::from_varmap(&classifier.varmap, params)?;
    let before = classifier.values()?;
    optimizer.backward_step(&classifier.loss()?)?;
    for (name, after) in classifier.values()? {
        let changed = before.get(&name).context("a new variable")? != &after;
        assert_eq!(changed, name.starts_with("head."), "{name}");
    }
    Ok(())
}
