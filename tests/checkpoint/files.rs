//! Where files go: any path, the same bytes for the same state, and nothing left beside them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_adamax::{Adamax, ErrorKind, ParamsAdamax, SparseUpdate, Table};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::folder::Folder;
#[cfg(unix)]
use crate::common::process::through_shell;
use crate::common::process::{child, is_child};
use crate::common::{Fingerprint, bits};
use crate::support::Model;

fn trained(calls: u64) -> Result<(Model, Adamax)> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.optimizer(ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() })?;
    model.run(&mut optimizer, 0..calls, false)?;
    Ok((model, optimizer))
}

/// Everything in a folder, hidden or not.
pub(crate) fn listing(folder: &Path) -> Result<Vec<OsString>> {
    let mut names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn the_same_state_has_the_same_bytes() -> Result<()> {
    let folder = Folder::new();
    let bytes = |optimizer: &Adamax, name: &str| -> Result<Vec<u8>> {
        optimizer.save(folder.file(name))?;
        Ok(std::fs::read(folder.file(name))?)
    };
    let (model, optimizer) = trained(3)?;
    let first = bytes(&optimizer, "first")?;
    assert_eq!(bytes(&optimizer, "second")?, first);
    // Another optimizer that was given its variables in another order and has the state from the file.
    let mut resumed = model.copy()?.optimizer(ParamsAdamax::default())?;
    resumed.load(folder.file("first"))?;
    assert_eq!(bytes(&resumed, "third")?, first);
    // Another run, with hash maps of its own.
    assert_eq!(bytes(&trained(3)?.1, "fourth")?, first);
    assert_ne!(bytes(&trained(4)?.1, "fifth")?, first);
    Ok(())
}

#[test]
fn over_an_existing_file() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    std::fs::write(&file, vec![7; 1 << 20])?;
    for calls in 0..3 {
        let (model, optimizer) = trained(calls)?;
        optimizer.save(&file)?;
        let mut resumed = model.optimizer(ParamsAdamax::default())?;
        resumed.load(&file)?;
        assert_eq!(resumed.calls(), calls);
        assert_eq!(listing(folder.path())?, ["optimizer.safetensors"]);
    }
    Ok(())
}

#[test]
fn by_a_relative_path() -> Result<()> {
    let folder = Folder::new();
    let up = std::env::current_dir()?.components().skip(1).map(|_| "..").collect::<PathBuf>();
    let below_root = folder.path().components().skip(1).collect::<PathBuf>();
    let file = up.join(below_root).join("relative");
    assert!(file.is_relative());
    let (model, optimizer) = trained(3)?;
    optimizer.save(&file)?;
    model.optimizer(ParamsAdamax::default())?.load(&file)?;
    assert_eq!(listing(folder.path())?, ["relative"]);
    Ok(())
}

#[test]
fn by_a_name_alone() -> Result<()> {
    if is_child() {
        return in_the_current_folder();
    }
    // The current folder belongs to all tests of a process, so that another process has to do it.
    let folder = Folder::new();
    let output = child("files::by_a_name_alone")?.current_dir(folder.path()).output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(listing(folder.path())?, ["name"]);
    Ok(())
}

fn in_the_current_folder() -> Result<()> {
    let (model, optimizer) = trained(3)?;
    optimizer.save("name")?;
    let mut resumed = model.optimizer(ParamsAdamax::default())?;
    resumed.load("name")?;
    assert_eq!(Fingerprint::of(&resumed, &[]), Fingerprint::of(&optimizer, &[]));
    Ok(())
}

#[test]
fn into_a_missing_folder_is_an_error() -> Result<()> {
    let folder = Folder::new();
    let (_, optimizer) = trained(1)?;
    let file = folder.file("missing").join("optimizer.safetensors");
    let error = optimizer.save(&file).err().context("a folder was made for the file")?;
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    assert!(error.to_string().contains("missing"), "{error}");
    assert!(listing(folder.path())?.is_empty(), "a folder was made all the same");
    Ok(())
}

#[test]
fn where_no_file_can_be_is_an_error() -> Result<()> {
    let folder = Folder::new();
    let (_, optimizer) = trained(1)?;
    std::fs::create_dir(folder.file("folder"))?;
    std::fs::write(folder.file("folder").join("content"), "kept")?;
    std::fs::write(folder.file("file"), "kept")?;
    for path in [PathBuf::new(), folder.file(".."), folder.file("folder"), folder.file("file").join("below")] {
        let error = optimizer.save(&path).err().with_context(|| format!("{path:?}"))?;
        assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    }
    assert_eq!(listing(folder.path())?, ["file", "folder"], "a save that fails leaves nothing");
    assert_eq!(std::fs::read(folder.file("folder").join("content"))?, b"kept");
    assert_eq!(std::fs::read(folder.file("file"))?, b"kept");
    Ok(())
}

#[test]
fn what_killed_saves_left_is_swept_and_what_goes_on_is_not() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let (model, optimizer) = trained(3)?;
    for save in 0..100 {
        let left = format!(".candle-adamax-{}-{save}-0123456789abcdef.saving", std::process::id());
        std::fs::write(folder.file(&left), "junk that is longer than nothing")?;
    }
    // Another process is writing this one, and these are none.
    let going_on = ".candle-adamax-4711-0-0123456789abcdef.saving";
    let lock = std::fs::File::create(folder.file(going_on))?;
    lock.lock()?;
    let others = [".candle-adamax-folder.saving", ".candle-adamax-4711-0.safetensors", ".other.saving"];
    std::fs::create_dir(folder.file(others[0]))?;
    std::fs::write(folder.file(others[1]), "kept")?;
    std::fs::write(folder.file(others[2]), "kept")?;
    for _ in 0..2 {
        optimizer.save(&file)?;
        let mut expected = [others.as_slice(), &[going_on, "optimizer.safetensors"]].concat();
        expected.sort_unstable();
        assert_eq!(listing(folder.path())?, expected);
        let mut resumed = model.optimizer(ParamsAdamax::default())?;
        resumed.load(&file)?;
        assert_eq!(Fingerprint::of(&resumed, &[]), Fingerprint::of(&optimizer, &[]));
    }
    drop(lock);
    optimizer.save(&file)?;
    assert!(!folder.file(going_on).exists());
    Ok(())
}

/// A disk that is full, as the system has it for one process.
#[cfg(unix)]
#[test]
fn a_save_that_fails_half_way_leaves_the_old_file() -> Result<()> {
    if is_child() {
        for save in [Adamax::save, Adamax::save_keras] as [fn(&Adamax, PathBuf) -> candle_adamax::Result<()>; 2] {
            let model = Model::new(DType::F32)?;
            let error = save(&model.optimizer(ParamsAdamax::default())?, "state".into()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { action: "writing", .. }), "{error}");
            assert!(error.to_string().contains("\"state\""), "{error}");
        }
        return Ok(());
    }
    let folder = Folder::new();
    let file = folder.file("state");
    trained(3)?.1.save(&file)?;
    let before = std::fs::read(&file)?;
    let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"";
    let output =
        through_shell(script, "files::a_save_that_fails_half_way_leaves_the_old_file", folder.path())?.output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(&file)?, before);
    assert_eq!(listing(folder.path())?, ["state"], "what was written so far takes no room");
    Ok(())
}

#[test]
fn a_save_that_cannot_begin_changes_no_row() -> Result<()> {
    let folder = Folder::new();
    let mut places = vec![folder.file("missing").join("state")];
    if cfg!(unix) {
        // A file cannot have these names, which only the rename would find out.
        places.extend(["missing/", "missing/."].map(|name| folder.file(name)));
    }
    type Save = fn(&Adamax, &Path) -> candle_adamax::Result<()>;
    let keras = ParamsAdamax { lr: 0.1.into(), ..Default::default() };
    let ways: [(ParamsAdamax, Save); 6] = [
        (keras.clone(), |optimizer, path| optimizer.save(path)),
        (keras.clone(), |optimizer, path| optimizer.save_keras(path)),
        (keras.clone(), |optimizer, path| optimizer.save_keras_legacy(path, &["table"])),
        (ParamsAdamax { lr: 0.1.into(), ..ParamsAdamax::pytorch() }, |optimizer, path| optimizer.save_torch(path)),
        // What the other side cannot hold.
        (keras, |optimizer, path| optimizer.save_torch(path.ancestors().nth(2).unwrap().join("torch"))),
        (ParamsAdamax::pytorch(), |optimizer, path| {
            optimizer.save_keras(path.ancestors().nth(2).unwrap().join("keras"))
        }),
    ];
    for ((params, save), nowhere) in ways.iter().flat_map(|way| places.iter().map(move |place| (way, place))) {
        let var = Var::ones((8, 2), DType::F32, &Device::Cpu)?;
        let table = Table::new(&var)?;
        let params = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..params.clone() };
        let mut optimizer = Adamax::from_named([("table", var.clone())], params)?;
        for row in [0u32, 1, 1, 1] {
            optimizer.backward_step(&table.lookup(&Tensor::new(&[row], &Device::Cpu)?)?.sum_all()?)?;
        }
        let before = bits(&var);
        save(&optimizer, nowhere).unwrap_err();
        assert_eq!(bits(&var), before);
        optimizer.catch_up()?;
        assert_ne!(bits(&var), before, "row 0 has missed three updates");
    }
    assert!(listing(folder.path())?.is_empty());
    Ok(())
}

#[test]
fn files_side_by_side_at_once() -> Result<()> {
    let folder = Folder::new();
    let save = |name: String, calls: u64| -> Result<()> {
        let (model, optimizer) = trained(calls)?;
        for _ in 0..10 {
            optimizer.save(folder.file(&name))?;
            let mut resumed = model.optimizer(ParamsAdamax::default())?;
            resumed.load(folder.file(&name))?;
            assert_eq!(resumed.calls(), calls);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || save(format!("state.{i}"), i))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    assert_eq!(listing(folder.path())?, ["state.0", "state.1", "state.2", "state.3"]);
    Ok(())
}

#[test]
fn one_file_from_several_threads_at_once() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("state");
    trained(0)?.1.save(&file)?;
    let save = |calls: u64| -> Result<()> {
        let (model, optimizer) = trained(calls)?;
        for _ in 0..25 {
            optimizer.save(&file)?;
            // One of the four, whole.
            let mut resumed = model.optimizer(ParamsAdamax::default())?;
            resumed.load(&file)?;
            assert!(resumed.calls() < 4);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|calls| scope.spawn(move || save(calls))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    assert_eq!(listing(folder.path())?, ["state"]);
    Ok(())
}

#[test]
fn one_file_from_several_processes_at_once() -> Result<()> {
    const SAVES: u64 = 100;
    if is_child() {
        let (model, optimizer) = trained(2)?;
        for _ in 0..SAVES {
            optimizer.save("state")?;
            model.optimizer(ParamsAdamax::default())?.load("state")?;
        }
        return Ok(());
    }
    let folder = Folder::new();
    let spawn = |_| Ok(child("files::one_file_from_several_processes_at_once")?.current_dir(folder.path()).spawn()?);
    for mut process in (0..4).map(spawn).collect::<Result<Vec<_>>>()? {
        assert!(process.wait()?.success());
    }
    assert_eq!(listing(folder.path())?, ["state"]);
    Ok(())
}
