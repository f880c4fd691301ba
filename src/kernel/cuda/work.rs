//! What an update is asked to do on one device, before and after addresses are known.

use candle_core::{DType, Tensor};

use super::abi::{self, Address, Sorting};
use super::ids::BagsAt;
use super::source::{Module, update_kernel};
use super::staging::{ArenaLayout, ArenaWriter, Offset};
use crate::codec::StateDType;
use crate::error::Result;
use crate::kernel::{LookupGrad, LookupIds, RowGrad, RowTask, RowValues, Source, SummedRows, Task, Update, total};
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

    pub(super) fn update_args(&self) -> abi::UpdateArgs {
        abi::UpdateArgs::new(match self {
            Self::Dense(task) => &task.kind.update_args,
            Self::Rows(task) => &task.update_args,
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
    Rows(&'a SummedRows),
    /// On the GPU, not sorted and not summed yet.
    Parts(Parts<'a>),
}

/// Numbers of rows are rounded up to a multiple of this.
const PLANNED_ROWS: u64 = 1024;

/// Of a `RowGrad`.
pub(super) struct Parts<'a> {
    /// Those that are not empty.
    parts: Vec<&'a LookupGrad<'a>>,
    pub(super) row_len: u64,
    /// How many contributions there are.
    pub(super) n: u32,
    /// How many rows there can be, rounded up.
    rows: u64,
}

impl<'a> Parts<'a> {
    fn new(parts: &'a [LookupGrad<'a>], row_len: usize, var: &Tensor) -> Result<Self> {
        let n = total(parts)? as u32;
        let rows = var.dims().first().map_or(1, |&rows| u64::from(n).min(rows as u64));
        // Launches are planned for that many, and planned anew only where batches differ by more.
        let rows = rows.next_multiple_of(PLANNED_ROWS).min(u32::MAX.into());
        let parts = parts.iter().filter(|part| part.lookup_ids.len() > 0).collect();
        Ok(Self { parts, row_len: row_len as u64, n, rows })
    }

    /// What contributions are multiplied with.
    fn factors(part: &'a LookupGrad<'_>) -> Option<&'a Tensor> {
        match &*part.lookup_ids {
            LookupIds::Gpu(ids) => ids.factors(),
            LookupIds::Host(_) => None,
        }
    }
}

impl<'a> Grad<'a> {
    /// How many elements there are, or can be where only the device knows.
    pub(super) fn elements(&self) -> u64 {
        match self {
            Self::Dense(grad) => grad.elem_count() as u64,
            Self::Rows(rows) => rows.values.len() as u64,
            Self::Parts(parts) => parts.rows * parts.row_len,
        }
    }

    /// The tensors that are read.
    pub(super) fn tensors(&self) -> Vec<&'a Tensor> {
        match self {
            Self::Dense(grad) => vec![*grad],
            Self::Rows(_) => Vec::new(),
            Self::Parts(Parts { parts, .. }) => {
                parts.iter().flat_map(|&part| [Some(part.grad.as_ref()), Parts::factors(part)]).flatten().collect()
            }
        }
    }

    pub(super) fn dtype(&self, var: &Tensor) -> DType {
        match self {
            Self::Dense(grad) => grad.dtype(),
            Self::Rows(_) | Self::Parts(_) => arithmetic(var.dtype()),
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
            Work::Rows(RowTask { grad: RowGrad { row_len, values }, .. }) => {
                let grad = match values {
                    RowValues::Summed(sums) => Grad::Rows(sums),
                    RowValues::Unsorted(parts) => Grad::Parts(Parts::new(parts, *row_len, var)?),
                    RowValues::Coalesced(_) => {
                        return Err(candle_core::Error::msg("rows of a table on a GPU are sorted there").into());
                    }
                };
                (grad, (*row_len).max(1) as u64)
            }
        };
        let dtypes = (var.dtype(), grad.dtype(var));
        let kernel = Kernel { dtypes, state: layout.dtype, rowwise: layout.rowwise };
        Ok(Self { var, moments, master, grad, unit, kernel })
    }

    /// How many units are updated, or can be.
    pub(super) fn units(&self) -> u64 {
        match &self.grad {
            Grad::Dense(_) => (self.var.elem_count() as u64).div_ceil(self.unit),
            // Rows without elements have nothing to update.
            Grad::Rows(_) | Grad::Parts(_) if self.grad.elements() == 0 => 0,
            Grad::Rows(SummedRows { rows, .. }) => rows.len() as u64,
            Grad::Parts(parts) => parts.rows,
        }
    }
}

/// The moments and the master of a state that lives on its variable's GPU.
pub(super) fn on_gpu(state: &ParamState) -> Result<(&MomentTensors, Option<&Tensor>)> {
    let master = state.master.as_ref().map(Master::on_gpu).transpose()?;
    match &state.moments.stored {
        Stored::Device(moments) => Ok((moments, master)),
        _ => Err(candle_core::Error::msg("expected moments on the variable's GPU").into()),
    }
}

/// Where on the device what the host knows of the rows of one table will be.
pub(super) enum RowPlaces {
    Summed {
        rows: Offset,
        count: Offset,
        values: Offset,
    },
    /// The parts, and for each the ids and bags that are in host memory.
    Parts {
        parts: Offset,
        listed: Vec<Option<(Offset, Option<Offset>)>>,
    },
}

impl RowPlaces {
    pub(super) fn of(grad: &Grad<'_>, arena: &mut ArenaLayout) -> Option<Self> {
        match grad {
            Grad::Dense(_) => None,
            Grad::Rows(SummedRows { rows, values }) => Some(Self::Summed {
                rows: arena.of::<u32>(rows.len()),
                count: arena.of::<u32>(1),
                values: arena.of::<u8>(values.bytes()),
            }),
            Grad::Parts(Parts { parts, .. }) => {
                let listed = parts.iter().map(|part| match &*part.lookup_ids {
                    LookupIds::Gpu(_) => None,
                    LookupIds::Host(listed) => {
                        let ids = arena.of::<u32>(listed.ids().len());
                        Some((ids, listed.sources().map(|sources| arena.of::<u32>(sources.len()))))
                    }
                });
                let listed = listed.collect();
                Some(Self::Parts { parts: arena.of::<abi::LookupGrad>(parts.len()), listed })
            }
        }
    }
}

/// A gradient of rows as a kernel is told of it.
#[derive(Default)]
pub(super) struct RowsAt {
    pub(super) rows: Address,
    pub(super) count: Address,
    pub(super) grad: Address,
}

impl RowPlaces {
    /// Fills the places. `tensors` are the addresses of [`Grad::tensors`]; `sorting` is told where the parts are.
    pub(super) fn fill(
        &self,
        grad: &Grad<'_>,
        (tensors, sorting): (&[Address], Option<&mut Sorting>),
        writer: &mut ArenaWriter<'_>,
    ) -> Result<RowsAt> {
        match (self, grad) {
            (Self::Summed { rows, count, values }, Grad::Rows(sums)) => {
                let grad = match &sums.values {
                    Buffer::F32(sums) => writer.put::<f32>(*values, sums)?,
                    Buffer::F64(sums) => writer.put::<f64>(*values, sums)?,
                    Buffer::Tensor(_) => return Err(candle_core::Error::msg("expected sums in host memory").into()),
                };
                let n = sums.rows.len() as u32;
                Ok(RowsAt { rows: writer.put(*rows, &sums.rows)?, count: writer.put(*count, &[n])?, grad })
            }
            (Self::Parts { parts: place, listed }, Grad::Parts(Parts { parts, .. })) => {
                let Some(sorting) = sorting else { return Ok(RowsAt::default()) };
                let (mut tensors, mut begin) = (tensors.iter().copied(), 0);
                let mut all = Vec::with_capacity(parts.len());
                for (part, listed) in parts.iter().zip(listed) {
                    let (ids, BagsAt { starts, bags, is_mean }) = match (&*part.lookup_ids, listed) {
                        (LookupIds::Gpu(ids), _) => (ids.trained().address(writer.stream()), ids.bags(writer.stream())),
                        (LookupIds::Host(list), Some((ids, sources))) => {
                            let bags = match (list.sources(), sources) {
                                (Some(sources), Some(place)) => writer.put(*place, sources)?,
                                _ => 0,
                            };
                            (writer.put(*ids, list.ids())?, BagsAt { bags, ..BagsAt::default() })
                        }
                        (LookupIds::Host(_), None) => (0, BagsAt::default()),
                    };
                    let values = tensors.next().unwrap_or(0);
                    let factors = Parts::factors(part);
                    all.push(abi::LookupGrad {
                        values,
                        ids,
                        bags,
                        starts: if is_mean { starts } else { 0 },
                        factors: if factors.is_some() { tensors.next().unwrap_or(0) } else { 0 },
                        begin,
                        dtype: abi::number(part.grad.dtype()),
                        factors_dtype: factors.map_or(0, |factors| abi::number(factors.dtype())),
                        padding: 0,
                    });
                    begin += part.lookup_ids.len() as u32;
                }
                (sorting.parts, sorting.parts_n) = (writer.put(*place, &all)?, all.len() as u32);
                Ok(RowsAt { rows: sorting.rows, count: sorting.count, grad: sorting.sums })
            }
            _ => Err(candle_core::Error::msg("a gradient in another place than it was").into()),
        }
    }
}

/// A gradient as a tensor on a GPU.
pub(super) fn tensor_of(source: Source<'_>) -> Result<&Tensor> {
    match source {
        Source::Tensor(tensor) | Source::Buffer(Buffer::Tensor(tensor)) => Ok(tensor),
        Source::Buffer(_) => Err(candle_core::Error::msg("expected a gradient on the variable's GPU").into()),
    }
}
