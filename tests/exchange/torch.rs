//! PyTorch to us and back.

use anyhow::Result;
use candle_adamax::{Adamax, ErrorKind, GroupLr, ParamGroup, ParamsAdamax, StateDType, StepCount, WeightDecay};
use candle_nn::Optimizer;

use crate::common::folder::Folder;
use crate::files::groups;
use crate::run::{Model, Run, TOLERANCE, assert_same_tensors, left, recorded};

/// An optimizer in the groups of the case `torch_mlp`, whose own numbers are others.
pub(crate) fn grouped(model: &Model) -> Result<Adamax> {
    let of = |part: &str| model.vars().into_iter().filter(|(name, _)| name.ends_with(part)).collect::<Vec<_>>();
    let groups = [ParamGroup::new("weights").vars(of("weight")), ParamGroup::new("biases").vars(of("bias"))];
    Ok(Adamax::from_groups(groups, ParamsAdamax { weight_decay: WeightDecay::L2(0.5), ..ParamsAdamax::pytorch() })?)
}

fn plain(model: &Model, params: ParamsAdamax) -> Result<Adamax> {
    Ok(Adamax::from_named(model.vars(), params)?)
}

#[test]
fn a_run_stays_on_its_trajectory() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    for step_count in [StepCount::PerVar, StepCount::Shared] {
        let model = run.model("at_50")?;
        let mut optimizer = plain(&model, ParamsAdamax { step_count, ..ParamsAdamax::pytorch() })?;
        optimizer.load_torch(run.state())?;
        assert_eq!((optimizer.learning_rate(), optimizer.updates(), optimizer.calls()), (0.01, 50, 50));
        assert!(run.compare_the_rest(&model, &mut optimizer)? <= TOLERANCE);
    }
    Ok(())
}

#[test]
fn also_with_groups_and_counters_of_their_own() -> Result<()> {
    let run = Run::read("torch_mlp", 7)?;
    let model = run.model("at_50")?;
    let mut optimizer = grouped(&model)?;
    optimizer.load_torch(run.state())?;
    assert_eq!((optimizer.state("fc2.weight")?.step, optimizer.state("fc2.bias")?.step), (50, 43));
    assert!(run.compare_the_rest(&model, &mut optimizer)? <= TOLERANCE);
    // The groups have what the file says.
    let [weights, biases] = optimizer.groups() else { panic!("{:?}", optimizer.groups()) };
    assert!(matches!(weights.lr, GroupLr::Inherit) && weights.weight_decay.is_none() && weights.beta1.is_none());
    assert_eq!(optimizer.learning_rate(), 0.02);
    assert_eq!(optimizer.params().weight_decay, WeightDecay::L2(0.01));
    assert!(matches!(&biases.lr, GroupLr::Own(lr) if lr.at(0).unwrap() == 0.05));
    let numbers = (biases.beta1, biases.beta2, biases.eps, biases.weight_decay);
    assert_eq!(numbers, (Some(0.8), Some(0.99), Some(1e-6), Some(WeightDecay::None)));
    Ok(())
}

#[test]
fn what_comes_in_goes_out_the_same() -> Result<()> {
    for (case, frozen) in [("torch_mlp", 7), ("torch_plain", 0)] {
        let run = Run::read(case, frozen)?;
        let mut optimizer = grouped(&run.model("at_50")?)?;
        optimizer.load_torch(run.state())?;
        let out = left(&format!("{case}.same.safetensors"))?;
        optimizer.save_torch(&out)?;
        assert_same_tensors(&out, &run.state(), 0.0)?;
        // The groups, too, which are two here in any case.
        let (ours, theirs) = (groups(&out)?, groups(&run.state())?);
        let of_name = |groups: &serde_json::Value, name: &str| {
            let has = |group: &&serde_json::Value| group["params"].as_array().unwrap().iter().any(|n| n == name);
            let mut group = groups.as_array().unwrap().iter().find(has).unwrap().clone();
            group.as_object_mut().unwrap().remove("params");
            group
        };
        for name in ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"] {
            assert_eq!(of_name(&ours, name), of_name(&theirs, name), "{name}");
        }
    }
    Ok(())
}

/// The crate's own run from the beginning has PyTorch's state after 50 calls. It is left, with one that was taken over
/// and went on, for PyTorch to go on with.
#[test]
fn our_own_state_is_theirs() -> Result<()> {
    for (case, frozen) in [("torch_mlp", 7), ("torch_plain", 0)] {
        let run = Run::read(case, frozen)?;
        let model = run.model("init")?;
        let mut optimizer = match case {
            "torch_mlp" => {
                let of = |part: &str| model.vars().into_iter().filter(|(n, _)| n.ends_with(part)).collect::<Vec<_>>();
                let weights = ParamGroup::new("weights").vars(of("weight")).weight_decay(WeightDecay::L2(0.01));
                let biases = ParamGroup::new("biases").vars(of("bias")).lr(0.05).beta1(0.8).beta2(0.99).eps(1e-6);
                Adamax::from_groups([weights, biases], ParamsAdamax { lr: 0.02.into(), ..ParamsAdamax::pytorch() })?
            }
            _ => plain(&model, ParamsAdamax { lr: 0.01.into(), ..ParamsAdamax::pytorch() })?,
        };
        run.go(&model, &mut optimizer, 0..50)?;
        optimizer.save_torch(left(&format!("{case}.50.safetensors"))?)?;
        model.leave(&format!("{case}.50.weights.safetensors"))?;
        assert_same_tensors(&left(&format!("{case}.50.safetensors"))?, &run.state(), TOLERANCE)?;

        let model = run.model("at_50")?;
        let mut optimizer = grouped(&model)?;
        optimizer.load_torch(run.state())?;
        run.go(&model, &mut optimizer, 50..100)?;
        optimizer.save_torch(left(&format!("{case}.100.safetensors"))?)?;
        model.leave(&format!("{case}.100.weights.safetensors"))?;
    }
    Ok(())
}

#[test]
fn counters_that_differ_need_counters_of_their_own() -> Result<()> {
    let run = Run::read("torch_mlp", 7)?;
    let model = run.model("at_50")?;
    let mut optimizer = grouped(&model)?;
    optimizer.set_params(ParamsAdamax { step_count: StepCount::Shared, ..ParamsAdamax::pytorch() })?;
    let error = optimizer.load_torch(run.state()).unwrap_err();
    let ErrorKind::Checkpoint { entry, expected, got } = error.kind() else { panic!("{error}") };
    assert_eq!((entry.as_str(), got.as_str()), ("fc2.bias.step", "43"));
    assert!(expected.starts_with("50, as for `fc1.bias`"), "{expected}");
    assert_eq!(optimizer.updates(), 0);
    Ok(())
}

#[test]
fn groups_that_differ_need_groups() -> Result<()> {
    let run = Run::read("torch_mlp", 7)?;
    let mut optimizer = plain(&run.model("at_50")?, ParamsAdamax::pytorch())?;
    let error = optimizer.load_torch(run.state()).unwrap_err().to_string();
    assert!(error.contains("param_groups") && error.contains("the same for `fc1.bias` and `fc1.weight`"), "{error}");
    assert_eq!(optimizer.updates(), 0);
    Ok(())
}

#[test]
fn variables_that_are_spared_are_a_group_without_decay() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    let model = run.model("at_50")?;
    let decay = || ParamsAdamax {
        weight_decay: WeightDecay::L2(0.25),
        no_decay: vec!["bias".into()],
        ..ParamsAdamax::pytorch()
    };
    let (file, optimizer) = (left("spared.safetensors")?, plain(&model, decay())?);
    optimizer.save_torch(&file)?;
    let groups = groups(&file)?;
    let [decayed, spared] = groups.as_array().unwrap().as_slice() else { panic!("{groups}") };
    assert_eq!((&decayed["weight_decay"], &spared["weight_decay"]), (&0.25.into(), &0.0.into()));
    assert_eq!(spared["params"], serde_json::json!(["fc1.bias", "fc2.bias"]));
    // They come back as one group that spares some.
    let params = ParamsAdamax { weight_decay: WeightDecay::None, ..decay() };
    let mut back = plain(&model, params)?;
    back.load_torch(&file)?;
    assert_eq!(back.params().weight_decay, WeightDecay::L2(0.25));
    // An optimizer that spares more than the file does is refused.
    let mut other = plain(&model, ParamsAdamax { no_decay: vec!["fc*".into()], ..decay() })?;
    let error = other.load_torch(&file).unwrap_err().to_string();
    assert!(error.contains("weight_decay") && error.contains("which `no_decay` spares"), "{error}");
    Ok(())
}

#[test]
fn a_schedule_and_factors_of_it_stay() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    let model = run.model("at_50")?;
    let schedule = candle_adamax::CosineDecay::new(0.5, 100);
    let params = ParamsAdamax { lr: schedule.into(), gradient_accumulation_steps: 2, ..ParamsAdamax::pytorch() };
    let mut optimizer = plain(&model, params)?;
    optimizer.load_torch(run.state())?;
    // 50 updates are 100 calls here, after which the cosine is at its end.
    assert_eq!((optimizer.updates(), optimizer.calls(), optimizer.learning_rate()), (50, 100, 0.0));

    let of = |part: &str| model.vars().into_iter().filter(|(name, _)| name.contains(part)).collect::<Vec<_>>();
    let groups = || [ParamGroup::new("fc1").vars(of("fc1")), ParamGroup::new("fc2").vars(of("fc2")).lr_factor(2.0)];
    let mut optimizer = Adamax::from_groups(groups(), ParamsAdamax::pytorch())?;
    // All have the same rate there, so the factor gives way; where it says the same, it stays.
    optimizer.load_torch(run.state())?;
    assert!(matches!(&optimizer.groups()[1].lr, GroupLr::Own(lr) if lr.at(0).unwrap() == 0.01));
    let file = left("factor.safetensors")?;
    let params = ParamsAdamax { lr: 0.25.into(), ..ParamsAdamax::pytorch() };
    Adamax::from_groups(groups(), params)?.save_torch(&file)?;
    let mut optimizer = Adamax::from_groups(groups(), ParamsAdamax::pytorch())?;
    optimizer.load_torch(&file)?;
    assert!(matches!(optimizer.groups()[1].lr, GroupLr::Factor(2.0)) && optimizer.learning_rate() == 0.25);
    Ok(())
}

#[test]
fn what_pytorch_cannot_hold_is_refused() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    let model = run.model("at_50")?;
    let folder = Folder::new();
    let file = folder.file("refused");
    let pytorch = ParamsAdamax::pytorch;
    let cases = [
        ("eps_mode", ParamsAdamax::default()),
        ("weight_decay", ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..pytorch() }),
        (".ema", ParamsAdamax { ema: Some(Default::default()), ..pytorch() }),
        ("accumulated", ParamsAdamax { gradient_accumulation_steps: 2, ..pytorch() }),
    ];
    for (entry, params) in cases {
        let mut optimizer = plain(&model, params)?;
        run.go(&model, &mut optimizer, 0..1)?;
        let error = optimizer.save_torch(&file).unwrap_err();
        let ErrorKind::Checkpoint { entry: got, .. } = error.kind() else { panic!("{error}") };
        assert!(got.contains(entry), "{error}");
        assert!(!file.exists(), "{error}");
    }
    // Counters of more than an f32 can count.
    let mut optimizer = plain(&model, pytorch())?;
    let mut snapshot = optimizer.snapshot()?;
    snapshot.counters.updates = 1 << 25;
    snapshot.vars.get_mut("fc1.bias").unwrap().step = (1 << 24) + 1;
    optimizer.restore(&snapshot)?;
    assert!(optimizer.save_torch(&file).unwrap_err().to_string().contains("fc1.bias.step"));
    assert!(!file.exists());
    Ok(())
}

#[test]
fn the_other_epsilon_is_refused() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    let mut optimizer = plain(&run.model("at_50")?, ParamsAdamax::default())?;
    let error = optimizer.load_torch(run.state()).unwrap_err().to_string();
    let expected =
        "Adamax: checkpoint entry `eps_mode`: expected InsideMax, which is PyTorch's convention, got AddToNorm";
    assert_eq!(error, expected);
    Ok(())
}

#[test]
fn variables_without_names_have_no_file() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    let vars = run.model("at_50")?.vars().into_iter().map(|(_, var)| var).collect();
    let mut optimizer = Adamax::new(vars, ParamsAdamax { state_dtype: StateDType::F32, ..ParamsAdamax::pytorch() })?;
    for error in [
        optimizer.load_torch(recorded("torch_plain.safetensors")).unwrap_err(),
        optimizer.save_torch(Folder::new().file("unnamed")).unwrap_err(),
    ] {
        assert!(matches!(error.kind(), ErrorKind::UnnamedVar(_)), "{error}");
    }
    Ok(())
}
