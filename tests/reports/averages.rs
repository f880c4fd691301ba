//! Moving averages of weights.

use candle_adamax::{Adamax, Ema, ParamsAdamax, Rounding};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap, batch_norm};

use crate::common::{tensor, values, var};

// d8ahazard/sd_dreambooth_extension#1417
#[test]
fn the_average_of_bf16_weights_does_not_stand_still() {
    let w = var(&[1.0; 8], &[8], DType::BF16);
    let ema = Some(Ema { momentum: 0.9999, overwrite_frequency: None });
    let mut optimizer = Adamax::from_named([("w", w.clone())], ParamsAdamax { ema, ..Default::default() }).unwrap();
    let zero = tensor(&[0.0; 8], &[8], DType::BF16);
    optimizer.apply_gradients([(&w, &zero)]).unwrap();
    w.set(&tensor(&[2.0; 8], &[8], DType::BF16)).unwrap();
    for _ in 0..1000 {
        optimizer.apply_gradients([(&w, &zero)]).unwrap();
    }
    // The momentum as f32 has it.
    let expected = 2.0 - f64::from(0.9999f32).powi(1000);
    let average = values(&optimizer.state("w").unwrap().ema.unwrap());
    assert!(average.iter().all(|x| (x - expected).abs() < 1e-5), "{average:?}, expected {expected}");
}

// d8ahazard/sd_dreambooth_extension#1417
#[test]
fn weights_that_averages_overwrite_move_in_bf16_as_in_f32() {
    let moved = |dtype, rounding| -> Vec<f64> {
        let w = var(&[1.0; 64], &[64], dtype);
        let ema = Some(Ema { momentum: 0.99, overwrite_frequency: Some(1) });
        let params = ParamsAdamax { lr: 1e-3.into(), ema, rounding, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
        let gradient = tensor(&[1.0; 64], &[64], dtype);
        for _ in 0..4000 {
            optimizer.apply_gradients([(&w, &gradient)]).unwrap();
        }
        values(&w).iter().map(|w| 1.0 - w).collect()
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let expected = mean(&moved(DType::F32, Rounding::Nearest));
    assert!((expected - 0.041).abs() < 5e-4, "{expected}");
    // Half a unit in the last place of a bf16 below 1.
    let half = 2f64.powi(-9);
    let master = moved(DType::BF16, Rounding::Master);
    assert!(master.iter().all(|moved| (moved - expected).abs() <= half), "{master:?}");
    let stochastic = mean(&moved(DType::BF16, Rounding::Stochastic));
    assert!((stochastic - expected).abs() <= half, "{stochastic}");
}

// huggingface/pytorch-image-models#102, fadel/pytorch_ema#13
#[test]
fn the_running_statistics_of_batch_norms_are_left_alone() {
    let varmap = VarMap::new();
    let layer = batch_norm(2, 1e-5, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu)).unwrap();
    let ema = Some(Ema { momentum: 0.9, overwrite_frequency: Some(1) });
    let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax { ema, ..Default::default() }).unwrap();
    let x = tensor(&[1.0, 10.0, 3.0, 14.0, 8.0, 12.0], &[3, 2], DType::F32);
    for _ in 0..10 {
        let before = values(layer.running_mean());
        let loss = layer.forward_t(&x, true).unwrap().sqr().unwrap().sum_all().unwrap();
        // The layer moves its statistics in the forward pass.
        let expected = values(layer.running_mean());
        assert_ne!(before, expected);
        optimizer.backward_step(&loss).unwrap();
        assert_eq!(values(layer.running_mean()), expected);
    }
    assert_eq!(optimizer.report().missing().count(), 0, "{:?}", optimizer.report());
    assert_eq!(optimizer.report().untrained().collect::<Vec<_>>(), ["running_mean", "running_var"]);
    optimizer.finalize_ema().unwrap();
    assert!(optimizer.state("running_mean").unwrap().ema.is_none());

    // They can be left out by name.
    let trained = |name: &str, _: &Var| !name.contains("running_");
    let optimizer = Adamax::from_varmap_where(&varmap, trained, ParamsAdamax::default()).unwrap();
    assert_eq!(optimizer.names().collect::<Vec<_>>(), ["bias", "weight"]);
}

// fadel/pytorch_ema#13
#[test]
fn a_counter_beside_the_weights_counts_on() {
    let (w, counter) = (var(&[1.0], &[1], DType::F32), var(&[0.0], &[1], DType::F32));
    let ema = Some(Ema { momentum: 0.9, overwrite_frequency: Some(1) });
    let vars = [("w", w.clone()), ("counter", counter.clone())];
    let mut optimizer = Adamax::from_named(vars, ParamsAdamax { ema, ..Default::default() }).unwrap();
    for k in 0..10 {
        counter.set(&Tensor::new(&[k as f32], &Device::Cpu).unwrap()).unwrap();
        optimizer.backward_step(&w.sum_all().unwrap()).unwrap();
    }
    assert_eq!(values(&counter), [9.0]);
}
