//! Groups: an embedding table that learns faster than the layer behind it, and a bias that does not decay.
//!
//! ```sh
//! cargo run --release --example 03_parameter_groups
//! ```

use candle_adamax::{Adamax, GroupLr, ParamGroup, ParamsAdamax, WeightDecay};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap, embedding, linear, loss};

fn main() -> Result<()> {
    let device = Device::Cpu;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let table = embedding(100, 8, vb.pp("items"))?;
    let head = linear(8, 1, vb.pp("head"))?;

    // Each item has a value of its own, which its row has to learn.
    let ids = Tensor::arange(0u32, 100, &device)?;
    let values = Tensor::arange(0f32, 100.0, &device)?.affine(0.1, 0.0)?.sin()?.reshape((100, 1))?;

    // The names tell the table from the rest.
    let (tables, others): (Vec<_>, Vec<_>) = {
        let vars = varmap.data().lock().map_err(|error| candle_core::Error::msg(error.to_string()))?;
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).partition(|(name, _)| name.starts_with("items"))
    };
    let mut optimizer = Adamax::from_groups(
        [
            ParamGroup::new("tables").vars(tables).lr_factor(5.0),
            ParamGroup::new("head").vars(others).weight_decay(WeightDecay::Decoupled(0.1)),
        ],
        ParamsAdamax { lr: 2e-3.into(), no_decay: vec!["bias".into()], ..Default::default() },
    )?;
    for group in optimizer.groups() {
        let lr = optimizer.group_learning_rate(&group.name)?;
        let decays = if group.weight_decay.is_some() { "a decay of its own" } else { "the optimizer's decay" };
        println!("group {:>8}: lr {lr}, {decays}", group.name);
    }

    for step in 1..=400 {
        let loss = loss::mse(&head.forward(&table.forward(&ids)?)?, &values)?;
        optimizer.backward_step(&loss)?;
        if step % 100 == 0 {
            println!("step {step}: loss {:.5}", loss.to_scalar::<f32>()?);
        }
        if step == 300 {
            // Settings can change at any time: the head rests for the last hundred steps.
            let mut settings = optimizer.groups()[1].clone();
            settings.lr = GroupLr::Factor(0.0);
            optimizer.set_group(settings)?;
            println!("the head's learning rate is 0 from now on");
        }
    }
    Ok(())
}
