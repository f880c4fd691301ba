//! A chunk of a parameter with all that belongs to it, in whole units, and how an operation runs on one of these.
//!
//! Parameters of 16 bits are widened a unit at a time, updated in f32 like any other, and narrowed.

use std::ops::Range;

use candle_core::bail;

use super::convert::Convert;
use super::isa::prefetch;
use super::unit_op::{CatchUpRow, CodedUnitOp, UnitOp, UpdateUnit};
use super::{Elements, ElementsMut};
use crate::codec::{Bf16, F16, Format, Plain, Q8};
use crate::element::Arithmetic;
use crate::kernel::rows::Summand;
use crate::mark::Checksum;
use crate::rounding::{Half, Randoms, Rounding, derive};
use crate::state::{Buffer, Coded, Kept, Master, Norms, ParamState, Stored};

/// Consecutive whole units of a parameter; the last unit of a parameter may be shorter.
pub(crate) struct ParamChunk<'x> {
    params: ElementsMut<'x>,
    moments: MomentsMut<'x>,
    master: Option<MasterMut<'x>>,
    /// How many elements a unit has.
    pub(super) unit: usize,
    /// Which unit of the parameter the first one is.
    pub(super) first: usize,
}

enum MomentsMut<'x> {
    F64(FullMut<'x, f64>),
    F32(FullMut<'x, f32>),
    BF16(CodedMut<'x, Bf16>),
    F16(CodedMut<'x, F16>),
    Q8(CodedMut<'x, Q8>),
}

struct FullMut<'x, A> {
    exp_avg: &'x mut [A],
    exp_inf: &'x mut [A],
    rowwise: bool,
}

struct CodedMut<'x, F: Format> {
    moments: &'x mut [F::Code],
    norms: NormsMut<'x, F>,
}

enum NormsMut<'x, F: Format> {
    Each { codes: &'x mut [F::Norm], logs: &'x mut [u32] },
    Shared(&'x mut [f32]),
}

pub(super) enum MasterMut<'x> {
    Residual(&'x mut [i16]),
    Copy(&'x mut [f32]),
}

impl<'x> MasterMut<'x> {
    pub(super) fn new(master: &'x mut Master) -> candle_core::Result<Self> {
        Ok(match master.kept()? {
            Kept::Residual(rest) => Self::Residual(rest),
            Kept::Copy(copy) => Self::Copy(copy),
            Kept::Device(_) => bail!("no CPU kernel for masters on another device"),
        })
    }
}

impl<'x> ParamChunk<'x> {
    /// All of a parameter.
    pub(crate) fn new(params: ElementsMut<'x>, state: &'x mut ParamState) -> candle_core::Result<Self> {
        let layout = state.moments.layout;
        let moments = match &mut state.moments.stored {
            Stored::Full { exp_avg: Buffer::F64(exp_avg), exp_inf: Buffer::F64(exp_inf) } => {
                MomentsMut::F64(FullMut { exp_avg, exp_inf, rowwise: layout.rowwise })
            }
            Stored::Full { exp_avg: Buffer::F32(exp_avg), exp_inf: Buffer::F32(exp_inf) } => {
                MomentsMut::F32(FullMut { exp_avg, exp_inf, rowwise: layout.rowwise })
            }
            Stored::Full { .. } | Stored::Device(_) => bail!("no CPU kernel for moments on another device"),
            Stored::BF16(coded) => MomentsMut::BF16(CodedMut::new(coded)),
            Stored::F16(coded) => MomentsMut::F16(CodedMut::new(coded)),
            Stored::Q8(coded) => MomentsMut::Q8(CodedMut::new(coded)),
        };
        let master = state.master.as_mut().map(MasterMut::new).transpose()?;
        Ok(Self { params, moments, master, unit: layout.unit, first: 0 })
    }

    /// How many elements there are.
    pub(super) fn len(&self) -> usize {
        self.params.len()
    }

    /// The first `units` units, and the others.
    pub(super) fn split_at(self, units: usize) -> (Self, Self) {
        let Self { params, moments, master, unit, first } = self;
        let n = params.len().min(units * unit);
        let (params, other_params) = params.split_at(n);
        let (moments, other_moments) = match moments {
            MomentsMut::F64(full) => pair(full.split_at(n, units), MomentsMut::F64),
            MomentsMut::F32(full) => pair(full.split_at(n, units), MomentsMut::F32),
            MomentsMut::BF16(coded) => pair(coded.split_at(n, units), MomentsMut::BF16),
            MomentsMut::F16(coded) => pair(coded.split_at(n, units), MomentsMut::F16),
            MomentsMut::Q8(coded) => pair(coded.split_at(n, units), MomentsMut::Q8),
        };
        let (master, other_master) = match master {
            None => (None, None),
            Some(MasterMut::Residual(rest)) => pair(pair(rest.split_at_mut(n), MasterMut::Residual), Some),
            Some(MasterMut::Copy(copy)) => pair(pair(copy.split_at_mut(n), MasterMut::Copy), Some),
        };
        (
            Self { params, moments, master, unit, first },
            Self { params: other_params, moments: other_moments, master: other_master, unit, first: first + units },
        )
    }

    /// The rows from `first` to `last`, which are units, and those behind.
    pub(super) fn rows(self, first: u32, last: u32) -> (Self, Self) {
        let skipped = first as usize - self.first;
        self.split_at(skipped).1.split_at((last - first) as usize + 1)
    }

    /// Whether units are rows of so many elements, or can be taken for such because nothing is stored for them.
    pub(super) fn has_units_of(&self, row_len: usize) -> bool {
        match &self.moments {
            MomentsMut::F64(full) => self.unit == row_len || !full.rowwise,
            MomentsMut::F32(full) => self.unit == row_len || !full.rowwise,
            _ => self.unit == row_len,
        }
    }

    /// The same with units of `unit` elements.
    pub(super) fn in_units_of(self, unit: usize) -> Self {
        Self { unit, ..self }
    }

    /// Whether the arithmetic is in f64.
    pub(super) fn is_f64(&self) -> bool {
        matches!(self.params, ElementsMut::F64(_))
    }

    /// Whether the parameters have to be widened.
    pub(super) fn is_narrow(&self) -> bool {
        matches!(self.params, ElementsMut::F16(_) | ElementsMut::BF16(_))
    }

    /// Asks for the memory of the parameters of unit `k`.
    #[inline(always)]
    pub(super) fn prefetch_params(&self, k: usize) {
        let range = self.range(k);
        match &self.params {
            ElementsMut::F64(w) => prefetch(&w[range]),
            ElementsMut::F32(w) => prefetch(&w[range]),
            ElementsMut::F16(w) => prefetch(&w[range]),
            ElementsMut::BF16(w) => prefetch(&w[range]),
        }
    }

    /// The checksum of the parameters of unit `k`.
    #[inline(always)]
    pub(super) fn checksum(&self, k: usize) -> Checksum {
        let range = self.range(k);
        match &self.params {
            ElementsMut::F64(w) => Checksum::of(&w[range]),
            ElementsMut::F32(w) => Checksum::of(&w[range]),
            ElementsMut::F16(w) => Checksum::of(&w[range]),
            ElementsMut::BF16(w) => Checksum::of(&w[range]),
        }
    }

    /// Makes the parameters of unit `k` their own masters.
    pub(super) fn drop_master(&mut self, k: usize) {
        let range = self.range(k);
        match &mut self.master {
            None => {}
            Some(MasterMut::Residual(rest)) => rest[range].fill(0),
            Some(MasterMut::Copy(copy)) => copy[range].fill(0.0),
        }
    }

    /// Asks for the memory of unit `k`.
    #[inline(always)]
    pub(super) fn prefetch(&self, k: usize) {
        self.prefetch_params(k);
        let range = self.range(k);
        match &self.moments {
            MomentsMut::F64(full) => full.prefetch(k, range),
            MomentsMut::F32(full) => full.prefetch(k, range),
            MomentsMut::BF16(coded) => coded.prefetch(k, range),
            MomentsMut::F16(coded) => coded.prefetch(k, range),
            MomentsMut::Q8(coded) => coded.prefetch(k, range),
        }
    }

    fn range(&self, k: usize) -> Range<usize> {
        k * self.unit..self.params.len().min((k + 1) * self.unit)
    }
}

/// Both halves, in a variant.
fn pair<T, U>((a, b): (T, T), of: impl Fn(T) -> U) -> (U, U) {
    (of(a), of(b))
}

impl<'x, A> FullMut<'x, A> {
    fn split_at(self, n: usize, units: usize) -> (Self, Self) {
        let Self { exp_avg, exp_inf, rowwise } = self;
        let norms = if rowwise { units.min(exp_inf.len()) } else { n };
        let ((m, other_m), (u, other_u)) = (exp_avg.split_at_mut(n), exp_inf.split_at_mut(norms));
        (Self { exp_avg: m, exp_inf: u, rowwise }, Self { exp_avg: other_m, exp_inf: other_u, rowwise })
    }

    #[inline(always)]
    fn prefetch(&self, k: usize, range: Range<usize>) {
        prefetch(&self.exp_avg[range.clone()]);
        prefetch(if self.rowwise { &self.exp_inf[k..=k] } else { &self.exp_inf[range] });
    }
}

impl<'x, F: Format> CodedMut<'x, F> {
    fn new(coded: &'x mut Coded<F>) -> Self {
        let norms = match &mut coded.norms {
            Norms::Each { codes, logs } => NormsMut::Each { codes, logs },
            Norms::Shared(norms) => NormsMut::Shared(norms),
        };
        Self { moments: &mut coded.moments, norms }
    }

    fn split_at(self, n: usize, units: usize) -> (Self, Self) {
        let (moments, other) = self.moments.split_at_mut(n);
        let (norms, other_norms) = match self.norms {
            NormsMut::Each { codes, logs } => {
                let units = units.min(logs.len());
                let ((codes, other_codes), (logs, other_logs)) = (codes.split_at_mut(n), logs.split_at_mut(units));
                (NormsMut::Each { codes, logs }, NormsMut::Each { codes: other_codes, logs: other_logs })
            }
            NormsMut::Shared(norms) => {
                let units = units.min(norms.len());
                pair(norms.split_at_mut(units), NormsMut::Shared)
            }
        };
        (Self { moments, norms }, Self { moments: other, norms: other_norms })
    }

    #[inline(always)]
    fn prefetch(&self, k: usize, range: Range<usize>) {
        prefetch(&self.moments[range.clone()]);
        match &self.norms {
            NormsMut::Each { codes, logs } => {
                prefetch(&codes[range]);
                prefetch(&logs[k..=k]);
            }
            NormsMut::Shared(norms) => prefetch(&norms[k..=k]),
        }
    }
}

/// A type of arithmetic in which units are worked on.
pub(super) trait Lane: Summand + bytemuck::Pod {
    /// Updates unit `k` of the chunk; `scratch` is as long as a unit.
    fn update(chunk: &mut ParamChunk<'_>, op: &UpdateUnit<'_, Self>, k: usize, scratch: &mut [Self]);

    /// Brings row `k` of the chunk up to date.
    fn catch_up(chunk: &mut ParamChunk<'_>, op: &CatchUpRow<'_, Self>, k: usize, scratch: &mut [Self]);

    /// Gradients of this type, or widened into `scratch`.
    fn widened<'s>(grads: Elements<'s>, scratch: &'s mut [Self]) -> &'s [Self];
}

impl Lane for f64 {
    #[inline(always)]
    fn update(chunk: &mut ParamChunk<'_>, op: &UpdateUnit<'_, f64>, k: usize, _: &mut [f64]) {
        chunk.run_f64(op, k);
    }

    #[inline(always)]
    fn catch_up(chunk: &mut ParamChunk<'_>, op: &CatchUpRow<'_, f64>, k: usize, _: &mut [f64]) {
        chunk.run_f64(op, k);
    }

    #[inline(always)]
    fn widened<'s>(grads: Elements<'s>, _: &'s mut [f64]) -> &'s [f64] {
        match grads {
            Elements::F64(grads) => grads,
            _ => &[],
        }
    }
}

impl Lane for f32 {
    #[inline(always)]
    fn update(chunk: &mut ParamChunk<'_>, op: &UpdateUnit<'_, f32>, k: usize, scratch: &mut [f32]) {
        chunk.run_f32(op, k, scratch);
    }

    #[inline(always)]
    fn catch_up(chunk: &mut ParamChunk<'_>, op: &CatchUpRow<'_, f32>, k: usize, scratch: &mut [f32]) {
        chunk.run_f32(op, k, scratch);
    }

    #[inline(always)]
    fn widened<'s>(grads: Elements<'s>, scratch: &'s mut [f32]) -> &'s [f32] {
        #[inline(always)]
        fn widened<'s, E: Convert>(grads: &[E], scratch: &'s mut [f32]) -> &'s [f32] {
            let scratch = &mut scratch[..grads.len()];
            E::widen_all(grads, scratch);
            scratch
        }
        match grads {
            Elements::F32(grads) => grads,
            Elements::F16(grads) => widened(grads, scratch),
            Elements::BF16(grads) => widened(grads, scratch),
            Elements::F64(_) => &[],
        }
    }
}

impl ParamChunk<'_> {
    #[inline(always)]
    fn run_f64<J: UnitOp<f64>>(&mut self, op: &J, k: usize) {
        let range = self.range(k);
        if let (ElementsMut::F64(w), MomentsMut::F64(full)) = (&mut self.params, &mut self.moments) {
            let w = &mut w[range.clone()];
            if !op.is_of_params(w) {
                full.run(op, k, range, w);
            }
        }
    }

    #[inline(always)]
    fn run_f32<J: CodedUnitOp>(&mut self, op: &J, k: usize, scratch: &mut [f32]) {
        let range = self.range(k);
        let key = derive(op.key(), (self.first + k) as u64);
        let (moment_key, param_key) = (key as u32, (key >> 32) as u32);
        // One call for all types of parameters, which the compiler can put into the loops for each instruction set.
        let w = match &mut self.params {
            ElementsMut::F32(w) => &mut w[range.clone()],
            ElementsMut::BF16(w) => {
                let scratch = &mut scratch[..range.len()];
                match &self.master {
                    Some(MasterMut::Residual(rest)) => join(&w[range.clone()], &rest[range.clone()], scratch),
                    _ => Convert::widen_all(&w[range.clone()], scratch),
                }
                scratch
            }
            ElementsMut::F16(w) => {
                let scratch = &mut scratch[..range.len()];
                match &self.master {
                    Some(MasterMut::Copy(copy)) => join(&w[range.clone()], &copy[range.clone()], scratch),
                    _ => Convert::widen_all(&w[range.clone()], scratch),
                }
                scratch
            }
            ElementsMut::F64(_) => return,
        };
        match &mut self.moments {
            _ if op.is_of_params(w) => {}
            MomentsMut::F32(full) => full.run(op, k, range.clone(), w),
            MomentsMut::BF16(coded) => coded.run(op, k, range.clone(), moment_key, w),
            MomentsMut::F16(coded) => coded.run(op, k, range.clone(), moment_key, w),
            MomentsMut::Q8(coded) => coded.run(op, k, range.clone(), moment_key, w),
            MomentsMut::F64(_) => {}
        }
        match &mut self.params {
            ElementsMut::BF16(w) => match &mut self.master {
                Some(MasterMut::Residual(rest)) => split(scratch, &mut w[range.clone()], &mut rest[range]),
                _ => narrow(scratch, &mut w[range], op.rounding(), param_key),
            },
            ElementsMut::F16(w) => match &mut self.master {
                Some(MasterMut::Copy(copy)) => split(scratch, &mut w[range.clone()], &mut copy[range]),
                _ => narrow(scratch, &mut w[range], op.rounding(), param_key),
            },
            ElementsMut::F32(_) | ElementsMut::F64(_) => {}
        }
    }
}

impl<A: Arithmetic + bytemuck::Pod> FullMut<'_, A> {
    #[inline(always)]
    fn run<J: UnitOp<A>>(&mut self, op: &J, k: usize, range: Range<usize>, w: &mut [A]) {
        let exp_avg = &mut self.exp_avg[range.clone()];
        if self.rowwise {
            op.rowwise::<Plain>(0, w, (exp_avg, &mut self.exp_inf[k]));
        } else {
            op.full(w, exp_avg, &mut self.exp_inf[range]);
        }
    }
}

impl<F: Format> CodedMut<'_, F> {
    #[inline(always)]
    fn run<J: CodedUnitOp>(&mut self, op: &J, k: usize, range: Range<usize>, key: u32, w: &mut [f32]) {
        let moments = &mut self.moments[range.clone()];
        match &mut self.norms {
            NormsMut::Each { codes, logs } => {
                op.coded::<F>(key, w, (moments, &mut codes[range], &mut logs[k]));
            }
            NormsMut::Shared(norms) => op.rowwise::<F>(key, w, (moments, &mut norms[k])),
        }
    }
}

/// Puts masters together.
#[inline(always)]
fn join<H: Half>(params: &[H], rests: &[H::Residual], wide: &mut [f32]) {
    for ((w, param), rest) in wide.iter_mut().zip(params).zip(rests) {
        *w = param.join(*rest);
    }
}

/// Rounds to parameters of 16 bits.
#[inline(always)]
pub(super) fn narrow<H: Convert>(wide: &[f32], params: &mut [H], rounding: Rounding, key: u32) {
    if rounding == Rounding::Stochastic {
        for ((w, param), random) in wide.iter().zip(params).zip(Randoms::new(key)) {
            *param = H::of_bits(H::stochastic(*w, random));
        }
    } else {
        H::narrow_all(wide, params);
    }
}

/// Takes masters apart.
#[inline(always)]
pub(super) fn split<H: Half>(wide: &[f32], params: &mut [H], rests: &mut [H::Residual]) {
    for ((w, param), rest) in wide.iter().zip(params).zip(rests) {
        (*param, *rest) = H::split(*w);
    }
}
