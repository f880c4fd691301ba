//! Rows that are pooled: the items of a user, the words of a text.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor, bail};
use candle_nn::{Module, VarBuilder};

use super::{Options, matrix, weight};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel;
use crate::table::{Pooled, Table};

/// What becomes of the rows of a bag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
            let (name, expected) = ("offsets".to_owned(), "an integer dtype".to_owned());
            return Err(ErrorKind::DTypeMismatch { what: "offsets", name, expected, got: offsets.dtype() }.into());
        }
        let n = ids.elem_count();
        let offsets = offsets.to_device(&candle_core::Device::Cpu)?;
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
/// The weight is `[rows, dim]`, the result `[bags, dim]`; an empty bag is zeros. Sums are made in f32 (f64 for f64),
/// in the order of the ids, and rounded once. The rows themselves are never written out, but for `Max`.
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

    /// As [`Embedding::max_norm`](super::Embedding::max_norm).
    ///
    /// # Errors
    ///
    /// As [`Embedding::max_norm`](super::Embedding::max_norm).
    pub fn max_norm(mut self, max_norm: f64) -> Result<Self> {
        self.options.max_norm(&self.table, max_norm)?;
        Ok(self)
    }

    /// The weight, `[rows, dim]`.
    pub fn embeddings(&self) -> &Tensor {
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
                return Err(Error::invalid(
                    "weights",
                    "none, but for Pooling::Sum",
                    format!("Pooling::{:?}", self.pooling),
                ));
            }
            if weights.dtype() != dtype {
                let (name, expected) = ("bags".to_owned(), format!("{dtype:?}, as the table"));
                return Err(ErrorKind::DTypeMismatch { what: "weights", name, expected, got: weights.dtype() }.into());
            }
        }
        let all = self.table.read(ids)?;
        if u32::try_from(all.len().max(starts.len())).is_err() {
            return Err(Error::invalid("ids", "at most 4294967295 ids", all.len()));
        }
        let pooled = self.arrange(&all, starts, weights.as_ref())?;
        if !self.table.on_host() {
            return self.pool_dense(pooled);
        }
        match self.pooling {
            Pooling::Max => self.pool_max(pooled),
            Pooling::Sum | Pooling::Mean => self.table.pool(pooled),
        }
    }

    /// The ids without those of the padding, and which bags they are in.
    fn arrange(&self, all: &[u32], starts: &[usize], weights: Option<&Tensor>) -> Result<Pooled> {
        let factors: Option<Vec<f64>> = match weights {
            Some(weights) => Some(
                weights
                    .detach()
                    .to_device(&candle_core::Device::Cpu)?
                    .flatten_all()?
                    .to_dtype(DType::F64)?
                    .to_vec1()?,
            ),
            None => None,
        };
        let (mut ids, mut bags) = (Vec::with_capacity(all.len()), Vec::with_capacity(all.len()));
        let (mut kept, mut positions) = (Vec::new(), Vec::new());
        let mut begins = vec![0];
        for (bag, range) in starts.windows(2).enumerate() {
            for p in range[0]..range[1] {
                if Some(all[p]) == self.options.padding {
                    continue;
                }
                ids.push(all[p]);
                bags.push(bag as u32);
                if let Some(factors) = &factors {
                    kept.push(factors[p]);
                    positions.push(p as u32);
                }
            }
            begins.push(ids.len() as u32);
        }
        let factors = weights.map(|weights| (kept, weights.clone(), positions));
        let (mean, max_norm) = (self.pooling == Pooling::Mean, self.options.max_norm);
        Ok(Pooled { ids, starts: begins, bags, mean, factors, max_norm })
    }

    fn pool_max(&self, pooled: Pooled) -> Result<Tensor> {
        let Pooled { ids, starts, max_norm, .. } = pooled;
        let n = ids.len();
        let rows = self.table.lookup_without(&Tensor::from_vec(ids, n, &candle_core::Device::Cpu)?, None, max_norm)?;
        let op = Largest { starts, row_len: self.table.row_len(), positions: OnceLock::new() };
        Ok(rows.apply_op1(op)?)
    }

    /// In candle's operations on looked-up rows, for other devices than the CPU.
    fn pool_dense(&self, pooled: Pooled) -> Result<Tensor> {
        let Pooled { ids, starts, bags, mean, factors, .. } = pooled;
        let (weight, dim) = (self.table.raw(), self.table.row_len());
        let (device, n) = (weight.device(), ids.len());
        let zeros = || Tensor::zeros((starts.len() - 1, dim), weight.dtype(), device);
        if n == 0 {
            return Ok(zeros()?);
        }
        let mut rows = self.table.lookup(&Tensor::from_vec(ids, n, &candle_core::Device::Cpu)?)?;
        if self.pooling == Pooling::Max {
            let bag = |range: &[u32]| match (range[1] - range[0]) as usize {
                0 => Tensor::zeros(dim, weight.dtype(), device),
                n => rows.narrow(0, range[0] as usize, n)?.max(0),
            };
            return Ok(Tensor::stack(&starts.windows(2).map(bag).collect::<candle_core::Result<Vec<_>>>()?, 0)?);
        }
        if let Some((_, weights, positions)) = factors {
            let factors = weights.flatten_all()?.index_select(&Tensor::new(positions, device)?, 0)?;
            rows = rows.broadcast_mul(&factors.unsqueeze(1)?)?;
        }
        let sums = zeros()?.index_add(&Tensor::new(bags, device)?, &rows, 0)?;
        if !mean {
            return Ok(sums);
        }
        let counts = starts.windows(2).map(|range| f64::from((range[1] - range[0]).max(1))).collect();
        let counts = Tensor::from_vec(counts, (starts.len() - 1, 1), &candle_core::Device::Cpu)?;
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
    Ok(EmbeddingBag::new(weight(rows, dim, vb)?, pooling)?)
}

/// The largest of each column of each bag, of rows that have been looked up.
struct Largest {
    starts: Vec<u32>,
    row_len: usize,
    /// From which row each element of the result came.
    positions: OnceLock<Vec<u32>>,
}

impl CustomOp1 for Largest {
    fn name(&self) -> &'static str {
        "table-max"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (values, positions) = kernel::largest((rows, layout), self.row_len, &self.starts)?;
        self.positions.get_or_init(|| positions);
        Ok((values, (self.starts.len() - 1, self.row_len).into()))
    }

    fn bwd(&self, rows: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Some(positions) = self.positions.get() else { bail!("the backward pass of a maximum before its forward") };
        let grad = kernel::largest_backward(&grad.contiguous()?, self.row_len, positions, rows.dim(0)?)?;
        Ok(Some(Tensor::from_storage(Storage::Cpu(grad), rows.shape(), BackpropOp::none(), false)))
    }
}
