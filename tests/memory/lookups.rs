//! Lookups that lead to nothing leave nothing, and neither do tables that are gone.

use candle_adamax::{Adamax, Embedding, MissingGradients, ParamsAdamax, Table};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;

use crate::common::process::has_passed_alone;
use crate::measure::growth;

const IDS: u32 = 512;

/// By how many bytes the process grows in so many calls of `f`, after a tenth as many to warm up.
fn growth_of(times: u32, mut f: impl FnMut(u32)) -> usize {
    (0..times / 10).for_each(&mut f);
    growth(|| (0..times).for_each(f))
}

#[test]
fn lookups_and_dropped_gradients_leave_nothing() {
    if has_passed_alone("lookups::lookups_and_dropped_gradients_leave_nothing") {
        return;
    }
    let var = Var::ones((1000, 4), DType::F32, &Device::Cpu).unwrap();
    let layer = Embedding::new(var.as_tensor().clone()).unwrap();
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let mut optimizer = Adamax::from_named([("table", var.clone())], params).unwrap();
    let ids = Tensor::arange(0u32, IDS, &Device::Cpu).unwrap();

    // The ids alone of as many records would be 200 MB, and their gradients 80 MB.
    let inference = growth_of(100_000, |_| drop(layer.forward(&ids).unwrap()));
    assert!(inference < 2 << 20, "100,000 lookups: {inference} bytes more");
    let dropped = growth_of(10_000, |_| {
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

#[test]
fn tables_that_are_gone_leave_no_memory() {
    if has_passed_alone("lookups::tables_that_are_gone_leave_no_memory") {
        return;
    }
    let grown = growth_of(20_000, |i| {
        let w = Var::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
        let ids = Tensor::new(&[i % 3; 64], &Device::Cpu).unwrap();
        let rows = Table::new(&w).unwrap().lookup(&ids).unwrap();
        let grads = rows.sum_all().unwrap().backward().unwrap();
        drop((rows, w));
        drop(grads);
    });
    // Their ids alone would be 5 MB.
    assert!(grown < 1 << 20, "{grown} bytes more");
}
