//! Lookups as operations of candle's graph.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use super::Table;
use super::exact;
use super::records::{self, Lookup, lock};
#[cfg(feature = "cuda")]
use crate::kernel::GpuIds;
use crate::kernel::{self, HostIds, LookupIds};

/// The ids of a lookup, and which of them get a gradient.
pub(super) struct Ids {
    /// All of them, if those are more and in host memory.
    pub(super) all: Option<HostIds>,
    pub(super) trained: Arc<LookupIds>,
}

/// A lookup whose rows are pooled.
pub(crate) struct Pooled {
    pub(crate) ids: PooledIds,
    /// The ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    pub(crate) starts: Vec<u32>,
    /// The bag of each id, where those are in host memory.
    pub(crate) bags: Vec<u32>,
    pub(crate) mean: bool,
    /// The factor of each id, `[n]`.
    pub(crate) factors: Option<Tensor>,
    pub(crate) max_norm: Option<f64>,
    /// The row of the padding, if it was in a bag.
    pub(crate) padding: Option<u32>,
}

/// The ids of a pooled lookup.
pub(crate) enum PooledIds {
    /// Rows of the table.
    Host(Vec<u32>),
    /// On the table's GPU, not checked yet.
    Gpu(Tensor),
}

impl PooledIds {
    pub(crate) fn into_tensor(self) -> Result<Tensor> {
        match self {
            Self::Host(ids) => {
                let n = ids.len();
                Tensor::from_vec(ids, n, &Device::Cpu)
            }
            Self::Gpu(ids) => Ok(ids),
        }
    }
}

/// Looks rows up; the result has this shape. Rows above `max_norm` are scaled down in it.
pub(super) fn rows(table: &Table, ids: Ids, shape: Vec<usize>, max_norm: Option<f64>) -> crate::error::Result<Tensor> {
    let n = ids.all.as_ref().map_or(ids.trained.len(), |all| all.ids().len());
    let anchor = anchor(table, &shape, n)?;
    let record = Record::new(table, &anchor, ids.trained);
    Ok(anchor.apply_op1(Gather { record, all: ids.all, shape: shape.into(), max_norm })?)
}

/// Copies the rows `ids` of a table in host memory. Those above `max_norm` are scaled down in the copy, and noted.
pub(super) fn gather(table: &Table, ids: &[u32], max_norm: Option<f64>) -> Result<CpuStorage> {
    let row_len = table.row_len();
    let mut gathered = kernel::gather(table.raw(), row_len, ids)?;
    if let Some(max_norm) = max_norm {
        let above = kernel::limit(&mut gathered, row_len, ids, max_norm)?;
        table.0.limits.note(&above, max_norm);
    }
    Ok(gathered)
}

/// Looks rows up and pools them: `[bags, row's dimensions..]`.
pub(super) fn pool(table: &Table, pooled: Pooled) -> crate::error::Result<Tensor> {
    let mut shape = vec![pooled.starts.len() - 1];
    shape.extend(&table.raw().dims()[1..]);
    let lookup_ids = Arc::new(if table.on_host() { listed(&pooled)? } else { on_gpu(table, &pooled)? });
    exact::catch_up_lookup(table.raw().id(), &lookup_ids)?;
    let Pooled { starts, mean, factors, max_norm, .. } = pooled;
    // The weight may have changed when the gradient of the factors is asked for.
    let needs_rows = factors.as_ref().is_some_and(Tensor::track_op);
    let rows = match needs_rows || max_norm.is_some() {
        true => Some(copied_rows(table, &lookup_ids, max_norm)?),
        false => None,
    };
    let anchor = anchor(table, &shape, lookup_ids.len())?;
    let record = Record::new(table, &anchor, lookup_ids);
    let kept = rows.clone().filter(|_| needs_rows);
    let op = Pool { record, starts, mean, weighted: factors.is_some(), shape: shape.into(), rows: Mutex::new(rows) };
    Ok(match factors {
        None => anchor.apply_op1(op)?,
        Some(factors) => anchor.apply_op2(&factors, PoolWeighted { pool: op, rows: kept })?,
    })
}

/// The rows of a pooled lookup, one after another.
fn copied_rows(table: &Table, lookup_ids: &LookupIds, max_norm: Option<f64>) -> crate::error::Result<Tensor> {
    let rows = match lookup_ids {
        LookupIds::Host(listed) => Storage::Cpu(gather(table, listed.ids(), max_norm)?),
        #[cfg(feature = "cuda")]
        LookupIds::Gpu(ids) => Storage::Cuda(kernel::gpu::gather(table.raw(), table.row_len(), ids.rows())?),
        #[cfg(not(feature = "cuda"))]
        LookupIds::Gpu(ids) => match **ids {},
    };
    Ok(Tensor::from_storage(rows, (lookup_ids.len(), table.row_len()), BackpropOp::none(), false))
}

/// What a pooled lookup contributes to, in host memory.
fn listed(pooled: &Pooled) -> crate::error::Result<LookupIds> {
    let Pooled { ids: PooledIds::Host(ids), starts, bags, mean, factors, .. } = pooled else {
        return Err(candle_core::Error::msg("expected ids in host memory").into());
    };
    let scales = match factors {
        Some(factors) => Some(factors.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?),
        None if *mean => {
            Some(bags.iter().map(|&b| 1.0 / f64::from(starts[b as usize + 1] - starts[b as usize])).collect())
        }
        None => None,
    };
    Ok(LookupIds::Host(HostIds::new(ids.clone(), Some(bags.clone()), scales)))
}

/// The same on the table's GPU.
#[cfg(feature = "cuda")]
fn on_gpu(table: &Table, pooled: &Pooled) -> crate::error::Result<LookupIds> {
    let ids = match &pooled.ids {
        PooledIds::Host(ids) => GpuIds::listed_on(table.raw().device(), ids, None)?,
        PooledIds::Gpu(ids) => table.gpu_ids(ids, None)?,
    };
    // The gradient of a row may be asked for when the factors have changed.
    let factors = pooled.factors.as_ref().map(|factors| factors.detach().copy()).transpose()?;
    Ok(LookupIds::Gpu(Box::new(ids.pooled(&pooled.starts, pooled.mean, factors)?)))
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &Table, _: &Pooled) -> crate::error::Result<LookupIds> {
    Err(candle_core::Error::msg("this program is built without the feature `cuda`").into())
}

/// The leaf that takes the gradient of a lookup of `n` ids. It has a shape and no memory: nobody reads its values.
fn anchor(table: &Table, shape: &[usize], n: usize) -> Result<Tensor> {
    let weight = table.raw();
    // Without ids there is nothing that has a gradient.
    let is_variable = weight.is_variable() && n > 0;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = weight.device() {
        use candle_core::backend::BackendDevice;
        // A GPU gives no memory of no bytes.
        let one = Storage::Cuda(device.zeros_impl(&1.into(), weight.dtype())?);
        return Ok(Tensor::from_storage(one, shape, BackpropOp::none(), is_variable));
    }
    let nothing = match weight.dtype() {
        DType::F64 => CpuStorage::F64(Vec::new()),
        DType::F16 => CpuStorage::F16(Vec::new()),
        DType::BF16 => CpuStorage::BF16(Vec::new()),
        _ => CpuStorage::F32(Vec::new()),
    };
    Ok(Tensor::from_storage(Storage::Cpu(nothing), shape, BackpropOp::none(), is_variable))
}

/// What connects an anchor with rows of a table. It is owned by the operations of the graph and by gradients.
struct Record {
    table: Table,
    lookup: Lookup,
    differentiated: AtomicBool,
}

impl Record {
    fn new(table: &Table, anchor: &Tensor, lookup_ids: Arc<LookupIds>) -> Arc<Self> {
        let lookup = Lookup::new(anchor.id(), lookup_ids);
        if anchor.is_variable() {
            records::add(table.raw().id(), &lookup);
        }
        Arc::new(Self { table: table.clone(), lookup, differentiated: AtomicBool::new(false) })
    }

    /// The gradient of the anchor, as one that owns this record: the graph may be gone when it is used.
    fn own(self: &Arc<Self>, anchor: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !anchor.is_variable() {
            return Ok(None);
        }
        if self.differentiated.swap(true, Ordering::Relaxed) {
            records::keep(self.table.raw().id(), &self.lookup);
        }
        let grad = Mutex::new(Some(grad.contiguous()?));
        anchor.apply_op1(Owned { _record: self.clone(), grad }).map(Some)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        records::remove(self.lookup.anchor);
    }
}

/// A tensor of these values, in host memory, whose gradient is that of `weight`.
pub(super) fn stand_in(weight: &Tensor, values: &Tensor) -> Result<Tensor> {
    weight.apply_op1(StandIn(Mutex::new(Some(kernel::copy(values)?))))
}

struct StandIn(Mutex<Option<CpuStorage>>);

impl CustomOp1 for StandIn {
    fn name(&self) -> &'static str {
        "table-weight"
    }

    fn cpu_fwd(&self, weight: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match lock(&self.0).take() {
            Some(values) => Ok((values, layout.shape().clone())),
            None => Ok((weight.clone(), layout.shape().clone())),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

struct Gather {
    record: Arc<Record>,
    /// The ids, if they are not those of the record.
    all: Option<HostIds>,
    shape: Shape,
    max_norm: Option<f64>,
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "table-lookup"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let Record { table, lookup: Lookup { lookup_ids, .. }, .. } = &*self.record;
        let ids = match &self.all {
            Some(all) => all,
            None => lookup_ids.listed()?,
        };
        Ok((gather(table, ids.ids(), self.max_norm)?, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let Record { table, lookup, .. } = &*self.record;
        Ok((kernel::gpu::gather(table.raw(), table.row_len(), lookup.on_gpu()?.rows())?, self.shape.clone()))
    }

    fn bwd(&self, anchor: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.record.own(anchor, grad)
    }
}

struct Pool {
    record: Arc<Record>,
    starts: Vec<u32>,
    mean: bool,
    weighted: bool,
    shape: Shape,
    /// The rows, if they are not read from the table.
    rows: Mutex<Option<Tensor>>,
}

impl CustomOp1 for Pool {
    fn name(&self) -> &'static str {
        "table-pool"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (table, lookup_ids) = (&self.record.table, self.record.lookup.lookup_ids.listed()?);
        // The scales of a mean are those of its gradient; the mean itself is a sum, divided once.
        let factors = if self.weighted { lookup_ids.scales() } else { None };
        let (row_len, ids) = (table.row_len(), lookup_ids.ids());
        let pooled = match lock(&self.rows).take() {
            None => kernel::pool(table.raw(), row_len, ids, &self.starts, factors, self.mean)?,
            Some(rows) => {
                let positions: Vec<u32> = (0..ids.len() as u32).collect();
                kernel::pool(&rows, row_len, &positions, &self.starts, factors, self.mean)?
            }
        };
        Ok((pooled, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let Record { table, lookup, .. } = &*self.record;
        let pooled = kernel::gpu::pool(table.raw(), table.row_len(), lookup.on_gpu()?, self.starts.len() - 1)?;
        Ok((pooled, self.shape.clone()))
    }

    fn bwd(&self, anchor: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.record.own(anchor, grad)
    }
}

/// [`Pool`] with a factor for each id.
struct PoolWeighted {
    pool: Pool,
    /// The rows as they were looked up, if the factors need a gradient.
    rows: Option<Tensor>,
}

impl PoolWeighted {
    /// The gradients of the factors: of `sum_p factor[p] * row[p]` by `factor[p]` it is the product of the row with the
    /// gradient of its bag.
    fn of_factors(&self, rows: &Tensor, grad: &Tensor) -> Result<Storage> {
        let Record { table, lookup, .. } = &*self.pool.record;
        #[cfg(feature = "cuda")]
        if !table.on_host() {
            return Ok(Storage::Cuda(kernel::gpu::dot_rows(rows, grad, table.row_len(), lookup.on_gpu()?)?));
        }
        let lookup_ids = lookup.lookup_ids.listed()?;
        Ok(Storage::Cpu(kernel::dot_rows(rows, grad, table.row_len(), lookup_ids)?))
    }
}

impl CustomOp2 for PoolWeighted {
    fn name(&self) -> &'static str {
        "table-pool-weighted"
    }

    fn cpu_fwd(&self, anchor: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.pool.cpu_fwd(anchor, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        anchor: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.pool.cuda_fwd(anchor, layout)
    }

    fn bwd(
        &self,
        anchor: &Tensor,
        factors: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_factors = self.rows.as_ref().map(|rows| self.of_factors(rows, &grad)).transpose()?;
        let of_factors = of_factors.map(|of| Tensor::from_storage(of, factors.shape(), BackpropOp::none(), false));
        Ok((self.pool.record.own(anchor, &grad)?, of_factors))
    }
}

/// A gradient that owns the record that it belongs to.
struct Owned {
    _record: Arc<Record>,
    grad: Mutex<Option<Tensor>>,
}

impl CustomOp1 for Owned {
    fn name(&self) -> &'static str {
        "table-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match lock(&self.grad).take() {
            Some(grad) => Ok((kernel::copy(&grad)?, grad.shape().clone())),
            None => bail!("the gradient of a lookup was taken twice"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match lock(&self.grad).take() {
            Some(grad) => Ok((kernel::gpu::copy(&grad)?, grad.shape().clone())),
            None => bail!("the gradient of a lookup was taken twice"),
        }
    }
}
