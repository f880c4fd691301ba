//! Moving in from PyTorch and Keras, and out: a run that moves stays on its trajectory, what does not fit is refused and
//! changes nothing. The recorded runs are those of `tests/golden/exchange.py`, which also goes on with what these tests
//! leave in `target/tmp/exchange`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod config;
mod encodings;
mod files;
mod keras;
mod refuse;
mod run;
mod settings;
mod torch;
