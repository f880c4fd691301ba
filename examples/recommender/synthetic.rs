//! Ratings that are made up, so that the example runs without a download.
//!
//! Behind them stands a truth of low rank that the model can find: a user's taste and an item's traits are vectors
//! of [`RANK`] numbers, and
//!
//! ```text
//! affinity = taste . traits
//! rating   = mean + user's bias + item's bias + affinity + noise      rounded to 1, 2, .., 5
//! chosen  ~  popularity * exp(CHOICE * affinity)                      popularity by Zipf's law
//! ```
//!
//! so that people rate more often what they will like, as they do with films.

use std::f64::consts::TAU;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::data::{Rating, Ratings};

/// The number of users, unless another one is asked for.
pub(crate) const USERS: usize = 2_000;
/// The number of items, unless another one is asked for; and how many of more items a user knows of.
pub(crate) const ITEMS: usize = 1_500;
/// Ratings of a user: their median, and the spread of their logarithm.
const MEDIAN_COUNT: f64 = 90.0;
const COUNT_SPREAD: f64 = 0.8;
const RANK: usize = 4;
const MEAN: f64 = 3.6;
/// Standard deviations of what a rating is made of.
const USER_BIAS: f64 = 0.4;
const ITEM_BIAS: f64 = 0.4;
const AFFINITY: f64 = 0.8;
const NOISE: f64 = 0.75;
/// How much taste decides what is chosen.
const CHOICE: f64 = 2.0;
/// The popularity of the item at place n is `(n + 10)^-ZIPF`.
const ZIPF: f64 = 0.9;

/// The same ratings on every call: the seed of the experiment plays no part.
///
/// Of many items a user knows [`ITEMS`] at most, drawn by popularity, and chooses among these.
pub(crate) fn ratings(users: usize, items: usize) -> Ratings {
    let rng = &mut StdRng::seed_from_u64(20_150_507);
    let scale = (AFFINITY / (RANK as f64).sqrt()).sqrt();
    let tastes = normals(rng, users * RANK, scale);
    let traits = normals(rng, items * RANK, scale);
    let user_bias = normals(rng, users, USER_BIAS);
    let item_bias = normals(rng, items, ITEM_BIAS);
    let mut ln_popularity: Vec<f64> = (1..=items).map(|place| -ZIPF * ((place + 10) as f64).ln()).collect();
    ln_popularity.shuffle(rng);
    let known = Known::new(&ln_popularity);

    let mut list = Vec::new();
    for (user, taste) in tastes.chunks_exact(RANK).enumerate() {
        let affinity = |item: usize| taste.iter().zip(&traits[item * RANK..]).map(|(a, b)| a * b).sum::<f64>();
        // The items with the largest `ln weight + Gumbel noise` are a draw by weight without replacement.
        let mut keys: Vec<(f64, usize)> = known
            .draw(rng)
            .into_iter()
            .map(|(item, ln_weight)| (ln_weight + CHOICE * affinity(item) - (-uniform(rng).ln()).ln(), item))
            .collect();
        keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let count = (MEDIAN_COUNT * (COUNT_SPREAD * normal(rng)).exp()) as usize;
        keys.truncate(count.clamp(20, ITEMS / 2));
        // Those come out by their weight, heaviest first, but were not seen in that order.
        keys.shuffle(rng);
        for (time, &(_, item)) in keys.iter().enumerate() {
            let rating = MEAN + user_bias[user] + item_bias[item] + affinity(item) + NOISE * normal(rng);
            let value = rating.round().clamp(1.0, 5.0) as f32;
            list.push(Rating { user: user as u32, item: item as u32, value, time: time as i64 });
        }
    }
    Ratings { list, users, items }
}

/// The items that a user knows of, and chooses among.
enum Known {
    /// All, and the logarithm of the weight of each.
    All(Vec<f64>),
    /// Some, by these weights, which are summed up from the first item on.
    Some(Vec<f64>),
}

impl Known {
    fn new(ln_popularity: &[f64]) -> Self {
        if ln_popularity.len() <= ITEMS {
            return Self::All(ln_popularity.to_vec());
        }
        let sums = ln_popularity.iter().scan(0.0, |sum, ln_weight| {
            *sum += ln_weight.exp();
            Some(*sum)
        });
        Self::Some(sums.collect())
    }

    /// The items that one user knows of, each once and in ascending order, with the logarithms of their weights.
    fn draw(&self, rng: &mut StdRng) -> Vec<(usize, f64)> {
        match self {
            Self::All(ln_weights) => ln_weights.iter().copied().enumerate().collect(),
            Self::Some(sums) => {
                let total = sums.last().copied().unwrap_or(0.0);
                let item = |point: f64| sums.partition_point(|&sum| sum <= point).min(sums.len() - 1);
                let mut items: Vec<usize> = (0..ITEMS).map(|_| item(total * rng.random::<f64>())).collect();
                items.sort_unstable();
                items.dedup();
                // Popularity has played its part.
                items.into_iter().map(|item| (item, 0.0)).collect()
            }
        }
    }
}

fn normals(rng: &mut StdRng, count: usize, deviation: f64) -> Vec<f64> {
    (0..count).map(|_| deviation * normal(rng)).collect()
}

/// A standard normal number, by Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    (-2.0 * uniform(rng).ln()).sqrt() * (TAU * uniform(rng)).cos()
}

/// A number in (0, 1], whose logarithm exists.
fn uniform(rng: &mut StdRng) -> f64 {
    1.0 - rng.random::<f64>()
}
