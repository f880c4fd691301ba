//! Safetensors files, read with care: every format here is read through [`TensorFile`].
//!
//! Invariant: nothing is allocated because a header says so. A header can be as long as the names that are looked for
//! need, and have as many values. A tensor's memory is allocated once it is known that the file has that many bytes and
//! that the tensor is one that the reader needs. So the memory that reading takes is that of the tensors, less than the
//! file's size, and a few times that of a header of limited length.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor};
use half::vec::HalfBitsVecExt as _;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::atomic::failed;
use super::header::Header;
use super::{LARGEST_HEADER, unreadable};
use crate::error::{Error, Result, listed};

/// How much a header may hold, and a JSON text in it: far more than variables with certain names need.
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
            limits.values += 128;
        }
        limits
    }

    /// Makes sure that the text `entry` is no longer.
    pub(super) fn check(self, entry: &str, text: &str) -> Result<()> {
        let values = count_values(text.as_bytes());
        for (what, limit, got) in [("bytes", self.bytes, text.len()), ("values", self.values, values)] {
            if got > limit {
                return Err(Error::checkpoint(entry, format!("at most {limit} {what} of settings"), got));
            }
        }
        Ok(())
    }
}

/// How many values a JSON text has, an object counted as [`HeaderLimits::OBJECT`]: what makes a parser allocate.
fn count_values(json: &[u8]) -> usize {
    let (mut values, mut in_string, mut is_escaped) = (0, false, false);
    for byte in json {
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
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads the header of the file at `path`, and the text `key` in it. Without `limits` it may have as many tensors as
    /// its length allows, and the text as much as their variables need.
    pub(super) fn open(path: &Path, key: Option<&str>, limits: Option<HeaderLimits>) -> Result<Self> {
        let (header, file, length) = read_header(path, limits)?;
        let start = (size_of::<u64>() + header.len()) as u64;
        let parsed = Header::parse(&header, key);
        let Header { text, tensors } =
            parsed.map_err(|error| unreadable(path, SafeTensorError::InvalidHeaderDeserialization(error)))?;
        let mut by_offset: Vec<_> = tensors.iter().map(|(name, info)| (name.clone(), info.clone())).collect();
        by_offset.sort_by_key(|(_, info)| info.data_offsets);
        let metadata = Metadata::new(None, by_offset).map_err(|error| unreadable(path, error))?;
        if start.checked_add(metadata.data_len() as u64) != Some(length) {
            return Err(unreadable(path, SafeTensorError::MetadataIncompleteBuffer));
        }
        if let (Some(key), Some(text)) = (key, &text) {
            let of_vars = || HeaderLimits::of(tensors.keys().filter_map(|name| name.strip_suffix(".exp_avg")));
            limits.unwrap_or_else(of_vars).check(key, text).map_err(|error| error.in_file(path))?;
        }
        Ok(Self { file, path: path.to_owned(), start, text, tensors })
    }

    /// The text that was looked for.
    pub(super) fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// The names of the tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Result of `assemble`, which takes each tensor once. It first makes the same of
    /// [outlines](Self::outline), and nothing is read unless `check` finds that these fit.
    pub(super) fn assemble<S>(
        &self,
        assemble: impl Fn(&mut Tensors<'_>) -> Result<S>,
        check: impl FnOnce(&S) -> Result<()>,
    ) -> Result<S> {
        let mut outlines = Tensors { file: self, left: self.names().collect(), are_outlines: true };
        let outline = assemble(&mut outlines)?;
        let mut surplus = outlines.left.iter().copied();
        if let Some(name) = surplus.next() {
            let got = match surplus.len() {
                0 => "a surplus one".to_owned(),
                _ => format!("a surplus one, and others: {}", listed(surplus)),
            };
            return Err(Error::checkpoint(name, "no such tensor", got));
        }
        check(&outline)?;
        assemble(&mut Tensors { file: self, left: self.names().collect(), are_outlines: false })
    }

    /// A tensor of the dtype and the shape that the header has for `name`. All its elements are one zero in memory.
    fn outline(&self, name: &str, info: &TensorInfo) -> Result<Tensor> {
        // Strides are products of some of the dimensions, also where another one is 0.
        let largest_stride = info.shape.iter().filter(|&&dim| dim > 0).try_fold(1usize, |n, &dim| n.checked_mul(dim));
        if largest_stride.is_none() {
            return Err(Error::checkpoint(name, "dimensions that a tensor can have", format!("{:?}", info.shape)));
        }
        let dtype = DType::try_from(info.dtype).map_err(|_| no_such_dtype(name, info))?;
        Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(info.shape.as_slice())?)
    }

    /// Reads a tensor into host memory.
    fn read(&self, name: &str, info: &TensorInfo) -> Result<Tensor> {
        let (shape, cpu) = (info.shape.as_slice(), &Device::Cpu);
        Ok(match info.dtype {
            Dtype::F64 => Tensor::from_vec(self.elements::<f64>(info)?, shape, cpu)?,
            Dtype::F32 => Tensor::from_vec(self.elements::<f32>(info)?, shape, cpu)?,
            Dtype::F16 => Tensor::from_vec(self.elements::<u16>(info)?.reinterpret_into::<f16>(), shape, cpu)?,
            Dtype::BF16 => Tensor::from_vec(self.elements::<u16>(info)?.reinterpret_into::<bf16>(), shape, cpu)?,
            Dtype::U8 => Tensor::from_vec(self.elements::<u8>(info)?, shape, cpu)?,
            Dtype::U32 => Tensor::from_vec(self.elements::<u32>(info)?, shape, cpu)?,
            Dtype::I16 => Tensor::from_vec(self.elements::<i16>(info)?, shape, cpu)?,
            Dtype::I32 => Tensor::from_vec(self.elements::<i32>(info)?, shape, cpu)?,
            Dtype::I64 => Tensor::from_vec(self.elements::<i64>(info)?, shape, cpu)?,
            _ => return Err(no_such_dtype(name, info)),
        })
    }

    fn elements<T: Pod>(&self, info: &TensorInfo) -> Result<Vec<T>> {
        let (begin, end) = info.data_offsets;
        let mut elements = vec![T::zeroed(); (end - begin) / size_of::<T>()];
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(self.start + begin as u64));
        let read = read.and_then(|_| file.read_exact(bytemuck::cast_slice_mut(&mut elements)));
        read.map_err(failed("reading", &self.path))?;
        Ok(elements)
    }
}

/// The tensors of a file that have not been taken yet.
pub(super) struct Tensors<'f> {
    file: &'f TensorFile,
    left: BTreeSet<&'f str>,
    are_outlines: bool,
}

impl Tensors<'_> {
    /// The tensor `name`. One without dimensions always has its value.
    pub(super) fn take(&mut self, name: &str) -> Result<Tensor> {
        let info = self.file.tensors.get(name).filter(|_| self.left.remove(name));
        let Some(info) = info else {
            let got = format!("none; left in the file: {}", listed(self.left.iter().copied()));
            return Err(Error::checkpoint(name, "a tensor", got));
        };
        match self.are_outlines && !info.shape.is_empty() {
            true => self.file.outline(name, info),
            false => self.file.read(name, info),
        }
    }
}

fn no_such_dtype(name: &str, info: &TensorInfo) -> Error {
    Error::checkpoint(name, "a tensor of a dtype that candle has", format!("{:?}", info.dtype))
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
    let too_large = || unreadable(path, SafeTensorError::HeaderTooLarge);
    // A text is at most twice as long as a string of JSON, and the entries of tensors are short.
    if claimed > limits.map_or(LARGEST_HEADER, |limits| 4 * limits.bytes) as u64 {
        return Err(too_large());
    }
    let mut header = vec![0; claimed as usize];
    file.read_exact(&mut header).map_err(failed())?;
    if limits.is_some_and(|limits| count_values(&header) > 4 * limits.values) {
        return Err(too_large());
    }
    Ok((header, file, metadata.len()))
}
