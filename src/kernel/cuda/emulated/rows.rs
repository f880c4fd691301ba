//! Rows of tables: gathered and updated.

use candle_core::{DType, Result, Tensor, Var};

use super::*;
use crate::kernel::cuda::abi::UpdateLaunchArgs;
use crate::kernel::cuda::plan::{blocks_of_rows, chunks, units_of_chunk};
use crate::kernel::rows::{Coalesced, Contribution};
use crate::kernel::{RowGrad, RowTask, RowValues, cpu};
use crate::state::{Layout, Place, Units};

/// Touched rows of a table: their numbers, and of which contributions each gradient is the sum.
pub(super) fn row_grad(rows: &[u32], row_len: usize, parts: &[Tensor]) -> RowGrad<'static> {
    let (mut starts, mut contributions) = (vec![0], Vec::new());
    for (k, _) in rows.iter().enumerate() {
        for nth in 0..=(k * k % 4) {
            let part = (k + nth) % parts.len();
            let source = ((3 * k + nth) % parts[part].dims()[0]) as u32;
            let scale = if nth == 1 { 0.3 } else { 1.0 };
            contributions.push(Contribution { part: part as u32, source, scale });
        }
        starts.push(contributions.len() as u32);
    }
    let parts = parts.iter().map(|part| std::borrow::Cow::Owned(part.clone())).collect();
    RowGrad { row_len, values: RowValues::Coalesced(Coalesced { rows: rows.to_vec(), starts, contributions, parts }) }
}

#[test]
fn touched_rows_have_the_bits_of_the_cpu() -> Result<()> {
    let rows = [0u32, 2, 3, 7, 8, 30, 31, 99];
    for (dtype, state, row_len) in [
        (DType::F32, StateDType::F32, 64),
        (DType::F32, StateDType::Q8, 24),
        (DType::BF16, StateDType::Q8, 64),
        (DType::F16, StateDType::BF16, 5),
        (DType::F64, StateDType::F32, 33),
        (DType::F32, StateDType::F16, 300),
    ] {
        let keep = Keep { dtypes: (dtype, crate::state::arithmetic(dtype)), state, units: Units::Rows, ..PLAIN };
        let encoding = Encoding::of(&hyper(&keep));
        let var = Var::from_tensor(&tensor(&[100, row_len], 5, 2, dtype)?)?;
        let layout = Layout::of(&var, state, Units::Rows, false, encoding);
        let mut own =
            ParamState::zeros(&var, Place::Host, &layout, Rounding::Nearest).map_err(candle_core::Error::from)?;
        for t in 1..=3u64 {
            let mut parts = vec![tensor(&[9, row_len], t, 3, dtype)?, tensor(&[4, row_len], t + 50, 3, dtype)?];
            if dtype != DType::F64 {
                parts.push(tensor(&[6, row_len], t + 70, 3, DType::F32)?);
            }
            let grad = row_grad(&rows, row_len, &parts);
            let update_args = update_args(&keep, t, encoding);
            let mut devices = arrays(&var, &own, 0)?;
            cpu::update_rows(vec![RowTask {
                nth: 0,
                var: &var,
                grad: &grad,
                update_args,
                state: &mut own,
                checksums: None,
            }])?;

            let sums = grad.summed(dtype).map_err(candle_core::Error::from)?.values;
            let mut sums =
                memory(&sums.to_tensor(&(rows.len(), row_len).into()).map_err(candle_core::Error::from)?, 0)?;
            let (n, len) = (rows.len() as u64, row_len as u64);
            let mut address = |i: usize| devices[i].as_mut().map_or(0, |(memory, _)| memory.address());
            let (mut numbers_of_rows, mut count) = (Memory::of(&rows, 0), Memory::of(&[rows.len() as u32], 0));
            let tensor = abi::Tensor {
                param: address(0),
                grad: sums.address(),
                exp_avg: address(1),
                exp_inf: address(2),
                scales: address(3),
                rows: numbers_of_rows.address(),
                count: count.address(),
                len: var.elem_count() as u64,
                unit: len,
                chunk: units_of_chunk(len),
                ..abi::Tensor::default()
            };
            let chunks = chunks([(n, tensor.chunk)]).expect("little work");
            let (mut tensors, mut update_args) =
                (Memory::of(&[tensor], 0), Memory::of(&[abi::UpdateArgs::new(&update_args)], 0));
            let (blocks, mut chunks) = (chunks.len(), Memory::of(&chunks, 0));
            let (tensors, update_args) = (tensors.address(), update_args.address());
            let args = UpdateLaunchArgs { tensors, update_args, chunks: chunks.address(), control: 0 };
            launch(&kernel_of(&keep), blocks, &args, t == 3);

            for (i, (got, expected)) in devices.iter().zip(&arrays(&var, &own, 0)?).enumerate() {
                if let (Some((got, dtype)), Some((expected, _))) = (got, expected) {
                    assert!(numbers(got, *dtype) == numbers(expected, *dtype), "{keep:?}, array {i}, update {t}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_gathered() -> Result<()> {
    let ids = [3u32, 0, 3, 19, 7];
    for row_len in [1u64, 2, 5, 33, 100] {
        let table: Vec<u16> = (0..20 * row_len as u16 * 8).collect();
        for (word, kernel) in [(2, "rows_gather_2"), (4, "rows_gather_4"), (8, "rows_gather_8"), (16, "rows_gather_16")]
        {
            let units = row_len as usize * word / 2;
            let (mut from, mut to) = (Memory::of(&table, 0), Memory::zeros::<u16>(ids.len() * units));
            let mut of_ids = Memory::of(&ids, 0);
            let args = abi::GatherArgs {
                ids: of_ids.address(),
                table: from.address(),
                out: to.address(),
                n: ids.len() as u64,
                row_len,
            };
            launch(kernel, blocks_of_rows(args.n, row_len) as usize, &args, word == 4);
            let expected: Vec<u16> =
                ids.iter().flat_map(|&id| table[id as usize * units..][..units].iter().copied()).collect();
            assert_eq!(to.read::<u16>(), expected, "{kernel} {row_len}");
        }
    }
    Ok(())
}
