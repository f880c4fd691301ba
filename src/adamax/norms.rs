//! Norms of gradients: for clipping, for the check that all is finite, for reports, and for those who log them.
//!
//! Gradients are never rewritten; the factor of clipping reaches the kernel as `grad_scale`. Invariant: norms are those of
//! the true gradients, that is after unscaling, and joined in the order of the variables' names.

use candle_core::backprop::GradStore;

use super::Adamax;
use super::grads::{Found, Grads};
use super::outcome::{Outcome, TotalNorm};
use super::vars::{VarInfo, Vars};
use crate::clip::Clip;
use crate::error::Result;
use crate::kernel::{Backends, Measure};
use crate::params::{ParamsAdamax, SparseUpdate};
use crate::reduce::{Norm, NormType};

/// Norms of the gradients of one update, and who knows them.
pub(super) struct Norms {
    /// Factor that makes each gradient the true one.
    unscale: f64,
    clip: Option<Clip>,
    known: Known,
}

enum Known {
    /// Nothing asks for them.
    NotNeeded,
    /// The host, of each gradient and of all together.
    Host { each: Vec<Norm>, total: Norm, is_reported: bool },
    /// The GPU that makes the update.
    Device(Measure),
}

impl Norms {
    /// Nothing has to be known.
    pub(super) fn not_needed(unscale: f64) -> Self {
        Self { unscale, clip: None, known: Known::NotNeeded }
    }

    /// Measures gradients whose true ones are `unscale` times as large, if clipping, `measure_norm` or `skip_nonfinite` asks
    /// for it; or has the GPU do so that all of them are on. Rows are summed first where the host measures.
    pub(super) fn measure(adamax: &mut Adamax, grads: &mut Grads<'_>, unscale: f64) -> Result<Self> {
        let Adamax { params, resolved, vars, backends, .. } = adamax;
        let (clip, skips) = (params.clip, params.skips_nonfinite());
        let is_reported = params.norm_type().is_some();
        // The norm that is asked for shows as well as the largest magnitude whether all elements are finite.
        let Some(norm) = params.norm_type().or(skips.then_some(NormType::Inf)) else {
            return Ok(Self { clip, ..Self::not_needed(unscale) });
        };
        // The host has to know what is skipped where that decides about sums, averages and ledgers.
        let is_exact = || resolved.iter().any(|group| group.storage.sparse_update == SparseUpdate::Exact);
        let decides = || params.gradient_accumulation_steps > 1 || params.ema.is_some() || is_exact();
        if grads.are_on_one_gpu(vars) && !(skips && decides()) {
            let measure = Measure { norm, is_reported, clip, unscale: unscale.abs(), skips };
            return Ok(Self { unscale, clip: None, known: Known::Device(measure) });
        }
        let each = of_each(vars, grads, norm, unscale, backends)?;
        let total = norm.join(&each);
        Ok(Self { unscale, clip, known: Known::Host { each, total, is_reported } })
    }

    /// Looks whether gradients that are about to be accumulated are finite, if that is asked for.
    pub(super) fn check(adamax: &mut Adamax, grads: &mut Grads<'_>) -> Result<Self> {
        let Adamax { params, vars, backends, .. } = adamax;
        if !params.skips_nonfinite() {
            return Ok(Self::not_needed(1.0));
        }
        let each = of_each(vars, grads, NormType::Inf, 1.0, backends)?;
        let total = NormType::Inf.join(&each);
        Ok(Self { known: Known::Host { each, total, is_reported: false }, ..Self::not_needed(1.0) })
    }

    /// Whether the host skips the call.
    pub(super) fn skips(&self, params: &ParamsAdamax) -> bool {
        matches!(self.known, Known::Host { total, .. } if params.skips_nonfinite() && !total.is_finite())
    }

    /// The factor of gradient `nth`: unscaled and clipped.
    pub(super) fn grad_scale(&self, nth: usize) -> f64 {
        match (&self.known, self.clip) {
            (Known::Host { each, total, .. }, Some(clip)) => clip.scale(self.unscale, each[nth], *total),
            _ => self.unscale,
        }
    }

    /// The measurement that a GPU makes.
    pub(super) fn on_device(&self) -> Option<&Measure> {
        match &self.known {
            Known::Device(measure) => Some(measure),
            Known::NotNeeded | Known::Host { .. } => None,
        }
    }

    /// The outcome of an update of so many variables.
    pub(super) fn outcome(&self, vars: usize) -> Outcome {
        let norm = match &self.known {
            Known::Device(Measure { skips: true, .. }) => return Outcome::InFlight { vars },
            Known::Device(Measure { is_reported: true, .. }) => TotalNorm::OnDevice,
            Known::Host { total, is_reported: true, .. } => TotalNorm::Known(total.to_f64()),
            _ => TotalNorm::NotMeasured,
        };
        Outcome::Updated { vars, norm }
    }
}

/// The norm of each gradient, times `unscale`.
fn of_each(
    vars: &Vars,
    grads: &mut Grads<'_>,
    norm: NormType,
    unscale: f64,
    backends: &mut Backends,
) -> Result<Vec<Norm>> {
    grads.sum_rows(vars)?;
    let norms = backends.measure(&grads.sources(vars), norm)?;
    Ok(norms.into_iter().map(|norm| norm.times(unscale.abs())).collect())
}

impl Adamax {
    /// The norm of the gradient of each variable that has one in `grads`, with its name, in alphabetical order. Tables
    /// are among them, whose gradients of rows `grads.get` does not show.
    ///
    /// They are the norms that a step with these gradients measures before it clips: after the division by the loss
    /// scale, with the contributions to each row summed. [`report`](Self::report) has their total where the optimizer
    /// measures them, and [`Table::gradient`](crate::Table::gradient) the rows themselves. This waits for the devices
    /// that gradients are on, and changes nothing.
    ///
    /// ```
    /// use candle_adamax::{Adamax, NormType, ParamsAdamax, Table};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// let (weight, bias) = (Var::zeros((1000, 2), DType::F32, &Device::Cpu)?, Var::zeros(2, DType::F32, &Device::Cpu)?);
    /// let vars = [("weight", weight.clone()), ("bias", bias.clone())];
    /// let optimizer = Adamax::from_named(vars, ParamsAdamax::default())?;
    ///
    /// let rows = Table::new(&weight)?.lookup(&Tensor::new(&[7u32, 7], &Device::Cpu)?)?;
    /// let grads = rows.broadcast_add(&bias)?.sum_all()?.backward()?;
    /// let norms = optimizer.gradient_norms(&grads, NormType::Inf)?;
    /// assert_eq!(norms, [("bias".to_owned(), 2.0), ("weight".to_owned(), 2.0)]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A gradient that a step would refuse: of the wrong shape, dtype or device, or of a lookup that is not known any
    /// more. No gradient at all is none: the list is empty.
    pub fn gradient_norms(&self, grads: &GradStore, norm: NormType) -> Result<Vec<(String, f64)>> {
        let measure = || {
            let mut grads = Grads::collect(&self.vars, self.found(grads)?)?;
            let unscale = 1.0 / self.loss_scale();
            let norms = of_each(&self.vars, &mut grads, norm, unscale, &mut Backends::default())?;
            let names = grads.indices().map(|index| self.vars[index].name.clone());
            Ok(names.zip(norms.into_iter().map(Norm::to_f64)).collect())
        };
        measure().map_err(|error| self.own(error))
    }

    /// Finds all that a `GradStore` has for a variable.
    pub(super) fn found<'g>(&self, grads: &'g GradStore) -> Result<impl FnMut(&VarInfo) -> Found<'g> + use<'g>> {
        let mut lookups = self.lookups(grads)?;
        Ok(move |info: &VarInfo| Found {
            dense: grads.get(&info.var),
            lookups: lookups.take(info.var.id()),
            ..Found::default()
        })
    }
}
