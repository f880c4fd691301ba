//! Rotary position embeddings.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{self, by_type};
use crate::kernel::rope::{Pairs, rotate};
use crate::{check, composed};

/// [Rotary position embeddings](https://arxiv.org/abs/2104.09864) of the pairs `x1 = x[i]` and `x2 = x[i + d / 2]` of
/// each head: `(x1 * cos - x2 * sin, x1 * sin + x2 * cos)`.
///
/// `x` has the shape `(b, h, t, d)`: sequences, heads, positions, and an even number of elements. `cos` and `sin` have
/// the shape `(n, d / 2)`, or `(b, n, d / 2)` where each sequence has its own; `n` is at least `t`, and further rows
/// are not used.
///
/// The gradient of `x` is the gradient of the result, rotated by the opposite angle. Where `cos` or `sin` is tracked,
/// the function is a composition of candle's operations, which is slower.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_graft::rope;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[[[[1f32, 2.0, 3.0, 4.0]]]], &Device::Cpu)?;
/// // The first pair as it is, the second rotated by a quarter.
/// let cos = Tensor::new(&[[1f32, 0.0]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32, 1.0]], &Device::Cpu)?;
/// let y = rope(&x, &cos, &sin)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1.0, -4.0, 3.0, 2.0]);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { name: "rope", pairs: Pairs::Halves, time: 2, back: false }.apply(x, cos, sin)
}

/// [`rope`] of pairs of neighbours, `x1 = x[2 i]` and `x2 = x[2 i + 1]`, for an `x` of shape `(b, h, t, d)`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_graft::rope_i;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[[1f32, 2.0, 3.0, 4.0]]]], &Device::Cpu)?;
/// let cos = Tensor::new(&[[1f32, 0.0]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32, 1.0]], &Device::Cpu)?;
/// let y = rope_i(&x, &cos, &sin)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0, -4.0, 3.0]);
/// # Ok(())
/// # }
/// ```
pub fn rope_i(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { name: "rope_i", pairs: Pairs::Neighbours, time: 2, back: false }.apply(x, cos, sin)
}

/// [`rope`] for an `x` of shape `(b, t, h, d)`, with the positions before the heads.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_graft::rope_thd;
///
/// # fn main() -> candle_core::Result<()> {
/// let (t, heads) = (2, 3);
/// let x = Tensor::ones((1, t, heads, 2), DType::F32, &Device::Cpu)?;
/// // The second position is rotated by a quarter.
/// let cos = Tensor::new(&[[1f32], [0.0]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32], [1.0]], &Device::Cpu)?;
/// let y = rope_thd(&x, &cos, &sin)?.squeeze(0)?.to_vec3::<f32>()?;
/// assert_eq!(y, [[[1.0, 1.0]; 3], [[-1.0, 1.0]; 3]]);
/// # Ok(())
/// # }
/// ```
pub fn rope_thd(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { name: "rope_thd", pairs: Pairs::Halves, time: 1, back: false }.apply(x, cos, sin)
}

#[derive(Clone, Copy)]
struct Rope {
    name: &'static str,
    pairs: Pairs,
    /// The dimension of x that is the time.
    time: usize,
    /// Rotates by the opposite angle.
    back: bool,
}

impl Rope {
    fn apply(self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let expected = if self.time == 2 { "(b, h, t, d)" } else { "(b, t, h, d)" };
        let (b, _, _, d) = check::dims4(self.name, "x", x, expected)?;
        let [cos, sin] = tables(self.name, x, [cos, sin], (b, x.dim(self.time)?, d))?;
        if x.device().is_cpu() && !cos.track_op() && !sin.track_op() {
            return x.apply_op3(&cos, &sin, self);
        }
        // The dimension of the heads.
        let [cos, sin] = [cos, sin].map(|cs| cs.unsqueeze(3 - self.time));
        match self.pairs {
            Pairs::Halves => composed::rope_halves(x, &cos?, &sin?),
            Pairs::Neighbours => composed::rope_neighbours(x, &cos?, &sin?),
        }
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        cos: &CpuStorage,
        cos_l: &Layout,
        sin: &CpuStorage,
        sin_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (shape, d) = (x_l.shape(), x_l.dims()[3]);
        let heads = shape.elem_count().checked_div(d).unwrap_or(0);
        let [_, n1, n2, _] = *x_l.dims() else { bail!("{}: not four dimensions", self.name) };
        by_type!(x.dtype(), self.name, T => {
            // Heads may be anywhere, as those of a transposed x are, but have to be contiguous themselves.
            let (x, [s0, s1, s2]) = match *x_l.stride() {
                [s0, s1, s2, 1] => (Cow::Borrowed(&x.as_slice::<T>()?[x_l.start_offset()..]), [s0, s1, s2]),
                _ => (cpu::slice::<T>(x, x_l)?, [n1 * n2 * d, n2 * d, d]),
            };
            let (cos, sin) = (cpu::slice::<T>(cos, cos_l)?, cpu::slice::<T>(sin, sin_l)?);
            let batch_stride = |l: &Layout| if l.dims()[0] == 1 { 0 } else { l.dims()[1] * d / 2 };
            let (cos_stride, sin_stride) = (batch_stride(cos_l), batch_stride(sin_l));
            let place = |head: usize| {
                let (i0, i1, i2) = (head / (n1 * n2), head / n2 % n1, head % n2);
                let row = (if self.time == 2 { i2 } else { i1 }) * d / 2;
                (i0 * s0 + i1 * s1 + i2 * s2, [i0 * cos_stride + row, i0 * sin_stride + row])
            };
            cpu::storage(rotate(self.pairs, &x, (&cos, &sin), (heads, d), self.back, place), shape)
        })
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        // The rotation by the opposite angle; cos and sin are not tracked.
        Ok((Some(grad.apply_op3_no_bwd(cos, sin, &Self { back: !self.back, ..*self })?), None, None))
    }
}

/// Checks cos and sin, and brings both to the shape `(1 or b, t, d / 2)`.
fn tables(function: &str, x: &Tensor, tables: [&Tensor; 2], (b, t, d): (usize, usize, usize)) -> Result<[Tensor; 2]> {
    check::float(function, "x", x)?;
    if d % 2 != 0 {
        bail!("{function}: the last dimension of x, of shape {:?}, must be even", x.dims());
    }
    let table = |name: &str, cs: &Tensor| {
        check::like(function, ("x", x), (name, cs))?;
        let fits = match *cs.dims() {
            [len, half] => len >= t && half * 2 == d,
            [batch, len, half] => batch == b && len >= t && half * 2 == d,
            _ => false,
        };
        if !fits {
            let (half, shape) = (d / 2, cs.dims());
            bail!(
                "{function}: the shape of {name} is {shape:?}, but must be (n, {half}) or ({b}, n, {half}) with n of \
                 at least {t} for an x of shape {:?}",
                x.dims()
            );
        }
        if cs.rank() == 2 { cs.narrow(0, 0, t)?.unsqueeze(0) } else { cs.narrow(1, 0, t) }
    };
    Ok([table("cos", tables[0])?, table("sin", tables[1])?])
}
