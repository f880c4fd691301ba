//! A gradient that has some rows only: which ones, and of what the gradient of each is the sum.
//!
//! Invariant: rows ascend and each is there once; the contributions to a row are added in the order in which they
//! occurred, in the type of the arithmetic. Nothing here is as large as the table.

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::lend::{Borrowed, Elements, Source};
use crate::element::{Arithmetic, Element};
use crate::pages::Pages;
use crate::state::Buffer;

/// The rows of a table that a lookup touched, and where their gradients will be.
pub(crate) struct Occurrences {
    /// One for each contribution, in order of occurrence.
    ids: Vec<u32>,
    /// From which row of the lookup's gradient each one comes; if none, they come one from each.
    sources: Option<Vec<u32>>,
    /// What each one is multiplied with; if none, 1.
    scales: Option<Vec<f64>>,
    /// `id << 32 | position`, ascending: sorted once, however often it is asked for.
    sorted: OnceLock<Vec<u64>>,
}

impl Occurrences {
    pub(crate) fn new(ids: Vec<u32>, sources: Option<Vec<u32>>, scales: Option<Vec<f64>>) -> Self {
        Self { ids, sources, scales, sorted: OnceLock::new() }
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn scales(&self) -> Option<&[f64]> {
        self.scales.as_deref()
    }

    /// Row of the gradient and factor of each contribution.
    pub(crate) fn contribution(&self, position: usize) -> (u32, f64) {
        let source = self.sources.as_ref().map_or(position as u32, |sources| sources[position]);
        (source, self.scales.as_ref().map_or(1.0, |scales| scales[position]))
    }

    /// `id << 32 | position`, ascending.
    pub(crate) fn sorted(&self) -> &[u64] {
        self.sorted.get_or_init(|| sort(&self.ids))
    }

    /// Each id once, ascending.
    pub(crate) fn unique(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.sorted().iter().map(|key| (key >> 32) as u32).collect();
        ids.dedup();
        ids
    }
}

/// `id << 32 | position` for each id, ascending: a radix sort, which is stable, over the bits that the ids have.
fn sort(ids: &[u32]) -> Vec<u64> {
    const DIGIT: u32 = 11;
    let mut keys: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, position)| u64::from(id) << 32 | position).collect();
    if keys.len() < 256 {
        keys.sort_unstable(); // no two keys are equal
        return keys;
    }
    let bits = u32::BITS - ids.iter().fold(0, |all, id| all | id).leading_zeros();
    let mut sorted = vec![0; keys.len()];
    for shift in (32..32 + bits).step_by(DIGIT as usize) {
        let digit = |key: u64| (key >> shift) as usize & ((1 << DIGIT) - 1);
        let mut places = [0u32; 1 << DIGIT];
        keys.iter().for_each(|&key| places[digit(key)] += 1);
        let mut place = 0;
        for count in &mut places {
            place += std::mem::replace(count, place);
        }
        for &key in &keys {
            let place = &mut places[digit(key)];
            sorted[*place as usize] = key;
            *place += 1;
        }
        std::mem::swap(&mut keys, &mut sorted);
    }
    keys
}

/// `scale` times row `source` of gradient `part`; kernels in `cuda/rows.cu` read it, too.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Contribution {
    pub(crate) part: u32,
    pub(crate) source: u32,
    pub(crate) scale: f64,
}

/// The gradient of some rows of a table.
pub(crate) struct RowGrad<'g> {
    pub(crate) rows: Vec<u32>,
    pub(crate) row_len: usize,
    pub(crate) values: RowValues<'g>,
}

/// Where the values of a [`RowGrad`] are.
pub(crate) enum RowValues<'g> {
    /// Not summed up yet: row k is the sum of the contributions from `starts[k]` to `starts[k + 1]`.
    Lazy { starts: Vec<u32>, contributions: Vec<Contribution>, parts: Vec<Cow<'g, Tensor>> },
    /// One after another, in host memory.
    Summed(Buffer),
}

impl RowGrad<'_> {
    /// Locks what the values are read from.
    pub(crate) fn borrow(&self) -> candle_core::Result<Vec<Borrowed<'_>>> {
        match &self.values {
            RowValues::Lazy { parts, .. } => parts.iter().map(|part| Source::Tensor(part).borrow()).collect(),
            RowValues::Summed(buffer) => Ok(vec![Source::Buffer(buffer).borrow()?]),
        }
    }

    /// How many bytes it keeps of its own.
    pub(crate) fn bytes(&self) -> usize {
        let values = match &self.values {
            RowValues::Lazy { starts, contributions, .. } => {
                size_of_val::<[u32]>(starts) + size_of_val::<[Contribution]>(contributions)
            }
            RowValues::Summed(sums) => sums.bytes(),
        };
        size_of_val::<[u32]>(&self.rows) + values
    }

    /// The rows and their values, where `borrowed` is from [`borrow`](Self::borrow).
    pub(crate) fn view<'x>(&'x self, borrowed: &'x [Borrowed<'_>]) -> candle_core::Result<RowsView<'x>> {
        let parts = borrowed.iter().map(Borrowed::elements).collect::<candle_core::Result<Vec<_>>>()?;
        let sums = match &self.values {
            RowValues::Lazy { starts, contributions, .. } => Some((starts.as_slice(), contributions.as_slice())),
            RowValues::Summed(_) => None,
        };
        Ok(RowsView { rows: &self.rows, row_len: self.row_len, sums, parts })
    }

    /// Takes rows out, which are ascending; of sums that have been made.
    pub(crate) fn remove(&mut self, rows: &[u32]) {
        fn keep<A: bytemuck::Pod>(values: &Pages<A>, kept: &[usize], row_len: usize) -> Pages<A> {
            let mut pages = Pages::zeros(kept.len() * row_len);
            for (to, &from) in kept.iter().enumerate() {
                pages[to * row_len..][..row_len].copy_from_slice(&values[from * row_len..][..row_len]);
            }
            pages
        }
        let kept: Vec<usize> = (0..self.rows.len()).filter(|&k| rows.binary_search(&self.rows[k]).is_err()).collect();
        match &mut self.values {
            RowValues::Summed(Buffer::F32(values)) => *values = keep(values, &kept, self.row_len),
            RowValues::Summed(Buffer::F64(values)) => *values = keep(values, &kept, self.row_len),
            // Accumulated rows are always summed, and in host memory.
            RowValues::Summed(Buffer::Tensor(_)) | RowValues::Lazy { .. } => return,
        }
        self.rows = kept.iter().map(|&k| self.rows[k]).collect();
    }

    /// The same with all sums made, in the type of the arithmetic on `dtype`, in host memory.
    pub(crate) fn summed(&self, dtype: DType) -> candle_core::Result<Buffer> {
        if let RowValues::Lazy { starts, contributions, parts } = &self.values
            && parts.iter().any(|part| !part.device().is_cpu())
        {
            let parts = parts.iter().map(|part| part.to_device(&Device::Cpu).map(Cow::Owned));
            let (starts, contributions) = (starts.clone(), contributions.clone());
            let values = RowValues::Lazy { starts, contributions, parts: parts.collect::<candle_core::Result<_>>()? };
            return RowGrad { rows: self.rows.clone(), row_len: self.row_len, values }.summed(dtype);
        }
        let borrowed = self.borrow()?;
        let view = self.view(&borrowed)?;
        Ok(match dtype {
            DType::F64 => Buffer::F64(view.sum_all()),
            _ => Buffer::F32(view.sum_all()),
        })
    }

    /// Makes all sums, unless they are made.
    pub(crate) fn sum(&mut self, dtype: DType) -> candle_core::Result<&Buffer> {
        if let RowValues::Lazy { .. } = self.values {
            self.values = RowValues::Summed(self.summed(dtype)?);
        }
        match &self.values {
            RowValues::Summed(buffer) => Ok(buffer),
            RowValues::Lazy { .. } => candle_core::bail!("the rows have not been summed"),
        }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_radix_sort_is_the_stable_sort(
            ids in prop::collection::vec(0u32..u32::MAX, 0..2000),
            bits in 0u32..33,
        ) {
            let ids: Vec<u32> = ids.into_iter().map(|id| id.checked_shr(bits).unwrap_or(0)).collect();
            let mut expected: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
            expected.sort();
            let got: Vec<(u32, usize)> = sort(&ids).iter().map(|&key| ((key >> 32) as u32, key as u32 as usize)).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
