//! The task: a network of random weights is learned by another one of the same shape.

use anyhow::{Result, ensure};
use candle_adamax::{Adamax, CosineDecay, ParamsAdamax, StateDType};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::loss;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::Moments;

/// What goes in, the two hidden layers, and what comes out.
const SIZES: [usize; 4] = [8, 48, 48, 4];
const EXAMPLES: usize = 2048;
const BATCH: usize = 128;
/// A loss is recorded once in so many steps: the mean over them.
pub(crate) const EVERY: u64 = 50;

/// Inputs and what a hidden network makes of them, and the weights that training begins with.
pub(crate) struct Task {
    seed: u64,
    inputs: Tensor,
    targets: Tensor,
    start: Vec<Tensor>,
}

/// One training.
pub(crate) struct Run {
    /// The mean loss of every [`EVERY`] steps.
    pub(crate) losses: Vec<f64>,
    /// Of all examples at the end.
    pub(crate) final_loss: f64,
    pub(crate) bytes_per_parameter: f64,
}

impl Task {
    pub(crate) fn new(seed: u64) -> Result<Self> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let inputs = uniform(rng, &[EXAMPLES, SIZES[0]], 1.0)?;
        let hidden = weights(rng, 2.0)?;
        let targets = forward(&hidden, &inputs)?;
        Ok(Self { seed, inputs, targets, start: weights(rng, 1.0)? })
    }

    pub(crate) fn train(&self, moments: Moments, lr: f64, steps: u64) -> Result<Run> {
        let vars = self.start.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
        let state_dtype = match moments {
            Moments::Encoded(dtype) => dtype,
            Moments::NaiveBf16 => StateDType::F32,
        };
        let params = ParamsAdamax { lr: CosineDecay::new(lr, steps).into(), state_dtype, ..Default::default() };
        let named = vars.iter().enumerate().map(|(i, var)| (format!("layer.{i}"), var.clone()));
        let mut optimizer = Adamax::from_named(named, params)?;

        let rng = &mut StdRng::seed_from_u64(self.seed ^ 0x5eed);
        let (mut losses, mut sum) = (Vec::new(), 0.0);
        let layers: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        for step in 1..=steps {
            let ids: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..EXAMPLES as u32)).collect();
            let ids = Tensor::new(ids, &Device::Cpu)?;
            let predicted = forward(&layers, &self.inputs.index_select(&ids, 0)?)?;
            let loss = loss::mse(&predicted, &self.targets.index_select(&ids, 0)?)?;
            optimizer.backward_step(&loss)?;
            if moments == Moments::NaiveBf16 {
                round_moments(&mut optimizer)?;
            }
            sum += f64::from(loss.to_scalar::<f32>()?);
            if step % EVERY == 0 {
                losses.push(sum / EVERY as f64);
                sum = 0.0;
            }
        }
        let final_loss = f64::from(loss::mse(&forward(&layers, &self.inputs)?, &self.targets)?.to_scalar::<f32>()?);
        ensure!(final_loss.is_finite(), "the loss is not finite: the learning rate may be too high");
        let parameters: usize = vars.iter().map(|var| var.elem_count()).sum();
        let mut bytes = 0;
        for i in 0..vars.len() {
            bytes += optimizer.state_bytes(&format!("layer.{i}"))?;
        }
        let bytes_per_parameter = match moments {
            Moments::Encoded(_) => bytes as f64 / parameters as f64,
            Moments::NaiveBf16 => 4.0, // what it would take: here the rounded numbers are kept as f32
        };
        Ok(Run { losses, final_loss, bytes_per_parameter })
    }
}

/// What an optimizer of bf16 tensors does at the end of each step.
fn round_moments(optimizer: &mut Adamax) -> Result<()> {
    let round = |tensor: &Tensor| tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    let mut snapshot = optimizer.snapshot()?;
    for var in snapshot.vars.values_mut() {
        (var.exp_avg, var.exp_inf) = (round(&var.exp_avg)?, round(&var.exp_inf)?);
    }
    Ok(optimizer.restore(&snapshot)?)
}

/// A matrix and a bias for each layer, as `candle_nn`'s linear layers begin with, `scale` times as large.
fn weights(rng: &mut StdRng, scale: f32) -> Result<Vec<Tensor>> {
    let mut weights = Vec::new();
    for pair in SIZES.windows(2) {
        let bound = scale / (pair[0] as f32).sqrt();
        weights.push(uniform(rng, &[pair[0], pair[1]], bound)?);
        weights.push(uniform(rng, &[pair[1]], bound)?);
    }
    Ok(weights)
}

fn uniform(rng: &mut StdRng, shape: &[usize], bound: f32) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-bound..bound)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn forward(weights: &[Tensor], inputs: &Tensor) -> candle_core::Result<Tensor> {
    let mut x = inputs.clone();
    for (layer, pair) in weights.chunks(2).enumerate() {
        x = x.matmul(&pair[0])?.broadcast_add(&pair[1])?;
        if 2 * (layer + 1) < weights.len() {
            x = x.tanh()?;
        }
    }
    Ok(x)
}
