//! Which kernel runs, from device and dtype; nothing else.

mod cpu;
mod cuda;
pub(crate) mod lend;
mod lookup;
mod lookup_ids;
mod plan;
mod portable;
mod rows;

use candle_core::{DType, Tensor};

use crate::clip::Clip;
use crate::error::Result;
use crate::mark::Mark;
use crate::reduce::{Norm, NormType};
use crate::state::Place;

pub(crate) use cpu::{Accumulate, Average, CatchUpTask, RowTask, Task, Update, UpdateArgs, Written};
#[cfg(feature = "cuda")]
pub(crate) use cuda::GpuRows;
pub(crate) use cuda::{GpuIds, GpuMarks, Unchecked};
pub(crate) use lend::Source;
pub(crate) use lookup::{
    Limit, advise_huge_pages, checksums, copy, dot_rows, gather, largest, largest_backward, limit, pool, scale_down,
};
pub(crate) use lookup_ids::{HostIds, LookupGrad, LookupIds, total};
pub(crate) use rows::{RowGrad, RowValues, SummedRows, Touched};

/// Which implementation of the update an optimizer uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// The fastest one for each variable: one pass over memory on the CPU; with the feature `cuda` one launch for all
    /// variables of the same types on an NVIDIA GPU of compute capability 7.5 or more; [`Self::Portable`] elsewhere.
    #[default]
    Auto,
    /// candle's tensor operations, some ten of them a variable: slower, for any device, and an independent
    /// implementation of the formula to compare with.
    Portable,
}

impl Kernel {
    /// Where the state of `var` lives under this choice.
    pub(crate) fn place(self, var: &Tensor) -> Place {
        match self {
            Self::Auto if var.device().is_cpu() => Place::Host,
            Self::Auto if has_cuda_kernels(var) => Place::Cuda,
            _ => Place::Device,
        }
    }
}

/// Whether lookups in this table have gradients of rows.
pub(crate) fn has_lookups(table: &Tensor) -> bool {
    table.device().is_cpu() || has_cuda_kernels(table)
}

/// Whether the CUDA kernels run on the device of `var`.
fn has_cuda_kernels(var: &Tensor) -> bool {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = var.device() {
        return cuda::has_kernels(device);
    }
    let _ = var;
    false
}

/// Whether `dtype` is one that parameters may have.
pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// Memory of kernels from one call of an optimizer to the next.
#[derive(Default)]
pub(crate) struct Backends {
    cuda: cuda::Runtimes,
}

/// A measurement of norms that an update makes by itself, on the GPU, to clip and skip by.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by the CUDA kernels"))]
pub(crate) struct Measure {
    pub(crate) norm: NormType,
    /// Whether the norm was asked for, and not only the check that all is finite.
    pub(crate) is_reported: bool,
    pub(crate) clip: Option<Clip>,
    /// Factor that makes norms those of the true gradients.
    pub(crate) unscale: f64,
    /// Whether a call that is not finite is skipped.
    pub(crate) skips: bool,
}

impl Backends {
    /// Updates variables and moments in place: whole ones, and the touched rows of tables. `measure` is for gradients
    /// that are [all on one GPU](all_on_one_gpu), in the order of their tasks' numbers.
    pub(crate) fn update(
        &mut self,
        tasks: Vec<Task<'_, Update<'_>>>,
        rows: Vec<RowTask<'_>>,
        measure: Option<&Measure>,
    ) -> Result<()> {
        let [host, device, gpu] = split(tasks, |task| task.place);
        let [host_rows, device_rows, gpu_rows] = split(rows, |task| task.state.place());
        // What can fail for want of memory goes first, so that a failure finds nothing changed: tensor operations, whose
        // results are not written yet, and what comes before launches. A pass over slices cannot fail.
        let by_operations = portable::update(device, device_rows)?;
        self.cuda.update(gpu, gpu_rows, measure)?;
        by_operations.write()?;
        cpu::run(host)?;
        cpu::update_rows(host_rows)?;
        Ok(())
    }

    /// Adds gradients to the accumulated ones.
    pub(crate) fn accumulate(&mut self, tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
        let [host, device, gpu] = split(tasks, |task| task.place);
        self.cuda.accumulate(gpu)?;
        portable::accumulate(device)?;
        cpu::run(host)?;
        Ok(())
    }

    /// Moves averages towards their variables.
    pub(crate) fn average(&mut self, tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
        let [host, device, gpu] = split(tasks, |task| task.place);
        self.cuda.average(gpu)?;
        portable::average(device)?;
        cpu::run(host)?;
        Ok(())
    }

    /// The norm of each gradient, in their order; the second of each pair is where the state of its variable lives.
    /// Waits for the devices that gradients are on.
    pub(crate) fn measure(&mut self, grads: &[(Source<'_>, Place)], norm: NormType) -> Result<Vec<Norm>> {
        let on_host = grads.iter().filter(|(_, place)| *place == Place::Host).map(|(source, _)| *source);
        let mut measured = cpu::measure(&on_host.collect::<Vec<_>>(), norm)?.into_iter();
        let of_each = grads.iter().map(|(source, place)| match place {
            Place::Host => Ok(measured.next().unwrap_or_default()),
            Place::Device => Ok(portable::measure(*source, norm)?),
            Place::Cuda => self.cuda.measure(*source, norm),
        });
        of_each.collect()
    }

    /// Whether the GPU has skipped the last update, which could be; waits for it.
    pub(crate) fn was_skipped(&self) -> Result<bool> {
        self.cuda.was_skipped()
    }

    /// The norm of all gradients of the last update, where it was measured on a GPU; waits for it.
    pub(crate) fn total_norm(&self) -> Result<Option<f64>> {
        self.cuda.total_norm()
    }
}

/// Lookups in tables on a GPU.
#[cfg(feature = "cuda")]
pub(crate) mod gpu {
    pub(crate) use super::cuda::{dot_rows, gather, largest, largest_backward, pool};
    pub(crate) use super::lend::gpu::copied as copy;
}

/// Whether all gradients are measured and used on one GPU, so that the host need not know their norms.
pub(crate) fn all_on_one_gpu<'v>(mut grads: impl Iterator<Item = (&'v Tensor, Place)>) -> bool {
    let Some((first, Place::Cuda)) = grads.next() else { return false };
    grads.all(|(var, place)| place == Place::Cuda && var.device().same_device(first.device()))
}

/// Brings rows of a table in host memory up to date: ascending, each with its mark, which becomes the new one. Returns the first row
/// that was written by others, if that is refused; nothing has changed then.
pub(crate) fn catch_up(task: CatchUpTask<'_>, rows: &mut [(u32, Mark)], written: Written) -> Result<Option<u32>> {
    Ok(cpu::catch_up_rows(task, rows, written)?)
}

/// Those of the host, of tensor operations and of the CUDA kernels.
fn split<T>(tasks: Vec<T>, place: impl Fn(&T) -> Place) -> [Vec<T>; 3] {
    // Nearly always all are in one place, and there is nothing to move.
    if tasks.iter().all(|task| place(task) == Place::Host) {
        return [tasks, Vec::new(), Vec::new()];
    }
    let (host, others) = tasks.into_iter().partition(|task| place(task) == Place::Host);
    let others: Vec<T> = others;
    let (device, gpu) = others.into_iter().partition(|task| place(task) == Place::Device);
    [host, device, gpu]
}
