//! A parallel pass for all tensors of a step, on the CPU.
//!
//! [`Plan`] cuts and bundles tensors; a [`Team`] of as many threads as the current rayon pool has runs the pieces.
//! Invariants: the work on an element does not depend on the piece it is in, so any number of threads gives the same
//! bits; a thread holds the locks of one variable and its gradient at most.

mod catch_up;
mod chunk;
mod convert;
pub(crate) mod gather;
mod isa;
mod measure;
mod passes;
mod rows;
mod team;
mod unit_op;

use candle_core::Tensor;

pub(crate) use catch_up::{CatchUpTask, Written, catch_up_rows, checksums};
pub(crate) use isa::{Isa, Pass};
pub(crate) use measure::measure;
pub(crate) use passes::{Accumulate, Average, Update};
pub(crate) use rows::{RowTask, update_rows};
pub(crate) use unit_op::UpdateArgs;

use self::team::Team;
use super::lend::{Borrowed, Elements, ElementsMut, Source, lend};
use super::plan::Plan;
use crate::state::Place;

/// What one tensor takes part in a pass with: what is lent to be written, what is read, and what is done.
pub(crate) struct Task<'a, K> {
    /// Where its buffers live.
    pub(crate) place: Place,
    /// Which of the call's gradients it has, in the order in which their norms are joined.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by the CUDA kernels"))]
    pub(crate) nth: usize,
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

/// Runs all tasks.
pub(crate) fn run<'a, K: Kind<'a>>(tasks: Vec<Task<'a, K>>) -> candle_core::Result<()> {
    run_with(tasks, Isa::detect(), rayon::current_num_threads())
}

fn run_with<'a, K: Kind<'a>>(tasks: Vec<Task<'a, K>>, isa: Isa, threads: usize) -> candle_core::Result<()> {
    let sizes: Vec<usize> = tasks.iter().map(|task| task.kind.len()).collect();
    let plan = Plan::new(&sizes, threads);
    if !plan.is_parallel() {
        return tasks.into_iter().try_for_each(|task| run_alone(task, isa));
    }
    Team::run(threads, |team| run_planned(tasks, &plan, isa, team))
}

/// Small tensors first, many at a time; then each large one, cut into pieces.
fn run_planned<'a, K: Kind<'a>>(tasks: Vec<Task<'a, K>>, plan: &Plan, isa: Isa, team: Team) -> candle_core::Result<()> {
    let mut tasks: Vec<Option<Task<'a, K>>> = tasks.into_iter().map(Some).collect();
    let mut take = |index: usize| tasks.get_mut(index).and_then(Option::take);
    let bundles: Vec<Vec<Task<'a, K>>> =
        plan.bundles.iter().map(|bundle| bundle.iter().filter_map(|&index| take(index)).collect()).collect();
    let mut results: Vec<candle_core::Result<()>> = bundles.iter().map(|_| Ok(())).collect();
    team.tensors(bundles.into_iter().zip(&mut results).collect(), |(bundle, result)| {
        *result = bundle.into_iter().try_for_each(|task| run_alone(task, isa));
    });
    results.into_iter().collect::<candle_core::Result<()>>()?;
    for &(index, piece) in &plan.cut {
        if let Some(task) = take(index) {
            with_locks(task, |work| team.pieces(work.cut(piece), |piece| piece.run(isa)))?;
        }
    }
    Ok(())
}

/// Runs one tensor on this thread.
fn run_alone<'a, K: Kind<'a>>(task: Task<'a, K>, isa: Isa) -> candle_core::Result<()> {
    with_locks(task, |work| work.run(isa))
}

/// Locks the variable and then its gradient, as candle's own operations in place do, for the time of `f`.
fn with_locks<'a, K: Kind<'a>>(
    task: Task<'a, K>,
    f: impl for<'x> FnOnce(Box<dyn Work<'x> + 'x>),
) -> candle_core::Result<()> {
    let Task { lent, read, kind, .. } = task;
    let run = |lent: Option<ElementsMut<'_>>| {
        let borrowed = read.map(Source::borrow).transpose()?;
        let read = borrowed.as_ref().map(Borrowed::elements).transpose()?;
        f(kind.bind(lent, read)?);
        Ok(())
    };
    match lent {
        Some(var) => lend(var, |lent| run(Some(lent))),
        None => run(None),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Var};

    use super::*;
    use crate::codec::{Encoding, StateDType};
    use crate::rounding::Rounding;
    use crate::rule::{Coefficients, EpsMode, Hyperparameters, WeightDecay};
    use crate::state::{Layout, ParamState, Units};

    /// Values of all magnitudes, with zeros and denormals, and a NaN and an infinity near the end of long ones.
    fn wild(n: usize, seed: u64) -> Vec<f64> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) as f64 / f64::from(1u32 << 31) - 0.5
        };
        let mut values: Vec<f64> = (0..n).map(|i| next() * 10f64.powi(i as i32 % 83 - 41)).collect();
        for (i, special) in [0.0, -0.0, 1e-42, f64::NAN, f64::NEG_INFINITY].into_iter().enumerate() {
            if n > 10 * (i + 1) {
                values[n - 3 * (i + 1)] = special;
            }
        }
        values
    }

    /// How the state of a test is kept.
    #[derive(Clone, Copy, Debug)]
    struct Keep {
        dtypes: (DType, DType),
        decay: WeightDecay,
        state: StateDType,
        rowwise: bool,
        rounding: Rounding,
    }

    const PLAIN: Keep = Keep {
        dtypes: (DType::F32, DType::F32),
        decay: WeightDecay::None,
        state: StateDType::F32,
        rowwise: false,
        rounding: Rounding::Nearest,
    };

    /// Three updates of tensors of these sizes; the bits of all parameters, moments and masters.
    fn bits(sizes: &[usize], keep: Keep, isa: Isa, threads: usize) -> Result<Vec<u64>> {
        let Keep { dtypes, decay, state, rowwise, rounding } = keep;
        let hyper =
            Hyperparameters { beta1: 0.9, beta2: 0.999, eps: 1e-7, eps_mode: EpsMode::AddToNorm, weight_decay: decay };
        let encoding = Encoding::of(&hyper);
        let (param_dtype, grad_dtype) = dtypes;
        let tensor = |n, seed, dtype| Tensor::from_vec(wild(n, seed), n, &Device::Cpu)?.to_dtype(dtype);
        let mut vars = Vec::new();
        for (i, &n) in sizes.iter().enumerate() {
            let var = tensor(n, i as u64, param_dtype)?;
            // Rows of two, where they share a norm.
            let var = Var::from_tensor(&if rowwise && n % 2 == 0 { var.reshape((n / 2, 2))? } else { var })?;
            let layout = Layout::of(&var, state, Units::Blocks, rowwise, encoding);
            let state = ParamState::zeros(&var, Place::Host, &layout, rounding).map_err(candle_core::Error::from)?;
            vars.push((var, state));
        }
        for t in 1..=3 {
            let grads = sizes.iter().map(|&n| tensor(n, 99 + t, grad_dtype)).collect::<Result<Vec<_>>>()?;
            let coefficients = Coefficients { clamp: 1e30, ..Coefficients::of_update(&hyper, 0.01, t) };
            let update_args = UpdateArgs { coefficients, encoding, shrink: 24_000 * t, rounding, key: t };
            let tasks = vars.iter_mut().zip(&grads).map(|((var, state), grad)| Task {
                place: Place::Host,
                nth: 0,
                lent: Some(var.as_tensor()),
                read: Some(Source::Tensor(grad)),
                kind: Update { update_args, state },
            });
            run_with(tasks.collect(), isa, threads)?;
        }
        // Any NaN equals any other.
        let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
        let mut all = Vec::new();
        for (var, state) in &vars {
            let stored = state.moments.to_stored(var.shape()).map_err(candle_core::Error::from)?;
            let master = state.master.as_ref().map(|master| master.to_tensor(var.shape())).transpose();
            let tensors = [Some(var.as_tensor().clone()), Some(stored.exp_avg), Some(stored.exp_inf), stored.scales];
            for tensor in tensors.into_iter().chain([master.map_err(candle_core::Error::from)?]).flatten() {
                all.extend(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?.into_iter().map(bits));
            }
        }
        Ok(all)
    }

    /// Compares all instruction sets and two numbers of threads with the plainest.
    fn check(sizes: &[usize], keep: Keep) -> Result<()> {
        let expected = bits(sizes, keep, Isa::Baseline, 1)?;
        for isa in Isa::all() {
            for threads in [1, 3] {
                assert!(bits(sizes, keep, isa, threads)? == expected, "{keep:?} {isa:?} {threads} threads");
            }
        }
        Ok(())
    }

    const SIZES: [usize; 13] = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 300_001, 20_000];

    #[test]
    fn bits_do_not_depend_on_vector_width_or_threads() -> Result<()> {
        use DType::{BF16, F16, F32, F64};
        for dtypes in [(F64, F64), (F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)] {
            for decay in [WeightDecay::None, WeightDecay::L2(0.1), WeightDecay::Decoupled(0.1)] {
                check(&SIZES, Keep { dtypes, decay, ..PLAIN })?;
            }
        }
        Ok(())
    }

    #[test]
    fn nor_do_those_of_encodings_and_roundings() -> Result<()> {
        use DType::{BF16, F16, F32};
        for state in [StateDType::BF16, StateDType::F16, StateDType::Q8, StateDType::F32] {
            for dtypes in [(F32, F32), (F16, F16), (BF16, F32)] {
                for rounding in [Rounding::Nearest, Rounding::Stochastic, Rounding::Master] {
                    for rowwise in [false, true] {
                        let decay = if rowwise { WeightDecay::L2(0.1) } else { WeightDecay::Decoupled(0.1) };
                        check(&SIZES, Keep { dtypes, decay, state, rowwise, rounding })?;
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn bits_of_many_large_variables_do_not_depend_on_threads() -> Result<()> {
        let mut sizes = vec![140_000; 8];
        sizes.extend([100_000; 12]);
        let plan = Plan::new(&sizes, 64);
        assert!(plan.cut.len() == 8 && plan.bundles.len() == 12, "{plan:?}");
        let isa = Isa::detect();
        let expected = bits(&sizes, PLAIN, isa, 1)?;
        for threads in [2, 64] {
            assert!(bits(&sizes, PLAIN, isa, threads)? == expected, "{threads} threads");
        }
        Ok(())
    }
}
