//! Which lookups a gradient can still belong to, of all tables.
//!
//! Invariant: a record lives as long as something that can lead to its gradient: the graph, or a gradient in a
//! `GradStore`, which own it. There is one case in which a gradient loses what owns its record: two gradients of one
//! anchor that `GradStore::extend` adds. So records that are differentiated more than once are kept here, up to a
//! limit, and a gradient whose record has been given up is an error and never passed over.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::TensorId;
use candle_core::backprop::GradStore;

use super::Shared;
use crate::kernel::{Occurrences, Part};

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
    pub(super) occurrences: Arc<Occurrences>,
}

impl Lookup {
    pub(super) fn new(anchor: TensorId, occurrences: Arc<Occurrences>) -> Self {
        Self { anchor, number: NEXT.fetch_add(1, Ordering::Relaxed), occurrences }
    }

    /// The ids of a lookup in a table on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self) -> candle_core::Result<&crate::kernel::GpuIds> {
        match &*self.occurrences {
            Occurrences::Gpu(ids) => Ok(ids),
            Occurrences::Host(_) => candle_core::bail!("expected ids on the GPU of the table"),
        }
    }
}

#[derive(Default)]
struct Records {
    /// All tables in use, by their variables.
    tables: HashMap<TensorId, Weak<Shared>>,
    /// Lookups that were differentiated more than once, with their variables.
    kept: VecDeque<(TensorId, Lookup)>,
    /// The ids of all of those.
    kept_ids: usize,
    /// The anchors of the last ones that were given up.
    given_up: VecDeque<TensorId>,
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

/// The padding rows of the layers over a variable.
pub(super) fn paddings(var: TensorId) -> Vec<u32> {
    let table = lock(&RECORDS).tables.get(&var).and_then(Weak::upgrade);
    // Without the lock: the last owner of a table, which this may be, takes it when it leaves.
    table.map(|table| lock(&table.paddings).clone()).unwrap_or_default()
}

/// Forgets the table of a variable, which nobody uses any more.
pub(super) fn forget(var: TensorId) {
    let mut records = lock(&RECORDS);
    // Another table of the same variable may have come since the last user of that one left.
    if records.tables.get(&var).is_some_and(|table| table.strong_count() == 0) {
        records.tables.remove(&var);
    }
}

/// Keeps a lookup whose gradients may be added up.
pub(super) fn keep(var: TensorId, lookup: &Lookup) {
    let mut records = lock(&RECORDS);
    if records.kept.iter().any(|(_, kept)| kept.anchor == lookup.anchor) {
        return;
    }
    records.kept_ids += lookup.occurrences.len();
    records.kept.push_back((var, lookup.clone()));
    while records.kept.len() > KEPT || (records.kept_ids > KEPT_IDS && records.kept.len() > 1) {
        let Some((_, oldest)) = records.kept.pop_front() else { break };
        records.kept_ids -= oldest.occurrences.len();
        records.given_up.push_back(oldest.anchor);
        if records.given_up.len() > GIVEN_UP {
            records.given_up.pop_front();
        }
    }
}

/// The lookups of all tables at one moment.
pub(crate) struct Snapshot {
    tables: HashMap<TensorId, Arc<Shared>>,
    kept: HashMap<TensorId, Vec<Lookup>>,
    given_up: VecDeque<TensorId>,
}

/// What there is now.
pub(crate) fn snapshot() -> Snapshot {
    let records = lock(&RECORDS);
    let tables: Vec<_> = records.tables.iter().map(|(id, table)| (*id, table.clone())).collect();
    let mut kept: HashMap<TensorId, Vec<Lookup>> = HashMap::new();
    for (var, lookup) in &records.kept {
        kept.entry(*var).or_default().push(lookup.clone());
    }
    let given_up = records.given_up.clone();
    drop(records);
    // Without the lock: the last owner of a table, which this may become, takes it when it leaves.
    let tables = tables.into_iter().filter_map(|(id, table)| Some((id, table.upgrade()?))).collect();
    Snapshot { tables, kept, given_up }
}

impl Snapshot {
    /// The gradients in `grads` of the lookups in a variable, in the order of the lookups.
    pub(crate) fn gradients<'g>(&self, var: TensorId, grads: &'g GradStore) -> Vec<Part<'g>> {
        let mut found: Vec<(u64, Part<'g>)> = Vec::new();
        let mut add = |anchor, number, occurrences: Arc<Occurrences>| {
            if let Some(grad) = grads.get_id(anchor) {
                found.push((number, Part { grad: Cow::Borrowed(grad), occurrences }));
            }
        };
        if let Some(table) = self.tables.get(&var) {
            for (anchor, (number, occurrences)) in lock(&table.live).iter() {
                if let Some(occurrences) = occurrences.upgrade() {
                    add(*anchor, *number, occurrences);
                }
            }
        }
        for Lookup { anchor, number, occurrences } in self.kept.get(&var).into_iter().flatten() {
            add(*anchor, *number, occurrences.clone());
        }
        found.sort_by_key(|(number, _)| *number);
        found.dedup_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, part)| part).collect()
    }

    /// Whether `grads` has the gradient of a lookup that was given up and that no graph holds.
    pub(crate) fn has_lost(&self, grads: &GradStore) -> bool {
        let is_live = |anchor: &TensorId| self.tables.values().any(|table| lock(&table.live).contains_key(anchor));
        self.given_up.iter().any(|anchor| grads.get_id(*anchor).is_some() && !is_live(anchor))
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
