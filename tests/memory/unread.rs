//! A file that does not fit is refused by its header: nothing after it is read.

use std::path::Path;

use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::{DType, Device, Var};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use crate::common::folder::Folder;
use crate::common::parts::with_header;
use crate::common::process::has_passed_alone;
use crate::measure::peak;

/// The elements of a large variable, whose memory nobody writes to.
const LARGE: usize = 1 << 27;
/// What is read of these files, and what it takes in memory.
const SMALL: usize = 64 << 10;

/// The bytes that this process has read.
fn bytes_read() -> usize {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

/// Makes a file of an optimizer with the variables `a` and `z`, of one element each, one in which `a` is large and the norm
/// of `z`, called `wrong`, has too many elements. All elements are a hole of 3 GiB.
fn grow(file: &Path, wrong: &str) {
    let bytes = std::fs::read(file).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut end = 0;
    let tensors = header.offset_keys().into_iter().map(|name| {
        let mut info = header.info(&name).unwrap().clone();
        let elements = match name.as_str() {
            name if name == wrong => 4 * LARGE,
            "a.exp_avg" | "a.exp_inf" | "a_momentum" | "a_norm" | "1" | "3" => LARGE,
            _ => 1,
        };
        if !info.shape.is_empty() {
            info.shape = vec![elements];
        }
        info.data_offsets = (end, end + elements * info.dtype.bitsize() / 8);
        end = info.data_offsets.1;
        (name, info)
    });
    let header = Metadata::new(header.metadata().clone(), tensors.collect()).unwrap();
    let bytes = with_header(&serde_json::to_string(&header).unwrap(), 0);
    std::fs::write(file, &bytes).unwrap();
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();
}

type Save = fn(&Adamax, &Path) -> candle_adamax::Result<()>;
type Load = fn(&mut Adamax, &Path) -> candle_adamax::Result<()>;

#[test]
fn a_shape_is_refused_by_the_header() {
    if has_passed_alone("unread::a_shape_is_refused_by_the_header") {
        return;
    }
    let optimizer = |elements: usize, params: &ParamsAdamax| {
        let var = |elements| Var::zeros(elements, DType::F32, &Device::Cpu).unwrap();
        Adamax::from_named([("a", var(elements)), ("z", var(1))], params.clone()).unwrap()
    };
    let (keras, torch) = (ParamsAdamax::default(), ParamsAdamax::pytorch());
    let ways: [(&ParamsAdamax, &str, Save, Load); 5] = [
        (&keras, "z.exp_inf", |from, path| from.save(path), |to, path| to.load(path)),
        (&keras, "z.exp_inf", |from, path| from.save(path), |to, path| to.load_matching(path).map(drop)),
        (&torch, "z.exp_inf", |from, path| from.save_torch(path), |to, path| to.load_torch(path)),
        (&keras, "z_norm", |from, path| from.save_keras(path), |to, path| to.load_keras(path)),
        (
            &keras,
            "4",
            |from, path| from.save_keras_legacy(path, &["a", "z"]),
            |to, path| to.load_keras_legacy(path, &["a", "z"]),
        ),
    ];
    let folder = Folder::new();
    for (way, (params, wrong, save, load)) in ways.into_iter().enumerate() {
        let file = folder.file(way.to_string());
        save(&optimizer(1, params), &file).unwrap();
        grow(&file, wrong);
        assert!(file.metadata().unwrap().len() > 3 << 30);
        let mut optimizer = optimizer(LARGE, params);
        let before = bytes_read();
        let (loaded, peak) = peak(|| load(&mut optimizer, &file));
        let read = bytes_read() - before;
        let error = loaded.unwrap_err();
        let expected = format!("exp_inf shape mismatch for `z`: expected [1], got [{}]", 4 * LARGE);
        assert!(error.to_string().contains(&expected), "way {way}: {error}");
        assert_eq!(error.path(), Some(file.as_path()), "way {way}");
        assert!(read < SMALL && peak < SMALL, "way {way}: {read} bytes read, {peak} of memory");
    }
}
