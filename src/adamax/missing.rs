//! Variables without a gradient: how many of them an update may have.

use super::{Adamax, Param};
use crate::error::{ErrorKind, Result};
use crate::group::GroupSettings;
use crate::params::MissingGradients;

impl Adamax {
    /// Refuses an update in which too few variables have a gradient; `has_gradient` tells which. It writes nothing.
    pub(super) fn check_missing(&self, has_gradient: impl Fn(usize, &Param) -> bool) -> Result<()> {
        let rule = self.params.missing_gradients;
        if rule == MissingGradients::Allow {
            return Ok(());
        }
        let is_any_frozen = self.groups.iter().any(GroupSettings::is_frozen);
        let is_counted = |param: &Param| !is_any_frozen || !self.groups[param.group].is_frozen();
        let counted = || self.vars.iter().enumerate().filter(|(_, param)| is_counted(param));
        let (vars, with_gradient) = counted().fold((0, 0), |(vars, with_gradient), (index, param)| {
            (vars + 1, with_gradient + usize::from(has_gradient(index, param)))
        });
        let is_enough = |count: usize| match rule {
            MissingGradients::Half => 2 * count >= vars,
            _ => count == vars,
        };
        // Almost every update ends here.
        if is_enough(with_gradient) {
            return Ok(());
        }
        // The count of updates is in snapshots, so that a resumed run knows it.
        let was_updated = |param: &Param| rule == MissingGradients::Half && param.state.get().step > 0;
        let missing = counted().filter(|(index, param)| !has_gradient(*index, param) && !was_updated(param));
        let missing: Vec<_> = missing.map(|(_, param)| param.label()).collect();
        let with_gradient = vars - missing.len();
        if is_enough(with_gradient) {
            return Ok(());
        }
        let expected = match rule {
            MissingGradients::Half => "at least half of them, in this update or an earlier one",
            _ => "all of them, in every update (`missing_gradients: Error`)",
        };
        Err(ErrorKind::MissingGradients { with_gradient, vars, expected, missing }.into())
    }
}

impl Param {
    /// Its name, or its number and shape if it was given without one.
    fn label(&self) -> String {
        match self.unnamed {
            Some(_) => format!("{} of shape {:?}", self.name, self.var.dims()),
            None => self.name.clone(),
        }
    }
}
