//! The kernels of `cuda/`: what they are given, and how they are compiled and launched.

pub(crate) mod abi;
#[cfg(feature = "cuda")]
mod compile;
#[cfg(test)]
mod emulated;
#[cfg(feature = "cuda")]
mod launcher;
#[cfg(feature = "cuda")]
mod norms;
pub(crate) mod plan;
#[cfg(feature = "cuda")]
mod rows;
#[cfg(feature = "cuda")]
mod runtime;
pub(crate) mod source;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
mod work;

#[cfg(feature = "cuda")]
pub(crate) use compile::has_kernels;
#[cfg(feature = "cuda")]
pub(crate) use rows::gather;
#[cfg(feature = "cuda")]
pub(crate) use runtime::Runtimes;
