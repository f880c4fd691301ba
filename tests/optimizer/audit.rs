//! Audits: the parts of a model that a backward pass does not reach.

#![allow(clippy::single_range_in_vec_init, reason = "it is what is meant: a list of one range")]

use std::ops::Range;

use candle_adamax::{Adamax, Audit, Embedding, ErrorKind, Kernel, MissingGradients, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, rotary_emb};

use crate::common::{DTYPES, Fingerprint, noise, tensor, var};

/// The findings of an audit: names without a gradient, names with one of zero, names with ranges.
type Found<'a> = (Vec<&'a str>, Vec<&'a str>, Vec<(&'a str, Vec<Range<usize>>)>);

fn found(audit: &Audit) -> Found<'_> {
    let slices = audit.zero_slices().map(|(name, ranges)| (name, ranges.to_vec())).collect();
    (audit.missing().collect(), audit.zero().collect(), slices)
}

/// An optimizer of `var` under the name "w", and the audit of this gradient of it.
fn audit_of(var: &Var, grad: &Tensor) -> Audit {
    let mut grads = GradStore::default();
    grads.insert(var, grad.clone());
    Adamax::from_named([("w", var.clone())], ParamsAdamax::default()).unwrap().audit(&grads).unwrap()
}

#[test]
fn attention_whose_queries_and_keys_are_cut_off() -> Result<()> {
    let (hidden, heads) = (12, 2);
    let wqkv = var(&noise(1, 3 * hidden * hidden), &[3 * hidden, hidden], DType::F32);
    let (out, unused) = (var(&noise(2, hidden * hidden), &[hidden, hidden], DType::F32), var(&[1.0], &[], DType::F32));
    let vars = [("Wqkv", &wqkv), ("out", &out), ("unused", &unused)].map(|(name, var)| (name.to_owned(), var.clone()));
    let optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default())?;
    let x = tensor(&noise(3, 5 * hidden), &[1, 5, hidden], DType::F32);
    let (cos, sin) = (tensor(&[0.5; 15], &[5, 3], DType::F32), tensor(&[0.25; 15], &[5, 3], DType::F32));
    let grads = |rope: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| -> Result<GradStore> {
        let qkv = x.broadcast_matmul(&wqkv.t()?)?;
        let part =
            |at: usize| qkv.narrow(2, at * hidden, hidden)?.reshape((1, 5, heads, ()))?.transpose(1, 2)?.contiguous();
        let (q, k) = (rope(&part(0)?, &cos, &sin)?, rope(&part(1)?, &cos, &sin)?);
        let shares = candle_nn::ops::softmax(&q.matmul(&k.t()?)?, 3)?;
        let x = shares.matmul(&part(2)?)?.transpose(1, 2)?.reshape((1, 5, hidden))?;
        x.broadcast_matmul(&out.t()?)?.sqr()?.sum_all()?.backward()
    };

    // ModernBERT's: no variable that is used is without a gradient.
    let cut = grads(rotary_emb::rope)?;
    assert!(cut.get(&wqkv).is_some());
    let before = Fingerprint::of(&optimizer, &vars);
    let audit = optimizer.audit(&cut)?;
    assert_eq!(found(&audit), (vec!["unused"], vec![], vec![("Wqkv", vec![0..24])]));
    assert!(!audit.is_clean());
    assert_eq!(
        audit.to_string(),
        "of 3 vars 1 have no gradient, 0 one of zero, 1 one with slices of zero\n  no gradient: `unused`\n  \
         `Wqkv`: 24 of 36 slices are zero, 0..24"
    );
    assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    assert_eq!(optimizer.report().to_string(), "no call yet");

    let audit = optimizer.audit(&grads(rotary_emb::rope_slow)?)?;
    assert_eq!(found(&audit), (vec!["unused"], vec![], vec![]));
    Ok(())
}

#[test]
fn every_dtype_and_shape() {
    for dtype in DTYPES {
        let of = |values: &[f64], shape: &[usize]| {
            let (grad, w) = (tensor(values, shape, dtype), var(&vec![1.0; values.len()], shape, dtype));
            audit_of(&w, &grad)
        };
        // The smallest numbers, NaN and infinity are no zeros; both zeros are.
        let smallest = match dtype {
            DType::F64 => 5e-324,
            DType::F16 => 6e-8,
            _ => f64::from(f32::MIN_POSITIVE),
        };
        let values = [0.0, smallest, 0.0, -0.0, f64::NAN, 0.0, f64::INFINITY, 1.0, 0.0, 0.0, -0.0, 0.0];
        assert_eq!(found(&of(&values, &[6, 2])), (vec![], vec![], vec![("w", vec![1..2, 4..6])]), "{dtype:?}");
        assert_eq!(found(&of(&values, &[2, 3, 2])).2, [], "{dtype:?}");
        assert!(of(&values, &[2, 3, 2]).is_clean() && of(&values, &[1, 12]).is_clean());
        assert_eq!(found(&of(&values, &[12])).2, [("w", vec![0..1, 2..4, 5..6, 8..12])]);
        assert_eq!(found(&of(&[0.0, -0.0], &[2])), (vec![], vec!["w"], vec![]));
        assert_eq!(found(&of(&[0.0], &[])), (vec![], vec!["w"], vec![]));
        assert!(of(&[2.0], &[]).is_clean());
        // No elements are no zeros.
        assert!(of(&[], &[0, 3]).is_clean() && of(&[], &[3, 0]).is_clean());
    }
}

#[test]
fn rows_of_a_table_are_those_that_were_looked_up() -> Result<()> {
    for kernel in [Kernel::Auto, Kernel::Portable] {
        for dtype in DTYPES {
            let weight = var(&noise(1, 20), &[10, 2], dtype);
            let table = Embedding::new(weight.as_tensor().clone())?;
            let mut optimizer = Adamax::from_named([("table", weight.clone())], ParamsAdamax::default())?;
            optimizer.set_kernel(kernel)?;
            let audit = |ids: &[u32], factors: &[f64]| -> Result<Audit> {
                let factors = tensor(factors, &[ids.len(), 1], dtype);
                let rows = table.forward(&Tensor::new(ids, &Device::Cpu)?)?;
                Ok(optimizer.audit(&rows.broadcast_mul(&factors)?.sum_all()?.backward()?)?)
            };
            assert!(audit(&[3, 7], &[1.0, 2.0])?.is_clean());
            // Contributions are summed first: those of row 4 cancel.
            let first = audit(&[3, 4, 4, 5, 8], &[1.0, 2.0, -2.0, 0.0, 0.0])?;
            assert_eq!(found(&first), (vec![], vec![], vec![("table", vec![4..6, 8..9])]));
            assert!(first.to_string().ends_with("`table`: 3 of 10 slices are zero, 4..6, 8..9"), "{first}");
            assert_eq!(found(&audit(&[9, 0], &[0.0, 0.0])?), (vec![], vec!["table"], vec![]));
            assert_eq!(found(&audit(&[], &[])?), (vec!["table"], vec![], vec![]));
            // A row that the other step has not looked up is not listed.
            assert_eq!(found(&first.and(&audit(&[5, 6], &[0.0, 1.0])?)).2, [("table", vec![5..6])]);
        }
    }
    Ok(())
}

#[test]
fn a_weight_that_is_looked_up_and_used_densely() -> Result<()> {
    let weight = var(&noise(1, 8), &[4, 2], DType::F32);
    let table = Embedding::new(weight.as_tensor().clone())?;
    let optimizer = Adamax::from_named([("tied", weight.clone())], ParamsAdamax::default())?;
    let rows = table.forward(&Tensor::new(&[2u32], &Device::Cpu)?)?.sum_all()?;
    let dense = weight.narrow(0, 0, 1)?.sum_all()?;
    let audit = optimizer.audit(&(rows + dense)?.backward()?)?;
    assert_eq!(found(&audit).2, [("tied", vec![1..2, 3..4])]);
    Ok(())
}

#[test]
fn audits_of_several_steps_are_joined() {
    let vars = ["a", "b", "c", "d"].map(|name| (name, var(&[1.0; 6], &[6], DType::F32)));
    let optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
    let audit = |grads: [Option<[f64; 6]>; 4]| {
        let mut store = GradStore::default();
        for ((_, var), grad) in vars.iter().zip(grads) {
            if let Some(grad) = grad {
                store.insert(var, tensor(&grad, &[6], DType::F32));
            }
        }
        optimizer.audit(&store).unwrap()
    };
    let (ones, zeros) = ([1.0; 6], [0.0; 6]);
    let (low, high) = ([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    let all = audit([None, Some(zeros), Some(low), Some(ones)]);
    assert_eq!(found(&all), (vec!["a"], vec!["b"], vec![("c", vec![0..4])]));
    assert_eq!(found(&all.and(&all)), found(&all));
    // By name, what neither has reached: one that is missing counts as zero beside zeros.
    let other = audit([Some(zeros), Some(high), Some(high), None]);
    let both = (vec![], vec!["a"], vec![("b", vec![1..2, 3..6]), ("c", vec![1..2, 3..4])]);
    assert_eq!(found(&all.and(&other)), both);
    assert_eq!(found(&other.and(&all)), both);
    let apart = audit([Some(ones), Some(ones), Some([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), Some(zeros)]);
    assert!(all.and(&apart).is_clean());
    assert_eq!(all.and(&apart).to_string(), "all 4 vars have a gradient, without a slice of zero");
    assert_eq!(all.and(&apart).vars(), 4);
}

#[test]
fn a_long_list_is_cut_short() {
    let vars: Vec<_> = (0..30).map(|i| (format!("v{i:02}"), var(&[1.0; 14], &[14], DType::F32))).collect();
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let optimizer = Adamax::from_named(vars.clone(), params).unwrap();
    let mut grads = GradStore::default();
    for (i, (_, var)) in vars.iter().enumerate().skip(12) {
        let alternate = |k: usize| if i < 18 || k.is_multiple_of(2) { 0.0 } else { 1.0 };
        grads.insert(var, tensor(&(0..14).map(alternate).collect::<Vec<_>>(), &[14], DType::F32));
    }
    let text = optimizer.audit(&grads).unwrap().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 14, "{text}");
    assert_eq!(lines[0], "of 30 vars 12 have no gradient, 6 one of zero, 12 one with slices of zero");
    assert_eq!(lines[1], "  no gradient: `v00`, `v01`, `v02`, `v03`, `v04` and 7 more");
    assert_eq!(lines[2], "  zero: `v12`, `v13`, `v14`, `v15`, `v16` and 1 more");
    assert_eq!(lines[3], "  `v18`: 7 of 14 slices are zero, 0..1, 2..3, 4..5, 6..7, 8..9 and 2 more ranges");
    assert_eq!(lines[13], "  and 2 more vars with slices of zero");
}

#[test]
fn gradients_that_a_step_would_refuse() {
    let w = var(&[1.0; 4], &[2, 2], DType::F32);
    let optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax::default()).unwrap();
    let mut grads = GradStore::default();
    grads.insert(&w, tensor(&[1.0; 4], &[4], DType::F32));
    let error = optimizer.audit(&grads).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ShapeMismatch { .. }), "{error}");
    assert_eq!(error.optimizer(), Some("Adamax"));
    // None at all is an answer, and not an error.
    let audit = optimizer.audit(&GradStore::default()).unwrap();
    assert_eq!(found(&audit), (vec!["w"], vec![], vec![]));
}

#[test]
fn audits_of_two_optimizers_keep_what_each_found() -> Result<()> {
    let (a, b) = (var(&[1.0, 2.0], &[2], DType::F32), var(&[1.0, 2.0], &[2], DType::F32));
    let audit = |name: &str, var: &Var, grad: Option<&[f64]>| -> Result<Audit> {
        let mut grads = GradStore::default();
        if let Some(grad) = grad {
            grads.insert(var, tensor(grad, &[2], DType::F32));
        }
        Ok(Adamax::from_named([(name, var.clone())], ParamsAdamax::default())?.audit(&grads)?)
    };
    let both = audit("a", &a, None)?.and(&audit("b", &b, Some(&[0.0, 1.0]))?);
    assert_eq!(both.vars(), 2);
    assert_eq!(found(&both), (vec!["a"], vec![], vec![("b", vec![0..1])]));
    assert!(!both.is_clean());
    // The second step of both reaches everything.
    let later = audit("a", &a, Some(&[1.0, 1.0]))?.and(&audit("b", &b, Some(&[1.0, 0.0]))?);
    assert!(both.and(&later).is_clean());
    Ok(())
}
