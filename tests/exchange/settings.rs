//! What becomes of PyTorch's settings and of its dtypes, and which of them are refused.

use anyhow::Result;
use candle_adamax::{Adamax, ErrorKind, ParamsAdamax, Rounding, TorchOptions};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Value, json};

use crate::common::folder::Folder;
use crate::files::{GROUPS, group, of_one};

/// One variable, and a file for it with edited settings.
fn load(edit: impl FnOnce(&mut Value)) -> Result<(Adamax, Result<(), candle_adamax::Error>)> {
    load_with(edit, TorchOptions::default())
}

fn load_with(
    edit: impl FnOnce(&mut Value),
    options: TorchOptions,
) -> Result<(Adamax, Result<(), candle_adamax::Error>)> {
    let var = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    let mut optimizer = Adamax::from_named([("w", var)], ParamsAdamax::pytorch())?;
    let mut parts = of_one("w", &[2])?;
    let mut groups = json!([group(&["w"])]);
    edit(&mut groups);
    parts.set_text(GROUPS, groups);
    let folder = Folder::new();
    let file = folder.file("settings");
    parts.write(&file)?;
    let loaded = optimizer.load_torch_with(&file, options);
    Ok((optimizer, loaded))
}

#[test]
fn keys_of_schedulers_are_left_out_and_others_if_asked_to() -> Result<()> {
    // As LRScheduler, SWALR, OneCycleLR and CyclicLR keep them.
    let schedulers =
        ["initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"].map(|key| (key, json!(0.5)));
    for (key, value) in schedulers.into_iter().chain([("param_names", json!(["w"]))]) {
        let (optimizer, loaded) = load(|groups| groups[0][key] = value)?;
        loaded?;
        assert_eq!((optimizer.updates(), optimizer.params().eps), (3, 1e-8), "{key}");
    }
    // As in the layer-wise rates of ConvNeXt, and anything else.
    for (key, value) in
        [("lr_scale", json!(0.25)), ("layer", json!({"a": [1, null, "text"]})), ("amsgrad", json!(false))]
    {
        let (optimizer, loaded) = load(|groups| groups[0][key] = value.clone())?;
        let error = loaded.unwrap_err().to_string();
        assert!(error.contains(&format!("unknown field `{key}`")) && error.contains("`ignore_unknown`"), "{error}");
        assert_eq!(optimizer.updates(), 0);
        let (optimizer, loaded) =
            load_with(|groups| groups[0][key] = value.clone(), TorchOptions { ignore_unknown: true })?;
        loaded?;
        assert_eq!((optimizer.updates(), optimizer.params().beta1), (3, 0.9), "{key}");
    }
    // What it needs is still needed.
    let (_, loaded) =
        load_with(|groups| groups[0] = json!({"lr_scale": 1, "params": ["w"]}), TorchOptions { ignore_unknown: true })?;
    assert!(loaded.unwrap_err().to_string().contains("missing field `lr`"));
    Ok(())
}

#[test]
fn all_numbers_are_taken_over() -> Result<()> {
    let (optimizer, loaded) = load(|groups| {
        groups[0]["lr"] = json!(0.25);
        groups[0]["betas"] = json!([0.5, 0.75]);
        groups[0]["eps"] = json!(1e-3);
        groups[0]["weight_decay"] = json!(0.125);
        groups[0]["maximize"] = json!(true);
        // Known, and without a meaning.
        groups[0]["foreach"] = json!(true);
        groups[0]["capturable"] = json!(true);
        groups[0]["differentiable"] = json!(true);
        groups[0]["initial_lr"] = json!(0.5);
    })?;
    loaded?;
    let ParamsAdamax { beta1, beta2, eps, weight_decay, maximize, .. } = optimizer.params();
    assert_eq!((*beta1, *beta2, *eps, *maximize), (0.5, 0.75, 1e-3, true));
    assert_eq!(*weight_decay, candle_adamax::WeightDecay::L2(0.125));
    Ok(())
}

#[test]
fn what_is_not_allowed_is_refused() -> Result<()> {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit); 15] = [
        ("lr", |groups| groups[0]["lr"] = json!(-0.5)),
        ("beta1", |groups| groups[0]["betas"] = json!([1.0, 0.5])),
        ("beta2", |groups| groups[0]["betas"] = json!([0.5, -0.5])),
        ("eps", |groups| groups[0]["eps"] = json!(-1e-8)),
        ("weight_decay", |groups| groups[0]["weight_decay"] = json!(-1)),
        ("invalid length 1", |groups| groups[0]["betas"] = json!([0.5])),
        ("missing field `eps`", |groups| drop(groups[0].as_object_mut().unwrap().remove("eps"))),
        ("missing field `params`", |groups| drop(groups[0].as_object_mut().unwrap().remove("params"))),
        ("unknown field `amsgrad`", |groups| groups[0]["amsgrad"] = json!(false)),
        ("invalid type", |groups| groups[0]["lr"] = json!("0.5")),
        ("invalid type", |groups| groups[0] = json!(7)),
        ("invalid type", |groups| *groups = json!({"groups": []})),
        ("expected `w` in one group", |groups| groups[0]["params"] = json!(["w", "w"])),
        ("expected no parameter `v`", |groups| groups[0]["params"] = json!(["w", "v"])),
        ("expected a group of `w`", |groups| groups[0]["params"] = json!([])),
    ];
    for (part, edit) in edits {
        let (optimizer, loaded) = load(edit)?;
        let error = loaded.unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` in: {error}");
        assert_eq!((optimizer.updates(), optimizer.params().beta1), (0, 0.9), "{error}");
    }
    let maximize = |groups: &mut Value| {
        let mut other = group(&["w"]);
        groups[0]["params"] = json!([]);
        groups[0]["maximize"] = json!(true);
        other["maximize"] = json!(false);
        groups.as_array_mut().unwrap().push(other);
    };
    // A group without parameters says nothing.
    let (optimizer, loaded) = load(maximize)?;
    loaded?;
    assert!(!optimizer.params().maximize);
    Ok(())
}

#[test]
fn groups_that_differ_in_maximize_are_refused() -> Result<()> {
    let vars = ["v", "w"].map(|name| (name, Var::zeros(2, DType::F32, &Device::Cpu).unwrap()));
    let mut optimizer = Adamax::from_named(vars, ParamsAdamax::pytorch())?;
    let mut parts = of_one("w", &[2])?;
    parts.tensors.extend(of_one("v", &[2])?.tensors);
    let (up, mut down) = (group(&["v"]), group(&["w"]));
    down["maximize"] = json!(true);
    parts.set_text(GROUPS, json!([up, down]));
    let folder = Folder::new();
    let file = folder.file("maximize");
    parts.write(&file)?;
    let error = optimizer.load_torch(&file).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Checkpoint { entry, .. } if entry == "param_groups.maximize"), "{error}");
    Ok(())
}

#[test]
fn state_of_halves_is_widened_and_written_in_f32() -> Result<()> {
    for (dtype, of_file) in [
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F32),
        (DType::F64, DType::F64),
        (DType::F32, DType::F32),
    ] {
        let var = Var::zeros((2, 3), dtype, &Device::Cpu)?;
        let params = ParamsAdamax { rounding: Rounding::Master, ..ParamsAdamax::pytorch() };
        let mut optimizer = Adamax::from_named([("w", var)], params)?;
        let mut parts = of_one("w", &[2, 3])?;
        let values = Tensor::new(&[[0.1f64, -0.2, 0.3], [0.0, 1.5, -2.5]], &Device::Cpu)?.to_dtype(of_file)?;
        parts.set("w.exp_avg", &values)?;
        parts.set("w.exp_inf", &values.abs()?)?;
        parts.set_text(GROUPS, json!([group(&["w"])]));
        let folder = Folder::new();
        let file = folder.file("halves");
        parts.write(&file)?;
        optimizer.load_torch(&file)?;
        optimizer.save_torch(&file)?;
        let saved = crate::run::load(&file)?;
        let exact = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        assert_eq!(saved["w.exp_avg"].dtype(), exact);
        assert_eq!(crate::run::difference(&saved["w.exp_avg"], &values)?, 0.0, "{dtype:?} {of_file:?}");
        // No other dtype fits.
        for wrong in [DType::F16, DType::BF16, DType::F32, DType::F64].into_iter().filter(|&d| d != dtype && d != exact)
        {
            parts.set("w.exp_avg", &values.to_dtype(wrong)?)?;
            parts.write(&file)?;
            let error = optimizer.load_torch(&file).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::DTypeMismatch { what: "exp_avg", .. }), "{error}");
        }
    }
    Ok(())
}
