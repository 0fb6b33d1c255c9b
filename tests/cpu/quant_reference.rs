//! Dequantised blocks are bit-identical to those of ggml's reference.
//!
//! Each fixture holds blocks of random bytes with finite float16 scales, followed by the
//! float32 weights that `gguf.quants.dequantize` computes for them (gguf-py 0.19; `generate.py`
//! next to the fixtures). `QUELL_QUANT_FIXTURES` names another folder of such files to compare
//! with.

use quell::internals::weights::DType;
use quell::internals::weights::quant::{affine, dequantize, unpack_row};

struct Fixture {
    blocks: Vec<u8>,
    weights: Vec<f32>,
}

fn fixture(dtype: DType) -> Fixture {
    let chosen = std::env::var_os("QUELL_QUANT_FIXTURES");
    let folder = common::root().join(chosen.unwrap_or("tests/fixtures/quant".into()));
    let path = folder.join(format!("{dtype}.bin"));
    let mut blocks = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let block = dtype.block_bytes() + 4 * dtype.block_elements();
    assert!(blocks.len().is_multiple_of(block), "{path:?}");
    let weights = blocks.split_off(blocks.len() / block * dtype.block_bytes());
    let (weights, _) = weights.as_chunks();
    Fixture {
        blocks,
        weights: weights.iter().copied().map(f32::from_le_bytes).collect(),
    }
}

fn assert_same_bits(dtype: DType, found: &[f32], expected: &[f32]) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{dtype}: weight {index} is {found:?}, not {expected:?}"
        );
    }
}

#[test]
fn dequantised_weights_have_the_reference_bits() {
    for dtype in DType::ALL {
        let Fixture { blocks, weights } = fixture(dtype);
        let mut found = vec![0.0; weights.len()];
        dequantize(dtype, &blocks, &mut found);
        assert_same_bits(dtype, &found, &weights);
    }
}

#[test]
fn unpacked_codes_and_scales_give_the_reference_weights() {
    for dtype in DType::ALL {
        let Some(view) = affine(dtype) else { continue };
        let Fixture { blocks, weights } = fixture(dtype);
        let groups = weights.len() / view.group;
        let (mut codes, mut scales) = (vec![0; weights.len()], vec![0.0; groups]);
        let mut mins = vec![0.0; if view.has_min { groups } else { 0 }];
        unpack_row(dtype, &blocks, &mut codes, &mut scales, &mut mins);
        let found: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(index, &code)| {
                let weight = scales[index / view.group] * (i32::from(code) - view.zero) as f32;
                match mins.get(index / view.group) {
                    Some(min) => weight + min,
                    None => weight,
                }
            })
            .collect();
        assert_same_bits(dtype, &found, &weights);
        if view.native_f16_scales {
            for number in scales.iter().chain(&mins) {
                let stored = half::f16::from_f32(*number).to_f32();
                assert_eq!(stored.to_bits(), number.to_bits(), "{dtype}");
            }
        }
    }
}
