//! Where steps run, what times them, and how much memory there is.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};

use crate::OURS;
use crate::device::Place;
use crate::gpu::Gpu;
use crate::memory::{available_memory, peak_memory};
use crate::support::case::Step;

/// After an operation the threads of candle's own pool spin for a millisecond or so before they sleep, on the cores
/// that the next step wants (`CANDLE_BARRIER_POOL_SPIN_LIMIT` sets how long). What comes after AdamW waits until they
/// sleep.
const AFTER_ADAMW: Duration = Duration::from_millis(5);

/// One buffer of the copy within a GPU's memory: far more than its caches hold.
const COPY_BUFFER: usize = 1 << 30;
/// What the copy reads and writes.
pub(crate) const COPY_BYTES: u64 = 2 * COPY_BUFFER as u64;

/// The CPU or a GPU.
pub(crate) struct Machine {
    pub(crate) device: Device,
    gpu: Option<Gpu>,
}

/// How long each round took.
#[derive(Default)]
pub(crate) struct Times {
    /// Until the work was done: by the host's clock on the CPU, by events on a GPU.
    pub(crate) ms: Vec<f64>,
    /// Until the call returned.
    pub(crate) host_us: Vec<f64>,
}

/// The memory that is in use, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Used(u64);

impl Machine {
    pub(crate) fn new(place: Place) -> Result<Self> {
        let device = place.open()?;
        let gpu = if device.is_cuda() { Some(Gpu::new(&device)?) } else { None };
        Ok(Self { device, gpu })
    }

    pub(crate) fn is_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    /// What computes, in words.
    pub(crate) fn name(&self) -> Result<String> {
        match &self.gpu {
            None => Ok(format!("CPU with {} threads", rayon::current_num_threads())),
            Some(gpu) => gpu.name(),
        }
    }

    /// How often everything runs before it is timed. A GPU's clocks and its allocator take a while to settle.
    pub(crate) fn warm_up(&self) -> usize {
        if self.is_gpu() { 10 } else { 2 }
    }

    /// Runs something that begins when everything before it is done.
    pub(crate) fn time(&self, times: &mut Times, run: impl FnOnce() -> candle_core::Result<()>) -> Result<()> {
        if let Some(gpu) = &self.gpu {
            gpu.begin()?;
        }
        let start = Instant::now();
        run()?;
        let host = start.elapsed().as_secs_f64();
        times.host_us.push(host * 1e6);
        times.ms.push(match &self.gpu {
            None => host * 1e3,
            Some(gpu) => gpu.end()?,
        });
        Ok(())
    }

    /// Waits until candle's threads sleep.
    pub(crate) fn settle(&self) {
        if !self.is_gpu() {
            std::thread::sleep(AFTER_ADAMW);
        }
    }

    /// A copy within the device's memory, which reads and writes every byte once. The numbers are random: a GPU's
    /// clocks depend on the bits that change.
    pub(crate) fn copy(&self) -> Result<Step> {
        let elements = COPY_BUFFER / size_of::<f32>();
        let source = Tensor::rand(-1f32, 1.0, elements, &self.device)?;
        let target = Var::zeros(elements, DType::F32, &self.device)?;
        Ok(Box::new(move || target.set(&source)))
    }

    /// The memory that could be had, in bytes, where the system tells.
    pub(crate) fn free_memory(&self) -> Result<Option<u64>> {
        match &self.gpu {
            None => Ok(available_memory()),
            Some(gpu) => Ok(Some(gpu.memory()?.0)),
        }
    }

    /// The most memory that this process has had so far, or what is used of a GPU's by all that runs there, where the
    /// system tells.
    pub(crate) fn used_memory(&self) -> Result<Option<Used>> {
        match &self.gpu {
            None => Ok(peak_memory().map(Used)),
            Some(gpu) => {
                let (free, total) = gpu.memory()?;
                Ok(Some(Used(total - free)))
            }
        }
    }

    /// Says how much memory is used, and how much was `before` there was anything to update.
    pub(crate) fn describe_memory(&self, used: Option<Used>, before: Option<Used>) -> String {
        let megabytes = |used: Option<Used>| {
            used.map_or("unknown".to_owned(), |Used(bytes)| format!("{:.0} MB", bytes as f64 / 1e6))
        };
        match self.is_gpu() {
            false => format!("peak memory with {OURS}: {}", megabytes(used)),
            true => format!("device memory in use with {OURS}: {}; before: {}", megabytes(used), megabytes(before)),
        }
    }
}
