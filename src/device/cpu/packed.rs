//! Weights in the layout that the kernels stream.
//!
//! Sixteen output rows are interleaved into a *tile*, so that one vector load brings the
//! weights of sixteen outputs. A tile is read from front to back:
//!
//! - Quantised: scales and codes in the layout that `layout` describes.
//! - Floating-point: sixteen weights per input, in the format that they are stored in.
//!
//! The last tile is padded with zeros. There is no other copy of the weights: embeddings are
//! read from the same tiles by [`Packed::read_row`].

use super::layout::{QuantLayout, Row};
use super::memory::{Arena, Buffer, Disjoint};
use super::simd::LANES;
use super::workers::Workers;
use crate::device::{DeviceError, WeightRows};
use crate::weights::DType;
use half::{bf16, f16};
use std::cell::RefCell;

/// Storage format of a floating-point weight.
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

/// Contents of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Float(FloatType),
    Quantised(QuantLayout),
}

impl Format {
    pub(crate) fn of(dtype: DType, columns: usize) -> Result<Self, DeviceError> {
        if let Some(layout) = QuantLayout::of(dtype, columns)? {
            return Ok(Self::Quantised(layout));
        }
        match dtype {
            DType::F16 => Ok(Self::Float(FloatType::F16)),
            DType::BF16 => Ok(Self::Float(FloatType::Bf16)),
            DType::F32 => Ok(Self::Float(FloatType::F32)),
            other => Err(DeviceError::Unsupported {
                device: "cpu",
                what: format!("weights stored as {other}"),
                expected: "expected F32, F16, BF16 or a block format".to_owned(),
            }),
        }
    }

    fn tile_bytes(&self, columns: usize) -> usize {
        match self {
            Self::Float(float) => LANES * columns * float.bytes(),
            Self::Quantised(layout) => layout.tile_bytes(),
        }
    }
}

/// Consecutive output rows of the same format.
pub(crate) struct Packed {
    pub(crate) format: Format,
    /// Number of output rows.
    pub(crate) rows: usize,
    /// Number of inputs.
    pub(crate) columns: usize,
    /// Index of row 0 among the outputs of the linear layer.
    pub(crate) first_output: usize,
    tile_bytes: usize,
    data: Buffer<u8>,
}

thread_local! {
    static ROW: RefCell<Row> = RefCell::default();
}

impl Packed {
    /// Packs `parts`, which must have the same dtype and number of columns. The caller has
    /// checked them.
    pub(crate) fn new(
        workers: &mut Workers,
        arena: &mut Arena,
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
        let mut data = arena.zeroed(bytes, "weights")?;
        let row_bytes = dtype.bytes_for(columns).ok_or_else(too_large)?;
        let out = Disjoint::new(&mut data);
        workers.run("load_linear", tiles, 4, |range| {
            for tile in range {
                // SAFETY: each tile belongs to one item.
                let to = unsafe { out.range(tile * tile_bytes, tile_bytes) };
                for lane in 0..LANES.min(rows - tile * LANES) {
                    let (part, row) = find(parts, tile * LANES + lane);
                    let stored = part.order.stored_row(row);
                    let from = &part.data[stored * row_bytes..][..row_bytes];
                    pack_lane(format, from, to, lane);
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

    /// Returns the number of tiles.
    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Returns the number of bytes that the weights take.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Returns the bytes of a tile.
    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        &self.data[tile * self.tile_bytes..][..self.tile_bytes]
    }

    /// Writes row `row` to `out` in float32.
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

/// Returns the part that holds row `row` of the stacked parts, and the row's index in it.
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

/// Writes a stored row to its lane of a tile.
fn pack_lane(format: Format, stored: &[u8], tile: &mut [u8], lane: usize) {
    match format {
        Format::Float(float) => {
            let bytes = float.bytes();
            let lanes = tile.chunks_exact_mut(LANES * bytes);
            for (from, to) in stored.chunks_exact(bytes).zip(lanes) {
                to[lane * bytes..][..bytes].copy_from_slice(from);
            }
        }
        Format::Quantised(layout) => {
            ROW.with_borrow_mut(|row| layout.write_lane(tile, lane, stored, row));
        }
    }
}
