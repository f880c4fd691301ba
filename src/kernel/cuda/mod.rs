//! The kernels of `cuda/`: what they are given, and how they are compiled and launched.

pub(crate) mod abi;
#[cfg(test)]
mod emulated;
pub(crate) mod plan;
pub(crate) mod source;
