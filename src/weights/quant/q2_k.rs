//! Q2_K: 256 weights of 2 bits; groups of 16 with a 4-bit scale and a 4-bit minimum.
//!
//! A block has 84 bytes: `groups: [u8; 16]` (scale in the low half, minimum in the high
//! half), `codes: [u8; 64]`, `scale: f16`, `min: f16`. Each run of 32 code bytes holds 128
//! weights: bits 0–1 hold the first 32, bits 2–3 the next 32, and so on.

use super::{Affine, f16_at};

pub(super) const AFFINE: Affine = Affine {
    group: 16,
    bits: 4,
    zero: 0,
    has_min: true,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    let (scale, min) = (f16_at(block, 80), f16_at(block, 82));
    for ((&group, group_scale), group_min) in block[..16].iter().zip(scales).zip(mins) {
        *group_scale = scale * f32::from(group & 15);
        *group_min = -(min * f32::from(group >> 4));
    }
    two_bits(&block[16..80], codes);
}

/// Unpacks 64 bytes into 256 codes of two bits.
pub(super) fn two_bits(packed: &[u8], codes: &mut [u8]) {
    for (packed, codes) in packed.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &byte) in codes.iter_mut().zip(packed) {
                *code = byte >> (2 * quarter) & 3;
            }
        }
    }
}
