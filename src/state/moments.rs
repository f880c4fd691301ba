//! The moments of one parameter, in each encoding, and the ways from one into another.

use bytemuck::Pod;
use candle_core::{DType, Device, Shape, Tensor};

use super::{Buffer, MomentTensors, Place, arithmetic, clear, grown};
use crate::codec::{self, BLOCK, Bf16, Encoding, F16, Format, Q8, StateDType};
use crate::error::Result;
use crate::pages::Pages;

/// The elements that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Units {
    /// 1,024 neighbors each.
    Blocks,
    /// All elements of a row, because gradients of some rows have come.
    Rows,
}

/// How the moments of a parameter are laid out in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layout {
    /// F32 stands for the type of the arithmetic.
    pub(crate) dtype: StateDType,
    /// How many elements share a unit, or a norm.
    pub(crate) unit: usize,
    /// Whether a unit is a row, because gradients of some rows have come.
    pub(crate) units: Units,
    /// Whether the elements of a row share one norm.
    pub(crate) rowwise: bool,
    pub(crate) encoding: Encoding,
}

impl Layout {
    /// The layout for `var`.
    pub(crate) fn of(var: &Tensor, dtype: StateDType, units: Units, rowwise: bool, encoding: Encoding) -> Self {
        // The moments of f64 are f64.
        let dtype = if arithmetic(var.dtype()) == DType::F64 { StateDType::F32 } else { dtype };
        // Moments as they are have no units, and nothing depends on what only some codes depend on.
        let units = if dtype == StateDType::F32 { Units::Blocks } else { units };
        let encoding = match dtype {
            StateDType::F32 => Encoding { eps_outside: 0.0, limit: f64::INFINITY },
            StateDType::BF16 | StateDType::F16 => Encoding { limit: f64::INFINITY, ..encoding },
            StateDType::Q8 => encoding,
        };
        let unit = if units == Units::Rows || rowwise { row_unit(var) } else { BLOCK };
        Self { dtype, unit, units, rowwise, encoding }
    }
}

/// The elements of a row; at least one, so that it can be divided by.
fn row_unit(var: &Tensor) -> usize {
    var.dims().iter().skip(1).product::<usize>().max(1)
}

/// m and u of one parameter.
pub(crate) struct Moments {
    pub(crate) layout: Layout,
    pub(crate) stored: Stored,
}

/// The arrays.
pub(crate) enum Stored {
    /// As they are; u may have one element for each row.
    Full {
        exp_avg: Buffer,
        exp_inf: Buffer,
    },
    BF16(Coded<Bf16>),
    F16(Coded<F16>),
    Q8(Coded<Q8>),
    /// Any of them as tensors on the variable's GPU, for the CUDA kernels.
    Device(MomentTensors),
}

/// Encoded moments.
pub(crate) struct Coded<F: Format> {
    pub(crate) moments: Pages<F::Code>,
    pub(crate) norms: Norms<F>,
}

/// Norms beside encoded moments.
pub(crate) enum Norms<F: Format> {
    /// One for each element, with the logarithm of each unit.
    Each { codes: Pages<F::Norm>, logs: Pages<u32> },
    /// One for each row.
    Shared(Pages<f32>),
}

impl<F: Format> Norms<F> {
    /// u of element `i`.
    fn value(&self, i: usize, layout: &Layout) -> f32 {
        match self {
            Self::Each { codes, logs } => F::norm(F::widen_norm(codes[i])) * codec::scale_of(logs[i / layout.unit]),
            Self::Shared(norms) => norms[i / layout.unit],
        }
    }
}

impl<F: Format> Coded<F> {
    fn zeros(n: usize, layout: &Layout) -> Self {
        let units = n.div_ceil(layout.unit);
        let norms = match layout.rowwise {
            true => Norms::Shared(Pages::zeros(units)),
            false => Norms::Each { codes: Pages::zeros(n), logs: Pages::zeros(units) },
        };
        Self { moments: Pages::zeros(n), norms }
    }

    /// m and u of each element.
    fn decode(&self, layout: &Layout) -> (Pages<f32>, Pages<f32>) {
        let n = self.moments.len();
        let (mut exp_avg, mut exp_inf) = (Pages::zeros(n), Pages::zeros(n));
        let limits = layout.encoding.limits();
        let blocks = exp_avg.chunks_mut(layout.unit).zip(exp_inf.chunks_mut(layout.unit));
        for ((block, (m, u)), codes) in blocks.enumerate().zip(self.moments.chunks(layout.unit)) {
            let mut out = m.iter_mut().zip(u);
            let mut put = |a, b| {
                if let Some((m, u)) = out.next() {
                    // What is zero already is not written: the memory may not be there yet.
                    if a != 0.0 || b != 0.0 {
                        (*m, *u) = (a, b);
                    }
                }
            };
            match &self.norms {
                Norms::Each { codes: norms, logs } => {
                    let norms = &norms[block * layout.unit..][..codes.len()];
                    codec::decode_block::<F>(&layout.encoding, (codes, norms, logs[block]), put);
                }
                Norms::Shared(norms) => {
                    let u = norms[block];
                    for &code in codes {
                        put(F::decode(F::load(code, &limits), u + layout.encoding.eps_outside as f32), u);
                    }
                }
            }
        }
        (exp_avg, exp_inf)
    }

    fn encode(exp_avg: &[f32], exp_inf: &[f32], layout: &Layout) -> Self {
        let mut coded = Self::zeros(exp_avg.len(), layout);
        let (limits, eps) = (layout.encoding.limits(), layout.encoding.eps_outside as f32);
        let blocks = exp_avg.chunks(layout.unit).zip(exp_inf.chunks(layout.unit));
        for (block, (m, u)) in blocks.enumerate() {
            if m.iter().chain(u).all(|&x| x == 0.0) {
                continue;
            }
            let codes = &mut coded.moments[block * layout.unit..][..m.len()];
            match &mut coded.norms {
                Norms::Each { codes: norms, logs } => {
                    let norms = &mut norms[block * layout.unit..][..m.len()];
                    logs[block] = codec::encode_block::<F>(&layout.encoding, (m, u), (codes, norms));
                }
                Norms::Shared(norms) => {
                    norms[block] = largest(u);
                    for (code, &m) in codes.iter_mut().zip(m) {
                        *code = codec::encode_moment::<F>(m, norms[block] + eps, &limits);
                    }
                }
            }
        }
        coded
    }

    /// The same codes for another layout of the same format. Norms are not rounded again: where units are merged, they
    /// are some octaves apart, since all units of a variable shrink alike before it becomes a table.
    fn rebuilt(&self, from: &Layout, to: &Layout) -> Self {
        let n = self.moments.len();
        let mut coded = Self::zeros(n, to);
        if let (Norms::Each { codes, logs }, Norms::Each { codes: new_codes, logs: new_logs }) =
            (&self.norms, &mut coded.norms)
        {
            for (unit, new_codes) in new_codes.chunks_mut(to.unit).enumerate() {
                let start = unit * to.unit;
                let covered = start / from.unit..(start + new_codes.len()).div_ceil(from.unit);
                let log = covered.map(|unit| logs[unit]).max().unwrap_or(0);
                for (new, i) in new_codes.iter_mut().zip(start..) {
                    *new = codec::in_unit::<F>(codes[i], logs[i / from.unit], log);
                }
                if log != 0 {
                    new_logs[unit] = log;
                }
            }
        }
        if let (Norms::Shared(norms), Norms::Shared(new)) = (&self.norms, &mut coded.norms) {
            *new = Pages::of(norms);
        }
        if from.encoding == to.encoding {
            coded.moments = Pages::of(&self.moments);
            return coded;
        }
        let (before, after) = (from.encoding.limits(), to.encoding.limits());
        for i in 0..n {
            let u = self.norms.value(i, from);
            let m = F::decode(F::load(self.moments[i], &before), u + from.encoding.eps_outside as f32);
            if m != 0.0 {
                coded.moments[i] = codec::encode_moment::<F>(m, u + to.encoding.eps_outside as f32, &after);
            }
        }
        coded
    }

    fn clear_rows(&mut self, rows: &[u32], row_len: usize) {
        clear(&mut self.moments, rows, row_len);
        match &mut self.norms {
            // A unit may be shared with other rows, and of zeros it does not matter.
            Norms::Each { codes, .. } => clear(codes, rows, row_len),
            Norms::Shared(norms) => clear(norms, rows, 1),
        }
    }

    fn grown(&self, n: usize, layout: &Layout) -> Self {
        let units = n.div_ceil(layout.unit);
        let norms = match &self.norms {
            Norms::Each { codes, logs } => {
                Norms::Each { codes: Pages::extended(codes, n), logs: Pages::extended(logs, units) }
            }
            Norms::Shared(norms) => Norms::Shared(Pages::extended(norms, units)),
        };
        Self { moments: Pages::extended(&self.moments, n), norms }
    }
}

/// The largest of them, or NaN if one is.
fn largest(u: &[f32]) -> f32 {
    u.iter().copied().fold(0.0, crate::rule::maximum)
}

/// Runs `$body` with the encoded arrays, whatever their format, or `$full` with the others.
macro_rules! with_coded {
    ($stored:expr, $coded:ident => $body:expr, ($m:ident, $u:ident) => $full:expr, $device:ident => $tensors:expr) => {
        match $stored {
            Stored::Device($device) => $tensors,
            Stored::Full { exp_avg: $m, exp_inf: $u } => $full,
            Stored::BF16($coded) => $body,
            Stored::F16($coded) => $body,
            Stored::Q8($coded) => $body,
        }
    };
}

impl Moments {
    pub(crate) fn zeros(var: &Tensor, place: Place, layout: &Layout) -> Result<Self> {
        let n = var.elem_count();
        let stored = match layout.dtype {
            _ if place == Place::Cuda => Stored::Device(MomentTensors::zeros(var, layout)?),
            StateDType::BF16 => Stored::BF16(Coded::zeros(n, layout)),
            StateDType::F16 => Stored::F16(Coded::zeros(n, layout)),
            StateDType::Q8 => Stored::Q8(Coded::zeros(n, layout)),
            StateDType::F32 if layout.rowwise => {
                let exp_inf = Buffer::zeros_host(var.dtype(), n.div_ceil(layout.unit));
                Stored::Full { exp_avg: Buffer::zeros(var, place)?, exp_inf }
            }
            StateDType::F32 => {
                Stored::Full { exp_avg: Buffer::zeros(var, place)?, exp_inf: Buffer::zeros(var, place)? }
            }
        };
        Ok(Self { layout: *layout, stored })
    }

    /// How many elements the parameter has.
    pub(crate) fn len(&self) -> usize {
        with_coded!(&self.stored, coded => coded.moments.len(), (m, _u) => m.len(), tensors => tensors.exp_avg.elem_count())
    }

    /// Where they live.
    pub(crate) fn place(&self) -> Place {
        let of_full = |m: &Buffer| if m.is_on_host() { Place::Host } else { Place::Device };
        with_coded!(&self.stored, _coded => Place::Host, (m, _u) => of_full(m), _tensors => Place::Cuda)
    }

    /// How many bytes they take, once all of them have been written.
    pub(crate) fn bytes(&self) -> usize {
        fn coded<F: Format>(coded: &Coded<F>) -> usize {
            let norms = match &coded.norms {
                Norms::Each { codes, logs } => size_of_val::<[F::Norm]>(codes) + size_of_val::<[u32]>(logs),
                Norms::Shared(norms) => size_of_val::<[f32]>(norms),
            };
            size_of_val::<[F::Code]>(&coded.moments) + norms
        }
        with_coded!(&self.stored, c => coded(c), (m, u) => m.bytes() + u.bytes(), tensors => tensors.bytes())
    }

    /// How many of these bytes are those of scales.
    pub(crate) fn scale_bytes(&self) -> usize {
        fn coded<F: Format>(coded: &Coded<F>) -> usize {
            match &coded.norms {
                Norms::Each { logs, .. } => size_of_val::<[u32]>(logs),
                Norms::Shared(_) => 0,
            }
        }
        with_coded!(&self.stored, c => coded(c), (_m, _u) => 0, tensors => tensors.scale_bytes())
    }

    /// A copy of tensors on a GPU in host memory; `None` if they are not there.
    fn on_host(&self) -> Result<Option<Self>> {
        let Stored::Device(tensors) = &self.stored else { return Ok(None) };
        let tensors = tensors.to_device(&Device::Cpu)?;
        Ok(Some(Self::from_stored(&tensors, &tensors.exp_avg, Place::Host, &self.layout)?))
    }

    /// The same values in another layout; a copy. Encodings round to nearest.
    pub(crate) fn converted(&self, layout: &Layout) -> Result<Self> {
        if let (Stored::Device(tensors), Some(host)) = (&self.stored, self.on_host()?) {
            // By way of the host: this happens where settings change, not at every step.
            let var = &tensors.exp_avg;
            let converted = host.converted(layout)?.to_stored(var.shape())?;
            return Self::from_stored(&converted, var, Place::Cuda, layout);
        }
        if let Stored::Full { exp_avg, exp_inf } = &self.stored
            && layout.dtype == StateDType::F32
            && layout.rowwise == self.layout.rowwise
        {
            let stored = Stored::Full { exp_avg: exp_avg.copied()?, exp_inf: exp_inf.copied()? };
            return Ok(Self { layout: *layout, stored });
        }
        if self.layout.dtype == layout.dtype && self.layout.rowwise == layout.rowwise {
            let stored = match &self.stored {
                Stored::BF16(coded) => Some(Stored::BF16(coded.rebuilt(&self.layout, layout))),
                Stored::F16(coded) => Some(Stored::F16(coded.rebuilt(&self.layout, layout))),
                Stored::Q8(coded) => Some(Stored::Q8(coded.rebuilt(&self.layout, layout))),
                Stored::Full { .. } | Stored::Device(_) => None,
            };
            if let Some(stored) = stored {
                return Ok(Self { layout: *layout, stored });
            }
        }
        let (exp_avg, exp_inf) = self.decode()?;
        let stored = match (layout.dtype, &exp_avg, &exp_inf) {
            (StateDType::BF16, Buffer::F32(m), Buffer::F32(u)) => Stored::BF16(Coded::encode(m, u, layout)),
            (StateDType::F16, Buffer::F32(m), Buffer::F32(u)) => Stored::F16(Coded::encode(m, u, layout)),
            (StateDType::Q8, Buffer::F32(m), Buffer::F32(u)) => Stored::Q8(Coded::encode(m, u, layout)),
            _ if layout.rowwise => Stored::Full { exp_inf: shared(exp_inf, layout.unit), exp_avg },
            _ => Stored::Full { exp_avg, exp_inf },
        };
        Ok(Self { layout: *layout, stored })
    }

    /// m and u of each element, in host memory.
    pub(super) fn decode(&self) -> Result<(Buffer, Buffer)> {
        fn decoded<F: Format>(coded: &Coded<F>, layout: &Layout) -> (Buffer, Buffer) {
            let (m, u) = coded.decode(layout);
            (Buffer::F32(m), Buffer::F32(u))
        }
        fn each<A: Pod>(u: &[A], n: usize, unit: usize) -> Pages<A> {
            let mut all = Pages::zeros(n);
            all.chunks_mut(unit).zip(u).for_each(|(row, u)| row.fill(*u));
            all
        }
        if let Some(host) = self.on_host()? {
            return host.decode();
        }
        Ok(with_coded!(&self.stored, coded => decoded(coded, &self.layout), (m, u) => {
            let n = m.len();
            let u = match u {
                Buffer::F32(u) if self.layout.rowwise => Buffer::F32(each(u, n, self.layout.unit)),
                Buffer::F64(u) if self.layout.rowwise => Buffer::F64(each(u, n, self.layout.unit)),
                u => u.on_host()?,
            };
            (m.on_host()?, u)
        }, _tensors => return Err(candle_core::Error::msg("the moments are not in host memory").into())))
    }

    /// m and u in the shape of the variable, in host memory, in the type of the arithmetic.
    pub(crate) fn to_tensors(&self, shape: &Shape) -> Result<(Tensor, Tensor)> {
        if let Stored::Full { exp_avg, exp_inf } = &self.stored
            && !self.layout.rowwise
        {
            return Ok((exp_avg.to_tensor(shape)?, exp_inf.to_tensor(shape)?));
        }
        let (exp_avg, exp_inf) = self.decode()?;
        Ok((exp_avg.to_tensor(shape)?, exp_inf.to_tensor(shape)?))
    }

    /// Sets rows to zero.
    pub(crate) fn clear_rows(&mut self, rows: &[u32], row_len: usize) -> Result<()> {
        let rowwise = self.layout.rowwise;
        with_coded!(&mut self.stored, coded => coded.clear_rows(rows, row_len), (m, u) => {
            m.clear_rows(rows, row_len)?;
            u.clear_rows(rows, if rowwise { 1 } else { row_len })?;
        }, tensors => tensors.clear_rows(rows, rowwise)?);
        Ok(())
    }

    /// A copy for `var`, which has more rows: those are zero.
    pub(crate) fn grown(&self, var: &Tensor) -> Result<Self> {
        let (n, layout) = (var.elem_count(), &self.layout);
        let stored = match &self.stored {
            Stored::Full { exp_avg, exp_inf } => {
                let exp_inf = match exp_inf {
                    Buffer::F32(u) if layout.rowwise => Buffer::F32(Pages::extended(u, n.div_ceil(layout.unit))),
                    Buffer::F64(u) if layout.rowwise => Buffer::F64(Pages::extended(u, n.div_ceil(layout.unit))),
                    u => u.grown(var)?,
                };
                Stored::Full { exp_avg: exp_avg.grown(var)?, exp_inf }
            }
            Stored::BF16(coded) => Stored::BF16(coded.grown(n, layout)),
            Stored::F16(coded) => Stored::F16(coded.grown(n, layout)),
            Stored::Q8(coded) => Stored::Q8(coded.grown(n, layout)),
            Stored::Device(tensors) => {
                let scales = tensors.scales.as_ref().map(|scales| grown(scales, &Shape::from(n.div_ceil(layout.unit))));
                let norms = if layout.rowwise { Shape::from(n.div_ceil(layout.unit)) } else { var.shape().clone() };
                Stored::Device(MomentTensors {
                    exp_avg: grown(&tensors.exp_avg, var.shape())?,
                    exp_inf: grown(&tensors.exp_inf, &norms)?,
                    scales: scales.transpose()?,
                })
            }
        };
        Ok(Self { layout: *layout, stored })
    }
}

/// The largest of each row.
fn shared(u: Buffer, unit: usize) -> Buffer {
    fn rows<A: Pod + PartialOrd>(u: &[A], unit: usize) -> Pages<A> {
        let rows = u.chunks(unit).map(|row| row.iter().copied().fold(A::zeroed(), crate::rule::maximum));
        Pages::of(&rows.collect::<Vec<_>>())
    }
    match u {
        Buffer::F64(u) => Buffer::F64(rows(&u, unit)),
        Buffer::F32(u) => Buffer::F32(rows(&u, unit)),
        tensor => tensor,
    }
}
