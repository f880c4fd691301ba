//! The functions on the CPU, on slices of contiguous numbers.
//!
//! Closures that run within a kernel are marked `inline(always)`, and so are the functions that take them. What is not
//! compiled into the function that allows the machine's vector instructions does not use them.

mod element;
mod lanes;
mod parallel;
mod real;

pub(crate) mod activation;
pub(crate) mod columns;
pub(crate) mod dropout;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod probabilities;
pub(crate) mod rope;
pub(crate) mod softmax;

pub(crate) use element::Element;
pub(crate) use real::Real;
