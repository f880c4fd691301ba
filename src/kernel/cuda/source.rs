//! The kernels' sources and names. Pure.

use candle_core::DType;

use crate::codec::StateDType;

/// The headers, in the order in which each needs those before it; NVRTC is given one text and finds no files.
#[cfg(feature = "cuda")]
const HEADERS: [&str; 7] = [
    include_str!("../../../cuda/element.cuh"),
    include_str!("../../../cuda/rule.cuh"),
    include_str!("../../../cuda/rounding.cuh"),
    include_str!("../../../cuda/ledger.cuh"),
    include_str!("../../../cuda/codec.cuh"),
    include_str!("../../../cuda/abi.cuh"),
    include_str!("../../../cuda/unit.cuh"),
];

/// One file of kernels, compiled when the first of them is needed.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Module {
    /// The update, of parameters of one dtype with gradients of one dtype.
    Update(&'static str),
    /// Kernels that bring rows up to date, of parameters of one dtype.
    Exact(&'static str),
    /// Norms.
    Summary,
    /// Sums and averages.
    Passes,
    /// Rows of tables.
    Rows,
    /// Their gradients.
    Sort,
    /// Rows by bags.
    Pool,
}

#[cfg(feature = "cuda")]
impl Module {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 15] = [
        Self::Update("f64_f64"),
        Self::Update("f32_f32"),
        Self::Update("f16_f16"),
        Self::Update("f16_f32"),
        Self::Update("bf16_bf16"),
        Self::Update("bf16_f32"),
        Self::Exact("f64"),
        Self::Exact("f32"),
        Self::Exact("f16"),
        Self::Exact("bf16"),
        Self::Summary,
        Self::Passes,
        Self::Rows,
        Self::Sort,
        Self::Pool,
    ];

    /// The module for parameters and gradients of these dtypes.
    pub(crate) fn of_update(dtypes: (DType, DType)) -> candle_core::Result<Self> {
        let name = match dtypes {
            (DType::F64, DType::F64) => "f64_f64",
            (DType::F32, DType::F32) => "f32_f32",
            (DType::F16, DType::F16) => "f16_f16",
            (DType::F16, DType::F32) => "f16_f32",
            (DType::BF16, DType::BF16) => "bf16_bf16",
            (DType::BF16, DType::F32) => "bf16_f32",
            other => candle_core::bail!("no CUDA kernel for parameters and gradients of {other:?}"),
        };
        Ok(Self::Update(name))
    }

    /// The module that brings rows of parameters of this dtype up to date.
    pub(crate) fn of_catch_up(dtype: DType) -> candle_core::Result<Self> {
        Ok(Self::Exact(match dtype {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            other => candle_core::bail!("no CUDA kernel for parameters of {other:?}"),
        }))
    }

    /// A name for candle's store of modules.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Update(dtypes) => format!("candle-adamax-update-{dtypes}"),
            Self::Exact(dtype) => format!("candle-adamax-exact-{dtype}"),
            Self::Summary => "candle-adamax-summary".to_owned(),
            Self::Passes => "candle-adamax-passes".to_owned(),
            Self::Rows => "candle-adamax-rows".to_owned(),
            Self::Sort => "candle-adamax-sort".to_owned(),
            Self::Pool => "candle-adamax-pool".to_owned(),
        }
    }

    /// The text to compile.
    pub(crate) fn source(self) -> String {
        let kernels = match self {
            Self::Update(_) => include_str!("../../../cuda/adamax.cu"),
            Self::Exact(_) => include_str!("../../../cuda/exact.cu"),
            Self::Summary => include_str!("../../../cuda/summary.cu"),
            Self::Passes => include_str!("../../../cuda/passes.cu"),
            Self::Rows => include_str!("../../../cuda/rows.cu"),
            Self::Sort => include_str!("../../../cuda/sort.cu"),
            Self::Pool => include_str!("../../../cuda/pool.cu"),
        };
        let text = HEADERS.iter().chain([&kernels]).flat_map(|file| file.lines());
        let mut source: String = match self {
            Self::Update(only) | Self::Exact(only) => format!("#define ONLY_{only}\n"),
            Self::Summary | Self::Passes | Self::Rows | Self::Sort | Self::Pool => String::new(),
        };
        for line in text.filter(|line| !line.starts_with("#include") && !line.starts_with("#pragma once")) {
            source.push_str(line);
            source.push('\n');
        }
        source
    }
}

/// The kernel that updates parameters and gradients of these dtypes, with moments stored like this.
pub(crate) fn update_kernel(param: DType, grad: DType, state: StateDType, rowwise: bool) -> String {
    format!("update_{}_{}_{}", param.as_str(), grad.as_str(), moments(state, rowwise))
}

/// The kernel that brings rows up to date, of parameters of this dtype, with moments stored like this.
pub(crate) fn catch_up_kernel(param: DType, state: StateDType, rowwise: bool) -> String {
    format!("catch_up_{}_{}", param.as_str(), moments(state, rowwise))
}

fn moments(state: StateDType, rowwise: bool) -> String {
    let state = match state {
        StateDType::F32 => "full",
        StateDType::BF16 => "bf16",
        StateDType::F16 => "f16",
        StateDType::Q8 => "q8",
    };
    format!("{state}{}", if rowwise { "_rowwise" } else { "" })
}
