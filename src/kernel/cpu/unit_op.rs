//! Operations on one unit: its update with a gradient, and the updates that it has missed.
//!
//! Nothing here computes: the formula is in `rule.rs`, the encodings in `codec`. A unit is a run of elements that share a scale
//! or a norm: a row of a table, a block of 1,024 elements, or the last, shorter one.

use crate::codec::{self, Codes, Encoding, Format, Limits, Moment};
use crate::element::Arithmetic;
use crate::ledger::Missed;
use crate::rounding::Rounding;
use crate::rule::{self, Coefficients};

/// Arguments of one update of one parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpdateArgs {
    pub(crate) coefficients: Coefficients<f64>,
    /// Numbers that the codes of the moments depend on.
    pub(crate) encoding: Encoding,
    /// By how much units shrink.
    pub(crate) shrink: u64,
    /// How f16 and bf16 parameters are rounded.
    pub(crate) rounding: Rounding,
    /// Key of the random numbers, from seed, variable and update.
    pub(crate) key: u64,
}

/// [`UpdateArgs`] in the type of the arithmetic.
#[derive(Clone, Copy)]
pub(super) struct Prepared<A> {
    coefficients: Coefficients<A>,
    codes: Codes,
    rounding: Rounding,
    key: u64,
}

impl UpdateArgs {
    /// In the type of the arithmetic.
    pub(super) fn prepare<A: Arithmetic>(&self) -> Prepared<A> {
        Prepared {
            coefficients: self.coefficients.round(),
            codes: Codes { limits: self.encoding.limits(), shrink: self.shrink },
            rounding: self.rounding,
            key: self.key,
        }
    }
}

/// Something that is done to the elements of one unit.
pub(super) trait UnitOp<A: Arithmetic + bytemuck::Pod> {
    /// How f16 and bf16 parameters are rounded after it.
    fn rounding(&self) -> Rounding;

    /// The key of the random numbers.
    fn key(&self) -> u64;

    /// Does the op if it is one of the parameters alone, whatever their moments are.
    #[inline(always)]
    fn is_of_params(&self, _: &mut [A]) -> bool {
        false
    }

    /// Where moments are as they are.
    fn full(&self, params: &mut [A], exp_avg: &mut [A], exp_inf: &mut [A]);

    /// Where the elements share one u.
    fn rowwise<M: Moment<A>>(&self, key: u32, params: &mut [A], state: (&mut [M::Code], &mut A));
}

/// A [`UnitOp`] that encoded moments can be of, too.
pub(super) trait CodedUnitOp: UnitOp<f32> {
    fn coded<F: Format>(&self, key: u32, params: &mut [f32], state: (&mut [F::Code], &mut [F::Norm], &mut u32));
}

/// The update of one unit with its gradient.
pub(super) struct UpdateUnit<'g, A> {
    pub(super) update_args: &'g Prepared<A>,
    pub(super) grads: &'g [A],
}

impl<A: Arithmetic + bytemuck::Pod> UnitOp<A> for UpdateUnit<'_, A> {
    #[inline(always)]
    fn rounding(&self) -> Rounding {
        self.update_args.rounding
    }

    #[inline(always)]
    fn key(&self) -> u64 {
        self.update_args.key
    }

    #[inline(always)]
    fn full(&self, params: &mut [A], exp_avg: &mut [A], exp_inf: &mut [A]) {
        self.update_args.coefficients.specialized(
            #[inline(always)]
            |c| {
                let streams = params.iter_mut().zip(self.grads).zip(&mut *exp_avg).zip(&mut *exp_inf);
                for (((w, g), m), u) in streams {
                    (*w, *m, *u) = rule::update(c, *w, *g, *m, *u);
                }
            },
        );
    }

    #[inline(always)]
    fn rowwise<M: Moment<A>>(&self, key: u32, params: &mut [A], state: (&mut [M::Code], &mut A)) {
        let Prepared { coefficients, codes, .. } = self.update_args;
        codec::update_row::<A, M>(coefficients, &codes.limits, key, params, self.grads, state);
    }
}

impl CodedUnitOp for UpdateUnit<'_, f32> {
    #[inline(always)]
    fn coded<F: Format>(&self, key: u32, params: &mut [f32], state: (&mut [F::Code], &mut [F::Norm], &mut u32)) {
        let Prepared { coefficients, codes, .. } = self.update_args;
        codec::update_block::<F>(coefficients, codes, key, params, self.grads, state);
    }
}

/// Applies the updates that one row has missed.
pub(super) struct CatchUpRow<'l, A> {
    pub(super) missed: Missed<'l, A>,
    /// Whether its moments are known to be zero.
    pub(super) is_empty: bool,
    /// Whether it is a padding row, which stays as it is where its moments are zero.
    pub(super) is_padding: bool,
    pub(super) limits: Limits,
    pub(super) rounding: Rounding,
    pub(super) key: u64,
}

impl<A: Arithmetic + bytemuck::Pod> UnitOp<A> for CatchUpRow<'_, A> {
    #[inline(always)]
    fn rounding(&self) -> Rounding {
        self.rounding
    }

    #[inline(always)]
    fn key(&self) -> u64 {
        self.key
    }

    #[inline(always)]
    fn is_of_params(&self, params: &mut [A]) -> bool {
        if self.is_empty {
            // Nothing but decay is left, and pages of moments that nobody has written are not asked for.
            params.iter_mut().for_each(|w| *w = self.missed.decayed(*w));
        }
        self.is_empty
    }

    #[inline(always)]
    fn full(&self, params: &mut [A], exp_avg: &mut [A], exp_inf: &mut [A]) {
        let missed = &self.missed;
        if self.is_padding && exp_avg.iter().chain(&*exp_inf).all(|x| *x == A::ZERO) {
            return;
        }
        let is_series = exp_avg.iter().zip(&*exp_inf).all(|(m, u)| missed.is_series(*m, *u));
        for ((w, m), u) in params.iter_mut().zip(exp_avg).zip(exp_inf) {
            *w = if is_series { missed.weight(*w, *m, *u) } else { missed.weight_one_by_one(*w, *m, *u) };
            (*m, *u) = missed.moments(*m, *u);
        }
    }

    #[inline(always)]
    fn rowwise<M: Moment<A>>(&self, key: u32, params: &mut [A], state: (&mut [M::Code], &mut A)) {
        // With one norm for the row, it tells whether there has been a gradient.
        if !(self.is_padding && *state.1 == A::ZERO) {
            codec::catch_up_row::<A, M>(&self.missed, &self.limits, key, params, state);
        }
    }
}

impl CodedUnitOp for CatchUpRow<'_, f32> {
    #[inline(always)]
    fn coded<F: Format>(&self, key: u32, params: &mut [f32], state: (&mut [F::Code], &mut [F::Norm], &mut u32)) {
        if !(self.is_padding && codec::is_zero::<F>(state.0, state.1)) {
            codec::catch_up_block::<F>(&self.missed, &self.limits, key, params, state);
        }
    }
}
