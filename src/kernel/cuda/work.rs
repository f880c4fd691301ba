//! What an update is asked to do on one device, before and after addresses are known.

use candle_core::{DType, Tensor};

use super::abi::{self, Address, SumArgs};
use super::source::{Module, update_kernel};
use super::staging::{Filling, Place, Room};
use crate::codec::StateDType;
use crate::error::Result;
use crate::kernel::{Contribution, RowGrad, RowTask, RowValues, Source, Task, Update};
use crate::state::{Buffer, Master, MomentTensors, ParamState, Stored, arithmetic};

/// One parameter of an update.
pub(super) enum Work<'a> {
    Dense(Task<'a, Update<'a>>),
    Rows(RowTask<'a>),
}

impl Work<'_> {
    pub(super) fn var(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(task) => task.lent,
            Self::Rows(task) => Some(task.var),
        }
    }

    pub(super) fn nth(&self) -> usize {
        match self {
            Self::Dense(task) => task.nth,
            Self::Rows(task) => task.nth,
        }
    }

    fn state(&self) -> &ParamState {
        match self {
            Self::Dense(task) => task.kind.state,
            Self::Rows(task) => task.state,
        }
    }

    pub(super) fn orders(&self) -> abi::Orders {
        abi::Orders::new(match self {
            Self::Dense(task) => &task.kind.orders,
            Self::Rows(task) => &task.orders,
        })
    }
}

/// Which kernel updates a parameter.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Of the parameter and of the gradient.
    dtypes: (DType, DType),
    state: StateDType,
    rowwise: bool,
}

impl Kernel {
    pub(super) fn name(&self) -> String {
        update_kernel(self.dtypes.0, self.dtypes.1, self.state, self.rowwise)
    }

    pub(super) fn module(&self) -> Result<Module> {
        Ok(Module::of_update(self.dtypes)?)
    }
}

/// A parameter of an update, with all that is known of it before addresses are.
pub(super) struct Prepared<'a> {
    pub(super) var: &'a Tensor,
    pub(super) moments: &'a MomentTensors,
    pub(super) master: Option<&'a Tensor>,
    pub(super) grad: Grad<'a>,
    pub(super) unit: u64,
    pub(super) kernel: Kernel,
}

/// Where a gradient is.
pub(super) enum Grad<'a> {
    Dense(&'a Tensor),
    /// Rows and their sums, in host memory.
    Rows(&'a [u32], &'a Buffer),
    /// Rows, and of what on the GPU they are the sums.
    Sums(RowSums<'a>),
}

/// Of a `RowGrad`.
pub(super) struct RowSums<'a> {
    rows: &'a [u32],
    row_len: usize,
    starts: &'a [u32],
    contributions: &'a [Contribution],
    parts: Vec<&'a Tensor>,
}

impl<'a> Grad<'a> {
    pub(super) fn elements(&self) -> u64 {
        match self {
            Self::Dense(grad) => grad.elem_count() as u64,
            Self::Rows(_, values) => values.len() as u64,
            Self::Sums(sums) => (sums.rows.len() * sums.row_len) as u64,
        }
    }

    /// The tensors that are read.
    pub(super) fn tensors(&self) -> Vec<&'a Tensor> {
        match self {
            Self::Dense(grad) => vec![*grad],
            Self::Rows(..) => Vec::new(),
            Self::Sums(sums) => sums.parts.clone(),
        }
    }

    pub(super) fn dtype(&self, var: &Tensor) -> DType {
        match self {
            Self::Dense(grad) => grad.dtype(),
            Self::Rows(..) | Self::Sums(_) => arithmetic(var.dtype()),
        }
    }
}

impl<'a> Prepared<'a> {
    pub(super) fn new(work: &'a Work<'_>) -> Result<Self> {
        let state = work.state();
        let layout = &state.moments.layout;
        let Some(var) = work.var() else { return Err(candle_core::Error::msg("expected a variable").into()) };
        let (moments, master) = on_gpu(state)?;
        let (grad, unit) = match work {
            Work::Dense(task) => match task.read {
                Some(source) => (Grad::Dense(tensor_of(source)?), layout.unit as u64),
                None => return Err(candle_core::Error::msg("expected a gradient").into()),
            },
            // Moments as they are have no units: then any length will do.
            Work::Rows(RowTask { grad: RowGrad { rows, row_len, values }, .. }) => {
                let grad = match values {
                    RowValues::Summed(sums) => Grad::Rows(rows, sums),
                    RowValues::Lazy { starts, contributions, parts } => {
                        let parts = parts.iter().map(|part| part.as_ref()).collect();
                        Grad::Sums(RowSums { rows, row_len: *row_len, starts, contributions, parts })
                    }
                };
                (grad, (*row_len).max(1) as u64)
            }
        };
        let dtypes = (var.dtype(), grad.dtype(var));
        let kernel = Kernel { dtypes, state: layout.dtype, rowwise: layout.rowwise };
        Ok(Self { var, moments, master, grad, unit, kernel })
    }

    /// How many units are updated.
    pub(super) fn units(&self) -> u64 {
        match &self.grad {
            Grad::Dense(_) => (self.var.elem_count() as u64).div_ceil(self.unit),
            // Rows without elements have nothing to update.
            Grad::Rows(..) | Grad::Sums(_) if self.grad.elements() == 0 => 0,
            Grad::Rows(rows, _) | Grad::Sums(RowSums { rows, .. }) => rows.len() as u64,
        }
    }
}

/// The moments and the master of a state that lives on its variable's GPU.
pub(super) fn on_gpu(state: &ParamState) -> Result<(&MomentTensors, Option<&Tensor>)> {
    let master = match &state.master {
        Some(Master::Device(master)) => Some(master),
        None => None,
        Some(_) => return Err(candle_core::Error::msg("expected a master on the variable's GPU").into()),
    };
    match &state.moments.stored {
        Stored::Device(moments) => Ok((moments, master)),
        _ => Err(candle_core::Error::msg("expected moments on the variable's GPU").into()),
    }
}

/// Where on the device what is known of the rows of one table will be.
pub(super) struct RowPlaces {
    rows: Place,
    count: Place,
    /// The sums, or what they are made of.
    values: ValuePlaces,
}

enum ValuePlaces {
    Summed(Place),
    Sums { starts: Place, contributions: Place, parts: Place },
}

impl RowPlaces {
    pub(super) fn of(grad: &Grad<'_>, room: &mut Room) -> Option<Self> {
        let (rows, values) = match grad {
            Grad::Dense(_) => return None,
            Grad::Rows(rows, sums) => (rows, ValuePlaces::Summed(room.of::<u8>(sums.bytes()))),
            Grad::Sums(RowSums { rows, starts, contributions, parts, .. }) => {
                let starts = room.of::<u32>(starts.len());
                let contributions = room.of::<Contribution>(contributions.len());
                (rows, ValuePlaces::Sums { starts, contributions, parts: room.of::<abi::Part>(parts.len()) })
            }
        };
        Some(Self { rows: room.of::<u32>(rows.len()), count: room.of::<u32>(1), values })
    }
}

/// A gradient of rows as a kernel is told of it.
#[derive(Default)]
pub(super) struct RowsAt {
    pub(super) rows: Address,
    pub(super) count: Address,
    pub(super) grad: Address,
    /// What has to be summed first.
    pub(super) sums: Option<SumArgs>,
}

impl RowPlaces {
    /// Fills the places. `parts` are the addresses of the tensors that are summed, into `sums`.
    pub(super) fn fill(
        &self,
        grad: &Grad<'_>,
        (parts, sums): (&[Address], Address),
        filling: &mut Filling<'_>,
    ) -> Result<RowsAt> {
        let numbers: &[u32] = match grad {
            Grad::Rows(rows, _) | Grad::Sums(RowSums { rows, .. }) => rows,
            Grad::Dense(_) => &[],
        };
        let (rows, count) = (filling.put(self.rows, numbers)?, filling.put(self.count, &[numbers.len() as u32])?);
        let (grad, sums) = match (grad, &self.values) {
            (Grad::Rows(_, Buffer::F32(values)), ValuePlaces::Summed(place)) => {
                (filling.put::<f32>(*place, values)?, None)
            }
            (Grad::Rows(_, Buffer::F64(values)), ValuePlaces::Summed(place)) => {
                (filling.put::<f64>(*place, values)?, None)
            }
            (Grad::Sums(of), ValuePlaces::Sums { starts, contributions, parts: of_parts }) => {
                let dtypes = of.parts.iter().map(|part| part.dtype());
                let parts: Vec<_> = parts.iter().zip(dtypes).map(|(&at, dtype)| abi::Part::new(at, dtype)).collect();
                let args = SumArgs {
                    starts: filling.put(*starts, of.starts)?,
                    contributions: filling.put(*contributions, of.contributions)?,
                    parts: filling.put(*of_parts, &parts)?,
                    out: sums,
                    n: of.rows.len() as u64,
                    row_len: of.row_len as u64,
                };
                (sums, Some(args))
            }
            _ => return Err(candle_core::Error::msg("rows in host memory have a type of arithmetic").into()),
        };
        Ok(RowsAt { rows, count, grad, sums })
    }
}

/// A gradient as a tensor on a GPU.
pub(super) fn tensor_of(source: Source<'_>) -> Result<&Tensor> {
    match source {
        Source::Tensor(tensor) | Source::Buffer(Buffer::Tensor(tensor)) => Ok(tensor),
        Source::Buffer(_) => Err(candle_core::Error::msg("expected a gradient on the variable's GPU").into()),
    }
}
