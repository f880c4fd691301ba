//! Safetensors files, read with care: every format here is read through [`TensorFile`].
//!
//! Invariant: nothing is allocated because a header says so. A header can be as long as the names that are looked for
//! need; of what is in it only what was looked for is kept; and a tensor's memory is allocated once it is known that
//! the file has that many bytes. So the memory that reading takes is that of the tensors, less than the file's size,
//! and a few times that of a header of limited length.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use candle_core::{Device, Tensor};
use half::vec::HalfBitsVecExt as _;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::atomic::failed;
use super::header::{Header, Wanted};
use super::{LARGEST_HEADER, unreadable};
use crate::error::{Error, Result, listed};

/// How much a JSON text in a header may hold: far more than settings of variables with certain names need.
#[derive(Clone, Copy)]
pub(super) struct HeaderLimits {
    bytes: usize,
    /// A value takes far more memory than its text.
    values: usize,
}

impl HeaderLimits {
    /// An object takes as much memory as so many numbers, whatever is in it.
    const OBJECT: usize = 16;

    pub(super) fn of<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        let mut limits = Self { bytes: 1 << 20, values: 1 << 16 };
        for name in names {
            limits.bytes += 2048 + 64 * name.len();
            limits.values += 64;
        }
        limits
    }

    /// Makes sure that the text `entry` is no longer.
    pub(super) fn check(self, entry: &str, text: &str) -> Result<()> {
        let values = count_values(text);
        for (what, limit, got) in [("bytes", self.bytes, text.len()), ("values", self.values, values)] {
            if got > limit {
                return Err(Error::checkpoint(entry, format!("at most {limit} {what} of settings"), got));
            }
        }
        Ok(())
    }
}

/// How many values a JSON text has, an object counted as [`HeaderLimits::OBJECT`]: what makes a parser allocate.
fn count_values(text: &str) -> usize {
    let (mut values, mut in_string, mut is_escaped) = (0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' => values += HeaderLimits::OBJECT,
            b'[' | b',' | b':' => values += 1,
            _ => {}
        }
    }
    values
}

/// A safetensors file whose header has been read and checked against the file's length.
pub(super) struct TensorFile {
    file: File,
    path: PathBuf,
    /// Where the tensors begin.
    start: u64,
    text: Option<String>,
    /// The tensors that were looked for and have not been taken yet.
    tensors: BTreeMap<String, TensorInfo>,
    /// The first few tensors that were not looked for.
    surplus: Vec<String>,
}

impl TensorFile {
    /// Reads the header of the file at `path`. What is surplus there is an error of [`no_surplus`](Self::no_surplus).
    pub(super) fn open(path: &Path, wanted: &Wanted<'_>) -> Result<Self> {
        let (header, file, length) = read_header(path, wanted.limits)?;
        let start = (size_of::<u64>() + header.len()) as u64;
        let parsed = Header::parse(&header, wanted);
        let Header { text, tensors, surplus } =
            parsed.map_err(|error| unreadable(path, SafeTensorError::InvalidHeaderDeserialization(error)))?;
        if let (Some(key), Some(text)) = (wanted.text, &text) {
            let of_vars = || HeaderLimits::of(tensors.keys().filter_map(|name| name.strip_suffix(".exp_avg")));
            wanted.limits.unwrap_or_else(of_vars).check(key, text).map_err(|error| error.in_file(path))?;
        }
        // What is surplus was not kept, so the rest has gaps; nothing is taken from such a file.
        if surplus.is_empty() {
            let mut by_offset: Vec<_> = tensors.iter().map(|(name, info)| (name.clone(), info.clone())).collect();
            by_offset.sort_by_key(|(_, info)| info.data_offsets);
            let metadata = Metadata::new(None, by_offset).map_err(|error| unreadable(path, error))?;
            if start.checked_add(metadata.data_len() as u64) != Some(length) {
                return Err(unreadable(path, SafeTensorError::MetadataIncompleteBuffer));
            }
        }
        Ok(Self { file, path: path.to_owned(), start, text, tensors, surplus })
    }

    /// The text that was looked for.
    pub(super) fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// The tensors that were looked for and found, and have not been taken yet.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name` that has not been taken yet.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Reads the tensor `name` into host memory. Each can be taken once.
    pub(super) fn take(&mut self, name: &str) -> Result<Tensor> {
        self.no_surplus()?;
        let Some(info) = self.tensors.remove(name) else {
            return Err(Error::checkpoint(name, "a tensor", "none"));
        };
        // Strides are products of some of the dimensions, also where another one is 0.
        let largest_stride = info.shape.iter().filter(|&&dim| dim > 0).try_fold(1usize, |n, &dim| n.checked_mul(dim));
        if largest_stride.is_none() {
            return Err(Error::checkpoint(name, "dimensions that a tensor can have", format!("{:?}", info.shape)));
        }
        let begin = self.start + info.data_offsets.0 as u64;
        self.file.seek(SeekFrom::Start(begin)).map_err(failed("reading", &self.path))?;
        let (shape, cpu) = (info.shape.as_slice(), &Device::Cpu);
        Ok(match info.dtype {
            Dtype::F64 => Tensor::from_vec(self.elements::<f64>(&info)?, shape, cpu)?,
            Dtype::F32 => Tensor::from_vec(self.elements::<f32>(&info)?, shape, cpu)?,
            Dtype::F16 => Tensor::from_vec(self.elements::<u16>(&info)?.reinterpret_into::<f16>(), shape, cpu)?,
            Dtype::BF16 => Tensor::from_vec(self.elements::<u16>(&info)?.reinterpret_into::<bf16>(), shape, cpu)?,
            Dtype::U8 => Tensor::from_vec(self.elements::<u8>(&info)?, shape, cpu)?,
            Dtype::U32 => Tensor::from_vec(self.elements::<u32>(&info)?, shape, cpu)?,
            Dtype::I16 => Tensor::from_vec(self.elements::<i16>(&info)?, shape, cpu)?,
            Dtype::I32 => Tensor::from_vec(self.elements::<i32>(&info)?, shape, cpu)?,
            Dtype::I64 => Tensor::from_vec(self.elements::<i64>(&info)?, shape, cpu)?,
            other => {
                let expected = "a tensor of a dtype that candle has";
                return Err(Error::checkpoint(name, expected, format!("{other:?}")));
            }
        })
    }

    /// The elements of a tensor, whose bytes are next in the file.
    fn elements<T: Pod>(&mut self, info: &TensorInfo) -> Result<Vec<T>> {
        let (begin, end) = info.data_offsets;
        let mut elements = vec![T::zeroed(); (end - begin) / size_of::<T>()];
        let read = self.file.read_exact(bytemuck::cast_slice_mut(&mut elements));
        read.map_err(failed("reading", &self.path))?;
        Ok(elements)
    }

    /// Makes sure that there was no tensor that was not looked for.
    pub(super) fn no_surplus(&self) -> Result<()> {
        match self.surplus.as_slice() {
            [] => Ok(()),
            [name] => Err(surplus(name)),
            [name, others @ ..] => {
                let got = format!("a surplus one, and others: {}", listed(others.iter().map(String::as_str)));
                Err(Error::checkpoint(name, NO_SUCH_TENSOR, got))
            }
        }
    }

    /// Makes sure that nothing was in the file but what has been taken.
    pub(super) fn finish(self) -> Result<()> {
        self.no_surplus()?;
        match self.tensors.keys().next() {
            Some(left) => Err(surplus(left)),
            None => Ok(()),
        }
    }
}

const NO_SUCH_TENSOR: &str = "no such tensor";

fn surplus(name: &str) -> Error {
    Error::checkpoint(name, NO_SUCH_TENSOR, "a surplus one")
}

/// The bytes of the header, the file, and how many bytes that has.
fn read_header(path: &Path, limits: Option<HeaderLimits>) -> Result<(Vec<u8>, File, u64)> {
    let failed = || failed("reading", path);
    let mut file = File::open(path).map_err(failed())?;
    let metadata = file.metadata().map_err(failed())?;
    if !metadata.is_file() {
        return Err(failed()(io::Error::new(io::ErrorKind::InvalidInput, "expected a file")));
    }
    let mut length_of_header = [0; size_of::<u64>()];
    let Some(rest) = metadata.len().checked_sub(length_of_header.len() as u64) else {
        return Err(unreadable(path, SafeTensorError::HeaderTooSmall));
    };
    file.read_exact(&mut length_of_header).map_err(failed())?;
    let claimed = u64::from_le_bytes(length_of_header);
    if claimed > rest {
        return Err(unreadable(path, SafeTensorError::InvalidHeaderLength));
    }
    // A text is at most twice as long as a string of JSON, and the entries of tensors are short.
    if claimed > limits.map_or(LARGEST_HEADER, |limits| 4 * limits.bytes) as u64 {
        return Err(unreadable(path, SafeTensorError::HeaderTooLarge));
    }
    let mut header = vec![0; claimed as usize];
    file.read_exact(&mut header).map_err(failed())?;
    Ok((header, file, metadata.len()))
}
