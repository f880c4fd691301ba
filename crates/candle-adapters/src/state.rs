//! The state of a model's adapters: its pairs, whole weights and the weights that models hold.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, DeviceLocation, Shape, Tensor, TensorId, Var};

use crate::config::{InitLora, LoraConfig, Modules};
use crate::error::{Error, Result};
use crate::random::Stream;
use crate::rules::Rules;
use crate::weight::{Factors, Mask, Weight};

/// What the handles of a `Lora` and the builders of its models share.
pub(crate) struct Inner {
    pub(crate) config: LoraConfig,
    pub(crate) rules: Rules,
    pub(crate) seed: u64,
    /// Whether the values come from a file.
    pub(crate) is_loaded: bool,
    state: Mutex<State>,
}

/// The variables of a module's adapter.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) a: Var,
    pub(crate) b: Var,
    pub(crate) scale: f64,
    pub(crate) is_embedding: bool,
}

/// The matrices of a module's adapter as a file has them.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) is_embedding: bool,
}

/// A weight that the adapter has whole.
#[derive(Clone)]
pub(crate) enum Whole {
    /// One of `modules_to_save`.
    Trained(Var),
    /// One that stands for the base model's, such as a resized table of embeddings.
    Frozen(Tensor),
}

impl Whole {
    pub(crate) fn tensor(&self) -> &Tensor {
        match self {
            Self::Trained(var) => var.as_tensor(),
            Self::Frozen(tensor) => tensor,
        }
    }
}

/// A module that a model has asked for.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) is_embedding: bool,
    /// Whether it could have an adapter.
    pub(crate) is_matrix: bool,
}

/// What a file has that no model has asked for yet.
#[derive(Clone, Default)]
pub(crate) struct Waiting {
    pub(crate) pairs: BTreeMap<String, Stored>,
    pub(crate) whole: BTreeMap<String, Tensor>,
}

/// A weight in models: its module, type and device.
type Key = (String, DType, DeviceLocation);

#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) pairs: BTreeMap<String, Pair>,
    pub(crate) whole: BTreeMap<String, Whole>,
    pub(crate) waiting: Waiting,
    pub(crate) weights: HashMap<Key, Weight>,
    /// The modules that models have asked for.
    pub(crate) modules: BTreeMap<String, Seen>,
    /// Whether models, other than merged ones, have asked for anything.
    pub(crate) is_built: bool,
    /// Whether every entry of the settings is known to have an effect.
    pub(crate) is_matched: bool,
    pub(crate) is_training: bool,
    /// The number of the dropout's masks.
    pub(crate) draw: u64,
    /// How often weights have been written.
    pub(crate) writes: u64,
    /// The nodes of the graph that was checked last, and `writes` at that time.
    pub(crate) checked: Option<(u64, HashSet<TensorId>)>,
}

/// The names of a pair's tensors, without PEFT's prefix.
pub(crate) fn names(module: &str, is_embedding: bool) -> [String; 2] {
    if is_embedding {
        ["A", "B"].map(|letter| format!("{module}.lora_embedding_{letter}"))
    } else {
        ["A", "B"].map(|letter| format!("{module}.lora_{letter}.weight"))
    }
}

impl State {
    /// The modules and weights that wait, or all, each with the names of its tensors.
    pub(crate) fn entries(&self, all: bool) -> Vec<(&String, Vec<String>)> {
        let pairs = self.pairs.iter().filter(|_| all).map(|(module, pair)| (module, pair.is_embedding));
        let waiting = self.waiting.pairs.iter().map(|(module, stored)| (module, stored.is_embedding));
        let whole = self.whole.keys().filter(|_| all).chain(self.waiting.whole.keys());
        let pairs = pairs.chain(waiting).map(|(module, is_embedding)| (module, names(module, is_embedding).into()));
        pairs.chain(whole.map(|name| (name, vec![name.clone()]))).collect()
    }
}

impl Inner {
    pub(crate) fn new(config: LoraConfig, rules: Rules, seed: u64, is_loaded: bool, state: State) -> Self {
        Self { config, rules, seed, is_loaded, state: Mutex::new(state) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // What is half done after a panic is stale, which the next backward pass says.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn factors(&self, pair: &Pair) -> Factors {
        Factors {
            a: pair.a.as_tensor().clone(),
            b: pair.b.as_tensor().clone(),
            scale: pair.scale,
            is_transposed: self.is_transposed(pair.is_embedding),
        }
    }

    pub(crate) fn is_transposed(&self, is_embedding: bool) -> bool {
        is_embedding || self.config.fan_in_fan_out
    }

    /// Everything that has been made fits, nothing waits, and no entry of new adapters' settings is without effect.
    pub(crate) fn verify(&self, state: &mut State) -> Result<()> {
        if !state.is_built {
            return Err(Error::NotBuilt);
        }
        let unexpected: Vec<_> = state.entries(false).into_iter().flat_map(|(_, names)| names).collect();
        if !unexpected.is_empty() {
            return Err(Error::Names { missing: Vec::new(), unexpected, mismatched: Vec::new() });
        }
        if state.pairs.is_empty() {
            let target = match &self.config.target_modules {
                Modules::Names(names) => format!("{names:?}"),
                Modules::Pattern(pattern) => format!("{pattern:?}"),
            };
            let seen = state.modules.iter().filter(|(_, seen)| seen.is_matrix).map(|(module, _)| module.clone());
            return Err(Error::NoTarget { target, seen: seen.collect() });
        }
        // PEFT's own files have entries for all families of models.
        if !self.is_loaded && !state.is_matched {
            let modules: Vec<_> = state.modules.keys().map(String::as_str).collect();
            let whole: Vec<_> = state.whole.keys().map(String::as_str).collect();
            let entries = self.rules.unmatched(&modules, &whole)?;
            if !entries.is_empty() {
                return Err(Error::Unmatched { entries, seen: state.modules.keys().cloned().collect() });
            }
            state.is_matched = true;
        }
        Ok(())
    }

    /// The factors of a module's input features in draw `draw`.
    pub(crate) fn mask(&self, is_training: bool, draw: u64, module: &str, pair: &Pair) -> Result<Option<Mask>> {
        let dropout = self.config.lora_dropout;
        // PEFT has no dropout in the adapters of embeddings, either.
        if !is_training || dropout == 0.0 || pair.is_embedding {
            return Ok(None);
        }
        let mut stream = Stream::new(self.seed, draw, &format!("{module}.lora_dropout"));
        let features = pair.a.dim(1)?;
        let mask: Vec<_> =
            (0..features).map(|_| if stream.unit() < dropout { 0.0 } else { 1.0 / (1.0 - dropout) }).collect();
        let factors = Tensor::from_vec(mask, features, &Device::Cpu)?;
        Ok(Some(Mask { draw, factors: factors.to_dtype(pair.a.dtype())?.to_device(pair.a.device())? }))
    }

    /// Computes the weights that models hold again where their adapters or masks have changed.
    pub(crate) fn update(&self, state: &mut State, is_training: bool, draw: u64) -> Result<()> {
        for ((module, ..), weight) in &state.weights {
            let pair = &state.pairs[module];
            weight.update(self.mask(is_training, draw, module, pair)?)?;
        }
        state.is_training = is_training;
        state.draw = draw;
        state.writes += 1;
        Ok(())
    }

    /// Undoes a build that has failed.
    pub(crate) fn restore(&self, before: State) -> Result<()> {
        let mut state = self.state();
        *state = before;
        // It may have put another base under a weight.
        for ((module, ..), weight) in &state.weights {
            weight.write(self.mask(state.is_training, state.draw, module, &state.pairs[module])?)?;
        }
        Ok(())
    }

    /// The number of the next masks.
    pub(crate) fn next_draw(&self, state: &State) -> u64 {
        if state.is_training && self.config.lora_dropout > 0.0 { state.draw + 1 } else { state.draw }
    }

    /// Whether a model holds a weight that is not that of its adapter's values.
    pub(crate) fn stale(&self, state: &State) -> Result<Option<String>> {
        for ((module, ..), weight) in &state.weights {
            if weight.is_stale()? {
                return Ok(Some(module.clone()));
            }
        }
        Ok(None)
    }

    /// A new pair, in f64 where the base is, otherwise in f32.
    pub(crate) fn new_pair(&self, module: &str, base: &Tensor, is_embedding: bool) -> Result<Pair> {
        let adapter = self.rules.adapter(module)?;
        let (rank, [a_shape, b_shape]) = (adapter.rank, self.shapes(adapter.rank, base, is_embedding)?);
        let (inputs, outputs) = (a_shape[1], b_shape[0]);
        self.rules.check_rank(module, rank, [inputs, outputs])?;
        let (a_count, b_count) = (rank * inputs, outputs * rank);
        let [a_name, b_name] = names(module, is_embedding);
        let mut a_stream = Stream::new(self.seed, 0, &a_name);
        let mut b_stream = Stream::new(self.seed, 0, &b_name);
        let bound = |inputs: usize| 1.0 / (inputs as f64).sqrt();
        let (a, b) = match (self.config.init_lora_weights, is_embedding) {
            (InitLora::Random, true) => (a_stream.normal(a_count, 0.0, 1.0), b_stream.normal(b_count, 0.0, 1.0)),
            (_, true) => (vec![0.0; a_count], b_stream.normal(b_count, 0.0, 1.0)),
            (InitLora::Random, false) => {
                let (a, b) = (bound(inputs), bound(rank));
                (a_stream.uniform(a_count, -a, a), b_stream.uniform(b_count, -b, b))
            }
            (InitLora::Default, false) => {
                (a_stream.uniform(a_count, -bound(inputs), bound(inputs)), vec![0.0; b_count])
            }
            (InitLora::Gaussian, false) => (a_stream.normal(a_count, 0.0, 1.0 / rank as f64), vec![0.0; b_count]),
        };
        let dtype = if base.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let var = |values, shape: [usize; 2]| variable(values, &Shape::from_dims(&shape), dtype, base.device());
        Ok(Pair { a: var(a, a_shape)?, b: var(b, b_shape)?, scale: adapter.scale, is_embedding })
    }

    /// The shapes of A and B.
    fn shapes(&self, rank: usize, base: &Tensor, is_embedding: bool) -> Result<[[usize; 2]; 2]> {
        let (rows, columns) = base.dims2()?;
        let (inputs, outputs) = if self.is_transposed(is_embedding) { (rows, columns) } else { (columns, rows) };
        Ok([[rank, inputs], [outputs, rank]])
    }

    /// The names and shapes that do not fit, of a pair with the shapes of `a` and `b`.
    pub(crate) fn mismatched(
        &self,
        module: &str,
        base: &Tensor,
        a: &Tensor,
        b: &Tensor,
        is_embedding: bool,
    ) -> Result<Vec<String>> {
        let expected = self.shapes(self.rules.adapter(module)?.rank, base, is_embedding)?;
        let names = names(module, is_embedding);
        let pairs = names.iter().zip(expected).zip([a, b]);
        Ok(pairs
            .filter(|((_, expected), tensor)| tensor.dims() != expected)
            .map(|((name, expected), tensor)| format!("{name} {:?} for {expected:?}", tensor.dims()))
            .collect())
    }

    /// The matrices of a module's adapter, whether a model has been built with it or not, and whether it is an
    /// embedding's.
    pub(crate) fn any_factors(&self, state: &State, module: &str, device: &Device) -> Result<Option<(Factors, bool)>> {
        let (a, b, is_embedding) = match (state.pairs.get(module), state.waiting.pairs.get(module)) {
            (Some(pair), _) => (pair.a.as_tensor(), pair.b.as_tensor(), pair.is_embedding),
            (None, Some(stored)) => (&stored.a, &stored.b, stored.is_embedding),
            (None, None) => return Ok(None),
        };
        let scale = self.rules.adapter(module)?.scale;
        let (a, b) = (a.to_device(device)?, b.to_device(device)?);
        Ok(Some((Factors { a, b, scale, is_transposed: self.is_transposed(is_embedding) }, is_embedding)))
    }
}

/// A variable with these values.
pub(crate) fn variable(values: Vec<f64>, shape: &Shape, dtype: DType, device: &Device) -> Result<Var> {
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
    Ok(Var::from_tensor(&tensor.to_device(device)?)?)
}

/// A variable of its own with a tensor's values.
pub(crate) fn variable_of(tensor: &Tensor, dtype: DType, device: &Device) -> Result<Var> {
    Ok(Var::from_tensor(&tensor.detach().to_device(device)?.to_dtype(dtype)?.contiguous()?)?)
}
