//! Writes integers with scales as blocks of Q4_0, Q5_0 or Q8_0.

use super::DType;
use half::f16;

/// Number of weights per block.
const BLOCK: usize = 32;

/// Writes a row of integers to `out`. Each `group` of them, a multiple of 32, has a scale, which
/// must be a float16 number.
///
/// # Panics
/// Panics if `dtype` is another one, or if the lengths do not fit.
pub fn write(dtype: DType, integers: &[i16], scales: &[f32], group: usize, out: &mut [u8]) {
    let blocks = integers
        .chunks_exact(BLOCK)
        .zip(out.chunks_exact_mut(dtype.block_bytes()));
    for (index, (integers, block)) in blocks.enumerate() {
        let scale = f16::from_f32(scales[index * BLOCK / group]);
        block[..2].copy_from_slice(&scale.to_le_bytes());
        match dtype {
            DType::Q4_0 => write_nibbles(integers, 8, &mut block[2..]),
            DType::Q5_0 => {
                let fifth = |bits: u32, (place, integer): (usize, &i16)| {
                    bits | u32::from(integer + 16 >= 16) << place
                };
                let high = integers.iter().enumerate().fold(0, fifth);
                block[2..6].copy_from_slice(&high.to_le_bytes());
                write_nibbles(integers, 16, &mut block[6..]);
            }
            DType::Q8_0 => {
                for (to, &integer) in block[2..].iter_mut().zip(integers) {
                    *to = integer as i8 as u8;
                }
            }
            other => panic!("{other} is not written from integers"),
        }
    }
}

/// Writes the low four bits of 32 integers, to each of which `zero` is added: the first half in the
/// low halves of the bytes.
fn write_nibbles(integers: &[i16], zero: i16, out: &mut [u8]) {
    let code = |integer: i16| (integer + zero) as u8 & 15;
    for (index, to) in out.iter_mut().enumerate() {
        *to = code(integers[index]) | code(integers[index + BLOCK / 2]) << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::quant::dequantize;

    #[test]
    fn integers_come_back_exactly() {
        for (dtype, least, most) in [
            (DType::Q4_0, -8, 7),
            (DType::Q5_0, -16, 15),
            (DType::Q8_0, -128, 127),
        ] {
            let count = most - least + 1;
            let integers: Vec<i16> = (0..256).map(|i| least + i * 7 % count).collect();
            let scales = [0.5, -0.25, 3.0 / 1024.0, 6.0e-8];
            let mut bytes = vec![0; dtype.bytes_for(256).unwrap()];
            write(dtype, &integers, &scales, 64, &mut bytes);
            let mut found = vec![0.0; 256];
            dequantize(dtype, &bytes, &mut found);
            for (place, (found, &integer)) in found.into_iter().zip(&integers).enumerate() {
                let scale = f16::from_f32(scales[place / 64]).to_f32();
                assert_eq!(found, scale * f32::from(integer), "{dtype} {place}");
            }
        }
    }
}
