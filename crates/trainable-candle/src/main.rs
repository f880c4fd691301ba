//! Writes a copy of the candle-nn that a project uses, whose layers have a backward pass.

fn main() {}
