//! RoPE with the write into the KV cache, and attention over the cache.

use crate::bench::{Bench, values};
use crate::report::Work;
use crate::shapes::{BLOCK, Shape};
use quell::internals::device::cuda::{CudaCache, CudaRope};
use quell::internals::device::*;

/// A KV cache of one or more layers whose sequences are full of random keys and values.
struct Filled {
    cache: CudaCache,
    rope: CudaRope,
    layers: usize,
    spec: AttentionSpec,
}

pub fn run(bench: &mut Bench, shape: &Shape) -> Result<(), DeviceError> {
    for &(sequences, cached) in shape.decodes {
        if bench.wants("attend decode") {
            decode(bench, shape, sequences, cached)?;
        }
    }
    for &(new, cached) in shape.prefills {
        if bench.wants("attend prefill") || bench.wants("rope_store") {
            prefill(bench, shape, new, cached)?;
        }
    }
    Ok(())
}

/// Returns the shape of an attention operation as named numbers.
fn sizes(shape: &Shape, sequences: usize, new: usize, cached: usize) -> Vec<(&'static str, usize)> {
    vec![
        ("sequences", sequences),
        ("new", new),
        ("tokens", cached + new),
        ("q_heads", shape.heads.q_heads),
        ("kv_heads", shape.heads.kv_heads),
        ("head_dim", shape.heads.head_dim),
    ]
}

/// Returns the bytes of keys and values per token and layer.
fn token_bytes(shape: &Shape) -> usize {
    2 * shape.heads.kv_heads * shape.heads.head_dim * 2
}

/// Builds a batch of `sequences` with `new` rows each, after `cached` tokens. Blocks are
/// assigned round-robin, so that the blocks of one sequence are not adjacent.
fn batch(sequences: usize, cached: usize, new: usize, total: usize) -> Batch {
    let blocks = total.div_ceil(BLOCK);
    let mut batch = Batch::new(1);
    for sequence in 0..sequences {
        let blocks = (0..blocks).map(|block| (block * sequences + sequence) as u32);
        batch.push(&vec![0; new], cached, BLOCK, [(0, blocks)]);
        batch.sample_rows.push(batch.tokens.len() - 1);
    }
    batch
}

/// Fills a KV cache for `sequences` with `total` tokens each.
fn fill(
    bench: &mut Bench,
    shape: &Shape,
    sequences: usize,
    total: usize,
) -> Result<Filled, DeviceError> {
    let heads = shape.heads;
    let layers = bench.copies(sequences * total * token_bytes(shape)).min(32);
    let device = &mut bench.device;
    let pairs = heads.head_dim / 2;
    let frequency = |pair| 500_000f32.powf(-(pair as f32) / pairs as f32);
    let rope = device.load_rope(&RopeSpec {
        inverse_frequencies: (0..pairs).map(frequency).collect(),
        magnitude: 1.0,
        max_positions: total,
    })?;
    let mut cache = device.allocate_cache(&CacheShape {
        layers,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        blocks: sequences * total.div_ceil(BLOCK),
        block_tokens: BLOCK,
        values: Values::BesideKeys,
    })?;
    let rows_at_once = if bench.small { 32 } else { 2048 };
    let chunk = (rows_at_once / sequences).max(1);
    for begin in (0..total).step_by(chunk) {
        let new = chunk.min(total - begin);
        let columns = heads.qkv_columns();
        let x = values(sequences * new * columns);
        let mut qkv = device.tensor(columns, Precision::Activation, &x)?;
        device.stage(&batch(sequences, begin, new, total))?;
        for layer in 0..layers {
            let layer = CacheLayer::single_group(layer);
            device.rope_store(&mut qkv, heads, None, &rope, &mut cache, layer)?;
        }
    }
    Ok(Filled {
        cache,
        rope,
        layers,
        spec: AttentionSpec {
            heads,
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            window: None,
            causal: true,
            chunked: false,
            softcap: None,
        },
    })
}

fn decode(
    bench: &mut Bench,
    shape: &Shape,
    sequences: usize,
    cached: usize,
) -> Result<(), DeviceError> {
    let filled = match fill(bench, shape, sequences, cached) {
        Ok(filled) => filled,
        Err(error) => return failed(bench, shape, "attend decode", error),
    };
    let heads = shape.heads;
    let x = values(sequences * heads.qkv_columns());
    let qkv = bench
        .device
        .tensor(heads.qkv_columns(), Precision::Activation, &x)?;
    let mut out = bench
        .device
        .allocate(sequences, heads.q_columns(), Precision::Activation)?;
    // The row to decode is the last of the cached tokens.
    let step = batch(sequences, cached - 1, 1, cached);
    bench.device.stage(&step)?;
    let work = Work {
        kernel: "attend decode".to_owned(),
        shape: format!("{} {sequences} × {cached} tokens", shape.name),
        rows: sequences,
        sizes: sizes(shape, sequences, 1, cached - 1),
        bytes: sequences * (cached * token_bytes(shape) + 4 * heads.q_columns()),
        operations: 4 * sequences * cached * heads.q_columns(),
    };
    bench.measure(work, filled.layers, |device| {
        let mut layers = (0..filled.layers).map(CacheLayer::single_group);
        layers.try_for_each(|layer| {
            device.attend(&qkv, &filled.spec, None, &filled.cache, layer, &mut out)
        })
    });
    Ok(())
}

fn prefill(bench: &mut Bench, shape: &Shape, new: usize, cached: usize) -> Result<(), DeviceError> {
    let mut filled = match fill(bench, shape, 1, cached + new) {
        Ok(filled) => filled,
        Err(error) => return failed(bench, shape, "attend prefill", error),
    };
    let heads = shape.heads;
    let x = values(new * heads.qkv_columns());
    let mut qkv = bench
        .device
        .tensor(heads.qkv_columns(), Precision::Activation, &x)?;
    let mut out = bench
        .device
        .allocate(new, heads.q_columns(), Precision::Activation)?;
    bench.device.stage(&batch(1, cached, new, cached + new))?;
    // On average, each new token attends to all cached tokens and to half of the new ones.
    let pairs = new * cached + new * (new + 1) / 2;
    let work = Work {
        kernel: "attend prefill".to_owned(),
        shape: format!("{} {new} after {cached}", shape.name),
        rows: new,
        sizes: sizes(shape, 1, new, cached),
        bytes: (cached + new) * token_bytes(shape) + new * 4 * heads.q_columns(),
        operations: 4 * pairs * heads.q_columns(),
    };
    if bench.wants("attend prefill") {
        bench.measure(work, 1, |device| {
            let layer = CacheLayer::single_group(0);
            device.attend(&qkv, &filled.spec, None, &filled.cache, layer, &mut out)
        });
    }
    if bench.wants("rope_store") {
        let work = Work {
            kernel: "rope_store".to_owned(),
            shape: format!("{} {} columns", shape.name, heads.qkv_columns()),
            rows: new,
            sizes: sizes(shape, 1, new, cached),
            bytes: new * (4 * heads.q_columns() + 3 * token_bytes(shape)),
            operations: 0,
        };
        let layers = filled.layers;
        bench.measure(work, layers, |device| {
            let mut layers = (0..layers).map(CacheLayer::single_group);
            layers.try_for_each(|layer| {
                let Filled { rope, cache, .. } = &mut filled;
                device.rope_store(&mut qkv, heads, None, rope, cache, layer)
            })
        });
    }
    Ok(())
}

fn failed(
    bench: &mut Bench,
    shape: &Shape,
    kernel: &str,
    error: DeviceError,
) -> Result<(), DeviceError> {
    let work = Work {
        kernel: kernel.to_owned(),
        shape: shape.name.to_owned(),
        rows: 0,
        sizes: Vec::new(),
        bytes: 0,
        operations: 0,
    };
    bench.report.add(work, 1, Err(error));
    Ok(())
}
