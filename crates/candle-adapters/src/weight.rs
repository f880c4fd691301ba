//! The weight `base + scale * B A` as a tensor that leads to A and B, and that is written again in place.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor};

use crate::error::Error;
use crate::stamp;

/// The elements of the part of a weight that is computed at once: its temporary values stay in a CPU's cache.
const PART: usize = 1 << 18;

/// The low-rank matrices of a module.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    /// A, [r, in].
    pub(crate) a: Tensor,
    /// B, [out, r].
    pub(crate) b: Tensor,
    /// The factor of their product.
    pub(crate) scale: f64,
    /// Whether the weight is [in, out] and has the product's transpose added: tables of embeddings, `fan_in_fan_out`.
    pub(crate) is_transposed: bool,
}

impl Factors {
    /// The type in which a weight of type `base` is computed.
    fn compute(&self, base: DType) -> DType {
        if base == DType::F64 || self.a.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// Writes the weight to `target`, which has the base's shape and type. The sum is rounded once.
    pub(crate) fn write(&self, base: &Tensor, mask: Option<&Tensor>, target: &Tensor) -> Result<()> {
        let dtype = base.dtype();
        let compute = self.compute(dtype);
        let a = masked(&self.a.detach().to_dtype(compute)?, mask)?;
        let b = self.b.detach().to_dtype(compute)?.affine(self.scale, 0.0)?;
        let (left, right) = if self.is_transposed { (a.t()?.contiguous()?, b.t()?) } else { (b, a) };
        let (rows, columns) = base.dims2()?;
        let step = (PART / columns.max(1)).max(1);
        for start in (0..rows).step_by(step) {
            let count = step.min(rows - start);
            let product = left.narrow(0, start, count)?.matmul(&right)?;
            let sum = (base.narrow(0, start, count)?.contiguous()?.to_dtype(compute)? + product)?.to_dtype(dtype)?;
            target.slice_set(&sum, 0, start)?;
        }
        Ok(())
    }

    /// The weight as a tensor of its own.
    pub(crate) fn merged(&self, base: &Tensor) -> Result<Tensor> {
        let target = Tensor::zeros(base.shape(), base.dtype(), base.device())?;
        self.write(base, None, &target)?;
        Ok(target)
    }

    /// The stamp of A and B.
    fn stamp(&self) -> Result<u64> {
        stamp::add(stamp::add(stamp::EMPTY, &self.a)?, &self.b)
    }
}

/// A with the columns of some input features scaled, or set to 0.
fn masked(a: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    mask.map_or_else(|| Ok(a.clone()), |mask| a.broadcast_mul(&mask.to_dtype(a.dtype())?))
}

/// The factors of a module's input features, and their number.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    pub(crate) draw: u64,
    pub(crate) factors: Tensor,
}

/// What the values in a weight's storage were computed from.
#[derive(Debug)]
struct Current {
    /// The stamps of the base and of A and B; none while it is being written.
    stamps: Option<[u64; 2]>,
    base: Tensor,
    mask: Option<Mask>,
}

impl Current {
    fn is_stale(&self, factors: &Factors) -> Result<bool> {
        let Some([base, adapter]) = self.stamps else { return Ok(true) };
        Ok(adapter != factors.stamp()? || base != stamp::add(stamp::EMPTY, &self.base)?)
    }
}

/// A weight that a model holds.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    factors: Factors,
    base: Tensor,
    tensor: Tensor,
    current: Arc<Mutex<Current>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every value is written by one assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Weight {
    pub(crate) fn new(module: &str, factors: Factors, base: Tensor, mask: Option<Mask>) -> Result<Self> {
        let current = Arc::new(Mutex::new(Current { stamps: None, base: base.clone(), mask: None }));
        let op = SumOp {
            module: module.to_owned(),
            shape: base.shape().clone(),
            dtype: base.dtype(),
            factors: factors.clone(),
            current: current.clone(),
        };
        let tensor = factors.a.apply_op2(&factors.b, op)?;
        let weight = Self { factors, base, tensor, current };
        weight.write(mask)?;
        Ok(weight)
    }

    /// The tensor for the model.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The same tensor with other values under it from the next [`write`](Self::write) on.
    pub(crate) fn with_base(&self, base: &Tensor) -> Self {
        Self { base: base.clone(), ..self.clone() }
    }

    /// Whether these are the elements of the base; their values may have changed.
    pub(crate) fn has_base(&self, base: &Tensor) -> bool {
        let is_same_place = |a: &Layout, b: &Layout| a.start_offset() == b.start_offset() && a.stride() == b.stride();
        storage_address(&self.base) == storage_address(base)
            && self.base.shape() == base.shape()
            && is_same_place(self.base.layout(), base.layout())
    }

    /// Computes the tensor's values.
    pub(crate) fn write(&self, mask: Option<Mask>) -> Result<()> {
        // Until all of it is written, a backward pass is an error.
        lock(&self.current).stamps = None;
        self.factors.write(&self.base, mask.as_ref().map(|mask| &mask.factors), &self.tensor)?;
        let stamps = Some([stamp::add(stamp::EMPTY, &self.base)?, self.factors.stamp()?]);
        *lock(&self.current) = Current { stamps, base: self.base.clone(), mask };
        Ok(())
    }

    /// Computes them again if the base's values, A, B or the mask are others.
    pub(crate) fn update(&self, mask: Option<Mask>) -> Result<()> {
        let draw = |mask: &Option<Mask>| mask.as_ref().map(|mask| mask.draw);
        let is_same_mask = draw(&lock(&self.current).mask) == draw(&mask);
        if is_same_mask && !self.is_stale()? { Ok(()) } else { self.write(mask) }
    }

    pub(crate) fn is_stale(&self) -> Result<bool> {
        lock(&self.current).is_stale(&self.factors)
    }
}

/// A number that tensors have in common that share their values.
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// The node of the graph between a weight and its A and B.
struct SumOp {
    module: String,
    shape: Shape,
    dtype: DType,
    factors: Factors,
    current: Arc<Mutex<Current>>,
}

impl CustomOp2 for SumOp {
    fn name(&self) -> &'static str {
        "lora"
    }

    // The values come by `Weight::write`, which is all that writes them.
    fn cpu_fwd(&self, a: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((a.device().zeros_impl(&self.shape, self.dtype)?, self.shape.clone()))
    }

    fn cuda_fwd(&self, a: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((a.device().zeros_impl(&self.shape, self.dtype)?, self.shape.clone()))
    }

    fn metal_fwd(&self, a: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        Ok((a.device().zeros_impl(&self.shape, self.dtype)?, self.shape.clone()))
    }

    /// With G the gradient of the weight, dB = scale G Aᵀ and dA = scale Bᵀ G.
    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mask = {
            let current = lock(&self.current);
            if current.is_stale(&self.factors)? {
                return Err(Error::Stale { module: self.module.clone() }.into());
            }
            current.mask.as_ref().map(|mask| mask.factors.clone())
        };
        let compute = self.factors.compute(self.dtype);
        let grad = grad.to_dtype(compute)?;
        let grad = if self.factors.is_transposed { grad.t()? } else { grad };
        // What every device multiplies: rows or columns that lie together.
        let grad = if grad.is_contiguous() || grad.t()?.is_contiguous() { grad } else { grad.contiguous()? };
        let mask = mask.as_ref();
        let a_used = masked(&a.detach().to_dtype(compute)?, mask)?;
        let b_used = b.detach().to_dtype(compute)?;
        let b_grad = grad.matmul(&a_used.t()?)?.affine(self.factors.scale, 0.0)?;
        let a_grad = masked(&b_used.t()?.matmul(&grad)?.affine(self.factors.scale, 0.0)?, mask)?;
        Ok((Some(a_grad.to_dtype(a.dtype())?), Some(b_grad.to_dtype(b.dtype())?)))
    }
}
