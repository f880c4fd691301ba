//! Fewer bits.

use candle_adamax::{Adamax, ParamsAdamax, Rounding};
use candle_core::DType;

use crate::common::{noise, tensor, values, var};

// NVIDIA/apex#1842
#[test]
fn bf16_weights_and_16_more_bits_are_the_f32_weights_also_at_ties() {
    const N: usize = 200_000;
    let start: Vec<f64> = tensor(&noise(1, N), &[N], DType::BF16).to_dtype(DType::F64).unwrap().to_vec1().unwrap();
    let (full, half) = (var(&start, &[N], DType::F32), var(&start, &[N], DType::BF16));
    let mut of_full = Adamax::from_named([("w", full.clone())], ParamsAdamax::default()).unwrap();
    let params = ParamsAdamax { rounding: Rounding::Master, ..Default::default() };
    let mut of_half = Adamax::from_named([("w", half.clone())], params).unwrap();
    for step in 0..20 {
        let gradient = tensor(&noise(100 + step, N), &[N], DType::F32);
        of_full.apply_gradients([(&full, &gradient)]).unwrap();
        of_half.apply_gradients([(&half, &gradient)]).unwrap();
    }
    // The nearest bf16 of each f32 weight; ties are rounded up.
    for (full, half) in values(&full).into_iter().zip(values(&half)) {
        let expected = f32::from_bits((full as f32).to_bits().wrapping_add(0x8000) & 0xffff_0000);
        assert_eq!(half as f32, expected);
    }
}
