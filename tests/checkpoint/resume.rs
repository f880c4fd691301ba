//! n calls, save, load into a fresh optimizer, n calls: the bits of 2n calls.

use anyhow::Result;
use candle_adamax::{
    Adamax, Clip, CosineDecay, Ema, ErrorKind, ExponentialDecay, GradScaler, Join, Kernel, LearningRate,
    LearningRateSchedule, LinearWarmup, LossScale, NormType, OneCycle, ParamsAdamax, PiecewiseConstantDecay,
    ReduceLrOnPlateau, WeightDecay,
};
use candle_core::{DType, Device, Var};
use candle_nn::{Optimizer, VarBuilder, VarMap};

use crate::common::folder::Folder;
use crate::common::{DTYPES, Fingerprint, bits};
use crate::support::Model;

/// Every kind of setting that a step depends on.
fn settings() -> Vec<(&'static str, ParamsAdamax)> {
    let keras = ParamsAdamax::default;
    let pytorch = ParamsAdamax::pytorch;
    let scaler = GradScaler { init_scale: 8.0, ..GradScaler::default() };
    let lr = |lr: LearningRate| ParamsAdamax { lr, ..keras() };
    vec![
        ("keras", keras()),
        ("pytorch, with counters of their own", pytorch()),
        (
            "maximize, other numbers",
            ParamsAdamax { beta1: 0.7, beta2: 0.91, eps: 0.1 + 0.2, maximize: true, ..keras() },
        ),
        ("a name", ParamsAdamax { name: "Généra\"tor".to_owned(), ..pytorch() }),
        ("exponential decay", lr(ExponentialDecay::new(0.1, 3, 0.7).into())),
        (
            "a cosine with a warm-up",
            lr(CosineDecay { warmup_target: Some(0.05), warmup_steps: 4, ..CosineDecay::new(0.001, 8) }.into()),
        ),
        ("a piecewise constant", lr(PiecewiseConstantDecay::new(vec![2.0, 6.0], vec![0.1, 0.01, 1.0 / 3.0]).into())),
        (
            "schedules joined",
            lr(Join::new(vec![LinearWarmup::new(0.0, 0.1, 5).into(), CosineDecay::new(0.1, 9).into()], vec![5]).into()),
        ),
        (
            "coupled decay",
            ParamsAdamax { weight_decay: WeightDecay::L2(0.03), no_decay: vec!["scalar".into()], ..pytorch() },
        ),
        (
            "decoupled decay",
            ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.3), no_decay: vec!["fc1".into()], ..keras() },
        ),
        ("values clipped", ParamsAdamax { clip: Some(Clip::Value(0.2)), ..keras() }),
        ("norms clipped", ParamsAdamax { clip: Some(Clip::Norm(0.3)), ..keras() }),
        (
            "the global norm clipped",
            ParamsAdamax { clip: Some(Clip::GlobalNorm(0.9)), loss_scale: LossScale::Static(3.0), ..keras() },
        ),
        (
            "clipped as PyTorch does",
            ParamsAdamax { clip: Some(Clip::GradNorm { max_norm: 1.5, norm_type: NormType::L1 }), ..pytorch() },
        ),
        ("accumulation, half done", ParamsAdamax { gradient_accumulation_steps: 4, ..keras() }),
        (
            "accumulation, half done, a mean of 3",
            ParamsAdamax {
                gradient_accumulation_steps: 3,
                loss_scale: LossScale::Static(7.0),
                clip: Some(Clip::Norm(0.1)),
                ..pytorch()
            },
        ),
        ("an average", ParamsAdamax { ema: Some(Ema { momentum: 0.9, overwrite_frequency: None }), ..keras() }),
        (
            "an average that overwrites",
            ParamsAdamax { ema: Some(Ema { momentum: 0.5, overwrite_frequency: Some(3) }), ..keras() },
        ),
        (
            "an average of accumulated updates",
            ParamsAdamax {
                ema: Some(Ema { momentum: 0.5, overwrite_frequency: Some(2) }),
                gradient_accumulation_steps: 2,
                ..pytorch()
            },
        ),
        ("calls skipped", ParamsAdamax { skip_nonfinite: true, ..pytorch() }),
        (
            "calls skipped while accumulating",
            ParamsAdamax { skip_nonfinite: true, gradient_accumulation_steps: 2, ..keras() },
        ),
        (
            "a loss scale that grows",
            ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler { growth_interval: 3, ..scaler }), ..pytorch() },
        ),
        (
            "a loss scale while accumulating, of no power of two",
            ParamsAdamax {
                loss_scale: LossScale::Dynamic(GradScaler { growth_factor: 1.3, growth_interval: 3, ..scaler }),
                gradient_accumulation_steps: 2,
                ..keras()
            },
        ),
        ("a cycle", lr(OneCycle::new(0.1, 9).into())),
        ("a plateau", ParamsAdamax { plateau: Some(ReduceLrOnPlateau::default()), ..keras() }),
    ]
}

/// A fresh optimizer that knows nothing but the conventions, which a file cannot change.
fn conventions(params: &ParamsAdamax) -> ParamsAdamax {
    ParamsAdamax { eps_mode: params.eps_mode, step_count: params.step_count, lr: 0.77.into(), ..Default::default() }
}

#[test]
fn has_the_bits_of_an_uninterrupted_run() -> Result<()> {
    const N: u64 = 5;
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    for dtype in DTYPES {
        for (what, params) in settings() {
            for grouped in [false, true] {
                let what = format!("{what}, {dtype:?}, grouped: {grouped}");
                let make = |model: &Model, params: ParamsAdamax| {
                    if grouped { model.grouped(params) } else { model.optimizer(params) }
                };
                let skips = params.skip_nonfinite || matches!(params.loss_scale, LossScale::Dynamic(_));

                let whole = Model::new(dtype)?;
                let mut uninterrupted = make(&whole, params.clone())?;
                whole.run(&mut uninterrupted, 0..2 * N, skips)?;

                let before = Model::new(dtype)?;
                let mut first = make(&before, params.clone())?;
                before.run(&mut first, 0..N, skips)?;
                first.save(&file)?;
                let after = before.copy()?;
                let mut second = make(&after, conventions(&params))?;
                second.load(&file)?;
                assert_eq!(Fingerprint::of(&second, &[]), Fingerprint::of(&first, &[]), "{what}: as loaded");
                after.run(&mut second, N..2 * N, skips)?;

                assert_eq!(after.bits(), whole.bits(), "{what}: weights");
                assert_eq!(Fingerprint::of(&second, &[]), Fingerprint::of(&uninterrupted, &[]), "{what}: state");
                assert_eq!(second.skipped(), u64::from(skips), "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn goes_on_from_every_call() -> Result<()> {
    const CALLS: u64 = 9;
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let params = || ParamsAdamax {
        gradient_accumulation_steps: 4,
        ema: Some(Ema { momentum: 0.8, overwrite_frequency: Some(2) }),
        ..ParamsAdamax::pytorch()
    };
    let whole = Model::new(DType::BF16)?;
    let mut uninterrupted = whole.optimizer(params())?;
    whole.run(&mut uninterrupted, 0..CALLS, false)?;

    // Saved and loaded after each call, the very first and the last included.
    let mut model = Model::new(DType::BF16)?;
    let mut optimizer = model.optimizer(params())?;
    for call in 0..CALLS {
        optimizer.save(&file)?;
        model = model.copy()?;
        optimizer = model.optimizer(ParamsAdamax::pytorch())?;
        optimizer.load(&file)?;
        model.run(&mut optimizer, call..call + 1, false)?;
    }
    assert_eq!(model.bits(), whole.bits());
    assert_eq!(Fingerprint::of(&optimizer, &[]), Fingerprint::of(&uninterrupted, &[]));
    Ok(())
}

#[test]
fn keeps_a_learning_rate_that_was_set() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let model = Model::new(DType::F32)?;
    let mut optimizer = model.optimizer(ParamsAdamax { lr: CosineDecay::new(0.1, 10).into(), ..Default::default() })?;
    model.run(&mut optimizer, 0..3, false)?;
    optimizer.set_learning_rate(1.0 / 3.0);
    optimizer.save(&file)?;

    let copy = model.copy()?;
    let mut resumed = copy.optimizer(ParamsAdamax { lr: CosineDecay::new(0.1, 10).into(), ..Default::default() })?;
    resumed.load(&file)?;
    assert_eq!(resumed.learning_rate(), 1.0 / 3.0);
    model.run(&mut optimizer, 3..6, false)?;
    copy.run(&mut resumed, 3..6, false)?;
    assert_eq!(copy.bits(), model.bits());
    Ok(())
}

#[test]
fn every_finite_number_survives() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let model = Model::new(DType::F32)?;
    for exponent in (-300..300).step_by(13) {
        // Numbers with all their digits, of every size; a subnormal one first.
        let lr = 10f64.powi(exponent) * (1.0 + 1.0 / 3.0 + f64::from(exponent) * 1e-9).abs();
        let lr = if exponent == -300 { f64::from_bits(12_345) } else { lr };
        let optimizer = model.optimizer(ParamsAdamax { lr: lr.into(), eps: lr / 3.0, ..Default::default() })?;
        optimizer.save(&file)?;
        let mut resumed = model.optimizer(ParamsAdamax::default())?;
        resumed.load(&file)?;
        assert_eq!(resumed.learning_rate().to_bits(), lr.to_bits());
        assert_eq!(resumed.params().eps.to_bits(), (lr / 3.0).to_bits());
    }
    Ok(())
}

#[test]
fn moves_between_kernels() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    for (from, to) in [(Kernel::Auto, Kernel::Portable), (Kernel::Portable, Kernel::Auto)] {
        let model = Model::new(DType::F16)?;
        let params = ParamsAdamax { gradient_accumulation_steps: 2, ema: Some(Ema::default()), ..Default::default() };
        let mut optimizer = model.optimizer(params.clone())?;
        optimizer.set_kernel(from)?;
        model.run(&mut optimizer, 0..5, false)?;
        optimizer.save(&file)?;
        let mut resumed = model.copy()?.optimizer(params)?;
        resumed.set_kernel(to)?;
        resumed.load(&file)?;
        assert_eq!(Fingerprint::of(&resumed, &[]), Fingerprint::of(&optimizer, &[]), "{from:?} to {to:?}");
    }
    Ok(())
}

#[test]
fn weights_and_state_resume_by_varmap() -> Result<()> {
    let folder = Folder::new();
    let (weights, state) = (folder.file("model.safetensors"), folder.file("optimizer.safetensors"));
    let build = |varmap: &VarMap| -> Result<(candle_nn::Linear, candle_nn::Linear)> {
        let vb = VarBuilder::from_varmap(varmap, DType::F32, &Device::Cpu);
        Ok((candle_nn::linear(3, 4, vb.pp("body.0"))?, candle_nn::linear(4, 1, vb.pp("head"))?))
    };
    let train = |(body, head): &(candle_nn::Linear, candle_nn::Linear), optimizer: &mut Adamax, calls| -> Result<()> {
        use candle_nn::Module;
        let x = candle_core::Tensor::arange(0f32, 15f32, &Device::Cpu)?.reshape((5, 3))?;
        for _ in 0..calls {
            let loss = head.forward(&body.forward(&x)?.tanh()?)?.sqr()?.mean_all()?;
            optimizer.backward_step(&loss)?;
        }
        Ok(())
    };
    let varmap = VarMap::new();
    let model = build(&varmap)?;
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax { lr: 0.05.into(), ..Default::default() })?;
    train(&model, &mut optimizer, 4)?;
    varmap.save(&weights)?;
    optimizer.save(&state)?;
    train(&model, &mut optimizer, 4)?;

    let mut resumed_map = VarMap::new();
    let resumed_model = build(&resumed_map)?;
    resumed_map.load(&weights)?;
    let mut resumed = Adamax::from_varmap(&resumed_map, ParamsAdamax::default())?;
    resumed.load(&state)?;
    train(&resumed_model, &mut resumed, 4)?;
    assert_eq!(Fingerprint::of(&resumed, &[]), Fingerprint::of(&optimizer, &[]));
    let weights = |map: &VarMap| -> Result<Vec<_>> {
        let vars = map.data().lock().unwrap();
        let mut all = vars.iter().map(|(name, var)| Ok((name.clone(), bits(var)))).collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    };
    assert_eq!(weights(&resumed_map)?, weights(&varmap)?);
    Ok(())
}

#[derive(Debug)]
struct Halves;

impl LearningRateSchedule for Halves {
    fn learning_rate(&self, step: u64) -> f64 {
        0.5f64.powi(step as i32)
    }
}

#[test]
fn a_learning_rate_from_outside_stays_the_optimizers_own() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let model = Model::new(DType::F32)?;
    let dial = Var::new(0.25f32, &Device::Cpu)?;
    let custom = || LearningRate::Custom(std::sync::Arc::new(Halves));
    let with = |lr: LearningRate| model.optimizer(ParamsAdamax { lr, ..Default::default() });

    // Both have one: the optimizer's own, whichever kind it is, and it is still live.
    for saved in [LearningRate::from(&Var::new(0.125f64, &Device::Cpu)?), custom()] {
        let mut optimizer = with(saved)?;
        model.run(&mut optimizer, 0..3, false)?;
        optimizer.save(&file)?;
        let mut own_dial = with((&dial).into())?;
        own_dial.load(&file)?;
        assert_eq!(own_dial.learning_rate(), 0.25);
        dial.set(&dial.affine(2.0, 0.0)?)?;
        assert_eq!(own_dial.learning_rate(), 0.5);
        dial.set(&dial.affine(0.5, 0.0)?)?;
        let mut own_custom = with(custom())?;
        own_custom.load(&file)?;
        assert_eq!(own_custom.learning_rate(), 0.125, "the third power of a half, by the calls that were loaded");
    }

    // Only the file has one: a tensor's number as it was; a schedule cannot be had from a file.
    with((&dial).into())?.save(&file)?;
    let mut constant = with(0.7.into())?;
    constant.load(&file)?;
    assert_eq!(constant.learning_rate(), 0.25);
    with(custom())?.save(&file)?;
    let mut constant = with(0.7.into())?;
    let before = Fingerprint::of(&constant, &[]);
    let error = constant.load(&file).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidArgument { field, .. } if field.starts_with("lr")), "{error}");
    assert_eq!(Fingerprint::of(&constant, &[]), before);

    // Only the optimizer has one: everything is as it was when the file was written.
    with(0.7.into())?.save(&file)?;
    let mut own_dial = with((&dial).into())?;
    own_dial.load(&file)?;
    assert_eq!(own_dial.learning_rate(), 0.7);
    Ok(())
}

#[test]
fn a_groups_learning_rate_from_outside_stays_its_own() -> Result<()> {
    let folder = Folder::new();
    let file = folder.file("optimizer.safetensors");
    let var = || Var::zeros(3, DType::F32, &Device::Cpu);
    let with = |lr: LearningRate| -> Result<Adamax> {
        Ok(Adamax::from_groups(
            [candle_adamax::ParamGroup::new("head").var("w", &var()?).lr(lr)],
            ParamsAdamax::default(),
        )?)
    };
    let dial = Var::new(0.25f32, &Device::Cpu)?;
    with(LearningRate::Custom(std::sync::Arc::new(Halves)))?.save(&file)?;
    let mut own_dial = with((&dial).into())?;
    own_dial.load(&file)?;
    let candle_adamax::GroupLr::Own(LearningRate::Tensor(tensor)) = &own_dial.groups()[0].lr else {
        panic!("{:?}", own_dial.groups());
    };
    assert_eq!(tensor.id(), dial.as_tensor().id());
    let error = with(0.5.into())?.load(&file).unwrap_err();
    assert!(error.to_string().contains("groups.head.lr"), "{error}");
    Ok(())
}
