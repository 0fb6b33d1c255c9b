//! Q5_0: 32 weights of 5 bits around 16; one scale.
//!
//! A block has 22 bytes: `scale: f16`, `high: [u8; 4]`, `low: [u8; 16]`. The low four bits
//! of the weights are laid out as in Q4_0; bit `i` of the little-endian `high` is bit 4 of
//! weight `i`.

use super::{Affine, add_fifth_bits, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 16,
    has_min: false,
    native_f16_scales: true,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    nibbles(&block[6..22], codes);
    add_fifth_bits(&block[2..6], codes);
}
