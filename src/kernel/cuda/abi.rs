//! What the host hands to kernels: `cuda/abi.cuh` has the same structures. Pure.
//!
//! Invariant: every field is at the place where the compiler of the other side puts it, and there is no hidden padding; a
//! test asks that compiler.

use bytemuck::{Pod, Zeroable};
use candle_core::DType;

use crate::clip::Clip;
use crate::codec::Limits;
use crate::kernel::UpdateArgs as HostOrders;
use crate::ledger::Terms;
use crate::reduce::NormType;
use crate::rounding::Rounding;
use crate::rule::Coefficients;

/// Threads of a warp.
pub(crate) const WARP: u32 = 32;
/// Threads of a block, in every kernel.
pub(crate) const THREADS: u32 = 256;

/// An address in the device's memory; 0 is none.
pub(crate) type Address = u64;

/// One parameter of a launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Tensor {
    pub(crate) param: Address,
    pub(crate) grad: Address,
    /// m, or its codes.
    pub(crate) exp_avg: Address,
    /// u, or its codes, or one for each row.
    pub(crate) exp_inf: Address,
    /// The logarithm of each unit.
    pub(crate) scales: Address,
    /// What masters keep beside the parameter.
    pub(crate) master: Address,
    /// Which units, ascending; none for all of them.
    pub(crate) rows: Address,
    /// How many `rows` there are.
    pub(crate) count: Address,
    /// Elements of the parameter.
    pub(crate) len: u64,
    /// Elements of a unit.
    pub(crate) unit: u64,
    /// Index of this one's arguments.
    pub(crate) update_args: u32,
    /// How many units a chunk has.
    pub(crate) chunk: u32,
}

/// `Coefficients` in the order of `cuda/rule.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Wide {
    pub(crate) grad_scale: f64,
    rest: [f64; 9],
}

/// The same, rounded once to f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Narrow {
    pub(crate) grad_scale: f32,
    rest: [f32; 9],
}

/// Arguments of one update of one parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct UpdateArgs {
    pub(crate) wide: Wide,
    pub(crate) narrow: Narrow,
    limits: [f32; 3],
    rounding: u32,
    shrink: u64,
    key: u64,
}

impl UpdateArgs {
    pub(crate) fn new(update_args: &HostOrders) -> Self {
        let HostOrders { coefficients, encoding, shrink, rounding, key } = update_args;
        let (narrow, limits): (Coefficients<f32>, Limits) = (coefficients.round(), encoding.limits());
        Self {
            wide: Wide { grad_scale: coefficients.grad_scale, rest: rest(coefficients) },
            narrow: Narrow { grad_scale: narrow.grad_scale, rest: rest(&narrow) },
            limits: limits.as_array(),
            rounding: u32::from(*rounding == Rounding::Stochastic),
            shrink: *shrink,
            key: *key,
        }
    }
}

/// All but `grad_scale`.
fn rest<A: Copy>(c: &Coefficients<A>) -> [A; 9] {
    [c.clamp, c.l2, c.beta1, c.one_minus_beta1, c.beta2, c.eps_inside, c.eps_outside, c.decay, c.step_size]
}

/// The work of one block: units of one tensor, from `first` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Chunk {
    pub(crate) tensor: u32,
    pub(crate) first: u32,
}

/// Results of an update that the device knows before the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Control {
    /// As [`Norm`](crate::reduce::Norm) stores it.
    pub(crate) total_norm: f64,
    /// Whether the update is skipped.
    pub(crate) skip: u32,
    pub(crate) padding: u32,
}

/// Of `update_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct UpdateLaunchArgs {
    pub(crate) tensors: Address,
    pub(crate) update_args: Address,
    pub(crate) chunks: Address,
    /// Null if nothing is skipped.
    pub(crate) control: Address,
}

/// One gradient that is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Gradient {
    pub(crate) values: Address,
    /// How many rows there are, where only the device knows.
    pub(crate) count: Address,
    /// Elements; of a row if there is a count.
    pub(crate) len: u64,
    /// Of its leaves, among those of all tensors.
    pub(crate) first: u64,
    /// 1 for elements of f64, whose squares can leave the range of f64, else 0.
    pub(crate) is_f64: u64,
}

/// Of `summary_leaves_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LeavesArgs {
    pub(crate) gradients: Address,
    pub(crate) chunks: Address,
    pub(crate) leaves: Address,
    pub(crate) norm: u32,
    pub(crate) chunk_units: u32,
}

/// Of `summary_norms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NormsArgs {
    pub(crate) gradients: Address,
    pub(crate) leaves: Address,
    pub(crate) folded: Address,
    pub(crate) norms: Address,
    pub(crate) unscale: f64,
    pub(crate) norm: u32,
    pub(crate) padding: u32,
}

/// Of `summary_join`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct JoinArgs {
    pub(crate) norms: Address,
    pub(crate) squares: Address,
    pub(crate) update_args: Address,
    pub(crate) control: Address,
    pub(crate) limit: f64,
    pub(crate) n: u32,
    pub(crate) norm: u32,
    pub(crate) clip: u32,
    pub(crate) skips: u32,
}

/// A norm's number.
pub(crate) fn norm(norm: NormType) -> u32 {
    match norm {
        NormType::L1 => 0,
        NormType::L2 => 1,
        NormType::Inf => 2,
    }
}

/// The number of a way of clipping by norms, and its limit.
pub(crate) fn clip(clip: Option<Clip>) -> (u32, f64) {
    match clip {
        None | Some(Clip::Value(_)) => (0, 0.0),
        Some(Clip::Norm(limit)) => (1, limit),
        Some(Clip::GlobalNorm(limit)) => (2, limit),
        Some(Clip::GradNorm { max_norm, .. }) => (3, max_norm),
    }
}

/// Of `rows_gather_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct GatherArgs {
    pub(crate) ids: Address,
    pub(crate) table: Address,
    pub(crate) out: Address,
    pub(crate) n: u64,
    /// In words.
    pub(crate) row_len: u64,
}

/// Of `rows_ids_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct IdsArgs {
    pub(crate) from: Address,
    pub(crate) to: Address,
    /// None if there is no padding.
    pub(crate) trained: Address,
    /// In host memory: becomes 1 if an id is no row.
    pub(crate) bad: Address,
    pub(crate) n: u64,
    /// Rows of the table.
    pub(crate) rows: u32,
    pub(crate) padding: u32,
}

/// One lookup whose gradient is summed by rows, or another gradient of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LookupGrad {
    /// Rows of the gradient.
    pub(crate) values: Address,
    /// To which row of the table each position contributes; beyond the table: to none.
    pub(crate) ids: Address,
    /// Which row of the gradient it is; none: one for each position.
    pub(crate) bags: Address,
    /// Of bags, if each position contributes its part of a mean.
    pub(crate) starts: Address,
    /// What each position is multiplied with, if anything.
    pub(crate) factors: Address,
    /// Of its positions, among those of all parts.
    pub(crate) begin: u32,
    /// [`number`] of the values' type.
    pub(crate) dtype: u32,
    pub(crate) factors_dtype: u32,
    pub(crate) padding: u32,
}

/// The number of a type of elements.
pub(crate) fn number(dtype: DType) -> u32 {
    match dtype {
        DType::F64 => 0,
        DType::F16 => 2,
        DType::BF16 => 3,
        _ => 1,
    }
}

/// The sort of the ids of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Sorting {
    pub(crate) parts: Address,
    pub(crate) keys: [Address; 2],
    pub(crate) places: [Address; 2],
    pub(crate) counts: Address,
    pub(crate) heads: Address,
    /// Ascending, each once.
    pub(crate) rows: Address,
    /// Row k has the places from `starts[k]` to `starts[k + 1]`.
    pub(crate) starts: Address,
    /// How many rows there are.
    pub(crate) count: Address,
    pub(crate) sums: Address,
    pub(crate) row_len: u64,
    /// Positions.
    pub(crate) n: u32,
    /// Rows of the table.
    pub(crate) all: u32,
    pub(crate) parts_n: u32,
    pub(crate) passes: u32,
    pub(crate) blocks: u32,
    /// Of a block.
    pub(crate) tiles: u32,
    /// How many sums a block makes.
    pub(crate) chunk: u32,
    pub(crate) padding: u32,
}

/// Of `sort_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct SortArgs {
    pub(crate) tables: Address,
    pub(crate) chunks: Address,
    pub(crate) pass: u32,
    pub(crate) padding: u32,
}

/// Of `pool_bags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct BagsArgs {
    pub(crate) starts: Address,
    /// Of each id.
    pub(crate) bags: Address,
    /// Ids.
    pub(crate) n: u64,
    pub(crate) bags_n: u64,
}

/// Of `pool_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct PoolArgs {
    pub(crate) table: Address,
    pub(crate) ids: Address,
    /// The ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    pub(crate) starts: Address,
    /// What each row is multiplied with, if anything.
    pub(crate) factors: Address,
    pub(crate) out: Address,
    /// Bags.
    pub(crate) n: u64,
    pub(crate) row_len: u64,
    pub(crate) mean: u32,
    pub(crate) padding: u32,
}

/// Of `pool_dot_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct DotArgs {
    /// One for each id, as they were when they were pooled.
    pub(crate) rows: Address,
    /// A row for each bag.
    pub(crate) grad: Address,
    /// Of each id.
    pub(crate) bags: Address,
    pub(crate) out: Address,
    /// Ids.
    pub(crate) n: u64,
    pub(crate) row_len: u64,
}

/// Of `pool_largest_*` and `pool_scatter_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LargestArgs {
    /// A row for each id; of the gradient of the maxima, for each bag.
    pub(crate) values: Address,
    pub(crate) starts: Address,
    /// From which row each element of the maxima is.
    pub(crate) positions: Address,
    pub(crate) out: Address,
    /// Bags.
    pub(crate) n: u64,
    pub(crate) row_len: u64,
}

/// Arguments of `catch_up_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct CatchUpArgs {
    /// Its `rows` are those that catch up; none for all of them.
    pub(crate) tensor: Tensor,
    /// After which update each row was up to date.
    pub(crate) marks: Address,
    /// Of `ledger::Record`.
    pub(crate) entries: Address,
    pub(crate) terms: Terms,
    /// Rows that catch up.
    pub(crate) n: u64,
    /// Rows of the table.
    pub(crate) all: u64,
    pub(crate) key: u64,
    pub(crate) limits: [f32; 3],
    pub(crate) rounding: u32,
    /// The last update.
    pub(crate) now: u32,
    /// Mark of rows that have caught up.
    pub(crate) mark: u32,
}

/// Of `rows_mark`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct MarkArgs {
    pub(crate) marks: Address,
    /// Which rows; none for all of them.
    pub(crate) rows: Address,
    pub(crate) n: u64,
    /// Rows of the table.
    pub(crate) all: u64,
    /// Bits of a mark that stay, and those that are added.
    pub(crate) kept: u32,
    pub(crate) added: u32,
}

/// Of `accumulate_*` and `average_*`: elements of one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Pair {
    /// What is written: a sum, or an average.
    pub(crate) to: Address,
    /// A gradient, or a parameter, which an average may overwrite.
    pub(crate) other: Address,
    /// What a master keeps beside the parameter, if there is one.
    pub(crate) master: Address,
    /// Of the random numbers with which a parameter is overwritten.
    pub(crate) key: u64,
    pub(crate) len: u64,
}

/// Of `accumulate_*` and `average_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct PairArgs {
    pub(crate) pairs: Address,
    pub(crate) chunks: Address,
    pub(crate) control: Address,
    /// What gradients are multiplied with, or the share that an average keeps.
    pub(crate) factor: f64,
    /// 1 less that share.
    pub(crate) other_factor: f64,
    pub(crate) chunk_units: u32,
    /// 0 if parameters stay, 1 if they become their averages, 2 if those are rounded at random.
    pub(crate) overwrites: u32,
}
