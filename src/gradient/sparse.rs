//! Gradients of rows: as a caller gives them, accumulated, and as dense ones.

use candle_core::{DType, Device, Tensor};

use crate::element::Arithmetic;
use crate::error::{Error, ErrorKind, Result};
use crate::kernel::{RowGrad, RowValues, SummedRows};
use crate::pages::Pages;
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
pub enum TouchedRows<'a> {
    /// These: the ids of the batch, in any shape, of any integer dtype, with repetitions.
    Ids(&'a Tensor),
    /// Those that are not all zero. The gradient is read to find them.
    NonZero,
}

/// Adds `unscale` times `grad` to an accumulated sum: a merge of two ascending lists of rows.
pub(crate) fn accumulate(
    sum: Option<&RowGrad<'_>>,
    grad: &RowGrad<'_>,
    unscale: f64,
    dtype: DType,
) -> Result<RowGrad<'static>> {
    let row_len = grad.row_len;
    let grads = grad.summed(dtype)?;
    let before = match sum {
        Some(sum) => sum.summed(dtype)?,
        None => SummedRows { rows: Vec::new(), values: grads.values.empty() },
    };
    let (rows, values) = match (&before.values, &grads.values) {
        (Buffer::F32(sums), Buffer::F32(values)) => {
            let (rows, values) = merge((&before.rows, sums), (&grads.rows, values), row_len, unscale as f32);
            (rows, Buffer::F32(values))
        }
        (Buffer::F64(sums), Buffer::F64(values)) => {
            let (rows, values) = merge((&before.rows, sums), (&grads.rows, values), row_len, unscale);
            (rows, Buffer::F64(values))
        }
        _ => unreachable_dtype()?,
    };
    Ok(RowGrad { row_len, values: RowValues::Summed(SummedRows { rows, values }) })
}

fn unreachable_dtype<T>() -> candle_core::Result<T> {
    candle_core::bail!("rows of a table are summed in one type of arithmetic")
}

/// Rows and values of `sums + unscale * grads`.
fn merge<A: Arithmetic + bytemuck::Pod>(
    (summed, sums): (&[u32], &[A]),
    (rows, grads): (&[u32], &[A]),
    row_len: usize,
    unscale: A,
) -> (Vec<u32>, Pages<A>) {
    let mut merged: Vec<u32> = [summed, rows].concat();
    merged.sort();
    merged.dedup();
    let mut values = Pages::zeros(merged.len() * row_len);
    let (mut of_sum, mut of_grad) = (0, 0);
    for (k, &row) in merged.iter().enumerate() {
        let value = &mut values[k * row_len..][..row_len];
        if summed.get(of_sum) == Some(&row) {
            value.copy_from_slice(&sums[of_sum * row_len..][..row_len]);
            of_sum += 1;
        }
        if rows.get(of_grad) == Some(&row) {
            for (sum, &grad) in value.iter_mut().zip(&grads[of_grad * row_len..][..row_len]) {
                *sum = rule::accumulate(unscale, *sum, grad);
            }
            of_grad += 1;
        }
    }
    (merged, values)
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
        Buffer::Tensor(_) => unreachable_dtype()?,
    })
}

/// Accumulated rows as tensors in host memory.
pub(crate) fn to_sparse(rows: &RowGrad<'_>, var: &Tensor) -> Result<SparseGrad> {
    let SummedRows { rows, values } = rows.summed(var.dtype())?;
    let mut dims = var.dims().to_vec();
    dims[0] = rows.len();
    let indices = Tensor::from_slice(&rows, rows.len(), &Device::Cpu)?;
    Ok(SparseGrad { indices, values: values.to_tensor(&dims.into())? })
}

/// What ids are, for errors about them: the `what` of the variable `of`, or of nobody if that is empty.
#[derive(Clone, Copy)]
pub(crate) struct IdsOf<'n> {
    pub(crate) what: &'static str,
    pub(crate) of: &'n str,
}

/// The ids of a lookup, and those that a method of a table is given.
pub(crate) const IDS: IdsOf<'_> = IdsOf { what: "ids", of: "" };

/// The integers of `ids`, each checked to be a row of a table that has `rows`.
pub(crate) fn read_ids(what: IdsOf<'_>, ids: &Tensor, rows: usize) -> Result<Vec<u32>> {
    fn check<T: Copy + Into<i64>>(what: IdsOf<'_>, shape: &[usize], values: &[T], rows: usize) -> Result<Vec<u32>> {
        let mut checked = Vec::with_capacity(values.len());
        for (position, &value) in values.iter().enumerate() {
            let id: i64 = value.into();
            // Compared before it is narrowed, so that nothing wraps around into the table.
            match u32::try_from(id) {
                Ok(row) if (row as usize) < rows => checked.push(row),
                _ => {
                    let what = match what {
                        IdsOf { what, of: "" } => what.to_owned(),
                        IdsOf { what, of } => format!("the {what} of `{of}`"),
                    };
                    let position = index(position, shape);
                    return Err(ErrorKind::IdOutOfRange { what, id, position, rows }.into());
                }
            }
        }
        Ok(checked)
    }
    let flat = ids.to_device(&Device::Cpu)?.flatten_all()?;
    let shape = ids.dims();
    match flat.dtype() {
        DType::U8 => check(what, shape, &flat.to_vec1::<u8>()?, rows),
        DType::U32 => check(what, shape, &flat.to_vec1::<u32>()?, rows),
        DType::I16 => check(what, shape, &flat.to_vec1::<i16>()?, rows),
        DType::I32 => check(what, shape, &flat.to_vec1::<i32>()?, rows),
        DType::I64 => check(what, shape, &flat.to_vec1::<i64>()?, rows),
        got => {
            let IdsOf { what, of } = what;
            let (name, expected) = (of.to_owned(), "an integer dtype".to_owned());
            Err(ErrorKind::DTypeMismatch { what, name, expected, got }.into())
        }
    }
}

/// The position of element `flat` in a tensor of this shape.
fn index(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let i = flat % n;
            flat /= n;
            i
        })
        .collect();
    index.reverse();
    index
}

/// How many rows a tensor has; they are numbered with 32 bits.
pub(crate) fn rows_of(name: &str, tensor: &Tensor) -> Result<usize> {
    match tensor.dims() {
        [] => Err(Error::invalid(name, "a tensor with rows, that is of rank 1 or more", "a scalar")),
        [rows, ..] if u32::try_from(*rows).is_err() => Err(Error::invalid("rows", "at most 4294967295 rows", rows)),
        [rows, ..] => Ok(*rows),
    }
}

/// The elements of one row.
pub(crate) fn row_len(tensor: &Tensor) -> usize {
    tensor.dims().iter().skip(1).product()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_named_in_the_shape_of_the_ids() {
        assert_eq!(index(0, &[]), Vec::<usize>::new());
        assert_eq!(index(5, &[7]), [5]);
        assert_eq!(index(17, &[2, 3, 4]), [1, 1, 1]);
    }
}
