//! Rows that have never had a gradient decay without memory for their moments.

use candle_adamax::{Adamax, ParamsAdamax, SparseGrad, SparseUpdate, StateDType, WeightDecay};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::process::has_passed_alone;
use crate::measure::growth;

const ROWS: usize = 1_000_000;
const DIM: usize = 16;

#[test]
fn rows_without_moments_catch_up_without_memory_for_them() -> Result<()> {
    if has_passed_alone("exact::rows_without_moments_catch_up_without_memory_for_them") {
        return Ok(());
    }
    for state_dtype in [StateDType::F32, StateDType::Q8] {
        let var = Var::ones((ROWS, DIM), DType::F32, &Device::Cpu)?;
        let params = ParamsAdamax {
            lr: 0.1.into(),
            sparse_update: SparseUpdate::Exact,
            weight_decay: WeightDecay::Decoupled(0.1),
            state_dtype,
            ..ParamsAdamax::default()
        };
        let mut optimizer = Adamax::from_named([("table", var.clone())], params)?;
        for first in [0u32, 10] {
            let grad = SparseGrad {
                indices: Tensor::arange(first, first + 10, &Device::Cpu)?,
                values: Tensor::ones((10, DIM), DType::F32, &Device::Cpu)?,
            };
            optimizer.apply_gradients([(&var, &grad)])?;
        }
        let grown = growth(|| optimizer.catch_up().unwrap());
        // A list of the rows is 8 MB while it is needed. Moments of all rows would be 128 MB, and 36 MB in Q8.
        assert!(grown < 16 << 20, "{state_dtype:?}: {grown} bytes more");
        let last = var.get(ROWS - 1)?.to_vec1::<f32>()?;
        assert!(last.iter().all(|w| (w - 0.99 * 0.99).abs() < 1e-6), "{last:?}");
    }
    Ok(())
}
