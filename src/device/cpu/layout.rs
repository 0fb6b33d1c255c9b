//! Layout of the codes and scales in a quantised tile.
//!
//! A tile is a sequence of blocks. A block consists of a header of scales, sixteen of each kind
//! (one per row), followed by the codes of its groups.
//!
//! - Formats with float16 scales: a block is one group. The header has the scales and, if the
//!   format has them, the minimums.
//! - K-quants, whose scales are small integers times a float16: a block has 256 inputs. The
//!   header has the float16 factors of the scales and minimums, then the integers of each group
//!   as signed bytes. The expanded float32 values are bit for bit those that the format
//!   defines.
//!
//! Each 64 bytes of codes hold four consecutive inputs of each of the sixteen rows as bytes, or
//! eight as nibbles. The low nibbles are the first four inputs, the high nibbles the next four.

use super::simd::{LANES, Simd};
use crate::device::DeviceError;
use crate::weights::DType;
use crate::weights::quant::{self, Affine};
use half::f16;

/// Number of inputs per block with nested scales.
const NESTED: usize = 256;

/// Layout of a quantised tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuantLayout {
    /// Constants of the format.
    pub(crate) affine: Affine,
    /// Number of groups per row.
    pub(crate) groups: usize,
    /// Number of groups per block.
    pub(crate) block_groups: usize,
    dtype: DType,
}

/// Consecutive weights of one row, unpacked.
#[derive(Default)]
pub(crate) struct Row {
    codes: Vec<u8>,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

/// Loads the scales and minimums of group `group` of a block. The layout is given as constants.
/// Returns the scales twice if the layout has no minimums.
///
/// # Safety
/// `header` must point to a header of a layout that has minimums if `MIN` and nested scales if
/// `NEST`, and not otherwise. `group` must be below its `block_groups`.
#[inline(always)]
pub(crate) unsafe fn load_scales<S: Simd, const MIN: bool, const NEST: bool>(
    s: S,
    header: *const u8,
    group: usize,
) -> (S::F, S::F) {
    let kinds = if MIN { 2 } else { 1 };
    // SAFETY: all offsets are inside the header, and the loads need no alignment.
    unsafe {
        let integers = header
            .wrapping_add(LANES * kinds * (2 + group))
            .cast::<i8>();
        let mut scale = s.load_f16(header.cast());
        if NEST {
            scale = s.mul(scale, s.load_i8(integers));
        }
        if !MIN {
            return (scale, scale);
        }
        let mut min = s.load_f16(header.add(LANES * 2).cast());
        if NEST {
            min = s.mul(min, s.load_i8(integers.add(LANES)));
        }
        (scale, min)
    }
}

/// Returns the offsets of the float16 factors of scales and minimums in a K-quant block, or
/// `None` for other formats.
fn factor_offsets(dtype: DType) -> Option<(usize, usize)> {
    match dtype {
        DType::Q2K => Some((80, 82)),
        DType::Q3K => Some((108, 108)),
        DType::Q4K | DType::Q5K => Some((0, 2)),
        DType::Q6K => Some((208, 208)),
        DType::Iq4Xs => Some((0, 0)),
        _ => None,
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Returns the integer `n` for which `value = n · factor`.
fn quotient(value: f32, factor: f16) -> u8 {
    // Exact, because a float16 times an 8-bit integer is always a float32. 0 / 0 is NaN, which
    // the cast turns into 0.
    (value / factor.to_f32()).round() as i8 as u8
}

impl QuantLayout {
    /// Returns the layout for rows of `columns` inputs of `dtype`, or `None` for floating-point
    /// formats.
    pub(crate) fn of(dtype: DType, columns: usize) -> Result<Option<Self>, DeviceError> {
        let Some(affine) = quant::affine(dtype) else {
            return Ok(None);
        };
        let nested = factor_offsets(dtype).is_some();
        let block_groups = match (affine.native_f16_scales, affine.group) {
            (true, 32) => 1,
            (false, 16 | 32) if nested => NESTED / affine.group,
            _ => {
                return Err(DeviceError::Unsupported {
                    device: "cpu",
                    what: format!("the scales of {dtype}"),
                    expected: "only float16 scales and K-quant scales are supported".to_owned(),
                });
            }
        };
        let groups = columns / affine.group;
        Ok(Some(Self {
            affine,
            groups,
            block_groups,
            dtype,
        }))
    }

    /// Returns whether the scales are integers times a float16.
    pub(crate) fn nested(&self) -> bool {
        !self.affine.native_f16_scales
    }

    /// Returns 2 if there are scales and minimums, 1 if there are only scales.
    fn kinds(&self) -> usize {
        if self.affine.has_min { 2 } else { 1 }
    }

    /// Returns the number of bytes of a block's header.
    pub(crate) fn header_bytes(&self) -> usize {
        let halves = LANES * 2 * self.kinds();
        match self.nested() {
            // The codes begin at a cache line.
            true => (halves + LANES * self.kinds() * self.block_groups).next_multiple_of(64),
            false => halves,
        }
    }

    /// Returns the number of bytes of a group's codes.
    pub(crate) fn code_bytes(&self) -> usize {
        LANES * self.affine.group * usize::from(self.affine.bits) / 8
    }

    /// Returns the number of bytes per block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.header_bytes() + self.block_groups * self.code_bytes()
    }

    /// Returns the number of bytes per tile.
    pub(crate) fn tile_bytes(&self) -> usize {
        self.groups / self.block_groups * self.block_bytes()
    }

    /// Returns the offset in a header of a group's integers: those of its scales if `kind` is
    /// 0, those of its minimums if `kind` is 1.
    fn integers(&self, group: usize, kind: usize) -> usize {
        LANES * (self.kinds() * (2 + group) + kind)
    }

    /// Returns the scale and the minimum of one lane.
    fn read_scale(&self, header: &[u8], group: usize, lane: usize) -> (f32, f32) {
        let read = |kind: usize| {
            let factor = half_at(header, kind * LANES * 2 + lane * 2).to_f32();
            match self.nested() {
                true => factor * f32::from(header[self.integers(group, kind) + lane] as i8),
                false => factor,
            }
        };
        (read(0), if self.affine.has_min { read(1) } else { 0.0 })
    }

    /// Writes a row, as stored in a file, to its lane of `tile`.
    pub(crate) fn write_lane(&self, tile: &mut [u8], lane: usize, stored: &[u8], row: &mut Row) {
        row.codes.resize(self.groups * self.affine.group, 0);
        row.scales.resize(self.groups, 0.0);
        row.mins.resize(self.groups, 0.0);
        let Row {
            codes,
            scales,
            mins,
        } = row;
        quant::unpack_row(self.dtype, stored, codes, scales, mins);
        let code_bytes = self.code_bytes();
        for (index, block) in tile.chunks_exact_mut(self.block_bytes()).enumerate() {
            let first = index * self.block_groups;
            let (header, to) = block.split_at_mut(self.header_bytes());
            let scales = [&scales[first..], &mins[first..]];
            let block = match self.nested() {
                true => &stored[index * self.dtype.block_bytes()..],
                false => &[],
            };
            self.write_header(header, lane, &scales[..self.kinds()], block);
            let codes = codes[first * self.affine.group..].chunks_exact(self.affine.group);
            for (to, codes) in to.chunks_exact_mut(code_bytes).zip(codes) {
                self.write_codes(to, lane, codes);
            }
        }
    }

    /// Writes one lane of a block's header. `scales` has the scales and, if the format has
    /// them, the minimums. Both lists begin with the block's groups and may continue beyond
    /// them.
    fn write_header(&self, header: &mut [u8], lane: usize, scales: &[&[f32]], stored: &[u8]) {
        let offsets = factor_offsets(self.dtype).unwrap_or_default();
        for (kind, values) in scales.iter().enumerate() {
            let factor = match self.nested() {
                true => half_at(stored, if kind == 0 { offsets.0 } else { offsets.1 }),
                false => f16::from_f32(values[0]),
            };
            let at = kind * LANES * 2 + lane * 2;
            header[at..at + 2].copy_from_slice(&factor.to_le_bytes());
            if self.nested() {
                for (group, &value) in values[..self.block_groups].iter().enumerate() {
                    header[self.integers(group, kind) + lane] = quotient(value, factor);
                }
            }
        }
    }

    fn write_codes(&self, to: &mut [u8], lane: usize, codes: &[u8]) {
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

    /// Writes the weights of one lane to `out` in float32.
    pub(crate) fn read_lane(&self, tile: &[u8], lane: usize, out: &mut [f32]) {
        let outs = out.chunks_exact_mut(self.affine.group * self.block_groups);
        for (block, out) in tile.chunks_exact(self.block_bytes()).zip(outs) {
            let (header, codes) = block.split_at(self.header_bytes());
            let groups = codes.chunks_exact(self.code_bytes());
            let outs = out.chunks_exact_mut(self.affine.group);
            for (group, (codes, out)) in groups.zip(outs).enumerate() {
                let (scale, min) = self.read_scale(header, group, lane);
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
}
