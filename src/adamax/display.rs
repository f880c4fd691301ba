//! An optimizer as text. Nothing here waits for a device.

use std::fmt;

use super::Adamax;
use super::settings::decays_any;
use crate::codec::StateDType;
use crate::params::{MissingGradients, ParamsAdamax, SparseUpdate};
use crate::rounding::Rounding;
use crate::rule::WeightDecay;

impl fmt::Display for Adamax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ParamsAdamax { name, lr, beta1, beta2, eps, eps_mode, weight_decay, .. } = &self.params;
        let ParamsAdamax { state_dtype, rowwise_norm, rounding, sparse_update, missing_gradients, .. } = &self.params;
        write!(f, "{name}(lr: {lr}, beta1: {beta1}, beta2: {beta2}, eps: {eps:e} {eps_mode:?}")?;
        if *weight_decay != WeightDecay::None {
            write!(f, ", weight decay: {weight_decay:?}")?;
        }
        if !self.params.no_decay.is_empty() && decays_any(&self.params, &self.groups) {
            write!(f, ", no decay: {} of {} vars", self.spared_names().count(), self.vars.len())?;
        }
        if *state_dtype != StateDType::default() {
            write!(f, ", moments: {state_dtype:?}")?;
        }
        if *rowwise_norm {
            write!(f, ", one norm a row")?;
        }
        if *rounding != Rounding::default() {
            write!(f, ", rounding: {rounding:?}")?;
        }
        if *sparse_update != SparseUpdate::default() {
            write!(f, ", rows: {sparse_update:?}")?;
        }
        if *missing_gradients != MissingGradients::default() {
            write!(f, ", missing gradients: {missing_gradients}")?;
        }
        let groups = self.groups();
        if groups.len() > 1 {
            write!(f, ", groups: {}", groups.len())?;
        }
        write!(f, ", vars: {}, updates: {}", self.vars.len(), self.progress.counters.updates)?;
        let steps = self.params.gradient_accumulation_steps;
        if steps > 1 {
            write!(f, ", accumulated: {} of {steps} calls", self.progress.counters.pending)?;
        }
        write!(f, ")")
    }
}

impl fmt::Debug for Adamax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adamax")
            .field("params", &self.params)
            .field("groups", &self.groups())
            .field("vars", &self.names().collect::<Vec<_>>())
            .field("counters", &self.progress.counters)
            .field("scaler", &self.progress.scaler)
            .field("plateau", &self.plateau)
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}
