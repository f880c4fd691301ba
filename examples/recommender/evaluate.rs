//! How good predictions are, and what they are to be compared with.

use std::cmp::Ordering;
use std::slice;

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
    let predict = |questions: &[Question<'_>], head| predict(model, questions, split, history, head);
    let rated = |rating| {
        let &Rating { user, ref item, time, .. } = rating;
        Question { user, time, items: slice::from_ref(item) }
    };
    let ratings = predict(&split.test.iter().map(rated).collect::<Vec<_>>(), |prediction| prediction.ratings)?;
    let test_rmse = rmse(&split.test, ratings.iter().map(|rating| f64::from(rating.clamp(lowest, highest))));

    let ranked = |ranking| {
        let &Ranking { user, time, ref candidates } = ranking;
        Question { user, time, items: candidates }
    };
    let logits = predict(&split.rankings.iter().map(ranked).collect::<Vec<_>>(), |prediction| prediction.logits)?;
    Ok(Quality { test_rmse, ranking: ranking_quality(&split.rankings, &logits) })
}

/// What about this user and each of these items at that time?
struct Question<'a> {
    user: u32,
    time: i64,
    items: &'a [u32],
}

/// What one head of `model` says of each item of each question.
fn predict(
    model: &Recommender,
    questions: &[Question<'_>],
    split: &Split,
    history: usize,
    head: fn(Prediction) -> Tensor,
) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(questions.iter().map(|question| question.items.len()).sum());
    for same in questions.chunk_by(|a, b| a.items.len() == b.items.len()) {
        let items_each = same[0].items.len();
        for chunk in same.chunks((CHUNK / items_each).max(1)) {
            // The first item of every question, then the second of every one: a history is pooled once for all of them.
            let users: Vec<u32> = chunk.iter().map(|question| question.user).collect();
            let nth_items = |nth: usize| chunk.iter().map(move |question| question.items[nth]);
            let items = (0..items_each).flat_map(nth_items).collect();
            let histories: Vec<&[u32]> =
                chunk.iter().map(|question| split.histories.before(question.user, question.time, history)).collect();
            let prediction = model.forward(&model.ids(users.repeat(items_each))?, &model.ids(items)?, &histories)?;
            let scores = head(prediction).to_vec1::<f32>()?;
            let of_question = |index| scores.iter().skip(index).step_by(chunk.len());
            (0..chunk.len()).for_each(|index| all.extend(of_question(index)));
        }
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
    use candle_core::Device;
    use candle_nn::VarMap;
    use clap::Parser;

    use super::*;
    use crate::random::{Stream, random};
    use crate::settings::Args;

    #[test]
    fn items_that_are_asked_about_together_have_the_scores_that_each_has_alone() -> Result<()> {
        let settings = Args::try_parse_from(["recommender", "--history", "3"])?.settings;
        let rating = |i: u32| Rating { user: i % 4, item: i % 7, value: 3.0, time: i64::from(i) };
        let ratings = Ratings { list: (0..20).map(rating).collect(), users: 4, items: 7 };
        let split = Split::new(&ratings, &mut random(1, Stream::Split))?;
        let rng = &mut random(1, Stream::Weights);
        let model = Recommender::new(&settings, &Device::Cpu, (4, 7), 3.0, &VarMap::new(), rng)?;
        let scores = |questions: &[Question<'_>]| predict(&model, questions, &split, 3, |prediction| prediction.logits);

        let all: [&[u32]; 5] = [&[1, 2, 3], &[4, 0, 1], &[6], &[2, 5], &[3, 3]];
        let together = scores(&(0..).zip(all).map(|(i, items)| question(i, items)).collect::<Vec<_>>())?;
        let single = (0..).zip(all).flat_map(|(i, items)| items.chunks(1).map(move |item| question(i, item)));
        assert_eq!(together, single.map(|question| scores(&[question])).collect::<Result<Vec<_>>>()?.concat());
        assert_eq!(together.len(), 11);
        Ok(())
    }

    /// One of user `i % 4`, at a time when some of the ratings have been given.
    fn question(i: u32, items: &[u32]) -> Question<'_> {
        Question { user: i % 4, time: i64::from(8 + 3 * i), items }
    }

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
