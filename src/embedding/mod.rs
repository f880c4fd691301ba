//! Layers on tables: nothing but shapes, options and candle's conventions.

mod bag;

use candle_core::Tensor;
use candle_nn::{Init, Module, VarBuilder};

pub use bag::{Bags, EmbeddingBag, Pooling, embedding_bag};

use crate::check;
use crate::error::{Error, Result};
use crate::table::Table;

/// `candle_nn`'s `Embedding`, with gradients of the rows that were looked up only.
///
/// ```text
/// forward(ids)[i, :] = weight[ids[i], :]
/// ```
///
/// The weight is `[rows, dim]`; ids have any shape and any integer dtype, and the result has their dimensions and
/// `dim`. Any id is an ordinary id. See [`Table`] for how its gradient reaches the optimizer; in a `VarBuilder` the weight
/// is called `weight`, as `candle_nn`'s, so files are interchangeable.
///
/// ```
/// use candle_adamax::{Adamax, ParamsAdamax, embedding};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let items = embedding(100_000, 16, vb.pp("items"))?;
/// let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax { lr: 0.1.into(), ..Default::default() })?;
///
/// let ids = Tensor::new(&[5u32, 77, 5], &Device::Cpu)?;
/// for _ in 0..200 {
///     optimizer.backward_step(&items.forward(&ids)?.sqr()?.mean_all()?)?;
/// }
/// assert!(items.forward(&ids)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    table: Table,
    options: Options,
}

/// What both layers can be told.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    padding: Option<u32>,
    max_norm: Option<f64>,
}

impl Options {
    fn padding_idx(&mut self, table: &Table, id: usize) -> Result<()> {
        let rows = table.rows();
        check::require(id < rows, "padding_idx", format!("an id below the {rows} rows"), id)?;
        table.pad(id as u32)?;
        self.padding = Some(id as u32);
        Ok(())
    }

    fn max_norm(&mut self, table: &Table, max_norm: f64) -> Result<()> {
        check::require(max_norm.is_finite() && max_norm > 0.0, "max_norm", "a finite number above 0", max_norm)?;
        for (holds, expected) in [
            (table.raw().is_variable(), "no limit for a weight that is not a variable, since it cannot be scaled"),
            (table.on_host(), "no limit for a weight on a device, since only those in host memory are scaled"),
        ] {
            check::require(holds, "max_norm", expected, max_norm)?;
        }
        self.max_norm = Some(max_norm);
        Ok(())
    }
}

fn matrix(weight: &Tensor) -> Result<Table> {
    if weight.rank() != 2 {
        return Err(Error::invalid("weight", "a matrix, [rows, dim]", format!("the shape {:?}", weight.dims())));
    }
    Table::new(weight)
}

impl Embedding {
    /// A layer on `weight`, `[rows, dim]`, which is trained if it is a variable.
    ///
    /// # Errors
    ///
    /// A weight that is not a matrix of f64, f32, f16 or bf16.
    pub fn new(weight: Tensor) -> Result<Self> {
        Ok(Self { table: matrix(&weight)?, options: Options::default() })
    }

    /// The row `id` gets no gradient: it stays as it is (PyTorch's `padding_idx`), unless it is above
    /// [`max_norm`](Self::max_norm). With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) decay spares it, too, unless it
    /// has had a gradient in another way. A lookup of padding alone is a gradient of zero, as in PyTorch: it counts as a step.
    ///
    /// # Errors
    ///
    /// An id that is not the number of a row.
    pub fn padding_idx(mut self, id: usize) -> Result<Self> {
        self.options.padding_idx(&self.table, id)?;
        Ok(self)
    }

    /// Rows whose L2 norm is above `max_norm` are scaled down to it when they are looked up (PyTorch's `max_norm`):
    ///
    /// ```text
    /// row = row * max_norm / (norm + 1e-7)    if norm > max_norm
    /// ```
    ///
    /// PyTorch writes the scaled rows into the weight at the lookup, and refuses the backward pass of a graph that has
    /// used the weight before. Here the lookup returns scaled rows and leaves the weight alone, so a weight that is
    /// also used densely (tied weights) has the gradient of the values that the graph has seen. The gradient of a
    /// scaled row goes to the row, without the factor, as in PyTorch. The rows that were looked up are scaled in the
    /// weight
    ///
    /// - by the next update of an optimizer that has a gradient for the weight, before it updates; a call that is
    ///   refused, skipped or only accumulated does not write it;
    /// - by [`Adamax::catch_up`](crate::Adamax::catch_up) and saving. [`Table::weight`] scales a copy.
    ///
    /// A row that was written in between, for instance by [`Table::set_rows`], stays as it was written. If several
    /// layers limit one row, the smallest limit holds in the weight, and each layer's own in its result. A layer
    /// without `max_norm` reads the weight as it is. The row of the padding is scaled as any other. What was looked up
    /// through a table is forgotten with the last layer, lookup and gradient of that table.
    ///
    /// # Errors
    ///
    /// A number that is not positive; a weight that is not a variable, or not in host memory.
    pub fn max_norm(mut self, max_norm: f64) -> Result<Self> {
        self.options.max_norm(&self.table, max_norm)?;
        Ok(self)
    }

    /// A layer over a weight that is not trained: PyTorch's `Embedding.from_pretrained`.
    ///
    /// ```
    /// use candle_adamax::Embedding;
    /// use candle_core::{Device, Tensor, Var};
    ///
    /// let pretrained = Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
    /// let layer = Embedding::frozen(pretrained.as_tensor())?;
    /// let rows = layer.lookup(&Tensor::new(&[1u32], &Device::Cpu)?)?;
    /// assert_eq!(rows.to_vec2::<f32>()?, [[3.0, 4.0]]);
    /// assert!(rows.sum_all()?.backward()?.get(&pretrained).is_none());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Embedding::new`].
    pub fn frozen(weight: &Tensor) -> Result<Self> {
        Self::new(weight.detach())
    }

    /// The rows of these ids: [`forward`](Module::forward), with the crate's error.
    ///
    /// # Errors
    ///
    /// Ids that are not integers; an id that is not the number of a row, which on a GPU is an error of the next step or
    /// lookup.
    pub fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        self.table.lookup_without(ids, self.options.padding, self.options.max_norm)
    }

    /// The weight, `[rows, dim]`, as [`Table::weight`] gives it.
    ///
    /// # Errors
    ///
    /// As [`Table::weight`].
    pub fn embeddings(&self) -> Result<Tensor> {
        self.table.weight()
    }

    /// The number of columns.
    pub fn hidden_size(&self) -> usize {
        self.table.row_len()
    }

    /// The table under it.
    pub fn table(&self) -> &Table {
        &self.table
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.lookup(ids)?)
    }
}

/// An [`Embedding`] of `rows` times `dim`, whose `weight` comes from `vb` or is drawn from a normal distribution of mean 0
/// and standard deviation 1, as `candle_nn`'s.
///
/// # Errors
///
/// As [`Embedding::new`], and what `vb` cannot give.
pub fn embedding(rows: usize, dim: usize, vb: VarBuilder<'_>) -> candle_core::Result<Embedding> {
    embedding_with_init(rows, dim, NORMAL, vb)
}

/// An [`Embedding`] whose `weight` comes from `vb` or is drawn as `init` says.
///
/// ```
/// use candle_adamax::embedding_with_init;
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarBuilder, VarMap};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let items = embedding_with_init(1000, 16, Init::Uniform { lo: -0.05, up: 0.05 }, vb.pp("items"))?;
/// assert!(items.embeddings()?.abs()?.max_all()?.to_scalar::<f32>()? <= 0.05);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
///
/// As [`embedding`].
pub fn embedding_with_init(rows: usize, dim: usize, init: Init, vb: VarBuilder<'_>) -> candle_core::Result<Embedding> {
    Ok(Embedding::new(weight(rows, dim, init, vb)?)?)
}

/// The initial values of `candle_nn::embedding`.
const NORMAL: Init = Init::Randn { mean: 0.0, stdev: 1.0 };

fn weight(rows: usize, dim: usize, init: Init, vb: VarBuilder<'_>) -> candle_core::Result<Tensor> {
    if rows.checked_mul(dim).is_none_or(|n| isize::try_from(n).is_err()) || u32::try_from(rows).is_err() {
        let error = Error::invalid("rows", "at most 4294967295 rows, and a table that fits into memory", rows);
        return Err(error.into());
    }
    vb.get_with_hints((rows, dim), "weight", init)
}
