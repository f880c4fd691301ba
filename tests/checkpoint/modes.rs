//! Whose files are, and who may read them: as any program of the user writes them.

use std::fs::{self, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use candle_adamax::{Adamax, ErrorKind, ParamsAdamax};
use candle_core::{Device, Var};

use crate::common::folder::Folder;
use crate::common::process::{child, is_child, through_shell};
use crate::files::listing;

/// Every way in which the crate writes a file.
const WAYS: [&str; 5] = ["native", "snapshot", "keras", "legacy", "torch"];

fn save(way: &str, path: impl AsRef<Path>) -> candle_adamax::Result<()> {
    let var = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    let params = if way == "torch" { ParamsAdamax::pytorch() } else { ParamsAdamax::default() };
    let optimizer = Adamax::from_named([("w", var)], params)?;
    match way {
        "native" => optimizer.save(path),
        "snapshot" => optimizer.snapshot()?.write(path),
        "keras" => optimizer.save_keras(path),
        "legacy" => optimizer.save_keras_legacy(path, &["w"]),
        _ => optimizer.save_torch(path),
    }
}

fn mode(path: impl AsRef<Path>) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

#[test]
fn a_new_file_has_what_the_umask_leaves() -> Result<()> {
    if is_child() {
        return Ok(WAYS.iter().try_for_each(|way| save(way, way))?);
    }
    for umask in [0o022, 0o002, 0o077, 0o000] {
        let folder = Folder::new();
        let script = format!("umask {umask:03o}; exec \"$0\" \"$@\"");
        let output = through_shell(&script, "modes::a_new_file_has_what_the_umask_leaves", folder.path())?.output()?;
        assert!(output.status.success(), "{output:?}");
        for way in WAYS {
            assert_eq!(mode(folder.file(way))?, 0o666 & !umask, "{way}, umask {umask:03o}");
        }
    }
    Ok(())
}

#[test]
fn a_file_that_is_replaced_leaves_its_mode_and_owner() -> Result<()> {
    for way in WAYS {
        let folder = Folder::new();
        let file = folder.file("state");
        fs::write(&file, "old")?;
        for mode_before in [0o664, 0o600, 0o640, 0o606, 0o777] {
            fs::set_permissions(&file, Permissions::from_mode(mode_before))?;
            save(way, &file)?;
            assert_eq!(mode(&file)?, mode_before, "{way}");
        }
        // Only root may give files away.
        if chown(&file, Some(1234), Some(5678)).is_ok() {
            fs::set_permissions(&file, Permissions::from_mode(0o640))?;
            save(way, &file)?;
            let metadata = fs::metadata(&file)?;
            assert_eq!((metadata.uid(), metadata.gid(), mode(&file)?), (1234, 5678, 0o640), "{way}");
        }
    }
    Ok(())
}

#[test]
fn links_are_followed() -> Result<()> {
    for way in WAYS {
        let folder = Folder::new();
        fs::create_dir(folder.file("there"))?;
        fs::create_dir(folder.file("links"))?;
        let (target, absolute, chained) =
            (folder.file("there").join("state"), folder.file("absolute"), folder.file("chained"));
        let relative = folder.file("links").join("relative");
        symlink("../there/state", &relative)?;
        symlink(&target, &absolute)?;
        symlink("links/relative", &chained)?;
        for link in [&chained, &absolute, &relative] {
            // To nothing, and to a file.
            let _ = fs::remove_file(&target);
            for _ in 0..2 {
                save(way, link)?;
                assert!(fs::symlink_metadata(link)?.is_symlink(), "{way}: {link:?} is no link any more");
                assert!(fs::symlink_metadata(&target)?.is_file(), "{way}: {link:?}");
                assert_eq!(listing(target.parent().unwrap())?, ["state"]);
            }
        }
        fs::set_permissions(&target, Permissions::from_mode(0o604))?;
        save(way, &chained)?;
        assert_eq!(mode(&target)?, 0o604);
        // By a link to a folder, and where links lead nowhere.
        symlink("there", folder.file("folder"))?;
        save(way, folder.file("folder").join("other"))?;
        assert!(folder.file("there").join("other").is_file());
        symlink("circle", folder.file("circle"))?;
        symlink("missing/state", folder.file("dangling"))?;
        for link in ["circle", "dangling", "folder"] {
            let error = save(way, folder.file(link)).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
            assert!(error.to_string().contains(link), "{error}");
            assert!(fs::symlink_metadata(folder.file(link))?.is_symlink());
        }
    }
    Ok(())
}

#[test]
fn other_names_of_a_file_keep_the_old_content() -> Result<()> {
    let folder = Folder::new();
    fs::write(folder.file("state"), "old")?;
    fs::hard_link(folder.file("state"), folder.file("backup"))?;
    save("native", folder.file("state"))?;
    assert_eq!(fs::read(folder.file("backup"))?, b"old");
    assert_eq!(fs::metadata(folder.file("state"))?.nlink(), 1);
    Ok(())
}

/// As a user who may not do everything.
#[test]
fn what_may_not_be_written_stays() -> Result<()> {
    if is_child() {
        for way in WAYS {
            for (file, part) in [("read-only", "read-only"), ("closed/state", "the folder has to be writable")] {
                let error = save(way, file).unwrap_err();
                assert!(error.to_string().contains(part), "{error}");
                let ErrorKind::Io { source, .. } = error.kind() else { panic!("{error}") };
                assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
            }
            // Of another owner and another group, whom this user cannot give a file to.
            save(way, "of-others")?;
        }
        return Ok(());
    }
    let folder = Folder::new();
    fs::create_dir(folder.file("closed"))?;
    for file in ["read-only", "closed/state", "of-others"] {
        fs::write(folder.file(file), "old")?;
    }
    let mut command = child("modes::what_may_not_be_written_stays")?;
    command.current_dir(folder.path());
    // A copy that every user may run, and a user who is not root.
    let is_root = fs::metadata(folder.path())?.uid() == 0;
    if is_root {
        let program = folder.file("program");
        // A process that this one starts meanwhile would inherit a file that this one writes, and a file that is open for
        // writing cannot be run.
        assert!(Command::new("cp").arg(std::env::current_exe()?).arg(&program).status()?.success());
        let mut as_nobody = Command::new(&program);
        as_nobody.args(command.get_args()).envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        as_nobody.current_dir(folder.path()).uid(65534).gid(65534);
        command = as_nobody;
        for file in ["", "read-only", "closed", "closed/state"] {
            chown(folder.file(file), Some(65534), Some(65534))?;
        }
    }
    for (file, mode) in [("read-only", 0o444), ("closed/state", 0o644), ("closed", 0o555), ("of-others", 0o656)] {
        fs::set_permissions(folder.file(file), Permissions::from_mode(mode))?;
    }
    let output = command.output()?;
    fs::set_permissions(folder.file("closed"), Permissions::from_mode(0o755))?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(folder.file("read-only"))?, b"old");
    assert_eq!(fs::read(folder.file("closed/state"))?, b"old");
    assert_eq!(listing(&folder.file("closed"))?, ["state"]);
    // The group is another one: it may do what others may.
    assert_eq!(mode(folder.file("of-others"))?, if is_root { 0o666 } else { 0o656 });
    Ok(())
}

#[test]
fn what_is_no_file_is_written_as_it_is() -> Result<()> {
    let folder = Folder::new();
    let (file, pipe) = (folder.file("state"), folder.file("pipe"));
    assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
    for way in WAYS {
        save(way, &file)?;
        let from_pipe = std::thread::scope(|scope| -> Result<Vec<u8>> {
            let reader = scope.spawn(|| -> Result<Vec<u8>> {
                let mut bytes = Vec::new();
                fs::File::open(&pipe)?.read_to_end(&mut bytes)?;
                Ok(bytes)
            });
            save(way, &pipe)?;
            reader.join().unwrap()
        })?;
        assert_eq!(from_pipe, fs::read(&file)?, "{way}");
        save(way, PathBuf::from("/dev/null"))?;
    }
    assert_eq!(listing(folder.path())?, ["pipe", "state"]);
    #[cfg(target_os = "linux")]
    {
        let error = save("native", "/dev/full").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Io { action: "writing", .. }), "{error}");
    }
    Ok(())
}
