//! Dropout: its factors, its gradient, its seeds.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_graft::dropout;

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

#[test]
fn numbers_are_zero_or_divided_and_the_gradient_has_the_same_factors() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        // Not contiguous, and not a multiple of a block.
        let var = Var::from_tensor(&Tensor::randn(3f64, 1.0, (70, 53), &Device::Cpu)?.to_dtype(dtype)?)?;
        let x = var.t()?;
        let y = dropout(&x, 0.25, 3)?;
        let weights = Tensor::randn(0f64, 1.0, (53, 70), &Device::Cpu)?.to_dtype(dtype)?;
        let grads = (&y * &weights)?.to_dtype(DType::F64)?.sum_all()?.backward()?;
        let grad = grads.get(&var).context("no gradient")?.t()?;
        let mut zeros = 0;
        for (((x, y), w), g) in numbers(&x)?.iter().zip(numbers(&y)?).zip(numbers(&weights)?).zip(numbers(&grad)?) {
            let factor = if y == 0.0 { 0.0 } else { 4.0 / 3.0 };
            zeros += usize::from(y == 0.0);
            // The rounding of the factor and that of the product.
            let allowed = 2.0 * if dtype == DType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
            assert!((y - x * factor).abs() <= allowed * x.abs(), "{dtype:?}: {x} {y}");
            assert!((g - w * factor).abs() <= allowed * w.abs(), "{dtype:?}: {w} {g}");
        }
        assert!((800..1060).contains(&zeros), "{zeros} of 3710"); // 5 standard deviations
    }
    Ok(())
}

#[test]
fn factors_depend_on_the_seed_and_not_on_threads_or_neighbours() -> Result<()> {
    let x = Tensor::ones(100_000, DType::F32, &Device::Cpu)?;
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        anyhow::Ok(pool.install(|| dropout(&x, 0.5, 11))?.to_vec1::<f32>()?)
    };
    let one = with(1)?;
    assert_eq!(one, with(3)?);
    assert_eq!(one[..5000], dropout(&x.narrow(0, 0, 5000)?, 0.5, 11)?.to_vec1::<f32>()?);
    // Half of the factors of another seed are others, and so are those of another block.
    let other = dropout(&x, 0.5, 12)?.to_vec1::<f32>()?;
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
    for (a, b) in [(&one[..], &other[..]), (&one[..99_000], &one[1000..]), (&one[1024..], &one[..98_976])] {
        assert!((same(a, b) - 0.5).abs() < 0.01, "{}", same(a, b));
    }
    Ok(())
}

#[test]
fn no_probability_changes_nothing_and_others_are_refused() -> Result<()> {
    let x = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
    assert_eq!(dropout(&x, 0.0, 1)?.id(), x.id());
    for p in [-0.1, 1.0, f64::NAN] {
        let error = dropout(&x, p, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("p is {p}, but must be at least 0 and less than 1")), "{error}");
    }
    assert!(!dropout(&x.detach(), 0.5, 1)?.track_op());
    assert_eq!(dropout(&Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?, 0.5, 1)?.dims(), [0, 4]);
    Ok(())
}
