//! Norms of gradients: one parallel read over all of them, by the fixed tree of `reduce.rs`.

use rayon::prelude::*;

use super::{Elements, Isa, Pass};
use crate::element::Element;
use crate::kernel::plan::Plan;
use crate::reduce::{self, LEAF, Largest, Magnitudes, Norm, NormType, Squares, Statistic};

/// The norm of each gradient.
pub(crate) fn measure(grads: &[Elements<'_>], norm: NormType) -> Vec<Norm> {
    measure_with(grads, norm, Isa::detect(), rayon::current_num_threads())
}

fn measure_with(grads: &[Elements<'_>], norm: NormType, isa: Isa, threads: usize) -> Vec<Norm> {
    let reduced = match norm {
        NormType::L1 => reduce_all::<Magnitudes>(grads, isa, threads),
        NormType::L2 => reduce_all::<Squares>(grads, isa, threads),
        NormType::Inf => reduce_all::<Largest>(grads, isa, threads),
    };
    let of_each = reduced.into_iter().zip(grads).map(|(reduced, grad)| match grad {
        Elements::F64(values) if norm.is_out_of_range(reduced) => measure_in_units(values, norm),
        _ => norm.finish(reduced, 1.0),
    });
    of_each.collect()
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

fn reduce_all<S: Statistic>(grads: &[Elements<'_>], isa: Isa, threads: usize) -> Vec<f64> {
    let sizes: Vec<usize> = grads.iter().map(Elements::len).collect();
    let plan = Plan::new(&sizes, threads);
    let mut reduced = vec![0.0; grads.len()];
    // Whole tensors, a bundle to a thread.
    let bundle = |bundle: &Vec<usize>| -> Vec<f64> {
        bundle.iter().map(|&index| reduce::tree::<S>(leaves::<S>(grads[index], isa))).collect()
    };
    let whole: Vec<Vec<f64>> = if plan.is_parallel() {
        plan.bundles.par_iter().with_max_len(1).map(bundle).collect()
    } else {
        plan.bundles.iter().map(bundle).collect()
    };
    for (&index, result) in plan.bundles.iter().flatten().zip(whole.into_iter().flatten()) {
        reduced[index] = result;
    }
    // Large tensors: their leaves, whose order the pieces keep.
    for &(index, piece) in &plan.cut {
        let pieces: Vec<Vec<f64>> = (0..sizes[index].div_ceil(piece))
            .into_par_iter()
            .with_max_len(1)
            .map(|i| leaves::<S>(grads[index].part(i * piece, piece), isa))
            .collect();
        reduced[index] = reduce::tree::<S>(pieces.concat());
    }
    reduced
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
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn bits_do_not_depend_on_threads_or_vector_width() {
        let values: Vec<f64> = (0..300_007).map(|i| ((i as f64) * 0.7).sin() * 10f64.powi(i % 7 - 3)).collect();
        let f32s: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        let f16s: Vec<f16> = values.iter().map(|&x| f16::from_f64(x)).collect();
        let bf16s: Vec<bf16> = values.iter().map(|&x| bf16::from_f64(x)).collect();
        let grads = [
            Elements::F64(&values),
            Elements::F32(&f32s),
            Elements::F16(&f16s[..999]),
            Elements::BF16(&bf16s[3..]),
            Elements::F32(&[]),
        ];
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            let expected = measure_with(&grads, norm, Isa::Baseline, 1);
            assert_eq!(expected[4], Norm::of(0.0));
            for isa in Isa::all() {
                for threads in [1, 2, 3, 16] {
                    assert_eq!(measure_with(&grads, norm, isa, threads), expected, "{norm:?} {isa:?} {threads}");
                }
            }
        }
    }

    #[test]
    fn norms_of_f64_are_right_over_its_whole_range() {
        let ordinary: Vec<f64> = (0..3000).map(|i| ((i as f64) * 0.7).sin()).collect();
        let measure = |values: &[f64], norm| measure_with(&[Elements::F64(values)], norm, Isa::detect(), 1)[0];
        for norm in [NormType::L1, NormType::L2, NormType::Inf] {
            let expected = measure(&ordinary, norm).to_f64();
            for exponent in [-900, -600, -500, -400, 400, 500, 530, 900, 1000] {
                let scale = 2f64.powi(exponent);
                let scaled: Vec<f64> = ordinary.iter().map(|x| x * scale).collect();
                let got = measure(&scaled, norm).to_f64() / scale;
                assert!((got / expected - 1.0).abs() < 1e-14, "{norm:?} 2^{exponent}: {got} for {expected}");
            }
        }
        // Three and four of the smallest numbers.
        assert_eq!(measure(&[1.5e-323, 2e-323], NormType::L2).to_f64(), 2.5e-323);
        assert!((measure(&[3e160, 4e160], NormType::L2).to_f64() / 5e160 - 1.0).abs() < 1e-15);
        assert!((measure(&[3e-170, -4e-170], NormType::L2).to_f64() / 5e-170 - 1.0).abs() < 1e-15);
        let huge = vec![2f64.powi(1023); 1 << 20];
        assert_eq!(measure(&huge, NormType::L2), Norm::product(2f64.powi(1023), 1024.0));
        assert_eq!(measure(&huge, NormType::L1), Norm::product(2f64.powi(1023), 2f64.powi(20)));
        assert!(measure(&huge, NormType::L1).is_beyond() && measure(&huge, NormType::Inf).to_f64() == huge[0]);
        for special in [f64::INFINITY, f64::NAN] {
            for norm in [NormType::L1, NormType::L2] {
                let got = measure(&[1e200, special, 1e-200], norm).to_f64();
                assert!(got.is_nan() == special.is_nan() && !got.is_finite());
            }
        }
        assert_eq!(measure(&[0.0; 40], NormType::L2), Norm::of(0.0));
    }
}
