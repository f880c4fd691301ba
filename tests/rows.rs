//! Gradients of some rows: what a step makes of them, with every setting, accumulated and not; and tables that change
//! while they are trained.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
mod table_support;

#[path = "table_support/accumulation.rs"]
mod accumulation;
#[path = "table_support/edges.rs"]
mod edges;
#[path = "table_support/growth.rs"]
mod growth;
#[path = "table_support/properties.rs"]
mod properties;
#[path = "table_support/updates.rs"]
mod updates;
