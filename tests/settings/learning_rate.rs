//! What an optimizer takes as its learning rate: settings that are refused, tensors, custom schedules, JSON and text.

use std::sync::Arc;

use candle_adamax::{
    Adamax, CosineDecay, CosineDecayRestarts, Error, ErrorKind, ExponentialDecay, InverseTimeDecay, Join, LearningRate,
    LearningRateSchedule, LinearWarmup, ParamGroup, ParamsAdamax, PiecewiseConstantDecay, PolynomialDecay,
    ReduceLrOnPlateau, Schedule,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use serde_json::{Value, json};

use crate::common::folder::Folder;

/// A schedule with a change: shorter than a structure with `..`, where there are many of them.
fn with<S>(mut schedule: S, change: impl FnOnce(&mut S)) -> S {
    change(&mut schedule);
    schedule
}

// === Validation ===

/// The field, what is allowed and what was given, of an error in a setting.
#[track_caller]
fn invalid(error: Error) -> (String, String, String) {
    match error.kind() {
        ErrorKind::InvalidArgument { field, expected, got } => (field.clone(), expected.clone(), got.clone()),
        kind => panic!("not an invalid argument: {kind}"),
    }
}

#[track_caller]
fn assert_invalid(schedule: impl Into<Schedule>, field: &str, expected: &str, got: &str) {
    let schedule = schedule.into();
    let error = invalid(schedule.validate().unwrap_err());
    assert_eq!(error, (field.into(), expected.into(), got.into()), "{schedule}");

    // The same in a learning rate and in a join, with the way to it.
    let lr = LearningRate::from(schedule.clone());
    assert_eq!(invalid(lr.validate().unwrap_err()).0, format!("lr.{field}"));
    let joined = LearningRate::from(Join::new([CosineDecay::new(0.1, 1).into(), schedule], [5]));
    assert_eq!(invalid(joined.validate().unwrap_err()).0, format!("lr.schedules[1].{field}"));
}

#[test]
fn every_setting_is_checked() {
    const NOT_NEGATIVE: &str = "a finite number that is not negative";
    const SHARE: &str = "a number in [0, 1]";
    const STEPS: &str = "at least 1 step";
    let lr = "initial_learning_rate";

    for (bad, got) in [(-0.5, "-0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
        let exponential = ExponentialDecay::new(0.1, 10, 0.9);
        let inverse = InverseTimeDecay::new(0.1, 10, 0.9);
        let polynomial = PolynomialDecay::new(0.1, 10);
        let cosine = CosineDecay::new(0.1, 10);
        let again = CosineDecayRestarts::new(0.1, 10);
        let with_lr = |initial_learning_rate| {
            [
                with(exponential.clone(), |s| s.initial_learning_rate = initial_learning_rate).into(),
                with(inverse.clone(), |s| s.initial_learning_rate = initial_learning_rate).into(),
                with(polynomial.clone(), |s| s.initial_learning_rate = initial_learning_rate).into(),
                with(cosine.clone(), |s| s.initial_learning_rate = initial_learning_rate).into(),
                with(again.clone(), |s| s.initial_learning_rate = initial_learning_rate).into(),
                Schedule::from(LinearWarmup::new(initial_learning_rate, 0.1, 10)),
            ]
        };
        for schedule in with_lr(bad) {
            assert_invalid(schedule, lr, NOT_NEGATIVE, got);
        }
        for schedule in with_lr(0.0) {
            schedule.validate().unwrap();
        }
        assert_invalid(with(exponential, |s| s.decay_rate = bad), "decay_rate", NOT_NEGATIVE, got);
        assert_invalid(with(inverse, |s| s.decay_rate = bad), "decay_rate", NOT_NEGATIVE, got);
        assert_invalid(with(polynomial.clone(), |s| s.end_learning_rate = bad), "end_learning_rate", NOT_NEGATIVE, got);
        assert_invalid(with(polynomial, |s| s.power = bad), "power", NOT_NEGATIVE, got);
        assert_invalid(with(cosine.clone(), |s| s.alpha = bad), "alpha", SHARE, got);
        assert_invalid(with(cosine, |s| s.warmup_target = Some(bad)), "warmup_target", NOT_NEGATIVE, got);
        assert_invalid(with(again.clone(), |s| s.m_mul = bad), "m_mul", NOT_NEGATIVE, got);
        assert_invalid(with(again.clone(), |s| s.alpha = bad), "alpha", SHARE, got);
        assert_invalid(with(again, |s| s.t_mul = bad), "t_mul", "a finite number of at least 1", got);
        assert_invalid(LinearWarmup::new(0.1, bad, 10), "target_learning_rate", NOT_NEGATIVE, got);
        assert_invalid(PiecewiseConstantDecay::new([1.0], [0.1, bad]), "values[1]", NOT_NEGATIVE, got);
        assert_invalid(PiecewiseConstantDecay::new([bad], [0.1, 0.1]), "boundaries[0]", NOT_NEGATIVE, got);
    }

    assert_invalid(ExponentialDecay::new(0.1, 0, 0.9), "decay_steps", STEPS, "0");
    assert_invalid(InverseTimeDecay::new(0.1, 0, 0.9), "decay_steps", STEPS, "0");
    assert_invalid(PolynomialDecay::new(0.1, 0), "decay_steps", STEPS, "0");
    assert_invalid(CosineDecay::new(0.1, 0), "decay_steps", STEPS, "0");
    assert_invalid(CosineDecayRestarts::new(0.1, 0), "first_decay_steps", STEPS, "0");

    assert_invalid(with(CosineDecay::new(0.1, 10), |s| s.alpha = 1.5), "alpha", SHARE, "1.5");
    assert_invalid(
        with(CosineDecayRestarts::new(0.1, 10), |s| s.t_mul = 0.5),
        "t_mul",
        "a finite number of at least 1",
        "0.5",
    );
    assert_invalid(
        with(CosineDecayRestarts::new(0.1, 10), |s| s.t_mul = 0.0),
        "t_mul",
        "a finite number of at least 1",
        "0",
    );
    assert_invalid(
        with(CosineDecay::new(0.1, 10), |s| s.warmup_steps = 7),
        "warmup_target",
        "a learning rate for the 7 warmup_steps to end at",
        "none",
    );
}

#[test]
fn every_list_is_checked() {
    let piecewise = |boundaries: &[f64], values: &[f64]| PiecewiseConstantDecay::new(boundaries, values);
    assert_invalid(piecewise(&[], &[]), "values", "at least one value", "none");
    assert_invalid(piecewise(&[1.0], &[0.1]), "boundaries", "0 boundaries, one less than there are values", "1");
    assert_invalid(piecewise(&[], &[0.1, 0.2]), "boundaries", "1 boundaries, one less than there are values", "0");
    assert_invalid(
        piecewise(&[1.0, 5.0, 5.0], &[0.4, 0.3, 0.2, 0.1]),
        "boundaries[2]",
        "a number above boundaries[1], which is 5",
        "5",
    );
    piecewise(&[0.0], &[0.1, 0.2]).validate().unwrap();

    let line = || Schedule::from(LinearWarmup::new(0.0, 0.1, 10));
    assert_invalid(Join::new([], []), "schedules", "at least one schedule", "none");
    assert_invalid(Join::new([line()], [3]), "boundaries", "0 boundaries, one less than there are schedules", "1");
    assert_invalid(
        Join::new([line(), line(), line()], [5, 3]),
        "boundaries[1]",
        "a number above boundaries[0], which is 5",
        "3",
    );
    assert_invalid(
        Join::new([CosineDecay::new(0.1, 0).into()], []),
        "schedules[0].decay_steps",
        "at least 1 step",
        "0",
    );
    Join::new([line()], []).validate().unwrap();
}

// === The learning rate ===

#[test]
fn learning_rate_refuses_bad_values() {
    for (bad, got) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        for lr in [LearningRate::from(bad), Tensor::new(bad, &Device::Cpu).unwrap().into()] {
            let expected = ("lr".into(), "a finite number that is not negative".into(), got.into());
            assert_eq!(invalid(lr.at(3).unwrap_err()), expected);
            assert_eq!(invalid(lr.validate().unwrap_err()), expected);
            assert!(serde_json::to_string(&lr).is_err());
        }
    }
    assert_eq!(LearningRate::from(0.0).at(0).unwrap(), 0.0);

    // What grows stays finite.
    let growing = LearningRate::from(ExponentialDecay::new(4.0, 1, 2.0));
    growing.validate().unwrap();
    assert_eq!(growing.at(1 << 20).unwrap(), f64::MAX);
    // Never validated: the error names the cause.
    let error = LearningRate::from(CosineDecay::new(0.1, 0)).at(0).unwrap_err();
    assert_eq!(error.to_string(), "invalid `lr.decay_steps`: expected at least 1 step, got 0");
}

#[test]
fn tensor_is_read_at_each_call() {
    let var = Var::new(&[[0.5_f32]], &Device::Cpu).unwrap();
    let by_var = LearningRate::from(&var);
    let by_tensor = LearningRate::from(var.as_tensor());
    let clone = by_tensor.clone();
    for value in [0.25_f32, 0.1, 0.0] {
        var.set(&Tensor::new(&[[value]], &Device::Cpu).unwrap()).unwrap();
        for lr in [&by_var, &by_tensor, &clone] {
            assert!(lr.is_external());
            assert_eq!(lr.at(0).unwrap(), f64::from(value));
        }
    }
    var.set(&Tensor::new(&[[-1_f32]], &Device::Cpu).unwrap()).unwrap();
    assert!(by_var.at(0).is_err() && by_var.validate().is_err());
}

#[test]
fn tensor_of_any_floating_dtype_and_view() {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64, DType::F8E4M3] {
        let tensor = Tensor::new(&[0.0, 0.125, 8.0], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let lr = LearningRate::from(tensor.get(1).unwrap());
        lr.validate().unwrap();
        assert_eq!(lr.at(0).unwrap(), 0.125, "{dtype:?}");
        let strided = tensor.reshape((3, 1)).unwrap().t().unwrap().narrow(1, 1, 1).unwrap();
        assert_eq!(LearningRate::from(strided).at(0).unwrap(), 0.125, "{dtype:?}");
    }
}

#[test]
fn tensor_of_a_wrong_shape_or_dtype() {
    let two = LearningRate::from(Tensor::new(&[0.1, 0.2], &Device::Cpu).unwrap());
    let none = LearningRate::from(Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap());
    let whole = LearningRate::from(Tensor::new(1_u32, &Device::Cpu).unwrap());
    for (lr, message) in [
        (two, "invalid `lr`: expected a tensor of one element, got one of shape [2]"),
        (none, "invalid `lr`: expected a tensor of one element, got one of shape [0]"),
        (whole, "invalid `lr`: expected a tensor of a floating dtype, got one of u32"),
    ] {
        assert_eq!(lr.at(0).unwrap_err().to_string(), message);
        assert_eq!(lr.validate().unwrap_err().to_string(), message);
    }
}

/// A schedule of the caller's.
#[derive(Debug)]
struct Countdown {
    from: u64,
}

impl LearningRateSchedule for Countdown {
    fn learning_rate(&self, step: u64) -> f64 {
        self.from as f64 - step as f64
    }

    fn validate(&self) -> candle_adamax::Result<()> {
        if self.from > 0 {
            return Ok(());
        }
        let [field, expected, got] = ["from", "at least 1", "0"].map(str::to_owned);
        Err(ErrorKind::InvalidArgument { field, expected, got }.into())
    }
}

#[test]
fn custom_schedules() {
    let schedule: Arc<dyn LearningRateSchedule> = Arc::new(Countdown { from: 2 });
    let lr = LearningRate::from(schedule);
    lr.validate().unwrap();
    assert!(lr.is_external());
    assert_eq!([0, 1, 2].map(|step| lr.at(step).unwrap()), [2.0, 1.0, 0.0]);
    assert_eq!(invalid(lr.at(3).unwrap_err()).0, "lr");

    let refused = LearningRate::Custom(Arc::new(Countdown { from: 0 }));
    assert_eq!(invalid(refused.validate().unwrap_err()).0, "lr.from");
}

// === JSON ===

#[test]
fn schedules_are_written_as_keras_does() {
    let written = |schedule: Schedule| serde_json::to_value(schedule).unwrap();
    assert_eq!(
        written(CosineDecay::new(0.1, 100).into()),
        json!({"class_name": "CosineDecay", "config": {
            "initial_learning_rate": 0.1, "decay_steps": 100, "alpha": 0.0, "warmup_target": null, "warmup_steps": 0,
        }})
    );
    assert_eq!(
        written(Join::new([LinearWarmup::new(0.0, 0.1, 5).into()], []).into()),
        json!({"class_name": "Join", "config": {
            "schedules": [{"class_name": "LinearWarmup", "config": {
                "initial_learning_rate": 0.0, "target_learning_rate": 0.1, "warmup_steps": 5,
            }}],
            "boundaries": [],
        }})
    );
}

#[test]
fn defaults_are_those_of_keras() {
    let read = |class: &str, config: Value| -> Schedule {
        serde_json::from_value(json!({"config": config, "class_name": class})).unwrap()
    };
    let steps = json!({"initial_learning_rate": 1, "decay_steps": 10});
    let rate = json!({"initial_learning_rate": 1, "decay_steps": 10.0, "decay_rate": 0.5});
    let first = json!({"initial_learning_rate": 1, "first_decay_steps": 1e1});
    let exponential =
        ExponentialDecay { initial_learning_rate: 1.0, decay_steps: 10, decay_rate: 0.5, staircase: false };
    let inverse = InverseTimeDecay { initial_learning_rate: 1.0, decay_steps: 10, decay_rate: 0.5, staircase: false };
    let polynomial = PolynomialDecay {
        initial_learning_rate: 1.0,
        decay_steps: 10,
        end_learning_rate: 1e-4,
        power: 1.0,
        cycle: false,
    };
    let cosine =
        CosineDecay { initial_learning_rate: 1.0, decay_steps: 10, alpha: 0.0, warmup_target: None, warmup_steps: 0 };
    let again =
        CosineDecayRestarts { initial_learning_rate: 1.0, first_decay_steps: 10, t_mul: 2.0, m_mul: 1.0, alpha: 0.0 };
    assert_eq!(exponential, ExponentialDecay::new(1.0, 10, 0.5));
    assert_eq!(inverse, InverseTimeDecay::new(1.0, 10, 0.5));
    assert_eq!(polynomial, PolynomialDecay::new(1.0, 10));
    assert_eq!(cosine, CosineDecay::new(1.0, 10));
    assert_eq!(again, CosineDecayRestarts::new(1.0, 10));
    assert_eq!(read("ExponentialDecay", rate.clone()), exponential.into());
    assert_eq!(read("InverseTimeDecay", rate), inverse.into());
    assert_eq!(read("PolynomialDecay", steps.clone()), polynomial.into());
    assert_eq!(read("CosineDecay", steps), cosine.into());
    assert_eq!(read("CosineDecayRestarts", first), again.into());
}

#[test]
fn wrong_json_is_refused_with_the_reason() {
    let cosine = |config: &str| format!(r#"{{"class_name": "CosineDecay", "config": {{{config}}}}}"#);
    for (text, reason) in [
        (cosine(r#""initial_learning_rate": 1"#), "missing field `decay_steps`"),
        (cosine(r#""initial_learning_rate": 1, "decay_steps": 1, "decay": 1"#), "unknown field `decay`"),
        (cosine(r#""initial_learning_rate": 1, "decay_steps": -1"#), "a whole number of steps, got -1"),
        (cosine(r#""initial_learning_rate": 1, "decay_steps": 2.5"#), "a whole number of steps, got 2.5"),
        (cosine(r#""initial_learning_rate": 1, "decay_steps": 1e300"#), "a whole number of steps, got 1e+300"),
        (cosine(r#""initial_learning_rate": null, "decay_steps": 1"#), "invalid type: null"),
        (r#"{"class_name": "StepDecay", "config": {}}"#.into(), "unknown variant `StepDecay`"),
        (r#"{"class_name": "CosineDecay"}"#.into(), "missing field `config`"),
        (r#"{"class_name": "Tensor", "config": null}"#.into(), "expected a number as the config of a Tensor"),
        (r#"{"config": 1}"#.into(), "expected a number or an object with a `class_name`"),
        (r#""0.1""#.into(), "expected a number or an object with a `class_name`"),
        (
            "null".into(),
            "expected a number or an object with a `class_name` as the learning rate, got null, NaN or infinity",
        ),
    ] {
        let error = serde_json::from_str::<LearningRate>(&text).unwrap_err().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

#[test]
fn live_learning_rates_say_so_in_a_file() {
    let tensor = LearningRate::from(Tensor::new(0.1_f64, &Device::Cpu).unwrap());
    let text = serde_json::to_string(&tensor).unwrap();
    assert_eq!(text, r#"{"class_name":"Tensor","config":0.1}"#);
    let read: LearningRate = serde_json::from_str(&text).unwrap();
    assert!(read.is_external());
    assert_eq!(read.at(0).unwrap(), 0.1);
    assert_eq!(serde_json::to_string(&read).unwrap(), text);

    let custom = LearningRate::Custom(Arc::new(Countdown { from: 2 }));
    let text = serde_json::to_string(&custom).unwrap();
    assert_eq!(text, r#"{"class_name":"Custom","config":null}"#);
    let read: LearningRate = serde_json::from_str(&text).unwrap();
    assert!(read.is_external());
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
    for error in [read.at(0).unwrap_err(), read.validate().unwrap_err()] {
        assert_eq!(
            error.to_string(),
            "invalid `lr.config`: expected the custom schedule itself, which a file cannot hold: set `lr` to it \
             again, got null"
        );
    }

    for lr in [LearningRate::from(0.1), CosineDecay::new(0.1, 10).into()] {
        assert!(!lr.is_external());
    }
}

// === Text and traits ===

#[test]
fn display_is_short() {
    let alpha = 0.1;
    for (lr, text) in [
        (LearningRate::from(0.001), "0.001"),
        (Tensor::new(0.1, &Device::Cpu).unwrap().into(), "Tensor"),
        (LearningRate::Custom(Arc::new(Countdown { from: 2 })), "Custom(Countdown { from: 2 })"),
        (ExponentialDecay::new(0.1, 10, 0.9).into(), "ExponentialDecay(0.1, times 0.9 every 10 steps)"),
        (
            with(InverseTimeDecay::new(0.1, 10, 0.9), |s| s.staircase = true).into(),
            "InverseTimeDecay(0.1, rate 0.9 every 10 steps, staircase)",
        ),
        (
            with(PolynomialDecay::new(0.1, 10), |s| {
                s.power = 2.0;
                s.cycle = true;
            })
            .into(),
            "PolynomialDecay(0.1 to 0.0001, 10 steps, power 2, cycle)",
        ),
        (with(CosineDecay::new(0.001, 1000), |s| s.alpha = alpha).into(), "CosineDecay(0.001, 1000 steps, alpha 0.1)"),
        (
            with(CosineDecay::new(0.0, 10), |s| {
                s.warmup_target = Some(0.1);
                s.warmup_steps = 5;
            })
            .into(),
            "CosineDecay(0, 10 steps, warmup to 0.1 in 5 steps)",
        ),
        (CosineDecayRestarts::new(0.1, 10).into(), "CosineDecayRestarts(0.1, 10 steps, t_mul 2)"),
        (
            with(CosineDecayRestarts::new(1.0, 10), |s| {
                s.t_mul = 1.0;
                s.m_mul = 0.5;
                s.alpha = alpha;
            })
            .into(),
            "CosineDecayRestarts(1, 10 steps, t_mul 1, m_mul 0.5, alpha 0.1)",
        ),
        (
            PiecewiseConstantDecay::new([5.0, 20.0], [1.0, 0.5, 0.1]).into(),
            "PiecewiseConstantDecay(1 to step 5, 0.5 to step 20, 0.1)",
        ),
        (
            Join::new([LinearWarmup::new(0.0, 0.1, 10).into(), CosineDecay::new(0.1, 50).into()], [10]).into(),
            "Join(LinearWarmup(0 to 0.1, 10 steps), from step 10 CosineDecay(0.1, 50 steps))",
        ),
    ] {
        assert_eq!(lr.to_string(), text);
    }
}

#[test]
fn may_be_shared_between_threads() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<LearningRate>();
    shared::<Schedule>();
}

// === A second stage ===

#[test]
fn a_second_stage_begins_with_the_next_call() {
    let make = |lr: LearningRate| {
        let w = Var::new(&[1f32], &Device::Cpu).unwrap();
        let head = Var::new(&[1f32], &Device::Cpu).unwrap();
        let plateau = ReduceLrOnPlateau { patience: 0, factor: 0.5, ..Default::default() };
        let params = ParamsAdamax { lr, plateau: Some(plateau), ..Default::default() };
        let groups = [
            ParamGroup::new("default").var("w", &w),
            ParamGroup::new("head").var("head", &head).lr_factor(2.0),
            ParamGroup::new("own").lr(0.125),
        ];
        (Adamax::from_groups(groups, params).unwrap(), w)
    };
    let step = |optimizer: &mut Adamax, w: &Var| {
        optimizer.apply_gradients([(w, &Tensor::new(&[1f32], &Device::Cpu).unwrap())]).unwrap();
        optimizer.report().lr()
    };
    let (mut optimizer, w) = make(CosineDecay::new(0.5, 4).into());
    let first: Vec<f64> = (0..6).map(|_| step(&mut optimizer, &w)).collect();
    assert_eq!((first[0], first[2], first[4], first[5]), (0.5, 0.25, 0.0, 0.0));

    // A refused one changes nothing.
    let error = optimizer.start_schedule(CosineDecay::new(0.5, 0)).unwrap_err();
    assert_eq!(error.to_string(), "Adamax: invalid `lr.decay_steps`: expected at least 1 step, got 0");
    let error = optimizer.start_schedule(f64::NAN).unwrap_err();
    assert!(error.to_string().starts_with("Adamax: invalid `lr.learning_rate`: expected"), "{error}");
    assert_eq!(optimizer.learning_rate(), 0.0);

    optimizer.observe_metric(1.0).unwrap();
    optimizer.start_schedule(LinearWarmup::new(0.0, 1.0, 4)).unwrap();
    let rates = |optimizer: &Adamax| ["default", "head", "own"].map(|g| optimizer.group_learning_rate(g).unwrap());
    assert_eq!(rates(&optimizer), [0.0, 0.0, 0.125]);
    assert_eq!([(); 2].map(|()| step(&mut optimizer, &w)), [0.0, 0.25]);
    assert_eq!(rates(&optimizer), [0.5, 1.0, 0.125]);

    // It is in checkpoints.
    let folder = Folder::new();
    let file = folder.file("state");
    optimizer.save(&file).unwrap();
    let (mut resumed, w) = make(1.0.into());
    resumed.load(&file).unwrap();
    assert_eq!([(); 4].map(|()| step(&mut resumed, &w)), [0.5, 0.75, 1.0, 1.0]);

    // A third one; a number is a schedule, too. What a metric has lowered is forgotten.
    resumed.observe_metric(1.0).unwrap();
    assert_eq!(resumed.learning_rate(), 0.5);
    resumed.start_schedule(0.75).unwrap();
    assert_eq!(resumed.learning_rate(), 0.75);
    assert_eq!(step(&mut resumed, &w), 0.75);
}
