//! Settings: the learning rate and all that it may follow, the loss scale, and what weights and moments are stored in.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod encodings;
mod grad_scaler;
mod learning_rate;
mod plateau;
mod schedules;
mod written_weights;
