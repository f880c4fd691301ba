//! One step of the optimizer, each beside the memory's own speed: `cargo bench`, or `cargo bench -- dense`.
//!
//! `dense` is one tensor, in sizes that fit into a core's cache, into the chip's, and into neither; `small` is many
//! small tensors. Gradients are recorded, so nothing but the step is timed. Throughput counts the bytes that an update
//! cannot avoid; `memory` reads and writes just these, in one row. `examples/throughput.rs` goes to larger sizes, alternates
//! the two in one run, and compares with candle-nn's AdamW.

use std::hint::black_box;

use candle_core::{DType, Result};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

mod support;

use support::case::{Case, Step};

/// candle allocates every intermediate result anew; the benches measure with the allocator that the README recommends.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn dense(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dense");
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for elements in [1 << 14, 1 << 20, 1 << 24] {
            // One dtype in all sizes shows the caches; one size in all dtypes, the conversions.
            if dtype == DType::F32 || elements == 1 << 20 {
                let name = format!("{elements} {}", dtype.as_str());
                beside_memory(&mut group, &name, Case { tensors: 1, elements, dtype });
            }
        }
    }
    group.finish();
}

fn small(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("small");
    for (tensors, elements) in [(10, 64), (1000, 64), (100, 4096)] {
        let name = format!("{tensors} of {elements} f32");
        beside_memory(&mut group, &name, Case { tensors, elements, dtype: DType::F32 });
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

criterion_group!(benches, dense, small);
criterion_main!(benches);
