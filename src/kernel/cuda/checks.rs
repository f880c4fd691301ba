//! Ids that only a GPU has seen, and when the host hears of one that is no row.
//!
//! A kernel checks them, and says so in host memory where one is no row of the table. The host looks there before a step uses
//! the lookup, for which it waits until the GPU has come to the lookup, with the rest of the forward and the backward pass
//! still before it; and before later lookups, without waiting. So the GPU is never idle for it, and a bad id changes nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, Tensor};
use cudarc::driver::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE};
use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice};

use super::abi::Address;
use crate::error::{Error, Result};
use crate::ids::{IDS, read_ids};

/// The checks of a table's lookups of which nobody has heard yet.
#[derive(Default)]
pub(crate) struct Unchecked(Vec<Arc<Check>>);

impl Unchecked {
    /// The check of the ids `given`, which a kernel writes into `flag`.
    pub(super) fn add(&mut self, flag: Flag, given: &Tensor, rows: usize) -> Arc<Check> {
        let check = Arc::new(Check { state: Mutex::new(State::Unknown(flag)), given: given.detach(), rows });
        self.0.push(check.clone());
        check
    }

    /// Hears of those that are done, and waits for none.
    ///
    /// # Errors
    ///
    /// A bad id of an earlier lookup that no step has said.
    pub(crate) fn hear(&mut self) -> Result<()> {
        let mut bad = None;
        let mut failed = Ok(());
        self.0.retain(|check| match check.is_good(false) {
            Ok(None) => true,
            Ok(Some(true)) => false,
            Ok(Some(false)) => {
                if !check.was_told() {
                    bad.get_or_insert_with(|| check.clone());
                }
                false
            }
            Err(error) => {
                failed = Err(error);
                true
            }
        });
        failed?;
        match bad {
            Some(check) => Err(check.error()),
            None => Ok(()),
        }
    }
}

/// Whether all ids of a lookup are rows of its table.
pub(super) struct Check {
    state: Mutex<State>,
    /// The ids, to name the one that is not.
    given: Tensor,
    rows: usize,
}

enum State {
    Unknown(Flag),
    Good,
    Bad {
        /// Whether a caller has heard of it.
        told: bool,
    },
}

impl Check {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether they are, if it is known, or to be waited for.
    pub(super) fn is_good(&self, wait: bool) -> Result<Option<bool>> {
        let mut state = self.state();
        if let State::Unknown(flag) = &*state {
            let Some(is_bad) = flag.read(wait)? else { return Ok(None) };
            let known = if is_bad { State::Bad { told: false } } else { State::Good };
            if let State::Unknown(flag) = std::mem::replace(&mut *state, known) {
                flag.give_back();
            }
        }
        Ok(Some(matches!(*state, State::Good)))
    }

    fn was_told(&self) -> bool {
        matches!(*self.state(), State::Bad { told: true })
    }

    /// Names the bad id; for its caller.
    pub(super) fn error(&self) -> Error {
        *self.state() = State::Bad { told: true };
        match read_ids(IDS, &self.given, self.rows) {
            Err(error) => error,
            Ok(_) => Error::invalid("ids", "the same from the lookup to the step", "others, and then valid ones"),
        }
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Unknown(flag) = std::mem::replace(state, State::Good) {
            flag.give_back();
        }
    }
}

/// A number in host memory that a kernel writes, and when it has.
pub(super) struct Flag {
    device: DeviceId,
    memory: PinnedHostSlice<u32>,
    written: CudaEvent,
}

/// Those that nobody uses. Host memory that a GPU writes takes long to get, and is kept.
static SPARE: Mutex<Vec<Flag>> = Mutex::new(Vec::new());

impl Flag {
    /// One that is zero.
    pub(super) fn take(device: &CudaDevice) -> Result<Self> {
        device.cuda_stream().context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        // One that was given back early may still be written.
        let is_free = |flag: &Self| flag.device == device.id() && flag.written.try_is_complete().unwrap_or(false);
        let mut flag = match spare.iter().position(is_free) {
            Some(index) => spare.swap_remove(index),
            None => {
                let context = device.cuda_stream().context().clone();
                let flags = CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_PORTABLE;
                #[expect(unsafe_code, reason = "memory that is not set yet")]
                // SAFETY: it is set below.
                let memory = unsafe { context.alloc_pinned_with_flags::<u32>(1, flags) };
                let written = context.new_event(None).map_err(candle_core::Error::wrap)?;
                Self { device: device.id(), memory: memory.map_err(candle_core::Error::wrap)?, written }
            }
        };
        flag.memory.as_mut_slice().map_err(candle_core::Error::wrap)?[0] = 0;
        Ok(flag)
    }

    fn give_back(self) {
        SPARE.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Where a kernel writes it: host memory that is locked has one address for both sides.
    pub(super) fn address(&mut self) -> Result<Address> {
        Ok(self.memory.as_mut_ptr().map_err(candle_core::Error::wrap)? as Address)
    }

    /// Behind the kernel that may write it.
    pub(super) fn record(&self, stream: &CudaStream) -> Result<()> {
        Ok(self.written.record(stream).map_err(candle_core::Error::wrap)?)
    }

    /// Whether it was written, if the kernel has run, or is to be waited for.
    fn read(&self, wait: bool) -> Result<Option<bool>> {
        self.written.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        if !wait && !self.written.try_is_complete().map_err(candle_core::Error::wrap)? {
            return Ok(None);
        }
        self.written.synchronize().map_err(candle_core::Error::wrap)?;
        Ok(Some(self.memory.as_slice().map_err(candle_core::Error::wrap)?[0] != 0))
    }
}
