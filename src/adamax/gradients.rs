//! Which gradients an update is made of: those of one call, or the sums of several.

use candle_core::Tensor;

use super::Param;
use super::accumulate::Accumulated;
use super::collect::{Collected, Grad};
use crate::error::Result;
use crate::kernel::{RowGrad, RowValues, Source, SummedRows};
use crate::state::Place;

/// Which gradients an update is made of.
#[derive(Clone, Copy)]
pub(super) enum Gradients<'c> {
    /// Those of this call.
    OfThisCall(&'c Collected<'c>),
    /// The sums of the last `calls` calls.
    Accumulated { calls: u64 },
}

/// One of them.
#[derive(Clone, Copy)]
pub(super) enum GradRef<'s> {
    Dense(Source<'s>),
    Rows(&'s RowGrad<'s>),
}

impl GradRef<'_> {
    /// Whether it is of some rows.
    pub(super) fn is_of_rows(self) -> bool {
        matches!(self, Self::Rows(_))
    }
}

impl<'c> Gradients<'c> {
    /// The gradient of variable `index`, for which `accumulated` was accumulated.
    pub(super) fn of<'s>(self, index: usize, accumulated: Option<&'s Accumulated>) -> Option<GradRef<'s>>
    where
        'c: 's,
    {
        match self {
            Self::OfThisCall(collected) => collected.get(index).map(|grad| match grad {
                Grad::Dense(grad) => GradRef::Dense(Source::Tensor(grad)),
                Grad::Rows(rows) => GradRef::Rows(rows),
            }),
            Self::Accumulated { .. } => accumulated.and_then(Accumulated::sum),
        }
    }

    /// The indices of the variables with a gradient.
    pub(super) fn indices<'s>(self, vars: &'s [Box<Param>]) -> impl Iterator<Item = usize>
    where
        'c: 's,
    {
        let with_gradient = move |&index: &usize| self.of(index, vars[index].accumulated.as_ref()).is_some();
        (0..vars.len()).filter(with_gradient)
    }

    /// The variables with a gradient, and where their state lives.
    pub(super) fn places<'s>(self, vars: &'s [Box<Param>]) -> impl Iterator<Item = (&'s Tensor, Place)>
    where
        'c: 's,
    {
        let with_gradient =
            vars.iter().enumerate().filter(move |(index, param)| self.of(*index, param.accumulated.as_ref()).is_some());
        with_gradient.map(|(_, param)| (param.var.as_tensor(), param.place()))
    }

    /// All there are, with the place of what they are measured from; rows have been summed up.
    pub(super) fn sources<'s>(self, vars: &'s [Box<Param>]) -> Result<Vec<(Source<'s>, Place)>>
    where
        'c: 's,
    {
        let mut sources = Vec::with_capacity(vars.len());
        for (index, param) in vars.iter().enumerate() {
            sources.push(match self.of(index, param.accumulated.as_ref()) {
                None => continue,
                Some(GradRef::Dense(source)) => (source, param.place()),
                Some(GradRef::Rows(RowGrad { values: RowValues::Summed(SummedRows { values, .. }), .. })) => {
                    (Source::Buffer(values), Place::Host)
                }
                Some(GradRef::Rows(_)) => return Err(candle_core::Error::msg("rows are not summed up yet").into()),
            });
        }
        Ok(sources)
    }
}
