//! IQ4_NL: 32 weights of 4 bits that index a table of uneven steps; one scale.
//!
//! A block has 18 bytes in the layout of Q4_0. The code of a weight is its table entry plus
//! 128.

use super::{Affine, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 128,
    has_min: false,
    native_f16_scales: true,
};

/// ggml's table `kvalues_iq4nl`, with 128 added to each entry.
pub(super) const STEPS: [u8; 16] = [
    1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241,
];

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales[0] = f16_at(block, 0);
    nibbles(&block[2..18], codes);
    for code in codes {
        *code = STEPS[usize::from(*code & 15)];
    }
}
