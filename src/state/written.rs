//! Which elements of variables this crate has written otherwise than by an update, for the masters of them.
//!
//! A table does not know which optimizers have its weight, and an optimizer's state is not to be locked by a lookup. So
//! who writes rows notes that here, by the variable, and each master hears of it before it is read the next time.
//! Invariant: a note is made after its write, and takes at most a sixteenth of the memory of its row, beside a few words.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use bytemuck::Zeroable;
use candle_core::{Tensor, TensorId};

use crate::error::Result;
use crate::ids::row_len;
use crate::maps::IdMap;

/// Of all variables with masters; more than one where more than one optimizer has the variable.
static FOLLOWED: LazyLock<Mutex<IdMap<TensorId, Vec<Weak<Written>>>>> = LazyLock::new(Mutex::default);

/// What has been written since one master was read.
pub(crate) struct Written {
    var: TensorId,
    row_len: usize,
    elements: Mutex<HashMap<u32, Columns>>,
}

/// Which elements of a row.
enum Columns {
    All,
    /// The columns whose bits are set.
    Some(Box<[u64]>),
}

/// Elements that were written, out of the hands of those who write.
pub(crate) struct Elements {
    row_len: usize,
    rows: HashMap<u32, Columns>,
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on hears what is written of `var`.
pub(crate) fn follow(var: &Tensor) -> Arc<Written> {
    let written = Arc::new(Written { var: var.id(), row_len: row_len(var), elements: Mutex::default() });
    lock(&FOLLOWED).entry(var.id()).or_default().push(Arc::downgrade(&written));
    written
}

fn followers(var: &Tensor) -> Vec<Arc<Written>> {
    lock(&FOLLOWED).get(&var.id()).into_iter().flatten().filter_map(Weak::upgrade).collect()
}

/// Whether anybody is to hear of writes of `var`.
pub(crate) fn is_followed(var: &Tensor) -> bool {
    lock(&FOLLOWED).contains_key(&var.id())
}

/// Notes that rows have been written, all of their elements.
pub(crate) fn rows(var: &Tensor, rows: &[u32]) {
    followers(var).iter().for_each(|written| written.add_rows(rows));
}

/// Notes that these elements have been written: pairs of row and column.
pub(crate) fn elements(var: &Tensor, elements: &[(u32, usize)]) {
    followers(var).iter().for_each(|written| written.add(elements));
}

impl Written {
    /// Notes that rows have been written.
    pub(super) fn add_rows(&self, rows: &[u32]) {
        lock(&self.elements).extend(rows.iter().map(|&row| (row, Columns::All)));
    }

    fn add(&self, elements: &[(u32, usize)]) {
        let mut noted = lock(&self.elements);
        for &(row, column) in elements {
            let none = || Columns::Some(vec![0; self.row_len.div_ceil(64)].into());
            if let Columns::Some(bits) = noted.entry(row).or_insert_with(none) {
                bits[column / 64] |= 1 << (column % 64);
            }
        }
    }

    /// What has been written since the last call, if anything.
    pub(super) fn take(&self) -> Option<Elements> {
        let mut noted = lock(&self.elements);
        if noted.is_empty() {
            return None;
        }
        Some(Elements { row_len: self.row_len, rows: std::mem::take(&mut noted) })
    }

    /// Sets what has been written to zero in a copy; the note stays.
    pub(super) fn clear<T: Zeroable + Clone>(&self, values: &mut [T]) {
        lock(&self.elements).iter().for_each(|(row, columns)| columns.clear(*row, self.row_len, values));
    }

    /// Sets what has been written to zero on a device. Rows there are noted as a whole.
    pub(super) fn drop_on_device(&self, kept: &Tensor) -> Result<()> {
        let Some(Elements { rows, row_len }) = self.take() else { return Ok(()) };
        if row_len == 0 {
            return Ok(());
        }
        let zero = kept.narrow(0, 0, 1)?.zeros_like()?;
        for row in rows.into_keys() {
            kept.slice_set(&zero, 0, row as usize)?;
        }
        Ok(())
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let mut all = lock(&FOLLOWED);
        if let Some(followers) = all.get_mut(&self.var) {
            followers.retain(|written| written.strong_count() > 0);
            if followers.is_empty() {
                all.remove(&self.var);
            }
        }
    }
}

impl Elements {
    /// Sets them to zero.
    pub(super) fn clear<T: Zeroable + Clone>(&self, values: &mut [T]) {
        self.rows.iter().for_each(|(row, columns)| columns.clear(*row, self.row_len, values));
    }
}

impl Columns {
    fn clear<T: Zeroable + Clone>(&self, row: u32, row_len: usize, values: &mut [T]) {
        let row = &mut values[row as usize * row_len..][..row_len];
        match self {
            Self::All => row.fill(T::zeroed()),
            Self::Some(bits) => {
                let is_written = |column: usize| bits[column / 64] >> (column % 64) & 1 == 1;
                row.iter_mut()
                    .enumerate()
                    .filter(|(column, _)| is_written(*column))
                    .for_each(|(_, x)| *x = T::zeroed());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn every_follower_hears_once_and_of_its_variable_only() -> candle_core::Result<()> {
        let var = Tensor::zeros((3, 70), DType::BF16, &Device::Cpu)?;
        let other = Tensor::zeros((3, 70), DType::BF16, &Device::Cpu)?;
        assert!(!is_followed(&var));
        let (first, second) = (follow(&var), follow(&var));
        rows(&other, &[0]);
        elements(&var, &[(1, 0), (1, 69)]);
        rows(&var, &[2]);
        let mut expected = vec![1i16; 3 * 70];
        (expected[70], expected[139]) = (0, 0);
        expected[140..].fill(0);
        for written in [&first, &second] {
            let mut values = vec![1i16; 3 * 70];
            written.clear(&mut values);
            assert_eq!(values, expected);
            let mut values = vec![1i16; 3 * 70];
            written.take().expect("elements").clear(&mut values);
            assert_eq!(values, expected);
            assert!(written.take().is_none());
        }
        drop(first);
        assert!(is_followed(&var));
        drop(second);
        assert!(!is_followed(&var));
        Ok(())
    }

    #[test]
    fn a_row_that_is_noted_as_a_whole_stays_so() -> candle_core::Result<()> {
        let var = Tensor::zeros((1, 2), DType::F16, &Device::Cpu)?;
        let written = follow(&var);
        elements(&var, &[(0, 0)]);
        rows(&var, &[0]);
        elements(&var, &[(0, 1)]);
        let mut values = [1.0f32, 1.0];
        written.clear(&mut values);
        assert_eq!(values, [0.0, 0.0]);
        Ok(())
    }
}
