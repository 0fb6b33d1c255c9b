//! Q4_1: 32 weights of 4 bits; one scale and one minimum.
//!
//! A block has 20 bytes: `scale: f16`, `min: f16`, `codes: [u8; 16]`. Byte `i` holds weight
//! `i` in its low half and weight `i + 16` in its high half.

use super::{Affine, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 4,
    zero: 0,
    has_min: true,
    native_f16_scales: true,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    mins[0] = f16_at(block, 2);
    nibbles(&block[4..20], codes);
}
