//! Where files go: any path, the same bytes for the same state, and nothing left beside them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_adamax::{Adamax, ErrorKind, ParamsAdamax};
use candle_core::DType;

use crate::kill::{child, is_child};
use crate::support::{Folder, Model, fingerprint};

fn trained(calls: u64) -> Result<(Model, Adamax)> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.optimizer(ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() })?;
    model.run(&mut optimizer, 0..calls, false)?;
    Ok((model, optimizer))
}

/// Everything in a folder, hidden or not.
fn listing(folder: &Path) -> Result<Vec<OsString>> {
    let mut names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn the_same_state_has_the_same_bytes() -> Result<()> {
    let folder = Folder::new()?;
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
    let folder = Folder::new()?;
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
    let folder = Folder::new()?;
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
    let folder = Folder::new()?;
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
    assert_eq!(fingerprint(&resumed)?, fingerprint(&optimizer)?);
    Ok(())
}

#[test]
fn into_a_missing_folder_is_an_error() -> Result<()> {
    let folder = Folder::new()?;
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
    let folder = Folder::new()?;
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
fn what_a_killed_save_left_is_no_obstacle_and_is_swept() -> Result<()> {
    let folder = Folder::new()?;
    let file = folder.file("optimizer.safetensors");
    let (model, optimizer) = trained(3)?;
    for existing in [false, true] {
        let left = folder.file(".optimizer.safetensors.saving");
        std::fs::create_dir_all(left.join("a folder"))?;
        std::fs::write(left.join("a folder").join("junk"), "junk")?;
        std::fs::write(left.join("4711-0"), vec![0; 100_000])?;
        // The next saves of this very process would use these names.
        for save in 0..1000 {
            std::fs::write(left.join(format!("{}-{save}", std::process::id())), "junk that is longer than nothing")?;
        }
        assert_eq!(file.exists(), existing);
        optimizer.save(&file)?;
        assert_eq!(listing(folder.path())?, ["optimizer.safetensors"]);
        let mut resumed = model.optimizer(ParamsAdamax::default())?;
        resumed.load(&file)?;
        assert_eq!(fingerprint(&resumed)?, fingerprint(&optimizer)?);
    }
    Ok(())
}

#[test]
fn a_save_that_fails_leaves_the_old_file() -> Result<()> {
    let folder = Folder::new()?;
    let file = folder.file("optimizer.safetensors");
    let (_, optimizer) = trained(3)?;
    optimizer.save(&file)?;
    let before = std::fs::read(&file)?;
    // A file where the folder for the new one should be.
    std::fs::write(folder.file(".optimizer.safetensors.saving"), "in the way")?;
    let error = trained(4)?.1.save(&file).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    assert_eq!(std::fs::read(&file)?, before);
    Ok(())
}

#[test]
fn files_side_by_side_at_once() -> Result<()> {
    let folder = Folder::new()?;
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
    let folder = Folder::new()?;
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
    })
}
