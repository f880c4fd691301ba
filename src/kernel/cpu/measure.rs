//! Norms of gradients: one parallel read over all of them, by the fixed tree of `reduce.rs`.

use rayon::prelude::*;

use super::{Elements, Isa, Pass};
use crate::element::Element;
use crate::kernel::plan::Plan;
use crate::reduce::{self, LEAF, Largest, Magnitudes, NormType, Squares, Statistic};

/// The norm of each gradient.
pub(crate) fn measure(grads: &[Elements<'_>], norm: NormType) -> Vec<f64> {
    measure_with(grads, norm, Isa::detect(), rayon::current_num_threads())
}

fn measure_with(grads: &[Elements<'_>], norm: NormType, isa: Isa, threads: usize) -> Vec<f64> {
    let reduced = match norm {
        NormType::L1 => reduce_all::<Magnitudes>(grads, isa, threads),
        NormType::L2 => reduce_all::<Squares>(grads, isa, threads),
        NormType::Inf => reduce_all::<Largest>(grads, isa, threads),
    };
    reduced.into_iter().map(|reduced| norm.finish(reduced)).collect()
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
            assert_eq!(expected[4], 0.0);
            for isa in Isa::all() {
                for threads in [1, 2, 3, 16] {
                    assert_eq!(measure_with(&grads, norm, isa, threads), expected, "{norm:?} {isa:?} {threads}");
                }
            }
        }
    }
}
