//! Rows that have missed updates, and their marks.

use candle_core::{DType, Result, Var};

use super::rows::row_grad;
use super::*;
use crate::kernel::cuda::plan::{blocks, blocks_of_units};
use crate::kernel::cuda::source::catch_up_kernel;
use crate::kernel::{CatchUpTask, RowTask, Written, cpu};
use crate::ledger::Ledger;
use crate::mark::Mark;
use crate::state::{Layout, Place, Units};

/// A table with rows that have missed updates, since only some were updated now and then.
struct Behind {
    var: Var,
    state: ParamState,
    ledger: Ledger,
    /// After which update each row was up to date, with flags.
    marks: Vec<u32>,
}

const EMPTY: u32 = Mark::EMPTY;
const PADDING: u32 = Mark::PADDING;
/// Rows that are padding: trained in vain, never touched, and touched first in the last update but one.
const PADDINGS: [u32; 3] = [3, 39, 21];

impl Behind {
    fn new(keep: &Keep, row_len: usize, span: i32) -> Result<Self> {
        let (rows, encoding) = (40, Encoding::of(&hyper(keep)));
        let var = Var::from_tensor(&tensor(&[rows, row_len], 5, 2, keep.dtypes.0)?)?;
        let layout = Layout::of(&var, keep.state, Units::Rows, keep.rowwise, encoding);
        let state = ParamState::zeros(&var, Place::Host, &layout, keep.rounding).map_err(candle_core::Error::from)?;
        let mut behind = Self { var, state, ledger: Ledger::new(&hyper(keep)), marks: vec![EMPTY; rows] };
        PADDINGS.into_iter().for_each(|row| behind.marks[row as usize] |= PADDING);
        for t in 1..=900u64 {
            let base = update_args(keep, t, encoding);
            if [1, 2, 300, 500, 899].contains(&t) {
                let touched: Vec<u32> = (0..rows as u32 - 3).filter(|row| (row + t as u32).is_multiple_of(3)).collect();
                let grad = row_grad(&touched, row_len, &[tensor(&[9, row_len], t, span, keep.dtypes.1)?]);
                cpu::update_rows(vec![RowTask {
                    nth: 0,
                    var: &behind.var,
                    grad: &grad,
                    update_args: base,
                    state: &mut behind.state,
                    checksums: None,
                }])?;
                behind.ledger.record(&base.coefficients, base.shrink);
                for row in touched {
                    let mark = &mut behind.marks[row as usize];
                    *mark = (*mark & PADDING) | behind.ledger.now() as u32;
                }
            } else {
                behind.ledger.record(&base.coefficients, 24_000);
            }
        }
        // As after loading a state: nobody knows that the moments of a row are zero.
        behind.marks[38] = PADDING;
        Ok(behind)
    }

    fn behind(&self, row: u32) -> Option<(u32, Mark)> {
        let mark = Mark::new(self.marks[row as usize]);
        let is_spared = mark.is_empty() && (mark.is_padding() || !self.ledger.decays_since(mark.since()));
        (mark.since() < self.ledger.now() && !is_spared).then_some((row, mark))
    }
}

#[test]
fn rows_pay_what_they_owe_with_the_bits_of_the_cpu() -> Result<()> {
    use DType::{BF16, F16, F32, F64};
    let decay = WeightDecay::Decoupled(0.02);
    let rounded = [Rounding::Stochastic, Rounding::Master];
    let mut keeps =
        vec![Keep { dtypes: (F64, F64), ..PLAIN }, Keep { dtypes: (F64, F64), decay, rowwise: true, ..PLAIN }];
    for state in STATES {
        for dtype in [F32, F16, BF16] {
            for rowwise in [false, true] {
                keeps.push(Keep { dtypes: (dtype, F32), state, rowwise, ..PLAIN });
                keeps.push(Keep { dtypes: (dtype, F32), state, rowwise, decay, eps_mode: EpsMode::InsideMax, ..PLAIN });
            }
        }
        keeps.extend(rounded.map(|rounding| Keep { dtypes: (BF16, F32), state, decay, rounding, ..PLAIN }));
    }
    for (nth, keep) in keeps.into_iter().enumerate() {
        // Of all magnitudes: for some elements the series does not suffice.
        let (row_len, span) = ([24, 5, 64, 300][nth % 4], if nth % 2 == 0 { 3 } else { 12 });
        let Behind { var, mut state, ledger, mut marks } = Behind::new(&keep, row_len, span)?;
        let behind = Behind {
            var: var.clone(),
            state: ParamState::nothing(&state.moments.layout),
            ledger,
            marks: marks.clone(),
        };
        let ledger = &behind.ledger;
        let mut devices = arrays(&var, &state, 0)?;
        let is_all = nth % 3 == 0;
        // Rows that are named several times, and the id of nothing.
        let named: Vec<u32> = vec![7, 3, 3, 39, 20, u32::MAX, 7, 0, 21, 22, 3, 38];
        let mut rows: Vec<u32> = if is_all { (0..40).collect() } else { named[..].to_vec() };
        rows.retain(|row| *row < 40);
        rows.sort_unstable();
        rows.dedup();
        let mut catching_up: Vec<(u32, Mark)> = rows.iter().filter_map(|&row| behind.behind(row)).collect();
        let (rounding, key, layout) = (keep.rounding, 77, state.moments.layout);
        let task = CatchUpTask { var: &var, row_len, ledger, rounding, key, state: &mut state };
        assert_eq!(cpu::catch_up_rows(task, &mut catching_up, Written::Refused)?, None);

        let mut address = |i: usize| devices[i].as_mut().map_or(0, |(memory, _)| memory.address());
        let (mut of_marks, mut of_rows) = (Memory::of(&marks, 0), Memory::of(&named, 0));
        let mut entries = Memory::of(&ledger.records(0).1, 0);
        let n = if is_all { 40 } else { named.len() as u64 };
        let args = abi::CatchUpArgs {
            tensor: abi::Tensor {
                param: address(0),
                exp_avg: address(1),
                exp_inf: address(2),
                scales: address(3),
                master: address(4),
                rows: if is_all { 0 } else { of_rows.address() },
                len: var.elem_count() as u64,
                unit: row_len as u64,
                ..abi::Tensor::default()
            },
            marks: of_marks.address(),
            entries: entries.address(),
            terms: ledger.terms(),
            n,
            all: 40,
            key,
            limits: layout.encoding.limits().as_array(),
            rounding: u32::from(rounding == Rounding::Stochastic),
            now: ledger.now() as u32,
            mark: ledger.now() as u32,
        };
        let kernel = catch_up_kernel(keep.dtypes.0, layout.dtype, layout.rowwise);
        launch(&kernel, blocks_of_units(n, row_len as u64) as usize, &args, nth % 2 == 0);
        for (i, (got, expected)) in devices.iter().zip(&arrays(&var, &state, 0)?).enumerate() {
            if let (Some((got, dtype)), Some((expected, _))) = (got, expected) {
                assert!(numbers(got, *dtype) == numbers(expected, *dtype), "{keep:?}, array {i}, span {span}");
            }
        }
        for (row, _) in catching_up {
            let mark = &mut marks[row as usize];
            *mark = ledger.now() as u32 | (*mark & (EMPTY | PADDING));
        }
        assert_eq!(of_marks.read::<u32>(), marks, "{keep:?}");
    }
    Ok(())
}

#[test]
fn rows_are_marked() {
    let (mut marks, mut rows) = (Memory::of(&[EMPTY, EMPTY | PADDING | 5, 9, 4], 0), Memory::of(&[3u32, 1, 99, 1], 0));
    let args = abi::MarkArgs { marks: marks.address(), rows: rows.address(), n: 4, all: 4, kept: PADDING, added: 7 };
    launch("rows_mark", blocks(4) as usize, &args, false);
    assert_eq!(marks.read::<u32>(), [EMPTY, PADDING | 7, 9, 7]);
    let args = abi::MarkArgs { marks: marks.address(), rows: 0, n: 4, all: 4, kept: EMPTY, added: 0 };
    launch("rows_mark", blocks(4) as usize, &args, false);
    assert_eq!(marks.read::<u32>(), [EMPTY, 0, 0, 0]);
}
