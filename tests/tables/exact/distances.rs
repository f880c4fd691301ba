//! The distances from dense runs that the documentation states.

use candle_adamax::{Adamax, ParamsAdamax, SparseGrad, SparseUpdate, StateDType};
use candle_core::{DType, Result, Tensor, Var};

use super::CPU;
use super::dense::decaying;
use crate::common::{Random, noise, values};

const ROWS: usize = 30;
const DIM: usize = 8;

/// How far rows of f32 end from a dense run in f64, and how far a dense run with the same encoding does, in terms of the way
/// that each has gone in the former. What the weight's own rounding may have done to the former is taken away: half a unit
/// in the last place of the largest weight for each product and each difference that was written.
fn distances(params: &ParamsAdamax, seed: u64, steps: usize) -> Result<[f64; 2]> {
    let start = Tensor::from_vec(noise(seed, ROWS * DIM), (ROWS, DIM), CPU)?.to_dtype(DType::F32)?;
    let plain = ParamsAdamax { state_dtype: StateDType::F32, ..params.clone() };
    let by_rows = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..params.clone() };
    let mut runs = Vec::new();
    for (dtype, params) in [(DType::F32, by_rows), (DType::F64, plain), (DType::F32, params.clone())] {
        let var = Var::from_tensor(&start.to_dtype(dtype)?.copy()?)?;
        runs.push((var.clone(), Adamax::from_named([("w", var)], params)?));
    }
    let (mut random, mut way, mut last) = (Random(seed), vec![0.0; ROWS * DIM], values(&start));
    let mut largest: Vec<f64> = last.iter().map(|w| w.abs()).collect();
    let mut written = [1.0f64; ROWS];
    for _ in 0..steps {
        let rows = random.rows(ROWS);
        let grads = random.values(rows.len() * DIM, -4.0, 0.0);
        let mut all = vec![0.0; ROWS * DIM];
        for (row, grads) in rows.iter().zip(grads.chunks(DIM)) {
            all[*row as usize * DIM..][..DIM].copy_from_slice(grads);
            // It catches up and is updated, and each is a product and a difference.
            written[*row as usize] += 2.0;
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
        largest.iter_mut().zip(&now).for_each(|(largest, now)| *largest = largest.max(now.abs()));
        last = now;
    }
    runs[0].1.catch_up()?;
    let [exact, wide, same] = [0, 1, 2].map(|run: usize| values(&runs[run].0));
    let mut worst = [0.0f64; 2];
    for i in (0..ROWS * DIM).filter(|i| way[*i] > 0.0) {
        let rounding = written[i / DIM] * 2.0 * largest[i] * 2f64.powi(-24);
        worst[0] = worst[0].max(((exact[i] - wide[i]).abs() - rounding) / way[i]);
        worst[1] = worst[1].max((same[i] - wide[i]).abs() / way[i]);
    }
    Ok(worst)
}

/// The worst of several runs: seeds, lengths, learning rates that stay or fall, with decay and without.
#[test]
fn distances_that_the_documentation_states() -> Result<()> {
    for (state_dtype, stated) in
        [(StateDType::F32, 1e-6), (StateDType::F16, 1e-3), (StateDType::BF16, 1e-2), (StateDType::Q8, 0.25)]
    {
        let mut worst = [0.0f64; 2];
        let constant = ParamsAdamax { lr: 1e-3.into(), ..ParamsAdamax::default() };
        for base in [decaying(ParamsAdamax::default()), constant, ParamsAdamax::pytorch()] {
            for seed in 0..3 {
                for steps in [500, 3000] {
                    let params = ParamsAdamax { state_dtype, ..base.clone() };
                    let found = distances(&params, seed, steps)?;
                    worst.iter_mut().zip(found).for_each(|(worst, found)| *worst = worst.max(found));
                }
            }
        }
        eprintln!("{state_dtype:?}: {worst:?}");
        assert!(worst[0] <= stated, "{state_dtype:?}: {worst:?}");
        assert!(worst[0] <= worst[1], "{state_dtype:?}: the dense run of the same encoding is nearer, {worst:?}");
    }
    Ok(())
}
