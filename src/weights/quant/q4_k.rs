//! Q4_K: 256 weights of 4 bits; groups of 32 with a 6-bit scale and a 6-bit minimum.
//!
//! A block has 144 bytes: 16 bytes of scales (see `k_scales`), `codes: [u8; 128]`. Each run
//! of 32 code bytes holds 64 weights: the low halves are the first 32, the high halves the
//! next 32.

use super::{Affine, k_scales, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 4,
    zero: 0,
    has_min: true,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    k_scales::unpack(block, scales, mins);
    let packed = block[16..144].chunks_exact(32);
    for (packed, codes) in packed.zip(codes.chunks_exact_mut(64)) {
        nibbles(packed, codes);
    }
}
