//! The types of elements, and how rows of them are read and written.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::real::Real;

/// A type of elements.
pub(crate) trait Element: WithDType {
    /// The type in which its numbers are computed.
    type Wide: Real;

    /// The numbers of `row`, which need `room` where they are of another type.
    fn widen<'a>(row: &'a [Self], room: &'a mut Vec<Self::Wide>) -> &'a [Self::Wide];

    /// Lets `fill` write all numbers of `row`, each of which is rounded once. `fill` finds any numbers there.
    fn narrow<R>(row: &mut [Self], room: &mut Vec<Self::Wide>, fill: impl FnOnce(&mut [Self::Wide]) -> R) -> R;

    /// The elements as numbers.
    fn into_wide(elements: Vec<Self>) -> Vec<Self::Wide>;

    /// The numbers as elements.
    fn of_wide(numbers: Vec<Self::Wide>) -> Vec<Self>;
}

macro_rules! wide {
    ($t:ty) => {
        impl Element for $t {
            type Wide = $t;

            #[inline(always)]
            fn widen<'a>(row: &'a [$t], _: &'a mut Vec<$t>) -> &'a [$t] {
                row
            }

            #[inline(always)]
            fn narrow<R>(row: &mut [$t], _: &mut Vec<$t>, fill: impl FnOnce(&mut [$t]) -> R) -> R {
                fill(row)
            }

            fn into_wide(elements: Vec<$t>) -> Vec<$t> {
                elements
            }

            fn of_wide(numbers: Vec<$t>) -> Vec<$t> {
                numbers
            }
        }
    };
}

macro_rules! narrow {
    ($t:ty) => {
        impl Element for $t {
            type Wide = f32;

            #[inline(always)]
            fn widen<'a>(row: &'a [$t], room: &'a mut Vec<f32>) -> &'a [f32] {
                room.resize(row.len(), 0.0);
                row.convert_to_f32_slice(room);
                room
            }

            #[inline(always)]
            fn narrow<R>(row: &mut [$t], room: &mut Vec<f32>, fill: impl FnOnce(&mut [f32]) -> R) -> R {
                room.resize(row.len(), 0.0);
                let result = fill(room);
                row.convert_from_f32_slice(room);
                result
            }

            fn into_wide(elements: Vec<$t>) -> Vec<f32> {
                elements.to_f32_vec()
            }

            fn of_wide(numbers: Vec<f32>) -> Vec<$t> {
                let mut elements = vec![<$t>::ZERO; numbers.len()];
                elements.convert_from_f32_slice(&numbers);
                elements
            }
        }
    };
}

wide!(f32);
wide!(f64);
narrow!(f16);
narrow!(bf16);
