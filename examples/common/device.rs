//! The option `--device`.

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// The processor.
    #[default]
    Cpu,
    /// The first NVIDIA GPU; the program has to be built with the feature `cuda`.
    Cuda,
}

impl Place {
    /// The device. It is to be opened once: tensors of one that was opened twice do not mix.
    pub(crate) fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => {
                ensure!(cfg!(feature = "cuda"), "--device cuda: this program is built without the feature `cuda`");
                Device::new_cuda(0).context("--device cuda: no GPU answers")
            }
        }
    }
}
