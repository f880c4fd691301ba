//! The adapters of a model: the `VarBuilder` that it is built from, and its variables.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, DeviceLocation, Shape, Tensor, TensorId, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::config::{InitLora, LoraConfig, Modules};
use crate::error::{Error, Result};
use crate::random::Stream;
use crate::rules::Rules;
use crate::weight::{Factors, Mask, Weight, storage_address};

/// The adapters of a model.
///
/// The variables are made while a model is built: [`build`](Self::build) is the first call. A clone is another handle
/// of the same adapters.
#[derive(Clone)]
pub struct Lora {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: LoraConfig,
    rules: Rules,
    pub(crate) seed: u64,
    /// Whether the values come from a file.
    is_loaded: bool,
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
    weights: HashMap<Key, Weight>,
    /// Modules of two dimensions without an adapter, for messages.
    others: BTreeSet<String>,
    is_training: bool,
    /// The number of the dropout's masks.
    pub(crate) draw: u64,
    /// How often weights have been written.
    writes: u64,
    /// The nodes of the graph that was checked last, and `writes` at that time.
    checked: Option<(u64, HashSet<TensorId>)>,
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
    fn entries(&self, all: bool) -> Vec<(&String, Vec<String>)> {
        let pairs = self.pairs.iter().filter(|_| all).map(|(module, pair)| (module, pair.is_embedding));
        let waiting = self.waiting.pairs.iter().map(|(module, stored)| (module, stored.is_embedding));
        let whole = self.whole.keys().filter(|_| all).chain(self.waiting.whole.keys());
        let pairs = pairs.chain(waiting).map(|(module, is_embedding)| (module, names(module, is_embedding).into()));
        pairs.chain(whole.map(|name| (name, vec![name.clone()]))).collect()
    }

    /// Everything that has been made fits, and nothing waits.
    pub(crate) fn verify(&self, config: &LoraConfig) -> Result<()> {
        let unexpected: Vec<_> = self.entries(false).into_iter().flat_map(|(_, names)| names).collect();
        if !unexpected.is_empty() {
            return Err(Error::Names { missing: Vec::new(), unexpected, mismatched: Vec::new() });
        }
        if self.pairs.is_empty() {
            let target = match &config.target_modules {
                Modules::Names(names) => format!("{names:?}"),
                Modules::Pattern(pattern) => format!("{pattern:?}"),
            };
            return Err(Error::NoTarget { target, seen: self.others.iter().cloned().collect() });
        }
        Ok(())
    }
}

impl Inner {
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

    /// The factors of a module's input features in draw `draw`.
    fn mask(&self, is_training: bool, draw: u64, module: &str, pair: &Pair) -> Result<Option<Mask>> {
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
    fn update(&self, state: &mut State, is_training: bool, draw: u64) -> Result<()> {
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
    fn restore(&self, before: State) -> Result<()> {
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
    fn new_pair(&self, module: &str, base: &Tensor, is_embedding: bool) -> Result<Pair> {
        let adapter = self.rules.adapter(module)?;
        let (rank, [a_shape, b_shape]) = (adapter.rank, self.shapes(adapter.rank, base, is_embedding)?);
        let (inputs, outputs) = (a_shape[1], b_shape[0]);
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
}

/// A variable with these values.
fn variable(values: Vec<f64>, shape: &Shape, dtype: DType, device: &Device) -> Result<Var> {
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
    Ok(Var::from_tensor(&tensor.to_device(device)?)?)
}

/// A variable of its own with a tensor's values.
fn variable_of(tensor: &Tensor, dtype: DType, device: &Device) -> Result<Var> {
    Ok(Var::from_tensor(&tensor.detach().to_device(device)?.to_dtype(dtype)?.contiguous()?)?)
}

impl fmt::Debug for Lora {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modules = self.inner.state().pairs.len();
        f.debug_struct("Lora")
            .field("config", &self.inner.config)
            .field("seed", &self.inner.seed)
            .field("modules", &modules)
            .finish_non_exhaustive()
    }
}

impl Lora {
    /// New adapters, in training mode. The values of a variable depend on the seed and on its name, not on the order in
    /// which a model is built.
    ///
    /// # Errors
    ///
    /// A setting that is not allowed.
    pub fn new(config: LoraConfig, seed: u64) -> Result<Self> {
        let rules = Rules::new(&config)?;
        Ok(Self::assemble(config, rules, seed, false, State { is_training: true, ..State::default() }))
    }

    /// Adapters whose values come from a file.
    pub(crate) fn stored(config: LoraConfig, rules: Rules, seed: u64, draw: u64, waiting: Waiting) -> Self {
        Self::assemble(config, rules, seed, true, State { waiting, draw, ..State::default() })
    }

    fn assemble(config: LoraConfig, rules: Rules, seed: u64, is_loaded: bool, state: State) -> Self {
        Self { inner: Arc::new(Inner { config, rules, seed, is_loaded, state: Mutex::new(state) }) }
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.inner.config
    }

    /// Builds a model on the base model's weights, and checks that the adapters fit it.
    ///
    /// A weight of a module that is adapted is `base + scale * B A` and leads to the variables A and B. One of
    /// `modules_to_save` is a variable of its own. All others are the base's, frozen: variables of a `VarMap` come
    /// detached.
    ///
    /// Where a model has been built before, the weights are computed again first, with new masks of the dropout: a loop
    /// may build its model anew for each step and needs no [`refresh`](Self::refresh) then. Models share the weights
    /// that are adapted, so there is one base model for a `Lora`: the last one counts.
    ///
    /// ```
    /// use candle_adapters::{Lora, LoraConfig};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap, linear};
    ///
    /// let base = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&base, DType::F32, &Device::Cpu);
    /// let lora = Lora::new(LoraConfig { target_modules: ["query"].into(), ..Default::default() }, 1)?;
    /// let layer = lora.build(vb, |vb| linear(16, 16, vb.pp("layer.0.query")))?;
    /// let names: Vec<_> = lora.named_vars()?.into_iter().map(|(name, _)| name).collect();
    /// assert_eq!(names, ["layer.0.query.lora_A.weight", "layer.0.query.lora_B.weight"]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `build`; no module matches the target; a module matches whose weight has not two dimensions or is of
    /// integers; an adapter from a file that lacks a name, has another shape, or has a name that the model does not ask
    /// for, all of them in one message. The adapters are then as before.
    pub fn build<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        build: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        let before = {
            let mut state = self.inner.state();
            let before = state.clone();
            if !state.weights.is_empty() {
                let (is_training, draw) = (state.is_training, self.inner.next_draw(&state));
                self.inner.update(&mut state, is_training, draw)?;
            }
            before
        };
        let built = self.run(base, false, build);
        if built.is_err() {
            self.inner.restore(before)?;
        }
        built
    }

    /// Builds a model whose weights are merged: plain tensors without a graph, for inference. An adapted weight takes
    /// the base's place, so the model needs no more memory than the base model; it does not follow later changes of the
    /// adapters. Nothing has to be built before where the adapters come from a file.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); an adapter that the model does not ask for.
    pub fn build_merged<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        build: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        self.run(base, true, build)
    }

    fn run<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        is_merged: bool,
        build: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        let found = Arc::new(Mutex::new(Found::default()));
        let model = build(self.backed(base, is_merged, Some(found.clone())))?;
        let Found { used, missing, mismatched } =
            std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        let state = self.inner.state();
        let entries = state.entries(is_merged).into_iter();
        let unexpected: Vec<_> = entries.filter(|(key, _)| !used.contains(*key)).flat_map(|(_, names)| names).collect();
        if !(missing.is_empty() && unexpected.is_empty() && mismatched.is_empty()) {
            return Err(Error::Names { missing, unexpected, mismatched }.into());
        }
        if used.is_empty() {
            state.verify(&self.inner.config)?;
        }
        Ok(model)
    }

    /// The builder that [`build`](Self::build) hands to its function, for models that are built in several places.
    /// Names that are missing in an adapter's file are an error of the builder's `get`; call [`verify`](Self::verify)
    /// when everything is built, which finds those that are left over.
    ///
    /// Asking again for a weight that is stale computes it again, with the same masks of the dropout.
    pub fn var_builder<'a>(&self, base: VarBuilder<'a>) -> VarBuilder<'a> {
        self.backed(base, false, None)
    }

    /// The builder that [`build_merged`](Self::build_merged) hands to its function, without its checks.
    pub fn merged_var_builder<'a>(&self, base: VarBuilder<'a>) -> VarBuilder<'a> {
        self.backed(base, true, None)
    }

    fn backed<'a>(&self, base: VarBuilder<'a>, is_merged: bool, found: Option<Arc<Mutex<Found>>>) -> VarBuilder<'a> {
        let (dtype, device, prefix) = (base.dtype(), base.device().clone(), base.prefix());
        // Names are whole: those of the root.
        let backend = Backend { base: base.root(), inner: self.inner.clone(), is_merged, found };
        let vb = VarBuilder::from_backend(Box::new(backend), dtype, device);
        if prefix.is_empty() { vb } else { vb.set_prefix(prefix) }
    }

    /// Checks that the adapters fit the models that have been built; [`build`](Self::build) does it.
    ///
    /// # Errors
    ///
    /// No module has an adapter; names of a file that no model has asked for.
    pub fn verify(&self) -> Result<()> {
        self.inner.state().verify(&self.inner.config)
    }

    /// Computes the weights that models hold again, after a step of the optimizer, in place. In training mode with a
    /// dropout it draws new masks, also where nothing has changed.
    ///
    /// No thread may be within a forward pass, and no loss may wait for its backward pass: its gradients would be those
    /// of the new weights.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify); errors of candle. Weights that were not computed are stale then, and the number of
    /// the masks is as before.
    pub fn refresh(&self) -> Result<()> {
        let mut state = self.inner.state();
        state.verify(&self.inner.config)?;
        let (is_training, draw) = (state.is_training, self.inner.next_draw(&state));
        self.inner.update(&mut state, is_training, draw)
    }

    /// Checks the graph of a loss, before its backward pass: that no weight is stale, and that the model holds no
    /// copies which [`refresh`](Self::refresh) does not reach. Copies show from the second call on, if there was a
    /// refresh in between; it takes a walk through the graph. So call it in the first two steps, or in all.
    ///
    /// ```
    /// use candle_adapters::{Error, Lora, LoraConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::VarBuilder;
    ///
    /// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let lora = Lora::new(LoraConfig { target_modules: ["query"].into(), ..Default::default() }, 1)?;
    /// // A model that transposes its weight when it is built.
    /// let weight = lora.build(vb, |vb| vb.pp("query").get((4, 4), "weight")?.t()?.contiguous())?;
    /// let input = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    /// lora.check(&input.matmul(&weight)?.sum_all()?)?;
    /// lora.refresh()?;
    /// let error = lora.check(&input.matmul(&weight)?.sum_all()?).unwrap_err();
    /// assert!(matches!(error, Error::Copied { module, .. } if module == "query"));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Stale`] and [`Error::Copied`]; errors of candle.
    pub fn check(&self, loss: &Tensor) -> Result<()> {
        let mut state = self.inner.state();
        if let Some(module) = self.inner.stale(&state)? {
            return Err(Error::Stale { module });
        }
        let modules: HashMap<_, _> =
            state.weights.iter().map(|((module, ..), weight)| (weight.tensor().id(), module)).collect();
        let addresses: HashSet<_> = state.weights.values().map(|weight| storage_address(weight.tensor())).collect();
        // Views of a weight are as new as the weight.
        let computed: Vec<_> = loss
            .sorted_nodes()
            .into_iter()
            .filter(|node| !node.is_variable() && !addresses.contains(&storage_address(node)))
            .collect();
        if let Some((writes, before)) = &state.checked
            && *writes != state.writes
        {
            let source =
                |node: &Tensor| node.sorted_nodes().into_iter().find_map(|node| modules.get(&node.id()).copied());
            let old = computed.iter().filter(|node| before.contains(&node.id()));
            let copies: Vec<_> = old.filter_map(|node| source(node).map(|module| (module, node.dims()))).collect();
            if let Some((module, dims)) = copies.last() {
                return Err(Error::Copied { module: (*module).clone(), shape: dims.to_vec(), copies: copies.len() });
            }
        }
        let ids = computed.iter().map(|node| node.id()).collect();
        state.checked = Some((state.writes, ids));
        Ok(())
    }

    /// Turns the dropout on.
    ///
    /// # Errors
    ///
    /// Errors of candle, as in [`refresh`](Self::refresh).
    pub fn train(&self) -> Result<()> {
        self.set_training(true)
    }

    /// Turns the dropout off.
    ///
    /// # Errors
    ///
    /// Errors of candle, as in [`refresh`](Self::refresh).
    pub fn eval(&self) -> Result<()> {
        self.set_training(false)
    }

    fn set_training(&self, is_training: bool) -> Result<()> {
        let mut state = self.inner.state();
        let draw = state.draw;
        self.inner.update(&mut state, is_training, draw)
    }

    /// Whether the dropout is on: at first so for new adapters, and not for those of a file.
    pub fn is_training(&self) -> bool {
        self.inner.state().is_training
    }

    /// The names of the modules with adapters.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn modules(&self) -> Result<Vec<String>> {
        let state = self.inner.state();
        state.verify(&self.inner.config)?;
        Ok(state.pairs.keys().cloned().collect())
    }

    /// All variables by name: [`adapter_vars`](Self::adapter_vars) and [`saved_vars`](Self::saved_vars).
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify): nothing has been built, for one.
    pub fn named_vars(&self) -> Result<Vec<(String, Var)>> {
        Ok([self.adapter_vars()?, self.saved_vars()?].concat())
    }

    /// The variables of the adapters, in the order of their modules' names: `MODULE.lora_A.weight`, [r, in], and
    /// `MODULE.lora_B.weight`, [out, r]; of embeddings `MODULE.lora_embedding_A`, [r, rows], and
    /// `MODULE.lora_embedding_B`, [dim, r].
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify): nothing has been built, for one.
    pub fn adapter_vars(&self) -> Result<Vec<(String, Var)>> {
        let state = self.inner.state();
        state.verify(&self.inner.config)?;
        let vars = |(module, pair): (&String, &Pair)| {
            let [a, b] = names(module, pair.is_embedding);
            [(a, pair.a.clone()), (b, pair.b.clone())]
        };
        Ok(state.pairs.iter().flat_map(vars).collect())
    }

    /// The variables of `modules_to_save`, under the names that the model asks for.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify): nothing has been built, for one.
    pub fn saved_vars(&self) -> Result<Vec<(String, Var)>> {
        let state = self.inner.state();
        state.verify(&self.inner.config)?;
        let var = |(name, whole): (&String, &Whole)| match whole {
            Whole::Trained(var) => Some((name.clone(), var.clone())),
            Whole::Frozen(_) => None,
        };
        Ok(state.whole.iter().filter_map(var).collect())
    }
}

/// What a model has asked for, and what of it was not there.
#[derive(Default)]
struct Found {
    /// Modules and weights.
    used: BTreeSet<String>,
    missing: Vec<String>,
    mismatched: Vec<String>,
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
struct Backend<'a> {
    base: VarBuilder<'a>,
    inner: Arc<Inner>,
    is_merged: bool,
    /// Where names that do not fit are collected; none where the first is an error.
    found: Option<Arc<Mutex<Found>>>,
}

impl Backend<'_> {
    fn provide(&self, request: &Request<'_>) -> Result<Tensor> {
        let name = request.name;
        if self.inner.rules.saves(name) {
            return self.trained(request);
        }
        let base = self.base(request)?;
        let frozen = if base.is_variable() { base.detach() } else { base };
        let Some(module) = name.strip_suffix(".weight") else { return Ok(frozen) };
        let mut state = self.inner.state();
        let stored = state.waiting.pairs.get(module).map(|stored| stored.is_embedding);
        let known = state.pairs.get(module).map(|pair| pair.is_embedding).or(stored);
        let init = request.shape.as_ref().map(|(_, init)| *init);
        let is_embedding = known.unwrap_or_else(|| self.inner.rules.is_embedding(module, init));
        let dims = frozen.dims();
        if !self.inner.rules.adapts(module, dims, is_embedding)? {
            if dims.len() == 2 {
                state.others.insert(module.to_owned());
            }
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
                let weight = weight.with_base(&base)?;
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

impl Inner {
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
