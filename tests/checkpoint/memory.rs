//! Snapshots in memory: out, edited, and in again. They need no names.

use anyhow::Result;
use candle_adamax::{AccumulatedGrad, Adamax, Ema, ErrorKind, GroupLr, Kernel, ParamsAdamax, VarSnapshot};
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;

use crate::common::{DTYPES, Fingerprint, bits};
use crate::support::Model;

fn params() -> ParamsAdamax {
    ParamsAdamax { gradient_accumulation_steps: 2, ema: Some(Ema::default()), ..ParamsAdamax::pytorch() }
}

#[test]
fn goes_out_and_in_also_without_names() -> Result<()> {
    for dtype in DTYPES {
        for kernel in [Kernel::Auto, Kernel::Portable] {
            let make = |model: &Model, params: ParamsAdamax| -> Result<Adamax> {
                let mut optimizer = Adamax::new(model.0.iter().map(|(_, var)| var.clone()).collect(), params)?;
                optimizer.set_kernel(kernel)?;
                Ok(optimizer)
            };
            let model = Model::new(dtype)?;
            let mut optimizer = make(&model, params())?;
            model.run(&mut optimizer, 0..5, false)?;
            let (snapshot, before) = (optimizer.snapshot()?, Fingerprint::of(&optimizer, &[]));
            // By position, since there are no names: the copy has to be in the same order.
            let mut copy = model.copy()?;
            copy.0.reverse();
            let mut resumed = make(&copy, ParamsAdamax::pytorch())?;
            resumed.restore(&snapshot)?;
            assert_eq!(Fingerprint::of(&resumed, &[]), before, "{dtype:?} {kernel:?}");

            model.run(&mut optimizer, 5..10, false)?;
            copy.run(&mut resumed, 5..10, false)?;
            assert_eq!(copy.bits(), model.bits(), "{dtype:?} {kernel:?}");
            assert_eq!(Fingerprint::of(&resumed, &[]), Fingerprint::of(&optimizer, &[]), "{dtype:?} {kernel:?}");
            // It shares nothing: neither with the optimizer that it came from nor with the one that took it.
            assert_eq!(Fingerprint::of_snapshot(&snapshot), before, "{dtype:?} {kernel:?}");
        }
    }
    Ok(())
}

#[test]
fn is_a_way_back() -> Result<()> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.grouped(params())?;
    model.run(&mut optimizer, 0..3, false)?;
    let (snapshot, before) = (optimizer.snapshot()?, Fingerprint::of(&optimizer, &[]));
    model.run(&mut optimizer, 3..7, false)?;
    optimizer.set_learning_rate(0.5);
    assert_ne!(Fingerprint::of(&optimizer, &[]), before);
    optimizer.restore(&snapshot)?;
    assert_eq!(Fingerprint::of(&optimizer, &[]), before);
    optimizer.restore(&snapshot)?;
    assert_eq!(Fingerprint::of(&optimizer, &[]), before);
    Ok(())
}

#[test]
fn averages_without_their_setting_are_refused() -> Result<()> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.grouped(params())?;
    model.run(&mut optimizer, 0..5, false)?;
    let mut snapshot = optimizer.snapshot()?;
    snapshot.params.ema = None;
    let before = Fingerprint::of(&optimizer, &[]);
    let error = optimizer.restore(&snapshot).unwrap_err().to_string();
    assert!(error.contains(".ema`: expected none, since the settings have no `ema`, got an average"), "{error}");
    assert_eq!(Fingerprint::of(&optimizer, &[]), before);
    Ok(())
}

#[test]
fn can_be_edited() -> Result<()> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.grouped(params())?;
    model.run(&mut optimizer, 0..5, false)?;
    let mut snapshot = optimizer.snapshot()?;
    snapshot.params.lr = 0.125.into();
    snapshot.params.ema = None;
    snapshot.params.gradient_accumulation_steps = 1;
    snapshot.groups[1].lr = GroupLr::Factor(4.0);
    snapshot.counters.updates = 1000;
    snapshot.counters.pending = 0;
    for var in snapshot.vars.values_mut() {
        (var.ema, var.accumulated) = (None, None);
    }
    let large = snapshot.vars.get_mut("large").unwrap();
    large.step = 77;
    large.exp_avg = large.exp_avg.zeros_like()?;
    large.exp_inf = large.exp_inf.ones_like()?.t()?.contiguous()?.t()?; // strides do not matter
    optimizer.restore(&snapshot)?;

    assert_eq!(optimizer.learning_rate(), 0.125);
    assert_eq!(optimizer.updates(), 1000);
    assert!(matches!(optimizer.groups()[1].lr, GroupLr::Factor(factor) if factor == 4.0));
    let state = optimizer.state("large")?;
    assert_eq!(state.step, 77);
    assert!(state.ema.is_none() && state.accumulated.is_none());
    assert!(bits(&state.exp_avg).iter().all(|&bits| bits == 0));
    assert!(bits(&state.exp_inf).iter().all(|&bits| bits == 1f64.to_bits()));
    model.run(&mut optimizer, 5..6, false)?;
    assert_eq!(optimizer.state("large")?.step, 78);
    Ok(())
}

#[test]
fn edited_so_that_it_does_not_fit_it_changes_nothing() -> Result<()> {
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.optimizer(params())?;
    model.run(&mut optimizer, 0..5, false)?;
    let before = Fingerprint::of(&optimizer, &[]);
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
    type Put = fn(&mut VarSnapshot, Tensor);
    let edits: [(&str, Put, Tensor); 6] = [
        ("exp_avg", |var, tensor| var.exp_avg = tensor, zeros(&[33, 41], DType::F32)?),
        ("exp_inf", |var, tensor| var.exp_inf = tensor, zeros(&[41 * 33], DType::F32)?),
        ("exp_avg", |var, tensor| var.exp_avg = tensor, zeros(&[41, 33], DType::F64)?),
        ("exp_inf", |var, tensor| var.exp_inf = tensor, zeros(&[41, 33], DType::F16)?),
        ("ema", |var, tensor| var.ema = Some(tensor), zeros(&[1, 41, 33], DType::F32)?),
        ("accumulated", |var, tensor| var.accumulated = Some((tensor.into(), 1)), zeros(&[41, 33], DType::BF16)?),
    ];
    for (what, put, tensor) in edits {
        let mut snapshot = optimizer.snapshot()?;
        snapshot.params.lr = 0.5.into();
        put(snapshot.vars.get_mut("large").unwrap(), tensor);
        let error = optimizer.restore(&snapshot).unwrap_err();
        let names = |kind: &ErrorKind| match kind {
            ErrorKind::ShapeMismatch { what, name, .. } | ErrorKind::DTypeMismatch { what, name, .. } => {
                Some((*what, name.clone()))
            }
            _ => None,
        };
        assert_eq!(names(error.kind()), Some((what, "large".to_owned())), "{error}");
        assert_eq!(Fingerprint::of(&optimizer, &[]), before, "{error}");
    }
    let mut snapshot = optimizer.snapshot()?;
    snapshot.vars.remove("scalar");
    assert!(optimizer.restore(&snapshot).unwrap_err().to_string().contains("scalar"));
    let mut snapshot = optimizer.snapshot()?;
    let scalar = snapshot.vars["scalar"].clone();
    snapshot.vars.insert("surplus".to_owned(), scalar);
    assert!(optimizer.restore(&snapshot).unwrap_err().to_string().contains("surplus"));
    assert_eq!(Fingerprint::of(&optimizer, &[]), before);
    Ok(())
}

#[test]
fn an_accumulated_gradient_of_no_calls_counts_for_nothing() -> Result<()> {
    let resume = |accumulated: Option<(AccumulatedGrad, u64)>| -> Result<_> {
        let model = Model::new(DType::F32)?;
        let mut optimizer = model.optimizer(params())?;
        model.run(&mut optimizer, 0..4, false)?;
        let mut snapshot = optimizer.snapshot()?;
        snapshot.vars.get_mut("large").unwrap().accumulated = accumulated;
        optimizer.restore(&snapshot)?;
        model.run(&mut optimizer, 4..8, false)?;
        Ok(Fingerprint::of(&optimizer, &model.0))
    };
    let ones = Tensor::ones((41, 33), DType::F32, &Device::Cpu)?;
    assert_eq!(resume(Some((ones.into(), 0)))?, resume(None)?);
    Ok(())
}
