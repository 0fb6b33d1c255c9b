//! Matrices of floating-point numbers of 4 or 8 bits with scales per tensor, row, block or group.

use super::super::directory::Directory;
use super::super::raw::RawType;
use super::super::{DType, WeightsError};
use super::integers::{dtype_for, is_half};
use super::{Rows, numbers, raw_rows, require_raw, wrong};
use std::ops::Range;

/// Format of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    /// FP8 with 4 bits of exponent and 3 of mantissa (OCP 8-bit floating point, 2023).
    E4m3,
    /// FP4 with 2 bits of exponent and 1 of mantissa, two per byte, the first one in the low half
    /// (OCP microscaling formats, 2023).
    E2m1,
}

/// Format of the scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// Plain floating-point numbers.
    Float,
    /// Powers of two: the biased exponent as a byte (E8M0).
    Exponent,
    /// FP8 numbers.
    E4m3,
}

/// A factor for all weights.
#[derive(Clone, Debug)]
pub(super) enum Factor {
    One,
    /// Scales are multiplied by the number in this tensor.
    Times(String),
    /// Scales are divided by the number in this tensor.
    Over(String),
}

/// A matrix of scaled numbers, or a stack of them.
#[derive(Debug)]
pub(super) struct Floats {
    pub(super) shape: Vec<usize>,
    pub(super) number: Number,
    /// Name of the tensor with the numbers, which has the bytes of a row next to each other.
    pub(super) numbers: String,
    /// Shape of that tensor.
    pub(super) stored: Vec<usize>,
    pub(super) scale: Scale,
    pub(super) scales: String,
    /// Rows and inputs that share a scale. The scales are `[rows / block.0, inputs / block.1]`.
    pub(super) block: (usize, usize),
    pub(super) factor: Factor,
}

/// Returns the value of an FP8 number. Only NaN is not finite.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

/// Twice the value of each FP4 number without its sign.
const E2M1: [i16; 8] = [0, 1, 2, 3, 4, 6, 8, 12];

/// Returns twice the value of an FP4 number.
fn doubled_e2m1(code: u8) -> i16 {
    let magnitude = E2M1[usize::from(code & 7)];
    if code >> 3 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

impl Floats {
    fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    fn inputs(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    fn row_bytes(&self) -> usize {
        match self.number {
            Number::E4m3 => self.inputs(),
            Number::E2m1 => self.inputs() / 2,
        }
    }

    /// Returns the names of the tensors that the matrix is stored in.
    pub(super) fn parts(&self) -> Vec<String> {
        let mut parts = vec![self.numbers.clone(), self.scales.clone()];
        match &self.factor {
            Factor::One => {}
            Factor::Times(name) | Factor::Over(name) => parts.push(name.clone()),
        }
        parts
    }

    /// Checks the parts, and returns the format in which the rows are read.
    pub(super) fn dtype(&self, directory: &Directory) -> Result<DType, WeightsError> {
        let kind = match self.number {
            Number::E4m3 => RawType::F8E4M3,
            Number::E2m1 => RawType::U8,
        };
        require_raw(directory, &self.numbers, kind, &self.stored)?;
        let scales = self.scales(directory, 0..self.rows())?;
        let (group, inputs) = (self.block.1, self.inputs());
        if self.are_integers() {
            if !group.is_multiple_of(32) || !inputs.is_multiple_of(group) {
                return Ok(DType::F32);
            }
            let mut halves: Vec<f32> = scales.iter().map(|scale| scale / 2.0).collect();
            if !halves.iter().all(is_half) {
                let rows = 0..self.rows();
                let data = raw_rows(directory, &self.numbers, self.row_bytes(), rows)?;
                self.clear_unused(&data, &mut halves);
            }
            return Ok(dtype_for((-12, 12), group, inputs, &halves));
        }
        // A number of at most 4 bits times a power of two is a bfloat16 number.
        let is_power = |scale: &f32| {
            let exponent = scale.to_bits() >> 23 & 255;
            scale.to_bits() << 9 == 0 && (20..240).contains(&exponent)
        };
        Ok(match scales.iter().all(is_power) {
            true => DType::BF16,
            false => DType::F32,
        })
    }

    /// Sets the scales to 0 that are no float16 numbers and belong to zeros only. Quantisers store
    /// the smallest scale for these. A row must be a whole number of groups.
    fn clear_unused(&self, data: &[u8], scales: &mut [f32]) {
        let groups = data.chunks(self.block.1 / 2);
        for (scale, numbers) in scales.iter_mut().zip(groups) {
            // Bits 3 and 7 are the signs.
            if !is_half(scale) && numbers.iter().all(|byte| byte & 0x77 == 0) {
                *scale = 0.0;
            }
        }
    }

    /// Returns whether the rows are integers with scales that are float16 numbers.
    fn are_integers(&self) -> bool {
        self.number == Number::E2m1 && self.block.0 == 1
    }

    /// Reads the scales of these rows, one row of scales for each row of blocks that they touch.
    fn scales(&self, directory: &Directory, rows: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        let (block_rows, block_inputs) = self.block;
        let per_row = self.inputs().div_ceil(block_inputs);
        let stored_rows = self.rows().div_ceil(block_rows);
        let own = rows.start / block_rows..rows.end.div_ceil(block_rows);
        let mut shape = self.shape.clone();
        // A stack has a scale for each of its rows.
        if let [.., outputs, inputs] = shape.as_mut_slice() {
            *outputs = outputs.div_ceil(block_rows);
            *inputs = per_row;
        }
        let mut scales = match self.scale {
            Scale::Float => {
                let row = [stored_rows];
                let shapes: &[&[usize]] = match (per_row, stored_rows) {
                    (1, 1) => &[&[1, 1], &[1], &[]],
                    (1, _) => &[&shape, &row],
                    _ => &[&shape],
                };
                let all = numbers(directory, &self.scales, shapes)?;
                all[own.start * per_row..own.end * per_row].to_vec()
            }
            Scale::Exponent | Scale::E4m3 => {
                let kind = match self.scale {
                    Scale::Exponent => RawType::U8,
                    _ => RawType::F8E4M3,
                };
                require_raw(directory, &self.scales, kind, &shape)?;
                let bytes = raw_rows(directory, &self.scales, per_row, own)?;
                let value = |byte: u8| match self.scale {
                    Scale::Exponent if byte == 255 => f32::NAN,
                    // The bits of a float32 number with this exponent, the smallest of which is
                    // subnormal.
                    Scale::Exponent if byte == 0 => f32::from_bits(1 << 22),
                    Scale::Exponent => f32::from_bits(u32::from(byte) << 23),
                    _ => e4m3(byte),
                };
                bytes.into_iter().map(value).collect()
            }
        };
        let factor = |name: &str| Ok::<_, WeightsError>(numbers(directory, name, &[&[1], &[]])?[0]);
        match &self.factor {
            Factor::One => {}
            Factor::Times(name) => {
                let factor = factor(name)?;
                scales.iter_mut().for_each(|scale| *scale *= factor);
            }
            Factor::Over(name) => {
                let factor = factor(name)?;
                scales.iter_mut().for_each(|scale| *scale /= factor);
            }
        }
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            let found = format!("{} at {at}", scales[at]);
            return Err(wrong(directory, &self.scales, &found, "a finite number"));
        }
        Ok(scales)
    }

    /// Reads the parts that these rows are made of.
    pub(super) fn open<'a>(
        &'a self,
        directory: &Directory,
        rows: Range<usize>,
    ) -> Result<Rows<'a>, WeightsError> {
        let row_bytes = self.row_bytes();
        let scales = self.scales(directory, rows.clone())?;
        let data = raw_rows(directory, &self.numbers, row_bytes, rows.clone())?;
        let (block_rows, block_inputs) = self.block;
        let per_row = self.inputs().div_ceil(block_inputs);
        let first = rows.start;
        if self.number == Number::E4m3
            && let Some(at) = data.iter().position(|byte| byte & 127 == 127)
        {
            let found = format!("NaN at {}", first * row_bytes + at);
            return Err(wrong(directory, &self.numbers, &found, "finite"));
        }
        if self.are_integers() {
            let mut halves: Vec<f32> = scales.iter().map(|scale| scale / 2.0).collect();
            if self.inputs().is_multiple_of(block_inputs) {
                self.clear_unused(&data, &mut halves);
            }
            let fill = move |row: usize, codes: &mut [i16], own: &mut [f32]| {
                let bytes = &data[row * row_bytes..][..row_bytes];
                for (codes, byte) in codes.chunks_exact_mut(2).zip(bytes) {
                    codes.copy_from_slice(&[doubled_e2m1(byte & 15), doubled_e2m1(byte >> 4)]);
                }
                own.copy_from_slice(&halves[row * per_row..][..per_row]);
            };
            return Ok(Rows::Integers {
                fill: Box::new(fill),
                group: block_inputs,
            });
        }
        let values: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
        Ok(Rows::Floats(Box::new(move |row, weights| {
            let bytes = &data[row * row_bytes..][..row_bytes];
            let own = (first + row) / block_rows - first / block_rows;
            let scales = &scales[own * per_row..][..per_row];
            for (at, (weight, &byte)) in weights.iter_mut().zip(bytes).enumerate() {
                *weight = values[usize::from(byte)] * scales[at / block_inputs];
            }
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_8_and_4_bits_have_the_values_of_the_standard() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        let doubled: Vec<_> = (0..16).map(doubled_e2m1).collect();
        assert_eq!(
            doubled,
            [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
        );
    }
}
