//! Q8_0: 32 signed weights of 8 bits; one scale.
//!
//! A block has 34 bytes: `scale: f16`, `weights: [i8; 32]`. The code of a weight is the
//! weight plus 128.

use super::{Affine, f16_at};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 128,
    has_min: false,
    native_f16_scales: true,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    for (code, &byte) in codes.iter_mut().zip(&block[2..34]) {
        // Two's complement plus 128 is the same byte with its sign bit flipped.
        *code = byte ^ 0x80;
    }
}
