//! Report of the last call, for people and programs.

use std::fmt;

use super::Adamax;
use super::outcome::{History, Outcome, Report, TotalNorm};
use super::vars::Vars;
use crate::group::GroupSettings;
use crate::kernel::Backends;

/// What the last call of `step` did; see [`Adamax::report`].
#[derive(Clone, Copy)]
pub struct StepReport<'a> {
    report: &'a Report,
    vars: &'a Vars,
    groups: &'a [GroupSettings],
    backends: &'a Backends,
}

impl<'a> StepReport<'a> {
    /// The learning rate of the call, before groups; 0 before the first call.
    pub fn lr(&self) -> f64 {
        self.report.lr
    }

    /// Whether variables were updated: not if the gradients were only accumulated, nor if the call was skipped or had no
    /// gradient at all. Where a GPU decides, this waits for it.
    pub fn updated(&self) -> bool {
        matches!(self.outcome(), Some(Outcome::Updated { .. }))
    }

    /// How many variables the call updated: those that had a gradient in it or, with accumulation, in one of the calls
    /// that it is the last of. 0 if there was no update. Where a GPU decides about that, this waits for it.
    pub fn trained(&self) -> usize {
        match self.outcome() {
            Some(Outcome::Updated { vars, .. }) => vars,
            _ => 0,
        }
    }

    /// Whether the call was skipped because something was not finite.
    ///
    /// Where a GPU decides that, this waits for it.
    pub fn skipped(&self) -> bool {
        matches!(self.outcome(), Some(Outcome::Skipped | Outcome::Overflowed))
    }

    /// The norm of all gradients together before clipping, in the norm that clipping asks for (L2 for each variable's
    /// own norm, and for [`measure_norm`](crate::ParamsAdamax::measure_norm)). `None` if nothing asks for one or if there
    /// was no update. Where a GPU has measured it, this waits for the GPU; `None` if its memory cannot be read.
    pub fn total_norm(&self) -> Option<f64> {
        match self.outcome() {
            Some(Outcome::Updated { norm: TotalNorm::Known(norm), .. }) => Some(norm),
            Some(Outcome::Updated { norm: TotalNorm::OnDevice, .. }) => self.backends.total_norm().ok().flatten(),
            _ => None,
        }
    }

    /// The outcome, once a GPU that decides has done so.
    fn outcome(&self) -> Option<Outcome> {
        match self.report.outcome {
            Some(Outcome::InFlight { vars }) => Some(match self.backends.was_skipped() {
                Ok(true) => Outcome::Skipped,
                _ => Outcome::Updated { vars, norm: TotalNorm::OnDevice },
            }),
            outcome => outcome,
        }
    }

    /// The names of the variables that had no gradient in the call although they have had one before, in alphabetical
    /// order; and those of all variables without one in the first call that they take part in, where a graph that is cut
    /// shows at once. After [`flush_gradients`](Adamax::flush_gradients) there are none.
    pub fn missing(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let vars = self.vars;
        self.report.missing.iter().filter_map(move |&index| vars.get(index)).map(|info| info.name.as_str())
    }

    /// How many variables [`missing`](Self::missing) names.
    pub fn missing_count(&self) -> usize {
        self.missing().count()
    }

    /// The names of the variables that have never had a gradient so far, in alphabetical order: such as the running
    /// statistics of a batch norm, which [`from_varmap`](Adamax::from_varmap) takes with all others, or layers that no
    /// loss depends on. The optimizer leaves them as they are.
    ///
    /// It is about all calls, also those before a checkpoint that was loaded, and not only the last one.
    ///
    /// ```
    /// use candle_adamax::{Adamax, ParamsAdamax};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{ModuleT, Optimizer, VarBuilder, VarMap, batch_norm};
    ///
    /// let varmap = VarMap::new();
    /// let norm = batch_norm(8, 1e-5, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
    /// let mut optimizer = Adamax::from_varmap(&varmap, ParamsAdamax::default())?;
    /// let x = Tensor::randn(0f32, 1.0, (4, 8, 2, 2), &Device::Cpu)?;
    /// for _ in 0..2 {
    ///     optimizer.backward_step(&norm.forward_t(&x, true)?.sqr()?.sum_all()?)?;
    /// }
    /// assert_eq!(optimizer.report().untrained().collect::<Vec<_>>(), ["running_mean", "running_var"]);
    /// assert!(optimizer.report().missing().next().is_none());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn untrained(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let vars = self.vars.iter().filter(|param| param.history != History::Trained);
        vars.map(|param| param.name.as_str())
    }
}

/// One line for a log, such as `updated 2 of 103 vars, lr 4e-4, norm 1.2`; see [`Adamax::report`].
///
/// | call | line |
/// | --- | --- |
/// | an update | `updated 103 of 103 vars, lr 4e-4` |
/// | with a norm that clipping or [`measure_norm`](crate::ParamsAdamax::measure_norm) asks for | `updated 103 of 103 vars, lr 4e-4, norm 1.2` |
/// | with groups of other learning rates | `updated 103 of 103 vars, lr body 4e-5, head 4e-4`; of more than three, `lr 1e-6 to 4e-4` |
/// | gradients are accumulated | `accumulated 103 of 103 vars in call 1 of 4, lr 4e-4` |
/// | something was not finite | `skipped: not finite, lr 4e-4` |
/// | [`MissingGradients::Allow`](crate::MissingGradients::Allow), and nothing had a gradient | `no gradient for 103 vars, lr 4e-4` |
/// | before the first one | `no call yet` |
///
/// Numbers have four digits. Where a GPU decides whether the call is skipped, or has measured the norm, this waits for
/// it.
impl fmt::Display for StepReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.report.vars;
        match self.outcome() {
            None => return f.write_str("no call yet"),
            Some(Outcome::NoGradients) => write!(f, "no gradient for {all} vars")?,
            Some(Outcome::Accumulated { vars, call, of }) => {
                write!(f, "accumulated {vars} of {all} vars in call {call} of {of}")?;
            }
            Some(Outcome::Updated { vars, .. } | Outcome::InFlight { vars }) => {
                write!(f, "updated {vars} of {all} vars")?;
            }
            Some(Outcome::Skipped | Outcome::Overflowed) => f.write_str("skipped: not finite")?,
        }
        self.write_lrs(f)?;
        match self.total_norm() {
            Some(norm) => write!(f, ", norm {}", Short(norm)),
            None => Ok(()),
        }
    }
}

impl StepReport<'_> {
    /// The learning rates of the groups that have variables: one if they are equal, else by name, or the range of many.
    fn write_lrs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        let is_used = |&(index, _): &(usize, &f64)| self.vars.iter().any(|info| info.group == index);
        let lrs: Vec<_> = self.report.group_lrs.iter().enumerate().filter(is_used).collect();
        let all = || lrs.iter().map(|(_, lr)| **lr);
        let (min, max) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
        f.write_str(", lr ")?;
        match lrs.len() {
            0 => write!(f, "{}", Short(self.report.lr)),
            _ if min == max => write!(f, "{}", Short(max)),
            n if n > SHOWN => write!(f, "{} to {}", Short(min), Short(max)),
            _ => lrs.iter().enumerate().try_for_each(|(nth, (index, lr))| {
                let separator = if nth == 0 { "" } else { ", " };
                write!(f, "{separator}{} {}", self.groups[*index].name, Short(**lr))
            }),
        }
    }
}

/// A number with at most four digits: `1.2`, `4e-4`.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Rounded by way of a text, which is exact.
        let rounded: f64 = format!("{:.3e}", self.0).parse().unwrap_or(self.0);
        match rounded.abs() {
            x if x == 0.0 || (0.01..1e5).contains(&x) || !x.is_finite() => write!(f, "{rounded}"),
            _ => write!(f, "{rounded:e}"),
        }
    }
}

impl fmt::Debug for StepReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepReport")
            .field("lr", &self.lr())
            .field("updated", &self.updated())
            .field("skipped", &self.skipped())
            .field("trained", &self.trained())
            .field("total_norm", &self.total_norm())
            .field("missing", &self.missing().collect::<Vec<_>>())
            .field("untrained", &self.untrained().collect::<Vec<_>>())
            .finish()
    }
}

impl Adamax {
    /// What the last call of `step` did: its learning rate, the total norm, and which variables had no gradient.
    ///
    /// ```
    /// use candle_adamax::{Adamax, Clip, ParamsAdamax};
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    ///
    /// let used = Var::new(&[3.0f32, 4.0], &Device::Cpu)?;
    /// let unused = Var::new(1.0f32, &Device::Cpu)?;
    /// let params = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..Default::default() };
    /// let mut optimizer = Adamax::from_named([("used", used.clone()), ("unused", unused)], params)?;
    /// optimizer.backward_step(&(used.sqr()? / 2.0)?.sum_all()?)?;
    ///
    /// assert_eq!(optimizer.report().total_norm(), Some(5.0));
    /// assert_eq!(optimizer.report().missing().collect::<Vec<_>>(), ["unused"]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn report(&self) -> StepReport<'_> {
        let Self { report, vars, groups, backends, .. } = self;
        StepReport { report, vars, groups, backends }
    }
}
