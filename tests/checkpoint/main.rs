//! Checkpoints: a run that was interrupted has the bits of one that was not, a file that does not fit is refused and
//! changes nothing, and a file is complete or not there, whenever the process is killed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod files;
mod kill;
mod matching;
mod memory;
#[cfg(unix)]
mod modes;
mod resume;
mod strict;
mod support;
