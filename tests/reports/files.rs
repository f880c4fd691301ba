//! Files of state.

use std::collections::BTreeMap;
use std::path::Path;

use candle_adamax::{Adamax, ParamsAdamax, StateDType};
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;

use crate::common::folder::Folder;
use crate::common::parts::Parts;
use crate::common::{bits, noise, tensor, var};

fn model(names: &[&str]) -> BTreeMap<String, Var> {
    names.iter().map(|name| ((*name).to_owned(), var(&noise(name.len() as u64, 6), &[6], DType::F32))).collect()
}

fn optimizer(model: &BTreeMap<String, Var>, params: ParamsAdamax) -> Adamax {
    Adamax::from_named(model.iter().map(|(name, var)| (name.clone(), var.clone())), params).unwrap()
}

/// A call with gradients that follow from its number.
fn step(optimizer: &mut Adamax, model: &BTreeMap<String, Var>, call: u64) {
    let gradients: Vec<Tensor> =
        (0..model.len() as u64).map(|k| tensor(&noise(1000 * call + k, 6), &[6], DType::F32)).collect();
    optimizer.apply_gradients(model.values().zip(&gradients)).unwrap();
}

// safetensors/safetensors#782, UKPLab/sentence-transformers#4010
#[cfg(unix)]
#[test]
fn saved_files_can_be_read_by_whom_the_umask_allows() {
    use std::os::unix::fs::PermissionsExt;

    use crate::program::{mode, usual_mode};

    let folder = Folder::new();
    let usual = usual_mode(folder.path());
    let model = model(&["w"]);
    let mut optimizer = optimizer(&model, ParamsAdamax::default());
    step(&mut optimizer, &model, 0);
    type Write = fn(&Adamax, &Path);
    let writers: [(&str, Write); 3] = [
        ("native", |optimizer, path| optimizer.save(path).unwrap()),
        ("keras", |optimizer, path| optimizer.save_keras(path).unwrap()),
        ("legacy", |optimizer, path| optimizer.save_keras_legacy(path, &["w"]).unwrap()),
    ];
    for (name, write) in writers {
        let path = folder.file(name);
        write(&optimizer, &path);
        assert_eq!(mode(&path), usual, "{name}: {:o}", mode(&path));
        // A file that is there keeps its mode.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        write(&optimizer, &path);
        assert_eq!(mode(&path), 0o640, "{name}: {:o}", mode(&path));
        // And a link stays a link.
        let (target, link) = (folder.file(format!("{name}.target")), folder.file(format!("{name}.link")));
        std::fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write(&optimizer, &link);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink(), "{name}");
        assert!(std::fs::metadata(&target).unwrap().len() > 3, "{name}");
    }
    let torch = self::optimizer(&model, ParamsAdamax::pytorch());
    torch.save_torch(folder.file("torch")).unwrap();
    assert_eq!(mode(&folder.file("torch")), usual);
}

// bitsandbytes-foundation/bitsandbytes#1647, pytorch/torchtitan#4615
#[test]
fn a_file_in_another_encoding_goes_on_with_the_same_bits() {
    let folder = Folder::new();
    let dtypes = [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8];
    for of_file in dtypes {
        let (model, path) = (model(&["a", "b"]), folder.file("state"));
        let mut unbroken = optimizer(&model, ParamsAdamax { state_dtype: of_file, ..Default::default() });
        (0..5).for_each(|call| step(&mut unbroken, &model, call));
        unbroken.save(&path).unwrap();
        let at_save: BTreeMap<String, Tensor> =
            model.iter().map(|(name, var)| (name.clone(), var.copy().unwrap())).collect();
        (5..10).for_each(|call| step(&mut unbroken, &model, call));
        for of_optimizer in dtypes {
            let resumed: BTreeMap<String, Var> =
                at_save.iter().map(|(name, w)| (name.clone(), Var::from_tensor(w).unwrap())).collect();
            let params = ParamsAdamax { state_dtype: of_optimizer, ..Default::default() };
            let mut other = optimizer(&resumed, params);
            // The file's settings hold, so its encoding is the one that goes on.
            other.load(&path).unwrap();
            assert_eq!(other.params().state_dtype, of_file);
            (5..10).for_each(|call| step(&mut other, &resumed, call));
            for (name, var) in &model {
                assert_eq!(bits(&resumed[name]), bits(var), "{of_file:?} into {of_optimizer:?}");
            }
        }
    }
}

// pytorch/pytorch#34660
#[test]
fn a_checkpoint_loads_into_a_model_with_a_new_head() {
    let (folder, old) = (Folder::new(), model(&["body.weight", "head.weight"]));
    let mut first = optimizer(&old, ParamsAdamax::default());
    (0..3).for_each(|call| step(&mut first, &old, call));
    first.save(folder.file("state")).unwrap();

    let mut new = model(&["body.weight", "classifier.weight"]);
    new.insert("body.weight".into(), old["body.weight"].clone());
    let mut second = optimizer(&new, ParamsAdamax::default());
    let error = second.load(folder.file("state")).unwrap_err().to_string();
    assert!(error.contains("classifier.weight") || error.contains("head.weight"), "{error}");
    assert_eq!(second.updates(), 0);

    second.load_matching(folder.file("state")).unwrap();
    let state = |optimizer: &Adamax, name: &str| optimizer.state(name).unwrap();
    assert_eq!(bits(&state(&second, "body.weight").exp_avg), bits(&state(&first, "body.weight").exp_avg));
    assert_eq!(state(&second, "body.weight").step, 3);
    assert_eq!((state(&second, "classifier.weight").step, second.updates()), (0, 3));
    step(&mut second, &new, 3);
}

// facebookresearch/ConvNeXt-V2#40
#[test]
fn keys_that_others_keep_in_param_groups_do_not_matter() {
    let (folder, model) = (Folder::new(), model(&["w"]));
    let mut optimizer = optimizer(&model, ParamsAdamax::pytorch());
    step(&mut optimizer, &model, 0);
    let path = folder.file("torch");
    optimizer.save_torch(&path).unwrap();
    // `SWALR` of PyTorch leaves its learning rate in the groups.
    let mut parts = Parts::read(&path).unwrap();
    let mut groups = parts.json("param_groups").unwrap();
    groups[0]["swa_lr"] = 0.05.into();
    parts.set_text("param_groups", groups);
    parts.write(&path).unwrap();
    optimizer.load_torch(&path).unwrap();
    assert_eq!(optimizer.updates(), 1);
    assert_eq!(optimizer.learning_rate(), 2e-3);
}

// huggingface/safetensors#782
#[test]
fn a_save_that_fails_leaves_the_file_as_it_was() {
    let (folder, model) = (Folder::new(), model(&["w"]));
    let optimizer = optimizer(&model, ParamsAdamax::default());
    let error = optimizer.save(folder.file("none/state")).unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
