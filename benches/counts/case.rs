//! A case: a set-up, and a call that is counted.

use anyhow::{Context, Result};

/// A call. It is made [`CALLS`] times, and the last one is counted: the first may find out what the CPU has, and allocates
/// state.
pub(crate) type Work = Box<dyn FnMut() -> Result<()>>;

/// How often a [`Work`] is called.
pub(crate) const CALLS: usize = 3;

/// The exponent of what is linear, with room for tables of hashes that are fuller at one size than at the other.
pub(crate) const LINEAR: f64 = 1.1;
/// The exponent of what sorts.
pub(crate) const SORTS: f64 = 1.25;
/// The exponent of what moves a pointer for each later variable, which takes less than an instruction.
pub(crate) const MOVES: f64 = 1.25;
/// The exponent of what does not depend on the size.
pub(crate) const NONE: f64 = 0.02;

/// Something to count.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) growth: Option<Growth>,
    make: Box<dyn Fn(usize) -> Result<Work>>,
}

/// How a count may grow with the size of a case.
#[derive(Clone, Copy)]
pub(crate) struct Growth {
    /// The smaller size. The larger one is four times as large, so that both fill tables of hashes alike.
    pub(crate) n: usize,
    /// The exponent between the two sizes, at most.
    pub(crate) at_most: f64,
}

impl Growth {
    /// Both sizes.
    pub(crate) fn sizes(self) -> [usize; 2] {
        [self.n, 4 * self.n]
    }
}

impl Case {
    /// A case whose count stands in the file.
    pub(crate) fn cost(name: impl Into<String>, make: impl Fn() -> Result<Work> + 'static) -> Self {
        Self { name: name.into(), growth: None, make: Box::new(move |_| make()) }
    }

    /// A case that is counted at `n` and `4 * n`.
    pub(crate) fn growth(name: &str, n: usize, at_most: f64, make: impl Fn(usize) -> Result<Work> + 'static) -> Self {
        Self { name: name.into(), growth: Some(Growth { n, at_most }), make: Box::new(make) }
    }

    /// The sizes to count at. A case of cost has one, which it does not look at.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.growth.map_or(vec![0], |growth| growth.sizes().to_vec())
    }

    /// The call at a size, set up.
    pub(crate) fn work(&self, size: usize) -> Result<Work> {
        (self.make)(size).with_context(|| self.name.clone())
    }

    /// One call at the smallest size, uncounted.
    pub(crate) fn test(&self) -> Result<()> {
        self.work(self.sizes()[0])?().with_context(|| self.name.clone())
    }
}

/// A call that uses up what it is called with, which `make` makes for each.
pub(crate) fn each<T: 'static>(
    make: impl FnMut() -> Result<T>,
    mut call: impl FnMut(T) -> Result<()> + 'static,
) -> Result<Work> {
    let mut made = std::iter::repeat_with(make).take(CALLS).collect::<Result<Vec<T>>>()?;
    Ok(Box::new(move || call(made.pop().context("a call too many")?)))
}

/// A call whose errors are candle's, or this crate's.
pub(crate) fn again<E: Into<anyhow::Error>>(mut call: impl FnMut() -> Result<(), E> + 'static) -> Result<Work> {
    Ok(Box::new(move || call().map_err(Into::into)))
}
