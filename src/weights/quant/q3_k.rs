//! Q3_K: 256 weights of 3 bits around 4; groups of 16 with a signed 6-bit scale.
//!
//! A block has 110 bytes: `high: [u8; 32]`, `low: [u8; 64]`, `groups: [u8; 12]`, `scale:
//! f16`. The low two bits of the weights are laid out as in Q2_K; bit `k` of `high[i]` is
//! bit 2 of weight `32·k + i`. The 16 group scales are stored with 32 added. The low four
//! bits of scales 0–7 are the low halves of bytes 0–7 of `groups`, and those of scales 8–15
//! are their high halves. The high two bits of scale `g` begin at bit `2·(g / 4)` of byte
//! `8 + g % 4`.

use super::q2_k::two_bits;
use super::{Affine, f16_at};

pub(super) const AFFINE: Affine = Affine {
    group: 16,
    bits: 4,
    zero: 4,
    has_min: false,
    native_f16_scales: false,
};

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    two_bits(&block[32..96], codes);
    let high = &block[..32];
    for (bit, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in codes.iter_mut().zip(high) {
            *code |= (byte >> bit & 1) << 2;
        }
    }
    let scale = f16_at(block, 108);
    let packed = &block[96..108];
    for (group, group_scale) in scales.iter_mut().enumerate() {
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        *group_scale = scale * (i32::from(low | high << 4) - 32) as f32;
    }
}
