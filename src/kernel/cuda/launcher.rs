//! Kernels of one device: loaded, planned and launched on candle's stream of it.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::CudaDevice;
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};

use super::abi::{
    Address, BagsArgs, CatchUpArgs, Chunk, DotArgs, GatherArgs, IdsArgs, JoinArgs, LargestArgs, LeavesArgs, MarkArgs,
    NormsArgs, PairArgs, PoolArgs, SortArgs, THREADS, UpdateLaunchArgs,
};
use super::compile::load;
use super::order::Order;
use super::plan::{LEAVES, chunks};
use super::source::Module;
use super::staging::alloc;
use crate::error::Result;
use crate::reduce::LEAF;

/// The kernels of one device.
pub(super) struct Launcher {
    /// The first to go: what follows is memory that kernels use.
    pub(super) order: Order,
    pub(super) device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
    functions: HashMap<String, CudaFunction>,
    /// The chunks of each kernel's last launch.
    chunks: HashMap<String, Planned>,
}

/// Chunks as they are on the device.
struct Planned {
    /// Of what they are chunks: how many units, and how many of them are in a chunk.
    units: Vec<(u64, u32)>,
    memory: CudaSlice<u8>,
    blocks: u32,
}

impl Launcher {
    pub(super) fn new(device: &CudaDevice) -> Result<Self> {
        let (functions, chunks) = (HashMap::new(), HashMap::new());
        let stream = device.cuda_stream();
        Ok(Self { order: Order::new(&stream)?, device: device.clone(), stream, functions, chunks })
    }

    /// Before anything of a call.
    pub(super) fn begin(&self) -> Result<()> {
        self.order.begin(&self.stream)
    }

    /// Behind all launches of a call.
    pub(super) fn end(&self) -> Result<()> {
        self.order.end(&self.stream)
    }

    /// Makes sure that a kernel is there.
    pub(super) fn load(&mut self, module: Module, kernel: &str) -> Result<()> {
        if !self.functions.contains_key(kernel) {
            let function = load(&self.device, module, kernel)?;
            self.functions.insert(kernel.to_owned(), function);
        }
        Ok(())
    }

    /// Makes sure that the chunks of a kernel are on the device.
    pub(super) fn plan(&mut self, kernel: &str, units: Vec<(u64, u32)>) -> Result<()> {
        if self.chunks.get(kernel).is_some_and(|planned| planned.units == units) {
            return Ok(());
        }
        let chunks: Vec<Chunk> = chunks(units.iter().copied())?;
        let bytes: &[u8] = bytemuck::cast_slice(&chunks);
        let mut memory = alloc(&self.stream, bytes.len())?;
        self.stream.memcpy_htod(bytes, &mut memory).map_err(candle_core::Error::wrap)?;
        let blocks = chunks.len() as u32;
        self.chunks.insert(kernel.to_owned(), Planned { units, memory, blocks });
        Ok(())
    }

    pub(super) fn plan_leaves(&mut self, kernel: &str, lens: impl IntoIterator<Item = u64>) -> Result<()> {
        let units = lens.into_iter().map(|len| (len.div_ceil(LEAF as u64), LEAVES)).collect();
        self.plan(kernel, units)
    }

    /// The chunks of a kernel, and how many there are.
    pub(super) fn planned(&self, kernel: &str) -> (Address, u32) {
        let of = |planned: &Planned| (planned.memory.device_ptr(&self.stream).0, planned.blocks);
        self.chunks.get(kernel).map_or((0, 0), of)
    }

    /// Launches a kernel that was loaded.
    pub(super) fn launch<A: DeviceRepr>(&self, kernel: &str, blocks: u32, args: A) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let Some(function) = self.functions.get(kernel) else {
            return Err(candle_core::Error::msg(format!("the kernel {kernel} is not loaded")).into());
        };
        launch(&self.stream, function, blocks, args)
    }
}

/// Launches a kernel.
pub(super) fn launch<A: DeviceRepr>(stream: &CudaStream, function: &CudaFunction, blocks: u32, args: A) -> Result<()> {
    let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
    let mut builder = stream.launch_builder(function);
    builder.arg(&args);
    #[expect(unsafe_code, reason = "launches a kernel")]
    // SAFETY: the kernel takes this structure by value, as a test compares with the compiler of the other side; its
    // addresses are those of tensors and of memory of this module, of the lengths that the plans say, and what the
    // kernel reads and writes stays allocated until it has run, since memory is freed in the order of the stream.
    let launched = unsafe { builder.launch(config) };
    launched.map_err(candle_core::Error::wrap)?;
    Ok(())
}

macro_rules! arguments {
    ($($name:ty),+) => {
        $(
            #[expect(unsafe_code, reason = "arguments of kernels")]
            // SAFETY: a structure of plain numbers in C's layout, without padding, which the kernel takes by value.
            unsafe impl DeviceRepr for $name {}
        )+
    };
}
arguments!(
    UpdateLaunchArgs,
    LeavesArgs,
    NormsArgs,
    JoinArgs,
    PairArgs,
    SortArgs,
    GatherArgs,
    IdsArgs,
    CatchUpArgs,
    MarkArgs
);
arguments!(BagsArgs, PoolArgs, DotArgs, LargestArgs);
