//! The passes: which streams each one walks over. No arithmetic here; that is `rule.rs`.

use candle_core::bail;

use super::chunk::{Lane, MasterMut, ParamChunk, narrow, split};
use super::convert::Convert;
use super::unit_op::{UpdateArgs, UpdateUnit};
use super::{Elements, ElementsMut, Isa, Kind, Pass, Work};
use crate::element::{Arithmetic, Element};
use crate::rounding::{Half, Rounding, derive};
use crate::rule;
use crate::state::{Buffer, Master, ParamState};

/// The update of a variable and its moments.
pub(crate) struct Update<'a> {
    pub(crate) update_args: UpdateArgs,
    pub(crate) state: &'a mut ParamState,
}

/// Adds a gradient to the accumulated one.
pub(crate) struct Accumulate<'a> {
    pub(crate) unscale: f64,
    pub(crate) sum: &'a mut Buffer,
}

/// Moves the average of a variable towards it.
pub(crate) struct Average<'a> {
    /// The share that the old average keeps.
    pub(crate) momentum: f64,
    /// Whether the variable is then replaced by its average.
    pub(crate) overwrite: bool,
    pub(crate) average: &'a mut Buffer,
    /// Of the variable: the average moves towards it, and replaces it.
    pub(crate) master: Option<&'a mut Master>,
    /// How f16 and bf16 variables are rounded that are replaced.
    pub(crate) rounding: Rounding,
    /// Of the random numbers: seed, variable and call.
    pub(crate) key: u64,
}

impl<'a> Kind<'a> for Update<'a> {
    fn len(&self) -> usize {
        self.state.moments.len()
    }

    fn bind<'x>(
        self,
        lent: Option<ElementsMut<'x>>,
        read: Option<Elements<'x>>,
    ) -> candle_core::Result<Box<dyn Work<'x> + 'x>>
    where
        'a: 'x,
    {
        match (lent, read) {
            (Some(lent), Some(grads)) if lent.takes(grads) => Ok(Box::new(DensePass {
                chunk: ParamChunk::new(lent, self.state)?,
                update_args: self.update_args,
                grads,
            })),
            _ => bail!("no CPU kernel for this combination of dtypes"),
        }
    }
}

impl<'x> Work<'x> for DensePass<'x> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let Self { mut chunk, update_args, grads } = *self;
        let units = piece.div_ceil(chunk.unit).max(1);
        let piece = units * chunk.unit;
        let mut pieces: Vec<Box<dyn Work<'x> + 'x>> = Vec::new();
        let mut start = 0;
        while chunk.len() > 0 {
            let (part, rest) = chunk.split_at(units);
            pieces.push(Box::new(DensePass { chunk: part, update_args, grads: grads.part(start, piece) }));
            (chunk, start) = (rest, start + piece);
        }
        pieces
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
    }
}

/// A pass over consecutive units, with a gradient for each element.
pub(super) struct DensePass<'x> {
    pub(super) chunk: ParamChunk<'x>,
    pub(super) update_args: UpdateArgs,
    pub(super) grads: Elements<'x>,
}

impl super::Pass for DensePass<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.grads {
            Elements::F64(_) => self.update_all::<f64>(),
            _ => self.update_all::<f32>(),
        }
    }
}

impl DensePass<'_> {
    #[inline(always)]
    fn update_all<A: Lane>(self) {
        let Self { mut chunk, update_args, grads } = self;
        let update_args = update_args.prepare::<A>();
        let (n, unit) = (chunk.len(), chunk.unit);
        let scratch = |is_needed| if is_needed { vec![A::ZERO; unit.min(n)] } else { Vec::new() };
        let mut widened = scratch(matches!(grads, Elements::F16(_) | Elements::BF16(_)));
        let mut scratch = scratch(chunk.is_narrow());
        for k in 0..n.div_ceil(unit) {
            let grads = A::widened(grads.part(k * unit, unit), &mut widened);
            A::update(&mut chunk, &UpdateUnit { update_args: &update_args, grads }, k, &mut scratch);
        }
    }
}

impl<'a> Kind<'a> for Accumulate<'a> {
    fn len(&self) -> usize {
        self.sum.len()
    }

    fn bind<'x>(
        self,
        _: Option<ElementsMut<'x>>,
        read: Option<Elements<'x>>,
    ) -> candle_core::Result<Box<dyn Work<'x> + 'x>>
    where
        'a: 'x,
    {
        Ok(match (read, self.sum) {
            (Some(Elements::F64(g)), Buffer::F64(sum)) => AccumulateLoop::boxed(self.unscale, sum, g),
            (Some(Elements::F32(g)), Buffer::F32(sum)) => AccumulateLoop::boxed(self.unscale, sum, g),
            (Some(Elements::F16(g)), Buffer::F32(sum)) => AccumulateLoop::boxed(self.unscale, sum, g),
            (Some(Elements::BF16(g)), Buffer::F32(sum)) => AccumulateLoop::boxed(self.unscale, sum, g),
            _ => bail!("no CPU kernel for this combination of dtypes"),
        })
    }
}

impl<'a> Kind<'a> for Average<'a> {
    fn len(&self) -> usize {
        self.average.len()
    }

    fn bind<'x>(
        self,
        lent: Option<ElementsMut<'x>>,
        _: Option<Elements<'x>>,
    ) -> candle_core::Result<Box<dyn Work<'x> + 'x>>
    where
        'a: 'x,
    {
        let shares = Shares { momentum: self.momentum, overwrite: self.overwrite };
        let rounded = Rounded { rounding: self.rounding, key: self.key, first: 0 };
        let master = self.master.map(MasterMut::new).transpose()?;
        Ok(match (lent, self.average, master) {
            (Some(ElementsMut::F64(w)), Buffer::F64(average), None) => AverageLoop::boxed(shares, w, average),
            (Some(ElementsMut::F32(w)), Buffer::F32(average), None) => AverageLoop::boxed(shares, w, average),
            (Some(ElementsMut::F16(params)), Buffer::F32(average), None) => {
                Box::new(NarrowAverageLoop { shares, rounded, params, rests: None, average })
            }
            (Some(ElementsMut::F16(params)), Buffer::F32(average), Some(MasterMut::Copy(copy))) => {
                Box::new(NarrowAverageLoop { shares, rounded, params, rests: Some(copy), average })
            }
            (Some(ElementsMut::BF16(params)), Buffer::F32(average), None) => {
                Box::new(NarrowAverageLoop { shares, rounded, params, rests: None, average })
            }
            (Some(ElementsMut::BF16(params)), Buffer::F32(average), Some(MasterMut::Residual(rest))) => {
                Box::new(NarrowAverageLoop { shares, rounded, params, rests: Some(rest), average })
            }
            _ => bail!("no CPU kernel for this combination of dtypes"),
        })
    }
}

struct AccumulateLoop<'x, G: Element> {
    unscale: G::Acc,
    sum: &'x mut [G::Acc],
    grad: &'x [G],
}

impl<'x, G: Element> AccumulateLoop<'x, G> {
    fn boxed(unscale: f64, sum: &'x mut [G::Acc], grad: &'x [G]) -> Box<dyn Work<'x> + 'x> {
        Box::new(Self { unscale: G::Acc::from_f64(unscale), sum, grad })
    }
}

impl<G: Element> Pass for AccumulateLoop<'_, G> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sum, grad) in self.sum.iter_mut().zip(self.grad) {
            *sum = rule::accumulate(self.unscale, *sum, grad.widen());
        }
    }
}

impl<'x, G: Element> Work<'x> for AccumulateLoop<'x, G> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let unscale = self.unscale;
        let pieces = self.sum.chunks_mut(piece).zip(self.grad.chunks(piece));
        pieces.map(|(sum, grad)| Box::new(AccumulateLoop { unscale, sum, grad }) as Box<dyn Work<'x> + 'x>).collect()
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
    }
}

/// How an average moves.
#[derive(Clone, Copy)]
struct Shares {
    momentum: f64,
    overwrite: bool,
}

impl Shares {
    /// One step of an average.
    #[inline(always)]
    fn step<A: Arithmetic>(self) -> impl Fn(A, A) -> A {
        let (one_minus_momentum, momentum) = (A::from_f64(1.0 - self.momentum), A::from_f64(self.momentum));
        move |average, w| rule::average(momentum, one_minus_momentum, average, w)
    }
}

/// Averages of parameters that need no rounding.
struct AverageLoop<'x, A> {
    shares: Shares,
    params: &'x mut [A],
    average: &'x mut [A],
}

impl<'x, A: Arithmetic> AverageLoop<'x, A> {
    fn boxed(shares: Shares, params: &'x mut [A], average: &'x mut [A]) -> Box<dyn Work<'x> + 'x> {
        Box::new(Self { shares, params, average })
    }
}

impl<A: Arithmetic> Pass for AverageLoop<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let step = self.shares.step();
        for (param, average) in self.params.iter_mut().zip(self.average) {
            *average = step(*average, *param);
            if self.shares.overwrite {
                *param = *average;
            }
        }
    }
}

impl<'x, A: Arithmetic> Work<'x> for AverageLoop<'x, A> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let Self { shares, params, average } = *self;
        let pieces = params.chunks_mut(piece).zip(average.chunks_mut(piece));
        pieces.map(|(params, average)| AverageLoop::boxed(shares, params, average)).collect()
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
    }
}

/// How many elements of 16 bits share a key when an average replaces them.
pub(crate) const AVERAGE_BLOCK: usize = 1024;

/// How parameters of 16 bits become their averages.
#[derive(Clone, Copy)]
struct Rounded {
    rounding: Rounding,
    key: u64,
    /// Which block of the parameter the first one is.
    first: u64,
}

/// Averages of parameters of 16 bits, or of their masters.
struct NarrowAverageLoop<'x, H: Half> {
    shares: Shares,
    rounded: Rounded,
    params: &'x mut [H],
    rests: Option<&'x mut [H::Residual]>,
    average: &'x mut [f32],
}

impl<H: Convert> Pass for NarrowAverageLoop<'_, H> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { shares, rounded: Rounded { rounding, key, first }, params, mut rests, average } = self;
        let step = shares.step::<f32>();
        for (block, average) in average.chunks_mut(AVERAGE_BLOCK).enumerate() {
            let range = block * AVERAGE_BLOCK..block * AVERAGE_BLOCK + average.len();
            let params = &mut params[range.clone()];
            match &mut rests {
                Some(rests) => {
                    let rests = &mut rests[range];
                    for ((average, param), rest) in average.iter_mut().zip(&*params).zip(&*rests) {
                        *average = step(*average, param.join(*rest));
                    }
                    if shares.overwrite {
                        split(average, params, rests);
                    }
                }
                None => {
                    for (average, param) in average.iter_mut().zip(&*params) {
                        *average = step(*average, param.widen());
                    }
                    if shares.overwrite {
                        narrow(average, params, rounding, (derive(key, first + block as u64) >> 32) as u32);
                    }
                }
            }
        }
    }
}

impl<'x, H: Convert> Work<'x> for NarrowAverageLoop<'x, H> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let Self { shares, mut rounded, params, rests, average } = *self;
        let blocks = piece.div_ceil(AVERAGE_BLOCK).max(1);
        let piece = blocks * AVERAGE_BLOCK;
        let mut rests = rests.map(|rests| rests.chunks_mut(piece));
        let pieces = params.chunks_mut(piece).zip(average.chunks_mut(piece)).map(|(params, average)| {
            let rests = rests.as_mut().and_then(Iterator::next);
            let part = NarrowAverageLoop { shares, rounded, params, rests, average };
            rounded.first += blocks as u64;
            Box::new(part) as Box<dyn Work<'x> + 'x>
        });
        pieces.collect()
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
    }
}
