//! Rows without a gradient: TensorFlow's optimizer leaves them as they are, which is a matter of bits.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use candle_adamax::Adamax;
use candle_core::Var;

use crate::common::gradients::{Grad, row_len};
use crate::common::{bits, values};

/// The variables with a gradient of some rows, before a call.
pub(crate) struct Untouched<'v> {
    tables: BTreeMap<&'v str, Table>,
}

struct Table {
    touched: BTreeSet<usize>,
    state: [(&'static str, Vec<u64>); 3],
}

impl<'v> Untouched<'v> {
    pub(crate) fn before(
        optimizer: &Adamax,
        vars: &'v BTreeMap<String, Var>,
        grads: &BTreeMap<String, Grad>,
    ) -> Result<Self> {
        let mut tables = BTreeMap::new();
        for (name, var) in vars {
            if let Some(Grad::Sparse(grad)) = grads.get(name) {
                let touched = values(&grad.indices).into_iter().map(|row| row as usize).collect();
                tables.insert(name.as_str(), Table { touched, state: state(optimizer, name, var)? });
            }
        }
        Ok(Self { tables })
    }

    /// Fails if a call has changed a bit of what it had no gradient for.
    pub(crate) fn check(&self, optimizer: &Adamax, vars: &BTreeMap<String, Var>) -> Result<()> {
        for (name, Table { touched, state: before }) in &self.tables {
            let row_len = row_len(vars[*name].dims());
            let after = state(optimizer, name, &vars[*name])?;
            for ((what, before), (_, after)) in before.iter().zip(&after) {
                let rows = (0..before.len()).map(|i| i / row_len);
                let changed = rows.zip(before.iter().zip(after)).find(|(row, (a, b))| a != b && !touched.contains(row));
                if let Some((row, (before, after))) = changed {
                    let [before, after] = [before, after].map(|bits| f64::from_bits(*bits));
                    bail!("{name}.{what}: row {row} has no gradient, but {before:e} became {after:e}");
                }
            }
        }
        Ok(())
    }
}

fn state(optimizer: &Adamax, name: &str, var: &Var) -> Result<[(&'static str, Vec<u64>); 3]> {
    let state = optimizer.state(name)?;
    Ok([("param", bits(var)), ("m", bits(&state.exp_avg)), ("u", bits(&state.exp_inf))])
}
