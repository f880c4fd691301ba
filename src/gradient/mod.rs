//! What happens to gradients between the backward pass and the update: they become numbers, not other gradients.

mod summary;

pub(crate) use summary::Summary;
