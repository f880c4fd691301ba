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

const USERS: usize = 2_000;
const ITEMS: usize = 1_500;
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
pub(crate) fn ratings() -> Ratings {
    let rng = &mut StdRng::seed_from_u64(20_150_507);
    let scale = (AFFINITY / (RANK as f64).sqrt()).sqrt();
    let tastes = normals(rng, USERS * RANK, scale);
    let traits = normals(rng, ITEMS * RANK, scale);
    let user_bias = normals(rng, USERS, USER_BIAS);
    let item_bias = normals(rng, ITEMS, ITEM_BIAS);
    let mut ln_popularity: Vec<f64> = (1..=ITEMS).map(|place| -ZIPF * ((place + 10) as f64).ln()).collect();
    ln_popularity.shuffle(rng);

    let mut list = Vec::new();
    for (user, taste) in tastes.chunks_exact(RANK).enumerate() {
        let affinities: Vec<f64> =
            traits.chunks_exact(RANK).map(|item| taste.iter().zip(item).map(|(a, b)| a * b).sum()).collect();
        // The items with the largest `ln weight + Gumbel noise` are a draw by weight without replacement.
        let mut keys: Vec<(f64, usize)> = (0..ITEMS)
            .map(|item| (ln_popularity[item] + CHOICE * affinities[item] - (-uniform(rng).ln()).ln(), item))
            .collect();
        keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let count = (MEDIAN_COUNT * (COUNT_SPREAD * normal(rng)).exp()) as usize;
        keys.truncate(count.clamp(20, ITEMS / 2));
        // Those come out by their weight, heaviest first, but were not seen in that order.
        keys.shuffle(rng);
        for (time, &(_, item)) in keys.iter().enumerate() {
            let rating = MEAN + user_bias[user] + item_bias[item] + affinities[item] + NOISE * normal(rng);
            let value = rating.round().clamp(1.0, 5.0) as f32;
            list.push(Rating { user: user as u32, item: item as u32, value, time: time as i64 });
        }
    }
    Ratings { list, users: USERS, items: ITEMS }
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
