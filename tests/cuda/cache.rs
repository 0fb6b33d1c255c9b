//! Blocks of the CUDA device's KV cache are copied to other blocks, to host memory and back
//! without a change and in stream order, and no allocation is leaked.

use crate::layer;
use crate::layer::identity;
use common::cpu::Random;
use common::gpu::Gpu;
use common::{gpu, refusals};
use quell::internals::device::cuda::*;
use quell::internals::device::*;

const BLOCKS: usize = 6;
const BLOCK: usize = 16;
const LAYERS: usize = 3;
const HEADS: HeadShape = HeadShape {
    q_heads: 2,
    kv_heads: 1,
    head_dim: 16,
    values: Values::BesideKeys,
};

fn device() -> CudaDevice {
    CudaDevice::new(&CudaOptions::default()).unwrap()
}

fn shape() -> CacheShape {
    CacheShape {
        layers: LAYERS,
        kv_heads: HEADS.kv_heads,
        head_dim: HEADS.head_dim,
        blocks: BLOCKS,
        block_tokens: BLOCK,
        values: Values::BesideKeys,
    }
}

/// Creates a cache whose blocks all differ, in every layer.
fn filled(device: &mut CudaDevice) -> CudaCache {
    let limits = DeviceLimits {
        rows: BLOCKS * BLOCK,
        ..layer::limits(BLOCK)
    };
    device.reserve(&limits).unwrap();
    let mut cache = device.allocate_cache(&shape()).unwrap();
    let rope = device.load_rope(&identity(BLOCKS * BLOCK)).unwrap();
    let mut random = Random::new(71);
    let rows = BLOCKS * BLOCK;
    let mut batch = Batch::new(1);
    batch.push(&vec![0; rows], 0, BLOCK, [(0, 0..BLOCKS as u32)]);
    for layer in 0..LAYERS {
        let columns = HEADS.qkv_columns();
        let values = random.numbers(rows * columns);
        let mut qkv = device
            .tensor(columns, Precision::Activation, &values)
            .unwrap();
        assert_eq!(device.stage(&batch).unwrap(), Staged::Enqueue);
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
        device.finish(Ok(())).unwrap();
    }
    let blocks = blocks(device, &cache);
    for (i, one) in blocks.iter().enumerate() {
        assert!(
            !blocks[..i].contains(one),
            "the contents of block {i} are not unique"
        );
    }
    cache
}

/// Reads the keys and values of a block, in all layers.
fn block(device: &CudaDevice, cache: &CudaCache, block: usize) -> Vec<u16> {
    let read = |layer| {
        let (keys, values) = cache.read(device, layer, block).unwrap();
        [keys, values].concat()
    };
    (0..LAYERS).flat_map(read).collect()
}

fn blocks(device: &CudaDevice, cache: &CudaCache) -> Vec<Vec<u16>> {
    (0..BLOCKS).map(|i| block(device, cache, i)).collect()
}

fn poison_all(device: &mut CudaDevice, cache: &mut CudaCache) {
    let all: Vec<u32> = (0..BLOCKS as u32).collect();
    device.poison(cache, &all).unwrap();
}

#[test]
fn swapped_blocks_are_restored_in_every_layer() {
    let gpu = gpu::lock();
    for schedule in ["", "shuffle:1", "shuffle:2", "shuffle:3"] {
        if !gpu::is_real() && !schedule.is_empty() {
            gpu.set("schedule", schedule);
        }
        let mut device = device();
        let mut cache = filled(&mut device);
        let before = blocks(&device, &cache);
        let mut host = device.allocate_host_blocks(&shape(), 4).unwrap();
        let out = [[0, 3], [2, 0], [5, 1]];
        device.swap_out(&cache, &mut host, &out).unwrap();
        poison_all(&mut device, &mut cache);
        let back = [[3, 4], [0, 2], [1, 1]];
        device.swap_in(&mut cache, &host, &back).unwrap();
        let after = blocks(&device, &cache);
        assert_eq!(
            [&after[4], &after[2], &after[1]],
            [&before[0], &before[2], &before[5]]
        );
        assert!(after[0] != before[0] && after[3] != before[3]);
    }
}

#[test]
fn a_slot_may_be_reused_while_its_copy_is_in_flight() {
    let gpu = gpu::lock();
    for schedule in ["", "shuffle:4", "shuffle:5"] {
        if !gpu::is_real() && !schedule.is_empty() {
            gpu.set("schedule", schedule);
        }
        let mut device = device();
        let mut cache = filled(&mut device);
        let before = blocks(&device, &cache);
        let mut host = device.allocate_host_blocks(&shape(), 1).unwrap();
        let waits = (!gpu::is_real()).then(|| gpu.statistic("synchronisations"));
        // Pass three blocks through one slot without waiting in between.
        for [from, to] in [[0, 5], [1, 4], [2, 3]] {
            device.swap_out(&cache, &mut host, &[[from, 0]]).unwrap();
            device.poison(&mut cache, &[from]).unwrap();
            device.swap_in(&mut cache, &host, &[[0, to]]).unwrap();
        }
        if let Some(waits) = waits {
            assert_eq!(gpu.statistic("synchronisations"), waits);
        }
        let after = blocks(&device, &cache);
        assert_eq!(
            [&after[5], &after[4], &after[3]],
            [&before[0], &before[1], &before[2]]
        );
    }
}

#[test]
fn copies_and_swaps_run_in_stream_order() {
    let _gpu = gpu::lock();
    let mut device = device();
    let mut cache = filled(&mut device);
    let before = blocks(&device, &cache);
    let mut host = device.allocate_host_blocks(&shape(), 2).unwrap();
    device.swap_out(&cache, &mut host, &[[1, 1]]).unwrap();
    device.copy_blocks(&mut cache, &[[0, 1], [3, 2]]).unwrap();
    device.swap_in(&mut cache, &host, &[[1, 0]]).unwrap();
    device.copy_blocks(&mut cache, &[]).unwrap();
    let after = blocks(&device, &cache);
    assert_eq!(
        [&after[0], &after[1], &after[2], &after[3]],
        [&before[1], &before[0], &before[3], &before[3]]
    );
}

#[test]
fn transfers_of_nonexistent_blocks_and_slots_are_refused() {
    let _gpu = gpu::lock();
    let mut device = device();
    let mut cache = filled(&mut device);
    let before = blocks(&device, &cache);
    refusals::blocks_and_slots_that_do_not_exist(&mut device, &mut cache, &shape());
    assert!(blocks(&device, &cache) == before);
}

/// Returns the number of pinned allocations so far.
fn pinned(gpu: &Gpu) -> u64 {
    let calls = gpu.calls();
    let of = |call: &&(String, u64)| call.0 == "cuMemHostAlloc";
    calls.iter().find(of).map_or(0, |call| call.1)
}

#[test]
fn host_memory_is_pinned_when_written_and_released() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let mut device = device();
    let cache = filled(&mut device);
    let before = pinned(&gpu);
    // A terabyte, which no machine has as pinned memory.
    let slots = (1 << 40)
        / device.cache_bytes(&CacheShape {
            blocks: 1,
            ..shape()
        });
    let mut host = device.allocate_host_blocks(&shape(), slots).unwrap();
    assert_eq!(pinned(&gpu), before);
    let last = slots as u32 - 1;
    let pairs = [[0, 0], [1, 1], [2, last]];
    device.swap_out(&cache, &mut host, &pairs).unwrap();
    device.swap_out(&cache, &mut host, &pairs).unwrap();
    assert_eq!(
        pinned(&gpu),
        before + 2,
        "a chunk for the first, one for the last"
    );
    // The copies are still in flight.
    drop((host, cache, device));
    assert_eq!(gpu.leaks(), [""; 0]);
}

#[test]
fn a_failed_driver_call_fails_only_its_swap() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    for (function, nth, code) in [
        ("cuMemHostAlloc", 1, 2),
        ("cuMemcpyDtoHAsync_v2", 3, 1),
        ("cuMemcpyHtoDAsync_v2", 2, 1),
    ] {
        let mut device = device();
        let mut cache = filled(&mut device);
        let before = blocks(&device, &cache);
        let mut host = device.allocate_host_blocks(&shape(), 2).unwrap();
        gpu.fail(function, nth, code);
        let mut there_and_back = |device: &mut CudaDevice| {
            device.swap_out(&cache, &mut host, &[[0, 1]])?;
            device.swap_in(&mut cache, &host, &[[1, 3]])
        };
        let error = there_and_back(&mut device).unwrap_err();
        match code {
            2 => assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}"),
            _ => assert!(matches!(error, DeviceError::Failed { .. }), "{error}"),
        }
        assert_eq!(gpu.waiting_failures(), 0);
        there_and_back(&mut device).unwrap();
        assert!(block(&device, &cache, 3) == before[0]);
        drop((host, cache, device));
        assert_eq!(gpu.leaks(), [""; 0]);
    }
}
