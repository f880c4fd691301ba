//! The parts of the JSON form that serde's derives do not cover: what Keras writes and these structures do not hold.

use serde::de::{DeserializeOwned, Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use super::LearningRateSchedule;

/// `{"class_name": .., "config": ..}`, as Keras stores an object.
#[derive(Serialize)]
pub(super) struct Object<T> {
    pub(super) class_name: &'static str,
    pub(super) config: T,
}

/// A schedule's valid config without the `name` that Keras adds: it labels a graph and changes no number.
pub(super) fn keras_config<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<T, D::Error>
where
    T: DeserializeOwned + LearningRateSchedule,
{
    let mut config = Map::deserialize(deserializer)?;
    config.remove("name");
    let schedule = T::deserialize(Value::Object(config)).map_err(D::Error::custom)?;
    schedule.validate().map_err(D::Error::custom)?;
    Ok(schedule)
}

/// A number of steps, which Keras stores as it was given: `100` or `100.0`.
pub(super) fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    // Up to here an f64 tells every whole number from its neighbors.
    const EXACT: f64 = (1_u64 << f64::MANTISSA_DIGITS) as f64;
    let number = Number::deserialize(deserializer)?;
    let whole = |value: &f64| value.fract() == 0.0 && (0.0..=EXACT).contains(value);
    number
        .as_u64()
        .or_else(|| number.as_f64().filter(whole).map(|value| value as u64))
        .ok_or_else(|| D::Error::custom(format!("expected a whole number of steps, got {number}")))
}
