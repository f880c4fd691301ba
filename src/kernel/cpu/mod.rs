//! One parallel pass for all tensors of a step, on the CPU.
//!
//! Tensors are cut and bundled by [`Plan`]; whichever rayon pool is current runs the pieces. Invariant: the work on an
//! element does not depend on the piece it is in, so any number of threads gives the same bits.

mod isa;
mod measure;
mod passes;

use candle_core::Tensor;
use rayon::prelude::*;

pub(crate) use isa::{Isa, Pass};
pub(crate) use measure::measure;
pub(crate) use passes::{Accumulate, Average, Update};

use super::lend::{Borrowed, Elements, ElementsMut, LENT_AT_ONCE, Source, lend, lend_all};
use super::plan::Plan;

/// What one tensor takes part in a pass with: what is lent to be written, what is read, and what is done.
pub(crate) struct Task<'a, K> {
    /// The variable that is written.
    pub(crate) lent: Option<&'a Tensor>,
    /// The gradient.
    pub(crate) read: Option<Source<'a>>,
    /// The kind of work, with its own buffers.
    pub(crate) kind: K,
}

/// A kind of work on one tensor.
pub(crate) trait Kind<'a>: Send {
    /// How many elements it has.
    fn len(&self) -> usize;

    /// The loops, once the slices are there.
    fn bind<'x>(
        self,
        lent: Option<ElementsMut<'x>>,
        read: Option<Elements<'x>>,
    ) -> candle_core::Result<Box<dyn Work<'x> + 'x>>
    where
        'a: 'x;
}

/// Loops over slices of equal length.
pub(crate) trait Work<'x>: Send {
    /// Cuts the slices into pieces of `piece` elements.
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>>;

    /// Runs the loop.
    fn run(self: Box<Self>, isa: Isa);
}

/// Runs all tasks in one parallel region (another one for every further [`LENT_AT_ONCE`] large variables).
pub(crate) fn run<'a, K: Kind<'a>>(tasks: Vec<Task<'a, K>>) -> candle_core::Result<()> {
    run_with(tasks, Isa::detect(), rayon::current_num_threads())
}

fn run_with<'a, K: Kind<'a>>(tasks: Vec<Task<'a, K>>, isa: Isa, threads: usize) -> candle_core::Result<()> {
    let sizes: Vec<usize> = tasks.iter().map(|task| task.kind.len()).collect();
    let plan = Plan::new(&sizes, threads);
    if !plan.is_parallel() {
        return tasks.into_iter().try_for_each(|task| run_alone(task, isa));
    }
    let mut tasks: Vec<Option<Task<'a, K>>> = tasks.into_iter().map(Some).collect();
    let mut take = |index: usize| tasks.get_mut(index).and_then(Option::take);
    let mut bundles: Vec<Vec<Task<'a, K>>> =
        plan.bundles.iter().map(|bundle| bundle.iter().filter_map(|&index| take(index)).collect()).collect();
    let mut large: Vec<(Task<'a, K>, usize)> =
        plan.cut.iter().filter_map(|&(index, piece)| Some((take(index)?, piece))).collect();
    if large.is_empty() {
        return run_parallel(Vec::new(), bundles, isa);
    }
    while !large.is_empty() {
        let group: Vec<_> = large.drain(..large.len().min(LENT_AT_ONCE)).collect();
        let bundles = std::mem::take(&mut bundles);
        let reads = group
            .iter()
            .map(|(task, _)| task.read.map(Source::borrow).transpose())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let vars: Vec<&Tensor> = group.iter().filter_map(|(task, _)| task.lent).collect();
        lend_all(&vars, |lent| {
            let mut lent = lent.into_iter();
            let mut pieces = Vec::new();
            for ((task, piece), read) in group.into_iter().zip(&reads) {
                let written = if task.lent.is_some() { lent.next() } else { None };
                let read = read.as_ref().map(Borrowed::elements).transpose()?;
                pieces.extend(task.kind.bind(written, read)?.cut(piece));
            }
            run_parallel(pieces, bundles, isa)
        })?;
    }
    Ok(())
}

fn run_parallel<'a, 'x, K: Kind<'a>>(
    pieces: Vec<Box<dyn Work<'x> + 'x>>,
    bundles: Vec<Vec<Task<'a, K>>>,
    isa: Isa,
) -> candle_core::Result<()> {
    let pieces = pieces.into_par_iter().with_max_len(1).map(|piece| {
        piece.run(isa);
        Ok(())
    });
    let bundles = bundles
        .into_par_iter()
        .with_max_len(1)
        .map(|bundle| bundle.into_iter().try_for_each(|task| run_alone(task, isa)));
    pieces.chain(bundles).collect()
}

/// Runs one tensor on this thread.
fn run_alone<'a, K: Kind<'a>>(task: Task<'a, K>, isa: Isa) -> candle_core::Result<()> {
    let borrowed = task.read.map(Source::borrow).transpose()?;
    let read = borrowed.as_ref().map(Borrowed::elements).transpose()?;
    let kind = task.kind;
    match task.lent {
        Some(var) => lend(var, |lent| {
            kind.bind(Some(lent), read)?.run(isa);
            Ok(())
        }),
        None => {
            kind.bind(None, read)?.run(isa);
            Ok(())
        }
    }
}
