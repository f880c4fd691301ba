//! How far a program has come: a bar where stderr is a terminal, and a line now and then where it is not.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// How long a program without a terminal says nothing, at most, unless one step takes longer.
const SILENCE: Duration = Duration::from_secs(10);

/// A bar, or lines.
pub(crate) struct Bar {
    bar: ProgressBar,
    /// The plural of what is counted.
    what: &'static str,
    /// When something was last printed.
    spoken: Cell<Instant>,
}

impl Bar {
    /// A bar of `width` letters for `length` of `what`, where `done` are done.
    pub(crate) fn new(width: usize, what: &'static str, length: u64, done: u64) -> Result<Self> {
        let bar = ProgressBar::new(length).with_position(done);
        let template = format!("{{bar:{width}}} {{pos}}/{{len}} {what}, {{eta}} left, {{msg}}");
        bar.set_style(ProgressStyle::with_template(&template)?);
        Ok(Self { bar, what, spoken: Cell::new(Instant::now()) })
    }

    /// One more is done, and `message` says what came of it.
    pub(crate) fn advance(&self, message: String) {
        self.bar.set_message(message);
        self.bar.inc(1);
        if self.bar.is_hidden()
            && let Some(line) = self.line(SILENCE)
        {
            eprintln!("{line}");
        }
    }

    /// The next line, if nothing was printed for `silence`.
    fn line(&self, silence: Duration) -> Option<String> {
        if self.spoken.get().elapsed() < silence {
            return None;
        }
        self.spoken.set(Instant::now());
        let (bar, eta) = (&self.bar, HumanDuration(self.bar.eta()));
        Some(format!("{}/{} {}, {eta} left, {}", bar.position(), bar.length().unwrap_or(0), self.what, bar.message()))
    }

    /// Prints something else meanwhile.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        self.spoken.set(Instant::now());
        self.bar.suspend(print);
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_the_bar_says_after_some_silence() -> Result<()> {
        let bar = Bar::new(30, "steps", 9, 4)?;
        bar.advance("loss 0.5".to_owned());
        assert_eq!(bar.line(SILENCE), None);
        std::thread::sleep(Duration::from_millis(5));
        let line = bar.line(Duration::from_millis(5)).unwrap_or_default();
        assert!(line.starts_with("5/9 steps, ") && line.ends_with(" left, loss 0.5"), "{line}");
        std::thread::sleep(Duration::from_millis(5));
        bar.suspend(|| {});
        assert_eq!(bar.line(Duration::from_millis(100)), None);
        Ok(())
    }
}
