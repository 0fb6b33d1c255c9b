//! Matrices spread over a warp: `ldmatrix` and `mma`, laid out as the PTX manual says.

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
    let depth = usize::from(depth);
    let (mut a, mut b, mut d) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
    let operands = &i.slots[4..];
    // Register r of a: rows from the lane's group, or 8 below for odd r; columns 8 on for r ≥ 2.
    for r in 0..depth / 4 {
        let words = file.words(operands[r]);
        for lane in 0..LANES {
            let (row, column) = (lane / 4 + r % 2 * 8, lane % 4 * 2 + r / 2 * 8);
            (a[row][column], a[row][column + 1]) = widen(words[lane], brain);
        }
    }
    for r in 0..depth / 8 {
        let words = file.words(operands[depth / 4 + r]);
        for lane in 0..LANES {
            let (row, column) = (lane % 4 * 2 + r * 8, lane / 4);
            (b[row][column], b[row + 1][column]) = widen(words[lane], brain);
        }
    }
    for r in 0..4 {
        let words = file.words(operands[depth / 4 + depth / 8 + r]);
        for lane in 0..LANES {
            d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = f32::from_bits(words[lane]);
        }
    }
    product(&a, &b, &mut d, depth);
    for r in 0..4 {
        let words = file.words_of_slot_mut(i.slots[r]);
        for lane in 0..LANES {
            words[lane] =
                super::float::canonical(d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]).to_bits();
        }
    }
}

#[inline(always)]
fn widen(word: u32, brain: bool) -> (f32, f32) {
    let (low, high) = (word as u16, (word >> 16) as u16);
    if brain {
        (Brain(low).wide(), Brain(high).wide())
    } else {
        (Half(low).wide(), Half(high).wide())
    }
}

fn product(a: &[[f32; 16]; 16], b: &[[f32; 8]; 16], d: &mut [[f32; 8]; 16], depth: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { product_vector(a, b, d, depth) };
    }
    product_body(a, b, d, depth);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn product_vector(a: &[[f32; 16]; 16], b: &[[f32; 8]; 16], d: &mut [[f32; 8]; 16], depth: usize) {
    product_body(a, b, d, depth);
}

#[inline(always)]
fn product_body(a: &[[f32; 16]; 16], b: &[[f32; 8]; 16], d: &mut [[f32; 8]; 16], depth: usize) {
    for (row, sums) in a.iter().zip(d) {
        for k in 0..depth {
            for column in 0..8 {
                sums[column] += row[k] * b[k][column];
            }
        }
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
