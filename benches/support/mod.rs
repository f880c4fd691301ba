//! What the benches and `examples/throughput.rs` share: cases, and the steps that are timed on them.
//!
//! Nothing here measures or prints. Every step is a closure that does the same work each time it is called.

pub(crate) mod case;
pub(crate) mod rows;
pub(crate) mod streams;
