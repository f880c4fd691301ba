//! The passes: which streams each one walks over. No arithmetic here; that is `rule.rs`.

use candle_core::bail;
use half::{bf16, f16};

use super::{Elements, ElementsMut, Isa, Kind, Pass, Work};
use crate::element::{Arithmetic, Element};
use crate::rule::{self, Coefficients};
use crate::state::{Buffer, ParamState};

/// The update of a variable and its moments.
pub(crate) struct Update<'a> {
    pub(crate) coefficients: Coefficients<f64>,
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
        self.state.exp_avg.len()
    }

    fn bind<'x>(
        self,
        lent: Option<ElementsMut<'x>>,
        read: Option<Elements<'x>>,
    ) -> candle_core::Result<Box<dyn Work<'x> + 'x>>
    where
        'a: 'x,
    {
        let c = &self.coefficients;
        let (m, u) = (&mut self.state.exp_avg, &mut self.state.exp_inf);
        Ok(match (lent, read, m, u) {
            (Some(ElementsMut::F64(w)), Some(Elements::F64(g)), Buffer::F64(m), Buffer::F64(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            (Some(ElementsMut::F32(w)), Some(Elements::F32(g)), Buffer::F32(m), Buffer::F32(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            (Some(ElementsMut::F16(w)), Some(Elements::F16(g)), Buffer::F32(m), Buffer::F32(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            (Some(ElementsMut::F16(w)), Some(Elements::F32(g)), Buffer::F32(m), Buffer::F32(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            (Some(ElementsMut::BF16(w)), Some(Elements::BF16(g)), Buffer::F32(m), Buffer::F32(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            (Some(ElementsMut::BF16(w)), Some(Elements::F32(g)), Buffer::F32(m), Buffer::F32(u)) => {
                UpdateLoop::boxed(c, w, g, m, u)
            }
            _ => bail!("no CPU kernel for this combination of dtypes"),
        })
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

struct UpdateLoop<'x, P: Element, G> {
    coefficients: Coefficients<P::Acc>,
    param: &'x mut [P],
    grad: &'x [G],
    exp_avg: &'x mut [P::Acc],
    exp_inf: &'x mut [P::Acc],
}

impl<'x, P: Element, G: Element<Acc = P::Acc>> UpdateLoop<'x, P, G> {
    fn boxed(
        coefficients: &Coefficients<f64>,
        param: &'x mut [P],
        grad: &'x [G],
        exp_avg: &'x mut [P::Acc],
        exp_inf: &'x mut [P::Acc],
    ) -> Box<dyn Work<'x> + 'x> {
        Box::new(Self { coefficients: coefficients.round(), param, grad, exp_avg, exp_inf })
    }
}

impl<P: Element, G: Element<Acc = P::Acc>> Pass for UpdateLoop<'_, P, G> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let streams = self.param.iter_mut().zip(self.grad).zip(self.exp_avg).zip(self.exp_inf);
        for (((param, grad), exp_avg), exp_inf) in streams {
            let (w, m, u) = rule::update(&self.coefficients, param.widen(), grad.widen(), *exp_avg, *exp_inf);
            *param = P::narrow(w);
            *exp_avg = m;
            *exp_inf = u;
        }
    }
}

impl<'x, P: Element, G: Element<Acc = P::Acc>> Work<'x> for UpdateLoop<'x, P, G> {
    fn cut(self: Box<Self>, piece: usize) -> Vec<Box<dyn Work<'x> + 'x>> {
        let coefficients = self.coefficients;
        self.param
            .chunks_mut(piece)
            .zip(self.grad.chunks(piece))
            .zip(self.exp_avg.chunks_mut(piece))
            .zip(self.exp_inf.chunks_mut(piece))
            .map(|(((param, grad), exp_avg), exp_inf)| {
                Box::new(UpdateLoop { coefficients, param, grad, exp_avg, exp_inf }) as Box<dyn Work<'x> + 'x>
            })
            .collect()
    }

    fn run(self: Box<Self>, isa: Isa) {
        isa.run(*self);
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
