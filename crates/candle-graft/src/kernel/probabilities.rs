//! The probabilities of attention from the products of queries and keys.

use super::element::Element;
use super::real::Real;
use super::{lanes, parallel, softmax};

/// How products become the arguments of the softmax.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    /// The query at `i` sees the keys up to and including `i` plus this.
    pub(crate) causal: Option<usize>,
    // The sizes: a row for each query of each head.
    pub(crate) heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
}

/// What is added to the scores.
pub(crate) struct Bias<'a, W> {
    numbers: &'a [W],
    /// How far the numbers of the next sequence, head and query are; 0 where they are the same.
    strides: [usize; 3],
}

impl<'a, W> Bias<'a, W> {
    /// The numbers of a tensor of these sizes. A size of 1 is that of any number of sequences, heads or queries.
    pub(crate) fn new(numbers: &'a [W], (b, h, s, keys): (usize, usize, usize, usize)) -> Self {
        let stride = |size: usize, stride: usize| if size == 1 { 0 } else { stride };
        Self { numbers, strides: [stride(b, h * s * keys), stride(h, s * keys), stride(s, keys)] }
    }

    /// The first numbers of a row.
    fn row(&self, scores: &Scores, row: usize, len: usize) -> &'a [W] {
        let (head, query) = (row / scores.queries, row % scores.queries);
        let at = [head / scores.heads, head % scores.heads, query];
        let from: usize = at.iter().zip(self.strides).map(|(at, stride)| at * stride).sum();
        &self.numbers[from..from + len]
    }
}

impl Scores {
    /// How many keys a row sees.
    fn visible(&self, row: usize) -> usize {
        match self.causal {
            Some(offset) => self.keys.min(offset.saturating_add(row % self.queries + 1)),
            None => self.keys,
        }
    }

    /// Replaces each row of `products` by the softmax of its scores. A row that sees no key becomes zeros.
    pub(crate) fn forward<T: Real + Element<Wide = T>>(&self, products: &mut [T], bias: Option<&Bias<'_, T>>) {
        let keys = self.keys;
        parallel::pieces(
            products,
            keys,
            #[inline(always)]
            |(start, products)| {
                let mut scores = vec![T::ZERO; keys];
                for (i, row) in products.chunks_mut(keys.max(1)).enumerate() {
                    let at = start / keys + i;
                    let visible = self.visible(at);
                    let (row, hidden) = row.split_at_mut(visible);
                    hidden.fill(T::ZERO);
                    let scores = &mut scores[..visible];
                    let scale = T::of(self.scale);
                    match self.softcap {
                        Some(cap) => {
                            let (cap, scale) = (T::of(cap), T::of(self.scale / cap));
                            lanes::map!(scores, x in row => (x * scale).tanh() * cap);
                        }
                        None => lanes::map!(scores, x in row => x * scale),
                    }
                    if let Some(bias) = bias {
                        let bias = bias.row(self, at, visible);
                        lanes::update!(score in scores, bias in bias => score + bias);
                    }
                    // The maximum passes over NaN, which is no key that is hidden.
                    let sees_none =
                        lanes::max(scores) == T::NEG_INFINITY && scores.iter().all(|x| *x == T::NEG_INFINITY);
                    if sees_none {
                        row.fill(T::ZERO);
                    } else {
                        softmax::row(scores, row);
                    }
                }
            },
        );
    }

    /// The gradient of the products, where `p` is the result. `products` are needed where there is a cap.
    pub(crate) fn backward<T: Real + Element<Wide = T>>(&self, p: &[T], grad: &[T], products: Option<&[T]>) -> Vec<T> {
        let mut out = vec![T::ZERO; p.len()];
        let keys = self.keys;
        parallel::pieces(
            &mut out,
            keys,
            #[inline(always)]
            |(start, out)| {
                for (i, out) in out.chunks_mut(keys.max(1)).enumerate() {
                    let at = start + i * keys..start + (i + 1) * keys;
                    softmax::row_backward(&p[at.clone()], &grad[at.clone()], out);
                    let scale = T::of(self.scale);
                    match (self.softcap, products) {
                        (Some(cap), Some(products)) => {
                            let inner = T::of(self.scale / cap);
                            let products = &products[at];
                            lanes::update!(g in out, x in products => {
                                let t = (x * inner).tanh();
                                g * scale * (T::ONE - t * t)
                            });
                        }
                        _ => lanes::update!(g in out => g * scale),
                    }
                }
            },
        );
        out
    }
}
