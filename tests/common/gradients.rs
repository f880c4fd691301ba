//! Gradients as tests hold them, dense or of some rows, and what they are in f64 before anything clips them.

use std::collections::{BTreeMap, BTreeSet};

use candle_adamax::{AccumulatedGrad, Gradient, SparseGrad};
use candle_core::Tensor;

use super::values;

/// A gradient of either kind.
#[derive(Clone, Debug)]
pub(crate) enum Grad {
    Dense(Tensor),
    Sparse(SparseGrad),
}

impl<'a> From<&'a Grad> for Gradient<'a> {
    fn from(grad: &'a Grad) -> Self {
        match grad {
            Grad::Dense(grad) => Self::Dense(grad),
            Grad::Sparse(grad) => Self::Sparse(grad),
        }
    }
}

/// A gradient written out in the shape of its variable; of rows that are there several times, the sums.
#[derive(Clone, Debug)]
pub(crate) struct Whole {
    pub(crate) g: Vec<f64>,
    /// The magnitudes of what was summed up, together.
    pub(crate) size: Vec<f64>,
    /// How often the most frequent row is there.
    pub(crate) terms: usize,
    /// The rows that it exists for; all if none.
    pub(crate) rows: Option<BTreeSet<usize>>,
}

impl Whole {
    /// `grad` as that of a variable of this shape.
    #[track_caller]
    pub(crate) fn of<'a>(grad: impl Into<Gradient<'a>>, shape: &[usize]) -> Self {
        let SparseGrad { indices, values: rows } = match grad.into() {
            Gradient::Dense(grad) => {
                let g = values(grad);
                return Self { size: g.iter().map(|g| g.abs()).collect(), g, terms: 1, rows: None };
            }
            Gradient::Sparse(grad) => grad,
            _ => unreachable!("no other one is made here"),
        };
        let n = shape.iter().product();
        let (mut g, mut size) = (vec![0.0; n], vec![0.0; n]);
        let mut count: BTreeMap<usize, usize> = BTreeMap::new();
        let (row_len, rows) = (row_len(shape), values(rows));
        for (position, row) in values(indices).into_iter().map(|row| row as usize).enumerate() {
            *count.entry(row).or_default() += 1;
            for i in 0..row_len {
                let x = rows[position * row_len + i];
                g[row * row_len + i] += x;
                size[row * row_len + i] += x.abs();
            }
        }
        Self { g, size, terms: count.values().copied().max().unwrap_or(0), rows: Some(count.into_keys().collect()) }
    }

    /// What was accumulated for a variable of this shape.
    #[track_caller]
    pub(crate) fn accumulated(sum: &AccumulatedGrad, shape: &[usize]) -> Self {
        match sum {
            AccumulatedGrad::Dense(sum) => Self::of(sum, shape),
            AccumulatedGrad::Rows(sum) => Self::of(sum, shape),
            _ => unreachable!("no other one is made here"),
        }
    }

    pub(crate) fn scaled(mut self, scale: f64) -> Self {
        self.g.iter_mut().for_each(|g| *g *= scale);
        self.size.iter_mut().for_each(|size| *size *= scale.abs());
        self
    }

    /// The sum with another of the same variable: of all rows if one of the two is.
    pub(crate) fn plus(mut self, other: &Self) -> Self {
        self.g.iter_mut().zip(&other.g).for_each(|(g, other)| *g += other);
        self.size.iter_mut().zip(&other.size).for_each(|(size, other)| *size += other);
        self.terms = self.terms.max(other.terms);
        self.rows = self.rows.zip(other.rows.as_ref()).map(|(rows, other)| &rows | other);
        self
    }

    /// Whether it says anything of element `i` of a variable of this shape, be it 0.
    pub(crate) fn touches(&self, i: usize, shape: &[usize]) -> bool {
        self.rows.as_ref().is_none_or(|rows| rows.contains(&(i / row_len(shape))))
    }
}

/// How many elements a row of a variable of this shape has.
pub(crate) fn row_len(shape: &[usize]) -> usize {
    shape.iter().skip(1).product()
}
