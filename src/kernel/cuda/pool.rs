//! Rows of tables on the device, gathered and pooled for lookups, and what goes back to weights and maxima.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Tensor};
use cudarc::driver::DeviceRepr;

use super::abi::{Address, DotArgs, GatherArgs, LargestArgs, PoolArgs};
use super::compile::load;
use super::ids::{BagsAt, GpuIds, GpuRows};
use super::launcher::launch;
use super::plan::{blocks_of_rows, blocks_of_warps};
use super::source::Module;
use crate::kernel::lend::gpu::{Held, storage_address, storage_address_to_write, storage_written};

/// The rows `ids` of a table on a GPU, one after another; NaN for an id that is no row.
pub(crate) fn gather(table: &Tensor, row_len: usize, ids: &GpuRows) -> candle_core::Result<CudaStorage> {
    let out = Output { device: device_of(table)?, dtype: table.dtype(), len: ids.len() * row_len };
    let stream = out.device.cuda_stream();
    out.filled(|at| {
        let held = Held::new(table)?;
        let (table_at, _guard) = held.address(&stream)?;
        // The widest word that a row is a multiple of, and that it begins at.
        let bytes = row_len * table.dtype().size_in_bytes();
        let fits = |word: usize| bytes.is_multiple_of(word) && (table_at | at).is_multiple_of(word as u64);
        let (kernel, word) = [("rows_gather_16", 16), ("rows_gather_8", 8), ("rows_gather_4", 4)]
            .into_iter()
            .find(|&(_, word)| fits(word))
            .unwrap_or(("rows_gather_2", 2));
        let (n, row_len) = (ids.len() as u64, (bytes / word) as u64);
        let args = GatherArgs { ids: ids.address(&stream), table: table_at, out: at, n, row_len };
        out.launch((Module::Rows, kernel), blocks_of_rows(n, row_len), args)
    })
}

/// One row for each of the `bags` of a table on a GPU: the sum or mean of its rows, each times its factor.
pub(crate) fn pool(table: &Tensor, row_len: usize, ids: &GpuIds, bags: usize) -> candle_core::Result<CudaStorage> {
    let out = Output { device: device_of(table)?, dtype: table.dtype(), len: bags * row_len };
    let stream = out.device.cuda_stream();
    out.filled(|at| {
        let (table, factors) = (Held::new(table)?, ids.factors().map(Held::new).transpose()?);
        let (table_at, _table_guard) = table.address(&stream)?;
        let (factors_at, _guard) = match &factors {
            Some(factors) if ids.len() > 0 => factors.address(&stream).map(|(at, guard)| (at, Some(guard)))?,
            _ => (0, None),
        };
        let BagsAt { starts, is_mean, .. } = ids.bags(&stream);
        let args = PoolArgs {
            table: table_at,
            ids: ids.rows().address(&stream),
            starts,
            factors: factors_at,
            out: at,
            n: bags as u64,
            row_len: row_len as u64,
            mean: u32::from(is_mean),
            padding: 0,
        };
        out.launch((Module::Pool, &out.kernel("pool")), blocks_of_rows(args.n, args.row_len), args)
    })
}

/// The gradients of the factors of a pooled lookup, from that of its result and the `rows` that were looked up.
pub(crate) fn dot_rows(rows: &Tensor, grad: &Tensor, row_len: usize, ids: &GpuIds) -> candle_core::Result<CudaStorage> {
    let out = Output { device: device_of(rows)?, dtype: rows.dtype(), len: ids.len() };
    let stream = out.device.cuda_stream();
    if row_len == 0 {
        return out.zeros();
    }
    out.filled(|at| {
        let (rows, grad) = (Held::new(rows)?, Held::new(grad)?);
        let ((rows, _rows_guard), (grad, _guard)) = (rows.address(&stream)?, grad.address(&stream)?);
        let bags = ids.bags(&stream).bags;
        let args = DotArgs { rows, grad, bags, out: at, n: ids.len() as u64, row_len: row_len as u64 };
        out.launch((Module::Pool, &out.kernel("pool_dot")), blocks_of_warps(args.n), args)
    })
}

/// The largest element of each column of each bag of looked-up rows, and in which row it is. The ids of bag b are those from
/// `starts[b]` to `starts[b + 1]`.
pub(crate) fn largest(
    (rows, start): (&CudaStorage, usize),
    row_len: usize,
    starts: &[u32],
) -> candle_core::Result<(CudaStorage, GpuRows)> {
    let bags = starts.len() - 1;
    let out = Output { device: rows.device().clone(), dtype: rows.dtype(), len: bags * row_len };
    let stream = out.device.cuda_stream();
    let device = Device::Cuda(out.device.clone());
    let (starts, positions) = (GpuRows::on(&device, starts)?, GpuRows::none(&device, out.len)?);
    let maxima = out.filled(|at| {
        let (values, _guard) = storage_address(rows, start, &stream)?;
        let (starts, positions) = (starts.address(&stream), positions.address(&stream));
        let args = LargestArgs { values, starts, positions, out: at, n: bags as u64, row_len: row_len as u64 };
        out.launch((Module::Pool, &out.kernel("pool_largest")), blocks_of_rows(args.n, args.row_len), args)
    })?;
    Ok((maxima, positions))
}

/// The gradient of what [`largest`] was given, `rows` rows: each element of `grad` goes to where its value came from.
pub(crate) fn largest_backward(
    grad: &Tensor,
    row_len: usize,
    positions: &GpuRows,
    rows: usize,
) -> candle_core::Result<CudaStorage> {
    let out = Output { device: device_of(grad)?, dtype: grad.dtype(), len: rows * row_len };
    let stream = out.device.cuda_stream();
    let mut scattered = out.zeros()?;
    if out.len == 0 || grad.elem_count() == 0 {
        return Ok(scattered);
    }
    let at = storage_address_to_write(&mut scattered, &stream)?;
    let held = Held::new(grad)?;
    let (values, _guard) = held.address(&stream)?;
    let (positions, n, row_len) = (positions.address(&stream), (grad.elem_count() / row_len) as u64, row_len as u64);
    let args = LargestArgs { values, starts: 0, positions, out: at, n, row_len };
    out.launch((Module::Pool, &out.kernel("pool_scatter")), blocks_of_rows(n, row_len), args)?;
    storage_written(&mut scattered, &stream)?;
    Ok(scattered)
}

/// What a kernel makes.
struct Output {
    device: CudaDevice,
    dtype: DType,
    len: usize,
}

impl Output {
    fn zeros(&self) -> candle_core::Result<CudaStorage> {
        // A GPU gives no memory of no bytes.
        self.device.zeros_impl(&Shape::from(self.len.max(1)), self.dtype)
    }

    /// The result of a launch that writes all of it, at the address that it is given.
    fn filled(&self, write: impl FnOnce(Address) -> candle_core::Result<()>) -> candle_core::Result<CudaStorage> {
        if self.len == 0 {
            return self.zeros();
        }
        #[expect(unsafe_code, reason = "memory that is not set yet")]
        // SAFETY: the launch writes all of it, in the order of the stream.
        let mut storage = unsafe { self.device.alloc_uninit(&Shape::from(self.len), self.dtype)? };
        let stream = self.device.cuda_stream();
        write(storage_address_to_write(&mut storage, &stream)?)?;
        storage_written(&mut storage, &stream)?;
        Ok(storage)
    }

    fn kernel(&self, name: &str) -> String {
        format!("{name}_{}", self.dtype.as_str())
    }

    fn launch<A: DeviceRepr>(&self, (module, kernel): (Module, &str), blocks: u32, args: A) -> candle_core::Result<()> {
        let function = load(&self.device, module, kernel)?;
        Ok(launch(&self.device.cuda_stream(), &function, blocks, args)?)
    }
}

fn device_of(tensor: &Tensor) -> candle_core::Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => candle_core::bail!("expected a tensor on a GPU"),
    }
}
