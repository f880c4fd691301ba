//! The cost of the hot paths, but for those of the recommender.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use candle_adamax::{
    Adamax, Bags, Clip, EmbeddingBag, ParamsAdamax, Pooling, Rounding, SparseGrad, SparseUpdate, StateDType, Table,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer as _;

use crate::case::{Case, again, each};
use crate::support::case::Case as Dense;

const F32: Dense =
    Dense { tensors: 1, elements: 65_536, dtype: DType::F32, state: StateDType::F32, rounding: Rounding::Nearest };
const SMALL: Dense = Dense { tensors: 1000, elements: 64, ..F32 };

/// The sizes of a table and of its lookups.
const ROWS: usize = 16_384;
const DIM: usize = 64;
const IDS: usize = 2048;
const BAGS: usize = 256;

pub(crate) fn cases() -> Vec<Case> {
    [dense(), clipping(), tables(), files()].into_iter().flatten().collect()
}

fn dense() -> Vec<Case> {
    let step = |name: String, case: Dense| Case::cost(name, move || again(case.adamax()?));
    let dtypes = [DType::F32, DType::BF16, DType::F16, DType::F64]
        .map(|dtype| step(format!("dense {}", dtype.as_str()), Dense { dtype, ..F32 }));
    let states = [StateDType::BF16, StateDType::F16, StateDType::Q8]
        .map(|state| step(format!("dense f32, {state:?} moments"), Dense { state, ..F32 }));
    let roundings = [Rounding::Stochastic, Rounding::Master].map(|rounding| {
        let case = Dense { dtype: DType::BF16, state: StateDType::Q8, rounding, ..F32 };
        step(format!("dense bf16 {rounding:?}, Q8 moments"), case)
    });
    let small = step("1000 tensors of 64".to_owned(), SMALL);
    dtypes.into_iter().chain(states).chain(roundings).chain([small]).collect()
}

fn clipping() -> Vec<Case> {
    let clipped = |name: &str, case: Dense| {
        Case::cost(format!("{name}, clipped"), move || {
            let (vars, grads) = case.vars_and_grads()?;
            let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..ParamsAdamax::default() };
            let mut optimizer = Adamax::new(vars, params)?;
            again(move || optimizer.step(&grads).map(drop))
        })
    };
    vec![clipped("dense f32", F32), clipped("1000 tensors of 64", SMALL)]
}

fn tables() -> Vec<Case> {
    vec![
        Case::cost("lookup", || {
            let (table, ids) = (Table::new(weight()?.as_tensor())?, ids(0)?);
            again(move || table.lookup(&ids).map(drop))
        }),
        Case::cost("bag forward", || {
            let (bag, bags) = bags(&weight()?)?;
            again(move || bag.pool(&bags).map(drop))
        }),
        Case::cost("bag backward", || {
            let (bag, bags) = bags(&weight()?)?;
            each(move || Ok(bag.pool(&bags)?.sqr()?.sum_all()?), |loss| Ok(loss.backward().map(drop)?))
        }),
        Case::cost("bag forward, backward and step", || {
            let weight = weight()?;
            let (bag, bags) = bags(&weight)?;
            let mut optimizer = Adamax::new(vec![weight], ParamsAdamax::default())?;
            again(move || optimizer.backward_step(&bag.pool(&bags)?.sqr()?.sum_all()?).map(drop))
        }),
        Case::cost("sparse step", || {
            let weight = weight()?;
            let mut optimizer = Adamax::new(vec![weight.clone()], ParamsAdamax::default())?;
            let grad = SparseGrad { indices: ids(0)?, values: Tensor::full(0.5f32, (IDS, DIM), &Device::Cpu)? };
            again(move || optimizer.apply_gradients([(&weight, &grad)]).map(drop))
        }),
        Case::cost("exact forward, backward and step", || {
            let weight = weight()?;
            let params = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..ParamsAdamax::default() };
            let mut optimizer = Adamax::new(vec![weight.clone()], params)?;
            let table = Table::new(&weight)?;
            // Two batches that share some rows, so that some have missed an update and some none.
            let mut batches = [ids(0)?, ids(1)?].into_iter().cycle();
            again(move || {
                let Some(ids) = batches.next() else { return Ok(()) };
                optimizer.backward_step(&table.lookup(&ids)?.sqr()?.sum_all()?).map(drop)
            })
        }),
    ]
}

fn files() -> Vec<Case> {
    vec![
        Case::cost("save", || {
            let (optimizer, file) = (stepped()?, File::new("save"));
            again(move || optimizer.save(&file.0))
        }),
        Case::cost("load", || {
            let (mut optimizer, file) = (stepped()?, File::new("load"));
            optimizer.save(&file.0)?;
            again(move || optimizer.load(&file.0))
        }),
    ]
}

/// An optimizer that has state to write.
fn stepped() -> Result<Adamax> {
    let (vars, grads) = Dense { tensors: 64, elements: 256, ..F32 }.vars_and_grads()?;
    let named = vars.into_iter().enumerate().map(|(i, var)| (format!("layers.{i}.weight"), var));
    let mut optimizer = Adamax::from_named(named, ParamsAdamax::default())?;
    optimizer.step(&grads)?;
    Ok(optimizer)
}

/// A file that is removed in the end.
pub(crate) struct File(pub(crate) PathBuf);

impl File {
    /// A name that no other process has; nothing is written.
    pub(crate) fn new(name: &str) -> Self {
        let name = name.replace(' ', "-");
        Self(std::env::temp_dir().join(format!("candle-adamax-counts-{}-{name}.safetensors", std::process::id())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // it may not have been written
    }
}

fn weight() -> Result<Var> {
    Ok(Var::ones((ROWS, DIM), DType::F32, &Device::Cpu)?)
}

/// Ids in no order, some of them equal.
fn ids(batch: u64) -> Result<Tensor> {
    let id = |i: u64| ((batch << 10 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32 % ROWS as u32;
    Ok(Tensor::from_iter((0..IDS as u64).map(id), &Device::Cpu)?)
}

/// A layer, and as many bags as it is asked for.
fn bags(weight: &Var) -> Result<(EmbeddingBag, Bags)> {
    let bag = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Mean)?;
    Ok((bag, Bags::batch(&ids(0)?.reshape((BAGS, IDS / BAGS))?)?))
}
