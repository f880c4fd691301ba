//! Ids of lookups on a GPU: those in host memory are checked there and copied; those on the GPU stay there, see `checks`.

use std::sync::{Arc, OnceLock};

use candle_core::{CudaDevice, DType, Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::abi::{Address, BagsArgs, IdsArgs};
use super::checks::{Check, Flag, Unchecked};
use super::compile::load;
use super::launcher::launch;
use super::order::check_no_capture;
use super::plan::blocks;
use super::source::Module;
use super::staging::alloc_of;
use crate::error::{Error, Result};
use crate::ids::{IDS, read_ids};
use crate::kernel::lend::gpu::Held;
use crate::kernel::{HostIds, LookupIds, Touched};

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
    listed: OnceLock<HostIds>,
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

    /// The rows that the ids contribute to.
    pub(crate) fn trained(lookup_ids: &LookupIds, device: &Device) -> Result<Self> {
        match lookup_ids {
            LookupIds::Gpu(ids) => Ok(ids.trained.clone()),
            LookupIds::Host(listed) => Self::on(device, listed.ids()),
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
        flag.record(&stream)?;
        let check = unchecked.add(flag, given, rows);
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

    /// Rows that are about to catch up.
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

    /// The ids in host memory; waits for the GPU.
    pub(crate) fn listed(&self) -> Result<&HostIds> {
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
        Ok(self.listed.get_or_init(|| HostIds::new(ids, sources, scales)))
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
