//! Weights that are written between two updates, by the user or by this crate: whatever the rounding is, f16 and bf16
//! weights are those of a run in f32 with the same writes, within the rounding.

use candle_adamax::{Adamax, Ema, Embedding, ParamsAdamax, Rounding, SparseUpdate, Table};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarMap};

use crate::common::folder::Folder;
use crate::common::{bits, pool, tensor, values, var};

const HALVES: [DType; 2] = [DType::BF16, DType::F16];
const ROUNDINGS: [Rounding; 3] = [Rounding::Nearest, Rounding::Stochastic, Rounding::Master];

/// One unit in the last place of `x` in `dtype`.
fn ulp(x: f64, dtype: DType) -> f64 {
    let (digits, least) = if dtype == DType::BF16 { (7, -133) } else { (10, -24) };
    2f64.powi(((x.abs().log2().floor() as i32).max(-1000) - digits).max(least))
}

/// How many units a weight may be away from the exact one after the last update: each rounding to the nearest value is one
/// half, each one at random up to one.
fn last_rounding(rounding: Rounding) -> f64 {
    if rounding == Rounding::Stochastic { 1.0 } else { 0.5 }
}

/// Compares with a run in f32, up to so many units in the last place, of the larger one of both.
#[track_caller]
fn assert_close(what: &str, got: &Tensor, exact: &Tensor, units: f64) {
    let dtype = got.dtype();
    for (i, (got, exact)) in values(got).into_iter().zip(values(exact)).enumerate() {
        assert_eq!(got.is_nan(), exact.is_nan(), "{what}: element {i} is {got}, in f32 {exact}");
        if exact.is_nan() || got == exact {
            continue;
        }
        assert!(got.is_finite() && exact.is_finite(), "{what}: element {i} is {got}, in f32 {exact}");
        let unit = ulp(got.abs().max(exact.abs()), dtype);
        // A thousandth for the rounding of f32 itself.
        assert!((got - exact).abs() <= units * unit * 1.001, "{what}: element {i} is {got}, in f32 {exact}");
    }
}

/// Numbers of both signs and of several magnitudes.
fn start(n: usize) -> Vec<f64> {
    (0..n).map(|i| (i as f64 * 0.7).sin() * 4f64.powi(i as i32 % 3 - 1)).collect()
}

/// A weight of 16 bits and its twin in f32, each with an optimizer.
struct Twins {
    half: Var,
    full: Var,
    optimizers: [Adamax; 2],
}

impl Twins {
    fn new(shape: &[usize], dtype: DType, params: &ParamsAdamax) -> Result<Self> {
        let half = Var::from_tensor(&tensor(&start(shape.iter().product()), shape, dtype))?;
        let full = Var::from_tensor(&half.to_dtype(DType::F32)?)?;
        let of_full = ParamsAdamax { rounding: Rounding::Nearest, ..params.clone() };
        let optimizers = [
            Adamax::from_named([("w", half.clone())], params.clone())?,
            Adamax::from_named([("w", full.clone())], of_full)?,
        ];
        Ok(Self { half, full, optimizers })
    }

    /// A step with gradients of both signs.
    fn step(&mut self, seed: usize) -> Result<()> {
        let n = self.full.elem_count();
        let grads: Vec<f32> = (0..n).map(|i| ((i * 31 + seed * 17) as f32 * 0.37).sin()).collect();
        let grads = Tensor::from_vec(grads, self.full.shape(), &Device::Cpu)?;
        self.optimizers[0].apply_gradients([(&self.half, &grads)])?;
        Ok(self.optimizers[1].apply_gradients([(&self.full, &grads)]).map(drop)?)
    }

    /// Writes to both.
    fn set(&self, half: &Tensor) -> Result<()> {
        self.half.set(half)?;
        self.full.set(&half.to_dtype(DType::F32)?)
    }
}

/// The report: rests are negative, the weight becomes zero, and the sum is no number any more.
#[test]
fn a_weight_that_is_set_to_zero_is_no_nan() -> Result<()> {
    let params = ParamsAdamax { lr: 1e-3.into(), rounding: Rounding::Master, ..Default::default() };
    let w = Var::ones(1, DType::BF16, &Device::Cpu)?;
    let full = Var::ones(1, DType::F32, &Device::Cpu)?;
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    let mut reference =
        Adamax::from_named([("w", full.clone())], ParamsAdamax { lr: 1e-3.into(), ..Default::default() })?;
    for gradient in [1.0f32, 0.0] {
        let gradient = Tensor::new(&[gradient], &Device::Cpu)?;
        optimizer.apply_gradients([(&w, &gradient)])?;
        reference.apply_gradients([(&full, &gradient)])?;
        if gradient.to_vec1::<f32>()?[0] == 1.0 {
            w.zero_set()?;
            full.zero_set()?;
        }
    }
    assert_close("zero", &w, &full, 0.5);
    Ok(())
}

#[test]
fn weights_that_somebody_writes_are_what_was_written() -> Result<()> {
    const N: usize = 300;
    let write = |what: &str, old: &Tensor| -> Result<Tensor> {
        let dtype = old.dtype();
        let all = |x: f64| Tensor::full(x as f32, N, &Device::Cpu)?.to_dtype(dtype);
        Ok(match what {
            "zero" => old.zeros_like()?,
            "minus zero" => all(-0.0)?,
            "infinity" => all(f64::INFINITY)?,
            "minus infinity" => all(f64::NEG_INFINITY)?,
            "nan" => all(f64::NAN)?,
            "another" => all(-0.37)?,
            "its own" => old.copy()?,
            "largest" => all(if dtype == DType::BF16 { 3.389e38 } else { 65504.0 })?,
            "smallest" => all(if dtype == DType::BF16 { 1e-40 } else { 6e-8 })?,
            _ => {
                let mask: Vec<f32> = (0..N).map(|i| (i % 3 != 0) as u8 as f32).collect();
                (old * Tensor::new(mask, &Device::Cpu)?.to_dtype(dtype)?)?
            }
        })
    };
    const WRITES: [&str; 10] = [
        "zero",
        "minus zero",
        "infinity",
        "minus infinity",
        "nan",
        "another",
        "its own",
        "largest",
        "smallest",
        "mask",
    ];
    for dtype in HALVES {
        for rounding in ROUNDINGS {
            for what in WRITES {
                let params = ParamsAdamax { rounding, ..Default::default() };
                let mut twins = Twins::new(&[N], dtype, &params)?;
                for seed in 0..5 {
                    twins.step(seed)?;
                }
                twins.set(&write(what, &twins.half)?)?;
                twins.step(5)?;
                // The master may be half a unit off what was written.
                let units = last_rounding(rounding) + if rounding == Rounding::Master { 0.5 } else { 0.0 };
                assert_close(&format!("{dtype:?} {rounding:?} {what}"), &twins.half, &twins.full, units);
            }
        }
    }
    Ok(())
}

#[test]
fn weights_that_a_varmap_loads_are_those_of_the_file() -> Result<()> {
    let folder = Folder::new();
    let path = folder.file("state");
    for dtype in HALVES {
        for rounding in ROUNDINGS {
            let mut twins = Twins::new(&[40, 5], dtype, &ParamsAdamax { rounding, ..Default::default() })?;
            let mut varmap = VarMap::new();
            varmap.data().lock().unwrap().insert("w".into(), twins.half.clone());
            let best = (twins.half.zeros_like()? + 0.25)?;
            twins.half.set(&best)?;
            varmap.save(&path)?;
            for seed in 0..5 {
                twins.step(seed)?;
            }
            varmap.load(&path)?;
            twins.full.set(&best.to_dtype(DType::F32)?)?;
            twins.step(5)?;
            let units = last_rounding(rounding) + if rounding == Rounding::Master { 0.5 } else { 0.0 };
            assert_close(&format!("{dtype:?} {rounding:?}"), &twins.half, &twins.full, units);
        }
    }
    Ok(())
}

/// Two tables with the same lookups.
struct Tables {
    twins: Twins,
    tables: [Table; 2],
}

impl Tables {
    fn new(dtype: DType, rounding: Rounding, sparse_update: SparseUpdate) -> Result<Self> {
        let twins = Twins::new(&[6, 70], dtype, &ParamsAdamax { rounding, sparse_update, ..Default::default() })?;
        let tables = [Table::new(&twins.half)?, Table::new(&twins.full)?];
        Ok(Self { twins, tables })
    }

    /// A step of these rows.
    fn step(&mut self, ids: &[u32]) -> Result<()> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let scale: Vec<f64> = (0..70).map(|i| (f64::from(i) * 0.37 + 0.5).sin()).collect();
        let scale = tensor(&scale, &[1, 70], self.twins.half.dtype());
        for (table, optimizer) in self.tables.iter().zip(&mut self.twins.optimizers) {
            let rows = table.lookup(&ids)?;
            optimizer.backward_step(&rows.broadcast_mul(&scale.to_dtype(rows.dtype())?)?.sum_all()?)?;
        }
        Ok(())
    }

    fn set_rows(&self, ids: &[u32], x: f64) -> Result<()> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let rows = tensor(&vec![x; ids.elem_count() * 70], &[ids.elem_count(), 70], self.twins.half.dtype());
        self.tables[0].set_rows(&ids, &rows)?;
        self.tables[1].set_rows(&ids, &rows.to_dtype(DType::F32)?)?;
        Ok(())
    }

    fn reset_rows(&mut self, ids: &[u32]) -> Result<()> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        self.twins.optimizers.iter_mut().try_for_each(|optimizer| optimizer.reset_rows("w", &ids))?;
        Ok(())
    }

    /// What the optimizer keeps beside the rows.
    fn master(&self) -> Result<Vec<f64>> {
        Ok(values(self.twins.optimizers[0].snapshot()?.vars["w"].master.as_ref().unwrap()))
    }

    fn check(&self, what: &str, units: f64) -> Result<()> {
        self.twins.optimizers.iter().try_for_each(Adamax::catch_up)?;
        assert_close(what, &self.twins.half, &self.twins.full, units);
        Ok(())
    }
}

#[test]
fn rows_that_are_set_are_the_master() -> Result<()> {
    for dtype in HALVES {
        for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
            for x in [0.0, -0.0, 0.7, f64::INFINITY, f64::NAN] {
                for resets in [false, true] {
                    let mut tables = Tables::new(dtype, Rounding::Master, sparse_update)?;
                    for _ in 0..5 {
                        tables.step(&[0, 1, 2, 3, 4, 5])?;
                    }
                    tables.set_rows(&[1, 4], x)?;
                    if resets {
                        tables.reset_rows(&[1, 4])?;
                    }
                    for _ in 0..3 {
                        tables.step(&[1, 2, 4])?;
                    }
                    // Exactly that: with the run in f32 every update is the same.
                    tables.check(&format!("{dtype:?} {sparse_update:?} {x} {resets}"), 0.5)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_that_are_set_without_a_master_are_rounded_once_more() -> Result<()> {
    for dtype in HALVES {
        for rounding in [Rounding::Nearest, Rounding::Stochastic] {
            for x in [0.0, -0.0, 0.7, f64::INFINITY, f64::NAN] {
                let mut tables = Tables::new(dtype, rounding, SparseUpdate::Lazy)?;
                tables.step(&[1, 4])?;
                tables.set_rows(&[0, 1, 2, 3, 4, 5], x)?;
                tables.reset_rows(&[4])?;
                tables.step(&[1, 4])?;
                tables.check(&format!("{dtype:?} {rounding:?} {x}"), last_rounding(rounding))?;
            }
        }
    }
    Ok(())
}

/// What is written is followed before anybody reads the master, not only by a step.
#[test]
fn checkpoints_and_grown_tables_have_masters_that_have_followed() -> Result<()> {
    for dtype in HALVES {
        let mut tables = Tables::new(dtype, Rounding::Master, SparseUpdate::Lazy)?;
        tables.step(&[0, 1, 2])?;
        assert!(tables.master()?[70..140].iter().all(|&rest| rest != 0.0), "{dtype:?}");
        tables.set_rows(&[1], 0.5)?;
        for _ in 0..2 {
            let master = tables.master()?;
            assert!(master[..70].iter().all(|&rest| rest != 0.0), "{dtype:?}");
            assert!(master[70..140].iter().all(|&rest| rest == 0.0), "{dtype:?}");
        }
        let rows = tensor(&[2.0; 70], &[1, 70], dtype);
        tables.twins.optimizers[0].append_rows("w", &rows)?;
        let master = tables.master()?;
        assert!(master[..70].iter().chain(&master[140..210]).all(|&rest| rest != 0.0), "{dtype:?}");
        assert!(master[70..140].iter().chain(&master[420..]).all(|&rest| rest == 0.0), "{dtype:?}");
        assert_eq!(master.len(), 490);
        // Off and on again: a new master is the weight.
        let optimizer = &mut tables.twins.optimizers[0];
        for rounding in [Rounding::Nearest, Rounding::Master] {
            let params = ParamsAdamax { rounding, ..optimizer.params().clone() };
            optimizer.set_params(params)?;
        }
        assert!(tables.master()?.iter().all(|&rest| rest == 0.0), "{dtype:?}");
    }
    Ok(())
}

#[test]
fn rows_begin_anew_without_what_was_kept_of_them() -> Result<()> {
    for dtype in HALVES {
        for sparse_update in [SparseUpdate::Lazy, SparseUpdate::Exact] {
            let mut tables = Tables::new(dtype, Rounding::Master, sparse_update)?;
            tables.step(&[0, 1, 2])?;
            tables.reset_rows(&[1])?;
            let master = tables.master()?;
            assert!(master[..70].iter().chain(&master[140..210]).all(|&rest| rest != 0.0), "{dtype:?}");
            assert!(master[70..140].iter().all(|&rest| rest == 0.0), "{dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn rows_that_a_norm_scales_are_scaled_in_their_masters() -> Result<()> {
    for dtype in HALVES {
        for rounding in ROUNDINGS {
            let mut tables = Tables::new(dtype, rounding, SparseUpdate::Lazy)?;
            tables.step(&[0, 1])?;
            tables.twins.full.set(&tables.twins.half.to_dtype(DType::F32)?)?;
            let ids = Tensor::new(&[0u32, 1], &Device::Cpu)?;
            for weight in [&tables.twins.half, &tables.twins.full] {
                Embedding::new(weight.as_tensor().clone())?.max_norm(1.0)?.forward(&ids)?;
            }
            let what = format!("{dtype:?} {rounding:?}");
            assert_close(&what, &tables.twins.half, &tables.twins.full, 0.5);
            let scaled = values(&tables.twins.full);
            tables.step(&[0, 1])?;
            let got = values(&tables.twins.half).into_iter().zip(values(&tables.twins.full));
            for ((got, exact), scaled) in got.zip(scaled) {
                let largest =
                    0.5 * ulp(scaled, dtype) + last_rounding(rounding) * ulp(got.abs().max(exact.abs()), dtype);
                assert!((got - exact).abs() <= 1.001 * largest, "{what}: {got}, in f32 {exact}");
            }
        }
    }
    Ok(())
}

/// A row just above its largest norm: its scaled weights round to what they were, at every lookup. Steps that are smaller
/// than the rounding are not lost, since nothing is written.
#[test]
fn a_row_at_its_largest_norm_goes_on_training() -> Result<()> {
    let ids = Tensor::new(&[0u32], &Device::Cpu)?;
    let run = |dtype: DType, rounding: Rounding| -> Result<Vec<f64>> {
        let w = var(&[1.0, 0.0546875], &[1, 2], dtype);
        let embedding = Embedding::new(w.as_tensor().clone())?.max_norm(1.0)?;
        let params = ParamsAdamax { lr: 1e-5.into(), rounding, ..Default::default() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        let scale = tensor(&[0.0, 1.0], &[1, 2], dtype);
        for _ in 0..100 {
            optimizer.backward_step(&(embedding.forward(&ids)? * &scale)?.sum_all()?)?;
        }
        Ok(values(&w))
    };
    let exact = run(DType::F32, Rounding::Nearest)?;
    let master = run(DType::BF16, Rounding::Master)?;
    assert_eq!(master[0], 1.0);
    let unit = ulp(exact[1], DType::BF16);
    assert!(0.0546875 - exact[1] > 4.0 * unit, "{}", exact[1]);
    assert!((master[1] - exact[1]).abs() <= unit, "{}, in f32 {}", master[1], exact[1]);
    Ok(())
}

fn with_average(momentum: f64, overwrite_frequency: Option<u64>, rounding: Rounding) -> ParamsAdamax {
    let ema = Some(Ema { momentum, overwrite_frequency });
    ParamsAdamax { lr: 1e-3.into(), ema, rounding, ..Default::default() }
}

/// The report: f32 moves by 0.0410, and steps of an average with momentum 0.99 are a hundredth of one of Adamax.
#[test]
fn averages_that_overwrite_go_where_those_of_f32_go() -> Result<()> {
    const N: usize = 64;
    let run = |dtype: DType, rounding: Rounding| -> Result<Vec<f64>> {
        let w = Var::ones(N, dtype, &Device::Cpu)?;
        let mut optimizer = Adamax::from_named([("w", w.clone())], with_average(0.99, Some(1), rounding))?;
        let grad = Tensor::ones(N, DType::F32, &Device::Cpu)?;
        for _ in 0..4000 {
            optimizer.apply_gradients([(&w, &grad)])?;
        }
        Ok(values(&w))
    };
    let exact = run(DType::F32, Rounding::Nearest)?[0];
    assert!((1.0 - exact - 0.041).abs() < 5e-4, "{exact}");
    for dtype in HALVES {
        let half_unit = ulp(exact, dtype) / 2.0;
        for w in run(dtype, Rounding::Master)? {
            assert!((w - exact).abs() <= half_unit, "{dtype:?}: {w}, in f32 {exact}");
        }
        let stochastic = run(dtype, Rounding::Stochastic)?;
        let mean = stochastic.iter().sum::<f64>() / N as f64;
        assert!((mean - exact).abs() <= half_unit, "{dtype:?}: {mean}, in f32 {exact}");
        assert!(stochastic.iter().any(|&w| w != stochastic[0]), "{dtype:?}: each element for itself");
    }
    Ok(())
}

#[test]
fn averages_become_weights_and_masters() -> Result<()> {
    for dtype in HALVES {
        for (overwrite_frequency, accumulation) in [(None, 1), (Some(3), 1), (Some(2), 2)] {
            let params = ParamsAdamax {
                gradient_accumulation_steps: accumulation,
                ..with_average(0.8, overwrite_frequency, Rounding::Master)
            };
            let mut twins = Twins::new(&[700], dtype, &params)?;
            for seed in 0..20 {
                twins.step(seed)?;
                // Bit for bit the run in f32, but for ties.
                assert_close(&format!("{dtype:?} {overwrite_frequency:?} {seed}"), &twins.half, &twins.full, 0.5);
            }
            let averages = |twins: &Twins| -> Result<[Tensor; 2]> {
                Ok([twins.optimizers[0].state("w")?.ema.unwrap(), twins.optimizers[1].state("w")?.ema.unwrap()])
            };
            let [half, full] = averages(&twins)?;
            assert_eq!(bits(&half), bits(&full), "{dtype:?}: the average is one of masters");
            for optimizer in &mut twins.optimizers {
                optimizer.finalize_ema()?;
            }
            assert_eq!(values(&twins.full), values(&full));
            assert_close(&format!("{dtype:?} finalized"), &twins.half, &twins.full, 0.5);
            for seed in 20..20 + 2 * accumulation as usize {
                twins.step(seed)?;
            }
            let [half, full] = averages(&twins)?;
            assert_eq!(bits(&half), bits(&full), "{dtype:?}: the master has become the average");
        }
    }
    Ok(())
}

#[test]
fn averages_are_rounded_as_weights_are() -> Result<()> {
    const N: usize = 5000;
    for dtype in HALVES {
        for rounding in ROUNDINGS {
            let mut twins = Twins::new(&[N], dtype, &with_average(0.9, None, rounding))?;
            for seed in 0..10 {
                twins.step(seed)?;
            }
            twins.optimizers[0].finalize_ema()?;
            let average = twins.optimizers[0].state("w")?.ema.unwrap();
            assert_close(&format!("{dtype:?} {rounding:?}"), &twins.half, &average, last_rounding(rounding));
            let units = |exact: f64, got: f64| (got - exact) / ulp(exact, dtype);
            let errors: Vec<f64> =
                values(&average).into_iter().zip(values(&twins.half)).map(|(a, w)| units(a, w)).collect();
            let mean = errors.iter().sum::<f64>() / N as f64;
            // 5 standard deviations of a mean of errors of at most a half each.
            assert!(mean.abs() < 5.0 * 0.5 / (N as f64).sqrt(), "{dtype:?} {rounding:?}: {mean}");
            let beyond = errors.iter().filter(|error| error.abs() > 0.5).count();
            assert_eq!(beyond > 0, rounding == Rounding::Stochastic, "{dtype:?} {rounding:?}: {beyond}");
        }
    }
    Ok(())
}

#[test]
fn threads_make_no_difference_to_averages_that_overwrite() -> Result<()> {
    const N: usize = 300_001;
    for dtype in HALVES {
        for rounding in ROUNDINGS {
            let run = |threads: usize| -> Result<Vec<u64>> {
                pool(threads).install(|| {
                    let mut twins = Twins::new(&[N], dtype, &with_average(0.9, Some(2), rounding))?;
                    for seed in 0..4 {
                        twins.step(seed)?;
                    }
                    twins.optimizers[0].finalize_ema()?;
                    Ok(bits(&twins.half))
                })
            };
            assert!(run(1)? == run(3)?, "{dtype:?} {rounding:?}");
        }
    }
    Ok(())
}
