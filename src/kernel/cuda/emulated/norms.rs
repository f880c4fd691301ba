//! Norms of gradients, and what clipping and skipping make of them.

use candle_core::{DType, Result, Tensor};

use super::*;
use crate::clip::Clip;
use crate::kernel::Source;
use crate::kernel::cuda::abi::{Control, Gradient, JoinArgs, LeavesArgs, NormsArgs};
use crate::kernel::cuda::plan::{LEAVES, chunks_of_leaves};
use crate::reduce::{LEAF, Norm, NormType};
use crate::state::Place;

/// The norms of gradients by the kernels, and the arguments that they leave.
fn summarize(
    grads: &[Tensor],
    norm: NormType,
    clip: Option<Clip>,
    unscale: f64,
    (skips, reversed): (bool, bool),
) -> Result<(Vec<f64>, Control, Vec<f64>)> {
    let dtype = grads.first().map_or(DType::F32, Tensor::dtype);
    let mut values = grads.iter().map(|grad| memory(grad, 0)).collect::<Result<Vec<_>>>()?;
    let (mut gradients, mut first) = (Vec::new(), 0);
    for (values, grad) in values.iter_mut().zip(grads) {
        let len = grad.elem_count() as u64;
        gradients.push(Gradient {
            values: values.address(),
            count: 0,
            len,
            first,
            is_f64: u64::from(dtype == DType::F64),
        });
        first += len.div_ceil(LEAF as u64);
    }
    let chunks = chunks_of_leaves(gradients.iter().map(|g| g.len)).expect("little work");
    let blocks = chunks.len();
    let (mut gradients, mut chunks) = (Memory::of(&gradients, 0), Memory::of(&chunks, 0));
    let (mut leaves, mut folded) = (Memory::zeros::<f64>(first as usize), Memory::zeros::<f64>(first as usize));
    let (mut norms, mut squares) = (Memory::zeros::<f64>(grads.len()), Memory::zeros::<f64>(2 * grads.len()));
    let mut base = update_args(&PLAIN, 1, Encoding::of(&hyper(&PLAIN)));
    base.coefficients.grad_scale = unscale;
    let mut all = Memory::of(&vec![abi::UpdateArgs::new(&base); grads.len()], 0);
    let mut control = Memory::of(&[Control::default()], 0);
    let args = LeavesArgs {
        gradients: gradients.address(),
        chunks: chunks.address(),
        leaves: leaves.address(),
        norm: abi::norm(norm),
        chunk_units: LEAVES,
    };
    launch(&format!("summary_leaves_{}", name(dtype)), blocks, &args, reversed);
    let args = NormsArgs {
        gradients: gradients.address(),
        leaves: leaves.address(),
        folded: folded.address(),
        norms: norms.address(),
        unscale,
        norm: abi::norm(norm),
        padding: 0,
    };
    launch("summary_norms", grads.len(), &args, reversed);
    let (clip, limit) = abi::clip(clip);
    let args = JoinArgs {
        norms: norms.address(),
        squares: squares.address(),
        update_args: all.address(),
        control: control.address(),
        limit,
        n: grads.len() as u32,
        norm: abi::norm(norm),
        clip,
        skips: u32::from(skips),
    };
    launch("summary_join", 1, &args, reversed);
    let scales = all.read::<abi::UpdateArgs>();
    for update_args in &scales {
        assert!(
            update_args.wide.grad_scale.is_nan() || update_args.narrow.grad_scale == update_args.wide.grad_scale as f32
        );
    }
    Ok((norms.read(), control.read()[0], scales.iter().map(|update_args| update_args.wide.grad_scale).collect()))
}

/// Compares norms, factors and what is skipped with those of the CPU.
fn check(grads: &[Tensor], norm: NormType, unscale: f64) -> Result<()> {
    let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    let sources: Vec<_> = grads.iter().map(|grad| (Source::Tensor(grad), Place::Host)).collect();
    let measured = crate::kernel::Backends::default().measure(&sources, norm).map_err(candle_core::Error::from)?;
    let expected: Vec<Norm> = measured.into_iter().map(|norm| norm.times(unscale)).collect();
    let total = norm.join(&expected);
    let clips = [Clip::Norm(0.5), Clip::GlobalNorm(2.0), Clip::GradNorm { max_norm: 1.0, norm_type: norm }];
    for clip in clips.map(Some).into_iter().chain([None]) {
        let reversed = clip.is_none();
        let (norms, control, scales) = summarize(grads, norm, clip, unscale, (true, reversed))?;
        let what = format!("{norm:?} {clip:?} {unscale}: {norms:?} for {expected:?}");
        assert!(norms.iter().zip(&expected).all(|(a, b)| same(*a, b.stored())), "{what}");
        assert!(same(control.total_norm, total.stored()), "{what}");
        assert_eq!(control.skip, u32::from(!total.is_finite()), "{what}");
        for (scale, own) in scales.iter().zip(&expected) {
            let expected = clip.map_or(unscale, |clip| clip.scale(unscale, *own, total));
            assert!(same(*scale, expected), "{what}");
        }
    }
    Ok(())
}

#[test]
fn norms_and_factors_have_the_bits_of_the_cpu() -> Result<()> {
    let sizes = [0, 1, 31, 32, 33, 1023, 1024, 1025, 40_000, 1_100_000];
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (span, sizes) in [(3, &sizes[..]), (41, &sizes[..8])] {
            let grads = sizes.iter().map(|&n| tensor(&[n], n as u64, span, dtype)).collect::<Result<Vec<_>>>()?;
            for norm in [NormType::L1, NormType::L2, NormType::Inf] {
                check(&grads, norm, 1.0)?;
            }
        }
    }
    let none = summarize(&[], NormType::L2, Some(Clip::GlobalNorm(1.0)), 1.0, (true, false))?;
    assert_eq!((none.1.total_norm, none.1.skip), (0.0, 0));
    Ok(())
}

/// Where squares of f64, their sums, and the norms themselves leave the range.
#[test]
fn norms_of_f64_out_of_range_have_the_bits_of_the_cpu() -> Result<()> {
    let gradient = |n: usize, magnitude: f64| {
        let values = wild(n, n as u64, 3).into_iter().map(|x| x * magnitude).collect();
        Tensor::from_vec(values, n, &Device::Cpu)
    };
    let huge = 2f64.powi(1022) / 1e3;
    for magnitudes in [[1e160, 1e-3], [1e-170, 0.0], [huge, 1e-300], [huge, huge], [5e-324, 1e-310], [1e-150, 1e150]] {
        let mut grads = Vec::new();
        for (magnitude, n) in magnitudes.into_iter().cycle().zip([1, 33, 1025, 5000, 5]) {
            grads.push(gradient(n, magnitude)?);
        }
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            for unscale in [1.0, 2f64.powi(126), 2f64.powi(-126)] {
                check(&grads, norm, unscale)?;
            }
        }
    }
    // Beyond f64 each, and together only; not finite beside them.
    for special in [1.0, f64::INFINITY, f64::NAN] {
        let grads = [Tensor::full(f64::MAX, 5000, &Device::Cpu)?, Tensor::new(&[f64::MAX, special], &Device::Cpu)?];
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            check(&grads, norm, 1.0)?;
            check(&grads[1..], norm, 0.25)?;
        }
    }
    Ok(())
}
