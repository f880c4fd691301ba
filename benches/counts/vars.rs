//! Growth with the number of variables, groups and names, and with the calls of an accumulation.

use std::hint::black_box;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_adamax::{Adamax, Clip, Ema, MissingGradients, NormType, ParamGroup, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer as _, VarMap};

use crate::case::{Case, LINEAR, MOVES, Work, again, each};
use crate::cost::File;

/// The smaller number of variables.
const N: usize = 256;
/// Rows and columns of each.
const SHAPE: (usize, usize) = (4, 4);

pub(crate) fn cases() -> Vec<Case> {
    [made(), managed(), stepped(), kept()].into_iter().flatten().collect()
}

/// A case that is linear in the number of variables.
fn of_vars(name: &str, make: impl Fn(usize) -> Result<Work> + 'static) -> Case {
    Case::growth(name, N, LINEAR, make)
}

fn made() -> Vec<Case> {
    vec![
        of_vars("new", |n| {
            let vars: Vec<Var> = named(n)?.into_iter().map(|(_, var)| var).collect();
            each(move || Ok(vars.clone()), |vars| Ok(Adamax::new(vars, ParamsAdamax::default()).map(drop)?))
        }),
        of_vars("from_named", |n| {
            let named = named(n)?;
            each(move || Ok(named.clone()), |named| made_of([ParamGroup::new("all").vars(named)]))
        }),
        of_vars("from_varmap", |n| {
            let varmap = VarMap::new();
            let mut data = varmap.data().lock().unwrap_or_else(|error| error.into_inner());
            data.extend(named(n)?);
            drop(data);
            again(move || Adamax::from_varmap(&varmap, ParamsAdamax::default()).map(drop))
        }),
        of_vars("from_groups, groups", |n| {
            let groups = groups(n)?;
            each(move || Ok(groups.clone()), made_of)
        }),
        of_vars("from_groups, names", |n| {
            let named = named(n)?;
            let group = |(i, vars): (usize, &[_])| ParamGroup::new(format!("group.{i}")).vars(vars.to_vec());
            let groups: Vec<_> = named.chunks(n / 4).enumerate().map(group).collect();
            each(move || Ok(groups.clone()), made_of)
        }),
    ]
}

fn managed() -> Vec<Case> {
    let empty = || Ok(Adamax::new(Vec::new(), ParamsAdamax::default())?);
    vec![
        of_vars("add_var, calls", move |n| {
            let named = named(n)?;
            each(empty, move |mut optimizer| {
                named.iter().try_for_each(|(name, var)| Ok(optimizer.add_var(name, var.clone())?))
            })
        }),
        of_vars("add_group, calls", move |n| {
            let groups = groups(n)?;
            each(empty, move |mut optimizer| {
                groups.iter().try_for_each(|group| Ok(optimizer.add_group(group.clone())?))
            })
        }),
        Case::growth("remove_var, calls", N, MOVES, |n| {
            let named = named(n)?;
            let names: Vec<String> = named.iter().map(|(name, _)| name.clone()).collect();
            each(
                move || Ok(Adamax::from_named(named.clone(), ParamsAdamax::default())?),
                move |mut optimizer| names.iter().try_for_each(|name| Ok(optimizer.remove_var(name).map(drop)?)),
            )
        }),
        of_vars("append_rows, vars", |n| {
            let names: Vec<String> = named(n)?.into_iter().map(|(name, _)| name).collect();
            let (mut optimizer, _) = start(n, ParamsAdamax::default())?;
            let row = Tensor::ones((1, SHAPE.1), DType::F32, &Device::Cpu)?;
            again(move || names.iter().try_for_each(|name| optimizer.append_rows(name, &row).map(drop)))
        }),
        of_vars("set_params", |n| {
            let (mut optimizer, _) = start(n, ParamsAdamax::default())?;
            again(move || optimizer.set_params(ParamsAdamax { no_decay: vec!["1".into()], ..Default::default() }))
        }),
        of_vars("set_group, groups", |n| {
            let mut optimizer = Adamax::from_groups(groups(n)?, ParamsAdamax::default())?;
            let settings = optimizer.groups()[n / 2].clone();
            again(move || optimizer.set_group(settings.clone()))
        }),
        of_vars("group_learning_rate, calls", |n| {
            let optimizer = Adamax::from_groups(groups(n)?, ParamsAdamax::default())?;
            let names: Vec<String> = optimizer.groups().iter().map(|group| group.name.clone()).collect();
            again(move || {
                names.iter().try_for_each(|name| {
                    black_box(optimizer.group_learning_rate(name)?);
                    Ok::<_, candle_adamax::Error>(())
                })
            })
        }),
    ]
}

fn stepped() -> Vec<Case> {
    let step = |name: &str, params: fn() -> ParamsAdamax| {
        of_vars(name, move |n| {
            let (mut optimizer, grads) = start(n, params())?;
            again(move || optimizer.step(&grads).map(drop))
        })
    };
    vec![
        step("step, tensors", ParamsAdamax::default),
        step("clipped step, tensors", || ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() }),
        step("averaged step, tensors", || ParamsAdamax { ema: Some(EMA), ..Default::default() }),
        Case::growth("step, elements", 16_384, LINEAR, |n| {
            let var = Var::ones(n, DType::F32, &Device::Cpu)?;
            let mut grads = GradStore::default();
            grads.insert(&var, Tensor::ones(n, DType::F32, &Device::Cpu)?);
            let mut optimizer = Adamax::new(vec![var], ParamsAdamax::default())?;
            again(move || optimizer.step(&grads).map(drop))
        }),
        of_vars("step, groups", |n| {
            let mut optimizer = Adamax::from_groups(groups(n)?, ParamsAdamax::default())?;
            let var = Var::ones(SHAPE, DType::F32, &Device::Cpu)?;
            optimizer.add_var("last", var.clone())?;
            let mut grads = GradStore::default();
            grads.insert(&var, gradient()?);
            optimizer.set_params(ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() })?;
            again(move || optimizer.step(&grads).map(drop))
        }),
        of_vars("apply_gradients, vars", |n| {
            let vars: Vec<Var> = named(n)?.into_iter().map(|(_, var)| var).collect();
            let mut optimizer = Adamax::new(vars.clone(), ParamsAdamax::default())?;
            let grad = gradient()?;
            again(move || optimizer.apply_gradients(vars.iter().map(|var| (var, &grad))).map(drop))
        }),
        Case::growth("accumulation, calls", 64, LINEAR, |n| {
            let params = ParamsAdamax { gradient_accumulation_steps: n as u64, ..Default::default() };
            let (mut optimizer, grads) = start(4, params)?;
            again(move || (0..n).try_for_each(|_| optimizer.step(&grads).map(drop)))
        }),
        of_vars("accumulation and flush, tensors", |n| {
            let params = ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() };
            let (mut optimizer, grads) = start(n, params)?;
            again(move || {
                optimizer.step(&grads)?;
                optimizer.flush_gradients().map(drop).map_err(candle_core::Error::from)
            })
        }),
        of_vars("gradient_norms and audit, vars", |n| {
            let (optimizer, grads) = start(n, ParamsAdamax::default())?;
            again(move || {
                let audit = optimizer.audit(&grads)?;
                black_box(audit.and(&audit));
                optimizer.gradient_norms(&grads, NormType::L2).map(drop)
            })
        }),
        of_vars("finalize_ema, vars", |n| {
            each(
                move || Ok(start(n, ParamsAdamax { ema: Some(EMA), ..Default::default() })?.0),
                |mut optimizer| Ok(optimizer.finalize_ema()?),
            )
        }),
        of_vars("report and Display, vars", |n| {
            let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
            let mut optimizer = Adamax::from_named(named(n)?, params)?;
            let (_, grads) = start(1, ParamsAdamax::default())?;
            optimizer.step(&grads)?;
            again(move || -> Result<()> {
                let report = optimizer.report();
                ensure!(report.missing().count() == n && report.untrained().count() == n, "none is trained");
                black_box((format!("{optimizer} {optimizer:?} {report}"), optimizer.bytes()));
                Ok(())
            })
        }),
        of_vars("state, calls", |n| {
            let names: Vec<String> = named(n)?.into_iter().map(|(name, _)| name).collect();
            let (optimizer, _) = start(n, ParamsAdamax::default())?;
            again(move || {
                names.iter().try_for_each(|name| {
                    black_box((optimizer.state(name)?, optimizer.state_bytes(name)?));
                    optimizer.moment_statistics(name).map(drop)
                })
            })
        }),
    ]
}

/// How an optimizer is written, and read again.
type Way = (&'static str, fn(&Adamax, &Path) -> candle_adamax::Result<()>, fn(&mut Adamax, &Path) -> Result<()>);

fn kept() -> Vec<Case> {
    const WAYS: [Way; 5] = [
        ("", |from, path| from.save(path), |to, path| Ok(to.load(path)?)),
        ("_matching", |from, path| from.save(path), |to, path| Ok(to.load_matching(path).map(drop)?)),
        ("_torch", |from, path| from.save_torch(path), |to, path| Ok(to.load_torch(path)?)),
        ("_keras", |from, path| from.save_keras(path), |to, path| Ok(to.load_keras(path)?)),
        (
            "_keras_legacy",
            |from, path| from.save_keras_legacy(path, &from.names().collect::<Vec<_>>()),
            |to, path| {
                let names: Vec<String> = to.names().map(str::to_owned).collect();
                Ok(to.load_keras_legacy(path, &names)?)
            },
        ),
    ];
    let written = WAYS.into_iter().filter(|way| way.0 != "_matching").map(|(name, save, _)| {
        of_vars(&format!("save{name}, vars"), move |n| {
            let (optimizer, file) = (exchanged(n, name)?, File::new(name));
            again(move || save(&optimizer, &file.0))
        })
    });
    let read = WAYS.map(|(name, save, load)| {
        of_vars(&format!("load{name}, vars"), move |n| {
            let (mut optimizer, file) = (exchanged(n, name)?, File::new(name));
            save(&optimizer, &file.0)?;
            again(move || load(&mut optimizer, &file.0))
        })
    });
    let memory = of_vars("snapshot and restore, vars", |n| {
        let (mut optimizer, _) = start(n, ParamsAdamax::default())?;
        again(move || {
            let snapshot = optimizer.snapshot()?;
            optimizer.restore(&snapshot)
        })
    });
    written.chain(read).chain([memory]).collect()
}

/// An optimizer with the conventions of the library whose file is meant.
fn exchanged(n: usize, way: &str) -> Result<Adamax> {
    Ok(start(n, if way == "_torch" { ParamsAdamax::pytorch() } else { ParamsAdamax::default() })?.0)
}

const EMA: Ema = Ema { momentum: 0.9, overwrite_frequency: None };

fn named(n: usize) -> Result<Vec<(String, Var)>> {
    (0..n).map(|i| Ok((format!("layers.{i}.weight"), Var::ones(SHAPE, DType::F32, &Device::Cpu)?))).collect()
}

fn gradient() -> Result<Tensor> {
    Ok(Tensor::ones(SHAPE, DType::F32, &Device::Cpu)?)
}

/// A group for each variable.
fn groups(n: usize) -> Result<Vec<ParamGroup>> {
    let group = |(i, (name, var)): (usize, (String, Var))| ParamGroup::new(format!("group.{i}")).var(name, &var);
    Ok(named(n)?.into_iter().enumerate().map(group).collect())
}

fn made_of(groups: impl IntoIterator<Item = ParamGroup>) -> Result<()> {
    Ok(Adamax::from_groups(groups, ParamsAdamax::default()).map(drop)?)
}

/// An optimizer of `n` variables after its first call, and the gradients of that.
fn start(n: usize, params: ParamsAdamax) -> Result<(Adamax, GradStore)> {
    let named = named(n)?;
    let mut grads = GradStore::default();
    for (_, var) in &named {
        grads.insert(var, gradient()?);
    }
    let mut optimizer = Adamax::from_named(named, params)?;
    optimizer.step(&grads)?;
    Ok((optimizer, grads))
}
