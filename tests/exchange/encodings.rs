//! Moments that are stored in fewer bytes, one norm for each row, and accumulated rows: what other frameworks get of them.

use anyhow::Result;
use candle_adamax::{Adamax, Embedding, ParamsAdamax, SparseUpdate, StateDType};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;

use crate::run::{Run, TOLERANCE, assert_same_tensors, difference, left, load};

#[test]
fn encoded_moments_are_decoded_and_encoded() -> Result<()> {
    let run = Run::read("torch_plain", 0)?;
    // The largest error of an encoded number, as a share of the largest u.
    for (state_dtype, share) in [(StateDType::BF16, 0.01), (StateDType::F16, 0.002), (StateDType::Q8, 0.15)] {
        for rowwise_norm in [false, true] {
            let model = run.model("at_50")?;
            let params = ParamsAdamax { state_dtype, rowwise_norm, ..ParamsAdamax::pytorch() };
            let mut optimizer = Adamax::from_named(model.vars(), params.clone())?;
            optimizer.load_torch(run.state())?;
            assert_eq!(optimizer.params().state_dtype, state_dtype);
            let file = left(&format!("encoded-{state_dtype:?}-{rowwise_norm}.safetensors"))?;
            optimizer.save_torch(&file)?;
            let (saved, recorded) = (load(&file)?, load(&run.state())?);
            for name in model.0.keys() {
                let u = |of: &std::collections::HashMap<String, Tensor>| of[&format!("{name}.exp_inf")].clone();
                let largest = u(&recorded).flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert!(difference(&u(&saved), &optimizer.state(name)?.exp_inf)? == 0.0);
                // With one norm for each row u is the largest of the row, and no smaller than it was.
                let below = (u(&recorded) - u(&saved))?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert!(below <= share * largest, "{name}: {below} of {largest}");
                if !rowwise_norm {
                    assert!(difference(&u(&saved), &u(&recorded))? <= f64::from(share * largest), "{name}");
                }
                let key = format!("{name}.exp_avg");
                assert!(difference(&saved[&key], &recorded[&key])? <= f64::from(share * largest), "{name}");
            }
            // The same codes come back.
            let mut again = Adamax::from_named(model.vars(), params)?;
            again.load_torch(&file)?;
            let out = left(&format!("encoded-again-{state_dtype:?}-{rowwise_norm}.safetensors"))?;
            again.save_torch(&out)?;
            assert_same_tensors(&out, &file, f64::from(f32::EPSILON))?;
        }
    }
    Ok(())
}

#[test]
fn accumulated_rows_become_a_whole_gradient() -> Result<()> {
    let params = || ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() };
    let make = |weight: &Var| Adamax::from_named([("table", weight.clone())], params());
    let weight = Var::ones((5, 2), DType::F32, &Device::Cpu)?;
    let layer = Embedding::new(weight.as_tensor().clone())?;
    let mut optimizer = make(&weight)?;
    let step = |optimizer: &mut Adamax, layer: &Embedding, ids: &[u32]| -> Result<()> {
        let loss = layer.forward(&Tensor::new(ids, &Device::Cpu)?)?.sum_all()?;
        Ok(optimizer.backward_step(&loss).map(drop)?)
    };
    step(&mut optimizer, &layer, &[1, 3, 3])?;
    let file = left("rows.safetensors")?;
    optimizer.save_keras(&file)?;
    let sums = load(&file)?["table_gradient_accumulator"].to_vec2::<f32>()?;
    assert_eq!(sums.iter().map(|row| row[0]).collect::<Vec<_>>(), [0.0, 1.0, 0.0, 2.0, 0.0]);
    // Back in, it waits as a dense sum, and the update is that of a whole gradient.
    let copy = Var::from_tensor(&weight.copy()?)?;
    let mut back = make(&copy)?;
    back.load_keras(&file)?;
    let layer = Embedding::new(copy.as_tensor().clone())?;
    step(&mut back, &layer, &[0])?;
    assert_eq!((back.updates(), back.calls()), (1, 2));
    let moved: Vec<_> = copy.to_vec2::<f32>()?.iter().map(|row| row[0] != 1.0).collect();
    assert_eq!(moved, [true, true, false, true, false]);
    Ok(())
}

#[test]
fn exact_rows_pay_before_they_are_written() -> Result<()> {
    let run = |sparse_update| -> Result<_> {
        let weight = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
        let layer = Embedding::new(weight.as_tensor().clone())?;
        let params = ParamsAdamax { sparse_update, ..ParamsAdamax::pytorch() };
        let mut optimizer = Adamax::from_named([("table", weight.clone())], params)?;
        for id in [0u32, 1, 2, 2, 2] {
            optimizer.backward_step(&layer.forward(&Tensor::new(&[id], &Device::Cpu)?)?.sum_all()?)?;
        }
        let file = left(&format!("exact-{sparse_update:?}.safetensors"))?;
        optimizer.save_torch(&file)?;
        Ok((load(&file)?["table.exp_avg"].to_vec2::<f32>()?, weight.to_vec2::<f32>()?))
    };
    let (lazy, _) = run(SparseUpdate::Lazy)?;
    let (exact, weights) = run(SparseUpdate::Exact)?;
    assert_eq!(lazy[0], lazy[1], "a row that is not touched does not decay");
    assert!(f64::from((exact[0][0] - 0.9f32.powi(4) * lazy[0][0]).abs()) <= TOLERANCE);
    assert!(weights[0][0] < weights[1][0], "row 0 has gone on moving");
    Ok(())
}
