//! A case: so many tensors of so many elements, their recorded gradients, and a step over them.
//!
//! Invariant: gradients are made once and only read, so a timed step contains no autograd and no allocation of inputs.

use candle_adamax::{Adamax, ParamsAdamax, Rounding, StateDType};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::Optimizer;
use half::{bf16, f16};

use super::streams;

/// One step, to be called again and again.
pub(crate) type Step = Box<dyn FnMut() -> Result<()>>;

/// `tensors` variables of `elements` elements each, and their gradients, all of one dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    /// How many variables.
    pub(crate) tensors: usize,
    /// How many elements each of them has.
    pub(crate) elements: usize,
    /// Of the variables and of the gradients.
    pub(crate) dtype: DType,
    /// How moments are stored; those of f64 are f64.
    pub(crate) state: StateDType,
    /// How f16 and bf16 variables are rounded.
    pub(crate) rounding: Rounding,
}

impl Case {
    /// All elements together.
    pub(crate) fn total(&self) -> usize {
        self.tensors * self.elements
    }

    /// The bytes of one moment of one element.
    fn moment(&self) -> usize {
        match (self.dtype, self.state) {
            (DType::F64, _) => 8,
            (_, StateDType::Q8) => 1,
            (_, StateDType::BF16 | StateDType::F16) => 2,
            _ => 4,
        }
    }

    /// The bytes that an update cannot avoid: it reads parameter, gradient and both moments, and writes all but the
    /// gradient. 28 an element for f32, 22 for f16 and bf16, 56 for f64; with other moments, 20 (16 bits) and 16 (8 bits)
    /// for f32.
    pub(crate) fn bytes(&self) -> u64 {
        (self.total() * (3 * self.dtype.size_in_bytes() + 4 * self.moment())) as u64
    }

    /// A step of this crate's optimizer.
    pub(crate) fn adamax(&self) -> Result<Step> {
        let (vars, grads) = self.vars_and_grads()?;
        let params = ParamsAdamax { state_dtype: self.state, rounding: self.rounding, ..ParamsAdamax::default() };
        let mut optimizer = Adamax::new(vars, params)?;
        Ok(Box::new(move || Ok(optimizer.step(&grads).map(drop)?)))
    }

    /// The memory's own speed: the bytes of a step over one row of [`total`](Self::total) elements, without arithmetic.
    pub(crate) fn memory(&self) -> Result<Step> {
        let n = self.total();
        let mut pass = match (self.dtype, self.moment()) {
            (DType::F64, _) => streams::pass::<u64, u64>(n),
            (DType::F32, 4) => streams::pass::<u32, u32>(n),
            (DType::F32, 2) => streams::pass::<u32, u16>(n),
            (DType::F32, _) => streams::pass::<u32, u8>(n),
            (DType::F16 | DType::BF16, 4) => streams::pass::<u16, u32>(n),
            (DType::F16 | DType::BF16, 2) => streams::pass::<u16, u16>(n),
            (DType::F16 | DType::BF16, _) => streams::pass::<u16, u8>(n),
            (other, _) => bail!("no case for {other:?}"),
        };
        Ok(Box::new(move || {
            pass();
            Ok(())
        }))
    }

    /// Variables of their own, and a gradient for each.
    pub(crate) fn vars_and_grads(&self) -> Result<(Vec<Var>, GradStore)> {
        let mut grads = GradStore::default();
        let mut vars = Vec::with_capacity(self.tensors);
        for index in 0..self.tensors {
            let var = Var::from_tensor(&self.tensor(2 * index)?)?;
            grads.insert(&var, self.tensor(2 * index + 1)?);
            vars.push(var);
        }
        Ok((vars, grads))
    }

    /// Numbers between -1 and 1, far from zero: subnormals, which CPUs are slow at, would be another measurement.
    fn tensor(&self, seed: usize) -> Result<Tensor> {
        let values = (seed..seed + self.elements).map(|i| {
            let bits = (i as u32).wrapping_mul(0x9e37_79b1);
            let magnitude = 0.25 + (bits >> 9) as f32 / (1 << 24) as f32;
            if bits & 1 == 0 { magnitude } else { -magnitude }
        });
        let (n, cpu) = (self.elements, &Device::Cpu);
        match self.dtype {
            DType::F64 => Tensor::from_vec(values.map(f64::from).collect(), n, cpu),
            DType::F32 => Tensor::from_vec(values.collect(), n, cpu),
            DType::F16 => Tensor::from_vec(values.map(f16::from_f32).collect(), n, cpu),
            DType::BF16 => Tensor::from_vec(values.map(bf16::from_f32).collect(), n, cpu),
            other => bail!("no case for {other:?}"),
        }
    }
}
