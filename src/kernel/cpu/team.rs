//! Threads of the crate's own, which share the parts of a pass.
//!
//! A pass holds the lock of a variable while several threads work on it, and anybody may be waiting for that lock: a
//! worker of any rayon pool, too. Hence two rules, without which a program can wait for ever:
//!
//! - A pass is never run by a pool that runs the tasks of others. All workers of such a pool may be waiting for the lock.
//! - A thread that waits for a pass takes no other tasks meanwhile. A worker of a rayon pool does, in whatever pool the
//!   work is that it waits for, and a task may want the lock that the frame below it holds.
//!
//! Invariant: whoever holds a lock while others work waits for [`Team::pieces`] only, and pieces take no locks. What does
//! take locks, [`Team::tensors`], has other workers, which can wait for a lock without holding pieces up.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, bail};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// The threads of one pass: the one that runs it, and helpers.
#[derive(Clone, Copy)]
pub(super) struct Team {
    threads: usize,
}

static PIECES: Helpers = Helpers(Mutex::new(None));
static TENSORS: Helpers = Helpers(Mutex::new(None));

impl Team {
    /// Runs a pass with a team of so many threads.
    pub(super) fn run<T: Send>(threads: usize, pass: impl FnOnce(Self) -> Result<T> + Send) -> Result<T> {
        if threads <= 1 || rayon::current_thread_index().is_none() {
            return pass(Self { threads });
        }
        // This is a worker of a rayon pool: to wait for another thread is the way to wait without taking tasks.
        let pass = Mutex::new(Some(pass));
        let take = || lock(&pass).take();
        let run = |threads| take().map(|pass| pass(Self { threads }));
        let result = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name(NAME.to_owned()).spawn_scoped(scope, || run(threads));
            match thread {
                Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                Err(_) => run(1),
            }
        });
        match result {
            Some(result) => result,
            None => bail!("a pass was run twice"),
        }
    }

    /// Runs parts of a pass that take no locks.
    pub(super) fn pieces<T: Send>(self, pieces: Vec<T>, run: impl Fn(T) + Sync) {
        self.share(&PIECES, pieces, run);
    }

    /// Runs parts of a pass that lock what they need, while the caller holds no lock.
    pub(super) fn tensors<T: Send>(self, bundles: Vec<T>, run: impl Fn(T) + Sync) {
        self.share(&TENSORS, bundles, run);
    }

    fn share<T: Send>(self, helpers: &Helpers, parts: Vec<T>, run: impl Fn(T) + Sync) {
        let n = self.threads.min(parts.len()).saturating_sub(1);
        let parts = Mutex::new(parts.into_iter());
        let next = || lock(&parts).next();
        let work = || {
            while let Some(part) = next() {
                run(part);
            }
        };
        match helpers.get(n) {
            // The caller, which is no worker of a pool, begins at once and waits for helpers at the end.
            Some(pool) => pool.in_place_scope(|scope| {
                (0..n).for_each(|_| scope.spawn(|_| work()));
                work();
            }),
            None => work(),
        }
    }
}

const NAME: &str = "adamax";

/// A pool with as many workers as were ever asked for; they sleep while there is nothing to do.
struct Helpers(Mutex<Option<Arc<ThreadPool>>>);

impl Helpers {
    /// A pool of at least `n` workers; a smaller one, or none, if the system gives no more threads.
    fn get(&self, n: usize) -> Option<Arc<ThreadPool>> {
        if n == 0 {
            return None;
        }
        let mut pool = lock(&self.0);
        if pool.as_ref().is_none_or(|pool| pool.current_num_threads() < n)
            && let Ok(larger) = ThreadPoolBuilder::new().num_threads(n).thread_name(|_| NAME.to_owned()).build()
        {
            // The workers of the old one end when nobody uses it any more.
            *pool = Some(Arc::new(larger));
        }
        pool.clone()
    }
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    /// Runs as many parts of each kind; how often the parts were run.
    fn run(threads: usize, parts: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
        let count = |count: &AtomicUsize| {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let pass = |team: Team| {
            team.pieces(counts.iter().collect(), count);
            team.tensors(counts.iter().collect(), count);
            Ok(())
        };
        Team::run(threads, pass).unwrap();
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_part_is_run_once() {
        let pool = pool(2);
        for threads in [1, 2, 5] {
            for parts in [0, 1, 2, 100] {
                assert_eq!(run(threads, parts), vec![2; parts]);
                assert_eq!(pool.install(|| run(threads, parts)), vec![2; parts]);
            }
        }
    }

    #[test]
    fn a_worker_that_waits_takes_no_tasks() {
        let (is_waiting, was_taken) = (&AtomicBool::new(false), &AtomicBool::new(false));
        pool(1).scope(|scope| {
            scope.spawn(move |_| was_taken.store(is_waiting.load(Ordering::Relaxed), Ordering::Relaxed));
            is_waiting.store(true, Ordering::Relaxed);
            let pause = |()| std::thread::sleep(Duration::from_millis(5));
            let pass = |team: Team| {
                team.pieces(vec![(); 4], pause);
                team.tensors(vec![(); 4], pause);
                Ok(())
            };
            Team::run(2, pass).unwrap();
            is_waiting.store(false, Ordering::Relaxed);
        });
        assert!(!was_taken.load(Ordering::Relaxed));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_threads() {
        let fail = || {
            let pass = |team: Team| {
                team.pieces((0..10).collect(), |i| assert_ne!(i, 7, "a panic of a test"));
                Ok(())
            };
            catch_unwind(AssertUnwindSafe(|| Team::run(3, pass))).is_err()
        };
        assert!(fail() && pool(1).install(fail));
        assert_eq!(run(3, 10), [2; 10]);
    }
}
