//! How much memory is taken, and what is left of it. Each test has a process of its own, in which nothing else takes any.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

#[cfg(target_os = "linux")]
mod exact;
mod files;
#[cfg(target_os = "linux")]
mod lookups;
mod measure;
#[cfg(target_os = "linux")]
mod unread;
