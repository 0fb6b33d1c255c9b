//! Matrices distributed over a warp: `ldmatrix` and `mma`, with the layouts of the PTX manual.

use super::float::canonical;
use super::half::{Brain, Half, Small};
use super::lanes::has_vectors;
use super::registers::Registers;
use super::warp::Warp;
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Factors, Instruction, LANES};

/// Computes `d = a · b + c` in single precision, where a is 16 × `depth` (8 or 16) and b is
/// `depth` × 8. The products are added to c one by one, by ascending k, and each sum is rounded
/// to nearest. (PTX leaves the order and the rounding of a GPU's additions open.) Of factors in
/// tf32, the lower 13 bits are ignored.
pub fn multiply(file: &mut Registers, i: &Instruction, depth: u8, factors: Factors) {
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the CPU has the features that the function is compiled for.
        return unsafe { multiply_vector(file, i, depth, factors) };
    }
    multiply_typed(file, i, depth, factors, add_products, add_products);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn multiply_vector(file: &mut Registers, i: &Instruction, depth: u8, factors: Factors) {
    // Closures defined in here are compiled with the same features.
    let one = |a: &Halves<1>, b: &Halves<1>, sums: &mut Sums| add_products_vector(a, b, sums);
    let two = |a: &Halves<2>, b: &Halves<2>, sums: &mut Sums| add_products_vector(a, b, sums);
    multiply_typed(file, i, depth, factors, one, two);
}

#[inline(always)]
fn multiply_typed(
    file: &mut Registers,
    i: &Instruction,
    depth: u8,
    factors: Factors,
    one: impl Fn(&Halves<1>, &Halves<1>, &mut Sums),
    two: impl Fn(&Halves<2>, &Halves<2>, &mut Sums),
) {
    match (depth, factors) {
        (16, Factors::Bf16) => multiply_body::<Pairs<Brain>, 2>(file, i, two),
        (16, _) => multiply_body::<Pairs<Half>, 2>(file, i, two),
        (_, Factors::Bf16) => multiply_body::<Pairs<Brain>, 1>(file, i, one),
        (_, Factors::F16) => multiply_body::<Pairs<Half>, 1>(file, i, one),
        (_, Factors::Tf32) => multiply_body::<Singles, 1>(file, i, one),
    }
}

/// For each group of eight k: the lower and the upper halves of a register.
type Halves<const EIGHTS: usize> = [[[f32; LANES]; 2]; EIGHTS];

/// Eight rows of results, each with its even columns first and then its odd ones.
type Sums = [[f32; 8]; 8];

/// Adds the products to the sums, by ascending k. Row r of a has its columns 2 t and 2 t + 1 at
/// index 4 r + t of the lower and the upper halves; rows 2 t and 2 t + 1 of b begin at index 8
/// t.
fn add_products<const EIGHTS: usize>(a: &Halves<EIGHTS>, b: &Halves<EIGHTS>, sums: &mut Sums) {
    for (row, sums) in sums.iter_mut().enumerate() {
        for (a, b) in a.iter().zip(b) {
            for t in 0..4 {
                for half in 0..2 {
                    for at in 0..8 {
                        sums[at] += a[half][row * 4 + t] * b[half][t * 8 + at];
                    }
                }
            }
        }
    }
}

/// [`add_products`] with explicit vector instructions, since compilers do not vectorise it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_products_vector<const EIGHTS: usize>(
    a: &Halves<EIGHTS>,
    b: &Halves<EIGHTS>,
    sums: &mut Sums,
) {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_storeu_ps,
    };
    for (group, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: each row of sums has the eight numbers that are loaded.
        let mut totals =
            [0, 1, 2, 3].map(|row: usize| unsafe { _mm256_loadu_ps(sums[row].as_ptr()) });
        for (a, b) in a.iter().zip(b) {
            for t in 0..4 {
                for half in 0..2 {
                    // SAFETY: t is at most 3, so 8 t + 7 is within the 32 numbers.
                    let b = unsafe { _mm256_loadu_ps(b[half].as_ptr().add(t * 8)) };
                    for (row, total) in totals.iter_mut().enumerate() {
                        let a = _mm256_set1_ps(a[half][(group * 4 + row) * 4 + t]);
                        *total = _mm256_add_ps(*total, _mm256_mul_ps(a, b));
                    }
                }
            }
        }
        for (sums, total) in sums.iter_mut().zip(totals) {
            // SAFETY: a row of sums has eight numbers.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), total) };
        }
    }
}

/// Returns the numbers in the lower and the upper halves of a register's lanes.
#[inline(always)]
fn halves<S: Small>(words: &[u32; LANES]) -> [[f32; LANES]; 2] {
    let mut out = [[0.0; LANES]; 2];
    for lane in 0..LANES {
        out[0][lane] = S::from_bits(words[lane] as u16).wide();
        out[1][lane] = S::from_bits((words[lane] >> 16) as u16).wide();
    }
    out
}

/// How registers hold eight columns of operand a and eight rows of operand b.
trait Fragments {
    /// Registers of b for eight rows. Of a, twice as many hold eight columns.
    const REGISTERS: usize;

    /// Returns eight columns of rows 0 to 7 of a, or of rows 8 to 15 if `lower` is 1. `registers`
    /// are those of all rows.
    fn a(file: &Registers, registers: &[u16], lower: usize) -> [[f32; LANES]; 2];

    /// Returns eight rows of b: the even ones, then the odd ones, each in the order of the
    /// results.
    fn b(file: &Registers, registers: &[u16]) -> [[f32; LANES]; 2];
}

/// Index of a column of b in a row that is in the order of the results.
const fn place(column: usize) -> usize {
    column / 2 + column % 2 * 4
}

/// Two factors per register. Lane 4 g + t holds columns 2 t and 2 t + 1 of row g of a, and the
/// same two rows of column g of b.
struct Pairs<S>(std::marker::PhantomData<S>);

impl<S: Small> Fragments for Pairs<S> {
    const REGISTERS: usize = 1;

    #[inline(always)]
    fn a(file: &Registers, registers: &[u16], lower: usize) -> [[f32; LANES]; 2] {
        halves::<S>(file.words(registers[lower]))
    }

    #[inline(always)]
    fn b(file: &Registers, registers: &[u16]) -> [[f32; LANES]; 2] {
        let words = file.words(registers[0]);
        let mut rows = [0; LANES];
        for t in 0..4 {
            for column in 0..8 {
                rows[t * 8 + place(column)] = words[column * 4 + t];
            }
        }
        halves::<S>(&rows)
    }
}

/// One factor per register, in tf32. Lane 4 g + t holds columns t and t + 4 of row g of a, and
/// the same two rows of column g of b.
struct Singles;

fn tf32(word: u32) -> f32 {
    f32::from_bits(word & !0x1fff)
}

impl Fragments for Singles {
    const REGISTERS: usize = 2;

    #[inline(always)]
    fn a(file: &Registers, registers: &[u16], lower: usize) -> [[f32; LANES]; 2] {
        let mut out = [[0.0; LANES]; 2];
        for upper in 0..2 {
            let words = file.words(registers[2 * upper + lower]);
            for (lane, word) in words.iter().enumerate() {
                let k = 4 * upper + lane % 4;
                out[k % 2][lane / 4 * 4 + k / 2] = tf32(*word);
            }
        }
        out
    }

    #[inline(always)]
    fn b(file: &Registers, registers: &[u16]) -> [[f32; LANES]; 2] {
        let mut out = [[0.0; LANES]; 2];
        for (upper, register) in registers[..2].iter().enumerate() {
            let words = file.words(*register);
            for (lane, word) in words.iter().enumerate() {
                let k = 4 * upper + lane % 4;
                out[k % 2][k / 2 * 8 + place(lane / 4)] = tf32(*word);
            }
        }
        out
    }
}

/// Computes a product whose depth k is `EIGHTS` × 8.
///
/// Of row g of c and d, lane 4 g + t holds columns 2 t and 2 t + 1, each in a register of its
/// own. Therefore a row of results is stored as its even columns followed by its odd ones.
#[inline(always)]
fn multiply_body<F: Fragments, const EIGHTS: usize>(
    file: &mut Registers,
    i: &Instruction,
    add: impl Fn(&Halves<EIGHTS>, &Halves<EIGHTS>, &mut Sums),
) {
    let (a_registers, others) = i.slots[4..].split_at(2 * EIGHTS * F::REGISTERS);
    let (b_registers, c_registers) = others.split_at(EIGHTS * F::REGISTERS);
    let mut b = [[[0.0; LANES]; 2]; EIGHTS];
    for (eight, b) in b.iter_mut().enumerate() {
        *b = F::b(file, &b_registers[eight * F::REGISTERS..]);
    }
    // Rows 0 to 7 are in the even registers of a and the first two of c and d, rows 8 to 15 in
    // the others.
    let mut results = [[0u32; LANES]; 4];
    for lower in 0..2 {
        let even = file.words(c_registers[2 * lower]);
        let odd = file.words(c_registers[2 * lower + 1]);
        let mut a = [[[0.0; LANES]; 2]; EIGHTS];
        for (eight, a) in a.iter_mut().enumerate() {
            *a = F::a(file, &a_registers[2 * eight * F::REGISTERS..], lower);
        }
        let mut sums = [[0.0; 8]; 8];
        for (row, sums) in sums.iter_mut().enumerate() {
            for t in 0..4 {
                sums[t] = f32::from_bits(even[row * 4 + t]);
                sums[t + 4] = f32::from_bits(odd[row * 4 + t]);
            }
        }
        add(&a, &b, &mut sums);
        for (row, sums) in sums.iter().enumerate() {
            for t in 0..4 {
                results[2 * lower][row * 4 + t] = canonical(sums[t]).to_bits();
                results[2 * lower + 1][row * 4 + t] = canonical(sums[t + 4]).to_bits();
            }
        }
    }
    for (register, result) in results.iter().enumerate() {
        *file.words_of_slot_mut(i.slots[register]) = *result;
    }
}

impl Block<'_> {
    /// Loads `count` matrices of 8 × 8 halves. Lane 8 m + r provides the address of row r of
    /// matrix m. Lane l receives the elements 2 (l mod 4) and 2 (l mod 4) + 1 of row l / 4, or
    /// of that column if transposed.
    pub(super) fn load_matrix(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        count: usize,
        transposed: bool,
        at: usize,
    ) -> Outcome<()> {
        let addresses = *warp.file.words(i.slots[count]);
        // Every lane reads every row.
        let stamp = self.shared.stamp(warp.visitor(32, at, false));
        for matrix in 0..count {
            let mut rows = [[0u32; 4]; 8];
            for (r, row) in rows.iter_mut().enumerate() {
                let lane = matrix * 8 + r;
                let address = addresses[lane].wrapping_add(i.offset as u32) as usize;
                if address % 16 != 0 {
                    let stop = Stop::new(
                        FaultKind::Misaligned,
                        "a row of a matrix must begin at a multiple of 16 bytes",
                    );
                    return Err(stop.at(address as u64, "shared memory").at_lane(lane));
                }
                self.check_shared(address as u64, 16, lane)?;
                self.shared
                    .read_as(address, 16, stamp)
                    .map_err(|c| self.shared_fault(c, lane, "reads"))?;
                for (word, bytes) in row
                    .iter_mut()
                    .zip(self.shared.data[address..address + 16].as_chunks().0)
                {
                    *word = u32::from_le_bytes(*bytes);
                }
            }
            let words = warp.file.words_of_slot_mut(i.slots[matrix]);
            if !transposed {
                words.copy_from_slice(rows.as_flattened());
                continue;
            }
            let element =
                |row: usize, column: usize| rows[row][column / 2] >> (column % 2 * 16) & 0xffff;
            for (lane, word) in words.iter_mut().enumerate() {
                let (column, first) = (lane / 4, lane % 4 * 2);
                *word = element(first, column) | element(first + 1, column) << 16;
            }
        }
        Ok(())
    }
}
