//! Tables, lookups and the optimizer: whatever way a gradient takes from a lookup to its rows, it arrives once.
//!
//! The reference is candle's own `index_select` on a variable of its own, whose gradient is dense: of it, the rows that
//! were looked up are what a table has to be given.

use candle_adamax::{Adamax, Embedding, EmbeddingBag, MissingGradients, ParamsAdamax, Pooling, Table, TouchedRows};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};

use crate::common::folder::Folder;
use crate::common::{bits, ids, noise, tensor};

const ROWS: usize = 20;
const DIM: usize = 3;

/// The same weights twice: under a table, and for candle's own way.
struct Pair {
    var: Var,
    layer: Embedding,
    optimizer: Adamax,
    dense: Var,
    dense_optimizer: Adamax,
}

fn params() -> ParamsAdamax {
    ParamsAdamax { lr: 0.1.into(), missing_gradients: MissingGradients::Allow, ..Default::default() }
}

fn optimizer(var: &Var) -> Adamax {
    Adamax::from_named([("table", var.clone())], params()).unwrap()
}

/// Factors that tell the elements of a result apart.
fn factors(seed: u64, n: usize) -> Tensor {
    tensor(&noise(seed, n * DIM), &[n, DIM], DType::F32)
}

impl Pair {
    fn new() -> Self {
        let weights = tensor(&noise(7, ROWS * DIM), &[ROWS, DIM], DType::F32);
        let (var, dense) = (Var::from_tensor(&weights).unwrap(), Var::from_tensor(&weights.copy().unwrap()).unwrap());
        let layer = Embedding::new(var.as_tensor().clone()).unwrap();
        Self { optimizer: optimizer(&var), dense_optimizer: optimizer(&dense), var, layer, dense }
    }

    /// A loss of the rows `of`, and the same of candle's.
    fn losses(&self, of: &[u32], seed: u64) -> (Tensor, Tensor) {
        let loss = |rows: Tensor| (rows * factors(seed, of.len())).unwrap().sum_all().unwrap();
        (loss(self.layer.forward(&ids(of)).unwrap()), loss(self.dense.index_select(&ids(of), 0).unwrap()))
    }

    /// A step with candle's gradient, of which only the rows `touched` count.
    fn dense_step(&mut self, grads: &GradStore, touched: &[u32]) {
        self.dense_optimizer.step_rows(grads, [(&self.dense, TouchedRows::Ids(&ids(touched)))]).unwrap();
    }

    /// Both have the same weights and moments, up to the rounding of sums that were made in another order.
    #[track_caller]
    fn assert_same(&self) {
        let state = |optimizer: &Adamax, var: &Var| {
            let state = optimizer.state("table").unwrap();
            [var.as_tensor().clone(), state.exp_avg, state.exp_inf].map(|tensor| crate::common::values(&tensor))
        };
        let all = state(&self.optimizer, &self.var).into_iter().zip(state(&self.dense_optimizer, &self.dense));
        for (what, (got, expected)) in ["weight", "exp_avg", "exp_inf"].into_iter().zip(all) {
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert!((got - expected).abs() <= 1e-6, "{what}[{i}]: expected {expected}, got {got}");
            }
        }
        assert_eq!(self.optimizer.updates(), self.dense_optimizer.updates());
    }
}

#[test]
fn several_lookups_in_one_graph_are_summed() -> Result<()> {
    let mut pair = Pair::new();
    let lists: [&[u32]; 3] = [&[1, 5, 1], &[5, 19], &[0, 1]];
    for step in 0..3 {
        let losses: Vec<(Tensor, Tensor)> =
            lists.iter().enumerate().map(|(i, of)| pair.losses(of, 10 * step + i as u64)).collect();
        let total = |side: fn(&(Tensor, Tensor)) -> Tensor| -> Result<Tensor> {
            losses.iter().map(side).try_fold(Tensor::zeros((), DType::F32, &Device::Cpu)?, |sum, loss| sum + loss)
        };
        let (ours, dense) = (total(|losses| losses.0.clone())?, total(|losses| losses.1.clone())?);
        pair.optimizer.step(&ours.backward()?)?;
        pair.dense_step(&dense.backward()?, &[0, 1, 5, 19]);
        pair.assert_same();
    }
    Ok(())
}

#[test]
fn layers_on_one_weight_share_it_whenever_they_were_made() -> Result<()> {
    let mut pair = Pair::new();
    // This one is younger than the optimizer, which the first layer is not; and a bag is another kind of layer.
    let later = EmbeddingBag::new(pair.var.as_tensor().clone(), Pooling::Sum)?;
    let bags = Tensor::new(&[[3u32, 4], [4, 5]], &Device::Cpu)?;
    let (ours, dense) = pair.losses(&[4, 6], 1);
    let factors = factors(2, 2);
    let ours = (ours + (later.forward(&bags)? * &factors)?.sum_all()?)?;
    let pooled = pair.dense.index_select(&bags.flatten_all()?, 0)?.reshape((2, 2, DIM))?.sum(1)?;
    let dense = (dense + (pooled * &factors)?.sum_all()?)?;
    pair.optimizer.step(&ours.backward()?)?;
    pair.dense_step(&dense.backward()?, &[3, 4, 5, 6]);
    pair.assert_same();
    Ok(())
}

#[test]
fn backward_passes_are_merged_when_their_losses_are_gone() -> Result<()> {
    let mut pair = Pair::new();
    for step in 0..2 {
        let (mut ours, mut dense) = (GradStore::default(), GradStore::default());
        // More than the table keeps by itself.
        for pass in 0..150 {
            let (a, b) = pair.losses(&[pass % 7, 9, pass % 3], u64::from(pass) + 1000 * step);
            ours.extend(a.backward()?)?;
            dense.extend(b.backward()?)?;
        }
        pair.optimizer.step(&ours)?;
        pair.dense_step(&dense, &[0, 1, 2, 3, 4, 5, 6, 9]);
    }
    // Sums of 150 numbers in another order.
    let off = (pair.var.as_tensor() - pair.dense.as_tensor())?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(off < 1e-4, "{off}");
    Ok(())
}

#[test]
fn two_passes_through_one_graph_count_twice() -> Result<()> {
    let mut pair = Pair::new();
    let (ours, dense) = pair.losses(&[2, 3, 2], 1);
    let mut grads = ours.backward()?;
    grads.extend(ours.backward()?)?;
    let mut dense_grads = dense.backward()?;
    dense_grads.extend(dense.backward()?)?;
    drop((ours, dense));
    pair.optimizer.step(&grads)?;
    pair.dense_step(&dense_grads, &[2, 3]);
    pair.assert_same();
    // And a step with the same gradients again.
    pair.optimizer.step(&grads)?;
    pair.dense_step(&dense_grads, &[2, 3]);
    pair.assert_same();
    Ok(())
}

#[test]
fn a_gradient_outlives_its_loss_and_its_layer() -> Result<()> {
    let Pair { var, layer, mut optimizer, dense, mut dense_optimizer } = Pair::new();
    let grads = (layer.forward(&ids(&[3, 8]))? * factors(1, 2))?.sum_all()?.backward()?;
    drop(layer);
    optimizer.step(&grads)?;
    let dense_grads = (dense.index_select(&ids(&[3, 8]), 0)? * factors(1, 2))?.sum_all()?.backward()?;
    dense_optimizer.step_rows(&dense_grads, [(&dense, TouchedRows::NonZero)])?;
    assert_eq!(bits(&var), bits(&dense));
    Ok(())
}

#[test]
fn gradients_that_are_thrown_away_leave_nothing() -> Result<()> {
    let mut pair = Pair::new();
    let before = bits(&pair.var);
    for seed in 0..10 {
        drop(pair.losses(&[1, 2, 3], seed).0.backward()?);
    }
    let kept = pair.losses(&[4], 99).0;
    pair.optimizer.step(&GradStore::default())?;
    assert_eq!(bits(&pair.var), before);
    assert_eq!(pair.optimizer.report().missing().collect::<Vec<_>>(), ["table"]);
    // The step after them applies its own and nothing else.
    pair.optimizer.step(&kept.backward()?)?;
    let changed: Vec<usize> = (0..ROWS * DIM).filter(|&i| bits(&pair.var)[i] != before[i]).map(|i| i / DIM).collect();
    assert_eq!(changed, [4; DIM]);
    Ok(())
}

#[test]
fn another_losss_gradients_are_not_confused_with_these() -> Result<()> {
    let mut pair = Pair::new();
    let (first, _) = pair.losses(&[1, 2], 1);
    let (second, dense) = pair.losses(&[2, 3], 2);
    let _of_first = first.backward()?;
    pair.optimizer.step(&second.backward()?)?;
    pair.dense_step(&dense.backward()?, &[2, 3]);
    pair.assert_same();
    Ok(())
}

#[test]
fn tied_weights_get_the_sum_of_both_uses() -> Result<()> {
    let mut pair = Pair::new();
    let x = factors(5, 4);
    for _ in 0..3 {
        let (ours, dense) = pair.losses(&[1, 7, 1], 1);
        let ours = (ours + x.matmul(&pair.var.t()?)?.sqr()?.sum_all()?)?;
        let dense = (dense + x.matmul(&pair.dense.t()?)?.sqr()?.sum_all()?)?;
        pair.optimizer.step(&ours.backward()?)?;
        // All rows have a gradient.
        pair.dense_optimizer.step(&dense.backward()?)?;
        pair.assert_same();
    }
    Ok(())
}

#[test]
fn a_weight_that_is_no_variable_is_frozen() -> Result<()> {
    let weight = tensor(&noise(1, ROWS * DIM), &[ROWS, DIM], DType::F32);
    let layer = Embedding::new(weight.clone())?;
    let rows = layer.forward(&ids(&[3, 4]))?;
    assert_eq!(bits(&rows), bits(&weight.narrow(0, 3, 2)?));
    assert_eq!(rows.sum_all()?.backward()?.get_ids().count(), 1, "only the loss itself");
    // What depends on other variables, too, is differentiated with respect to those.
    let scale = Var::new(2f32, &Device::Cpu)?;
    let grads = rows.broadcast_mul(&scale)?.sum_all()?.backward()?;
    assert_eq!(grads.get(&scale).unwrap().to_scalar::<f32>()?, rows.sum_all()?.to_scalar::<f32>()?);
    Ok(())
}

#[test]
fn files_are_interchangeable_with_those_of_candle_nn() -> Result<()> {
    let folder = Folder::new();
    let (file, device) = (folder.file("weights.safetensors"), Device::Cpu);
    let mut theirs = VarMap::new();
    let layer = candle_nn::embedding(ROWS, DIM, VarBuilder::from_varmap(&theirs, DType::F32, &device).pp("e"))?;
    theirs.save(&file)?;
    let mut ours = VarMap::new();
    let table = candle_adamax::embedding(ROWS, DIM, VarBuilder::from_varmap(&ours, DType::F32, &device).pp("e"))?;
    assert_ne!(bits(&table.embeddings().unwrap()), bits(layer.embeddings()));
    ours.load(&file)?;
    assert_eq!(bits(&table.embeddings().unwrap()), bits(layer.embeddings()));
    let which = Tensor::new(&[[3u32, 1], [4, 1]], &device)?;
    assert_eq!(bits(&table.forward(&which)?), bits(&layer.forward(&which)?));
    assert_eq!(table.forward(&which)?.dims(), layer.forward(&which)?.dims());
    ours.save(&file)?;
    theirs.load(&file)?;
    Ok(())
}

#[test]
fn threads_look_up_in_one_table() -> Result<()> {
    let mut pair = Pair::new();
    let table = Table::new(&pair.var)?;
    let expected = bits(&pair.var.narrow(0, 5, 1)?);
    let losses: Vec<Tensor> = std::thread::scope(|scope| {
        let lookup = |seed| {
            let (table, expected) = (&table, &expected);
            scope.spawn(move || -> Result<Tensor> {
                for _ in 0..500 {
                    assert_eq!(bits(&table.lookup(&ids(&[5]))?), *expected);
                }
                (table.lookup(&ids(&[5, 6]))? * factors(seed, 2))?.sum_all()
            })
        };
        let threads = [lookup(1), lookup(2), lookup(3)];
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<_>>()
    })?;
    let total = losses.iter().try_fold(Tensor::zeros((), DType::F32, &Device::Cpu)?, |sum, loss| sum + loss)?;
    pair.optimizer.step(&total.backward()?)?;
    let dense = (1..4)
        .map(|seed| (pair.dense.index_select(&ids(&[5, 6]), 0)? * factors(seed, 2))?.sum_all())
        .try_fold(Tensor::zeros((), DType::F32, &Device::Cpu)?, |sum, loss| sum + loss?)?;
    pair.dense_step(&dense.backward()?, &[5, 6]);
    pair.assert_same();
    Ok(())
}
