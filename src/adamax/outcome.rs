//! Outcome of a call, by indices of variables.

use super::call::Call;
use super::grads::Grads;
use super::vars::Vars;

/// Outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Outcome {
    /// It had no gradient at all.
    NoGradients,
    /// The gradients of so many variables wait for the calls to come; it is call number `call` of `of`.
    Accumulated { vars: usize, call: u64, of: u64 },
    /// So many variables were updated.
    Updated { vars: usize, norm: TotalNorm },
    /// Something was not finite; nothing has changed.
    Skipped,
    /// The sum of the gradients of several calls was not finite, and was dropped.
    Overflowed,
    /// A GPU updates so many variables or skips the call, and only it knows which.
    InFlight { vars: usize },
}

/// Norm of all gradients of an update together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum TotalNorm {
    /// Nothing asks for it.
    NotMeasured,
    Known(f64),
    /// A GPU has measured it.
    OnDevice,
}

impl Outcome {
    /// Whether variables were updated, unless a GPU has skipped the call.
    pub(super) fn updates(self) -> bool {
        matches!(self, Self::Updated { .. } | Self::InFlight { .. })
    }

    /// Whether the call was skipped, if the host knows.
    pub(super) fn known_skipped(self) -> Option<bool> {
        match self {
            Self::InFlight { .. } => None,
            outcome => Some(matches!(outcome, Self::Skipped | Self::Overflowed)),
        }
    }
}

/// Gradients of a variable in the calls so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum History {
    /// It has not taken part in any.
    #[default]
    New,
    /// No gradient in any of them.
    Untrained,
    /// A gradient.
    Trained,
}

/// Report of the last call, by indices of variables.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) lr: f64,
    /// Learning rate of each group.
    pub(super) group_lrs: Vec<f64>,
    /// `None` before the first call.
    pub(super) outcome: Option<Outcome>,
    /// How many variables the optimizer had.
    pub(super) vars: usize,
    pub(super) missing: Vec<usize>,
}

impl Report {
    /// Report of a call in which nothing is missing.
    pub(super) fn new(call: Call, outcome: Outcome, vars: usize) -> Self {
        Self { lr: call.lr, group_lrs: call.group_lrs, outcome: Some(outcome), vars, missing: Vec::new() }
    }

    /// Notes the variables without a gradient, but for those that have taken part before and never had one.
    pub(super) fn note_missing(&mut self, vars: &mut Vars, grads: &Grads<'_>) {
        let mut with_gradient = grads.indices().peekable();
        for (index, param) in vars.iter_mut().enumerate() {
            let history = &mut param.history;
            match with_gradient.next_if_eq(&index) {
                Some(_) => *history = History::Trained,
                None => {
                    if *history != History::Untrained {
                        self.missing.push(index);
                    }
                    if *history == History::New {
                        *history = History::Untrained;
                    }
                }
            }
        }
    }
}
