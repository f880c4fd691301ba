//! Tensors on the CPU as slices, and slices as tensors.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail};

/// Runs code with `$t` as the type of elements that a `DType` names.
macro_rules! by_type {
    ($dtype:expr, $function:expr, $t:ident => $code:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $code
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $code
            }
            candle_core::DType::F16 => {
                type $t = half::f16;
                $code
            }
            candle_core::DType::BF16 => {
                type $t = half::bf16;
                $code
            }
            dtype => candle_core::bail!("{}: not for elements of type {dtype:?}", $function),
        }
    };
}
pub(crate) use by_type;

/// The elements in the order of the layout: lent where they are stored in that order, and copied where they are not.
pub(crate) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [T]>> {
    if let Some((from, to)) = layout.contiguous_offsets() {
        return Ok(Cow::Borrowed(&storage.as_slice()?[from..to]));
    }
    let mut copy = T::to_cpu_storage_owned(vec![T::zero(); layout.shape().elem_count()]);
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(Cow::Owned(T::cpu_storage_data(copy)?))
}

/// Calls `f` with the elements of all the tensors.
pub(crate) fn with_slices<T: WithDType, R, const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> R,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices = [const { Cow::Owned(Vec::new()) }; N];
    for ((storage, layout), to) in guards.iter().zip(&mut slices) {
        let Storage::Cpu(storage) = &**storage else {
            bail!("a tensor that is not on the CPU, where the others are");
        };
        *to = slice(storage, layout)?;
    }
    Ok(f(std::array::from_fn(|i| &*slices[i])))
}

/// The tensor of these elements, which are not copied.
pub(crate) fn tensor<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(elements, shape.into(), &Device::Cpu)
}

/// The elements as a storage, and their shape.
pub(crate) fn storage<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((T::to_cpu_storage_owned(elements), shape.into()))
}
