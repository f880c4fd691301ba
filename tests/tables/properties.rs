//! What holds for any rows: a gradient of all of them is a dense one, those of a dense one are found, lookups are what
//! `index_select` is, and the number of threads makes no difference.

use candle_adamax::{
    Adamax, Bags, Clip, Embedding, EmbeddingBag, EpsMode, Gradient, Kernel, NormType, ParamsAdamax, Pooling,
    SparseGrad, Table, WeightDecay,
};
use candle_core::{DType, Tensor};
use candle_nn::Module as _;
use proptest::prelude::*;

use crate::common::formulas::norm_of_clip;
use crate::common::property::config;
use crate::common::{DTYPES, Fingerprint, bits, ids, noise, pool, shuffled, tensor, values, var};
use crate::support::{coarse, received, scatter};

/// Settings: one of the clips or none, one of the decays or none, both epsilons.
fn params() -> impl Strategy<Value = ParamsAdamax> {
    let norm_type = prop::sample::select(vec![NormType::L1, NormType::L2, NormType::Inf]);
    let limit = prop::sample::select(vec![1e-3, 0.25, 40.0]);
    (0..5u8, norm_type, limit, 0..3u8, any::<bool>(), any::<bool>()).prop_map(
        |(clip, norm_type, limit, decay, inside, maximize)| ParamsAdamax {
            lr: 0.05.into(),
            clip: match clip {
                0 => None,
                1 => Some(Clip::Value(limit)),
                2 => Some(Clip::Norm(limit)),
                3 => Some(Clip::GlobalNorm(limit)),
                _ => Some(Clip::GradNorm { max_norm: limit, norm_type }),
            },
            weight_decay: match decay {
                0 => WeightDecay::None,
                1 => WeightDecay::L2(0.1),
                _ => WeightDecay::Decoupled(0.1),
            },
            eps_mode: if inside { EpsMode::InsideMax } else { EpsMode::AddToNorm },
            maximize,
            ..Default::default()
        },
    )
}

/// Whether norms are measured, which the portable path does in another order for dense gradients than for rows.
fn measures(params: &ParamsAdamax) -> bool {
    norm_of_clip(params).is_some()
}

fn fingerprint(optimizer: &Adamax, w: &candle_core::Var) -> Fingerprint {
    Fingerprint::of(optimizer, &[("w".to_owned(), w.clone())])
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn a_gradient_of_every_row_is_a_dense_gradient(
        params in params(),
        // Around the widths of vectors, and no columns at all.
        (rows, row) in (1usize..40, prop::sample::select(vec![vec![], vec![1], vec![3], vec![16], vec![33], vec![2, 5]])),
        dtype in prop::sample::select(DTYPES.to_vec()),
        (f32_gradient, portable, steps) in (any::<bool>(), any::<bool>(), 1u64..3),
        seed: u64,
    ) {
        let kernel = if portable && !measures(&params) { Kernel::Portable } else { Kernel::Auto };
        let grad_dtype = if f32_gradient && dtype != DType::F64 { DType::F32 } else { dtype };
        let shape: Vec<usize> = [rows].into_iter().chain(row.iter().copied()).collect();
        let n: usize = shape.iter().product();
        let run = |as_rows: bool| {
            let w = var(&noise(seed, n), &shape, dtype);
            let params = ParamsAdamax { gradient_accumulation_steps: steps, ..params.clone() };
            let mut optimizer = Adamax::from_named([("w", w.clone())], params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            let mut norms = Vec::new();
            for call in 0..2 * steps {
                let dense = tensor(&noise(seed.wrapping_add(call + 1), n), &shape, grad_dtype);
                let order: Vec<u32> = shuffled(seed ^ call, rows).into_iter().map(|row| row as u32).collect();
                let indices = ids(&order);
                let grad = SparseGrad { values: dense.index_select(&indices, 0).unwrap(), indices };
                let grad = if as_rows { Gradient::Sparse(&grad) } else { Gradient::Dense(&dense) };
                optimizer.apply_gradients([(&w, grad)]).unwrap();
                norms.push(optimizer.report().total_norm().map(f64::to_bits));
            }
            (fingerprint(&optimizer, &w), norms)
        };
        prop_assert!(run(true) == run(false), "{dtype:?}, {kernel:?}");
    }

    #[test]
    fn rows_of_a_dense_gradient_are_found(
        (rows, dim) in (1usize..20, 1usize..6),
        of in prop::collection::vec(0usize..20, 0..30),
        dtype in prop::sample::select(DTYPES.to_vec()),
        seed: u64,
    ) {
        let of: Vec<u32> = of.into_iter().map(|row| (row % rows) as u32).collect();
        let dense = noise(seed, rows * dim);
        let kept: Vec<f64> =
            (0..rows * dim).map(|i| if of.contains(&((i / dim) as u32)) { dense[i] } else { 0.0 }).collect();
        let kept = tensor(&kept, &[rows, dim], dtype);
        let mut expected = of.clone();
        expected.sort_unstable();
        expected.dedup();
        let indices: Vec<f64> = expected.iter().map(|&row| f64::from(row)).collect();
        let all: Vec<u64> = bits(&kept);
        let of_rows: Vec<u64> = expected.iter().flat_map(|&row| all[row as usize * dim..][..dim].to_vec()).collect();
        for grad in [SparseGrad::touched_rows(&kept, &ids(&of)).unwrap(), SparseGrad::nonzero_rows(&kept).unwrap()] {
            prop_assert_eq!(values(&grad.indices), indices.clone());
            prop_assert_eq!(bits(&grad.values), of_rows.clone());
            prop_assert_eq!(grad.values.dtype(), dtype);
        }
    }

    #[test]
    fn lookups_have_the_values_and_gradients_of_index_select(
        lists in prop::collection::vec(prop::collection::vec(0u32..15, 0..25), 1..5),
        dtype in prop::sample::select(DTYPES.to_vec()),
        seed: u64,
    ) {
        let w = var(&noise(seed, 45), &[15, 3], dtype);
        let table = Table::new(&w).unwrap();
        let (mut all_ids, mut all_values) = (Vec::new(), Vec::new());
        let mut loss = Tensor::zeros((), dtype, &candle_core::Device::Cpu).unwrap();
        for (i, of) in lists.iter().enumerate() {
            let rows = table.lookup(&ids(of)).unwrap();
            prop_assert_eq!(bits(&rows), bits(&w.index_select(&ids(of), 0).unwrap()));
            let factors = coarse(seed.wrapping_add(i as u64), of.len() * 3);
            let product = (rows * tensor(&factors, &[of.len(), 3], dtype)).unwrap();
            if !of.is_empty() {
                loss = (loss + product.sum_all().unwrap()).unwrap();
                all_ids.extend_from_slice(of);
                all_values.extend(factors);
            }
        }
        let got = received(&w, &loss.backward().unwrap());
        if all_ids.is_empty() {
            prop_assert_eq!(got, None);
        } else {
            prop_assert_eq!(got.unwrap(), scatter(&all_ids, &all_values, 15, 3));
        }
    }
}

/// Steps of a large table and of bags of it, on so many threads: all bits, and the norm.
fn large(threads: usize, dtype: DType, params: &ParamsAdamax) -> (Fingerprint, Vec<u64>, Option<f64>) {
    const ROWS: usize = 30_000;
    const DIM: usize = 64;
    const IDS: usize = 20_000;
    let w = var(&noise(1, ROWS * DIM), &[ROWS, DIM], dtype);
    let layer = Embedding::new(w.as_tensor().clone()).unwrap();
    let bag = EmbeddingBag::new(w.as_tensor().clone(), Pooling::Mean).unwrap();
    let mut optimizer = Adamax::from_named([("w", w.clone())], params.clone()).unwrap();
    let pool = pool(threads);
    // Some rows very often.
    let row = |x: f64| ((x * x * x).abs() * ROWS as f64) as u32;
    let of: Vec<u32> = noise(2, IDS).into_iter().map(row).collect();
    let offsets: Vec<u32> = (0..IDS as u32).step_by(7).collect();
    let factors = tensor(&noise(3, IDS * DIM), &[IDS, DIM], dtype);
    let mut pooled = Tensor::zeros((), dtype, &candle_core::Device::Cpu).unwrap();
    for _ in 0..2 {
        pool.install(|| {
            pooled = bag.pool(&Bags::offsets(&ids(&of), &ids(&offsets)).unwrap()).unwrap();
            let rows = (layer.forward(&ids(&of)).unwrap() * &factors).unwrap();
            let loss = (rows.sum_all().unwrap() + pooled.sqr().unwrap().sum_all().unwrap()).unwrap();
            optimizer.backward_step(&loss).unwrap();
        });
    }
    (fingerprint(&optimizer, &w), bits(&pooled), optimizer.report().total_norm())
}

#[test]
fn threads_make_no_difference() {
    let plain = ParamsAdamax { lr: 0.05.into(), weight_decay: WeightDecay::Decoupled(0.01), ..Default::default() };
    for (dtype, params) in [
        (DType::F32, ParamsAdamax { gradient_accumulation_steps: 2, clip: Some(Clip::Norm(1.0)), ..plain.clone() }),
        (DType::BF16, plain),
    ] {
        let expected = large(1, dtype, &params);
        for threads in [2, 3] {
            assert!(large(threads, dtype, &params) == expected, "{threads} threads give other bits, {dtype:?}");
        }
    }
}
