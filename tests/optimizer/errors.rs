//! Every mistake is an error that says whose it is, what it is about, what was given and what is allowed; and whatever
//! fails, or is skipped, has changed nothing.

use std::sync::Arc;
use std::time::Duration;

use candle_adamax::{
    Adamax, Clip, CosineDecay, CosineDecayRestarts, Ema, EpsMode, ErrorKind, ExponentialDecay, GradScaler, GroupLr,
    GroupSettings, InverseTimeDecay, Join, LearningRate, LearningRateSchedule, LinearWarmup, LossScale,
    MissingGradients, NormType, OneCycle, ParamGroup, ParamsAdamax, PiecewiseConstantDecay, PolynomialDecay,
    ReduceLrOnPlateau, WeightDecay,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer as _;

use crate::common::folder::Folder;
use crate::common::{Fingerprint, KERNELS, noise, tensor, values, var};

/// Settings under a name of their own, which every error has to begin with.
fn named() -> ParamsAdamax {
    ParamsAdamax { name: "Encoder".into(), ..ParamsAdamax::default() }
}

/// The error of making an optimizer, all of its text.
#[track_caller]
fn assert_refused(params: ParamsAdamax, text: &str) {
    let error = Adamax::from_named::<&str>([], params.clone()).unwrap_err();
    assert_eq!(error.to_string(), format!("Encoder: {text}"));
    assert_eq!(error.optimizer(), Some("Encoder"));
    assert_eq!(params.validate().unwrap_err().to_string(), error.to_string());
    // Through candle's own signature nothing is lost.
    let error = Adamax::new(Vec::new(), params).map(drop).unwrap_err();
    assert!(error.to_string().contains(&format!("Encoder: {text}")), "{error}");
}

#[track_caller]
fn assert_invalid(params: ParamsAdamax, field: &str, expected: &str, got: &str) {
    match Adamax::from_named::<&str>([], params.clone()).unwrap_err().kind() {
        ErrorKind::InvalidArgument { field: f, expected: e, got: g } => {
            assert_eq!((f.as_str(), e.as_str(), g.as_str()), (field, expected, got));
        }
        other => panic!("expected an invalid `{field}`, got {other:?}"),
    }
    assert_refused(params, &format!("invalid `{field}`: expected {expected}, got {got}"));
}

const NOT_NEGATIVE: &str = "a finite number that is not negative";
const POSITIVE: &str = "a finite number above 0";

/// What no learning rate, epsilon or decay may be, and how it is shown.
const NEGATIVE: [(f64, &str); 4] =
    [(-0.5, "-0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")];

#[test]
fn learning_rates() {
    for (lr, got) in NEGATIVE {
        assert_invalid(ParamsAdamax { lr: lr.into(), ..named() }, "lr", NOT_NEGATIVE, got);
    }
    assert!(ParamsAdamax { lr: 0.0.into(), ..named() }.validate().is_ok());
}

#[test]
fn learning_rate_tensors() {
    let lr = |tensor: Tensor| ParamsAdamax { lr: tensor.into(), ..named() };
    let cpu = &Device::Cpu;
    let two = lr(Tensor::new(&[0.1f32, 0.2], cpu).unwrap());
    assert_invalid(two, "lr", "a tensor of one element", "one of shape [2]");
    let none = lr(Tensor::zeros(0, DType::F32, cpu).unwrap());
    assert_invalid(none, "lr", "a tensor of one element", "one of shape [0]");
    assert_invalid(lr(Tensor::new(1u32, cpu).unwrap()), "lr", "a tensor of a floating dtype", "one of u32");
    assert_invalid(lr(Tensor::new(1i64, cpu).unwrap()), "lr", "a tensor of a floating dtype", "one of i64");
    assert_invalid(lr(Tensor::new(-0.5f32, cpu).unwrap()), "lr", NOT_NEGATIVE, "-0.5");
    assert_invalid(lr(Tensor::new(f32::NAN, cpu).unwrap()), "lr", NOT_NEGATIVE, "NaN");
}

#[test]
fn betas() {
    let allowed = "a number in [0, 1)";
    for (beta, got) in [(-0.25, "-0.25"), (1.0, "1"), (1.5, "1.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        assert_invalid(ParamsAdamax { beta1: beta, ..named() }, "beta1", allowed, got);
        assert_invalid(ParamsAdamax { beta2: beta, ..named() }, "beta2", allowed, got);
    }
    assert!(ParamsAdamax { beta1: 0.0, beta2: 0.0, ..named() }.validate().is_ok());
}

#[test]
fn epsilon_and_decay() {
    for (x, got) in NEGATIVE {
        assert_invalid(ParamsAdamax { eps: x, ..named() }, "eps", NOT_NEGATIVE, got);
        for weight_decay in [WeightDecay::L2(x), WeightDecay::Decoupled(x)] {
            assert_invalid(ParamsAdamax { weight_decay, ..named() }, "weight_decay", NOT_NEGATIVE, got);
        }
    }
    for pattern in ["", ".", "fc.", ".bias", "fc..bias"] {
        let no_decay = vec!["bias".to_owned(), pattern.to_owned()];
        let (allowed, got) = ("patterns without empty components", format!("{pattern:?}"));
        assert_invalid(ParamsAdamax { no_decay, ..named() }, "no_decay", allowed, &got);
    }
    assert!(ParamsAdamax { eps: 0.0, ..named() }.validate().is_ok());
}

#[test]
fn clips_and_the_loss_scale() {
    for (x, got) in NEGATIVE.into_iter().chain([(0.0, "0")]) {
        for (clip, variant) in [
            (Clip::Value(x), "Value"),
            (Clip::Norm(x), "Norm"),
            (Clip::GlobalNorm(x), "GlobalNorm"),
            (Clip::GradNorm { max_norm: x, norm_type: NormType::L2 }, "GradNorm"),
        ] {
            let expected = format!("{POSITIVE} for `{variant}`");
            assert_invalid(ParamsAdamax { clip: Some(clip), ..named() }, "clip", &expected, got);
        }
        let expected = "a number in [2^-126, 2^126] for `Static`";
        assert_invalid(ParamsAdamax { loss_scale: LossScale::Static(x), ..named() }, "loss_scale", expected, got);
    }
}

#[test]
fn a_loss_scale_that_follows() {
    let check = |scaler: GradScaler, field: &str, expected: &str, got: &str| {
        assert_invalid(ParamsAdamax { loss_scale: LossScale::Dynamic(scaler), ..named() }, field, expected, got);
    };
    let default = GradScaler::default();
    let range = "a number in [2^-126, 2^127]";
    check(GradScaler { init_scale: 0.0, ..default }, "loss_scale.init_scale", range, "0");
    check(GradScaler { init_scale: f64::NAN, ..default }, "loss_scale.init_scale", range, "NaN");
    check(GradScaler { init_scale: f64::INFINITY, ..default }, "loss_scale.init_scale", range, "inf");
    let above = "a finite number above 1";
    check(GradScaler { growth_factor: 1.0, ..default }, "loss_scale.growth_factor", above, "1");
    check(GradScaler { growth_factor: f64::INFINITY, ..default }, "loss_scale.growth_factor", above, "inf");
    let share = "a number in (0, 1)";
    check(GradScaler { backoff_factor: 0.0, ..default }, "loss_scale.backoff_factor", share, "0");
    check(GradScaler { backoff_factor: 1.0, ..default }, "loss_scale.backoff_factor", share, "1");
    check(GradScaler { growth_interval: 0, ..default }, "loss_scale.growth_interval", "at least 1 step", "0");
}

#[test]
fn plateaus() {
    let check = |plateau: ReduceLrOnPlateau, field: &str, expected: &str, got: &str| {
        assert_invalid(ParamsAdamax { plateau: Some(plateau), ..named() }, field, expected, got);
    };
    let default = ReduceLrOnPlateau::default();
    check(ReduceLrOnPlateau { factor: 1.0, ..default }, "plateau.factor", "a number in [0, 1)", "1");
    check(ReduceLrOnPlateau { factor: -0.5, ..default }, "plateau.factor", "a number in [0, 1)", "-0.5");
    for (x, got) in NEGATIVE {
        check(ReduceLrOnPlateau { threshold: x, ..default }, "plateau.threshold", NOT_NEGATIVE, got);
        check(ReduceLrOnPlateau { min_lr: x, ..default }, "plateau.min_lr", NOT_NEGATIVE, got);
        check(ReduceLrOnPlateau { eps: x, ..default }, "plateau.eps", NOT_NEGATIVE, got);
    }
    let error = two_vars(named()).0.observe_metric(1.0).unwrap_err();
    let text = "Encoder: invalid `plateau`: expected the settings of a plateau, for a metric to be observed, got none";
    assert_eq!(error.to_string(), text);
    let error = two_vars(named()).0.group_learning_rate("head").unwrap_err();
    assert_eq!(error.to_string(), "Encoder: unknown group `head`; known are: default");
}

#[test]
fn averages_and_accumulation() {
    for (momentum, got) in [(-0.25, "-0.25"), (1.5, "1.5"), (f64::NAN, "NaN")] {
        let ema = Some(Ema { momentum, overwrite_frequency: None });
        assert_invalid(ParamsAdamax { ema, ..named() }, "ema.momentum", "a number in [0, 1]", got);
    }
    let ema = Some(Ema { overwrite_frequency: Some(0), ..Ema::default() });
    assert_invalid(ParamsAdamax { ema, ..named() }, "ema.overwrite_frequency", "at least 1 step", "0");
    let params = ParamsAdamax { gradient_accumulation_steps: 0, ..named() };
    assert_invalid(params, "gradient_accumulation_steps", "at least 1 step", "0");
    let error = two_vars(named()).0.finalize_ema().unwrap_err();
    assert_eq!(error.to_string(), "Encoder: invalid `ema`: expected a moving average to finalize with, got none");
}

#[test]
fn schedules() {
    #[track_caller]
    fn check(lr: impl Into<LearningRate>, field: &str, expected: &str, got: &str) {
        assert_invalid(ParamsAdamax { lr: lr.into(), ..named() }, field, expected, got);
    }
    let at_least_one = "at least 1 step";
    check(ExponentialDecay::new(0.1, 0, 0.5), "lr.decay_steps", at_least_one, "0");
    check(ExponentialDecay::new(-0.5, 1, 0.5), "lr.initial_learning_rate", NOT_NEGATIVE, "-0.5");
    check(ExponentialDecay::new(0.1, 1, f64::NAN), "lr.decay_rate", NOT_NEGATIVE, "NaN");
    check(InverseTimeDecay::new(0.1, 0, 0.5), "lr.decay_steps", at_least_one, "0");
    check(PolynomialDecay::new(0.1, 0), "lr.decay_steps", at_least_one, "0");
    let negative = PolynomialDecay { power: -0.5, ..PolynomialDecay::new(0.1, 1) };
    check(negative, "lr.power", NOT_NEGATIVE, "-0.5");
    check(CosineDecay::new(0.1, 0), "lr.decay_steps", at_least_one, "0");
    let too_high = CosineDecay { alpha: 1.5, ..CosineDecay::new(0.1, 1) };
    check(too_high, "lr.alpha", "a number in [0, 1]", "1.5");
    let no_target = CosineDecay { warmup_steps: 5, ..CosineDecay::new(0.1, 1) };
    check(no_target, "lr.warmup_target", "a learning rate for the 5 warmup_steps to end at", "none");
    check(CosineDecayRestarts::new(0.1, 0), "lr.first_decay_steps", at_least_one, "0");
    let shorter = CosineDecayRestarts { t_mul: 0.5, ..CosineDecayRestarts::new(0.1, 1) };
    check(shorter, "lr.t_mul", "a finite number of at least 1", "0.5");
    check(LinearWarmup::new(0.0, f64::INFINITY, 3), "lr.target_learning_rate", NOT_NEGATIVE, "inf");

    check(OneCycle::new(-0.5, 10), "lr.max_lr", NOT_NEGATIVE, "-0.5");
    check(OneCycle::new(0.1, 1), "lr.total_steps", "at least 2 steps", "1");
    let too_long = OneCycle { pct_start: 1.5, ..OneCycle::new(0.1, 10) };
    check(too_long, "lr.pct_start", "a number in [0, 1]", "1.5");
    let no_room = OneCycle { pct_start: 0.75, three_phase: true, ..OneCycle::new(0.1, 10) };
    check(no_room, "lr.pct_start", "a number in [0, 0.5] with `three_phase`", "0.75");
    let above = OneCycle { div_factor: 0.5, ..OneCycle::new(0.1, 10) };
    check(above, "lr.div_factor", "a finite number of at least 1", "0.5");
    let nothing = OneCycle { final_div_factor: 0.0, ..OneCycle::new(0.1, 10) };
    check(nothing, "lr.final_div_factor", "a finite number above 0", "0");

    let piecewise = |boundaries: &[f64], values: &[f64]| PiecewiseConstantDecay::new(boundaries, values);
    check(piecewise(&[], &[]), "lr.values", "at least one value", "none");
    check(piecewise(&[1.0], &[0.1]), "lr.boundaries", "0 boundaries, one less than there are values", "1");
    check(piecewise(&[-1.0], &[0.1, 0.2]), "lr.boundaries[0]", NOT_NEGATIVE, "-1");
    check(piecewise(&[1.0], &[0.1, -0.5]), "lr.values[1]", NOT_NEGATIVE, "-0.5");
    let order = "a number above boundaries[0], which is 5";
    check(piecewise(&[5.0, 5.0], &[0.1, 0.2, 0.3]), "lr.boundaries[1]", order, "5");
    check(piecewise(&[5.0, 2.0], &[0.1, 0.2, 0.3]), "lr.boundaries[1]", order, "2");

    check(Join::new([], []), "lr.schedules", "at least one schedule", "none");
    let one = || ExponentialDecay::new(0.1, 1, 0.5);
    check(Join::new([one().into()], [3]), "lr.boundaries", "0 boundaries, one less than there are schedules", "1");
    let three = Join::new([one().into(), one().into(), one().into()], [5, 4]);
    check(three, "lr.boundaries[1]", order, "4");
    let inner = Join::new([one().into(), CosineDecay::new(0.1, 0).into()], [5]);
    check(inner, "lr.schedules[1].decay_steps", at_least_one, "0");
}

/// Two variables and their optimizer.
#[track_caller]
fn two_vars(params: ParamsAdamax) -> (Adamax, Vec<(String, Var)>) {
    let vars: Vec<(String, Var)> = ["first", "last"]
        .into_iter()
        .enumerate()
        .map(|(i, name)| (name.to_owned(), var(&noise(i as u64, 6), &[2, 3], DType::F32)))
        .collect();
    (Adamax::from_named(vars.clone(), params).unwrap(), vars)
}

#[test]
fn variables_and_names() {
    let (a, b) = (var(&[1.0], &[1], DType::F32), var(&[1.0], &[1], DType::F32));
    let error = Adamax::from_named([("a", a.clone()), ("b", a.clone())], named()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DuplicateVar { .. }));
    let text = "Encoder: var given twice: `a` and `b` are the same memory; give each var once";
    assert_eq!(error.to_string(), text);
    // Another variable of the same memory is the same memory.
    let view = Var::from_tensor(&a.as_tensor().reshape((1, 1)).unwrap()).unwrap();
    match Adamax::from_named([("a", a.clone()), ("b", view)], named()) {
        Err(error) => assert_eq!(error.to_string(), text),
        Ok(mut optimizer) => {
            // Then it is a copy, and both can be updated.
            let vars = ["a", "b"].map(|name| optimizer.remove_var(name).unwrap());
            assert_ne!(vars[0].id(), vars[1].id());
        }
    }
    let error = Adamax::new(vec![a.clone(), b.clone(), a.clone()], named()).map(drop).unwrap_err();
    let text = "Encoder: var given twice: `var.0` and `var.2` are the same memory; give each var once";
    assert!(error.to_string().contains(text), "{error}");

    let error = Adamax::from_named([("a", a.clone()), ("a", b.clone())], named()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DuplicateName(name) if name == "a"));
    let text =
        "Encoder: name given twice: `a`; names are the keys of the state, so every var has its own, and every group";
    assert_eq!(error.to_string(), text);

    let mut optimizer = Adamax::from_named([("a", a.clone())], named()).unwrap();
    assert_eq!(optimizer.add_var("a", b.clone()).unwrap_err().to_string(), text);
    assert!(optimizer.add_var("b", a.clone()).unwrap_err().to_string().contains("`a` and `b` are the same memory"));
    assert_eq!(optimizer.names().collect::<Vec<_>>(), ["a"]);
    let unknown = "Encoder: unknown var `c`; known are: a";
    assert_eq!(optimizer.remove_var("c").unwrap_err().to_string(), unknown);
    assert_eq!(optimizer.state("c").unwrap_err().to_string(), unknown);
    let unnamed = Adamax::new(vec![b], named()).unwrap();
    let error = unnamed.save(Folder::new().file("never-written")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::UnnamedVar(0)));
    assert!(error.to_string().starts_with("Encoder: var 0 has no name"), "{error}");
}

#[test]
fn groups() {
    let group = |name: &str| ParamGroup::new(name);
    let refused = |groups: Vec<ParamGroup>| Adamax::from_groups(groups, named()).unwrap_err().to_string();
    let twice =
        "Encoder: name given twice: `g`; names are the keys of the state, so every var has its own, and every group";
    assert_eq!(refused(vec![group("g"), group("g")]), twice);
    let default = refused(vec![group("default"), group("default")]);
    assert!(default.contains("name given twice: `default`"), "{default}");
    assert_eq!(
        refused(vec![group("")]),
        "Encoder: invalid `groups`: expected a name for every group, got an empty one"
    );
    for (wrong, text) in [
        (group("g").beta1(1.0), "invalid `groups.g.beta1`: expected a number in [0, 1), got 1"),
        (group("g").beta2(-0.5), "invalid `groups.g.beta2`: expected a number in [0, 1), got -0.5"),
        (group("g").eps(f64::NAN), "invalid `groups.g.eps`: expected a finite number that is not negative, got NaN"),
        (
            group("g").weight_decay(WeightDecay::L2(-0.5)),
            "invalid `groups.g.weight_decay`: expected a finite number that is not negative, got -0.5",
        ),
        (
            group("g").lr_factor(-0.5),
            "invalid `groups.g.lr_factor`: expected a finite number that is not negative, got -0.5",
        ),
        (group("g").lr(-0.5), "invalid `groups.g.lr`: expected a finite number that is not negative, got -0.5"),
        (
            group("g").lr(ExponentialDecay::new(0.1, 0, 0.5)),
            "invalid `groups.g.lr.decay_steps`: expected at least 1 step, got 0",
        ),
    ] {
        assert_eq!(refused(vec![wrong]), format!("Encoder: {text}"));
    }

    let (mut optimizer, vars) = two_vars(named());
    let before = Fingerprint::of(&optimizer, &vars);
    let error = optimizer.set_group(GroupSettings::new("g")).unwrap_err();
    assert_eq!(error.to_string(), "Encoder: unknown group `g`; known are: default");
    let wrong = GroupSettings { lr: GroupLr::Factor(f64::NAN), ..GroupSettings::new("default") };
    assert!(optimizer.set_group(wrong).unwrap_err().to_string().starts_with("Encoder: invalid `groups.default.lr"));
    // A group of which one variable is refused is not added at all.
    let new = var(&[1.0], &[1], DType::F32);
    let error = optimizer.add_group(group("g").var("new", &new).var("first", &new)).unwrap_err();
    assert!(error.to_string().starts_with("Encoder: "), "{error}");
    assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    assert_eq!(optimizer.groups().len(), 1);
    assert_eq!(optimizer.names().count(), 2);
    optimizer.add_group(group("g").var("new", &new)).unwrap();
}

/// What a step may be given.
type Pairs<'a> = Vec<(&'a Var, &'a Tensor)>;

/// A call that fails: its error, after a call that did not, and nothing has changed since.
#[track_caller]
fn assert_step_fails(
    optimizer: &mut Adamax,
    vars: &[(String, Var)],
    step: impl FnOnce(&mut Adamax) -> candle_core::Result<()>,
    text: &str,
) {
    let before = Fingerprint::of(optimizer, vars);
    let error = step(optimizer).unwrap_err();
    let first_line = error.to_string().lines().next().unwrap_or_default().to_owned();
    assert_eq!(first_line, format!("Encoder: {text}"));
    assert!(Fingerprint::of(optimizer, vars) == before, "a call that failed has changed something");
}

/// An optimizer that has made `calls` calls, in each of the ways a step can go.
fn trained(calls: usize) -> impl Iterator<Item = (Adamax, Vec<(String, Var)>)> {
    let all = [(None, 1), (Some(Ema { momentum: 0.5, overwrite_frequency: Some(2) }), 1), (Some(Ema::default()), 2)];
    all.into_iter().flat_map(|(ema, steps)| KERNELS.map(|kernel| (ema, steps, kernel))).map(
        move |(ema, gradient_accumulation_steps, kernel)| {
            let params =
                ParamsAdamax { ema, gradient_accumulation_steps, clip: Some(Clip::GlobalNorm(1.0)), ..named() };
            let (mut optimizer, vars) = two_vars(params);
            optimizer.set_kernel(kernel).unwrap();
            let good = tensor(&noise(9, 6), &[2, 3], DType::F32);
            for _ in 0..calls {
                let pairs: Pairs<'_> = vars.iter().map(|(_, var)| (var, &good)).collect();
                optimizer.apply_gradients(pairs).unwrap();
            }
            (optimizer, vars)
        },
    )
}

#[test]
fn gradients_that_do_not_fit() {
    let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
    for (mut optimizer, vars) in trained(3) {
        for (bad, text) in [
            (
                tensor(&noise(5, 6), &[3, 2], DType::F32),
                "gradient shape mismatch for `last`: expected [2, 3], got [3, 2]",
            ),
            (tensor(&noise(5, 6), &[6], DType::F32), "gradient shape mismatch for `last`: expected [2, 3], got [6]"),
            (tensor(&[1.0], &[], DType::F32), "gradient shape mismatch for `last`: expected [2, 3], got []"),
            (tensor(&noise(5, 6), &[2, 3], DType::F64), "gradient dtype mismatch for `last`: expected F32, got F64"),
            (tensor(&noise(5, 6), &[2, 3], DType::F16), "gradient dtype mismatch for `last`: expected F32, got F16"),
        ] {
            let pairs: Pairs<'_> = vec![(&vars[0].1, &good), (&vars[1].1, &bad)];
            let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs).map(drop)?);
            assert_step_fails(&mut optimizer, &vars, step, text);
            let mut store = GradStore::default();
            store.insert(&vars[0].1, good.clone());
            store.insert(&vars[1].1, bad);
            assert_step_fails(&mut optimizer, &vars, |optimizer| Ok(optimizer.step(&store).map(drop)?), text);
        }
    }
    let half = var(&[1.0], &[1], DType::F16);
    let mut optimizer = Adamax::from_named([("half", half.clone())], named()).unwrap();
    let bad = tensor(&[1.0], &[1], DType::BF16);
    let error = optimizer.apply_gradients([(&half, &bad)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DTypeMismatch { .. }));
    assert_eq!(error.to_string(), "Encoder: gradient dtype mismatch for `half`: expected F16 or F32, got BF16");
}

/// Runs a test that a lock could make wait for ever.
#[track_caller]
fn without_hanging(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match wait.recv_timeout(Duration::from_secs(20)) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("a call of step hangs"),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

#[test]
fn gradients_in_the_memory_of_a_variable() {
    without_hanging(|| {
        let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
        for (mut optimizer, vars) in trained(1) {
            let (first, last) = (vars[0].1.clone(), vars[1].1.clone());
            let detached = last.as_tensor().detach();
            let transposed = first.t().unwrap().t().unwrap();
            let part = first.flatten_all().unwrap().narrow(0, 0, 1).unwrap().broadcast_as((2, 3)).unwrap();
            for (grad, owner) in [
                (last.as_tensor(), "last"),
                (&detached, "last"),
                (first.as_tensor(), "first"),
                (&transposed, "first"),
                (&part, "first"),
            ] {
                let text = format!(
                    "the gradient of `last` shares the storage of the var `{owner}`: expected a tensor of its own, \
                     such as `grad.copy()`"
                );
                let pairs: Pairs<'_> = vec![(&first, &good), (&last, grad)];
                let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs).map(drop)?);
                assert_step_fails(&mut optimizer, &vars, step, &text);
                let mut store = GradStore::default();
                store.insert(&first, good.clone());
                store.insert(&last, grad.clone());
                assert_step_fails(&mut optimizer, &vars, |optimizer| Ok(optimizer.step(&store).map(drop)?), &text);
            }
            // Two variables may have the same tensor as their gradient.
            optimizer.apply_gradients([(&first, &good), (&last, &good)]).unwrap();
        }
    });
}

#[test]
fn pairs_that_do_not_fit() {
    let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
    let stranger = var(&noise(5, 6), &[2, 3], DType::F32);
    for (mut optimizer, vars) in trained(1) {
        let (first, last) = (&vars[0].1, &vars[1].1);
        let pairs: Pairs<'_> = vec![(first, &good), (&stranger, &good)];
        let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs).map(drop)?);
        let text = "the var of pair 1, of shape [2, 3], is not one of this optimizer's; add it first";
        assert_step_fails(&mut optimizer, &vars, step, text);
        let pairs: Pairs<'_> = vec![(last, &good), (first, &good), (last, &good)];
        let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs).map(drop)?);
        let text = "two gradients for `last`; give their sum";
        assert_step_fails(&mut optimizer, &vars, step, text);
    }
}

#[test]
fn no_gradient_at_all() {
    let text = "none of the 2 vars had a gradient: is the loss computed from them, through operations that have a \
                backward pass?";
    for (mut optimizer, vars) in trained(3) {
        let step = |optimizer: &mut Adamax| Ok(optimizer.step(&GradStore::default()).map(drop)?);
        assert_step_fails(&mut optimizer, &vars, step, text);
        let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients([] as [(&Var, &Tensor); 0]).map(drop)?);
        assert_step_fails(&mut optimizer, &vars, step, text);
        // A loss that knows nothing of the variables.
        let loss = var(&[1.0], &[1], DType::F32).sqr().unwrap().sum_all().unwrap();
        let step = |optimizer: &mut Adamax| Ok(optimizer.backward_step(&loss).map(drop)?);
        assert_step_fails(&mut optimizer, &vars, step, text);
        let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..optimizer.params().clone() };
        optimizer.set_params(params).unwrap();
        // As in PyTorch and candle_nn, such a call does nothing.
        let before = Fingerprint::of(&optimizer, &vars);
        optimizer.apply_gradients([] as [(&Var, &Tensor); 0]).unwrap();
        assert_eq!(Fingerprint::of(&optimizer, &vars), before);
        assert!(!optimizer.report().updated());
        assert_eq!(optimizer.report().missing().collect::<Vec<_>>(), ["first", "last"]);
    }
}

#[test]
fn an_optimizer_without_variables_says_so() {
    let mut optimizer = Adamax::from_named::<&str>([], ParamsAdamax::default()).unwrap();
    let error = optimizer.step(&GradStore::default()).unwrap_err().to_string();
    let text = "Adamax: the optimizer has no vars: was it made before they were, or from another `VarMap`?\n\
                where this is meant, set `missing_gradients: MissingGradients::Allow`";
    assert_eq!(error, text);
}

/// A schedule that goes wrong after a while.
#[derive(Debug)]
struct Breaks;

impl LearningRateSchedule for Breaks {
    fn learning_rate(&self, step: u64) -> f64 {
        if step < 2 { 0.1 } else { f64::NAN }
    }
}

#[test]
fn learning_rates_of_a_step() {
    let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
    for (mut optimizer, vars) in trained(3) {
        let pairs = || -> Pairs<'_> { vars.iter().map(|(_, var)| (var, &good)).collect() };
        for (lr, got) in NEGATIVE {
            optimizer.set_learning_rate(lr);
            assert!(optimizer.learning_rate().is_nan());
            let text = format!("invalid `lr`: expected {NOT_NEGATIVE}, got {got}");
            let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs()).map(drop)?);
            assert_step_fails(&mut optimizer, &vars, step, &text);
        }
        // It is the next step's error alone: a good rate mends it.
        optimizer.set_learning_rate(0.1);
        optimizer.apply_gradients(pairs()).unwrap();

        // A group's own rate, from a tensor that turns bad.
        let dial = Var::new(0.1f32, &Device::Cpu).unwrap();
        let own = GroupSettings { lr: GroupLr::Own((&dial).into()), ..GroupSettings::new("default") };
        optimizer.set_group(own).unwrap();
        dial.set(&Tensor::new(-0.5f32, &Device::Cpu).unwrap()).unwrap();
        let text = format!("invalid `groups.default.lr`: expected {NOT_NEGATIVE}, got -0.5");
        let before = Fingerprint::of(&optimizer, &vars);
        let error = optimizer.apply_gradients(pairs()).unwrap_err();
        assert_eq!(error.to_string(), format!("Encoder: {text}"));
        assert!(Fingerprint::of(&optimizer, &vars) == before);
    }
    let lr = LearningRate::Custom(Arc::new(Breaks));
    let (mut optimizer, vars) = two_vars(ParamsAdamax { lr, ..named() });
    let pairs = || -> Pairs<'_> { vars.iter().map(|(_, var)| (var, &good)).collect() };
    optimizer.apply_gradients(pairs()).unwrap();
    optimizer.apply_gradients(pairs()).unwrap();
    let step = |optimizer: &mut Adamax| Ok(optimizer.apply_gradients(pairs()).map(drop)?);
    let text = format!("invalid `lr`: expected {NOT_NEGATIVE}, got NaN");
    assert_step_fails(&mut optimizer, &vars, step, &text);
}

#[test]
fn what_is_not_finite_can_be_skipped() {
    let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
    let norms = [None, Some(NormType::L1), Some(NormType::L2), Some(NormType::Inf)];
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut numbers = noise(5, 6);
        numbers[5] = bad;
        let bad = tensor(&numbers, &[2, 3], DType::F32);
        for kernel in KERNELS {
            for (norm_type, steps) in norms.iter().flat_map(|norm_type| [(norm_type, 1u64), (norm_type, 3)]) {
                let params = ParamsAdamax {
                    skip_nonfinite: true,
                    clip: norm_type.map(|norm_type| Clip::GradNorm { max_norm: 1.0, norm_type }),
                    gradient_accumulation_steps: steps,
                    ema: Some(Ema { momentum: 0.5, overwrite_frequency: Some(1) }),
                    ..named()
                };
                let (mut optimizer, vars) = two_vars(params);
                optimizer.set_kernel(kernel).unwrap();
                // One bad call before each good one, up to the second update: only the last variable is bad.
                for call in 0..2 * steps {
                    let before = optimizer.snapshot().unwrap();
                    let fingerprint = Fingerprint::of(&optimizer, &vars);
                    optimizer.apply_gradients([(&vars[0].1, &good), (&vars[1].1, &bad)]).unwrap();
                    let context = format!("call {call}, {norm_type:?}, {steps} steps, {kernel:?}");
                    let after = optimizer.snapshot().unwrap();
                    assert_eq!(after.counters.skipped, before.counters.skipped + 1, "{context}");
                    let as_before = candle_adamax::Counters { skipped: before.counters.skipped, ..after.counters };
                    assert_eq!(as_before, before.counters, "{context}");
                    let now = Fingerprint::of(&optimizer, &vars);
                    assert_eq!(now.bits(), fingerprint.bits(), "{context}");
                    let report = optimizer.report();
                    assert!(report.skipped() && !report.updated() && report.total_norm().is_none(), "{context}");
                    optimizer.apply_gradients([(&vars[0].1, &good), (&vars[1].1, &good)]).unwrap();
                    assert!(!optimizer.report().skipped());
                }
                assert_eq!((optimizer.calls(), optimizer.updates()), (2 * steps, 2));
                assert_eq!(optimizer.skipped(), 2 * steps);
            }
        }
    }
}

#[test]
fn settings_that_are_refused_change_nothing() {
    for (mut optimizer, vars) in trained(3) {
        let before = Fingerprint::of(&optimizer, &vars);
        let own = optimizer.params().clone();
        let text = |error: candle_adamax::Error| error.to_string();
        let error = text(optimizer.set_params(ParamsAdamax { beta1: 1.0, ..own.clone() }).unwrap_err());
        assert_eq!(error, "Encoder: invalid `beta1`: expected a number in [0, 1), got 1");
        let clip = Some(Clip::Value(-1.0));
        let error = text(optimizer.set_params(ParamsAdamax { clip, ..own.clone() }).unwrap_err());
        assert_eq!(error, "Encoder: invalid `clip`: expected a finite number above 0 for `Value`, got -1");
        let inside = ParamsAdamax { eps_mode: EpsMode::InsideMax, ema: None, ..own.clone() };
        let error = text(optimizer.set_params(inside).unwrap_err());
        let expected =
            "Encoder: invalid `eps_mode`: expected AddToNorm as before, since u is made for it, got InsideMax";
        assert_eq!(error, expected);
        if own.gradient_accumulation_steps > 1 {
            let other = ParamsAdamax { gradient_accumulation_steps: 5, ema: None, ..own };
            let error = text(optimizer.set_params(other).unwrap_err());
            let allowed = "expected 2 until `flush_gradients` has used the gradients that wait, or \
                           `discard_gradients` dropped them, got 5";
            assert_eq!(error, format!("Encoder: invalid `gradient_accumulation_steps`: {allowed}"));
        }
        assert!(Fingerprint::of(&optimizer, &vars) == before, "settings that were refused have changed something");
    }
}

#[test]
fn snapshots_that_do_not_fit_change_nothing() {
    for (mut optimizer, vars) in trained(3) {
        let before = Fingerprint::of(&optimizer, &vars);
        let snapshot = optimizer.snapshot().unwrap();
        let with = |change: &dyn Fn(&mut candle_adamax::Snapshot)| {
            let mut changed = snapshot.clone();
            change(&mut changed);
            changed
        };
        let wrong = tensor(&[1.0], &[1], DType::F32);
        let double = tensor(&noise(1, 6), &[2, 3], DType::F64);
        for (snapshot, text) in [
            (
                with(&|s| drop(s.vars.remove("last"))),
                "checkpoint entry `last`: expected the state of this var, got none; the names in the snapshot are \
                 `first`, those of this optimizer are `first`, `last`; `restore_matching` takes the vars that are in both",
            ),
            (
                with(&|s| drop(s.vars.insert("more".into(), s.vars["last"].clone()))),
                "checkpoint entry `more`: expected no such var, got a surplus one; the names in the snapshot are \
                 `first`, `last`, `more`, those of this optimizer are `first`, `last`; `restore_matching` takes the vars \
                 that are in both",
            ),
            (
                with(&|s| s.vars.get_mut("last").unwrap().exp_inf = wrong.clone()),
                "exp_inf shape mismatch for `last`: expected [2, 3], got [1]",
            ),
            (
                with(&|s| s.vars.get_mut("last").unwrap().exp_avg = double.clone()),
                "exp_avg dtype mismatch for `last`: expected F32, got F64",
            ),
            (
                with(&|s| s.vars.get_mut("last").unwrap().group = "g".into()),
                "checkpoint entry `last`: expected a var of group `default`, got `g`",
            ),
            (
                with(&|s| s.params.eps_mode = EpsMode::InsideMax),
                "checkpoint entry `eps_mode`: expected this optimizer's convention, AddToNorm, got InsideMax",
            ),
            (
                with(&|s| s.counters.pending = 9),
                &*format!(
                    "checkpoint entry `counters.pending`: expected at most {} (one less than the accumulation steps), \
                     got 9",
                    snapshot.params.gradient_accumulation_steps - 1
                ),
            ),
            (with(&|s| s.params.beta1 = 1.0), "invalid `beta1`: expected a number in [0, 1), got 1"),
            (
                with(&|s| s.groups.push(GroupSettings::new("g"))),
                "checkpoint entry `groups.g`: expected no such group, got a surplus one",
            ),
        ] {
            let error = optimizer.restore(&snapshot).unwrap_err();
            assert_eq!(error.to_string(), format!("Encoder: {text}"));
            assert!(Fingerprint::of(&optimizer, &vars) == before, "after: {text}");
        }
        optimizer.restore(&snapshot).unwrap();
        assert!(Fingerprint::of(&optimizer, &vars) == before);
    }
}

#[test]
fn variables_that_are_no_floats_are_left_out() {
    let ids = Var::from_tensor(&Tensor::new(&[1u32, 2], &Device::Cpu).unwrap()).unwrap();
    let w = var(&[1.0, 2.0], &[2], DType::F32);
    let mut optimizer = Adamax::from_named([("ids", ids.clone()), ("w", w.clone())], named()).unwrap();
    assert_eq!(optimizer.names().collect::<Vec<_>>(), ["w"]);
    optimizer.backward_step(&w.sqr().unwrap().sum_all().unwrap()).unwrap();
    assert_ne!(values(&w), [1.0, 2.0]);
    assert_eq!(ids.to_vec1::<u32>().unwrap(), [1, 2]);
}

#[test]
fn the_checks_can_fail() {
    // A step that does not fail is noticed, and so is a change.
    let (mut optimizer, vars) = two_vars(named());
    let before = Fingerprint::of(&optimizer, &vars);
    let good = tensor(&noise(5, 6), &[2, 3], DType::F32);
    optimizer.apply_gradients([(&vars[1].1, &good)]).unwrap();
    assert_ne!(Fingerprint::of(&optimizer, &vars), before);
}
