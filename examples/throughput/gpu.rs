//! What only a GPU has: events on its stream, and memory of its own.

#[cfg(not(feature = "cuda"))]
pub(crate) use absent::Gpu;
#[cfg(feature = "cuda")]
pub(crate) use present::Gpu;

#[cfg(feature = "cuda")]
mod present {
    use std::sync::Arc;

    use anyhow::Result;
    use candle_core::Device;
    use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
    use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};

    /// The stream on which candle and the optimizer work, and two events that are used again and again.
    pub(crate) struct Gpu {
        stream: Arc<CudaStream>,
        begin: CudaEvent,
        end: CudaEvent,
    }

    impl Gpu {
        pub(crate) fn new(device: &Device) -> Result<Self> {
            let stream = device.as_cuda_device()?.cuda_stream();
            let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            Ok(Self { begin: event()?, end: event()?, stream })
        }

        /// What the GPU's name is.
        pub(crate) fn name(&self) -> Result<String> {
            Ok(self.stream.context().name()?)
        }

        /// Begins a measurement, once the GPU has nothing left to do.
        pub(crate) fn begin(&self) -> Result<()> {
            self.stream.synchronize()?;
            Ok(self.begin.record(&self.stream)?)
        }

        /// Ends it. Waits, and says how many milliseconds have passed on the GPU.
        pub(crate) fn end(&self) -> Result<f64> {
            self.end.record(&self.stream)?;
            Ok(f64::from(self.begin.elapsed_ms(&self.end)?))
        }

        /// The bytes that are free, and those of all the memory. What is given back on the stream is free when the
        /// stream has come there.
        pub(crate) fn memory(&self) -> Result<(u64, u64)> {
            self.stream.synchronize()?;
            let (free, total) = self.stream.context().mem_get_info()?;
            Ok((free as u64, total as u64))
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod absent {
    use anyhow::{Result, bail};
    use candle_core::Device;

    /// There is none without the feature `cuda`.
    pub(crate) enum Gpu {}

    impl Gpu {
        pub(crate) fn new(_: &Device) -> Result<Self> {
            bail!("this program is built without the feature `cuda`")
        }

        pub(crate) fn name(&self) -> Result<String> {
            match *self {}
        }

        pub(crate) fn begin(&self) -> Result<()> {
            match *self {}
        }

        pub(crate) fn end(&self) -> Result<f64> {
            match *self {}
        }

        pub(crate) fn memory(&self) -> Result<(u64, u64)> {
            match *self {}
        }
    }
}
