//! Layers with different heads in one cache, and layers that attend to the cache of another one,
//! give the same bits as in a cache of their own.

use crate::layer::{TYPES, device, identity, kept, limits};
use common::cpu::{Random, bits};
use common::gpu;
use common::model_groups::chunks_change_no_bit_of_a_model;
use quell::CudaActivations;
use quell::internals::device::cuda::{CudaCache, CudaDevice, CudaTensor};
use quell::internals::device::*;
use std::ops::Range;

const BLOCK: usize = 16;
const TABLE: [u32; 4] = [3, 0, 4, 1];

fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape {
        q_heads,
        kv_heads,
        head_dim,
        values: Values::BesideKeys,
    }
}

/// The heads of layers, and their places: a large one, and two small ones in one place.
fn layers() -> [(HeadShape, CacheLayer); 3] {
    let place = |index, part| CacheLayer {
        group: 0,
        index,
        part,
    };
    [
        (heads(3, 1, 512), place(0, 0)),
        (heads(4, 2, 128), place(1, 0)),
        (heads(2, 1, 256), place(1, 1)),
    ]
}

fn cache(device: &mut CudaDevice, layers: usize, heads: HeadShape) -> CudaCache {
    let shape = CacheShape {
        layers,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        values: Values::BesideKeys,
        blocks: 5,
        block_tokens: BLOCK,
    };
    let mut cache = device.allocate_cache(&shape).unwrap();
    device.poison(&mut cache, &[0, 1, 2, 3, 4]).unwrap();
    cache
}

fn spec(heads: HeadShape) -> AttentionSpec {
    AttentionSpec {
        heads,
        scale: 0.3,
        window: None,
        causal: true,
        chunked: false,
        softcap: None,
    }
}

/// The rows of a layer in a step, its place, and its results.
struct Operands {
    heads: HeadShape,
    place: CacheLayer,
    qkv: CudaTensor,
    out: CudaTensor,
}

/// Computes the tokens `range` in layers of one cache: all store their keys and values before any
/// attends, in a decode step as well.
fn step(
    device: &mut CudaDevice,
    cache: &mut CudaCache,
    layers: &[(HeadShape, CacheLayer)],
    rows: &[Vec<f32>],
    range: Range<usize>,
) -> Vec<Vec<f32>> {
    let mut batch = Batch::new(1);
    let table = TABLE[..range.end.div_ceil(BLOCK)].iter().copied();
    batch.push(&vec![0; range.len()], range.start, BLOCK, [(0, table)]);
    let rope = device.load_rope(&identity(64)).unwrap();
    let mut operands: Vec<Operands> = layers
        .iter()
        .zip(rows)
        .map(|(&(heads, place), rows)| {
            let columns = heads.qkv_columns();
            let rows = &rows[range.start * columns..range.end * columns];
            let count = range.len() * heads.q_columns();
            let mut tensor = |columns, values: &[f32]| {
                let precision = Precision::Activation;
                device.tensor(columns, precision, values).unwrap()
            };
            Operands {
                heads,
                place,
                qkv: tensor(columns, rows),
                out: tensor(heads.q_columns(), &vec![f32::NAN; count]),
            }
        })
        .collect();
    assert_eq!(device.stage(&batch).unwrap(), Staged::Enqueue);
    for own in &mut operands {
        device
            .rope_store(&mut own.qkv, own.heads, None, &rope, cache, own.place)
            .unwrap();
    }
    for own in &mut operands {
        let spec = spec(own.heads);
        device
            .attend(&own.qkv, &spec, None, cache, own.place, &mut own.out)
            .unwrap();
    }
    device.finish(Ok(())).unwrap();
    let outs = operands.iter();
    outs.map(|own| device.values(&own.out, range.len()).unwrap())
        .collect()
}

#[test]
fn layers_of_different_heads_share_blocks_without_changing_a_bit() {
    let _gpu = gpu::lock();
    let mut random = Random::new(71);
    for kind in TYPES {
        let mut device = device(kind);
        device.reserve(&limits(BLOCK)).unwrap();
        let rows: Vec<Vec<f32>> = layers()
            .iter()
            .map(|(heads, _)| {
                let numbers = random.numbers(50 * heads.qkv_columns()).into_iter();
                numbers.map(|value| kept(kind, value)).collect()
            })
            .collect();
        let mut together = cache(&mut device, 2, layers()[0].0);
        let mut own = layers().map(|(heads, _)| cache(&mut device, 1, heads));
        for range in [0..33, 33..34, 34..50] {
            let found = step(&mut device, &mut together, &layers(), &rows, range.clone());
            for (layer, (heads, _)) in layers().into_iter().enumerate() {
                let alone = [(heads, CacheLayer::single_group(0))];
                let rows = &rows[layer..layer + 1];
                let cache = &mut own[layer];
                let expected = step(&mut device, cache, &alone, rows, range.clone());
                assert!(expected[0].iter().all(|value| value.is_finite()));
                assert!(
                    bits(&found[layer]) == bits(&expected[0]),
                    "{kind:?}, layer {layer}, tokens {range:?}"
                );
            }
        }
        // A layer beyond the room of its place is refused.
        let (small, place) = layers()[1];
        for part in [2, usize::MAX] {
            let beyond = CacheLayer { part, ..place };
            let mut out = device
                .allocate(16, small.q_columns(), Precision::Activation)
                .unwrap();
            let qkv = device
                .allocate(16, small.qkv_columns(), Precision::Activation)
                .unwrap();
            let attended = device.attend(&qkv, &spec(small), None, &together, beyond, &mut out);
            assert!(matches!(attended, Err(DeviceError::Failed { .. })));
        }
    }
}

#[test]
fn queries_alone_attend_to_the_cache_of_another_layer() {
    let _gpu = gpu::lock();
    let mut random = Random::new(72);
    let kind = CudaActivations::F16;
    let mut device = device(kind);
    device.reserve(&limits(BLOCK)).unwrap();
    for heads in [heads(4, 2, 64), heads(3, 1, 512)] {
        let (columns, q_columns) = (heads.qkv_columns(), heads.q_columns());
        let numbers = random.numbers(40 * columns).into_iter();
        let rows: Vec<f32> = numbers.map(|value| kept(kind, value)).collect();
        let layer = [(heads, CacheLayer::single_group(0))];
        let mut cache = cache(&mut device, 1, heads);
        for range in [0..39, 39..40] {
            let all = [rows.clone()];
            let expected = step(&mut device, &mut cache, &layer, &all, range.clone());
            let mut batch = Batch::new(1);
            let table = TABLE[..range.end.div_ceil(BLOCK)].iter().copied();
            batch.push(&vec![0; range.len()], range.start, BLOCK, [(0, table)]);
            let queries = rows.chunks(columns).map(|row| row[..q_columns].to_vec());
            let queries: Vec<f32> = queries.collect::<Vec<_>>()[range.clone()].concat();
            let precision = Precision::Activation;
            let queries = device.tensor(q_columns, precision, &queries).unwrap();
            let mut out = device.allocate(range.len(), q_columns, precision).unwrap();
            assert_eq!(device.stage(&batch).unwrap(), Staged::Enqueue);
            let place = layer[0].1;
            device
                .attend(&queries, &spec(heads), None, &cache, place, &mut out)
                .unwrap();
            device.finish(Ok(())).unwrap();
            let found = device.values(&out, range.len()).unwrap();
            assert!(bits(&found) == bits(&expected[0]), "{heads:?} {range:?}");
        }
    }
}

#[test]
fn heads_without_a_kernel_are_refused_when_a_layer_is_loaded() {
    let _gpu = gpu::lock();
    let device = device(CudaActivations::F16);
    device.check_heads(heads(8, 1, 512), true).unwrap();
    let both = device.check_heads(heads(8, 1, 128), false).unwrap_err();
    assert!(both.to_string().contains("both directions"), "{both}");
    let refused = device.check_heads(heads(8, 1, 320), true).unwrap_err();
    assert!(matches!(refused, DeviceError::Unsupported { .. }));
}

#[test]
fn chunks_and_replayed_steps_give_a_model_the_same_bits() {
    let gpu = gpu::lock();
    for name in ["gemma4", "gemma4-moe", "gemma3n"] {
        let before = gpu.statistic("graph_launches");
        chunks_change_no_bit_of_a_model(&mut || device(CudaActivations::F16), name);
        if !gpu::is_real() {
            let replayed = gpu.statistic("graph_launches") - before;
            assert!(replayed > 10, "{name}: {replayed} steps were replayed");
        }
    }
}
