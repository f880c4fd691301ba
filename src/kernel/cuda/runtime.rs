//! One GPU of one optimizer: what is prepared, copied and launched in a call, all on candle's stream of that device.
//!
//! Invariant: everything that can fail for want of memory or of a compiler comes before the first launch; nothing here
//! waits for the device but what says so.

use std::collections::HashMap;

use candle_core::{CudaDevice, DType, Device, Tensor, TensorId};
use cudarc::driver::{CudaEvent, CudaSlice, DevicePtr, PinnedHostSlice};

use super::abi::{self, Address, Control, Gradient, JoinArgs, Pair, PairArgs, UpdateLaunchArgs};
use super::launcher::Launcher;
use super::norms::{Norms, Scratch};
use super::plan::{LEAVES, units_of_chunk};
use super::sort::{Sorter, Sorts};
use super::source::Module;
use super::staging::{ArenaLayout, Offset, Staging};
use super::work::{Grad, Kernel, Prepared, RowPlaces, RowsAt, Work, tensor_of};
use crate::error::Result;
use crate::kernel::lend::gpu::{Held, address_to_write, written};
use crate::kernel::{self, Accumulate, Average, Measure, RowTask, Source, Task};
use crate::reduce::{LEAF, Norm, NormType};
use crate::rounding::Rounding;
use crate::state::Buffer;

/// The GPUs of one optimizer.
#[derive(Default)]
pub(crate) struct Runtimes(Vec<Runtime>);

struct Runtime {
    launcher: Launcher,
    staging: Staging,
    control: CudaSlice<u8>,
    scratch: Scratch,
    sorter: Sorter,
    /// Where moments and masters are: nobody else has these tensors, so they stay there.
    addresses: HashMap<TensorId, Address>,
    /// Whether the last update has measured the norm, and was asked to.
    has_measured: bool,
    /// Whether the last update may have been skipped.
    last_skips: bool,
    /// Copy of the control of the last update that may have been skipped, and the event behind the copy.
    decision: Option<(PinnedHostSlice<u8>, CudaEvent)>,
}

impl Runtimes {
    /// The runtime of a device; made when it is first needed.
    fn of(&mut self, device: &Device) -> Result<&mut Runtime> {
        let Device::Cuda(device) = device else {
            return Err(candle_core::Error::msg("expected a variable on a GPU").into());
        };
        let known = self.0.iter().position(|runtime| runtime.launcher.device.id() == device.id());
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
    fn by_device<T>(tasks: Vec<T>, device: impl Fn(&T) -> Option<&Device>) -> Vec<(Device, Vec<T>)> {
        let mut all: Vec<(Device, Vec<T>)> = Vec::new();
        for task in tasks {
            let Some(device) = device(&task) else { continue };
            match all.iter().position(|(known, _)| known.same_device(device)) {
                Some(index) => all[index].1.push(task),
                None => all.push((device.clone(), vec![task])),
            }
        }
        all
    }

    pub(crate) fn update(
        &mut self,
        tasks: Vec<Task<'_, kernel::Update<'_>>>,
        rows: Vec<RowTask<'_>>,
        measure: Option<&Measure>,
    ) -> Result<()> {
        // What is asked of the last update is asked of the GPU that made it.
        for runtime in &mut self.0 {
            (runtime.has_measured, runtime.last_skips) = (false, false);
        }
        let tasks = tasks.into_iter().map(Work::Dense).chain(rows.into_iter().map(Work::Rows)).collect();
        let mut by_device = Self::by_device(tasks, |work| Some(work.var()?.device()));
        for (_, work) in &mut by_device {
            // The order in which norms are joined, which is that of the arguments.
            work.sort_by_key(Work::nth);
        }
        // A GPU that has no memory left is to be heard of before another one has changed anything.
        if by_device.len() > 1 {
            for (device, work) in &by_device {
                self.of(device)?.prepare(work, measure)?;
            }
        }
        by_device.iter().try_for_each(|(device, work)| self.of(device)?.update(work, measure))
    }

    pub(crate) fn accumulate(&mut self, tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
        fn device<'t>(task: &'t Task<'_, Accumulate<'_>>) -> Option<&'t Device> {
            match task.read {
                Some(Source::Tensor(grad)) => Some(grad.device()),
                _ => None,
            }
        }
        for (device, tasks) in Self::by_device(tasks, device) {
            let pass = Pass { kernel: "accumulate", factor: 0.0, other_factor: 0.0, overwrites: 0 };
            let mut pairs = Vec::new();
            let mut factor = 1.0;
            for task in tasks {
                let (Some(Source::Tensor(grad)), Buffer::Tensor(sum)) = (task.read, &*task.kind.sum) else { continue };
                factor = task.kind.unscale;
                pairs.push(PairOf { to: sum.clone(), other: grad.clone(), master: None, key: 0 });
            }
            self.of(&device)?.pass(&Pass { factor, ..pass }, &pairs)?;
        }
        Ok(())
    }

    pub(crate) fn average(&mut self, tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
        fn device<'t>(task: &'t Task<'_, Average<'_>>) -> Option<&'t Device> {
            task.lent.map(Tensor::device)
        }
        for (device, tasks) in Self::by_device(tasks, device) {
            // Variables that came later begin with a copy, so not all have the same momentum.
            let mut passes: Vec<(Pass, Vec<PairOf>)> = Vec::new();
            for task in tasks {
                let Average { momentum, overwrite, average, master, rounding, key } = task.kind;
                let (Some(var), Buffer::Tensor(average)) = (task.lent, average) else { continue };
                let master = master.map(|master| master.on_gpu().cloned()).transpose()?;
                let pair = PairOf { to: average.clone(), other: var.clone(), master, key };
                let overwrites = match (overwrite, rounding) {
                    (false, _) => 0,
                    (true, Rounding::Stochastic) => 2,
                    (true, Rounding::Nearest | Rounding::Master) => 1,
                };
                let pass = Pass { kernel: "average", factor: momentum, other_factor: 1.0 - momentum, overwrites };
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
    pub(crate) fn measure(&mut self, grad: Source<'_>, norm: NormType) -> Result<Norm> {
        let grad = tensor_of(grad)?;
        self.of(grad.device())?.measure(grad, norm)
    }

    /// The norm of all gradients of the last update; waits for it.
    pub(crate) fn total_norm(&self) -> Result<Option<f64>> {
        match self.0.iter().find(|runtime| runtime.has_measured) {
            Some(runtime) => Ok(Some(Norm::of(runtime.control()?.total_norm).to_f64())),
            None => Ok(None),
        }
    }

    /// Whether the last update was skipped, if it could be; waits for the GPU to decide.
    pub(crate) fn was_skipped(&self) -> Result<bool> {
        self.0.iter().find(|runtime| runtime.last_skips).map_or(Ok(false), Runtime::was_skipped)
    }
}

/// An update, of which everything is there but the addresses of tensors.
struct Update<'w> {
    tasks: Vec<Prepared<'w>>,
    /// In the order of the tasks.
    update_args: Vec<abi::UpdateArgs>,
    /// Each with the tasks that are its own.
    kernels: Vec<(Kernel, String, Vec<usize>)>,
    sorts: Sorts,
    /// How many elements gradients have, or can have.
    lens: Vec<(DType, u64)>,
    norms: Option<Norms>,
    arena: ArenaLayout,
    places: Places,
}

/// Where what the kernels are told will be.
struct Places {
    update_args: Offset,
    tensors: Vec<Offset>,
    gradients: Offset,
    rows: Vec<Option<RowPlaces>>,
    sorts: Offset,
}

/// What is done to pairs of tensors.
#[derive(PartialEq)]
struct Pass {
    kernel: &'static str,
    factor: f64,
    other_factor: f64,
    overwrites: u32,
}

/// The tensors of one pair.
struct PairOf {
    to: Tensor,
    other: Tensor,
    master: Option<Tensor>,
    key: u64,
}

impl Runtime {
    fn new(device: &CudaDevice) -> Result<Self> {
        let launcher = Launcher::new(device)?;
        let stream = launcher.stream.clone();
        let control = stream.alloc_zeros::<u8>(size_of::<Control>()).map_err(candle_core::Error::wrap)?;
        Ok(Self {
            launcher,
            staging: Staging::new(stream),
            control,
            scratch: Scratch::default(),
            sorter: Sorter::default(),
            addresses: HashMap::new(),
            has_measured: false,
            last_skips: false,
            decision: None,
        })
    }

    /// Everything of an update that can fail: kernels are loaded, and all memory is there.
    fn prepare<'w>(&mut self, work: &'w [Work<'_>], measure: Option<&Measure>) -> Result<Update<'w>> {
        self.launcher.begin()?;
        let tasks = work.iter().map(Prepared::new).collect::<Result<Vec<_>>>()?;
        // Those of states that have been replaced, by another encoding for instance, are of no more use.
        if self.addresses.len() > 8 * (tasks.len() + 64) {
            self.addresses.clear();
        }
        let update_args: Vec<abi::UpdateArgs> = work.iter().map(Work::update_args).collect();
        let mut kernels: Vec<(Kernel, String, Vec<usize>)> = Vec::new();
        for (index, task) in tasks.iter().enumerate().filter(|(_, task)| task.units() > 0) {
            match kernels.iter_mut().find(|(kernel, ..)| *kernel == task.kernel) {
                Some((_, _, tasks)) => tasks.push(index),
                None => kernels.push((task.kernel, task.kernel.name(), vec![index])),
            }
        }
        for (of, kernel, of_kernel) in &kernels {
            self.launcher.load(of.module()?, kernel)?;
            let units = of_kernel.iter().map(|&i| (tasks[i].units(), units_of_chunk(tasks[i].unit))).collect();
            self.launcher.plan(kernel, units)?;
        }
        let sorts = self.sorter.prepare(&mut self.launcher, &tasks)?;
        let lens: Vec<(DType, u64)> =
            tasks.iter().map(|task| (task.grad.dtype(task.var), task.grad.elements())).collect();
        let norms = measure.map(|_| self.scratch.prepare(&mut self.launcher, &lens)).transpose()?;

        let mut arena = ArenaLayout::default();
        let places = Places {
            update_args: arena.of::<abi::UpdateArgs>(update_args.len()),
            tensors: kernels.iter().map(|(_, _, tasks)| arena.of::<abi::Tensor>(tasks.len())).collect(),
            gradients: arena.of::<Gradient>(tasks.len()),
            rows: tasks.iter().map(|task| RowPlaces::of(&task.grad, &mut arena)).collect(),
            sorts: arena.of::<abi::Sorting>(sorts.tables.len()),
        };
        self.staging.prepare(&arena)?;
        if let (None, Some(Measure { skips: true, .. })) = (&self.decision, measure) {
            self.decision = Some(self.memory_for_decision()?);
        }
        Ok(Update { tasks, update_args, kernels, sorts, lens, norms, arena, places })
    }

    fn update(&mut self, work: &[Work<'_>], measure: Option<&Measure>) -> Result<()> {
        let Update { tasks, update_args, kernels, mut sorts, lens, norms, arena, places } =
            self.prepare(work, measure)?;
        let mut writer = self.staging.fill(&arena)?;

        // From here on the gradients are locked against writing, until everything is launched.
        let held = tasks
            .iter()
            .map(|task| task.grad.tensors().into_iter().map(Held::new).collect())
            .collect::<candle_core::Result<Vec<Vec<Held<'_>>>>>()?;
        let (mut guards, mut tensors) = (Vec::new(), Vec::with_capacity(tasks.len()));
        for (index, ((task, held), places)) in tasks.iter().zip(&held).zip(&places.rows).enumerate() {
            let mut addresses = Vec::with_capacity(held.len());
            for held in held {
                let (address, guard) = held.address(&self.launcher.stream)?;
                guards.push(guard);
                addresses.push(address);
            }
            let rows = match places {
                Some(places) => places.fill(&task.grad, (&addresses, sorts.of(index)), &mut writer)?,
                None => RowsAt { grad: addresses.first().copied().unwrap_or(0), ..RowsAt::default() },
            };
            let mut own = |tensor: &Tensor| -> Result<Address> {
                if let Some(address) = self.addresses.get(&tensor.id()) {
                    return Ok(*address);
                }
                let address = address_to_write(tensor, &self.launcher.stream)?;
                self.addresses.insert(tensor.id(), address);
                Ok(address)
            };
            tensors.push(abi::Tensor {
                param: address_to_write(task.var, &self.launcher.stream)?,
                grad: rows.grad,
                exp_avg: own(&task.moments.exp_avg)?,
                exp_inf: own(&task.moments.exp_inf)?,
                scales: task.moments.scales.as_ref().map_or(Ok(0), &mut own)?,
                master: task.master.map_or(Ok(0), &mut own)?,
                rows: rows.rows,
                count: rows.count,
                len: task.var.elem_count() as u64,
                unit: task.unit,
                update_args: index as u32,
                chunk: units_of_chunk(task.unit),
            });
        }
        let update_args_at = writer.put(places.update_args, &update_args)?;
        for ((_, _, of_kernel), place) in kernels.iter().zip(&places.tensors) {
            writer.put(*place, &of_kernel.iter().map(|&i| tensors[i]).collect::<Vec<_>>())?;
        }
        let mut first = 0;
        let gradients = tasks.iter().zip(&lens).zip(&tensors).map(|((task, (dtype, most)), tensor)| {
            let (count, len) = match &task.grad {
                // Without a single id nothing is sorted, and there is no count.
                Grad::Parts(parts) if tensor.count != 0 => (tensor.count, parts.row_len),
                Grad::Parts(_) | Grad::Dense(_) | Grad::Rows(_) => (0, *most),
            };
            let gradient = Gradient { values: tensor.grad, count, len, first, is_f64: u64::from(*dtype == DType::F64) };
            first += most.div_ceil(LEAF as u64);
            gradient
        });
        let gradients: Vec<Gradient> = gradients.collect();
        let sorts_at = writer.put(places.sorts, &sorts.tables)?;
        let gradients_at = writer.put(places.gradients, &gradients)?;
        let tensors_at: Vec<Address> = places.tensors.iter().map(|place| writer.address(*place)).collect();
        writer.copy()?;

        sorts.launch(&self.launcher, sorts_at)?;
        let skips = measure.is_some_and(|measure| measure.skips);
        if let (Some(measure), Some(norms)) = (measure, &norms) {
            norms.launch(&self.launcher, &lens, gradients_at, measure.norm, measure.unscale)?;
            let (clip, limit) = abi::clip(measure.clip);
            let args = JoinArgs {
                norms: norms.norms,
                squares: norms.squares,
                update_args: update_args_at,
                control: self.control.device_ptr(&self.launcher.stream).0,
                limit,
                n: work.len() as u32,
                norm: abi::norm(measure.norm),
                clip,
                skips: u32::from(skips),
            };
            self.launcher.launch("summary_join", 1, args)?;
            if let (true, Some((memory, copied))) = (skips, &mut self.decision) {
                self.launcher.stream.memcpy_dtoh(&self.control, memory).map_err(candle_core::Error::wrap)?;
                copied.record(&self.launcher.stream).map_err(candle_core::Error::wrap)?;
            }
        }
        let control = if skips { self.control.device_ptr(&self.launcher.stream).0 } else { 0 };
        for ((_, kernel, _), tensors) in kernels.iter().zip(tensors_at) {
            let (chunks, blocks) = self.launcher.planned(kernel);
            self.launcher.launch(
                kernel,
                blocks,
                UpdateLaunchArgs { tensors, update_args: update_args_at, chunks, control },
            )?;
        }
        drop(guards);
        self.launcher.end()?;
        tasks.iter().try_for_each(|task| written(task.var, &self.launcher.stream))?;
        drop(held);
        self.has_measured = measure.is_some_and(|measure| measure.is_reported);
        self.last_skips = skips;
        Ok(())
    }

    /// Memory for the copy of the control.
    fn memory_for_decision(&self) -> Result<(PinnedHostSlice<u8>, CudaEvent)> {
        let context = self.launcher.stream.context();
        #[expect(unsafe_code, reason = "memory that is not set yet")]
        // SAFETY: bytes, which the copy of the control sets before they are read.
        let memory = unsafe { context.alloc_pinned_with_flags::<u8>(size_of::<Control>(), 0) };
        let event = context.new_event(None).map_err(candle_core::Error::wrap)?;
        Ok((memory.map_err(candle_core::Error::wrap)?, event))
    }

    /// Whether the last update was skipped; waits for the copy of the control, which comes before the update itself.
    fn was_skipped(&self) -> Result<bool> {
        let Some((memory, copied)) = &self.decision else { return Ok(false) };
        copied.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        copied.synchronize().map_err(candle_core::Error::wrap)?;
        let control: Control = bytemuck::pod_read_unaligned(memory.as_slice().map_err(candle_core::Error::wrap)?);
        Ok(control.skip != 0)
    }

    /// What the device knows behind the last call; waits for it.
    fn control(&self) -> Result<Control> {
        self.launcher.begin()?;
        let bytes = self.launcher.stream.clone_dtoh(&self.control).map_err(candle_core::Error::wrap)?;
        Ok(bytemuck::pod_read_unaligned(&bytes[..size_of::<Control>()]))
    }

    /// One launch for all pairs of the same types.
    fn pass(&mut self, pass: &Pass, pairs: &[PairOf]) -> Result<()> {
        self.launcher.begin()?;
        let mut kernels: Vec<(String, Vec<&PairOf>)> = Vec::new();
        for pair in pairs.iter().filter(|pair| pair.to.elem_count() > 0) {
            let kernel = format!("{}_{}", pass.kernel, pair.other.dtype().as_str());
            match kernels.iter_mut().find(|(known, _)| *known == kernel) {
                Some((_, pairs)) => pairs.push(pair),
                None => kernels.push((kernel, vec![pair])),
            }
        }
        for (kernel, pairs) in &kernels {
            self.launcher.load(Module::Passes, kernel)?;
            self.launcher.plan_leaves(kernel, pairs.iter().map(|pair| pair.to.elem_count() as u64))?;
        }
        let mut arena = ArenaLayout::default();
        let places: Vec<_> = kernels.iter().map(|(_, pairs)| arena.of::<Pair>(pairs.len())).collect();
        let mut writer = self.staging.fill(&arena)?;
        let mut addresses = Vec::with_capacity(kernels.len());
        for ((_, pairs), place) in kernels.iter().zip(&places) {
            let address = |tensor: &Tensor| address_to_write(tensor, &self.launcher.stream);
            let pairs = pairs.iter().map(|PairOf { to, other, master, key }| {
                let master = master.as_ref().map_or(Ok(0), &address)?;
                Ok(Pair { to: address(to)?, other: address(other)?, master, key: *key, len: to.elem_count() as u64 })
            });
            addresses.push(writer.put(*place, &pairs.collect::<Result<Vec<_>>>()?)?);
        }
        writer.copy()?;
        for ((kernel, pairs), address) in kernels.iter().zip(addresses) {
            let (chunks, blocks) = self.launcher.planned(kernel);
            let args = PairArgs {
                pairs: address,
                chunks,
                control: 0,
                factor: pass.factor,
                other_factor: pass.other_factor,
                chunk_units: LEAVES,
                overwrites: pass.overwrites,
            };
            self.launcher.launch(kernel, blocks, args)?;
            for PairOf { to, other, master, .. } in pairs {
                for tensor in [Some(to), Some(other), master.as_ref()].into_iter().flatten() {
                    written(tensor, &self.launcher.stream)?;
                }
            }
        }
        self.launcher.end()
    }

    fn measure(&mut self, grad: &Tensor, norm: NormType) -> Result<Norm> {
        self.launcher.begin()?;
        let lens = [(grad.dtype(), grad.elem_count() as u64)];
        let norms = self.scratch.prepare(&mut self.launcher, &lens)?;
        let mut arena = ArenaLayout::default();
        let place = arena.of::<Gradient>(1);
        let mut writer = self.staging.fill(&arena)?;
        let held = if grad.elem_count() > 0 { Some(Held::new(grad)?) } else { None };
        let (values, _guard) = match &held {
            Some(held) => held.address(&self.launcher.stream).map(|(address, guard)| (address, Some(guard)))?,
            None => (0, None),
        };
        let gradients = writer.put(
            place,
            &[Gradient { values, count: 0, len: lens[0].1, first: 0, is_f64: u64::from(lens[0].0 == DType::F64) }],
        )?;
        writer.copy()?;
        norms.launch(&self.launcher, &lens, gradients, norm, 1.0)?;
        self.launcher.end()?;
        let scratch = self.scratch.0.as_ref().ok_or_else(|| candle_core::Error::msg("no memory for norms"))?;
        let start = norms.offset();
        let norm = scratch.slice(start..start + size_of::<f64>());
        let bytes = self.launcher.stream.clone_dtoh(&norm).map_err(candle_core::Error::wrap)?;
        Ok(Norm::of(bytemuck::pod_read_unaligned(&bytes)))
    }
}
