//! Finds weights that are NaN or infinite, without unpacking them.

use super::{DType, mxfp4};
use half::f16;

/// Numbers that are checked together. Only a run with a non-finite number is searched for
/// the first one.
const RUN: usize = 1024;

/// Returns the index of the first weight that is NaN or infinite, or `None` if all are
/// finite. In a block format, this is the first weight of a block with a non-finite scale
/// or minimum.
///
/// Bytes after the last whole block of `dtype` are ignored.
pub fn first_not_finite(dtype: DType, data: &[u8]) -> Option<usize> {
    let halves: &[usize] = match dtype {
        DType::F32 => return first(data, |number| u32::from_le_bytes(number) << 1 >= 0xff << 24),
        DType::BF16 => return first(data, |number| u16::from_le_bytes(number) << 1 >= 0xff << 8),
        DType::F16 => return first(data, |number| u16::from_le_bytes(number) << 1 >= 0x1f << 11),
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::Iq4Nl | DType::Iq4Xs => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        DType::Tq1_0 => &[52],
        DType::Tq2_0 => &[64],
        // Exponents beyond those of float16 count as infinite.
        DType::Mxfp4 => {
            let mut blocks = data.chunks_exact(dtype.block_bytes());
            let block = blocks.position(|block| block[0] > mxfp4::LARGEST_EXPONENT);
            return block.map(|block| block * dtype.block_elements());
        }
    };
    let mut blocks = data.chunks_exact(dtype.block_bytes());
    let block = blocks.position(|block| {
        let mut halves = halves.iter();
        halves.any(|&at| !f16::from_le_bytes([block[at], block[at + 1]]).is_finite())
    });
    block.map(|block| block * dtype.block_elements())
}

fn first<const BYTES: usize>(
    data: &[u8],
    is_bad: impl Fn([u8; BYTES]) -> bool + Copy,
) -> Option<usize> {
    let (numbers, _) = data.as_chunks::<BYTES>();
    // The compiler vectorises a loop that has no early exit.
    let mut runs = numbers.chunks(RUN);
    let run = runs.position(|run| run.iter().fold(false, |any, &number| any | is_bad(number)))?;
    let rest = numbers[run * RUN..].iter();
    let index = rest.copied().position(is_bad)?;
    Some(run * RUN + index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn numbers_that_are_not_finite_are_found_where_they_are() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 7, 1023, 1024, 2999] {
                let mut numbers = vec![f32::MAX; 3000];
                numbers[at + 1..].fill(-0.0);
                numbers[at] = bad;
                let bytes = |each: &dyn Fn(f32) -> Vec<u8>| -> Vec<u8> {
                    numbers.iter().flat_map(|&number| each(number)).collect()
                };
                let full = bytes(&|number| number.to_le_bytes().to_vec());
                // The largest float32 is not finite in bfloat16.
                let brain = bytes(&|number| {
                    bf16::from_f32(number.clamp(-3e38, 3e38))
                        .to_le_bytes()
                        .to_vec()
                });
                let half = bytes(&|number| f16::from_f32(number / 1e34).to_le_bytes().to_vec());
                assert_eq!(first_not_finite(DType::F32, &full), Some(at));
                assert_eq!(first_not_finite(DType::F16, &half), Some(at));
                let expected = bad.is_nan().then_some(at);
                assert_eq!(first_not_finite(DType::BF16, &brain), expected);
            }
        }
        let infinite = bf16::INFINITY.to_le_bytes();
        assert_eq!(first_not_finite(DType::BF16, &infinite), Some(0));
        assert_eq!(first_not_finite(DType::F32, &[]), None);
    }

    #[test]
    fn a_scale_or_a_minimum_that_is_not_finite_spoils_its_block_only() {
        let has_halves = |dtype: &DType| !dtype.is_float() && *dtype != DType::Mxfp4;
        for dtype in DType::ALL.into_iter().filter(has_halves) {
            let (bytes, elements) = (dtype.block_bytes(), dtype.block_elements());
            assert_eq!(
                first_not_finite(dtype, &vec![0; 3 * bytes]),
                None,
                "{dtype}"
            );
            let mut spoiled = 0;
            for at in 0..bytes - 1 {
                let mut data = vec![0; 3 * bytes];
                data[bytes + at..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
                let mut weights = vec![0.0; 3 * elements];
                super::super::dequantize(dtype, &data, &mut weights);
                let expected = weights.iter().any(|weight| !weight.is_finite());
                let expected = expected.then_some(elements);
                assert_eq!(first_not_finite(dtype, &data), expected, "{dtype} at {at}");
                spoiled += usize::from(expected.is_some());
            }
            assert!(spoiled > 0, "{dtype}");
        }
    }

    #[test]
    fn an_exponent_beyond_float16_spoils_its_block() {
        let mut data = vec![143; 3 * 17];
        assert_eq!(first_not_finite(DType::Mxfp4, &data), None);
        data[17] = 144;
        assert_eq!(first_not_finite(DType::Mxfp4, &data), Some(32));
    }
}
