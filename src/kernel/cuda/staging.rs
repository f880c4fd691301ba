//! One copy to the GPU for all that a launch is told.
//!
//! A call fills pinned host memory, and one asynchronous copy takes it to the device. Several pieces of pinned memory take
//! turns, so that a call waits for no copy but one of several calls before.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice};

use super::abi::Address;
use crate::error::Result;

/// Everything begins at a multiple of this many bytes.
const ALIGNMENT: usize = 16;
/// So many calls may be on their way.
const TURNS: usize = 4;

/// Where something will be, once it is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offset(usize);

/// What is to be copied: places first, contents when addresses are known.
#[derive(Debug, Default)]
pub(crate) struct ArenaLayout(usize);

impl ArenaLayout {
    /// Room for `n` values.
    pub(crate) fn of<T>(&mut self, n: usize) -> Offset {
        let place = Offset(self.0);
        self.0 += (n * size_of::<T>()).next_multiple_of(ALIGNMENT);
        place
    }
}

/// Memory on both sides.
pub(crate) struct Staging {
    stream: Arc<CudaStream>,
    pinned: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
    next: usize,
    device: Option<CudaSlice<u8>>,
}

impl Staging {
    pub(crate) fn new(stream: Arc<CudaStream>) -> Self {
        Self { stream, pinned: Vec::new(), next: 0, device: None }
    }

    /// Makes room on both sides.
    pub(crate) fn prepare(&mut self, arena: &ArenaLayout) -> Result<()> {
        let bytes = arena.0.max(ALIGNMENT);
        if self.device.as_ref().is_none_or(|device| device.len() < bytes) {
            let bytes = bytes.next_power_of_two();
            self.wait();
            self.pinned.clear();
            self.next = 0;
            // The old memory is given back when what reads it has run: in the order of the stream.
            self.device = Some(alloc(&self.stream, bytes)?);
        }
        let capacity = self.device.as_ref().map_or(0, CudaSlice::len);
        if self.next == self.pinned.len() {
            let context = self.stream.context();
            #[expect(unsafe_code, reason = "memory that is not set yet")]
            // SAFETY: bytes are written before they are copied: the copy takes what was filled, and what lies between
            // are bytes that no kernel reads.
            let pinned = unsafe { context.alloc_pinned::<u8>(capacity) }.map_err(candle_core::Error::wrap)?;
            self.pinned.push((pinned, context.new_event(None).map_err(candle_core::Error::wrap)?));
        }
        Ok(())
    }

    /// Begins to write arguments, once there is room.
    pub(crate) fn fill(&mut self, arena: &ArenaLayout) -> Result<ArenaWriter<'_>> {
        self.prepare(arena)?;
        let turn = self.next;
        self.next = (self.next + 1) % TURNS;
        let (Some(device), Some((pinned, copied))) = (&mut self.device, self.pinned.get_mut(turn)) else {
            return Err(candle_core::Error::msg("no memory for what the kernels are told").into());
        };
        copied.synchronize().map_err(candle_core::Error::wrap)?;
        let base = device.device_ptr(&self.stream).0;
        Ok(ArenaWriter { stream: &self.stream, pinned, copied, device, base, bytes: arena.0 })
    }
}

impl Staging {
    /// Waits for the copies that are on their way: their memory is about to go.
    fn wait(&self) {
        for (_, copied) in &self.pinned {
            // A device that does not answer copies nothing any more.
            let _ = copied.synchronize();
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.wait();
    }
}

/// Memory on a device, whose contents nobody has set.
pub(crate) fn alloc(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>> {
    alloc_of(stream, bytes.max(ALIGNMENT))
}

/// The same for `n` numbers, at least one.
pub(crate) fn alloc_of<T: Pod + DeviceRepr>(stream: &Arc<CudaStream>, n: usize) -> Result<CudaSlice<T>> {
    #[expect(unsafe_code, reason = "memory that is not set yet")]
    // SAFETY: it holds numbers, for which every value is valid; kernels write what they read. A device gives no memory of
    // no bytes.
    let memory = unsafe { stream.alloc::<T>(n.max(1)) };
    Ok(memory.map_err(candle_core::Error::wrap)?)
}

/// One copy, being filled.
pub(crate) struct ArenaWriter<'s> {
    stream: &'s Arc<CudaStream>,
    pinned: &'s mut PinnedHostSlice<u8>,
    copied: &'s CudaEvent,
    device: &'s mut CudaSlice<u8>,
    base: Address,
    bytes: usize,
}

impl ArenaWriter<'_> {
    /// The stream that the copy is on.
    pub(crate) fn stream(&self) -> &CudaStream {
        self.stream
    }

    /// Where something will be on the device.
    pub(crate) fn address(&self, place: Offset) -> Address {
        self.base + place.0 as Address
    }

    /// Fills a place.
    pub(crate) fn put<T: Pod>(&mut self, place: Offset, values: &[T]) -> Result<Address> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let pinned = self.pinned.as_mut_slice().map_err(candle_core::Error::wrap)?;
        pinned[place.0..place.0 + bytes.len()].copy_from_slice(bytes);
        Ok(self.address(place))
    }

    /// Begins the copy.
    pub(crate) fn copy(self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let pinned = self.pinned.as_slice().map_err(candle_core::Error::wrap)?;
        self.stream.memcpy_htod(&pinned[..self.bytes], self.device).map_err(candle_core::Error::wrap)?;
        Ok(self.copied.record(self.stream).map_err(candle_core::Error::wrap)?)
    }
}
