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
    /// The plural of the steps that are counted, and of what the steps are made of.
    what: (&'static str, &'static str),
    /// When something was last printed, and of how many things the steps since then were made.
    since: Cell<(Instant, usize)>,
}

impl Bar {
    /// A bar of `width` letters for `length` steps, where `done` are done. The steps, and what they are made of, are
    /// called `what`, such as `("steps", "texts")`.
    pub(crate) fn new(width: usize, what: (&'static str, &'static str), length: u64, done: u64) -> Result<Self> {
        let bar = ProgressBar::new(length).with_position(done);
        let template = format!("{{bar:{width}}} {{pos}}/{{len}} {}, {{eta}} left, {{msg}}", what.0);
        bar.set_style(ProgressStyle::with_template(&template)?);
        Ok(Self { bar, what, since: Cell::new((Instant::now(), 0)) })
    }

    /// One more step is done, of so many things, and `message` says what came of it.
    pub(crate) fn advance(&self, things: usize, message: String) {
        self.bar.set_message(message);
        self.bar.inc(1);
        let (spoken, before) = self.since.get();
        self.since.set((spoken, before + things));
        if spoken.elapsed() >= SILENCE {
            self.speak();
        }
    }

    /// Prints a line if there is no bar, after a step that is the last of some.
    pub(crate) fn speak(&self) {
        if self.bar.is_hidden()
            && let Some(line) = self.line()
        {
            eprintln!("{line}");
        }
    }

    /// What the bar says, and how fast it goes; nothing if nothing has been done since the last time.
    fn line(&self) -> Option<String> {
        let (spoken, things) = self.since.replace((Instant::now(), 0));
        let (bar, eta, (steps, what)) = (&self.bar, HumanDuration(self.bar.eta()), self.what);
        let (done, length, message) = (bar.position(), bar.length().unwrap_or(0), bar.message());
        let rate = things as f64 / spoken.elapsed().as_secs_f64();
        let digits = usize::from(rate < 10.0);
        (things > 0).then(|| format!("{done}/{length} {steps}, {eta} left, {message}, {rate:.digits$} {what} a second"))
    }

    /// Prints something else meanwhile. The time since the last step counts for no other one.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
        self.since.set((Instant::now(), 0));
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
    fn a_line_says_what_the_bar_says_and_how_fast_it_goes() -> Result<()> {
        let bar = Bar::new(30, ("steps", "texts"), 9, 4)?;
        assert_eq!(bar.line(), None);
        bar.advance(20, "loss 0.7".to_owned());
        bar.advance(30, "loss 0.5".to_owned());
        std::thread::sleep(Duration::from_millis(5));
        let line = bar.line().unwrap_or_default();
        let rate = line.strip_prefix("6/9 steps, ").and_then(|line| line.strip_suffix(" texts a second"));
        let rate = rate.and_then(|line| line.split_once(" left, loss 0.5, ")).and_then(|(_, rate)| rate.parse().ok());
        assert!(rate.is_some_and(|rate: f64| rate > 0.0 && rate <= 10_000.0), "{line}");
        assert_eq!(bar.line(), None);
        bar.advance(1, String::new());
        bar.suspend(|| {});
        assert_eq!(bar.line(), None);
        Ok(())
    }
}
