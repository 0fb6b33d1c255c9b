//! Matrices spread over a warp: `ldmatrix` and `mma`, laid out as the PTX manual says.

use super::float::canonical;
use super::half::{Brain, Half, Small};
use super::lanes::has_vectors;
use super::registers::Registers;
use super::warp::Warp;
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Instruction, LANES};

/// `d = a · b + c`, a of 16 × `depth` (8 or 16), b of `depth` × 8, in single precision: the
/// products are added to c one after the other, by ascending k, each sum rounded to nearest.
/// (A GPU adds in an order and with a rounding that PTX leaves open.)
pub fn multiply(file: &mut Registers, i: &Instruction, depth: u8, brain: bool) {
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { multiply_vector(file, i, depth, brain) };
    }
    multiply_typed(file, i, depth, brain);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn multiply_vector(file: &mut Registers, i: &Instruction, depth: u8, brain: bool) {
    multiply_typed(file, i, depth, brain);
}

#[inline(always)]
fn multiply_typed(file: &mut Registers, i: &Instruction, depth: u8, brain: bool) {
    match (depth, brain) {
        (16, true) => multiply_body::<Brain, 2>(file, i),
        (16, false) => multiply_body::<Half, 2>(file, i),
        (_, true) => multiply_body::<Brain, 1>(file, i),
        (_, false) => multiply_body::<Half, 1>(file, i),
    }
}

/// Eight rows of eight numbers.
type Tile = [[f32; 8]; 8];

/// The numbers of a register: lane l has elements 2 (l mod 4) and the next of row l / 4, so
/// the rows lie one after the other.
#[inline(always)]
fn tile<S: Small>(words: &[u32; LANES]) -> Tile {
    let mut tile = [[0.0; 8]; 8];
    for (row, words) in tile.iter_mut().zip(words.as_chunks::<4>().0) {
        for at in 0..4 {
            row[2 * at] = S::from_bits(words[at] as u16).wide();
            row[2 * at + 1] = S::from_bits((words[at] >> 16) as u16).wide();
        }
    }
    tile
}

/// `DEPTH` counts eights of k.
#[inline(always)]
fn multiply_body<S: Small, const DEPTH: usize>(file: &mut Registers, i: &Instruction) {
    let operands = &i.slots[4..];
    // Operand b: lane l has rows 2 (l mod 4) and the next of column l / 4.
    let mut b = [[[0.0; 8]; 8]; DEPTH];
    for (eight, b) in b.iter_mut().enumerate() {
        let columns = tile::<S>(file.words(operands[2 * DEPTH + eight]));
        for row in 0..8 {
            for column in 0..8 {
                b[row][column] = columns[column][row];
            }
        }
    }
    // Rows 0 to 7 are in the even registers of a and the first two of c and d, rows 8 to 15 in the others.
    let mut results = [[[0u32; LANES]; 2]; 2];
    for (lower, result) in results.iter_mut().enumerate() {
        let (even, odd) = (
            operands[3 * DEPTH + 2 * lower],
            operands[3 * DEPTH + 2 * lower + 1],
        );
        let (even, odd) = (file.words(even), file.words(odd));
        let mut sums: Tile = [[0.0; 8]; 8];
        for (row, sums) in sums.iter_mut().enumerate() {
            for at in 0..4 {
                sums[2 * at] = f32::from_bits(even[row * 4 + at]);
                sums[2 * at + 1] = f32::from_bits(odd[row * 4 + at]);
            }
        }
        for (eight, b) in b.iter().enumerate() {
            let a = tile::<S>(file.words(operands[2 * eight + lower]));
            for (a, sums) in a.iter().zip(&mut sums) {
                for (a, b) in a.iter().zip(b) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum += a * b;
                    }
                }
            }
        }
        let [even, odd] = result;
        for (row, sums) in sums.iter().enumerate() {
            for at in 0..4 {
                even[row * 4 + at] = canonical(sums[2 * at]).to_bits();
                odd[row * 4 + at] = canonical(sums[2 * at + 1]).to_bits();
            }
        }
    }
    for (register, result) in results.as_flattened().iter().enumerate() {
        *file.words_of_slot_mut(i.slots[register]) = *result;
    }
}

impl Block<'_> {
    /// Loads `count` matrices of 8 × 8 halves; lane `8 m + r` gives the address of row r of
    /// matrix m. Lane l gets the elements 2 (l mod 4) and the next of row l / 4, or of that
    /// column if transposed.
    pub(super) fn load_matrix(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        count: usize,
        transposed: bool,
        at: usize,
    ) -> Outcome<()> {
        let addresses = *warp.file.words(i.slots[count]);
        for matrix in 0..count {
            let mut rows = [[0u16; 8]; 8];
            for (r, row) in rows.iter_mut().enumerate() {
                let lane = matrix * 8 + r;
                let address = addresses[lane].wrapping_add(i.offset as u32) as usize;
                if address % 16 != 0 {
                    let stop = Stop::new(
                        FaultKind::Misaligned,
                        "a row of a matrix begins at a multiple of 16 bytes",
                    );
                    return Err(stop.at(address as u64, "shared memory").at_lane(lane));
                }
                self.check_shared(address as u64, 16, lane)?;
                let everybody = warp.visitor(32, at, false);
                self.shared
                    .read(address, 16, everybody)
                    .map_err(|c| self.shared_fault(c, lane, "reads"))?;
                for (element, bytes) in row
                    .iter_mut()
                    .zip(self.shared.data[address..address + 16].chunks_exact(2))
                {
                    *element = u16::from_le_bytes([bytes[0], bytes[1]]);
                }
            }
            let words = warp.file.words_of_slot_mut(i.slots[matrix]);
            for (lane, word) in words.iter_mut().enumerate() {
                let (line, first) = (lane / 4, lane % 4 * 2);
                let (low, high) = if transposed {
                    (rows[first][line], rows[first + 1][line])
                } else {
                    (rows[line][first], rows[line][first + 1])
                };
                *word = u32::from(low) | u32::from(high) << 16;
            }
        }
        Ok(())
    }
}
