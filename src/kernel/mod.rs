//! Which kernel runs, from device and dtype; nothing else.

mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
pub(crate) mod lend;
mod lookup;
mod plan;
mod portable;
mod rows;

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::reduce::NormType;
use crate::state::Place;
use lend::Borrowed;

pub(crate) use cpu::{Accumulate, Average, Orders, PayTask, RowTask, Task, Update};
pub(crate) use lend::Source;
pub(crate) use lookup::{copy, dot_rows, enlarge, gather, largest, largest_backward, pool, renormalize};
pub(crate) use rows::{Contribution, Occurrences, RowGrad, RowValues};

/// Which implementation of the update an optimizer uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// The fastest one for each variable: one pass over memory on the CPU, [`Self::Portable`] elsewhere.
    #[default]
    Auto,
    /// candle's tensor operations, some ten of them a variable: slower, for any device, and an independent
    /// implementation of the formula to compare with.
    Portable,
}

impl Kernel {
    /// Where the state of `var` lives under this choice.
    pub(crate) fn place(self, var: &Tensor) -> Place {
        match self {
            Self::Auto if var.device().is_cpu() => Place::Host,
            _ => Place::Device,
        }
    }
}

/// Whether `dtype` is one that parameters may have.
pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// Updates variables and moments in place: whole ones, and the touched rows of tables.
pub(crate) fn update(tasks: Vec<Task<'_, Update<'_>>>, rows: Vec<RowTask<'_>>) -> Result<()> {
    let (host, device) = split(tasks, |task| task.kind.state.place());
    let (host_rows, device_rows) = split(rows, |task| task.state.place());
    // Tensor operations can fail and a pass over slices cannot: they go first, so that a failure finds nothing changed.
    portable::update(device, device_rows)?;
    cpu::run(host)?;
    cpu::update_rows(host_rows)?;
    Ok(())
}

/// Lets rows of one table pay what they owe; tables elsewhere owe nothing.
pub(crate) fn pay(task: PayTask<'_>) -> Result<()> {
    Ok(cpu::pay_rows(task)?)
}

/// Adds gradients to the accumulated ones.
pub(crate) fn accumulate(tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
    let (host, device) = split(tasks, |task| task.kind.sum.place());
    portable::accumulate(device)?;
    cpu::run(host)?;
    Ok(())
}

/// Moves averages towards their variables.
pub(crate) fn average(tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
    let (host, device) = split(tasks, |task| task.kind.average.place());
    portable::average(device)?;
    cpu::run(host)?;
    Ok(())
}

/// The norm of each gradient, in their order; the second of each pair is where the state of its variable lives.
pub(crate) fn measure(grads: &[(Source<'_>, Place)], norm: NormType) -> Result<Vec<f64>> {
    let on_host = grads.iter().filter(|(_, place)| *place == Place::Host);
    let borrowed = on_host.map(|(source, _)| source.borrow()).collect::<candle_core::Result<Vec<_>>>()?;
    let elements = borrowed.iter().map(Borrowed::elements).collect::<candle_core::Result<Vec<_>>>()?;
    let mut measured = cpu::measure(&elements, norm).into_iter();
    let of_each = grads.iter().map(|(source, place)| match place {
        Place::Host => Ok(measured.next().unwrap_or_default()),
        Place::Device => Ok(portable::measure(*source, norm)?),
    });
    of_each.collect()
}

fn split<T>(tasks: Vec<T>, place: impl Fn(&T) -> Place) -> (Vec<T>, Vec<T>) {
    // Nearly always all are in one place, and there is nothing to move.
    if tasks.iter().all(|task| place(task) == Place::Host) {
        return (tasks, Vec::new());
    }
    tasks.into_iter().partition(|task| place(task) == Place::Host)
}
