//! Norms of gradients: a parallel read of all of them, by the fixed tree of `reduce.rs`.

use candle_core::Result;

use super::team::Team;
use super::{Borrowed, Elements, Isa, Pass, Source};
use crate::element::Element;
use crate::kernel::plan::Plan;
use crate::reduce::{self, LEAF, Largest, Magnitudes, Norm, NormType, Squares, Statistic};

/// The norm of each gradient, which is in host memory.
pub(crate) fn measure(grads: &[Source<'_>], norm: NormType) -> Result<Vec<Norm>> {
    measure_with(grads, norm, Isa::detect(), rayon::current_num_threads())
}

fn measure_with(grads: &[Source<'_>], norm: NormType, isa: Isa, threads: usize) -> Result<Vec<Norm>> {
    let reduced = match norm {
        NormType::L1 => reduce_all::<Magnitudes>(grads, isa, threads),
        NormType::L2 => reduce_all::<Squares>(grads, isa, threads),
        NormType::Inf => reduce_all::<Largest>(grads, isa, threads),
    };
    let finish = |(reduced, grad): (f64, &Source<'_>)| {
        if !norm.is_out_of_range(reduced) {
            return Ok(norm.finish(reduced, 1.0));
        }
        with_elements(*grad, |elements| match elements {
            Elements::F64(values) => measure_in_units(values, norm),
            _ => norm.finish(reduced, 1.0),
        })
    };
    reduced?.into_iter().zip(grads).map(finish).collect()
}

/// The norm of f64 elements whose sum, or the sum of whose squares, is too large or too small for an f64. Nothing is gained
/// by doing this in parallel: it is for gradients that hardly any run has, and for those that are zero.
fn measure_in_units(values: &[f64], norm: NormType) -> Norm {
    let leaves = |leaf: fn(&[f64]) -> f64| values.chunks(LEAF).map(leaf).collect();
    let largest = reduce::tree::<Largest>(leaves(reduce::leaf::<Largest, f64>));
    if largest == 0.0 || !largest.is_finite() {
        return Norm::of(largest);
    }
    let unit = reduce::unit_of(largest);
    let in_units = |leaf: fn(&[f64], f64) -> f64| values.chunks(LEAF).map(|values| leaf(values, unit)).collect();
    let reduced = match norm {
        NormType::L1 => reduce::tree::<Magnitudes>(in_units(reduce::leaf_in_units::<Magnitudes>)),
        _ => reduce::tree::<Squares>(in_units(reduce::leaf_in_units::<Squares>)),
    };
    norm.finish(reduced, unit)
}

fn reduce_all<S: Statistic>(grads: &[Source<'_>], isa: Isa, threads: usize) -> Result<Vec<f64>> {
    let sizes: Vec<usize> = grads.iter().map(Source::len).collect();
    let plan = Plan::new(&sizes, threads);
    let threads = if plan.is_parallel() { threads } else { 1 };
    Team::run(threads, |team| reduce_planned::<S>(grads, &plan, isa, team))
}

/// Holds the lock of one gradient at a time.
fn reduce_planned<S: Statistic>(grads: &[Source<'_>], plan: &Plan, isa: Isa, team: Team) -> Result<Vec<f64>> {
    let mut reduced = vec![0.0; grads.len()];
    // Whole tensors, a bundle to a thread.
    let mut whole: Vec<Result<Vec<f64>>> = plan.bundles.iter().map(|_| Ok(Vec::new())).collect();
    team.tensors(plan.bundles.iter().zip(&mut whole).collect(), |(bundle, whole)| {
        let one = |&index: &usize| with_elements(grads[index], |grad| reduce::tree::<S>(leaves::<S>(grad, isa)));
        *whole = bundle.iter().map(one).collect();
    });
    let whole = whole.into_iter().collect::<Result<Vec<_>>>()?;
    for (&index, result) in plan.bundles.iter().flatten().zip(whole.into_iter().flatten()) {
        reduced[index] = result;
    }
    // Large tensors: their leaves, whose order the pieces keep.
    for &(index, piece) in &plan.cut {
        let all = with_elements(grads[index], |grad| {
            let mut pieces = vec![Vec::new(); grad.len().div_ceil(piece)];
            team.pieces(pieces.iter_mut().enumerate().collect(), |(i, result)| {
                *result = leaves::<S>(grad.part(i * piece, piece), isa);
            });
            pieces.concat()
        });
        reduced[index] = reduce::tree::<S>(all?);
    }
    Ok(reduced)
}

fn with_elements<R>(grad: Source<'_>, f: impl FnOnce(Elements<'_>) -> R) -> Result<R> {
    let borrowed: Borrowed<'_> = grad.borrow()?;
    Ok(f(borrowed.elements()?))
}

fn leaves<S: Statistic>(elements: Elements<'_>, isa: Isa) -> Vec<f64> {
    match elements {
        Elements::F64(values) => isa.run(Leaves::<S, _>::of(values)),
        Elements::F32(values) => isa.run(Leaves::<S, _>::of(values)),
        Elements::F16(values) => isa.run(Leaves::<S, _>::of(values)),
        Elements::BF16(values) => isa.run(Leaves::<S, _>::of(values)),
    }
}

struct Leaves<'x, S, E> {
    values: &'x [E],
    statistic: std::marker::PhantomData<S>,
}

impl<'x, S: Statistic, E: Element> Leaves<'x, S, E> {
    fn of(values: &'x [E]) -> Self {
        Self { values, statistic: std::marker::PhantomData }
    }
}

impl<S: Statistic, E: Element> Pass for Leaves<'_, S, E> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let mut leaves = Vec::with_capacity(self.values.len().div_ceil(LEAF));
        for leaf in self.values.chunks(LEAF) {
            leaves.push(reduce::leaf::<S, E>(leaf));
        }
        leaves
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn bits_do_not_depend_on_threads_or_vector_width() -> Result<()> {
        let values = |n: usize| (0..n).map(|i| ((i as f64) * 0.7).sin() * 10f64.powi(i as i32 % 7 - 3)).collect();
        let tensor = |n: usize, dtype| -> Result<Tensor> {
            let values: Vec<f64> = values(n);
            Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(dtype)
        };
        let tensors = [
            tensor(300_007, DType::F64)?,
            tensor(300_007, DType::F32)?,
            tensor(999, DType::F16)?,
            tensor(300_007, DType::BF16)?.narrow(0, 3, 300_004)?,
            tensor(0, DType::F32)?,
            tensor(100_000, DType::F32)?,
        ];
        let grads: Vec<Source<'_>> = tensors.iter().map(Source::Tensor).collect();
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            let expected = measure_with(&grads, norm, Isa::Baseline, 1)?;
            assert_eq!(expected[4], Norm::of(0.0));
            for isa in Isa::all() {
                for threads in [1, 2, 3, 16] {
                    assert_eq!(measure_with(&grads, norm, isa, threads)?, expected, "{norm:?} {isa:?} {threads}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn norms_of_f64_are_right_over_its_whole_range() -> Result<()> {
        let ordinary: Vec<f64> = (0..3000).map(|i| ((i as f64) * 0.7).sin()).collect();
        let measure = |values: &[f64], norm| -> Result<Norm> {
            let grad = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
            Ok(measure_with(&[Source::Tensor(&grad)], norm, Isa::detect(), 1)?[0])
        };
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            let expected = measure(&ordinary, norm)?.to_f64();
            for exponent in [-900, -600, -500, -400, 400, 500, 530, 900, 1000] {
                let scale = 2f64.powi(exponent);
                let scaled: Vec<f64> = ordinary.iter().map(|x| x * scale).collect();
                let got = measure(&scaled, norm)?.to_f64() / scale;
                assert!((got / expected - 1.0).abs() < 1e-14, "{norm:?} 2^{exponent}: {got} for {expected}");
            }
        }
        // Three and four of the smallest numbers.
        assert_eq!(measure(&[1.5e-323, 2e-323], NormType::L2)?.to_f64(), 2.5e-323);
        assert!((measure(&[3e160, 4e160], NormType::L2)?.to_f64() / 5e160 - 1.0).abs() < 1e-15);
        assert!((measure(&[3e-170, -4e-170], NormType::L2)?.to_f64() / 5e-170 - 1.0).abs() < 1e-15);
        let huge = vec![2f64.powi(1023); 1 << 20];
        assert_eq!(measure(&huge, NormType::L2)?, Norm::product(2f64.powi(1023), 1024.0));
        assert_eq!(measure(&huge, NormType::L1)?, Norm::product(2f64.powi(1023), 2f64.powi(20)));
        assert!(measure(&huge, NormType::L1)?.is_beyond() && measure(&huge, NormType::Inf)?.to_f64() == huge[0]);
        for special in [f64::INFINITY, f64::NAN] {
            for norm in [NormType::L1, NormType::L2] {
                let got = measure(&[1e200, special, 1e-200], norm)?.to_f64();
                assert!(got.is_nan() == special.is_nan() && !got.is_finite());
            }
        }
        assert_eq!(measure(&[0.0; 40], NormType::L2)?, Norm::of(0.0));
        Ok(())
    }
}
