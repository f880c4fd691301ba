//! One weight with rows: its lookups, and which of them a step's gradients belong to.
//!
//! The graph of a lookup is `rows = table[ids] + anchor`. The table itself stays outside of it, so that no gradient of
//! its size ever exists; the anchor, a leaf in the shape of the result, is what takes the gradient, and a record says
//! to which rows it goes. Layer and optimizer find each other by the weight: one shared table for each variable.
//!
//! Invariant: nothing here is as large as the table, and what is thrown away leaves nothing; see `records` for how long
//! a record lives.

pub(crate) mod exact;
pub(crate) mod limits;
mod lookup;
mod records;

use std::sync::{Arc, Mutex};

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::error::{Error, ErrorKind, Result};
use crate::gradient::SparseGrad;
use crate::gradient::sparse::to_sparse;
use crate::ids::{IDS, read_ids, row_len, rows_of};
use crate::kernel::{self, GpuIds, HostIds, LookupIds, RowGrad, Unchecked, is_supported};
use crate::state::{arithmetic, written};

pub(crate) use lookup::{Pooled, PooledIds};
pub(crate) use records::{Lookups, find};

/// A weight with rows, `[rows, ..]`, of which a step touches few.
///
/// ```text
/// lookup(ids)[i, ..] = weight[ids[i], ..]
/// ```
///
/// The result of [`lookup`](Self::lookup) is part of candle's graph, but its backward pass makes no gradient of the
/// table's size: an [`Adamax`](crate::Adamax) that has the weight finds the rows' gradients in the `GradStore` by
/// itself, sums those of equal rows in order of occurrence, and updates these rows only (TensorFlow's `IndexedSlices`).
/// Clones, and tables made of the same variable, are the same table. A weight that is not a variable is frozen. The
/// weight is in host memory or, with the feature `cuda`, on a GPU; on any other device it is looked up and differentiated
/// densely, candle's way.
///
/// With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) a row catches up on the updates that it missed when it is looked
/// up. Call [`Adamax::catch_up`](crate::Adamax::catch_up) or [`weight`](Self::weight) before the weight is read or written by
/// anything but this crate; [`set_rows`](Self::set_rows) may be called at any time.
///
/// Ids on the table's GPU stay there, and a lookup waits for nothing: rows of ids that are none are NaN, and the error that
/// names the id is that of the optimizer's step, or of a later lookup if there is none. With ids in host memory it is the
/// lookup's own.
///
/// ```
/// use candle_adamax::{Adamax, ParamsAdamax, Table};
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::Optimizer;
///
/// let weight = Var::ones((1_000_000, 8), DType::F32, &Device::Cpu)?;
/// let table = Table::new(&weight)?;
/// let mut optimizer = Adamax::from_named([("weight", weight.clone())], ParamsAdamax::default())?;
///
/// let ids = Tensor::new(&[[3i64, 5], [3, 999_999]], &Device::Cpu)?;
/// let rows = table.lookup(&ids)?;
/// assert_eq!(rows.dims(), [2, 2, 8]);
/// optimizer.backward_step(&rows.sum_all()?)?; // updates rows 3, 5 and 999,999
///
/// let after = table.lookup(&Tensor::new(&[3u32, 4], &Device::Cpu)?)?.to_vec2::<f32>()?;
/// assert!((after[0][0] - 0.999).abs() < 1e-6 && after[1][0] == 1.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Table(Arc<Shared>);

struct Shared {
    weight: Tensor,
    rows: usize,
    row_len: usize,
    /// The rows that are to be scaled down when the weight is written.
    limits: limits::Limits,
    /// The lookups whose ids only the GPU has seen.
    unchecked: Mutex<Unchecked>,
    /// The padding rows of the layers over it.
    paddings: Mutex<Vec<u32>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.weight.is_variable() {
            records::forget(self.weight.id());
        }
    }
}

impl Table {
    /// The table of `weight`, `[rows, ..]` of f64, f32, f16 or bf16. On Linux a large variable is moved to pages of 2
    /// MB, unless it is on such already, which takes some tenths of a second a gigabyte, once.
    ///
    /// # Errors
    ///
    /// A scalar, more than 4,294,967,295 rows, or another dtype; a tensor that is computed from variables, whose
    /// gradient would be lost.
    pub fn new(weight: &Tensor) -> Result<Self> {
        if !is_supported(weight.dtype()) {
            let (name, expected, got) = ("weight".to_owned(), "F64, F32, F16 or BF16".to_owned(), weight.dtype());
            return Err(ErrorKind::DTypeMismatch { what: "table", name, expected, got }.into());
        }
        let rows = rows_of("weight", weight)?;
        let make = |weight: Tensor| {
            let row_len = row_len(&weight);
            let limits = limits::Limits::default();
            Arc::new(Shared { weight, rows, row_len, limits, unchecked: Mutex::default(), paddings: Mutex::default() })
        };
        if weight.is_variable() {
            let mut is_new = false;
            let shared = records::share(weight.id(), || {
                is_new = true;
                make(weight.clone())
            });
            // Not while others wait for the records.
            if is_new && weight.device().is_cpu() {
                kernel::advise_huge_pages(weight)?;
            }
            return Ok(Self(shared));
        }
        if weight.track_op() {
            let expected = "a variable, or a tensor that needs no gradient, such as `weight.detach()`";
            return Err(Error::invalid("weight", expected, "one that is computed from variables"));
        }
        Ok(Self(make(weight.contiguous()?)))
    }

    /// The weight, `[rows, ..]`, with all rows up to date. Looking at it changes nothing.
    ///
    /// It is the variable itself, unless rows have missed updates ([`SparseUpdate::Exact`](crate::SparseUpdate::Exact)) or a
    /// layer with [`max_norm`](crate::Embedding::max_norm) has found rows that are to be scaled. Then it is a copy, whose
    /// gradient is that of the variable. On a GPU the rows themselves are brought up to date.
    ///
    /// # Errors
    ///
    /// A device that does not answer, or has no memory.
    pub fn weight(&self) -> Result<Tensor> {
        let weight = &self.0.weight;
        let caught_up = exact::caught_up(weight.id())?;
        if !weight.device().is_cpu() {
            limits::scale_down(weight)?;
        }
        let noted = self.0.limits.noted();
        let copy = match caught_up {
            None if noted.is_empty() => return Ok(weight.clone()),
            None => weight.detach().copy()?,
            Some(copy) => copy,
        };
        kernel::scale_down(&copy, self.0.row_len, &noted)?;
        Ok(lookup::stand_in(weight, &copy)?)
    }

    /// The weight, whatever updates its rows have missed.
    pub(crate) fn raw(&self) -> &Tensor {
        &self.0.weight
    }

    /// A layer over the table has this padding row: as long as its moments are zero it stays as it is.
    pub(crate) fn pad(&self, row: u32) -> Result<()> {
        let mut paddings = records::lock(&self.0.paddings);
        if !paddings.contains(&row) {
            paddings.push(row);
        }
        drop(paddings);
        // After that: an optimizer that takes the table meanwhile has found it there.
        exact::pad(self.0.weight.id(), row)
    }

    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// The rows of `ids`, which have any shape and any integer dtype: `[ids' dimensions.., row's dimensions..]`.
    /// Without ids the result is a constant: the weight has no gradient then, and a step reports it as missing.
    ///
    /// # Errors
    ///
    /// An id that is not the number of a row, or that was not in an earlier lookup whose ids were on the GPU; ids that are not
    /// integers; a row that was [written](crate::ErrorKind::WrittenRow) while it had missed updates.
    pub fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        self.lookup_without(ids, None, None)
    }

    /// A lookup in which the row `padding` gets no gradient and rows above `max_norm` are scaled down.
    pub(crate) fn lookup_without(&self, ids: &Tensor, padding: Option<u32>, max_norm: Option<f64>) -> Result<Tensor> {
        let weight = &self.0.weight;
        let mut shape = ids.dims().to_vec();
        shape.extend(&weight.dims()[1..]);
        if !kernel::has_lookups(weight) {
            if ids.elem_count() == 0 {
                self.read(ids)?;
                return Ok(Tensor::zeros(shape, weight.dtype(), weight.device())?);
            }
            let ids = Tensor::new(self.read(ids)?, weight.device())?;
            return Ok(weight.index_select(&ids, 0)?.reshape(shape)?);
        }
        if !self.on_host() {
            let trained = Arc::new(LookupIds::Gpu(Box::new(self.gpu_ids(ids, padding)?)));
            exact::catch_up_lookup(weight.id(), &trained)?;
            return lookup::rows(self, lookup::Ids { all: None, trained }, shape, None);
        }
        let rows = HostIds::new(self.read(ids)?, None, None);
        let ids = match padding {
            None => lookup::Ids { all: None, trained: Arc::new(LookupIds::Host(rows)) },
            Some(padding) => {
                let (sources, trained) = (0..).zip(rows.ids()).filter(|&(_, &row)| row != padding).unzip();
                let trained = Arc::new(LookupIds::Host(HostIds::new(trained, Some(sources), None)));
                lookup::Ids { all: Some(rows), trained }
            }
        };
        match &ids.all {
            None => exact::catch_up_lookup(weight.id(), &ids.trained)?,
            Some(all) => exact::catch_up_rows(weight.id(), all)?,
        }
        lookup::rows(self, ids, shape, max_norm)
    }

    /// The ids of a lookup in a table on a GPU, of which `padding` gets no gradient; hears of earlier ones.
    fn gpu_ids(&self, ids: &Tensor, padding: Option<u32>) -> Result<GpuIds> {
        let mut unchecked = records::lock(&self.0.unchecked);
        unchecked.hear()?;
        GpuIds::new(self.0.weight.device(), ids, self.0.rows, padding, &mut unchecked)
    }

    /// Sets rows of the weight to `values`, `[ids' dimensions.., row's dimensions..]`; of equal ids, the last one wins.
    /// Moments stay: [`reset_rows`](crate::Adamax::reset_rows) clears those.
    ///
    /// # Errors
    ///
    /// An id out of range; values of another shape or dtype; a weight that is not a variable.
    pub fn set_rows(&self, ids: &Tensor, values: &Tensor) -> Result<()> {
        let (weight, row_len) = (&self.0.weight, self.0.row_len);
        let rows = self.read(ids)?;
        if !weight.is_variable() {
            return Err(Error::invalid("weight", "a variable", "a tensor that cannot be changed"));
        }
        let expected: Vec<usize> = ids.dims().iter().chain(&weight.dims()[1..]).copied().collect();
        if values.dims() != expected {
            let (name, got) = ("weight".to_owned(), values.dims().to_vec());
            return Err(ErrorKind::ShapeMismatch { what: "values", name, expected, got }.into());
        }
        if values.dtype() != weight.dtype() {
            let (name, expected) = ("weight".to_owned(), format!("{:?}", weight.dtype()));
            return Err(ErrorKind::DTypeMismatch { what: "values", name, expected, got: values.dtype() }.into());
        }
        // The last of equal ids: a scatter may write them in any order.
        let sorted = HostIds::new(rows, None, None);
        let last = sorted.sorted().chunk_by(|a, b| a >> 32 == b >> 32).filter_map(|equal| equal.last());
        let (rows, positions): (Vec<u32>, Vec<u32>) = last.map(|&key| ((key >> 32) as u32, key as u32)).unzip();
        if rows.is_empty() || row_len == 0 {
            return Ok(());
        }
        exact::catch_up_before_writing(weight.id(), &rows)?;
        let (n, device) = (rows.len(), weight.device());
        let positions = Tensor::new(positions, device)?;
        let values = values.to_device(device)?.copy()?.reshape(((), row_len))?.index_select(&positions, 0)?;
        let places = Tensor::new(rows.as_slice(), device)?.reshape((n, 1))?.broadcast_as((n, row_len))?.contiguous()?;
        exact::write(weight.id(), &rows, || {
            weight.detach().reshape((self.0.rows, row_len))?.scatter_set(&places, &values, 0)?;
            written::rows(weight, &rows);
            Ok(())
        })
    }

    pub(crate) fn on_host(&self) -> bool {
        self.0.weight.device().is_cpu()
    }

    pub(crate) fn row_len(&self) -> usize {
        self.0.row_len
    }

    pub(crate) fn read(&self, ids: &Tensor) -> Result<Vec<u32>> {
        read_ids(IDS, ids, self.0.rows)
    }

    /// Lets a row be scaled down if it is above `max_norm`, although no lookup returns it.
    pub(crate) fn limit(&self, row: u32, max_norm: f64) -> Result<()> {
        exact::catch_up_rows(self.0.weight.id(), &HostIds::new(vec![row], None, None))?;
        lookup::gather(self, &[row], Some(max_norm))?;
        Ok(())
    }

    /// The gradient of the lookups in this table among those of a backward pass: each row once, in ascending order,
    /// with the sum of its contributions in the order in which they occurred. `None` if no lookup has a gradient there.
    ///
    /// `grads.get(&weight)` is `None` for a weight that was only looked up, since no tensor of its size exists. Ask
    /// here to log such a gradient, or to change it before [`apply_gradients`](crate::Adamax::apply_gradients), which
    /// updates with an unchanged one to the bits of [`step`](candle_nn::Optimizer::step).
    /// [`Adamax::gradient_norms`](crate::Adamax::gradient_norms) has the norms of all variables.
    ///
    /// The values are of the weight's dtype, or f32 for f16 and bf16, and on its device. A weight that is also used
    /// densely has that part of its gradient under `grads.get(&weight)`; give `apply_gradients` both. So has a weight
    /// on a device that this crate has no kernels for.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, SparseGrad, Table};
    /// use candle_core::{Device, Tensor, Var};
    ///
    /// let weight = Var::zeros((1000, 2), candle_core::DType::F32, &Device::Cpu)?;
    /// let table = Table::new(&weight)?;
    /// let mut optimizer = Adamax::from_named([("weight", weight.clone())], ParamsAdamax::default())?;
    ///
    /// let rows = table.lookup(&Tensor::new(&[7u32, 3, 7], &Device::Cpu)?)?;
    /// let grads = rows.sum_all()?.backward()?;
    /// assert!(grads.get(&weight).is_none());
    /// let grad = table.gradient(&grads)?.expect("rows were looked up");
    /// assert_eq!(grad.indices.to_vec1::<u32>()?, [3, 7]);
    /// assert_eq!(grad.values.to_vec2::<f32>()?, [[1.0, 1.0], [2.0, 2.0]]);
    ///
    /// let halved = SparseGrad { values: (grad.values / 2.0)?, ..grad };
    /// optimizer.apply_gradients([(&weight, &halved)])?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// An id on a GPU that turns out to be none of a row; a gradient whose lookup is not known any more
    /// ([`ErrorKind::LostLookup`]).
    pub fn gradient(&self, grads: &GradStore) -> Result<Option<SparseGrad>> {
        let weight = &self.0.weight;
        let mut lookups = find(grads);
        lookups.check(std::iter::once(weight.id()))?;
        let mut parts = lookups.take(weight.id());
        for part in &mut parts {
            part.lookup_ids.check()?;
            if ![weight.dtype(), arithmetic(weight.dtype())].contains(&part.grad.dtype()) {
                let (name, expected) = ("weight".to_owned(), format!("{:?}", weight.dtype()));
                let got = part.grad.dtype();
                return Err(ErrorKind::DTypeMismatch { what: "gradient", name, expected, got }.into());
            }
            if !part.grad.is_contiguous() {
                part.grad = std::borrow::Cow::Owned(part.grad.contiguous()?);
            }
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let SparseGrad { indices, values } =
            to_sparse(RowGrad::coalesced(&parts, self.0.row_len)?.summed(weight.dtype())?, weight)?;
        let device = weight.device();
        Ok(Some(match values.elem_count() {
            // Nothing cannot be copied to a GPU.
            0 => SparseGrad { indices, values: Tensor::zeros(values.shape(), values.dtype(), device)? },
            _ => SparseGrad { indices: indices.to_device(device)?, values: values.to_device(device)? },
        }))
    }

    /// Rows that are pooled by bags.
    pub(crate) fn pool(&self, pooled: lookup::Pooled) -> Result<Tensor> {
        lookup::pool(self, pooled)
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("shape", self.0.weight.shape())
            .field("dtype", &self.0.weight.dtype())
            .field("trained", &self.0.weight.is_variable())
            .finish()
    }
}
