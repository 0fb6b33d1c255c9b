//! Weights in the layout that the kernels stream.
//!
//! Sixteen output rows are interleaved into a *tile*, so that one vector load
//! brings the weights of sixteen outputs. A tile is read from front to back:
//!
//! - quantised: for each group of 16 or 32 inputs, sixteen scales, sixteen
//!   minimums where the format has them, then the codes. 64 bytes hold, for each
//!   of the sixteen rows, four consecutive inputs as bytes, or eight as nibbles:
//!   the low ones are the first four inputs, the high ones the next four.
//! - floating-point: for each input, sixteen weights in the format they came in.
//!
//! The last tile is filled up with zeros. There is no other copy of the weights:
//! [`Packed::read_row`] serves embeddings from the same tiles.

use super::memory::{Buffer, Disjoint};
use super::simd::LANES;
use super::workers::Workers;
use crate::device::{DeviceError, WeightRows};
use crate::weights::DType;
use crate::weights::quant::{self, Affine};
use half::{bf16, f16};
use std::cell::RefCell;

/// How a floating-point weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatType {
    F32,
    F16,
    Bf16,
}

impl FloatType {
    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        }
    }
}

/// Where things lie in a quantised tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuantLayout {
    /// The format's constants.
    pub(crate) affine: Affine,
    /// Groups of a row.
    pub(crate) groups: usize,
}

impl QuantLayout {
    /// Bytes of sixteen scales.
    pub(crate) fn scale_bytes(&self) -> usize {
        LANES * if self.affine.native_f16_scales { 2 } else { 4 }
    }

    /// Bytes of a group's scales and minimums.
    pub(crate) fn header_bytes(&self) -> usize {
        self.scale_bytes() * if self.affine.has_min { 2 } else { 1 }
    }

    /// Bytes of a group of a tile.
    pub(crate) fn group_bytes(&self) -> usize {
        self.header_bytes() + LANES * self.affine.group * usize::from(self.affine.bits) / 8
    }

    fn write_scale(&self, to: &mut [u8], lane: usize, value: f32) {
        if self.affine.native_f16_scales {
            to[lane * 2..lane * 2 + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        } else {
            to[lane * 4..lane * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
    }

    fn read_scale(&self, from: &[u8], lane: usize) -> f32 {
        if self.affine.native_f16_scales {
            FloatType::F16.read(&from[lane * 2..])
        } else {
            FloatType::F32.read(&from[lane * 4..])
        }
    }

    /// Spreads one row, as [`quant::unpack_row`] gives it, over its lane of `tile`.
    fn write_lane(&self, tile: &mut [u8], lane: usize, row: &Row) {
        let group = self.affine.group;
        for (g, to) in tile.chunks_exact_mut(self.group_bytes()).enumerate() {
            let (header, to) = to.split_at_mut(self.header_bytes());
            self.write_scale(header, lane, row.scales[g]);
            if self.affine.has_min {
                self.write_scale(&mut header[self.scale_bytes()..], lane, row.mins[g]);
            }
            let codes = &row.codes[g * group..][..group];
            let lanes = to
                .chunks_exact_mut(64)
                .map(|vector| &mut vector[lane * 4..][..4]);
            if self.affine.bits == 8 {
                for (to, codes) in lanes.zip(codes.chunks_exact(4)) {
                    to.copy_from_slice(codes);
                }
            } else {
                for (to, codes) in lanes.zip(codes.chunks_exact(8)) {
                    for j in 0..4 {
                        to[j] = codes[j] | codes[j + 4] << 4;
                    }
                }
            }
        }
    }

    /// The weights of one lane.
    fn read_lane(&self, tile: &[u8], lane: usize, out: &mut [f32]) {
        let group = self.affine.group;
        for (from, out) in tile
            .chunks_exact(self.group_bytes())
            .zip(out.chunks_exact_mut(group))
        {
            let (header, codes) = from.split_at(self.header_bytes());
            let scale = self.read_scale(header, lane);
            let min = match self.affine.has_min {
                true => self.read_scale(&header[self.scale_bytes()..], lane),
                false => 0.0,
            };
            let weight = |code: u8| {
                let weight = scale * (i32::from(code) - self.affine.zero) as f32;
                if self.affine.has_min {
                    weight + min
                } else {
                    weight
                }
            };
            let lanes = codes
                .chunks_exact(64)
                .map(|vector| &vector[lane * 4..][..4]);
            if self.affine.bits == 8 {
                for (from, out) in lanes.zip(out.chunks_exact_mut(4)) {
                    for j in 0..4 {
                        out[j] = weight(from[j]);
                    }
                }
            } else {
                for (from, out) in lanes.zip(out.chunks_exact_mut(8)) {
                    for j in 0..4 {
                        out[j] = weight(from[j] & 15);
                        out[j + 4] = weight(from[j] >> 4);
                    }
                }
            }
        }
    }
}

/// What a tile holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Float(FloatType),
    Quantised(QuantLayout),
}

impl Format {
    pub(crate) fn of(dtype: DType, columns: usize) -> Result<Self, DeviceError> {
        match (dtype, quant::affine(dtype)) {
            (_, Some(affine)) => Ok(Self::Quantised(QuantLayout {
                affine,
                groups: columns / affine.group,
            })),
            (DType::F16, _) => Ok(Self::Float(FloatType::F16)),
            (DType::BF16, _) => Ok(Self::Float(FloatType::Bf16)),
            (DType::F32, _) => Ok(Self::Float(FloatType::F32)),
            (other, None) => Err(DeviceError::Unsupported {
                device: "cpu",
                what: format!("weights stored as {other}"),
                expected: "F32, F16, BF16 or a block format".to_owned(),
            }),
        }
    }

    fn tile_bytes(&self, columns: usize) -> usize {
        match self {
            Self::Float(float) => LANES * columns * float.bytes(),
            Self::Quantised(layout) => layout.groups * layout.group_bytes(),
        }
    }
}

/// Consecutive output rows of one format.
pub(crate) struct Packed {
    pub(crate) format: Format,
    /// Output rows.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) columns: usize,
    /// Which output of the linear layer row 0 is.
    pub(crate) first_output: usize,
    tile_bytes: usize,
    data: Buffer<u8>,
}

/// One unpacked row.
#[derive(Default)]
struct Row {
    codes: Vec<u8>,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

thread_local! {
    static ROW: RefCell<Row> = RefCell::default();
}

impl Packed {
    /// Packs `parts`, which share dtype and columns and have been checked.
    pub(crate) fn new(
        workers: &mut Workers,
        parts: &[WeightRows<'_>],
        first_output: usize,
    ) -> Result<Self, DeviceError> {
        let (dtype, columns) = (parts[0].dtype, parts[0].columns);
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        let format = Format::of(dtype, columns)?;
        let tile_bytes = format.tile_bytes(columns);
        let tiles = rows.div_ceil(LANES);
        let too_large = || DeviceError::OutOfMemory {
            device: "cpu",
            bytes: usize::MAX,
            what: format!("{rows} × {columns} weights"),
        };
        let bytes = tiles.checked_mul(tile_bytes).ok_or_else(too_large)?;
        let mut data = Buffer::zeroed(bytes, "weights")?;
        let row_bytes = dtype.bytes_for(columns).ok_or_else(too_large)?;
        let out = Disjoint::new(&mut data);
        workers.run("load_linear", tiles, 4, |range| {
            for tile in range {
                // SAFETY: each tile is one item.
                let to = unsafe { out.range(tile * tile_bytes, tile_bytes) };
                for lane in 0..LANES.min(rows - tile * LANES) {
                    let (part, row) = find(parts, tile * LANES + lane);
                    let stored = part.order.stored_row(row);
                    let from = &part.data[stored * row_bytes..][..row_bytes];
                    pack_lane(format, dtype, columns, from, to, lane);
                }
            }
        })?;
        Ok(Self {
            format,
            rows,
            columns,
            first_output,
            tile_bytes,
            data,
        })
    }

    /// How many tiles.
    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The bytes of a tile.
    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        &self.data[tile * self.tile_bytes..][..self.tile_bytes]
    }

    /// Row `row` in float32.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (tile, lane) = (self.tile(row / LANES), row % LANES);
        match self.format {
            Format::Quantised(layout) => layout.read_lane(tile, lane, out),
            Format::Float(float) => {
                let bytes = float.bytes();
                for (from, out) in tile.chunks_exact(LANES * bytes).zip(out) {
                    *out = float.read(&from[lane * bytes..]);
                }
            }
        }
    }
}

/// Which part holds row `row` of all parts together, and which of its rows it is.
fn find<'a, 'b>(parts: &'a [WeightRows<'b>], mut row: usize) -> (&'a WeightRows<'b>, usize) {
    let mut part = &parts[0];
    for candidate in parts {
        part = candidate;
        if row < candidate.rows {
            break;
        }
        row -= candidate.rows;
    }
    (part, row)
}

fn pack_lane(
    format: Format,
    dtype: DType,
    columns: usize,
    from: &[u8],
    to: &mut [u8],
    lane: usize,
) {
    match format {
        Format::Float(float) => {
            let bytes = float.bytes();
            let lanes = to.chunks_exact_mut(LANES * bytes);
            for (from, to) in from.chunks_exact(bytes).zip(lanes) {
                to[lane * bytes..][..bytes].copy_from_slice(from);
            }
        }
        Format::Quantised(layout) => ROW.with_borrow_mut(|row| {
            row.codes.resize(columns, 0);
            row.scales.resize(layout.groups, 0.0);
            row.mins.resize(layout.groups, 0.0);
            quant::unpack_row(dtype, from, &mut row.codes, &mut row.scales, &mut row.mins);
            layout.write_lane(to, lane, row);
        }),
    }
}
