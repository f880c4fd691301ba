//! The probabilities of attention, from queries `(b, h_kv, h / h_kv * s, d)` and keys `(b, h_kv, s_kv, d)`, both
//! contiguous and in f32 or f64, and a bias of four dimensions, the last of which is that of the keys.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};

use crate::kernel::probabilities::{Bias, Scores};
use crate::kernel::{Element, Real};
use crate::{composed as differentiable, cpu};

/// The probabilities on the CPU.
pub(crate) fn on_cpu(q: &Tensor, k: &Tensor, bias: Option<&Tensor>, scores: Scores) -> Result<Tensor> {
    match bias {
        Some(bias) => q.apply_op3(k, bias, scores),
        None => q.apply_op2(k, scores),
    }
}

/// The probabilities as a composition of candle's operations, on any device.
pub(crate) fn composed(q: &Tensor, k: &Tensor, bias: Option<&Tensor>, scores: Scores) -> Result<Tensor> {
    let shape = (q.dim(0)?, scores.heads, scores.queries, scores.keys);
    let products = q.matmul(&k.t()?)?;
    let flat = products.shape().clone();
    let mut y = (products * scores.scale)?.reshape(shape)?;
    if let Some(cap) = scores.softcap {
        y = ((y / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(offset) = scores.causal {
        let (s, s_kv) = (scores.queries, scores.keys);
        let number = |at: usize| if at % s_kv > offset.saturating_add(at / s_kv) { f32::NEG_INFINITY } else { 0.0 };
        let hidden = Tensor::from_iter((0..s * s_kv).map(number), &Device::Cpu)?.reshape((1, 1, s, s_kv))?;
        y = y.broadcast_add(&hidden.to_dtype(y.dtype())?.to_device(y.device())?)?;
    }
    differentiable::softmax_or_zero(&y)?.reshape(flat)
}

/// The product with the values `(b, h_kv, s_kv, d_v)` on the CPU, which unlike candle's computes no gradients of
/// constants.
pub(crate) fn weigh_on_cpu(p: &Tensor, v: &Tensor) -> Result<Tensor> {
    p.apply_op2(v, Weigh)
}

struct Weigh;

impl CustomOp2 for Weigh {
    fn name(&self) -> &'static str {
        "attention-values"
    }

    fn cpu_fwd(&self, p: &CpuStorage, p_l: &Layout, v: &CpuStorage, v_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, h_kv, rows, keys) = p_l.shape().dims4()?;
        let d_v = v_l.dims()[3];
        Ok((p.matmul(v, (b * h_kv, rows, d_v, keys), p_l, v_l)?, (b, h_kv, rows, d_v).into()))
    }

    fn bwd(&self, p: &Tensor, v: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_p = p.track_op().then(|| grad.matmul(&v.detach().t()?)).transpose()?;
        let of_v = v.track_op().then(|| p.detach().t()?.matmul(grad)).transpose()?;
        Ok((of_p, of_v))
    }
}

impl Scores {
    fn value<T: Real + Element<Wide = T>>(
        &self,
        (q, q_l): (&CpuStorage, &Layout),
        (k, k_l): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, h_kv, rows, d) = q_l.shape().dims4()?;
        let products = q.matmul(k, (b * h_kv, rows, self.keys, d), q_l, &k_l.transpose(2, 3)?)?;
        let mut p = T::cpu_storage_data(products)?;
        match bias {
            Some((bias, layout)) => {
                let dims = layout.shape().dims4()?;
                let numbers = cpu::slice(bias, layout)?;
                self.forward(&mut p, Some(&Bias::new(&numbers, dims)));
            }
            None => self.forward(&mut p, None),
        }
        cpu::storage(p, (b, h_kv, rows, self.keys))
    }

    /// The gradients of q, k and the bias, where they are wanted.
    fn gradients<T: Real + Element<Wide = T>>(
        &self,
        [q, k]: [&Tensor; 2],
        bias: Option<&Tensor>,
        [p, grad]: [&Tensor; 2],
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let of_products = |scores: &Scores| -> Result<Tensor> {
            let grad = match scores.softcap {
                Some(_) => {
                    let products = q.detach().matmul(&k.detach().t()?)?;
                    cpu::with_slices([p, grad, &products], |[p, grad, x]: [&[T]; 3]| scores.backward(p, grad, Some(x)))
                }
                None => cpu::with_slices([p, grad], |[p, grad]: [&[T]; 2]| scores.backward(p, grad, None)),
            };
            cpu::tensor(grad?, p.shape())
        };
        let (mut q_grad, mut k_grad, mut bias_grad) = (None, None, None);
        if q.track_op() || k.track_op() {
            let grad = of_products(self)?;
            if q.track_op() {
                q_grad = Some(grad.matmul(&k.detach())?);
            }
            if k.track_op() {
                k_grad = Some(grad.t()?.matmul(&q.detach())?);
            }
        }
        if let Some(bias) = bias.filter(|bias| bias.track_op()) {
            // What is added comes after the scale and the cap.
            let grad = of_products(&Scores { scale: 1.0, softcap: None, ..*self })?;
            let grad = grad.reshape((q.dim(0)?, self.heads, self.queries, self.keys))?;
            let ones: Vec<usize> = (0..4).filter(|&dim| bias.dims()[dim] != grad.dims()[dim]).collect();
            bias_grad = Some(grad.sum_keepdim(ones)?);
        }
        Ok((q_grad, k_grad, bias_grad))
    }
}

/// Calls a function for the type of the elements, which is f32 or f64.
macro_rules! wide {
    ($dtype:expr, $call:ident ( $self:expr $(, $arg:expr)* )) => {
        match $dtype {
            DType::F32 => $self.$call::<f32>($($arg),*),
            DType::F64 => $self.$call::<f64>($($arg),*),
            dtype => bail!("attention: probabilities of type {dtype:?}"),
        }
    };
}

impl CustomOp2 for Scores {
    fn name(&self) -> &'static str {
        "attention-probabilities"
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_l: &Layout, k: &CpuStorage, k_l: &Layout) -> Result<(CpuStorage, Shape)> {
        wide!(q.dtype(), value(self, (q, q_l), (k, k_l), None))
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, p: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (q, k, _) = wide!(q.dtype(), gradients(self, [q, k], None, [p, grad]))?;
        Ok((q, k))
    }
}

impl CustomOp3 for Scores {
    fn name(&self) -> &'static str {
        "attention-probabilities"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_l: &Layout,
        k: &CpuStorage,
        k_l: &Layout,
        bias: &CpuStorage,
        bias_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        wide!(q.dtype(), value(self, (q, q_l), (k, k_l), Some((bias, bias_l))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        bias: &Tensor,
        p: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        wide!(q.dtype(), gradients(self, [q, k], Some(bias), [p, grad]))
    }
}
