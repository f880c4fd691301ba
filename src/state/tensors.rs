//! Moments as tensors, bit for bit: what a checkpoint holds of them.

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};

use super::moments::{Coded, Layout, Moments, Norms, Stored};
use super::{Buffer, Place, arithmetic};
use crate::codec::{Format, StateDType};
use crate::error::Result;
use crate::pages::Pages;

/// The arrays of one parameter's moments, in host memory or on a GPU.
#[derive(Clone, Debug)]
pub(crate) struct MomentTensors {
    /// m, or its codes, in the variable's shape.
    pub(crate) exp_avg: Tensor,
    /// u, or its codes, in the variable's shape; or one for each row.
    pub(crate) exp_inf: Tensor,
    /// The logarithm of each unit, where there are scales.
    pub(crate) scales: Option<Tensor>,
}

impl MomentTensors {
    /// The state before the first update, on the variable's device.
    pub(super) fn zeros(var: &Tensor, layout: &Layout) -> Result<Self> {
        let zeros = |(dtype, shape): (DType, Vec<usize>)| Tensor::zeros(shape, dtype, var.device());
        let [exp_avg, exp_inf] = Moments::expected(var, layout);
        let scales = Moments::expected_scales(var, layout).map(zeros).transpose()?;
        Ok(Self { exp_avg: zeros(exp_avg)?, exp_inf: zeros(exp_inf)?, scales })
    }

    fn each(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let scales = self.scales.as_ref().map(&f).transpose()?;
        Ok(Self { exp_avg: f(&self.exp_avg)?, exp_inf: f(&self.exp_inf)?, scales })
    }

    /// Copies on a device.
    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        // A tensor that is there already is not copied by `to_device`.
        self.each(|tensor| tensor.to_device(device)?.copy())
    }

    pub(super) fn bytes(&self) -> usize {
        bytes(&self.exp_avg) + bytes(&self.exp_inf) + self.scale_bytes()
    }

    pub(super) fn scale_bytes(&self) -> usize {
        self.scales.as_ref().map_or(0, bytes)
    }

    /// Sets rows to zero; their scales may be those of other rows, too, and of zeros it does not matter.
    pub(super) fn clear_rows(&self, rows: &[u32], rowwise: bool) -> Result<()> {
        for tensor in [&self.exp_avg, &self.exp_inf] {
            let is_of_rows = rowwise && std::ptr::eq(tensor, &self.exp_inf);
            let tensor = if is_of_rows { tensor.flatten_all()? } else { tensor.clone() };
            if tensor.elem_count() == 0 {
                continue;
            }
            let zero = tensor.narrow(0, 0, 1)?.zeros_like()?;
            for &row in rows {
                tensor.slice_set(&zero, 0, row as usize)?;
            }
        }
        Ok(())
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Codes of one type as a tensor's elements, and back.
trait Codes: Sized {
    fn tensor(codes: &[Self], half: DType, shape: &Shape) -> candle_core::Result<Tensor>;
    fn pages(tensor: &Tensor) -> candle_core::Result<Pages<Self>>;
}

impl Codes for u16 {
    fn tensor(codes: &[Self], half: DType, shape: &Shape) -> candle_core::Result<Tensor> {
        match half {
            DType::F16 => {
                Tensor::from_vec(codes.iter().map(|&c| f16::from_bits(c)).collect::<Vec<_>>(), shape, &Device::Cpu)
            }
            _ => Tensor::from_vec(codes.iter().map(|&c| bf16::from_bits(c)).collect::<Vec<_>>(), shape, &Device::Cpu),
        }
    }

    fn pages(tensor: &Tensor) -> candle_core::Result<Pages<Self>> {
        let codes: Vec<u16> = match tensor.dtype() {
            DType::F16 => tensor.to_vec1::<f16>()?.into_iter().map(f16::to_bits).collect(),
            _ => tensor.to_vec1::<bf16>()?.into_iter().map(bf16::to_bits).collect(),
        };
        Ok(Pages::of(&codes))
    }
}

impl Codes for i8 {
    fn tensor(codes: &[Self], _: DType, shape: &Shape) -> candle_core::Result<Tensor> {
        Tensor::from_slice(bytemuck::cast_slice::<i8, u8>(codes), shape, &Device::Cpu)
    }

    fn pages(tensor: &Tensor) -> candle_core::Result<Pages<Self>> {
        Ok(Pages::of(bytemuck::cast_slice::<u8, i8>(&tensor.to_vec1::<u8>()?)))
    }
}

impl Codes for u8 {
    fn tensor(codes: &[Self], _: DType, shape: &Shape) -> candle_core::Result<Tensor> {
        Tensor::from_slice(codes, shape, &Device::Cpu)
    }

    fn pages(tensor: &Tensor) -> candle_core::Result<Pages<Self>> {
        Ok(Pages::of(&tensor.to_vec1::<u8>()?))
    }
}

/// The dtype of the tensors of codes; `None` for moments as they are.
pub(crate) fn dtype_of_codes(dtype: StateDType) -> Option<DType> {
    match dtype {
        StateDType::F32 => None,
        StateDType::BF16 => Some(DType::BF16),
        StateDType::F16 => Some(DType::F16),
        StateDType::Q8 => Some(DType::U8),
    }
}

impl Moments {
    /// The arrays, as they are.
    pub(crate) fn to_stored(&self, shape: &Shape) -> Result<MomentTensors> {
        match &self.stored {
            Stored::Full { exp_avg, exp_inf } if self.layout.rowwise => Ok(MomentTensors {
                exp_avg: exp_avg.to_tensor(shape)?,
                exp_inf: exp_inf.to_tensor(&Shape::from(exp_inf.len()))?,
                scales: None,
            }),
            Stored::Full { exp_avg, exp_inf } => Ok(MomentTensors {
                exp_avg: exp_avg.to_tensor(shape)?,
                exp_inf: exp_inf.to_tensor(shape)?,
                scales: None,
            }),
            Stored::BF16(coded) => self.coded(coded, shape),
            Stored::F16(coded) => self.coded(coded, shape),
            Stored::Q8(coded) => self.coded(coded, shape),
            Stored::Device(tensors) => tensors.to_device(&Device::Cpu),
        }
    }

    fn coded<F: Format>(&self, coded: &Coded<F>, shape: &Shape) -> Result<MomentTensors>
    where
        F::Code: Codes,
        F::Norm: Codes,
    {
        let dtype = dtype_of_codes(self.layout.dtype).unwrap_or(DType::U8);
        let exp_avg = Codes::tensor(&coded.moments, dtype, shape)?;
        Ok(match &coded.norms {
            Norms::Each { codes, logs } => MomentTensors {
                exp_avg,
                exp_inf: Codes::tensor(codes, dtype, shape)?,
                scales: Some(Tensor::from_slice(logs, logs.len(), &Device::Cpu)?),
            },
            Norms::Shared(norms) => {
                MomentTensors { exp_avg, exp_inf: Tensor::from_slice(norms, norms.len(), &Device::Cpu)?, scales: None }
            }
        })
    }

    /// What [`to_stored`](Self::to_stored) made of moments in this layout; the tensors have been checked.
    pub(crate) fn from_stored(tensors: &MomentTensors, var: &Tensor, place: Place, layout: &Layout) -> Result<Self> {
        fn coded<F: Format>(tensors: &MomentTensors) -> Result<Coded<F>>
        where
            F::Code: Codes,
            F::Norm: Codes,
        {
            let flat = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.flatten_all();
            let norms = match &tensors.scales {
                Some(scales) => Norms::Each {
                    codes: Codes::pages(&flat(&tensors.exp_inf)?)?,
                    logs: Pages::of(&flat(scales)?.to_vec1::<u32>()?),
                },
                None => Norms::Shared(Pages::of(&flat(&tensors.exp_inf)?.to_vec1::<f32>()?)),
            };
            Ok(Coded { moments: Codes::pages(&flat(&tensors.exp_avg)?)?, norms })
        }
        let stored = match layout.dtype {
            _ if place == Place::Cuda => Stored::Device(tensors.to_device(var.device())?),
            StateDType::F32 => Stored::Full {
                exp_avg: Buffer::from_tensor(&tensors.exp_avg, var, place)?,
                exp_inf: Buffer::from_tensor(&tensors.exp_inf, var, place)?,
            },
            StateDType::BF16 => Stored::BF16(coded(tensors)?),
            StateDType::F16 => Stored::F16(coded(tensors)?),
            StateDType::Q8 => Stored::Q8(coded(tensors)?),
        };
        Ok(Self { layout: *layout, stored })
    }

    /// The dtypes and shapes that tensors of moments in this layout have.
    pub(crate) fn expected(var: &Tensor, layout: &Layout) -> [(DType, Vec<usize>); 2] {
        let exact = arithmetic(var.dtype());
        let dtype = dtype_of_codes(layout.dtype).unwrap_or(exact);
        let norm = match layout.rowwise {
            true => (exact, vec![var.elem_count().div_ceil(layout.unit)]),
            false => (dtype, var.dims().to_vec()),
        };
        [(dtype, var.dims().to_vec()), norm]
    }

    /// Dtype and shape of the tensor of scales, if there is one.
    pub(crate) fn expected_scales(var: &Tensor, layout: &Layout) -> Option<(DType, Vec<usize>)> {
        let has_scales = layout.dtype != StateDType::F32 && !layout.rowwise;
        has_scales.then(|| (DType::U32, vec![var.elem_count().div_ceil(layout.unit)]))
    }
}
