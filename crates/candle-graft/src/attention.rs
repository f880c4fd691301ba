//! Attention.

use candle_core::{Device, Result, Tensor, bail};

use crate::kernel::probabilities::Scores;
use crate::{check, composed, probabilities};

const NAME: &str = "attention";

/// The keys that a query does not attend to, as an argument of [`attention`].
#[derive(Clone, Debug, Default)]
pub enum Mask {
    /// Every query attends to every key.
    #[default]
    None,
    /// The query at `i` attends to the keys up to and including `i + kv_offset`.
    Causal {
        /// The number of keys before the first query.
        kv_offset: usize,
    },
    /// A tensor that is added to the scores, and that may be tracked. It has a floating point type and a shape that can
    /// be broadcast to `(b, h, s, s_kv)`. Minus infinity hides a key.
    Tensor(Tensor),
}

/// [Scaled dot product attention](https://arxiv.org/abs/1706.03762): `softmax(q * k^T * scale + mask) * v` for each
/// head.
///
/// The shapes are `(b, h, s, d)` for `q`, `(b, h_kv, s_kv, d)` for `k`, `(b, h_kv, s_kv, d_v)` for `v`, and `(b, h, s,
/// d_v)` for the result. Heads of queries may share heads of keys and values, as in [grouped-query
/// attention](https://arxiv.org/abs/2305.13245): `h` is a multiple of `h_kv`, and the keys are not copied for each
/// head.
///
/// With a `softcap`, a product `x = q * k^T * scale` becomes `softcap * tanh(x / softcap)` before the mask is added, as
/// in [Gemma 2](https://arxiv.org/abs/2408.00118). With `alibi_slopes`, of shape `(h)`, the score of the query at `i`
/// for the key at `j` is reduced by `slope * |i + offset - j|`, as in [ALiBi](https://arxiv.org/abs/2108.12409). The
/// offset is `kv_offset` of a causal mask, and `s_kv - s` otherwise.
///
/// A query that sees no key, since its mask is minus infinity everywhere, has zeros as its result, and gradients of 0.
///
/// All arguments are differentiable, a mask and slopes included. The probabilities, of shape `(b, h, s, s_kv)`, are
/// kept for the backward pass; with a `softcap` the products are computed once more there.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_graft::{Mask, attention};
///
/// # fn main() -> candle_core::Result<()> {
/// let [q, k, v] = [(1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)].map(|shape| Var::randn(0f32, 1.0, shape, &Device::Cpu));
/// let (q, k, v) = (q?, k?, v?);
/// // Two keys have been seen before the three queries.
/// let mask = Mask::Causal { kv_offset: 2 };
/// let y = attention(&q, &k, &v, 8f64.powf(-0.5), &mask, None, None)?;
/// assert_eq!(y.dims(), [1, 4, 3, 8]);
/// let grads = y.sqr()?.sum_all()?.backward()?;
/// for var in [&q, &k, &v] {
///     assert!(grads.get(var).is_some());
/// }
/// # Ok(())
/// # }
/// ```
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: &Mask,
    softcap: Option<f64>,
    alibi_slopes: Option<&Tensor>,
) -> Result<Tensor> {
    check::float(NAME, "q", q)?;
    check::like(NAME, ("q", q), ("k", k))?;
    check::like(NAME, ("q", q), ("v", v))?;
    let (b, h, s, d) = check::dims4(NAME, "q", q, "(b, h, s, d)")?;
    let (_, h_kv, s_kv, _) = check::dims4(NAME, "k", k, "(b, h_kv, s_kv, d)")?;
    check::shape(NAME, "k", k, &[b, h_kv, s_kv, d])?;
    let (_, _, _, d_v) = check::dims4(NAME, "v", v, "(b, h_kv, s_kv, d_v)")?;
    check::shape(NAME, "v", v, &[b, h_kv, s_kv, d_v])?;
    if h_kv == 0 || h % h_kv != 0 {
        bail!("{NAME}: q has {h} heads, but must have a multiple of the {h_kv} heads of k and v");
    }
    if let Some(cap) = softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
        bail!("{NAME}: softcap is {cap}, but must be a positive number");
    }
    let dtype = composed::wide(q.dtype());
    let wide = |x: &Tensor| x.to_dtype(dtype)?.contiguous();
    // Query heads that share a head of keys are rows of one matrix.
    let grouped = if h == h_kv { wide(q)? } else { wide(q)?.reshape((b, h_kv, h / h_kv * s, d))? };
    let causal = match *mask {
        Mask::Causal { kv_offset } => Some(kv_offset),
        _ => None,
    };
    let bias = bias(mask, alibi_slopes, [b, h, s, s_kv], &grouped)?;
    let scores = Scores { scale, softcap, causal, heads: h, queries: s, keys: s_kv };
    let (k, v) = (wide(k)?, wide(v)?);
    let y = if q.device().is_cpu() {
        probabilities::weigh_on_cpu(&probabilities::on_cpu(&grouped, &k, bias.as_ref(), scores)?, &v)?
    } else {
        probabilities::composed(&grouped, &k, bias.as_ref(), scores)?.matmul(&v)?
    };
    let y = if h == h_kv { y } else { y.reshape((b, h, s, d_v))? };
    y.to_dtype(q.dtype())
}

/// What is added to the scores: a tensor of four dimensions, the last of which is that of the keys, like `q` in type.
fn bias(mask: &Mask, alibi_slopes: Option<&Tensor>, shape: [usize; 4], q: &Tensor) -> Result<Option<Tensor>> {
    let [_, h, s, s_kv] = shape;
    let mask_bias = match mask {
        Mask::Tensor(mask) => {
            check::float(NAME, "the mask", mask)?;
            check::like(NAME, ("q", q), ("the mask", &mask.to_dtype(q.dtype())?))?;
            let missing = 4usize.saturating_sub(mask.rank());
            let dims: Vec<usize> = std::iter::repeat_n(1, missing).chain(mask.dims().iter().copied()).collect();
            if dims.len() > 4 || dims.iter().zip(shape).any(|(&dim, to)| dim != to && dim != 1) {
                bail!("{NAME}: the shape of the mask is {:?}, but must be broadcast to {shape:?}", mask.dims());
            }
            let mask = mask.to_dtype(q.dtype())?.reshape(&*dims)?;
            Some(if dims[3] == s_kv { mask } else { mask.broadcast_as((dims[0], dims[1], dims[2], s_kv))? })
        }
        _ => None,
    };
    let Some(slopes) = alibi_slopes else { return Ok(mask_bias) };
    check::shape(NAME, "alibi_slopes", slopes, &[h])?;
    let slopes = slopes.to_dtype(q.dtype())?;
    check::like(NAME, ("q", q), ("alibi_slopes", &slopes))?;
    let offset = match *mask {
        Mask::Causal { kv_offset } => kv_offset as f64,
        _ => s_kv as f64 - s as f64,
    };
    let distances = (0..s * s_kv).map(|at| -((at / s_kv) as f64 + offset - (at % s_kv) as f64).abs());
    let distances = Tensor::from_iter(distances, &Device::Cpu)?.reshape((1, 1, s, s_kv))?;
    let distances = distances.to_dtype(q.dtype())?.to_device(q.device())?;
    let alibi = slopes.reshape((1, h, 1, 1))?.broadcast_mul(&distances)?;
    Ok(Some(match mask_bias {
        Some(mask) => mask.broadcast_add(&alibi)?,
        None => alibi,
    }))
}

/// The slopes of [ALiBi](https://arxiv.org/abs/2108.12409) for each of the heads, as [`attention`] takes them:
/// `2^(-max_bias * i / n)` for i from 1, where n is the least power of two that is not less than the number of heads.
///
/// They are those of candle-nn's `flash_attn` for its argument `max_bias`, which is 8 in the paper.
///
/// ```
/// use candle_core::Device;
/// use candle_graft::alibi_slopes;
///
/// # fn main() -> candle_core::Result<()> {
/// let slopes = alibi_slopes(4, 8.0, &Device::Cpu)?;
/// assert_eq!(slopes.to_vec1::<f32>()?, [1.0 / 4.0, 1.0 / 16.0, 1.0 / 64.0, 1.0 / 256.0]);
/// # Ok(())
/// # }
/// ```
pub fn alibi_slopes(heads: usize, max_bias: f64, device: &Device) -> Result<Tensor> {
    let n = heads.next_power_of_two() as f64;
    let slopes = (1..=heads).map(|i| (-max_bias * i as f64 / n).exp2() as f32);
    Tensor::from_iter(slopes, device)
}
