//! Tables of rows, and the ids that are looked up in them.

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::Zipf;

/// Checks the options `--rows` and `--dim`: a table of f32 that ids of 32 bits reach and that memory could hold.
pub(crate) fn check_table(rows: usize, dim: usize) -> Result<()> {
    ensure!(rows > 0 && u32::try_from(rows).is_ok(), "--rows: expected 1 to 4294967295, got {rows}");
    ensure!(dim > 0, "--dim: expected at least 1, got 0");
    let bytes = (rows as u64).saturating_mul(dim as u64).saturating_mul(4);
    ensure!(bytes <= isize::MAX as u64 / 4, "--rows, --dim: a table of {bytes} bytes does not fit");
    Ok(())
}

/// Ids for the rounds.
pub(crate) struct Batches {
    rng: StdRng,
    rows: u64,
    batch: usize,
    /// Of ranks, from 1 on; if none, rows are drawn uniformly.
    zipf: Option<Zipf<f64>>,
}

/// Shares no factor with any smaller number of rows.
const PRIME: u64 = 4_294_967_291;

impl Batches {
    /// So many ids a batch, drawn from the rows of a table: uniformly, or by Zipf's law with this exponent.
    pub(crate) fn new(rows: usize, batch: usize, zipf: Option<f64>) -> Result<Self> {
        if let Some(exponent) = zipf {
            ensure!(exponent.is_finite() && exponent >= 0.0, "--zipf: expected a number of at least 0, got {exponent}");
        }
        let zipf = zipf.map(|exponent| Zipf::new(rows as f64, exponent)).transpose()?;
        Ok(Self { rng: StdRng::seed_from_u64(2015), rows: rows as u64, batch, zipf })
    }

    pub(crate) fn draw(&mut self) -> Vec<u32> {
        let Self { rng, rows, batch, zipf } = self;
        let mut row = || match zipf {
            None => rng.random_range(0..*rows),
            Some(zipf) => (rng.sample(*zipf) as u64 - 1) * PRIME % *rows,
        };
        (0..*batch).map(|_| row() as u32).collect()
    }
}
