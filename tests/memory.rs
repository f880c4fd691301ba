//! Lookups that lead to nothing leave nothing: a program of its own, so that no other test takes memory meanwhile.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_adamax::{Adamax, Embedding, MissingGradients, ParamsAdamax};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;

const IDS: u32 = 512;

/// The resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// By how many bytes the process grows in so many calls of `f`, after a tenth as many to warm up.
fn growth(times: u32, f: impl Fn()) -> usize {
    (0..times / 10).for_each(|_| f());
    let before = resident();
    (0..times).for_each(|_| f());
    resident().saturating_sub(before)
}

#[test]
fn lookups_and_dropped_gradients_leave_nothing() {
    let var = Var::ones((1000, 4), DType::F32, &Device::Cpu).unwrap();
    let layer = Embedding::new(var.as_tensor().clone()).unwrap();
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let mut optimizer = Adamax::from_named([("table", var.clone())], params).unwrap();
    let ids = Tensor::arange(0u32, IDS, &Device::Cpu).unwrap();

    // The ids alone of as many records would be 200 MB, and their gradients 80 MB.
    let inference = growth(100_000, || drop(layer.forward(&ids).unwrap()));
    assert!(inference < 2 << 20, "100,000 lookups: {inference} bytes more");
    let dropped = growth(10_000, || {
        let loss = layer.forward(&ids).unwrap().sum_all().unwrap();
        drop(loss.backward().unwrap());
    });
    assert!(dropped < 2 << 20, "10,000 dropped gradients: {dropped} bytes more");

    // A step applies what it is given, and nothing of all that.
    optimizer.step(&GradStore::default()).unwrap();
    assert_eq!(optimizer.report().missing().collect::<Vec<_>>(), ["table"]);
    let grads = layer.forward(&ids.narrow(0, 7, 1).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
    optimizer.step(&grads).unwrap();
    let changed = var.to_vec2::<f32>().unwrap().iter().map(|row| row[0] != 1.0).collect::<Vec<_>>();
    assert_eq!(changed, (0..1000).map(|row| row == 7).collect::<Vec<_>>());
}
