//! Q6_K: 256 weights of 6 bits around 32; groups of 16 with a signed 8-bit scale.
//!
//! A block has 210 bytes: `low: [u8; 128]`, `high: [u8; 64]`, `groups: [i8; 16]`, `scale:
//! f16`. Each run of 64 bytes of `low` and 32 bytes of `high` holds 128 weights. The low
//! halves of the 64 bytes belong to the first 64 weights and their high halves to the next
//! 64. Bits 0–1 of the 32 bytes belong to the first 32 weights, bits 2–3 to the next 32,
//! and so on.

use super::{Affine, f16_at, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 16,
    bits: 8,
    zero: 32,
    has_min: false,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    let low = block[..128].chunks_exact(64);
    let high = block[128..192].chunks_exact(32);
    for ((low, high), codes) in low.zip(high).zip(codes.chunks_exact_mut(128)) {
        nibbles(low, codes);
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &byte) in codes.iter_mut().zip(high) {
                *code |= (byte >> (2 * quarter) & 3) << 4;
            }
        }
    }
    let scale = f16_at(block, 208);
    for (&group, group_scale) in block[192..208].iter().zip(scales) {
        *group_scale = scale * f32::from(group as i8);
    }
}
