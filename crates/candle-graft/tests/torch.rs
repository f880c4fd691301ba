//! Results and gradients in f32 against those of PyTorch, which `record.py` has recorded.

mod common;

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use candle_core::{D, Device, Tensor};
use candle_graft::{
    Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope, rope_i, rope_thd,
    sigmoid, silu, softmax, softmax_last_dim,
};
use common::{assert_close, derive};

struct Recorded(HashMap<String, Tensor>);

impl Recorded {
    fn get(&self, case: &str, name: &str) -> Result<&Tensor> {
        self.0.get(&format!("{case}/{name}")).with_context(|| format!("{case}/{name} has not been recorded"))
    }

    /// Compares the result of `function` for the first arguments, and the gradients of all of them.
    fn check(
        &self,
        case: &str,
        args: usize,
        function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    ) -> Result<()> {
        let names: Vec<String> = (0..args).map(|i| i.to_string()).collect();
        let args = names.iter().map(|name| self.get(case, name).cloned()).collect::<Result<Vec<_>>>()?;
        let (y, grads) = derive(&args, Some(self.get(case, "weights")?), function)?;
        assert_close(case, &y, self.get(case, "y")?, 1e-5)?;
        for (i, grad) in grads.iter().enumerate() {
            let name = format!("grad{i}");
            assert_close(&format!("{case}/{name}"), grad, self.get(case, &name)?, 1e-5)?;
        }
        Ok(())
    }
}

fn recorded() -> Result<Recorded> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/torch.safetensors");
    Ok(Recorded(candle_core::safetensors::load(path, &Device::Cpu)?))
}

#[test]
fn the_normalizations() -> Result<()> {
    let torch = recorded()?;
    torch.check("layer_norm", 3, |a| layer_norm(&a[0], &a[1], Some(&a[2]), 1e-5))?;
    torch.check("layer_norm_no_bias", 2, |a| layer_norm(&a[0], &a[1], None, 1e-5))?;
    torch.check("rms_norm", 2, |a| rms_norm(&a[0], &a[1], 1e-6))
}

#[test]
fn the_softmax_and_its_logarithm() -> Result<()> {
    let torch = recorded()?;
    torch.check("softmax", 1, |a| softmax_last_dim(&a[0]))?;
    torch.check("softmax_dim1", 1, |a| softmax(&a[0], 1))?;
    torch.check("log_softmax", 1, |a| log_softmax(&a[0], D::Minus1))
}

#[test]
fn the_activations() -> Result<()> {
    let torch = recorded()?;
    torch.check("gelu", 1, |a| gelu(&a[0]))?;
    torch.check("gelu_tanh", 1, |a| gelu_tanh(&a[0]))?;
    torch.check("silu", 1, |a| silu(&a[0]))?;
    torch.check("sigmoid", 1, |a| sigmoid(&a[0]))
}

#[test]
fn the_linear_layer() -> Result<()> {
    let torch = recorded()?;
    torch.check("linear", 3, |a| linear(&a[0], &a[1], Some(&a[2])))?;
    torch.check("linear_no_bias", 2, |a| linear(&a[0], &a[1], None))
}

#[test]
fn the_rotary_embeddings() -> Result<()> {
    let torch = recorded()?;
    torch.check("rope", 3, |a| rope(&a[0], &a[1], &a[2]))?;
    torch.check("rope_batched", 3, |a| rope(&a[0], &a[1], &a[2]))?;
    torch.check("rope_i", 3, |a| rope_i(&a[0], &a[1], &a[2]))?;
    torch.check("rope_thd", 3, |a| rope_thd(&a[0], &a[1], &a[2]))?;
    // cos and sin as constants, as they are in models: by the kernels.
    for (case, form) in [("rope", rope as fn(&_, &_, &_) -> _), ("rope_batched", rope), ("rope_thd", rope_thd)] {
        let (cos, sin) = (torch.get(case, "1")?, torch.get(case, "2")?);
        torch.check(case, 1, |a| form(&a[0], cos, sin))?;
    }
    let (cos, sin) = (torch.get("rope_i", "1")?, torch.get("rope_i", "2")?);
    torch.check("rope_i", 1, |a| rope_i(&a[0], cos, sin))
}

#[test]
fn the_cross_entropy() -> Result<()> {
    let torch = recorded()?;
    let targets = torch.get("cross_entropy", "1")?;
    torch.check("cross_entropy", 1, |a| cross_entropy(&a[0], targets))
}

#[test]
fn attention_with_groups_masks_and_a_cap() -> Result<()> {
    let torch = recorded()?;
    torch.check("attention_gqa_causal", 3, |a| {
        attention(&a[0], &a[1], &a[2], 0.3, &Mask::Causal { kv_offset: 0 }, None, None)
    })?;
    torch.check("attention_softcap", 3, |a| {
        attention(&a[0], &a[1], &a[2], 0.7, &Mask::Causal { kv_offset: 4 }, Some(2.0), None)
    })?;
    torch.check("attention_mask", 4, |a| attention(&a[0], &a[1], &a[2], 0.3, &Mask::Tensor(a[3].clone()), None, None))
}
