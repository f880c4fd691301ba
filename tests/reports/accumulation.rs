//! Gradients that wait for their update.

use candle_adamax::{Adamax, Clip, NormType, ParamsAdamax, StepCount, WeightDecay};
use candle_core::{DType, Tensor, Var};

use crate::common::{noise, tensor, values, var};

/// `w . x`, summed over the rows of `x`, divided by `texts`.
fn loss(w: &Var, x: &Tensor, texts: usize) -> Tensor {
    let product = x.matmul(&w.reshape((4, 1)).unwrap()).unwrap();
    (product.sqr().unwrap().sum_all().unwrap() / texts as f64).unwrap()
}

// huggingface/transformers#38837, Lightning-AI/pytorch-lightning#19987
#[test]
fn the_last_incomplete_accumulation_is_not_lost() {
    let w = var(&[1.0, -1.0], &[2], DType::F32);
    let params = ParamsAdamax { lr: 0.1.into(), gradient_accumulation_steps: 4, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    let gradient = |x: f64| tensor(&[x, x], &[2], DType::F32);
    for _ in 0..6 {
        optimizer.apply_gradients([(&w, &gradient(1.0))]).unwrap();
    }
    assert_eq!(optimizer.updates(), 1);
    // The mean is over the two calls that there were, and not over four.
    assert!(optimizer.flush_gradients().unwrap());
    assert_eq!(optimizer.updates(), 2);
    let state = optimizer.state("w").unwrap();
    let expected = 0.9 * 0.1 + 0.1;
    assert!(values(&state.exp_avg).iter().all(|m| (m - expected).abs() < 1e-7), "{state:?}");
    assert!(!optimizer.flush_gradients().unwrap());

    // Or it is dropped.
    let before = values(&w);
    optimizer.apply_gradients([(&w, &gradient(f64::NAN))]).unwrap();
    assert_eq!(optimizer.discard_gradients().unwrap(), 1);
    assert!(!optimizer.flush_gradients().unwrap());
    assert_eq!(values(&w), before);
    for _ in 0..4 {
        optimizer.apply_gradients([(&w, &gradient(1.0))]).unwrap();
    }
    assert_eq!(optimizer.updates(), 3);
    assert!(values(&w).iter().all(|w| w.is_finite()));
}

// keras-team/keras#19990
#[test]
fn accumulation_is_a_large_batch_for_decay_bias_correction_and_clipping() {
    let settings = [
        ParamsAdamax::default(),
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..Default::default() },
        ParamsAdamax { step_count: StepCount::PerVar, ..ParamsAdamax::pytorch() },
        ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), ..Default::default() },
        ParamsAdamax { clip: Some(Clip::GradNorm { max_norm: 0.5, norm_type: NormType::Inf }), ..Default::default() },
    ];
    for params in settings {
        let params = ParamsAdamax { lr: 0.01.into(), ..params };
        let weights = || var(&noise(7, 4), &[4], DType::F64);
        let (large, small) = (weights(), weights());
        let of = |w: &Var, params| Adamax::from_named([("w", w.clone())], params).unwrap();
        let mut whole = of(&large, params.clone());
        let mut parts = of(&small, ParamsAdamax { gradient_accumulation_steps: 3, ..params.clone() });
        for step in 0..10 {
            let x = tensor(&noise(step, 48), &[12, 4], DType::F64);
            whole.backward_step(&loss(&large, &x, 12)).unwrap();
            for part in 0..3 {
                let x = x.narrow(0, 4 * part, 4).unwrap();
                parts.backward_step(&loss(&small, &x, 4)).unwrap();
            }
        }
        for (a, b) in values(&large).iter().zip(values(&small)) {
            assert!((a - b).abs() < 1e-12, "{params:?}: {a} {b}");
        }
    }
}
