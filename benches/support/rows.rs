//! The memory's own speed for some rows of a table: the same rows of the same arrays as an update, in ascending order,
//! with the rows to come fetched ahead, and no arithmetic.
//!
//! Arrays are allocated as those of the optimizer: the weights by the program's allocator, the moments as mappings that
//! ask for large pages.

use memmap2::MmapMut;
use rayon::prelude::*;

/// A table of f32, its moments, and what it has for gradients.
pub(crate) struct Rows {
    row_len: usize,
    param: Vec<u32>,
    exp_avg: MmapMut,
    exp_inf: MmapMut,
    looked_up: Vec<u32>,
}

/// Which rows are touched, ascending, and from which row of the gradient each one gets its own.
pub(crate) struct Touched {
    rows: Vec<u32>,
    positions: Vec<u32>,
}

impl Touched {
    /// Of these ids; of equal ones only the first counts.
    pub(crate) fn of(ids: &[u32]) -> Self {
        let mut pairs: Vec<(u32, u32)> = ids.iter().copied().zip(0..).collect();
        pairs.sort_unstable();
        pairs.dedup_by_key(|(row, _)| *row);
        let (rows, positions) = pairs.into_iter().unzip();
        Self { rows, positions }
    }

    /// Of these ids, where each bag has `per_bag` of them and one row of the gradient.
    #[allow(dead_code, reason = "the benches have no bags")]
    pub(crate) fn of_bags(ids: &[u32], per_bag: usize) -> Self {
        let Self { rows, positions } = Self::of(ids);
        Self { rows, positions: positions.into_iter().map(|position| position / per_bag as u32).collect() }
    }

    /// How many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
}

impl Rows {
    /// A table of `rows` times `row_len`.
    pub(crate) fn new(rows: usize, row_len: usize) -> std::io::Result<Self> {
        let moment = || -> std::io::Result<MmapMut> {
            let map = MmapMut::map_anon((rows * row_len * 4).max(1))?;
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage); // a wish
            Ok(map)
        };
        let (exp_avg, exp_inf) = (moment()?, moment()?);
        Ok(Self { row_len, param: vec![0x5a; rows * row_len], exp_avg, exp_inf, looked_up: Vec::new() })
    }

    /// Reads the rows and writes them one after another, as a lookup does.
    #[allow(dead_code, reason = "the benches time steps only")]
    pub(crate) fn look_up(&mut self, ids: &[u32]) {
        let row = |id: u32| &self.param[id as usize * self.row_len..][..self.row_len];
        self.looked_up.clear();
        for (k, &id) in ids.iter().enumerate() {
            if let Some(&next) = ids.get(k + AHEAD) {
                prefetch::<FIRST>(row(next));
            }
            self.looked_up.extend_from_slice(row(id));
        }
    }

    /// Pools rows of its own: see [`pool`].
    #[allow(dead_code, reason = "the benches have no bags")]
    pub(crate) fn pool(&mut self, ids: &[u32], per_bag: usize) {
        pool(&self.param, self.row_len, ids, per_bag, &mut self.looked_up);
    }

    /// Reads the gradients' rows, and reads and writes those of weights and moments, as an update does.
    pub(crate) fn update(&mut self, touched: &Touched, grads: &[f32]) {
        let threads = rayon::current_num_threads();
        let grads: &[u32] = bytemuck::cast_slice(grads);
        let slices = Slices {
            first: 0,
            param: &mut self.param,
            exp_avg: bytemuck::cast_slice_mut(&mut self.exp_avg),
            exp_inf: bytemuck::cast_slice_mut(&mut self.exp_inf),
        };
        let row_len = self.row_len;
        let piece = touched.len().div_ceil(threads * 4).max(1);
        slices.cut(touched, row_len, piece).into_par_iter().with_max_len(1).for_each(|(from, to, slices)| {
            slices.touch(touched, from..to, grads, row_len);
        });
    }
}

/// Reads the rows of bags of `per_bag` ids each, and writes a row for each bag.
#[allow(dead_code, reason = "the benches have no bags")]
pub(crate) fn pool(table: &[u32], row_len: usize, ids: &[u32], per_bag: usize, pooled: &mut Vec<u32>) {
    let row = |id: u32| &table[id as usize * row_len..][..row_len];
    let bags = ids.len() / per_bag;
    pooled.resize(bags * row_len, 0);
    let pool_some = |pooled: &mut [u32], ids: &[u32]| {
        for (bag, pooled) in pooled.chunks_exact_mut(row_len).enumerate() {
            pooled.fill(0);
            for k in bag * per_bag..(bag + 1) * per_bag {
                if let Some(&next) = ids.get(k + AHEAD_OF_POOL) {
                    prefetch::<SECOND>(row(next));
                }
                pooled.iter_mut().zip(row(ids[k])).for_each(|(pooled, &bits)| *pooled ^= bits);
            }
        }
    };
    let threads = rayon::current_num_threads();
    if threads == 1 {
        return pool_some(pooled, ids); // no other thread has to wake up for it
    }
    let piece = bags.div_ceil(threads * 4).max(1);
    let pieces = pooled.par_chunks_mut(piece * row_len).zip(ids.par_chunks(piece * per_bag));
    pieces.with_max_len(1).for_each(|(pooled, ids)| pool_some(pooled, ids));
}

/// Parts of the arrays that begin with row `first`.
struct Slices<'x> {
    first: usize,
    param: &'x mut [u32],
    exp_avg: &'x mut [u32],
    exp_inf: &'x mut [u32],
}

/// Rows that are asked for ahead of the one that is worked on.
const AHEAD: usize = 8;
/// The same where rows are only read, into the second cache: more lines can be on their way there than to the first one.
/// Measured, 20 rows of 64 f32 a bag, 8,192 bags, one core of an AMD EPYC: 3.3 ms, and 4.8 ms with the first cache.
const AHEAD_OF_POOL: usize = 16;

/// Into which cache: `_MM_HINT_T0` and `_MM_HINT_T1`.
const FIRST: i32 = 3;
const SECOND: i32 = 2;

impl<'x> Slices<'x> {
    fn cut(self, touched: &Touched, row_len: usize, piece: usize) -> Vec<(usize, usize, Self)> {
        let Self { first: mut begin, mut param, mut exp_avg, mut exp_inf } = self;
        let mut pieces = Vec::new();
        for from in (0..touched.len()).step_by(piece) {
            let to = touched.len().min(from + piece);
            let (first, end) = (touched.rows[from] as usize, touched.rows[to - 1] as usize + 1);
            let (skipped, taken) = ((first - begin) * row_len, (end - first) * row_len);
            let (w, m, u);
            (w, param) = param.split_at_mut(skipped).1.split_at_mut(taken);
            (m, exp_avg) = exp_avg.split_at_mut(skipped).1.split_at_mut(taken);
            (u, exp_inf) = exp_inf.split_at_mut(skipped).1.split_at_mut(taken);
            begin = end;
            pieces.push((from, to, Self { first, param: w, exp_avg: m, exp_inf: u }));
        }
        pieces
    }

    fn touch(self, touched: &Touched, range: std::ops::Range<usize>, grads: &[u32], row_len: usize) {
        let Self { first, param, exp_avg, exp_inf } = self;
        let place = |k: usize| (touched.rows[k] as usize - first) * row_len;
        for k in range.clone() {
            if k + AHEAD < range.end {
                let next = place(k + AHEAD);
                prefetch::<FIRST>(&param[next..next + row_len]);
                prefetch::<FIRST>(&exp_avg[next..next + row_len]);
                prefetch::<FIRST>(&exp_inf[next..next + row_len]);
                prefetch::<FIRST>(&grads[touched.positions[k + AHEAD] as usize * row_len..][..row_len]);
            }
            let place = place(k);
            let grads = &grads[touched.positions[k] as usize * row_len..][..row_len];
            let param = &mut param[place..place + row_len];
            let exp_avg = &mut exp_avg[place..place + row_len];
            let exp_inf = &mut exp_inf[place..place + row_len];
            for (((w, &g), m), u) in param.iter_mut().zip(grads).zip(exp_avg).zip(exp_inf) {
                *w ^= g;
                *m ^= g;
                *u ^= g;
            }
        }
    }
}

#[inline(always)]
fn prefetch<const CACHE: i32>(row: &[u32]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(16) {
        use std::arch::x86_64::_mm_prefetch;
        // SAFETY: a prefetch is a hint that neither faults nor changes anything a program sees; SSE, which has it, is
        // part of x86-64.
        unsafe { _mm_prefetch::<CACHE>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
