//! Gradients that wait for their update: summed in the shape of the variable, or by rows where they are of rows.

use candle_core::DType;

use super::Adamax;
use super::grads::{DenseGrad, Grad, Grads};
use super::vars::{Param, Vars};
use crate::error::Result;
use crate::gradient::sparse::{RowSum, densify};
use crate::ids::row_len;
use crate::kernel::{Accumulate, Backends, RowGrad, SummedRows, Task};
use crate::state::Buffer;

/// A sum of gradients.
pub(super) enum Sum {
    /// In the shape of the variable.
    Dense(Buffer),
    /// Sums of the rows that had any.
    Rows(RowSum),
}

impl Sum {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Dense(sum) => sum.bytes(),
            Self::Rows(sum) => sum.bytes(),
        }
    }
}

/// The sum of unscaled gradients of one variable since the last update.
#[derive(Default)]
pub(super) struct GradSum {
    /// Number of calls in which the variable had a gradient.
    pub(super) calls: u64,
    /// Zeros that are kept for the next sum, if there were no calls.
    pub(super) sum: Option<Sum>,
}

impl GradSum {
    /// The sum, if there were calls.
    pub(super) fn get(&self) -> Option<&Sum> {
        self.sum.as_ref().filter(|_| self.calls > 0)
    }

    /// The sum in the shape of the variable, which is there, or `fresh`.
    fn dense(&mut self, fresh: Option<Buffer>) -> &mut Buffer {
        if let Some(fresh) = fresh {
            self.sum = Some(Sum::Dense(fresh));
        }
        match &mut self.sum {
            Some(Sum::Dense(sum)) => sum,
            _ => unreachable!("a dense sum is there or was prepared"),
        }
    }

    /// The sum of rows, which is empty if there were no calls.
    fn rows(&mut self, row_len: usize, dtype: DType) -> &mut RowSum {
        if self.calls == 0 {
            self.sum = Some(Sum::Rows(RowSum::empty(row_len, dtype)));
        }
        match &mut self.sum {
            Some(Sum::Rows(sum)) => sum,
            _ => unreachable!("rows are added to a dense sum beforehand"),
        }
    }
}

/// Memory for the gradients of one more call, made before any sum is written.
pub(super) struct Addition(Vec<Addend>);

enum Addend {
    /// Unscaled rows, to be added to the sum of rows.
    Rows(SummedRows),
    /// The dense sum with the rows added.
    Sum(Buffer),
    /// The gradient is added to the dense sum, or to this one, which takes its place.
    Grad(Option<Buffer>),
}

impl Addition {
    /// Gets ready for gradients of which the true ones are `unscale` times as large.
    pub(super) fn prepare(vars: &Vars, grads: &Grads<'_>, unscale: f64) -> Result<Self> {
        let addends = grads.iter().map(|(index, grad)| {
            let Param { info, sum: waiting, .. } = &*vars[*index];
            let var = info.var.as_tensor();
            let buffer = |dense| Buffer::from_tensor(&dense, var, info.place);
            Ok(match (grad, waiting.get(), &waiting.sum) {
                (Grad::Rows(rows), Some(Sum::Dense(sum)), _) => {
                    Addend::Sum(buffer(densify(Some(&sum.to_tensor(var.shape())?), rows, unscale, var)?)?)
                }
                (Grad::Rows(rows), ..) => Addend::Rows(RowSum::scaled(rows, unscale, var.dtype())?),
                (Grad::Dense(_), _, Some(Sum::Dense(_))) => Addend::Grad(None),
                (Grad::Dense(_), Some(Sum::Rows(rows)), _) => {
                    let rows = RowGrad::of_sums(rows.merged(), row_len(var));
                    Addend::Grad(Some(buffer(densify(None, &rows, 1.0, var)?)?))
                }
                (Grad::Dense(_), ..) => Addend::Grad(Some(Buffer::zeros(var, info.place)?)),
            })
        });
        addends.collect::<Result<_>>().map(Self)
    }

    /// Adds the gradients.
    pub(super) fn add(self, vars: &mut Vars, grads: &Grads<'_>, unscale: f64, backends: &mut Backends) -> Result<()> {
        let (mut tasks, mut rest) = (Vec::with_capacity(self.0.len()), Vec::new());
        for (nth, ((grad, param), addend)) in grads.with(vars).zip(self.0).enumerate() {
            let Param { info, sum, .. } = param;
            match (grad, addend) {
                (Grad::Dense(grad), Addend::Grad(fresh)) => {
                    let kind = Accumulate { unscale, sum: sum.dense(fresh) };
                    tasks.push(Task { place: info.place, nth, lent: None, read: Some(grad.source()), kind });
                }
                (_, addend) => rest.push((sum, &info.var, addend)),
            }
        }
        backends.accumulate(tasks)?;
        for (sum, var, addend) in rest {
            match addend {
                Addend::Rows(rows) => sum.rows(row_len(var), var.dtype()).add(rows),
                Addend::Sum(dense) => sum.sum = Some(Sum::Dense(dense)),
                Addend::Grad(_) => unreachable!("rows are not added to dense sums by a task"),
            }
        }
        grads.with(vars).for_each(|(_, param)| param.sum.calls += 1);
        Ok(())
    }
}

impl Vars {
    /// Whether no gradients wait.
    fn wait_for_nothing(&self) -> bool {
        self.iter().all(|param| param.sum.calls == 0)
    }

    /// Takes the sums out, as the gradients of an update.
    pub(super) fn take_sums(&mut self) -> Grads<'static> {
        let waiting = self.iter_mut().enumerate().filter(|(_, param)| param.sum.calls > 0);
        let grads = waiting.filter_map(|(index, param)| {
            Some(match param.sum.sum.take()? {
                Sum::Dense(sum) => (index, Grad::Dense(DenseGrad::Sum(sum))),
                Sum::Rows(sum) => (index, Grad::Rows(Box::new(sum.into_gradient()))),
            })
        });
        Grads(grads.collect())
    }

    /// Puts sums back that have not been used.
    pub(super) fn put_back(&mut self, sums: Grads<'static>) {
        for (index, grad) in sums.0 {
            self[index].sum.sum = match grad {
                Grad::Dense(DenseGrad::Sum(sum)) => Some(Sum::Dense(sum)),
                Grad::Dense(DenseGrad::Call(_)) => unreachable!("sums are buffers"),
                Grad::Rows(rows) => Some(Sum::Rows(RowSum::of_gradient(*rows))),
            };
        }
    }

    /// Drops the sums; the memory of dense ones is kept for the next.
    pub(super) fn clear_sums(&mut self) -> Result<()> {
        for GradSum { calls, sum } in self.iter_mut().map(|param| &mut param.sum).filter(|sum| sum.calls > 0) {
            *calls = 0;
            match sum {
                Some(Sum::Dense(sum)) => sum.clear()?,
                _ => *sum = None,
            }
        }
        Ok(())
    }
}

impl Adamax {
    /// How many calls wait for an update: those whose gradients have been accumulated since the last one
    /// ([`gradient_accumulation_steps`](crate::ParamsAdamax::gradient_accumulation_steps)).
    pub fn pending(&self) -> u64 {
        self.progress.counters.pending
    }

    /// Updates with the gradients of the calls that [wait](Self::pending), and tells whether there were any: for
    /// the end of an epoch, whose number of calls is not a multiple of the accumulation steps.
    ///
    /// The update is that of the N-th call if N were the number of calls that wait: their mean is clipped, skipped
    /// if it is not finite and that is asked for, and [reported](Self::report), and the averages move once more. It
    /// is no call of its own: [`calls`](Self::calls) and schedules stay where they are, and its learning rate is
    /// that of the last call. Where it is skipped, the sums are dropped, and a
    /// [dynamic loss scale](crate::LossScale::Dynamic) follows.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{Device, Var};
    ///
    /// let w = Var::new(&[8f32], &Device::Cpu)?;
    /// let params = ParamsAdamax { lr: 0.5.into(), gradient_accumulation_steps: 4, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// for _batch in 0..6 {
    ///     optimizer.backward_step(&w.sum_all()?)?;
    /// }
    /// assert_eq!((optimizer.updates(), optimizer.pending()), (1, 2));
    /// assert!(optimizer.flush_gradients()?); // with the mean of two
    /// assert_eq!((optimizer.updates(), optimizer.pending(), w.to_vec1::<f32>()?), (2, 0, vec![7.0]));
    /// assert!(!optimizer.flush_gradients()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`step`](candle_nn::Optimizer::step), but for what it says of single gradients. Nothing has changed then.
    pub fn flush_gradients(&mut self) -> Result<bool> {
        self.named(|adamax| {
            adamax.sync()?;
            if adamax.vars.wait_for_nothing() {
                // The variables of the calls that waited, if any, have been removed.
                adamax.progress.forget_pending();
                return Ok(false);
            }
            adamax.traced(Self::flush)?;
            Ok(true)
        })
    }

    /// Drops the gradients of the calls that [wait](Self::pending), and gives the number of these calls. What they
    /// counted, and where averages are, stays.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{Device, Var};
    ///
    /// let w = Var::new(&[8f32], &Device::Cpu)?;
    /// let params = ParamsAdamax { gradient_accumulation_steps: 4, ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    /// optimizer.backward_step(&w.sum_all()?)?;
    /// assert_eq!(optimizer.discard_gradients()?, 1);
    /// assert_eq!((optimizer.calls(), optimizer.updates(), optimizer.pending()), (1, 0, 0));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A device whose memory cannot be written.
    pub fn discard_gradients(&mut self) -> Result<u64> {
        self.named(|adamax| adamax.vars.clear_sums())?;
        Ok(self.progress.forget_pending())
    }
}
