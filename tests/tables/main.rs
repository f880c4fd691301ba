//! Tables: what lookups and bags give, what a step makes of the gradients of some rows, with every setting, accumulated
//! and not, and tables that change while they are trained.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod accumulation;
mod bags;
mod edges;
mod errors;
mod exact;
mod gradients;
mod growth;
mod lookups;
mod properties;
mod rows;
mod sparse;
mod support;
mod updates;
