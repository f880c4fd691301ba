//! Where the time of training steps goes.

use std::time::Duration;

/// How long each part of each step took. A GPU is waited for at the end of each, so that every part has its own time.
#[derive(Default)]
pub(crate) struct Laps {
    pub(crate) batch: Vec<Duration>,
    pub(crate) forward: Vec<Duration>,
    pub(crate) backward: Vec<Duration>,
    pub(crate) step: Vec<Duration>,
}

impl Laps {
    /// Prints a line for each part, under `head` in a column of this width; nothing if there was no step.
    pub(crate) fn print(&self, head: &str, width: usize) {
        let parts = [
            ("batch", &self.batch),
            ("forward", &self.forward),
            ("backward", &self.backward),
            ("step (Adamax)", &self.step),
        ];
        let total: Duration = parts.iter().flat_map(|(_, laps)| laps.iter()).sum();
        if total.is_zero() {
            return; // resumed after the last step
        }
        println!("\n{head:<width$}  {:>9}  {:>8}  {:>8}", "median ms", "total s", "share");
        for (name, laps) in parts {
            let mut sorted = laps.clone();
            sorted.sort_unstable();
            let median = sorted[sorted.len() / 2].as_secs_f64() * 1e3;
            let sum = laps.iter().sum::<Duration>().as_secs_f64();
            println!("{name:<width$}  {median:>9.2}  {sum:>8.2}  {:>6.1} %", 100.0 * sum / total.as_secs_f64());
        }
    }
}
