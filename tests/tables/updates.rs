//! Steps of gradients of rows: each follows the formulas, restricted to the rows that it names.

use candle_adamax::{
    Adamax, Clip, Gradient, Kernel, LossScale, MissingGradients, NormType, ParamGroup, ParamsAdamax, SparseGrad,
    StepCount, WeightDecay,
};
use candle_core::{DType, Tensor, Var};
use candle_nn::Module as _;

use crate::common::gradients::Grad;
use crate::common::{DTYPES, Fingerprint, KERNELS, bits, ids, noise, tensor, values, var};
use crate::support::{Checked, coarse, grads, noisy, scatter, sparse};

fn base() -> ParamsAdamax {
    ParamsAdamax { lr: 0.05.into(), missing_gradients: MissingGradients::Allow, ..Default::default() }
}

/// Settings that each concern gradients, and what to call them.
fn settings() -> Vec<(&'static str, ParamsAdamax)> {
    let grad_norm = |norm_type| Some(Clip::GradNorm { max_norm: 0.3, norm_type });
    vec![
        ("Keras", base()),
        ("PyTorch", ParamsAdamax { missing_gradients: MissingGradients::Allow, ..ParamsAdamax::pytorch() }),
        ("clip by Value", ParamsAdamax { clip: Some(Clip::Value(0.1)), ..base() }),
        ("clip by Norm", ParamsAdamax { clip: Some(Clip::Norm(0.3)), ..base() }),
        ("clip by GlobalNorm", ParamsAdamax { clip: Some(Clip::GlobalNorm(0.3)), ..base() }),
        ("clip by GradNorm L1", ParamsAdamax { clip: grad_norm(NormType::L1), ..base() }),
        ("clip by GradNorm L2", ParamsAdamax { clip: grad_norm(NormType::L2), ..base() }),
        ("clip by GradNorm Inf", ParamsAdamax { clip: grad_norm(NormType::Inf), ..base() }),
        ("L2 decay", ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..base() }),
        ("decoupled decay", ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..base() }),
        (
            "no decay of tables",
            ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), no_decay: vec!["table".into()], ..base() },
        ),
        ("own counters", ParamsAdamax { step_count: StepCount::PerVar, beta1: 0.5, ..base() }),
        (
            "scaled loss",
            ParamsAdamax { loss_scale: LossScale::Static(3.0), clip: Some(Clip::GlobalNorm(0.1)), ..base() },
        ),
        ("upwards", ParamsAdamax { maximize: true, clip: Some(Clip::Value(0.5)), ..base() }),
    ]
}

#[test]
fn steps_follow_the_formulas_in_touched_rows_and_nowhere_else() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            for (what, params) in settings() {
                let vars: [(&str, &[usize], DType); 3] =
                    [("table.a", &[12, 3], dtype), ("table.b", &[5], dtype), ("bias", &[4], DType::F32)];
                let mut checked = Checked::new(&vars, params, kernel);
                for call in 0..5 {
                    let seed = 100 * call;
                    // For halves, gradients of their own dtype and of f32 in turn.
                    let grad_dtype = if call % 2 == 1 && dtype != DType::F64 { DType::F32 } else { dtype };
                    let a = noisy(&[7, 2, 7, (3 + call) as u32, 7], seed, &[3], grad_dtype);
                    let b = noisy(&[1, 1, 4 - call as u32], seed + 1, &[], dtype);
                    let bias = tensor(&noise(seed + 2, 4), &[4], DType::F32);
                    let of_call = match call {
                        // A call in which one table was not looked up, and one in which it has all rows.
                        1 => grads([("table.b", Grad::Sparse(b)), ("bias", Grad::Dense(bias))]),
                        3 => grads([
                            ("table.a", Grad::Dense(tensor(&noise(seed, 36), &[12, 3], grad_dtype))),
                            ("bias", Grad::Dense(bias)),
                        ]),
                        _ => grads([
                            ("table.a", Grad::Sparse(a)),
                            ("table.b", Grad::Sparse(b)),
                            ("bias", Grad::Dense(bias)),
                        ]),
                    };
                    checked.step(&of_call, &format!("{what}, {dtype:?}, {kernel:?}, call {call}"));
                    let missing: Vec<&str> = checked.optimizer.report().missing().collect();
                    let expected: &[&str] = match call {
                        1 => &["table.a"],
                        3 => &["table.b"],
                        _ => &[],
                    };
                    assert_eq!(missing, expected, "{what}, call {call}");
                }
                assert_eq!((checked.optimizer.updates(), checked.optimizer.state("table.a").unwrap().step), (5, 4));
            }
        }
    }
}

#[test]
fn groups_have_their_own_settings() {
    for kernel in KERNELS {
        let weights = [("a", 1), ("b", 2), ("c", 3)]
            .map(|(name, seed)| (name.to_owned(), var(&noise(seed, 24), &[8, 3], DType::F32)));
        let groups = [
            ("a", ParamGroup::new("slow").lr_factor(0.1).weight_decay(WeightDecay::Decoupled(0.5))),
            ("b", ParamGroup::new("own").lr(0.3).beta1(0.5).beta2(0.75).eps(1e-3)),
        ];
        let mut checked = Checked::of(weights.into(), base(), kernel, &groups);
        for call in 0..3u64 {
            let grad = |seed| Grad::Sparse(noisy(&[0, 5, 5, 2 + call as u32], seed + call, &[3], DType::F32));
            checked.step(&grads([("a", grad(10)), ("b", grad(20)), ("c", grad(30))]), &format!("{kernel:?} {call}"));
        }
    }
}

/// The first moments after one step with beta1 = 0: the gradient as it was applied.
#[track_caller]
fn applied(grad: &SparseGrad, shape: &[usize], dtype: DType, kernel: Kernel, params: ParamsAdamax) -> Vec<f64> {
    let w = var(&vec![0.5; shape.iter().product()], shape, dtype);
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax { beta1: 0.0, ..params }).unwrap();
    optimizer.set_kernel(kernel).unwrap();
    optimizer.apply_gradients([(&w, grad)]).unwrap();
    values(&optimizer.state("w").unwrap().exp_avg)
}

#[test]
fn duplicates_are_summed_in_f32_even_where_the_table_is_not() {
    for kernel in KERNELS {
        // In bf16, and in f16, 2048 + 1 is 2048.
        for dtype in [DType::F16, DType::BF16] {
            for grad_dtype in [dtype, DType::F32] {
                let grad = sparse(&[1, 1, 1, 1], &[2048.0, 1.0, 1.0, 1.0], &[], grad_dtype);
                let got = applied(&grad, &[3], dtype, kernel, base());
                assert_eq!(got, [0.0, 2051.0, 0.0], "{dtype:?}, {kernel:?}");
            }
        }
    }
}

#[test]
fn duplicates_are_summed_in_order_of_occurrence() {
    for (dtype, huge) in [(DType::F32, 2f64.powi(24)), (DType::F64, 2f64.powi(53)), (DType::BF16, 2f64.powi(24))] {
        for kernel in KERNELS {
            // 1 is lost beside the huge one. Other rows in between make no difference.
            let lost = sparse(&[2, 0, 2, 1, 2], &[huge, 5.0, 1.0, 6.0, -huge], &[], dtype);
            assert_eq!(applied(&lost, &[3], dtype, kernel, base()), [5.0, 6.0, 0.0], "{dtype:?}, {kernel:?}");
            let kept = sparse(&[2, 0, 2, 1, 2], &[huge, 5.0, -huge, 6.0, 1.0], &[], dtype);
            assert_eq!(applied(&kept, &[3], dtype, kernel, base()), [5.0, 6.0, 1.0], "{dtype:?}, {kernel:?}");
        }
    }
}

#[test]
fn lookups_are_summed_in_the_order_in_which_they_were_made() {
    let huge = 2f64.powi(24);
    let w = var(&[0.0; 6], &[3, 2], DType::F32);
    let layer = candle_adamax::Embedding::new(w.as_tensor().clone()).unwrap();
    let factor = |x: f64| tensor(&[x, x], &[1, 2], DType::F32);
    for (factors, expected) in [([huge, 1.0, -huge], 0.0), ([huge, -huge, 1.0], 1.0)] {
        let losses = factors.map(|x| (layer.forward(&ids(&[1])).unwrap() * factor(x)).unwrap().sum_all().unwrap());
        // The loss adds them the other way around, and so does the backward pass go through them.
        let loss = ((&losses[2] + &losses[1]).unwrap() + &losses[0]).unwrap();
        let mut optimizer =
            Adamax::from_named([("w", w.clone())], ParamsAdamax { beta1: 0.0, lr: 0.0.into(), ..base() }).unwrap();
        optimizer.backward_step(&loss).unwrap();
        let m = values(&optimizer.state("w").unwrap().exp_avg);
        assert_eq!(m, [0.0, 0.0, expected, expected, 0.0, 0.0]);
    }
}

#[test]
fn clips_and_norms_see_sums() {
    // Two contributions of 3 and 4 to the columns of one row: its norm is 5, whatever the norms of its parts are.
    let grad = sparse(&[2, 2], &[3.0, 0.0, 0.0, 4.0], &[2], DType::F32);
    for kernel in KERNELS {
        let row = |params: ParamsAdamax| applied(&grad, &[3, 2], DType::F32, kernel, params)[4..].to_vec();
        let near = |params: ParamsAdamax, expected: [f64; 2]| {
            let got = row(params.clone());
            assert!(got.iter().zip(expected).all(|(got, x)| (got - x).abs() < 1e-6), "{params:?}: {got:?}");
        };
        near(ParamsAdamax { clip: Some(Clip::Norm(1.0)), ..base() }, [0.6, 0.8]);
        near(ParamsAdamax { clip: Some(Clip::Norm(5.0)), ..base() }, [3.0, 4.0]);
        near(ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..base() }, [0.6, 0.8]);
        let clip = Some(Clip::GradNorm { max_norm: 3.5, norm_type: NormType::L1 });
        near(ParamsAdamax { clip, ..base() }, [1.5, 2.0]);
        let clip = Some(Clip::GradNorm { max_norm: 1.0, norm_type: NormType::Inf });
        near(ParamsAdamax { clip, ..base() }, [0.75, 1.0]);
        // Of two contributions of 0.75, each below the limit, the sum is above it.
        let twice = sparse(&[0, 0], &[0.75, -0.75], &[], DType::F32);
        let zero = applied(&twice, &[2], DType::F32, kernel, ParamsAdamax { clip: Some(Clip::Value(0.5)), ..base() });
        assert_eq!(zero, [0.0, 0.0]);
        let twice = sparse(&[0, 0], &[0.75, 0.75], &[], DType::F32);
        let limit = applied(&twice, &[2], DType::F32, kernel, ParamsAdamax { clip: Some(Clip::Value(1.0)), ..base() });
        assert_eq!(limit, [1.0, 0.0]);
    }
}

#[test]
fn norms_are_of_tables_and_dense_variables_together() {
    let table = var(&[0.0; 6], &[3, 2], DType::BF16);
    let bias = var(&[0.0], &[1], DType::F64);
    let of_table = sparse(&[2, 2], &[3.0, 0.0, 0.0, 4.0], &[2], DType::BF16);
    let of_bias = tensor(&[12.0], &[1], DType::F64);
    let pairs = || [(&table, Gradient::Sparse(&of_table)), (&bias, Gradient::Dense(&of_bias))];
    for kernel in KERNELS {
        let vars = || [("table", table.clone()), ("bias", bias.clone())];
        for (params, expected) in [
            (ParamsAdamax { measure_norm: true, ..base() }, [3.0, 4.0, 12.0]),
            (ParamsAdamax { clip: Some(Clip::GlobalNorm(6.5)), ..base() }, [1.5, 2.0, 6.0]),
            (ParamsAdamax { clip: Some(Clip::Norm(5.0)), ..base() }, [3.0, 4.0, 5.0]),
        ] {
            let mut optimizer = Adamax::from_named(vars(), ParamsAdamax { beta1: 0.0, ..params }).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            optimizer.apply_gradients(pairs()).unwrap();
            assert_eq!(optimizer.report().total_norm(), Some(13.0), "{kernel:?}");
            let m = |name| values(&optimizer.state(name).unwrap().exp_avg);
            let got = [&m("table")[4..], &m("bias")].concat();
            assert!(got.iter().zip(expected).all(|(got, x)| (got - x).abs() < 1e-5), "{got:?}");
        }
    }
}

#[test]
fn decay_is_of_rows_that_are_named_even_with_a_gradient_of_zero() {
    for kernel in KERNELS {
        for weight_decay in [WeightDecay::L2(0.5), WeightDecay::Decoupled(0.5)] {
            for (no_decay, decays) in [(vec![], true), (vec!["w".to_owned()], false)] {
                let w = var(&[2.0; 4], &[4], DType::F32);
                let params = ParamsAdamax { weight_decay, no_decay, ..base() };
                let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
                optimizer.set_kernel(kernel).unwrap();
                optimizer.apply_gradients([(&w, &sparse(&[2], &[0.0], &[], DType::F32))]).unwrap();
                let after = values(&w);
                assert_eq!((after[0], after[1], after[3]), (2.0, 2.0, 2.0));
                assert_eq!(after[2] < 2.0, decays, "{weight_decay:?}, {kernel:?}");
            }
        }
    }
}

#[test]
fn a_variable_may_have_a_gradient_of_each_kind() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            let run = |both: bool| {
                let w = var(&noise(1, 12), &[4, 3], dtype);
                let mut optimizer = Adamax::from_named([("w", w.clone())], base()).unwrap();
                optimizer.set_kernel(kernel).unwrap();
                for call in 0..3 {
                    let (of, dense, some) = ([3u32, 1, 3], coarse(call, 12), coarse(10 + call, 9));
                    let rows = scatter(&of, &some, 4, 3).g;
                    let sum: Vec<f64> = dense.iter().zip(&rows).map(|(dense, rows)| dense + rows).collect();
                    let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
                    let (dense, sum) = (tensor(&dense, &[4, 3], dtype), tensor(&sum, &[4, 3], wide));
                    let some = sparse(&of, &some, &[3], dtype);
                    if both {
                        let pairs = [(&w, Gradient::Sparse(&some)), (&w, Gradient::Dense(&dense))];
                        optimizer.apply_gradients(pairs).unwrap();
                    } else {
                        optimizer.apply_gradients([(&w, &sum)]).unwrap();
                    }
                }
                Fingerprint::of(&optimizer, &[("w".to_owned(), w)])
            };
            assert_eq!(run(true), run(false), "{dtype:?}, {kernel:?}");
        }
    }
}

#[test]
fn gradients_may_be_views() {
    let (w, v) = (var(&noise(1, 15), &[5, 3], DType::F32), var(&noise(1, 15), &[5, 3], DType::F32));
    for kernel in KERNELS {
        let optimizer = |var: &Var| {
            let mut optimizer = Adamax::from_named([("w", var.clone())], base()).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            optimizer
        };
        let (mut of_views, mut of_copies) = (optimizer(&w), optimizer(&v));
        let (columns, every) = (tensor(&noise(2, 12), &[3, 4], DType::F32), ids(&[9, 1, 4, 4, 2, 9]));
        let view = SparseGrad { indices: every.narrow(0, 1, 4).unwrap(), values: columns.t().unwrap() };
        let copy = SparseGrad { indices: ids(&[1, 4, 4, 2]), values: columns.t().unwrap().contiguous().unwrap() };
        of_views.apply_gradients([(&w, &view)]).unwrap();
        of_copies.apply_gradients([(&v, &copy)]).unwrap();
        // One row for all ids.
        let row: Tensor = tensor(&noise(3, 3), &[1, 3], DType::F32);
        let view = SparseGrad { indices: ids(&[0, 3, 0]), values: row.broadcast_as((3, 3)).unwrap() };
        let copy = SparseGrad { values: view.values.contiguous().unwrap(), ..view.clone() };
        of_views.apply_gradients([(&w, &view)]).unwrap();
        of_copies.apply_gradients([(&v, &copy)]).unwrap();
        assert_eq!(bits(&w), bits(&v), "{kernel:?}");
    }
}

#[test]
fn gradients_of_no_row_change_no_row() {
    for dtype in DTYPES {
        for kernel in KERNELS {
            for params in [base(), ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), skip_nonfinite: true, ..base() }] {
                let w = var(&noise(1, 6), &[3, 2], dtype);
                let before = bits(&w);
                let mut optimizer = Adamax::from_named(
                    [("w", w.clone())],
                    ParamsAdamax { missing_gradients: MissingGradients::Half, ..params },
                )
                .unwrap();
                optimizer.set_kernel(kernel).unwrap();
                optimizer.apply_gradients([(&w, &sparse(&[], &[], &[2], dtype))]).unwrap();
                assert_eq!(bits(&w), before);
                assert_eq!((optimizer.updates(), optimizer.report().missing().count()), (1, 0));
            }
        }
    }
}

#[test]
fn tables_without_elements_take_part() {
    for kernel in KERNELS {
        for (shape, of) in [(&[0usize, 3][..], &[][..]), (&[4, 0], &[2, 1, 2])] {
            let w = var(&[], shape, DType::F32);
            let mut optimizer = Adamax::from_named([("w", w.clone())], base()).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            optimizer.apply_gradients([(&w, &sparse(of, &[], &shape[1..], DType::F32))]).unwrap();
            assert_eq!(optimizer.updates(), 1, "{shape:?}, {kernel:?}");
            let layer = candle_adamax::Table::new(&w).unwrap();
            assert_eq!(layer.lookup(&ids(of)).unwrap().dims(), [of.len(), shape[1]]);
        }
    }
}
