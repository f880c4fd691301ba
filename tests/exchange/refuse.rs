//! Files that do not fit: an error that names what is wrong, no panic, and nothing has changed.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_adamax::{Adamax, Error, ErrorKind, ParamsAdamax};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::json;

use crate::common::Fingerprint;
use crate::common::folder::Folder;
use crate::common::parts::{Parts, with_header};
use crate::files::{GROUPS, group};
use crate::run::Run;
use crate::torch::grouped;

/// A way in, with an optimizer that has state of its own and a file that fits it.
struct Way {
    name: &'static str,
    folder: Folder,
    optimizer: Adamax,
    vars: Vec<(String, Var)>,
    good: Parts,
    load: fn(&mut Adamax, &Path) -> candle_adamax::Result<()>,
}

const ORDER: [&str; 4] = ["fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"];

fn ways() -> Result<Vec<Way>> {
    let keras = |json: &str| -> Result<ParamsAdamax> {
        Ok(ParamsAdamax::from_keras_json(&std::fs::read_to_string(crate::run::recorded(json))?)?)
    };
    let way = |name, case: &'static str, params: Option<ParamsAdamax>, load| -> Result<Way> {
        let run = Run::read(case, 0)?;
        let model = run.model("init")?;
        let mut optimizer = match params {
            Some(params) => Adamax::from_named(model.vars(), params)?,
            None => grouped(&model)?,
        };
        run.go(&model, &mut optimizer, 0..2)?;
        let good = Parts::read(&run.state())?;
        Ok(Way { name, folder: Folder::new(), optimizer, vars: model.vars(), good, load })
    };
    Ok(vec![
        way("torch", "torch_mlp", None, |optimizer, path| optimizer.load_torch(path))?,
        way("keras", "keras_extras", Some(keras("keras_extras.json")?), |optimizer, path| optimizer.load_keras(path))?,
        way("legacy", "keras_legacy", Some(keras("keras_legacy.json")?), |optimizer, path| {
            optimizer.load_keras_legacy(path, &ORDER)
        })?,
    ])
}

impl Way {
    /// Everything that a load may not change.
    fn fingerprint(&self) -> (Fingerprint, String) {
        (Fingerprint::of(&self.optimizer, &self.vars), format!("{:?}", self.optimizer.report()))
    }

    fn file(&self) -> PathBuf {
        self.folder.file("file")
    }

    fn refuse(&mut self, bytes: &[u8]) -> Result<Error> {
        let file = self.folder.write("file", bytes);
        let before = self.fingerprint();
        let loaded = (self.load)(&mut self.optimizer, &file);
        let Err(error) = loaded else { bail!("{}: loaded", self.name) };
        assert_eq!(self.fingerprint(), before, "{}: {error}", self.name);
        assert!(error.optimizer().is_some(), "{error}");
        Ok(error)
    }

    /// Edits the file that fits, and names what the error has to name.
    #[track_caller]
    fn refuse_edited(&mut self, part: &str, edit: impl FnOnce(&mut Parts)) -> Result<()> {
        let mut parts = self.good.clone();
        edit(&mut parts);
        let file = self.file();
        parts.write(&file)?;
        let error = self.refuse(&std::fs::read(&file)?)?.to_string();
        assert!(error.contains(part), "{}: `{part}` in: {error}", self.name);
        Ok(())
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let file = self.file();
        self.good.write(&file)?;
        Ok(std::fs::read(&file)?)
    }
}

#[test]
fn what_fits_is_loaded() -> Result<()> {
    for mut way in ways()? {
        let file = way.file();
        way.good.write(&file)?;
        (way.load)(&mut way.optimizer, &file)?;
        assert_eq!(way.optimizer.calls(), 50);
    }
    Ok(())
}

#[test]
fn missing_and_surplus_tensors() -> Result<()> {
    for mut way in ways()? {
        for name in way.good.tensors.keys().cloned().collect::<Vec<_>>() {
            way.refuse_edited(&format!("`{name}`: expected a tensor, got none"), |parts| {
                parts.tensors.remove(&name);
            })?;
        }
        for surplus in
            ["other", "fc1.weight", "fc1.bias.exp_avg.exp_avg", "9", "00", "+1", "mlp/fc1/bias_momentum_norm"]
        {
            way.refuse_edited(&format!("`{surplus}`: expected no such tensor"), |parts| {
                let any = parts.tensors.values().next().unwrap().clone();
                parts.tensors.insert(surplus.into(), any);
            })?;
        }
    }
    Ok(())
}

#[test]
fn other_shapes_and_dtypes() -> Result<()> {
    for mut way in ways()? {
        for (name, (_, shape, _)) in way.good.tensors.clone() {
            let is_moment = !shape.is_empty();
            let mut other = shape.clone();
            other.push(1);
            way.refuse_edited(if is_moment { "shape mismatch" } else { &name }, |parts| {
                parts.tensors.get_mut(&name).unwrap().1 = other;
            })?;
            let tensors = [DType::F64, DType::BF16, DType::I64, DType::U8];
            for dtype in tensors.into_iter().filter(|_| is_moment) {
                let tensor = Tensor::zeros(shape.as_slice(), dtype, &Device::Cpu)?;
                way.refuse_edited("dtype mismatch", |parts| parts.set(&name, &tensor).unwrap())?;
            }
            if is_moment {
                way.refuse_edited("a dtype that candle has", |parts| {
                    let size = shape.iter().product();
                    parts.tensors.insert(name.clone(), (safetensors::Dtype::BOOL, shape.clone(), vec![0; size]));
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn counters_that_are_none() -> Result<()> {
    let counters = ["fc1.weight.step", "iteration", "0"];
    for mut way in ways()? {
        let name = counters.into_iter().find(|name| way.good.tensors.contains_key(*name)).unwrap();
        for count in [-1.0, -0.5, 0.5, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
            let tensor = Tensor::new(count, &Device::Cpu)?;
            way.refuse_edited(&format!("`{name}`: expected a whole number from 0"), |parts| {
                parts.set(name, &tensor).unwrap();
            })?;
        }
        for count in [-1, i64::MIN, i64::MAX] {
            let tensor = Tensor::new(count, &Device::Cpu)?;
            way.refuse_edited(name, |parts| parts.set(name, &tensor).unwrap())?;
        }
    }
    Ok(())
}

#[test]
fn norms_that_are_negative() -> Result<()> {
    for mut way in ways()? {
        let is_norm = |name: &&String| name.ends_with("exp_inf") || name.ends_with("_norm") || *name == "7";
        let name = way.good.tensors.keys().find(is_norm).unwrap().clone();
        let shape = way.good.tensors[&name].1.clone();
        let tensor = (Tensor::ones(shape, DType::F32, &Device::Cpu)? * -1e-3)?;
        way.refuse_edited("expected numbers that are not negative, got -0.001", |parts| {
            parts.set(&name, &tensor).unwrap();
        })?;
        // What a NaN left behind is no mistake of the file.
        let mut parts = way.good.clone();
        parts.set(&name, &(tensor * f64::NAN)?)?;
        let file = way.file();
        parts.write(&file)?;
        (way.load)(&mut way.optimizer, &file)?;
    }
    Ok(())
}

#[test]
fn learning_rates_that_are_none() -> Result<()> {
    let run = Run::read("keras_mlp", 0)?;
    let model = run.model("init")?;
    let optimizer = Adamax::from_named(model.vars(), ParamsAdamax::default())?;
    let good = Parts::read(&run.state())?;
    let mut way = Way {
        name: "rate",
        folder: Folder::new(),
        optimizer,
        vars: model.vars(),
        good,
        load: |optimizer, path| optimizer.load_keras(path),
    };
    for rate in [-0.5f32, f32::NAN, f32::INFINITY] {
        let tensor = Tensor::new(rate, &Device::Cpu)?;
        way.refuse_edited("invalid `lr`", |parts| parts.set("learning_rate", &tensor).unwrap())?;
    }
    Ok(())
}

#[test]
fn settings_that_are_missing_or_garbage() -> Result<()> {
    let mut way = ways()?.swap_remove(0);
    let names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"];
    let text = |text: String| move |parts: &mut Parts| parts.set_text(GROUPS, text);
    way.refuse_edited("`param_groups`: expected the settings", |parts| parts.metadata.clear())?;
    way.refuse_edited("`param_groups`: expected the settings", |parts| {
        let text = parts.metadata.remove(GROUPS).unwrap();
        parts.set_text("groups", text);
    })?;
    for garbage in ["", "{}", "null", "[", "[null]", "[{}]", "\u{0}", "[NaN]", "[1e999]", "[{\"lr\": 1e999}]"] {
        way.refuse_edited("param_groups", text(garbage.into()))?;
    }
    for open in ["[", "{\"lr\":", "[{\"params\":["] {
        way.refuse_edited("param_groups", text(open.repeat(20_000)))?;
    }
    // A text that is longer than any settings of four variables.
    let mut long = json!([group(&names)]);
    long[0]["padding"] = json!("x".repeat(8 << 20));
    way.refuse_edited("header too large", text(long.to_string()))
}

#[test]
fn files_cut_short_and_grown() -> Result<()> {
    for mut way in ways()? {
        let good = way.bytes()?;
        for length in (0..good.len()).step_by(if cfg!(debug_assertions) { 37 } else { 3 }) {
            way.refuse(&good[..length])?;
        }
        way.refuse(&[&good[..], b"\0"].concat())?;
    }
    Ok(())
}

#[test]
fn headers_with_any_byte_changed() -> Result<()> {
    for mut way in ways()? {
        let good = way.bytes()?;
        let header = 8 + u64::from_le_bytes(good[..8].try_into()?) as usize;
        let file = way.file();
        let mut refused = 0;
        for byte in 0..header {
            let mut changed = good.clone();
            changed[byte] ^= 1 << (byte % 8);
            std::fs::write(&file, &changed)?;
            let (before, snapshot) = (way.fingerprint(), way.optimizer.snapshot()?);
            // Another file may be as good: a digit of a setting has changed.
            match (way.load)(&mut way.optimizer, &file) {
                Ok(()) => way.optimizer.restore(&snapshot)?,
                Err(error) => {
                    refused += 1;
                    assert_eq!(way.fingerprint(), before, "{error}");
                }
            }
        }
        assert!(refused > header / 2, "{}: {refused} of {header}", way.name);
    }
    Ok(())
}

#[test]
fn hostile_headers() -> Result<()> {
    let entry = |name: &str, shape: &str, begin: u64, end: u64| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
    };
    for mut way in ways()? {
        let name = way.good.tensors.keys().next().unwrap().clone();
        let headers = [
            String::new(),
            "{".into(),
            "[]".into(),
            "{}".into(),
            "null".into(),
            "{\"__metadata__\":[]}".into(),
            "{\"__metadata__\":{\"param_groups\":7}}".into(),
            "{\"__metadata__\":{},\"__metadata__\":{}}".into(),
            "{\"__metadata__\":{\"param_groups\":\"[]\",\"param_groups\":\"[]\"}}".into(),
            format!("{{{}}}", entry(&name, "[1099511627776]", 0, 1 << 42)),
            format!("{{{}}}", entry(&name, "[4294967296,4294967296,4]", 0, 4)),
            format!("{{{}}}", entry(&name, "[0,9223372036854775807,9223372036854775807]", 0, 0)),
            format!("{{{}}}", entry(&name, "[1]", 4, 0)),
            format!("{{{}}}", entry(&name, "[1]", 4, 8)),
            format!("{{{}}}", entry(&name, "[1]", u64::MAX - 3, u64::MAX)),
            format!("{{{}}}", entry(&name, "[-1]", 0, 4)),
            format!("{{{}}}", entry(&name, "[1e3]", 0, 4000)),
            format!("{{{}}}", entry(&name, &format!("[{}1]", "1,".repeat(64)), 0, 4)),
            format!("{{{},{}}}", entry(&name, "[]", 0, 4), entry(&name, "[]", 0, 4)),
            format!("{{\"{name}\":{}", "[".repeat(100_000)),
            format!("{{\"other\":{}", "[".repeat(100_000)),
            format!("{{{}}}", (0..20_000).map(|i| entry(&format!("t{i}"), "[0]", 0, 0)).collect::<Vec<_>>().join(",")),
        ];
        for header in headers {
            for data in [0, 4, 4000] {
                way.refuse(&with_header(&header, data))?;
            }
        }
        for length in [1, 100, 1 << 20, 1 << 40, i64::MAX as u64, u64::MAX] {
            let mut bytes = way.bytes()?;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            way.refuse(&bytes)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_no_file() -> Result<()> {
    for mut way in ways()? {
        let before = way.fingerprint();
        for path in ["not there".into(), way.folder.path().into(), PathBuf::new()] {
            let error = (way.load)(&mut way.optimizer, &path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { action: "reading", .. }), "{error}");
            assert_eq!(way.fingerprint(), before);
        }
    }
    Ok(())
}
