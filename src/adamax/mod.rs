//! The optimizer. [`Adamax::step_with`] is the picture of one call: plan, then apply.
//!
//! Invariants: whatever can be refused is refused before the first write; `Progress::record` is the only place that counts.

mod append;
mod audit;
mod averages;
mod build;
mod call;
mod convert;
mod display;
mod exchange;
mod fit;
mod grads;
mod inspect;
mod matching;
mod norms;
mod outcome;
mod progress;
mod ranges;
mod rates;
mod report;
mod restore;
mod rows;
mod settings;
mod snapshot;
mod state;
mod sums;
mod update;
mod vars;

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

pub use self::audit::Audit;
use self::call::{Call, Turn};
use self::grads::{Found, Grads};
pub use self::inspect::{MomentStatistics, StateBytes, Statistics};
pub use self::matching::Restored;
use self::norms::Norms;
use self::outcome::{History, Outcome, Report};
use self::progress::Progress;
pub use self::report::StepReport;
use self::settings::ResolvedGroup;
pub use self::snapshot::State;
use self::vars::{VarInfo, Vars};
use crate::error::{ErrorKind, Result};
use crate::gradient::{Gradient, SparseGrad};
use crate::group::GroupSettings;
use crate::kernel::{Backends, Kernel};
use crate::maps::IdMap;
use crate::params::{MissingGradients, ParamsAdamax};
use crate::schedule::{LearningRate, Plateau};
use crate::trace;

/// The Adamax optimizer (Kingma & Ba 2015, section 7.1) for candle's variables.
///
/// ```text
/// m  = beta1 * m + (1 - beta1) * g
/// u  = max(beta2 * u, |g|)
/// w  = w - lr / (1 - beta1^t) * m / (u + eps)
/// ```
///
/// It updates f64, f32, f16 and bf16 variables of any shape. The arithmetic is f32 (f64 for f64), and so are the
/// moments m and u, in buffers of the optimizer's own, unless [`state_dtype`](ParamsAdamax::state_dtype) asks for fewer
/// bytes. Variables that are not floating point are left out; a variable without a gradient is skipped and
/// [reported](Self::report), and too many of them are an error
/// ([`missing_gradients`](ParamsAdamax::missing_gradients)). [`ParamsAdamax`] has the settings.
///
/// The order of each call of `step`: divide by the loss scale; check that all is finite, if asked to; accumulate;
/// and on the N-th call divide by N, measure norms, clip, negate if `maximize`, decay, update, count the update. On
/// every call then: move the averages, count the call. The bias correction's t counts updates, a schedule counts calls.
///
/// A variable that has never had a gradient is never written, whatever the settings are: it has no average, and no decay
/// acts on it. [`StepReport::untrained`] names such variables.
///
/// # Threads
///
/// All types are `Send + Sync`. A step may run beside lookups, beside every other call of this crate and beside candle's
/// operations, in plain threads and in tasks of any rayon pool. It locks one variable at a time, and the variable's
/// gradient after it, as candle's operations in place do. Another thread sees a variable before the step or after it, and
/// of two variables it may see one before and one after. A step has as many threads as the rayon pool that it is called
/// in. They are the crate's own, and wait for no other tasks.
///
/// An operation that waits for ever beside `Var::set` does so beside a step, too. candle locks the operands of an
/// operation, and two locks by one thread, with a writer between them, never end: the operation has one variable twice (`&x * &x`), or it
/// is shared among the workers of a rayon pool (a large `matmul`, a convolution), and a worker that waits takes a task
/// that reads or writes an operand, or no worker is free since all wait for an operand. Keep such operations out of tasks,
/// and tasks that use their operands out of the global pool, while another thread writes the operands.
///
/// ```
/// use candle_adamax::{Adamax, ParamsAdamax};
/// use candle_core::{Device, Var};
///
/// let w = Var::new(&[3.0f32, -2.0], &Device::Cpu)?;
/// let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax { lr: 0.1.into(), ..Default::default() })?;
/// for _ in 0..200 {
///     optimizer.backward_step(&w.sqr()?.sum_all()?)?;
/// }
/// assert!(w.to_vec1::<f32>()?.iter().all(|x| x.abs() < 1e-2));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Adamax {
    params: ParamsAdamax,
    groups: Vec<GroupSettings>,
    /// The index of each group, by its name.
    group_indices: HashMap<String, usize>,
    /// The settings that hold for the variables of each group.
    resolved: Vec<ResolvedGroup>,
    vars: Vars,
    progress: Progress,
    /// State of [`ReduceLrOnPlateau`](crate::ReduceLrOnPlateau), if one is set.
    plateau: Option<Plateau>,
    kernel: Kernel,
    /// Memory of kernels from one call to the next.
    backends: Backends,
    report: Report,
}

impl Adamax {
    /// One call: see [`Adamax`] for what happens in which order. With a loss scale the gradients are those of the
    /// [scaled](Adamax::scale_loss) loss.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ErrorKind, ParamsAdamax};
    /// use candle_core::{Device, Var, backprop::GradStore};
    ///
    /// let w = Var::new(&[3.0f32, -2.0], &Device::Cpu)?;
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default())?;
    /// let report = optimizer.step(&w.sqr()?.sum_all()?.backward()?)?;
    /// assert_eq!(report.to_string(), "updated 1 of 1 vars, lr 1e-3");
    ///
    /// let error = optimizer.step(&GradStore::default()).unwrap_err();
    /// assert!(matches!(error.kind(), ErrorKind::NoGradients { vars: 1 }));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A gradient of the wrong shape, dtype or device, or one that shares a variable's memory; fewer gradients than
    /// [`missing_gradients`](ParamsAdamax::missing_gradients) asks for;
    /// a gradient of a variable that [`append_rows`](Adamax::append_rows) has replaced; a learning rate that is not a
    /// finite number of at least 0. Nothing has changed then.
    pub fn step(&mut self, grads: &GradStore) -> Result<StepReport<'_>> {
        self.step_found(grads, |_| None)
    }

    /// The backward pass of a loss, and a call of [`step`](Self::step) with its gradients. With
    /// [`LossScale::Dynamic`](crate::LossScale::Dynamic) the loss is [scaled](Adamax::scale_loss) first; with `Static` it has
    /// been, as in Keras.
    ///
    /// # Errors
    ///
    /// As [`step`](Self::step), and those of the backward pass.
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<StepReport<'_>> {
        let grads = if self.progress.scaler.is_some() { self.scale_loss(loss)?.backward() } else { loss.backward() };
        let grads = grads.map_err(|error| self.own(error.into()))?;
        self.step(&grads)
    }

    /// Updates from pairs of a variable and its gradient, dense (`&Tensor`) or of some rows (`&SparseGrad`), for those
    /// who have no `GradStore`. It is a call of [`step`](Self::step). A variable may have one gradient of each kind, which are added;
    /// a list of both kinds is made of [`Gradient`]s.
    ///
    /// # Errors
    ///
    /// As [`step`](Self::step); a variable that is not the optimizer's, or that is given twice; an index that is
    /// not the number of a row, or values of the wrong shape.
    pub fn apply_gradients<'a, G: Into<Gradient<'a>>>(
        &mut self,
        pairs: impl IntoIterator<Item = (&'a Var, G)>,
    ) -> Result<StepReport<'_>> {
        let names = self.vars.names_by_id();
        let mut found: IdMap<_, (Option<&Tensor>, Option<&SparseGrad>)> = IdMap::default();
        for (position, (var, grad)) in pairs.into_iter().enumerate() {
            let Some(&name) = names.get(&var.id()) else {
                return Err(self.not_owned(position, var));
            };
            let (dense, sparse) = found.entry(var.id()).or_default();
            let twice = match grad.into() {
                Gradient::Dense(grad) => dense.replace(grad).is_some(),
                Gradient::Sparse(grad) => sparse.replace(grad).is_some(),
            };
            if twice {
                return Err(self.own(ErrorKind::DuplicateGradient(name.to_owned()).into()));
            }
        }
        self.call(|info| {
            let (dense, sparse) = found.get(&info.var.id()).copied().unwrap_or_default();
            Found { dense, sparse, ..Found::default() }
        })
    }

    /// One call, with gradients from anywhere.
    fn call<'g>(&mut self, find: impl FnMut(&VarInfo) -> Found<'g>) -> Result<StepReport<'_>> {
        self.traced(|adamax| adamax.step_with(find))?;
        Ok(self.report())
    }

    /// A call, or a flush, in a span of its own.
    fn traced(&mut self, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let span = trace::Call::enter(&self.params.name, self.progress.counters.calls);
        self.named(run)?;
        if let Some(outcome) = self.report.outcome {
            span.record(self.report.lr, outcome.updates(), outcome.known_skipped());
        }
        Ok(())
    }

    fn step_with<'g>(&mut self, find: impl FnMut(&VarInfo) -> Found<'g>) -> Result<()> {
        self.sync()?; // counters are exact from here on

        // Plan: numbers, gradients, norms. Nothing is written.
        let call = Call::plan(self)?;
        let mut grads = Grads::collect(&self.vars, find)?;
        if grads.is_empty() {
            return self.without_gradients(call);
        }
        self.check_averages(&grads)?;
        let norms = match call.turn {
            Turn::Update => Norms::measure(self, &mut grads, call.unscale)?,
            _ => Norms::check(self, &mut grads)?,
        };

        // Apply, unless the call is skipped.
        let outcome = match norms.skips(&self.params) {
            true => Outcome::Skipped,
            false => self.update(&call, &grads, &norms)?,
        };
        self.progress.record(call.turn, outcome, self.params.loss_scale);
        self.report = Report::new(call, outcome, self.vars.len());
        self.report.note_missing(&mut self.vars, &grads);
        Ok(())
    }

    /// A call without any gradient, which does nothing.
    fn without_gradients(&mut self, call: Call) -> Result<()> {
        if self.params.missing_gradients != MissingGradients::Allow {
            return Err(ErrorKind::NoGradients { vars: self.vars.len() }.into());
        }
        self.report = Report::new(call, Outcome::NoGradients, self.vars.len());
        self.report.missing =
            (0..self.vars.len()).filter(|&index| self.vars[index].history != History::Untrained).collect();
        Ok(())
    }

    /// An update with the sums of the calls that wait.
    fn flush(&mut self) -> Result<()> {
        let call = Call::flush(self)?;
        let outcome = self.update(&call, &Grads::none(), &Norms::not_needed(1.0))?;
        self.progress.record(call.turn, outcome, self.params.loss_scale);
        self.report = Report::new(call, outcome, self.vars.len());
        Ok(())
    }
}

impl candle_nn::Optimizer for Adamax {
    type Config = ParamsAdamax;

    /// An optimizer of variables without names. It cannot be saved to a file: [`Adamax::from_varmap`] can.
    ///
    /// # Errors
    ///
    /// A setting that is not allowed; a variable that is given twice or has an unsupported float dtype; a pattern of
    /// [`no_decay`](ParamsAdamax::no_decay) that spares no variable.
    fn new(vars: Vec<Var>, params: ParamsAdamax) -> candle_core::Result<Self> {
        Ok(Self::unnamed(vars, params)?)
    }

    /// [`Adamax::step`], with candle's error.
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Self::step(self, grads)?;
        Ok(())
    }

    /// The learning rate of the next call; NaN where a tensor or a custom schedule gives no valid one.
    fn learning_rate(&self) -> f64 {
        self.rate(self.resolved().counters.calls).unwrap_or(f64::NAN)
    }

    /// From now on the learning rate is `lr`, also in place of a schedule. An invalid one is an error of the next step. What
    /// a [plateau](ParamsAdamax::plateau) has lowered learning rates by is forgotten, for all groups.
    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = LearningRate::Constant(lr);
        if let Some(plateau) = &mut self.plateau {
            plateau.lr_factor = 1.0;
        }
    }

    /// [`Adamax::backward_step`], with candle's error.
    fn backward_step(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        Self::backward_step(self, loss)?;
        Ok(())
    }
}
