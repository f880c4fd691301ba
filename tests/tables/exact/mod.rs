//! More about `SparseUpdate::Exact`, by subject.

mod dense;
mod distances;
mod limits;
mod padding;
mod written;

use candle_adamax::{ParamsAdamax, SparseGrad, SparseUpdate};
use candle_core::{DType, Device, Result, Tensor, Var};

const CPU: &Device = &Device::Cpu;

/// The default settings with `Exact`.
fn exact() -> ParamsAdamax {
    ParamsAdamax { lr: 0.1.into(), sparse_update: SparseUpdate::Exact, ..ParamsAdamax::default() }
}

/// A gradient of ones for one row.
fn ones(row: u32, dim: usize, dtype: DType) -> Result<SparseGrad> {
    Ok(SparseGrad { indices: Tensor::new(&[row], CPU)?, values: Tensor::ones((1, dim), dtype, CPU)? })
}

/// A table of ones.
fn table(rows: usize, dim: usize, dtype: DType) -> Result<Var> {
    Var::ones((rows, dim), dtype, CPU)
}
