//! Keras's configuration JSON, read and written.

use anyhow::Result;
use candle_adamax::{
    Clip, CosineDecay, CosineDecayRestarts, Ema, ExponentialDecay, GradScaler, InverseTimeDecay, Join, LearningRate,
    LinearWarmup, LossScale, NormType, ParamsAdamax, PiecewiseConstantDecay, PolynomialDecay, Schedule, StateDType,
    StepCount, WeightDecay,
};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::run::recorded;

/// Everything but the learning rate, as JSON, which compares.
fn fields(params: &ParamsAdamax) -> Value {
    serde_json::to_value(params).unwrap()
}

fn read(config: Value) -> Result<ParamsAdamax, candle_adamax::Error> {
    ParamsAdamax::from_keras_json(&json!({"class_name": "Adamax", "config": config}).to_string())
}

#[test]
fn an_empty_config_is_the_default() -> Result<()> {
    let mut params = read(json!({}))?;
    assert_eq!(params.name, "adamax");
    params.name = "Adamax".into();
    assert_eq!(fields(&params), fields(&ParamsAdamax::default()));
    Ok(())
}

#[test]
fn what_keras_wrote_is_written_again() -> Result<()> {
    for case in ["keras_mlp", "keras_extras"] {
        let json = std::fs::read_to_string(recorded(&format!("{case}.json")))?;
        let params = ParamsAdamax::from_keras_json(&json)?;
        let written: Value = serde_json::from_str(&params.to_keras_json()?)?;
        assert_eq!(written, serde_json::from_str::<Value>(&json)?);
    }
    Ok(())
}

#[test]
fn every_setting_goes_there_and_back() -> Result<()> {
    let params = ParamsAdamax {
        name: "mine".into(),
        lr: 0.1.into(),
        beta1: 0.5,
        beta2: 0.75,
        eps: 1e-3,
        weight_decay: WeightDecay::Decoupled(0.125),
        clip: Some(Clip::Value(3.0)),
        loss_scale: LossScale::Static(128.0),
        ema: Some(Ema { momentum: 0.9, overwrite_frequency: Some(5) }),
        gradient_accumulation_steps: 4,
        ..Default::default()
    };
    for params in [
        params.clone(),
        ParamsAdamax { clip: Some(Clip::Norm(2.0)), ..params.clone() },
        ParamsAdamax { clip: Some(Clip::GlobalNorm(2.0)), ema: None, ..params },
    ] {
        assert_eq!(fields(&ParamsAdamax::from_keras_json(&params.to_keras_json()?)?), fields(&params));
    }
    // What is the crate's own is left out.
    let own = ParamsAdamax { state_dtype: StateDType::Q8, seed: 7, measure_norm: true, ..Default::default() };
    assert_eq!(own.to_keras_json()?, ParamsAdamax::default().to_keras_json()?);
    Ok(())
}

#[test]
fn every_schedule_of_keras_goes_there_and_back() -> Result<()> {
    let schedules: [Schedule; 7] = [
        ExponentialDecay { staircase: true, ..ExponentialDecay::new(0.5, 10, 0.9) }.into(),
        PiecewiseConstantDecay::new([10.0, 20.0], [0.5, 0.25, 0.125]).into(),
        PolynomialDecay { cycle: true, power: 2.0, ..PolynomialDecay::new(0.5, 10) }.into(),
        InverseTimeDecay::new(0.5, 10, 0.5).into(),
        CosineDecay { alpha: 0.1, ..CosineDecay::new(0.5, 10) }.into(),
        CosineDecay { warmup_target: Some(0.5), warmup_steps: 3, ..CosineDecay::new(0.0, 10) }.into(),
        CosineDecayRestarts { m_mul: 0.5, ..CosineDecayRestarts::new(0.5, 10) }.into(),
    ];
    let mut all = Vec::new();
    for schedule in schedules {
        let params = ParamsAdamax { lr: schedule.clone().into(), ..Default::default() };
        let json = params.to_keras_json()?;
        let LearningRate::Schedule(back) = ParamsAdamax::from_keras_json(&json)?.lr else { panic!("{json}") };
        assert_eq!(back, schedule);
        all.push(json);
    }
    // For `exchange.py check`, which lets Keras read them and compares rates.
    let rates = all.iter().map(|json| {
        let lr = ParamsAdamax::from_keras_json(json)?.lr;
        let rates = (0..60).map(|step| lr.at(step)).collect::<candle_adamax::Result<Vec<_>>>()?;
        Ok(json!({"optimizer": serde_json::from_str::<Value>(json)?, "rates": rates}))
    });
    let rates = rates.collect::<Result<Vec<_>>>()?;
    std::fs::write(crate::run::left("keras_schedules.json")?, Value::from(rates).to_string())?;
    Ok(())
}

#[test]
fn keys_of_older_optimizers_are_known() -> Result<()> {
    // TensorFlow 2.11 and later.
    let params = read(json!({
        "name": "Adamax", "weight_decay": null, "clipnorm": null, "global_clipnorm": null, "clipvalue": null,
        "use_ema": false, "ema_momentum": 0.99, "ema_overwrite_frequency": null, "jit_compile": true,
        "is_legacy_optimizer": false, "learning_rate": 0.5, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07
    }))?;
    assert_eq!(params.lr.at(0)?, 0.5);
    // The legacy optimizers.
    let params = ParamsAdamax::from_keras_json(&std::fs::read_to_string(recorded("keras_legacy.json"))?)?;
    let lr = f64::from(0.03f32);
    assert_eq!([0, 1, 100].map(|step| params.lr.at(step).unwrap()), [lr, lr / 1.01, lr / 2.0]);
    let params = read(json!({"learning_rate": 0.5, "decay": 0.0}))?;
    assert!(matches!(params.lr, LearningRate::Constant(0.5)));
    // 0 is never, as in Keras.
    let params = read(json!({"use_ema": true, "ema_overwrite_frequency": 0}))?;
    assert_eq!(params.ema, Some(Ema::default()));
    Ok(())
}

#[test]
fn what_is_not_understood_is_refused() {
    let schedule = |extra: Value| {
        let mut object = json!({"class_name": "CosineDecay", "config": {"initial_learning_rate": 1, "decay_steps": 9}});
        object.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"learning_rate": object})
    };
    for (part, config) in [
        ("unknown field `lr`", json!({"lr": 0.5})),
        ("unknown field `amsgrad`", json!({"amsgrad": false})),
        ("invalid type", json!({"beta_1": "0.9"})),
        ("invalid type", json!({"epsilon": null})),
        ("beta1", json!({"beta_1": 1.0})),
        ("weight_decay", json!({"weight_decay": -0.1})),
        ("invalid `clipnorm`: expected null beside `clipvalue`, got 1", json!({"clipnorm": 1.0, "clipvalue": 0.5})),
        ("`global_clipnorm`: expected null beside `clipnorm`", json!({"clipnorm": 1.0, "global_clipnorm": 0.5})),
        ("invalid `clip`: expected a finite number above 0 for `Norm`, got 0", json!({"clipnorm": 0.0})),
        ("gradient_accumulation_steps", json!({"gradient_accumulation_steps": 1})),
        ("gradient_accumulation_steps", json!({"gradient_accumulation_steps": 0})),
        ("invalid value", json!({"gradient_accumulation_steps": -2})),
        ("ema.momentum", json!({"use_ema": true, "ema_momentum": 1.5})),
        ("learning_rate", json!({"learning_rate": null})),
        ("learning_rate", json!({"learning_rate": [0.5]})),
        ("lr", json!({"learning_rate": -0.5})),
        ("`extra`", schedule(json!({"extra": 1}))),
        ("missing field `config`", json!({"learning_rate": {"class_name": "CosineDecay"}})),
        ("unknown variant `NoamDecay`", schedule(json!({"class_name": "NoamDecay"}))),
        ("unknown field `unknown`", schedule(json!({"config": {"unknown": 1}}))),
        (
            "a schedule of Keras",
            schedule(json!({
                "class_name": "LinearWarmup",
                "config": {"initial_learning_rate": 0.0, "target_learning_rate": 1.0, "warmup_steps": 5}
            })),
        ),
        ("none beside a schedule", {
            let mut config = schedule(json!({}));
            config["decay"] = json!(0.5);
            config
        }),
        (
            "invalid `decay_steps`: expected at least 1 step, got 0",
            schedule(json!({"config": {"initial_learning_rate": 1, "decay_steps": 0}})),
        ),
    ] {
        let error = read(config.clone()).unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` in: {error} ({config})");
    }
    let nested = format!("{{\"class_name\": \"Adamax\", \"config\": {}", "{\"learning_rate\":".repeat(100_000));
    for (part, json) in [
        ("class_name", r#"{"class_name": "Adam", "config": {}}"#),
        ("`class_name`: expected Adamax", r#"{"class_name": "Adam", "config": {"amsgrad": false}}"#),
        ("keras.optimizers.serialize", r#"{"name": "adamax", "learning_rate": 0.1}"#),
        ("missing field `config`", r#"{"class_name": "Adamax"}"#),
        ("unknown field `extra`", r#"{"class_name": "Adamax", "config": {}, "extra": 1}"#),
        ("keras configuration", ""),
        ("keras configuration", "Adamax"),
        ("keras configuration", r#"{"class_name": "Adamax", "config": {"learning_rate": NaN}}"#),
        ("keras configuration", r#"{"class_name": "Adamax", "config": {"learning_rate": 1e999}}"#),
        ("recursion limit", &nested),
    ] {
        let error = ParamsAdamax::from_keras_json(json).unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` in: {error}");
    }
}

#[test]
fn what_keras_does_not_have_is_refused() -> Result<()> {
    let tensor = Tensor::new(0.5f32, &Device::Cpu)?;
    let rate = |lr: LearningRate| ParamsAdamax { lr, ..Default::default() };
    let schedules = [CosineDecay::new(0.5, 10).into(), CosineDecay::new(0.5, 10).into()];
    for (field, params) in [
        ("eps_mode", ParamsAdamax { step_count: StepCount::Shared, ..ParamsAdamax::pytorch() }),
        ("step_count", ParamsAdamax { step_count: StepCount::PerVar, ..Default::default() }),
        ("weight_decay", ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..Default::default() }),
        ("maximize", ParamsAdamax { maximize: true, ..Default::default() }),
        ("loss_scale", ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..Default::default() }),
        ("skip_nonfinite", ParamsAdamax { skip_nonfinite: true, ..Default::default() }),
        (
            "clip",
            ParamsAdamax {
                clip: Some(Clip::GradNorm { max_norm: 1.0, norm_type: NormType::L2 }),
                ..Default::default()
            },
        ),
        (
            "no_decay",
            ParamsAdamax {
                weight_decay: WeightDecay::Decoupled(0.1),
                no_decay: vec!["bias".into()],
                ..Default::default()
            },
        ),
        ("lr", rate(LinearWarmup::new(0.0, 1.0, 10).into())),
        ("lr", rate(Join::new(schedules, [5]).into())),
        ("beta1", ParamsAdamax { beta1: 2.0, ..Default::default() }),
    ] {
        let error = params.to_keras_json().unwrap_err().to_string();
        assert!(error.starts_with(&format!("Adamax: invalid `{field}`: ")), "{field}: {error}");
    }
    // A tensor is the number that it holds.
    let params = ParamsAdamax::from_keras_json(&rate(tensor.into()).to_keras_json()?)?;
    assert!(matches!(params.lr, LearningRate::Constant(0.5)));
    Ok(())
}

#[test]
fn a_byte_order_mark_is_passed_over() -> Result<()> {
    let json = "{\"class_name\": \"Adamax\",\r\n\"config\": {\"beta_1\": 0.5}}\r\n\r\n";
    for text in [json.to_owned(), format!("\u{feff}{json}")] {
        assert_eq!(ParamsAdamax::from_keras_json(&text)?.beta1, 0.5);
    }
    let error = ParamsAdamax::from_keras_json("\u{feff}{\"class_name\": \"Adam\"}").unwrap_err().to_string();
    assert!(error.contains("class_name") && error.contains("Adam"), "{error}");
    Ok(())
}
