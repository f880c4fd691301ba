//! Growth with the number of ids, bags and rows, and with the lookups and the tables of one graph.

use std::hint::black_box;

use anyhow::{Context, Result};
use candle_adamax::{
    Adamax, Bags, Embedding, EmbeddingBag, ParamsAdamax, Pooling, SparseGrad, SparseUpdate, Table, TouchedRows,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, Optimizer as _};

use crate::case::{Case, LINEAR, NONE, SORTS, Work, again};

const DIM: usize = 4;
/// The smaller number of ids, and that of a case with more and more rows.
const IDS: usize = 1024;
/// The smaller number of rows, and that of a case with more and more ids: `ids` leaves gaps between all of them.
const ROWS: usize = 8192;

pub(crate) fn cases() -> Vec<Case> {
    [looked_up(), pooled(), updated(), set(), graphs()].into_iter().flatten().collect()
}

/// Two cases: one with more and more ids of a table, and one with a table of more and more rows.
fn of_ids(name: &str, at_most: f64, make: impl Fn(usize, usize) -> Result<Work> + Copy + 'static) -> [Case; 2] {
    [
        Case::growth(&format!("{name}, ids"), IDS, at_most, move |ids| make(ids, ROWS)),
        Case::growth(&format!("{name}, rows"), ROWS, NONE, move |rows| make(IDS, rows)),
    ]
}

fn looked_up() -> Vec<Case> {
    let lookup = of_ids("lookup", LINEAR, |n, rows| {
        let (table, ids) = (Table::new(weight(rows)?.as_tensor())?, ids(n, rows)?);
        again(move || table.lookup(&ids).map(drop))
    });
    let layer = of_ids("Embedding with padding and max_norm", SORTS, |n, rows| {
        let layer = Embedding::new(weight(rows)?.as_tensor().clone())?.padding_idx(0)?.max_norm(1.0)?;
        let ids = ids(n, rows)?;
        again(move || layer.forward(&ids).map(drop))
    });
    let of_table = of_ids("Table::gradient", SORTS, |n, rows| {
        let table = Table::new(weight(rows)?.as_tensor())?;
        let grads = table.lookup(&ids(n, rows)?)?.sqr()?.sum_all()?.backward()?;
        again(move || table.gradient(&grads).map(drop))
    });
    [lookup, layer, of_table].into_iter().flatten().collect()
}

/// Forward and backward passes, with bags that say where they begin.
fn pooled() -> Vec<Case> {
    let pass = |bag: EmbeddingBag, n: usize, each: usize, weights: bool| -> Result<Work> {
        let rows = bag.table().rows();
        let offsets = Tensor::from_iter((0..n as u32).step_by(each), &Device::Cpu)?;
        let mut bags = Bags::offsets(&ids(n, rows)?, &offsets)?;
        if weights {
            bags = bags.weights(Var::ones(n, DType::F32, &Device::Cpu)?.as_tensor())?;
        }
        again(move || bag.pool(&bags)?.sqr()?.sum_all()?.backward().map(drop))
    };
    let bag =
        |rows, pooling| -> Result<EmbeddingBag> { Ok(EmbeddingBag::new(weight(rows)?.as_tensor().clone(), pooling)?) };
    let plain = of_ids("bags", LINEAR, move |n, rows| pass(bag(rows, Pooling::Mean)?, n, 8, false));
    let wide = Case::growth("bags, ids of each", 64, LINEAR, move |each| {
        pass(bag(ROWS, Pooling::Mean)?, 16 * each, each, false)
    });
    let batch = Case::growth("bags of a matrix", IDS, LINEAR, move |n| {
        let (bag, ids) = (bag(ROWS, Pooling::Sum)?, ids(n, ROWS)?.reshape((n / 4, 4))?);
        again(move || bag.forward(&ids)?.sqr()?.sum_all()?.backward().map(drop))
    });
    let weighed = Case::growth("bags with weights", IDS, LINEAR, move |n| pass(bag(ROWS, Pooling::Sum)?, n, 8, true));
    let max = Case::growth("bags, the largest", IDS, LINEAR, move |n| pass(bag(ROWS, Pooling::Max)?, n, 8, false));
    let limited = Case::growth("bags with padding and max_norm", IDS, SORTS, move |n| {
        pass(bag(ROWS, Pooling::Mean)?.padding_idx(0)?.max_norm(1.0)?, n, 8, false)
    });
    plain.into_iter().chain([wide, batch, weighed, max, limited]).collect()
}

fn updated() -> Vec<Case> {
    let sparse = of_ids("sparse step", SORTS, |n, rows| {
        let (mut optimizer, weight) = optimizer(rows, ParamsAdamax::default())?;
        let grad = gradient(ids(n, rows)?)?;
        again(move || optimizer.apply_gradients([(&weight, &grad)]).map(drop))
    });
    let training = of_ids("lookup, backward and step", SORTS, |n, rows| {
        let (mut optimizer, weight) = optimizer(rows, ParamsAdamax::default())?;
        let (table, ids) = (Table::new(&weight)?, ids(n, rows)?);
        again(move || optimizer.backward_step(&table.lookup(&ids)?.sqr()?.sum_all()?).map(drop))
    });
    let exact = of_ids("exact lookup, backward and step", SORTS, |n, rows| {
        let (mut optimizer, weight) = optimizer(rows, EXACT())?;
        let (table, ids) = (Table::new(&weight)?, ids(n, rows)?);
        again(move || optimizer.backward_step(&table.lookup(&ids)?.sqr()?.sum_all()?).map(drop))
    });
    let missed = Case::growth("exact lookup, updates missed", 256, NONE, |n| {
        let (mut optimizer, weight) = optimizer(ROWS, EXACT())?;
        let (table, all, one) = (Table::new(&weight)?, ids(IDS, ROWS)?, gradient(ids(1, ROWS)?)?);
        let mut waiting = Vec::new();
        for _ in 0..crate::case::CALLS {
            let ids = all.narrow(0, waiting.len() * IDS / 4, IDS / 4)?;
            optimizer.backward_step(&table.lookup(&ids)?.sqr()?.sum_all()?)?;
            waiting.push(ids);
        }
        (0..n).try_for_each(|_| optimizer.apply_gradients([(&weight, &one)]).map(drop))?;
        Ok(Box::new(move || Ok(table.lookup(&waiting.pop().context("a call too many")?).map(drop)?)))
    });
    let rows = of_ids("step_rows", SORTS, |n, rows| {
        let (mut optimizer, weight) = optimizer(rows, ParamsAdamax::default())?;
        let ids = ids(n, rows)?;
        let mut grads = GradStore::default();
        grads.insert(&weight, Tensor::ones((rows, DIM), DType::F32, &Device::Cpu)?);
        again(move || optimizer.step_rows(&grads, [(&weight, TouchedRows::Ids(&ids))]).map(drop))
    });
    let touched = of_ids("touched_rows", SORTS, |n, rows| {
        let (grad, ids) = (weight(rows)?, ids(n, rows)?);
        again(move || SparseGrad::touched_rows(&grad, &ids).map(drop))
    });
    let nonzero = Case::growth("nonzero_rows, rows", ROWS, LINEAR, |rows| {
        let grad = weight(rows)?;
        again(move || SparseGrad::nonzero_rows(&grad).map(drop))
    });
    let pairs = [sparse, training, exact, rows, touched];
    pairs.into_iter().flatten().chain([missed, nonzero]).collect()
}

fn set() -> Vec<Case> {
    let set = of_ids("set_rows", SORTS, |n, rows| {
        let (table, ids) = (Table::new(weight(rows)?.as_tensor())?, ids(n, rows)?);
        let values = Tensor::ones((n, DIM), DType::F32, &Device::Cpu)?;
        again(move || table.set_rows(&ids, &values))
    });
    let reset = of_ids("reset_rows", SORTS, |n, rows| {
        let (mut optimizer, weight) = optimizer(rows, ParamsAdamax::default())?;
        let ids = ids(n, rows)?;
        optimizer.apply_gradients([(&weight, &gradient(ids.clone())?)])?;
        again(move || optimizer.reset_rows("weight", &ids))
    });
    let append = Case::growth("append_rows, rows", ROWS, LINEAR, |rows| {
        let (mut optimizer, weight) = optimizer(rows, ParamsAdamax::default())?;
        optimizer.apply_gradients([(&weight, &gradient(ids(IDS, rows)?)?)])?;
        let row = Tensor::ones((1, DIM), DType::F32, &Device::Cpu)?;
        again(move || optimizer.append_rows("weight", &row).map(drop))
    });
    let pay = Case::growth("catch_up, rows", ROWS, LINEAR, |rows| {
        let (mut optimizer, weight) = optimizer(rows, EXACT())?;
        let grads = [gradient(ids(rows, rows)?)?, gradient(ids(1, rows)?)?];
        again(move || {
            grads.iter().try_for_each(|grad| optimizer.apply_gradients([(&weight, grad)]).map(drop))?;
            optimizer.catch_up()
        })
    });
    [set, reset].into_iter().flatten().chain([append, pay]).collect()
}

/// Many lookups in one graph, of one table and of many, and many gradients of one accumulation.
fn graphs() -> Vec<Case> {
    const N: usize = 256;
    let tables = |name: &str, params: fn() -> ParamsAdamax| {
        Case::growth(name, N, LINEAR, move |n| {
            let weights = (0..n).map(|_| weight(16)).collect::<Result<Vec<_>>>()?;
            let tables = weights.iter().map(|weight| Table::new(weight)).collect::<candle_adamax::Result<Vec<_>>>()?;
            let mut optimizer = Adamax::new(weights, params())?;
            let ids = ids(4, 16)?;
            again(move || {
                let mut losses = tables.iter().map(|table| Ok(table.lookup(&ids)?.sqr()?.sum_all()?));
                let first = losses.next().context("no table")??;
                let loss = losses.try_fold(first, |sum, loss: Result<_>| anyhow::Ok((sum + loss?)?))?;
                anyhow::Ok(optimizer.backward_step(&loss).map(drop)?)
            })
        })
    };
    let loss = |looked_up: &[Tensor]| Tensor::cat(looked_up, 0)?.sqr()?.sum_all();
    vec![
        Case::growth("lookups of one table", N, SORTS, move |n| {
            let (mut optimizer, weight) = optimizer(ROWS, ParamsAdamax::default())?;
            let table = Table::new(&weight)?;
            let all = ids(4 * n, ROWS)?;
            let ids = (0..n).map(|i| Ok(all.narrow(0, 4 * i, 4)?)).collect::<Result<Vec<_>>>()?;
            again(move || {
                let looked_up = ids.iter().map(|ids| Ok(table.lookup(ids)?)).collect::<Result<Vec<_>>>()?;
                anyhow::Ok(optimizer.backward_step(&loss(&looked_up)?).map(drop)?)
            })
        }),
        Case::growth("lookups without a step", N, SORTS, move |n| {
            let (mut optimizer, weight) = optimizer(ROWS, ParamsAdamax::default())?;
            let (table, ids) = (Table::new(&weight)?, ids(4, ROWS)?);
            again(move || {
                let kept = (0..n).map(|_| table.lookup(&ids)).collect::<candle_adamax::Result<Vec<_>>>()?;
                optimizer.backward_step(&loss(&[table.lookup(&ids)?])?)?;
                black_box(kept);
                anyhow::Ok(())
            })
        }),
        tables("tables of one graph", ParamsAdamax::default),
        tables("exact tables of one graph", EXACT),
        Case::growth("Table::new, calls", N, LINEAR, |n| {
            let weights = (0..n).map(|_| weight(16)).collect::<Result<Vec<_>>>()?;
            again(move || weights.iter().map(|weight| Table::new(weight)).collect::<Result<Vec<_>, _>>().map(drop))
        }),
        Case::growth("accumulation of the same rows, calls", N, LINEAR, |n| accumulation(n, |_| 0)),
        Case::growth("accumulation of other rows, calls", N, LINEAR, |n| accumulation(n, |call| 8 * call)),
    ]
}

/// `n` calls of an accumulation, each with eight rows from `first` on.
fn accumulation(n: usize, first: impl Fn(u32) -> u32) -> Result<Work> {
    let params = ParamsAdamax { gradient_accumulation_steps: n as u64, ..ParamsAdamax::default() };
    let (mut optimizer, weight) = optimizer(ROWS.max(8 * n), params)?;
    let rows = |call| Tensor::from_vec((first(call)..first(call) + 8).collect::<Vec<u32>>(), 8, &Device::Cpu);
    let grads = (0..n as u32).map(|call| gradient(rows(call)?)).collect::<Result<Vec<_>>>()?;
    again(move || grads.iter().try_for_each(|grad| optimizer.apply_gradients([(&weight, grad)]).map(drop)))
}

const EXACT: fn() -> ParamsAdamax = || ParamsAdamax { sparse_update: SparseUpdate::Exact, ..ParamsAdamax::default() };

fn weight(rows: usize) -> Result<Var> {
    Ok(Var::ones((rows, DIM), DType::F32, &Device::Cpu)?)
}

/// An optimizer of one table.
fn optimizer(rows: usize, params: ParamsAdamax) -> Result<(Adamax, Var)> {
    let weight = weight(rows)?;
    Ok((Adamax::from_named([("weight", weight.clone())], params)?, weight))
}

/// The numbers of `n` rows, each once and in no order: the same order for any number of rows, so that sorting them takes as
/// long. Both are powers of two.
fn ids(n: usize, rows: usize) -> Result<Tensor> {
    let id = |i: usize| (i.wrapping_mul(0x9e37_79b1) % n * (rows / n)) as u32;
    Ok(Tensor::from_iter((0..n).map(id), &Device::Cpu)?)
}

/// A gradient of these rows.
fn gradient(ids: Tensor) -> Result<SparseGrad> {
    let values = Tensor::full(0.5f32, (ids.elem_count(), DIM), &Device::Cpu)?;
    Ok(SparseGrad { indices: ids, values })
}
