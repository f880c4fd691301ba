//! The example `recommender`, as far as its training step needs it.

#[path = "../common/bar.rs"]
pub(crate) mod bar;
#[path = "../recommender/data.rs"]
pub(crate) mod data;
#[path = "../recommender/evaluate.rs"]
pub(crate) mod evaluate;
#[path = "../recommender/form.rs"]
pub(crate) mod form;
#[path = "../common/laps.rs"]
pub(crate) mod laps;
#[path = "../recommender/model.rs"]
pub(crate) mod model;
#[path = "../common/options.rs"]
pub(crate) mod options;
#[path = "../recommender/random.rs"]
pub(crate) mod random;
#[path = "../recommender/settings.rs"]
pub(crate) mod settings;
#[path = "../recommender/split.rs"]
pub(crate) mod split;
#[path = "../recommender/synthetic.rs"]
pub(crate) mod synthetic;
#[path = "../common/text.rs"]
pub(crate) mod text;
#[path = "../recommender/train.rs"]
pub(crate) mod trainer;
