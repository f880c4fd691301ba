//! Weights that somebody writes while rows have missed updates, and tables that change hands.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_adamax::{
    Adamax, Embedding, ErrorKind, ParamGroup, ParamsAdamax, Rounding, StateDType, Table, WeightDecay, embedding,
};
use candle_core::{DType, IndexOp, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};

use super::{CPU, exact, ones, table};
use crate::common::{bits, noise, values};

/// Keeping the best weights: with `catch_up` before they are written back, they stand.
#[test]
fn best_weights_are_written_back() -> Result<()> {
    let w = table(2, 1, DType::F32)?;
    let lookups = Table::new(&w)?;
    let mut optimizer = Adamax::from_named([("w", w.clone())], exact())?;
    optimizer.apply_gradients([(&w, &ones(0, 1, DType::F32)?)])?;
    let best = lookups.weight()?.copy()?;
    for _ in 0..5 {
        optimizer.apply_gradients([(&w, &ones(1, 1, DType::F32)?)])?;
    }
    optimizer.catch_up()?;
    w.set(&best)?;
    assert_eq!(bits(&lookups.lookup(&Tensor::new(&[0u32, 1], CPU)?)?), bits(&best));
    assert!((values(&best)[0] - 0.9).abs() < 1e-6);
    // What comes after starts from there: one update is missed, and no more.
    optimizer.apply_gradients([(&w, &ones(1, 1, DType::F32)?)])?;
    let row = values(&lookups.lookup(&Tensor::new(&[0u32], CPU)?)?)[0];
    assert!(row < 0.9 && row > 0.88, "{row}");
    Ok(())
}

/// Two tables of which rows 0 to 2 have been updated, and rows 0 and 1 have missed updates.
fn two_tables(dtype: DType, params: &ParamsAdamax) -> Result<([Var; 2], Adamax)> {
    let (first, second) = (table(5, 6, dtype)?, table(5, 6, dtype)?);
    let group = ParamGroup::new("tables").var("first", &first).var("second", &second);
    let mut optimizer = Adamax::from_groups([group], params.clone())?;
    for row in [0, 1, 2, 2, 2] {
        let grad = ones(row, 6, dtype)?;
        optimizer.apply_gradients([(&first, &grad), (&second, &grad)])?;
    }
    Ok(([first, second], optimizer))
}

#[test]
fn written_rows_are_noticed_and_stand_after_catching_up() -> Result<()> {
    for (dtype, state_dtype, rounding) in [
        (DType::F64, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::F32, Rounding::Nearest),
        (DType::F32, StateDType::Q8, Rounding::Nearest),
        (DType::BF16, StateDType::BF16, Rounding::Master),
        (DType::F16, StateDType::F32, Rounding::Master),
        (DType::BF16, StateDType::Q8, Rounding::Stochastic),
    ] {
        for (rowwise_norm, weight_decay) in [(false, WeightDecay::None), (true, WeightDecay::Decoupled(0.1))] {
            let params = ParamsAdamax { state_dtype, rounding, rowwise_norm, weight_decay, ..exact() };
            notices(dtype, &params)?;
        }
    }
    Ok(())
}

fn notices(dtype: DType, params: &ParamsAdamax) -> Result<()> {
    let case = format!("{dtype:?} {params:?}");
    let ([first, second], mut optimizer) = two_tables(dtype, params)?;
    let lookups = Table::new(&second)?;
    // Row 0 alone.
    second.slice_set(&Tensor::full(7f64, (1, 6), CPU)?.to_dtype(dtype)?, 0, 0)?;
    let before = [bits(&first), bits(&second)];
    let error = lookups.lookup(&Tensor::new(&[1u32, 0], CPU)?).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrittenRow { row: 0, .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "row 0 of a table of shape [5, 6] with `SparseUpdate::Exact` was written while it had missed updates, which would \
         move what was written: call `Adamax::catch_up` before weights are written, or now, to let them stand"
    );
    let grad = ones(0, 6, dtype)?;
    let error = optimizer.apply_gradients([(&first, &grad), (&second, &grad)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrittenRow { row: 0, .. }), "{error}");
    let dense = Tensor::ones((5, 6), dtype, CPU)?;
    let error = optimizer.apply_gradients([(&first, &dense), (&second, &dense)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrittenRow { row: 0, .. }), "{error}");
    assert_eq!(before, [bits(&first), bits(&second)], "{case}");
    assert_eq!(optimizer.updates(), 5);
    // The other rows do not mind.
    lookups.lookup(&Tensor::new(&[2u32, 4], CPU)?)?;

    // A run in which nobody has written.
    let ([_, reference], other) = two_tables(dtype, params)?;
    Table::new(&reference)?.lookup(&Tensor::new(&[2u32, 4], CPU)?)?;
    other.catch_up()?;
    optimizer.catch_up()?;
    let (got, expected) = (bits(&second), bits(&reference));
    assert_eq!(values(&second)[..6], [7.0; 6], "{case}");
    assert_eq!(got[6..], expected[6..], "the other rows have caught up: {case}");
    let (state, expected) = (optimizer.state("second")?, other.state("second")?);
    assert_eq!(bits(&state.exp_avg), bits(&expected.exp_avg), "moments have: {case}");
    assert_eq!(bits(&state.exp_inf), bits(&expected.exp_inf), "{case}");
    assert_eq!(values(&lookups.lookup(&Tensor::new(&[0u32], CPU)?)?), [7.0; 6]);
    optimizer.apply_gradients([(&second, &grad)])?;
    assert!(values(&second)[0] < 7.0);

    // The end of the optimizer, saving, and looking let what was written stand, too.
    let end = |f: fn(Adamax) -> Result<()>| -> Result<()> {
        let ([first, second], optimizer) = two_tables(dtype, params)?;
        for var in [&first, &second] {
            // Rows 3 and 4 have never moved; with decay they would.
            let all = Tensor::full(3f64, (3, 6), CPU)?.to_dtype(dtype)?;
            var.slice_set(&all, 0, 0)?;
        }
        f(optimizer)?;
        assert_eq!((&values(&first)[..18], &values(&second)[..18]), (&[3.0; 18][..], &[3.0; 18][..]), "{case}");
        Ok(())
    };
    end(|optimizer| {
        drop(optimizer);
        Ok(())
    })?;
    end(|optimizer| optimizer.snapshot().map(drop).map_err(Into::into))?;
    end(|optimizer| {
        ["first", "second"].iter().try_for_each(|name| optimizer.state(name).map(drop).map_err(Into::into))
    })?;
    end(|mut optimizer| {
        optimizer.reset_rows("first", &Tensor::new(&[0u32, 1, 2], CPU)?)?;
        optimizer.reset_rows("second", &Tensor::new(&[0u32, 1, 2], CPU)?)?;
        optimizer.catch_up()?;
        Ok(())
    })
}

/// What the crate itself writes is right at any time.
#[test]
fn the_crates_own_writes() -> Result<()> {
    let w = Var::from_tensor(&Tensor::from_vec(noise(3, 60), (12, 5), CPU)?.to_dtype(DType::F32)?)?;
    let params = ParamsAdamax { weight_decay: WeightDecay::Decoupled(0.1), ..exact() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params.clone())?;
    let layer = Embedding::new(w.as_tensor().clone())?.max_norm(0.7)?;
    let lookups = Table::new(&w)?;
    for k in 0..60u32 {
        let ids = Tensor::new(&[k % 12, (k * 5) % 12, (k * k) % 12], CPU)?;
        optimizer.backward_step(&layer.forward(&ids)?.sqr()?.sum_all()?)?;
        if k % 4 == 1 {
            let row = Tensor::new(&[(k * 7) % 12], CPU)?;
            let set = Tensor::full(0.25f32, (1, 5), CPU)?;
            lookups.set_rows(&row, &set)?;
            assert_eq!(bits(&w.i(((k * 7) % 12) as usize)?), bits(&set));
        }
        match k {
            20 => optimizer.reset_rows("w", &Tensor::new(&[1u32, 2], CPU)?)?,
            25 => optimizer.set_params(ParamsAdamax { beta1: 0.8, ..params.clone() })?,
            30 => optimizer.apply_gradients([(&w, &Tensor::ones((12, 5), DType::F32, CPU)?)]).map(drop)?,
            40 => {
                let snapshot = optimizer.snapshot()?;
                optimizer.restore(&snapshot)?;
            }
            50 => drop(lookups.weight()),
            _ => {}
        }
    }
    Ok(())
}

/// Loading weights and state, in either order.
#[test]
fn loading_stands() -> Result<()> {
    for weights_first in [false, true] {
        let varmap = VarMap::new();
        let layer = embedding(6, 3, VarBuilder::from_varmap(&varmap, DType::F32, CPU))?;
        let mut optimizer = Adamax::from_varmap(&varmap, exact())?;
        let step = |optimizer: &mut Adamax, row: u32| -> Result<()> {
            Ok(optimizer.backward_step(&layer.forward(&Tensor::new(&[row], CPU)?)?.sum_all()?).map(drop)?)
        };
        (0..4).try_for_each(|row| step(&mut optimizer, row))?;
        let snapshot = optimizer.snapshot()?;
        let weight = layer.table().weight()?.copy()?;
        (0..4).try_for_each(|row| step(&mut optimizer, row))?;
        let mut load = |weights: bool| -> Result<()> {
            match weights {
                true => varmap.data().lock().unwrap()["weight"].set(&weight),
                false => Ok(optimizer.restore(&snapshot)?),
            }
        };
        load(weights_first)?;
        load(!weights_first)?;
        assert_eq!(bits(&layer.table().weight()?), bits(&weight));
    }
    Ok(())
}

/// A new optimizer takes a table over while another thread looks rows up.
#[test]
fn a_released_table_is_taken_over_beside_lookups() -> Result<()> {
    let w = table(2000, 16, DType::F32)?;
    let lookups = Table::new(&w)?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let others: Vec<_> = (0..2u32)
            .map(|thread| {
                let (lookups, is_over) = (&lookups, &is_over);
                scope.spawn(move || -> candle_adamax::Result<()> {
                    let ids = Tensor::arange(thread * 900, thread * 900 + 1000, CPU)?;
                    while !is_over.load(Ordering::Relaxed) {
                        lookups.lookup(&ids)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let run = || -> Result<()> {
            for k in 0..300u32 {
                let mut optimizer = Adamax::from_named([("w", w.clone())], exact())?;
                for row in [k % 7, 1, k] {
                    optimizer.apply_gradients([(&w, &ones(row, 16, DType::F32)?)])?;
                }
            }
            Ok(())
        };
        let done = run();
        is_over.store(true, Ordering::Relaxed);
        for other in others {
            other.join().unwrap()?;
        }
        done
    })?;
    // Nothing is missed: each optimizer that was dropped has let its rows catch up.
    let now = bits(&w);
    assert_eq!(bits(&lookups.weight()?), now);
    Ok(())
}
