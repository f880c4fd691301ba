//! What rows of one table on a GPU owe: which are up to date, and their payment. Nothing here waits for the device.

use std::sync::Arc;

use candle_core::{CudaDevice, Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::abi::{self, Address, MarkArgs, PayArgs};
use super::compile::load;
use super::launcher::launch;
use super::plan::{blocks, blocks_of_units};
use super::source::{Module, pay_kernel};
use super::staging::alloc;
use crate::error::Result;
use crate::kernel::PayTask;
use crate::kernel::lend::gpu::{address_to_write, written};
use crate::ledger::Record;
use crate::rounding::Rounding;
use crate::state::{Master, Stored};

/// A table's marks, one for each row, and the ledger's entries, on its GPU.
pub(crate) struct GpuMarks {
    device: CudaDevice,
    marks: CudaSlice<u32>,
    rows: u64,
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
        let marks = stream.alloc_zeros::<u32>(rows.max(1)).map_err(candle_core::Error::wrap)?;
        let mut new = Self { device: device.clone(), marks, rows: rows as u64, entries: None, seen: 0 };
        if mark != 0 {
            new.mark(None, 0, mark)?;
        }
        Ok(new)
    }

    /// How many bytes the marks take.
    pub(crate) fn bytes(&self) -> usize {
        self.marks.len() * size_of::<u32>()
    }

    /// Lets rows pay what they owe, or all of them; those that have paid are marked with `mark`. A row may be named more
    /// than once.
    pub(crate) fn pay(&mut self, task: PayTask<'_>, rows: Option<&[u32]>, mark: u32) -> Result<()> {
        let PayTask { var, row_len, ledger, rounding, key, state } = task;
        let Stored::Device(moments) = &state.moments.stored else {
            return Err(candle_core::Error::msg("expected moments on the variable's GPU").into());
        };
        let master = match &state.master {
            Some(Master::Device(master)) => Some(master),
            None => None,
            Some(_) => return Err(candle_core::Error::msg("expected a master on the variable's GPU").into()),
        };
        if row_len == 0 {
            return Ok(());
        }
        let layout = &state.moments.layout;
        let stream = self.device.cuda_stream();
        let kernel = pay_kernel(var.dtype(), layout.dtype, layout.rowwise);
        let function = load(&self.device, Module::of_payment(var.dtype())?, &kernel)?;
        let (first, records) = ledger.records(self.seen);
        let entries = self.told(&stream, first, &records)?;
        self.seen = first + records.len();
        let own = |tensor: &Tensor| address_to_write(tensor, &stream);
        let tensor = abi::Tensor {
            param: own(var)?,
            exp_avg: own(&moments.exp_avg)?,
            exp_inf: own(&moments.exp_inf)?,
            units: moments.units.as_ref().map_or(Ok(0), own)?,
            master: master.map_or(Ok(0), own)?,
            len: var.elem_count() as u64,
            unit: row_len as u64,
            ..abi::Tensor::default()
        };
        let mut args = PayArgs {
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
        // Freed when the kernel has run, in the order of the stream.
        let named = named(&stream, rows)?;
        if let Some((ids, n)) = &named {
            (args.tensor.rows, args.n) = (ids.device_ptr(&stream).0, *n);
        }
        launch(&stream, &function, blocks_of_units(args.n, args.tensor.unit), args)?;
        Ok(written(var, &stream)?)
    }

    /// From now on these rows have this mark, or all of them, with the bits `kept` of their own.
    pub(crate) fn mark(&mut self, rows: Option<&[u32]>, kept: u32, added: u32) -> Result<()> {
        let stream = self.device.cuda_stream();
        let function = load(&self.device, Module::Rows, "rows_mark")?;
        let marks = self.marks.device_ptr_mut(&stream).0;
        let mut args = MarkArgs { marks, rows: 0, n: self.rows, all: self.rows, kept, added };
        let named = named(&stream, rows)?;
        if let Some((ids, n)) = &named {
            (args.rows, args.n) = (ids.device_ptr(&stream).0, *n);
        }
        launch(&stream, &function, blocks(args.n), args)
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
            if let Some(entries) = &self.entries {
                let mut same = larger.slice_mut(..entries.len());
                stream.memcpy_dtod(entries, &mut same).map_err(candle_core::Error::wrap)?;
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

/// Rows on the device, and how many there are; none if all are meant.
fn named(stream: &Arc<CudaStream>, rows: Option<&[u32]>) -> Result<Option<(CudaSlice<u32>, u64)>> {
    match rows {
        // A device gives no memory of no bytes.
        Some([]) => Ok(Some((stream.alloc_zeros::<u32>(1).map_err(candle_core::Error::wrap)?, 0))),
        Some(rows) => Ok(Some((stream.clone_htod(rows).map_err(candle_core::Error::wrap)?, rows.len() as u64))),
        None => Ok(None),
    }
}
