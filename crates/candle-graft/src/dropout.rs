//! Dropout.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{self, by_type};
use crate::kernel::dropout::Factors;
use crate::{check, composed};

const NAME: &str = "dropout";

/// [Dropout](https://jmlr.org/papers/v15/srivastava14a.html): each number of `x` becomes 0 with probability `p`, and is
/// divided by `1 - p` otherwise, which keeps the mean. The derivative is that factor: 0 or `1 / (1 - p)`.
///
/// The factors are a function of `seed` and of the place of a number, on every device and with any number of threads. The
/// backward pass computes them again, so that nobody keeps them. Give each call a seed of its own, from a generator that is
/// saved with a run: candle-nn's dropout draws from one that has no seed on the CPU.
///
/// # Errors
///
/// `p` is not in `[0, 1)`; `x` is not of f32, f64, f16 or bf16.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use candle_graft::dropout;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::ones(1000, DType::F32, &Device::Cpu)?;
/// let y = dropout(&x, 0.2, 7)?;
/// let zeros = y.to_vec1::<f32>()?.iter().filter(|y| **y == 0.0).count();
/// assert!((150..250).contains(&zeros)); // and the others are 1.25
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).map(|grad| grad.to_vec1::<f32>()).transpose()?, Some(y.to_vec1()?));
/// # Ok(())
/// # }
/// ```
pub fn dropout(x: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
    check::float(NAME, "x", x)?;
    if !(0.0..1.0).contains(&p) {
        bail!("{NAME}: p is {p}, but must be at least 0 and less than 1");
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    let factors = Factors::new(p, seed);
    if x.device().is_cpu() {
        return x.apply_op1(factors);
    }
    let ones = Tensor::ones(x.shape(), DType::F32, &Device::Cpu)?;
    let dtype = composed::wide(x.dtype());
    let factors = ones.apply_op1_no_bwd(&factors)?.to_dtype(dtype)?.to_device(x.device())?;
    (x.to_dtype(dtype)? * factors)?.to_dtype(x.dtype())
}

impl CustomOp1 for Factors {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_type!(x.dtype(), NAME, T => cpu::storage(self.apply(&cpu::slice::<T>(x, layout)?), layout.shape()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        by_type!(x.dtype(), NAME, T => {
            let grad = cpu::with_slices([grad], |[grad]: [&[T]; 1]| self.apply(grad))?;
            Ok(Some(cpu::tensor(grad, x.shape())?))
        })
    }
}
