//! ggml's quantised block formats, one file each, as integers with scales.
//!
//! Every format is read as groups of 16 or 32 consecutive weights of one row: `weight =
//! scale · (code − zero) + min`. Here `code` is an unsigned integer of at most 4 or 8 bits,
//! `zero` is a constant of the format, and `scale` and `min` belong to the group. Devices
//! repack weights from this form; [`dequantize`] defines it in float32.
//!
//! The formula is evaluated as written, and each operation is rounded to float32. This is
//! the order of ggml's `dequantize_row_*`, so the results have the same bits. Where ggml
//! subtracts a minimum, this form adds its negative, which gives the same number.

pub mod blocks;
mod finite;
mod iq4_nl;
mod iq4_xs;
mod k_scales;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod ternary;

pub use finite::first_not_finite;

use super::DType;
use half::{bf16, f16};

/// The constants of a block format in the affine view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affine {
    /// Number of consecutive weights that share a scale: 16 or 32.
    pub group: usize,
    /// Bits that are enough for every code: 4 or 8.
    pub bits: u8,
    /// Number that is subtracted from each code.
    pub zero: i32,
    /// Whether groups have a minimum. Without one, `min` is 0 and is not added.
    pub has_min: bool,
    /// Whether every scale and minimum is exactly representable in float16.
    pub native_f16_scales: bool,
}

/// Returns the affine view of `dtype`, or `None` for the plain floating-point formats.
pub fn affine(dtype: DType) -> Option<Affine> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => None,
        DType::Q4_0 => Some(q4_0::AFFINE),
        DType::Q4_1 => Some(q4_1::AFFINE),
        DType::Q5_0 => Some(q5_0::AFFINE),
        DType::Q5_1 => Some(q5_1::AFFINE),
        DType::Q8_0 => Some(q8_0::AFFINE),
        DType::Q2K => Some(q2_k::AFFINE),
        DType::Q3K => Some(q3_k::AFFINE),
        DType::Q4K => Some(q4_k::AFFINE),
        DType::Q5K => Some(q5_k::AFFINE),
        DType::Q6K => Some(q6_k::AFFINE),
        DType::Iq4Nl => Some(iq4_nl::AFFINE),
        DType::Iq4Xs => Some(iq4_xs::AFFINE),
        DType::Mxfp4 => Some(mxfp4::AFFINE),
        DType::Tq1_0 | DType::Tq2_0 => Some(ternary::AFFINE),
    }
}

/// Unpacks one block: its codes, and the scale and minimum of each of its groups. Formats
/// without minimums leave `mins` unchanged.
type Unpack = fn(block: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]);

/// Unpacks all blocks in `data`: one code per weight, and one scale and one minimum per
/// group of [`Affine::group`] weights.
///
/// Formats without a minimum do not write to `mins`, which may then be empty.
///
/// # Panics
/// Panics if `dtype` is a floating-point format, if `data` is not a whole number of blocks,
/// or if an output does not have the length that `data` needs.
pub fn unpack_row(
    dtype: DType,
    data: &[u8],
    codes: &mut [u8],
    scales: &mut [f32],
    mins: &mut [f32],
) {
    let unpack: Unpack = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => panic!("{dtype} is not a block format"),
        DType::Q4_0 => q4_0::unpack,
        DType::Q4_1 => q4_1::unpack,
        DType::Q5_0 => q5_0::unpack,
        DType::Q5_1 => q5_1::unpack,
        DType::Q8_0 => q8_0::unpack,
        DType::Q2K => q2_k::unpack,
        DType::Q3K => q3_k::unpack,
        DType::Q4K => q4_k::unpack,
        DType::Q5K => q5_k::unpack,
        DType::Q6K => q6_k::unpack,
        DType::Iq4Nl => iq4_nl::unpack,
        DType::Iq4Xs => iq4_xs::unpack,
        DType::Mxfp4 => mxfp4::unpack,
        DType::Tq1_0 => ternary::unpack_base_3,
        DType::Tq2_0 => ternary::unpack_pairs,
    };
    let Some(view) = affine(dtype) else { return };
    let elements = elements_in(dtype, data);
    let groups = elements / view.group;
    assert_eq!(codes.len(), elements, "codes of {dtype}");
    assert_eq!(scales.len(), groups, "scales of {dtype}");

    let block_groups = dtype.block_elements() / view.group;
    let blocks = data
        .chunks_exact(dtype.block_bytes())
        .zip(codes.chunks_exact_mut(dtype.block_elements()))
        .zip(scales.chunks_exact_mut(block_groups));
    if view.has_min {
        assert_eq!(mins.len(), groups, "minimums of {dtype}");
        for (((block, codes), scales), mins) in blocks.zip(mins.chunks_exact_mut(block_groups)) {
            unpack(block, codes, scales, mins);
        }
    } else {
        for ((block, codes), scales) in blocks {
            unpack(block, codes, scales, &mut []);
        }
    }
}

/// Converts consecutive blocks to float32, with the same bits as ggml's `dequantize_row_*`
/// except for those of a NaN.
///
/// # Panics
/// Panics if `data` is not exactly the bytes of `out.len()` weights.
pub fn dequantize(dtype: DType, data: &[u8], out: &mut [f32]) {
    assert_eq!(
        dtype.bytes_for(out.len()),
        Some(data.len()),
        "bytes of {} weights of {dtype}",
        out.len()
    );
    match affine(dtype) {
        None => dequantize_floats(dtype, data, out),
        Some(view) => dequantize_blocks(dtype, view, data, out),
    }
}

fn dequantize_floats(dtype: DType, data: &[u8], out: &mut [f32]) {
    if dtype == DType::F32 {
        let (numbers, _) = data.as_chunks::<4>();
        for (out, &number) in out.iter_mut().zip(numbers) {
            *out = f32::from_le_bytes(number);
        }
        return;
    }
    let (numbers, _) = data.as_chunks::<2>();
    if dtype == DType::F16 {
        for (out, &number) in out.iter_mut().zip(numbers) {
            *out = f16::from_le_bytes(number).to_f32();
        }
    } else {
        for (out, &number) in out.iter_mut().zip(numbers) {
            *out = bf16::from_le_bytes(number).to_f32();
        }
    }
}

fn dequantize_blocks(dtype: DType, view: Affine, data: &[u8], out: &mut [f32]) {
    /// Number of weights that are unpacked at a time: the largest block.
    const CHUNK: usize = 256;
    const GROUPS: usize = CHUNK / 16;
    let bytes = CHUNK / dtype.block_elements() * dtype.block_bytes();
    let (mut codes, mut scales, mut mins) = ([0u8; CHUNK], [0f32; GROUPS], [0f32; GROUPS]);
    for (data, out) in data.chunks(bytes).zip(out.chunks_mut(CHUNK)) {
        let groups = out.len() / view.group;
        let (codes, scales) = (&mut codes[..out.len()], &mut scales[..groups]);
        let mins = &mut mins[..groups];
        unpack_row(dtype, data, codes, scales, mins);
        let weights = out.chunks_exact_mut(view.group);
        let groups = codes.chunks_exact(view.group).zip(&*scales).zip(&*mins);
        for (weights, ((codes, &scale), &min)) in weights.zip(groups) {
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = scale * (i32::from(code) - view.zero) as f32;
                if view.has_min {
                    *weight += min;
                }
            }
        }
    }
}

/// Returns the number of weights in `data`.
///
/// # Panics
/// Panics if `data` is not a whole number of blocks.
fn elements_in(dtype: DType, data: &[u8]) -> usize {
    assert!(
        data.len().is_multiple_of(dtype.block_bytes()),
        "{} bytes are not a whole number of {dtype} blocks of {} bytes",
        data.len(),
        dtype.block_bytes()
    );
    data.len() / dtype.block_bytes() * dtype.block_elements()
}

/// Reads the little-endian float16 at `offset`.
fn f16_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// Splits bytes into 4-bit codes: the low halves of all bytes, then the high halves.
fn nibbles(packed: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(packed.len());
    for ((&byte, low), high) in packed.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Sets bit 4 of each of 32 codes from the 32 bits of `high`, lowest bit first.
fn add_fifth_bits(high: &[u8], codes: &mut [u8]) {
    for (&bits, codes) in high.iter().zip(codes.chunks_exact_mut(8)) {
        for (bit, code) in codes.iter_mut().enumerate() {
            *code |= (bits >> bit & 1) << 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_a_whole_number_of_groups_and_codes_fit_their_width() {
        for dtype in DType::ALL {
            let Some(view) = affine(dtype) else {
                assert!(dtype.is_float());
                continue;
            };
            assert!(dtype.block_elements().is_multiple_of(view.group), "{dtype}");
            let groups = dtype.block_elements() / view.group;
            let (mut codes, mut scales) = (vec![0; dtype.block_elements()], vec![0.0; groups]);
            let mut mins = vec![0.0; groups];
            for byte in [0x00, 0x0f, 0xf0, 0x5a, 0xff] {
                let block = vec![byte; dtype.block_bytes()];
                unpack_row(dtype, &block, &mut codes, &mut scales, &mut mins);
                let widest = codes.iter().map(|&code| u32::from(code)).max().unwrap_or(0);
                assert!(widest < 1 << view.bits, "{dtype}: code {widest}");
            }
        }
    }

    #[test]
    fn a_row_is_its_blocks_one_after_the_other() {
        for dtype in DType::ALL {
            let weights = 2 * 256;
            let bytes = dtype.bytes_for(weights).unwrap();
            let data: Vec<u8> = (0..bytes).map(|index| (index * 37 % 53) as u8).collect();
            let mut whole = vec![0.0; weights];
            dequantize(dtype, &data, &mut whole);
            for (block, expected) in data
                .chunks_exact(dtype.block_bytes())
                .zip(whole.chunks_exact(dtype.block_elements()))
            {
                let mut alone = vec![0.0; expected.len()];
                dequantize(dtype, block, &mut alone);
                assert_eq!(alone, expected, "{dtype}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "bytes of 32 weights of Q4_0")]
    fn a_row_of_another_length_is_a_callers_mistake() {
        dequantize(DType::Q4_0, &[0; 19], &mut [0.0; 32]);
    }
}
