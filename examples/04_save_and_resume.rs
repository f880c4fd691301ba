//! Save, stop, resume: the bits of a run that was never interrupted.
//!
//! The optimizer writes its own state; the weights are written by candle's `VarMap::save`.
//!
//! ```sh
//! cargo run --release --example 04_save_and_resume
//! ```

use anyhow::ensure;
use candle_adamax::{Adamax, CosineDecay, Ema, ParamsAdamax};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear, loss};

const HALF: usize = 50;

fn main() -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("candle-adamax-example-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let (weights, state) = (folder.join("model.safetensors"), folder.join("optimizer.safetensors"));

    // The first half, and what a process leaves behind.
    let (varmap, model, mut optimizer) = start()?;
    train(&model, &mut optimizer)?;
    varmap.save(&weights)?;
    optimizer.save(&state)?;
    println!("saved after {} updates: {} bytes", optimizer.updates(), std::fs::metadata(&state)?.len());

    // The second half, without an interruption.
    train(&model, &mut optimizer)?;
    let unbroken = model.weight().flatten_all()?.to_vec1::<f32>()?;

    // Another process: a new model and a new optimizer, then everything from the files.
    let (mut varmap, model, mut optimizer) = start()?;
    varmap.load(&weights)?;
    optimizer.load(&state)?;
    println!("resumed at {optimizer}");
    train(&model, &mut optimizer)?;
    let resumed = model.weight().flatten_all()?.to_vec1::<f32>()?;

    println!("unbroken {unbroken:?}\nresumed  {resumed:?}");
    ensure!(unbroken == resumed, "a resumed run has to have the same bits");

    // A checkpoint of something else is refused, and changes nothing.
    let mut other = Adamax::from_named([("other", candle_core::Var::zeros(3, DType::F32, &Device::Cpu)?)], params())?;
    if let Err(error) = other.load(&state) {
        println!("loading it into another model: {error}");
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

fn params() -> ParamsAdamax {
    ParamsAdamax {
        lr: CosineDecay::new(0.05, 2 * HALF as u64).into(),
        ema: Some(Ema { momentum: 0.9, overwrite_frequency: None }),
        gradient_accumulation_steps: 2,
        ..Default::default()
    }
}

fn start() -> anyhow::Result<(VarMap, Linear, Adamax)> {
    let varmap = VarMap::new();
    let model = linear(3, 1, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    let optimizer = Adamax::from_varmap(&varmap, params())?;
    Ok((varmap, model, optimizer))
}

fn train(model: &Linear, optimizer: &mut Adamax) -> anyhow::Result<()> {
    let x = Tensor::new(&[[1f32, 2.0, 0.5], [-1.0, 0.3, 2.0], [0.7, -0.2, 1.0]], &Device::Cpu)?;
    let y = Tensor::new(&[[1f32], [0.0], [-1.0]], &Device::Cpu)?;
    for _ in 0..HALF {
        let loss = loss::mse(&model.forward(&x)?, &y)?;
        optimizer.backward_step(&loss)?;
    }
    Ok(())
}
