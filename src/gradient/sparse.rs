//! Gradients of rows: as a caller gives them, accumulated, and as dense ones.

use candle_core::{DType, Device, Tensor};

use crate::element::Arithmetic;
use crate::error::Result;
use crate::ids::{IDS, read_ids, rows_of};
use crate::kernel::{RowGrad, SummedRows};
use crate::rule;
use crate::state::{Buffer, arithmetic};

/// A gradient that exists for some rows of a variable only: TensorFlow's `IndexedSlices`.
///
/// The rows that are not listed are not updated, and neither are their moments. An index may be there several times,
/// in any order: its values are summed, in order of occurrence, in f32 (f64 for f64 variables). One without indices is
/// a gradient all the same: the update counts, and changes no row. A lookup without ids has no gradient.
///
/// [`Table::gradient`](crate::Table::gradient) makes one of the lookups in a table.
///
/// ```
/// use candle_adamax::{Adamax, ParamsAdamax, SparseGrad};
/// use candle_core::{Device, Tensor, Var};
///
/// let table = Var::zeros((1000, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let mut optimizer = Adamax::from_named([("table", table.clone())], ParamsAdamax::default())?;
/// let grad = SparseGrad {
///     indices: Tensor::new(&[7u32, 3, 7], &Device::Cpu)?,
///     values: Tensor::new(&[[1f32, 1.0], [2.0, 2.0], [3.0, 3.0]], &Device::Cpu)?,
/// };
/// optimizer.apply_gradients([(&table, &grad)])?;
///
/// let m = optimizer.state("table")?.exp_avg.to_vec2::<f32>()?;
/// assert_eq!((m[3][0], m[7][0], m[8][0]), (0.2, 0.4, 0.0));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SparseGrad {
    /// Which rows: `[n]`, of any integer dtype.
    pub indices: Tensor,
    /// Their gradients: `[n, ..]`, where `..` are the dimensions of a row; the variable's dtype, or f32 for f16 and bf16.
    pub values: Tensor,
}

impl SparseGrad {
    /// The rows `ids` of a dense gradient, each once. `ids` has any shape and any integer dtype; repetitions count
    /// once, because the dense gradient holds their sum.
    ///
    /// # Errors
    ///
    /// A scalar gradient, ids that are not integers, an id out of range.
    pub fn touched_rows(grad: &Tensor, ids: &Tensor) -> Result<Self> {
        let rows = rows_of("gradient", grad)?;
        let mut ids = read_ids(IDS, ids, rows)?;
        ids.sort_unstable();
        ids.dedup();
        Self::select(grad, ids)
    }

    /// The rows of a dense gradient that are not all zero. It reads all of the gradient.
    ///
    /// # Errors
    ///
    /// A scalar gradient.
    pub fn nonzero_rows(grad: &Tensor) -> Result<Self> {
        Self::select(grad, nonzero(grad)?)
    }

    fn select(grad: &Tensor, rows: Vec<u32>) -> Result<Self> {
        if rows.is_empty() || grad.elem_count() == 0 {
            // Nothing cannot be selected from on a GPU.
            let mut dims = grad.dims().to_vec();
            dims[0] = rows.len();
            let indices = Tensor::from_vec(rows, dims[0], &Device::Cpu)?;
            return Ok(Self { indices, values: Tensor::zeros(dims, grad.dtype(), grad.device())? });
        }
        let indices = Tensor::new(rows, grad.device())?;
        let values = grad.detach().contiguous()?.index_select(&indices, 0)?;
        Ok(Self { indices, values })
    }
}

/// The rows of a dense gradient that are not all zero.
pub(crate) fn nonzero(grad: &Tensor) -> Result<Vec<u32>> {
    let rows = rows_of("gradient", grad)?;
    if grad.elem_count() == 0 {
        return Ok(Vec::new());
    }
    let differs = grad.reshape((rows, ()))?.ne(0.0)?.to_dtype(DType::U32)?;
    let counts = differs.max(1)?.to_vec1::<u32>()?;
    Ok((0..rows as u32).filter(|&row| counts[row as usize] != 0).collect())
}

/// A gradient for [`apply_gradients`](crate::Adamax::apply_gradients): `.into()` makes it from either kind.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Gradient<'a> {
    /// In the shape of the variable.
    Dense(&'a Tensor),
    /// Of some rows.
    Sparse(&'a SparseGrad),
}

impl<'a> From<&'a Tensor> for Gradient<'a> {
    fn from(grad: &'a Tensor) -> Self {
        Self::Dense(grad)
    }
}

impl<'a> From<&'a SparseGrad> for Gradient<'a> {
    fn from(grad: &'a SparseGrad) -> Self {
        Self::Sparse(grad)
    }
}

/// Which rows of a dense gradient are meant; for [`step_rows`](crate::Adamax::step_rows).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TouchedRows<'a> {
    /// These: the ids of the batch, in any shape, of any integer dtype, with repetitions.
    Ids(&'a Tensor),
    /// Those that are not all zero. The gradient is read to find them.
    NonZero,
}

/// Sum of the gradients of rows of several calls, in the order of the calls.
///
/// The last calls are kept beside the sum until they have more rows than it, and are merged then. So the work of a call is
/// that of its own rows, whichever these are.
pub(crate) struct RowSum {
    row_len: usize,
    sum: SummedRows,
    later: Vec<SummedRows>,
    /// The number of rows in `later`.
    later_rows: usize,
}

impl RowSum {
    /// A sum of these rows alone.
    pub(crate) fn new(row_len: usize, sum: SummedRows) -> Self {
        Self { row_len, sum, later: Vec::new(), later_rows: 0 }
    }

    /// A sum without rows, of the type of the arithmetic on `dtype`.
    pub(crate) fn empty(row_len: usize, dtype: DType) -> Self {
        Self::new(row_len, SummedRows { rows: Vec::new(), values: Buffer::zeros_host(dtype, 0) })
    }

    /// `unscale` times the rows of a gradient, to be [added](Self::add).
    pub(crate) fn scaled(grad: &RowGrad<'_>, unscale: f64, dtype: DType) -> Result<SummedRows> {
        let mut rows = grad.summed(dtype)?;
        match &mut rows.values {
            Buffer::F32(values) => values.iter_mut().for_each(|x| *x *= unscale as f32),
            Buffer::F64(values) => values.iter_mut().for_each(|x| *x *= unscale),
            Buffer::Tensor(_) => unreachable!("rows are summed in host memory"),
        }
        Ok(rows)
    }

    /// Adds the rows of one more call.
    pub(crate) fn add(&mut self, rows: SummedRows) {
        self.later_rows += rows.rows.len();
        self.later.push(rows);
        if self.later_rows > self.sum.rows.len() {
            self.merge();
        }
    }

    fn merge(&mut self) {
        let later = std::mem::take(&mut self.later);
        self.later_rows = 0;
        let merged = union(std::iter::once(&self.sum).chain(&later));
        if merged.len() > self.sum.rows.len() {
            self.sum = self.sum.in_rows(merged, self.row_len);
        }
        later.iter().for_each(|later| self.sum.add(later, self.row_len));
    }

    /// A copy of all rows and their sums.
    pub(crate) fn merged(&self) -> SummedRows {
        let mut merged = self.sum.in_rows(union(std::iter::once(&self.sum).chain(&self.later)), self.row_len);
        self.later.iter().for_each(|later| merged.add(later, self.row_len));
        merged
    }

    /// The sum that was such a gradient.
    pub(crate) fn of_gradient(grad: RowGrad<'static>) -> Self {
        Self::new(grad.row_len, grad.into_sums())
    }

    /// All rows and their sums, as a gradient.
    pub(crate) fn into_gradient(mut self) -> RowGrad<'static> {
        self.merge();
        RowGrad::of_sums(self.sum, self.row_len)
    }

    /// Takes rows out, which are ascending.
    pub(crate) fn remove(&mut self, rows: &[u32]) {
        self.merge();
        let kept = self.sum.rows.iter().copied().filter(|row| rows.binary_search(row).is_err()).collect();
        self.sum = self.sum.in_rows(kept, self.row_len);
    }

    /// How many bytes it takes.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |rows: &SummedRows| size_of_val::<[u32]>(&rows.rows) + rows.values.bytes();
        bytes(&self.sum) + self.later.iter().map(bytes).sum::<usize>()
    }
}

impl SummedRows {
    /// These sums in other rows, which are ascending; those that it does not have are zero.
    fn in_rows(&self, rows: Vec<u32>, row_len: usize) -> Self {
        let mut other = Self { values: self.values.zeros_like(rows.len() * row_len), rows };
        other.add(self, row_len);
        other
    }

    /// Adds the sums of the rows that both have.
    fn add(&mut self, from: &Self, row_len: usize) {
        fn add<A: Arithmetic>((rows, sums): (&[u32], &mut [A]), (from, values): (&[u32], &[A]), row_len: usize) {
            let mut k = 0;
            for (nth, row) in from.iter().enumerate() {
                // Mostly it is the next one.
                if rows.get(k).is_some_and(|own| own < row) {
                    k += rows[k..].partition_point(|own| own < row);
                }
                if rows.get(k) == Some(row) {
                    let sums = &mut sums[k * row_len..][..row_len];
                    k += 1;
                    sums.iter_mut().zip(&values[nth * row_len..]).for_each(|(sum, value)| *sum = *sum + *value);
                }
            }
        }
        match (&mut self.values, &from.values) {
            (Buffer::F32(sums), Buffer::F32(values)) => add((&self.rows, sums), (&from.rows, values), row_len),
            (Buffer::F64(sums), Buffer::F64(values)) => add((&self.rows, sums), (&from.rows, values), row_len),
            _ => unreachable!("the rows of a variable are summed in the type of its arithmetic"),
        }
    }
}

/// The rows that any of these has, ascending.
fn union<'s>(sums: impl Iterator<Item = &'s SummedRows>) -> Vec<u32> {
    let mut rows: Vec<u32> = sums.flat_map(|sums| &sums.rows).copied().collect();
    // The standard library's stable sort merges ascending runs.
    rows.sort();
    rows.dedup();
    rows
}

/// `base + unscale * grad` as a dense tensor in host memory, of the type of the arithmetic; `base` is zero if none.
pub(crate) fn densify(base: Option<&Tensor>, grad: &RowGrad<'_>, unscale: f64, var: &Tensor) -> Result<Tensor> {
    fn add<A: Arithmetic>(dense: &mut [A], rows: &[u32], values: &[A], row_len: usize, unscale: A) {
        for (k, &row) in rows.iter().enumerate() {
            let sums = &mut dense[row as usize * row_len..][..row_len];
            for (sum, &value) in sums.iter_mut().zip(&values[k * row_len..][..row_len]) {
                *sum = rule::accumulate(unscale, *sum, value);
            }
        }
    }
    let dtype = arithmetic(var.dtype());
    let base = match base {
        Some(base) => base.to_device(&Device::Cpu)?.to_dtype(dtype)?.flatten_all()?,
        None => Tensor::zeros(var.elem_count(), dtype, &Device::Cpu)?,
    };
    let SummedRows { rows, values } = grad.summed(dtype)?;
    Ok(match values {
        Buffer::F64(values) => {
            let mut dense = base.to_vec1::<f64>()?;
            add(&mut dense, &rows, &values, grad.row_len, unscale);
            Tensor::from_vec(dense, var.shape(), &Device::Cpu)?
        }
        Buffer::F32(values) => {
            let mut dense = base.to_vec1::<f32>()?;
            add(&mut dense, &rows, &values, grad.row_len, unscale as f32);
            Tensor::from_vec(dense, var.shape(), &Device::Cpu)?
        }
        Buffer::Tensor(_) => unreachable!("rows are summed in host memory"),
    })
}

/// Rows and their sums as tensors in host memory.
pub(crate) fn to_sparse(sums: SummedRows, var: &Tensor) -> Result<SparseGrad> {
    let SummedRows { rows, values } = sums;
    let mut dims = var.dims().to_vec();
    dims[0] = rows.len();
    let indices = Tensor::from_slice(&rows, rows.len(), &Device::Cpu)?;
    Ok(SparseGrad { indices, values: values.to_tensor(&dims.into())? })
}
