//! The model: embeddings of users and items, an MLP on top of them, and two heads.
//!
//! ```text
//! p       = user's embedding + mean of the embeddings, as history, of the items that the user rated last
//! q       = item's embedding
//! x       = MLP([p, q, p * q])                       `*` element by element
//! rating  = mean + x[0] + user's bias + item's bias
//! logit   =        x[1] + user's bias + item's bias + sum (p * q)        another two biases
//! ```
//!
//! The sum is the scalar product of plain matrix factorization, which the MLP is bad at learning by itself.
//!
//! Nearly all weights are in tables. With the crate's layers a step costs what the rows of its batch cost; with
//! `--dense`, candle's own are used, whose gradients are as large as the tables. The model is the same.

use anyhow::Result;
use candle_adamax::{Bags, Embedding, EmbeddingBag, Pooling};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, Init, Linear, Module, Sequential, VarMap, seq};
use rand::{Rng, rngs::StdRng};

use crate::settings::Settings;

/// Standard deviation of the embeddings at the start.
const EMBEDDING_DEVIATION: f64 = 0.1;

/// The model. Its weights are variables of the `VarMap` that it was made with.
pub(crate) struct Recommender {
    mean: f64,
    /// Where the tables want their ids.
    ids: Device,
    users: Table,
    items: Table,
    /// None if no item of the past is looked at.
    history: Option<History>,
    /// A column for each head.
    user_biases: Table,
    item_biases: Table,
    mlp: Sequential,
}

/// What the model says about pairs of a user and an item; each tensor has one element a pair.
pub(crate) struct Prediction {
    /// The rating that the user would give.
    pub(crate) ratings: Tensor,
    /// The higher, the likelier the user turns to the item; without a unit.
    pub(crate) logits: Tensor,
}

impl Recommender {
    /// A model on `device` for so many users and items, and `mean`, the mean of all ratings.
    pub(crate) fn new(
        settings: &Settings,
        device: &Device,
        (users, items): (usize, usize),
        mean: f64,
        varmap: &VarMap,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let &Settings { dim, hidden, history, dense, .. } = settings;
        let half = hidden.div_ceil(2);
        let mut weights = Weights { varmap: varmap.clone(), rng, device, dense };
        let mlp = seq()
            .add(weights.linear("mlp.0", 3 * dim, hidden, 2.0)?)
            .add(Activation::Relu)
            .add(weights.linear("mlp.1", hidden, half, 2.0)?)
            .add(Activation::Relu)
            .add(weights.linear("mlp.2", half, 2, 0.25)?);
        Ok(Self {
            mean,
            ids: if dense { device.clone() } else { Device::Cpu },
            users: weights.table("users.embedding", users, dim, EMBEDDING_DEVIATION)?,
            items: weights.table("items.embedding", items, dim, EMBEDDING_DEVIATION)?,
            user_biases: weights.table("users.bias", users, 2, 0.0)?,
            item_biases: weights.table("items.bias", items, 2, 0.0)?,
            history: (history > 0).then(|| weights.history("history", items, dim)).transpose()?,
            mlp,
        })
    }

    /// Ids to look up. Tables of rows have them read by the host, wherever the rows are; those on a GPU would have to
    /// be waited for. candle's own want them beside the table.
    pub(crate) fn ids(&self, ids: Vec<u32>) -> candle_core::Result<Tensor> {
        Tensor::new(ids, &self.ids)
    }

    /// The predictions for pairs of `users` and `items`, both [`ids`](Self::ids) of dimension `N`. `histories` has the
    /// items that the first users rated before; if it is shorter, it goes for those after them from the beginning
    /// again.
    pub(crate) fn forward(&self, users: &Tensor, items: &Tensor, histories: &[&[u32]]) -> Result<Prediction> {
        let (mut p, q) = (self.users.forward(users)?, self.items.forward(items)?);
        if let Some(history) = &self.history {
            let times = users.elem_count() / histories.len();
            p = (p + history.forward(histories)?.repeat((times, 1))?)?;
        }
        let product = (&p * &q)?;
        let heads = self.mlp.forward(&Tensor::cat(&[&p, &q, &product], 1)?)?;
        let heads = ((heads + self.user_biases.forward(users)?)? + self.item_biases.forward(items)?)?;
        let head = |index| heads.narrow(1, index, 1)?.squeeze(1);
        Ok(Prediction { ratings: (head(0)? + self.mean)?, logits: (head(1)? + product.sum(1)?)? })
    }
}

/// The layer of a table, of this crate or of candle.
type Table = Box<dyn Module>;

/// Rows of a table that are pooled, a row for each user.
enum History {
    Rows(EmbeddingBag),
    Dense(candle_nn::Embedding),
}

impl History {
    /// The mean of the rows of each list; zeros for an empty one.
    fn forward(&self, histories: &[&[u32]]) -> Result<Tensor> {
        let ids = histories.concat();
        let offsets = histories.iter().scan(0, |end, items| {
            let begin = *end;
            *end += items.len() as u32;
            Some(begin)
        });
        match self {
            Self::Rows(bag) => {
                let (ids, offsets) = (Tensor::new(ids, &Device::Cpu)?, Tensor::from_iter(offsets, &Device::Cpu)?);
                Ok(bag.pool(&Bags::offsets(&ids, &offsets)?)?)
            }
            Self::Dense(embedding) => {
                let device = embedding.embeddings().device();
                let bags = histories.len();
                let zeros = Tensor::zeros((bags, embedding.hidden_size()), DType::F32, device)?;
                if ids.is_empty() {
                    return Ok(zeros);
                }
                let rows = embedding.forward(&Tensor::new(ids, device)?)?;
                let bag_of = (0..).zip(histories).flat_map(|(bag, items)| items.iter().map(move |_| bag));
                let counts = histories.iter().map(|items| items.len().max(1) as f32);
                let sums = zeros.index_add(&Tensor::from_iter::<u32>(bag_of, device)?, &rows, 0)?;
                Ok(sums.broadcast_div(&Tensor::from_iter(counts, device)?.unsqueeze(1)?)?)
            }
        }
    }
}

/// Makes the layers, with weights that depend on nothing but the seed.
struct Weights<'r> {
    varmap: VarMap,
    rng: &'r mut StdRng,
    device: &'r Device,
    dense: bool,
}

impl Weights<'_> {
    /// A table with a row of `dim` numbers for each of `rows` ids.
    fn table(&mut self, name: &str, rows: usize, dim: usize, deviation: f64) -> Result<Table> {
        let weight = self.var(&format!("{name}.weight"), &[rows, dim], deviation)?;
        Ok(match self.dense {
            false => Box::new(Embedding::new(weight)?),
            true => Box::new(candle_nn::Embedding::new(weight, dim)),
        })
    }

    /// A table whose rows are pooled.
    fn history(&mut self, name: &str, rows: usize, dim: usize) -> Result<History> {
        let weight = self.var(&format!("{name}.weight"), &[rows, dim], EMBEDDING_DEVIATION)?;
        Ok(match self.dense {
            false => History::Rows(EmbeddingBag::new(weight, Pooling::Mean)?),
            true => History::Dense(candle_nn::Embedding::new(weight, dim)),
        })
    }

    /// A layer whose outputs have `gain` times the mean square of its inputs, at the start.
    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, gain: f64) -> Result<Linear> {
        let weight = self.var(&format!("{name}.weight"), &[outputs, inputs], (gain / inputs as f64).sqrt())?;
        let bias = self.var(&format!("{name}.bias"), &[outputs], 0.0)?;
        Ok(Linear::new(weight, Some(bias)))
    }

    /// A variable with uniform random numbers of this standard deviation.
    fn var(&mut self, name: &str, shape: &[usize], deviation: f64) -> Result<Tensor> {
        let bound = 3f64.sqrt() * deviation;
        let mut number = || (bound * self.rng.random_range(-1.0..1.0)) as f32;
        let numbers = (0..shape.iter().product()).map(|_| number()).collect();
        let var = self.varmap.get(shape, name, Init::Const(0.0), DType::F32, self.device)?;
        self.varmap.set_one(name, Tensor::from_vec(numbers, shape, self.device)?)?;
        Ok(var)
    }
}

#[cfg(test)]
mod tests {
    use candle_adamax::{Adamax, ParamsAdamax};
    use candle_core::Var;

    use super::*;

    #[test]
    fn both_kinds_of_histories_have_the_same_means_and_gradients() -> Result<()> {
        let weights = Tensor::arange(0f32, 10.0, &Device::Cpu)?.reshape((5, 2))?;
        for dense in [false, true] {
            let var = Var::from_tensor(&weights)?;
            let weight = var.as_tensor().clone();
            let history = match dense {
                false => History::Rows(EmbeddingBag::new(weight, Pooling::Mean)?),
                true => History::Dense(candle_nn::Embedding::new(weight, 2)),
            };
            let pooled = history.forward(&[&[4, 0], &[], &[4, 2]])?;
            assert_eq!(pooled.to_vec2::<f32>()?, [[4.0, 5.0], [0.0, 0.0], [6.0, 7.0]], "dense: {dense}");

            // After one step u is the magnitude of the gradient: a half for each place in a history of two.
            let mut optimizer = Adamax::from_named([("history", var)], ParamsAdamax::default())?;
            optimizer.backward_step(&pooled.sum_all()?)?;
            let gradients = optimizer.state("history")?.exp_inf.to_vec2::<f32>()?;
            assert_eq!(gradients, [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]], "dense: {dense}");

            assert_eq!(history.forward(&[&[], &[]])?.to_vec2::<f32>()?, [[0.0; 2]; 2], "dense: {dense}");
        }
        Ok(())
    }
}
