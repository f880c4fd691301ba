//! The **only** place that takes slices out of candle's tensors.
//!
//! candle hands `&mut CpuStorage` to an in-place operation; an operation that holds a closure lends the storage to it,
//! without `unsafe`. The storage is locked meanwhile: whoever asks for the same storage again waits for ever. Hence
//! the invariant that callers keep: no variable is lent twice at once, and no gradient shares a variable's storage
//! (compare [`storage_address`]es first).

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

/// Lends the elements of several variables at once, in their order. Every variable takes a level of the stack, so the
/// caller passes no more than [`LENT_AT_ONCE`].
pub(crate) fn lend_all<R>(
    vars: &[&Tensor],
    f: impl FnOnce(Vec<ElementsMut<'_>>) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    // The closure is called at the deepest level; as a trait object it keeps the levels from growing the type.
    let (mut f, mut result) = (Some(f), None);
    lend_rest(vars, Vec::with_capacity(vars.len()), &mut |lent| {
        if let Some(f) = f.take() {
            result = Some(f(lent)?);
        }
        Ok(())
    })?;
    match result {
        Some(result) => Ok(result),
        None => bail!("the variables' storage was not lent"),
    }
}

/// How many variables [`lend_all`] takes at most.
pub(crate) const LENT_AT_ONCE: usize = 64;

type WithAll<'f> = dyn for<'x> FnMut(Vec<ElementsMut<'x>>) -> candle_core::Result<()> + 'f;

fn lend_rest(vars: &[&Tensor], lent: Vec<ElementsMut<'_>>, f: &mut WithAll<'_>) -> candle_core::Result<()> {
    match vars {
        [] => f(lent),
        [var, rest @ ..] => lend(var, move |elements| {
            let mut lent = lent;
            lent.push(elements);
            lend_rest(rest, lent, f)
        }),
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
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn lends_as_many_as_it_says_in_order() -> candle_core::Result<()> {
        let vars = (0..LENT_AT_ONCE)
            .map(|i| Var::from_vec(vec![i as f32; 3], 3, &Device::Cpu))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let tensors: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
        let lent = lend_all(&tensors, |all| {
            for (i, elements) in all.into_iter().enumerate() {
                match elements {
                    ElementsMut::F32(values) => {
                        assert_eq!(values, [i as f32; 3]);
                        values[1] = -1.0;
                    }
                    _ => bail!("wrong dtype"),
                }
            }
            Ok(vars.len())
        })?;
        assert_eq!(lent, LENT_AT_ONCE);
        assert_eq!(vars[63].to_vec1::<f32>()?, [63.0, -1.0, 63.0]);
        Ok(())
    }

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
