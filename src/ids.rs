//! Rows of tensors, and ids that name them.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, ErrorKind, Result};

/// Name of ids, for errors about them: the `what` of the variable `of`, or of nobody if that is empty.
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
