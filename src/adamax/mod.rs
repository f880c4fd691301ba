//! The optimizer. [`Adamax::step`](candle_nn::Optimizer::step) reads as the picture of one step, top to bottom:
//! collect, check, accumulate, summary, coefficients, kernel, average.
//!
//! Invariant: variables are kept in the order of their names, so that nothing depends on the order in which a
//! `VarMap` happens to give them; and whatever can fail comes before the first write.

mod accumulate;
mod audit;
mod collect;
mod ema;
mod exchange;
mod gradients;
mod held;
mod inspect;
mod late;
mod loss_scale;
mod manage;
mod matching;
mod missing;
mod norms;
mod rates;
mod report;
mod rows;
mod snapshot;
mod stage;

use std::collections::HashMap;
use std::sync::PoisonError;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::{Optimizer, VarMap};

use self::accumulate::{Accumulated, Sum};
pub use self::audit::Audit;
use self::collect::{Collected, Found, collect};
use self::ema::{Averages, Rounded};
use self::gradients::{GradRef, Gradients};
use self::held::Held;
pub use self::inspect::{MomentStatistics, StateBytes, Statistics};
use self::late::Unsettled;
pub use self::matching::Restored;
use self::rates::{GroupRates, Rates};
pub use self::report::StepReport;
use self::report::{History, Outcome, Report};
use self::rows::Replaced;
pub use self::snapshot::State;
use crate::checkpoint::Counters;
use crate::codec::shrinkage;
use crate::error::{Error, ErrorKind, Result};
use crate::gradient::{Gradient, SparseGrad, Summary};
use crate::group::{DEFAULT_GROUP, GroupSettings, ParamGroup};
use crate::kernel::{Context, Kernel, Orders, RowTask, Task, Update, all_on_one_gpu};
use crate::maps::IdMap;
use crate::params::{MissingGradients, ParamsAdamax, SparseUpdate, StepCount};
use crate::rounding::derive;
use crate::rule::Coefficients;
use crate::scaler::GradScalerState;
use crate::schedule::{LearningRate, Plateau};
use crate::state::{Buffer, Place};
use crate::table::debts;
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
/// use candle_nn::Optimizer;
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
    /// By their names.
    #[expect(clippy::vec_box, reason = "where one comes or goes, boxes are moved faster than variables")]
    vars: Vec<Box<Param>>,
    /// The memory of every variable, and whose it is.
    storages: IdMap<usize, String>,
    counters: Counters,
    /// What the loss scale has come to, where it follows the gradients.
    scaler: Option<GradScalerState>,
    /// What metrics have made of learning rates, where these follow them.
    plateau: Option<Plateau>,
    kernel: Kernel,
    /// What kernels keep from one call to the next.
    context: Context,
    unsettled: Unsettled,
    report: Report,
    /// The variables that `append_rows` has replaced.
    replaced: Replaced,
}

/// One variable and all that the optimizer keeps for it.
struct Param {
    name: String,
    /// Its position, if it was given without a name and `name` was made up.
    unnamed: Option<usize>,
    group: usize,
    decays: bool,
    /// Of its random numbers, from its name.
    key: u64,
    var: Var,
    state: Held,
    accumulated: Option<Accumulated>,
    ema: Option<Buffer>,
    history: History,
}

impl Param {
    /// Where its state lives.
    fn place(&self) -> Place {
        self.state.get().place()
    }
}

impl Optimizer for Adamax {
    type Config = ParamsAdamax;

    /// An optimizer of variables without names. It cannot be saved to a file: [`Adamax::from_varmap`] can.
    ///
    /// # Errors
    ///
    /// A setting that is not allowed; a variable that is given twice or has an unsupported float dtype; a part of
    /// [`no_decay`](ParamsAdamax::no_decay) that spares no variable.
    fn new(vars: Vec<Var>, params: ParamsAdamax) -> candle_core::Result<Self> {
        let mut adamax = Self::without_vars(params)?;
        let vars = vars.into_iter().enumerate().map(|(i, var)| (format!("var.{i}"), Some(i), var)).collect();
        let settings = adamax.groups[0].clone();
        adamax.insert(0, &settings, vars)?;
        adamax.check_no_decay()?;
        Ok(adamax)
    }

    /// One call: see [`Adamax`] for what happens in which order. With a loss scale the gradients are those of the
    /// [scaled](Adamax::scale) loss.
    ///
    /// # Errors
    ///
    /// A gradient of the wrong shape, dtype or device, or one that shares a variable's memory; fewer gradients than
    /// [`missing_gradients`](ParamsAdamax::missing_gradients) asks for;
    /// a gradient of a variable that [`append_rows`](Adamax::append_rows) has replaced; a learning rate that is not a
    /// finite number of at least 0. Nothing has changed then.
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Ok(self.step_found(grads, |_| None)?)
    }

    /// The learning rate of the next call; NaN where a tensor or a custom schedule gives no valid one.
    fn learning_rate(&self) -> f64 {
        self.rate(self.settled_counters().calls).unwrap_or(f64::NAN)
    }

    /// From now on the learning rate is `lr`, also in place of a schedule. An invalid one is an error of the next step. What
    /// a [plateau](ParamsAdamax::plateau) has lowered learning rates by is forgotten, for all groups.
    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = LearningRate::Constant(lr);
        if let Some(plateau) = &mut self.plateau {
            plateau.lr_factor = 1.0;
        }
    }

    /// The backward pass of a loss, and a call of [`step`](Optimizer::step) with its gradients. With a
    /// [`grad_scaler`](ParamsAdamax::grad_scaler) the loss is [scaled](Adamax::scale) first; for `loss_scale_factor` it has
    /// been, as in Keras.
    fn backward_step(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        let grads = if self.scaler.is_some() { self.scale(loss)?.backward()? } else { loss.backward()? };
        self.step(&grads)
    }
}

impl Adamax {
    /// An optimizer with Keras's defaults but for the learning rate; variables have no names.
    ///
    /// # Errors
    ///
    /// As [`new`](Optimizer::new).
    pub fn new_lr(vars: Vec<Var>, lr: f64) -> Result<Self> {
        Ok(<Self as Optimizer>::new(vars, ParamsAdamax { lr: lr.into(), ..ParamsAdamax::default() })?)
    }

    /// An optimizer of all variables in a `VarMap`, under their names there.
    ///
    /// # Errors
    ///
    /// As [`new`](Optimizer::new).
    pub fn from_varmap(varmap: &VarMap, params: ParamsAdamax) -> Result<Self> {
        Self::from_varmap_where(varmap, |_, _| true, params)
    }

    /// An optimizer of the variables in a `VarMap` that `keep` is true for, under their names there. `keep` is asked in
    /// the order of the names.
    ///
    /// A `VarMap` also has variables that are not trained, such as the running statistics of `candle_nn::batch_norm`.
    /// The optimizer never writes a variable without a gradient, so it may have them; leave them out where its
    /// variables are to be those that PyTorch's optimizer has.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap, batch_norm};
    ///
    /// let varmap = VarMap::new();
    /// let norm = batch_norm(8, 1e-5, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    /// let is_trained = |name: &str, _: &_| !name.ends_with("running_mean") && !name.ends_with("running_var");
    /// let optimizer = Adamax::from_varmap_where(&varmap, is_trained, ParamsAdamax::default())?;
    /// assert_eq!(optimizer.names().collect::<Vec<_>>(), ["bias", "weight"]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`new`](Optimizer::new); none of the variables is kept.
    pub fn from_varmap_where(
        varmap: &VarMap,
        mut keep: impl FnMut(&str, &Var) -> bool,
        params: ParamsAdamax,
    ) -> Result<Self> {
        // The caller's function runs without the lock.
        let named = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
        let mut vars: Vec<_> = named.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        drop(named);
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        let all = vars.len();
        vars.retain(|(name, var)| keep(name, var));
        if vars.is_empty() && all > 0 {
            let error = Error::invalid("keep", "a function that keeps a variable", format!("none of {all}"));
            return Err(error.of_optimizer(&params.name));
        }
        Self::from_named(vars, params)
    }

    /// An optimizer of named variables.
    ///
    /// # Errors
    ///
    /// As [`new`](Optimizer::new), and a name that is given twice.
    pub fn from_named<S: Into<String>>(vars: impl IntoIterator<Item = (S, Var)>, params: ParamsAdamax) -> Result<Self> {
        Self::from_groups([ParamGroup::new(DEFAULT_GROUP).vars(vars)], params)
    }

    /// An optimizer of groups of variables with settings of their own. A group named "default" takes the place of the
    /// one for variables that are [added](Self::add_var) later.
    ///
    /// # Errors
    ///
    /// As [`from_named`](Self::from_named), for the names of groups, too.
    pub fn from_groups(groups: impl IntoIterator<Item = ParamGroup>, params: ParamsAdamax) -> Result<Self> {
        let mut adamax = Self::without_vars(params)?;
        let mut groups: Vec<_> = groups.into_iter().collect();
        if let Some(index) = groups.iter().position(|group| group.settings.name == DEFAULT_GROUP) {
            let ParamGroup { settings, vars } = groups.remove(index);
            adamax.set_group(settings)?;
            adamax.insert_named(0, vars)?;
        }
        groups.into_iter().try_for_each(|group| adamax.add_group(group))?;
        adamax.check_no_decay()?;
        Ok(adamax)
    }

    /// Updates from pairs of a variable and its gradient, dense (`&Tensor`) or of some rows (`&SparseGrad`), for those
    /// who have no `GradStore`. It is a call of `step`. A variable may have one gradient of each kind, which are added;
    /// a list of both kinds is made of [`Gradient`]s.
    ///
    /// # Errors
    ///
    /// As [`step`](Optimizer::step); a variable that is not the optimizer's, or that is given twice; an index that is
    /// not the number of a row, or values of the wrong shape.
    pub fn apply_gradients<'a, G: Into<Gradient<'a>>>(
        &mut self,
        pairs: impl IntoIterator<Item = (&'a Var, G)>,
    ) -> Result<()> {
        let names = self.names_by_id();
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
        self.call(|param| {
            let (dense, sparse) = found.get(&param.var.id()).copied().unwrap_or_default();
            Found { dense, sparse, ..Found::default() }
        })
    }

    /// One call, with gradients from anywhere.
    fn call<'g>(&mut self, lookup: impl FnMut(&Param) -> Found<'g>) -> Result<()> {
        self.traced(|adamax| adamax.run(lookup))
    }

    /// A call, or a flush, in a span of its own.
    fn traced(&mut self, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let span = trace::Call::enter(&self.params.name, self.counters.calls);
        run(self).map_err(|error| error.of_optimizer(&self.params.name))?;
        let Report { lr, outcome, .. } = self.report;
        span.record(lr, outcome.updates(), outcome.known_skipped());
        Ok(())
    }

    fn run<'g>(&mut self, lookup: impl FnMut(&Param) -> Found<'g>) -> Result<()> {
        let mut collected = collect(&self.vars, &self.storages, lookup)?;
        if collected.is_empty() {
            return self.without_gradients(&collected);
        }
        let on_gpu = self.measures_on_gpu(Gradients::OfThisCall(&collected));
        self.make_room(Gradients::OfThisCall(&collected), on_gpu)?;
        let rates = self.rates(self.counters.calls)?;
        if let (Some(_), Some(index)) = (self.params.ema, collected.first_sparse()) {
            let expected = format!("none with `{}`, whose average would cost all of its rows", self.vars[index].name);
            return Err(Error::invalid("ema", expected, "a gradient of some rows"));
        }
        if Summary::is_measured(&self.params) && !on_gpu {
            collected.sum_rows(&self.vars)?;
        }
        let steps = self.params.gradient_accumulation_steps;
        let is_last = self.counters.pending + 1 >= steps;
        let averages = Averages::prepare(&self.vars, self.params.ema, |index, param| {
            is_last && (collected.get(index).is_some() || param.sum().is_some())
        })?;
        let updates_before = self.counters.updates;
        let outcome = match steps {
            1 => self.update(Gradients::OfThisCall(&collected), &rates)?,
            steps => self.accumulate(&collected, steps, &rates)?,
        };
        self.report = Report { missing: collected.missing(&self.vars), ..Report::of(&rates, outcome, self.vars.len()) };
        for (index, param) in self.vars.iter_mut().enumerate() {
            param.history = param.history.after(collected.get(index).is_some());
        }
        self.follow(outcome);
        if outcome == Outcome::Skipped {
            self.counters.skipped += 1;
            return Ok(());
        }
        let rounded = Rounded::of_call(&rates, self.params.seed, self.counters.calls);
        averages.advance(&mut self.vars, self.params.ema, updates_before, &rounded, &mut self.context)?;
        self.counters.calls += 1;
        Ok(())
    }

    /// A call without any gradient, which does nothing.
    fn without_gradients(&mut self, collected: &Collected<'_>) -> Result<()> {
        if self.params.missing_gradients != MissingGradients::Allow {
            return Err(ErrorKind::NoGradients { vars: self.vars.len() }.into());
        }
        self.settle(false)?;
        let lr = self.rate(self.counters.calls)?;
        let (missing, vars) = (collected.missing(&self.vars), self.vars.len());
        self.report = Report { lr, group_lrs: Vec::new(), outcome: Outcome::NoGradients, vars, missing };
        Ok(())
    }

    /// An update with the sums of the calls that wait.
    fn flush(&mut self) -> Result<()> {
        let Counters { calls, updates, pending, .. } = self.counters;
        let rates = self.rates(calls.saturating_sub(1))?;
        let averages = Averages::prepare(&self.vars, self.params.ema, |_, param| param.sum().is_some())?;
        let outcome = self.update(Gradients::Accumulated { calls: pending }, &rates)?;
        self.clear_sums()?;
        self.report = Report::of(&rates, outcome, self.vars.len());
        if outcome == Outcome::Skipped {
            self.follow(outcome);
            self.counters.skipped += 1;
            return Ok(());
        }
        let rounded = Rounded::of_flush(&rates, self.params.seed, updates);
        averages.advance(&mut self.vars, self.params.ema, updates, &rounded, &mut self.context)
    }

    /// The update, unless it is skipped.
    fn update(&mut self, gradients: Gradients<'_>, rates: &Rates) -> Result<Outcome> {
        let unscale = match gradients {
            Gradients::OfThisCall(_) => self.unscale(),
            Gradients::Accumulated { calls } => 1.0 / calls as f64,
        };
        let (summary, mut measured) = if self.measures_on_gpu(gradients) {
            Summary::of_update(&self.params, unscale)
        } else {
            let grads = || gradients.sources(&self.vars);
            (Summary::measure(&mut self.context, grads, &self.params, unscale)?, None)
        };
        if self.params.skips_nonfinite() && !summary.is_finite() {
            return Ok(Outcome::Skipped);
        }
        // Whatever settings can refuse comes before the first write.
        let late = if measured.is_some() { self.late_rates()? } else { Vec::new() };
        self.check_missing(|index, param| gradients.of(index, param.accumulated.as_ref()).is_some())?;
        self.check_tables(rates, |index, param| {
            gradients.of(index, param.accumulated.as_ref()).map(GradRef::is_of_rows)
        })?;
        self.seek_written(gradients)?;
        self.prepare_states(gradients, rates)?;
        let update = self.counters.updates + 1;
        let orders = self.orders(gradients, rates, &summary, 0);
        if let Some(measured) = &mut measured {
            let orders = |(late, rates)| self.orders(gradients, rates, &summary, late).into_iter().flatten().collect();
            measured.late = (1..).zip(&late).map(orders).collect();
        }
        let mut locked: Vec<_> = self.vars.iter_mut().map(|param| param.unlock()).collect();
        let (mut tasks, mut row_tasks, mut nth) = (Vec::with_capacity(locked.len()), Vec::new(), 0);
        for (index, (orders, (var, accumulated, state))) in orders.iter().zip(&mut locked).enumerate() {
            let (Some(orders), Some(grad)) = (*orders, gradients.of(index, *accumulated)) else { continue };
            state.pay_touched(&grad, var)?;
            state.scale_down(var)?;
            match grad {
                GradRef::Rows(grad) => {
                    let (state, checksums) = state.parts();
                    row_tasks.push(RowTask { nth, var, grad, orders, state, checksums });
                }
                GradRef::Dense(read) => {
                    let place = state.place();
                    tasks.push(Task { place, nth, lent: Some(*var), read: Some(read), kind: Update { orders, state } });
                }
            }
            nth += 1;
        }
        let outcome = match &measured {
            Some(measured) => Outcome::UpdatedOnGpu { vars: nth, skips: measured.skips },
            None => Outcome::Updated { vars: nth, total_norm: summary.total_norm() },
        };
        self.context.update(tasks, row_tasks, measured)?;
        for (index, (orders, (_, accumulated, state))) in orders.iter().zip(&mut locked).enumerate() {
            let (Some(orders), Some(grad)) = (orders, gradients.of(index, *accumulated)) else { continue };
            state.step += 1;
            state.book(orders, grad)?;
        }
        drop(locked);
        self.counters.updates = update;
        if let Outcome::UpdatedOnGpu { skips: true, .. } = outcome {
            self.unsettled.push(gradients.indices(&self.vars).collect());
        }
        Ok(outcome)
    }

    /// Whether all of an update happens on one GPU, so that the host waits neither for norms nor to hear what is skipped:
    /// but where that decides what happens to sums and averages, and what is booked of tables that owe.
    fn measures_on_gpu(&self, gradients: Gradients<'_>) -> bool {
        let ParamsAdamax { gradient_accumulation_steps, ema, .. } = &self.params;
        let all =
            std::iter::once(Some(self.params.sparse_update)).chain(self.groups.iter().map(|group| group.sparse_update));
        let owes = all.flatten().any(|sparse_update| sparse_update == SparseUpdate::Exact);
        let decides = self.params.skips_nonfinite() && (*gradient_accumulation_steps > 1 || ema.is_some() || owes);
        !decides && all_on_one_gpu(gradients.places(&self.vars))
    }

    /// The rates that hold if 1, 2, .. of the unsettled calls have been skipped.
    fn late_rates(&self) -> Result<Vec<Rates>> {
        (1..=self.unsettled.len() as u64).map(|late| self.rates(self.counters.calls - late)).collect()
    }

    /// Refuses an update that tables with [`SparseUpdate::Exact`] cannot have. It writes nothing, and after it the
    /// settings have no more say. `is_of_rows` tells for each variable with a gradient whether that is of some rows.
    fn check_tables(&self, rates: &Rates, is_of_rows: impl Fn(usize, &Param) -> Option<bool>) -> Result<()> {
        let is_any_exact = debts::is_any();
        for (index, param) in self.vars.iter().enumerate() {
            let GroupRates { plan, lr, .. } = &rates.groups[param.group];
            let is_shared = matches!(param.state, Held::Shared(_));
            let is_exact = plan.keeping.sparse_update == SparseUpdate::Exact;
            if !is_shared && !is_exact && !is_any_exact {
                continue;
            }
            let Some(is_of_rows) = is_of_rows(index, param) else { continue };
            if !is_shared {
                // Whoever else writes the table writes rows that have missed updates.
                debts::check_alone(param.var.id())?;
                if !is_exact || !is_of_rows {
                    continue;
                }
            }
            if Coefficients::of_update(&plan.hyper(param.decays), *lr, 1).decay >= 1.0 {
                let expected = "less than 1 of the weight to decay in a step, for `sparse_update: Exact`";
                return Err(Error::invalid("lr", expected, lr));
            }
        }
        Ok(())
    }

    /// Refuses gradients of rows that somebody has written while they had missed updates. It writes nothing.
    fn seek_written(&mut self, gradients: Gradients<'_>) -> Result<()> {
        for (index, param) in self.vars.iter_mut().enumerate() {
            if let Held::Shared(_) = param.state {
                let (var, accumulated, mut state) = param.unlock();
                if let Some(grad) = gradients.of(index, accumulated) {
                    state.seek_written(&grad, var)?;
                }
            }
        }
        Ok(())
    }

    /// Gets the states of tables ready for gradients of rows.
    fn prepare_states(&mut self, gradients: Gradients<'_>, rates: &Rates) -> Result<()> {
        let seed = self.params.seed;
        for (index, param) in self.vars.iter_mut().enumerate() {
            if let Some(GradRef::Rows(_)) = gradients.of(index, param.accumulated.as_ref()) {
                let key = derive(seed, param.key);
                param.prepare_rows(&rates.groups[param.group].plan, key)?;
            }
        }
        Ok(())
    }

    /// What each variable with a gradient is updated with, if `late` of the calls that were counted have been skipped.
    fn orders(&self, gradients: Gradients<'_>, rates: &Rates, summary: &Summary, late: u64) -> Vec<Option<Orders>> {
        let sign = if self.params.maximize { -1.0 } else { 1.0 };
        let (mut last, mut nth) = (None, 0);
        let orders = self.vars.iter().enumerate().map(|(index, param)| {
            gradients.of(index, param.accumulated.as_ref())?;
            let state = param.state.get();
            let step = state.step + 1 - late;
            let t = match self.params.step_count {
                StepCount::Shared => self.counters.updates + 1 - late,
                StepCount::PerVar => step,
            };
            let coefficients = Coefficients {
                grad_scale: sign * summary.grad_scale(nth),
                clamp: self.params.clip_value.unwrap_or(f64::INFINITY),
                ..rates.coefficients(param.group, param.decays, t, &mut last)
            };
            nth += 1;
            let GroupRates { plan, octaves, .. } = &rates.groups[param.group];
            let key = derive(derive(self.params.seed, param.key), step);
            let encoding = state.moments.layout.encoding;
            let shrink = shrinkage(*octaves, step, state.moments.layout.by_rows.then_some(key));
            Some(Orders { coefficients, encoding, shrink, rounding: plan.keeping.rounding, key })
        });
        orders.collect()
    }
}
