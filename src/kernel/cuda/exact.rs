//! Marks and ledger of one table on a GPU, and how its rows catch up. Nothing here waits for the device.
//!
//! Invariant: rows are named before they are updated, and what comes behind the update needs no memory.

use std::sync::Arc;

use candle_core::{CudaDevice, Device, Tensor};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::abi::{self, Address, CatchUpArgs, MarkArgs};
use super::compile::load;
use super::ids::GpuRows;
use super::launcher::launch;
use super::order::Order;
use super::plan::{blocks, blocks_of_units};
use super::source::{Module, catch_up_kernel};
use super::staging::alloc;
use super::work::on_gpu;
use crate::error::Result;
use crate::kernel::lend::gpu::{address_to_write, written};
use crate::kernel::{CatchUpTask, Touched};
use crate::ledger::Record;
use crate::rounding::Rounding;

/// A table's marks, one for each row, and the ledger's entries, on its GPU.
pub(crate) struct GpuMarks {
    /// The first to go: what follows is memory that kernels use.
    order: Order,
    device: CudaDevice,
    /// What sets marks.
    kernel: CudaFunction,
    marks: CudaSlice<u32>,
    rows: u64,
    /// The rows that were named last.
    named: Vec<GpuRows>,
    entries: Option<CudaSlice<u8>>,
    /// How many entries have gone up.
    seen: usize,
}

impl GpuMarks {
    /// The marks of all rows of `var`.
    pub(crate) fn new(var: &Tensor, mark: u32) -> Result<Self> {
        let Device::Cuda(device) = var.device() else {
            return Err(candle_core::Error::msg("expected a variable on a GPU").into());
        };
        let rows = var.dims().first().copied().unwrap_or(1);
        let stream = device.cuda_stream();
        let zeros = |n: usize| stream.alloc_zeros::<u32>(n).map_err(candle_core::Error::wrap);
        let (marks, kernel) = (zeros(rows.max(1))?, load(device, Module::Rows, "rows_mark")?);
        let (order, device, rows) = (Order::new(&stream)?, device.clone(), rows as u64);
        let mut new = Self { order, device, kernel, marks, rows, named: Vec::new(), entries: None, seen: 0 };
        new.mark_all(0, mark)?;
        Ok(new)
    }

    /// How many bytes the marks take.
    pub(crate) fn bytes(&self) -> usize {
        self.marks.len() * size_of::<u32>()
    }

    /// Names the rows that catch up next and are marked next. A row may be named more than once.
    pub(crate) fn name(&mut self, rows: &Touched<'_>) -> Result<()> {
        self.named = match rows {
            Touched::Rows(rows) => vec![GpuRows::on(&Device::Cuda(self.device.clone()), rows)?],
            Touched::OnGpu(rows) => rows.clone(),
        };
        self.named.retain(|rows| rows.len() > 0);
        Ok(())
    }

    /// Lets the rows that were named catch up, or all of them; those that have caught up are marked with `mark`.
    pub(crate) fn catch_up(&mut self, task: CatchUpTask<'_>, is_all: bool, mark: u32) -> Result<()> {
        let CatchUpTask { var, row_len, ledger, rounding, key, state } = task;
        let (moments, master) = on_gpu(state)?;
        if row_len == 0 {
            return Ok(());
        }
        let layout = &state.moments.layout;
        let stream = self.device.cuda_stream();
        self.order.begin(&stream)?;
        let kernel = catch_up_kernel(var.dtype(), layout.dtype, layout.rowwise);
        let function = load(&self.device, Module::of_catch_up(var.dtype())?, &kernel)?;
        let (first, records) = ledger.records(self.seen);
        let entries = self.told(&stream, first, &records)?;
        self.seen = first + records.len();
        let own = |tensor: &Tensor| address_to_write(tensor, &stream);
        let tensor = abi::Tensor {
            param: own(var)?,
            exp_avg: own(&moments.exp_avg)?,
            exp_inf: own(&moments.exp_inf)?,
            scales: moments.scales.as_ref().map_or(Ok(0), own)?,
            master: master.map_or(Ok(0), own)?,
            len: var.elem_count() as u64,
            unit: row_len as u64,
            ..abi::Tensor::default()
        };
        let mut args = CatchUpArgs {
            tensor,
            marks: self.marks.device_ptr_mut(&stream).0,
            entries,
            terms: ledger.terms(),
            n: self.rows,
            all: self.rows,
            key,
            limits: layout.encoding.limits().as_array(),
            rounding: u32::from(rounding == Rounding::Stochastic),
            now: ledger.now() as u32,
            mark,
        };
        // Without rows, all of them.
        let lists = if is_all { vec![(0, self.rows)] } else { self.lists(&stream) };
        for (rows, n) in lists {
            (args.tensor.rows, args.n) = (rows, n);
            launch(&stream, &function, blocks_of_units(n, args.tensor.unit), args)?;
        }
        self.order.end(&stream)?;
        Ok(written(var, &stream)?)
    }

    /// From now on the rows that were named have these bits in their marks, beside those of their own that are `kept`.
    pub(crate) fn mark_named(&mut self, kept: u32, added: u32) -> Result<()> {
        let lists = self.lists(&self.device.cuda_stream());
        lists.into_iter().try_for_each(|(rows, n)| self.mark(MarkArgs { rows, n, kept, added, ..MarkArgs::default() }))
    }

    /// Where the rows are that were named, and how many.
    fn lists(&self, stream: &CudaStream) -> Vec<(Address, u64)> {
        self.named.iter().map(|rows| (rows.address(stream), rows.len() as u64)).collect()
    }

    /// From now on all rows have this mark, with the bits `kept` of their own.
    pub(crate) fn mark_all(&mut self, kept: u32, added: u32) -> Result<()> {
        self.mark(MarkArgs { n: self.rows, kept, added, ..MarkArgs::default() })
    }

    fn mark(&mut self, args: MarkArgs) -> Result<()> {
        let stream = self.device.cuda_stream();
        self.order.begin(&stream)?;
        let marks = self.marks.device_ptr_mut(&stream).0;
        launch(&stream, &self.kernel, blocks(args.n), MarkArgs { marks, all: self.rows, ..args })?;
        self.order.end(&stream)
    }

    /// The ledger begins anew.
    pub(crate) fn forget(&mut self) {
        self.seen = 0;
    }

    /// Where all entries are, of which these have changed, from the `first` on.
    fn told(&mut self, stream: &Arc<CudaStream>, first: usize, records: &[Record]) -> Result<Address> {
        let (size, n) = (size_of::<Record>(), first + records.len());
        if self.entries.as_ref().is_none_or(|entries| entries.len() < n * size) {
            let mut larger = alloc(stream, (2 * n).next_power_of_two() * size)?;
            if let Some(entries) = &self.entries
                && self.seen > 0
            {
                let seen = self.seen * size;
                let mut same = larger.slice_mut(..seen);
                stream.memcpy_dtod(&entries.slice(..seen), &mut same).map_err(candle_core::Error::wrap)?;
            }
            self.entries = Some(larger);
        }
        let Some(entries) = &mut self.entries else { return Ok(0) };
        let bytes: &[u8] = bytemuck::cast_slice(records);
        if !bytes.is_empty() {
            let mut changed = entries.slice_mut(first * size..n * size);
            stream.memcpy_htod(bytes, &mut changed).map_err(candle_core::Error::wrap)?;
        }
        Ok(entries.device_ptr(stream).0)
    }
}
