//! Embedding tables: a step that costs what its rows cost, rows that begin anew, and a table that grows.
//!
//! Users turn to items. A user is a row of a table, and the mean of what was turned to before; an item is a row of a
//! table of a million. A step looks a few of these rows up, and moves nothing else.
//!
//! ```sh
//! cargo run --release --example 05_embedding_tables
//! ```

use std::time::{Duration, Instant};

use anyhow::ensure;
use candle_adamax::{
    Adamax, Bags, Embedding, EmbeddingBag, ParamsAdamax, Pooling, TouchedRows, embedding, embedding_bag,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};

/// candle allocates every intermediate result anew, and the system's allocator gives large ones back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ITEMS: usize = 1_000_000;
const DIM: usize = 32;

/// Three users, the items they turned to before (of the third, none is known), and the item they turned to now.
fn batch() -> Result<(Tensor, Bags, Tensor)> {
    let device = &Device::Cpu;
    let history = Tensor::new(&[14u32, 15, 92, 65, 35], device)?;
    let bags = Bags::offsets(&history, &Tensor::new(&[0u32, 2, 5], device)?)?;
    Ok((Tensor::new(&[3u32, 1, 4], device)?, bags, Tensor::new(&[26u32, 535, 999_999], device)?))
}

/// How far the scores of users and items are from 1.
fn loss(users: &Embedding, history: &EmbeddingBag, items: &Embedding) -> Result<Tensor> {
    let (user_ids, bags, item_ids) = batch()?;
    let user = (users.forward(&user_ids)? + history.pool(&bags)?)?;
    (user * items.forward(&item_ids)?)?.sum(1)?.affine(1.0, -1.0)?.sqr()?.mean_all()
}

fn main() -> anyhow::Result<()> {
    let device = &Device::Cpu;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
    let users = embedding(1_000, DIM, vb.pp("users"))?;
    let history = embedding_bag(ITEMS, DIM, Pooling::Mean, vb.pp("history"))?;
    let items = embedding(ITEMS, DIM, vb.pp("items"))?;
    let params = ParamsAdamax { lr: 0.02.into(), ..Default::default() };
    let mut optimizer = Adamax::from_varmap(&varmap, params.clone())?;

    // Layers and optimizer have found each other by the variables. There is nothing else to do than to train.
    let before = items.embeddings()?.copy()?;
    let (first, mut times) = (loss(&users, &history, &items)?.to_scalar::<f32>()?, Vec::new());
    for _ in 0..200 {
        let start = Instant::now();
        let loss = loss(&users, &history, &items)?;
        optimizer.backward_step(&loss)?;
        times.push(start.elapsed());
    }
    let last = loss(&users, &history, &items)?.to_scalar::<f32>()?;
    println!("{ITEMS} items: loss {first:.2} to {last:.1e}, {:.3} ms a training step", milliseconds(times));
    ensure!(last < 1e-3, "the three pairs have to be learned");

    let moved = changed_rows(&before, &items.embeddings()?)?;
    println!("rows of items that changed: {moved:?}");
    ensure!(moved == [26, 535, 999_999], "only rows that were looked up may change");

    // Item 26 is gone, and its row goes to another one, which must not inherit its momentum.
    let row = Tensor::new(&[26u32], device)?;
    items.table().set_rows(&row, &Tensor::zeros((1, DIM), DType::F32, device)?)?;
    optimizer.reset_rows("items.weight", &row)?;
    let norm = optimizer.state("items.weight")?.exp_inf.sum(1)?;
    let [fresh, kept] = [26, 535].map(|item| norm.get(item).and_then(|norm| norm.to_scalar::<f32>()));
    ensure!(fresh? == 0.0 && kept? > 0.0, "one row begins anew, and no other");

    // A hundred new items. The variable is a new one, so the layer is made anew, and the `VarMap` is told.
    let new_rows = Tensor::randn(0f32, 0.1, (100, DIM), device)?;
    let grown = optimizer.append_rows("items.weight", &new_rows)?;
    let items = Embedding::new(grown.as_tensor().clone())?;
    varmap.data().lock().map_err(|error| anyhow::anyhow!("{error}"))?.insert("items.weight".into(), grown);
    let newest = Tensor::new(&[ITEMS as u32 + 99], device)?;
    optimizer.backward_step(&items.forward(&newest)?.sqr()?.sum_all()?)?;
    println!("after append_rows: {} items, and {} updates", items.table().rows(), optimizer.updates());

    // A model that keeps candle_nn's layer has a gradient of the table's size; at least the step can leave it sparse.
    let var = Var::from_tensor(&before)?;
    let model = candle_nn::Embedding::new(var.as_tensor().clone(), DIM);
    let mut optimizer = Adamax::from_named([("items", var.clone())], params)?;
    let (_, _, ids) = batch()?;
    let (mut backward, mut step) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let start = Instant::now();
        let grads = model.forward(&ids)?.sqr()?.sum_all()?.backward()?;
        backward.push(start.elapsed());
        let start = Instant::now();
        optimizer.step_rows(&grads, [(&var, TouchedRows::Ids(&ids))])?;
        step.push(start.elapsed());
    }
    let (backward, step) = (milliseconds(backward), milliseconds(step));
    println!("candle_nn's layer: {backward:.1} ms forward and backward, {step:.3} ms step_rows");
    ensure!(changed_rows(&before, &var)? == [26, 535, 999_999], "only the rows that were named may change");
    Ok(())
}

/// The rows in which two tables differ.
fn changed_rows(before: &Tensor, after: &Tensor) -> Result<Vec<usize>> {
    let differences = before.ne(after)?.to_dtype(DType::F32)?.sum(1)?.to_vec1::<f32>()?;
    Ok(differences.iter().enumerate().filter(|(_, count)| **count > 0.0).map(|(row, _)| row).collect())
}

fn milliseconds(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}
