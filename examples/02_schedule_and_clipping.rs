//! A learning rate that warms up and falls, and gradients that are clipped where the ground is steep.
//!
//! The valley of Rosenbrock's function has walls on which the gradient is hundreds of times as large as on its floor.
//! Adamax's own norm remembers such a gradient for a thousand steps and goes slowly meanwhile; clipping keeps it short.
//!
//! ```sh
//! cargo run --release --example 02_schedule_and_clipping
//! ```

use candle_adamax::{Adamax, Clip, CosineDecay, ParamsAdamax};
use candle_core::{Device, Result, Tensor, Var};

const STEPS: u64 = 2_000;

fn main() -> Result<()> {
    // Keras's CosineDecay: 100 calls from 0 up to 0.1, then half a cosine down to a hundredth of that.
    let schedule =
        CosineDecay { warmup_target: Some(0.1), warmup_steps: 100, alpha: 0.01, ..CosineDecay::new(0.0, STEPS - 100) };
    println!("learning rate: {schedule}");

    for clip in [None, Some(Clip::GlobalNorm(1.0))] {
        println!("\nclip: {clip:?}");
        let params = ParamsAdamax {
            lr: schedule.clone().into(),
            clip,
            measure_norm: true, // also where nothing is clipped
            ..Default::default()
        };
        let point = Var::new(&[-1.5f64, 2.0], &Device::Cpu)?;
        let mut optimizer = Adamax::from_named([("point", point.clone())], params)?;
        for step in 1..=STEPS {
            let loss = rosenbrock(&point)?;
            optimizer.backward_step(&loss)?;
            if step == 1 || step % 500 == 0 {
                let (report, loss) = (optimizer.report(), loss.to_scalar::<f64>()?);
                let norm = report.total_norm().unwrap_or_default();
                println!("step {step:>4}: lr {:.5}, gradient norm {norm:>8.3}, loss {loss:.2e}", report.lr());
            }
        }
        println!("ends at {:.4?}; the minimum is at [1, 1]", point.to_vec1::<f64>()?);
    }
    Ok(())
}

/// `(1 - x)^2 + 100 (y - x^2)^2`
fn rosenbrock(point: &Tensor) -> Result<Tensor> {
    let (x, y) = (point.get(0)?, point.get(1)?);
    x.affine(-1.0, 1.0)?.sqr()? + ((y - x.sqr()?)?.sqr()? * 100.0)?
}
