//! All that an optimizer holds, in a form that compares.

use std::collections::BTreeMap;

use candle_adamax::{AccumulatedGrad, Adamax, Snapshot, SparseGrad, VarSnapshot};
use candle_core::{Tensor, Var};

use super::bits;

/// Everything that a call of `step` may change: the bits of variables and of their states, and settings and counters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fingerprint(BTreeMap<String, Vec<Vec<u64>>>, String);

impl Fingerprint {
    /// Of an optimizer, and of those of its variables that are given.
    #[track_caller]
    pub(crate) fn of(optimizer: &Adamax, vars: &[(String, Var)]) -> Self {
        let mut of_state = Self::of_snapshot(&optimizer.snapshot().unwrap());
        for (name, var) in vars {
            of_state.0.get_mut(name).unwrap()[0] = bits(var);
        }
        of_state
    }

    /// Of a snapshot, which has no variables.
    #[track_caller]
    pub(crate) fn of_snapshot(snapshot: &Snapshot) -> Self {
        let Snapshot { params, groups, counters, grad_scaler, plateau, vars } = snapshot;
        let mut text = format!("{params:?} {groups:?} {counters:?} {grad_scaler:?} {plateau:?}");
        let of_var = |(name, var): (&String, &VarSnapshot)| {
            let VarSnapshot { group, step, exp_avg, exp_inf, scales, by_rows, master, ema, accumulated, missed } = var;
            let (sum, rows, calls) = match accumulated {
                None => (None, None, None),
                Some((AccumulatedGrad::Dense(sum), calls)) => (Some(sum), None, Some(calls)),
                Some((AccumulatedGrad::Rows(SparseGrad { indices, values }), calls)) => {
                    (Some(values), Some(indices), Some(calls))
                }
                _ => unreachable!("no other one is made here"),
            };
            let [last_update, updates] = match missed {
                None => [None; 2],
                Some(missed) => [Some(&missed.last_update), Some(&missed.updates)],
            };
            let (scales, master, ema) = (scales.as_ref(), master.as_ref(), ema.as_ref());
            let tensors = [Some(exp_avg), Some(exp_inf), scales, master, ema, sum, rows, last_update, updates];
            let form = |tensor: &Tensor| (tensor.dtype(), tensor.dims().to_vec());
            text += &format!(" {name} {group} {by_rows} {:?}", tensors.map(|tensor| tensor.map(form)));
            let all = tensors.map(|tensor| tensor.map(bits).unwrap_or_default());
            let counts = [*step].into_iter().chain(calls.copied()).collect();
            (name.clone(), [Vec::new()].into_iter().chain(all).chain([counts]).collect())
        };
        let bits = vars.iter().map(of_var).collect();
        Self(bits, text)
    }

    /// The bits alone, those of the variable first, for optimizers whose settings differ.
    pub(crate) fn bits(&self) -> &BTreeMap<String, Vec<Vec<u64>>> {
        &self.0
    }
}
