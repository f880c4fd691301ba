//! The adapters of a model: the `VarBuilder` that it is built from, and its variables.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;

use crate::backend::{Backend, Found};
use crate::config::LoraConfig;
use crate::error::{Error, Result};
use crate::rules::Rules;
use crate::state::{Inner, Pair, State, Waiting, Whole, names};
use crate::weight::storage_address;

/// The adapters of a model.
///
/// The variables are made while a model is built: [`build`](Self::build) is the first call. A clone is another handle
/// of the same adapters.
#[derive(Clone)]
pub struct Lora {
    pub(crate) inner: Arc<Inner>,
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
        Self { inner: Arc::new(Inner::new(config, rules, seed, is_loaded, state)) }
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
    /// Those of `build`; no module matches the target; an entry of new adapters' settings matches no module; a module
    /// matches whose weight has not two dimensions or is of integers; an adapter from a file that lacks a name, has
    /// another shape, or has a name that the model does not ask for, all of them in one message. The adapters are then
    /// as before.
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
    /// As [`build`](Self::build); an adapter that the model does not ask for; as [`verify`](Self::verify) for new
    /// adapters, which have no values before a model is built.
    pub fn build_merged<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        build: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        if !self.inner.is_loaded {
            self.verify()?;
        }
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
        let mut state = self.inner.state();
        let entries = state.entries(is_merged).into_iter();
        let unexpected: Vec<_> = entries.filter(|(key, _)| !used.contains(*key)).flat_map(|(_, names)| names).collect();
        if !(missing.is_empty() && unexpected.is_empty() && mismatched.is_empty()) {
            return Err(Error::Names { missing, unexpected, mismatched }.into());
        }
        if !is_merged {
            self.inner.verify(&mut state)?;
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
    /// No model has been built; no module has an adapter; an entry of new adapters' settings that matches no module;
    /// names of a file that no model has asked for.
    pub fn verify(&self) -> Result<()> {
        self.inner.verify(&mut self.inner.state())
    }

    /// Computes the weights that models hold again, after a step of the optimizer or a change of the base, in place. In
    /// training mode with a
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
        self.inner.verify(&mut state)?;
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
    /// [`Error::Stale`] and [`Error::Copied`]; as [`verify`](Self::verify); errors of candle.
    pub fn check(&self, loss: &Tensor) -> Result<()> {
        let mut state = self.inner.state();
        self.inner.verify(&mut state)?;
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
        let mut state = self.inner.state();
        self.inner.verify(&mut state)?;
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
        let mut state = self.inner.state();
        self.inner.verify(&mut state)?;
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
        let mut state = self.inner.state();
        self.inner.verify(&mut state)?;
        let var = |(name, whole): (&String, &Whole)| match whole {
            Whole::Trained(var) => Some((name.clone(), var.clone())),
            Whole::Frozen(_) => None,
        };
        Ok(state.whole.iter().filter_map(var).collect())
    }
}
