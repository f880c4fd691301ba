//! What an optimizer takes as its learning rate: a number, a schedule, or something outside that it asks at each call.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use serde::de::{Deserializer, Error as _};
use serde::ser::{Error as _, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::wire::Object;
use super::{LearningRateSchedule, Schedule};
use crate::check;
use crate::error::{Error, Result};

const TENSOR: &str = "Tensor";
const CUSTOM: &str = "Custom";

/// Where the learning rate of a call comes from.
///
/// Usually made with `into()`, from a number, a schedule or a tensor:
///
/// ```
/// use candle_adamax::{CosineDecay, LearningRate};
/// use candle_core::{Device, Var};
///
/// let constant = LearningRate::from(0.5);
/// assert_eq!(constant.at(7)?, 0.5);
///
/// let schedule = LearningRate::from(CosineDecay::new(0.5, 100));
/// assert_eq!(schedule.at(50)?, 0.25);
///
/// let dial = Var::new(0.5f32, &Device::Cpu)?;
/// let tensor = LearningRate::from(&dial);
/// assert_eq!(tensor.at(0)?, 0.5);
/// dial.set(&dial.affine(0.5, 0.0)?)?; // turn the dial: the next call reads it
/// assert_eq!(tensor.at(1)?, 0.25);
/// # Ok::<(), candle_adamax::Error>(())
/// ```
///
/// # Serde
///
/// A `Constant` is a number, a `Schedule` is what [`Schedule`] writes. The other two lie outside of the optimizer, and
/// a file cannot hold them; it says so, and reading it does not fail:
///
/// | | written | read again |
/// | --- | --- | --- |
/// | `Tensor` | `{"class_name": "Tensor", "config": 0.001}`, with the number it holds now | a new tensor (f64, CPU) of that number |
/// | `Custom` | `{"class_name": "Custom", "config": null}` | a placeholder, which [`validate`](Self::validate) and [`at`](Self::at) refuse |
///
/// Both are [live](Self::is_external) when read, so that a loader can tell that the caller's own has to take their place.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LearningRate {
    /// The same number at each call.
    Constant(f64),
    /// A schedule of this crate.
    Schedule(Schedule),
    /// A tensor of one element, of any floating dtype and on any device, read at each call; on an accelerator the read
    /// waits for the device. A clone refers to the same memory.
    Tensor(Tensor),
    /// A schedule of the caller's.
    Custom(Arc<dyn LearningRateSchedule>),
}

impl LearningRate {
    /// The learning rate of the call that `step` calls came before.
    ///
    /// # Errors
    ///
    /// The value is not finite or is negative, or the tensor is not a single floating-point number or cannot be read.
    /// Where the settings of a schedule are the cause, the error names them, as [`validate`](Self::validate) does.
    pub fn at(&self, step: u64) -> Result<f64> {
        let value = match self {
            Self::Constant(value) => *value,
            Self::Schedule(schedule) => schedule.learning_rate(step),
            Self::Tensor(tensor) => scalar(tensor)?,
            Self::Custom(schedule) => schedule.learning_rate(step),
        };
        if !check::is_not_negative(value) {
            self.validate_settings()?;
        }
        check::not_negative("lr", value)?;
        Ok(value)
    }

    /// Checks what can be checked before the first call: a number or a tensor now, a schedule's settings.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for the field `lr`, or for a setting of the
    /// schedule, such as `lr.decay_steps` or, in a [`Join`](crate::Join), `lr.schedules[1].decay_steps`; an error of
    /// candle if the tensor cannot be read.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Constant(_) | Self::Tensor(_) => self.at(0).map(drop),
            Self::Schedule(_) | Self::Custom(_) => self.validate_settings(),
        }
    }

    /// Whether the value comes from outside of the optimizer, through a `Tensor` or a `Custom` schedule, and therefore
    /// is not in a file.
    ///
    /// ```
    /// use candle_adamax::LearningRate;
    ///
    /// let saved: LearningRate = serde_json::from_str(r#"{"class_name": "Custom", "config": null}"#)?;
    /// assert!(saved.is_external()); // so keep the learning rate that the optimizer has
    /// assert!(saved.validate().is_err()); // and do not train with this one
    ///
    /// let saved: LearningRate = serde_json::from_str("0.001")?;
    /// assert!(!saved.is_external());
    /// # Ok::<(), serde_json::Error>(())
    /// ```
    pub fn is_external(&self) -> bool {
        match self {
            Self::Constant(_) | Self::Schedule(_) => false,
            Self::Tensor(_) | Self::Custom(_) => true,
        }
    }

    /// Checks the settings of a schedule; a number and a tensor have none.
    fn validate_settings(&self) -> Result<()> {
        let settings = match self {
            Self::Constant(_) | Self::Tensor(_) => Ok(()),
            Self::Schedule(schedule) => schedule.validate(),
            Self::Custom(schedule) => schedule.validate(),
        };
        settings.map_err(|error| error.within("lr"))
    }
}

/// The number in a tensor of one element.
fn scalar(tensor: &Tensor) -> Result<f64> {
    let dims = tensor.dims();
    check::require(tensor.elem_count() == 1, "lr", "a tensor of one element", format_args!("one of shape {dims:?}"))?;
    let dtype = tensor.dtype();
    check::require(dtype.is_float(), "lr", "a tensor of a floating dtype", format_args!("one of {}", dtype.as_str()))?;
    let value = tensor.detach().flatten_all()?.get(0)?;
    Ok(match dtype {
        DType::F64 => value.to_scalar()?,
        // All the others fit into an f32, which every device has. (In candle 0.11.1, F8E4M3 to f64 never returns.)
        _ => value.to_dtype(DType::F32)?.to_scalar::<f32>()?.into(),
    })
}

impl From<f64> for LearningRate {
    fn from(value: f64) -> Self {
        Self::Constant(value)
    }
}

impl From<Schedule> for LearningRate {
    fn from(schedule: Schedule) -> Self {
        Self::Schedule(schedule)
    }
}

impl From<Tensor> for LearningRate {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl From<&Tensor> for LearningRate {
    fn from(tensor: &Tensor) -> Self {
        Self::Tensor(tensor.clone())
    }
}

impl From<&Var> for LearningRate {
    fn from(var: &Var) -> Self {
        var.as_tensor().into()
    }
}

impl From<Arc<dyn LearningRateSchedule>> for LearningRate {
    fn from(schedule: Arc<dyn LearningRateSchedule>) -> Self {
        Self::Custom(schedule)
    }
}

impl fmt::Display for LearningRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(value) => value.fmt(f),
            Self::Schedule(schedule) => schedule.fmt(f),
            // Not its number: to show something must not wait for a device.
            Self::Tensor(_) => f.write_str(TENSOR),
            Self::Custom(schedule) => write!(f, "{CUSTOM}({schedule:?})"),
        }
    }
}

impl Serialize for LearningRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // By `at`, since JSON has no NaN and no infinity: they would become null, and the file could not be read.
            Self::Constant(_) => self.at(0).map_err(S::Error::custom)?.serialize(serializer),
            Self::Schedule(schedule) => schedule.serialize(serializer),
            Self::Tensor(_) => {
                Object { class_name: TENSOR, config: self.at(0).map_err(S::Error::custom)? }.serialize(serializer)
            }
            Self::Custom(_) => Object { class_name: CUSTOM, config: () }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for LearningRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = Value::deserialize(deserializer)?;
        if let Some(value) = form.as_f64() {
            return Ok(Self::Constant(value));
        }
        match form.get("class_name").and_then(Value::as_str) {
            Some(TENSOR) => {
                let value = form.get("config").and_then(Value::as_f64);
                let value = value.ok_or_else(|| D::Error::custom("expected a number as the config of a Tensor"))?;
                Ok(Self::Tensor(Tensor::new(value, &Device::Cpu).map_err(D::Error::custom)?))
            }
            Some(CUSTOM) => Ok(Self::Custom(Arc::new(Absent))),
            Some(_) => Schedule::deserialize(form).map(Self::Schedule).map_err(D::Error::custom),
            None => {
                // What TOML and YAML have as NaN or as infinity is null in a value of JSON.
                let got = if form.is_null() { "null, NaN or infinity".to_owned() } else { form.to_string() };
                Err(D::Error::custom(format!(
                    "expected a number or an object with a `class_name` as the learning rate, got {got}"
                )))
            }
        }
    }
}

/// What a file holds in place of a custom schedule.
#[derive(Debug)]
struct Absent;

impl LearningRateSchedule for Absent {
    fn learning_rate(&self, _: u64) -> f64 {
        f64::NAN
    }

    fn validate(&self) -> Result<()> {
        Err(Error::invalid(
            "config",
            "the custom schedule itself, which a file cannot hold: set `lr` to it again",
            "null",
        ))
    }
}
