//! The rule in candle's tensor operations: for any device that candle has, and the oracle of the tests.
//!
//! It shares no arithmetic with the kernels on purpose. Invariant: all results are computed before the first one is
//! written, so that an operation that fails has changed nothing.

use candle_core::{DType, Result, Shape, Tensor};

use super::cpu::{Accumulate, Average, RowTask, Task, Update};
use super::lend::Source;
use super::rows::SummedRows;
use crate::reduce::{Norm, NormType};
use crate::rule::Coefficients;
use crate::state::{Buffer, ParamState, Stored, arithmetic};

/// Variables and moments after an update that has not been written yet.
pub(super) struct Updated<'a> {
    whole: Vec<(&'a Tensor, &'a mut ParamState, [Tensor; 3])>,
    rows: Vec<UpdatedRows>,
}

/// Computes an update.
pub(super) fn update<'a>(tasks: Vec<Task<'a, Update<'a>>>, row_tasks: Vec<RowTask<'_>>) -> Result<Updated<'a>> {
    let rows = row_tasks.into_iter().map(UpdatedRows::compute).filter_map(Result::transpose).collect::<Result<_>>()?;
    let mut whole = Vec::with_capacity(tasks.len());
    for task in tasks {
        let (Some(var), Some(read)) = (task.lent, task.read) else { continue };
        if is_empty(var) {
            continue;
        }
        let Update { update_args, state } = task.kind;
        let [m, u] = moments(state)?;
        let (next_w, next_m, next_u) = update_one(&update_args.coefficients, var, gradient(read)?, m, u)?;
        whole.push((var, state, [next_w, next_m, next_u]));
    }
    Ok(Updated { whole, rows })
}

impl Updated<'_> {
    /// Writes it.
    pub(super) fn write(self) -> Result<()> {
        for (var, state, [next_w, next_m, next_u]) in self.whole {
            set(var, &next_w)?;
            state.moments.stored = Stored::Full { exp_avg: Buffer::Tensor(next_m), exp_inf: Buffer::Tensor(next_u) };
        }
        self.rows.iter().try_for_each(UpdatedRows::write)
    }
}

/// Some operations on a GPU cannot be launched on nothing.
fn is_empty(tensor: &Tensor) -> bool {
    tensor.elem_count() == 0
}

/// The touched rows of one table after their update, and where they go.
struct UpdatedRows {
    /// The row of each element, in the shape of the rows.
    rows: Tensor,
    /// What is written, and with what.
    tensors: [(Tensor, Tensor); 3],
}

impl UpdatedRows {
    /// None if there are no elements.
    fn compute(task: RowTask<'_>) -> Result<Option<Self>> {
        let RowTask { var, grad, update_args, state, .. } = task;
        let SummedRows { rows, values } = grad.summed(var.dtype())?;
        let (n, len) = (rows.len(), grad.row_len);
        if n * len == 0 {
            return Ok(None);
        }
        let flat = |tensor: &Tensor| tensor.reshape((tensor.dim(0)?, len));
        let rows = Tensor::from_slice(&rows, n, var.device())?;
        let shape = Shape::from((n, len));
        let values = values.to_tensor(&shape)?.to_device(var.device())?;
        // Views: what is written to them later is written to the variable and its moments.
        let [m, u] = moments(state)?;
        let all = [flat(&var.detach())?, flat(m)?, flat(u)?];
        let [w, m, u] = &all;
        let select = |tensor: &Tensor| tensor.index_select(&rows, 0);
        let (next_w, next_m, next_u) =
            update_one(&update_args.coefficients, &select(w)?, &values, &select(m)?, &select(u)?)?;
        let [w, m, u] = all;
        let rows = rows.reshape((n, 1))?.broadcast_as(&shape)?.contiguous()?;
        let tensors = [(w, next_w.contiguous()?), (m, next_m.contiguous()?), (u, next_u.contiguous()?)];
        Ok(Some(Self { rows, tensors }))
    }

    fn write(&self) -> Result<()> {
        self.tensors.iter().try_for_each(|(to, from)| to.scatter_set(&self.rows, from, 0))
    }
}

pub(super) fn accumulate(tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        let Some(read) = task.read else { continue };
        let sum = tensor(task.kind.sum)?;
        if is_empty(sum) {
            continue;
        }
        let next = (sum + gradient(read)?.to_dtype(sum.dtype())?.affine(task.kind.unscale, 0.0)?)?;
        results.push((task.kind.sum, next));
    }
    for (sum, next) in results {
        *sum = Buffer::Tensor(next);
    }
    Ok(())
}

pub(super) fn average(tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        let Some(var) = task.lent else { continue };
        if is_empty(var) {
            continue;
        }
        // Variables that are updated here have no masters, and are rounded to the nearest value.
        let Average { momentum, overwrite, average, .. } = task.kind;
        let old = tensor(average)?;
        let param = var.to_dtype(old.dtype())?;
        // A share of 0 leaves its term out, whatever it is: 0 times infinity would be NaN.
        let next = match momentum {
            0.0 => param.copy()?,
            1.0 => old.clone(),
            _ => ((old * momentum)? + (param * (1.0 - momentum))?)?,
        };
        results.push((var, average, next, overwrite));
    }
    for (var, average, next, overwrite) in results {
        if overwrite {
            set(var, &next.to_dtype(var.dtype())?)?;
        }
        *average = Buffer::Tensor(next);
    }
    Ok(())
}

/// The norm of one gradient; waits for the device. Everything is divided by the largest magnitude first, because not
/// every device has f64 to hold squares in.
pub(super) fn measure(grad: Source<'_>, norm: NormType) -> Result<Norm> {
    let grad = gradient(grad)?;
    if grad.elem_count() == 0 {
        return Ok(Norm::default());
    }
    let magnitudes = grad.to_dtype(arithmetic(grad.dtype()))?.abs()?.flatten_all()?;
    // A maximum may pass over a NaN; a sum does not.
    if number(&magnitudes.sum(0)?)?.is_nan() {
        return Ok(Norm::of(f64::NAN));
    }
    let largest = number(&magnitudes.max(0)?)?;
    if norm == NormType::Inf || largest == 0.0 || largest.is_infinite() {
        return Ok(Norm::of(largest));
    }
    let scaled = magnitudes.broadcast_div(&magnitudes.max(0)?)?;
    let norm_of_scaled = match norm {
        NormType::L2 => number(&scaled.sqr()?.sum(0)?)?.sqrt(),
        _ => number(&scaled.sum(0)?)?,
    };
    Ok(Norm::product(largest, norm_of_scaled))
}

fn update_one(
    c: &Coefficients<f64>,
    var: &Tensor,
    grad: &Tensor,
    exp_avg: &Tensor,
    exp_inf: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let w = var.to_dtype(exp_avg.dtype())?;
    let mut g = (grad.to_dtype(exp_avg.dtype())? * c.grad_scale)?;
    if c.clamp.is_finite() {
        let limit = g.ones_like()?.affine(c.clamp, 0.0)?;
        g = g.gt(&limit)?.where_cond(&limit, &g)?;
        let limit = limit.neg()?;
        g = g.lt(&limit)?.where_cond(&limit, &g)?;
    }
    if c.l2 != 0.0 {
        g = (g + (&w * c.l2)?)?;
    }
    let m = ((exp_avg * c.beta1)? + (&g * c.one_minus_beta1)?)?;
    let seen = (g.abs()? + c.eps_inside)?;
    let u = maximum(&(exp_inf * c.beta2)?, &seen)?;
    let denominator = (&u + c.eps_outside)?;
    let zero = denominator.eq(&denominator.zeros_like()?)?;
    let ratio = zero.where_cond(&denominator.zeros_like()?, &(&m / &denominator)?)?;
    let decayed = if c.decay == 0.0 { w } else { (&w - (&w * c.decay)?)? };
    let w = (decayed - (ratio * c.step_size)?)?;
    Ok((w.to_dtype(var.dtype())?, m, u))
}

/// The larger of each pair; NaN where one is NaN, which candle's own `maximum` does not promise.
fn maximum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let larger = a.ge(b)?.where_cond(a, b)?;
    // Only a NaN differs from itself. If b is NaN, the comparison above has chosen it already.
    a.ne(a)?.where_cond(a, &larger)
}

/// `Var::set`, for the tensor inside of a `Var`.
fn set(var: &Tensor, value: &Tensor) -> Result<()> {
    if var.elem_count() == 0 {
        // candle's operations may return an empty tensor itself, which `Var::set` refuses as a value for it.
        return Ok(());
    }
    candle_core::Var::from_tensor(var)?.set(value)
}

fn gradient(source: Source<'_>) -> Result<&Tensor> {
    match source {
        Source::Tensor(grad) => Ok(grad),
        Source::Buffer(buffer) => tensor(buffer),
    }
}

fn moments(state: &ParamState) -> Result<[&Tensor; 2]> {
    match &state.moments.stored {
        Stored::Full { exp_avg, exp_inf } => Ok([tensor(exp_avg)?, tensor(exp_inf)?]),
        _ => candle_core::bail!("expected moments on the variable's device"),
    }
}

fn tensor(buffer: &Buffer) -> Result<&Tensor> {
    match buffer {
        Buffer::Tensor(tensor) => Ok(tensor),
        _ => candle_core::bail!("expected a buffer on the variable's device"),
    }
}

fn number(scalar: &Tensor) -> Result<f64> {
    scalar.to_device(&candle_core::Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()
}
