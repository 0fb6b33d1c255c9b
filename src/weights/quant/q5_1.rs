//! Q5_1: 32 weights of 5 bits; one scale and one minimum.
//!
//! A block has 24 bytes: `scale: f16`, `min: f16`, `high: [u8; 4]`, `low: [u8; 16]`. The
//! low four bits of the weights are laid out as in Q4_1; bit `i` of the little-endian
//! `high` is bit 4 of weight `i`.

use super::{Affine, add_fifth_bits, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 0,
    has_min: true,
    native_f16_scales: true,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    mins[0] = f16_at(block, 2);
    nibbles(&block[8..24], codes);
    add_fifth_bits(&block[4..8], codes);
}
