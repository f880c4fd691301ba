//! Gradients of rows: sorted and summed.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::*;
use crate::kernel::cuda::abi::{SortArgs, Sorting};
use crate::kernel::cuda::plan::{chunks, sorting};
use crate::kernel::{HostIds, LookupGrad, LookupIds, RowGrad, SummedRows};
use crate::state::arithmetic;

const NO_ROW: u32 = u32::MAX;

/// What a lookup does with its rows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    /// They are the result.
    Plain,
    /// By bags of up to four.
    Sum,
    Mean,
    Weighted,
}

/// One lookup, as the host and as the device know it.
struct Given {
    part: LookupGrad<'static>,
    values: Memory,
    ids: Memory,
    bags: Option<Memory>,
    starts: Option<Memory>,
    factors: Option<Memory>,
    len: u32,
    dtypes: (DType, DType),
}

impl Given {
    fn new(ids: Vec<u32>, row_len: usize, kind: Use, (dtype, table): (DType, DType), seed: u64) -> Result<Self> {
        let n = ids.len();
        let (mut bags, mut starts) = (Vec::new(), vec![0u32]);
        while bags.len() < n {
            let bag = starts.len() as u32 - 1;
            // Some bags are empty.
            bags.extend(std::iter::repeat_n(bag, ((bag + seed as u32) % 5) as usize));
            bags.truncate(n);
            starts.push(bags.len() as u32);
        }
        let is_pooled = kind != Use::Plain;
        let grad = tensor(&[if is_pooled { starts.len() - 1 } else { n }, row_len], seed, 3, dtype)?;
        let factors = tensor(&[n], seed + 1, 3, table)?;
        let all = (0..n).filter(|&i| ids[i] != NO_ROW);
        let sources = all.clone().map(|i| if is_pooled { bags[i] } else { i as u32 }).collect();
        let weights = factors.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let count = |bag: u32| f64::from(starts[bag as usize + 1] - starts[bag as usize]);
        let scales = match kind {
            Use::Plain | Use::Sum => None,
            Use::Mean => Some(all.clone().map(|i| 1.0 / count(bags[i])).collect()),
            Use::Weighted => Some(all.clone().map(|i| weights[i]).collect()),
        };
        let listed = HostIds::new(all.map(|i| ids[i]).collect(), Some(sources), scales);
        Ok(Self {
            values: memory(&grad, 0)?,
            ids: Memory::of(&ids, 0),
            bags: is_pooled.then(|| Memory::of(&bags, 0)),
            starts: (kind == Use::Mean).then(|| Memory::of(&starts, 0)),
            factors: if kind == Use::Weighted { Some(memory(&factors, 0)?) } else { None },
            len: n as u32,
            dtypes: (dtype, table),
            part: LookupGrad { grad: Cow::Owned(grad), lookup_ids: Arc::new(LookupIds::Host(listed)) },
        })
    }

    fn at(&mut self, begin: u32) -> abi::LookupGrad {
        let address = |memory: &mut Option<Memory>| memory.as_mut().map_or(0, Memory::address);
        abi::LookupGrad {
            values: self.values.address(),
            ids: self.ids.address(),
            bags: address(&mut self.bags),
            starts: address(&mut self.starts),
            factors: address(&mut self.factors),
            begin,
            dtype: abi::number(self.dtypes.0),
            factors_dtype: abi::number(self.dtypes.1),
            padding: 0,
        }
    }
}

/// The lookups of one table.
struct Lookups {
    dtype: DType,
    rows: u32,
    row_len: usize,
    given: Vec<Given>,
}

/// Sorts and sums all tables as a GPU would, in blocks of at least so many `tiles`, and compares with what the host makes of
/// the same.
fn compare(mut tables: Vec<Lookups>, tiles: u32, reversed: bool) -> Result<()> {
    let (mut memories, mut parts, mut sortings) = (Vec::new(), Vec::new(), Vec::new());
    for Lookups { dtype, rows, row_len, given } in &mut tables {
        let mut begin = 0;
        let mut of_table = Vec::new();
        for given in given.iter_mut() {
            of_table.push(given.at(begin));
            begin += given.len;
        }
        let mut of_table = Memory::of(&of_table, 0);
        let size = (begin, *rows, (*row_len as u64, arithmetic(*dtype).size_in_bytes() as u64));
        let mut memory = Memory::of(&vec![0xcdu8; sorting(0, size).1 as usize], 0);
        let sorting = sorting(memory.address(), size).0;
        let (blocks, tiles) = (sorting.blocks.div_ceil(tiles), sorting.tiles * tiles);
        let parts_n = given.len() as u32;
        sortings.push(Sorting { parts: of_table.address(), parts_n, blocks, tiles, ..sorting });
        parts.push(of_table);
        memories.push(memory);
    }
    let mut of_tables = Memory::of(&sortings, 0);
    let blocks = chunks(sortings.iter().map(|sorting| (u64::from(sorting.blocks), 1))).expect("little work");
    let mut of_blocks = Memory::of(&blocks, 0);
    let mut args = SortArgs { tables: of_tables.address(), chunks: of_blocks.address(), pass: 0, padding: 0 };
    launch("sort_keys", blocks.len(), &args, reversed);
    for pass in 0..sortings.iter().map(|sorting| sorting.passes).max().unwrap_or(0) {
        args.pass = pass;
        launch("sort_count", blocks.len(), &args, reversed);
        launch("sort_scan", sortings.len(), &args, reversed);
        launch("sort_scatter", blocks.len(), &args, reversed);
    }
    launch("sort_heads", blocks.len(), &args, reversed);
    launch("sort_list", blocks.len(), &args, reversed);
    for (kernel, is_wide) in [("sort_sum_f32", false), ("sort_sum_f64", true)] {
        let rows = tables.iter().zip(&sortings).map(|(table, sorting)| {
            let is_own = (table.dtype == DType::F64) == is_wide;
            (if is_own { u64::from(sorting.n.min(sorting.all)) } else { 0 }, sorting.chunk)
        });
        let chunks = chunks(rows).expect("little work");
        let mut of_chunks = Memory::of(&chunks, 0);
        launch(kernel, chunks.len(), &SortArgs { chunks: of_chunks.address(), ..args }, reversed);
    }
    for ((table, sorting), own) in tables.into_iter().zip(&sortings).zip(&mut memories) {
        let Lookups { dtype, row_len, given, .. } = table;
        let parts: Vec<LookupGrad<'_>> = given.into_iter().map(|given| given.part).collect();
        let expected = RowGrad::coalesced(&parts, row_len).and_then(|grad| grad.summed(dtype));
        let SummedRows { rows, values } = expected.map_err(candle_core::Error::from)?;
        let base = own.address();
        let bytes = own.read::<u8>();
        let at = |address: Address, len: usize| Memory::of(&bytes[(address - base) as usize..][..len], 0);
        assert_eq!(at(sorting.count, 4).read::<u32>(), [rows.len() as u32]);
        assert_eq!(at(sorting.rows, 4 * rows.len()).read::<u32>(), rows);
        let sums = numbers(&at(sorting.sums, values.bytes()), arithmetic(dtype));
        let values = values.to_tensor(&values.len().into()).map_err(candle_core::Error::from)?;
        assert_eq!(sums, numbers(&memory(&values, 0)?, arithmetic(dtype)));
    }
    Ok(())
}

/// Ids by a law that favors small ones, some of which are no row.
fn ids(n: usize, rows: u32, seed: u64) -> Vec<u32> {
    let numbers = (0..n as u64).map(|i| crate::rounding::derive(seed, i));
    numbers
        .map(|x| match x % 11 {
            0 => NO_ROW,
            _ => {
                let uniform = (x >> 11) as f64 / (1u64 << 53) as f64;
                (uniform * uniform * uniform * f64::from(rows)) as u32
            }
        })
        .collect()
}

#[test]
fn rows_and_sums_are_those_of_the_host() -> Result<()> {
    for (dtype, rows, row_len, n) in [
        (DType::F32, 1, 3, 40),
        (DType::F32, 255, 64, 300),
        (DType::BF16, 256, 24, 1024),
        (DType::F16, 70_000, 5, 2600),
        (DType::F64, 20_000_000, 33, 700),
        (DType::F32, u32::MAX, 300, 1025),
    ] {
        for kind in [Use::Plain, Use::Sum, Use::Mean, Use::Weighted] {
            let own = (dtype, dtype);
            let mut given = vec![Given::new(ids(n, rows, 7), row_len, kind, own, 3)?];
            given.push(Given::new(ids(n / 3, rows, 8), row_len, Use::Plain, (arithmetic(dtype), dtype), 4)?);
            compare(vec![Lookups { dtype, rows, row_len, given }], 1, kind == Use::Mean)?;
        }
    }
    Ok(())
}

#[test]
fn several_tables_are_sorted_at_once() -> Result<()> {
    let table = |dtype: DType, rows: u32, row_len: usize, sizes: &[usize]| -> Result<Lookups> {
        let own = (dtype, dtype);
        let given = sizes.iter().map(|&n| Given::new(ids(n, rows, n as u64), row_len, Use::Plain, own, n as u64));
        Ok(Lookups { dtype, rows, row_len, given: given.collect::<Result<_>>()? })
    };
    for (tiles, reversed) in [(1, false), (2, true), (3, false)] {
        compare(
            vec![
                table(DType::F32, 100_000, 8, &[500, 1, 33])?,
                table(DType::F64, 3, 4, &[5100])?,
                table(DType::F32, 300, 1, &[1])?,
                table(DType::BF16, 5_000, 16, &[64, 64, 64, 64, 64])?,
            ],
            tiles,
            reversed,
        )?;
    }
    Ok(())
}

#[test]
fn ids_that_are_no_row_contribute_nothing() -> Result<()> {
    for n in [1, 5, 2000] {
        let given = vec![Given::new(vec![NO_ROW; n], 4, Use::Plain, (DType::F32, DType::F32), 1)?];
        compare(vec![Lookups { dtype: DType::F32, rows: 10, row_len: 4, given }], 1, false)?;
    }
    Ok(())
}

#[test]
fn ids_are_checked() {
    let check = |kernel: &str, given: &mut Memory, n: usize, rows: u32, padding: u32| -> (Vec<u32>, Vec<u32>, u32) {
        let (mut to, mut trained) = (Memory::zeros::<u32>(n), Memory::zeros::<u32>(n));
        let mut bad = Memory::zeros::<u32>(1);
        let args = abi::IdsArgs {
            from: given.address(),
            to: to.address(),
            trained: if padding == NO_ROW { 0 } else { trained.address() },
            bad: bad.address(),
            n: n as u64,
            rows,
            padding,
        };
        launch(kernel, 1, &args, false);
        (to.read(), trained.read(), bad.read::<u32>()[0])
    };
    let none = NO_ROW;
    let wide = [0i64, 9, 10, -1, 1 << 32, i64::MIN, i64::MAX, 3];
    let expected = vec![0, 9, none, none, none, none, none, 3];
    let unused = vec![0; 8];
    assert_eq!(check("rows_ids_i64", &mut Memory::of(&wide, 8), 8, 10, NO_ROW), (expected, unused, 1));
    let all_rows = [u32::MAX - 1, 0, u32::MAX];
    let (expected, unused) = (vec![u32::MAX - 1, 0, none], vec![0; 3]);
    assert_eq!(check("rows_ids_u32", &mut Memory::of(&all_rows, 4), 3, u32::MAX, NO_ROW), (expected, unused, 1));
    let (given, without) = (vec![4, 0, 4, 7], vec![none, 0, none, 7]);
    assert_eq!(check("rows_ids_u8", &mut Memory::of(&[4u8, 0, 4, 7], 1), 4, 8, 4), (given.clone(), without.clone(), 0));
    assert_eq!(
        check("rows_ids_i16", &mut Memory::of(&[4i16, 0, 4, 7], 2), 4, 8, 4),
        (given.clone(), without.clone(), 0)
    );
    assert_eq!(check("rows_ids_i32", &mut Memory::of(&[4i32, 0, 4, 7], 4), 4, 8, 4), (given, without, 0));
    assert_eq!(check("rows_ids_i16", &mut Memory::of(&[-4i16], 2), 1, 8, NO_ROW), (vec![none], vec![0], 1));
}

#[test]
fn unknown_rows_are_gathered_as_nan() -> Result<()> {
    let table = Tensor::from_vec((0..40).map(|x| x as f32).collect(), (10, 4), &Device::Cpu)?;
    let (mut from, mut ids, mut to) = (memory(&table, 0)?, Memory::of(&[9, NO_ROW], 0), Memory::zeros::<f32>(8));
    let args = abi::GatherArgs { ids: ids.address(), table: from.address(), out: to.address(), n: 2, row_len: 1 };
    launch("rows_gather_16", 1, &args, false);
    let got = to.read::<f32>();
    assert_eq!(got[..4], [36.0, 37.0, 38.0, 39.0]);
    assert!(got[4..].iter().all(|x| x.is_nan()));
    Ok(())
}
