//! What stands in the place of the runtimes without the feature `cuda`: no variable's state lives on a GPU then.

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::kernel::{
    Accumulate, Average, CatchUpTask, HostIds, LookupIds, Measure, RowTask, Source, Task, Touched, Update,
};
use crate::reduce::{Norm, NormType};

/// The GPUs of one optimizer: none.
#[derive(Default)]
pub(crate) struct Runtimes;

impl Runtimes {
    pub(crate) fn update(
        &mut self,
        tasks: Vec<Task<'_, Update<'_>>>,
        rows: Vec<RowTask<'_>>,
        measure: Option<&Measure>,
    ) -> Result<()> {
        debug_assert!(tasks.is_empty() && rows.is_empty() && measure.is_none());
        Ok(())
    }

    pub(crate) fn accumulate(&mut self, tasks: Vec<Task<'_, Accumulate<'_>>>) -> Result<()> {
        debug_assert!(tasks.is_empty());
        Ok(())
    }

    pub(crate) fn average(&mut self, tasks: Vec<Task<'_, Average<'_>>>) -> Result<()> {
        debug_assert!(tasks.is_empty());
        Ok(())
    }

    pub(crate) fn measure(&mut self, _: Source<'_>, _: NormType) -> Result<Norm> {
        stub()
    }

    pub(crate) fn was_skipped(&self) -> Result<bool> {
        Ok(false)
    }

    pub(crate) fn total_norm(&self) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// Marks of the rows of a table on a GPU: there is none.
pub(crate) enum GpuMarks {}

impl GpuMarks {
    pub(crate) fn new(_: &Tensor, _: u32) -> Result<Self> {
        stub()
    }

    pub(crate) fn bytes(&self) -> usize {
        match *self {}
    }

    pub(crate) fn name(&mut self, _: &Touched<'_>) -> Result<()> {
        match *self {}
    }

    pub(crate) fn catch_up(&mut self, _: CatchUpTask<'_>, _: bool, _: u32) -> Result<()> {
        match *self {}
    }

    pub(crate) fn mark_named(&mut self, _: u32, _: u32) -> Result<()> {
        match *self {}
    }

    pub(crate) fn mark_all(&mut self, _: u32, _: u32) -> Result<()> {
        match *self {}
    }

    pub(crate) fn forget(&mut self) {
        match *self {}
    }
}

/// Rows on a GPU: there are none.
#[derive(Clone)]
pub(crate) enum GpuRows {}

impl GpuRows {
    pub(crate) fn trained(_: &LookupIds, _: &Device) -> Result<Self> {
        stub()
    }
}

/// Ids of a lookup on a GPU: there are none.
pub(crate) enum GpuIds {}

impl GpuIds {
    pub(crate) fn new(_: &Device, _: &Tensor, _: usize, _: Option<u32>, _: &mut Unchecked) -> Result<Self> {
        stub()
    }

    pub(crate) fn len(&self) -> usize {
        match *self {}
    }

    pub(crate) fn touched(&self) -> Touched<'static> {
        match *self {}
    }

    pub(crate) fn check(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn listed(&self) -> Result<&HostIds> {
        match *self {}
    }
}

/// Lookups whose ids are checked on a GPU: there are none.
#[derive(Default)]
pub(crate) struct Unchecked;

impl Unchecked {
    pub(crate) fn hear(&mut self) -> Result<()> {
        Ok(())
    }
}

fn stub<T>() -> Result<T> {
    Err(candle_core::Error::msg("this program is built without the feature `cuda`").into())
}
