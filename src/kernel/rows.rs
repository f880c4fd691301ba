//! A gradient that has some rows only: which ones, and of what the gradient of each is the sum.
//!
//! Invariant: rows ascend and each is there once; the contributions to a row are added in the order in which they
//! occurred, in the type of the arithmetic. Nothing here is as large as the table.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::cuda::GpuRows;
use super::lend::{Borrowed, Elements, Source};
use super::lookup_ids::{LookupGrad, coalesce};
use crate::element::{Arithmetic, Element};
use crate::error::Result;
use crate::pages::Pages;
use crate::state::Buffer;

/// `scale` times row `source` of gradient `part`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Contribution {
    pub(crate) part: u32,
    pub(crate) source: u32,
    pub(crate) scale: f64,
}

/// The gradient of some rows of a table.
pub(crate) struct RowGrad<'g> {
    pub(crate) row_len: usize,
    pub(crate) values: RowValues<'g>,
}

/// What is known of a [`RowGrad`].
pub(crate) enum RowValues<'g> {
    /// As it occurred: the GPU that the table is on sorts and sums it.
    Unsorted(Vec<LookupGrad<'g>>),
    /// Sorted by row, and not summed up yet.
    Coalesced(Coalesced<'g>),
    /// In host memory.
    Summed(SummedRows),
}

/// Which rows, and of what each is the sum.
#[derive(Clone)]
pub(crate) struct Coalesced<'g> {
    pub(crate) rows: Vec<u32>,
    /// Row k is the sum of the contributions from `starts[k]` to `starts[k + 1]`.
    pub(crate) starts: Vec<u32>,
    pub(crate) contributions: Vec<Contribution>,
    pub(crate) parts: Vec<Cow<'g, Tensor>>,
}

/// Which rows, and their values one after another, in the type of the arithmetic.
pub(crate) struct SummedRows {
    pub(crate) rows: Vec<u32>,
    pub(crate) values: Buffer,
}

/// Rows that are about to catch up, or that were updated.
pub(crate) enum Touched<'x> {
    /// Ascending, each once.
    Rows(&'x [u32]),
    /// On the GPU, as they occurred.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by the CUDA kernels"))]
    OnGpu(Vec<GpuRows>),
}

impl<'g> RowGrad<'g> {
    pub(crate) fn coalesced(parts: &[LookupGrad<'g>], row_len: usize) -> Result<Self> {
        Ok(Self { row_len, values: RowValues::Coalesced(coalesce(parts)?) })
    }

    pub(crate) fn of_sums(sums: SummedRows, row_len: usize) -> Self {
        Self { row_len, values: RowValues::Summed(sums) }
    }
}

impl RowGrad<'_> {
    /// Which rows it has, if the host knows them.
    pub(crate) fn rows(&self) -> Option<&[u32]> {
        match &self.values {
            RowValues::Coalesced(Coalesced { rows, .. }) | RowValues::Summed(SummedRows { rows, .. }) => Some(rows),
            RowValues::Unsorted(_) => None,
        }
    }

    /// Which rows it has, of a variable on `device`.
    pub(crate) fn touched(&self, device: &Device) -> Result<Touched<'_>> {
        match &self.values {
            RowValues::Coalesced(Coalesced { rows, .. }) | RowValues::Summed(SummedRows { rows, .. }) => {
                Ok(Touched::Rows(rows))
            }
            RowValues::Unsorted(parts) => {
                let rows = parts.iter().map(|part| GpuRows::trained(&part.lookup_ids, device));
                Ok(Touched::OnGpu(rows.collect::<Result<_>>()?))
            }
        }
    }

    /// The sums, which have been [made](Self::sum).
    pub(crate) fn sums(&self) -> &SummedRows {
        match &self.values {
            RowValues::Summed(sums) => sums,
            RowValues::Unsorted(_) | RowValues::Coalesced(_) => {
                unreachable!("rows are summed before they are measured")
            }
        }
    }

    pub(crate) fn into_sums(self) -> SummedRows {
        match self.values {
            RowValues::Summed(sums) => sums,
            RowValues::Unsorted(_) | RowValues::Coalesced(_) => unreachable!("made of sums"),
        }
    }

    /// Locks what the values are read from.
    pub(crate) fn borrow(&self) -> candle_core::Result<Vec<Borrowed<'_>>> {
        match &self.values {
            RowValues::Coalesced(Coalesced { parts, .. }) => {
                parts.iter().map(|part| Source::Tensor(part).borrow()).collect()
            }
            RowValues::Summed(SummedRows { values, .. }) => Ok(vec![Source::Buffer(values).borrow()?]),
            RowValues::Unsorted(_) => candle_core::bail!("the rows are not in host memory"),
        }
    }

    /// The rows and their values, where `borrowed` is from [`borrow`](Self::borrow).
    pub(crate) fn view<'x>(&'x self, borrowed: &'x [Borrowed<'_>]) -> candle_core::Result<RowsView<'x>> {
        let parts = borrowed.iter().map(Borrowed::elements).collect::<candle_core::Result<Vec<_>>>()?;
        let (rows, sums) = match &self.values {
            RowValues::Coalesced(Coalesced { rows, starts, contributions, .. }) => {
                (rows, Some((starts.as_slice(), contributions.as_slice())))
            }
            RowValues::Summed(SummedRows { rows, .. }) => (rows, None),
            RowValues::Unsorted(_) => candle_core::bail!("the rows are not in host memory"),
        };
        Ok(RowsView { rows, row_len: self.row_len, sums, parts })
    }

    /// The same with all sums made, in the type of the arithmetic on `dtype`, in host memory; waits for a GPU that has it.
    pub(crate) fn summed(&self, dtype: DType) -> Result<SummedRows> {
        let row_len = self.row_len;
        match &self.values {
            RowValues::Unsorted(parts) => return RowGrad::coalesced(parts, row_len)?.summed(dtype),
            RowValues::Coalesced(coalesced) if coalesced.parts.iter().any(|part| !part.device().is_cpu()) => {
                let parts = coalesced.parts.iter().map(|part| part.to_device(&Device::Cpu).map(Cow::Owned));
                let parts = parts.collect::<candle_core::Result<_>>()?;
                let values = RowValues::Coalesced(Coalesced { parts, ..coalesced.clone() });
                return RowGrad { row_len, values }.summed(dtype);
            }
            RowValues::Coalesced(_) | RowValues::Summed(_) => {}
        }
        let borrowed = self.borrow()?;
        let view = self.view(&borrowed)?;
        let values = match dtype {
            DType::F64 => Buffer::F64(view.sum_all()),
            _ => Buffer::F32(view.sum_all()),
        };
        Ok(SummedRows { rows: view.rows.to_vec(), values })
    }

    /// Makes all sums, unless they are made.
    pub(crate) fn sum(&mut self, dtype: DType) -> Result<()> {
        if !matches!(self.values, RowValues::Summed(_)) {
            self.values = RowValues::Summed(self.summed(dtype)?);
        }
        Ok(())
    }
}

/// Rows and their values, to be read by several threads.
pub(crate) struct RowsView<'x> {
    pub(crate) rows: &'x [u32],
    pub(crate) row_len: usize,
    sums: Option<(&'x [u32], &'x [Contribution])>,
    parts: Vec<Elements<'x>>,
}

impl RowsView<'_> {
    /// The gradient of the `k`-th row; `scratch` is as long as a row.
    #[inline(always)]
    pub(crate) fn row<'s, A: Summand>(&'s self, k: usize, scratch: &'s mut [A]) -> &'s [A] {
        let Some((starts, contributions)) = self.sums else {
            return match self.parts.first().and_then(|part| A::slice(*part)) {
                Some(values) => &values[k * self.row_len..][..self.row_len],
                None => scratch,
            };
        };
        let contributions = &contributions[starts[k] as usize..starts[k + 1] as usize];
        if let [Contribution { part, source, scale: 1.0 }] = *contributions
            && let Some(values) = A::slice(self.parts[part as usize])
        {
            return &values[source as usize * self.row_len..][..self.row_len];
        }
        for (nth, &Contribution { part, source, scale }) in contributions.iter().enumerate() {
            A::add_row(
                self.parts[part as usize],
                source as usize * self.row_len,
                A::from_f64(scale),
                nth == 0,
                scratch,
            );
        }
        scratch
    }

    /// Where the values of the `k`-th row begin, if they are in one place: to be fetched ahead.
    #[inline(always)]
    pub(crate) fn first<A: Summand>(&self, k: usize) -> Option<&[A]> {
        let (part, source) = match self.sums {
            Some((starts, contributions)) => {
                let first = contributions.get(starts[k] as usize)?;
                (first.part as usize, first.source as usize)
            }
            None => (0, k),
        };
        A::slice(*self.parts.get(part)?)?.get(source * self.row_len..(source + 1) * self.row_len)
    }

    fn sum_all<A: Summand + bytemuck::Pod>(&self) -> Pages<A> {
        let mut all = Pages::zeros(self.rows.len() * self.row_len);
        if self.row_len > 0 {
            let mut scratch = vec![A::ZERO; self.row_len];
            for (k, values) in all.chunks_exact_mut(self.row_len).enumerate() {
                values.copy_from_slice(self.row(k, &mut scratch));
            }
        }
        all
    }
}

/// A type of arithmetic in which contributions are summed.
pub(crate) trait Summand: Arithmetic {
    /// The elements, if they are of this type.
    fn slice(elements: Elements<'_>) -> Option<&[Self]>;

    /// Adds `scale` times the elements from `start` on to `sum`, or sets it to them if they are the `first`.
    fn add_row(elements: Elements<'_>, start: usize, scale: Self, first: bool, sum: &mut [Self]);
}

impl Summand for f32 {
    #[inline(always)]
    fn slice(elements: Elements<'_>) -> Option<&[Self]> {
        match elements {
            Elements::F32(values) => Some(values),
            _ => None,
        }
    }

    #[inline(always)]
    fn add_row(elements: Elements<'_>, start: usize, scale: Self, first: bool, sum: &mut [Self]) {
        match elements {
            Elements::F32(values) => add_scaled::<f32>(values, start, scale, first, sum),
            Elements::F16(values) => add_scaled::<f16>(values, start, scale, first, sum),
            Elements::BF16(values) => add_scaled::<bf16>(values, start, scale, first, sum),
            // Checked where gradients are collected.
            Elements::F64(_) => {}
        }
    }
}

impl Summand for f64 {
    #[inline(always)]
    fn slice(elements: Elements<'_>) -> Option<&[Self]> {
        match elements {
            Elements::F64(values) => Some(values),
            _ => None,
        }
    }

    #[inline(always)]
    fn add_row(elements: Elements<'_>, start: usize, scale: Self, first: bool, sum: &mut [Self]) {
        if let Elements::F64(values) = elements {
            add_scaled::<f64>(values, start, scale, first, sum);
        }
    }
}

#[inline(always)]
fn add_scaled<E: Element>(values: &[E], start: usize, scale: E::Acc, first: bool, sum: &mut [E::Acc]) {
    for (sum, value) in sum.iter_mut().zip(&values[start..]) {
        let value = value.widen() * scale;
        *sum = if first { value } else { *sum + value };
    }
}
