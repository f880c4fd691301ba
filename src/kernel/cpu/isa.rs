//! One algorithm, several vector widths: a pass is written once, in plain Rust, and compiled once for each instruction
//! set. rustc never contracts `a * b + c`, so the wider the registers, the faster, and the bits stay the same.

/// A loop over elements. Implementations are `#[inline(always)]`, so that each [`Isa`] compiles its own copy.
pub(crate) trait Pass {
    type Output;

    fn run(self) -> Self::Output;
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    /// 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The widest one.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx512) = Avx512::detect() {
            return Self::Avx512(avx512);
        } else if let Some(avx2) = Avx2::detect() {
            return Self::Avx2(avx2);
        }
        Self::Baseline
    }

    /// Every one that this CPU has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "there is one"))]
        let mut all = vec![Self::Baseline];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::detect().map(Self::Avx2));
            all.extend(Avx512::detect().map(Self::Avx512));
        }
        all
    }

    /// Runs the pass as compiled for this instruction set.
    #[inline]
    pub(crate) fn run<P: Pass>(self, pass: P) -> P::Output {
        match self {
            Self::Baseline => pass.run(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(pass),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.run(pass),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, F16c, prefetch, prefetch_early};

/// Asks for memory that will be used soon. Here, nothing: this architecture has no stable way to say it.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn prefetch<T>(_values: &[T]) {}

/// The same for memory that will be read a little later.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn prefetch_early<T>(_values: &[T]) {}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "a function for an instruction set may be called only where the CPU has it")]
mod x86 {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm_storeu_si128,
        _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_storeu_ps,
    };

    use half::f16;

    use super::Pass;

    macro_rules! instruction_set {
        ($(#[$doc:meta])* $name:ident, $call:ident, $($feature:tt),+) => {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub(crate) struct $name(());

            impl $name {
                /// The proof, if this CPU has the instruction set; the answer never changes in a process.
                pub(crate) fn detect() -> Option<Self> {
                    ($(is_x86_feature_detected!($feature))&&+).then_some(Self(()))
                }

                #[inline]
                pub(crate) fn run<P: Pass>(self, pass: P) -> P::Output {
                    // SAFETY: a value of this type comes from `detect` alone, which has found every feature that the
                    // function is compiled for.
                    unsafe { $call(pass) }
                }
            }

            $(#[target_feature(enable = $feature)])+
            fn $call<P: Pass>(pass: P) -> P::Output {
                pass.run()
            }
        };
    }

    /// Asks for memory that will be used soon, into the first cache.
    #[inline(always)]
    pub(crate) fn prefetch<T>(values: &[T]) {
        fetch::<_MM_HINT_T0, T>(values);
    }

    /// Asks for memory that will be read a little later, into the second cache.
    #[inline(always)]
    pub(crate) fn prefetch_early<T>(values: &[T]) {
        fetch::<_MM_HINT_T1, T>(values);
    }

    #[inline(always)]
    fn fetch<const HINT: i32, T>(values: &[T]) {
        const LINE: usize = 64;
        let bytes = size_of_val(values);
        for offset in (0..bytes).step_by(LINE) {
            let line = values.as_ptr().cast::<i8>().wrapping_add(offset);
            // SAFETY: a prefetch is a hint that neither faults nor changes anything a program sees; SSE, which has it,
            // is part of x86-64.
            unsafe { _mm_prefetch::<HINT>(line) };
        }
    }

    /// Proof that this CPU has F16C: instructions that convert eight f16.
    #[derive(Clone, Copy)]
    pub(crate) struct F16c(());

    impl F16c {
        /// The proof, if this CPU has the instructions; the answer never changes in a process.
        #[inline]
        pub(crate) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx") && is_x86_feature_detected!("f16c")).then_some(Self(()))
        }

        /// Widens as many elements as whole vectors have; how many these are.
        #[inline]
        pub(crate) fn widen(self, from: &[f16], to: &mut [f32]) -> usize {
            // SAFETY: a value of this type comes from `detect` alone, which has found both features.
            unsafe { widen(from, to) }
        }

        /// Narrows as many elements as whole vectors have, to nearest even; how many these are.
        #[inline]
        pub(crate) fn narrow(self, from: &[f32], to: &mut [f16]) -> usize {
            // SAFETY: a value of this type comes from `detect` alone, which has found both features.
            unsafe { narrow(from, to) }
        }
    }

    #[target_feature(enable = "avx,f16c")]
    fn widen(from: &[f16], to: &mut [f32]) -> usize {
        let (from, to) = (from.as_chunks::<8>().0, to.as_chunks_mut::<8>().0);
        for (from, to) in from.iter().zip(&mut *to) {
            // SAFETY: the array has the 16 bytes that are read; they need no alignment.
            let halves = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
            let wide = _mm256_cvtph_ps(halves);
            // SAFETY: the array has the 32 bytes that are written; they need no alignment.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), wide) };
        }
        8 * from.len().min(to.len())
    }

    #[target_feature(enable = "avx,f16c")]
    fn narrow(from: &[f32], to: &mut [f16]) -> usize {
        let (from, to) = (from.as_chunks::<8>().0, to.as_chunks_mut::<8>().0);
        for (from, to) in from.iter().zip(&mut *to) {
            // SAFETY: the array has the 32 bytes that are read; they need no alignment.
            let wide = unsafe { _mm256_loadu_ps(from.as_ptr()) };
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
            // SAFETY: the array has the 16 bytes that are written; they need no alignment.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), halves) };
        }
        8 * from.len().min(to.len())
    }

    instruction_set! {
        /// Proof that this CPU has AVX2.
        Avx2, run_avx2, "avx2"
    }
    instruction_set! {
        /// Proof that this CPU has AVX-512.
        Avx512, run_avx512, "avx512f", "avx512bw", "avx512dq", "avx512vl"
    }
}
