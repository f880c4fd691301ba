//! Reading a file takes no more memory than the file has bytes, whatever its header says.

use std::path::Path;

use candle_adamax::{Adamax, ParamsAdamax, Snapshot};
use candle_core::{DType, Device, Var};

use crate::common::folder::Folder;
use crate::common::parts::with_header;
use crate::common::process::has_passed_alone;
use crate::measure::peak;

/// What names, paths and errors take.
const SMALL: usize = 64 << 10;

fn entry(name: &str, shape: &str, end: u64) -> String {
    format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{end}]}}")
}

type Load = fn(&mut Adamax, &Path) -> candle_adamax::Result<()>;

#[test]
fn no_more_than_the_file() {
    if has_passed_alone("files::no_more_than_the_file") {
        return;
    }
    let var = || Var::ones((1000, 64), DType::F32, &Device::Cpu).unwrap();
    let mut torch = Adamax::from_named([("w", var())], ParamsAdamax::pytorch()).unwrap();
    let mut keras = Adamax::from_named([("w", var())], ParamsAdamax::default()).unwrap();
    let folder = Folder::new();
    let [torch_file, keras_file, native_file] = ["torch", "keras", "native"].map(|name| folder.file(name));
    torch.save_torch(&torch_file).unwrap();
    keras.save_keras(&keras_file).unwrap();
    torch.save(&native_file).unwrap();
    let ways: [(&mut Adamax, &Path, &str, Load); 3] = [
        (&mut torch, &torch_file, "w.exp_avg", |optimizer, path| optimizer.load_torch(path)),
        (&mut keras, &keras_file, "w_momentum", |optimizer, path| optimizer.load_keras(path)),
        (&mut Adamax::from_named([("w", var())], ParamsAdamax::pytorch()).unwrap(), &native_file, "w.exp_avg", {
            |optimizer, path| optimizer.load(path)
        }),
    ];
    let bad = folder.file("bad");
    for (optimizer, good, name, load) in ways {
        let many = |of: &dyn Fn(usize) -> String| (0..50_000).map(of).collect::<Vec<_>>().join(",");
        let good = std::fs::read(good).unwrap();
        let mut long_header = good.clone();
        long_header[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        let mut last_byte_missing = good.clone();
        last_byte_missing.pop();
        let files = [
            ("a header of a terabyte", long_header),
            ("a file cut short", last_byte_missing),
            ("a tensor of a terabyte", with_header(&format!("{{{}}}", entry(name, "[1099511627776]", 1 << 42)), 4)),
            ("no elements, huge dimensions", {
                with_header(&format!("{{{}}}", entry(name, "[0,9223372036854775807,9223372036854775807]", 0)), 0)
            }),
            (
                "a million dimensions",
                with_header(&format!("{{{}}}", entry(name, &format!("[{}1]", "1,".repeat(1 << 20)), 4)), 4),
            ),
            ("many names", with_header(&format!("{{{}}}", many(&|i| entry(&format!("t{i}"), "[0]", 0))), 0)),
            ("many texts", with_header(&format!("{{\"__metadata__\":{{{}}}}}", many(&|i| format!("\"{i}\":\"\""))), 0)),
            ("deep", with_header(&"[".repeat(1 << 20), 0)),
            ("spaces", with_header(&" ".repeat(64 << 20), 0)),
        ];
        for (what, bytes) in files {
            std::fs::write(&bad, &bytes).unwrap();
            let length = bytes.len();
            drop(bytes);
            let (loaded, peak) = peak(|| load(optimizer, &bad));
            let error = loaded.unwrap_err();
            assert!(peak <= length + SMALL, "{what}: {peak} bytes of memory for {length} of a file: {error}");
        }
    }
    settings_of_many_values(
        &mut torch,
        "param_groups",
        &format!("[{}]", "\"\",".repeat(200_000)),
        |optimizer, path| optimizer.load_torch(path),
    );
    let lr = format!("{{\"format_version\":1,\"params\":{{\"lr\":[{}0]}}}}", "0,".repeat(400_000));
    settings_of_many_values(&mut torch, "candle_adamax", &lr, |optimizer, path| optimizer.load(path));
    // Objects in objects, which have no commas: as deep as a parser goes, and side by side.
    let deep = format!("{}0{}", "{\"\":".repeat(100), "}".repeat(100));
    let nested = (0..1500).map(|_| deep.as_str()).collect::<Vec<_>>().join(",");
    let empty = vec!["{\"\":0}"; 100_000].join(",");
    for hostile in [&nested, &empty] {
        let groups = format!("[{{\"lr\":0,\"other\":[{hostile}]}}]");
        settings_of_many_values(&mut torch, "param_groups", &groups, |optimizer, path| optimizer.load_torch(path));
        let lr = format!("{{\"format_version\":1,\"params\":{{\"lr\":[{hostile}]}}}}");
        settings_of_many_values(&mut torch, "candle_adamax", &lr, |optimizer, path| optimizer.load(path));
        settings_of_many_values(&mut torch, "candle_adamax", &lr, |_, path| Snapshot::read(path).map(drop));
    }
    // Just below what is refused by its number.
    let most = vec![deep.as_str(); 38].join(",");
    let lr = format!("{{\"format_version\":1,\"params\":{{\"lr\":[{most}]}}}}");
    let header = format!("{{\"__metadata__\":{{\"candle_adamax\":\"{}\"}}}}", lr.replace('"', "\\\""));
    std::fs::write(&bad, with_header(&header, 0)).unwrap();
    let (loaded, peak) = peak(|| torch.load(&bad));
    let error = loaded.unwrap_err().to_string();
    assert!(!error.contains("values of settings"), "{error}");
    assert!(peak <= 4 << 20, "{peak} bytes of memory for {} of a file", header.len());
    // A file of any variables, as it is read into a snapshot: a few times its header.
    let many = (0..50_000).map(|i| entry(&format!("t{i}"), "[0]", 0)).collect::<Vec<_>>().join(",");
    let header = format!("{{{many}}}");
    std::fs::write(&bad, with_header(&header, 0)).unwrap();
    let (read, peak) = self::peak(|| Snapshot::read(&bad));
    read.unwrap_err();
    assert!(peak <= 12 * header.len(), "{peak} bytes of memory for {} of a file", header.len());
}

/// A text of settings, whose values take far more memory than their digits, is refused by their number.
fn settings_of_many_values(optimizer: &mut Adamax, key: &str, text: &str, load: Load) {
    let header = format!("{{\"__metadata__\":{{\"{key}\":\"{}\"}}}}", text.replace('"', "\\\""));
    let folder = Folder::new();
    let bad = folder.file("settings");
    let length = header.len();
    std::fs::write(&bad, with_header(&header, 0)).unwrap();
    let (loaded, peak) = peak(|| load(optimizer, &bad));
    let error = loaded.unwrap_err().to_string();
    assert!(error.contains("values of settings"), "{error}");
    // The header, the text that is being unescaped, and the text.
    assert!(peak <= 4 * length + SMALL, "{peak} bytes of memory for {length} of a file");
}
