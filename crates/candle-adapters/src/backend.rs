//! The `VarBuilder` that models with adapters are built from.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::error::{Error, Result};
use crate::random::Stream;
use crate::state::{Inner, Pair, Seen, State, Whole, names, variable, variable_of};
use crate::weight::Weight;

/// What a model has asked for, and what of it was not there.
#[derive(Default)]
pub(crate) struct Found {
    /// Modules and weights.
    pub(crate) used: BTreeSet<String>,
    pub(crate) missing: Vec<String>,
    pub(crate) mismatched: Vec<String>,
}

impl From<Found> for Error {
    fn from(found: Found) -> Self {
        let Found { missing, mismatched, .. } = found;
        Self::Names { missing, unexpected: Vec::new(), mismatched }
    }
}

/// What a `VarBuilder` is asked for.
struct Request<'r> {
    name: &'r str,
    /// The shape and how to make a tensor of it; none where any shape is right.
    shape: Option<(Shape, Init)>,
    dtype: DType,
    device: &'r Device,
}

impl Request<'_> {
    fn check(&self, tensor: &Tensor) -> Result<()> {
        match &self.shape {
            Some((shape, _)) if shape != tensor.shape() => {
                Err(Error::weight(self.name, format!("the shape {shape:?}"), tensor.shape()))
            }
            _ => Ok(()),
        }
    }
}

/// The source of a model's weights.
pub(crate) struct Backend<'a> {
    pub(crate) base: VarBuilder<'a>,
    pub(crate) inner: Arc<Inner>,
    pub(crate) is_merged: bool,
    /// Where names that do not fit are collected; none where the first is an error.
    pub(crate) found: Option<Arc<Mutex<Found>>>,
}

impl Backend<'_> {
    fn provide(&self, request: &Request<'_>) -> Result<Tensor> {
        let name = request.name;
        let is_saved = self.inner.rules.saves(name);
        let tensor = if is_saved { self.trained(request)? } else { self.base(request)? };
        let mut state = self.inner.state();
        state.is_built |= !self.is_merged;
        let module = name.strip_suffix(".weight");
        let is_embedding = module.is_some_and(|module| self.see(&mut state, module, request, tensor.rank()));
        if is_saved {
            return Ok(tensor);
        }
        let frozen = if tensor.is_variable() { tensor.detach() } else { tensor };
        let Some(module) = module else { return Ok(frozen) };
        let dims = frozen.dims();
        if !self.inner.rules.adapts(module, dims, is_embedding)? {
            return Ok(frozen);
        }
        let expected = "two dimensions, because `target_modules` matches";
        if dims.len() != 2 {
            return Err(Error::weight(name, expected, dims));
        }
        if !matches!(frozen.dtype(), DType::F32 | DType::F64 | DType::F16 | DType::BF16) {
            return Err(Error::weight(name, "f32, f64, f16 or bf16", frozen.dtype()));
        }
        if frozen.track_op() {
            return Err(Error::weight(name, "a base without a gradient", "the result of tracked operations"));
        }
        self.use_name(module);
        if self.is_merged {
            return self.merged(&state, module, &frozen);
        }
        if !state.pairs.contains_key(module) {
            let Some(pair) = self.pair(&state, module, &frozen, is_embedding)? else { return Ok(frozen) };
            state.waiting.pairs.remove(module);
            state.pairs.insert(module.to_owned(), pair);
        }
        self.adapted(&mut state, module, request, frozen)
    }

    /// Remembers a module. Whether it is an embedding is what its adapter says, or the first request: a head may be tied
    /// to it.
    fn see(&self, state: &mut State, module: &str, request: &Request<'_>, rank: usize) -> bool {
        let stored = state.waiting.pairs.get(module).map(|stored| stored.is_embedding);
        let known = state.pairs.get(module).map(|pair| pair.is_embedding).or(stored);
        let init = request.shape.as_ref().map(|(_, init)| *init);
        if let Some(seen) = state.modules.get(module) {
            return known.unwrap_or(seen.is_embedding);
        }
        let is_embedding = known.unwrap_or_else(|| self.inner.rules.is_embedding(module, init));
        state.modules.insert(module.to_owned(), Seen { is_embedding, is_matrix: rank == 2 });
        is_embedding
    }

    /// A pair for a module that has none; nothing if what the file has does not fit.
    fn pair(&self, state: &State, module: &str, base: &Tensor, is_embedding: bool) -> Result<Option<Pair>> {
        let Some(stored) = state.waiting.pairs.get(module) else {
            if !self.inner.is_loaded {
                return self.inner.new_pair(module, base, is_embedding).map(Some);
            }
            self.misfit(|found| found.missing.extend(names(module, is_embedding)))?;
            return Ok(None);
        };
        let mismatched = self.inner.mismatched(module, base, &stored.a, &stored.b, is_embedding)?;
        if !mismatched.is_empty() {
            self.misfit(|found| found.mismatched.extend(mismatched))?;
            return Ok(None);
        }
        let dtype = if base.dtype() == DType::F64 { DType::F64 } else { stored.a.dtype() };
        let var = |tensor| variable_of(tensor, dtype, base.device());
        let scale = self.inner.rules.adapter(module)?.scale;
        Ok(Some(Pair { a: var(&stored.a)?, b: var(&stored.b)?, scale, is_embedding }))
    }

    /// The weight that leads to a module's pair: one tensor, however often it is asked for.
    fn adapted(&self, state: &mut State, module: &str, request: &Request<'_>, base: Tensor) -> Result<Tensor> {
        let pair = &state.pairs[module];
        let mismatched = self.inner.mismatched(module, &base, &pair.a, &pair.b, pair.is_embedding)?;
        if !mismatched.is_empty() {
            self.misfit(|found| found.mismatched.extend(mismatched))?;
            return Ok(base);
        }
        if pair.a.device().location() != base.device().location() {
            let expected = format!("the device of its adapter, {:?}", pair.a.device().location());
            return Err(Error::weight(request.name, expected, base.device().location()));
        }
        let mask = self.inner.mask(state.is_training, state.draw, module, pair)?;
        let key = (module.to_owned(), base.dtype(), base.device().location());
        let weight = match state.weights.get(&key) {
            Some(weight) if weight.has_base(&base) => {
                weight.update(mask)?;
                return Ok(weight.tensor().clone());
            }
            Some(weight) => {
                let weight = weight.with_base(&base);
                weight.write(mask)?;
                weight
            }
            None => Weight::new(module, self.inner.factors(pair), base, mask)?,
        };
        let tensor = weight.tensor().clone();
        state.weights.insert(key, weight);
        Ok(tensor)
    }

    fn merged(&self, state: &State, module: &str, base: &Tensor) -> Result<Tensor> {
        let Some((factors, is_embedding)) = self.inner.any_factors(state, module, base.device())? else {
            let is_embedding = self.inner.rules.is_embedding(module, None);
            self.misfit(|found| found.missing.extend(names(module, is_embedding)))?;
            return Ok(base.clone());
        };
        let mismatched = self.inner.mismatched(module, base, &factors.a, &factors.b, is_embedding)?;
        if !mismatched.is_empty() {
            self.misfit(|found| found.mismatched.extend(mismatched))?;
            return Ok(base.clone());
        }
        Ok(factors.merged(base)?)
    }

    /// A weight of `modules_to_save`.
    fn trained(&self, request: &Request<'_>) -> Result<Tensor> {
        let name = request.name;
        self.use_name(name);
        let waiting = {
            let state = self.inner.state();
            if let Some(whole) = state.whole.get(name) {
                let tensor = whole.tensor();
                request.check(tensor)?;
                if self.is_merged {
                    return Ok(tensor.detach().to_device(request.device)?.to_dtype(request.dtype)?);
                }
                let expected = format!("{:?} on {:?}, as before", tensor.dtype(), tensor.device().location());
                let is_same =
                    tensor.dtype() == request.dtype && tensor.device().location() == request.device.location();
                return if is_same {
                    Ok(tensor.clone())
                } else {
                    Err(Error::weight(name, expected, (request.dtype, request.device.location())))
                };
            }
            state.waiting.whole.get(name).cloned()
        };
        let var = match (waiting, &request.shape) {
            (Some(tensor), _) => {
                if request.check(&tensor).is_err() {
                    let expected = request.shape.as_ref().map(|(shape, _)| shape.dims()).unwrap_or_default();
                    let text = format!("{name} {:?} for {expected:?}", tensor.dims());
                    self.misfit(|found| found.mismatched.push(text))?;
                    return self.fetch(request);
                }
                variable_of(&tensor, request.dtype, request.device)?
            }
            (None, _) if self.inner.is_loaded => {
                self.misfit(|found| found.missing.push(name.to_owned()))?;
                // The names that follow are to be in the same message.
                return match &request.shape {
                    Some((shape, _)) => Ok(Tensor::zeros(shape, request.dtype, request.device)?),
                    None => self.fetch(request),
                };
            }
            (None, Some((shape, init))) if !self.base.contains_tensor(name) => {
                let values = Stream::new(self.inner.seed, 0, name).init(*init, shape);
                variable(values, shape, request.dtype, request.device)?
            }
            (None, _) => variable_of(&self.fetch(request)?, request.dtype, request.device)?,
        };
        if self.is_merged {
            return Ok(var.as_detached_tensor());
        }
        let mut state = self.inner.state();
        state.waiting.whole.remove(name);
        // Another thread may have been faster.
        let whole = state.whole.entry(name.to_owned()).or_insert(Whole::Trained(var));
        Ok(whole.tensor().clone())
    }

    /// The base's tensor, or that which the adapter has in its place.
    fn base(&self, request: &Request<'_>) -> Result<Tensor> {
        let tensor = {
            let mut state = self.inner.state();
            if let Some(tensor) = state.waiting.whole.get(request.name).cloned() {
                if !self.is_merged {
                    state.waiting.whole.remove(request.name);
                    state.whole.insert(request.name.to_owned(), Whole::Frozen(tensor.clone()));
                }
                Some(tensor)
            } else {
                state.whole.get(request.name).map(|whole| whole.tensor().clone())
            }
        };
        let Some(tensor) = tensor else { return self.fetch(request) };
        self.use_name(request.name);
        request.check(&tensor)?;
        Ok(tensor.to_device(request.device)?.to_dtype(request.dtype)?)
    }

    fn fetch(&self, request: &Request<'_>) -> Result<Tensor> {
        let base = self.base.clone().set_device(request.device.clone());
        Ok(match &request.shape {
            Some((shape, init)) => base.get_with_hints_dtype(shape.clone(), request.name, *init, request.dtype)?,
            None => base.get_unchecked_dtype(request.name, request.dtype)?,
        })
    }

    fn use_name(&self, name: &str) {
        if let Some(found) = &self.found {
            found.lock().unwrap_or_else(PoisonError::into_inner).used.insert(name.to_owned());
        }
    }

    /// Collects what does not fit, or is an error.
    fn misfit(&self, add: impl FnOnce(&mut Found)) -> Result<()> {
        match &self.found {
            Some(found) => {
                add(&mut found.lock().unwrap_or_else(PoisonError::into_inner));
                Ok(())
            }
            None => {
                let mut found = Found::default();
                add(&mut found);
                Err(found.into())
            }
        }
    }
}

impl SimpleBackend for Backend<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.provide(&Request { name, shape: Some((shape, init)), dtype, device })?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.provide(&Request { name, shape: None, dtype, device })?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let state = self.inner.state();
        let is_own = state.whole.contains_key(name) || state.waiting.whole.contains_key(name);
        drop(state);
        is_own || self.base.contains_tensor(name)
    }
}
