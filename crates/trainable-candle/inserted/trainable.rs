//! Paths for tensors that need a gradient. Written by trainable-candle; the other files of candle-nn call it.

use candle::{bail, DType, Result, Tensor};
use candle_graft::{alibi_slopes, attention, Mask};

use crate::attention::AttnMask;

/// Whether a result of these arguments belongs to a graph.
pub(crate) fn tracked<const N: usize>(args: [&Tensor; N]) -> bool {
    args.iter().any(|arg| arg.track_op())
}

/// Fails where an argument of a function without a backward pass belongs to a graph.
pub(crate) fn inference_only(function: &str, args: &[Option<&Tensor>]) -> Result<()> {
    if args.iter().flatten().any(|arg| arg.track_op()) {
        bail!("{function} has no backward pass, but an argument needs one: detach the arguments for inference")
    }
    Ok(())
}

/// The cached tensor with a new one behind it, which keeps the graphs of both.
pub(crate) fn appended(cached: Option<&Tensor>, new: &Tensor, dim: usize) -> Result<Tensor> {
    match cached {
        Some(cached) if cached.dim(dim)? > 0 => Tensor::cat(&[cached, new], dim),
        _ => new.contiguous(),
    }
}

/// `attention::flash_attn` with a graph; none where no argument belongs to one.
pub(crate) fn flash_attn(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    mask: &AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Option<Tensor>> {
    let added = match mask {
        AttnMask::Mask(added) => Some(added),
        AttnMask::None | AttnMask::Causal { .. } => None,
    };
    if !tracked([q, k, v, added.unwrap_or(q)]) {
        return Ok(None);
    }
    let (b, s, h, _) = q.dims4()?;
    let s_kv = k.dim(1)?;
    // The kernels read 0 as absent.
    let softcap = softcap.filter(|&cap| cap != 0.0).map(f64::from);
    let max_bias = max_bias.filter(|&bias| bias > 0.0);
    let slopes = max_bias.map(|max_bias| alibi_slopes(h, max_bias.into(), q.device())).transpose()?;
    // Kernels for one query or for several sequences take the queries as the last positions, whatever the offset is.
    let last = b > 1 || s == 1;
    let (mask, slopes) = match mask {
        AttnMask::None => (Mask::None, slopes.filter(|_| b > 1)),
        AttnMask::Causal { .. } if last && s_kv < s => {
            bail!("flash_attn: causal attention of {s} queries needs as many keys, but there are {s_kv}")
        }
        AttnMask::Causal { kv_offset } => {
            let kv_offset = if last { s_kv - s } else { *kv_offset };
            (Mask::Causal { kv_offset }, slopes)
        }
        // With ALiBi the kernel scales the mask, and adds no distances.
        AttnMask::Mask(added) => {
            let added = added.reshape((1, 1, s, s_kv))?;
            let added = match slopes {
                Some(slopes) => {
                    added.broadcast_mul(&slopes.to_dtype(added.dtype())?.reshape((1, h, 1, 1))?)?
                }
                None => added,
            };
            (Mask::Tensor(added), None)
        }
    };
    // The kernels for one sequence return f32, whatever they are given.
    let to_f32 = |x: &Tensor| if b == 1 && x.dtype() != DType::F64 { x.to_dtype(DType::F32) } else { Ok(x.clone()) };
    let [q, k, v] = [q, k, v].map(|x| to_f32(&x.transpose(1, 2)?));
    let result = attention(&q?, &k?, &v?, scale.into(), &mask, softcap, slopes.as_ref())?;
    Ok(Some(if b == 1 { result.to_dtype(DType::F32)? } else { result }))
}

/// `attention::flash_attn_varlen_cpu` with a graph; none where no argument belongs to one.
#[allow(clippy::too_many_arguments)]
pub(crate) fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    scale: f32,
    causal: bool,
    window: (Option<usize>, Option<usize>),
) -> Result<Option<Tensor>> {
    if !tracked([q, k, v, slopes.unwrap_or(q)]) {
        return Ok(None);
    }
    // To the left, and to the right.
    let window = match window {
        (None, None) => None,
        (Some(left), right) => Some((left, right.unwrap_or(0))),
        (None, Some(right)) => bail!("flash_attn_varlen: window_right is {right}, but window_left is missing"),
    };
    let (seqlens_q, seqlens_k) = (seqlens_q.to_vec1::<u32>()?, seqlens_k.to_vec1::<u32>()?);
    if seqlens_q.len() != seqlens_k.len() {
        bail!("flash_attn_varlen: {} lengths of queries, but {} of keys", seqlens_q.len(), seqlens_k.len())
    }
    for (what, seqlens, x) in [("q", &seqlens_q, q), ("k", &seqlens_k, k), ("v", &seqlens_k, v)] {
        let total: usize = seqlens.iter().map(|&len| len as usize).sum();
        if total != x.dim(0)? {
            bail!("flash_attn_varlen: the lengths add up to {total}, but {what} has {} rows", x.dim(0)?)
        }
    }
    let (mut start_q, mut start_k) = (0, 0);
    let mut results = Vec::with_capacity(seqlens_q.len());
    for (&s, &s_kv) in seqlens_q.iter().zip(&seqlens_k) {
        let (s, s_kv) = (s as usize, s_kv as usize);
        let sequence = |x: &Tensor, start, len| x.narrow(0, start, len)?.transpose(0, 1)?.unsqueeze(0);
        let (q, k, v) = (sequence(q, start_q, s)?, sequence(k, start_k, s_kv)?, sequence(v, start_k, s_kv)?);
        (start_q, start_k) = (start_q + s, start_k + s_kv);
        if causal && s_kv < s {
            bail!("flash_attn_varlen: causal attention of {s} queries needs as many keys, but there are {s_kv}")
        }
        if s == 0 {
            continue;
        }
        let mask = match window {
            None if causal => Mask::Causal { kv_offset: s_kv - s },
            None => Mask::None,
            Some((left, right)) => {
                let right = if causal { 0 } else { right };
                let seen = |i: usize, j: usize| j + s + left >= i + s_kv && j + s <= i + s_kv + right;
                let added = |at| if seen(at / s_kv, at % s_kv) { 0f32 } else { f32::NEG_INFINITY };
                let added: Vec<f32> = (0..s * s_kv).map(added).collect();
                Mask::Tensor(Tensor::from_vec(added, (1, 1, s, s_kv), q.device())?)
            }
        };
        let result = if s_kv == 0 { q.zeros_like()? } else { attention(&q, &k, &v, scale.into(), &mask, None, slopes)? };
        results.push(result.squeeze(0)?.transpose(0, 1)?);
    }
    match results.is_empty() {
        true => q.zeros_like().map(Some),
        false => Tensor::cat(&results, 0)?.contiguous().map(Some),
    }
}

/// `ops::sdpa` with a graph; none where no argument belongs to one.
pub(crate) fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Option<Tensor>> {
    if !tracked([q, k, v, mask.unwrap_or(q)]) {
        return Ok(None);
    }
    let (s, s_kv) = (q.dim(2)?, k.dim(2)?);
    let mask = match mask {
        None if causal && s_kv < s => bail!("sdpa: causal attention of {s} queries needs as many keys, but there are {s_kv}"),
        None if causal => Mask::Causal { kv_offset: s_kv - s },
        None => Mask::None,
        Some(_) if causal => bail!("sdpa: a mask and do_causal: give a mask that hides the later keys, too"),
        Some(mask) => Mask::Tensor(mask.clone()),
    };
    // 1 stands for none.
    let softcap = Some(f64::from(softcapping)).filter(|&cap| cap != 1.0);
    attention(q, k, v, scale.into(), &mask, softcap, None).map(Some)
}
