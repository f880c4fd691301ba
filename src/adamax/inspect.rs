//! What an optimizer keeps, to look at: bytes by kind, and statistics of moments. Nothing here is computed before it is
//! asked for.

use candle_core::{DType, Tensor};

use super::Adamax;
use super::state::StateCell;
use super::sums::Sum;
use super::vars::Param;
use crate::error::Result;
use crate::state::{Buffer, Master};

/// How many bytes an optimizer keeps beside the variables, by kind, once all of them have been written: large arrays take
/// memory where they are written. What kernels keep from call to call is not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StateBytes {
    /// m and u, or their codes.
    pub moments: usize,
    /// The scales of codes.
    pub scales: usize,
    /// What [`Rounding::Master`](crate::Rounding::Master) keeps beside variables.
    pub masters: usize,
    /// Moving averages of the weights.
    pub averages: usize,
    /// Sums of gradients that wait for their update, and the memory for the next ones.
    pub accumulated: usize,
    /// Missed updates of tables with [`SparseUpdate::Exact`](crate::SparseUpdate::Exact): 4 bytes a row, and
    /// a ledger of the updates since all rows were up to date.
    pub missed: usize,
}

impl StateBytes {
    /// All of them together.
    pub fn total(&self) -> usize {
        let Self { moments, scales, masters, averages, accumulated, missed } = *self;
        moments + scales + masters + averages + accumulated + missed
    }
}

/// Statistics of the moments of one variable, as an update reads them: decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MomentStatistics {
    /// Of m, the first moment.
    pub exp_avg: Statistics,
    /// Of u, the exponentially weighted infinity norm.
    pub exp_inf: Statistics,
    /// The largest `|m| / u` where both are finite and u is not 0; 0 if there is none. With gradients that are not 0 a new
    /// variable has `1 - beta1`, and none ever has more than `(1 - beta1) / (1 - beta1 / beta2)`, 1.0091 by default.
    pub max_ratio: f64,
}

/// Statistics of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Statistics {
    /// How many there are.
    pub count: usize,
    /// How many of them are NaN or infinite. They are left out of all that follows.
    pub non_finite: usize,
    /// Which share of the finite ones is 0; 0 if there are none.
    pub zeros: f64,
    /// The smallest; 0 if there are none.
    pub min: f64,
    /// The largest; 0 if there are none.
    pub max: f64,
    /// The arithmetic mean; 0 if there are none.
    pub mean: f64,
    /// The square root of the mean square; 0 if there are none.
    pub rms: f64,
}

impl Statistics {
    /// Of these numbers.
    fn of(values: &[f64]) -> Self {
        let finite = || values.iter().copied().filter(|x| x.is_finite());
        let count = finite().count();
        let non_finite = values.len() - count;
        if count == 0 {
            let [zeros, min, max, mean, rms] = [0.0; 5];
            return Self { count: values.len(), non_finite, zeros, min, max, mean, rms };
        }
        let n = count as f64;
        let largest = finite().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        // As parts of the largest, whose squares do not overflow.
        let [mean, mean_square] = match largest {
            0.0 => [0.0; 2],
            _ => [
                finite().map(|x| x / largest).sum::<f64>() / n,
                finite().map(|x| (x / largest).powi(2)).sum::<f64>() / n,
            ],
        };
        Self {
            count: values.len(),
            non_finite,
            zeros: finite().filter(|&x| x == 0.0).count() as f64 / n,
            min: finite().fold(f64::INFINITY, f64::min),
            max: finite().fold(f64::NEG_INFINITY, f64::max),
            mean: mean * largest,
            rms: mean_square.sqrt() * largest,
        }
    }
}

impl Adamax {
    /// How many bytes all state takes, by kind; [`state_bytes`](Self::state_bytes) has those of one variable's moments.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax, Rounding, StateDType};
    /// use candle_core::{DType, Device, Var};
    ///
    /// let w = Var::zeros(4096, DType::BF16, &Device::Cpu)?;
    /// let params = ParamsAdamax { state_dtype: StateDType::Q8, rounding: Rounding::Master, ..Default::default() };
    /// let bytes = Adamax::from_named([("w", w)], params)?.bytes();
    /// assert_eq!((bytes.moments, bytes.scales, bytes.masters), (2 * 4096, 4 * 4, 2 * 4096));
    /// assert_eq!(bytes.total(), 4 * 4096 + 16);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn bytes(&self) -> StateBytes {
        let mut bytes = StateBytes::default();
        for param in self.vars.iter() {
            let Param { state: cell, sum, average, .. } = &**param;
            cell.read(|state| {
                let scales = state.moments.scale_bytes();
                bytes.moments += state.moments.bytes() - scales;
                bytes.scales += scales;
                bytes.masters += state.master.as_ref().map_or(0, Master::bytes);
            });
            bytes.averages += average.as_ref().map_or(0, Buffer::bytes);
            bytes.accumulated += sum.sum.as_ref().map_or(0, Sum::bytes);
            if let StateCell::Table(table) = cell {
                bytes.missed += table.lock().ledger_bytes();
            }
        }
        bytes
    }

    /// Statistics of the moments of the variable `name`: copies of them are decoded and read, so this costs more than a
    /// step of that variable. With [`SparseUpdate::Exact`](crate::SparseUpdate::Exact) copies of its rows catch up, and on a
    /// GPU the rows themselves.
    ///
    /// # Errors
    ///
    /// No variable has this name; a device whose memory cannot be read.
    pub fn moment_statistics(&self, name: &str) -> Result<MomentStatistics> {
        let index = self.index_of(name)?;
        let moments = self.vars[index].state.moments(&self.vars[index].var).map_err(|error| self.own(error))?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (m, u) = (values(&moments.0)?, values(&moments.1)?);
        let ratios = m.iter().zip(&u).filter(|&(m, u)| m.is_finite() && u.is_finite() && *u != 0.0);
        Ok(MomentStatistics {
            exp_avg: Statistics::of(&m),
            exp_inf: Statistics::of(&u),
            max_ratio: ratios.fold(0.0, |largest, (m, u)| largest.max(m.abs() / u)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_by_hand() {
        let Statistics { count, non_finite, zeros, min, max, mean, rms } =
            Statistics::of(&[3.0, -1.0, 0.0, f64::NAN, 0.0, f64::INFINITY]);
        assert_eq!((count, non_finite, zeros, min, max, mean), (6, 2, 0.5, -1.0, 3.0, 0.5));
        assert!((rms - 2.5f64.sqrt()).abs() < 1e-15);
    }

    #[test]
    fn statistics_of_the_largest_and_of_no_numbers() {
        let all = Statistics::of(&[1e300, -1e300]);
        assert_eq!((all.rms, all.mean, all.max), (1e300, 0.0, 1e300));
        let none = Statistics::of(&[f64::NAN]);
        assert_eq!((none.count, none.non_finite, none.min, none.max, none.rms), (1, 1, 0.0, 0.0, 0.0));
        assert_eq!(Statistics::of(&[]).count, 0);
    }
}
