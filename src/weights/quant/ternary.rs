//! TQ1_0 and TQ2_0: 256 weights that are -1, 0 or 1 times one scale (TriLMs, BitNet b1.58).
//!
//! A block of TQ2_0 has 66 bytes: `codes: [u8; 64]`, `scale: f16`. Pair `p` of the bits of byte `i`
//! of each half of `codes` is weight `32 p + i` of 128. A block of TQ1_0 has 54 bytes: `codes:
//! [u8; 48]`, `rest: [u8; 4]`, `scale: f16`. A byte has five digits of base 3, those of `rest` have
//! four; the first 32 bytes, the next 16 and the last four are each read digit by digit.

use super::f16_at;

// The CUDA device stores both in the same records.
pub(super) use super::q4_0::AFFINE;

/// Returns the code of a weight that is stored as 0, 1 or 2, or as 3, which stands for twice the
/// scale.
fn code(stored: u8) -> u8 {
    stored + 7
}

/// Unpacks a block of TQ2_0.
pub(super) fn unpack_pairs(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales.fill(f16_at(block, 64));
    for (bytes, codes) in block[..64]
        .chunks_exact(32)
        .zip(codes.chunks_exact_mut(128))
    {
        for (pair, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (to, byte) in codes.iter_mut().zip(bytes) {
                *to = code(byte >> (2 * pair) & 3);
            }
        }
    }
}

/// Unpacks a block of TQ1_0.
pub(super) fn unpack_base_3(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    scales.fill(f16_at(block, 52));
    let (first, rest) = codes.split_at_mut(160);
    let (second, third) = rest.split_at_mut(80);
    for (bytes, codes) in [
        (&block[..32], first),
        (&block[32..48], second),
        (&block[48..52], third),
    ] {
        let mut power = 1u8;
        for codes in codes.chunks_exact_mut(bytes.len()) {
            for (to, byte) in codes.iter_mut().zip(bytes) {
                // The byte is a fraction of 256, whose next digit is the product with 3.
                let fraction = u16::from(byte.wrapping_mul(power));
                *to = code(((fraction * 3) >> 8) as u8);
            }
            power *= 3;
        }
    }
}
