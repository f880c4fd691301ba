//! Which ratings are trained on and which are kept for the evaluation.
//!
//! Two sets are kept, and neither is trained on: a random tenth of the ratings, for the error of predicted ratings,
//! and each user's latest rating, for the ranking (the leave-one-out of He et al., "Neural Collaborative
//! Filtering", 2017). A rating may be in both.

use anyhow::{Result, ensure};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

use crate::data::{Rating, Ratings};

/// How many unrated items the held-out one is ranked among.
const RIVALS: usize = 99;

/// The ratings, split.
pub(crate) struct Split {
    pub(crate) train: Vec<Rating>,
    pub(crate) test: Vec<Rating>,
    /// One for each user who has rated at least two items and has left one unrated.
    pub(crate) rankings: Vec<Ranking>,
    /// What each user has rated in `train`.
    pub(crate) trained: ItemSets,
    /// The same, in the order of time.
    pub(crate) histories: Histories,
}

/// A task of the ranking evaluation: `candidates[0]`, which the user chose, among others that they did not.
pub(crate) struct Ranking {
    pub(crate) user: u32,
    /// When the user chose.
    pub(crate) time: i64,
    pub(crate) candidates: Vec<u32>,
}

impl Split {
    /// Splits `ratings` as `rng` decides.
    ///
    /// It is an error if nothing is left to train on or for one of the evaluations.
    pub(crate) fn new(ratings: &Ratings, rng: &mut StdRng) -> Result<Self> {
        let mut order: Vec<usize> = (0..ratings.list.len()).collect();
        order.shuffle(rng);

        // Many ratings of MovieLens have the time of another; walking in random order breaks such ties at random.
        let mut latest: Vec<Option<usize>> = vec![None; ratings.users];
        for &index in &order {
            let rating = &ratings.list[index];
            let latest = &mut latest[rating.user as usize];
            if latest.is_none_or(|latest| ratings.list[latest].time < rating.time) {
                *latest = Some(index);
            }
        }

        let all = ItemSets::new(ratings.users, ratings.items, &ratings.list);
        let latest: Vec<usize> =
            latest.into_iter().flatten().filter(|&index| all.of(ratings.list[index].user).len() >= 2).collect();

        let mut kept = vec![false; ratings.list.len()];
        latest.iter().for_each(|&index| kept[index] = true);
        let tests = &order[..ratings.list.len() / 10];
        tests.iter().for_each(|&index| kept[index] = true);

        let train: Vec<Rating> =
            ratings.list.iter().zip(&kept).filter(|&(_, &kept)| !kept).map(|(&rating, _)| rating).collect();
        let rankings: Vec<Ranking> = latest
            .iter()
            .map(|&index| {
                let Rating { user, item, time, .. } = ratings.list[index];
                let unrated = all.missing(user);
                let drawn = rand::seq::index::sample(rng, unrated, RIVALS.min(unrated));
                let rivals = drawn.iter().map(|nth| all.nth_missing(user, nth));
                Ranking { user, time, candidates: std::iter::once(item).chain(rivals).collect() }
            })
            .filter(|ranking| ranking.candidates.len() > 1)
            .collect();
        ensure!(!tests.is_empty(), "expected at least 10 ratings, got {}", ratings.list.len());
        ensure!(
            !latest.is_empty(),
            "no user has rated two items, so that one could be learned and the other be ranked"
        );
        ensure!(
            !rankings.is_empty(),
            "every user with two ratings has rated all of the {} items: there is no other to rank the latest one among",
            ratings.items
        );
        ensure!(!train.is_empty(), "all of the {} ratings are kept for the evaluation", ratings.list.len());
        Ok(Self {
            trained: ItemSets::new(ratings.users, ratings.items, &train),
            histories: Histories::new(ratings.users, &train),
            test: tests.iter().map(|&index| ratings.list[index]).collect(),
            train,
            rankings,
        })
    }
}

/// A set of items for each user, in one array: the items of user `u` are those from `starts[u]` to `starts[u + 1]`.
pub(crate) struct ItemSets {
    items: usize,
    starts: Vec<usize>,
    /// Ascending for each user.
    sorted: Vec<u32>,
}

impl ItemSets {
    fn new(users: usize, items: usize, ratings: &[Rating]) -> Self {
        let mut pairs: Vec<(u32, u32)> = ratings.iter().map(|rating| (rating.user, rating.item)).collect();
        pairs.sort_unstable();
        let starts = (0..=users).map(|user| pairs.partition_point(|pair| (pair.0 as usize) < user)).collect();
        Self { items, starts, sorted: pairs.into_iter().map(|pair| pair.1).collect() }
    }

    /// The items of `user`, ascending.
    pub(crate) fn of(&self, user: u32) -> &[u32] {
        &self.sorted[self.starts[user as usize]..self.starts[user as usize + 1]]
    }

    /// How many items `user` does not have.
    pub(crate) fn missing(&self, user: u32) -> usize {
        self.items - self.of(user).len()
    }

    /// The `nth` item, from 0, that `user` does not have; so a draw needs no second try, however few there are.
    pub(crate) fn nth_missing(&self, user: u32, nth: usize) -> u32 {
        // Before the item at `index` there are `sorted[index] - index` missing ones, which never falls.
        let items = self.of(user);
        let (mut low, mut high) = (0, items.len());
        while low < high {
            let middle = (low + high) / 2;
            if items[middle] as usize - middle <= nth {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (nth + low) as u32
    }

    /// A random item that `user` does not have, each with the same probability.
    pub(crate) fn draw_missing(&self, user: u32, rng: &mut StdRng) -> u32 {
        self.nth_missing(user, rng.random_range(0..self.missing(user)))
    }
}

/// The items of each user in the order of time, in one array: those of user `u` are from `starts[u]` to `starts[u + 1]`.
pub(crate) struct Histories {
    starts: Vec<usize>,
    times: Vec<i64>,
    items: Vec<u32>,
}

impl Histories {
    fn new(users: usize, ratings: &[Rating]) -> Self {
        let mut sorted: Vec<(u32, i64, u32)> =
            ratings.iter().map(|rating| (rating.user, rating.time, rating.item)).collect();
        sorted.sort_unstable();
        let starts = (0..=users).map(|user| sorted.partition_point(|entry| (entry.0 as usize) < user)).collect();
        let (times, items) = sorted.into_iter().map(|(_, time, item)| (time, item)).unzip();
        Self { starts, times, items }
    }

    /// The last `n` items that `user` has rated before `time`; what has the same time is not before.
    pub(crate) fn before(&self, user: u32, time: i64, n: usize) -> &[u32] {
        let (start, end) = (self.starts[user as usize], self.starts[user as usize + 1]);
        let end = start + self.times[start..end].partition_point(|&earlier| earlier < time);
        &self.items[start.max(end.saturating_sub(n))..end]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::random::{Stream, random};
    use crate::synthetic;

    #[test]
    fn the_missing_items_are_counted_in_order() {
        let rating = |user, item| Rating { user, item, value: 3.0, time: 0 };
        let sets = ItemSets::new(3, 6, &[rating(0, 4), rating(0, 0), rating(0, 1), rating(2, 5)]);
        let missing = |user| (0..sets.missing(user)).map(|nth| sets.nth_missing(user, nth)).collect::<Vec<_>>();
        assert_eq!(missing(0), [2, 3, 5]);
        assert_eq!(missing(1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(missing(2), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_history_ends_before_its_time() {
        let rating = |user, item, time| Rating { user, item, value: 3.0, time };
        let ratings = [rating(0, 5, 30), rating(2, 1, 7), rating(0, 3, 10), rating(0, 4, 20), rating(0, 2, 20)];
        let histories = Histories::new(3, &ratings);
        assert_eq!(histories.before(0, 10, 9), [0u32; 0]);
        assert_eq!(histories.before(0, 20, 9), [3]);
        assert_eq!(histories.before(0, 99, 9), [3, 2, 4, 5]);
        assert_eq!(histories.before(0, 30, 2), [2, 4]);
        assert_eq!(histories.before(0, 99, 0), [0u32; 0]);
        assert_eq!(histories.before(1, 99, 9), [0u32; 0]);
        assert_eq!(histories.before(2, 8, 9), [1]);
    }

    #[test]
    fn users_who_have_rated_every_item_are_not_ranked() -> Result<()> {
        let of = |pairs: Vec<(u32, u32)>, users, items| {
            let list = (0..).zip(pairs).map(|(time, (user, item))| Rating { user, item, value: 3.0, time }).collect();
            Split::new(&Ratings { list, users, items }, &mut random(1, Stream::Split))
        };
        let all = |users: u32, items: u32| (0..users * items).map(|i| (i / items, i % items)).collect::<Vec<_>>();
        let refused = |pairs, users, items| of(pairs, users, items).err().map(|error| error.to_string());
        let every =
            "every user with two ratings has rated all of the 4 items: there is no other to rank the latest one among";
        assert_eq!(refused(all(5, 4), 5, 4).as_deref(), Some(every));
        let few = Some("expected at least 10 ratings, got 4");
        assert_eq!(refused(all(1, 4), 1, 4).as_deref(), few);
        let one = "no user has rated two items, so that one could be learned and the other be ranked";
        assert_eq!(refused((0..20).map(|user| (user, user % 3)).collect(), 20, 3).as_deref(), Some(one));
        // One user has every item, another one has not.
        let pairs = [all(1, 12), vec![(1, 0), (1, 5)]].concat();
        let split = of(pairs, 2, 12)?;
        assert_eq!(split.rankings.iter().map(|ranking| ranking.user).collect::<Vec<_>>(), [1]);
        Ok(())
    }

    #[test]
    fn nothing_that_is_evaluated_is_trained_on() -> Result<()> {
        let ratings = synthetic::ratings(synthetic::USERS, synthetic::ITEMS);
        let split = Split::new(&ratings, &mut random(1, Stream::Split))?;
        let pairs =
            |ratings: &[Rating]| ratings.iter().map(|rating| (rating.user, rating.item)).collect::<HashSet<_>>();
        let (all, train) = (pairs(&ratings.list), pairs(&split.train));
        assert_eq!(split.test.len(), ratings.list.len() / 10);
        assert!(split.test.iter().all(|rating| !train.contains(&(rating.user, rating.item))));
        assert_eq!(split.rankings.len(), ratings.users);
        for Ranking { user, candidates, .. } in &split.rankings {
            let latest = ratings.list.iter().filter(|rating| rating.user == *user).max_by_key(|rating| rating.time);
            assert_eq!(latest.map(|rating| rating.item), Some(candidates[0]));
            assert!(!train.contains(&(*user, candidates[0])));
            assert_eq!(candidates.iter().collect::<HashSet<_>>().len(), 1 + RIVALS);
            assert!(candidates[1..].iter().all(|&item| !all.contains(&(*user, item))));
        }
        Ok(())
    }
}
