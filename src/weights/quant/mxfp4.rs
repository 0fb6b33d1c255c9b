//! MXFP4: 32 numbers of 4 bits, with a sign, two bits of exponent and one of mantissa; one power of
//! two (OCP microscaling formats, 2023).
//!
//! A block has 17 bytes: `exponent: u8`, `codes: [u8; 16]`. The code of a weight is twice its
//! number plus 16, and its scale is half the power of two, as in ggml.

use super::nibbles;

// The CUDA device stores both in the same records.
pub(super) use super::q5_0::AFFINE;

/// The largest exponent whose scale is a float16 number: 2 to the power of 15. The smallest ones
/// are below those of float16, where weights count as zeros on devices.
pub(super) const LARGEST_EXPONENT: u8 = 143;

/// Twice each number, plus 16.
const CODES: [u8; 16] = [16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4];

pub(super) fn unpack(block: &[u8], codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
    // In two factors, because the smallest powers are subnormal numbers.
    scales[0] = 2f32.powi(i32::from(block[0]) - 64) * 2f32.powi(-64);
    nibbles(&block[1..17], codes);
    for code in codes {
        *code = CODES[usize::from(*code & 15)];
    }
}
