//! Repacks block formats into the records that `kernels/linear_quant.cu` streams.
//!
//! A record holds the weights of sixteen outputs and 128 inputs. A warp reads it as operand A of
//! matrix instructions, in eight steps. In step `s`, lane `4 · g + quarter` needs, of the outputs
//! `g` and `g + 8`, two pairs of inputs: `16 s + 2 · quarter +` 0 and 1, and 8 and 9. The codes of
//! a pair lie sixteen bits apart in a word, so that each is in one half of it. In memory order, a
//! record consists of:
//!
//! - The low four bits of the codes, first of the outputs 0 to 7 and then of 8 to 15: four words
//!   per lane. Step `s` is in word `s / 2`; pair `p` begins at bit `8 (s mod 2) + 4 p`. Codes of 8
//!   bits take eight words instead, four for the first four steps of all outputs and then four
//!   for the others. Pair `p` of a step begins at bit `8 p` of its word.
//! - The high bits of the codes, in the same order of outputs. Codes of 5 bits: one word per lane,
//!   with pair `p` of step `s` at bit `2 s + p`. Codes of 6 bits: two words per lane, four steps
//!   each, with pair `p` of step `s` at bit `4 (s mod 4) + 2 p`.
//! - The scales: for each output, the scales of its groups in this record; see [`Scales`].
//! - The shared scales: for each output, the values that the scales of its groups are multiples
//!   of.
//!
//! The records of the same sixteen outputs follow each other in the order of their inputs.
//! Outputs are padded with zeros to a multiple of sixteen, and inputs to a multiple of 128.

use super::error::{failed, unsupported};
use crate::device::{DeviceError, WeightRows};
use crate::weights::{DType, quant};
use half::f16;

/// Outputs per record.
pub(super) const RECORD_OUTPUTS: usize = 16;
/// Inputs per record.
pub(super) const RECORD_INPUTS: usize = 128;

/// How a group's scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// A float16 scale.
    Plain,
    /// A float16 scale and minimum.
    PlainMinimum,
    /// A byte: 128 plus the multiple of a float16 scale that 256 weights share.
    Nested,
    /// Two bytes: 128 plus the multiples of a float16 scale and a float16 minimum that 256
    /// weights share. The minimum is subtracted.
    NestedMinimum,
}

/// A record layout, named and defined as in `kernels/linear_quant.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Suffix of the embedding kernel `embed_NAME`.
    pub(super) name: &'static str,
    /// Suffixes of the `linear_…` kernels for up to 8 rows, for up to 16 and for more.
    pub(super) kernels: [&'static str; 3],
    /// Bits per code.
    bits: usize,
    /// Weights per group.
    group: usize,
    scales: Scales,
    /// Number that the kernels subtract from a code.
    zero: i32,
}

impl Format {
    const fn new(
        name: &'static str,
        kernels: [&'static str; 3],
        bits: usize,
        group: usize,
        scales: Scales,
        zero: i32,
    ) -> Self {
        Self {
            name,
            kernels,
            bits,
            group,
            scales,
            zero,
        }
    }

    /// Returns the layout that `dtype` is repacked into, or `None` for floating-point types.
    pub(super) fn of(dtype: DType) -> Option<Self> {
        use Scales::*;
        Some(match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            // No kernel has a code book with shared scales: these are expanded to 16 bits.
            DType::Iq4Xs => return None,
            DType::Q4_0 | DType::Tq1_0 | DType::Tq2_0 => {
                Self::new("q4", ["q4_m8", "q4_m16", "q4_m64"], 4, 32, Plain, 8)
            }
            DType::Q4_1 => Self::new(
                "q4m",
                ["q4m_m8", "q4m_m16", "q4m_m64"],
                4,
                32,
                PlainMinimum,
                0,
            ),
            DType::Q4K => Self::new(
                "q4k",
                ["q4k_m8", "q4k_m16", "q4k_m64"],
                4,
                32,
                NestedMinimum,
                0,
            ),
            DType::Q2K => Self::new(
                "q2k",
                ["q2k_m8", "q2k_m16", "q2k_m64"],
                4,
                16,
                NestedMinimum,
                0,
            ),
            DType::Q5_0 | DType::Mxfp4 => {
                Self::new("q5", ["q5_m8", "q5_m16", "q5_m64"], 5, 32, Plain, 16)
            }
            DType::Q5_1 => Self::new(
                "q5m",
                ["q5m_m8", "q5m_m16", "q5m_m64"],
                5,
                32,
                PlainMinimum,
                0,
            ),
            DType::Q5K => Self::new(
                "q5k",
                ["q5k_m8", "q5k_m16", "q5k_m64"],
                5,
                32,
                NestedMinimum,
                0,
            ),
            DType::Q6K | DType::Q3K => {
                Self::new("q6k", ["q6k_m8", "q6k_m16", "q6k_m64"], 6, 16, Nested, 32)
            }
            DType::Q8_0 | DType::Iq4Nl => {
                Self::new("q8", ["q8_m8", "q8_m16", "q8_m64"], 8, 32, Plain, 128)
            }
        })
    }

    /// Returns how many outputs the tile of 64 rows has.
    pub(super) fn many_outputs(&self) -> usize {
        match (self.group, self.scales) {
            (16, Scales::NestedMinimum) => 64,
            _ => 128,
        }
    }

    fn high_offset(&self) -> usize {
        if self.bits == 8 { 2048 } else { 1024 }
    }

    fn scales_offset(&self) -> usize {
        let high_bits = if self.bits == 8 { 0 } else { self.bits - 4 };
        self.high_offset() + high_bits * 256
    }

    fn group_bytes(&self) -> usize {
        match self.scales {
            Scales::Plain | Scales::NestedMinimum => 2,
            Scales::PlainMinimum => 4,
            Scales::Nested => 1,
        }
    }

    /// Returns the bytes per output that the scales of its groups take in a record.
    fn scale_bytes(&self) -> usize {
        RECORD_INPUTS / self.group * self.group_bytes()
    }

    fn shared_offset(&self) -> usize {
        self.scales_offset() + RECORD_OUTPUTS * self.scale_bytes()
    }

    fn shared_bytes(&self) -> usize {
        match self.scales {
            Scales::Plain | Scales::PlainMinimum => 0,
            Scales::Nested => 2,
            Scales::NestedMinimum => 4,
        }
    }

    /// Returns the bytes per record.
    pub(super) fn record_bytes(&self) -> usize {
        self.shared_offset() + RECORD_OUTPUTS * self.shared_bytes()
    }

    /// Returns the bytes of all records of sixteen outputs with `inputs` inputs.
    pub(super) fn records_bytes(&self, inputs: usize) -> usize {
        inputs.div_ceil(RECORD_INPUTS) * self.record_bytes()
    }

    /// Returns the bytes of the records of `weights` weights that fill their records.
    pub(super) fn bytes_for(&self, weights: usize) -> usize {
        weights
            .div_ceil(RECORD_OUTPUTS * RECORD_INPUTS)
            .saturating_mul(self.record_bytes())
    }

    /// Returns the bytes of shared memory for the stages of a kernel: each one holds x of `rows`
    /// rows of a record's inputs, and `records` records. There are as many stages as fit into
    /// what every GPU has, four at most, as `stages_of` in `kernels/linear_quant.cu` says.
    pub(super) fn stages_bytes(&self, rows: usize, records: usize) -> usize {
        const MOST: usize = 99 << 10;
        let stage = rows * RECORD_INPUTS * 2 + records * self.record_bytes();
        let stage = stage.next_multiple_of(256);
        stage * (MOST / stage).min(4)
    }

    /// Writes the codes that lane `4 · g + quarter` needs of an output in a step: two pairs.
    fn put_codes(
        &self,
        record: &mut [u8],
        (output, quarter): (usize, usize),
        step: usize,
        codes: [u8; 4],
    ) {
        let (row, lane) = (output / 8, output % 8 * 4 + quarter);
        let place = row * 32 + lane;
        let mut put = |at: usize, bit: usize, codes: [u8; 4]| {
            let word = &mut record[at..][..4];
            let mut bits = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            for (index, code) in codes.into_iter().enumerate() {
                let (pair, half) = (index / 2, index % 2);
                let apart = match self.bits {
                    _ if at < self.high_offset() && self.bits == 8 => 8,
                    _ if at < self.high_offset() => 4,
                    bits => bits - 4,
                };
                bits |= u32::from(code) << (bit + pair * apart + half * 16);
            }
            word.copy_from_slice(&bits.to_le_bytes());
        };
        if self.bits == 8 {
            put((step / 4 * 64 + place) * 16 + step % 4 * 4, 0, codes);
            return;
        }
        put(
            place * 16 + step / 2 * 4,
            step % 2 * 8,
            codes.map(|c| c & 15),
        );
        let high = codes.map(|code| code >> 4);
        match self.bits {
            5 => put(self.high_offset() + place * 4, step * 2, high),
            6 => {
                let at = self.high_offset() + place * 8 + step / 4 * 4;
                put(at, step % 4 * 4, high);
            }
            _ => {}
        }
    }
}

/// Repacks rows of weights into records. Its buffers are reused from row to row.
pub(super) struct Packer {
    format: Format,
    dtype: DType,
    inputs: usize,
    /// Largest magnitude that a weight may have.
    largest: f32,
    codes: Vec<u8>,
    scales: Vec<f32>,
    minimums: Vec<f32>,
}

impl Packer {
    /// Creates a packer for rows of `inputs` weights of the block format `dtype`. `largest` is
    /// the largest magnitude that the activation type can hold.
    pub(super) fn new(dtype: DType, inputs: usize, largest: f32) -> Result<Self, DeviceError> {
        let (Some(format), Some(view)) = (Format::of(dtype), quant::affine(dtype)) else {
            let reason = format!("{dtype} is not a block format");
            return Err(failed("load_linear", reason));
        };
        let groups = inputs / view.group;
        Ok(Self {
            format,
            dtype,
            inputs,
            largest,
            codes: vec![0; inputs],
            scales: vec![0.0; groups],
            minimums: if view.has_min {
                vec![0.0; groups]
            } else {
                Vec::new()
            },
        })
    }

    /// Writes a stored row as output `output`, 0 to 15, of `records`. These are the records of
    /// sixteen outputs and must be zeroed before the first row.
    pub(super) fn put(
        &mut self,
        records: &mut [u8],
        output: usize,
        stored: &[u8],
    ) -> Result<(), DeviceError> {
        quant::unpack_row(
            self.dtype,
            stored,
            &mut self.codes,
            &mut self.scales,
            &mut self.minimums,
        );
        self.check()?;
        // Q3_K is stored in the layout of Q6_K, so its codes move to that layout's zero.
        let shift = match quant::affine(self.dtype) {
            Some(view) if self.format.scales == Scales::Nested => self.format.zero - view.zero,
            _ => 0,
        };
        let format = self.format;
        for (index, record) in records.chunks_exact_mut(format.record_bytes()).enumerate() {
            let first = index * RECORD_INPUTS;
            let codes = &self.codes[first..self.inputs.min(first + RECORD_INPUTS)];
            // Groups have 16 or 32 weights, so a row is a whole number of steps.
            for (at, step) in codes.chunks_exact(16).enumerate() {
                for quarter in 0..4 {
                    let code = |within: usize| step[2 * quarter + within] + shift as u8;
                    let four = [code(0), code(1), code(8), code(9)];
                    format.put_codes(record, (output, quarter), at, four);
                }
            }
            self.put_scales(record, output, index, stored)?;
        }
        Ok(())
    }

    /// Fails if the activation type cannot hold the largest possible weight of the row.
    fn check(&self) -> Result<(), DeviceError> {
        let zero = quant::affine(self.dtype).map_or(0, |view| view.zero);
        let widest = f32::from(1u16 << self.format.bits.min(8)) - zero as f32;
        let widest = widest.max(zero as f32);
        let scale = self.scales.iter().fold(0f32, |most, &scale| {
            if scale.is_nan() {
                f32::INFINITY
            } else {
                most.max(scale.abs())
            }
        });
        let minimum = self.minimums.iter().fold(0f32, |most, &minimum| {
            if minimum.is_nan() {
                f32::INFINITY
            } else {
                most.max(minimum.abs())
            }
        });
        if scale * widest + minimum <= self.largest {
            return Ok(());
        }
        Err(unsupported(
            format!(
                "{} weights with a scale of {scale} and a minimum of {minimum}",
                self.dtype
            ),
            format!("the magnitude of a weight must not exceed {}", self.largest),
        ))
    }

    /// Writes the scales of an output to `record`, the record number `index` of the row.
    fn put_scales(
        &self,
        record: &mut [u8],
        output: usize,
        index: usize,
        stored: &[u8],
    ) -> Result<(), DeviceError> {
        let format = self.format;
        let groups = RECORD_INPUTS / format.group;
        let first = index * groups;
        let count = groups.min(self.scales.len() - first);
        let scales = &self.scales[first..][..count];
        let shared = self.shared(stored, index);
        let (groups, rest) = record.split_at_mut(format.shared_offset());
        let out = &mut groups[format.scales_offset() + output * format.scale_bytes()..];
        let out = out.chunks_exact_mut(format.group_bytes()).zip(scales);
        for (at, (out, &scale)) in out.enumerate() {
            match format.scales {
                Scales::Plain => out.copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
                Scales::PlainMinimum => {
                    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    let minimum = f16::from_f32(self.minimums[first + at]);
                    out[2..].copy_from_slice(&minimum.to_le_bytes());
                }
                Scales::Nested => out[0] = multiple(scale, shared[0])?,
                Scales::NestedMinimum => {
                    out[0] = multiple(scale, shared[0])?;
                    // The record's minimum is subtracted; the unpacked one is added.
                    out[1] = multiple(-self.minimums[first + at], shared[1])?;
                }
            }
        }
        let shared = shared.map(|scale| scale.to_le_bytes());
        let shared = &shared.as_flattened()[..format.shared_bytes()];
        rest[output * format.shared_bytes()..][..shared.len()].copy_from_slice(shared);
        Ok(())
    }

    /// Reads from the stored block the scale and the minimum that the groups of record `index`
    /// share.
    fn shared(&self, stored: &[u8], index: usize) -> [f16; 2] {
        let block = index * RECORD_INPUTS / self.dtype.block_elements() * self.dtype.block_bytes();
        let at = |offset: usize| {
            f16::from_le_bytes([stored[block + offset], stored[block + offset + 1]])
        };
        match self.dtype {
            DType::Q2K => [at(80), at(82)],
            DType::Q3K => [at(108), f16::ZERO],
            DType::Q4K | DType::Q5K => [at(0), at(2)],
            DType::Q6K => [at(208), f16::ZERO],
            _ => [f16::ZERO; 2],
        }
    }
}

/// Returns `scale / unit + 128`. Fails unless that is an integer from 0 to 255.
fn multiple(scale: f32, unit: f16) -> Result<u8, DeviceError> {
    let quotient = match unit.to_f32() {
        0.0 => 0.0,
        unit => scale / unit,
    };
    // Unpacking computed `scale` as an exact product, so the quotient is exact.
    let multiple = quotient + 128.0;
    if (0.0..=255.0).contains(&multiple) && multiple.fract() == 0.0 {
        return Ok(multiple as u8);
    }
    Err(failed(
        "load_linear",
        format!("a scale of {scale} is not a multiple of {unit}"),
    ))
}

/// Returns the stored bytes of row `row`, where `row` counts in the order of use.
pub(super) fn stored_row<'a>(part: &WeightRows<'a>, row: usize) -> &'a [u8] {
    let bytes = part.data.len() / part.rows.max(1);
    &part.data[part.order.stored_row(row) * bytes..][..bytes]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the float32 weight that the kernels compute from a record.
    fn weight(format: Format, record: &[u8], output: usize, input: usize) -> f32 {
        let (step, within) = (input / 16, input % 16);
        let (quarter, pair, half) = (within % 8 / 2, within / 8, within % 2);
        let place = output / 8 * 32 + output % 8 * 4 + quarter;
        let word = |at: usize| {
            let bytes = &record[at..][..4];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) >> (half * 16)
        };
        let code = if format.bits == 8 {
            word((step / 4 * 64 + place) * 16 + step % 4 * 4) >> (pair * 8) & 255
        } else {
            let low = word(place * 16 + step / 2 * 4) >> (step % 2 * 8 + pair * 4) & 15;
            let high = format.high_offset();
            low | match format.bits {
                5 => (word(high + place * 4) >> (step * 2 + pair) & 1) << 4,
                6 => {
                    let word = word(high + place * 8 + step / 4 * 4);
                    (word >> (step % 4 * 4 + pair * 2) & 3) << 4
                }
                _ => 0,
            }
        };
        let float = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let group = input / format.group * format.group_bytes();
        let scales = &record[format.scales_offset() + output * format.scale_bytes() + group..];
        let shared = &record[format.shared_offset() + output * format.shared_bytes()..];
        let times = |byte: u8| f32::from(byte) - 128.0;
        let (scale, minimum) = match format.scales {
            Scales::Plain => (float(scales), 0.0),
            Scales::PlainMinimum => (float(scales), float(&scales[2..])),
            Scales::Nested => (float(shared) * times(scales[0]), 0.0),
            Scales::NestedMinimum => (
                float(shared) * times(scales[0]),
                -(float(&shared[2..]) * times(scales[1])),
            ),
        };
        scale * (code as i32 - format.zero) as f32 + minimum
    }

    #[test]
    fn records_hold_the_weights_of_every_block_format() {
        let mut state = 1u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for dtype in DType::ALL {
            let Some(format) = Format::of(dtype) else {
                continue;
            };
            let inputs = if dtype.block_elements() == 256 {
                512
            } else {
                224
            };
            let bytes = dtype.bytes_for(inputs).unwrap();
            let mut records = vec![0; format.records_bytes(inputs)];
            let mut packer = Packer::new(dtype, inputs, f32::MAX).unwrap();
            let mut rows = vec![vec![0f32; inputs]; 15];
            for (output, row) in rows.iter_mut().enumerate() {
                let mut stored: Vec<u8> = (0..bytes).map(|_| random()).collect();
                // No byte has all exponent bits set, so every float16 in the block is finite.
                stored.iter_mut().for_each(|byte| *byte &= 0xbf);
                if dtype == DType::Mxfp4 {
                    // Exponents of float16 numbers.
                    let blocks = stored.chunks_exact_mut(dtype.block_bytes());
                    blocks.for_each(|block| block[0] = 104 + block[0] % 40);
                }
                quant::dequantize(dtype, &stored, row);
                packer.put(&mut records, output, &stored).unwrap();
            }
            for (index, record) in records.chunks_exact(format.record_bytes()).enumerate() {
                for (output, input) in (0..16).flat_map(|o| (0..128).map(move |i| (o, i))) {
                    let column = index * 128 + input;
                    let row = rows.get(output);
                    let expected = row.and_then(|row| row.get(column)).copied();
                    let found = weight(format, record, output, input);
                    if let Some(expected) = expected {
                        assert_eq!(found, expected, "{dtype}: output {output}, input {column}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_nan_scale_is_refused() {
        let mut stored = vec![0; 18];
        stored[..2].copy_from_slice(&f16::NAN.to_le_bytes());
        let mut packer = Packer::new(DType::Q4_0, 32, 65504.0).unwrap();
        let mut records = vec![0; packer.format.records_bytes(32)];
        let error = packer.put(&mut records, 0, &stored).unwrap_err();
        assert!(error.to_string().contains("Q4_0 weights"), "{error}");
    }
}
