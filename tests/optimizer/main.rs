//! What a call of the optimizer does, what it leaves alone, what it refuses, and what it tells of it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod audit;
mod calls;
mod counts;
mod determinism;
mod errors;
mod manage;
mod missing_gradients;
mod properties;
mod refused;
