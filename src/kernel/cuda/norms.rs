//! Norms of gradients on the device: what they need, and their launches.

use candle_core::DType;
use cudarc::driver::{CudaSlice, DevicePtr};

use super::abi::{self, Address, LeavesArgs, NormsArgs};
use super::launcher::Launcher;
use super::plan::LEAVES;
use super::source::Module;
use super::staging::alloc;
use crate::error::Result;
use crate::reduce::{LEAF, NormType};

/// Memory for partial sums, kept from call to call.
#[derive(Default)]
pub(super) struct Scratch(pub(super) Option<CudaSlice<u8>>);

/// Room for the norms of some gradients.
pub(super) struct Norms {
    leaves: Address,
    folded: Address,
    pub(super) norms: Address,
    pub(super) squares: Address,
}

impl Scratch {
    /// Loads what measures gradients of these types and sizes, and makes room for it.
    pub(super) fn prepare(&mut self, launcher: &mut Launcher, lens: &[(DType, u64)]) -> Result<Norms> {
        launcher.load(Module::Summary, "summary_norms")?;
        launcher.load(Module::Summary, "summary_join")?;
        for (kernel, of_kernel) in of_leaves(lens) {
            launcher.load(Module::Summary, kernel)?;
            // All gradients have a place, so that their numbers are those of the norms; of other types, none of it.
            launcher.plan_leaves(kernel, of_kernel)?;
        }
        let leaves: u64 = lens.iter().map(|(_, len)| len.div_ceil(LEAF as u64)).sum();
        let n = lens.len() as u64;
        let (size, bytes) = (size_of::<f64>() as u64, (2 * leaves + 3 * n) * size_of::<f64>() as u64);
        if self.0.as_ref().is_none_or(|scratch| (scratch.len() as u64) < bytes) {
            self.0 = None;
            self.0 = Some(alloc(&launcher.stream, bytes.next_power_of_two() as usize)?);
        }
        let base = self.0.as_ref().map_or(0, |scratch| scratch.device_ptr(&launcher.stream).0);
        let [folded, norms, squares] = [leaves, 2 * leaves, 2 * leaves + n].map(|elements| base + elements * size);
        Ok(Norms { leaves: base, folded, norms, squares })
    }
}

impl Norms {
    /// Where the norms begin in the memory.
    pub(super) fn offset(&self) -> usize {
        (self.norms - self.leaves) as usize
    }

    /// Measures all gradients, times `unscale`.
    pub(super) fn launch(
        &self,
        launcher: &Launcher,
        lens: &[(DType, u64)],
        gradients: Address,
        norm: NormType,
        unscale: f64,
    ) -> Result<()> {
        let norm = abi::norm(norm);
        for (kernel, _) in of_leaves(lens) {
            let (chunks, blocks) = launcher.planned(kernel);
            let args = LeavesArgs { gradients, chunks, leaves: self.leaves, norm, chunk_units: LEAVES };
            launcher.launch(kernel, blocks, args)?;
        }
        let Self { leaves, folded, norms, .. } = *self;
        let args = NormsArgs { gradients, leaves, folded, norms, unscale, norm, padding: 0 };
        launcher.launch("summary_norms", lens.len() as u32, args)
    }
}

/// The kernels that measure gradients of these types, each with the lengths that are its own: 0 for those of other types.
fn of_leaves(lens: &[(DType, u64)]) -> Vec<(&'static str, Vec<u64>)> {
    let kernels = [
        (DType::F64, "summary_leaves_f64"),
        (DType::F32, "summary_leaves_f32"),
        (DType::F16, "summary_leaves_f16"),
        (DType::BF16, "summary_leaves_bf16"),
    ];
    let own = |dtype: DType| lens.iter().map(|&(of, len)| if of == dtype { len } else { 0 }).collect();
    let is_used = |dtype: DType| lens.iter().any(|&(of, _)| of == dtype);
    kernels.into_iter().filter(|&(dtype, _)| is_used(dtype)).map(|(dtype, kernel)| (kernel, own(dtype))).collect()
}
