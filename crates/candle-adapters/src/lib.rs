//! Low-rank adapters for candle models.
