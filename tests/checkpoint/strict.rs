//! Loading is strict: what does not fit is an error that names the entry, and the optimizer is as it was.

use std::path::Path;

use anyhow::Result;
use candle_adamax::{
    Adamax, Ema, EpsMode, Error, ErrorKind, ExponentialDecay, LearningRate, ParamGroup, ParamsAdamax, StateDType,
    StepCount,
};
use candle_core::{DType, Device, Var};
use candle_nn::{Optimizer, VarMap};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common::folder::Folder;
use crate::common::parts::{Parts, Tensors, with_header};
use crate::common::{Fingerprint, bits};
use crate::support::Model;

/// The key of the JSON text in a file's metadata.
const METADATA: &str = "candle_adamax";

/// A checkpoint taken apart.
struct Checkpoint {
    header: Value,
    tensors: Tensors,
}

impl Checkpoint {
    fn read(path: &Path) -> Result<Self> {
        let parts = Parts::read(path)?;
        Ok(Self { header: parts.json(METADATA)?, tensors: parts.tensors })
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut parts = Parts { tensors: self.tensors.clone(), ..Parts::default() };
        parts.set_text(METADATA, &self.header);
        parts.write(path)
    }
}

/// A file, and an optimizer that it fits and that has gone another way since.
struct Fixture {
    folder: Folder,
    vars: Vec<(String, Var)>,
    optimizer: Adamax,
}

const NAMES: [&str; 2] = ["body.0.weight", "head"];

impl Fixture {
    /// Two variables in two groups, with everything that a state can have.
    fn new() -> Result<Self> {
        let params = ParamsAdamax {
            gradient_accumulation_steps: 3,
            ema: Some(Ema { momentum: 0.5, overwrite_frequency: None }),
            ..Default::default()
        };
        let folder = Folder::new();
        let vars: Vec<(String, Var)> = NAMES
            .iter()
            .map(|name| Ok((name.to_string(), Var::new(&[[0.5f32, -0.5, 0.25], [1.0, 2.0, -3.0]], &Device::Cpu)?)))
            .collect::<Result<_>>()?;
        let (body, head) =
            (ParamGroup::new("body").var(NAMES[0], &vars[0].1), ParamGroup::new("head").var(NAMES[1], &vars[1].1));
        let mut optimizer = Adamax::from_groups([body, head.lr_factor(2.0)], params)?;
        let fixture_step = |optimizer: &mut Adamax, factor: f64| -> Result<()> {
            let loss = vars
                .iter()
                .map(|(_, var)| var.sqr()?.affine(factor, 0.0)?.sum_all())
                .collect::<candle_core::Result<Vec<_>>>()?;
            Ok(optimizer.backward_step(&(&loss[0] + &loss[1])?).map(drop)?)
        };
        for call in 0..4 {
            fixture_step(&mut optimizer, f64::from(call) + 1.0)?;
        }
        optimizer.save(folder.file("good"))?;
        for _ in 0..4 {
            fixture_step(&mut optimizer, -0.5)?;
        }
        Ok(Self { folder, vars, optimizer })
    }

    fn parts(&self) -> Result<Checkpoint> {
        Checkpoint::read(&self.folder.file("good"))
    }

    /// Loads the file `name`, which must fail and change nothing: neither the state nor the weights.
    fn refuse(&mut self, name: &str) -> Result<Error> {
        let file = self.folder.file(name);
        refuse(&mut self.optimizer, &self.vars, &file)
    }

    /// Saves an edited checkpoint and loads it, which must fail, name the entry and change nothing.
    #[track_caller]
    fn refuse_edited(&mut self, entries: &[&str], edit: impl FnOnce(&mut Checkpoint)) -> Result<()> {
        let mut parts = self.parts()?;
        edit(&mut parts);
        parts.write(&self.folder.file("edited"))?;
        let message = self.refuse("edited")?.to_string();
        for entry in entries {
            assert!(message.contains(entry), "`{entry}` in: {message}");
        }
        assert!(message.starts_with("Adamax: "), "{message}");
        Ok(())
    }
}

fn refuse(optimizer: &mut Adamax, vars: &[(String, Var)], file: &Path) -> Result<Error> {
    let (before, report) = (Fingerprint::of(optimizer, vars), format!("{:?}", optimizer.report()));
    let loaded = optimizer.load(file);
    let Err(error) = loaded else { anyhow::bail!("{file:?} was loaded") };
    assert_eq!(Fingerprint::of(optimizer, vars), before, "state and weights after: {error}");
    assert_eq!(format!("{:?}", optimizer.report()), report, "the report after: {error}");
    Ok(error)
}

#[test]
fn takes_what_fits() -> Result<()> {
    // The edits below begin with this: taken apart and put together, the file is still good.
    let mut fixture = Fixture::new()?;
    let parts = fixture.parts()?;
    let keys: Vec<_> = parts.tensors.keys().map(String::as_str).collect();
    let expected = ["accumulated", "ema", "exp_avg", "exp_inf"].map(|what| NAMES.map(|name| format!("{name}.{what}")));
    let mut expected: Vec<_> = expected.iter().flatten().map(String::as_str).collect();
    expected.sort_unstable();
    assert_eq!(keys, expected);
    parts.write(&fixture.folder.file("edited"))?;
    fixture.optimizer.load(fixture.folder.file("edited"))?;
    assert_eq!(fixture.optimizer.calls(), 4);
    Ok(())
}

#[test]
fn a_missing_entry() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for name in NAMES {
        for what in ["exp_avg", "exp_inf", "ema", "accumulated"] {
            let key = format!("{name}.{what}");
            fixture.refuse_edited(&[&key], |parts| drop(parts.tensors.remove(&key)))?;
        }
        // The variable is in neither, or in one place only.
        fixture.refuse_edited(&[name], |parts| {
            parts.header["vars"].as_object_mut().unwrap().remove(name);
            parts.tensors.retain(|key, _| !key.starts_with(name));
        })?;
        fixture.refuse_edited(&[name], |parts| {
            parts.header["vars"].as_object_mut().unwrap().remove(name);
        })?;
        for field in ["group", "step", "ema", "accumulated"] {
            fixture.refuse_edited(&[field], |parts| {
                parts.header["vars"][name].as_object_mut().unwrap().remove(field);
            })?;
        }
    }
    for field in ["format_version", "params", "groups", "counters", "grad_scaler", "plateau", "vars"] {
        fixture.refuse_edited(&[field], |parts| {
            parts.header.as_object_mut().unwrap().remove(field);
        })?;
    }
    for field in ["calls", "updates", "skipped", "pending"] {
        fixture.refuse_edited(&[field], |parts| {
            parts.header["counters"].as_object_mut().unwrap().remove(field);
        })?;
    }
    for field in ["lr", "beta1", "eps_mode", "gradient_accumulation_steps", "loss_scale", "plateau"] {
        fixture.refuse_edited(&[field], |parts| {
            parts.header["params"].as_object_mut().unwrap().remove(field);
        })?;
    }
    Ok(())
}

#[test]
fn a_surplus_entry() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for key in ["head.extra", "other.exp_avg", "head"] {
        fixture.refuse_edited(&[key], |parts| {
            let tensor = parts.tensors["head.exp_avg"].clone();
            parts.tensors.insert(key.to_owned(), tensor);
        })?;
    }
    // A whole variable that this optimizer does not have.
    fixture.refuse_edited(&["other"], |parts| {
        parts.header["vars"]["other"] = parts.header["vars"]["head"].clone();
        for what in ["exp_avg", "exp_inf", "ema", "accumulated"] {
            let tensor = parts.tensors[&format!("head.{what}")].clone();
            parts.tensors.insert(format!("other.{what}"), tensor);
        }
    })?;
    // A tensor that is there although the header says it is not.
    fixture.refuse_edited(&["head.ema"], |parts| parts.header["vars"]["head"]["ema"] = json!(false))?;
    fixture.refuse_edited(&["head.accumulated"], |parts| parts.header["vars"]["head"]["accumulated"] = json!(0))?;
    // Fields that this version does not know, on every level.
    fixture.refuse_edited(&["novel"], |parts| parts.header["novel"] = json!(1))?;
    fixture.refuse_edited(&["novel"], |parts| parts.header["params"]["novel"] = json!(1))?;
    fixture.refuse_edited(&["novel"], |parts| parts.header["counters"]["novel"] = json!(1))?;
    fixture.refuse_edited(&["novel"], |parts| parts.header["groups"][1]["novel"] = json!(1))?;
    fixture.refuse_edited(&["novel"], |parts| parts.header["vars"]["head"]["novel"] = json!(1))?;
    Ok(())
}

#[test]
fn another_shape() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for what in ["exp_avg", "exp_inf", "ema", "accumulated"] {
        let key = format!("head.{what}");
        for shape in [vec![3, 2], vec![6], vec![2, 3, 1]] {
            fixture.refuse_edited(&["head", what, "[2, 3]"], |parts| parts.tensors.get_mut(&key).unwrap().1 = shape)?;
        }
        fixture.refuse_edited(&["head", what], |parts| {
            parts.tensors.insert(key.clone(), (Dtype::F32, vec![0, 3], vec![]));
        })?;
    }
    Ok(())
}

#[test]
fn another_dtype() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for what in ["exp_avg", "exp_inf", "ema", "accumulated"] {
        let key = format!("head.{what}");
        for (dtype, size) in
            [(Dtype::F64, 8), (Dtype::BF16, 2), (Dtype::F16, 2), (Dtype::I64, 8), (Dtype::U8, 1), (Dtype::BOOL, 1)]
        {
            // candle cannot read each of these; whatever it says, the entry is named.
            fixture.refuse_edited(&["head", what], |parts| {
                parts.tensors.insert(key.clone(), (dtype, vec![2, 3], vec![0; 6 * size]));
            })?;
        }
    }
    let mut parts = fixture.parts()?;
    parts.tensors.insert("head.ema".into(), (Dtype::BOOL, vec![2, 3], vec![0; 6]));
    parts.write(&fixture.folder.file("edited"))?;
    let message = fixture.refuse("edited")?.to_string();
    let expected = "checkpoint entry `head.ema`: expected a tensor of a dtype that candle has, got ";
    assert!(message.contains(expected), "{message}");
    // The file is of an f64 variable, the variable is f32, and the other way around.
    let folder = Folder::new();
    for (from, to) in [(DType::F64, DType::F32), (DType::F32, DType::F64)] {
        Model::new(from)?.optimizer(ParamsAdamax::default())?.save(folder.file("state"))?;
        let model = Model::new(to)?;
        let error = refuse(&mut model.optimizer(ParamsAdamax::default())?, &model.0, &folder.file("state"))?;
        assert!(matches!(error.kind(), ErrorKind::DTypeMismatch { what: "exp_avg", .. }), "{error}");
    }
    Ok(())
}

#[test]
fn another_version() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for version in [0, 2, 1000] {
        let got = version.to_string();
        fixture.refuse_edited(&["format_version", &got], |parts| parts.header["format_version"] = json!(version))?;
        // Whatever that version's header looks like: its number is the message.
        fixture.refuse_edited(&["format_version", &got], |parts| {
            parts.header = json!({"format_version": version, "something": ["else"]});
        })?;
    }
    fixture.refuse_edited(&[METADATA], |parts| parts.header["format_version"] = json!("1"))?;
    fixture.refuse_edited(&[METADATA], |parts| parts.header = json!([1, 2, 3]))?;
    Ok(())
}

#[test]
fn values_that_are_not_allowed() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for (field, value) in [
        ("lr", json!(-1.0)),
        ("beta1", json!(1.0)),
        ("beta2", json!(-0.1)),
        ("eps", json!(-1e-8)),
        ("weight_decay", json!({"L2": -1.0})),
        ("no_decay", json!([""])),
        ("clip", json!({"Value": 0.0})),
        ("loss_scale", json!({"Static": 0.0})),
        ("gradient_accumulation_steps", json!(0)),
    ] {
        fixture.refuse_edited(&[field], |parts| parts.header["params"][field] = value)?;
    }
    let two = json!({"Value": 1.0, "Norm": 1.0});
    fixture.refuse_edited(&[METADATA], |parts| parts.header["params"]["clip"] = two)?;
    fixture.refuse_edited(&["groups.head.beta2"], |parts| parts.header["groups"][2]["beta2"] = json!(2.0))?;
    // A state that the settings have none for, and settings without a state.
    let state = json!({"scale": 8.0, "growth_tracker": 0});
    fixture.refuse_edited(&["grad_scaler"], |parts| parts.header["grad_scaler"] = state.clone())?;
    let scaler = json!({"init_scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3});
    fixture.refuse_edited(&["grad_scaler"], |parts| {
        parts.header["params"]["loss_scale"] = json!({"Dynamic": scaler});
    })?;
    let mut both = |parts_scaler: &serde_json::Value, state: serde_json::Value, entry: &str| {
        fixture.refuse_edited(&[entry], |parts| {
            parts.header["params"]["loss_scale"] = json!({"Dynamic": parts_scaler});
            parts.header["grad_scaler"] = state;
        })
    };
    both(&scaler, json!({"scale": 0.0, "growth_tracker": 0}), "grad_scaler.scale")?;
    both(&scaler, json!({"scale": -8.0, "growth_tracker": 0}), "grad_scaler.scale")?;
    both(&scaler, json!({"scale": 8.0, "growth_tracker": 3}), "grad_scaler.growth_tracker")?;
    both(&scaler, json!({"scale": 8.0}), "growth_tracker")?;
    both(&json!({"init_scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5}), state, "growth_interval")?;
    let plateau = serde_json::to_value(candle_adamax::ReduceLrOnPlateau::default())?;
    for (state, entry) in [
        (json!(null), "plateau"),
        (json!({"best": 1.0, "num_bad": 0, "cooldown": 0, "lr_factor": 1.5}), "plateau.lr_factor"),
        (json!({"num_bad": 0, "cooldown": 0, "lr_factor": 1.0}), "best"),
    ] {
        fixture.refuse_edited(&[entry], |parts| {
            parts.header["params"]["plateau"] = plateau.clone();
            parts.header["plateau"] = state;
        })?;
    }
    // Three calls make an update: a third one that waits cannot be.
    fixture.refuse_edited(&["counters.pending"], |parts| parts.header["counters"]["pending"] = json!(3))?;
    // What is not even a number of the right kind is an error of the JSON text, which says where.
    fixture.refuse_edited(&[METADATA, "-1"], |parts| parts.header["counters"]["calls"] = json!(-1))?;
    fixture.refuse_edited(&[METADATA, "1.5"], |parts| parts.header["vars"]["head"]["step"] = json!(1.5))?;
    Ok(())
}

#[test]
fn another_convention() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("state");
    let model = Model::new(DType::F32)?;
    let keras = ParamsAdamax::default;
    for (entry, params) in [
        ("eps_mode", ParamsAdamax { eps_mode: EpsMode::InsideMax, ..keras() }),
        ("step_count", ParamsAdamax { step_count: StepCount::PerVar, ..keras() }),
        ("eps_mode", ParamsAdamax::pytorch()),
    ] {
        let mut optimizer = model.optimizer(params.clone())?;
        model.run(&mut optimizer, 0..2, false)?;
        optimizer.save(&file)?;
        let error = refuse(&mut model.optimizer(keras())?, &model.0, &file)?;
        assert!(matches!(error.kind(), ErrorKind::Checkpoint { entry: e, .. } if e == entry), "{error}");
        model.optimizer(keras())?.save(&file)?;
        let error = refuse(&mut optimizer, &model.0, &file)?;
        assert!(matches!(error.kind(), ErrorKind::Checkpoint { entry: e, .. } if e == entry), "{error}");
    }
    Ok(())
}

#[test]
fn other_groups() -> Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.refuse_edited(&["groups.novel"], |parts| {
        let mut group = parts.header["groups"][1].clone();
        group["name"] = json!("novel");
        parts.header["groups"].as_array_mut().unwrap().push(group);
    })?;
    for (index, name) in ["groups.default", "groups.body", "groups.head"].into_iter().enumerate() {
        fixture.refuse_edited(&[name], |parts| {
            parts.header["groups"].as_array_mut().unwrap().remove(index);
        })?;
    }
    fixture.refuse_edited(&["groups.head"], |parts| {
        let head = parts.header["groups"][2].clone();
        parts.header["groups"].as_array_mut().unwrap().push(head);
    })?;
    // The same groups, but the variable is in the other one.
    fixture.refuse_edited(&["head", "body"], |parts| parts.header["vars"]["head"]["group"] = json!("body"))?;
    fixture.refuse_edited(&["head", "default"], |parts| parts.header["vars"]["head"]["group"] = json!("default"))?;
    // Files of optimizers that have more groups, fewer, or the same with other variables.
    let folder = Folder::new();
    let model = Model::new(DType::F32)?;
    let (mut grouped, mut plain) = (model.grouped(ParamsAdamax::default())?, model.optimizer(ParamsAdamax::default())?);
    grouped.save(folder.file("grouped"))?;
    plain.save(folder.file("plain"))?;
    let message = refuse(&mut plain, &model.0, &folder.file("grouped"))?.to_string();
    assert!(message.contains("groups.fc"), "{message}");
    let message = refuse(&mut grouped, &model.0, &folder.file("plain"))?.to_string();
    assert!(message.contains("groups.fc"), "{message}");
    Ok(())
}

#[test]
fn groups_in_another_order_fit() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("state");
    let vars = [Var::zeros(2, DType::F32, &Device::Cpu)?, Var::zeros(3, DType::F32, &Device::Cpu)?];
    let (a, b) = (
        || ParamGroup::new("a").var("x", &vars[0]).beta1(0.5),
        || ParamGroup::new("b").var("y", &vars[1]).lr_factor(3.0),
    );
    Adamax::from_groups([a(), b()], ParamsAdamax::default())?.save(&file)?;
    let mut reversed = Adamax::from_groups([b(), a()], ParamsAdamax::default())?;
    reversed.load(&file)?;
    let beta1: Vec<_> = reversed.groups().iter().map(|group| (group.name.as_str(), group.beta1)).collect();
    assert_eq!(beta1, [("b", None), ("a", Some(0.5))]);
    Ok(())
}

#[test]
fn a_file_cut_short_at_any_length() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let good = std::fs::read(fixture.folder.file("good"))?;
    for length in 0..good.len() {
        std::fs::write(fixture.folder.file("cut"), &good[..length])?;
        let error = fixture.refuse("cut")?;
        assert!(error.to_string().contains("cut"), "{length} bytes: {error}");
    }
    // Nor may anything follow.
    std::fs::write(fixture.folder.file("cut"), [&good[..], b"\0"].concat())?;
    fixture.refuse("cut")?;
    Ok(())
}

#[test]
fn a_header_with_any_bit_flipped() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let good = std::fs::read(fixture.folder.file("good"))?;
    let header = 8 + u64::from_le_bytes(good[..8].try_into()?) as usize;
    fixture.optimizer.load(fixture.folder.file("good"))?;
    let tensors = |optimizer: &Adamax| {
        let of = |name| optimizer.state(name).unwrap();
        NAMES.map(|name| [bits(&of(name).exp_avg), bits(&of(name).exp_inf)])
    };
    let loaded = tensors(&fixture.optimizer);
    let mut refused = 0;
    for byte in 0..header {
        for bit in 0..8 {
            let mut flipped = good.clone();
            flipped[byte] ^= 1 << bit;
            std::fs::write(fixture.folder.file("flipped"), &flipped)?;
            let before = Fingerprint::of(&fixture.optimizer, &[]);
            if fixture.optimizer.load(fixture.folder.file("flipped")).is_err() {
                refused += 1;
                assert_eq!(Fingerprint::of(&fixture.optimizer, &[]), before, "byte {byte}, bit {bit}");
            } else {
                // It is another file that is as good, with a digit or a letter of a setting changed.
                assert_eq!(tensors(&fixture.optimizer), loaded, "byte {byte}, bit {bit}");
                fixture.optimizer.load(fixture.folder.file("good"))?;
            }
        }
    }
    assert!(refused > 6 * header, "{refused} of {} were refused", 8 * header);
    Ok(())
}

#[test]
fn files_of_other_kinds() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let files: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("text", b"This is not a safetensors file, although it is long enough to have the length of a header."),
        ("json", b"{\"format_version\": 1, \"params\": {}, \"groups\": [], \"counters\": {}, \"vars\": {}}"),
        ("zip", b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
        ("huge header", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
        ("no header", b"\0\0\0\0\0\0\0\0"),
        ("empty header", b"\x02\0\0\0\0\0\0\0{}"),
    ];
    for (name, bytes) in files {
        std::fs::write(fixture.folder.file(name), bytes)?;
        let message = fixture.refuse(name)?.to_string();
        assert!(message.contains(name) || message.contains(METADATA), "{message}");
    }

    // A file of weights has no state, not even one whose variables are called like it.
    let weights = VarMap::new();
    for name in NAMES {
        for what in ["exp_avg", "exp_inf"] {
            weights.get((2, 3), &format!("{name}.{what}"), Default::default(), DType::F32, &Device::Cpu)?;
        }
    }
    weights.save(fixture.folder.file("weights"))?;
    let error = fixture.refuse("weights")?;
    assert!(matches!(error.kind(), ErrorKind::Checkpoint { entry, .. } if entry == METADATA), "{error}");

    let error = fixture.refuse("not there")?;
    assert!(matches!(error.kind(), ErrorKind::Io { action: "reading", .. }), "{error}");
    assert!(error.to_string().contains("not there"), "{error}");
    std::fs::create_dir(fixture.folder.file("a folder"))?;
    let error = fixture.refuse("a folder")?;
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    Ok(())
}

#[test]
fn variables_without_names_have_no_file() -> Result<()> {
    let folder = Folder::new();
    let var = Var::zeros(3, DType::F32, &Device::Cpu)?;
    let named = Adamax::from_named([("var.0", var.clone())], ParamsAdamax::default())?;
    named.save(folder.file("named"))?;
    let mut unnamed = Adamax::new(vec![var.clone()], ParamsAdamax::default())?;
    let error = unnamed.save(folder.file("unnamed")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::UnnamedVar(0)), "{error}");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1, "nothing was written");
    // Not even a file that happens to have the made-up name.
    let error = refuse(&mut unnamed, &[("var.0".into(), var)], &folder.file("named"))?;
    assert!(matches!(error.kind(), ErrorKind::UnnamedVar(0)), "{error}");
    Ok(())
}

#[test]
fn a_norm_that_is_negative() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let entry = "`head.exp_inf`: expected numbers that are not negative, got -";
    fixture.refuse_edited(&[entry], |parts| {
        parts.tensors.get_mut("head.exp_inf").unwrap().2[20..24].copy_from_slice(&(-1e-30f32).to_le_bytes());
    })?;
    // What a gradient leaves that is not finite is no mistake of the file.
    for value in [f32::NAN, f32::INFINITY, 0.0] {
        let mut parts = fixture.parts()?;
        parts.tensors.get_mut("head.exp_inf").unwrap().2[20..24].copy_from_slice(&value.to_le_bytes());
        parts.write(&fixture.folder.file("edited"))?;
        fixture.optimizer.load(fixture.folder.file("edited"))?;
    }
    // In every encoding that has negative numbers, and by rows.
    for (state_dtype, rowwise_norm, size) in [
        (StateDType::F32, true, 4),
        (StateDType::BF16, false, 2),
        (StateDType::F16, false, 2),
        (StateDType::Q8, true, 4),
        (StateDType::F16, true, 4),
    ] {
        let folder = Folder::new();
        let (good, edited) = (folder.file("good"), folder.file("edited"));
        let vars = vec![("w".to_owned(), Var::ones((3, 2), DType::F32, &Device::Cpu)?)];
        let params = ParamsAdamax { state_dtype, rowwise_norm, ..Default::default() };
        let mut optimizer = Adamax::from_named(vars.clone(), params)?;
        optimizer.backward_step(&vars[0].1.sqr()?.sum_all()?)?;
        optimizer.save(&good)?;
        let mut parts = Checkpoint::read(&good)?;
        let bytes = &mut parts.tensors.get_mut("w.exp_inf").unwrap().2;
        bytes[size - 1] |= 0x80;
        parts.write(&edited)?;
        let message = refuse(&mut optimizer, &vars, &edited)?.to_string();
        assert!(message.contains("`w.exp_inf`: expected numbers that are not negative"), "{state_dtype:?}: {message}");
        optimizer.load(&good)?;
    }
    Ok(())
}

#[test]
fn keys_that_saving_does_not_write() -> Result<()> {
    let mut fixture = Fixture::new()?;
    // What Keras writes beside a schedule, and what nobody does.
    let decay = serde_json::to_value(LearningRate::from(ExponentialDecay::new(0.5, 10, 0.5)))?;
    for (key, value) in
        [("module", json!("keras.optimizers.schedules")), ("registered_name", json!(null)), ("novel", json!(1))]
    {
        let mut lr = decay.clone();
        lr[key] = value;
        fixture.refuse_edited(&[&format!("`params.lr.{key}`: expected no such setting")], |parts| {
            parts.header["params"]["lr"] = lr.clone();
        })?;
        fixture.refuse_edited(&[&format!("`groups.1.lr.Own.{key}`")], |parts| {
            parts.header["groups"][1]["lr"] = json!({"Own": lr});
        })?;
    }
    fixture.refuse_edited(&["`params.lr.config.name`: expected no such setting"], |parts| {
        parts.header["params"]["lr"] = decay.clone();
        parts.header["params"]["lr"]["config"]["name"] = json!("decay");
    })?;
    for outside in [json!({"class_name": "Tensor", "config": 0.5}), json!({"class_name": "Custom", "config": null})] {
        fixture.refuse_edited(&["`params.lr.novel`"], |parts| {
            parts.header["params"]["lr"] = outside;
            parts.header["params"]["lr"]["novel"] = json!({"a": [1, 2]});
        })?;
    }
    let mut parts = fixture.parts()?;
    parts.header["params"]["lr"] = decay;
    parts.write(&fixture.folder.file("edited"))?;
    fixture.optimizer.load(fixture.folder.file("edited"))?;
    Ok(())
}

#[test]
fn counters_that_contradict_each_other() -> Result<()> {
    let mut fixture = Fixture::new()?;
    // Four calls, one update of three and one that waits.
    fixture.refuse_edited(&["`counters.pending`: expected at most 0 (they are calls, too)"], |parts| {
        parts.header["counters"]["calls"] = json!(0);
    })?;
    fixture.refuse_edited(&["`head.step`: expected at most the 1 updates"], |parts| {
        parts.header["vars"]["head"]["step"] = json!(2);
    })?;
    fixture.refuse_edited(&["`body.0.weight.accumulated`"], |parts| {
        parts.header["vars"]["body.0.weight"]["accumulated"] = json!(2);
    })?;
    for counter in ["calls", "updates", "skipped"] {
        fixture.refuse_edited(&[counter], |parts| parts.header["counters"][counter] = json!(u64::MAX))?;
    }
    Ok(())
}

#[test]
fn errors_name_the_file_and_the_tensor() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let file = fixture.folder.file("edited");
    type Edit = fn(&mut Checkpoint);
    let edits: [Edit; 4] = [
        |parts| drop(parts.tensors.remove("head.ema")),
        |parts| drop(parts.tensors.insert("head.ema".into(), (Dtype::BOOL, vec![2, 3], vec![0; 6]))),
        |parts| parts.header["params"]["lr"] = json!(-1.0),
        |parts| parts.tensors.get_mut("head.exp_avg").unwrap().1 = vec![6],
    ];
    for edit in edits {
        let mut parts = fixture.parts()?;
        edit(&mut parts);
        parts.write(&file)?;
        let error = fixture.refuse("edited")?;
        assert_eq!(error.path(), Some(file.as_path()), "{error}");
        assert!(error.to_string().contains(&format!("{file:?}")), "{error}");
        // It stays with the error on its way through candle's.
        let message = candle_core::Error::from(error).to_string();
        assert!(message.contains("edited"), "{message}");
    }
    // A dtype that no reader of safetensors knows.
    let header = r#"{"__metadata__":{},"head.ema":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}}"#;
    let bytes = with_header(header, 1);
    std::fs::write(&file, bytes)?;
    let message = fixture.refuse("edited")?.to_string();
    assert!(message.contains("the tensor `head.ema`: ") && message.contains("edited"), "{message}");
    Ok(())
}
