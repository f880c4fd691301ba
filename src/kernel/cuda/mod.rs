//! The kernels of `cuda/`: what they are given, and how they are compiled and launched.
//!
//! | module | what lives there |
//! | --- | --- |
//! | `runtime` | one GPU of one optimizer: an update, a pass, a norm, and what is heard late |
//! | `work` | what an update is asked to do, before and after addresses are known |
//! | `ids`, `checks` | ids of lookups, and what is heard of bad ones |
//! | `pool` | rows that are gathered and pooled |
//! | `sort`, `norms` | gradients of rows, sorted and summed; norms of gradients |
//! | `exact` | the updates that rows of a table have missed |
//! | `launcher`, `order` | kernels of one device: loaded, planned, launched, in order whichever thread it is |
//! | `staging` | one copy for all that a launch is told |
//! | `compile`, `source` | the compiler at run time; the kernels' texts and names |
//! | `plan` | sizes become blocks of a launch; pure |
//! | `abi` | the structures that both sides have; pure |
//! | `stub` | what stands in for `runtime` without the feature `cuda` |
//!
//! Without the feature the pure ones are there for the tests, which run the kernels on the host.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod abi;
#[cfg(feature = "cuda")]
mod checks;
#[cfg(feature = "cuda")]
mod compile;
#[cfg(test)]
mod emulated;
#[cfg(feature = "cuda")]
mod exact;
#[cfg(feature = "cuda")]
mod ids;
#[cfg(feature = "cuda")]
mod launcher;
#[cfg(feature = "cuda")]
mod norms;
#[cfg(feature = "cuda")]
mod order;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod plan;
#[cfg(feature = "cuda")]
mod pool;
#[cfg(feature = "cuda")]
mod runtime;
#[cfg(feature = "cuda")]
mod sort;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod source;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(not(feature = "cuda"))]
mod stub;
#[cfg(feature = "cuda")]
mod work;

#[cfg(feature = "cuda")]
pub(crate) use checks::Unchecked;
#[cfg(feature = "cuda")]
pub(crate) use compile::has_kernels;
#[cfg(feature = "cuda")]
pub(crate) use exact::GpuMarks;
#[cfg(feature = "cuda")]
pub(crate) use ids::{GpuIds, GpuRows};
#[cfg(feature = "cuda")]
pub(crate) use pool::{dot_rows, gather, largest, largest_backward, pool};
#[cfg(feature = "cuda")]
pub(crate) use runtime::Runtimes;
#[cfg(not(feature = "cuda"))]
pub(crate) use stub::{GpuIds, GpuMarks, GpuRows, Runtimes, Unchecked};
