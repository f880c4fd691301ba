//! The variables of Keras's Adamax as safetensors files.
//!
//! By path, of Keras 3: `PATH_momentum` and `PATH_norm` for each variable, `iteration`, and `learning_rate` unless that
//! is a schedule; with `use_ema` `PATH_average`, with accumulation `PATH_gradient_accumulator`. Names that Keras itself
//! gives its variables, `adamax/dense_kernel_momentum` of a variable `dense/kernel`, are read, too.
//!
//! In the order of Keras 2 and `tf_keras.optimizers.legacy`, which have no names: `0` is the iteration, then all m, then
//! all v.
//!
//! `examples/exchange/keras3.py` is the other side.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::plain::{PlainVar, count, of_scalar, scalar};
use super::reading::{HeaderLimits, TensorFile, Tensors};
use super::{AtomicFile, write_tensors};
use crate::error::{Error, Result};

const ITERATION: &str = "iteration";
const LEARNING_RATE: &str = "learning_rate";

/// What a variable has in a file.
#[derive(Clone, Copy)]
enum Part {
    Momentum,
    Norm,
    Average,
    Accumulator,
}

impl Part {
    fn key(self, name: &str) -> String {
        let part = match self {
            Self::Momentum => "momentum",
            Self::Norm => "norm",
            Self::Average => "average",
            Self::Accumulator => "gradient_accumulator",
        };
        format!("{name}_{part}")
    }
}

/// The same as Keras spells it in the names of an optimizer's variables.
fn spelled(name: &str) -> String {
    name.replace('/', "_")
}

/// What is in such a file.
#[derive(Debug)]
pub(crate) struct KerasState {
    /// The calls of the optimizer.
    pub(crate) iteration: u64,
    /// None where it is a schedule, and in files of the legacy order.
    pub(crate) learning_rate: Option<f64>,
    /// Their `step` is 0, and of how many calls gradients are, too: Keras counts for all variables together.
    pub(crate) vars: BTreeMap<String, PlainVar>,
}

/// Which variables the optimizer has beside the moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extras {
    pub(crate) averages: bool,
    pub(crate) accumulators: bool,
}

/// Writes the variables by path.
pub(crate) fn write(state: &KerasState, file: AtomicFile) -> Result<()> {
    // As the iteration of Keras; and all of the rate's digits, which Keras rounds to f32.
    let scalars = [
        Some((ITERATION.to_owned(), iteration(state)?)),
        state.learning_rate.map(|lr| Ok::<_, Error>((LEARNING_RATE.to_owned(), of_scalar(lr)?))).transpose()?,
    ];
    let vars = state.vars.iter().flat_map(|(name, var)| {
        let part = |part: Part, tensor| (part.key(name), tensor);
        let average = var.ema.as_ref().map(|ema| part(Part::Average, ema));
        let accumulator = var.accumulated.as_ref().map(|(sum, _)| part(Part::Accumulator, sum));
        let moments = [part(Part::Momentum, &var.exp_avg), part(Part::Norm, &var.exp_inf)];
        moments.into_iter().chain(average).chain(accumulator)
    });
    let scalars = scalars.iter().flatten().map(|(key, tensor)| (key.clone(), tensor));
    write_tensors(file, scalars.chain(vars), None)
}

/// Writes the variables in the legacy order, where the variables of the model are in the order of `names`.
pub(crate) fn write_legacy(state: &KerasState, names: &[&str], file: AtomicFile) -> Result<()> {
    let iteration = iteration(state)?;
    let vars = names
        .iter()
        .map(|name| state.vars.get(*name).ok_or_else(|| Error::checkpoint(*name, "the state of this var", "none")));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let moments = vars.iter().map(|var| &var.exp_avg).chain(vars.iter().map(|var| &var.exp_inf));
    let tensors = std::iter::once(&iteration).chain(moments);
    write_tensors(file, tensors.enumerate().map(|(position, tensor)| (position.to_string(), tensor)), None)
}

/// Makes sure that Keras can count so many calls.
pub(crate) fn check_iteration(calls: u64) -> Result<()> {
    as_iteration(calls).map(drop)
}

fn as_iteration(calls: u64) -> Result<i64> {
    i64::try_from(calls).map_err(|error| Error::checkpoint(ITERATION, "a number that an i64 can hold", error))
}

fn iteration(state: &KerasState) -> Result<Tensor> {
    of_scalar(as_iteration(state.iteration)?)
}

/// Reads the variables of variables of these names. `check` sees them before the moments are read, with
/// [outlines](TensorFile::assemble) for them.
pub(crate) fn read(
    path: &Path,
    names: &[&str],
    extras: Extras,
    check: impl FnOnce(&KerasState) -> Result<()>,
) -> Result<KerasState> {
    let file = TensorFile::open(path, None, Some(HeaderLimits::of(names.iter().copied())))?;
    // With or without the optimizer's name; the iteration tells whether, and which.
    let of_optimizer = |key: &str| {
        key.strip_suffix(ITERATION).filter(|name| name.is_empty() || name.ends_with('/')).map(str::to_owned)
    };
    let Some(prefix) = file.names().find_map(of_optimizer) else {
        return Err(Error::checkpoint(ITERATION, "a tensor", "none"));
    };
    let key_of = |part: Part, name: &str| {
        let (key, spelled) = (prefix.clone() + &part.key(name), prefix.clone() + &part.key(&spelled(name)));
        if file.has(&key) || !file.has(&spelled) { key } else { spelled }
    };
    let assemble = |tensors: &mut Tensors<'_>| {
        let key = format!("{prefix}{ITERATION}");
        let iteration = count(&key, &tensors.take(&key)?)?;
        let key = format!("{prefix}{LEARNING_RATE}");
        let learning_rate = file.has(&key).then(|| scalar(&key, &tensors.take(&key)?)).transpose()?;
        let vars = names.iter().map(|&name| {
            let mut take = |part: Part| tensors.take(&key_of(part, name));
            let var = PlainVar {
                exp_avg: take(Part::Momentum)?,
                exp_inf: take(Part::Norm)?,
                step: 0,
                ema: extras.averages.then(|| take(Part::Average)).transpose()?,
                accumulated: extras.accumulators.then(|| Ok::<_, Error>((take(Part::Accumulator)?, 0))).transpose()?,
            };
            Ok((name.to_owned(), var))
        });
        let vars = vars.collect::<Result<_>>()?;
        Ok(KerasState { iteration, learning_rate, vars })
    };
    file.assemble(assemble, check)
}

/// Reads the variables in the legacy order, where the variables of the model are in the order of `names`, as
/// [`read`] does.
pub(crate) fn read_legacy(
    path: &Path,
    names: &[&str],
    check: impl FnOnce(&KerasState) -> Result<()>,
) -> Result<KerasState> {
    let file = TensorFile::open(path, None, Some(HeaderLimits::of(names.iter().copied())))?;
    let assemble = |tensors: &mut Tensors<'_>| {
        let mut take = |position: usize| tensors.take(&position.to_string());
        let iteration = count("0", &take(0)?)?;
        let vars = names.iter().enumerate().map(|(nth, &name)| {
            let (exp_avg, exp_inf) = (take(1 + nth)?, take(1 + names.len() + nth)?);
            Ok((name.to_owned(), PlainVar { exp_avg, exp_inf, step: 0, ema: None, accumulated: None }))
        });
        Ok(KerasState { iteration, learning_rate: None, vars: vars.collect::<Result<_>>()? })
    };
    file.assemble(assemble, check)
}
