//! The packed 6-bit scales and minimums that Q4_K and Q5_K share.

use super::f16_at;

/// Reads the first 16 bytes of a Q4_K or Q5_K block: `scale: f16`, `min: f16`, and 12 bytes
/// with eight 6-bit scales and eight 6-bit minimums.
///
/// In their low six bits, bytes 0–3 hold scales 0–3 and bytes 4–7 hold minimums 0–3. Byte
/// `8 + i` holds the low four bits of scale `4 + i` and of minimum `4 + i`. Their high two
/// bits are the top two bits of bytes `i` and `4 + i`.
pub(super) fn unpack(block: &[u8], scales: &mut [f32], mins: &mut [f32]) {
    let (scale, min) = (f16_at(block, 0), f16_at(block, 2));
    let packed = &block[4..16];
    for group in 0..4 {
        scales[group] = scale * f32::from(packed[group] & 63);
        mins[group] = -(min * f32::from(packed[4 + group] & 63));
        let low = packed[8 + group];
        scales[4 + group] = scale * f32::from(low & 15 | packed[group] >> 6 << 4);
        mins[4 + group] = -(min * f32::from(low >> 4 | packed[4 + group] >> 6 << 4));
    }
}
