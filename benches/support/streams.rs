//! The memory's own speed: all that an update reads and writes, and no arithmetic.
//!
//! The same arrays in the same widths as parameter, gradient, m and u; four are read and three written, in place, in
//! one pass, by the rayon pool that is current, in pieces as large as the optimizer's. The values are xor-ed with the
//! gradient's bits, so that every load is needed and every store happens. Plain code, which compilers vectorise, once for
//! each width of registers. Where the arrays are far larger than the caches, its speed is that of the memory.

use std::ops::BitXorAssign;

use rayon::prelude::*;

/// As the optimizer's plan: fewer elements than this stay on one thread.
const SEQUENTIAL: usize = 256 * 1024;
/// As the optimizer's plan: pieces for each thread, and how small and large a piece may be.
const PIECES_PER_THREAD: usize = 8;
const SMALLEST_PIECE: usize = 16 * 1024;
const LARGEST_PIECE: usize = 1024 * 1024;

/// An integer as wide as a moment, some of whose bits are those of a gradient.
pub(crate) trait Bits<P>: Copy + BitXorAssign {
    fn of(grad: P) -> Self;
}

macro_rules! bits {
    ($($grad:ty => $($moment:ty),+;)+) => {
        $($(impl Bits<$grad> for $moment {
            #[inline(always)]
            fn of(grad: $grad) -> Self {
                grad as Self
            }
        })+)+
    };
}

bits! {
    u64 => u64;
    u32 => u32, u16, u8;
    u16 => u32, u16, u8;
}

/// A pass over `elements` elements: parameters and gradients as wide as `P`, moments as wide as `M`.
pub(crate) fn pass<P, M>(elements: usize) -> Box<dyn FnMut()>
where
    P: Copy + From<u8> + BitXorAssign + Send + Sync + 'static,
    M: Bits<P> + Default + Send + Sync + 'static,
{
    // Allocated as the optimizer's are: parameters and gradients are filled, moments come zeroed from the system.
    let (mut param, grad) = (vec![P::from(0x5a); elements], vec![P::from(0xa5); elements]);
    let (mut exp_avg, mut exp_inf) = (vec![M::default(); elements], vec![M::default(); elements]);
    let threads = rayon::current_num_threads();
    let piece = (elements / (threads * PIECES_PER_THREAD)).clamp(SMALLEST_PIECE, LARGEST_PIECE);
    Box::new(move || {
        if elements <= SEQUENTIAL || threads == 1 {
            return touch(&mut param, &grad, &mut exp_avg, &mut exp_inf);
        }
        param
            .par_chunks_mut(piece)
            .zip(grad.par_chunks(piece))
            .zip(exp_avg.par_chunks_mut(piece))
            .zip(exp_inf.par_chunks_mut(piece))
            .with_max_len(1)
            .for_each(|(((param, grad), exp_avg), exp_inf)| touch(param, grad, exp_avg, exp_inf));
    })
}

/// Reads all four and writes all but the gradient, with the widest registers that this CPU has. Narrow ones keep fewer
/// loads in flight: measured, on two cores with AVX-512, the 128 bits of SSE2 reach 45 GB/s of memory, and 512 reach 51.
fn touch<P, M>(param: &mut [P], grad: &[P], exp_avg: &mut [M], exp_inf: &mut [M])
where
    P: Copy + BitXorAssign,
    M: Bits<P>,
{
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        // SAFETY: the CPU has the features that the function is compiled for, as was asked just now.
        return unsafe { touch_avx512(param, grad, exp_avg, exp_inf) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has the feature that the function is compiled for, as was asked just now.
        return unsafe { touch_avx2(param, grad, exp_avg, exp_inf) };
    }
    touch_each(param, grad, exp_avg, exp_inf);
}

macro_rules! touch_with {
    ($name:ident, $($feature:tt),+) => {
        #[cfg(target_arch = "x86_64")]
        $(#[target_feature(enable = $feature)])+
        fn $name<P, M>(param: &mut [P], grad: &[P], exp_avg: &mut [M], exp_inf: &mut [M])
        where
            P: Copy + BitXorAssign,
            M: Bits<P>,
        {
            touch_each(param, grad, exp_avg, exp_inf);
        }
    };
}

touch_with!(touch_avx2, "avx2");
touch_with!(touch_avx512, "avx512f", "avx512bw");

#[inline(always)]
fn touch_each<P, M>(param: &mut [P], grad: &[P], exp_avg: &mut [M], exp_inf: &mut [M])
where
    P: Copy + BitXorAssign,
    M: Bits<P>,
{
    for (((param, &grad), exp_avg), exp_inf) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_inf) {
        *param ^= grad;
        *exp_avg ^= M::of(grad);
        *exp_inf ^= M::of(grad);
    }
}
