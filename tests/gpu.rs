//! What needs an NVIDIA GPU: `cargo test --release --features cuda --test gpu`. Every test fails where no device answers.
//!
//! The CPU's results are the reference, bit for bit: for every dtype and encoding, rounding and clipping, sizes and starts,
//! whole variables and rows of tables.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "golden_cases/reader/mod.rs"]
mod reader;

use std::sync::LazyLock;

use candle_adamax::{
    Adamax, Bags, Clip, CosineDecay, Ema, Embedding, EmbeddingBag, EpsMode, GradScaler, Kernel, LossScale, NormType,
    ParamsAdamax, Pooling, Rounding, SparseGrad, SparseUpdate, StateDType, StepCount, Table, WeightDecay,
};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor, Var};
use candle_nn::{Module, Optimizer};
use common::{Fingerprint, bits, noise, on, recorded, tensor, values, var};

/// The first GPU.
fn gpu() -> &'static Device {
    static GPU: LazyLock<Device> = LazyLock::new(|| Device::new_cuda(0).expect("a GPU, which these tests are for"));
    &GPU
}

/// One on a stream of its own.
fn gpu_with_stream() -> Device {
    Device::new_cuda_with_stream(0).expect("a GPU, which these tests are for")
}

const STATES: [StateDType; 4] = [StateDType::F32, StateDType::BF16, StateDType::F16, StateDType::Q8];
const SIZES: [usize; 9] = [0, 1, 7, 255, 1023, 1024, 1025, 4099, 100_003];

fn names() -> Vec<String> {
    SIZES.iter().map(|n| format!("w{n:06}")).collect()
}

/// Variables of all sizes on the current device.
fn vars(dtype: DType) -> Vec<(String, Var)> {
    let of_size = |(name, &n): (String, &usize)| (name, var(&noise(n as u64, n), &[n], dtype));
    names().into_iter().zip(&SIZES).map(of_size).collect()
}

/// A gradient for update `t`, whose magnitudes fall and now and then jump, as one of a larger tensor if it is `offset`.
fn gradient(n: usize, t: u64, dtype: DType, offset: usize) -> Tensor {
    let scale = 10f64.powi(-((t % 40) as i32) / 8) * if t.is_multiple_of(17) { 1e4 } else { 1.0 };
    let all: Vec<f64> = noise(1000 * t + n as u64, n + offset).into_iter().map(|x| x * scale).collect();
    tensor(&all, &[n + offset], dtype).narrow(0, offset, n).unwrap()
}

/// The fingerprint after some steps on a device, with the total norms that were reported.
fn train(
    device: &Device,
    dtypes: (DType, DType),
    params: &ParamsAdamax,
    steps: u64,
    offset: usize,
) -> (Fingerprint, Vec<u64>) {
    on(device, || {
        let vars = vars(dtypes.0);
        let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
        let mut norms = Vec::new();
        for t in 1..=steps {
            let grads: Vec<Tensor> = SIZES.iter().map(|&n| gradient(n, t, dtypes.1, offset)).collect();
            // One variable misses some of its gradients.
            let pairs = vars.iter().map(|(_, var)| var).zip(&grads).enumerate();
            let pairs = pairs.filter(|(i, _)| *i != 3 || !t.is_multiple_of(3)).map(|(_, pair)| pair);
            optimizer.apply_gradients(pairs).unwrap();
            norms.push(optimizer.report().total_norm().map_or(0, f64::to_bits));
        }
        (Fingerprint::of(&optimizer, &vars), norms)
    })
}

#[track_caller]
fn compare(dtypes: (DType, DType), params: &ParamsAdamax, steps: u64, offset: usize) {
    let (expected, norms) = train(&Device::Cpu, dtypes, params, steps, offset);
    let (got, got_norms) = train(gpu(), dtypes, params, steps, offset);
    assert_eq!(got_norms, norms, "{dtypes:?} {params:?}");
    assert!(got == expected, "{dtypes:?} {params:?}: the bits differ");
}

#[test]
fn recorded_runs_of_other_frameworks() {
    for kernel in [Kernel::Auto, Kernel::Portable] {
        let summary = on(gpu(), || reader::run_folder(&recorded(""), kernel)).unwrap();
        assert!(summary.failures.is_empty(), "{kernel:?}:\n{summary}");
    }
}

#[test]
fn every_dtype_and_encoding_has_the_bits_of_the_cpu() {
    use DType::{BF16, F16, F32, F64};
    for dtypes in [(F64, F64), (F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)] {
        for state_dtype in STATES {
            for rounding in [Rounding::Nearest, Rounding::Stochastic, Rounding::Master] {
                let params = ParamsAdamax { state_dtype, rounding, ..Default::default() };
                compare(dtypes, &params, 6, 0);
                compare(dtypes, &ParamsAdamax { rowwise_norm: true, ..params.clone() }, 4, 3);
            }
        }
    }
}

#[test]
fn every_setting_has_the_bits_of_the_cpu() {
    let base = || ParamsAdamax { state_dtype: StateDType::Q8, ..Default::default() };
    let all = [
        ParamsAdamax { eps_mode: EpsMode::InsideMax, weight_decay: WeightDecay::L2(0.1), ..base() },
        ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), maximize: true, ..base() },
        ParamsAdamax { clip: Some(Clip::Value(1e-3)), ..base() },
        ParamsAdamax { clip: Some(Clip::Norm(0.1)), loss_scale: LossScale::Static(128.0), ..base() },
        ParamsAdamax { clip: Some(Clip::GlobalNorm(0.1)), ..base() },
        ParamsAdamax { clip: Some(Clip::GradNorm { max_norm: 0.1, norm_type: NormType::L1 }), ..base() },
        ParamsAdamax { clip: Some(Clip::GradNorm { max_norm: 0.1, norm_type: NormType::Inf }), ..base() },
        ParamsAdamax { measure_norm: true, skip_nonfinite: true, ..base() },
        ParamsAdamax { gradient_accumulation_steps: 3, clip: Some(Clip::Norm(0.5)), ..base() },
        ParamsAdamax { ema: Some(Ema { momentum: 0.9, overwrite_frequency: Some(4) }), ..base() },
        ParamsAdamax { state_dtype: StateDType::F32, eps: 0.0, ..ParamsAdamax::pytorch() },
    ];
    for params in all {
        for dtypes in [(DType::F32, DType::F32), (DType::BF16, DType::BF16)] {
            compare(dtypes, &params, 10, 1);
        }
    }
}

#[test]
fn a_thousand_clipped_steps_have_the_bits_of_the_cpu() {
    for state_dtype in STATES {
        let params = ParamsAdamax { state_dtype, clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
        compare((DType::F32, DType::F32), &params, 1000, 0);
        compare((DType::BF16, DType::BF16), &ParamsAdamax { rounding: Rounding::Stochastic, ..params }, 1000, 0);
    }
}

#[test]
fn values_that_are_not_finite_go_where_the_cpu_takes_them() {
    let run = |device: &Device, params: &ParamsAdamax| {
        on(device, || {
            let w = var(&noise(1, 3000), &[3000], DType::F32);
            let mut optimizer = Adamax::from_named([("w", w.clone())], params.clone()).unwrap();
            for t in 1..=6u64 {
                let mut values = noise(t, 3000);
                if t == 2 {
                    (values[5], values[1500], values[2999]) = (f64::NAN, f64::INFINITY, -f64::INFINITY);
                }
                if t == 4 {
                    (values[7], values[2000]) = (1e30, 1e-42);
                }
                optimizer.apply_gradients([(&w, &tensor(&values, &[3000], DType::F32))]).unwrap();
            }
            (Fingerprint::of(&optimizer, &[("w".to_owned(), w)]), optimizer.skipped())
        })
    };
    for state_dtype in STATES {
        for skip_nonfinite in [false, true] {
            let params = ParamsAdamax { state_dtype, skip_nonfinite, ..Default::default() };
            assert!(run(gpu(), &params) == run(&Device::Cpu, &params), "{params:?}");
        }
    }
}

#[test]
fn calls_that_only_the_gpu_knows_to_be_skipped_have_the_bits_of_the_cpu() {
    // Schedules, biases, random numbers and units all depend on how many calls were skipped, of which the host hears late.
    let run = |device: &Device, params: &ParamsAdamax| {
        on(device, || {
            let (a, b) = (var(&noise(1, 3000), &[3000], DType::BF16), var(&noise(2, 50), &[50], DType::BF16));
            let vars = [("a".to_owned(), a.clone()), ("b".to_owned(), b.clone())];
            let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
            let mut reports = Vec::new();
            for t in 1..=40u64 {
                let mut values = noise(t, 3000);
                if t % 5 == 2 || (20..=27).contains(&t) {
                    values[t as usize] = f64::NAN;
                }
                let grads = [tensor(&values, &[3000], DType::BF16), tensor(&noise(t, 50), &[50], DType::BF16)];
                // Now and then one of them has no gradient.
                let n = if t.is_multiple_of(11) { 1 } else { 2 };
                optimizer.apply_gradients([&a, &b].into_iter().zip(&grads).take(n)).unwrap();
                if t.is_multiple_of(13) {
                    let report = optimizer.report();
                    let norm = report.total_norm().map(f64::to_bits);
                    let rates = (optimizer.learning_rate(), optimizer.loss_scale());
                    reports.push((report.updated(), report.skipped(), norm, optimizer.calls(), rates));
                }
            }
            (Fingerprint::of(&optimizer, &vars), optimizer.skipped(), optimizer.updates(), reports)
        })
    };
    let base = ParamsAdamax {
        lr: CosineDecay::new(0.01, 30).into(),
        skip_nonfinite: true,
        rounding: Rounding::Stochastic,
        state_dtype: StateDType::Q8,
        ..Default::default()
    };
    let loss_scale = LossScale::Dynamic(GradScaler { growth_factor: 1.7, growth_interval: 3, ..GradScaler::default() });
    for params in [
        base.clone(),
        ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), step_count: StepCount::PerVar, ..base.clone() },
        ParamsAdamax { skip_nonfinite: false, loss_scale, ..base.clone() },
        ParamsAdamax { loss_scale, gradient_accumulation_steps: 2, ..base.clone() },
        ParamsAdamax { clip: Some(Clip::Norm(0.5)), gradient_accumulation_steps: 2, ..base.clone() },
        ParamsAdamax { ema: Some(Ema { momentum: 0.9, overwrite_frequency: None }), measure_norm: true, ..base },
    ] {
        assert!(run(gpu(), &params) == run(&Device::Cpu, &params), "{params:?}");
    }
}

/// A loss of which the gradient is given, so that only the optimizer computes.
struct Given(Tensor);

impl CustomOp1 for Given {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let zeros = Tensor::zeros((), self.0.dtype(), &Device::Cpu)?;
        let (storage, _) = zeros.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.clone(), Shape::from(()))),
            _ => candle_core::bail!("made on the CPU"),
        }
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        Ok((storage.device().zeros_impl(&shape, self.0.dtype())?, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// Trains a table by lookups, several in a step, with ids that occur several times, in host memory and where the table is.
fn train_table(device: &Device, dtype: DType, params: &ParamsAdamax, padding: bool) -> (Fingerprint, Vec<u64>) {
    const ROWS: usize = 1000;
    const DIM: usize = 24;
    on(device, || {
        let weight = var(&noise(3, ROWS * DIM), &[ROWS, DIM], dtype);
        let mut layer = Embedding::new(weight.as_tensor().clone()).unwrap();
        if padding {
            layer = layer.padding_idx(7).unwrap();
        }
        let bias = var(&noise(4, DIM), &[DIM], dtype);
        let all = [("bias".to_owned(), bias.clone()), ("table".to_owned(), weight.clone())];
        let mut optimizer = Adamax::from_named(all.clone(), params.clone()).unwrap();
        for t in 1..=12u64 {
            let ids = |seed: u64, n: usize| -> Tensor {
                let ids: Vec<i64> = noise(seed, n).iter().map(|x| ((x * x) * 999.0) as i64).collect();
                let device = if seed.is_multiple_of(3) { Device::Cpu } else { common::device() };
                Tensor::from_vec(ids, n, &device).unwrap()
            };
            let grads_of = |seed: u64, n: usize| {
                let rows = layer.forward(&ids(seed, n)).unwrap();
                rows.apply_op1(Given(tensor(&noise(seed + 1, n * DIM), &[n, DIM], dtype))).unwrap().backward().unwrap()
            };
            let mut grads = grads_of(t, 300);
            grads.extend(grads_of(t + 100, 50)).unwrap();
            grads.insert(&bias, tensor(&noise(t, DIM), &[DIM], dtype));
            optimizer.step(&grads).unwrap();
        }
        let norm = optimizer.report().total_norm().map(f64::to_bits);
        // On a GPU rows catch up for a snapshot, and in host memory it has what they have missed.
        optimizer.catch_up().unwrap();
        (Fingerprint::of(&optimizer, &all), norm.into_iter().collect())
    })
}

#[test]
fn rows_of_tables_have_the_bits_of_the_cpu() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for state_dtype in STATES {
            for rowwise_norm in [false, true] {
                let params = ParamsAdamax { state_dtype, rowwise_norm, ..Default::default() };
                for params in [params.clone(), ParamsAdamax { clip: Some(Clip::GlobalNorm(0.1)), ..params }] {
                    let expected = train_table(&Device::Cpu, dtype, &params, false);
                    assert!(train_table(gpu(), dtype, &params, false) == expected, "{dtype:?} {params:?}");
                }
            }
        }
    }
    let params = ParamsAdamax { gradient_accumulation_steps: 4, ..Default::default() };
    assert!(train_table(gpu(), DType::F32, &params, true) == train_table(&Device::Cpu, DType::F32, &params, true));
}

#[test]
fn rows_catch_up_with_the_bits_of_the_cpu() {
    let exact = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..Default::default() };
    let decay = WeightDecay::Decoupled(0.1);
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for state_dtype in STATES {
            let params = ParamsAdamax { state_dtype, ..exact.clone() };
            for params in [
                ParamsAdamax { rowwise_norm: true, ..params.clone() },
                ParamsAdamax { skip_nonfinite: true, clip: Some(Clip::GlobalNorm(0.1)), ..params.clone() },
                ParamsAdamax {
                    weight_decay: decay,
                    eps_mode: EpsMode::InsideMax,
                    rounding: Rounding::Stochastic,
                    ..params
                },
            ] {
                let expected = train_table(&Device::Cpu, dtype, &params, true);
                assert!(train_table(gpu(), dtype, &params, true) == expected, "{dtype:?} {params:?}");
            }
        }
    }
    let params = ParamsAdamax { gradient_accumulation_steps: 4, ..exact };
    assert!(train_table(gpu(), DType::F32, &params, false) == train_table(&Device::Cpu, DType::F32, &params, false));
}

#[test]
fn rows_that_a_caller_gives() {
    let run = |device: &Device| {
        on(device, || {
            let weight = var(&noise(1, 400), &[50, 8], DType::F32);
            let mut optimizer = Adamax::from_named([("w", weight.clone())], ParamsAdamax::default()).unwrap();
            for t in 1..=5u64 {
                let indices = Tensor::new(&[4u32, 49, 4, 0], &common::device()).unwrap();
                let grad = SparseGrad { indices, values: tensor(&noise(t, 32), &[4, 8], DType::F32) };
                optimizer.apply_gradients([(&weight, &grad)]).unwrap();
            }
            optimizer.reset_rows("w", &Tensor::new(&[4u32], &Device::Cpu).unwrap()).unwrap();
            Fingerprint::of(&optimizer, &[("w".to_owned(), weight)])
        })
    };
    assert!(run(gpu()) == run(&Device::Cpu));
}

#[test]
fn a_table_in_host_memory_serves_a_model_on_the_gpu() {
    let weight = var(&noise(1, 4000), &[500, 8], DType::F32);
    let table = Table::new(&weight).unwrap();
    let scale = on(gpu(), || var(&noise(2, 8), &[8], DType::F32));
    let vars = [("scale", scale.clone()), ("table", weight.clone())];
    let mut optimizer = Adamax::from_named(vars, ParamsAdamax::default()).unwrap();
    let before = weight.to_vec2::<f32>().unwrap();
    let ids = Tensor::new(&[3u32, 8, 3], &Device::Cpu).unwrap();
    let rows = table.lookup(&ids).unwrap().to_device(gpu()).unwrap();
    let loss = rows.broadcast_mul(&scale).unwrap().sqr().unwrap().sum_all().unwrap();
    optimizer.backward_step(&loss).unwrap();
    let after = weight.to_vec2::<f32>().unwrap();
    let moved: Vec<usize> = (0..500).filter(|&row| before[row] != after[row]).collect();
    assert_eq!(moved, [3, 8]);
    assert!(optimizer.report().missing().next().is_none());
}

/// Trains a table and weights of its rows by bags, some of which are empty.
fn train_bags(device: &Device, dtype: DType, pooling: Pooling, weighted: bool) -> (Fingerprint, Vec<Vec<u64>>) {
    const OFFSETS: [u32; 6] = [0, 4, 4, 5, 90, 120];
    const IDS: usize = 120;
    on(device, || {
        let table = var(&noise(3, 200 * 20), &[200, 20], dtype);
        let weights = var(&noise(4, IDS), &[IDS], dtype);
        let layer = EmbeddingBag::new(table.as_tensor().clone(), pooling).unwrap();
        let all = [("table".to_owned(), table), ("weights".to_owned(), weights.clone())];
        let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(0.1)), ..Default::default() };
        let mut optimizer = Adamax::from_named(all.clone(), params).unwrap();
        let mut forward = Vec::new();
        for t in 1..=6u64 {
            let ids: Vec<i32> = noise(t, IDS).iter().map(|x| (x * x * 199.0) as i32).collect();
            let ids_on = if t.is_multiple_of(3) { Device::Cpu } else { common::device() };
            let ids = Tensor::from_vec(ids, IDS, &ids_on).unwrap();
            let mut bags = Bags::offsets(&ids, &Tensor::new(&OFFSETS, &Device::Cpu).unwrap()).unwrap();
            if weighted {
                bags = bags.weights(weights.as_tensor()).unwrap();
            }
            let pooled = layer.pool(&bags).unwrap();
            forward.push(bits(&pooled));
            let given = Given(tensor(&noise(t + 50, OFFSETS.len() * 20), &[OFFSETS.len(), 20], dtype));
            optimizer.step(&pooled.apply_op1(given).unwrap().backward().unwrap()).unwrap();
        }
        (Fingerprint::of(&optimizer, &all), forward)
    })
}

#[test]
fn bags_have_the_bits_of_the_cpu() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (pooling, weighted) in
            [(Pooling::Sum, false), (Pooling::Mean, false), (Pooling::Max, false), (Pooling::Sum, true)]
        {
            let expected = train_bags(&Device::Cpu, dtype, pooling, weighted);
            assert!(train_bags(gpu(), dtype, pooling, weighted) == expected, "{dtype:?} {pooling:?} {weighted}");
        }
    }
}

#[test]
fn a_lookup_of_nothing_has_the_bits_of_the_cpu() {
    let run = |device: &Device| {
        on(device, || {
            let (table, bias) = (var(&noise(1, 80), &[10, 8], DType::F32), var(&noise(2, 3000), &[3000], DType::F32));
            let layer = EmbeddingBag::new(table.as_tensor().clone(), Pooling::Sum).unwrap().padding_idx(3).unwrap();
            let all = [("bias".to_owned(), bias.clone()), ("table".to_owned(), table)];
            let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(0.1)), skip_nonfinite: true, ..Default::default() };
            let mut optimizer = Adamax::from_named(all.clone(), params).unwrap();
            // First some rows, then the padding alone, and then no id.
            for ids in [vec![1u32, 3, 2, 2], vec![3; 4], vec![]] {
                let offsets: &[u32] = if ids.is_empty() { &[0, 0] } else { &[0, 1] };
                let ids = Tensor::from_vec(ids.clone(), ids.len(), &Device::Cpu).unwrap();
                let bags = Bags::offsets(&ids, &Tensor::new(offsets, &Device::Cpu).unwrap()).unwrap();
                let pooled = layer.pool(&bags).unwrap();
                let n = pooled.dim(0).unwrap();
                let given = Given(tensor(&noise(5, n * 8), &[n, 8], DType::F32));
                let mut grads = pooled.apply_op1(given).unwrap().backward().unwrap();
                grads.insert(&bias, tensor(&noise(6, 3000), &[3000], DType::F32));
                optimizer.step(&grads).unwrap();
            }
            let norm = optimizer.report().total_norm().map(f64::to_bits);
            (Fingerprint::of(&optimizer, &all), norm)
        })
    };
    assert!(run(gpu()) == run(&Device::Cpu));
}

#[test]
fn steps_from_several_threads_have_the_bits_of_the_cpu() {
    let run = |device: &Device| {
        let (table, bias) =
            on(device, || (var(&noise(1, 8000), &[1000, 8], DType::F32), var(&noise(2, 8), &[8], DType::F32)));
        let all = [("bias".to_owned(), bias.clone()), ("table".to_owned(), table.clone())];
        let params =
            ParamsAdamax { sparse_update: SparseUpdate::Exact, clip: Some(Clip::Norm(0.1)), ..Default::default() };
        let mut optimizer = Adamax::from_named(all.clone(), params).unwrap();
        let lookups = Table::new(&table).unwrap();
        for t in 1..=6u64 {
            // candle's default stream is another one in each thread; what tensors need of each other the device waits for.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    on(device, || {
                        let ids: Vec<u32> = noise(t, 200).iter().map(|x| (x * x * 999.0) as u32).collect();
                        let rows = lookups.lookup(&Tensor::new(ids, &common::device()).unwrap()).unwrap();
                        let given = Given(tensor(&noise(t + 9, 1600), &[200, 8], DType::F32));
                        let mut grads = rows.apply_op1(given).unwrap().backward().unwrap();
                        grads.insert(&bias, tensor(&noise(t, 8), &[8], DType::F32));
                        optimizer.step(&grads).unwrap();
                        device.synchronize().unwrap();
                    });
                });
            });
        }
        // On a GPU rows catch up for a snapshot, and in host memory it has what they have missed.
        optimizer.catch_up().unwrap();
        Fingerprint::of(&optimizer, &all)
    };
    assert!(run(gpu()) == run(&Device::Cpu));
}

#[test]
fn a_bad_id_in_host_memory_is_an_error_of_the_lookup() {
    on(gpu(), || {
        let weight = var(&noise(1, 80), &[10, 8], DType::F32);
        let ids = Tensor::new(&[3u32, 12], &Device::Cpu).unwrap();
        let error = Table::new(&weight).unwrap().lookup(&ids).unwrap_err().to_string();
        assert!(error.contains("id 12 at position [1]") && error.contains("10 rows, so ids are 0 to 9"), "{error}");
        assert_eq!(bits(&weight), bits(&tensor(&noise(1, 80), &[10, 8], DType::F32)));
    });
}

#[test]
fn a_bad_id_on_the_gpu_is_an_error_of_the_step() {
    on(gpu(), || {
        for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
            let weight = var(&noise(1, 80), &[10, 8], DType::F32);
            let table = Table::new(&weight).unwrap();
            let params = ParamsAdamax { sparse_update, ..Default::default() };
            let vars = [("w".to_owned(), weight.clone())];
            let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
            let grads_of = |ids: &[i64]| {
                let rows = table.lookup(&Tensor::new(ids, gpu()).unwrap()).unwrap();
                let given = Given(tensor(&noise(7, 8 * ids.len()), &[ids.len(), 8], DType::F32));
                (bits(&rows), rows.apply_op1(given).unwrap().backward().unwrap())
            };
            optimizer.step(&grads_of(&[1, 2]).1).unwrap();
            let before = Fingerprint::of(&optimizer, &vars);
            let (rows, grads) = grads_of(&[3, -1, 4]);
            let nan = f64::NAN.to_bits();
            assert!(rows[..8].iter().chain(&rows[16..]).all(|&x| x != nan) && rows[8..16].iter().all(|&x| x == nan));
            for _ in 0..2 {
                let error = optimizer.step(&grads).unwrap_err().to_string();
                assert!(error.contains("id -1 at position [1]"), "{error}");
                assert!(error.contains("out of range: the table has 10 rows, so ids are 0 to 9"), "{error}");
            }
            assert!(Fingerprint::of(&optimizer, &vars) == before);
            optimizer.step(&grads_of(&[3, 4]).1).unwrap();
        }
    });
}

#[test]
fn a_bad_id_that_no_step_has_seen_is_an_error_of_a_later_lookup() {
    on(gpu(), || {
        let weight = var(&noise(1, 80), &[10, 8], DType::F32);
        let (table, good) = (Table::new(&weight).unwrap(), Tensor::new(&[1u8], gpu()).unwrap());
        let bad = Tensor::new(&[[1u32, 2], [10, 3]], gpu()).unwrap();
        table.lookup(&bad).unwrap();
        gpu().synchronize().unwrap();
        let error = table.lookup(&good).unwrap_err().to_string();
        assert!(error.contains("id 10 at position [1, 0]"), "{error}");
        table.lookup(&good).unwrap();
    });
}

#[test]
fn states_move_between_devices_and_kernels() {
    let params = ParamsAdamax { state_dtype: StateDType::Q8, rounding: Rounding::Master, ..Default::default() };
    let make = |device: &Device| {
        on(device, || {
            let vars = vars(DType::BF16);
            (Adamax::from_named(vars.clone(), params.clone()).unwrap(), vars)
        })
    };
    let step = |device: &Device, optimizer: &mut Adamax, vars: &[(String, Var)], t: u64| {
        on(device, || {
            let grads: Vec<Tensor> = SIZES.iter().map(|&n| gradient(n, t, DType::BF16, 0)).collect();
            optimizer.apply_gradients(vars.iter().map(|(_, var)| var).zip(&grads)).unwrap();
        });
    };
    let ((mut on_gpu, gpu_vars), (mut on_cpu, cpu_vars)) = (make(gpu()), make(&Device::Cpu));
    for t in 1..=3 {
        step(gpu(), &mut on_gpu, &gpu_vars, t);
    }
    on_cpu.restore(&on_gpu.snapshot().unwrap()).unwrap();
    for ((_, to), (_, from)) in cpu_vars.iter().zip(&gpu_vars).filter(|((_, to), _)| to.elem_count() > 0) {
        to.set(&from.to_device(&Device::Cpu).unwrap()).unwrap();
    }
    for t in 4..=6 {
        step(gpu(), &mut on_gpu, &gpu_vars, t);
        step(&Device::Cpu, &mut on_cpu, &cpu_vars, t);
    }
    assert!(Fingerprint::of(&on_gpu, &gpu_vars) == Fingerprint::of(&on_cpu, &cpu_vars));
    // Other encodings, on the GPU and on the CPU.
    for optimizer in [&mut on_gpu, &mut on_cpu] {
        optimizer.set_params(ParamsAdamax { state_dtype: StateDType::F16, ..params.clone() }).unwrap();
    }
    step(gpu(), &mut on_gpu, &gpu_vars, 7);
    step(&Device::Cpu, &mut on_cpu, &cpu_vars, 7);
    assert!(Fingerprint::of(&on_gpu, &gpu_vars) == Fingerprint::of(&on_cpu, &cpu_vars));
    // Tensor operations have moments in f32 only.
    assert!(on_gpu.set_kernel(Kernel::Portable).is_err());
}

#[test]
fn tensor_operations_and_kernels_take_turns() {
    let run = |device: &Device, kernels: [Kernel; 3]| {
        on(device, || {
            let vars = vars(DType::F32);
            let mut optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
            for (t, kernel) in (1..).zip(kernels) {
                optimizer.set_kernel(kernel).unwrap();
                let grads: Vec<Tensor> = SIZES.iter().map(|&n| gradient(n, t, DType::F32, 0)).collect();
                optimizer.apply_gradients(vars.iter().map(|(_, var)| var).zip(&grads)).unwrap();
            }
            vars.iter().flat_map(|(_, var)| values(var)).collect::<Vec<f64>>()
        })
    };
    let got = run(gpu(), [Kernel::Auto, Kernel::Portable, Kernel::Auto]);
    let expected = run(&Device::Cpu, [Kernel::Auto; 3]);
    // Weights are about 1 and move by a thousandth three times; tensor operations round in another order.
    let largest = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(got.len() == expected.len() && largest < 1e-6, "{largest:e}");
}

#[test]
fn devices_with_streams_of_their_own() {
    let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(0.1)), ..Default::default() };
    let expected = train(&Device::Cpu, (DType::F32, DType::F32), &params, 20, 0);
    let (one, other) = (gpu_with_stream(), gpu_with_stream());
    for device in [&one, &other, &one] {
        assert!(train(device, (DType::F32, DType::F32), &params, 20, 0) == expected);
    }
    // And two at once, from two threads.
    std::thread::scope(|scope| {
        let runs: Vec<_> = [&one, &other]
            .map(|device| scope.spawn(|| train(device, (DType::F32, DType::F32), &params, 20, 0)))
            .into_iter()
            .collect();
        for run in runs {
            assert!(run.join().unwrap() == expected);
        }
    });
}

#[test]
fn variables_on_the_cpu_and_on_the_gpu_in_one_optimizer() {
    let run = |device: &Device| {
        let here = var(&noise(1, 3000), &[3000], DType::F32);
        let there = on(device, || var(&noise(2, 5000), &[5000], DType::F32));
        let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), ..Default::default() };
        let mut optimizer = Adamax::from_named([("here", here.clone()), ("there", there.clone())], params).unwrap();
        for t in 1..=5u64 {
            let grad = tensor(&noise(10 + t, 3000), &[3000], DType::F32);
            let other = on(device, || tensor(&noise(20 + t, 5000), &[5000], DType::F32));
            optimizer.apply_gradients([(&here, &grad), (&there, &other)]).unwrap();
        }
        Fingerprint::of(&optimizer, &[("here".to_owned(), here), ("there".to_owned(), there)])
    };
    assert!(run(gpu()) == run(&Device::Cpu));
}
