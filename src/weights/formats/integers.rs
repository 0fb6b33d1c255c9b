//! Matrices of integers of a few bits with a scale and a zero point per group of inputs:
//! `weight = scale · (code − zero)`.

use super::super::directory::Directory;
use super::super::raw::RawType;
use super::super::{DType, WeightsError};
use super::{Rows, numbers, raw_rows, require_raw, wrong};
use half::f16;
use std::ops::Range;

/// How codes are packed into words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// `[inputs · bits / 32, outputs]`: a word has consecutive inputs, lowest bits first.
    Inputs,
    /// `[inputs, outputs · bits / 32]`: a word has eight outputs in AWQ's order.
    Outputs,
    /// `[outputs, inputs · bits / 32]`: a word has consecutive inputs, lowest bits first.
    Rows,
    /// `[outputs, inputs]` as signed bytes.
    Bytes,
}

/// Zero points.
#[derive(Clone, Debug)]
pub(super) enum Zeros {
    /// The same for all weights.
    All(i16),
    /// `[groups, outputs · bits / 32]`, lowest bits first. The first version of GPTQ stores words
    /// from each of whose zero points one has been subtracted, with a borrow from the next one.
    Plain { name: String, are_less_one: bool },
    /// `[groups, outputs · bits / 32]` in AWQ's order.
    Interleaved(String),
    /// `[outputs · bits / 32, groups]`, lowest bits first along the outputs.
    Columns(String),
    /// `[outputs, groups]` as signed bytes.
    Bytes(String),
}

/// A matrix of integers.
#[derive(Debug)]
pub(super) struct Integers {
    pub(super) shape: Vec<usize>,
    pub(super) bits: u32,
    /// Number of consecutive inputs that share a scale.
    pub(super) group: usize,
    pub(super) codes: String,
    pub(super) packing: Packing,
    pub(super) scales: String,
    /// Whether the scales are `[groups, outputs]` instead of `[outputs, groups]`.
    pub(super) scales_by_group: bool,
    pub(super) zeros: Zeros,
    /// Name of the tensor with the group of each input, if groups are not consecutive inputs.
    pub(super) order: Option<String>,
}

/// Place of output `j` of eight in a word of AWQ.
const INTERLEAVED: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Returns code `index` of a sequence of codes that are packed into words, lowest bits first.
fn code(words: &[u8], first_word: usize, stride: usize, index: usize, bits: u32) -> i16 {
    let per_word = (32 / bits) as usize;
    let at = 4 * (first_word + index / per_word * stride);
    let word = u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
    let shift = (index % per_word) as u32 * bits;
    ((word >> shift) & ((1 << bits) - 1)) as i16
}

impl Integers {
    fn outputs(&self) -> usize {
        self.shape[0]
    }

    fn inputs(&self) -> usize {
        self.shape[1]
    }

    fn groups(&self) -> usize {
        self.inputs().div_ceil(self.group)
    }

    /// Returns the names of the tensors that the matrix is stored in.
    pub(super) fn parts(&self) -> Vec<String> {
        let mut parts = vec![self.codes.clone(), self.scales.clone()];
        match &self.zeros {
            Zeros::All(_) => {}
            Zeros::Plain { name, .. }
            | Zeros::Interleaved(name)
            | Zeros::Columns(name)
            | Zeros::Bytes(name) => parts.push(name.clone()),
        }
        parts.extend(self.order.clone());
        parts
    }

    /// Checks the parts, and returns the format in which the rows are read.
    pub(super) fn dtype(&self, directory: &Directory) -> Result<DType, WeightsError> {
        let (outputs, inputs) = (self.outputs(), self.inputs());
        let per_word = (32 / self.bits) as usize;
        let whole = |count: usize, of: &str| {
            if count.is_multiple_of(per_word) {
                return Ok(count / per_word);
            }
            let found = format!("of a matrix with {count} {of}");
            let expected = format!("of one with a multiple of {per_word}");
            Err(wrong(directory, &self.codes, &found, &expected))
        };
        let (kind, shape) = match self.packing {
            Packing::Inputs => (RawType::I32, [whole(inputs, "inputs")?, outputs]),
            Packing::Outputs => (RawType::I32, [inputs, whole(outputs, "outputs")?]),
            Packing::Rows => (RawType::I32, [outputs, inputs.div_ceil(per_word)]),
            Packing::Bytes => (RawType::I8, [outputs, inputs]),
        };
        require_raw(directory, &self.codes, kind, &shape)?;
        let scales = self.scales(directory)?;
        let zeros = self.zeros(directory)?;
        if self.order(directory)?.is_some() {
            return Ok(DType::F32);
        }
        let (least, most) = match self.packing {
            Packing::Bytes => (-128, 127),
            _ => (0, (1 << self.bits) - 1),
        };
        let smallest_zero = zeros.iter().min().copied().unwrap_or(0);
        let largest_zero = zeros.iter().max().copied().unwrap_or(0);
        let range = (least - largest_zero, most - smallest_zero);
        Ok(dtype_for(range, self.group, inputs, &scales))
    }

    /// Reads the scales, `[outputs, groups]`.
    fn scales(&self, directory: &Directory) -> Result<Vec<f32>, WeightsError> {
        let (outputs, groups) = (self.outputs(), self.groups());
        if !self.scales_by_group {
            let row = [outputs];
            let shapes: &[&[usize]] = match groups {
                1 => &[&[outputs, 1], &row, &[1], &[]],
                _ => &[&[outputs, groups]],
            };
            let scales = numbers(directory, &self.scales, shapes)?;
            return Ok(match scales.len() {
                1 => vec![scales[0]; outputs],
                _ => scales,
            });
        }
        let stored = numbers(directory, &self.scales, &[&[groups, outputs]])?;
        Ok(transposed(&stored, groups))
    }

    /// Reads the zero points, `[outputs, groups]`.
    fn zeros(&self, directory: &Directory) -> Result<Vec<i16>, WeightsError> {
        let (outputs, groups) = (self.outputs(), self.groups());
        let packed = outputs.div_ceil((32 / self.bits) as usize);
        let (name, kind, shape) = match &self.zeros {
            Zeros::All(zero) => return Ok(vec![*zero; outputs * groups]),
            Zeros::Plain { name, .. } | Zeros::Interleaved(name) => {
                (name, RawType::I32, [groups, packed])
            }
            Zeros::Columns(name) => (name, RawType::I32, [packed, groups]),
            Zeros::Bytes(name) => (name, RawType::I8, [outputs, groups]),
        };
        require_raw(directory, name, kind, &shape)?;
        let mut data = raw_rows(directory, name, shape[1] * kind.bytes(), 0..shape[0])?;
        if let Zeros::Plain {
            are_less_one: true, ..
        } = &self.zeros
        {
            // A one for each zero point of a word.
            let ones = u32::MAX / ((1 << self.bits) - 1);
            let (words, _) = data.as_chunks_mut();
            for word in words {
                *word = u32::from_le_bytes(*word).wrapping_add(ones).to_le_bytes();
            }
        }
        let places = (0..outputs).flat_map(|output| (0..groups).map(move |group| (output, group)));
        Ok(places
            .map(|(output, group)| match &self.zeros {
                Zeros::All(zero) => *zero,
                Zeros::Plain { .. } => code(&data, group * packed, 1, output, self.bits),
                Zeros::Interleaved(_) => {
                    let place = output / 8 * 8 + INTERLEAVED[output % 8];
                    code(&data, group * packed, 1, place, self.bits)
                }
                // Both codes and zero points are stored with half of their range added.
                Zeros::Columns(_) => code(&data, group, groups, output, self.bits),
                Zeros::Bytes(_) => i16::from(data[output * groups + group] as i8),
            })
            .collect())
    }

    /// Reads the group of each input, if groups are not consecutive inputs.
    fn order(&self, directory: &Directory) -> Result<Option<Vec<usize>>, WeightsError> {
        let Some(name) = &self.order else {
            return Ok(None);
        };
        let (inputs, groups) = (self.inputs(), self.groups());
        require_raw(directory, name, RawType::I32, &[inputs])?;
        let data = raw_rows(directory, name, 4, 0..inputs)?;
        let (words, _) = data.as_chunks();
        let mut order = Vec::with_capacity(inputs);
        for (input, word) in words.iter().enumerate() {
            let group = i32::from_le_bytes(*word);
            // compressed-tensors writes this for groups of consecutive inputs.
            if group == -1 && self.packing == Packing::Rows {
                return Ok(None);
            }
            let known = usize::try_from(group).ok().filter(|&group| group < groups);
            let Some(group) = known else {
                let found = format!("{group} for input {input}");
                let expected = format!("from 0 to {}", groups - 1);
                return Err(wrong(directory, name, &found, &expected));
            };
            order.push(group);
        }
        let is_usual = |(input, &group): (usize, &usize)| group == input / self.group;
        Ok((!order.iter().enumerate().all(is_usual)).then_some(order))
    }

    /// Reads the parts that these rows are made of.
    pub(super) fn open<'a>(
        &'a self,
        directory: &Directory,
        rows: Range<usize>,
    ) -> Result<Rows<'a>, WeightsError> {
        let (outputs, inputs, groups) = (self.outputs(), self.inputs(), self.groups());
        let (scales, zeros) = (self.scales(directory)?, self.zeros(directory)?);
        let order = self.order(directory)?;
        let per_word = (32 / self.bits) as usize;
        let first = rows.start;
        let row_bytes = match self.packing {
            Packing::Rows => 4 * inputs.div_ceil(per_word),
            Packing::Bytes => inputs,
            Packing::Inputs => 4 * outputs,
            Packing::Outputs => 4 * outputs / per_word,
        };
        // Packed along the outputs, or with the outputs of an input next to each other, all rows of
        // the stored matrix hold codes of a row.
        let (stored_rows, first_stored) = match self.packing {
            Packing::Rows | Packing::Bytes => (rows, first),
            Packing::Inputs => (0..inputs / per_word, 0),
            Packing::Outputs => (0..inputs, 0),
        };
        let data = raw_rows(directory, &self.codes, row_bytes, stored_rows)?;
        let codes = move |row: usize, codes: &mut [i16]| {
            let output = row + first;
            let own = output - first_stored;
            for (input, to) in codes.iter_mut().enumerate() {
                *to = match self.packing {
                    Packing::Rows => code(&data, own * row_bytes / 4, 1, input, self.bits),
                    Packing::Bytes => i16::from(data[own * row_bytes + input] as i8),
                    Packing::Inputs => code(&data, output, outputs, input, self.bits),
                    Packing::Outputs => {
                        let place = output / 8 * 8 + INTERLEAVED[output % 8];
                        code(&data, input * row_bytes / 4, 1, place, self.bits)
                    }
                };
            }
        };
        let Some(order) = order else {
            let fill = move |row: usize, to: &mut [i16], own: &mut [f32]| {
                codes(row, to);
                let at = (row + first) * groups;
                own.copy_from_slice(&scales[at..at + groups]);
                for (codes, zero) in to.chunks_mut(self.group).zip(&zeros[at..]) {
                    codes.iter_mut().for_each(|code| *code -= zero);
                }
            };
            return Ok(Rows::Integers {
                fill: Box::new(fill),
                group: self.group,
            });
        };
        Ok(Rows::Floats(Box::new(move |row, weights| {
            let mut own = vec![0; inputs];
            codes(row, &mut own);
            let at = (row + first) * groups;
            for ((weight, code), group) in weights.iter_mut().zip(own).zip(&order) {
                *weight = scales[at + group] * f32::from(code - zeros[at + group]);
            }
        })))
    }
}

/// Returns whether a scale is a float16 number.
pub(super) fn is_half(scale: &f32) -> bool {
    f16::from_f32(*scale).to_f32() == *scale
}

/// Returns the format that holds integers of this range, with these scales, exactly and in the
/// fewest bytes.
pub(super) fn dtype_for(range: (i16, i16), group: usize, inputs: usize, scales: &[f32]) -> DType {
    let fits_blocks = inputs.is_multiple_of(32) && (group.is_multiple_of(32) || group >= inputs);
    if !fits_blocks || !scales.iter().all(is_half) {
        return DType::F32;
    }
    match range {
        (-8.., ..=7) => DType::Q4_0,
        (-16.., ..=15) => DType::Q5_0,
        (-128.., ..=127) => DType::Q8_0,
        _ => DType::F32,
    }
}

/// Transposes a matrix of `rows` rows.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..values.len())
        .map(|at| values[at % rows * columns + at / rows])
        .collect()
}
