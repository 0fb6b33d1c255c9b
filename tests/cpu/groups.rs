//! Attention of layers in several groups on the CPU device.

use crate::attention::{assert_near, heads, options, reference, rope_spec};
use common::cpu::*;
use common::groups::*;
use common::model_groups::a_model_has_the_same_bits_in_groups;
use quell::internals::device::cpu::CpuDevice;
use quell::internals::device::*;
use quell::{KvType, SimdLevel};

#[test]
fn late_tables_change_no_bit_of_any_group() {
    let mut random = Random::new(51);
    let identity = RopeSpec {
        inverse_frequencies: vec![0.0; 2],
        magnitude: 1.0,
        ..rope_spec(4)
    };
    for (kv, threads, tolerance) in [(KvType::F32, 1, 2e-5), (KvType::F16, 3, 4e-3)] {
        for (heads, block_tokens) in [(heads(4, 2, 16), 16), (heads(3, 1, 40), 48)] {
            let mut device = || CpuDevice::new(&options(SimdLevel::Auto, threads, kv)).unwrap();
            let check = |spec: &AttentionSpec, qkv: &[f32], found: &[f32]| {
                let expected = reference(spec, &identity, None, qkv);
                assert_near(found, &expected, tolerance, &format!("{spec:?} {kv:?}"));
            };
            let mut numbers = |count| random.numbers(count);
            late_tables_change_no_bit(&mut device, heads, block_tokens, &mut numbers, &check);
        }
    }
}

#[test]
fn chunk_sizes_change_no_bit_of_any_group() {
    let mut random = Random::new(52);
    for level in levels() {
        for kv in [KvType::F32, KvType::F16] {
            let mut device = || CpuDevice::new(&options(level, 2, kv)).unwrap();
            let mut numbers = |count| random.numbers(count);
            chunk_sizes_change_no_bit(&mut device, heads(4, 2, 16), &mut numbers);
        }
    }
}

#[test]
fn missing_blocks_and_groups_are_refused() {
    let options = options(SimdLevel::Auto, 1, KvType::Auto);
    common::groups::missing_blocks_and_groups_are_refused(
        CpuDevice::new(&options).unwrap(),
        heads(4, 2, 16),
    );
}

#[test]
fn models_have_the_same_bits_in_groups() {
    for (name, windows) in [
        ("gemma2", true),
        ("gemma3", true),
        ("gemma3n", true),
        // Caches of two sizes, some of which layers share.
        ("gemma4", true),
        ("gpt-oss", true),
        ("mistral", true),
        ("phi3", false),
    ] {
        for level in levels() {
            let mut device = || CpuDevice::new(&options(level, 2, KvType::Auto)).unwrap();
            a_model_has_the_same_bits_in_groups(&mut device, name, windows);
        }
    }
}
