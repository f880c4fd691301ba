//! Rows that a step does not touch end up where the dense optimizer puts them: every run here is made twice, by rows with
//! `SparseUpdate::Exact`, and densely in f64 with a gradient that is zero for all other rows.

use candle_adamax::{
    Adamax, Clip, CosineDecay, Embedding, EpsMode, ExponentialDecay, Kernel, LossScale, MissingGradients, ParamGroup,
    ParamsAdamax, Rounding, Snapshot, SparseGrad, SparseUpdate, StateDType, StepCount, Table, WeightDecay,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, Optimizer};

use crate::common::{Random, bits, noise, values};

const CPU: &Device = &Device::Cpu;

/// The same table twice.
struct Pair {
    rows: usize,
    dim: usize,
    by_rows: (Var, Adamax),
    dense: (Var, Adamax),
    table: Table,
    /// The way that each element has gone in the dense run.
    travelled: Vec<f64>,
    last: Vec<f64>,
}

impl Pair {
    fn new(rows: usize, dim: usize, dtype: DType, params: &ParamsAdamax) -> Result<Self> {
        let start = Tensor::from_vec(noise(1, rows * dim), (rows, dim), CPU)?.to_dtype(dtype)?;
        let (var, full) = (Var::from_tensor(&start)?, Var::from_tensor(&start.to_dtype(DType::F64)?.copy()?)?);
        let exact = ParamsAdamax { sparse_update: SparseUpdate::Exact, ..params.clone() };
        Ok(Self {
            rows,
            dim,
            table: Table::new(var.as_tensor())?,
            by_rows: (var.clone(), Adamax::from_named([("w", var)], exact)?),
            dense: (full.clone(), Adamax::from_named([("w", full.clone())], params.clone())?),
            travelled: vec![0.0; rows * dim],
            last: values(&full),
        })
    }

    fn each(&mut self, change: impl Fn(&mut Adamax)) {
        change(&mut self.by_rows.1);
        change(&mut self.dense.1);
    }

    fn step(&mut self, rows: &[u32], grads: &[f64]) -> Result<()> {
        let mut all = vec![0.0; self.rows * self.dim];
        for (row, grads) in rows.iter().zip(grads.chunks(self.dim)) {
            all[*row as usize * self.dim..][..self.dim].copy_from_slice(grads);
        }
        let values_of_rows = Tensor::from_slice(grads, (rows.len(), self.dim), CPU)?;
        let grad = SparseGrad {
            indices: Tensor::from_slice(rows, rows.len(), CPU)?,
            values: values_of_rows.to_dtype(self.by_rows.0.dtype())?,
        };
        self.by_rows.1.apply_gradients([(&self.by_rows.0, &grad)])?;
        let all = Tensor::from_vec(all, (self.rows, self.dim), CPU)?;
        // The gradient that the rows have, in their dtype.
        let all = all.to_dtype(self.by_rows.0.dtype())?.to_dtype(DType::F64)?;
        self.dense.1.apply_gradients([(&self.dense.0, &all)])?;
        let now = values(&self.dense.0);
        for ((way, now), last) in self.travelled.iter_mut().zip(&now).zip(&self.last) {
            *way += (now - last).abs();
        }
        self.last = now;
        Ok(())
    }

    /// How far rows that are looked up now are from the dense run's, in terms of the way that they have gone.
    fn off(&self, rows: &[u32]) -> Result<f64> {
        let got = values(&self.table.lookup(&Tensor::from_slice(rows, rows.len(), CPU)?)?);
        let mut worst = 0.0f64;
        for (k, row) in rows.iter().enumerate() {
            for j in 0..self.dim {
                let i = *row as usize * self.dim + j;
                let (got, exact) = (got[k * self.dim + j], self.last[i]);
                if self.travelled[i] == 0.0 {
                    assert_eq!(got, exact, "row {row} has never moved");
                } else {
                    worst = worst.max((got - exact).abs() / self.travelled[i]);
                }
            }
        }
        Ok(worst)
    }

    fn off_all(&self) -> Result<f64> {
        self.off(&(0..self.rows as u32).collect::<Vec<_>>())
    }
}

pub(super) fn decaying(params: ParamsAdamax) -> ParamsAdamax {
    let lr = CosineDecay::new(1e-2, 20_000).into();
    ParamsAdamax { lr, weight_decay: WeightDecay::Decoupled(0.01), ..params }
}

/// 20,000 steps; the largest error at the end, and of rows that are looked up on the way.
fn long_run(params: &ParamsAdamax, from: f64, to: f64) -> Result<(f64, f64)> {
    let mut random = Random(7);
    let mut pair = Pair::new(300, 4, DType::F64, params)?;
    let mut on_the_way = 0.0f64;
    for step in 0..20_000 {
        let rows = random.rows(300);
        let grads = random.values(rows.len() * 4, from, to);
        pair.step(&rows, &grads)?;
        // Not at once: a row that has gone no further than a decay of its last place is off by the place after that.
        if step > 1000 && step % 499 == 0 {
            let rows: Vec<u32> = (0..10).map(|_| (random.next() * 300.0) as u32).collect();
            on_the_way = on_the_way.max(pair.off(&rows)?);
        }
    }
    Ok((pair.off_all()?, on_the_way))
}

#[test]
fn twenty_thousand_steps_with_either_epsilon() -> Result<()> {
    for (params, from, limit) in [
        (ParamsAdamax::pytorch(), -5.9, 1e-12),
        (ParamsAdamax::default(), -7.0, 1e-6),
        (ParamsAdamax { eps: 0.0, ..ParamsAdamax::default() }, -7.0, 1e-12),
    ] {
        let (end, on_the_way) = long_run(&decaying(params.clone()), from, 0.0)?;
        eprintln!("{:?}: {end:.1e} at the end, {on_the_way:.1e} on the way", params.eps_mode);
        assert!(end.max(on_the_way) <= limit, "{:?}: {end:e}, {on_the_way:e}", params.eps_mode);
    }
    Ok(())
}

/// Where the series does not suffice: u far below epsilon, PyTorch's u at its epsilon, and betas that are close together.
#[test]
fn small_norms_and_other_betas() -> Result<()> {
    for (params, from, to) in [
        (ParamsAdamax::default(), -12.0, -6.0),
        (ParamsAdamax::pytorch(), -12.0, -6.0),
        (ParamsAdamax { beta2: 0.99, ..ParamsAdamax::default() }, -8.0, 0.0),
        (ParamsAdamax { beta2: 0.93, ..ParamsAdamax::default() }, -9.0, -5.0),
        (ParamsAdamax { beta2: 0.93, ..ParamsAdamax::pytorch() }, -9.0, -5.0),
        (ParamsAdamax { beta1: 0.0, ..ParamsAdamax::default() }, -7.0, 0.0),
        (ParamsAdamax { beta1: 0.99, beta2: 0.9999, ..ParamsAdamax::default() }, -7.0, 0.0),
        (ParamsAdamax { eps: 1e-3, ..ParamsAdamax::default() }, -6.0, 0.0),
    ] {
        let mut random = Random(3);
        let mut pair = Pair::new(40, 3, DType::F64, &decaying(params.clone()))?;
        for _ in 0..3000 {
            let rows = random.rows(40);
            let grads = random.values(rows.len() * 3, from, to);
            pair.step(&rows, &grads)?;
        }
        let off = pair.off_all()?;
        let ParamsAdamax { beta1, beta2, eps, eps_mode, .. } = params;
        assert!(off <= 1e-8, "betas {beta1}, {beta2}, eps {eps:e} {eps_mode:?}: {off:e}");
    }
    Ok(())
}

#[test]
fn every_setting_that_changes_a_step() -> Result<()> {
    let base = || ParamsAdamax { lr: 0.01.into(), ..ParamsAdamax::default() };
    let settings = [
        ("maximize", ParamsAdamax { maximize: true, ..base() }),
        ("clip by Norm", ParamsAdamax { clip: Some(Clip::Norm(0.5)), ..base() }),
        ("clip by Value", ParamsAdamax { clip: Some(Clip::Value(0.1)), ..base() }),
        ("clip by GlobalNorm", ParamsAdamax { clip: Some(Clip::GlobalNorm(0.5)), ..base() }),
        ("loss scale", ParamsAdamax { loss_scale: LossScale::Static(8.0), ..base() }),
        ("own counters", ParamsAdamax { step_count: StepCount::PerVar, ..base() }),
        ("exponential", ParamsAdamax { lr: ExponentialDecay::new(0.05, 10, 0.9).into(), ..base() }),
        ("a strong decay", ParamsAdamax { weight_decay: WeightDecay::Decoupled(5.0), ..base() }),
        ("accumulation", ParamsAdamax { gradient_accumulation_steps: 3, ..base() }),
        ("skipping", ParamsAdamax { skip_nonfinite: true, eps_mode: EpsMode::InsideMax, ..base() }),
        ("one norm a row", ParamsAdamax { rowwise_norm: true, ..base() }),
    ];
    for (name, params) in settings {
        let mut random = Random(5);
        let mut pair = Pair::new(20, 4, DType::F64, &params)?;
        for step in 0..900 {
            let rows = random.rows(20);
            let mut grads = random.values(rows.len() * 4, -3.0, 0.0);
            if params.skip_nonfinite && step % 7 == 3 {
                grads[0] = f64::NAN;
            }
            match step {
                300 => pair.each(|optimizer| optimizer.set_learning_rate(0.0)),
                320 => pair.each(|optimizer| optimizer.set_learning_rate(0.1)),
                _ => {}
            }
            pair.step(&rows, &grads)?;
        }
        let off = pair.off_all()?;
        assert!(off < 1e-10, "{name}: {off:e}");
        assert!(pair.by_rows.1.skipped() > 0 || !params.skip_nonfinite);
        assert_eq!(pair.by_rows.1.skipped(), pair.dense.1.skipped());
    }
    Ok(())
}

/// Rows that nobody touches for longer than any window, or ever; and steps in which the table has no gradient at all.
#[test]
fn rows_that_are_hardly_or_never_touched() -> Result<()> {
    for decay in [WeightDecay::None, WeightDecay::Decoupled(0.1)] {
        let params = ParamsAdamax {
            lr: 0.01.into(),
            weight_decay: decay,
            missing_gradients: MissingGradients::Allow,
            ..Default::default()
        };
        let mut pair = Pair::new(6, 3, DType::F64, &params)?;
        let before = bits(&pair.by_rows.0);
        pair.step(&[1, 4], &noise(2, 6))?;
        for k in 0..4000 {
            pair.step(&[0], &noise(k, 3))?;
            if k % 10 == 0 {
                // A missing gradient: nothing decays, and no row misses an update.
                let none: [(&Var, &Tensor); 0] = [];
                pair.by_rows.1.apply_gradients(none)?;
                pair.dense.1.apply_gradients(none)?;
            }
        }
        pair.step(&[4], &noise(9, 3))?;
        assert!(pair.off_all()? < 1e-11, "{decay:?}: {:e}", pair.off_all()?);
        pair.by_rows.1.catch_up()?;
        let after = bits(&pair.by_rows.0);
        // Rows 2, 3 and 5 have no momentum: without decay nobody has written to them.
        for row in [2, 3, 5] {
            let same = before[3 * row..3 * row + 3] == after[3 * row..3 * row + 3];
            assert_eq!(same, decay == WeightDecay::None, "row {row}, {decay:?}");
        }
        pair.by_rows.1.catch_up()?;
        assert_eq!(after, bits(&pair.by_rows.0), "no update is applied twice");
    }
    Ok(())
}

/// A gradient of NaN stays in its row, and zeros, subnormals and huge ones are as in the dense run.
#[test]
fn gradients_of_every_kind() -> Result<()> {
    let mut pair = Pair::new(5, 2, DType::F64, &decaying(ParamsAdamax::default()))?;
    pair.step(&[0, 1, 2, 3], &[0.0, 0.0, 1e30, -1e-30, 5e-324, 1.0, f64::NAN, 1.0])?;
    for k in 0..500 {
        pair.step(&[4], &noise(k, 2))?;
    }
    pair.by_rows.1.catch_up()?;
    let (got, exact) = (values(&pair.by_rows.0), values(&pair.dense.0));
    for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
        let off = (got - exact).abs() / pair.travelled[i].max(1e-300);
        assert!(got.is_nan() == exact.is_nan() && (got.is_nan() || off < 1e-9), "element {i}: {got} for {exact}");
    }
    assert!(got[6].is_nan() && got[7].is_finite());
    Ok(())
}

#[test]
fn every_dtype_and_encoding_within_its_rounding() -> Result<()> {
    // In terms of the way, of which these rows go 0.3 to 2: f32's arithmetic; half a unit in the last place of weights below
    // 1 in bf16 and f16, whose masters lose nothing else; and what Q8's larger u leaves out.
    for (dtype, state_dtype, rounding, limit) in [
        (DType::F32, StateDType::F32, Rounding::Nearest, 2e-5),
        (DType::F32, StateDType::BF16, Rounding::Nearest, 1e-2),
        (DType::F32, StateDType::F16, Rounding::Nearest, 2e-3),
        (DType::F32, StateDType::Q8, Rounding::Nearest, 0.12),
        (DType::BF16, StateDType::F32, Rounding::Master, 1.3e-2),
        (DType::F16, StateDType::F32, Rounding::Master, 1.6e-3),
        (DType::BF16, StateDType::Q8, Rounding::Stochastic, 0.2),
        (DType::F64, StateDType::Q8, Rounding::Nearest, 1e-11),
    ] {
        for rowwise_norm in [false, true] {
            let params = ParamsAdamax { state_dtype, rounding, rowwise_norm, ..decaying(ParamsAdamax::default()) };
            let dense = ParamsAdamax { state_dtype: StateDType::F32, rounding: Rounding::Nearest, ..params.clone() };
            let mut pair = Pair::new(30, 8, dtype, &dense)?;
            pair.by_rows.1.set_params(ParamsAdamax { sparse_update: SparseUpdate::Exact, ..params })?;
            let mut random = Random(11);
            for _ in 0..3000 {
                let rows = random.rows(30);
                let grads = random.values(rows.len() * 8, -4.0, 0.0);
                pair.step(&rows, &grads)?;
            }
            let off = pair.off(&[0, 1, 2, 3, 5, 8, 13])?;
            assert!(off < limit, "{dtype:?} {state_dtype:?} rowwise {rowwise_norm}: {off:e}");
        }
    }
    Ok(())
}

/// Other numbers, half way: missed updates are made with the numbers that held then.
#[test]
fn settings_that_change_on_the_way() -> Result<()> {
    let first = decaying(ParamsAdamax::default());
    let changes: [ParamsAdamax; 5] = [
        ParamsAdamax { beta1: 0.8, ..first.clone() },
        ParamsAdamax { beta2: 0.99, ..first.clone() },
        ParamsAdamax { eps: 1e-3, ..first.clone() },
        ParamsAdamax { weight_decay: WeightDecay::None, ..first.clone() },
        ParamsAdamax { no_decay: vec!["w".into()], ..first.clone() },
    ];
    for change in changes {
        let mut pair = Pair::new(20, 3, DType::F64, &first)?;
        let mut random = Random(2);
        for step in 0..600 {
            if step == 300 {
                pair.dense.1.set_params(change.clone())?;
                pair.by_rows.1.set_params(ParamsAdamax { sparse_update: SparseUpdate::Exact, ..change.clone() })?;
            }
            let rows = random.rows(20);
            let grads = random.values(rows.len() * 3, -3.0, 0.0);
            pair.step(&rows, &grads)?;
        }
        assert!(pair.off_all()? < 1e-10, "{change:?}: {:e}", pair.off_all()?);
    }
    // From exact to lazy: rows stop where they are.
    let mut pair = Pair::new(4, 2, DType::F64, &first)?;
    pair.step(&[1], &[0.5, 0.5])?;
    pair.step(&[0], &[0.5, 0.5])?;
    pair.by_rows.1.set_params(first)?;
    let row = bits(&pair.by_rows.0)[2..4].to_vec();
    pair.step(&[0], &[0.5, 0.5])?;
    assert_eq!(bits(&pair.table.weight().unwrap())[2..4], row);
    Ok(())
}

/// A run that was saved and went on, and one that was resumed, have the same bits: in weights and in moments, in rows that
/// nobody touched before, and whether rows had missed updates or a dense gradient had just brought all of them up to date.
#[test]
fn resume() -> Result<()> {
    let kinds = [
        (DType::F64, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::BF16, Rounding::Nearest),
        (DType::F32, StateDType::F16, Rounding::Nearest),
        (DType::F32, StateDType::Q8, Rounding::Nearest),
        (DType::BF16, StateDType::Q8, Rounding::Stochastic),
        (DType::BF16, StateDType::BF16, Rounding::Master),
        (DType::F16, StateDType::F32, Rounding::Master),
    ];
    let bases = [ParamsAdamax::default(), ParamsAdamax::pytorch()];
    let bases = bases.map(|params| [decaying(params.clone()), ParamsAdamax { lr: 0.01.into(), ..params }]).concat();
    for (dtype, state_dtype, rounding) in kinds {
        for base in &bases {
            for (rowwise_norm, ends_dense) in [(false, false), (false, true), (true, false)] {
                let sparse_update = SparseUpdate::Exact;
                let params =
                    ParamsAdamax { state_dtype, rounding, rowwise_norm, sparse_update, seed: 3, ..base.clone() };
                resumes(dtype, &params, ends_dense)?;
            }
        }
    }
    Ok(())
}

fn resumes(dtype: DType, params: &ParamsAdamax, ends_dense: bool) -> Result<()> {
    let case = format!("{dtype:?} {params:?}, dense before: {ends_dense}");
    let var = Var::from_tensor(&Tensor::from_vec(noise(4, 60), (20, 3), CPU)?.to_dtype(dtype)?)?;
    // A seed that changes on the way is the one that counts.
    let mut optimizer = Adamax::from_named([("w", var.clone())], ParamsAdamax { seed: 1, ..params.clone() })?;
    let step = |optimizer: &mut Adamax, var: &Var, k: u64| -> Result<()> {
        // Rows from 12 on have their first gradients after the interruption.
        let mut rows = Random(k + 99).rows(12);
        rows.extend((k >= 50 && k.is_multiple_of(3)).then_some(12 + (k / 3) as u32 % 8));
        let values = Tensor::from_vec(noise(k, rows.len() * 3), (rows.len(), 3), CPU)?.to_dtype(dtype)?;
        let grad = SparseGrad { indices: Tensor::new(rows, CPU)?, values };
        Ok(optimizer.apply_gradients([(var, &grad)]).map(drop)?)
    };
    for k in 0..50 {
        step(&mut optimizer, &var, k)?;
        if k == 20 {
            optimizer.set_params(params.clone())?;
        }
    }
    if ends_dense {
        optimizer.apply_gradients([(&var, &Tensor::from_vec(noise(7, 60), (20, 3), CPU)?.to_dtype(dtype)?)])?;
    }
    let snapshot = optimizer.snapshot()?; // with the updates that rows have missed
    let saved = var.as_tensor().copy()?;
    let copy = Var::from_tensor(&var.as_tensor().copy()?)?;
    let mut resumed = Adamax::from_named([("w", copy.clone())], params.clone())?;
    resumed.restore(&snapshot)?;
    for k in 50..90 {
        step(&mut optimizer, &var, k)?;
        step(&mut resumed, &copy, k)?;
    }
    let (one, other) = (optimizer.snapshot()?, resumed.snapshot()?);
    assert_eq!(bits(&var), bits(&copy), "the weights: {case}");
    let moments = |snapshot: &Snapshot| {
        let state = &snapshot.vars["w"];
        [Some(&state.exp_avg), Some(&state.exp_inf), state.scales.as_ref(), state.master.as_ref()].map(|t| t.map(bits))
    };
    assert_eq!(moments(&one), moments(&other), "the moments: {case}");
    // Going back, weights and all.
    let after = bits(&var);
    optimizer.catch_up()?;
    var.set(&saved)?;
    optimizer.restore(&snapshot)?;
    (50..90).try_for_each(|k| step(&mut optimizer, &var, k))?;
    assert_eq!(bits(&var), after, "{case}");
    Ok(())
}

/// Betas whose sums are beyond f32: elements without momentum in rows that have some stay where they are.
#[test]
fn elements_without_momentum_and_betas_that_are_close() -> Result<()> {
    for state_dtype in [StateDType::F32, StateDType::BF16, StateDType::Q8] {
        for rowwise_norm in [false, true] {
            let params = ParamsAdamax {
                beta2: 0.93,
                state_dtype,
                rowwise_norm,
                sparse_update: SparseUpdate::Exact,
                ..ParamsAdamax::default()
            };
            let start = Tensor::new(&[[0.5f32, -0.0], [0.25, 1.0]], CPU)?;
            let var = Var::from_tensor(&start)?;
            let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
            for row in [0u32, 1] {
                for _ in 0..2000 {
                    let values = Tensor::new(&[[0.0f32, 0.0]], CPU)?;
                    let grad = SparseGrad { indices: Tensor::new(&[row], CPU)?, values };
                    optimizer.apply_gradients([(&var, &grad)])?;
                }
            }
            optimizer.catch_up()?;
            let (got, expected) = (var.as_tensor().to_vec2::<f32>()?, start.to_vec2::<f32>()?);
            let same = got.iter().flatten().zip(expected.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{state_dtype:?} rowwise {rowwise_norm}: {got:?}");
        }
    }
    Ok(())
}

/// Layers bring up to date what they read, and nobody else changes anything.
#[test]
fn lookups_pay_and_are_free_after_that() -> Result<()> {
    let mut pair = Pair::new(12, 3, DType::F64, &decaying(ParamsAdamax::default()))?;
    let mut random = Random(1);
    for _ in 0..50 {
        let rows = random.rows(12);
        let grads = random.values(rows.len() * 3, -2.0, 0.0);
        pair.step(&rows, &grads)?;
    }
    let weight = pair.by_rows.0.as_tensor().clone();
    let ids = Tensor::new(&[[3u32, 5], [3, 7]], CPU)?;
    let (raw, layer) = (bits(&weight), Embedding::new(weight.clone())?);
    let first = bits(&layer.forward(&ids)?);
    let caught_up = bits(&weight);
    let moved: Vec<usize> =
        (0..12).filter(|row| raw[3 * row..3 * row + 3] != caught_up[3 * row..3 * row + 3]).collect();
    assert!(moved.iter().all(|row| [3, 5, 7].contains(row)) && !moved.is_empty(), "{moved:?} have caught up");
    assert_eq!(first, bits(&layer.forward(&ids)?));
    assert_eq!(caught_up, bits(&weight), "a second lookup writes nothing");
    // On another thread, through another table of the same variable.
    let other = Table::new(&weight)?;
    std::thread::scope(|scope| scope.spawn(|| other.lookup(&ids).map(|rows| bits(&rows))).join().unwrap())
        .map(|rows| assert_eq!(rows, first))?;
    assert!(pair.off_all()? < 1e-11);
    // And the run goes on as if nobody had looked.
    for _ in 0..50 {
        let rows = random.rows(12);
        let grads = random.values(rows.len() * 3, -2.0, 0.0);
        pair.step(&rows, &grads)?;
    }
    assert!(pair.off_all()? < 1e-11);
    Ok(())
}

/// Backward passes find their rows; two lookups before one step, two steps after two lookups.
#[test]
fn steps_of_a_graph() -> Result<()> {
    let params = decaying(ParamsAdamax::default());
    let mut pair = Pair::new(10, 2, DType::F64, &params)?;
    let loss = |ids: &[u32]| pair.table.lookup(&Tensor::new(ids, CPU)?)?.sqr()?.sum_all();
    let dense_loss = |ids: &[u32]| pair.dense.0.index_select(&Tensor::new(ids, CPU)?, 0)?.sqr()?.sum_all();
    let steps: [&[u32]; 5] = [&[1, 2], &[2, 3, 2], &[9], &[1], &[4, 1]];
    for ids in steps {
        let (grads, dense_grads) = (loss(ids)?.backward()?, dense_loss(ids)?.backward()?);
        pair.by_rows.1.step(&grads)?;
        pair.dense.1.step(&dense_grads)?;
    }
    // Two graphs of the same weights, one step after the other: the second one's rows have missed the first step.
    let (first, second) = (loss(&[1, 2])?.backward()?, loss(&[2, 5])?.backward()?);
    let (dense_first, dense_second) = (dense_loss(&[1, 2])?.backward()?, dense_loss(&[2, 5])?.backward()?);
    for (grads, dense_grads) in [(first, dense_first), (second, dense_second)] {
        pair.by_rows.1.step(&grads)?;
        pair.dense.1.step(&dense_grads)?;
    }
    let (got, exact) = (values(&pair.table.weight().unwrap()), values(&pair.dense.0));
    assert!(got.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-13), "{got:?} for {exact:?}");
    // Used densely as well: all rows have a gradient then.
    pair.by_rows.1.catch_up()?;
    let tied = (loss(&[3])? + pair.by_rows.0.as_tensor().powf(2.0)?.sum_all()?)?;
    let dense_tied = (dense_loss(&[3])? + pair.dense.0.as_tensor().powf(2.0)?.sum_all()?)?;
    pair.by_rows.1.step(&tied.backward()?)?;
    pair.dense.1.step(&dense_tied.backward()?)?;
    let (got, exact) = (values(&pair.by_rows.0), values(&pair.dense.0));
    assert!(got.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-13), "{got:?} for {exact:?}");
    Ok(())
}

/// Rows that are set, begin anew or are added; a variable that leaves, and an optimizer that goes.
#[test]
fn rows_and_variables_come_and_go() -> Result<()> {
    let params = ParamsAdamax { lr: 0.01.into(), ..ParamsAdamax::default() };
    let run = || -> Result<Pair> {
        let mut pair = Pair::new(5, 2, DType::F64, &params)?;
        pair.step(&[0, 1, 2], &noise(1, 6))?;
        pair.step(&[4], &noise(2, 2))?;
        pair.step(&[4], &noise(3, 2))?;
        Ok(pair)
    };
    let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-14);

    let mut pair = run()?;
    pair.table.set_rows(&Tensor::new(&[1u32], CPU)?, &Tensor::new(&[[7.0f64, 8.0]], CPU)?)?;
    pair.by_rows.1.reset_rows("w", &Tensor::new(&[1u32], CPU)?)?;
    pair.step(&[4], &noise(4, 2))?;
    let got = values(&pair.table.weight().unwrap());
    assert_eq!(got[2..4], [7.0, 8.0], "what was set has missed nothing");
    assert!(close(&got[0..2], &pair.last[0..2]) && close(&got[4..10], &pair.last[4..10]));

    let mut pair = run()?;
    let grown = pair.by_rows.1.append_rows("w", &Tensor::zeros((2, 2), DType::F64, CPU)?)?;
    assert!(close(&values(&grown)[..10], &pair.last));
    let none = SparseGrad { indices: Tensor::new(&[6u32], CPU)?, values: Tensor::ones((1, 2), DType::F64, CPU)? };
    pair.by_rows.1.apply_gradients([(&grown, &none)])?;
    pair.dense.1.apply_gradients([(&pair.dense.0, &Tensor::zeros((5, 2), DType::F64, CPU)?)])?;
    pair.by_rows.1.catch_up()?;
    assert!(close(&values(&grown)[..10], &values(&pair.dense.0)));

    let mut pair = run()?;
    let var = pair.by_rows.1.remove_var("w")?;
    assert!(close(&values(&var), &pair.last));

    let pair = run()?;
    let (var, last) = (pair.by_rows.0.clone(), pair.last.clone());
    drop(pair);
    assert!(close(&values(&var), &last), "rows catch up when the optimizer ends");
    Ok(())
}

#[test]
fn what_exact_rows_do_not_go_with() -> Result<()> {
    let exact = || ParamsAdamax { sparse_update: SparseUpdate::Exact, ..ParamsAdamax::default() };
    let var = Var::zeros((3, 2), DType::F32, CPU)?;
    let error = |params: ParamsAdamax| Adamax::from_named([("w", var.clone())], params).unwrap_err().to_string();
    assert_eq!(
        error(ParamsAdamax { weight_decay: WeightDecay::L2(0.1), ..exact() }),
        "Adamax: invalid `weight_decay`: expected None or Decoupled for `sparse_update: Exact`: with L2 no row is without \
         a gradient, got L2(0.1)"
    );
    assert_eq!(
        error(ParamsAdamax { beta2: 0.9, ..exact() }),
        "Adamax: invalid `beta1`: expected a number below `beta2`, 0.9, for `sparse_update: Exact`, got 0.9"
    );
    let grad = SparseGrad { indices: Tensor::new(&[1u32], CPU)?, values: Tensor::ones((1, 2), DType::F32, CPU)? };
    let params = ParamsAdamax { weight_decay: WeightDecay::Decoupled(10.0), lr: 0.05.into(), ..exact() };
    let mut optimizer = Adamax::from_named([("w", var.clone())], params)?;
    optimizer.apply_gradients([(&var, &grad)])?;
    let before = (bits(&var), bits(&optimizer.state("w")?.exp_avg));
    optimizer.set_learning_rate(0.1);
    assert_eq!(
        optimizer.apply_gradients([(&var, &grad)]).unwrap_err().to_string(),
        "Adamax: invalid `lr`: expected less than 1 of the weight to decay in a step, for `sparse_update: Exact`, got 0.1"
    );
    assert_eq!((bits(&var), bits(&optimizer.state("w")?.exp_avg)), before);
    assert_eq!(
        optimizer.set_kernel(Kernel::Portable).unwrap_err().to_string(),
        "Adamax: invalid `sparse_update`: expected the default for variables that candle's tensor operations update, on \
         this device, got Exact"
    );
    let mut second = Adamax::from_named([("w", var.clone())], exact())?;
    assert_eq!(
        second.apply_gradients([(&var, &grad)]).unwrap_err().to_string(),
        "Adamax: invalid `sparse_update`: expected one optimizer with `Exact` for a table, got another one that has it, too"
    );
    drop(optimizer);
    second.apply_gradients([(&var, &grad)])?;
    // By group: the other tables are lazy.
    let lazy = Var::zeros((3, 2), DType::F32, CPU)?;
    let table = Var::zeros((3, 2), DType::F32, CPU)?;
    let group = ParamGroup::new("exact").var("a", &table).sparse_update(SparseUpdate::Exact);
    let mut optimizer = Adamax::from_groups([group], ParamsAdamax::default())?;
    optimizer.add_var("b", lazy.clone())?;
    let other = SparseGrad { indices: Tensor::new(&[2u32], CPU)?, values: Tensor::ones((1, 2), DType::F32, CPU)? };
    optimizer.apply_gradients([(&table, &grad), (&lazy, &grad)])?;
    optimizer.apply_gradients([(&table, &other), (&lazy, &other)])?;
    optimizer.catch_up()?;
    assert!(values(&table)[2] < values(&lazy)[2], "the exact row has gone on");
    Ok(())
}
