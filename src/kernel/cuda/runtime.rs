//! One GPU of one optimizer: what is prepared, copied and launched in a call, all on candle's stream of that device.
//!
//! Invariant: everything that can fail for want of memory or of a compiler comes before the first launch; nothing here
//! waits for the device but what says so.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Tensor};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice, PushKernelArg,
};

use super::abi::{
    self, Address, Chunk, Control, GatherArgs, Gradient, JoinArgs, Late, LeavesArgs, NormsArgs, Pair, PairArgs,
    SumArgs, THREADS, UpdateArgs,
};
use super::compile::load;
use super::plan::{LEAVES, blocks_of_rows, chunks, units_of_chunk};
use super::source::{Module, update_kernel};
use super::staging::{Place, Room, Staging, alloc};
use crate::error::{Error, Result};
use crate::kernel::lend::gpu::{Held, address_to_write, storage_address_to_write, written};
use crate::kernel::{Accumulate, Average, Contribution, Measured, RowGrad, RowTask, RowValues, Source, Task, Update};
use crate::reduce::{LEAF, NormType};
use crate::state::{Buffer, Master, MomentTensors, ParamState, Stored, arithmetic};

/// The GPUs of one optimizer.
#[derive(Default)]
pub(crate) struct Runtimes(Vec<Runtime>);

struct Runtime {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    functions: HashMap<String, CudaFunction>,
    staging: Staging,
    /// The chunks of each kernel's last launch.
    chunks: HashMap<String, Planned>,
    control: CudaSlice<u8>,
    /// Partial sums of norms.
    scratch: Option<CudaSlice<u8>>,
    /// Sums of the gradients of rows.
    sums: Option<CudaSlice<u8>>,
    /// Whether the last update has measured the norm, and was asked to.
    has_measured: bool,
    /// Whether the last update may have been skipped.
    last_skips: bool,
    /// Skipped calls that the host knows of.
    heard: u64,
    /// What the control was behind each of the calls that are not settled.
    unsettled: VecDeque<(PinnedHostSlice<u8>, CudaEvent)>,
    /// Memory for more of them.
    spare: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
}

/// Chunks as they are on the device.
struct Planned {
    /// Of what they are chunks: how many units, and how many of them are in a chunk.
    units: Vec<(u64, u32)>,
    memory: CudaSlice<u8>,
    blocks: u32,
}

impl Runtimes {
    /// The runtime of a device; made when it is first needed.
    fn of(&mut self, device: &Device) -> Result<&mut Runtime> {
        let Device::Cuda(device) = device else {
            return Err(candle_core::Error::msg("expected a variable on a GPU").into());
        };
        let known = self.0.iter().position(|runtime| runtime.device.id() == device.id());
        let index = match known {
            Some(index) => index,
            None => {
                self.0.push(Runtime::new(device)?);
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[index])
    }

    /// The devices of these tasks, each with its own.
    fn by_device<T>(tasks: Vec<T>, device: impl Fn(&T) -> Option<Device>) -> Vec<(Device, Vec<T>)> {
        let mut all: Vec<(Device, Vec<T>)> = Vec::new();
        for task in tasks {
            let Some(device) = device(&task) else { continue };
            match all.iter_mut().find(|(known, _)| known.same_device(&device)) {
                Some((_, tasks)) => tasks.push(task),
                None => all.push((device, vec![task])),
            }
        }
        all
    }

    pub(crate) fn update(
        &mut self,
        tasks: Vec<Task<'_, Update<'_>>>,
        rows: Vec<RowTask<'_>>,
        measured: Option<Measured>,
    ) -> Result<()> {
        let tasks = tasks.into_iter().map(Work::Dense).chain(rows.into_iter().map(Work::Rows)).collect();
        for (device, work) in Self::by_device(tasks, |work| Some(work.var()?.device().clone())) {
            self.of(&device)?.update(work, measured.clone())?;
        }
        Ok(())
    }

    pub(crate) fn accumulate(&mut self, tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
        let device = |task: &Task<'_, Accumulate<'_>>| match task.read {
            Some(Source::Tensor(grad)) => Some(grad.device().clone()),
            _ => None,
        };
        for (device, tasks) in Self::by_device(tasks, device) {
            let pass = Pass { kernel: "accumulate", factor: 0.0, other_factor: 0.0, overwrites: false };
            let mut pairs = Vec::new();
            let mut factor = 1.0;
            for task in tasks {
                let (Some(Source::Tensor(grad)), Buffer::Tensor(sum)) = (task.read, &*task.kind.sum) else { continue };
                factor = task.kind.unscale;
                pairs.push((sum.clone(), grad.clone()));
            }
            self.of(&device)?.pass(&Pass { factor, ..pass }, &pairs)?;
        }
        Ok(())
    }

    pub(crate) fn average(&mut self, tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
        let device = |task: &Task<'_, Average<'_>>| task.lent.map(|var| var.device().clone());
        for (device, tasks) in Self::by_device(tasks, device) {
            // Variables that came later begin with a copy, so not all have the same momentum.
            let mut passes: Vec<(Pass, Vec<(Tensor, Tensor)>)> = Vec::new();
            for task in tasks {
                let (Some(var), Average { momentum, overwrite, average: Buffer::Tensor(average) }) =
                    (task.lent, task.kind)
                else {
                    continue;
                };
                let (pair, other_factor) = ((average.clone(), var.clone()), 1.0 - momentum);
                let pass = Pass { kernel: "average", factor: momentum, other_factor, overwrites: overwrite };
                match passes.iter_mut().find(|(known, _)| *known == pass) {
                    Some((_, pairs)) => pairs.push(pair),
                    None => passes.push((pass, vec![pair])),
                }
            }
            for (pass, pairs) in passes {
                self.of(&device)?.pass(&pass, &pairs)?;
            }
        }
        Ok(())
    }

    /// The norm of one gradient; waits for it.
    pub(crate) fn measure(&mut self, grad: Source<'_>, norm: NormType) -> Result<f64> {
        let grad = tensor_of(grad)?;
        self.of(grad.device())?.measure(grad, norm)
    }

    /// The norm of all gradients of the last update; waits for it.
    pub(crate) fn total_norm(&self) -> Result<Option<f64>> {
        match self.0.iter().find(|runtime| runtime.has_measured) {
            Some(runtime) => Ok(Some(runtime.control()?.total_norm)),
            None => Ok(None),
        }
    }

    /// The runtime whose calls may be skipped: there is one, since that needs all variables on one GPU.
    fn skipping(&self) -> Option<&Runtime> {
        self.0.iter().find(|runtime| !runtime.unsettled.is_empty())
    }

    pub(crate) fn settle(&mut self, wait: bool) -> Result<Option<bool>> {
        match self.0.iter_mut().find(|runtime| !runtime.unsettled.is_empty()) {
            Some(runtime) => runtime.settle(wait),
            None => Ok(None),
        }
    }

    pub(crate) fn unheard(&self) -> Result<u64> {
        self.skipping().map_or(Ok(0), |runtime| Ok(runtime.control()?.skipped - runtime.heard))
    }

    pub(crate) fn was_skipped(&self) -> Result<bool> {
        let has_skipped = |runtime: &Runtime| Ok(runtime.control()?.skip != 0);
        // The last call may have been settled since.
        self.0.iter().find(|runtime| runtime.last_skips).map_or(Ok(false), has_skipped)
    }
}

/// One parameter of an update.
enum Work<'a> {
    Dense(Task<'a, Update<'a>>),
    Rows(RowTask<'a>),
}

impl Work<'_> {
    fn var(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(task) => task.lent,
            Self::Rows(task) => Some(task.var),
        }
    }

    fn nth(&self) -> usize {
        match self {
            Self::Dense(task) => task.nth,
            Self::Rows(task) => task.nth,
        }
    }

    fn state(&self) -> &ParamState {
        match self {
            Self::Dense(task) => task.kind.state,
            Self::Rows(task) => task.state,
        }
    }

    fn orders(&self) -> abi::Orders {
        abi::Orders::new(match self {
            Self::Dense(task) => &task.kind.orders,
            Self::Rows(task) => &task.orders,
        })
    }
}

/// A parameter of an update, with all that is known of it before addresses are.
struct Prepared<'a> {
    var: &'a Tensor,
    moments: &'a MomentTensors,
    master: Option<&'a Tensor>,
    grad: Grad<'a>,
    unit: u64,
    kernel: String,
    module: Module,
}

/// Where a gradient is.
enum Grad<'a> {
    Dense(&'a Tensor),
    /// Rows and their sums, in host memory.
    Rows(&'a [u32], &'a Buffer),
    /// Rows, and of what on the GPU they are the sums.
    Sums(RowSums<'a>),
}

/// Of a `RowGrad`.
struct RowSums<'a> {
    rows: &'a [u32],
    row_len: usize,
    starts: &'a [u32],
    contributions: &'a [Contribution],
    parts: Vec<&'a Tensor>,
}

impl<'a> Grad<'a> {
    fn elements(&self) -> u64 {
        match self {
            Self::Dense(grad) => grad.elem_count() as u64,
            Self::Rows(_, values) => values.len() as u64,
            Self::Sums(sums) => (sums.rows.len() * sums.row_len) as u64,
        }
    }

    /// The tensors that are read.
    fn tensors(&self) -> Vec<&'a Tensor> {
        match self {
            Self::Dense(grad) => vec![*grad],
            Self::Rows(..) => Vec::new(),
            Self::Sums(sums) => sums.parts.clone(),
        }
    }

    fn dtype(&self, var: &Tensor) -> DType {
        match self {
            Self::Dense(grad) => grad.dtype(),
            Self::Rows(..) | Self::Sums(_) => arithmetic(var.dtype()),
        }
    }
}

impl<'a> Prepared<'a> {
    fn new(work: &'a Work<'_>) -> Result<Self> {
        let state = work.state();
        let layout = &state.moments.layout;
        let (Some(var), Stored::Device(moments)) = (work.var(), &state.moments.stored) else {
            return Err(candle_core::Error::msg("expected moments on the variable's GPU").into());
        };
        let master = match &state.master {
            Some(Master::Device(master)) => Some(master),
            None => None,
            Some(_) => return Err(candle_core::Error::msg("expected a master on the variable's GPU").into()),
        };
        let (grad, unit) = match work {
            Work::Dense(task) => match task.read {
                Some(source) => (Grad::Dense(tensor_of(source)?), layout.unit as u64),
                None => return Err(candle_core::Error::msg("expected a gradient").into()),
            },
            // Moments as they are have no units: then any length will do.
            Work::Rows(RowTask { grad: RowGrad { rows, row_len, values }, .. }) => {
                let grad = match values {
                    RowValues::Summed(sums) => Grad::Rows(rows, sums),
                    RowValues::Lazy { starts, contributions, parts } => {
                        let parts = parts.iter().map(|part| part.as_ref()).collect();
                        Grad::Sums(RowSums { rows, row_len: *row_len, starts, contributions, parts })
                    }
                };
                (grad, (*row_len).max(1) as u64)
            }
        };
        let dtypes = (var.dtype(), grad.dtype(var));
        let kernel = update_kernel(dtypes.0, dtypes.1, layout.dtype, layout.rowwise);
        let module = Module::of_update(dtypes)?;
        Ok(Self { var, moments, master, grad, unit, kernel, module })
    }

    /// How many units are updated.
    fn units(&self) -> u64 {
        match &self.grad {
            Grad::Dense(_) => (self.var.elem_count() as u64).div_ceil(self.unit),
            // Rows without elements have nothing to update.
            Grad::Rows(..) | Grad::Sums(_) if self.grad.elements() == 0 => 0,
            Grad::Rows(rows, _) | Grad::Sums(RowSums { rows, .. }) => rows.len() as u64,
        }
    }
}

/// Where on the device what is known of the rows of one table will be.
struct RowPlaces {
    rows: Place,
    count: Place,
    /// The sums, or what they are made of.
    values: ValuePlaces,
}

enum ValuePlaces {
    Summed(Place),
    Sums { starts: Place, contributions: Place, parts: Place },
}

impl RowPlaces {
    fn of(grad: &Grad<'_>, room: &mut Room) -> Option<Self> {
        let (rows, values) = match grad {
            Grad::Dense(_) => return None,
            Grad::Rows(rows, sums) => (rows, ValuePlaces::Summed(room.of::<u8>(sums.bytes()))),
            Grad::Sums(RowSums { rows, starts, contributions, parts, .. }) => {
                let starts = room.of::<u32>(starts.len());
                let contributions = room.of::<Contribution>(contributions.len());
                (rows, ValuePlaces::Sums { starts, contributions, parts: room.of::<abi::Part>(parts.len()) })
            }
        };
        Some(Self { rows: room.of::<u32>(rows.len()), count: room.of::<u32>(1), values })
    }
}

/// A gradient as a tensor on a GPU.
fn tensor_of(source: Source<'_>) -> Result<&Tensor> {
    match source {
        Source::Tensor(tensor) | Source::Buffer(Buffer::Tensor(tensor)) => Ok(tensor),
        Source::Buffer(_) => Err(candle_core::Error::msg("expected a gradient on the variable's GPU").into()),
    }
}

/// What is done to pairs of tensors.
#[derive(PartialEq)]
struct Pass {
    kernel: &'static str,
    factor: f64,
    other_factor: f64,
    overwrites: bool,
}

/// Room for the norms of some gradients: leaves, folded leaves, norms, squares.
struct Norms {
    leaves: Address,
    folded: Address,
    norms: Address,
    squares: Address,
}

impl Runtime {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let control = stream.alloc_zeros::<u8>(size_of::<Control>()).map_err(candle_core::Error::wrap)?;
        Ok(Self {
            device: device.clone(),
            staging: Staging::new(stream.clone()),
            stream,
            functions: HashMap::new(),
            chunks: HashMap::new(),
            control,
            scratch: None,
            sums: None,
            has_measured: false,
            last_skips: false,
            heard: 0,
            unsettled: VecDeque::new(),
            spare: Vec::new(),
        })
    }

    fn update(&mut self, work: Vec<Work<'_>>, measured: Option<Measured>) -> Result<()> {
        self.check_no_capture()?;
        let mut work = work;
        // The order in which norms are joined, which is that of the orders.
        work.sort_by_key(Work::nth);
        let prepared = work.iter().map(Prepared::new).collect::<Result<Vec<_>>>()?;
        let mut orders: Vec<abi::Orders> = work.iter().map(Work::orders).collect();
        let n = orders.len() as u32;
        if let Some(Measured { late, .. }) = &measured {
            orders.extend(late.iter().flatten().map(abi::Orders::new));
        }
        let mut told = match &measured {
            Some(Measured { skips: true, .. }) => Some(self.prepare_telling()?),
            _ => None,
        };
        let mut kernels: Vec<(&str, Module, Vec<usize>)> = Vec::new();
        for (index, task) in prepared.iter().enumerate().filter(|(_, task)| task.units() > 0) {
            match kernels.iter_mut().find(|(kernel, ..)| *kernel == task.kernel) {
                Some((_, _, tasks)) => tasks.push(index),
                None => kernels.push((&task.kernel, task.module, vec![index])),
            }
        }
        for (kernel, module, tasks) in &kernels {
            self.load(*module, kernel)?;
            let units = tasks.iter().map(|&i| (prepared[i].units(), units_of_chunk(prepared[i].unit))).collect();
            self.plan(kernel, units)?;
        }
        let sums_at = self.prepare_sums(&prepared)?;
        let lens: Vec<(DType, u64)> =
            prepared.iter().map(|task| (task.grad.dtype(task.var), task.grad.elements())).collect();
        let norms = match &measured {
            Some(_) => Some(self.prepare_norms(&lens)?),
            None => None,
        };

        let mut room = Room::default();
        let of_orders = room.of::<abi::Orders>(orders.len());
        let of_tensors: Vec<_> = kernels.iter().map(|(_, _, tasks)| room.of::<abi::Tensor>(tasks.len())).collect();
        let of_gradients = room.of::<Gradient>(prepared.len());
        let of_rows: Vec<_> = prepared.iter().map(|task| RowPlaces::of(&task.grad, &mut room)).collect();
        let mut filling = self.staging.prepare(&room)?;

        // From here on the gradients are locked against writing, until everything is launched.
        let held = prepared
            .iter()
            .map(|task| task.grad.tensors().into_iter().map(Held::new).collect())
            .collect::<candle_core::Result<Vec<Vec<Held<'_>>>>>()?;
        let (mut guards, mut tensors, mut sums) = (Vec::new(), Vec::with_capacity(prepared.len()), Vec::new());
        for ((((task, held), places), sums_at), index) in
            prepared.iter().zip(&held).zip(&of_rows).zip(&sums_at).zip(0u32..)
        {
            let mut addresses = Vec::with_capacity(held.len());
            for held in held {
                let (address, guard) = held.address(&self.stream)?;
                guards.push(guard);
                addresses.push(address);
            }
            let mut grad = addresses.first().copied().unwrap_or(0);
            let (mut rows_at, mut count) = (0, 0);
            if let Some(RowPlaces { rows, count: of_count, values }) = places {
                let numbers: &[u32] = match &task.grad {
                    Grad::Rows(rows, _) | Grad::Sums(RowSums { rows, .. }) => rows,
                    Grad::Dense(_) => &[],
                };
                rows_at = filling.put(*rows, numbers)?;
                count = filling.put(*of_count, &[numbers.len() as u32])?;
                match (&task.grad, values) {
                    (Grad::Rows(_, Buffer::F32(values)), ValuePlaces::Summed(place)) => {
                        grad = filling.put::<f32>(*place, values)?;
                    }
                    (Grad::Rows(_, Buffer::F64(values)), ValuePlaces::Summed(place)) => {
                        grad = filling.put::<f64>(*place, values)?;
                    }
                    (Grad::Sums(of), ValuePlaces::Sums { starts, contributions, parts }) => {
                        let dtypes = of.parts.iter().map(|part| part.dtype());
                        let all: Vec<_> =
                            addresses.iter().zip(dtypes).map(|(&at, dtype)| abi::Part::new(at, dtype)).collect();
                        grad = *sums_at;
                        let args = SumArgs {
                            starts: filling.put(*starts, of.starts)?,
                            contributions: filling.put(*contributions, of.contributions)?,
                            parts: filling.put(*parts, &all)?,
                            out: grad,
                            n: of.rows.len() as u64,
                            row_len: of.row_len as u64,
                        };
                        sums.push((sum_kernel(task.var.dtype()), args));
                    }
                    _ => return Err(candle_core::Error::msg("rows in host memory have a type of arithmetic").into()),
                }
            }
            let write = |tensor: &Tensor| address_to_write(tensor, &self.stream);
            tensors.push(abi::Tensor {
                param: write(task.var)?,
                grad,
                exp_avg: write(&task.moments.exp_avg)?,
                exp_inf: write(&task.moments.exp_inf)?,
                units: task.moments.units.as_ref().map_or(Ok(0), write)?,
                master: task.master.map_or(Ok(0), write)?,
                rows: rows_at,
                count,
                len: task.var.elem_count() as u64,
                unit: task.unit,
                orders: index,
                chunk: units_of_chunk(task.unit),
            });
        }
        filling.put(of_orders, &orders)?;
        for ((_, _, tasks), place) in kernels.iter().zip(&of_tensors) {
            filling.put(*place, &tasks.iter().map(|&i| tensors[i]).collect::<Vec<_>>())?;
        }
        let mut first = 0;
        let gradients: Vec<Gradient> = lens
            .iter()
            .zip(&tensors)
            .map(|((_, len), tensor)| {
                let gradient = Gradient { values: tensor.grad, count: 0, len: *len, first };
                first += len.div_ceil(LEAF as u64);
                gradient
            })
            .collect();
        filling.put(of_gradients, &gradients)?;
        let (orders_at, gradients_at) = (filling.address(of_orders), filling.address(of_gradients));
        let tensors_at: Vec<Address> = of_tensors.iter().map(|place| filling.address(*place)).collect();
        filling.copy()?;

        for (kernel, args) in sums {
            self.launch(kernel, blocks_of_rows(args.n, args.row_len), args)?;
        }
        let mut late = Late::default();
        if let (Some(measured), Some(norms)) = (&measured, &norms) {
            self.launch_norms(&lens, gradients_at, norms, measured.norm, measured.unscale)?;
            let (clip, limit) = abi::clip(measured.clip);
            let control = self.control.device_ptr(&self.stream).0;
            let args = JoinArgs {
                norms: norms.norms,
                squares: norms.squares,
                orders: orders_at,
                control,
                limit,
                n,
                orders_n: orders.len() as u32,
                norm: abi::norm(measured.norm),
                clip,
                skips: u32::from(measured.skips),
                padding: 0,
            };
            self.launch("summary_join", 1, args)?;
            if let Some((memory, copied)) = &mut told {
                late = Late { control, heard: self.heard, orders: n, padding: 0 };
                self.stream.memcpy_dtoh(&self.control, memory).map_err(candle_core::Error::wrap)?;
                copied.record(&self.stream).map_err(candle_core::Error::wrap)?;
            }
        }
        for ((kernel, ..), tensors) in kernels.iter().zip(tensors_at) {
            let (chunks, blocks) = self.planned(kernel);
            self.launch(kernel, blocks, UpdateArgs { tensors, orders: orders_at, chunks, late })?;
        }
        drop(guards);
        prepared.iter().try_for_each(|task| written(task.var, &self.stream))?;
        drop(held);
        self.has_measured = measured.as_ref().is_some_and(|measured| measured.reported);
        self.last_skips = told.is_some();
        self.unsettled.extend(told);
        Ok(())
    }

    /// Memory for what the device tells of a call.
    fn prepare_telling(&mut self) -> Result<(PinnedHostSlice<u8>, CudaEvent)> {
        if let Some(spare) = self.spare.pop() {
            return Ok(spare);
        }
        let context = self.stream.context();
        #[expect(unsafe_code, reason = "memory that is not set yet")]
        // SAFETY: bytes, which the copy of the control sets before they are read.
        let memory = unsafe { context.alloc_pinned_with_flags::<u8>(size_of::<Control>(), 0) };
        let event = context.new_event(None).map_err(candle_core::Error::wrap)?;
        Ok((memory.map_err(candle_core::Error::wrap)?, event))
    }

    /// Whether the first call of those that are not settled was skipped, if it is known, or to be waited for.
    fn settle(&mut self, wait: bool) -> Result<Option<bool>> {
        let Some((memory, copied)) = self.unsettled.front() else { return Ok(None) };
        if !wait && !copied.try_is_complete().map_err(candle_core::Error::wrap)? {
            return Ok(None);
        }
        copied.synchronize().map_err(candle_core::Error::wrap)?;
        let control: Control = bytemuck::pod_read_unaligned(memory.as_slice().map_err(candle_core::Error::wrap)?);
        self.spare.extend(self.unsettled.pop_front());
        self.heard = control.skipped;
        Ok(Some(control.skip != 0))
    }

    /// What the device knows behind the last call; waits for it.
    fn control(&self) -> Result<Control> {
        let bytes = self.stream.clone_dtoh(&self.control).map_err(candle_core::Error::wrap)?;
        Ok(bytemuck::pod_read_unaligned(&bytes[..size_of::<Control>()]))
    }

    /// One launch for all pairs of the same types.
    fn pass(&mut self, pass: &Pass, pairs: &[(Tensor, Tensor)]) -> Result<()> {
        self.check_no_capture()?;
        let mut kernels: Vec<(String, Vec<&(Tensor, Tensor)>)> = Vec::new();
        for pair in pairs.iter().filter(|(to, _)| to.elem_count() > 0) {
            let kernel = format!("{}_{}", pass.kernel, pair.1.dtype().as_str());
            match kernels.iter_mut().find(|(known, _)| *known == kernel) {
                Some((_, pairs)) => pairs.push(pair),
                None => kernels.push((kernel, vec![pair])),
            }
        }
        for (kernel, pairs) in &kernels {
            self.load(Module::Passes, kernel)?;
            self.plan_leaves(kernel, pairs.iter().map(|(to, _)| to.elem_count() as u64))?;
        }
        let mut room = Room::default();
        let places: Vec<_> = kernels.iter().map(|(_, pairs)| room.of::<Pair>(pairs.len())).collect();
        let mut filling = self.staging.prepare(&room)?;
        let mut addresses = Vec::with_capacity(kernels.len());
        for ((_, pairs), place) in kernels.iter().zip(&places) {
            let pairs = pairs.iter().map(|(to, other)| {
                let (to_address, other) = (address_to_write(to, &self.stream)?, address_to_write(other, &self.stream)?);
                Ok(Pair { to: to_address, other, len: to.elem_count() as u64 })
            });
            addresses.push(filling.put(*place, &pairs.collect::<Result<Vec<_>>>()?)?);
        }
        filling.copy()?;
        for ((kernel, pairs), address) in kernels.iter().zip(addresses) {
            let (chunks, blocks) = self.planned(kernel);
            let args = PairArgs {
                pairs: address,
                chunks,
                control: 0,
                factor: pass.factor,
                other_factor: pass.other_factor,
                chunk_units: LEAVES,
                overwrites: u32::from(pass.overwrites),
            };
            self.launch(kernel, blocks, args)?;
            for (to, other) in pairs {
                written(to, &self.stream)?;
                written(other, &self.stream)?;
            }
        }
        Ok(())
    }

    fn measure(&mut self, grad: &Tensor, norm: NormType) -> Result<f64> {
        self.check_no_capture()?;
        let lens = [(grad.dtype(), grad.elem_count() as u64)];
        let norms = self.prepare_norms(&lens)?;
        let mut room = Room::default();
        let place = room.of::<Gradient>(1);
        let mut filling = self.staging.prepare(&room)?;
        let held = if grad.elem_count() > 0 { Some(Held::new(grad)?) } else { None };
        let (values, _guard) = match &held {
            Some(held) => held.address(&self.stream).map(|(address, guard)| (address, Some(guard)))?,
            None => (0, None),
        };
        let gradients = filling.put(place, &[Gradient { values, count: 0, len: lens[0].1, first: 0 }])?;
        filling.copy()?;
        self.launch_norms(&lens, gradients, &norms, norm, 1.0)?;
        let scratch = self.scratch.as_ref().ok_or_else(|| candle_core::Error::msg("no memory for norms"))?;
        let start = (norms.norms - norms.leaves) as usize;
        let norm = scratch.slice(start..start + size_of::<f64>());
        let bytes = self.stream.clone_dtoh(&norm).map_err(candle_core::Error::wrap)?;
        Ok(bytemuck::pod_read_unaligned(&bytes))
    }

    /// Loads what measures gradients of these types and sizes, and makes room for it.
    fn prepare_norms(&mut self, lens: &[(DType, u64)]) -> Result<Norms> {
        self.load(Module::Summary, "summary_norms")?;
        self.load(Module::Summary, "summary_join")?;
        for (kernel, of_kernel) in of_leaves(lens) {
            self.load(Module::Summary, kernel)?;
            // All gradients have a place, so that their numbers are those of the norms; of other types, none of it.
            self.plan_leaves(kernel, of_kernel)?;
        }
        let leaves: u64 = lens.iter().map(|(_, len)| len.div_ceil(LEAF as u64)).sum();
        let n = lens.len() as u64;
        let (size, bytes) = (size_of::<f64>() as u64, (2 * leaves + 3 * n) * size_of::<f64>() as u64);
        if self.scratch.as_ref().is_none_or(|scratch| (scratch.len() as u64) < bytes) {
            self.scratch = Some(alloc(&self.stream, bytes.next_power_of_two() as usize)?);
        }
        let base = self.scratch.as_ref().map_or(0, |scratch| scratch.device_ptr(&self.stream).0);
        let [folded, norms, squares] = [leaves, 2 * leaves, 2 * leaves + n].map(|elements| base + elements * size);
        Ok(Norms { leaves: base, folded, norms, squares })
    }

    fn launch_norms(
        &self,
        lens: &[(DType, u64)],
        gradients: Address,
        norms: &Norms,
        norm: NormType,
        unscale: f64,
    ) -> Result<()> {
        let number = abi::norm(norm);
        for (kernel, _) in of_leaves(lens) {
            let (chunks, blocks) = self.planned(kernel);
            let args = LeavesArgs { gradients, chunks, leaves: norms.leaves, norm: number, chunk_units: LEAVES };
            self.launch(kernel, blocks, args)?;
        }
        let Norms { leaves, folded, norms, .. } = *norms;
        self.launch(
            "summary_norms",
            lens.len() as u32,
            NormsArgs { gradients, leaves, folded, norms, unscale, norm: number, padding: 0 },
        )
    }

    /// Makes room for the sums of the rows of each table, and loads what makes them.
    fn prepare_sums(&mut self, prepared: &[Prepared<'_>]) -> Result<Vec<Address>> {
        let (mut bytes, mut offsets) = (0, Vec::with_capacity(prepared.len()));
        for task in prepared {
            offsets.push(bytes);
            if let Grad::Sums(_) = &task.grad {
                let dtype = arithmetic(task.var.dtype());
                self.load(Module::Rows, sum_kernel(dtype))?;
                let size = task.grad.elements() * dtype.size_in_bytes() as u64;
                bytes += size.next_multiple_of(16);
            }
        }
        if bytes > 0 && self.sums.as_ref().is_none_or(|sums| (sums.len() as u64) < bytes) {
            self.sums = Some(alloc(&self.stream, bytes.next_power_of_two() as usize)?);
        }
        let base = self.sums.as_ref().map_or(0, |sums| sums.device_ptr(&self.stream).0);
        Ok(offsets.into_iter().map(|offset| base + offset).collect())
    }

    /// Makes sure that a kernel is there.
    fn load(&mut self, module: Module, kernel: &str) -> Result<()> {
        if !self.functions.contains_key(kernel) {
            let function = load(&self.device, module, kernel)?;
            self.functions.insert(kernel.to_owned(), function);
        }
        Ok(())
    }

    /// Makes sure that the chunks of a kernel are on the device.
    fn plan(&mut self, kernel: &str, units: Vec<(u64, u32)>) -> Result<()> {
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

    fn plan_leaves(&mut self, kernel: &str, lens: impl IntoIterator<Item = u64>) -> Result<()> {
        let units = lens.into_iter().map(|len| (len.div_ceil(LEAF as u64), LEAVES)).collect();
        self.plan(kernel, units)
    }

    /// The chunks of a kernel, and how many there are.
    fn planned(&self, kernel: &str) -> (Address, u32) {
        let of = |planned: &Planned| (planned.memory.device_ptr(&self.stream).0, planned.blocks);
        self.chunks.get(kernel).map_or((0, 0), of)
    }

    /// Launches a kernel that was loaded.
    fn launch<A: DeviceRepr>(&self, kernel: &str, blocks: u32, args: A) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let Some(function) = self.functions.get(kernel) else {
            return Err(candle_core::Error::msg(format!("the kernel {kernel} is not loaded")).into());
        };
        launch(&self.stream, function, blocks, args)
    }

    /// A step cannot be part of a CUDA graph: its coefficients change with every update, and a graph repeats them.
    fn check_no_capture(&self) -> Result<()> {
        use cudarc::driver::sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        match self.stream.capture_status() {
            Ok(CU_STREAM_CAPTURE_STATUS_NONE) => Ok(()),
            Ok(_) => {
                let expected = "none in progress: a graph would repeat the numbers of one update";
                Err(Error::invalid("CUDA graph capture", expected, "a step during one"))
            }
            Err(error) => Err(candle_core::Error::wrap(error).into()),
        }
    }
}

/// The kernels that measure gradients of these types, each with the lengths that are its own: 0 for those of other types.
fn of_leaves(lens: &[(DType, u64)]) -> Vec<(&'static str, Vec<u64>)> {
    let kernels = [
        (DType::F64, "summary_leaves_f64"),
        (DType::F32, "summary_leaves_f32"),
        (DType::F16, "summary_leaves_f16"),
        (DType::BF16, "summary_leaves_bf16"),
    ];
    let own = |dtype: DType| lens.iter().map(|&(of, len)| if of == dtype { len } else { 0 }).collect();
    let is_used = |dtype: DType| lens.iter().any(|&(of, _)| of == dtype);
    kernels.into_iter().filter(|&(dtype, _)| is_used(dtype)).map(|(dtype, kernel)| (kernel, own(dtype))).collect()
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
arguments!(UpdateArgs, LeavesArgs, NormsArgs, JoinArgs, PairArgs, SumArgs, GatherArgs);

/// What sums rows of a table of `dtype`.
fn sum_kernel(dtype: DType) -> &'static str {
    if dtype == DType::F64 { "rows_sum_f64" } else { "rows_sum_f32" }
}

/// The rows `ids` of a table on a GPU, one after another; each id is the number of a row.
pub(crate) fn gather(table: &Tensor, row_len: usize, ids: &[u32]) -> candle_core::Result<CudaStorage> {
    let Device::Cuda(device) = table.device() else { candle_core::bail!("expected a table on a GPU") };
    let stream = device.cuda_stream();
    let shape = Shape::from(ids.len() * row_len);
    if ids.is_empty() || row_len == 0 {
        return device.zeros_impl(&shape, table.dtype());
    }
    let held = Held::new(table)?;
    let (table_at, _guard) = held.address(&stream)?;
    let ids_at = stream.clone_htod(ids).map_err(candle_core::Error::wrap)?;
    #[expect(unsafe_code, reason = "memory that is not set yet")]
    // SAFETY: the kernel below writes all of it, in the order of the stream.
    let mut gathered = unsafe { device.alloc_uninit(&shape, table.dtype())? };
    let out = storage_address_to_write(&mut gathered, &stream)?;
    // The widest word that a row is a multiple of, and that it begins at.
    let bytes = row_len * table.dtype().size_in_bytes();
    let fits = |word: usize| bytes.is_multiple_of(word) && (table_at | out).is_multiple_of(word as u64);
    let (kernel, word) = [("rows_gather_16", 16), ("rows_gather_8", 8), ("rows_gather_4", 4)]
        .into_iter()
        .find(|&(_, word)| fits(word))
        .unwrap_or(("rows_gather_2", 2));
    let function = load(device, Module::Rows, kernel)?;
    let args = GatherArgs {
        ids: ids_at.device_ptr(&stream).0,
        table: table_at,
        out,
        n: ids.len() as u64,
        row_len: (bytes / word) as u64,
    };
    launch(&stream, &function, blocks_of_rows(args.n, args.row_len), args)?;
    Ok(gathered)
}

/// Launches a kernel.
fn launch<A: DeviceRepr>(stream: &CudaStream, function: &CudaFunction, blocks: u32, args: A) -> Result<()> {
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
