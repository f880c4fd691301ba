//! Ids of lookups on a GPU.
//!
//! Ids in host memory are checked there. Those on the GPU stay there: a kernel checks them, and says so in host memory
//! where one is no row of the table. The host looks there before a step uses the lookup, for which it waits until the GPU has
//! come to the lookup, with the rest of the forward and the backward pass still before it; and before later lookups, without
//! waiting. So the GPU is never idle for it, and a bad id changes nothing.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType, Device, Tensor};
use cudarc::driver::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice};

use super::abi::{Address, BagsArgs, IdsArgs};
use super::compile::load;
use super::launcher::launch;
use super::order::check_no_capture;
use super::plan::blocks;
use super::source::Module;
use super::staging::alloc_of;
use crate::error::{Error, Result};
use crate::gradient::sparse::{IDS, read_ids};
use crate::kernel::lend::gpu::Held;
use crate::kernel::{Listed, Occurrences, Touched};

/// What is no row of any table.
const NO_ROW: u32 = u32::MAX;

/// The ids of one lookup.
pub(crate) struct GpuIds {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    all: GpuRows,
    /// Those that get a gradient: the same, but for the padding.
    trained: GpuRows,
    bags: Option<GpuBags>,
    check: Option<Arc<Check>>,
    listed: OnceLock<Listed>,
}

/// Rows on a GPU, as they occurred; what is no row is there, too, and means none.
#[derive(Clone)]
pub(crate) struct GpuRows {
    memory: Arc<CudaSlice<u32>>,
    n: usize,
}

/// How ids are pooled.
struct GpuBags {
    /// The ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    starts: GpuRows,
    /// The bag of each id.
    bags: GpuRows,
    mean: bool,
    /// What each row is multiplied with, `[n]`.
    factors: Option<Tensor>,
}

/// What the kernels are told of the bags of a lookup.
#[derive(Clone, Copy, Default)]
pub(crate) struct BagsAt {
    pub(crate) starts: Address,
    pub(crate) bags: Address,
    pub(crate) is_mean: bool,
}

impl GpuRows {
    fn copied(stream: &Arc<CudaStream>, rows: &[u32]) -> Result<Self> {
        Ok(Self { memory: Arc::new(copied(stream, rows)?), n: rows.len() })
    }

    /// A list in host memory, on `device`.
    pub(crate) fn on(device: &Device, rows: &[u32]) -> Result<Self> {
        Self::copied(&cuda(device)?.cuda_stream(), rows)
    }

    /// Room for `n` numbers, which nobody has set.
    pub(crate) fn none(device: &Device, n: usize) -> Result<Self> {
        Ok(Self { memory: Arc::new(alloc_of(&cuda(device)?.cuda_stream(), n)?), n })
    }

    /// The rows that occurrences contribute to.
    pub(crate) fn trained(occurrences: &Occurrences, device: &Device) -> Result<Self> {
        match occurrences {
            Occurrences::Gpu(ids) => Ok(ids.trained.clone()),
            Occurrences::Host(listed) => Self::on(device, listed.ids()),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.n
    }

    pub(crate) fn address(&self, stream: &CudaStream) -> Address {
        self.memory.device_ptr(stream).0
    }
}

impl GpuIds {
    /// The ids of a lookup in a table of so many `rows` on `device`, of which `padding` gets no gradient. Ids on that GPU are
    /// checked there, and are among the `unchecked` until that is known.
    ///
    /// # Errors
    ///
    /// An id that is not the number of a row; ids that are not integers.
    pub(crate) fn new(
        device: &Device,
        given: &Tensor,
        rows: usize,
        padding: Option<u32>,
        unchecked: &mut Unchecked,
    ) -> Result<Self> {
        let kernel = match given.dtype() {
            DType::U8 => "rows_ids_u8",
            DType::I16 => "rows_ids_i16",
            DType::I32 => "rows_ids_i32",
            DType::U32 => "rows_ids_u32",
            _ => "rows_ids_i64",
        };
        if !given.device().same_device(device) || !given.dtype().is_int() || given.elem_count() == 0 {
            return Self::listed_on(device, &read_ids(IDS, given, rows)?, padding);
        }
        let device = cuda(device)?;
        let stream = device.cuda_stream();
        check_no_capture(&stream)?;
        let function = load(device, Module::Rows, kernel)?;
        let n = given.elem_count();
        let room = || Ok::<_, Error>(GpuRows { memory: Arc::new(alloc_of(&stream, n)?), n });
        let all = room()?;
        let trained = if padding.is_some() { room()? } else { all.clone() };
        let mut flag = Flag::take(device)?;
        let flat = given.detach().contiguous()?;
        let held = Held::new(&flat)?;
        let (from, guard) = held.address(&stream)?;
        let args = IdsArgs {
            from,
            to: all.address(&stream),
            trained: if padding.is_some() { trained.address(&stream) } else { 0 },
            bad: flag.address()?,
            n: n as u64,
            rows: rows as u32,
            padding: padding.unwrap_or(NO_ROW),
        };
        launch(&stream, &function, blocks(args.n), args)?;
        drop(guard);
        flag.written.record(&stream).map_err(candle_core::Error::wrap)?;
        let check = Arc::new(Check { state: Mutex::new(State::Unknown(flag)), given: given.detach(), rows });
        unchecked.0.push(check.clone());
        let device = device.clone();
        Ok(Self { device, stream, all, trained, bags: None, check: Some(check), listed: OnceLock::new() })
    }

    /// Ids that the host has, and has checked.
    pub(crate) fn listed_on(device: &Device, ids: &[u32], padding: Option<u32>) -> Result<Self> {
        let device = cuda(device)?.clone();
        let stream = device.cuda_stream();
        let all = GpuRows::copied(&stream, ids)?;
        let trained = match padding {
            Some(padding) if ids.contains(&padding) => {
                let trained: Vec<u32> = ids.iter().map(|&id| if id == padding { NO_ROW } else { id }).collect();
                GpuRows::copied(&stream, &trained)?
            }
            _ => all.clone(),
        };
        Ok(Self { device, stream, all, trained, bags: None, check: None, listed: OnceLock::new() })
    }

    /// The same, pooled: the ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    pub(crate) fn pooled(self, starts: &[u32], mean: bool, factors: Option<Tensor>) -> Result<Self> {
        let stream = &self.stream;
        let starts = GpuRows::copied(stream, starts)?;
        let bags = GpuRows { memory: Arc::new(alloc_of(stream, self.len())?), n: self.len() };
        let (n, bags_n) = (self.len() as u64, starts.n as u64 - 1);
        if n > 0 {
            let function = load(&self.device, Module::Pool, "pool_bags")?;
            let args = BagsArgs { starts: starts.address(stream), bags: bags.address(stream), n, bags_n };
            launch(stream, &function, blocks(n), args)?;
        }
        Ok(Self { bags: Some(GpuBags { starts, bags, mean, factors }), ..self })
    }

    pub(crate) fn len(&self) -> usize {
        self.all.n
    }

    /// All ids.
    pub(crate) fn rows(&self) -> &GpuRows {
        &self.all
    }

    /// The same, that are about to pay.
    pub(crate) fn touched(&self) -> Touched<'static> {
        Touched::OnGpu(vec![self.all.clone()])
    }

    /// What contributions are multiplied with.
    pub(crate) fn factors(&self) -> Option<&Tensor> {
        self.bags.as_ref()?.factors.as_ref()
    }

    /// The ids that get a gradient.
    pub(crate) fn trained(&self) -> &GpuRows {
        &self.trained
    }

    /// Their bags.
    pub(crate) fn bags(&self, stream: &CudaStream) -> BagsAt {
        let bags = self.bags.as_ref().map(|GpuBags { starts, bags, mean, .. }| BagsAt {
            starts: starts.address(stream),
            bags: bags.address(stream),
            is_mean: *mean,
        });
        bags.unwrap_or_default()
    }

    /// Waits until it is known whether all ids are rows of the table.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.check {
            Some(check) if check.is_good(true)? == Some(false) => Err(check.error()),
            _ => Ok(()),
        }
    }

    /// The occurrences in host memory; waits for the GPU.
    pub(crate) fn listed(&self) -> Result<&Listed> {
        if let Some(listed) = self.listed.get() {
            return Ok(listed);
        }
        let list = |rows: &GpuRows| match rows.n {
            0 => Ok(Vec::new()),
            n => self.stream.clone_dtoh(&rows.memory.slice(..n)).map_err(candle_core::Error::wrap),
        };
        let mut ids = list(&self.trained)?;
        let (sources, scales) = match &self.bags {
            None => {
                let trained = (0..).zip(&ids).filter(|&(_, &id)| id != NO_ROW).map(|(source, _)| source);
                let sources: Vec<u32> = trained.collect();
                let is_all = sources.len() == ids.len();
                ids.retain(|&id| id != NO_ROW);
                (if is_all { None } else { Some(sources) }, None)
            }
            Some(bags) => {
                let (starts, sources) = (list(&bags.starts)?, list(&bags.bags)?);
                let count = |&bag: &u32| f64::from(starts[bag as usize + 1] - starts[bag as usize]);
                let scales = match &bags.factors {
                    Some(factors) => Some(factors.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?),
                    None if bags.mean => Some(sources.iter().map(|bag| 1.0 / count(bag)).collect()),
                    None => None,
                };
                (Some(sources), scales)
            }
        };
        Ok(self.listed.get_or_init(|| Listed::new(ids, sources, scales)))
    }
}

fn cuda(device: &Device) -> Result<&CudaDevice> {
    match device {
        Device::Cuda(device) => Ok(device),
        _ => Err(candle_core::Error::msg("expected a table on a GPU").into()),
    }
}

/// A copy on the GPU, which gives no memory of no bytes.
fn copied(stream: &Arc<CudaStream>, values: &[u32]) -> Result<CudaSlice<u32>> {
    match values {
        [] => alloc_of::<u32>(stream, 1),
        _ => Ok(stream.clone_htod(values).map_err(candle_core::Error::wrap)?),
    }
}

/// The checks of a table's lookups of which nobody has heard yet.
#[derive(Default)]
pub(crate) struct Unchecked(Vec<Arc<Check>>);

impl Unchecked {
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
struct Check {
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
    fn is_good(&self, wait: bool) -> Result<Option<bool>> {
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
    fn error(&self) -> Error {
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
struct Flag {
    device: DeviceId,
    memory: PinnedHostSlice<u32>,
    written: CudaEvent,
}

/// Those that nobody uses. Host memory that a GPU writes takes long to get, and is kept.
static SPARE: Mutex<Vec<Flag>> = Mutex::new(Vec::new());

impl Flag {
    /// One that is zero.
    fn take(device: &CudaDevice) -> Result<Self> {
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
    fn address(&mut self) -> Result<Address> {
        Ok(self.memory.as_mut_ptr().map_err(candle_core::Error::wrap)? as Address)
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
