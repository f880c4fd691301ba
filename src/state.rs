//! The moments of one parameter, in buffers of the crate's own, and the parameter's clock.
//!
//! Invariant: a buffer has as many elements as its variable and the type of its arithmetic: f64 for f64, else f32.

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::Result;

/// A row of numbers that the crate keeps for a variable: a moment, an average, an accumulated gradient.
#[derive(Clone, Debug)]
pub(crate) enum Buffer {
    /// In host memory, for the CPU kernel.
    F32(Vec<f32>),
    /// In host memory, for the CPU kernel.
    F64(Vec<f64>),
    /// On the variable's device, in its shape, for the portable path.
    Tensor(Tensor),
}

impl Buffer {
    /// Zeros for a variable like `var`. Host memory comes from the system already zeroed and is not touched here.
    pub(crate) fn zeros(var: &Tensor, place: Place) -> Result<Self> {
        let n = var.elem_count();
        Ok(match (place, arithmetic(var.dtype())) {
            (Place::Host, DType::F64) => Self::F64(vec![0.0; n]),
            (Place::Host, _) => Self::F32(vec![0.0; n]),
            (Place::Device, dtype) => Self::Tensor(Tensor::zeros(var.shape(), dtype, var.device())?),
        })
    }

    /// The values of `tensor`, which has the shape of `var` and the dtype of its arithmetic.
    pub(crate) fn from_tensor(tensor: &Tensor, var: &Tensor, place: Place) -> Result<Self> {
        if place == Place::Device {
            return Ok(Self::Tensor(tensor.to_device(var.device())?.copy()?));
        }
        let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        Ok(match flat.dtype() {
            DType::F64 => Self::F64(flat.to_vec1()?),
            _ => Self::F32(flat.to_dtype(DType::F32)?.to_vec1()?),
        })
    }

    /// A copy of the values as a tensor in host memory.
    pub(crate) fn to_tensor(&self, shape: &Shape) -> Result<Tensor> {
        Ok(match self {
            Self::F32(values) => Tensor::from_vec(values.clone(), shape, &Device::Cpu)?,
            Self::F64(values) => Tensor::from_vec(values.clone(), shape, &Device::Cpu)?,
            Self::Tensor(tensor) => tensor.to_device(&Device::Cpu)?.copy()?,
        })
    }

    /// How many elements it has.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Tensor(tensor) => tensor.elem_count(),
        }
    }

    /// The place where it lives.
    pub(crate) fn place(&self) -> Place {
        match self {
            Self::F32(_) | Self::F64(_) => Place::Host,
            Self::Tensor(_) => Place::Device,
        }
    }

    /// Sets everything to zero.
    pub(crate) fn clear(&mut self) -> Result<()> {
        match self {
            Self::F32(values) => values.fill(0.0),
            Self::F64(values) => values.fill(0.0),
            Self::Tensor(tensor) => *tensor = tensor.zeros_like()?,
        }
        Ok(())
    }
}

/// Where a variable's buffers live, which also decides the kernel: host memory for the CPU kernel, the variable's
/// device for the portable path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Device,
}

/// The type in which a variable of `dtype` is computed with.
pub(crate) fn arithmetic(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The moments of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct ParamState {
    /// m, the first moment.
    pub(crate) exp_avg: Buffer,
    /// u, the exponentially weighted infinity norm.
    pub(crate) exp_inf: Buffer,
    /// The parameter's own clock: how many updates it has had. A missing gradient does not advance it.
    pub(crate) step: u64,
}

impl ParamState {
    /// The state before the first update.
    pub(crate) fn zeros(var: &Tensor, place: Place) -> Result<Self> {
        Ok(Self { exp_avg: Buffer::zeros(var, place)?, exp_inf: Buffer::zeros(var, place)?, step: 0 })
    }
}
