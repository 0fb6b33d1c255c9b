//! The register file of a warp.

use crate::ptx::instruction::{ALL, LANES};

/// 16 words, aligned for vector instructions; accessed only through slices of words.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u32; 16]);

/// All registers of a warp: rows of 32 words, the first of which contain predicates.
pub struct Registers {
    lines: Vec<Line>,
}

impl Registers {
    pub fn new(rows: usize) -> Self {
        // One extra row, so that a wide register in the last row has both of its rows.
        Registers {
            lines: vec![Line([0; 16]); (rows + 1) * 2],
        }
    }

    pub fn clear(&mut self) {
        self.lines.fill(Line([0; 16]));
    }

    pub fn as_mut_ptr(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }

    fn words_of(&self) -> &[u32] {
        // SAFETY: a line is sixteen words without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }

    fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: a line is sixteen words without padding.
        unsafe {
            std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16)
        }
    }

    #[inline(always)]
    pub fn predicate(&self, slot: u16) -> u32 {
        self.words_of()[usize::from(slot)]
    }

    pub fn write_predicate(&mut self, slot: u16, mask: u32, bits: u32) {
        let word = &mut self.words_mut()[usize::from(slot)];
        *word = (*word & !mask) | (bits & mask);
    }

    /// Returns the lanes of a 32-bit register.
    #[inline(always)]
    pub fn words(&self, slot: u16) -> &[u32; LANES] {
        let row = &self.words_of()[usize::from(slot) * LANES..][..LANES];
        row.try_into().unwrap_or(&[0; LANES])
    }

    #[inline(always)]
    pub fn words_of_slot_mut(&mut self, slot: u16) -> &mut [u32; LANES] {
        let row = &mut self.words_mut()[usize::from(slot) * LANES..][..LANES];
        // SAFETY: the slice has this length.
        unsafe { &mut *row.as_mut_ptr().cast() }
    }

    /// Returns the lanes of a 64-bit register.
    #[inline(always)]
    pub fn wides(&self, slot: u16) -> &[u64; LANES] {
        let rows = &self.words_of()[usize::from(slot) * LANES..][..2 * LANES];
        // SAFETY: the slice has this size, and rows are aligned to 64 bytes.
        unsafe { &*rows.as_ptr().cast() }
    }

    #[inline(always)]
    pub fn wides_mut(&mut self, slot: u16) -> &mut [u64; LANES] {
        let rows = &mut self.words_mut()[usize::from(slot) * LANES..][..2 * LANES];
        // SAFETY: the slice has this size, and rows are aligned to 64 bytes.
        unsafe { &mut *rows.as_mut_ptr().cast() }
    }

    pub fn write_words(&mut self, slot: u16, mask: u32, values: &[u32; LANES]) {
        blend(self.words_of_slot_mut(slot), mask, values);
    }

    pub fn write_wides(&mut self, slot: u16, mask: u32, values: &[u64; LANES]) {
        blend(self.wides_mut(slot), mask, values);
    }
}

fn blend<S: Copy>(to: &mut [S; LANES], mask: u32, values: &[S; LANES]) {
    if mask == ALL {
        *to = *values;
        return;
    }
    for lane in 0..LANES {
        if mask >> lane & 1 == 1 {
            to[lane] = values[lane];
        }
    }
}
