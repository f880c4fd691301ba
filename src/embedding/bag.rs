//! Rows that are pooled: the items of a user, the words of a text.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor, bail};
use candle_nn::{Module, VarBuilder};

use super::{Options, matrix, weight};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel;
use crate::table::{Pooled, PooledIds, Table};

/// How the rows of a bag are pooled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their sum.
    Sum,
    /// Their mean.
    #[default]
    Mean,
    /// The largest of each column; the gradient goes to the first of several.
    Max,
}

/// Which ids are pooled together.
///
/// ```
/// use candle_adamax::Bags;
/// use candle_core::{Device, Tensor};
///
/// // Two bags of two ids each.
/// Bags::batch(&Tensor::new(&[[1u32, 2], [3, 4]], &Device::Cpu)?)?;
/// // Three bags: [1, 2, 3], none, [4].
/// let ids = Tensor::new(&[1u32, 2, 3, 4], &Device::Cpu)?;
/// Bags::offsets(&ids, &Tensor::new(&[0u32, 3, 3], &Device::Cpu)?)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Bags {
    ids: Tensor,
    /// The ids of bag b are those from `starts[b]` to `starts[b + 1]`.
    starts: Vec<usize>,
    weights: Option<Tensor>,
}

impl Bags {
    /// Every row of `ids`, `[bags, n]` of any integer dtype, is a bag.
    ///
    /// # Errors
    ///
    /// Ids that are not a matrix.
    pub fn batch(ids: &Tensor) -> Result<Self> {
        let [bags, n] = ids.dims() else {
            return Err(Error::invalid("ids", "a matrix, [bags, n]", format!("{:?}", ids.dims())));
        };
        let starts = (0..=*bags).map(|bag| bag * n).collect();
        Ok(Self { ids: ids.clone(), starts, weights: None })
    }

    /// Bag b has the `ids`, `[n]`, from `offsets[b]` to the next offset, and the last bag those to the end. Bags may be
    /// empty.
    ///
    /// # Errors
    ///
    /// Offsets that do not begin with 0, go backwards or beyond the ids, or are not integers; shapes that are not `[n]`.
    pub fn offsets(ids: &Tensor, offsets: &Tensor) -> Result<Self> {
        for (field, tensor) in [("ids", ids), ("offsets", offsets)] {
            if tensor.rank() != 1 {
                return Err(Error::invalid(field, "a row, [n]", format!("{:?}", tensor.dims())));
            }
        }
        if !offsets.dtype().is_int() {
            let (name, expected) = (String::new(), "an integer dtype".to_owned());
            return Err(ErrorKind::DTypeMismatch { what: "offsets", name, expected, got: offsets.dtype() }.into());
        }
        let n = ids.elem_count();
        let offsets = offsets.to_device(&Device::Cpu)?;
        let offsets = match offsets.dtype() {
            // Not through i64, whose conversion from some dtypes candle does not have.
            DType::U32 => offsets.to_vec1::<u32>()?.into_iter().map(i64::from).collect(),
            DType::U8 => offsets.to_vec1::<u8>()?.into_iter().map(i64::from).collect(),
            DType::I16 => offsets.to_vec1::<i16>()?.into_iter().map(i64::from).collect(),
            DType::I32 => offsets.to_vec1::<i32>()?.into_iter().map(i64::from).collect(),
            _ => offsets.to_vec1::<i64>()?,
        };
        let mut starts = Vec::with_capacity(offsets.len() + 1);
        for (bag, &offset) in offsets.iter().enumerate() {
            let expected = match starts.last() {
                None if offset != 0 => "0, where the first bag begins".to_owned(),
                Some(&before) if offset < before as i64 => format!("at least {before}, where the bag before begins"),
                _ if offset > n as i64 => format!("at most {n}, the number of ids"),
                _ => {
                    starts.push(offset as usize);
                    continue;
                }
            };
            return Err(Error::invalid(format!("offsets[{bag}]"), expected, offset));
        }
        if starts.is_empty() && n > 0 {
            return Err(Error::invalid("offsets", format!("an offset for the bag of the {n} ids"), "none"));
        }
        starts.push(n);
        Ok(Self { ids: ids.clone(), starts, weights: None })
    }

    /// Every row is multiplied with its weight before it is summed; for [`Pooling::Sum`]. The weights have the shape of
    /// the ids and the dtype of the table, and get their gradient.
    ///
    /// # Errors
    ///
    /// Weights of another shape than the ids.
    pub fn weights(mut self, weights: &Tensor) -> Result<Self> {
        if weights.shape() != self.ids.shape() {
            let (expected, got) = (self.ids.dims().to_vec(), weights.dims().to_vec());
            let name = "bags".to_owned();
            return Err(ErrorKind::ShapeMismatch { what: "weights", name, expected, got }.into());
        }
        self.weights = Some(weights.clone());
        Ok(self)
    }
}

/// Rows of a table, pooled by bags: PyTorch's `EmbeddingBag`.
///
/// ```text
/// pool(bags)[b, :] = sum over the ids p of bag b: weight[ids[p], :]         Sum; times weights[p], where there are some
///                    the same, divided by the number of ids                 Mean
///                    the largest of each column                             Max
/// ```
///
/// The weight is `[rows, dim]`, the result `[bags, dim]`; an empty bag is zeros. Where all bags are empty the weight
/// has no gradient. Sums are made in f32 (f64 for f64), in the order of the ids, and rounded once. The rows themselves
/// are written out only for `Max`, for `max_norm`, and for weights of ids that need a gradient, which is that of the
/// rows as they were looked up.
///
/// ```
/// use candle_adamax::{Bags, EmbeddingBag, Pooling};
/// use candle_core::{Device, Tensor, Var};
///
/// let weight = Var::new(&[[1f32, 1.0], [2.0, 3.0], [5.0, 7.0]], &Device::Cpu)?;
/// let bag = EmbeddingBag::new(weight.as_tensor().clone(), Pooling::Sum)?;
/// let ids = Tensor::new(&[0u32, 2, 1], &Device::Cpu)?;
/// let pooled = bag.pool(&Bags::offsets(&ids, &Tensor::new(&[0u32, 2], &Device::Cpu)?)?)?;
/// assert_eq!(pooled.to_vec2::<f32>()?, [[6.0, 8.0], [2.0, 3.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EmbeddingBag {
    table: Table,
    pooling: Pooling,
    options: Options,
}

impl EmbeddingBag {
    /// A layer on `weight`, `[rows, dim]`, which is trained if it is a variable.
    ///
    /// # Errors
    ///
    /// A weight that is not a matrix of f64, f32, f16 or bf16.
    pub fn new(weight: Tensor, pooling: Pooling) -> Result<Self> {
        Ok(Self { table: matrix(&weight)?, pooling, options: Options::default() })
    }

    /// The id `id` is left out of every bag, as if it were not there (PyTorch's `padding_idx`).
    ///
    /// # Errors
    ///
    /// An id that is not the number of a row.
    pub fn padding_idx(mut self, id: usize) -> Result<Self> {
        self.options.padding_idx(&self.table, id)?;
        Ok(self)
    }

    /// As [`Embedding::max_norm`](super::Embedding::max_norm), before the rows are pooled. The row of the padding is in
    /// no bag, and is scaled all the same where its id is given.
    ///
    /// # Errors
    ///
    /// As [`Embedding::max_norm`](super::Embedding::max_norm).
    pub fn max_norm(mut self, max_norm: f64) -> Result<Self> {
        self.options.max_norm(&self.table, max_norm)?;
        Ok(self)
    }

    /// The weight, `[rows, dim]`, as [`Table::weight`] gives it.
    ///
    /// # Errors
    ///
    /// As [`Table::weight`].
    pub fn embeddings(&self) -> Result<Tensor> {
        self.table.weight()
    }

    /// The table under it.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// One row for each bag: `[bags, dim]`.
    ///
    /// # Errors
    ///
    /// An id that is not the number of a row, ids that are not integers; weights of another dtype than the table, or
    /// with another pooling than the sum.
    pub fn pool(&self, bags: &Bags) -> Result<Tensor> {
        let Bags { ids, starts, weights } = bags;
        let dtype = self.table.raw().dtype();
        if let Some(weights) = weights {
            if self.pooling != Pooling::Sum {
                let expected = "no weights with this pooling, since only Pooling::Sum takes any";
                return Err(Error::invalid("weights", expected, format!("weights with Pooling::{:?}", self.pooling)));
            }
            if weights.dtype() != dtype {
                let (name, expected) = ("bags".to_owned(), format!("{dtype:?}, as the table"));
                return Err(ErrorKind::DTypeMismatch { what: "weights", name, expected, got: weights.dtype() }.into());
            }
        }
        if u32::try_from(ids.elem_count().max(starts.len())).is_err() {
            return Err(Error::invalid("ids", "at most 4294967295 ids", ids.elem_count()));
        }
        let pooled = self.arrange(ids, starts, weights.as_ref())?;
        if !kernel::has_lookups(self.table.raw()) {
            return self.pool_dense(pooled);
        }
        let padding = pooled.padding.zip(pooled.max_norm);
        let pooled = match self.pooling {
            Pooling::Max => self.pool_max(pooled),
            Pooling::Sum | Pooling::Mean => self.table.pool(pooled),
        }?;
        // In no bag, and scaled down all the same: as in PyTorch.
        if let Some((row, max_norm)) = padding {
            self.table.limit(row, max_norm)?;
        }
        Ok(pooled)
    }

    /// The ids without those of the padding, and which bags they are in. Ids on the table's GPU stay there, unless some are to
    /// be left out.
    fn arrange(&self, ids: &Tensor, starts: &[usize], weights: Option<&Tensor>) -> Result<Pooled> {
        let (table, padding) = (self.table.raw(), self.options.padding);
        let (mean, max_norm) = (self.pooling == Pooling::Mean, self.options.max_norm);
        let factors = weights.map(Tensor::flatten_all).transpose()?;
        let stays = padding.is_none() && !ids.device().is_cpu() && ids.device().same_device(table.device());
        if stays && kernel::has_lookups(table) && ids.dtype().is_int() {
            let starts = starts.iter().map(|&start| start as u32).collect();
            let ids = PooledIds::Gpu(ids.flatten_all()?);
            // The GPU finds the bags by itself.
            return Ok(Pooled { ids, starts, bags: Vec::new(), mean, factors, max_norm, padding: None });
        }
        let all = self.table.read(ids)?;
        let (mut kept, mut bags) = (Vec::with_capacity(all.len()), Vec::with_capacity(all.len()));
        let (mut positions, mut begins) = (Vec::new(), vec![0]);
        for (bag, range) in (0..).zip(starts.windows(2)) {
            for p in (range[0]..range[1]).filter(|&p| Some(all[p]) != padding) {
                kept.push(all[p]);
                bags.push(bag);
                positions.push(p as u32);
            }
            begins.push(kept.len() as u32);
        }
        let factors = match factors {
            Some(factors) if positions.is_empty() => Some(factors.narrow(0, 0, 0)?),
            Some(factors) if positions.len() < all.len() => {
                Some(factors.index_select(&Tensor::from_vec::<_, u32>(positions, kept.len(), factors.device())?, 0)?)
            }
            factors => factors,
        };
        let padding = padding.filter(|_| kept.len() < all.len());
        Ok(Pooled { ids: PooledIds::Host(kept), starts: begins, bags, mean, factors, max_norm, padding })
    }

    fn pool_max(&self, pooled: Pooled) -> Result<Tensor> {
        let Pooled { ids, starts, max_norm, .. } = pooled;
        let rows = self.table.lookup_without(&ids.into_tensor()?, None, max_norm)?;
        let op = Largest { starts, row_len: self.table.row_len(), positions: OnceLock::new() };
        Ok(rows.apply_op1(op)?)
    }

    /// In candle's operations on looked-up rows, for devices on which no kernel of this crate runs.
    fn pool_dense(&self, pooled: Pooled) -> Result<Tensor> {
        let Pooled { ids, starts, bags, mean, factors, .. } = pooled;
        let (weight, dim) = (self.table.raw(), self.table.row_len());
        let device = weight.device();
        let zeros = || Tensor::zeros((starts.len() - 1, dim), weight.dtype(), device);
        if bags.is_empty() {
            return Ok(zeros()?);
        }
        let mut rows = self.table.lookup(&ids.into_tensor()?)?;
        if self.pooling == Pooling::Max {
            let bag = |range: &[u32]| match (range[1] - range[0]) as usize {
                0 => Tensor::zeros(dim, weight.dtype(), device),
                n => rows.narrow(0, range[0] as usize, n)?.max(0),
            };
            return Ok(Tensor::stack(&starts.windows(2).map(bag).collect::<candle_core::Result<Vec<_>>>()?, 0)?);
        }
        if let Some(factors) = factors {
            rows = rows.broadcast_mul(&factors.unsqueeze(1)?)?;
        }
        let sums = zeros()?.index_add(&Tensor::new(bags, device)?, &rows, 0)?;
        if !mean {
            return Ok(sums);
        }
        let counts = starts.windows(2).map(|range| f64::from((range[1] - range[0]).max(1))).collect();
        let counts = Tensor::from_vec(counts, (starts.len() - 1, 1), &Device::Cpu)?;
        Ok(sums.broadcast_div(&counts.to_dtype(weight.dtype())?.to_device(device)?)?)
    }
}

impl Module for EmbeddingBag {
    /// The bags are the rows of `ids`: `[bags, n]` gives `[bags, dim]`.
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.pool(&Bags::batch(ids)?)?)
    }
}

/// An [`EmbeddingBag`] of `rows` times `dim`, whose `weight` comes from `vb` or is drawn as that of
/// [`embedding`](super::embedding()).
///
/// # Errors
///
/// As [`EmbeddingBag::new`], and what `vb` cannot give.
pub fn embedding_bag(
    rows: usize,
    dim: usize,
    pooling: Pooling,
    vb: VarBuilder<'_>,
) -> candle_core::Result<EmbeddingBag> {
    Ok(EmbeddingBag::new(weight(rows, dim, super::NORMAL, vb)?, pooling)?)
}

/// The largest of each column of each bag, of rows that have been looked up.
struct Largest {
    starts: Vec<u32>,
    row_len: usize,
    /// From which row each element of the result came.
    positions: OnceLock<Positions>,
}

enum Positions {
    Host(Vec<u32>),
    #[cfg(feature = "cuda")]
    Gpu(kernel::GpuRows),
}

impl Largest {
    fn shape(&self) -> Shape {
        (self.starts.len() - 1, self.row_len).into()
    }
}

impl CustomOp1 for Largest {
    fn name(&self) -> &'static str {
        "table-max"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (values, positions) = kernel::largest((rows, layout), self.row_len, &self.starts)?;
        self.positions.get_or_init(|| Positions::Host(positions));
        Ok((values, self.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, rows: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some((start, _)) = layout.contiguous_offsets() else { bail!("expected contiguous rows, got {layout:?}") };
        let (values, positions) = kernel::gpu::largest((rows, start), self.row_len, &self.starts)?;
        self.positions.get_or_init(|| Positions::Gpu(positions));
        Ok((values, self.shape()))
    }

    fn bwd(&self, rows: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (grad, n) = (grad.contiguous()?, rows.dim(0)?);
        let grad = match self.positions.get() {
            Some(Positions::Host(positions)) => {
                Storage::Cpu(kernel::largest_backward(&grad, self.row_len, positions, n)?)
            }
            #[cfg(feature = "cuda")]
            Some(Positions::Gpu(positions)) => {
                Storage::Cuda(kernel::gpu::largest_backward(&grad, self.row_len, positions, n)?)
            }
            None => bail!("the backward pass of a maximum before its forward"),
        };
        Ok(Some(Tensor::from_storage(grad, rows.shape(), BackpropOp::none(), false)))
    }
}
