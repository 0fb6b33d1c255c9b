//! Q4_0: 32 weights of 4 bits around 8; one scale.
//!
//! A block has 18 bytes: `scale: f16`, `codes: [u8; 16]`. Byte `i` holds weight `i` in its
//! low half and weight `i + 16` in its high half.

use super::{Affine, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 4,
    zero: 8,
    has_min: false,
    native_f16_scales: true,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    nibbles(&block[2..18], codes);
}
