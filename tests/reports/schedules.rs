//! Learning rates and settings.

use candle_adamax::{Adamax, CosineDecay, ExponentialDecay, LinearWarmup, ParamsAdamax, ReduceLrOnPlateau, Schedule};
use candle_core::DType;
use candle_nn::Optimizer;

use crate::common::folder::Folder;
use crate::common::{tensor, var};

// pytorch/pytorch#47513, google-deepmind/optax#1767
#[test]
fn a_plateau_of_a_negative_metric_is_seen() {
    let plateau = Some(ReduceLrOnPlateau { patience: 2, factor: 0.1, ..Default::default() });
    let mut optimizer = Adamax::new(vec![], ParamsAdamax { lr: 1.0.into(), plateau, ..Default::default() }).unwrap();
    let reduced: Vec<bool> = (0..8).map(|_| optimizer.observe_metric(-1.0).unwrap()).collect();
    // The first one is the best; after two that are patiently waited for, the third one reduces.
    assert_eq!(reduced, [false, false, false, true, false, false, true, false]);
    assert!((optimizer.learning_rate() - 0.01).abs() < 1e-15);
    // A metric that does get better is no plateau.
    let plateau = Some(ReduceLrOnPlateau { patience: 2, factor: 0.1, ..Default::default() });
    let mut optimizer = Adamax::new(vec![], ParamsAdamax { lr: 1.0.into(), plateau, ..Default::default() }).unwrap();
    assert!((1..20).all(|k| !optimizer.observe_metric(-f64::from(k)).unwrap()));
}

// huggingface/transformers#34053, THUDM/slime#1547
#[test]
fn the_learning_rate_neither_jumps_nor_counts_twice_after_resuming() {
    let folder = Folder::new();
    let path = folder.file("state");
    let lr: Schedule = LinearWarmup::new(0.0, 1.0, 4).into();
    let schedule = candle_adamax::Join::new([lr, CosineDecay::new(1.0, 8).into()], [4u64]);
    let params = ParamsAdamax { lr: schedule.into(), ..Default::default() };
    let run = |optimizer: &mut Adamax, w: &candle_core::Var| -> f64 {
        optimizer.apply_gradients([(w, &tensor(&[1.0], &[1], DType::F32))]).unwrap();
        optimizer.report().lr()
    };
    let w = var(&[1.0], &[1], DType::F32);
    let mut unbroken = Adamax::from_named([("w", w.clone())], params.clone()).unwrap();
    let rates: Vec<f64> = (0..12).map(|_| run(&mut unbroken, &w)).collect();
    assert!(rates[..4].is_sorted() && rates[5..].is_sorted_by(|a, b| a > b), "{rates:?}");

    let w = var(&[1.0], &[1], DType::F32);
    let mut first = Adamax::from_named([("w", w.clone())], params.clone()).unwrap();
    let mut resumed: Vec<f64> = (0..5).map(|_| run(&mut first, &w)).collect();
    first.save(&path).unwrap();
    let mut second = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
    second.load(&path).unwrap();
    assert_eq!(second.learning_rate(), rates[5]);
    resumed.extend((5..12).map(|_| run(&mut second, &w)));
    assert_eq!(resumed, rates);
}

// hiyouga/LLaMA-Factory#4014, allenai/allennlp#1429
#[test]
fn a_learning_rate_in_scientific_notation_is_a_number() {
    for (text, expected) in [("2e-5", 2e-5), ("2E-5", 2e-5), ("0.00002", 2e-5), ("1", 1.0)] {
        let params: ParamsAdamax = serde_json::from_str(&format!(r#"{{"lr": {text}}}"#)).unwrap();
        assert_eq!(params.lr.at(0).unwrap(), expected);
    }
    // Text is no number, and the error says which field it is.
    let error = serde_json::from_str::<ParamsAdamax>(r#"{"beta1": "2e-5"}"#).unwrap_err().to_string();
    assert!(error.contains("2e-5"), "{error}");
    let written =
        serde_json::to_string(&ParamsAdamax { lr: ExponentialDecay::new(2e-5, 10, 0.5).into(), ..Default::default() });
    let read: ParamsAdamax = serde_json::from_str(&written.unwrap()).unwrap();
    assert_eq!(read.lr.at(10).unwrap(), 1e-5);
}

// keras-team/keras#13568
#[test]
fn a_second_stage_of_training_begins_its_schedule_anew() {
    let w = var(&[1.0], &[1], DType::F32);
    let gradient = tensor(&[1.0], &[1], DType::F32);
    let params = ParamsAdamax { lr: CosineDecay::new(1e-2, 100).into(), ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
    for _ in 0..100 {
        optimizer.apply_gradients([(&w, &gradient)]).unwrap();
    }
    assert_eq!(optimizer.learning_rate(), 0.0);
    optimizer.start_schedule(CosineDecay::new(1e-3, 50)).unwrap();
    assert_eq!(optimizer.learning_rate(), 1e-3);
    for _ in 0..25 {
        optimizer.apply_gradients([(&w, &gradient)]).unwrap();
    }
    assert!((optimizer.learning_rate() - 5e-4).abs() < 1e-12);
    for _ in 25..50 {
        optimizer.apply_gradients([(&w, &gradient)]).unwrap();
    }
    assert_eq!((optimizer.learning_rate(), optimizer.calls()), (0.0, 150));
}
