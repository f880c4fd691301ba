//! Variables, and slices of them, that a backward pass leaves without a gradient or with one of zero.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::Adamax;
use super::grads::{DenseGrad, Grad, Grads};
use super::ranges::{intersection, ranges};
use crate::error::{Result, listed};
use crate::gradient::sparse::nonzero;
use crate::kernel::{RowGrad, SummedRows};
use crate::state::Buffer;

/// The parts of a model that one backward pass, or several, did not reach; [`Adamax::audit`] makes it.
///
/// A slice of a variable is all that is under one index of its first dimension: a row of a weight, an element of a
/// bias. [`Display`](fmt::Display) prints a list for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// By name, the part of each variable that was not reached.
    vars: BTreeMap<String, Unreached>,
}

/// The part of a variable that a backward pass did not reach.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unreached {
    Nothing,
    /// All, which has no gradient.
    Missing,
    /// All: its gradient is zero.
    Zero,
    /// Ascending ranges of slices, of so many.
    Slices {
        ranges: Vec<Range<usize>>,
        of: usize,
    },
}

impl Unreached {
    /// The part that neither of two backward passes reached.
    fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Nothing, _) | (_, Self::Nothing) => Self::Nothing,
            (Self::Missing, all) | (all, Self::Missing) | (Self::Zero, all) | (all, Self::Zero) => all.clone(),
            (Self::Slices { ranges, of }, Self::Slices { ranges: others, .. }) => match intersection(ranges, others) {
                ranges if ranges.is_empty() => Self::Nothing,
                ranges => Self::Slices { ranges, of: *of },
            },
        }
    }
}

impl Audit {
    /// How many variables the optimizer has.
    pub fn vars(&self) -> usize {
        self.vars.len()
    }

    /// The names of the variables without a gradient, in alphabetical order.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.named(|unreached| *unreached == Unreached::Missing)
    }

    /// The names of the variables whose gradient is exactly zero everywhere, in alphabetical order.
    pub fn zero(&self) -> impl Iterator<Item = &str> {
        self.named(|unreached| *unreached == Unreached::Zero)
    }

    /// The names of the other variables that have slices whose gradient is exactly zero, in alphabetical order, with
    /// the ranges of these slices, ascending and as long as possible.
    pub fn zero_slices(&self) -> impl Iterator<Item = (&str, &[Range<usize>])> {
        self.vars.iter().filter_map(|(name, unreached)| match unreached {
            Unreached::Slices { ranges, .. } => Some((name.as_str(), ranges.as_slice())),
            _ => None,
        })
    }

    /// Whether every slice of every variable has a gradient that is not zero.
    pub fn is_clean(&self) -> bool {
        self.vars.values().all(|unreached| *unreached == Unreached::Nothing)
    }

    /// The parts that neither of two backward passes reached: for audits of several steps, whose batches use other ids,
    /// tasks or experts.
    ///
    /// A variable that has no gradient in one of them and one of zero in the other is among those of
    /// [`zero`](Self::zero). A row of a table that one of them has not looked up is not listed. A variable that only one
    /// of them has, since they are of two optimizers, is as that one has it.
    ///
    /// ```
    /// use candle_adamax::{Adamax, Audit, ParamsAdamax};
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_nn::{Embedding, Module};
    ///
    /// let weight = Var::ones((4, 2), DType::F32, &Device::Cpu)?;
    /// let layer = Embedding::new(weight.as_tensor().clone(), 2); // whose gradient is dense
    /// let optimizer = Adamax::from_named([("weight", weight)], ParamsAdamax::default())?;
    /// let audit = |ids: &[u32]| -> candle_core::Result<Audit> {
    ///     let grads = layer.forward(&Tensor::new(ids, &Device::Cpu)?)?.sum_all()?.backward()?;
    ///     Ok(optimizer.audit(&grads)?)
    /// };
    /// let first = audit(&[0])?;
    /// assert_eq!(first.zero_slices().next(), Some(("weight", &[1..4][..])));
    /// let both = first.and(&audit(&[2, 3])?);
    /// assert_eq!(both.zero_slices().next(), Some(("weight", &[1..2][..])));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let mut vars = self.vars.clone();
        for (name, unreached) in &other.vars {
            vars.entry(name.clone()).and_modify(|own| *own = own.and(unreached)).or_insert_with(|| unreached.clone());
        }
        Self { vars }
    }

    fn named(&self, is: impl Fn(&Unreached) -> bool) -> impl Iterator<Item = &str> {
        self.vars.iter().filter(move |(_, unreached)| is(unreached)).map(|(name, _)| name.as_str())
    }
}

/// A list for people: a line of counts, and below it names with ranges, of the first few.
///
/// ```text
/// of 136 vars 2 have no gradient, 0 one of zero, 22 one with slices of zero
///   no gradient: `head.dense.bias`, `head.dense.weight`
///   `layers.0.attn.Wqkv.weight`: 512 of 768 slices are zero, 0..512
/// ```
impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const VARS: usize = 10;
        const RANGES: usize = 5;
        if self.is_clean() {
            return write!(f, "all {} vars have a gradient, without a slice of zero", self.vars.len());
        }
        let (missing, zero, slices) = (self.missing().count(), self.zero().count(), self.zero_slices().count());
        let vars = self.vars.len();
        write!(f, "of {vars} vars {missing} have no gradient, {zero} one of zero, {slices} one with slices of zero")?;
        if missing > 0 {
            write!(f, "\n  no gradient: {}", listed(self.missing()))?;
        }
        if zero > 0 {
            write!(f, "\n  zero: {}", listed(self.zero()))?;
        }
        let with_slices = self.vars.iter().filter_map(|(name, unreached)| match unreached {
            Unreached::Slices { ranges, of } => Some((name, ranges, of)),
            _ => None,
        });
        for (name, ranges, of) in with_slices.take(VARS) {
            let count: usize = ranges.iter().map(ExactSizeIterator::len).sum();
            let shown: Vec<_> = ranges.iter().take(RANGES).map(|range| format!("{range:?}")).collect();
            write!(f, "\n  `{name}`: {count} of {of} slices are zero, {}", shown.join(", "))?;
            if ranges.len() > RANGES {
                write!(f, " and {} more ranges", ranges.len() - RANGES)?;
            }
        }
        if slices > VARS { write!(f, "\n  and {} more vars with slices of zero", slices - VARS) } else { Ok(()) }
    }
}

impl Adamax {
    /// The variables without a gradient in `grads`, those whose gradient is exactly zero, and the slices of the others
    /// that are: for the first steps of a run, to find parts of a model that stand still.
    ///
    /// A cut graph need not leave a variable without a gradient. `ModernBert` of candle-transformers computes q, k and
    /// v with one weight, and candle's `rope` cuts off q and k: two thirds of that weight have a gradient of exactly 0.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// let wqkv = Var::ones((6, 4), DType::F32, &Device::Cpu)?;
    /// let optimizer = Adamax::from_named([("wqkv", wqkv.clone())], ParamsAdamax::default())?;
    /// let x = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    /// let qkv = x.matmul(&wqkv.t()?)?;
    /// let (q, v) = (qkv.narrow(1, 0, 2)?.detach(), qkv.narrow(1, 4, 2)?);
    /// let grads = (q + v)?.sum_all()?.backward()?;
    ///
    /// let audit = optimizer.audit(&grads)?;
    /// assert_eq!(audit.zero_slices().next(), Some(("wqkv", &[0..4][..])));
    /// println!("{audit}");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// Some zeros are no fault:
    ///
    /// - the rows of a `candle_nn::Embedding` whose ids are not in the batch, and experts that got no token. Audit
    ///   several steps and join them with [`Audit::and`]. Of a [`Table`](crate::Table) only the rows that were looked
    ///   up are compared with zero.
    /// - whatever is before a factor of zero. LoRA begins with `b = 0`, so that `a` has a gradient of zero in the first
    ///   step, and so has all that is before a head of zeros. Audit the second step, too.
    /// - the weights before a `relu` that was negative for the whole batch.
    /// - gradients that are too small for f16: scale the loss ([`LossScale::Dynamic`](crate::LossScale::Dynamic)).
    ///
    /// A gradient of NaN or infinity is one that is not zero: [`skip_nonfinite`](crate::ParamsAdamax::skip_nonfinite) finds
    /// those. This reads all gradients, waits for the devices that they are on and changes nothing. Gradients that are
    /// accumulated have no part in it.
    ///
    /// # Errors
    ///
    /// A gradient that a step would refuse: of the wrong shape, dtype or device, or of a lookup that is not known any
    /// more.
    pub fn audit(&self, grads: &GradStore) -> Result<Audit> {
        let audit = || {
            let collected = Grads::collect(&self.vars, self.found(grads)?)?;
            let mut collected = collected.iter().peekable();
            let vars = self.vars.iter().enumerate().map(|(index, info)| {
                let grad = collected.next_if(|(of, _)| *of == index).map(|(_, grad)| grad);
                let unreached = match grad {
                    None => Unreached::Missing,
                    Some(Grad::Dense(DenseGrad::Call(grad))) => unreached(&info.var, zero_slices(grad)?),
                    Some(Grad::Dense(DenseGrad::Sum(_))) => unreachable!("gradients of one call"),
                    Some(Grad::Rows(grad)) => unreached(&info.var, zero_rows(grad, info.var.dtype())?),
                };
                Ok((info.name.clone(), unreached))
            });
            Ok(Audit { vars: vars.collect::<Result<_>>()? })
        };
        audit().map_err(|error| self.own(error))
    }
}

/// The slices of a gradient that are zero, and whether these are all there are.
type Zeros = (Vec<usize>, bool);

fn unreached(var: &Var, (zeros, is_all): Zeros) -> Unreached {
    match zeros.is_empty() {
        true => Unreached::Nothing,
        false if is_all => Unreached::Zero,
        false => Unreached::Slices { ranges: ranges(&zeros), of: var.dims().first().copied().unwrap_or(1) },
    }
}

/// The slices of a dense gradient.
fn zero_slices(grad: &Tensor) -> Result<Zeros> {
    let slices = grad.dims().first().copied().unwrap_or(1);
    if grad.elem_count() == 0 {
        return Ok((Vec::new(), false));
    }
    let mut nonzero = nonzero(&grad.reshape((slices, ()))?)?.into_iter().peekable();
    let zeros: Vec<_> = (0..slices).filter(|slice| nonzero.next_if(|row| *row as usize == *slice).is_none()).collect();
    let is_all = zeros.len() == slices;
    Ok((zeros, is_all))
}

/// The rows of a gradient of some rows; one that it does not have is not zero.
fn zero_rows(grad: &RowGrad<'_>, dtype: DType) -> Result<Zeros> {
    fn zeros<T: Copy + PartialEq + Default>(rows: &[u32], values: &[T], row_len: usize) -> Vec<usize> {
        let is_zero = |k: &usize| values[k * row_len..][..row_len].iter().all(|x| *x == T::default());
        (0..rows.len()).filter(is_zero).map(|k| rows[k] as usize).collect()
    }
    let SummedRows { rows, values } = grad.summed(dtype)?;
    let zeros = match values {
        _ if grad.row_len == 0 => Vec::new(),
        Buffer::F32(values) => zeros(&rows, &values, grad.row_len),
        Buffer::F64(values) => zeros(&rows, &values, grad.row_len),
        Buffer::Tensor(_) => unreachable!("sums are in host memory"),
    };
    let is_all = zeros.len() == rows.len();
    Ok((zeros, is_all))
}
