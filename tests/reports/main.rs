//! Reports of users of other libraries, tried here: one test for each, named after what the user saw.
//!
//! A comment above each test names the project and the number of the report. The reports are another project's faults,
//! so the test states what this crate does in the same situation. `finetune.rs` holds the reports that concern the
//! program `finetune`, whose package runs it: `cargo test --release -p finetune --test reports`. `recommender.rs` runs
//! the example of that name.
//!
//! To add a report: one test in the module of its subject, the line with the source, the smallest input that shows the
//! fault, and the right value.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod accumulation;
mod averages;
mod files;
mod gradients;
mod precision;
mod program;
mod recommender;
mod schedules;
mod tables;
mod weights;
