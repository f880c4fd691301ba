//! What happens to gradients between the backward pass and the update: they become numbers, not other gradients;
//! and those of rows are brought into order.

pub(crate) mod sparse;

pub use sparse::{Gradient, SparseGrad, TouchedRows};
