//! Gradients of rows, sorted and summed on the device: memory and launches.

use candle_core::DType;
use cudarc::driver::{CudaSlice, DevicePtr};

use super::abi::{Address, SortArgs, Sorting};
use super::launcher::Launcher;
use super::plan::{sorting, sums_of_chunk};
use super::source::Module;
use super::staging::alloc;
use super::work::{Grad, Prepared};
use crate::error::Result;
use crate::state::arithmetic;

/// Memory for sorts and sums, kept from call to call.
#[derive(Default)]
pub(super) struct Sorter(Option<CudaSlice<u8>>);

/// The tables of one call whose gradients are sorted and summed.
#[derive(Default)]
pub(super) struct Sorts {
    /// Which of the prepared tasks each one is.
    tasks: Vec<usize>,
    pub(super) tables: Vec<Sorting>,
    passes: u32,
}

/// The chunks of all kernels but those that sum: blocks.
const BLOCKS: &str = "sort_keys";
const SUMS: [(DType, &str); 2] = [(DType::F32, "sort_sum_f32"), (DType::F64, "sort_sum_f64")];

impl Sorter {
    /// Loads what sorts and sums these gradients, and makes room for it.
    pub(super) fn prepare(&mut self, launcher: &mut Launcher, prepared: &[Prepared<'_>]) -> Result<Sorts> {
        let mut sorts = Sorts::default();
        let (mut sizes, mut sums, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (index, task) in prepared.iter().enumerate().filter(|(_, task)| task.units() > 0) {
            let Grad::Parts(parts) = &task.grad else { continue };
            let (dtype, all) = (arithmetic(task.var.dtype()), task.var.dims().first().copied().unwrap_or(1));
            let size = (parts.n, all as u32, (parts.row_len, dtype.size_in_bytes() as u64));
            sums.push((dtype, task.units(), sums_of_chunk(parts.row_len)));
            bytes += sorting(0, size).1;
            sizes.push(size);
            sorts.tasks.push(index);
        }
        if sizes.is_empty() {
            return Ok(sorts);
        }
        for kernel in [BLOCKS, "sort_count", "sort_scan", "sort_scatter", "sort_heads", "sort_list"] {
            launcher.load(Module::Sort, kernel)?;
        }
        for (dtype, kernel) in SUMS {
            launcher.load(Module::Sort, kernel)?;
            // All tables have a place, so that their numbers are those of the sorts; of another type, none of it.
            let own = |&(of, rows, chunk): &(DType, u64, u32)| (if of == dtype { rows } else { 0 }, chunk);
            launcher.plan(kernel, sums.iter().map(own).collect())?;
        }
        if self.0.as_ref().is_none_or(|memory| (memory.len() as u64) < bytes) {
            // What is too small goes first, so that both are never there at once.
            self.0 = None;
            self.0 = Some(alloc(&launcher.stream, bytes.next_power_of_two() as usize)?);
        }
        let mut base = self.0.as_ref().map_or(0, |memory| memory.device_ptr(&launcher.stream).0);
        for size in sizes {
            let (table, bytes) = sorting(base, size);
            base += bytes;
            sorts.passes = sorts.passes.max(table.passes);
            sorts.tables.push(table);
        }
        launcher.plan(BLOCKS, sorts.tables.iter().map(|table| (u64::from(table.blocks), 1)).collect())?;
        Ok(sorts)
    }
}

impl Sorts {
    /// The sort of a task.
    pub(super) fn of(&mut self, task: usize) -> Option<&mut Sorting> {
        let index = self.tasks.iter().position(|&index| index == task)?;
        self.tables.get_mut(index)
    }

    /// Sorts and sums.
    pub(super) fn launch(&self, launcher: &Launcher, tables: Address) -> Result<()> {
        if self.tables.is_empty() {
            return Ok(());
        }
        let (chunks, blocks) = launcher.planned(BLOCKS);
        let args = |pass: u32| SortArgs { tables, chunks, pass, padding: 0 };
        launcher.launch(BLOCKS, blocks, args(0))?;
        for pass in 0..self.passes {
            launcher.launch("sort_count", blocks, args(pass))?;
            launcher.launch("sort_scan", self.tables.len() as u32, args(pass))?;
            launcher.launch("sort_scatter", blocks, args(pass))?;
        }
        launcher.launch("sort_heads", blocks, args(0))?;
        launcher.launch("sort_list", blocks, args(0))?;
        for (_, kernel) in SUMS {
            let (chunks, blocks) = launcher.planned(kernel);
            launcher.launch(kernel, blocks, SortArgs { chunks, ..args(0) })?;
        }
        Ok(())
    }
}
