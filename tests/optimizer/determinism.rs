//! The same bits for any number of threads, and types that may move between threads.

use candle_adamax::{
    Adamax, Clip, Ema, Error, ErrorKind, Kernel, LearningRate, NormType, ParamGroup, ParamsAdamax, Schedule, Snapshot,
    State, StepReport, VarSnapshot, WeightDecay,
};
use candle_core::{DType, Tensor, Var};

use crate::common::{DTYPES, Fingerprint, bits, noise, pool, tensor, var};

/// One variable that is cut into pieces, two around the size where that begins, and two hundred small ones.
fn shapes() -> Vec<(usize, DType)> {
    let large = [(1_200_007, DType::F32), (131_073, DType::BF16), (131_072, DType::F64), (0, DType::F32)];
    large.into_iter().chain((0..200).map(|i| (1 + i * 37 % 512, DTYPES[i % 4]))).collect()
}

/// Calls of an optimizer on `threads` threads, and all bits after them.
fn run(threads: usize, params: &ParamsAdamax, calls: usize) -> (Fingerprint, Option<f64>) {
    let vars: Vec<(String, Var)> = shapes()
        .into_iter()
        .enumerate()
        .map(|(i, (n, dtype))| (format!("var{i:03}"), var(&noise(i as u64, n), &[n], dtype)))
        .collect();
    let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
    let pool = pool(threads);
    let mut total_norm = None;
    for call in 0..calls {
        let seed = |i: usize| (1000 * (call + 1) + i) as u64;
        let grad =
            |(i, (_, var)): (usize, &(String, Var))| tensor(&noise(seed(i), var.elem_count()), var.dims(), var.dtype());
        let grads: Vec<Tensor> = vars.iter().enumerate().map(grad).collect();
        pool.install(|| optimizer.apply_gradients(vars.iter().map(|(_, var)| var).zip(&grads))).unwrap();
        total_norm = optimizer.report().total_norm().or(total_norm);
    }
    (Fingerprint::of(&optimizer, &vars), total_norm)
}

#[track_caller]
fn assert_bits_are_equal(params: ParamsAdamax, calls: usize) {
    let expected = run(1, &params, calls);
    for threads in [2, 3, 8] {
        let (got, norm) = run(threads, &params, calls);
        assert!(got == expected.0, "{threads} threads give other bits than one");
        assert_eq!(norm.map(f64::to_bits), expected.1.map(f64::to_bits), "{threads} threads give another norm");
    }
}

#[test]
fn threads_make_no_difference_to_an_update() {
    assert_bits_are_equal(ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.01), ..Default::default() }, 2);
}

#[test]
fn threads_make_no_difference_to_clipping() {
    assert_bits_are_equal(ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() }, 1);
    assert_bits_are_equal(ParamsAdamax { clip: Some(Clip::Norm(0.5)), ..Default::default() }, 1);
    let clip = Some(Clip::GradNorm { max_norm: 10.0, norm_type: NormType::L1 });
    assert_bits_are_equal(ParamsAdamax { clip, ..ParamsAdamax::pytorch() }, 1);
}

#[test]
fn threads_make_no_difference_to_accumulation_and_averages() {
    let params = ParamsAdamax {
        gradient_accumulation_steps: 2,
        clip: Some(Clip::GlobalNorm(1.0)),
        ema: Some(Ema { momentum: 0.9, overwrite_frequency: Some(1) }),
        skip_nonfinite: true,
        ..Default::default()
    };
    assert_bits_are_equal(params, 3);
}

#[test]
fn two_runs_are_equal_and_other_gradients_are_not() {
    let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
    assert!(run(2, &params, 1) == run(2, &params, 1));
    assert!(run(2, &params, 1) != run(2, &params, 2));
}

#[test]
fn optimizers_on_several_threads_at_once() {
    let expected = {
        let w = var(&noise(1, 40_000), &[40_000], DType::F32);
        train(&w);
        bits(&w)
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let w = var(&noise(1, 40_000), &[40_000], DType::F32);
                    train(&w);
                    bits(&w)
                })
            })
            .collect();
        for one in all {
            assert!(one.join().unwrap() == expected);
        }
    });
}

fn train(w: &Var) {
    let mut optimizer = Adamax::new_lr(vec![w.clone()], 0.01).unwrap();
    for call in 0..5 {
        let grad = tensor(&noise(call, w.elem_count()), w.dims(), w.dtype());
        optimizer.apply_gradients([(w, &grad)]).unwrap();
    }
}

#[test]
fn public_types_may_move_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<Adamax>();
    check::<Error>();
    check::<ErrorKind>();
    check::<Kernel>();
    check::<LearningRate>();
    check::<ParamGroup>();
    check::<ParamsAdamax>();
    check::<Schedule>();
    check::<Snapshot>();
    check::<State>();
    check::<StepReport<'_>>();
    check::<VarSnapshot>();
}
