//! One step of the optimizer, each beside the memory's own speed: `cargo bench`, or `cargo bench -- dense`.
//!
//! `dense` is one tensor, in sizes that fit into a core's cache, into the chip's, and into neither; `small` is many
//! small tensors; `sparse` is some rows of a table. Gradients are recorded, so nothing but the step is timed. Throughput counts the bytes that an update
//! cannot avoid; `memory` reads and writes just these, in one row. `examples/throughput.rs` goes to larger sizes, alternates
//! the two in one run, and compares with candle-nn's AdamW.

use std::hint::black_box;

use candle_adamax::{Adamax, ParamsAdamax, Rounding, SparseGrad, StateDType};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer as _;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

mod support;

use support::case::{Case, Step};
use support::rows::{Rows, Touched};

/// candle allocates every intermediate result anew; the benches measure with the allocator that the README recommends.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CASE: Case =
    Case { tensors: 1, elements: 0, dtype: DType::F32, state: StateDType::F32, rounding: Rounding::Nearest };

fn dense(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dense");
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for elements in [1 << 14, 1 << 20, 1 << 24] {
            // One dtype in all sizes shows the caches; one size in all dtypes, the conversions.
            if dtype == DType::F32 || elements == 1 << 20 {
                let name = format!("{elements} {}", dtype.as_str());
                beside_memory(&mut group, &name, Case { elements, dtype, ..CASE });
            }
        }
    }
    for state in [StateDType::BF16, StateDType::F16, StateDType::Q8] {
        let elements = 1 << 20;
        beside_memory(&mut group, &format!("{elements} f32 with {state:?} moments"), Case { elements, state, ..CASE });
    }
    for rounding in [Rounding::Stochastic, Rounding::Master] {
        let case = Case { elements: 1 << 20, dtype: DType::BF16, state: StateDType::Q8, rounding, ..CASE };
        beside_memory(&mut group, &format!("{} bf16 {rounding:?} with Q8 moments", case.elements), case);
    }
    group.finish();
}

fn small(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("small");
    for (tensors, elements) in [(10, 64), (1000, 64), (100, 4096)] {
        let name = format!("{tensors} of {elements} f32");
        beside_memory(&mut group, &name, Case { tensors, elements, ..CASE });
    }
    group.finish();
}

/// The optimizer and the memory on one case. The arrays of the first are gone before the second makes its own.
fn beside_memory(group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>, name: &str, case: Case) {
    group.throughput(Throughput::Bytes(case.bytes()));
    let mut bench = |implementation: &str, make: &dyn Fn() -> Result<Step>| {
        group.bench_function(BenchmarkId::new(implementation, name), |bencher| match make() {
            Ok(mut step) => bencher.iter(|| black_box(step())),
            Err(error) => panic!("{name}: {error}"),
        });
    };
    bench("candle-adamax", &|| case.adamax());
    bench("memory", &|| case.memory());
}

/// Some rows of a table: sorted, summed and updated, for ids that change from one iteration to the next.
fn sparse(criterion: &mut Criterion) {
    const DIM: usize = 64;
    const BATCHES: usize = 16;
    let mut group = criterion.benchmark_group("sparse");
    for (rows, batch) in [(100_000, 512), (100_000, 8192), (1_000_000, 8192)] {
        let name = format!("{batch} of {rows} x {DIM} f32");
        let ids = |nth: usize| -> Vec<u32> {
            let hash = |i: usize| ((nth * batch + i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (0..batch).map(|i| (hash(i) as usize % rows) as u32).collect()
        };
        // Weights and moments are read and written, gradients are read.
        group.throughput(Throughput::Bytes((28 * batch * DIM) as u64));
        group.bench_function(BenchmarkId::new("candle-adamax", &name), |bencher| {
            let make = || -> Result<_> {
                let table = Var::ones((rows, DIM), DType::F32, &Device::Cpu)?;
                let values = Tensor::full(0.5f32, (batch, DIM), &Device::Cpu)?;
                let grads = (0..BATCHES).map(|nth| {
                    Ok(SparseGrad { indices: Tensor::new(ids(nth), &Device::Cpu)?, values: values.clone() })
                });
                let grads = grads.collect::<Result<Vec<_>>>()?;
                Ok((Adamax::new(vec![table.clone()], ParamsAdamax::default())?, table, grads))
            };
            let (mut optimizer, table, grads) = make().expect("a table that fits into memory");
            let mut grads = grads.iter().cycle();
            bencher.iter(|| grads.next().map(|grad| black_box(optimizer.apply_gradients([(&table, grad)]).map(drop))));
        });
        group.bench_function(BenchmarkId::new("memory", &name), |bencher| {
            let mut memory = Rows::new(rows, DIM).expect("arrays that fit into memory");
            let touched: Vec<Touched> = (0..BATCHES).map(|nth| Touched::of(&ids(nth))).collect();
            let grads = vec![0.5f32; batch * DIM];
            let mut touched = touched.iter().cycle();
            bencher.iter(|| touched.next().map(|touched| memory.update(touched, &grads)));
        });
    }
    group.finish();
}

criterion_group!(benches, dense, small, sparse);
criterion_main!(benches);
