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
    for (name, threads) in pools(threads, std::env::var_os("CANDLE_NUM_THREADS").is_some()) {
        // candle and rayon ask the environment how many threads to use.
        // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, threads.to_string()) };
    }
    keep_free_memory();
    end_where_nobody_reads();
    end(run())
}

/// Says on one line what went wrong.
pub(crate) fn end(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}"); // on one line, with all its causes
            ExitCode::FAILURE
        }
    }
}

/// Tells mimalloc to keep memory that has become free. After 10 ms it would give it back to the kernel, which fills pages
/// with zeros before it lends them again: a fourth of the recommender's time, and a third of finetune's backward pass.
fn keep_free_memory() {
    /// `mi_option_purge_delay` of mimalloc.h, in ms; -1 is never.
    const PURGE_DELAY: i32 = 15;
    // SAFETY: the number is an option of the mimalloc that is linked, and its options may be set at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// The sizes of candle's pools that are to be set, by the variables that say them.
///
/// Matrix products have rayon's pool, whose threads sleep while they wait. Operations on elements have a pool of
/// candle's own. Their caller waits for each of its threads in a loop without end, so that a thread whose core another
/// program has holds every operation up. One thread waits for nobody, so that pool has one, unless its size `is_said`
/// already.
///
/// Two steps of `finetune --model` with `all-MiniLM-L6-v2` and 16 texts, beside two programs that kept both cores of a
/// machine busy, took 23.7 s with two threads in both pools, 7.5 s with one in this one, and 15.1 s with one in both.
/// Four steps of 32 texts on nearly free cores took 8.2 s, 9.3 s and 11.2 s (medians of forward and backward passes).
fn pools(threads: Option<usize>, is_said: bool) -> impl Iterator<Item = (&'static str, usize)> {
    let of_elements = (!is_said).then_some(("CANDLE_NUM_THREADS", 1));
    threads.map(|threads| ("RAYON_NUM_THREADS", threads)).into_iter().chain(of_elements)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_of_operations_on_elements_has_one_thread_unless_it_is_said() {
        let pools = |threads, is_said| pools(threads, is_said).collect::<Vec<_>>();
        assert_eq!(pools(Some(4), false), [("RAYON_NUM_THREADS", 4), ("CANDLE_NUM_THREADS", 1)]);
        assert_eq!(pools(None, false), [("CANDLE_NUM_THREADS", 1)]);
        assert_eq!(pools(Some(4), true), [("RAYON_NUM_THREADS", 4)]);
    }
}
