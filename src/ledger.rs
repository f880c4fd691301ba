//! Updates that rows of a table have missed, and the sum of the steps that a dense optimizer would have made. Pure.
//!
//! Without a gradient m and u only shrink, so a row that was last updated in update s has missed, by update n,
//!
//! ```text
//! w_n = P(s, n) * (w_s - sum_j c_j * r_j / P(s, j))        j = s + 1 .. n, k = j - s
//! r_j = beta1^k * m / (beta2^k * u + eps)                  by how many step sizes the row moves in update j
//! c_j = lr_j / (1 - beta1^t_j)                             the step size
//! P(s, j) = product of (1 - lr_i * decay) over i = s + 1 .. j
//! ```
//!
//! With `y = eps / (u + eps)`, `rho = beta1 / beta2` and `x_k = beta2^-k - 1` the quotient is
//!
//! ```text
//! r_j = m / (u + eps) * rho^k / (1 + y * x_k) = m / (u + eps) * rho^k * sum_i (-y * x_k)^i
//! ```
//!
//! so the sum over j splits into numbers of the row's elements, m, u and y, and numbers that are the same for all rows
//! that were last updated in s: `S_i(s) = sum_j c_j * rho^k * x_k^i / P(s, j)`. The ledger holds those, one entry for
//! each update; an entry is final once its window has passed, since `rho^k` vanishes (after 394 updates with the
//! default betas). Six terms leave less than 1e-9 of the movement for the default betas, whatever u is. Where they do
//! not suffice, for other betas and a u near eps, or where PyTorch's u reaches its epsilon within the window, the
//! missed updates are made one by one ([`Missed::weight_one_by_one`]).
//!
//! Invariant: a row that catches up in several parts, or later, ends where it would have in one, but for rounding. What is
//! all zero stays as it is, bit for bit. What depends on a row is mirrored in `cuda/ledger.cuh`, statement for statement;
//! what does not is computed here, for kernels too, which read its entries.

use crate::element::Arithmetic;
use crate::rule::{self, Coefficients, EpsMode, Hyperparameters};

/// Terms of the series in y.
const TERMS: usize = 6;
/// What may be left out of a row's movement, relative to it.
const LEFT_OUT: f64 = 1e-9;
/// Where a window ends: what follows is less than this share of the step that began it.
const VANISHED: f64 = 1e-18;
/// The number of entries that are kept before all rows catch up and the ledger begins anew.
pub(crate) const FULL: usize = 1 << 16;
/// Shrinkages beyond this are stored as this: see `codec`.
const LARGEST_SHRINKAGE: f64 = (1u64 << 40) as f64;
/// So many updates a window may have.
pub(crate) const LONGEST_WINDOW: usize = FULL;

/// How many updates it takes until what is left of a step's momentum has vanished, `ln(1e-18) / ln(beta1 / beta2)`. Work and
/// memory of a ledger grow with it.
pub(crate) fn window(beta1: f64, beta2: f64) -> f64 {
    if beta1 == 0.0 { 0.0 } else { VANISHED.ln() / (beta1 / beta2).ln() }
}

/// Numbers of missed updates that are the same for all rows; kernels take them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Terms {
    beta1: f64,
    beta2: f64,
    eps_inside: f64,
    eps_outside: f64,
    smallest_u: f64,
    /// Updates of a window.
    window: u64,
}

/// One update of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MissedUpdate {
    step_size: f64,
    decay: f64,
}

/// Sums for the rows that have seen no update after one.
#[derive(Clone, Copy, Debug)]
struct Entry {
    sums: [f64; TERMS],
    /// `1 / P` up to now, within the window.
    growth: f64,
    /// The logarithm of `P` since the ledger began.
    log_decay: f64,
    /// By how much units have shrunk since the ledger began.
    shrunk: u64,
    /// The update after which the entry counts.
    update: MissedUpdate,
}

/// An entry as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
#[cfg(any(test, feature = "cuda"))]
pub(crate) struct Record {
    sums: [f64; TERMS],
    log_decay: f64,
    shrunk: u64,
    step_size: f64,
    decay: f64,
    /// `beta1^k` and `beta2^k`, where k is the number of the entry.
    powers: [f64; 2],
}

/// The updates of one table since all of its rows were last up to date.
#[derive(Debug)]
pub(crate) struct Ledger {
    hyper: Hyperparameters,
    entries: Vec<Entry>,
    /// `rho^k` and `x_k` for each k of a window.
    powers: Vec<(f64, f64)>,
    /// `beta1^k` and `beta2^k` for each k since the ledger began.
    shrinking: Vec<(f64, f64)>,
    /// The series needs a u of this or more: below, updates are made one by one.
    smallest_u: f64,
}

impl Ledger {
    /// A ledger in which no row has missed an update.
    pub(crate) fn new(hyper: &Hyperparameters) -> Self {
        let Hyperparameters { beta1, beta2, eps, eps_mode, .. } = *hyper;
        let rho = if beta1 == 0.0 { 0.0 } else { beta1 / beta2 };
        let mut powers = Vec::new();
        let mut k = 0;
        loop {
            k += 1;
            let (power, shrunk) = (rho.powi(k), beta2.powi(k));
            if power < VANISHED {
                break;
            }
            powers.push((power, 1.0 / shrunk - 1.0));
        }
        let smallest_u = match eps_mode {
            // u stays at its epsilon from some update on, which must be behind the window.
            EpsMode::InsideMax => eps / beta2.powi(powers.len() as i32),
            EpsMode::AddToNorm => {
                // What the first term that is left out is of the first one, for y = 1: it falls with y to this power.
                let whole: f64 = powers.iter().map(|(power, _)| power).sum();
                let rest: f64 = powers.iter().map(|(power, x)| power * x.powi(TERMS as i32)).sum();
                let y = if whole > 0.0 { (LEFT_OUT * whole / rest).powf(1.0 / TERMS as f64) } else { 1.0 };
                if y >= 1.0 { 0.0 } else { eps * (1.0 / y - 1.0) }
            }
        };
        let mut ledger = Self { hyper: *hyper, entries: Vec::new(), powers, shrinking: vec![(1.0, 1.0)], smallest_u };
        ledger.clear();
        ledger
    }

    /// All rows are up to date.
    pub(crate) fn clear(&mut self) {
        let update = MissedUpdate { step_size: 0.0, decay: 0.0 };
        self.entries.clear();
        self.entries.push(Entry { sums: [0.0; TERMS], growth: 1.0, log_decay: 0.0, shrunk: 0, update });
    }

    /// The number of the last update, from 0 for the state in which the ledger began.
    pub(crate) fn now(&self) -> usize {
        self.entries.len() - 1
    }

    /// How many bytes it takes.
    pub(crate) fn bytes(&self) -> usize {
        let Self { entries, powers, shrinking, .. } = self;
        size_of_val::<[Entry]>(entries) + size_of_val::<[(f64, f64)]>(powers) + size_of_val::<[(f64, f64)]>(shrinking)
    }

    /// Whether the recorded updates are made with these numbers.
    pub(crate) fn is_for(&self, hyper: &Hyperparameters) -> bool {
        self.hyper == *hyper
    }

    /// The entries that a reader lacks who has seen the first `seen` of them, and the number of the first one.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn records(&self, seen: usize) -> (usize, Vec<Record>) {
        // An entry changes while its window is open, with every update.
        let is_new = seen < self.entries.len();
        let first = if is_new { seen.saturating_sub(self.powers.len() + 1) } else { seen };
        let record = |(entry, powers): (&Entry, &(f64, f64))| Record {
            sums: entry.sums,
            log_decay: entry.log_decay,
            shrunk: entry.shrunk,
            step_size: entry.update.step_size,
            decay: entry.update.decay,
            powers: [powers.0, powers.1],
        };
        (first, self.entries.iter().zip(&self.shrinking).skip(first).map(record).collect())
    }

    /// Numbers of missed updates that are the same for all rows.
    pub(crate) fn terms(&self) -> Terms {
        let Hyperparameters { beta1, beta2, eps, eps_mode, .. } = self.hyper;
        let (eps_inside, eps_outside) = match eps_mode {
            EpsMode::InsideMax => (eps, 0.0),
            EpsMode::AddToNorm => (0.0, eps),
        };
        let window = self.powers.len() as u64;
        Terms { beta1, beta2, eps_inside, eps_outside, smallest_u: self.smallest_u, window }
    }

    /// Records an update.
    pub(crate) fn record(&mut self, c: &Coefficients<f64>, shrink: u64) {
        self.record_update(MissedUpdate { step_size: c.step_size, decay: c.decay }, shrink);
    }

    /// The updates since it began: step size, decay and shrinkage of each.
    pub(crate) fn updates(&self) -> Vec<[f64; 3]> {
        let updates = self.entries.windows(2).map(|pair| {
            let MissedUpdate { step_size, decay } = pair[1].update;
            [step_size, decay, (pair[1].shrunk - pair[0].shrunk) as f64]
        });
        updates.collect()
    }

    /// The ledger of these [updates](Self::updates), to the bit. `None` if no run can have made them.
    pub(crate) fn of_updates(hyper: &Hyperparameters, updates: &[[f64; 3]]) -> Option<Self> {
        let mut ledger = Self::new(hyper);
        for &[step_size, decay, shrink] in updates {
            let is_shrinkage = shrink.fract() == 0.0 && (0.0..=LARGEST_SHRINKAGE).contains(&shrink);
            if !(step_size.is_finite() && (0.0..1.0).contains(&decay) && is_shrinkage) {
                return None;
            }
            ledger.record_update(MissedUpdate { step_size, decay }, shrink as u64);
        }
        (ledger.now() <= FULL).then_some(ledger)
    }

    fn record_update(&mut self, update: MissedUpdate, shrink: u64) {
        let Some(last) = self.entries.last().copied() else { return };
        if self.shrinking.len() == self.entries.len() {
            let k = self.entries.len() as f64;
            self.shrinking.push((self.hyper.beta1.powf(k), self.hyper.beta2.powf(k)));
        }
        let grown = 1.0 / (1.0 - update.decay);
        for (entry, (power, x)) in self.entries.iter_mut().rev().zip(&self.powers) {
            entry.growth *= grown;
            let mut term = update.step_size * power * entry.growth;
            for sum in &mut entry.sums {
                *sum += term;
                term *= x;
            }
        }
        self.entries.push(Entry {
            sums: [0.0; TERMS],
            growth: 1.0,
            log_decay: last.log_decay + (-update.decay).ln_1p(),
            shrunk: last.shrunk.saturating_add(shrink),
            update,
        });
    }

    /// The updates after `since` that a row has missed.
    pub(crate) fn missed<A: Arithmetic>(&self, since: usize) -> Missed<'_, A> {
        let now = self.now();
        let (entry, last) = (&self.entries[since.min(now)], &self.entries[now]);
        let (m_shrunk, u_shrunk) = self.shrinking[now - since.min(now)];
        let Terms { beta1, beta2, eps_inside, eps_outside, smallest_u, .. } = self.terms();
        let decay = exp(last.log_decay - entry.log_decay);
        Missed {
            decay: A::from_f64(decay),
            sums: entry.sums.map(|sum| A::from_f64(sum * decay)),
            beta1: A::from_f64(m_shrunk),
            beta2: A::from_f64(u_shrunk),
            each_beta1: A::from_f64(beta1),
            each_beta2: A::from_f64(beta2),
            eps_inside: A::from_f64(eps_inside),
            eps_outside: A::from_f64(eps_outside),
            smallest_u: A::from_f64(smallest_u),
            shrunk: last.shrunk - entry.shrunk,
            missed: Updates { before: entry, entries: &self.entries[since.min(now) + 1..], window: self.powers.len() },
        }
    }

    /// Whether weights decay without a gradient.
    pub(crate) fn decays_since(&self, since: usize) -> bool {
        self.entries[since.min(self.now())].log_decay != self.entries[self.now()].log_decay
    }
}

/// The updates that a row has missed.
#[derive(Clone, Copy)]
struct Updates<'l> {
    /// The one after which it was up to date.
    before: &'l Entry,
    entries: &'l [Entry],
    window: usize,
}

/// The updates that a row has missed, in the type of the arithmetic.
#[derive(Clone, Copy)]
pub(crate) struct Missed<'l, A> {
    /// `P`.
    decay: A,
    /// `P * S_i`.
    sums: [A; TERMS],
    /// `beta1^k` and `beta2^k`.
    beta1: A,
    beta2: A,
    each_beta1: A,
    each_beta2: A,
    eps_inside: A,
    pub(crate) eps_outside: A,
    smallest_u: A,
    /// By how much units have shrunk.
    pub(crate) shrunk: u64,
    missed: Updates<'l>,
}

impl<A: Arithmetic> Missed<'_, A> {
    /// The shrunken moments. A u of zero, where no gradient has ever been, stays so, though a dense optimizer would
    /// make it its epsilon: the first gradient does, before anything is divided by it.
    #[inline(always)]
    pub(crate) fn moments(&self, m: A, u: A) -> (A, A) {
        let shrunk = rule::maximum(u * self.beta2, self.eps_inside);
        (m * self.beta1, if u == A::ZERO { A::ZERO } else { shrunk })
    }

    /// The same for a row whose weights have been written since, and stand as they are: its moments alone catch up.
    pub(crate) fn standing(self) -> Self {
        // Without updates, one by one: the weight is not even multiplied, whatever its moments are.
        let missed = Updates { entries: &[], ..self.missed };
        let (decay, smallest_u) = (A::from_f64(1.0), A::from_f64(f64::INFINITY));
        Self { decay, sums: [A::ZERO; TERMS], smallest_u, missed, ..self }
    }

    /// The weight of a row without momentum.
    #[inline(always)]
    pub(crate) fn decayed(&self, w: A) -> A {
        self.decay * w
    }

    /// Whether the series suffices for an element.
    #[inline(always)]
    pub(crate) fn is_series(&self, m: A, u: A) -> bool {
        u >= self.smallest_u || m == A::ZERO
    }

    /// The weight, where the series suffices.
    #[inline(always)]
    pub(crate) fn weight(&self, w: A, m: A, u: A) -> A {
        let denominator = u + self.eps_outside;
        let (ratio, y) =
            if denominator == A::ZERO { (A::ZERO, A::ZERO) } else { (m / denominator, self.eps_outside / denominator) };
        let mut sum = self.sums[TERMS - 1];
        for term in self.sums[..TERMS - 1].iter().rev() {
            sum = *term - y * sum;
        }
        // Where there is no momentum the sums may be beyond f32, for betas that are close together.
        let moved = if ratio == A::ZERO { A::ZERO } else { ratio * sum };
        self.decay * w - moved
    }

    /// The weight, update by update: what a dense optimizer does.
    pub(crate) fn weight_one_by_one(&self, mut w: A, mut m: A, mut u: A) -> A {
        let Updates { before, entries, window } = self.missed;
        let (within, behind) = entries.split_at(window.min(entries.len()));
        for Entry { update, .. } in within {
            m = self.each_beta1 * m;
            u = rule::maximum(self.each_beta2 * u, self.eps_inside);
            let denominator = u + self.eps_outside;
            let ratio = if denominator == A::ZERO { A::ZERO } else { m / denominator };
            w = w - A::from_f64(update.decay) * w - A::from_f64(update.step_size) * ratio;
        }
        // Behind the window nothing but decay is left.
        let Some(last) = behind.last() else { return w };
        let log_decay = within.last().unwrap_or(before).log_decay;
        w * A::from_f64(exp(last.log_decay - log_decay))
    }
}

/// e to the power of a number that is not positive, within two units in the last place: the same on each machine, which
/// those of mathematical libraries are not. 0 where it would be subnormal.
fn exp(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    if x < -708.0 {
        return 0.0;
    }
    let k = (x * std::f64::consts::LOG2_E - 0.5) as i64;
    // The logarithm of 2 in two parts, of which the first has zeros at its end: its product with k is exact.
    let r = (x - k as f64 * LN_2_HIGH) - k as f64 * LN_2_LOW;
    let mut sum = 1.0;
    for n in (1..=14).rev() {
        sum = 1.0 + r * sum * RECIPROCALS[n];
    }
    sum * f64::from_bits(((k + 1023) as u64) << 52)
}

const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// `1 / n`.
const RECIPROCALS: [f64; 15] = {
    let mut reciprocals = [0.0; 15];
    let mut n = 1;
    while n < 15 {
        reciprocals[n] = 1.0 / n as f64;
        n += 1;
    }
    reciprocals
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_that_of_the_library_within_two_units() {
        assert_eq!((exp(0.0), exp(-0.0), exp(-1e300), exp(f64::NEG_INFINITY)), (1.0, 1.0, 0.0, 0.0));
        let mut x = -1e-18;
        while x > -700.0 {
            let (got, expected) = (exp(x), x.exp());
            let units = (got.to_bits() as i64 - expected.to_bits() as i64).abs();
            assert!(units <= 2, "{x}: {got} is {units} units from {expected}");
            x *= 1.000_37;
        }
    }

    #[test]
    fn a_reader_is_told_what_has_changed() {
        let hyper = Hyperparameters {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-7,
            eps_mode: EpsMode::AddToNorm,
            weight_decay: crate::rule::WeightDecay::Decoupled(0.1),
        };
        let mut ledger = Ledger::new(&hyper);
        let (mut copy, mut seen): (Vec<Record>, usize) = (Vec::new(), 0);
        for t in 1..1000u64 {
            ledger.record(&Coefficients::of_update(&hyper, 1e-2 / t as f64, t), t);
            if t % 7 == 0 {
                let (first, records) = ledger.records(seen);
                assert!(records.len() <= ledger.powers.len() + 9);
                copy.truncate(first);
                copy.extend(records);
                seen = copy.len();
                assert_eq!(copy, ledger.records(0).1);
            }
        }
    }
}
