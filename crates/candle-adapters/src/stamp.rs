//! Numbers that say whether a tensor's values have changed.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor};

/// The elements that are read from a device that is not the CPU.
const PROBE: usize = 1 << 12;

/// The stamp of no tensors.
pub(crate) const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// Chains that do not wait for each other, so that a CPU hashes as fast as it reads.
const LANES: usize = 8;

fn mix(stamp: u64, bits: u64) -> u64 {
    (stamp.rotate_left(5) ^ bits).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Adds values to a stamp, `N` to a word.
fn add_values<T: Copy, const N: usize>(stamp: u64, values: &[T], bits: impl Fn(T) -> u64) -> u64 {
    let word = |values: &[T]| values.iter().rev().fold(0, |word, value| word << (64 / N - 1) << 1 | bits(*value));
    let mut lanes = [stamp; LANES];
    let (words, rest) = values.as_chunks::<N>();
    let (groups, last) = words.as_chunks::<LANES>();
    for group in groups {
        for (lane, values) in lanes.iter_mut().zip(group) {
            *lane = mix(*lane, word(values));
        }
    }
    let ends = last.iter().map(|values| word(values)).chain(rest.iter().map(|value| bits(*value)));
    ends.chain(lanes).fold(stamp, mix)
}

/// A stamp with a tensor's values added: another one, but for one case in 2⁶⁴, if one of them is another.
pub(crate) fn add(stamp: u64, tensor: &Tensor) -> Result<u64> {
    // The values of another device are a copy away: a change that leaves the first ones alone is possible in principle
    // only.
    let near = match tensor.device() {
        Device::Cpu => tensor.contiguous()?,
        _ => {
            let rows = PROBE.div_ceil(tensor.elem_count().checked_div(tensor.dim(0)?).unwrap_or(1).max(1));
            let flat = tensor.detach().narrow(0, 0, rows.min(tensor.dim(0)?))?.flatten_all()?;
            flat.narrow(0, 0, PROBE.min(flat.elem_count()))?.to_device(&Device::Cpu)?
        }
    };
    let (storage, layout) = near.storage_and_layout();
    let part = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            Ok(add_values::<_, 2>(stamp, &values[part], |value| u64::from(value.to_bits())))
        }
        Storage::Cpu(CpuStorage::F64(values)) => Ok(add_values::<_, 1>(stamp, &values[part], f64::to_bits)),
        Storage::Cpu(CpuStorage::F16(values)) => {
            Ok(add_values::<_, 4>(stamp, &values[part], |value| u64::from(value.to_bits())))
        }
        Storage::Cpu(CpuStorage::BF16(values)) => {
            Ok(add_values::<_, 4>(stamp, &values[part], |value| u64::from(value.to_bits())))
        }
        _ => Err(candle_core::Error::Msg(format!("expected f32, f64, f16 or bf16, got {:?}", near.dtype()))),
    }
}
