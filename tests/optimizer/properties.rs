//! What holds for any shapes, dtypes, settings and gradients: every call follows the formulas in f64, on each path; and
//! what should make no difference makes none, to the last bit.

use std::collections::BTreeMap;

use candle_adamax::{
    Adamax, Clip, Ema, EpsMode, Kernel, LossScale, MissingGradients, NormType, ParamGroup, ParamsAdamax, StepCount,
    WeightDecay,
};
use candle_core::{DType, Tensor, Var};
use proptest::prelude::*;

use crate::common::property::config;
use crate::common::{DTYPES, Fingerprint, bits, formulas, noise, tensor, values, var};

/// How large gradients are.
#[derive(Clone, Copy, Debug)]
enum Size {
    Normal,
    /// Magnitudes of many orders, zeros among them.
    Mixed,
    /// Beyond the squares of f32; for f16 as large as it gets.
    Huge,
    /// Subnormal numbers of the gradient's dtype.
    Subnormal,
    Zero,
}

/// Gradient numbers that any dtype holds.
fn gradient(size: Size, dtype: DType, seed: u64, n: usize) -> Vec<f64> {
    let (huge, subnormal) = match dtype {
        DType::F16 => (6e4, 4e-7),
        DType::BF16 | DType::F32 => (1e30, 1e-39),
        _ => (1e120, 1e-310),
    };
    let exponents = noise(seed ^ 0xabcd, n);
    let of = |(g, exponent): (f64, f64)| match size {
        Size::Normal => g,
        Size::Mixed if exponent.abs() < 0.1 => 0.0,
        Size::Mixed => g * 10f64.powf(3.0 * exponent),
        Size::Huge => g * huge,
        Size::Subnormal => g * subnormal,
        Size::Zero => 0.0,
    };
    noise(seed, n).into_iter().zip(exponents).map(of).collect()
}

/// One variable: shape, dtype, whether its gradients are f32 where it is a half, how large they are.
#[derive(Clone, Debug)]
struct OneVar {
    shape: Vec<usize>,
    dtype: DType,
    f32_gradient: bool,
    size: Size,
    /// In which group: 0 for "default".
    group: usize,
    /// In which of four calls it has a gradient, as bits.
    has_grad: u8,
}

impl OneVar {
    fn grad_dtype(&self) -> DType {
        match self.dtype {
            DType::F16 | DType::BF16 if self.f32_gradient => DType::F32,
            own => own,
        }
    }

    fn n(&self) -> usize {
        self.shape.iter().product()
    }

    fn grad(&self, seed: u64) -> Tensor {
        let dtype = self.grad_dtype();
        tensor(&gradient(self.size, dtype, seed, self.n()), &self.shape, dtype)
    }
}

fn one_var() -> impl Strategy<Value = OneVar> {
    // No axis at all, no element, and around the widths of vectors, of leaves and of pieces.
    let around = [1usize, 4, 8, 16, 32, 1024].iter().flat_map(|&w| [w - 1, w, w + 1]).map(|n| vec![n]);
    let mut shapes: Vec<Vec<usize>> = around.collect();
    shapes.extend([vec![], vec![0, 3], vec![3, 5], vec![2, 3, 4], vec![1, 1, 1]]);
    let shape = prop_oneof![20 => prop::sample::select(shapes), 1 => Just(vec![70_003])];
    let size = prop_oneof![
        3 => Just(Size::Normal), 3 => Just(Size::Mixed), 1 => Just(Size::Huge), 1 => Just(Size::Subnormal),
        1 => Just(Size::Zero),
    ];
    let has_grad = prop_oneof![2 => Just(0b1111u8), 1 => 0u8..16];
    (shape, prop::sample::select(DTYPES.to_vec()), any::<bool>(), size, 0usize..3, has_grad).prop_map(
        |(shape, dtype, f32_gradient, size, group, has_grad)| OneVar {
            shape,
            dtype,
            f32_gradient,
            size,
            group,
            has_grad,
        },
    )
}

fn clip() -> impl Strategy<Value = Option<Clip>> {
    let limit = prop::sample::select(vec![1e-3, 0.25, 1.0, 40.0]);
    let norm_type = prop::sample::select(vec![NormType::L1, NormType::L2, NormType::Inf]);
    (0..5u8, limit, norm_type).prop_map(|(which, limit, norm_type)| match which {
        0 => None,
        1 => Some(Clip::Value(limit)),
        2 => Some(Clip::Norm(limit)),
        3 => Some(Clip::GlobalNorm(limit)),
        _ => Some(Clip::GradNorm { max_norm: limit, norm_type }),
    })
}

fn decay() -> impl Strategy<Value = WeightDecay> {
    let lambda = prop::sample::select(vec![0.0, 0.01, 0.5]);
    prop_oneof![
        Just(WeightDecay::None),
        lambda.clone().prop_map(WeightDecay::L2),
        lambda.prop_map(WeightDecay::Decoupled)
    ]
}

fn params() -> impl Strategy<Value = ParamsAdamax> {
    let numbers = (
        prop::sample::select(vec![0.0, 1e-3, 0.05, 1.0]),
        prop::sample::select(vec![0.0, 0.5, 0.9, 0.999]),
        prop::sample::select(vec![0.0, 0.5, 0.95, 0.999]),
        prop::sample::select(vec![0.0, 1e-8, 1e-7, 1e-3, 1.0]),
    );
    let conventions = (any::<bool>(), any::<bool>(), any::<bool>(), decay());
    let ema = prop::option::of((prop::sample::select(vec![0.0, 0.5, 0.99, 1.0]), prop::option::of(1u64..3)));
    let rest = (clip(), prop::option::of(prop::sample::select(vec![3.0, 1024.0])), ema, 1u64..4, any::<bool>());
    (numbers, conventions, rest).prop_map(
        |((lr, beta1, beta2, eps), (inside, per_var, maximize, weight_decay), (clip, scale, ema, steps, spare))| {
            ParamsAdamax {
                lr: lr.into(),
                beta1,
                beta2,
                eps,
                eps_mode: if inside { EpsMode::InsideMax } else { EpsMode::AddToNorm },
                step_count: if per_var { StepCount::PerVar } else { StepCount::Shared },
                weight_decay,
                no_decay: if spare { vec!["var1".into()] } else { Vec::new() },
                maximize,
                loss_scale: scale.map_or(LossScale::None, LossScale::Static),
                ema: ema.map(|(momentum, overwrite_frequency)| Ema { momentum, overwrite_frequency }),
                gradient_accumulation_steps: steps,
                missing_gradients: MissingGradients::Allow,
                clip,
                ..ParamsAdamax::default()
            }
        },
    )
}

/// A random optimizer: variables in three groups, of which the two with names override settings.
#[derive(Clone, Debug)]
struct Setup {
    params: ParamsAdamax,
    vars: Vec<OneVar>,
    seed: u64,
}

fn setup() -> impl Strategy<Value = Setup> {
    let vars = prop::collection::vec(one_var(), 1..5);
    (params(), vars, any::<u64>()).prop_map(|(mut params, vars, seed)| {
        // A name that spares nothing is refused.
        params.no_decay.retain(|_| vars.len() > 1);
        Setup { params, vars, seed }
    })
}

impl Setup {
    fn name(index: usize) -> String {
        format!("var{index}")
    }

    fn weights(&self) -> BTreeMap<String, Var> {
        let weight = |(i, one): (usize, &OneVar)| {
            (Self::name(i), var(&noise(self.seed.wrapping_add(i as u64), one.n()), &one.shape, one.dtype))
        };
        self.vars.iter().enumerate().map(weight).collect()
    }

    /// The optimizer, with its variables given in the order of `order`.
    fn optimizer(&self, weights: &BTreeMap<String, Var>, order: &[usize], kernel: Kernel) -> Adamax {
        let mut groups = vec![
            ParamGroup::new("default"),
            ParamGroup::new("a").lr(0.25).beta1(0.75).weight_decay(WeightDecay::Decoupled(0.1)),
            ParamGroup::new("b").lr_factor(0.5).beta2(0.75).eps(1e-4).weight_decay(WeightDecay::None),
        ];
        for &i in order {
            let (name, group) = (Self::name(i), self.vars[i].group);
            groups[group] = groups[group].clone().var(name.as_str(), &weights[&name]);
        }
        let mut optimizer = Adamax::from_groups(groups, self.params.clone()).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        optimizer
    }

    fn grads(&self, call: usize) -> BTreeMap<String, Tensor> {
        let grad = |(i, one): (usize, &OneVar)| {
            let has_grad = one.has_grad >> (call % 4) & 1 == 1;
            let seed = self.seed.wrapping_add((1000 * (call + 1) + i) as u64);
            has_grad.then(|| (Self::name(i), one.grad(seed)))
        };
        self.vars.iter().enumerate().filter_map(grad).collect()
    }

    fn in_order(&self) -> Vec<usize> {
        (0..self.vars.len()).collect()
    }
}

fn apply(optimizer: &mut Adamax, weights: &BTreeMap<String, Var>, grads: &BTreeMap<String, Tensor>) {
    optimizer.apply_gradients(grads.iter().map(|(name, grad)| (&weights[name], grad))).unwrap();
}

fn fingerprint(optimizer: &Adamax, weights: &BTreeMap<String, Var>) -> Fingerprint {
    let vars: Vec<_> = weights.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    Fingerprint::of(optimizer, &vars)
}

/// The bits of a tensor, but that all zeros are the same.
fn without_signs_of_zeros(tensor: &Tensor) -> Vec<u64> {
    bits(&(tensor + 0.0).unwrap())
}

/// Makes five calls and checks each one against the formulas.
fn follows_the_formulas(setup: &Setup, kernel: Kernel) -> Result<(), TestCaseError> {
    let weights = setup.weights();
    let mut optimizer = setup.optimizer(&weights, &setup.in_order(), kernel);
    // candle sums the f32 magnitudes of the portable path's norms in f32.
    let norm_error = if kernel == Kernel::Portable { 1e-4 } else { 0.0 };
    for call in 0..5 {
        let grads = setup.grads(call);
        let expected = formulas::call(&optimizer.snapshot().unwrap(), &weights, &grads, norm_error);
        apply(&mut optimizer, &weights, &grads);
        prop_assert_eq!(optimizer.report().updated(), expected.updated);
        let after = optimizer.snapshot().unwrap();
        let mismatch = expected.mismatch(&after, &weights);
        prop_assert!(mismatch.is_none(), "{kernel:?}, call {call}: {}", mismatch.unwrap_or_default());
        match (optimizer.report().total_norm(), expected.total_norm) {
            (Some(got), Some(expected)) => {
                prop_assert!(expected.allows(got), "{kernel:?}, call {call}: total norm {expected:?}, got {got:e}");
            }
            (got, expected) => prop_assert!(got.is_none() && expected.is_none(), "{got:?}, {expected:?}"),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(192))]

    #[test]
    fn the_default_path_follows_the_formulas(setup in setup()) {
        follows_the_formulas(&setup, Kernel::Auto)?;
    }

    #[test]
    fn the_portable_path_follows_the_formulas(setup in setup()) {
        follows_the_formulas(&setup, Kernel::Portable)?;
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn the_order_of_the_variables_makes_no_difference(setup in setup(), shift in 0usize..5) {
        let run = |order: &[usize]| {
            let weights = setup.weights();
            let mut optimizer = setup.optimizer(&weights, order, Kernel::Auto);
            (0..4).for_each(|call| apply(&mut optimizer, &weights, &setup.grads(call)));
            fingerprint(&optimizer, &weights)
        };
        let mut order = setup.in_order();
        let expected = run(&order);
        order.reverse();
        prop_assert!(run(&order) == expected);
        let n = order.len();
        order.rotate_left(shift % n);
        prop_assert!(run(&order) == expected);
    }

    #[test]
    fn u_falls_no_faster_than_beta2(one in one_var(), beta2 in prop::sample::select(vec![0.5, 0.9, 0.999]), seed: u64) {
        let params = ParamsAdamax { beta2, ..ParamsAdamax::default() };
        let w = var(&noise(seed, one.n()), &one.shape, one.dtype);
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        let mut before = vec![0.0; one.n()];
        for call in 0..6 {
            let grad = one.grad(seed.wrapping_add(call));
            optimizer.apply_gradients([(&w, &grad)]).unwrap();
            let u = values(&optimizer.state("w").unwrap().exp_inf);
            for (i, (&u, &before)) in u.iter().zip(&before).enumerate() {
                // One rounding of the product, in the type of the state.
                let least = match one.dtype {
                    DType::F64 => beta2 * before,
                    _ => f64::from(beta2 as f32 * before as f32),
                };
                prop_assert!(u >= least, "u[{i}] fell from {before:e} to {u:e}");
            }
            let grad = values(&grad);
            prop_assert!(u.iter().zip(&grad).all(|(u, g)| *u >= g.abs()));
            before = u;
        }
    }

    #[test]
    fn maximize_is_the_negated_gradient(setup in setup()) {
        let run = |maximize: bool, sign: f64| {
            let setup = Setup { params: ParamsAdamax { maximize, ..setup.params.clone() }, ..setup.clone() };
            let weights = setup.weights();
            let mut optimizer = setup.optimizer(&weights, &setup.in_order(), Kernel::Auto);
            for call in 0..4 {
                let grads = setup.grads(call).into_iter().map(|(name, grad)| (name, (grad * sign).unwrap())).collect();
                apply(&mut optimizer, &weights, &grads);
            }
            // Zeros may differ in their sign, in m alone. The accumulated sums are those of the gradients as they came.
            let of_var = |(name, w): (&String, &Var)| {
                let state = optimizer.state(name).unwrap();
                [without_signs_of_zeros(&state.exp_avg), bits(&state.exp_inf), bits(w)]
            };
            weights.iter().map(of_var).collect::<Vec<_>>()
        };
        prop_assert!(run(true, 1.0) == run(false, -1.0));
    }

    #[test]
    fn a_loss_scale_of_a_power_of_two_makes_no_difference(setup in setup(), exponent in 1i32..12) {
        let vars = setup.vars.iter().cloned().map(|one| OneVar { f32_gradient: true, size: Size::Normal, ..one });
        let setup = Setup { vars: vars.collect(), ..setup };
        let run = |scale: f64| {
            let loss_scale = if scale == 1.0 { LossScale::None } else { LossScale::Static(scale) };
            let setup = Setup { params: ParamsAdamax { loss_scale, ..setup.params.clone() }, ..setup.clone() };
            let weights = setup.weights();
            let mut optimizer = setup.optimizer(&weights, &setup.in_order(), Kernel::Auto);
            for call in 0..4 {
                let grads = setup.grads(call).into_iter().map(|(name, grad)| (name, (grad * scale).unwrap())).collect();
                apply(&mut optimizer, &weights, &grads);
            }
            fingerprint(&optimizer, &weights).bits().clone()
        };
        prop_assert!(run(2f64.powi(exponent)) == run(1.0));
    }

    #[test]
    fn equal_micro_batches_are_one_batch(setup in setup(), n in prop::sample::select(vec![2u64, 3, 4, 5, 8])) {
        let (weights, vars): (Vec<_>, Vec<_>) = setup.vars.iter().enumerate().map(|(i, one)| {
            let one = OneVar { has_grad: 0b1111, size: Size::Normal, ..one.clone() };
            (Setup::name(i), one)
        }).unzip();
        prop_assert_eq!(weights.len(), vars.len());
        let scale = match setup.params.loss_scale {
            LossScale::Static(scale) => scale,
            _ => 1.0,
        };
        let exact = n.is_power_of_two() && scale.log2().fract() == 0.0;
        let weight_decay = match setup.params.weight_decay {
            // u would depend on weights, which take many roundings.
            WeightDecay::L2(lambda) if !exact => WeightDecay::Decoupled(lambda),
            any => any,
        };
        let setup = Setup { vars, params: ParamsAdamax { ema: None, weight_decay, ..setup.params }, ..setup };
        let run = |steps: u64| {
            let params = ParamsAdamax { gradient_accumulation_steps: steps, ..setup.params.clone() };
            let setup = Setup { params, ..setup.clone() };
            let weights = setup.weights();
            let mut optimizer = setup.optimizer(&weights, &setup.in_order(), Kernel::Auto);
            for update in 0..3 {
                // Multiples of 1/64: sums of a few of them are exact in every dtype but for the division by n.
                let grads: BTreeMap<_, _> = setup.grads(update).into_iter().map(|(name, grad)| {
                    let coarse: Vec<f64> = values(&grad).into_iter().map(|g| (g * 64.0).round() / 64.0).collect();
                    (name, tensor(&coarse, grad.dims(), grad.dtype()))
                }).collect();
                (0..steps).for_each(|_| apply(&mut optimizer, &weights, &grads));
            }
            (0..setup.vars.len()).map(|i| {
                let state = optimizer.state(&Setup::name(i)).unwrap();
                [state.exp_avg, state.exp_inf, weights[&Setup::name(i)].as_tensor().clone()]
            }).collect::<Vec<_>>()
        };
        for ((accumulated, at_once), one) in run(n).into_iter().zip(run(1)).zip(&setup.vars) {
            if exact {
                let of = |tensors: &[Tensor; 3]| tensors.each_ref().map(without_signs_of_zeros);
                prop_assert!(of(&accumulated) == of(&at_once), "{n} equal micro-batches differ from one batch: {one:?}");
                continue;
            }
            // u takes no more roundings than the sum has; m and w could cancel.
            for (got, expected) in values(&accumulated[1]).into_iter().zip(values(&at_once[1])) {
                prop_assert!((got - expected).abs() <= 1e-6 * expected.abs() + 1e-40, "u: {expected:e}, got {got:e}");
            }
        }
    }
}

/// Gradients that are not contiguous, each with the same one that is.
fn views(dtype: DType) -> Vec<(&'static str, Tensor)> {
    let base = |shape: &[usize]| {
        let n = shape.iter().product();
        tensor(&noise(n as u64, n), shape, dtype)
    };
    vec![
        ("transposed", base(&[5, 3]).t().unwrap()),
        ("permuted", base(&[5, 2, 3]).permute((2, 0, 1)).unwrap()),
        ("broadcast row", base(&[1, 5]).broadcast_as((3, 5)).unwrap()),
        ("broadcast scalar", base(&[]).broadcast_as((3, 5)).unwrap()),
        ("offset, contiguous", base(&[9, 5]).narrow(0, 4, 3).unwrap()),
        ("offset, strided", base(&[3, 9]).narrow(1, 2, 5).unwrap()),
        ("large, transposed", base(&[300, 257]).t().unwrap()),
        ("large, offset", base(&[90_000]).narrow(0, 12_345, 70_003).unwrap()),
    ]
}

#[test]
fn views_are_as_good_as_contiguous_gradients() {
    for (dtype, grad_dtype) in [
        (DType::F64, DType::F64),
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
    ] {
        for (what, view) in views(grad_dtype) {
            for kernel in [Kernel::Auto, Kernel::Portable] {
                for (limit, steps) in [(None, 1), (Some(0.5), 1), (Some(0.5), 2)] {
                    let run = |grad: &Tensor| {
                        let w = var(&noise(7, grad.elem_count()), grad.dims(), dtype);
                        let gradient_accumulation_steps = steps;
                        let clip = limit.map(Clip::Norm);
                        let params = ParamsAdamax { clip, gradient_accumulation_steps, ..ParamsAdamax::default() };
                        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
                        optimizer.set_kernel(kernel).unwrap();
                        (0..4).for_each(|_| optimizer.apply_gradients([(&w, grad)]).map(drop).unwrap());
                        Fingerprint::of(&optimizer, &[("w".into(), w)])
                    };
                    let contiguous = tensor(&values(&view), view.dims(), grad_dtype);
                    assert_eq!(run(&view), run(&contiguous), "{what}, {dtype:?}, {kernel:?}, clip {limit:?}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows_where_it_was() {
    let grad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0, 0.0];
    for dtype in DTYPES {
        for kernel in [Kernel::Auto, Kernel::Portable] {
            for params in [ParamsAdamax::default(), ParamsAdamax::pytorch()] {
                let w = var(&[1.0; 5], &[5], dtype);
                let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
                optimizer.set_kernel(kernel).unwrap();
                optimizer.apply_gradients([(&w, &tensor(&grad, &[5], dtype))]).unwrap();
                optimizer.apply_gradients([(&w, &tensor(&[1.0; 5], &[5], dtype))]).unwrap();
                let state = optimizer.state("w").unwrap();
                let (w, m, u) = (values(&w), values(&state.exp_avg), values(&state.exp_inf));
                let context = format!("{dtype:?} {kernel:?}: {w:?} {m:?} {u:?}");
                assert!(w[..3].iter().all(|w| w.is_nan()) && w[3..].iter().all(|w| w.is_finite()), "{context}");
                assert!(m[0].is_nan() && m[1] == f64::INFINITY && m[2] == f64::NEG_INFINITY, "{context}");
                assert!(u[0].is_nan() && u[1] == f64::INFINITY && u[2] == f64::INFINITY, "{context}");
                assert!(m[3..].iter().chain(&u[3..]).all(|x| x.is_finite()), "{context}");
            }
        }
    }
}

#[test]
fn averages_leave_out_what_has_no_share() {
    // With a share of 0 an infinite weight, or average, must not become 0 * inf.
    for kernel in [Kernel::Auto, Kernel::Portable] {
        let w = var(&[f64::INFINITY, 1.0], &[2], DType::F32);
        let ema = Some(Ema { momentum: 1.0, overwrite_frequency: None });
        let params = ParamsAdamax { ema, lr: 0.0.into(), ..ParamsAdamax::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let grad = tensor(&[1.0; 2], &[2], DType::F32);
        optimizer.apply_gradients([(&w, &grad)]).unwrap();
        w.set(&tensor(&[2.0, f64::INFINITY], &[2], DType::F32)).unwrap();
        optimizer.apply_gradients([(&w, &grad)]).unwrap();
        let ema = optimizer.state("w").unwrap().ema.unwrap();
        assert_eq!(values(&ema), [f64::INFINITY, 1.0], "{kernel:?}");
        w.set(&tensor(&[f64::NAN, f64::NAN], &[2], DType::F32)).unwrap();
        optimizer.finalize_ema().unwrap();
        assert_eq!(values(&w), [f64::INFINITY, 1.0], "{kernel:?}");
    }
}

#[test]
fn variables_without_elements_take_part() {
    for kernel in [Kernel::Auto, Kernel::Portable] {
        for dtype in DTYPES {
            let vars = [("empty", var(&[], &[0, 3], dtype)), ("w", var(&[1.0, 2.0], &[2], dtype))];
            let ema = Some(Ema { momentum: 0.5, overwrite_frequency: Some(2) });
            let params =
                ParamsAdamax { clip: Some(Clip::Norm(1.0)), gradient_accumulation_steps: 2, ema, ..Default::default() };
            let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            let grads = [tensor(&[], &[0, 3], dtype), tensor(&[1.0, 1.0], &[2], dtype)];
            for _ in 0..4 {
                let pairs = vars.iter().map(|(_, var)| var).zip(&grads);
                optimizer.apply_gradients(pairs).unwrap_or_else(|error| panic!("{kernel:?} {dtype:?}: {error}"));
            }
            assert_eq!(optimizer.state("empty").unwrap().step, 2);
            assert_eq!(vars[0].1.dims(), [0, 3]);
        }
    }
}

#[test]
fn the_formulas_notice_another_rule() {
    // The check above has to be able to fail: other settings than those of the optimizer are another rule.
    let w = var(&noise(1, 9), &[9], DType::F32);
    let weights = BTreeMap::from([("w".to_owned(), w.clone())]);
    let grads = BTreeMap::from([("w".to_owned(), tensor(&noise(2, 9), &[9], DType::F32))]);
    for change in 0..6 {
        let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
        apply(&mut optimizer, &weights, &grads);
        let mut before = optimizer.snapshot().unwrap();
        let params = &mut before.params;
        match change {
            0 => params.beta1 += 1e-5,
            1 => params.beta2 -= 0.5,
            2 => params.eps = 1e-3,
            3 => params.lr = 1.001e-3.into(),
            4 => params.weight_decay = WeightDecay::Decoupled(0.1),
            _ => params.clip = Some(Clip::Norm(0.5)),
        }
        let beta2_shows = BTreeMap::from([("w".to_owned(), (&grads["w"] * 0.25).unwrap())]);
        let grads = if change == 1 { &beta2_shows } else { &grads };
        let expected = formulas::call(&before, &weights, grads, 0.0);
        apply(&mut optimizer, &weights, grads);
        assert!(expected.mismatch(&optimizer.snapshot().unwrap(), &weights).is_some(), "change {change}");
    }
}

/// Norms, clips and numbers at the edges of what a dtype holds.
#[test]
fn clips_are_right_over_the_whole_range_of_f64() {
    let clips: [fn(f64) -> ParamsAdamax; 5] = [
        |limit| ParamsAdamax { clip: Some(Clip::Norm(limit)), ..Default::default() },
        |limit| ParamsAdamax { clip: Some(Clip::GlobalNorm(limit)), skip_nonfinite: true, ..Default::default() },
        |limit| clip_grad_norm(limit, NormType::L2),
        |limit| clip_grad_norm(limit, NormType::L1),
        |limit| clip_grad_norm(limit, NormType::Inf),
    ];
    // Gradients in units of `unit`, and a limit; the squares overflow or vanish, or so does the norm itself.
    for (unit, limit) in [
        (1e160, 1.0),
        (1e-170, 1e-180),
        (1e-300, 1e-305),
        (f64::MAX / 4.0, 1.0),
        (f64::MAX / 4.0, 1e300),
        (1e-200, 1.0),
    ] {
        for (which, params) in clips.iter().enumerate() {
            for loss_scale in [1.0, 2f64.powi(100), 2f64.powi(-4)] {
                let params = ParamsAdamax { beta1: 0.5, loss_scale: LossScale::Static(loss_scale), ..params(limit) };
                let scale = 1.0 / loss_scale;
                let (a, b) = (vec![3.0, -4.0, 3.0, 4.0], vec![0.0, 2.0, -2.0, 1.0]);
                let vars = [&a, &b].map(|g| var(&vec![0.5; g.len()], &[g.len()], DType::F64));
                let mut optimizer =
                    Adamax::from_named([("a", vars[0].clone()), ("b", vars[1].clone())], params).unwrap();
                let grads = [&a, &b].map(|g| {
                    let values: Vec<f64> = g.iter().map(|x| x * unit).collect();
                    tensor(&values, &[values.len()], DType::F64)
                });
                optimizer.apply_gradients(vars.iter().zip(&grads)).unwrap();
                let (of_a, of_b, total): (f64, f64, f64) = match which {
                    0 => (50f64.sqrt(), 3.0, 59f64.sqrt()),
                    1 | 2 => (59f64.sqrt(), 59f64.sqrt(), 59f64.sqrt()),
                    3 => (19.0, 19.0, 19.0),
                    _ => (4.0, 4.0, 4.0),
                };
                let what = format!("{unit:e} {limit:e} clip {which} scale {scale:e}");
                let got_total = optimizer.report().total_norm().unwrap();
                let total = total * (unit * scale);
                assert!(got_total == total || (got_total / total - 1.0).abs() < 1e-13, "{what}: {got_total:e}");
                for (name, own, g, w) in [("a", of_a, &a, &vars[0]), ("b", of_b, &b, &vars[1])] {
                    // In units, and in this order, nothing leaves the range.
                    let limit_in_units = limit / unit / scale;
                    let torch = if which >= 2 { 1e-6 / unit / scale } else { 0.0 };
                    let clipped = limit_in_units < own + torch;
                    let m = values(&optimizer.state(name).unwrap().exp_avg);
                    for (m, g) in m.iter().zip(g) {
                        let expected = if clipped { g / (own + torch) * limit } else { g * (unit * scale) } / 2.0;
                        // The factor may be a subnormal number.
                        let error = 1e-10 * expected.abs() + 1e-320;
                        assert!((m - expected).abs() <= error, "{what} {name}: {m:e} for {expected:e}");
                    }
                    assert!(values(w).iter().all(|w| w.is_finite()), "{what}");
                }
            }
        }
    }
}

fn clip_grad_norm(max_norm: f64, norm_type: NormType) -> ParamsAdamax {
    ParamsAdamax { clip: Some(Clip::GradNorm { max_norm, norm_type }), ..Default::default() }
}

/// Settings at the edges of what is allowed, against the formula.
#[test]
fn settings_at_the_edges_follow_the_formula() {
    let beta = 1.0 - f64::EPSILON / 2.0;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for lr in [0.0, 5e-324, 1e-3, 1e30, f64::MAX] {
            for (beta1, beta2) in [(0.0, 0.0), (0.0, beta), (0.9, beta), (5e-324, 0.5), (beta, 0.999)] {
                for (eps, eps_mode) in [
                    (0.0, EpsMode::AddToNorm),
                    (0.0, EpsMode::InsideMax),
                    (5e-324, EpsMode::InsideMax),
                    (1e300, EpsMode::AddToNorm),
                ] {
                    let w = var(&[1.0, -2.0, 0.0], &[3], dtype);
                    let params = ParamsAdamax { lr: lr.into(), beta1, beta2, eps, eps_mode, ..Default::default() };
                    let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
                    for _ in 0..3 {
                        optimizer.apply_gradients([(&w, &tensor(&[0.5, 0.0, 0.0], &[3], dtype))]).unwrap();
                    }
                    let what = format!("{dtype:?} lr {lr:e} betas {beta1} {beta2} eps {eps:e}");
                    let got = values(&w);
                    // Without a gradient nothing moves, whatever the numbers are.
                    assert_eq!(got[1..], [-2.0, 0.0], "{what}: {got:?}");
                    assert!(!got[0].is_nan(), "{what}: {got:?}");
                    if lr == 0.0 || lr == 5e-324 {
                        assert_eq!(got[0], 1.0, "{what}");
                    } else if lr == 1e-3 && eps < 1.0 && dtype == DType::F64 {
                        // The same gradient each time: m / (1 - beta1^t) is it, and so is u.
                        assert!((got[0] - 0.997).abs() < 1e-12, "{what}: {}", got[0]);
                    }
                }
            }
        }
        // The largest weights stay, and go down.
        let largest = match dtype {
            DType::F16 => 65504.0,
            DType::F64 => f64::MAX,
            _ => 3e38,
        };
        let w = var(&[largest, -largest], &[2], dtype);
        let before = values(&w);
        let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
        optimizer.apply_gradients([(&w, &tensor(&[1.0, -1.0], &[2], dtype))]).unwrap();
        assert_eq!(values(&w), before);
    }
    for loss_scale in [1e-40, 1e40, 0.0, f64::NAN].map(LossScale::Static) {
        assert!(ParamsAdamax { loss_scale, ..Default::default() }.validate().is_err());
    }
}
