//! Quick start: fit a line, and read what the optimizer reports.
//!
//! ```sh
//! cargo run --release --example 01_quick_start
//! ```

use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap, linear, loss};

fn main() -> Result<()> {
    let device = Device::Cpu;

    // The data: y = 3 a - 2 b + 0.5.
    let x = Tensor::new(&[[0f32, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]], &device)?;
    let y = Tensor::new(&[[0.5f32], [3.5], [-1.5], [1.5], [8.5]], &device)?;

    // A `VarMap` knows its variables by name, and so does an optimizer made from it.
    let varmap = VarMap::new();
    let model = linear(2, 1, VarBuilder::from_varmap(&varmap, DType::F32, &device).pp("line"))?;
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax { lr: 0.1.into(), ..Default::default() })?;
    println!("{optimizer}");

    for step in 1..=400 {
        let loss = loss::mse(&model.forward(&x)?, &y)?;
        optimizer.backward_step(&loss)?;
        if step % 100 == 0 {
            println!("step {step}: loss {:.2e}", loss.to_scalar::<f32>()?);
        }
    }

    println!("weight {:.3?}, expected [3, -2]", model.weight().flatten_all()?.to_vec1::<f32>()?);
    for name in optimizer.names() {
        let state = optimizer.state(name)?;
        let norm = state.exp_inf.flatten_all()?.to_vec1::<f32>()?;
        println!("{name}: {} updates, infinity norm of its gradients {norm:.4?}", state.step);
    }
    Ok(())
}
