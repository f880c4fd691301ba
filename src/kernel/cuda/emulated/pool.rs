//! Rows that are pooled by bags, and what goes back from them.

use candle_core::{CpuStorage, DType, Result, Shape, Storage, Tensor};

use super::*;
use crate::kernel::cuda::abi::{DotArgs, LargestArgs, PoolArgs};
use crate::kernel::cuda::plan::{blocks_of_rows, blocks_of_warps};
use crate::kernel::{self, HostIds};

const STARTS: [u32; 7] = [0, 3, 3, 4, 20, 29, 29];

/// The bag of each id.
fn bags() -> Vec<u32> {
    let of = |(bag, range): (u32, &[u32])| std::iter::repeat_n(bag, (range[1] - range[0]) as usize);
    (0..).zip(STARTS.windows(2)).flat_map(of).collect()
}

fn ids() -> Vec<u32> {
    (0..29u32).map(|i| (i * i + 3) % 17).collect()
}

/// The elements of what the CPU made.
fn expected(storage: CpuStorage, shape: impl Into<Shape>) -> Result<Vec<u64>> {
    let tensor = Tensor::from_storage(Storage::Cpu(storage), shape, candle_core::op::BackpropOp::none(), false);
    Ok(numbers(&memory(&tensor, 0)?, tensor.dtype()))
}

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

#[test]
fn each_id_is_in_its_bag() {
    for starts in [&STARTS[..], &[0, 0, 0, 29, 29], &[0, 29]] {
        let (mut from, mut to) = (Memory::of(starts, 0), Memory::zeros::<u32>(29));
        let bags_n = starts.len() as u64 - 1;
        let args = abi::BagsArgs { starts: from.address(), bags: to.address(), n: 29, bags_n };
        launch("pool_bags", 1, &args, false);
        let of = |(bag, range): (u32, &[u32])| std::iter::repeat_n(bag, (range[1] - range[0]) as usize);
        let expected: Vec<u32> = (0..).zip(starts.windows(2)).flat_map(of).collect();
        assert_eq!(to.read::<u32>(), expected);
    }
}

#[test]
fn bags_are_those_of_the_cpu() -> Result<()> {
    let n = STARTS.len() - 1;
    for dtype in DTYPES {
        for row_len in [1, 7, 64, 100] {
            for (mean, weighted) in [(false, false), (true, false), (false, true)] {
                let (table, factors) = (tensor(&[17, row_len], 3, 3, dtype)?, tensor(&[29], 4, 3, dtype)?);
                let weights = factors.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                let weights = weighted.then_some(weights.as_slice());
                let pooled = kernel::pool(&table, row_len, &ids(), &STARTS, weights, mean)?;
                let (mut from, mut factors) = (memory(&table, 0)?, memory(&factors, 0)?);
                let (mut ids, mut starts) = (Memory::of(&ids(), 0), Memory::of(&STARTS, 0));
                let mut out = Memory::of(&vec![0xcdu8; n * row_len * dtype.size_in_bytes()], 0);
                let args = PoolArgs {
                    table: from.address(),
                    ids: ids.address(),
                    starts: starts.address(),
                    factors: if weighted { factors.address() } else { 0 },
                    out: out.address(),
                    n: n as u64,
                    row_len: row_len as u64,
                    mean: u32::from(mean),
                    padding: 0,
                };
                let blocks = blocks_of_rows(args.n, args.row_len) as usize;
                launch(&format!("pool_{}", name(dtype)), blocks, &args, mean);
                assert_eq!(
                    numbers(&out, dtype),
                    expected(pooled, (n, row_len))?,
                    "{dtype:?} {row_len} {mean} {weighted}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_factors_are_those_of_the_cpu() -> Result<()> {
    for dtype in DTYPES {
        for row_len in [1, 31, 64, 100] {
            let (rows, grad) = (tensor(&[29, row_len], 3, 3, dtype)?, tensor(&[6, row_len], 4, 3, dtype)?);
            let listed = HostIds::new(ids(), Some(bags()), None);
            let dots = kernel::dot_rows(&rows, &grad, row_len, &listed)?;
            let (mut from, mut grad) = (memory(&rows, 0)?, memory(&grad, 0)?);
            let mut bags = Memory::of(&bags(), 0);
            let mut out = Memory::of(&vec![0xcdu8; 29 * dtype.size_in_bytes()], 0);
            let args = DotArgs {
                rows: from.address(),
                grad: grad.address(),
                bags: bags.address(),
                out: out.address(),
                n: 29,
                row_len: row_len as u64,
            };
            launch(&format!("pool_dot_{}", name(dtype)), blocks_of_warps(args.n) as usize, &args, row_len == 31);
            assert_eq!(numbers(&out, dtype), expected(dots, 29)?, "{dtype:?} {row_len}");
        }
    }
    Ok(())
}

#[test]
fn maxima_are_those_of_the_cpu() -> Result<()> {
    let n = STARTS.len() - 1;
    for dtype in DTYPES {
        for row_len in [1, 7, 64] {
            // Few different values, so that several are the largest.
            let rows = tensor(&[29, row_len], 3, 1, DType::F32)?.round()?.to_dtype(dtype)?;
            let grad = tensor(&[n, row_len], 4, 3, dtype)?;
            let (storage, layout) = rows.storage_and_layout();
            let Storage::Cpu(cpu) = &*storage else { panic!("made on the CPU") };
            let (maxima, of_each) = kernel::largest((cpu, layout), row_len, &STARTS)?;
            let back = kernel::largest_backward(&grad, row_len, &of_each, 29)?;
            let (mut values, mut starts) = (memory(&rows, 0)?, Memory::of(&STARTS, 0));
            let mut positions = Memory::zeros::<u32>(n * row_len);
            let mut out = Memory::of(&vec![0xcdu8; n * row_len * dtype.size_in_bytes()], 0);
            let args = LargestArgs {
                values: values.address(),
                starts: starts.address(),
                positions: positions.address(),
                out: out.address(),
                n: n as u64,
                row_len: row_len as u64,
            };
            let blocks = blocks_of_rows(args.n, args.row_len) as usize;
            launch(&format!("pool_largest_{}", name(dtype)), blocks, &args, false);
            assert_eq!(positions.read::<u32>(), of_each, "{dtype:?} {row_len}");
            assert_eq!(numbers(&out, dtype), expected(maxima, (n, row_len))?, "{dtype:?} {row_len}");

            let (mut grad, mut scattered) =
                (memory(&grad, 0)?, Memory::zeros::<u8>(29 * row_len * dtype.size_in_bytes()));
            let args = LargestArgs { values: grad.address(), out: scattered.address(), ..args };
            launch(&format!("pool_scatter_{}", name(dtype)), blocks, &args, true);
            assert_eq!(numbers(&scattered, dtype), expected(back, (29, row_len))?, "{dtype:?} {row_len}");
        }
    }
    Ok(())
}
