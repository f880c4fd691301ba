//! Classifiers of images.

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{convnext, vit};
use serde_json::json;

use crate::check::{Family, Loss, check};
use crate::{HEADS, HIDDEN, cross_entropy};

/// Two images of this size.
fn images(size: usize, dtype: DType) -> Result<Tensor> {
    let number = |i: usize| (i as f64 * 12.9898).sin() + (i as f64 * 0.317).cos();
    let numbers: Vec<_> = (0..2 * 3 * size * size).map(number).collect();
    Ok(Tensor::from_vec(numbers, (2, 3, size, size), &Device::Cpu)?.to_dtype(dtype)?)
}

fn load_vit(vb: VarBuilder<'static>) -> Result<Loss> {
    let config: vit::Config = serde_json::from_value(json!({
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 24,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 8, "patch_size": 4, "num_channels": 3,
        "qkv_bias": true,
    }))?;
    let images = images(8, vb.dtype())?;
    let model = vit::Model::new(&config, 3, vb)?;
    Ok(Box::new(move || Ok(cross_entropy(&model.forward(&images)?)?)))
}

#[test]
fn vit() -> Result<()> {
    check(&Family { name: "ViT", dtype: DType::F64, load: load_vit, unused: &[], cancelled: &["key.bias"], cut: &[] })
}

fn load_convnext(vb: VarBuilder<'static>) -> Result<Loss> {
    let images = images(32, vb.dtype())?;
    let model = convnext::convnext(&convnext::Config::atto(), 3, vb)?;
    Ok(Box::new(move || Ok(cross_entropy(&model.forward(&images)?)?)))
}

#[test]
fn convnext() -> Result<()> {
    check(&Family { name: "ConvNeXt", dtype: DType::F64, load: load_convnext, unused: &[], cancelled: &[], cut: &[] })
}
