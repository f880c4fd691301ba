//! Variables, groups and settings: in, out and changed between steps.

use candle_adamax::{
    Adamax, Clip, Ema, EpsMode, ErrorKind, ExponentialDecay, GradScaler, GroupLr, GroupSettings, LossScale,
    MissingGradients, ParamGroup, ParamsAdamax, Rounding, SparseUpdate, StateDType, StepCount, WeightDecay,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};

fn var(values: &[f64]) -> Var {
    Var::new(values, &Device::Cpu).unwrap()
}

fn values(var: &Var) -> Vec<f64> {
    var.to_vec1().unwrap()
}

/// The same gradient for each variable.
fn grads(vars: &[&Var], grad: &[f64]) -> GradStore {
    let mut store = GradStore::default();
    for var in vars {
        store.insert(var, Tensor::new(grad, &Device::Cpu).unwrap());
    }
    store
}

/// Settings under which the first update moves a weight by exactly `lr` against the gradient's sign.
fn plain(lr: f64) -> ParamsAdamax {
    ParamsAdamax { lr: lr.into(), beta1: 0.5, beta2: 0.5, eps: 0.0, ..Default::default() }
}

#[test]
fn a_var_that_is_added_later_counts_as_it_is_told() -> Result<()> {
    for (step_count, expected) in [(StepCount::PerVar, -1.0), (StepCount::Shared, -0.5 / 0.75)] {
        let (a, b) = (var(&[0.0]), var(&[0.0]));
        let mut adamax = Adamax::from_named([("a", a.clone())], ParamsAdamax { step_count, ..plain(1.0) })?;
        adamax.step(&grads(&[&a, &b], &[3.0]))?;
        assert_eq!(values(&b), [0.0]);
        adamax.add_var("b", b.clone())?;
        adamax.step(&grads(&[&a, &b], &[3.0]))?;
        assert_eq!(values(&b), [expected], "{step_count:?}");
        assert_eq!((adamax.state("a")?.step, adamax.state("b")?.step, adamax.updates()), (2, 1, 2));
    }
    Ok(())
}

#[test]
fn a_var_that_is_removed_rests_and_comes_back_fresh() -> Result<()> {
    let (a, b) = (var(&[0.0]), var(&[0.0]));
    let mut adamax = Adamax::from_named([("b", b.clone()), ("a", a.clone())], plain(1.0))?;
    assert_eq!(adamax.names().collect::<Vec<_>>(), ["a", "b"]);
    adamax.step(&grads(&[&a, &b], &[1.0]))?;
    assert_eq!(adamax.remove_var("b")?.id(), b.id());
    let error = adamax.remove_var("b").unwrap_err();
    assert_eq!(error.to_string(), "Adamax: unknown var `b`; known are: a");
    let before = values(&b);
    adamax.step(&grads(&[&a, &b], &[1.0]))?;
    assert_eq!(values(&b), before);
    adamax.add_var("b", b)?;
    let state = adamax.state("b")?;
    assert_eq!(
        (state.step, state.exp_avg.to_vec1::<f64>()?, state.exp_inf.to_vec1::<f64>()?),
        (0, vec![0.0], vec![0.0])
    );
    Ok(())
}

#[test]
fn a_group_is_added_whole_or_not_at_all() -> Result<()> {
    let (a, b) = (var(&[0.0]), var(&[0.0]));
    let mut adamax = Adamax::from_named([("a", a.clone())], plain(1.0))?;
    for group in [
        ParamGroup::new("new").var("b", &b).var("c", &a),
        ParamGroup::new("new").var("b", &b).var("a", &var(&[1.0])),
        ParamGroup::new("new").var("b", &b).beta2(1.0),
        ParamGroup::new("default").var("b", &b),
        ParamGroup::new("").var("b", &b),
    ] {
        assert!(adamax.add_group(group).is_err());
        assert_eq!((adamax.names().count(), adamax.groups().len()), (1, 1));
    }
    adamax.add_group(ParamGroup::new("new").var("b", &b))?;
    assert_eq!((adamax.names().count(), adamax.groups().len()), (2, 2));
    Ok(())
}

#[test]
fn groups_override_what_they_say() -> Result<()> {
    let vars: Vec<Var> = (0..5).map(|_| var(&[8.0])).collect();
    let [inherit, factor, own, schedule, decay] = &vars[..] else { unreachable!() };
    let groups = [
        ParamGroup::new("default").var("inherit", inherit),
        ParamGroup::new("factor").var("factor", factor).lr_factor(0.5),
        ParamGroup::new("own").var("own", own).lr(0.25),
        ParamGroup::new("schedule").var("schedule", schedule).lr(ExponentialDecay::new(1.0, 1, 0.5)),
        ParamGroup::new("decay").var("decay", decay).weight_decay(WeightDecay::Decoupled(0.25)),
    ];
    let mut adamax = Adamax::from_groups(groups, plain(1.0))?;
    let store = grads(&vars.iter().collect::<Vec<_>>(), &[4.0]);
    adamax.step(&store)?;
    let now: Vec<f64> = vars.iter().map(|var| values(var)[0]).collect();
    assert_eq!(now, [7.0, 7.5, 7.75, 7.0, 5.0]);

    // The optimizer's learning rate moves those that follow it.
    adamax.set_learning_rate(2.0);
    assert_eq!(adamax.learning_rate(), 2.0);
    adamax.step(&store)?;
    let now: Vec<f64> = vars.iter().map(|var| values(var)[0]).collect();
    assert_eq!(now, [5.0, 6.5, 7.5, 6.5, 5.0 - 2.5 - 2.0]);

    // And so do settings that are replaced later.
    let mut settings = adamax.groups()[2].clone();
    assert_eq!(settings.name, "own");
    settings.lr = GroupLr::Factor(0.0);
    adamax.set_group(settings.clone())?;
    adamax.step(&store)?;
    assert_eq!(values(own), [7.5]);
    settings.name = "nobody".to_owned();
    let error = adamax.set_group(settings).unwrap_err();
    assert_eq!(error.to_string(), "Adamax: unknown group `nobody`; known are: default, factor, own, schedule, decay");
    Ok(())
}

#[test]
fn a_factor_that_leaves_the_numbers_is_an_error_of_the_step() -> Result<()> {
    let w = var(&[8.0]);
    let mut adamax = Adamax::from_groups([ParamGroup::new("g").var("w", &w).lr_factor(1e300)], plain(1e300))?;
    let error = adamax.step(&grads(&[&w], &[1.0])).unwrap_err();
    let text = "Adamax: invalid `groups.g.lr`: expected a finite number that is not negative, got inf";
    assert_eq!(error.to_string(), text);
    assert_eq!((values(&w), adamax.calls()), (vec![8.0], 0));
    Ok(())
}

#[test]
fn names_with_these_components_are_spared_from_decay() -> Result<()> {
    let (weight, bias) = (var(&[8.0]), var(&[8.0]));
    let params =
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.25), no_decay: vec!["bias".to_owned()], ..plain(1.0) };
    let mut adamax = Adamax::from_named([("fc.weight", weight.clone()), ("fc.bias", bias.clone())], params.clone())?;
    adamax.step(&grads(&[&weight, &bias], &[4.0]))?;
    assert_eq!((values(&weight), values(&bias)), (vec![5.0], vec![7.0]));
    adamax.set_params(ParamsAdamax { no_decay: vec!["f*".to_owned()], ..params })?;
    adamax.step(&grads(&[&weight, &bias], &[4.0]))?;
    assert_eq!((values(&weight), values(&bias)), (vec![4.0], vec![6.0]));
    Ok(())
}

#[test]
fn vars_that_are_not_floating_point_are_left_out() -> Result<()> {
    let ids = Var::zeros(3, DType::U32, &Device::Cpu)?;
    let w = var(&[1.0]);
    let mut adamax = Adamax::new(vec![ids, w.clone()], plain(1.0))?;
    assert_eq!(adamax.names().collect::<Vec<_>>(), ["var.1"]);
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert_eq!(values(&w), [0.0]);
    Ok(())
}

#[test]
fn a_varmap_gives_its_names() -> Result<()> {
    let varmap = VarMap::new();
    for name in ["z", "layer.1.weight", "layer.0.weight"] {
        varmap.get((2, 2), name, candle_nn::Init::Const(1.0), DType::F32, &Device::Cpu)?;
    }
    let adamax = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
    assert_eq!(adamax.names().collect::<Vec<_>>(), ["layer.0.weight", "layer.1.weight", "z"]);
    Ok(())
}

#[test]
fn the_learning_rate_comes_from_a_tensor() -> Result<()> {
    let device = Device::Cpu;
    let (lr, w) = (Var::new(1f32, &device)?, var(&[8.0]));
    let params = ParamsAdamax { lr: (&lr).into(), beta1: 0.5, beta2: 0.5, eps: 0.0, ..Default::default() };
    let mut adamax = Adamax::from_named([("w", w.clone())], params)?;
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert_eq!(values(&w), [7.0]);
    lr.set(&Tensor::new(0.25f32, &device)?)?;
    assert_eq!(adamax.learning_rate(), 0.25);
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert_eq!((values(&w), adamax.report().lr()), (vec![6.75], 0.25));
    Ok(())
}

#[test]
fn settings_can_be_replaced_where_the_state_allows() -> Result<()> {
    let w = var(&[8.0]);
    let mut adamax = Adamax::from_named([("w", w.clone())], plain(1.0))?;
    let inside = ParamsAdamax { eps_mode: EpsMode::InsideMax, ..plain(1.0) };
    adamax.set_params(inside.clone())?;
    adamax.set_params(ParamsAdamax { ema: Some(Ema::default()), ..plain(1.0) })?;
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert!(adamax.state("w")?.ema.is_some());

    let error = adamax.set_params(inside).unwrap_err();
    let expected = "Adamax: invalid `eps_mode`: expected AddToNorm as before, since u is made for it, got InsideMax";
    assert_eq!(error.to_string(), expected);
    assert!(adamax.set_params(ParamsAdamax { beta1: -0.1, ..plain(1.0) }).is_err());
    assert_eq!((adamax.params().beta1, adamax.params().ema), (0.5, Some(Ema::default())));

    adamax.set_params(ParamsAdamax { gradient_accumulation_steps: 2, ..plain(1.0) })?;
    assert!(adamax.state("w")?.ema.is_none());
    assert!(adamax.finalize_ema().unwrap_err().to_string().starts_with("Adamax: invalid `ema`"));
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert!(!adamax.report().updated());
    let error = adamax.set_params(plain(1.0)).unwrap_err();
    let field = "gradient_accumulation_steps";
    assert!(matches!(error.kind(), ErrorKind::InvalidArgument { field: f, .. } if f == field), "{error}");
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert!(adamax.report().updated());
    adamax.set_params(plain(1.0))?;
    Ok(())
}

#[test]
fn accumulation_uses_what_a_var_had_in_any_of_the_calls() -> Result<()> {
    let (a, b) = (var(&[0.0]), var(&[0.0]));
    let params = ParamsAdamax { gradient_accumulation_steps: 4, beta1: 0.0, ..plain(1.0) };
    let mut adamax = Adamax::from_named([("a", a.clone()), ("b", b.clone())], params)?;
    adamax.step(&grads(&[&a, &b], &[2.0]))?;
    assert_eq!(adamax.state("b")?.accumulated.unwrap().dense().unwrap().to_vec1::<f64>()?, [2.0]);
    for _ in 0..3 {
        adamax.step(&grads(&[&a], &[2.0]))?;
        assert_eq!(adamax.report().missing().collect::<Vec<_>>(), ["b"]);
    }
    // The sum is divided by the number of calls, not by the number of gradients.
    assert_eq!(adamax.state("a")?.exp_avg.to_vec1::<f64>()?, [2.0]);
    assert_eq!(adamax.state("b")?.exp_avg.to_vec1::<f64>()?, [0.5]);
    assert_eq!((adamax.calls(), adamax.updates()), (4, 1));
    assert!(adamax.state("a")?.accumulated.is_none());
    // Nothing of it is left for the next update.
    for _ in 0..4 {
        adamax.step(&grads(&[&a], &[1.0]))?;
    }
    assert_eq!((adamax.state("a")?.step, adamax.state("b")?.step), (2, 1));
    assert_eq!(adamax.state("a")?.exp_avg.to_vec1::<f64>()?, [1.0]);
    Ok(())
}

#[test]
fn an_accumulated_sum_that_overflows_is_dropped() -> Result<()> {
    let w = Var::new(&[8f32], &Device::Cpu)?;
    let params = ParamsAdamax { gradient_accumulation_steps: 2, skip_nonfinite: true, ..plain(1.0) };
    let mut adamax = Adamax::from_named([("w", w.clone())], params)?;
    let step =
        |adamax: &mut Adamax, grad: f32| adamax.apply_gradients([(&w, &Tensor::new(&[grad], &Device::Cpu)?)]).map(drop);
    step(&mut adamax, 3e38)?;
    step(&mut adamax, 3e38)?;
    assert!(adamax.report().skipped());
    assert_eq!((adamax.calls(), adamax.updates(), adamax.skipped()), (1, 0, 1));
    let state = adamax.state("w")?;
    assert_eq!((w.to_vec1::<f32>()?, state.exp_inf.to_vec1::<f32>()?), (vec![8.0], vec![0.0]));
    assert!(state.accumulated.is_none());
    // The next ones begin anew, with nothing of it.
    step(&mut adamax, 1.0)?;
    step(&mut adamax, 3.0)?;
    assert_eq!((adamax.updates(), w.to_vec1::<f32>()?), (1, vec![7.0]));
    assert_eq!(adamax.state("w")?.exp_inf.to_vec1::<f32>()?, [2.0]);
    Ok(())
}

#[test]
fn pairs_are_a_step() -> Result<()> {
    let (a, b) = (var(&[1.0, 2.0]), var(&[1.0, 2.0]));
    let mut by_store = Adamax::from_named([("w", a.clone())], ParamsAdamax::pytorch())?;
    let mut by_pairs = Adamax::from_named([("w", b.clone())], ParamsAdamax::pytorch())?;
    for i in 0..5 {
        let grad = [f64::from(i) - 2.0, 0.3];
        by_store.step(&grads(&[&a], &grad))?;
        by_pairs.apply_gradients([(&b, &Tensor::new(&grad, &Device::Cpu)?)])?;
    }
    assert_eq!(values(&a), values(&b));
    assert_eq!(by_pairs.calls(), 5);
    Ok(())
}

#[test]
fn settings_go_through_json() -> anyhow::Result<()> {
    let params = ParamsAdamax {
        lr: ExponentialDecay::new(0.1, 10, 0.3).into(),
        weight_decay: WeightDecay::L2(1e-17),
        ema: Some(Ema { momentum: 0.1 + 0.2, overwrite_frequency: Some(7) }),
        ..ParamsAdamax::pytorch()
    };
    let json = serde_json::to_string(&params)?;
    let back: ParamsAdamax = serde_json::from_str(&json)?;
    assert_eq!(format!("{back:?}"), format!("{params:?}"));

    let partial: ParamsAdamax = serde_json::from_str(r#"{"lr": 0.5, "clip": {"Norm": 2.0}}"#)?;
    assert_eq!((partial.lr.at(0)?, partial.clip, partial.eps), (0.5, Some(Clip::Norm(2.0)), 1e-7));
    let error = serde_json::from_str::<ParamsAdamax>(r#"{"learning_rate": 0.5}"#).unwrap_err();
    assert!(error.to_string().contains("unknown field `learning_rate`"), "{error}");
    Ok(())
}

#[test]
fn the_norm_is_measured_on_request() -> Result<()> {
    let w = var(&[0.0, 0.0]);
    for (limit, measure_norm, expected) in [(None, false, None), (None, true, Some(5.0)), (Some(1.0), true, Some(5.0))]
    {
        let params = ParamsAdamax { clip: limit.map(Clip::Value), measure_norm, ..plain(1.0) };
        let mut adamax = Adamax::from_named([("w", w.clone())], params)?;
        adamax.step(&grads(&[&w], &[3.0, -4.0]))?;
        assert_eq!(adamax.report().total_norm(), expected);
        // It is of the gradients before they are clipped, which it does not touch.
        assert_eq!(adamax.state("w")?.exp_inf.to_vec1::<f64>()?, limit.map_or([3.0, 4.0], |limit| [limit; 2]));
    }
    Ok(())
}

#[test]
fn names_are_not_empty() {
    let error = Adamax::from_named([("", var(&[1.0]))], plain(1.0)).unwrap_err();
    assert_eq!(error.to_string(), "Adamax: invalid `name`: expected a name for every var, got an empty one");
    assert!(ParamsAdamax { name: String::new(), ..plain(1.0) }.validate().is_err());
}

#[test]
fn an_optimizer_says_what_it_is() -> Result<()> {
    let params = ParamsAdamax { name: "tables".to_owned(), ..Default::default() };
    let adamax = Adamax::from_named([("w", var(&[1.0; 1000]))], params)?;
    let text = "tables(lr: 0.001, beta1: 0.9, beta2: 0.999, eps: 1e-7 AddToNorm, vars: 1, updates: 0)";
    assert_eq!(adamax.to_string(), text);
    let settings = ParamsAdamax {
        state_dtype: StateDType::Q8,
        rowwise_norm: true,
        rounding: Rounding::Stochastic,
        sparse_update: SparseUpdate::Exact,
        ..Default::default()
    };
    let text = "Adamax(lr: 0.001, beta1: 0.9, beta2: 0.999, eps: 1e-7 AddToNorm, moments: Q8, one norm a row, \
                rounding: Stochastic, rows: Exact, vars: 0, updates: 0)";
    assert_eq!(Adamax::new(vec![], settings)?.to_string(), text);
    assert!(format!("{adamax:?}").len() < 2000, "the moments are not for printing");
    Ok(())
}

#[test]
fn bytes_are_those_of_each_kind() -> Result<()> {
    let device = Device::Cpu;
    let half = Var::zeros((3, 1000), DType::BF16, &device)?;
    let full = Var::zeros(10, DType::F32, &device)?;
    let double = Var::zeros(10, DType::F64, &device)?;
    let groups = [
        ParamGroup::new("half").var("half", &half).state_dtype(StateDType::Q8).rounding(Rounding::Master),
        ParamGroup::new("full").var("full", &full).var("double", &double),
    ];
    let params = ParamsAdamax { gradient_accumulation_steps: 2, ema: Some(Ema::default()), ..Default::default() };
    let mut adamax = Adamax::from_groups(groups, params)?;
    // 3,000 elements are 3 blocks of 1,024 with a unit each.
    let expected = (2 * 3000 + 2 * 4 * 10 + 2 * 8 * 10, 4 * 3, 2 * 3000);
    let bytes = adamax.bytes();
    assert_eq!((bytes.moments, bytes.scales, bytes.masters), expected);
    assert_eq!((bytes.averages, bytes.accumulated, bytes.missed), (0, 0, 0));
    let of_vars = ["half", "full", "double"].map(|name| adamax.state_bytes(name).unwrap());
    assert_eq!(bytes.total(), of_vars.iter().sum::<usize>());

    let mut store = GradStore::default();
    store.insert(&half, half.ones_like()?);
    store.insert(&double, double.ones_like()?);
    adamax.step(&store)?;
    let bytes = adamax.bytes();
    assert_eq!((bytes.moments, bytes.scales, bytes.masters), expected);
    // Sums of those with a gradient, in the type of the arithmetic; averages begin with the first update.
    assert_eq!((bytes.averages, bytes.accumulated), (0, 4 * 3000 + 8 * 10));
    adamax.step(&store)?;
    let bytes = adamax.bytes();
    // The sums' memory is kept; what had no gradient has no average.
    assert_eq!((bytes.averages, bytes.accumulated), (4 * 3000 + 8 * 10, 4 * 3000 + 8 * 10));
    assert_eq!(bytes.total(), bytes.moments + bytes.scales + bytes.masters + bytes.averages + bytes.accumulated);
    Ok(())
}

#[test]
fn bytes_of_tables_are_those_of_touched_rows_and_of_marks() -> Result<()> {
    let device = Device::Cpu;
    let weight = Var::zeros((100, 4), DType::F32, &device)?;
    let (indices, values) = (Tensor::new(&[7u32, 3, 7], &device)?, Tensor::ones((3, 4), DType::F32, &device)?);
    let grad = candle_adamax::SparseGrad { indices, values };

    let params = ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() };
    let mut adamax = Adamax::from_named([("w", weight.clone())], params)?;
    adamax.apply_gradients([(&weight, &grad)])?;
    assert_eq!(adamax.bytes().accumulated, 2 * 4 + 2 * 4 * 4);
    drop(adamax);

    let params = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..Default::default() };
    let mut adamax = Adamax::from_named([("w", weight.clone())], params)?;
    assert_eq!(adamax.bytes().missed, 0);
    adamax.apply_gradients([(&weight, &grad)])?;
    let first = adamax.bytes().missed;
    adamax.apply_gradients([(&weight, &grad)])?;
    let second = adamax.bytes().missed;
    assert!(first > 4 * 100, "{first}");
    // What the README says of an update: some 100 bytes.
    assert!((90..=110).contains(&(second - first)), "{first}, {second}");
    Ok(())
}

#[test]
fn statistics_are_those_of_the_moments() -> Result<()> {
    let w = var(&[1.0, 1.0, 1.0, 1.0]);
    let mut adamax = Adamax::from_named([("w", w.clone())], plain(0.1))?;
    let before = adamax.moment_statistics("w")?;
    assert_eq!((before.exp_avg.zeros, before.exp_inf.max, before.max_ratio), (1.0, 0.0, 0.0));
    adamax.step(&grads(&[&w], &[4.0, -2.0, 0.0, f64::NAN]))?;
    let now = adamax.moment_statistics("w")?;
    // m is half of the gradient, u its magnitude.
    let m = now.exp_avg;
    assert_eq!((m.count, m.non_finite, m.min, m.max, m.zeros), (4, 1, -1.0, 2.0, 1.0 / 3.0));
    assert_eq!((m.mean, m.rms), (1.0 / 3.0, (5.0f64 / 3.0).sqrt()));
    assert_eq!((now.exp_inf.min, now.exp_inf.max, now.exp_inf.mean), (0.0, 4.0, 2.0));
    assert_eq!(now.max_ratio, 0.5);
    // Of codes, what they stand for.
    let halves = Var::ones(5000, DType::F32, &Device::Cpu)?;
    let params = ParamsAdamax { state_dtype: StateDType::Q8, ..Default::default() };
    let mut adamax = Adamax::from_named([("w", halves.clone())], params)?;
    let mut store = GradStore::default();
    store.insert(&halves, (halves.ones_like()? * 0.25)?);
    adamax.step(&store)?;
    let now = adamax.moment_statistics("w")?;
    assert!((0.25..0.29).contains(&now.exp_inf.rms) && (now.max_ratio - 0.1).abs() < 0.01, "{now:?}");
    let error = adamax.moment_statistics("v").unwrap_err();
    assert_eq!(error.to_string(), "Adamax: unknown var `v`; known are: w");
    Ok(())
}

#[test]
fn each_group_tells_its_learning_rate() -> Result<()> {
    let w = var(&[1.0]);
    let groups = [
        ParamGroup::new("factor").lr_factor(0.5),
        ParamGroup::new("own").lr(ExponentialDecay::new(8.0, 1, 0.5)),
        ParamGroup::new("default").var("w", &w),
    ];
    let mut adamax =
        Adamax::from_groups(groups, ParamsAdamax { missing_gradients: MissingGradients::Allow, ..plain(2.0) })?;
    let rates = |adamax: &Adamax| ["default", "factor", "own"].map(|name| adamax.group_learning_rate(name).unwrap());
    assert_eq!(rates(&adamax), [2.0, 1.0, 8.0]);
    // A call without a gradient is none, for schedules, too.
    adamax.step(&GradStore::default())?;
    assert_eq!(rates(&adamax), [2.0, 1.0, 8.0]);
    adamax.step(&grads(&[&w], &[1.0]))?;
    assert_eq!(rates(&adamax), [2.0, 1.0, 4.0]);
    adamax.set_learning_rate(4.0);
    assert_eq!(rates(&adamax), [4.0, 2.0, 4.0]);
    Ok(())
}

/// Settings with a decay that spares variables of these patterns.
fn sparing(patterns: &[&str]) -> ParamsAdamax {
    let no_decay = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), no_decay, ..plain(1.0) }
}

#[test]
fn a_pattern_that_spares_nothing_is_refused() -> Result<()> {
    let text = "Adamax: invalid `no_decay`: expected whole components of the names of vars, `*` for a part of one; \
                they are LayerNorm.weight, fc.bias, fc.weight, got `Norm`, which matches none";
    let names = ["fc.weight", "fc.bias", "LayerNorm.weight"];
    let vars = || names.map(|name| (name, var(&[1.0])));
    let wrong = sparing(&["bias", "Norm"]);
    assert_eq!(Adamax::from_named(vars(), wrong.clone()).unwrap_err().to_string(), text);
    let error = Adamax::from_groups([ParamGroup::new("all").vars(vars())], wrong.clone()).unwrap_err();
    assert_eq!(error.to_string(), text);
    // A decay of a group counts, too.
    let group = ParamGroup::new("all").vars(vars()).weight_decay(WeightDecay::L2(0.1));
    let params = ParamsAdamax { weight_decay: WeightDecay::None, ..wrong.clone() };
    assert_eq!(Adamax::from_groups([group], params.clone()).unwrap_err().to_string(), text);
    let varmap = VarMap::new();
    for name in names {
        varmap.get(1, name, candle_nn::Init::Const(1.0), DType::F32, &Device::Cpu)?;
    }
    assert_eq!(Adamax::from_varmap(&varmap, wrong.clone()).unwrap_err().to_string(), text);
    // Variables without names are never spared by one.
    let error = Adamax::new(vec![var(&[1.0])], sparing(&["bias"])).map(drop).unwrap_err().to_string();
    assert!(error.contains("they are var.0, got `bias`, which matches none"), "{error}");

    // Where nothing decays, or there is no variable yet, there is nothing to spare.
    Adamax::from_named(vars(), params)?;
    Adamax::from_named(vars(), ParamsAdamax { weight_decay: WeightDecay::L2(0.0), ..wrong.clone() })?;
    Adamax::from_named::<&str>([], wrong.clone())?;

    let mut adamax = Adamax::from_named(vars(), sparing(&["bias", "LayerNorm"]))?;
    assert_eq!(adamax.set_params(wrong).unwrap_err().to_string(), text);
    assert_eq!(adamax.params().no_decay, ["bias", "LayerNorm"]);
    assert_eq!(adamax.spared_names().collect::<Vec<_>>(), ["LayerNorm.weight", "fc.bias"]);
    let shown = adamax.to_string();
    assert!(shown.contains("weight decay: Decoupled(0.1), no decay: 2 of 3 vars"), "{shown}");
    // A pattern that was right when the optimizer was made stays accepted.
    adamax.remove_var("LayerNorm.weight")?;
    adamax.set_params(adamax.params().clone())?;
    Ok(())
}

#[test]
fn a_group_that_begins_to_decay_needs_patterns_that_spare_something() -> Result<()> {
    let params = ParamsAdamax { weight_decay: WeightDecay::None, ..sparing(&["biass"]) };
    let mut adamax = Adamax::from_named([("bias", var(&[1.0]))], params)?;
    let mut settings = GroupSettings::new("default");
    settings.weight_decay = Some(WeightDecay::L2(0.1));
    let error = adamax.set_group(settings.clone()).unwrap_err().to_string();
    assert!(error.contains("got `biass`, which matches none"), "{error}");
    assert!(adamax.groups()[0].weight_decay.is_none());
    adamax.set_params(ParamsAdamax { no_decay: vec!["bias".into()], ..adamax.params().clone() })?;
    adamax.set_group(settings)?;
    Ok(())
}

#[test]
fn a_group_that_nobody_made_does_not_count() -> Result<()> {
    let groups = || ["a", "b", "c"].map(|name| ParamGroup::new(name).var(name, &var(&[1.0])));
    let mut adamax = Adamax::from_groups(groups(), plain(1.0))?;
    let names = |adamax: &Adamax| adamax.groups().iter().map(|group| group.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&adamax), ["a", "b", "c"]);
    assert!(adamax.to_string().contains("groups: 3, vars: 3"), "{adamax}");
    // It is there as soon as it overrides something, or has a variable.
    let mut settings = GroupSettings::new("default");
    settings.beta1 = Some(0.25);
    adamax.set_group(settings)?;
    assert_eq!(names(&adamax), ["default", "a", "b", "c"]);
    let mut adamax = Adamax::from_groups(groups(), plain(1.0))?;
    adamax.add_var("d", var(&[1.0]))?;
    assert_eq!(names(&adamax), ["default", "a", "b", "c"]);
    // A snapshot has it in any case, as before.
    let adamax = Adamax::from_groups(groups(), plain(1.0))?;
    let snapshot = adamax.snapshot()?;
    assert_eq!(snapshot.groups.len(), 4);
    Adamax::from_groups(groups(), plain(1.0))?.restore(&snapshot)?;
    Ok(())
}

#[test]
fn those_that_are_kept_are_asked_for_by_name() -> Result<()> {
    let varmap = VarMap::new();
    for name in ["norm.weight", "norm.running_mean", "norm.running_var"] {
        varmap.get(2, name, candle_nn::Init::Const(1.0), DType::F32, &Device::Cpu)?;
    }
    let mut asked = Vec::new();
    let keep = |name: &str, var: &Var| {
        assert_eq!(var.dims(), [2]);
        asked.push(name.to_owned());
        !name.contains("running_")
    };
    let adamax = Adamax::from_varmap_where(&varmap, keep, ParamsAdamax::default())?;
    assert_eq!(adamax.names().collect::<Vec<_>>(), ["norm.weight"]);
    assert_eq!(asked, ["norm.running_mean", "norm.running_var", "norm.weight"]);
    let error = Adamax::from_varmap_where(&varmap, |_, _| false, ParamsAdamax::default()).unwrap_err();
    assert_eq!(error.to_string(), "Adamax: invalid `keep`: expected a function that keeps a variable, got none of 3");
    assert_eq!(Adamax::from_varmap(&VarMap::new(), ParamsAdamax::default())?.names().count(), 0);
    Ok(())
}

#[test]
fn a_group_in_a_file_needs_no_learning_rate() -> anyhow::Result<()> {
    let group: GroupSettings = serde_json::from_str(r#"{"name": "head", "beta1": 0.5}"#)?;
    assert!(matches!(group.lr, GroupLr::Inherit) && group.beta1 == Some(0.5));
    let error = serde_json::from_str::<GroupSettings>(r#"{"name": "head", "beta_1": 0.5}"#).unwrap_err();
    assert!(error.to_string().contains("unknown field `beta_1`"), "{error}");
    Ok(())
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    optimizer: ParamsAdamax,
    groups: Vec<GroupSettings>,
}

const TOML: &str = r#"
[optimizer]
lr = { class_name = "ExponentialDecay", config = { initial_learning_rate = 1e-3, decay_steps = 10, decay_rate = 0.5 } }
weight_decay = { Decoupled = 1e-2 }
no_decay = ["bias"]
step_count = "PerVar"
clip = { GlobalNorm = 1 }
state_dtype = "BF16"
ema = { momentum = 0.5 }
loss_scale = { Dynamic = { init_scale = 1024 } }

[[groups]]
name = "default"

[[groups]]
name = "head"
lr = { Factor = 0.5 }
weight_decay = "None"

[[groups]]
name = "body"
lr = { Own = 1e-3 }
beta1 = 0
"#;

const YAML: &str = "
optimizer:
  lr:
    class_name: ExponentialDecay
    config: {initial_learning_rate: 1e-3, decay_steps: 10, decay_rate: 0.5}
  weight_decay: !Decoupled 1e-2
  no_decay: [bias]
  step_count: PerVar
  clip: !GlobalNorm 1
  state_dtype: BF16
  ema:
    momentum: 0.5
  loss_scale: !Dynamic
    init_scale: 1024
groups:
  - name: default
  - name: head
    lr: !Factor 0.5
    weight_decay: None
  - name: body
    lr: !Own 1e-3
    beta1: 0
";

#[test]
fn settings_come_from_toml_and_yaml() -> anyhow::Result<()> {
    let expected = ParamsAdamax {
        lr: ExponentialDecay::new(1e-3, 10, 0.5).into(),
        weight_decay: WeightDecay::Decoupled(1e-2),
        no_decay: vec!["bias".into()],
        step_count: StepCount::PerVar,
        clip: Some(Clip::GlobalNorm(1.0)),
        state_dtype: StateDType::BF16,
        ema: Some(Ema { momentum: 0.5, overwrite_frequency: None }),
        loss_scale: LossScale::Dynamic(GradScaler { init_scale: 1024.0, ..GradScaler::default() }),
        ..ParamsAdamax::default()
    };
    let mut head = GroupSettings::new("head");
    (head.lr, head.weight_decay) = (GroupLr::Factor(0.5), Some(WeightDecay::None));
    let mut body = GroupSettings::new("body");
    (body.lr, body.beta1) = (GroupLr::Own(1e-3.into()), Some(0.0));
    let groups = vec![GroupSettings::new("default"), head, body];
    let read: [Settings; 2] = [toml::from_str(TOML)?, serde_norway::from_str(YAML)?];
    for settings in read {
        assert_eq!(format!("{:?}", settings.optimizer), format!("{expected:?}"));
        assert_eq!(format!("{:?}", settings.groups), format!("{groups:?}"));
        let vars = [("w.weight", var(&[1.0])), ("w.bias", var(&[1.0]))];
        let mut adamax = Adamax::from_named(vars, settings.optimizer)?;
        for group in settings.groups.iter().skip(1) {
            adamax.add_group(ParamGroup::new(group.name.clone()))?;
        }
        settings.groups.into_iter().try_for_each(|group| adamax.set_group(group))?;
        assert_eq!(adamax.group_learning_rate("head")?, 5e-4);
    }
    Ok(())
}

#[test]
fn unknown_keys_are_named_in_every_format() {
    for (key, wrong) in [("step_count", "step_counts"), ("beta1", "beta_1"), ("decay_steps", "decay_step")] {
        let errors = [
            toml::from_str::<Settings>(&TOML.replace(key, wrong)).unwrap_err().to_string(),
            serde_norway::from_str::<Settings>(&YAML.replace(key, wrong)).unwrap_err().to_string(),
        ];
        for error in errors {
            assert!(error.contains(&format!("unknown field `{wrong}`")), "{error}");
        }
    }
}
