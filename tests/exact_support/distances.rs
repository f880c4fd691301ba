//! The distances from dense runs that the documentation states.

use candle_adamax::{Adamax, ParamsAdamax, SparseGrad, SparseUpdate, StateDType};
use candle_core::{DType, Result, Tensor, Var};

use super::CPU;
use crate::common::values;
use crate::{Random, decaying, noise};

const ROWS: usize = 30;
const DIM: usize = 8;

/// How far rows of f32 end from a dense run in f64, and from one with the same encoding, in terms of the way that each has
/// gone in the former.
fn distances(params: &ParamsAdamax, seed: u64, steps: usize) -> Result<[f64; 3]> {
    let start = Tensor::from_vec(noise(seed, ROWS * DIM), (ROWS, DIM), CPU)?.to_dtype(DType::F32)?;
    let plain = ParamsAdamax { state_dtype: StateDType::F32, ..params.clone() };
    let by_rows = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..params.clone() };
    let mut runs = Vec::new();
    for (dtype, params) in [(DType::F32, by_rows), (DType::F64, plain), (DType::F32, params.clone())] {
        let var = Var::from_tensor(&start.to_dtype(dtype)?.copy()?)?;
        runs.push((var.clone(), Adamax::from_named([("w", var)], params)?));
    }
    let (mut random, mut way, mut last) = (Random(seed), vec![0.0; ROWS * DIM], values(&start));
    for _ in 0..steps {
        let rows = random.rows(ROWS);
        let grads = random.values(rows.len() * DIM, -4.0, 0.0);
        let mut all = vec![0.0; ROWS * DIM];
        for (row, grads) in rows.iter().zip(grads.chunks(DIM)) {
            all[*row as usize * DIM..][..DIM].copy_from_slice(grads);
        }
        let all = Tensor::from_vec(all, (ROWS, DIM), CPU)?.to_dtype(DType::F32)?;
        let indices = Tensor::new(&rows[..], CPU)?;
        let grad = SparseGrad { values: all.index_select(&indices, 0)?, indices };
        let [exact, wide, same] = &mut runs[..] else { unreachable!() };
        exact.1.apply_gradients([(&exact.0, &grad)])?;
        wide.1.apply_gradients([(&wide.0, &all.to_dtype(DType::F64)?)])?;
        same.1.apply_gradients([(&same.0, &all)])?;
        let now = values(&wide.0);
        way.iter_mut().zip(now.iter().zip(&last)).for_each(|(way, (now, last))| *way += (now - last).abs());
        last = now;
    }
    runs[0].1.catch_up()?;
    let [exact, wide, same] = [0, 1, 2].map(|run: usize| values(&runs[run].0));
    let apart = |a: &[f64], b: &[f64]| {
        let each = a.iter().zip(b).zip(&way).filter(|(_, way)| **way > 0.0);
        each.map(|((a, b), way)| (a - b).abs() / way).fold(0.0, f64::max)
    };
    Ok([apart(&exact, &wide), apart(&exact, &same), apart(&same, &wide)])
}

/// The worst of several runs: seeds, lengths, learning rates that stay or fall, with decay and without.
#[test]
fn distances_that_the_documentation_states() -> Result<()> {
    for (state_dtype, from_f64, from_same) in [
        (StateDType::F32, 1e-1, 1e-1),
        (StateDType::F16, 1e-1, 1e-1),
        (StateDType::BF16, 1e-1, 1e-1),
        (StateDType::Q8, 1.0, 1.0),
    ] {
        let mut worst = [0.0f64; 3];
        let constant = ParamsAdamax { lr: 1e-3.into(), ..ParamsAdamax::default() };
        for base in [decaying(ParamsAdamax::default()), constant, ParamsAdamax::pytorch()] {
            for seed in 0..6 {
                for steps in [500, 3000, 6000] {
                    let params = ParamsAdamax { state_dtype, ..base.clone() };
                    let found = distances(&params, seed, steps)?;
                    worst.iter_mut().zip(found).for_each(|(worst, found)| *worst = worst.max(found));
                }
            }
        }
        eprintln!("{state_dtype:?}: from f64, from the same encoding, of that from f64: {worst:?}");
        assert!(worst[0] <= from_f64 && worst[1] <= from_same, "{state_dtype:?}: {worst:?}");
    }
    Ok(())
}
