//! Which lookups a gradient can still belong to, of all tables.
//!
//! Invariant: a record lives as long as something that can lead to its gradient: the graph, or a gradient in a
//! `GradStore`, which own it. There is one case in which a gradient loses what owns its record: two gradients of one
//! anchor that `GradStore::extend` adds. So records that are differentiated more than once are kept here, up to a
//! limit, and a gradient whose record has been given up is an error and never passed over.
//!
//! A step asks for the ids in its own `GradStore`, so its cost depends on neither the number of tables nor on what the
//! process has done before.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::TensorId;
use candle_core::backprop::GradStore;

use super::Shared;
use crate::error::{ErrorKind, Result};
use crate::kernel::{LookupGrad, LookupIds};
use crate::maps::IdMap;

/// So many records are kept, of so many ids together.
const KEPT: usize = 4096;
const KEPT_IDS: usize = 1 << 24;
/// Of so many records it is known that they were given up.
const GIVEN_UP: usize = 1 << 16;

static RECORDS: LazyLock<Mutex<Records>> = LazyLock::new(Mutex::default);
/// Counts lookups, whose order is that of the contributions to a row.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The rows that one lookup touched.
#[derive(Clone)]
pub(super) struct Lookup {
    /// The leaf of the graph that takes the gradient.
    pub(super) anchor: TensorId,
    pub(super) number: u64,
    pub(super) lookup_ids: Arc<LookupIds>,
}

impl Lookup {
    pub(super) fn new(anchor: TensorId, lookup_ids: Arc<LookupIds>) -> Self {
        Self { anchor, number: NEXT.fetch_add(1, Ordering::Relaxed), lookup_ids }
    }

    /// The ids of a lookup in a table on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self) -> candle_core::Result<&crate::kernel::GpuIds> {
        match &*self.lookup_ids {
            LookupIds::Gpu(ids) => Ok(ids),
            LookupIds::Host(_) => candle_core::bail!("expected ids on the GPU of the table"),
        }
    }
}

/// Entries by anchors, in the order in which they came.
struct Recent<T> {
    entries: IdMap<TensorId, T>,
    order: VecDeque<TensorId>,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { entries: IdMap::default(), order: VecDeque::new() }
    }
}

impl<T> Recent<T> {
    fn len(&self) -> usize {
        self.order.len()
    }

    /// Adds an entry, unless there is one of this anchor.
    fn insert(&mut self, anchor: TensorId, entry: T) -> bool {
        let is_new = !self.entries.contains_key(&anchor);
        if is_new {
            self.entries.insert(anchor, entry);
            self.order.push_back(anchor);
        }
        is_new
    }

    fn pop_oldest(&mut self) -> Option<(TensorId, T)> {
        let anchor = self.order.pop_front()?;
        Some((anchor, self.entries.remove(&anchor)?))
    }
}

/// A lookup whose graph or gradient is there.
struct Live {
    var: TensorId,
    number: u64,
    lookup_ids: Weak<LookupIds>,
}

#[derive(Default)]
struct Records {
    /// All tables in use, by their variables.
    tables: IdMap<TensorId, Weak<Shared>>,
    /// By their anchors.
    live: IdMap<TensorId, Live>,
    /// Lookups that were differentiated more than once, with their variables.
    kept: Recent<(TensorId, Lookup)>,
    /// The ids of all of those.
    kept_ids: usize,
    /// The variables of the last ones that were given up.
    given_up: Recent<TensorId>,
}

/// A panic elsewhere leaves nothing half done under these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table of a variable, from `make` if there is none.
pub(super) fn share(var: TensorId, make: impl FnOnce() -> Arc<Shared>) -> Arc<Shared> {
    let mut records = lock(&RECORDS);
    if let Some(shared) = records.tables.get(&var).and_then(Weak::upgrade) {
        return shared;
    }
    let shared = make();
    records.tables.insert(var, Arc::downgrade(&shared));
    shared
}

/// The table of a variable, if it is in use.
pub(super) fn table_of(var: TensorId) -> Option<Arc<Shared>> {
    lock(&RECORDS).tables.get(&var).and_then(Weak::upgrade)
}

/// The padding rows of the layers over a variable.
pub(super) fn paddings(var: TensorId) -> Vec<u32> {
    table_of(var).map(|table| lock(&table.paddings).clone()).unwrap_or_default()
}

/// Forgets the table of a variable, which nobody uses any more.
pub(super) fn forget(var: TensorId) {
    let mut records = lock(&RECORDS);
    // Another table of the same variable may have come since the last user of that one left.
    if records.tables.get(&var).is_some_and(|table| table.strong_count() == 0) {
        records.tables.remove(&var);
    }
}

/// Adds a lookup in a variable.
pub(super) fn add(var: TensorId, lookup: &Lookup) {
    let Lookup { anchor, number, lookup_ids } = lookup;
    let live = Live { var, number: *number, lookup_ids: Arc::downgrade(lookup_ids) };
    lock(&RECORDS).live.insert(*anchor, live);
}

/// Removes a lookup, of which neither graph nor gradient is left.
pub(super) fn remove(anchor: TensorId) {
    lock(&RECORDS).live.remove(&anchor);
}

/// Keeps a lookup whose gradients may be added up.
pub(super) fn keep(var: TensorId, lookup: &Lookup) {
    // Its memory is given back without the lock.
    let mut evicted = Vec::new();
    let mut records = lock(&RECORDS);
    if !records.kept.insert(lookup.anchor, (var, lookup.clone())) {
        return;
    }
    records.kept_ids += lookup.lookup_ids.len();
    while records.kept.len() > KEPT || (records.kept_ids > KEPT_IDS && records.kept.len() > 1) {
        let Some((anchor, (var, oldest))) = records.kept.pop_oldest() else { break };
        records.kept_ids -= oldest.lookup_ids.len();
        records.given_up.insert(anchor, var);
        if records.given_up.len() > GIVEN_UP {
            records.given_up.pop_oldest();
        }
        evicted.push(oldest);
    }
}

/// The gradients of lookups in a `GradStore`, by variables.
#[derive(Default)]
pub(crate) struct Lookups<'g> {
    found: IdMap<TensorId, Vec<(u64, LookupGrad<'g>)>>,
    /// The variables of gradients whose records were given up.
    lost: Vec<TensorId>,
}

/// Finds the gradients of lookups among those of a backward pass.
pub(crate) fn find(grads: &GradStore) -> Lookups<'_> {
    let mut lookups = Lookups::default();
    let records = lock(&RECORDS);
    if records.live.is_empty() && records.kept.len() == 0 {
        return lookups;
    }
    for &anchor in grads.get_ids() {
        let live = records.live.get(&anchor);
        let live = live.and_then(|live| Some((live.var, live.number, live.lookup_ids.upgrade()?)));
        let kept = || {
            let (var, lookup) = records.kept.entries.get(&anchor)?;
            Some((*var, lookup.number, lookup.lookup_ids.clone()))
        };
        match (live.or_else(kept), grads.get_id(anchor)) {
            (Some((var, number, lookup_ids)), Some(grad)) => {
                let part = LookupGrad { grad: Cow::Borrowed(grad), lookup_ids };
                lookups.found.entry(var).or_default().push((number, part));
            }
            _ => lookups.lost.extend(records.given_up.entries.get(&anchor)),
        }
    }
    lookups
}

impl<'g> Lookups<'g> {
    /// Checks that no record of a lookup in these variables was given up.
    pub(crate) fn check(&self, mut vars: impl Iterator<Item = TensorId>) -> Result<()> {
        match !self.lost.is_empty() && vars.any(|var| self.lost.contains(&var)) {
            true => Err(ErrorKind::LostLookup.into()),
            false => Ok(()),
        }
    }

    /// Whether there are gradients of lookups in a variable.
    pub(crate) fn has(&self, var: TensorId) -> bool {
        self.found.contains_key(&var)
    }

    /// Takes the gradients of a variable, in the order of its lookups.
    pub(crate) fn take(&mut self, var: TensorId) -> Vec<LookupGrad<'g>> {
        // Most models have no tables, and asking costs a hash.
        if self.found.is_empty() {
            return Vec::new();
        }
        let mut parts = self.found.remove(&var).unwrap_or_default();
        parts.sort_unstable_by_key(|(number, _)| *number);
        parts.into_iter().map(|(_, part)| part).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor, Var};
    use candle_nn::Optimizer;

    use super::*;
    use crate::{Adamax, ParamsAdamax, Table};

    #[test]
    fn a_gradient_whose_record_was_given_up_is_an_error() -> candle_core::Result<()> {
        let var = Var::zeros((2, 1), DType::F32, &Device::Cpu)?;
        let table = Table::new(&var)?;
        let twice = |ids: &Tensor| -> candle_core::Result<GradStore> {
            let loss = table.lookup(ids)?.sum_all()?;
            let mut grads = loss.backward()?;
            grads.extend(loss.backward()?)?;
            Ok(grads)
        };
        let ids = Tensor::zeros(KEPT_IDS / 4, DType::U32, &Device::Cpu)?;
        let mut grads = twice(&ids)?;
        let mut optimizer = Adamax::new(vec![var.clone()], ParamsAdamax::default())?;
        optimizer.step(&grads)?;
        for _ in 0..5 {
            grads = twice(&ids)?;
        }
        optimizer.step(&grads)?;
        let first = twice(&ids)?;
        for _ in 0..5 {
            twice(&ids)?;
        }
        let before = var.to_vec2::<f32>()?;
        let error = optimizer.step(&first).unwrap_err().to_string();
        assert!(error.contains("differentiated more than once"), "{error}");
        assert_eq!(var.to_vec2::<f32>()?, before);
        Ok(())
    }
}
