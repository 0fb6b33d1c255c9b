//! IQ4_XS: 256 weights of 4 bits that index the table of IQ4_NL; a scale of 6 bits per 32 of them,
//! and one scale for all.
//!
//! A block has 136 bytes: `scale: f16`, `high: u16`, `low: [u8; 4]`, `codes: [u8; 128]`. Scale `g`
//! has its low four bits in half `g` of `low` and its high two bits at bit `2 g` of `high`; 32 is
//! subtracted from it. The codes of 32 weights are in 16 bytes, as in Q4_0.

use super::iq4_nl::STEPS;
use super::{Affine, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 128,
    has_min: false,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    let factor = f16_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let groups = block[8..].chunks_exact(16).zip(codes.chunks_exact_mut(32));
    for (group, ((packed, codes), scale)) in groups.zip(scales).enumerate() {
        let low = block[4 + group / 2] >> (group % 2 * 4) & 15;
        let high = (high >> (2 * group) & 3) as u8;
        *scale = factor * (f32::from(low | high << 4) - 32.0);
        nibbles(packed, codes);
        for code in codes {
            *code = STEPS[usize::from(*code & 15)];
        }
    }
}
