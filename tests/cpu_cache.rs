//! Blocks of the CPU device's KV cache are copied to other blocks, to host memory and back
//! without a change. Host memory is committed only when it is written.

use common::cpu::{Random, tensor};
#[cfg(target_os = "linux")]
use common::process;
use common::refusals;
use quell::internals::device::cpu::*;
use quell::internals::device::*;

const BLOCKS: usize = 6;
const LAYERS: usize = 3;
const HEADS: HeadShape = HeadShape {
    q_heads: 2,
    kv_heads: 2,
    head_dim: 24,
    values: Values::BesideKeys,
};

fn shape(block_tokens: usize) -> CacheShape {
    CacheShape {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        head_dim: HEADS.head_dim,
        blocks: BLOCKS,
        block_tokens,
        values: Values::BesideKeys,
    }
}

/// Creates a device with a cache whose blocks all differ, in every layer.
fn filled(kv: KvType, block_tokens: usize) -> (CpuDevice, CpuCache) {
    let mut device = CpuDevice::new(&CpuOptions {
        threads: Some(2),
        kv,
        ..CpuOptions::default()
    })
    .unwrap();
    let mut cache = device.allocate_cache(&shape(block_tokens)).unwrap();
    let rows = BLOCKS * block_tokens;
    let rope = RopeSpec {
        inverse_frequencies: vec![0.0; 2],
        magnitude: 1.0,
        max_positions: rows,
    };
    let rope = device.load_rope(&rope).unwrap();
    let mut batch = Batch::new(1);
    batch.push(&vec![0; rows], 0, block_tokens, [(0, 0..BLOCKS as u32)]);
    let mut random = Random::new(81);
    for layer in 0..LAYERS {
        let columns = HEADS.qkv_columns();
        let values = random.numbers(rows * columns);
        let mut qkv = tensor(&mut device, columns, &values);
        device.stage(&batch).unwrap();
        device
            .rope_store(
                &mut qkv,
                HEADS,
                None,
                &rope,
                &mut cache,
                CacheLayer::single_group(layer),
            )
            .unwrap();
    }
    let blocks = blocks(&cache);
    for (i, one) in blocks.iter().enumerate() {
        assert!(
            !blocks[..i].contains(one),
            "the contents of block {i} are not unique"
        );
    }
    (device, cache)
}

/// Returns the bytes of every block, in all layers.
fn blocks(cache: &CpuCache) -> Vec<Vec<u8>> {
    let block = |block| (0..LAYERS).flat_map(move |layer| cache.read(layer, block).unwrap());
    (0..BLOCKS).map(|i| block(i).copied().collect()).collect()
}

fn kinds() -> [(KvType, usize); 3] {
    [(KvType::F16, 16), (KvType::F32, 16), (KvType::F16, 48)]
}

#[test]
fn swapped_blocks_are_restored_in_every_layer() {
    for (kv, block_tokens) in kinds() {
        let (mut device, mut cache) = filled(kv, block_tokens);
        let before = blocks(&cache);
        let mut host = device
            .allocate_host_blocks(&shape(block_tokens), 4)
            .unwrap();
        let out = [[0, 3], [2, 0], [5, 1]];
        device.swap_out(&cache, &mut host, &out).unwrap();
        let all: Vec<u32> = (0..BLOCKS as u32).collect();
        device.poison(&mut cache, &all).unwrap();
        let back = [[3, 4], [0, 2], [1, 1]];
        device.swap_in(&mut cache, &host, &back).unwrap();
        let after = blocks(&cache);
        assert!(after[4] == before[0] && after[2] == before[2] && after[1] == before[5]);
        assert!(after[0] != before[0] && after[3] != before[3]);
        // Swapping out to a slot again overwrites it.
        device.swap_out(&cache, &mut host, &[[1, 3]]).unwrap();
        device.swap_in(&mut cache, &host, &[[3, 0]]).unwrap();
        assert!(blocks(&cache)[0] == before[5]);
    }
}

#[test]
fn copied_blocks_are_equal_in_every_layer_and_no_other_changes() {
    for (kv, block_tokens) in kinds() {
        let (mut device, mut cache) = filled(kv, block_tokens);
        let mut expected = blocks(&cache);
        device
            .copy_blocks(&mut cache, &[[4, 0], [4, 5], [1, 2]])
            .unwrap();
        expected[0] = expected[4].clone();
        expected[5] = expected[4].clone();
        expected[2] = expected[1].clone();
        assert!(blocks(&cache) == expected);
    }
}

#[test]
fn transfers_of_nonexistent_blocks_and_slots_are_refused() {
    let (mut device, mut cache) = filled(KvType::F16, 16);
    let before = blocks(&cache);
    refusals::blocks_and_slots_that_do_not_exist(&mut device, &mut cache, &shape(16));
    assert!(blocks(&cache) == before);
}

#[test]
fn a_failed_host_allocation_is_an_error() {
    let (mut device, _) = filled(KvType::F16, 16);
    let error = device.allocate_host_blocks(&shape(16), 1 << 50).err();
    assert!(matches!(error, Some(DeviceError::OutOfMemory { .. })));
}

#[test]
#[cfg(target_os = "linux")]
fn host_memory_is_committed_only_when_written() {
    let (mut device, cache) = filled(KvType::F16, 16);
    let block = device.cache_bytes(&CacheShape {
        blocks: 1,
        ..shape(16)
    });
    let slots = (1 << 30) / block;
    let before = process::memory("VmRSS");
    let mut host = device.allocate_host_blocks(&shape(16), slots).unwrap();
    let pairs = [[0, 0], [1, slots as u32 - 1]];
    device.swap_out(&cache, &mut host, &pairs).unwrap();
    let grown = process::memory("VmRSS").saturating_sub(before);
    assert!(grown < 1 << 28, "{grown} bytes for {} of 1 GiB", 2 * block);
}
