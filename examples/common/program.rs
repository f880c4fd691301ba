//! What every program of some size needs: a way to begin and to end, random numbers, numbers to read.

use std::io::{self, Write};
use std::panic;
use std::process::{self, ExitCode};

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng};

/// candle allocates every intermediate result anew, and most systems' allocators give large ones back to the kernel at
/// once, so that each step pays for page faults: a backward pass of the recommender takes 5.1 ms, and 3.6 ms with
/// mimalloc, which keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs a program with so many threads, or as many as candle wants, and says on one line what went wrong.
pub(crate) fn start(threads: Option<usize>, run: impl FnOnce() -> Result<()>) -> ExitCode {
    if let Some(threads) = threads {
        // candle and rayon ask the environment, once, how many threads to use.
        // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    end_where_nobody_reads();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}"); // on one line, with all its causes
            ExitCode::FAILURE
        }
    }
}

/// Ends the program with one line where what it prints cannot be written, as with `| head`: `println!` panics there.
fn end_where_nobody_reads() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| match info.payload_as_str() {
        Some(text) if text.starts_with("failed printing to std") => {
            let _ = writeln!(io::stderr(), "error: {text}"); // stderr may be closed, too
            process::exit(1)
        }
        _ => usual(info),
    }));
}

/// The random numbers of a seed and a purpose, of up to four numbers in all. candle's own on the CPU cannot be seeded.
pub(crate) fn random(purpose: &[u64]) -> StdRng {
    let mut key = [0; 32];
    for (to, number) in key.chunks_exact_mut(8).zip(purpose) {
        to.copy_from_slice(&number.to_le_bytes());
    }
    StdRng::from_seed(key)
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}
