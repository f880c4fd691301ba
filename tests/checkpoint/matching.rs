//! A part of a checkpoint, and files that are read without an optimizer.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_adamax::{
    Adamax, Ema, Error, ErrorKind, GradScaler, LossScale, ParamGroup, ParamsAdamax, ReduceLrOnPlateau, Restored,
    Rounding, Snapshot, SparseUpdate, StateDType, StepCount, Table,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;

use crate::common::folder::Folder;
use crate::common::{DTYPES, Fingerprint, bits};
use crate::support::Model;

type Vars = Vec<(String, Var)>;

/// Variables of these names and shapes.
fn vars(all: &[(&str, &[usize])], dtype: DType) -> Result<Vars> {
    let var = |(name, dims): &(&str, &[usize])| Ok((name.to_string(), Var::ones(*dims, dtype, &Device::Cpu)?));
    all.iter().map(var).collect()
}

fn train(optimizer: &mut Adamax, vars: &Vars, calls: usize) -> Result<()> {
    for call in 0..calls {
        let losses =
            vars.iter().map(|(_, var)| var.to_dtype(DType::F32)?.affine(0.5 + call as f64, 0.0)?.sqr()?.sum_all());
        let losses = losses.collect::<candle_core::Result<Vec<_>>>()?;
        optimizer.backward_step(&Tensor::stack(&losses, 0)?.sum_all()?)?;
    }
    Ok(())
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

const OLD: [(&str, &[usize]); 3] = [("body", &[3, 5]), ("head", &[5, 10]), ("old", &[4])];
const NEW: [(&str, &[usize]); 3] = [("body", &[3, 5]), ("head", &[5, 2]), ("new", &[4])];

#[test]
fn what_fits_is_taken_and_the_rest_begins_anew() -> Result<()> {
    let folder = Folder::new();
    for params in [ParamsAdamax::default(), ParamsAdamax::pytorch()] {
        let old = vars(&OLD, DType::F32)?;
        let mut optimizer = Adamax::from_named(old.clone(), params.clone())?;
        train(&mut optimizer, &old, 4)?;
        optimizer.save(folder.file("old"))?;

        let new = vars(&NEW, DType::F32)?;
        let params = ParamsAdamax { lr: 0.5.into(), ..params };
        let mut other = Adamax::from_named(new.clone(), params.clone())?;
        // Whatever it has come to before.
        train(&mut other, &new, 2)?;
        let weights: Vec<_> = new.iter().map(|(_, var)| bits(var)).collect();
        let restored = other.load_matching(folder.file("old"))?;
        assert_eq!(restored.restored, names(&["body"]));
        assert_eq!(restored.not_in_snapshot, names(&["new"]));
        assert_eq!(restored.not_in_optimizer, names(&["old"]));
        assert_eq!(restored.mismatched, [("head".to_owned(), "shape [5, 2] here, [5, 10] there".to_owned())]);
        assert!(!restored.is_complete());
        let text = "restored: 1; not in the snapshot: `new`; not in the optimizer: `old`; `head`: shape [5, 2] here, \
                    [5, 10] there";
        assert_eq!(restored.to_string(), text);

        assert_eq!(bits(&other.state("body")?.exp_avg), bits(&optimizer.state("body")?.exp_avg));
        assert_eq!(bits(&other.state("body")?.exp_inf), bits(&optimizer.state("body")?.exp_inf));
        for name in ["head", "new"] {
            let state = other.state(name)?;
            assert_eq!(state.step, 0);
            assert!(bits(&state.exp_avg).iter().chain(&bits(&state.exp_inf)).all(|&bits| bits == 0));
        }
        assert_eq!((other.calls(), other.updates(), other.state("body")?.step), (4, 4, 4));
        // Settings stay, and so do weights.
        assert_eq!(other.learning_rate(), 0.5);
        assert_eq!(new.iter().map(|(_, var)| bits(var)).collect::<Vec<_>>(), weights);

        // From memory, in the same way.
        let mut from_memory = Adamax::from_named(new.clone(), params)?;
        assert_eq!(from_memory.restore_matching(&optimizer.snapshot()?)?, restored);
        assert_eq!(Fingerprint::of(&from_memory, &[]), Fingerprint::of(&other, &[]));
        train(&mut other, &new, 2)?;
        assert_eq!((other.updates(), other.state("new")?.step, other.state("body")?.step), (6, 2, 6));
    }
    Ok(())
}

#[test]
fn all_of_it_is_what_load_takes() -> Result<()> {
    let folder = Folder::new();
    for dtype in DTYPES {
        for (state_dtype, rounding) in [
            (StateDType::F32, Rounding::Nearest),
            (StateDType::Q8, Rounding::Master),
            (StateDType::F16, Rounding::Stochastic),
        ] {
            if dtype == DType::F64 && state_dtype != StateDType::F32 {
                continue;
            }
            let params = ParamsAdamax {
                state_dtype,
                rounding,
                ema: Some(Ema::default()),
                gradient_accumulation_steps: 3,
                loss_scale: LossScale::Dynamic(GradScaler {
                    init_scale: 8.0,
                    growth_interval: 3,
                    ..Default::default()
                }),
                plateau: Some(ReduceLrOnPlateau::default()),
                ..Default::default()
            };
            let model = Model::new(dtype)?;
            let mut optimizer = model.grouped(params.clone())?;
            model.run(&mut optimizer, 0..5, false)?;
            optimizer.save(folder.file("state"))?;
            let (mut strict, mut matching) = (model.grouped(params.clone())?, model.grouped(params)?);
            strict.load(folder.file("state"))?;
            let restored = matching.load_matching(folder.file("state"))?;
            assert!(restored.is_complete(), "{restored}");
            assert_eq!(Fingerprint::of(&matching, &[]), Fingerprint::of(&strict, &[]), "{dtype:?} {state_dtype:?}");
            assert_eq!(Fingerprint::of(&matching, &[]), Fingerprint::of(&optimizer, &[]), "{dtype:?} {state_dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn another_encoding_and_other_groups_are_no_obstacle() -> Result<()> {
    let all = vars(&OLD, DType::F32)?;
    let mut optimizer =
        Adamax::from_named(all.clone(), ParamsAdamax { ema: Some(Ema::default()), ..Default::default() })?;
    train(&mut optimizer, &all, 3)?;
    let body = ParamGroup::new("body").vars(all[..1].to_vec()).state_dtype(StateDType::BF16).beta1(0.8);
    let rest = ParamGroup::new("rest").vars(all[1..].to_vec());
    let mut other = Adamax::from_groups([body, rest], ParamsAdamax::default())?;
    assert!(other.restore_matching(&optimizer.snapshot()?)?.is_complete());
    assert_eq!(other.groups()[0].beta1, Some(0.8));
    for (name, _) in &all {
        let (got, expected) = (other.state(name)?, optimizer.state(name)?);
        let bound = if name == "body" { 2f64.powi(-7) } else { 0.0 };
        for (got, expected) in [(&got.exp_avg, &expected.exp_avg), (&got.exp_inf, &expected.exp_inf)] {
            let difference = (got - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            let largest = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(f64::from(difference) <= bound * f64::from(largest), "{name}: {difference} of {largest}");
        }
        assert!(got.ema.is_none() && got.step == 3);
    }
    Ok(())
}

#[test]
fn another_type_of_arithmetic_is_a_mismatch() -> Result<()> {
    let of = |dtype| vars(&OLD[..1], dtype);
    for (here, there, fits) in [
        (DType::F32, DType::BF16, true),
        (DType::F16, DType::F32, true),
        (DType::F64, DType::F32, false),
        (DType::BF16, DType::F64, false),
    ] {
        let mut all = of(there)?;
        all.extend(vars(&[("other", &[2])], here)?);
        let mut optimizer = Adamax::from_named(all.clone(), ParamsAdamax::default())?;
        train(&mut optimizer, &all, 2)?;
        let mut mine = of(here)?;
        mine.extend(vars(&[("other", &[2])], here)?);
        let mut other = Adamax::from_named(mine, ParamsAdamax { rounding: Rounding::Master, ..Default::default() })?;
        let restored = other.restore_matching(&optimizer.snapshot()?)?;
        assert_eq!(restored.restored.contains(&"body".to_owned()), fits, "{restored}");
        if !fits {
            assert!(restored.mismatched[0].1.starts_with("moments of F"), "{restored}");
        }
        assert_eq!(other.state("body")?.step, if fits { 2 } else { 0 });
    }
    Ok(())
}

/// Refuses, and changes nothing.
#[track_caller]
fn refuse(optimizer: &mut Adamax, snapshot: &Snapshot) -> Result<Error> {
    let before = Fingerprint::of(optimizer, &[]);
    let Err(error) = optimizer.restore_matching(snapshot) else { anyhow::bail!("it was taken") };
    assert_eq!(Fingerprint::of(optimizer, &[]), before, "{error}");
    Ok(error)
}

#[test]
fn what_cannot_be_taken_is_refused() -> Result<()> {
    let (old, new) = (vars(&OLD, DType::F32)?, vars(&NEW, DType::F32)?);
    let mut optimizer = Adamax::from_named(old.clone(), ParamsAdamax::default())?;
    train(&mut optimizer, &old, 3)?;
    let good = optimizer.snapshot()?;
    let mut other = Adamax::from_named(new.clone(), ParamsAdamax::pytorch())?;
    assert!(refuse(&mut other, &good)?.to_string().contains("eps_mode"));
    let per_var = ParamsAdamax { step_count: StepCount::PerVar, ..Default::default() };
    assert!(refuse(&mut Adamax::from_named(new.clone(), per_var)?, &good)?.to_string().contains("step_count"));

    let mut other = Adamax::from_named(new, ParamsAdamax::default())?;
    // Nothing fits: names, and then shapes.
    let mut snapshot = good.clone();
    let rename = |(name, var)| (format!("module.{name}"), var);
    snapshot.vars = snapshot.vars.into_iter().map(rename).collect();
    let message = refuse(&mut other, &snapshot)?.to_string();
    assert!(message.contains("every name in the snapshot begins with `module.`"), "{message}");
    let mut snapshot = good.clone();
    snapshot.vars.retain(|name, _| name == "head");
    let message = refuse(&mut other, &snapshot)?.to_string();
    assert!(message.contains("`head` has shape [5, 2] here, [5, 10] there"), "{message}");
    // What no run can have made.
    let mut snapshot = good.clone();
    let body = snapshot.vars.get_mut("body").unwrap();
    body.exp_inf = (body.exp_inf.clone() * -1.0)?;
    assert!(
        refuse(&mut other, &snapshot)?.to_string().contains("`body.exp_inf`: expected numbers that are not negative")
    );
    let mut snapshot = good.clone();
    snapshot.vars.get_mut("body").unwrap().step = 4;
    assert!(refuse(&mut other, &snapshot)?.to_string().contains("`body.step`"));
    let mut snapshot = good.clone();
    snapshot.vars.get_mut("body").unwrap().group = "nowhere".to_owned();
    assert!(refuse(&mut other, &snapshot)?.to_string().contains("`body.group`"));
    // Gradients that wait, and an optimizer that does not accumulate.
    let mut snapshot = good;
    snapshot.counters.pending = 1;
    assert!(refuse(&mut other, &snapshot)?.to_string().contains("counters.pending"));
    Ok(())
}

#[test]
fn pending_gradients_and_loss_scales_go_on() -> Result<()> {
    let params = ParamsAdamax {
        gradient_accumulation_steps: 3,
        loss_scale: LossScale::Dynamic(GradScaler { init_scale: 8.0, growth_interval: 2, ..Default::default() }),
        ..Default::default()
    };
    let old = vars(&OLD, DType::F32)?;
    let mut optimizer = Adamax::from_named(old.clone(), params.clone())?;
    train(&mut optimizer, &old, 5)?;
    let snapshot = optimizer.snapshot()?;
    assert_eq!(snapshot.counters.pending, 2);
    let new = vars(&NEW, DType::F32)?;
    let mut other = Adamax::from_named(new.clone(), params.clone())?;
    other.restore_matching(&snapshot)?;
    let (got, expected) = (other.state("body")?.accumulated, optimizer.state("body")?.accumulated);
    let dense = |sum: Option<candle_adamax::AccumulatedGrad>| bits(sum.unwrap().dense().unwrap());
    assert_eq!(dense(got), dense(expected));
    assert!(other.state("new")?.accumulated.is_none());
    assert_eq!(other.loss_scale(), 32.0);
    train(&mut other, &new, 1)?;
    assert_eq!((other.updates(), other.snapshot()?.counters.pending), (2, 0));
    // Without a loss scale of its own there is none.
    let mut other = Adamax::from_named(new, ParamsAdamax { loss_scale: LossScale::None, ..params })?;
    other.restore_matching(&snapshot)?;
    assert!(other.snapshot()?.grad_scaler.is_none());
    Ok(())
}

#[test]
fn nothing_in_common_with_nothing_is_no_error() -> Result<()> {
    let empty = Adamax::from_named::<&str>([], ParamsAdamax::default())?;
    let mut other = Adamax::from_named(vars(&NEW, DType::F32)?, ParamsAdamax::default())?;
    assert_eq!(other.restore_matching(&empty.snapshot()?)?.not_in_snapshot.len(), 3);
    let mut empty = empty;
    assert_eq!(empty.restore_matching(&other.snapshot()?)?.not_in_optimizer.len(), 3);
    let same = Adamax::from_named::<&str>([], ParamsAdamax::default())?;
    assert_eq!(empty.restore_matching(&same.snapshot()?)?, Restored::default());
    Ok(())
}

#[test]
fn a_snapshot_goes_into_a_file_and_out() -> Result<()> {
    let folder = Folder::new();
    for dtype in DTYPES {
        let model = Model::new(dtype)?;
        let params = ParamsAdamax {
            ema: Some(Ema::default()),
            gradient_accumulation_steps: 2,
            rounding: Rounding::Master,
            ..Default::default()
        };
        let mut optimizer = model.grouped(params.clone())?;
        model.run(&mut optimizer, 0..5, false)?;
        optimizer.save(folder.file("saved"))?;
        let read = Snapshot::read(folder.file("saved"))?;
        assert_eq!(Fingerprint::of_snapshot(&read), Fingerprint::of(&optimizer, &[]));
        read.write(folder.file("written"))?;
        assert_eq!(std::fs::read(folder.file("written"))?, std::fs::read(folder.file("saved"))?);
        let mut other = model.grouped(params)?;
        other.restore(&read)?;
        assert_eq!(Fingerprint::of(&other, &[]), Fingerprint::of(&optimizer, &[]));
    }
    let error = Snapshot::read(folder.file("missing")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { action: "reading", .. }), "{error}");
    let good = std::fs::read(folder.file("saved"))?;
    for length in (0..good.len()).step_by(211) {
        std::fs::write(folder.file("cut"), &good[..length])?;
        let error = Snapshot::read(folder.file("cut")).unwrap_err();
        assert!(error.path().is_some_and(|path| path.ends_with("cut")), "{error}");
    }
    Ok(())
}

/// Names of another wrapper are spotted, on both sides, and the way out is named.
#[test]
fn a_prefix_that_only_one_side_has() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("state");
    for prefix in ["module.", "_orig_mod.", "module._orig_mod."] {
        let plain = vars(&OLD, DType::F32)?;
        let wrapped: Vars = plain.iter().map(|(name, var)| (format!("{prefix}{name}"), var.clone())).collect();
        for (saved, loaded, whose) in [(&wrapped, &plain, "in the file"), (&plain, &wrapped, "of this optimizer")] {
            Adamax::from_named(saved.clone(), ParamsAdamax::default())?.save(&file)?;
            let mut optimizer = Adamax::from_named(loaded.clone(), ParamsAdamax::default())?;
            let error = optimizer.load(&file).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(&format!("every name {whose} begins with `{prefix}`")), "{message}");
            for (name, _) in saved.iter().chain(loaded) {
                assert!(message.contains(&format!("`{name}`")), "{name} in {message}");
            }
            assert!(message.contains("`load_matching`"), "{message}");
            assert_eq!(error.path(), Some(file.as_path()));
            let message = optimizer.restore(&Snapshot::read(&file)?).unwrap_err().to_string();
            assert!(message.contains("`restore_matching`"), "{message}");

            Adamax::from_named(saved.clone(), ParamsAdamax::pytorch())?.save_torch(&file)?;
            let mut optimizer = Adamax::from_named(loaded.clone(), ParamsAdamax::pytorch())?;
            let message = optimizer.load_torch(&file).unwrap_err().to_string();
            assert!(message.contains(&format!("every name {whose} begins with `{prefix}`")), "{message}");
        }
    }
    // By the way that the documentation shows.
    let mut snapshot =
        Adamax::from_named(vars(&[("module.w", &[2])], DType::F32)?, ParamsAdamax::default())?.snapshot()?;
    snapshot.vars = BTreeMap::from([("w".to_owned(), snapshot.vars.remove("module.w").unwrap())]);
    Adamax::from_named(vars(&[("w", &[2])], DType::F32)?, ParamsAdamax::default())?.restore(&snapshot)?;
    Ok(())
}

/// Tables keep scales by rows, and with `Exact` their rows have missed updates.
#[test]
fn tables_take_their_rows() -> Result<()> {
    let begin = |state_dtype, sparse_update| -> Result<(Vars, Table, Adamax)> {
        let all = vars(&[("table", &[40, 4]), ("tower", &[3])], DType::F32)?;
        let table = Table::new(&all[0].1)?;
        let params = ParamsAdamax { lr: 0.1.into(), state_dtype, sparse_update, ..Default::default() };
        let optimizer = Adamax::from_named(all.clone(), params)?;
        Ok((all, table, optimizer))
    };
    let step = |vars: &Vars, table: &Table, optimizer: &mut Adamax, row: u32| -> Result<()> {
        let rows = table.lookup(&Tensor::new(&[row, 7], &Device::Cpu)?)?;
        Ok(optimizer.backward_step(&(rows.sqr()?.sum_all()? + vars[1].1.sqr()?.sum_all()?)?).map(drop)?)
    };
    for state_dtype in [StateDType::F32, StateDType::BF16, StateDType::Q8] {
        for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
            let (all, table, mut optimizer) = begin(state_dtype, sparse_update)?;
            (0..5).try_for_each(|row| step(&all, &table, &mut optimizer, row))?;
            let snapshot = optimizer.snapshot()?;
            let (_, _, mut strict) = begin(state_dtype, sparse_update)?;
            strict.restore(&snapshot)?;
            let (mine, own_table, mut matching) = begin(state_dtype, sparse_update)?;
            assert!(matching.restore_matching(&snapshot)?.is_complete());
            assert_eq!(
                Fingerprint::of(&matching, &[]),
                Fingerprint::of(&strict, &[]),
                "{state_dtype:?} {sparse_update:?}"
            );
            // The weights of the same moment belong to it.
            mine[0].1.set(&all[0].1)?;
            (0..3).try_for_each(|row| step(&mine, &own_table, &mut matching, row))?;
            // As other codes, too, once all rows are up to date.
            let (mine, own_table, mut other) = begin(StateDType::F16, sparse_update)?;
            if sparse_update == SparseUpdate::Exact {
                let error = other.restore_matching(&snapshot).unwrap_err().to_string();
                assert!(error.contains("`table.missed`") && error.contains("call `catch_up` before saving"), "{error}");
            }
            optimizer.catch_up()?;
            assert!(other.restore_matching(&optimizer.snapshot()?)?.is_complete());
            (0..3).try_for_each(|row| step(&mine, &own_table, &mut other, row))?;
            assert_eq!(other.state("table")?.step, 8);
        }
    }
    Ok(())
}
