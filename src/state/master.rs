//! What a master copy of f16 and bf16 parameters keeps beside them.
//!
//! The rule for parameters that are written between two updates: where somebody else writes them,
//! [`Half::join`](crate::rounding::Half::join) makes the master from the parameter as it is and from what was kept, within
//! half a unit in the parameter's last place. Where this crate writes them, the master becomes what was written: the writer
//! either has the master and writes it, too (updates, averages), or it tells [`written`], and what was kept of these
//! elements is dropped.
//!
//! Invariant: nobody reads what is kept before that has been done, since it cannot be reached otherwise.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};

use super::written::{self, Written};
use super::{Place, grown};
use crate::error::Result;
use crate::pages::Pages;
use crate::rounding::Rounding;

/// What is kept beside a parameter; zeros are a copy that equals its parameter.
pub(crate) enum Kept {
    /// The other half of the copy of a bf16 parameter.
    Residual(Pages<i16>),
    /// The copy of an f16 parameter.
    Copy(Pages<f32>),
    /// Either of them, on the parameter's GPU.
    Device(Tensor),
}

/// The master copy of one parameter.
pub(crate) struct Master {
    kept: Kept,
    written: Arc<Written>,
}

impl Master {
    /// Whether parameters of `dtype` have one.
    pub(crate) fn is_kept(dtype: DType, rounding: Rounding) -> bool {
        rounding == Rounding::Master && matches!(dtype, DType::BF16 | DType::F16)
    }

    /// The master of a parameter, if it has one.
    pub(crate) fn zeros(var: &Tensor, place: Place, rounding: Rounding) -> Result<Option<Self>> {
        if !Self::is_kept(var.dtype(), rounding) {
            return Ok(None);
        }
        let (dtype, n) = (Self::dtype(var.dtype()), var.elem_count());
        let kept = match (place, dtype) {
            (Place::Cuda, dtype) => Kept::Device(Tensor::zeros(var.shape(), dtype, var.device())?),
            (_, DType::I16) => Kept::Residual(Pages::zeros(n)),
            (_, _) => Kept::Copy(Pages::zeros(n)),
        };
        Ok(Some(Self::new(kept, var)))
    }

    fn new(kept: Kept, var: &Tensor) -> Self {
        Self { kept, written: written::follow(var) }
    }

    /// What is kept, to be read and written.
    pub(crate) fn kept(&mut self) -> Result<&mut Kept> {
        if let Kept::Device(tensor) = &self.kept {
            self.written.drop_on_device(tensor)?;
        } else {
            match (self.written.take(), &mut self.kept) {
                (None, _) | (_, Kept::Device(_)) => {}
                (Some(elements), Kept::Residual(values)) => elements.clear(values),
                (Some(elements), Kept::Copy(values)) => elements.clear(values),
            }
        }
        Ok(&mut self.kept)
    }

    /// What is kept on the parameter's GPU, to be read and written there.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self) -> Result<&Tensor> {
        match &self.kept {
            Kept::Device(tensor) => {
                self.written.drop_on_device(tensor)?;
                Ok(tensor)
            }
            _ => Err(candle_core::Error::msg("expected a master on the variable's GPU").into()),
        }
    }

    /// A copy for a parameter that may have more rows: those are zero.
    pub(crate) fn grown(&self, var: &Tensor) -> Result<Self> {
        let n = var.elem_count();
        let kept = match &self.kept {
            Kept::Residual(values) => {
                let mut values = Pages::extended(values, n);
                self.written.clear(&mut values);
                Kept::Residual(values)
            }
            Kept::Copy(values) => {
                let mut values = Pages::extended(values, n);
                self.written.clear(&mut values);
                Kept::Copy(values)
            }
            Kept::Device(tensor) => {
                self.written.drop_on_device(tensor)?;
                Kept::Device(grown(tensor, var.shape())?)
            }
        };
        Ok(Self::new(kept, var))
    }

    /// The values as they are stored.
    pub(crate) fn to_tensor(&self, shape: &Shape) -> Result<Tensor> {
        Ok(match &self.kept {
            Kept::Residual(values) => {
                let mut values = values.to_vec();
                self.written.clear(&mut values);
                Tensor::from_vec(values, shape, &Device::Cpu)?
            }
            Kept::Copy(values) => {
                let mut values = values.to_vec();
                self.written.clear(&mut values);
                Tensor::from_vec(values, shape, &Device::Cpu)?
            }
            Kept::Device(tensor) => {
                self.written.drop_on_device(tensor)?;
                tensor.to_device(&Device::Cpu)?.reshape(shape)?
            }
        })
    }

    /// What [`to_tensor`](Self::to_tensor) made, for the parameter `var`.
    pub(crate) fn from_tensor(tensor: &Tensor, var: &Tensor, place: Place) -> Result<Self> {
        if place == Place::Cuda {
            return Ok(Self::new(Kept::Device(tensor.to_device(var.device())?.copy()?), var));
        }
        let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        let kept = match flat.dtype() {
            DType::I16 => Kept::Residual(Pages::of(&flat.to_vec1()?)),
            _ => Kept::Copy(Pages::of(&flat.to_vec1()?)),
        };
        Ok(Self::new(kept, var))
    }

    /// Drops what is kept of rows: their masters are the parameters as they are.
    pub(crate) fn clear_rows(&self, rows: &[u32]) {
        self.written.add_rows(rows);
    }

    /// How many bytes it takes, once all of it has been written.
    pub(crate) fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Residual(values) => size_of_val::<[i16]>(values),
            Kept::Copy(values) => size_of_val::<[f32]>(values),
            Kept::Device(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        }
    }

    /// The dtype of a master of parameters of `dtype`.
    pub(crate) fn dtype(dtype: DType) -> DType {
        if dtype == DType::BF16 { DType::I16 } else { DType::F32 }
    }
}
