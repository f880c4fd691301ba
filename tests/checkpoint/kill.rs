//! A process that saves again and again is killed, many times, at moments of chance: there is always a checkpoint, it
//! is whole, and it is the old one or the new one.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;

use crate::common::bits;
use crate::common::folder::Folder;
use crate::common::process::{child, is_child};
use crate::files::listing;

/// What a child says once it saves.
const READY: &str = "saving";
const KILLS: usize = 200;
/// Where disks are slow, as many as fit into this.
const TIME: Duration = Duration::from_secs(12);
/// Large enough that most of the time goes into writing.
const ELEMENTS: usize = 50_000;

fn optimizer() -> Result<(Vec<Var>, Adamax)> {
    let vars =
        (0..2).map(|_| Var::zeros(ELEMENTS, DType::F32, &Device::Cpu)).collect::<candle_core::Result<Vec<_>>>()?;
    let named = vars.iter().enumerate().map(|(i, var)| (format!("var.{i}"), var.clone()));
    let optimizer = Adamax::from_named(named, ParamsAdamax::default())?;
    Ok((vars, optimizer))
}

/// One call. All elements of a gradient are the same, so that all of a moment are, and one that is not was torn.
fn step(vars: &[Var], optimizer: &mut Adamax) -> Result<()> {
    let value = (optimizer.calls() as f32).sin();
    let mut grads = GradStore::default();
    for var in vars {
        grads.insert(var, Tensor::full(value, ELEMENTS, &Device::Cpu)?);
    }
    Ok(optimizer.step(&grads).map(drop)?)
}

/// What the process does that is killed.
fn save_for_ever() -> Result<()> {
    let (vars, mut optimizer) = optimizer()?;
    let file = Path::new("optimizer.safetensors");
    if file.exists() {
        optimizer.load(file)?;
    }
    println!("{READY}");
    std::io::stdout().flush()?;
    loop {
        step(&vars, &mut optimizer)?;
        optimizer.save(file)?;
    }
}

/// Lets a child save for a while, and kills it.
fn kill_one(folder: &Path, after: Duration) -> Result<()> {
    let mut child = child("kill::always_leaves_a_whole_file")?
        .current_dir(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let ready = lines.map_while(Result::ok).any(|line| line.ends_with(READY));
    std::thread::sleep(after);
    // SIGKILL where there are signals: the process has no chance to tidy up.
    let killed = child.kill();
    let output = child.wait_with_output()?;
    ensure!(ready && killed.is_ok() && !output.status.success(), "the child ended by itself: {output:?}");
    Ok(())
}

#[test]
fn always_leaves_a_whole_file() -> Result<()> {
    if is_child() {
        return save_for_ever();
    }
    let folder = Folder::new();
    let file: PathBuf = folder.file("optimizer.safetensors");
    let mut random = rand::rng();
    let (vars, mut reference) = optimizer()?;
    let (mut calls, mut kills, mut left_behind) = (0, 0, 0);
    // In microseconds; more where a save takes longer.
    let mut latest = 15_000;
    let start = Instant::now();
    while kills < KILLS && start.elapsed() < TIME {
        let kill = kills;
        kills += 1;
        kill_one(folder.path(), Duration::from_micros(random.random_range(0..latest)))?;
        let is_left = |name: &OsString| name.to_string_lossy().ends_with(".saving");
        left_behind += usize::from(listing(folder.path())?.iter().any(is_left));
        if !file.exists() {
            ensure!(calls == 0, "kill {kill}: the file is gone");
            latest += latest / 8;
            continue;
        }
        let (_, mut loaded) = optimizer()?;
        loaded.load(&file).with_context(|| format!("kill {kill}"))?;
        ensure!(loaded.calls() >= calls, "kill {kill}: call {} after call {calls}", loaded.calls());
        latest += if loaded.calls() == calls { latest / 8 } else { 0 };
        calls = loaded.calls();
        // What a run without interruptions has after so many calls.
        while reference.calls() < calls {
            step(&vars, &mut reference)?;
        }
        for name in reference.names() {
            let (got, expected) = (loaded.state(name)?, reference.state(name)?);
            ensure!(got.step == expected.step, "kill {kill}, {name}: step {} of {}", got.step, expected.step);
            ensure!(bits(&got.exp_avg) == bits(&expected.exp_avg), "kill {kill}: exp_avg of {name}");
            ensure!(bits(&got.exp_inf) == bits(&expected.exp_inf), "kill {kill}: exp_inf of {name}");
        }
    }
    println!("{calls} saves and {kills} kills, after {left_behind} of which there was something left to sweep");
    assert!(calls > 0 && left_behind > kills / 20, "{calls} saves, {left_behind} kills left something");
    // The next save sweeps what the killed ones left.
    reference.save(&file)?;
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}
