//! Learning rates that follow a metric: PyTorch's numbers, and with schedules, groups and checkpoints.

use candle_adamax::{
    Adamax, ExponentialDecay, ParamGroup, ParamsAdamax, Plateau, PlateauMode, ReduceLrOnPlateau, ThresholdMode,
};
use candle_core::DType;
use candle_nn::Optimizer;
use serde_json::Value;

use crate::common::folder::Folder;
use crate::common::{recorded, tensor, values, var};

fn number(value: &Value) -> f64 {
    match value.as_str() {
        Some("nan") => f64::NAN,
        Some(text) => text.parse().unwrap(),
        None => value.as_f64().unwrap(),
    }
}

/// PyTorch's settings, by its names.
fn settings(recorded: &Value) -> ReduceLrOnPlateau {
    let mut settings = ReduceLrOnPlateau::default();
    for (name, value) in recorded.as_object().unwrap() {
        match (name.as_str(), value.as_str()) {
            ("mode", Some("max")) => settings.mode = PlateauMode::Max,
            ("threshold_mode", Some("abs")) => settings.threshold_mode = ThresholdMode::Absolute,
            ("factor", _) => settings.factor = number(value),
            ("patience", _) => settings.patience = value.as_u64().unwrap(),
            ("threshold", _) => settings.threshold = number(value),
            ("cooldown", _) => settings.cooldown = value.as_u64().unwrap(),
            ("min_lr", _) => settings.min_lr = number(value),
            ("eps", _) => settings.eps = number(value),
            other => panic!("{other:?} is not understood"),
        }
    }
    settings
}

#[test]
fn learning_rates_are_pytorchs() {
    let path = recorded("pytorch/plateau.json");
    let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut reductions = 0;
    let cases = recorded["cases"].as_array().unwrap();
    assert!(cases.len() >= 13);
    for case in cases {
        let plateau = Some(settings(&case["settings"]));
        let params = ParamsAdamax { lr: number(&case["base_lr"]).into(), plateau, ..Default::default() };
        let mut optimizer = Adamax::new(vec![], params).unwrap();
        for (k, metric) in case["metrics"].as_array().unwrap().iter().enumerate() {
            let at = format!("{}, metric {k}", case["name"]);
            let before = optimizer.learning_rate();
            let reduced = optimizer.observe_metric(number(metric)).unwrap();
            let (lr, expected) = (optimizer.learning_rate(), number(&case["lr"][k]));
            assert!((lr - expected).abs() <= 1e-14 * expected, "{at}: {lr:e}, expected {expected:e}");
            assert_eq!(reduced, lr < before, "{at}");
            let Plateau { best, num_bad, cooldown, .. } = optimizer.snapshot().unwrap().plateau.unwrap();
            // PyTorch begins with the worst there is.
            assert_eq!(best, Some(number(&case["best"][k])).filter(|best| best.is_finite()), "{at}");
            assert_eq!(Some(num_bad), case["num_bad_epochs"][k].as_u64(), "{at}");
            assert_eq!(Some(cooldown), case["cooldown_counter"][k].as_u64(), "{at}");
            reductions += u64::from(reduced);
        }
    }
    assert!(reductions > 100, "{reductions}");
}

/// Reduces by half after each metric that is no better.
fn halving() -> ReduceLrOnPlateau {
    ReduceLrOnPlateau { factor: 0.5, patience: 0, ..Default::default() }
}

#[test]
fn goes_with_schedules_groups_and_floors() {
    let (a, b) = (var(&[0.0], &[1], DType::F64), var(&[0.0], &[1], DType::F64));
    let plateau = Some(ReduceLrOnPlateau { min_lr: 0.5, ..halving() });
    let params = ParamsAdamax {
        lr: ExponentialDecay::new(8.0, 1, 0.5).into(),
        plateau,
        beta1: 0.5,
        beta2: 0.5,
        eps: 0.0,
        ..Default::default()
    };
    let groups = [
        ParamGroup::new("default").var("a", &a),
        ParamGroup::new("own").var("b", &b).lr(0.75),
        ParamGroup::new("factor").lr_factor(0.125),
    ];
    let mut optimizer = Adamax::from_groups(groups, params).unwrap();
    let rates = |optimizer: &Adamax| ["default", "own", "factor"].map(|g| optimizer.group_learning_rate(g).unwrap());
    assert_eq!(rates(&optimizer), [8.0, 0.75, 1.0]);
    assert!(!optimizer.observe_metric(1.0).unwrap());
    assert!(optimizer.observe_metric(1.0).unwrap());
    assert_eq!(rates(&optimizer), [4.0, 0.5, 0.5]);

    let step = |optimizer: &mut Adamax| {
        let grad = tensor(&[1.0], &[1], DType::F64);
        optimizer.apply_gradients([(&a, &grad), (&b, &grad)]).unwrap();
    };
    step(&mut optimizer);
    // The first update of these settings moves by the learning rate.
    assert_eq!((values(&a), values(&b), optimizer.report().lr()), (vec![-4.0], vec![-0.5], 4.0));
    assert_eq!(rates(&optimizer), [2.0, 0.5, 0.5]);
    for _ in 0..3 {
        step(&mut optimizer);
    }
    // The schedule itself has gone below the floor: the plateau does not raise it.
    assert_eq!(rates(&optimizer), [0.5, 0.5, 0.0625]);
    step(&mut optimizer);
    assert_eq!(rates(&optimizer), [0.25, 0.5, 0.03125]);
    assert!(!optimizer.observe_metric(2.0).unwrap());
}

#[test]
fn goes_into_checkpoints_and_back() {
    let plateau = Some(ReduceLrOnPlateau { patience: 1, cooldown: 1, ..halving() });
    let params = ParamsAdamax { lr: 1.0.into(), plateau, ..Default::default() };
    let metrics = [3.0, 2.0, 2.0, 2.5, 2.5, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.0, 1.0, 1.0, f64::NAN];
    let observe = |optimizer: &mut Adamax, metrics: &[f64]| {
        let rate = |&metric: &f64| {
            optimizer.observe_metric(metric).unwrap();
            optimizer.learning_rate()
        };
        metrics.iter().map(rate).collect::<Vec<_>>()
    };
    let make = |params: ParamsAdamax| Adamax::from_named([("w", var(&[1.0], &[1], DType::F32))], params).unwrap();
    let whole = observe(&mut make(params.clone()), &metrics);
    assert!(*whole.last().unwrap() < 0.2, "{whole:?}");
    let folder = Folder::new();
    let file = folder.file("state");
    for at in 0..=metrics.len() {
        let mut first = make(params.clone());
        let mut rates = observe(&mut first, &metrics[..at]);
        first.save(&file).unwrap();
        let mut second = make(ParamsAdamax::default());
        second.load(&file).unwrap();
        assert_eq!(second.snapshot().unwrap().plateau, first.snapshot().unwrap().plateau);
        rates.extend(observe(&mut second, &metrics[at..]));
        assert_eq!(rates, whole, "saved after {at}");
    }
}

#[test]
fn a_learning_rate_that_is_set_is_the_learning_rate() {
    let params = ParamsAdamax { lr: 1.0.into(), plateau: Some(halving()), ..Default::default() };
    let mut optimizer = Adamax::new(vec![], params).unwrap();
    optimizer.observe_metric(1.0).unwrap();
    optimizer.observe_metric(1.0).unwrap();
    assert_eq!(optimizer.learning_rate(), 0.5);
    optimizer.set_learning_rate(4.0);
    assert_eq!(optimizer.learning_rate(), 4.0);
    // The best metric stays.
    optimizer.observe_metric(1.0).unwrap();
    assert_eq!(optimizer.learning_rate(), 2.0);
}

#[test]
fn settings_may_change_and_the_state_stays() {
    let params = ParamsAdamax { lr: 1.0.into(), plateau: Some(halving()), ..Default::default() };
    let mut optimizer = Adamax::new(vec![], params.clone()).unwrap();
    optimizer.observe_metric(1.0).unwrap();
    optimizer.observe_metric(1.0).unwrap();
    let slower = Some(ReduceLrOnPlateau { factor: 0.25, ..halving() });
    optimizer.set_params(ParamsAdamax { plateau: slower, ..params.clone() }).unwrap();
    optimizer.observe_metric(1.0).unwrap();
    assert_eq!(optimizer.learning_rate(), 0.125);
    optimizer.set_params(ParamsAdamax { plateau: None, ..params.clone() }).unwrap();
    assert_eq!((optimizer.learning_rate(), optimizer.snapshot().unwrap().plateau), (1.0, None));
    optimizer.set_params(params).unwrap();
    assert_eq!(optimizer.snapshot().unwrap().plateau, Some(Plateau::default()));
}

#[test]
fn no_infinite_metric_is_the_best_one() {
    for (mode, best) in [(PlateauMode::Min, f64::NEG_INFINITY), (PlateauMode::Max, f64::INFINITY)] {
        let settings = ReduceLrOnPlateau { mode, ..halving() };
        let mut plateau = Plateau::default();
        assert!(plateau.observe(&settings, best, 1.0));
        assert_eq!((plateau.best, plateau.lr_factor), (None, 0.5));
        assert!(!plateau.observe(&settings, 3.0, 1.0));
        assert!(plateau.observe(&settings, best, 1.0));
        assert_eq!((plateau.best, plateau.lr_factor), (Some(3.0), 0.25));
    }
}

/// How often these metrics reduce a learning rate of 1 by half.
fn reductions(settings: &ReduceLrOnPlateau, metrics: &[f64]) -> usize {
    let mut plateau = Plateau::default();
    metrics.iter().filter(|&&metric| plateau.observe(settings, metric, 1.0)).count()
}

#[test]
fn a_negative_metric_that_stands_still_reduces() {
    let params = ParamsAdamax {
        lr: 1.0.into(),
        plateau: Some(ReduceLrOnPlateau { patience: 2, ..Default::default() }),
        ..Default::default()
    };
    let mut optimizer = Adamax::new(vec![], params).unwrap();
    let reduced = [-1.0; 8].map(|metric| optimizer.observe_metric(metric).unwrap());
    assert_eq!(reduced, [false, false, false, true, false, false, true, false]);
}

/// A relative threshold is the same for a metric and its mirror image, and for each mode and its reverse.
#[test]
fn a_relative_threshold_is_a_share_of_the_magnitude() {
    for threshold in [0.0, 1e-4, 0.125, 1.0, 2.0] {
        let of = |mode| ReduceLrOnPlateau { mode, threshold, ..halving() };
        let (min, max) = (of(PlateauMode::Min), of(PlateauMode::Max));
        for best in [-3.0, -1e-300, 5e-324, 0.0, -0.0, 1e300, f64::MAX, -f64::MAX, 7.0] {
            let step = f64::abs(best) * threshold;
            for metric in [best, best - step, best - 1.01 * step, best + 1.01 * step, -best, 0.0, f64::NAN] {
                // No product of these rounds to the other side of a metric that is a hundredth away.
                let is_better = metric.is_finite() && metric < best - step;
                let near = (metric - (best - step)).abs() <= 1e-12 * step;
                if !near || threshold == 0.0 {
                    let expected = usize::from(!is_better);
                    assert_eq!(reductions(&min, &[best, metric]), expected, "Min {threshold} {best} {metric}");
                    assert_eq!(reductions(&max, &[-best, -metric]), expected, "Max {threshold} {best} {metric}");
                }
            }
            for infinite in [f64::INFINITY, f64::NEG_INFINITY] {
                assert_eq!((reductions(&min, &[best, infinite]), reductions(&max, &[best, infinite])), (1, 1));
            }
        }
        // PyTorch's product decides where the best metric is not negative, to the last bit.
        for best in [0.3, 1.7, 0.0] {
            let edge = best * (1.0 - threshold);
            assert_eq!((reductions(&min, &[best, edge]), reductions(&min, &[best, edge.next_down()])), (1, 0));
            let edge = best * (1.0 + threshold);
            assert_eq!((reductions(&max, &[best, edge]), reductions(&max, &[best, edge.next_up()])), (1, 0));
        }
    }
}

#[test]
fn an_invalid_learning_rate_is_an_error_that_changes_nothing() {
    let params = ParamsAdamax { plateau: Some(halving()), ..Default::default() };
    let mut optimizer = Adamax::new(vec![], params).unwrap();
    optimizer.set_learning_rate(f64::NAN);
    let before = optimizer.snapshot().unwrap().plateau;
    let error = optimizer.observe_metric(1.0).unwrap_err();
    assert_eq!(error.to_string(), "Adamax: invalid `lr`: expected a finite number that is not negative, got NaN");
    assert_eq!(optimizer.snapshot().unwrap().plateau, before);
}
