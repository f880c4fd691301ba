//! Lookups in tables in host memory: from tensors to slices, for every dtype.

use candle_core::{CpuStorage, Layout, Result, Tensor, bail};

use super::cpu::{self, gather};
use super::lend::{Elements, ElementsMut, Source, elements_of, lend};
use super::lookup_ids::HostIds;
use crate::element::Element;
use crate::mark::Checksum;
use crate::pages;
use crate::reduce::Norm;
use crate::state::written;

/// Runs `$body` with the slice of elements, and makes a storage of the vector that comes back.
macro_rules! with_storage {
    ($elements:expr, $values:ident => $body:expr) => {
        match $elements {
            Elements::F64($values) => CpuStorage::F64($body),
            Elements::F32($values) => CpuStorage::F32($body),
            Elements::F16($values) => CpuStorage::F16($body),
            Elements::BF16($values) => CpuStorage::BF16($body),
        }
    };
}

/// The rows `ids` of a table, one after another.
pub(crate) fn gather(table: &Tensor, row_len: usize, ids: &[u32]) -> Result<CpuStorage> {
    let borrowed = Source::Tensor(table).borrow()?;
    Ok(with_storage!(borrowed.elements()?, table => gather::gather(table, row_len, ids)))
}

/// One row for each bag: the sum or mean of the bag's rows, each times its factor.
pub(crate) fn pool(
    table: &Tensor,
    row_len: usize,
    ids: &[u32],
    starts: &[u32],
    factors: Option<&[f64]>,
    mean: bool,
) -> Result<CpuStorage> {
    let borrowed = Source::Tensor(table).borrow()?;
    Ok(
        with_storage!(borrowed.elements()?, table => gather::Pool { table, row_len, ids, starts, factors, mean }.pooled()?),
    )
}

/// The gradients of the factors of a pooled lookup, from that of its result and the `rows` that were looked up.
pub(crate) fn dot_rows(rows: &Tensor, grad: &Tensor, row_len: usize, lookup_ids: &HostIds) -> Result<CpuStorage> {
    fn dots<E: Element>(rows: &[E], grad: &[E], row_len: usize, lookup_ids: &HostIds) -> Vec<E> {
        let bags = (0..lookup_ids.ids().len()).map(|position| lookup_ids.contribution(position).0);
        gather::dot_rows(rows, grad, row_len, bags)
    }
    let (rows, grad) = (Source::Tensor(rows).borrow()?, Source::Tensor(grad).borrow()?);
    Ok(match (rows.elements()?, grad.elements()?) {
        (Elements::F64(rows), Elements::F64(grad)) => CpuStorage::F64(dots(rows, grad, row_len, lookup_ids)),
        (Elements::F32(rows), Elements::F32(grad)) => CpuStorage::F32(dots(rows, grad, row_len, lookup_ids)),
        (Elements::F16(rows), Elements::F16(grad)) => CpuStorage::F16(dots(rows, grad, row_len, lookup_ids)),
        (Elements::BF16(rows), Elements::BF16(grad)) => CpuStorage::BF16(dots(rows, grad, row_len, lookup_ids)),
        _ => bail!("the gradient of a lookup has another dtype than its table"),
    })
}

/// The largest element of each column of each bag, and in which row it is.
pub(crate) fn largest(
    (storage, layout): (&CpuStorage, &Layout),
    row_len: usize,
    starts: &[u32],
) -> Result<(CpuStorage, Vec<u32>)> {
    fn pick<E: Element + Default>(values: &[E], row_len: usize, positions: &[u32]) -> Vec<E> {
        let value = |(i, &row): (usize, &u32)| values.get(row as usize * row_len + i % row_len).copied();
        positions.iter().enumerate().map(|each| value(each).unwrap_or_default()).collect()
    }
    let elements = elements_of(storage, layout)?;
    let positions = match elements {
        Elements::F64(values) => gather::largest(values, row_len, starts),
        Elements::F32(values) => gather::largest(values, row_len, starts),
        Elements::F16(values) => gather::largest(values, row_len, starts),
        Elements::BF16(values) => gather::largest(values, row_len, starts),
    };
    Ok((with_storage!(elements, values => pick(values, row_len, &positions)), positions))
}

/// The gradient of what [`largest`] was given, `rows` rows: each element of `grad` goes to where its value came from.
pub(crate) fn largest_backward(grad: &Tensor, row_len: usize, positions: &[u32], rows: usize) -> Result<CpuStorage> {
    fn scatter<E: Element + Default>(grad: &[E], row_len: usize, positions: &[u32], rows: usize) -> Vec<E> {
        let mut scattered = vec![E::default(); rows * row_len];
        for (i, (&grad, &row)) in grad.iter().zip(positions).enumerate() {
            if row != u32::MAX {
                scattered[row as usize * row_len + i % row_len] = grad;
            }
        }
        scattered
    }
    let borrowed = Source::Tensor(grad).borrow()?;
    Ok(with_storage!(borrowed.elements()?, grad => scatter(grad, row_len, positions, rows)))
}

/// The norm that a lookup saw of a row, and what it is to be scaled down to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) norm: Norm,
    pub(crate) max_norm: f64,
}

/// Scales gathered rows down to the L2 norm `max_norm`. Returns the ids of those that were above it, with their norms.
pub(crate) fn limit(gathered: &mut CpuStorage, row_len: usize, ids: &[u32], max_norm: f64) -> Result<Vec<(u32, Norm)>> {
    Ok(match gathered {
        CpuStorage::F64(values) => gather::limit(values, row_len, ids, max_norm),
        CpuStorage::F32(values) => gather::limit(values, row_len, ids, max_norm),
        CpuStorage::F16(values) => gather::limit(values, row_len, ids, max_norm),
        CpuStorage::BF16(values) => gather::limit(values, row_len, ids, max_norm),
        _ => bail!("expected rows of floating point"),
    })
}

/// Scales noted rows of a variable down, which still have the norm that was noted. Returns their numbers.
///
/// Masters follow only the elements that have changed: a row at the limit, whose scaled elements round to their old values,
/// would otherwise lose all steps that are smaller than its rounding.
pub(crate) fn scale_down(table: &Tensor, row_len: usize, noted: &[(u32, Limit)]) -> crate::error::Result<Vec<u32>> {
    let is_followed = written::is_followed(table);
    let mut changed = Vec::new();
    let mut note = |row, column| {
        if is_followed {
            changed.push((row, column));
        }
    };
    let scaled = lend(table, |elements| {
        Ok(match elements {
            ElementsMut::F64(table) => gather::scale_noted(table, row_len, noted, |_, _| {}),
            ElementsMut::F32(table) => gather::scale_noted(table, row_len, noted, |_, _| {}),
            ElementsMut::F16(table) => gather::scale_noted(table, row_len, noted, &mut note),
            ElementsMut::BF16(table) => gather::scale_noted(table, row_len, noted, &mut note),
        })
    })?;
    if !changed.is_empty() {
        written::elements(table, &changed);
    }
    Ok(scaled)
}

/// The checksums of the rows `ids`.
pub(crate) fn checksums(table: &Tensor, row_len: usize, ids: &[u32]) -> Result<Vec<Checksum>> {
    let borrowed = Source::Tensor(table).borrow()?;
    Ok(cpu::checksums(borrowed.elements()?, row_len, ids))
}

/// Asks for large pages under a large table.
pub(crate) fn advise_huge_pages(table: &Tensor) -> Result<()> {
    let borrowed = Source::Tensor(table).borrow()?;
    match borrowed.elements()? {
        Elements::F64(values) => pages::advise_huge_pages(values),
        Elements::F32(values) => pages::advise_huge_pages(values),
        Elements::F16(values) => pages::advise_huge_pages(values),
        Elements::BF16(values) => pages::advise_huge_pages(values),
    }
    Ok(())
}

/// The elements of a contiguous tensor.
pub(crate) fn copy(tensor: &Tensor) -> Result<CpuStorage> {
    let borrowed = Source::Tensor(tensor).borrow()?;
    Ok(with_storage!(borrowed.elements()?, values => values.to_vec()))
}
