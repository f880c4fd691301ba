//! Addresses of tensors in a GPU's memory.
//!
//! Work on a GPU goes on after the call that began it, so no lock protects memory from it: the order of a stream does.
//! candle does all work of one device on one stream. Where a program uses others, too, cudarc keeps events: whoever is
//! about to use memory waits for those of others, and leaves one of its own. Invariant: of everything that a launch reads
//! or writes, the events of others are waited for before it, and its own are recorded behind it.

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, bail};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::contiguous;
use crate::kernel::cuda::abi::Address;

/// Runs `$body` with the slice of a storage, whatever its type.
macro_rules! with_slice {
    ($slice:expr, $values:ident => $body:expr) => {
        match $slice {
            CudaStorageSlice::F64($values) => $body,
            CudaStorageSlice::F32($values) => $body,
            CudaStorageSlice::F16($values) => $body,
            CudaStorageSlice::BF16($values) => $body,
            CudaStorageSlice::I64($values) => $body,
            CudaStorageSlice::I32($values) => $body,
            CudaStorageSlice::I16($values) => $body,
            CudaStorageSlice::U32($values) => $body,
            CudaStorageSlice::U8($values) => $body,
            _ => bail!("expected numbers that the kernels know"),
        }
    };
}

/// A contiguous tensor whose storage is locked against writing.
pub(crate) struct Held<'t> {
    storage: StorageRef<'t>,
    start: usize,
}

impl<'t> Held<'t> {
    pub(crate) fn new(tensor: &'t Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let start = contiguous(layout)?.start;
        Ok(Self { storage, start })
    }

    /// The address of its first element; the other part is to be dropped behind the launch that reads it.
    pub(crate) fn address<'s>(&'s self, stream: &'s CudaStream) -> Result<(Address, SyncOnDrop<'s>)> {
        let Storage::Cuda(storage) = &*self.storage else { bail!("expected memory of a GPU") };
        storage_address(storage, self.start, stream)
    }
}

/// The address of an element of a storage that is locked; the other part is to be dropped behind the launch that reads it.
pub(crate) fn storage_address<'s>(
    storage: &'s CudaStorage,
    start: usize,
    stream: &'s CudaStream,
) -> Result<(Address, SyncOnDrop<'s>)> {
    Ok(with_slice!(&storage.slice, values => {
        let (address, guard) = values.device_ptr(stream);
        (address + (start * size_of_element(values)) as Address, guard)
    }))
}

fn size_of_element<T>(_: &cudarc::driver::CudaSlice<T>) -> usize {
    size_of::<T>()
}

/// The address of the first element of a tensor that a launch will write, once the stream has waited for all others.
pub(crate) fn address_to_write(tensor: &Tensor, stream: &CudaStream) -> Result<Address> {
    if tensor.elem_count() == 0 {
        return Ok(0);
    }
    let op = Write { stream, address: std::cell::Cell::new(0) };
    tensor.inplace_op1(&op)?;
    Ok(op.address.get())
}

/// Records behind a launch that it has written a tensor, if there is anybody to tell.
pub(crate) fn written(tensor: &Tensor, stream: &CudaStream) -> Result<()> {
    if stream.context().is_managing_stream_synchronization() {
        // The same once more: what it waits for is behind the launch, and so is the event that it leaves.
        address_to_write(tensor, stream)?;
    }
    Ok(())
}

struct Write<'s> {
    stream: &'s CudaStream,
    address: std::cell::Cell<Address>,
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "adamax"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("expected memory of a GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let start = contiguous(layout)?.start * candle_core::backend::BackendStorage::dtype(storage).size_in_bytes();
        self.address.set(storage_address_to_write(storage, self.stream)? + start as Address);
        Ok(())
    }
}

/// The address of a storage that nobody else has yet, or that is locked.
pub(crate) fn storage_address_to_write(storage: &mut CudaStorage, stream: &CudaStream) -> Result<Address> {
    Ok(with_slice!(&mut storage.slice, values => {
        let (address, _written) = values.device_ptr_mut(stream);
        address
    }))
}

/// Records behind a launch that it has written a storage, if there is anybody to tell.
pub(crate) fn storage_written(storage: &mut CudaStorage, stream: &CudaStream) -> Result<()> {
    if stream.context().is_managing_stream_synchronization() {
        storage_address_to_write(storage, stream)?;
    }
    Ok(())
}

/// A copy of the elements of a contiguous tensor.
pub(crate) fn copied(tensor: &Tensor) -> Result<CudaStorage> {
    use candle_core::backend::{BackendDevice, BackendStorage};
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("expected memory of a GPU") };
    let mut copy = storage.device().zeros_impl(tensor.shape(), tensor.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}
