//! How good predictions are, and what they are to be compared with.

use std::cmp::Ordering;

use anyhow::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::{Rating, Ratings};
use crate::model::{Prediction, Recommender};
use crate::split::{Ranking, Split};

/// How many items a user is shown.
const SHOWN: f64 = 10.0;

/// Pairs that are predicted at a time, so that the memory does not grow with the evaluation.
const CHUNK: usize = 16_384;

/// One line of the learning curves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Epoch {
    pub(crate) epoch: usize,
    /// The learning rate of its last step.
    pub(crate) lr: f64,
    pub(crate) train_rmse: f64,
    pub(crate) quality: Quality,
}

/// How good a model is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Quality {
    pub(crate) test_rmse: f64,
    pub(crate) ranking: RankingQuality,
}

/// How good a ranking is, as means over users.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankingQuality {
    /// HR@10: how often the item that the user chose is among the first ten.
    pub(crate) hit_rate: f64,
    /// NDCG@10: `1 / log2(1 + place)` for the places from 1 to 10, and 0 for those behind.
    pub(crate) ndcg: f64,
}

/// The quality of `model` on what was kept out of training.
pub(crate) fn quality(model: &Recommender, split: &Split, history: usize) -> Result<Quality> {
    let (lowest, highest) = range(&split.train);
    let predict = |questions: &[Question], head| predict(model, questions, split, history, head);
    let tests: Vec<_> =
        split.test.iter().map(|&Rating { user, item, time, .. }| Question { user, item, time }).collect();
    let ratings = predict(&tests, |prediction| prediction.ratings)?;
    let test_rmse = rmse(&split.test, ratings.iter().map(|rating| f64::from(rating.clamp(lowest, highest))));

    let candidates = split.rankings.iter().flat_map(|&Ranking { user, time, ref candidates }| {
        candidates.iter().map(move |&item| Question { user, item, time })
    });
    let logits = predict(&candidates.collect::<Vec<_>>(), |prediction| prediction.logits)?;
    Ok(Quality { test_rmse, ranking: ranking_quality(&split.rankings, &logits) })
}

/// What about this user and this item at that time?
struct Question {
    user: u32,
    item: u32,
    time: i64,
}

/// What one head of `model` says.
fn predict(
    model: &Recommender,
    questions: &[Question],
    split: &Split,
    history: usize,
    head: fn(Prediction) -> Tensor,
) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(questions.len());
    for chunk in questions.chunks(CHUNK) {
        let (users, items): (Vec<u32>, Vec<u32>) = chunk.iter().map(|question| (question.user, question.item)).unzip();
        let histories: Vec<&[u32]> =
            chunk.iter().map(|question| split.histories.before(question.user, question.time, history)).collect();
        let prediction = model.forward(&model.ids(users)?, &model.ids(items)?, &histories)?;
        all.extend(head(prediction).to_vec1::<f32>()?);
    }
    Ok(all)
}

/// What there is to beat. It knows the training data, and no user's taste.
pub(crate) struct Baselines {
    /// The RMSE of the mean with an offset for each user and item.
    pub(crate) test_rmse: f64,
    /// The ranking by how often an item was rated.
    pub(crate) ranking: RankingQuality,
}

impl Baselines {
    pub(crate) fn new(ratings: &Ratings, split: &Split) -> Self {
        let mut counts = vec![0.0; ratings.items];
        split.train.iter().for_each(|rating| counts[rating.item as usize] += 1.0);
        let candidates = split.rankings.iter().flat_map(|ranking| &ranking.candidates);
        let scores: Vec<f32> = candidates.map(|&item| counts[item as usize]).collect();

        let mean = mean(&split.train);
        let item_offsets = offsets(ratings.items, &split.train, |rating| (rating.item, f64::from(rating.value) - mean));
        let of_item = |rating: &Rating| mean + item_offsets[rating.item as usize];
        let user_offsets =
            offsets(ratings.users, &split.train, |rating| (rating.user, f64::from(rating.value) - of_item(rating)));
        let predicted = split.test.iter().map(|rating| of_item(rating) + user_offsets[rating.user as usize]);
        Self { test_rmse: rmse(&split.test, predicted), ranking: ranking_quality(&split.rankings, &scores) }
    }
}

/// The mean residual of each id, drawn towards 0 as by three more ratings that leave none.
fn offsets(ids: usize, ratings: &[Rating], residual: impl Fn(&Rating) -> (u32, f64)) -> Vec<f64> {
    let mut sums = vec![(0.0, 3.0); ids];
    for rating in ratings {
        let (id, residual) = residual(rating);
        let (sum, count) = &mut sums[id as usize];
        *sum += residual;
        *count += 1.0;
    }
    sums.into_iter().map(|(sum, count)| sum / count).collect()
}

/// The mean of all ratings.
pub(crate) fn mean(ratings: &[Rating]) -> f64 {
    ratings.iter().map(|rating| f64::from(rating.value)).sum::<f64>() / ratings.len() as f64
}

/// The lowest and the highest rating.
fn range(ratings: &[Rating]) -> (f32, f32) {
    ratings.iter().fold((f32::MAX, f32::MIN), |(low, high), rating| (low.min(rating.value), high.max(rating.value)))
}

/// The root of the mean squared error.
fn rmse(ratings: &[Rating], predicted: impl Iterator<Item = f64>) -> f64 {
    let squares =
        ratings.iter().zip(predicted).map(|(rating, predicted)| (predicted - f64::from(rating.value)).powi(2));
    (squares.sum::<f64>() / ratings.len() as f64).sqrt()
}

/// The quality of the rankings by `scores`, which has one for each candidate of each ranking.
fn ranking_quality(rankings: &[Ranking], mut scores: &[f32]) -> RankingQuality {
    let mut total = RankingQuality { hit_rate: 0.0, ndcg: 0.0 };
    for ranking in rankings {
        let (of_this, rest) = scores.split_at(ranking.candidates.len());
        scores = rest;
        let ahead = ahead(of_this);
        if ahead < SHOWN {
            total.hit_rate += 1.0;
            total.ndcg += 1.0 / (2.0 + ahead).log2();
        }
    }
    let users = rankings.len() as f64;
    RankingQuality { hit_rate: total.hit_rate / users, ndcg: total.ndcg / users }
}

/// How many candidates rank ahead of the first one. A tie counts for a half, so that a model gains nothing by giving
/// all the same score; and a NaN for one, so that it gains nothing by giving none.
fn ahead(scores: &[f32]) -> f64 {
    let count = |score: &f32| match score.partial_cmp(&scores[0]) {
        Some(Ordering::Less) => 0.0,
        Some(Ordering::Equal) => 0.5,
        Some(Ordering::Greater) | None => 1.0,
    };
    scores[1..].iter().map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_and_nan_gain_nothing() {
        assert_eq!(ahead(&[2.0, 1.0, 3.0, 2.0]), 1.5);
        assert_eq!(ahead(&[f32::NAN, 1.0, 3.0]), 2.0);
        assert_eq!(ahead(&[1.0, f32::NAN, 0.0]), 1.0);
    }

    #[test]
    fn the_tenth_place_is_shown_and_the_eleventh_is_not() {
        let ranking = || Ranking { user: 0, time: 0, candidates: (0..12).collect() };
        let scores = |ahead: usize| {
            (0..12).map(move |i| {
                if i == 0 {
                    0.0
                } else if i <= ahead {
                    1.0
                } else {
                    -1.0
                }
            })
        };
        let scores: Vec<f32> = scores(0).chain(scores(9)).chain(scores(10)).collect();
        let quality = ranking_quality(&[ranking(), ranking(), ranking()], &scores);
        assert_eq!(quality.hit_rate, 2.0 / 3.0);
        assert_eq!(quality.ndcg, (1.0 + 1.0 / 11f64.log2()) / 3.0);
    }
}
