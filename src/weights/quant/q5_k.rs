//! Q5_K: 256 weights of 5 bits; groups of 32 with a 6-bit scale and a 6-bit minimum.
//!
//! A block has 176 bytes: 16 bytes of scales (see `k_scales`), `high: [u8; 32]`, `low: [u8;
//! 128]`. The low four bits of the weights are laid out as in Q4_K; bit `k` of `high[i]` is
//! bit 4 of weight `32·k + i`.

use super::{Affine, k_scales, nibbles};

pub(super) const AFFINE: Affine = Affine {
    group: 32,
    bits: 8,
    zero: 0,
    has_min: true,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    k_scales::unpack(block, scales, mins);
    let low = block[48..176].chunks_exact(32);
    for (low, codes) in low.zip(codes.chunks_exact_mut(64)) {
        nibbles(low, codes);
    }
    let high = &block[16..48];
    for (bit, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in codes.iter_mut().zip(high) {
            *code |= (byte >> bit & 1) << 4;
        }
    }
}
