//! The moments of one parameter, in buffers of the crate's own, and the parameter's clock.
//!
//! Invariant: a buffer has as many elements as its variable and the type of its arithmetic: f64 for f64, else f32.

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::Result;
use crate::pages::Pages;

/// A row of numbers that the crate keeps for a variable: a moment, an average, an accumulated gradient.
pub(crate) enum Buffer {
    /// In host memory, for the CPU kernel.
    F32(Pages<f32>),
    /// In host memory, for the CPU kernel.
    F64(Pages<f64>),
    /// On the variable's device, in its shape, for the portable path.
    Tensor(Tensor),
}

impl Buffer {
    /// Zeros for a variable like `var`. Host memory comes from the system already zeroed and is not touched here.
    pub(crate) fn zeros(var: &Tensor, place: Place) -> Result<Self> {
        let n = var.elem_count();
        Ok(match (place, arithmetic(var.dtype())) {
            (Place::Host, DType::F64) => Self::F64(Pages::zeros(n)),
            (Place::Host, _) => Self::F32(Pages::zeros(n)),
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
            DType::F64 => Self::F64(Pages::of(&flat.to_vec1()?)),
            _ => Self::F32(Pages::of(&flat.to_dtype(DType::F32)?.to_vec1()?)),
        })
    }

    /// A copy of the values as a tensor in host memory.
    pub(crate) fn to_tensor(&self, shape: &Shape) -> Result<Tensor> {
        Ok(match self {
            Self::F32(values) => Tensor::from_slice(values, shape, &Device::Cpu)?,
            Self::F64(values) => Tensor::from_slice(values, shape, &Device::Cpu)?,
            Self::Tensor(tensor) => tensor.to_device(&Device::Cpu)?.copy()?,
        })
    }

    /// No values, in host memory, of the same type.
    pub(crate) fn empty(&self) -> Self {
        match self {
            Self::F64(_) => Self::F64(Pages::zeros(0)),
            _ => Self::F32(Pages::zeros(0)),
        }
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

    /// Sets the rows `rows`, of `row_len` elements each, to zero.
    pub(crate) fn clear_rows(&mut self, rows: &[u32], row_len: usize) -> Result<()> {
        fn clear<T: bytemuck::Pod>(values: &mut [T], rows: &[u32], row_len: usize) {
            for &row in rows {
                values[row as usize * row_len..][..row_len].fill(T::zeroed());
            }
        }
        match self {
            Self::F32(values) => clear(values, rows, row_len),
            Self::F64(values) => clear(values, rows, row_len),
            Self::Tensor(_) if rows.is_empty() || row_len == 0 => {}
            Self::Tensor(tensor) => {
                let shape = (rows.len(), row_len);
                let rows = Tensor::from_slice(rows, (rows.len(), 1), tensor.device())?;
                let rows = rows.broadcast_as(shape)?.contiguous()?;
                let zeros = Tensor::zeros(shape, tensor.dtype(), tensor.device())?;
                // A view: what is written to it is written to the buffer.
                tensor.reshape((tensor.dim(0)?, row_len))?.scatter_set(&rows, &zeros, 0)?;
            }
        }
        Ok(())
    }

    /// A copy for `var`, which has more rows: those are zero.
    pub(crate) fn grown(&self, var: &Tensor) -> Result<Self> {
        Ok(match self {
            Self::F32(values) => Self::F32(Pages::extended(values, var.elem_count())),
            Self::F64(values) => Self::F64(Pages::extended(values, var.elem_count())),
            Self::Tensor(tensor) => {
                let grown = Tensor::zeros(var.shape(), tensor.dtype(), tensor.device())?;
                if tensor.elem_count() > 0 {
                    grown.slice_set(tensor, 0, 0)?;
                }
                Self::Tensor(grown)
            }
        })
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
