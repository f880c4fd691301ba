//! Moving in from PyTorch and Keras, and out: a run that moves stays on its trajectory, what does not fit is refused and
//! changes nothing. The recorded runs are those of `tests/golden/exchange.py`, which also goes on with what these tests
//! leave in `target/tmp/exchange`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "exchange_support/config.rs"]
mod config;
#[path = "exchange_support/encodings.rs"]
mod encodings;
#[path = "exchange_support/files.rs"]
mod files;
#[path = "exchange_support/keras.rs"]
mod keras;
#[path = "exchange_support/refuse.rs"]
mod refuse;
#[path = "exchange_support/run.rs"]
mod run;
#[path = "exchange_support/settings.rs"]
mod settings;
#[path = "exchange_support/torch.rs"]
mod torch;
