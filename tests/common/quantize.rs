//! Quantises float32 weights for test models, as ggml does.

use half::f16;
use quell::internals::weights::DType;

/// Encodes `weights` as blocks of `dtype`: a floating-point format, Q4_0, Q4_1 or Q8_0.
pub fn quantize(dtype: DType, weights: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
        DType::F16 => {
            let weights = weights.iter().map(|&w| f16::from_f32(w));
            weights.flat_map(f16::to_le_bytes).collect()
        }
        DType::BF16 => {
            let weights = weights.iter().map(|&w| half::bf16::from_f32(w));
            weights.flat_map(half::bf16::to_le_bytes).collect()
        }
        DType::Q4_0 => blocks(weights, q4_0),
        DType::Q4_1 => blocks(weights, q4_1),
        DType::Q8_0 => blocks(weights, q8_0),
        other => panic!("tests do not quantise to {other}"),
    }
}

fn blocks(weights: &[f32], block: fn(&[f32; 32]) -> Vec<u8>) -> Vec<u8> {
    let (blocks, rest) = weights.as_chunks();
    assert!(rest.is_empty(), "{} weights", weights.len());
    blocks.iter().flat_map(block).collect()
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Packs 32 four-bit codes: the first 16 in the low halves of the bytes, the others in the high
/// halves.
fn nibbles(codes: [u8; 32]) -> impl Iterator<Item = u8> {
    (0..16).map(move |index| codes[index].min(15) | codes[index + 16].min(15) << 4)
}

fn q4_0(weights: &[f32; 32]) -> Vec<u8> {
    let largest = weights.iter().fold(0.0f32, |largest, &weight| {
        if weight.abs() > largest.abs() {
            weight
        } else {
            largest
        }
    });
    let scale = largest / -8.0;
    let inverse = inverse(scale);
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    block.extend(nibbles(
        weights.map(|weight| (weight * inverse + 8.5) as u8),
    ));
    block
}

fn q4_1(weights: &[f32; 32]) -> Vec<u8> {
    let min = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (max - min) / 15.0;
    let inverse = inverse(scale);
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    block.extend(f16::from_f32(min).to_le_bytes());
    block.extend(nibbles(
        weights.map(|weight| ((weight - min) * inverse + 0.5) as u8),
    ));
    block
}

fn q8_0(weights: &[f32; 32]) -> Vec<u8> {
    let largest = weights
        .iter()
        .fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    let scale = largest / 127.0;
    let inverse = inverse(scale);
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    block.extend(
        weights
            .iter()
            .map(|weight| (weight * inverse).round() as i8 as u8),
    );
    block
}
