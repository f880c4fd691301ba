//! Gradients that wait for their update: summed in the shape of the variable, or by rows where they are of rows.

use candle_core::DType;

use super::Adamax;
use super::grads::{DenseGrad, Grad, Grads};
use super::vars::Vars;
use crate::error::Result;
use crate::gradient::sparse::{RowSum, densify, row_len};
use crate::kernel::{Accumulate, Backends, RowGrad, SummedRows, Task};
use crate::state::Buffer;

/// A sum of gradients.
pub(super) enum Sum {
    /// In the shape of the variable.
    Dense(Buffer),
    /// Of the rows that had any.
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

/// The sums of all variables, in their order.
#[derive(Default)]
pub(super) struct GradSums(pub(super) Vec<GradSum>);

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

impl GradSums {
    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|sum| sum.calls == 0)
    }

    /// Gets ready for the gradients of one call.
    pub(super) fn prepare(&self, grads: &Grads<'_>, vars: &Vars, unscale: f64) -> Result<Addition> {
        let addends = grads.iter().map(|(index, grad)| {
            let (info, waiting) = (&vars[*index], &self.0[*index]);
            let var = info.var.as_tensor();
            let buffer = |dense| Buffer::from_tensor(&dense, var, info.place);
            Ok(match (grad, waiting.get(), &waiting.sum) {
                (Grad::Rows(rows), Some(Sum::Dense(sum)), _) => {
                    let dense = densify(Some(&sum.to_tensor(var.shape())?), rows, unscale, var)?;
                    Addend::Sum(buffer(dense)?)
                }
                (Grad::Rows(rows), ..) => Addend::Rows(RowSum::scaled(rows, unscale, var.dtype())?),
                (Grad::Dense(_), _, Some(Sum::Dense(_))) => Addend::Grad(None),
                (Grad::Dense(_), Some(Sum::Rows(rows)), _) => {
                    let sums = rows.merged();
                    let dense = densify(None, &RowGrad::summed_up(&sums, row_len(var)), 1.0, var)?;
                    Addend::Grad(Some(buffer(dense)?))
                }
                (Grad::Dense(_), ..) => Addend::Grad(Some(Buffer::zeros(var, info.place)?)),
            })
        });
        addends.collect::<Result<_>>().map(Addition)
    }

    /// Adds the gradients of one call.
    pub(super) fn add(
        &mut self,
        Addition(addends): Addition,
        grads: &Grads<'_>,
        vars: &Vars,
        unscale: f64,
        backends: &mut Backends,
    ) -> Result<()> {
        let (mut tasks, mut rest) = (Vec::with_capacity(addends.len()), Vec::new());
        for ((index, grad, sum), addend) in grads.with(&mut self.0).zip(addends) {
            match (grad, addend) {
                (Grad::Dense(grad), Addend::Grad(fresh)) => {
                    let kind = Accumulate { unscale, sum: sum.dense(fresh) };
                    tasks.push(Task {
                        place: vars[index].place,
                        nth: index,
                        lent: None,
                        read: Some(grad.source()),
                        kind,
                    });
                }
                (_, addend) => rest.push((sum, &vars[index].var, addend)),
            }
        }
        backends.accumulate(tasks)?;
        for (sum, var, addend) in rest {
            match addend {
                Addend::Rows(rows) => sum.rows(row_len(var), var.dtype()).add(rows),
                Addend::Sum(dense) => sum.sum = Some(Sum::Dense(dense)),
                Addend::Grad(_) => unreachable!("rows are not added to dense sums on a device"),
            }
        }
        grads.with(&mut self.0).for_each(|(_, _, sum)| sum.calls += 1);
        Ok(())
    }

    /// The sums, as the gradients of an update.
    pub(super) fn grads<'s>(&'s mut self, vars: &Vars) -> Grads<'s> {
        let grads = self.0.iter_mut().zip(vars.iter()).enumerate().filter(|(_, (sum, _))| sum.calls > 0);
        let grads = grads.filter_map(|(index, (sum, info))| {
            Some(match sum.sum.as_mut()? {
                Sum::Dense(sum) => (index, Grad::Dense(DenseGrad::Sum(sum))),
                Sum::Rows(sum) => (index, Grad::Rows(Box::new(RowGrad::summed_up(sum.merge(), row_len(&info.var))))),
            })
        });
        Grads(grads.collect())
    }

    /// Drops the sums; the memory of dense ones is kept for the next.
    pub(super) fn clear(&mut self) -> Result<()> {
        for GradSum { calls, sum } in self.0.iter_mut().filter(|sum| sum.calls > 0) {
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
    /// [`grad_scaler`](crate::ParamsAdamax::grad_scaler) follows.
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
            if adamax.sums.is_empty() {
                // The variables of the calls that waited, if any, have been removed.
                adamax.progress.counters.pending = 0;
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
        self.named(|adamax| adamax.sums.clear())?;
        Ok(std::mem::take(&mut self.progress.counters.pending))
    }
}
