//! The variables of an optimizer: their identity, and all that is kept for each.
//!
//! Invariant: variables are in the order of their names, so that nothing depends on the order in which a `VarMap` happens
//! to give them.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

use candle_core::{TensorId, Var};

use super::outcome::History;
use super::settings::ResolvedGroup;
use super::state::StateCell;
use super::sums::GradSum;
use crate::kernel::lend::storage_address;
use crate::maps::IdMap;
use crate::rule::Hyperparameters;
use crate::state::{Buffer, ParamState, Place};

/// Identity of one variable. A step never writes it.
pub(super) struct VarInfo {
    pub(super) name: String,
    /// Its position, if it was given without a name and `name` was made up.
    pub(super) unnamed: Option<usize>,
    /// The index of its group.
    pub(super) group: usize,
    /// Whether `no_decay` leaves its decay on.
    pub(super) decays: bool,
    /// Key of its random numbers, from its name.
    pub(super) key: u64,
    /// Memory of its state, which also decides the kernel.
    pub(super) place: Place,
    pub(super) var: Var,
}

impl VarInfo {
    /// The numbers of its updates, of those of its group.
    pub(super) fn hyper<'g>(&self, group: &'g ResolvedGroup) -> &'g Hyperparameters {
        if self.decays { &group.hyper } else { &group.spared }
    }

    /// Its name, or its number and shape if it was given without one.
    pub(super) fn label(&self) -> String {
        match self.unnamed {
            Some(_) => format!("{} of shape {:?}", self.name, self.var.dims()),
            None => self.name.clone(),
        }
    }
}

/// One variable and all that the optimizer keeps for it.
pub(super) struct Param {
    pub(super) info: VarInfo,
    pub(super) state: StateCell,
    /// Gradients that wait for their update.
    pub(super) sum: GradSum,
    /// Moving average, once it has begun.
    pub(super) average: Option<Buffer>,
    pub(super) history: History,
}

impl Param {
    /// A variable that has had no gradient yet.
    pub(super) fn new(info: VarInfo, state: ParamState) -> Self {
        let (state, sum) = (StateCell::Own(state), GradSum::default());
        Self { info, state, sum, average: None, history: History::default() }
    }
}

impl Deref for Param {
    type Target = VarInfo;

    fn deref(&self) -> &VarInfo {
        &self.info
    }
}

/// All variables of an optimizer.
#[derive(Default)]
pub(super) struct Vars {
    #[expect(clippy::vec_box, reason = "where one comes or goes, boxes are moved faster than variables")]
    all: Vec<Box<Param>>,
    /// Name of the variable that lives at each storage address.
    storages: IdMap<usize, String>,
    /// The variables that `append_rows` has replaced.
    pub(super) replaced: Replaced,
}

impl Vars {
    /// The index of the variable of this name, or the index that it would have.
    pub(super) fn position(&self, name: &str) -> Result<usize, usize> {
        self.all.binary_search_by(|param| param.info.name.as_str().cmp(name))
    }

    /// The name of the variable that lives at this address.
    pub(super) fn owner_of(&self, address: usize) -> Option<&String> {
        self.storages.get(&address)
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Adds variables, whose names are new.
    #[expect(clippy::vec_box, reason = "they stay in their boxes")]
    pub(super) fn extend(&mut self, params: Vec<Box<Param>>) {
        for param in &params {
            self.replaced.forget_id(param.var.id());
            self.storages.insert(storage_address(&param.var), param.name.clone());
        }
        // To sort costs a look at all of them, so a few are put where they belong.
        const FEW: usize = 16;
        if params.len() > FEW {
            self.all.extend(params);
            self.all.sort_by(|a, b| a.name.cmp(&b.name));
        } else {
            for param in params {
                let index = self.position(&param.name).unwrap_or_else(|index| index);
                self.all.insert(index, param);
            }
        }
    }

    /// Takes a variable out.
    pub(super) fn remove(&mut self, index: usize) -> Var {
        let Param { info, .. } = *self.all.remove(index);
        self.storages.remove(&storage_address(&info.var));
        self.replaced.forget_name(&info.name);
        info.var
    }

    /// Puts another variable in the place of one, which is remembered as replaced.
    pub(super) fn replace(&mut self, index: usize, var: Var) {
        let info = &mut self.all[index].info;
        let old = std::mem::replace(&mut info.var, var);
        self.storages.remove(&storage_address(&old));
        self.storages.insert(storage_address(&info.var), info.name.clone());
        self.replaced.push(old.id(), info.name.clone());
    }

    /// The names of all variables, for calls that are given some of them.
    pub(super) fn names_by_id(&self) -> IdMap<TensorId, &str> {
        self.all.iter().map(|param| (param.var.id(), param.name.as_str())).collect()
    }
}

impl Deref for Vars {
    type Target = [Box<Param>];

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl DerefMut for Vars {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.all
    }
}

/// Ids and names of the variables that [`Adamax::append_rows`](super::Adamax::append_rows) has replaced.
///
/// A layer that still holds one of them would train nothing, so that its gradients are errors. The oldest ones are
/// forgotten, which bounds what a step looks for.
#[derive(Default)]
pub(super) struct Replaced(VecDeque<(TensorId, String)>);

/// The number of replaced variables that are remembered.
const REPLACED: usize = 256;

impl Replaced {
    fn push(&mut self, id: TensorId, name: String) {
        if self.0.len() == REPLACED {
            self.0.pop_front();
        }
        self.0.push_back((id, name));
    }

    /// Forgets those of a name that is gone, or that stands for another variable now.
    fn forget_name(&mut self, name: &str) {
        self.0.retain(|(_, of)| of != name);
    }

    /// Forgets a variable that is the optimizer's own again.
    fn forget_id(&mut self, id: TensorId) {
        self.0.retain(|(known, _)| *known != id);
    }

    /// The name of the first one that is used.
    pub(super) fn find(&self, is_used: impl Fn(TensorId) -> bool) -> Option<&str> {
        self.0.iter().find(|(id, _)| is_used(*id)).map(|(_, name)| name.as_str())
    }
}
