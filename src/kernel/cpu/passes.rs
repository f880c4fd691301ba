//! The passes: which streams each one walks over. No arithmetic here; that is `rule.rs`.

use candle_core::bail;
use half::{bf16, f16};

use super::span::{DensePass, Orders, Span};
use super::{Elements, ElementsMut, Isa, Kind, Pass, Work};
use crate::element::{Arithmetic, Element};
use crate::rule;
use crate::state::{Buffer, ParamState};

/// The update of a variable and its moments.
pub(crate) struct Update<'a> {
    pub(crate) orders: Orders,
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
            (Some(lent), Some(grads)) if lent.takes(grads) => {
                Ok(Box::new(DensePass { span: Span::new(lent, self.state)?, orders: self.orders, grads }))
            }
            _ => bail!("no CPU kernel for this combination of dtypes"),
        }
    }
}

impl<'x> Work<'x> for DensePass<'x> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let Self { mut span, orders, grads } = *self;
        let units = piece.div_ceil(span.unit).max(1);
        let piece = units * span.unit;
        let mut pieces: Vec<Box<dyn Work<'x> + 'x>> = Vec::new();
        let mut start = 0;
        while span.len() > 0 {
            let (part, rest) = span.split_at(units);
            pieces.push(Box::new(DensePass { span: part, orders, grads: grads.part(start, piece) }));
            (span, start) = (rest, start + piece);
        }
        pieces
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
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
        let (momentum, overwrite) = (self.momentum, self.overwrite);
        Ok(match (lent, self.average) {
            (Some(ElementsMut::F64(w)), Buffer::F64(average)) => AverageLoop::boxed(momentum, overwrite, w, average),
            (Some(ElementsMut::F32(w)), Buffer::F32(average)) => AverageLoop::boxed(momentum, overwrite, w, average),
            (Some(ElementsMut::F16(w)), Buffer::F32(average)) => {
                AverageLoop::<f16>::boxed(momentum, overwrite, w, average)
            }
            (Some(ElementsMut::BF16(w)), Buffer::F32(average)) => {
                AverageLoop::<bf16>::boxed(momentum, overwrite, w, average)
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

struct AverageLoop<'x, P: Element> {
    momentum: P::Acc,
    one_minus_momentum: P::Acc,
    overwrite: bool,
    param: &'x mut [P],
    average: &'x mut [P::Acc],
}

impl<'x, P: Element> AverageLoop<'x, P> {
    fn boxed(momentum: f64, overwrite: bool, param: &'x mut [P], average: &'x mut [P::Acc]) -> Box<dyn Work<'x> + 'x> {
        let (one_minus_momentum, momentum) = (P::Acc::from_f64(1.0 - momentum), P::Acc::from_f64(momentum));
        Box::new(Self { momentum, one_minus_momentum, overwrite, param, average })
    }
}

impl<P: Element> Pass for AverageLoop<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (param, average) in self.param.iter_mut().zip(self.average) {
            *average = rule::average(self.momentum, self.one_minus_momentum, *average, param.widen());
            if self.overwrite {
                *param = P::narrow(*average);
            }
        }
    }
}

impl<'x, P: Element> Work<'x> for AverageLoop<'x, P> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let Self { momentum, one_minus_momentum, overwrite, .. } = *self;
        let pieces = self.param.chunks_mut(piece).zip(self.average.chunks_mut(piece));
        pieces
            .map(|(param, average)| {
                Box::new(AverageLoop { momentum, one_minus_momentum, overwrite, param, average })
                    as Box<dyn Work<'x> + 'x>
            })
            .collect()
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
    }
}
