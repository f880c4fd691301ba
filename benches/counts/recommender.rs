//! The training step and the evaluation of `examples/recommender`, with its settings, on ratings that take no time to make.

use anyhow::Result;
use candle_core::Device;
use clap::Parser as _;
use rand::rngs::StdRng;

use crate::case::{Case, again};
use crate::data::{Rating, Ratings};
use crate::settings::Args;
use crate::split::Split;
use crate::train::Trainer;
use crate::{Stream, random};

const USERS: u32 = 64;
const ITEMS: u32 = 1500;
/// The ratings of each user.
const EACH: u32 = 40;

/// The evaluation asks for 64 x 100 pairs that are ranked, and 256 ratings.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::cost("recommender step", || {
            let (mut trainer, batch, mut rng) = start()?;
            again(move || trainer.step(&batch, &mut rng).map(drop))
        }),
        Case::cost("recommender evaluation", || {
            let (trainer, ..) = start()?;
            again(move || trainer.evaluate().map(drop))
        }),
    ]
}

/// A model, the ratings of a batch, and the random numbers of its other items.
fn start() -> Result<(Trainer<'static>, Vec<&'static Rating>, StdRng)> {
    // The trainer borrows them, and lives as long as the program.
    let settings = &Box::leak(Box::new(Args::try_parse_from(["recommender"])?)).settings;
    let ratings = ratings();
    let split: &Split = Box::leak(Box::new(Split::new(&ratings, &mut random(settings.seed, Stream::Split))?));
    let trainer = Trainer::new(settings, &Device::Cpu, &ratings, split)?;
    let batch = split.train.iter().step_by(split.train.len() / settings.batch).take(settings.batch).collect();
    Ok((trainer, batch, random(settings.seed, Stream::Epoch(1))))
}

/// Every user has rated other items, in the order of their numbers.
fn ratings() -> Ratings {
    let rating = |user: u32, nth: u32| {
        let value = 1.0 + ((7 * user + 3 * nth) % 5) as f32;
        Rating { user, item: (37 * user + 31 * nth) % ITEMS, value, time: nth.into() }
    };
    let list = (0..USERS).flat_map(|user| (0..EACH).map(move |nth| rating(user, nth))).collect();
    Ratings { list, users: USERS as usize, items: ITEMS as usize }
}
