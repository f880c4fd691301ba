//! Rows that a lookup found above its `max_norm`, until the weight is written.
//!
//! A lookup returns such a row scaled and leaves the weight alone, because the graph may have used the weight already.
//! The row is noted here, and the weight is scaled when it is written anyway.
//!
//! Invariant: a row is scaled only if it still has the norm that the lookup saw. A row that somebody has set since then
//! stays as it was set.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Tensor, TensorId};

use super::exact;
use super::records::{self, lock};
use crate::error::Result;
use crate::kernel::Limit;
use crate::reduce::Norm;

/// The number of tables with noted rows. It spares the variables of most models the search for their table.
static NOTED: AtomicUsize = AtomicUsize::new(0);

/// The noted rows of one table: at most one entry for each row.
#[derive(Default)]
pub(super) struct Limits(Mutex<BTreeMap<u32, Limit>>);

impl Limits {
    /// Notes rows with the norms that they have.
    pub(super) fn note(&self, rows: &[(u32, Norm)], max_norm: f64) {
        if rows.is_empty() {
            return;
        }
        let mut noted = lock(&self.0);
        if noted.is_empty() {
            NOTED.fetch_add(1, Ordering::Relaxed);
        }
        for &(row, norm) in rows {
            let limit = noted.entry(row).or_insert(Limit { norm, max_norm });
            // A row that has another norm now was written since the lookup that noted it.
            let stays = limit.norm == norm && limit.max_norm <= max_norm;
            if !stays {
                *limit = Limit { norm, max_norm };
            }
        }
    }

    /// All noted rows, in ascending order.
    pub(super) fn noted(&self) -> Vec<(u32, Limit)> {
        lock(&self.0).iter().map(|(row, limit)| (*row, *limit)).collect()
    }

    /// Takes all noted rows, in ascending order.
    pub(super) fn take(&self) -> Vec<(u32, Limit)> {
        let mut noted = lock(&self.0);
        if !noted.is_empty() {
            NOTED.fetch_sub(1, Ordering::Relaxed);
        }
        std::mem::take(&mut *noted).into_iter().collect()
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        self.take();
    }
}

/// Takes the noted rows of a variable, in ascending order.
pub(crate) fn take(var: TensorId) -> Vec<(u32, Limit)> {
    if NOTED.load(Ordering::Relaxed) == 0 {
        return Vec::new();
    }
    records::table_of(var).map(|table| table.limits.take()).unwrap_or_default()
}

/// Scales the noted rows of a variable down in its weight.
pub(crate) fn scale_down(var: &Tensor) -> Result<()> {
    let noted = take(var.id());
    if noted.is_empty() {
        return Ok(());
    }
    exact::scale_down(var, &noted)
}
