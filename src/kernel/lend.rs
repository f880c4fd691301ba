//! The **only** place that takes slices out of candle's tensors.
//!
//! candle hands `&mut CpuStorage` to an in-place operation; an operation that holds a closure lends the storage to it,
//! without `unsafe`. The storage is locked meanwhile: whoever asks for the same storage again waits for ever. Hence
//! the invariants that callers keep: no gradient shares a variable's storage (compare [`storage_address`]es first); a
//! thread locks one variable at a time, and what it reads for it after it, in the order of candle's own operations in
//! place; and whoever holds a lock waits for nobody who may want one (see `cpu/team.rs`).

#[cfg(feature = "cuda")]
pub(crate) mod gpu;

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16};

use crate::state::Buffer;

/// A tensor's elements, to be read.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F64(&'a [f64]),
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl Elements<'_> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    /// At most `len` of them, from `start` on.
    pub(crate) fn part(self, start: usize, len: usize) -> Self {
        let end = self.len().min(start + len);
        match self {
            Self::F64(values) => Self::F64(&values[start..end]),
            Self::F32(values) => Self::F32(&values[start..end]),
            Self::F16(values) => Self::F16(&values[start..end]),
            Self::BF16(values) => Self::BF16(&values[start..end]),
        }
    }
}

/// A variable's elements, to be written.
pub(crate) enum ElementsMut<'a> {
    F64(&'a mut [f64]),
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
}

impl<'a> ElementsMut<'a> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    /// The first `n`, and the others.
    pub(crate) fn split_at(self, n: usize) -> (Self, Self) {
        fn both<'a, T>(
            (a, b): (&'a mut [T], &'a mut [T]),
            of: fn(&'a mut [T]) -> ElementsMut<'a>,
        ) -> (ElementsMut<'a>, ElementsMut<'a>) {
            (of(a), of(b))
        }
        match self {
            Self::F64(values) => both(values.split_at_mut(n), ElementsMut::F64),
            Self::F32(values) => both(values.split_at_mut(n), ElementsMut::F32),
            Self::F16(values) => both(values.split_at_mut(n), ElementsMut::F16),
            Self::BF16(values) => both(values.split_at_mut(n), ElementsMut::BF16),
        }
    }

    /// Whether gradients of this type can be those of these elements.
    pub(crate) fn takes(&self, grads: Elements<'_>) -> bool {
        matches!(
            (self, grads),
            (Self::F64(_), Elements::F64(_))
                | (Self::F32(_) | Self::F16(_) | Self::BF16(_), Elements::F32(_))
                | (Self::F16(_), Elements::F16(_))
                | (Self::BF16(_), Elements::BF16(_))
        )
    }
}

/// Identifies the memory of a tensor: equal addresses, same memory. Views of a tensor have its address.
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// Where a gradient is read from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A contiguous tensor.
    Tensor(&'a Tensor),
    /// An accumulated gradient of the crate's own.
    Buffer(&'a Buffer),
}

impl<'a> Source<'a> {
    /// How many elements it has.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.elem_count(),
            Self::Buffer(buffer) => buffer.len(),
        }
    }

    /// The elements in host memory, locked against writing while the result lives.
    pub(crate) fn borrow(self) -> candle_core::Result<Borrowed<'a>> {
        Ok(match self {
            Self::Tensor(tensor) | Self::Buffer(Buffer::Tensor(tensor)) => {
                let (storage, layout) = tensor.storage_and_layout();
                let range = contiguous(layout)?;
                Borrowed::Locked(storage, range)
            }
            Self::Buffer(Buffer::F32(values)) => Borrowed::Plain(Elements::F32(values)),
            Self::Buffer(Buffer::F64(values)) => Borrowed::Plain(Elements::F64(values)),
        })
    }
}

/// Elements in host memory that nobody writes meanwhile.
pub(crate) enum Borrowed<'a> {
    /// Of a tensor, with the lock on its storage.
    Locked(StorageRef<'a>, Range<usize>),
    /// Of a buffer of the crate's own.
    Plain(Elements<'a>),
}

impl Borrowed<'_> {
    /// The elements.
    pub(crate) fn elements(&self) -> candle_core::Result<Elements<'_>> {
        let (storage, range) = match self {
            Self::Plain(elements) => return Ok(*elements),
            Self::Locked(storage, range) => (storage, range.clone()),
        };
        match &**storage {
            Storage::Cpu(storage) => elements(storage, range),
            other => bail!("expected host memory, got {:?}", other.device()),
        }
    }
}

fn elements(storage: &CpuStorage, range: Range<usize>) -> candle_core::Result<Elements<'_>> {
    Ok(match storage {
        CpuStorage::F64(values) => Elements::F64(&values[range]),
        CpuStorage::F32(values) => Elements::F32(&values[range]),
        CpuStorage::F16(values) => Elements::F16(&values[range]),
        CpuStorage::BF16(values) => Elements::BF16(&values[range]),
        other => bail!("expected floats, got {:?}", candle_core::backend::BackendStorage::dtype(other)),
    })
}

/// The elements that an operation is given, of a contiguous tensor.
pub(crate) fn elements_of<'s>(storage: &'s CpuStorage, layout: &Layout) -> candle_core::Result<Elements<'s>> {
    elements(storage, contiguous(layout)?)
}

/// Lends the elements of one variable to `f`.
pub(crate) fn lend<R>(
    var: &Tensor,
    f: impl FnOnce(ElementsMut<'_>) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    if var.elem_count() == 0 {
        // candle takes the strides of some empty shapes, such as [6, 0], for those of repeated elements.
        return f(match var.dtype() {
            DType::F64 => ElementsMut::F64(&mut []),
            DType::F16 => ElementsMut::F16(&mut []),
            DType::BF16 => ElementsMut::BF16(&mut []),
            _ => ElementsMut::F32(&mut []),
        });
    }
    let op = Lend { f: RefCell::new(Some(f)), result: RefCell::new(None) };
    var.inplace_op1(&op)?;
    match op.result.into_inner() {
        Some(result) => Ok(result),
        None => bail!("the variable's storage was not lent"),
    }
}

/// An in-place operation that runs a closure instead of an operation.
struct Lend<F, R> {
    f: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
}

impl<F, R> InplaceOp1 for Lend<F, R>
where
    F: FnOnce(ElementsMut<'_>) -> candle_core::Result<R>,
{
    fn name(&self) -> &'static str {
        "adamax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let range = contiguous(layout)?;
        let elements = match storage {
            CpuStorage::F64(values) => ElementsMut::F64(&mut values[range]),
            CpuStorage::F32(values) => ElementsMut::F32(&mut values[range]),
            CpuStorage::F16(values) => ElementsMut::F16(&mut values[range]),
            CpuStorage::BF16(values) => ElementsMut::BF16(&mut values[range]),
            other => bail!(
                "expected a floating-point variable, got {:?}",
                candle_core::backend::BackendStorage::dtype(other)
            ),
        };
        if let Some(f) = self.f.take() {
            self.result.replace(Some(f(elements)?));
        }
        Ok(())
    }
}

fn contiguous(layout: &Layout) -> candle_core::Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got {layout:?}"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn views_have_the_address_of_their_tensor() -> candle_core::Result<()> {
        let tensor = Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?;
        assert_eq!(storage_address(&tensor), storage_address(&tensor.narrow(0, 1, 2)?.t()?));
        assert_ne!(storage_address(&tensor), storage_address(&tensor.copy()?));
        let view = tensor.narrow(0, 1, 2)?;
        assert!(matches!(Source::Tensor(&view).borrow()?.elements()?, Elements::F32(values) if values.len() == 8));
        assert!(Source::Tensor(&tensor.t()?).borrow().is_err());
        Ok(())
    }
}
