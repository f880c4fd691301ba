//! Rows of tables on the device: gathered for lookups, and the sums of their gradients.

use candle_core::backend::BackendDevice;
use candle_core::{CudaStorage, DType, Device, Shape, Tensor};
use cudarc::driver::{CudaSlice, DevicePtr};

use super::abi::{Address, GatherArgs};
use super::compile::load;
use super::launcher::{Launcher, launch};
use super::plan::blocks_of_rows;
use super::source::Module;
use super::staging::alloc;
use super::work::{Grad, Prepared};
use crate::error::Result;
use crate::kernel::lend::gpu::{Held, storage_address_to_write};
use crate::state::arithmetic;

/// Memory for the sums of the gradients of rows, kept from call to call.
#[derive(Default)]
pub(super) struct Sums(Option<CudaSlice<u8>>);

impl Sums {
    /// Makes room for the sums of the rows of each table, and loads what makes them.
    pub(super) fn prepare(&mut self, launcher: &mut Launcher, prepared: &[Prepared<'_>]) -> Result<Vec<Address>> {
        let (mut bytes, mut offsets) = (0, Vec::with_capacity(prepared.len()));
        for task in prepared {
            offsets.push(bytes);
            if let Grad::Sums(_) = &task.grad {
                let dtype = arithmetic(task.var.dtype());
                launcher.load(Module::Rows, sum_kernel(dtype))?;
                let size = task.grad.elements() * dtype.size_in_bytes() as u64;
                bytes += size.next_multiple_of(16);
            }
        }
        if bytes > 0 && self.0.as_ref().is_none_or(|sums| (sums.len() as u64) < bytes) {
            self.0 = Some(alloc(&launcher.stream, bytes.next_power_of_two() as usize)?);
        }
        let base = self.0.as_ref().map_or(0, |sums| sums.device_ptr(&launcher.stream).0);
        Ok(offsets.into_iter().map(|offset| base + offset).collect())
    }
}

/// What sums rows of a table of `dtype`.
pub(super) fn sum_kernel(dtype: DType) -> &'static str {
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
