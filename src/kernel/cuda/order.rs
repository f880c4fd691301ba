//! Order between calls that come from several threads.

use cudarc::driver::{CudaEvent, CudaStream};

use crate::error::{Error, Result};

/// What one owner of memory on a device has launched last. candle's default stream is another one in each thread: a call waits
/// on its own for what the call before has launched on its.
pub(super) struct Order(CudaEvent);

impl Order {
    pub(super) fn new(stream: &CudaStream) -> Result<Self> {
        Ok(Self(stream.context().new_event(None).map_err(candle_core::Error::wrap)?))
    }

    /// Before anything of a call.
    ///
    /// # Errors
    ///
    /// A capture is in progress. A step cannot be part of a CUDA graph: its coefficients change with every update, and a graph
    /// repeats them.
    pub(super) fn begin(&self, stream: &CudaStream) -> Result<()> {
        check_no_capture(stream)?;
        Ok(stream.wait(&self.0).map_err(candle_core::Error::wrap)?)
    }

    /// Behind all launches of a call.
    pub(super) fn end(&self, stream: &CudaStream) -> Result<()> {
        Ok(self.0.record(stream).map_err(candle_core::Error::wrap)?)
    }
}

impl Drop for Order {
    /// The memory goes back on the stream of the thread that gives it back.
    fn drop(&mut self) {
        // A device that does not answer reads nothing any more.
        let _ = self.0.synchronize();
    }
}

/// Nothing of this crate can be part of a CUDA graph.
pub(super) fn check_no_capture(stream: &CudaStream) -> Result<()> {
    use cudarc::driver::sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    match stream.capture_status() {
        Ok(CU_STREAM_CAPTURE_STATUS_NONE) => Ok(()),
        Ok(_) => {
            let expected = "none in progress: a graph would repeat the numbers of one call";
            Err(Error::invalid("CUDA graph capture", expected, "a step or a lookup during one"))
        }
        Err(error) => Err(candle_core::Error::wrap(error).into()),
    }
}
