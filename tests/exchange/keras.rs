//! Keras to us and back: by path and in the legacy order.

use anyhow::Result;
use candle_adamax::{
    Adamax, Ema, ErrorKind, GradScaler, LearningRate, LossScale, ParamGroup, ParamsAdamax, ReduceLrOnPlateau,
    StepCount, WeightDecay,
};
use candle_nn::Optimizer;

use crate::common::folder::Folder;
use crate::run::{Model, Run, TOLERANCE, assert_same_tensors, left, load, recorded};

const LEGACY_ORDER: [&str; 4] = ["fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"];

/// The settings that were recorded beside a case.
fn settings(case: &str) -> Result<ParamsAdamax> {
    Ok(ParamsAdamax::from_keras_json(&std::fs::read_to_string(recorded(&format!("{case}.json")))?)?)
}

fn optimizer(model: &Model, case: &str) -> Result<Adamax> {
    Ok(Adamax::from_named(model.vars(), settings(case)?)?)
}

#[test]
fn a_run_stays_on_its_trajectory() -> Result<()> {
    for (case, updates) in [("keras_mlp", 50), ("keras_extras", 16)] {
        let run = Run::read(case, 0)?;
        let model = run.model("at_50")?;
        let mut optimizer = optimizer(&model, case)?;
        optimizer.load_keras(run.state())?;
        assert_eq!((optimizer.calls(), optimizer.updates()), (50, updates));
        assert!(run.compare_the_rest(&model, &mut optimizer)? <= TOLERANCE);
    }
    Ok(())
}

#[test]
fn also_in_the_legacy_order() -> Result<()> {
    let run = Run::read("keras_legacy", 0)?;
    let model = run.model("at_50")?;
    let mut optimizer = optimizer(&model, "keras_legacy")?;
    optimizer.load_keras_legacy(run.state(), &LEGACY_ORDER)?;
    assert_eq!((optimizer.calls(), optimizer.updates()), (50, 50));
    assert!(run.compare_the_rest(&model, &mut optimizer)? <= TOLERANCE);
    Ok(())
}

#[test]
fn what_comes_in_goes_out_the_same() -> Result<()> {
    for case in ["keras_mlp", "keras_extras"] {
        let run = Run::read(case, 0)?;
        let mut optimizer = optimizer(&run.model("at_50")?, case)?;
        optimizer.load_keras(run.state())?;
        let out = left(&format!("{case}.same.safetensors"))?;
        optimizer.save_keras(&out)?;
        assert_same_tensors(&out, &run.state(), 0.0)?;
    }
    let run = Run::read("keras_legacy", 0)?;
    let mut optimizer = optimizer(&run.model("at_50")?, "keras_legacy")?;
    optimizer.load_keras_legacy(run.state(), &LEGACY_ORDER)?;
    let out = left("keras_legacy.same.safetensors")?;
    optimizer.save_keras_legacy(&out, &LEGACY_ORDER)?;
    assert_same_tensors(&out, &run.state(), 0.0)
}

/// The crate's own run from the beginning has Keras's state after 50 calls. It is left, with one that was taken over and
/// went on, for Keras to go on with.
#[test]
fn our_own_state_is_theirs() -> Result<()> {
    let leave = |optimizer: &Adamax, model: &Model, name: &str| -> Result<()> {
        let file = left(&format!("{name}.safetensors"))?;
        if name.starts_with("keras_legacy") {
            optimizer.save_keras_legacy(&file, &LEGACY_ORDER)?;
        } else {
            optimizer.save_keras(&file)?;
            std::fs::write(file.with_extension("json"), optimizer.params().to_keras_json()?)?;
        }
        model.leave(&format!("{name}.weights.safetensors"))
    };
    for case in ["keras_mlp", "keras_extras", "keras_legacy"] {
        let run = Run::read(case, 0)?;
        let model = run.model("init")?;
        let mut own = optimizer(&model, case)?;
        run.go(&model, &mut own, 0..50)?;
        leave(&own, &model, &format!("{case}.50"))?;
        assert_same_tensors(&left(&format!("{case}.50.safetensors"))?, &run.state(), TOLERANCE)?;

        let model = run.model("at_50")?;
        let mut taken_over = optimizer(&model, case)?;
        if case == "keras_legacy" {
            taken_over.load_keras_legacy(run.state(), &LEGACY_ORDER)?;
        } else {
            taken_over.load_keras(run.state())?;
        }
        run.go(&model, &mut taken_over, 50..100)?;
        leave(&taken_over, &model, &format!("{case}.100"))?;
    }
    Ok(())
}

#[test]
fn names_of_keras_itself_are_understood() -> Result<()> {
    let run = Run::read("keras_extras", 0)?;
    let tensors = load(&run.state())?;
    let file = left("spelled.safetensors")?;
    let model = run.model("at_50")?;
    for prefix in ["adamax_1/", ""] {
        let spelled =
            tensors.iter().map(|(key, tensor)| (format!("{prefix}{}", key.replace('/', "_")), tensor.clone()));
        candle_core::safetensors::save(&spelled.collect(), &file)?;
        let mut optimizer = optimizer(&model, "keras_extras")?;
        optimizer.load_keras(&file)?;
        optimizer.save_keras(&file)?;
        assert_same_tensors(&file, &run.state(), 0.0)?;
    }
    // Names of two optimizers in one file.
    let mut mixed = tensors;
    let iteration = mixed["iteration"].clone();
    mixed.insert("other/iteration".into(), iteration);
    candle_core::safetensors::save(&mixed, &file)?;
    let mut optimizer = optimizer(&model, "keras_extras")?;
    let error = optimizer.load_keras(&file).unwrap_err().to_string();
    assert!(error.contains("a surplus one"), "{error}");
    assert_eq!(optimizer.calls(), 0);
    Ok(())
}

#[test]
fn a_number_is_taken_over_and_a_schedule_stays() -> Result<()> {
    let run = Run::read("keras_mlp", 0)?;
    let model = run.model("at_50")?;
    let mut number = Adamax::from_named(model.vars(), ParamsAdamax { lr: 0.5.into(), ..Default::default() })?;
    number.load_keras(run.state())?;
    assert_eq!(number.learning_rate(), f64::from(0.02f32));
    let schedule = candle_adamax::ExponentialDecay::new(0.5, 50, 0.5);
    let params = ParamsAdamax { lr: schedule.into(), ..Default::default() };
    let mut scheduled = Adamax::from_named(model.vars(), params)?;
    scheduled.load_keras(run.state())?;
    assert!(matches!(scheduled.params().lr, LearningRate::Schedule(_)));
    assert_eq!(scheduled.learning_rate(), 0.25);
    Ok(())
}

#[test]
fn averages_and_accumulators_are_there_if_they_are_kept() -> Result<()> {
    let (extras, plain) = (Run::read("keras_extras", 0)?, Run::read("keras_mlp", 0)?);
    let with = settings("keras_extras")?;
    let no_average = ParamsAdamax { ema: None, ..with.clone() };
    let no_accumulator = ParamsAdamax { gradient_accumulation_steps: 1, ..with.clone() };
    for (run, params, entry) in [
        (&extras, no_average, "average"),
        (&extras, no_accumulator, "gradient_accumulator"),
        (&plain, ParamsAdamax { ema: Some(Ema::default()), ..Default::default() }, "average"),
        (&plain, ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() }, "gradient_accumulator"),
    ] {
        let mut optimizer = Adamax::from_named(run.model("at_50")?.vars(), params)?;
        let error = optimizer.load_keras(run.state()).unwrap_err();
        let ErrorKind::Checkpoint { entry: got, .. } = error.kind() else { panic!("{error}") };
        assert!(got.ends_with(entry), "{error}");
        assert_eq!(optimizer.calls(), 0);
    }
    Ok(())
}

#[test]
fn before_the_first_call_too() -> Result<()> {
    let run = Run::read("keras_extras", 0)?;
    let model = run.model("init")?;
    let (file, fresh) = (left("fresh.safetensors")?, optimizer(&model, "keras_extras")?);
    fresh.save_keras(&file)?;
    let mut loaded = optimizer(&model, "keras_extras")?;
    loaded.load_keras(&file)?;
    // Not zeros as averages: the first call begins them.
    assert!(loaded.state("mlp/fc1/bias")?.ema.is_none() && loaded.state("mlp/fc1/bias")?.accumulated.is_none());
    run.go(&model, &mut loaded, 0..50)?;
    loaded.save_keras(&file)?;
    assert_same_tensors(&file, &run.state(), TOLERANCE)
}

#[test]
fn what_keras_cannot_hold_is_refused() -> Result<()> {
    let run = Run::read("keras_mlp", 0)?;
    let model = run.model("at_50")?;
    let folder = Folder::new();
    let file = folder.file("refused");
    let of = |part: &str| model.vars().into_iter().filter(|(name, _)| name.ends_with(part)).collect::<Vec<_>>();
    let grouped = |group: ParamGroup| -> Result<Adamax> {
        let groups = [group.vars(of("weight")), ParamGroup::new("default").vars(of("bias"))];
        Ok(Adamax::from_groups(groups, ParamsAdamax::default())?)
    };
    let mut counted =
        Adamax::from_named(model.vars(), ParamsAdamax { step_count: StepCount::PerVar, ..Default::default() })?;
    run.go(&model, &mut counted, 0..1)?;
    let name = "fc1.bias";
    let var = &model.0[name];
    counted.apply_gradients([(var, &var.ones_like()?)])?;
    let with = |params: ParamsAdamax| Adamax::from_named(model.vars(), params);
    let plain = ParamsAdamax::default;
    for (entry, optimizer) in [
        ("eps_mode", with(ParamsAdamax::pytorch())?),
        ("weight_decay", with(ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..plain() })?),
        ("maximize", with(ParamsAdamax { maximize: true, ..plain() })?),
        ("loss_scale", with(ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..plain() })?),
        ("plateau", with(ParamsAdamax { plateau: Some(ReduceLrOnPlateau::default()), ..plain() })?),
        ("groups.g.lr", grouped(ParamGroup::new("g").lr(0.5))?),
        ("groups.g.lr", grouped(ParamGroup::new("g").lr_factor(0.5))?),
        ("groups.g.beta1", grouped(ParamGroup::new("g").beta1(0.5))?),
        ("groups.g.eps", grouped(ParamGroup::new("g").eps(0.5))?),
        ("fc1.weight.step", counted),
    ] {
        let error = optimizer.save_keras(&file).unwrap_err();
        let ErrorKind::Checkpoint { entry: got, .. } = error.kind() else { panic!("{error}") };
        assert_eq!(got, entry, "{error}");
        assert!(!file.exists());
    }
    // What is the same in a group is no obstacle.
    grouped(ParamGroup::new("g").beta1(0.9).lr_factor(1.0))?.save_keras(&file)?;
    Ok(())
}

#[test]
fn an_order_has_each_variable_once() -> Result<()> {
    let run = Run::read("keras_legacy", 0)?;
    let mut optimizer = optimizer(&run.model("at_50")?, "keras_legacy")?;
    let [a, b, c, d] = LEGACY_ORDER;
    for (order, part) in [
        (vec![a, b, c], "`fc2/bias`, too"),
        (vec![a, b, c, c], "name given twice: `fc2/kernel`"),
        (vec![a, b, c, "other"], "unknown var `other`"),
        (vec![a, b, c, d, "other"], "unknown var `other`"),
        // Shapes guard it.
        (vec![c, b, a, d], "shape mismatch for `fc1/kernel`"),
    ] {
        let error = optimizer.load_keras_legacy(run.state(), &order).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(optimizer.calls(), 0);
    }
    Ok(())
}

#[test]
fn more_calls_than_keras_counts_are_refused() -> Result<()> {
    let w = candle_core::Var::new(&[1f32], &candle_core::Device::Cpu)?;
    let params = ParamsAdamax { gradient_accumulation_steps: u64::MAX, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    for _ in 0..2 {
        optimizer.backward_step(&w.sum_all()?)?;
        optimizer.flush_gradients()?;
    }
    let error = optimizer.save_keras(Folder::new().file("never written")).unwrap_err().to_string();
    assert!(error.contains("`iteration`: expected a number that an i64 can hold"), "{error}");
    Ok(())
}
