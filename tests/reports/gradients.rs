//! Gradients that are missing, zero, or of nothing.

use candle_adamax::{
    Adamax, Clip, GradScaler, LossScale, MissingGradients, NormType, ParamsAdamax, StepCount, WeightDecay,
};
use candle_core::{DType, Tensor};
use candle_nn::VarMap;

use crate::common::{DTYPES, tensor, values, var};

// KellerJordan/Muon#54
#[test]
fn a_variable_without_a_gradient_does_not_decay() {
    for (steps, decay) in
        [(1, WeightDecay::Decoupled(0.1)), (1, WeightDecay::L2(0.1)), (2, WeightDecay::Decoupled(0.1))]
    {
        let (used, unused) = (var(&[1.0, 2.0], &[2], DType::F32), var(&[3.0], &[1], DType::F32));
        let params = ParamsAdamax { weight_decay: decay, gradient_accumulation_steps: steps, ..Default::default() };
        let vars = [("used", used.clone()), ("unused", unused.clone())];
        let mut optimizer = Adamax::from_named(vars, params).unwrap();
        for _ in 0..6 {
            optimizer.backward_step(&used.sqr().unwrap().sum_all().unwrap()).unwrap();
        }
        assert_eq!(values(&unused), [3.0]);
        assert_ne!(values(&used), [1.0, 2.0]);
    }
}

// pytorch/torchrec#3809, pytorch/torchrec#3891, NVIDIA/Megatron-LM#5529
#[test]
fn the_norm_of_an_empty_variable_is_zero_in_every_norm() {
    for norm_type in [NormType::L1, NormType::L2, NormType::Inf] {
        let (w, empty) = (var(&[3.0, 4.0], &[2], DType::F32), var(&[], &[0, 3], DType::F32));
        let params = ParamsAdamax { clip: Some(Clip::GradNorm { max_norm: 1.0, norm_type }), ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone()), ("empty", empty.clone())], params).unwrap();
        optimizer.apply_gradients([(&empty, &tensor(&[], &[0, 3], DType::F32))]).unwrap();
        assert_eq!(optimizer.report().total_norm(), Some(0.0));
        let gradient = tensor(&[3.0, 4.0], &[2], DType::F32);
        optimizer.apply_gradients([(&w, &gradient), (&empty, &tensor(&[], &[0, 3], DType::F32))]).unwrap();
        let expected = match norm_type {
            NormType::L1 => 7.0,
            NormType::L2 => 5.0,
            NormType::Inf => 4.0,
            _ => unreachable!("no other one is made here"),
        };
        assert_eq!(optimizer.report().total_norm(), Some(expected));
        assert!(values(&w).iter().all(|w| w.is_finite()));
    }
}

// nerfstudio-project/nerfstudio#1919, huggingface/blog#143
#[test]
fn a_loss_scale_survives_a_call_without_any_gradient() {
    for missing_gradients in [MissingGradients::Half, MissingGradients::Allow] {
        let (w, other) = (var(&[1.0], &[1], DType::F16), var(&[1.0], &[1], DType::F16));
        let loss_scale = LossScale::Dynamic(GradScaler { growth_interval: 2, ..Default::default() });
        let params = ParamsAdamax { loss_scale, missing_gradients, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        for _ in 0..4 {
            let result = optimizer.backward_step(&other.to_dtype(DType::F32).unwrap().sum_all().unwrap());
            assert_eq!(result.is_ok(), missing_gradients == MissingGradients::Allow);
            assert_eq!((optimizer.loss_scale(), optimizer.updates(), optimizer.calls()), (65536.0, 0, 0));
            assert!(!optimizer.report().updated());
        }
        // The first call with a gradient is the first one: a step of Adamax is then the learning rate.
        optimizer.backward_step(&(w.to_dtype(DType::F32).unwrap() * 0.5).unwrap().sum_all().unwrap()).unwrap();
        assert!((values(&w)[0] - 0.999).abs() < 1e-3, "{:?}", values(&w));
        assert_eq!((optimizer.updates(), optimizer.calls()), (1, 1));
    }
}

// eriklindernoren/Keras-GAN#128
#[test]
fn one_optimizer_of_two_models_counts_as_it_is_told() {
    let first_step_of_the_second = |step_count| {
        let (a, b) = (var(&[1.0], &[1], DType::F64), var(&[1.0], &[1], DType::F64));
        let params = ParamsAdamax { lr: 0.1.into(), step_count, ..Default::default() };
        let mut optimizer = Adamax::from_named([("a", a.clone()), ("b", b.clone())], params).unwrap();
        optimizer.backward_step(&a.sum_all().unwrap()).unwrap();
        optimizer.backward_step(&b.sum_all().unwrap()).unwrap();
        1.0 - values(&b)[0]
    };
    assert!((first_step_of_the_second(StepCount::PerVar) - 0.1).abs() < 1e-6);
    // t is 2, so the bias correction is (1 - 0.9) / (1 - 0.9^2) of the learning rate, as in Keras.
    assert!((first_step_of_the_second(StepCount::Shared) - 0.1 * 0.1 / 0.19).abs() < 1e-6);
}

// tensorflow/tensorflow#26256
#[test]
fn zero_gradients_never_make_nan() {
    for dtype in DTYPES {
        for eps in [0.0, 1e-7] {
            let w = var(&[1.0, -2.0, 0.0], &[3], dtype);
            let params = ParamsAdamax { eps, ..Default::default() };
            let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
            for gradient in [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]] {
                optimizer.apply_gradients([(&w, &tensor(&gradient, &[3], dtype))]).unwrap();
            }
            let w = values(&w);
            assert_eq!((w[0], w[2]), (1.0, 0.0), "{dtype:?}");
            assert!(w[1].is_finite(), "{dtype:?}");
        }
    }
    // The smaller of two numbers: its gradient is zero where they are equal.
    let (a, b) = (var(&[0.5], &[1], DType::F32), var(&[0.5], &[1], DType::F32));
    let vars = [("a", a.clone()), ("b", b.clone())];
    let mut optimizer = Adamax::from_named(vars, ParamsAdamax { eps: 0.0, ..Default::default() }).unwrap();
    for _ in 0..3 {
        optimizer.backward_step(&a.minimum(b.as_tensor()).unwrap().sum_all().unwrap()).unwrap();
    }
    assert!(values(&a)[0].is_finite() && values(&b)[0].is_finite());
}

// tracel-ai/burn#5014, huggingface/candle#1509
#[test]
fn a_step_that_would_do_nothing_is_an_error() {
    let (mine, other) = (var(&[1.0], &[1], DType::F32), var(&[1.0], &[1], DType::F32));
    let mut optimizer = Adamax::from_named([("mine", mine.clone())], ParamsAdamax::default()).unwrap();
    let error = optimizer.backward_step(&other.sum_all().unwrap()).unwrap_err().to_string();
    assert!(error.contains("gradient"), "{error}");
    // Weights that are computed from a variable that the optimizer does not have.
    let copy = Tensor::from_vec(vec![1f32], 1, mine.device()).unwrap();
    assert!(optimizer.backward_step(&copy.sum_all().unwrap()).is_err());
    assert_eq!(values(&mine), [1.0]);
    // And of an empty `VarMap`, the error says so.
    let mut optimizer = Adamax::from_varmap(&VarMap::new(), ParamsAdamax::default()).unwrap();
    let error = optimizer.backward_step(&other.sum_all().unwrap()).unwrap_err().to_string();
    assert!(!error.contains("none of the 0 vars"), "{error}");
}
