//! Buffers of the crate's own, and in them all that it keeps for one parameter: moments, masters, its clock.
//!
//! Invariant: a [`Buffer`] has the type of its variable's arithmetic: f64 for f64, else f32. Zeroed memory is the state
//! before the first update, in every encoding, and takes no memory until it is written.

mod master;
mod moments;
mod tensors;
pub(crate) mod written;

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::Result;
use crate::pages::Pages;
use crate::rounding::Rounding;

pub(crate) use master::{Kept, Master};
pub(crate) use moments::{Coded, Layout, Moments, Norms, Stored, Units};
pub(crate) use tensors::MomentTensors;

/// A row of numbers that the crate keeps for a variable: a moment, an average, an accumulated gradient.
pub(crate) enum Buffer {
    /// In host memory, for the CPU kernel.
    F32(Pages<f32>),
    /// In host memory, for the CPU kernel.
    F64(Pages<f64>),
    /// On the variable's device, in its shape.
    Tensor(Tensor),
}

impl Buffer {
    /// Zeros for a variable like `var`. Host memory comes from the system already zeroed and is not touched here.
    pub(crate) fn zeros(var: &Tensor, place: Place) -> Result<Self> {
        let n = var.elem_count();
        Ok(match (place, arithmetic(var.dtype())) {
            (Place::Host, dtype) => Self::zeros_host(dtype, n),
            (Place::Device | Place::Cuda, dtype) => Self::Tensor(Tensor::zeros(var.shape(), dtype, var.device())?),
        })
    }

    /// Zeros in host memory, of the type of the arithmetic on `dtype`.
    pub(crate) fn zeros_host(dtype: DType, n: usize) -> Self {
        match arithmetic(dtype) {
            DType::F64 => Self::F64(Pages::zeros(n)),
            _ => Self::F32(Pages::zeros(n)),
        }
    }

    /// A copy in host memory.
    pub(crate) fn on_host(&self) -> Result<Self> {
        match self {
            Self::Tensor(tensor) => Self::from_tensor(tensor, tensor, Place::Host),
            host => host.copied(),
        }
    }

    /// A copy.
    pub(crate) fn copied(&self) -> Result<Self> {
        Ok(match self {
            Self::F32(values) => Self::F32(Pages::of(values)),
            Self::F64(values) => Self::F64(Pages::of(values)),
            Self::Tensor(tensor) => Self::Tensor(tensor.copy()?),
        })
    }

    /// How many bytes it takes, once all of it has been written.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val::<[f32]>(values),
            Self::F64(values) => size_of_val::<[f64]>(values),
            Self::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        }
    }

    /// The values of `tensor`, which has the shape of `var` and the dtype of its arithmetic.
    pub(crate) fn from_tensor(tensor: &Tensor, var: &Tensor, place: Place) -> Result<Self> {
        if place != Place::Host {
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

    /// Zeros in host memory, of the same type.
    pub(crate) fn zeros_like(&self, n: usize) -> Self {
        match self {
            Self::F64(_) => Self::F64(Pages::zeros(n)),
            _ => Self::F32(Pages::zeros(n)),
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

    /// Whether it is in host memory.
    pub(crate) fn is_on_host(&self) -> bool {
        !matches!(self, Self::Tensor(_))
    }

    /// Sets the rows `rows`, of `row_len` elements each, to zero.
    pub(crate) fn clear_rows(&mut self, rows: &[u32], row_len: usize) -> Result<()> {
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
            Self::Tensor(tensor) => Self::Tensor(grown(tensor, var.shape())?),
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

/// Where a variable's buffers live, which also decides the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Host memory, for the CPU kernel.
    Host,
    /// The variable's device, for candle's tensor operations.
    Device,
    /// The variable's GPU, for the CUDA kernels.
    Cuda,
}

/// The type in which a variable of `dtype` is computed with.
pub(crate) fn arithmetic(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// All that is kept for one parameter, but for averages and accumulated gradients.
pub(crate) struct ParamState {
    pub(crate) moments: Moments,
    /// What f16 and bf16 parameters lose by rounding, if that is kept.
    pub(crate) master: Option<Master>,
    /// The parameter's own clock: how many updates it has had. A missing gradient does not advance it.
    pub(crate) step: u64,
}

impl ParamState {
    /// The state before the first update.
    pub(crate) fn zeros(var: &Tensor, place: Place, layout: &Layout, rounding: Rounding) -> Result<Self> {
        Ok(Self { moments: Moments::zeros(var, place, layout)?, master: Master::zeros(var, place, rounding)?, step: 0 })
    }

    /// The state of no elements.
    pub(crate) fn nothing(layout: &Layout) -> Self {
        let none = || Buffer::F32(Pages::zeros(0));
        let stored = Stored::Full { exp_avg: none(), exp_inf: none() };
        Self { moments: Moments { layout: *layout, stored }, master: None, step: 0 }
    }

    /// A copy in another place.
    pub(crate) fn moved(&self, var: &Tensor, place: Place) -> Result<Self> {
        let tensors = self.moments.to_stored(var.shape())?;
        let master = self.master.as_ref().map(|master| master.to_tensor(var.shape())).transpose()?;
        Ok(Self {
            moments: Moments::from_stored(&tensors, var, place, &self.moments.layout)?,
            master: master.map(|master| Master::from_tensor(&master, var, place)).transpose()?,
            step: self.step,
        })
    }

    /// How many bytes it takes, once all of it has been written.
    pub(crate) fn bytes(&self) -> usize {
        self.moments.bytes() + self.master.as_ref().map_or(0, Master::bytes)
    }

    /// Where it lives.
    pub(crate) fn place(&self) -> Place {
        self.moments.place()
    }
}

/// A copy in a shape that has more rows: those are zero.
fn grown(tensor: &Tensor, shape: &Shape) -> Result<Tensor> {
    let grown = Tensor::zeros(shape, tensor.dtype(), tensor.device())?;
    if tensor.elem_count() > 0 {
        grown.slice_set(tensor, 0, 0)?;
    }
    Ok(grown)
}

fn clear<T: bytemuck::Pod>(values: &mut [T], rows: &[u32], row_len: usize) {
    for &row in rows {
        values[row as usize * row_len..][..row_len].fill(T::zeroed());
    }
}
