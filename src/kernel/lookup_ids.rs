//! The rows of a table that lookups touch, and the contributions of lookups to the gradient of each row.
//!
//! Invariant: a sort by row is stable, so the contributions to a row stay in the order in which they occurred, over all
//! lookups of a step; and it comes before norms and clipping.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use super::cuda::GpuIds;
use super::rows::{Coalesced, Contribution};
use crate::error::{Error, Result};

/// The rows of a table that a lookup touched, and where their gradients will be.
pub(crate) enum LookupIds {
    Host(HostIds),
    /// On the GPU of the table.
    Gpu(Box<GpuIds>),
}

impl LookupIds {
    /// How many contributions there are, if not fewer.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(listed) => listed.ids.len(),
            Self::Gpu(ids) => ids.len(),
        }
    }

    /// Makes sure that each id is a row of the table: where only the GPU knows, it is asked.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Gpu(ids) => ids.check(),
        }
    }

    /// In host memory; waits for a GPU that has them.
    pub(crate) fn listed(&self) -> Result<&HostIds> {
        match self {
            Self::Host(listed) => Ok(listed),
            Self::Gpu(ids) => ids.listed(),
        }
    }
}

/// [`LookupIds`] in host memory.
pub(crate) struct HostIds {
    /// One for each contribution, in order of occurrence.
    ids: Vec<u32>,
    /// From which row of the lookup's gradient each one comes; if none, they come one from each.
    sources: Option<Vec<u32>>,
    /// What each one is multiplied with; if none, 1.
    scales: Option<Vec<f64>>,
    /// `id << 32 | position`, ascending: sorted once, however often it is asked for.
    sorted: OnceLock<Vec<u64>>,
}

impl HostIds {
    pub(crate) fn new(ids: Vec<u32>, sources: Option<Vec<u32>>, scales: Option<Vec<f64>>) -> Self {
        Self { ids, sources, scales, sorted: OnceLock::new() }
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn scales(&self) -> Option<&[f64]> {
        self.scales.as_deref()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn sources(&self) -> Option<&[u32]> {
        self.sources.as_deref()
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

/// The gradient of a lookup, and to which rows it contributes.
pub(crate) struct LookupGrad<'g> {
    pub(crate) grad: Cow<'g, Tensor>,
    pub(crate) lookup_ids: Arc<LookupIds>,
}

/// How many contributions the parts have together.
///
/// # Errors
///
/// More than positions have bits.
pub(crate) fn total(parts: &[LookupGrad<'_>]) -> Result<usize> {
    let total = parts.iter().map(|part| part.lookup_ids.len()).sum();
    match u32::try_from(total) {
        Ok(_) => Ok(total),
        Err(_) => Err(Error::invalid("ids", "at most 4294967295 ids of one table in a step", total)),
    }
}

/// All contributions of a step to one table, by rows. Nothing is summed up yet.
pub(crate) fn coalesce<'g>(parts: &[LookupGrad<'g>]) -> Result<Coalesced<'g>> {
    total(parts)?;
    let lists = parts.iter().map(|part| part.lookup_ids.listed()).collect::<Result<Vec<_>>>()?;
    let mut ends = Vec::with_capacity(parts.len());
    for list in &lists {
        ends.push(ends.last().copied().unwrap_or(0) + list.ids.len());
    }
    let merged: Vec<u64>;
    let keys = match lists.as_slice() {
        [list] => list.sorted(),
        _ => {
            let begins = std::iter::once(0).chain(ends.iter().map(|&end| end as u64));
            let keys =
                lists.iter().zip(begins).flat_map(|(list, begin)| list.sorted().iter().map(move |key| key + begin));
            let mut keys: Vec<u64> = keys.collect();
            // The standard library's stable sort finds the sorted runs and merges them.
            keys.sort();
            merged = keys;
            &merged
        }
    };
    let (mut rows, mut starts) = (Vec::with_capacity(keys.len()), Vec::with_capacity(keys.len() + 1));
    let mut contributions = Vec::with_capacity(keys.len());
    for &key in keys {
        let (row, position) = ((key >> 32) as u32, key as u32 as usize);
        if rows.last() != Some(&row) {
            rows.push(row);
            starts.push(contributions.len() as u32);
        }
        let part = if parts.len() == 1 { 0 } else { ends.partition_point(|&end| end <= position) };
        let (source, scale) = lists[part].contribution(position - (ends[part] - lists[part].ids.len()));
        contributions.push(Contribution { part: part as u32, source, scale });
    }
    starts.push(contributions.len() as u32);
    let parts = parts.iter().map(|part| part.grad.clone()).collect();
    Ok(Coalesced { rows, starts, contributions, parts })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
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

        #[test]
        fn every_contribution_is_there_once_in_order_of_occurrence(
            lookups in prop::collection::vec(prop::collection::vec(0u32..20, 0..40), 1..5),
        ) {
            let grad = || Cow::Owned(Tensor::zeros((40, 1), DType::F32, &Device::Cpu).expect("small"));
            let parts = lookups.iter().map(|ids| {
                LookupGrad { grad: grad(), lookup_ids: Arc::new(LookupIds::Host(HostIds::new(ids.clone(), None, None))) }
            });
            let coalesced = coalesce(&parts.collect::<Vec<_>>()).expect("few ids");
            let mut expected: Vec<(u32, u32, u32)> = Vec::new();
            for (part, ids) in lookups.iter().enumerate() {
                expected.extend(ids.iter().zip(0..).map(|(&id, source)| (id, part as u32, source)));
            }
            expected.sort();
            let Coalesced { rows, starts, contributions, .. } = coalesced;
            let mut got = Vec::new();
            for (k, &row) in rows.iter().enumerate() {
                let of_row = &contributions[starts[k] as usize..starts[k + 1] as usize];
                got.extend(of_row.iter().map(|c| (row, c.part, c.source)));
                prop_assert!(!of_row.is_empty());
            }
            prop_assert!(rows.is_sorted_by(|a, b| a < b));
            prop_assert_eq!(got, expected);
        }
    }
}
