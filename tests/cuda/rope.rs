//! The rotary embedding on the CUDA device, the norms before it and the write to the KV cache
//! agree with float64.

use crate::layer::*;
use common::cpu::{Random, bits};
use common::gpu;
use quell::CudaActivations;
use quell::internals::device::*;

const POSITIONS: usize = 5000;

#[derive(Clone, Copy, Debug)]
enum Norm {
    None,
    Heads,
    Row,
}

/// Heads, number of rotated elements per head, and tokens per block.
const SHAPES: [((usize, usize, usize), usize, usize); 9] = [
    ((2, 1, 16), 16, 16),
    ((3, 3, 32), 8, 32),
    ((9, 3, 64), 64, 48),
    ((4, 1, 80), 20, 16),
    ((2, 2, 96), 48, 16),
    ((8, 2, 128), 128, 64),
    ((2, 1, 256), 256, 16),
    ((1, 1, 512), 512, 16),
    ((1, 1, 128), 0, 16),
];

fn spec(rotary_dim: usize, magnitude: f32) -> RopeSpec {
    let frequency = |i| 10_000f32.powf(-(2.0 * i as f32) / rotary_dim as f32);
    RopeSpec {
        inverse_frequencies: (0..rotary_dim / 2).map(frequency).collect(),
        magnitude,
        max_positions: POSITIONS,
    }
}

/// Normalises `x` in float64.
fn normalize(x: &mut [f64], weight: &[f32]) {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(EPSILON)).sqrt();
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x *= factor * f64::from(weight);
    }
}

/// Computes the norm and rotation of a row in float64.
fn reference(
    heads: HeadShape,
    rope: &RopeSpec,
    (norm, q_weight, k_weight): (Norm, &[f32], &[f32]),
    position: usize,
    row: &[f32],
) -> Vec<f64> {
    let mut row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
    let dim = heads.head_dim;
    let (q, kv) = row.split_at_mut(heads.q_columns());
    let k = &mut kv[..heads.kv_heads * dim];
    match norm {
        Norm::None => {}
        Norm::Heads => {
            q.chunks_mut(dim).for_each(|head| normalize(head, q_weight));
            k.chunks_mut(dim).for_each(|head| normalize(head, k_weight));
        }
        Norm::Row => {
            normalize(q, q_weight);
            normalize(k, k_weight);
        }
    }
    let half = rope.inverse_frequencies.len();
    let magnitude = f64::from(rope.magnitude);
    for head in q.chunks_mut(dim).chain(k.chunks_mut(dim)) {
        for i in 0..half {
            let angle = f64::from(position as f32 * rope.inverse_frequencies[i]);
            let (sine, cosine) = angle.sin_cos();
            let (a, b) = (head[i], head[i + half]);
            head[i] = (a * cosine - b * sine) * magnitude;
            head[i + half] = (b * cosine + a * sine) * magnitude;
        }
    }
    row
}

/// Compares with a tolerance of one rounding to the activations' type; float32 arithmetic
/// before it adds little.
fn assert_near(kind: CudaActivations, out: &[f32], expected: &[f64], what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (&out, &expected)) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(out) - expected).abs();
        assert!(
            error <= 1.01 * rounding(kind) * expected.abs() + 2e-6,
            "{what}: {out} at {i} instead of {expected}"
        );
    }
}

/// Reads the bits of a token from the cache, keys first and then values.
fn cached(layer: &Layer<'_>, table: &[u32], block_tokens: usize, position: usize) -> Vec<u16> {
    let HeadShape {
        kv_heads, head_dim, ..
    } = layer.heads;
    let block = table[position / block_tokens] as usize;
    let (keys, values) = layer.cache.read(layer.device, 1, block).unwrap();
    let of = |array: &[u16]| -> Vec<u16> {
        let head = |head: usize| (head * block_tokens + position % block_tokens) * head_dim;
        let heads = (0..kv_heads).map(head);
        heads
            .flat_map(|at| array[at..at + head_dim].to_vec())
            .collect()
    };
    [of(&keys), of(&values)].concat()
}

#[test]
fn norm_rotation_and_store_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(41);
    for kind in TYPES {
        let mut device = device(kind);
        for ((q_heads, kv_heads, head_dim), rotary_dim, block_tokens) in SHAPES {
            for norm in [Norm::None, Norm::Heads, Norm::Row] {
                let heads = HeadShape {
                    q_heads,
                    kv_heads,
                    head_dim,
                    values: Values::BesideKeys,
                };
                let rope = spec(rotary_dim, 1.25);
                let count = |heads: usize| match norm {
                    Norm::Row => heads * head_dim,
                    _ => head_dim,
                };
                let q_weight = random.numbers(count(q_heads));
                let k_weight = random.numbers(count(kv_heads));
                // Two sequences: a few tokens at low positions, and one token at a high
                // position.
                let blocks = POSITIONS.div_ceil(block_tokens);
                let mut long = vec![0; blocks];
                long[blocks - 1] = 3;
                let tables = [vec![4, 2, 0], long];
                let starts = [block_tokens - 2, POSITIONS - 1];
                let counts = [5, 1];
                let columns = heads.qkv_columns();
                let rows: Vec<Vec<f32>> = counts
                    .iter()
                    .map(|&count| {
                        let numbers = random.numbers(count * columns);
                        numbers.into_iter().map(|value| kept(kind, value)).collect()
                    })
                    .collect();

                device.reserve(&limits(block_tokens)).unwrap();
                let mut layer = Layer::new(&mut device, heads, &rope, block_tokens, 5);
                let q = layer.device.load_vector(&q_weight).unwrap();
                let k = layer.device.load_vector(&k_weight).unwrap();
                layer.norm = match norm {
                    Norm::None => None,
                    Norm::Heads => Some((q, k, true)),
                    Norm::Row => Some((q, k, false)),
                };
                let padded: Vec<Vec<f32>> = rows
                    .iter()
                    .zip(starts)
                    .map(|(rows, start)| [vec![0.0; start * columns], rows.clone()].concat())
                    .collect();
                let parts: Vec<Part<'_>> = (0..2)
                    .map(|i| Part {
                        qkv: &padded[i],
                        range: starts[i]..starts[i] + counts[i],
                        table: &tables[i],
                    })
                    .collect();
                let out = layer.store(&parts);

                let mut out = out.chunks(columns);
                let mut written = 0;
                for i in 0..2 {
                    for (offset, row) in rows[i].chunks(columns).enumerate() {
                        let position = starts[i] + offset;
                        let what = format!("{kind:?} {heads:?} {rotary_dim} {norm:?} {position}");
                        let weights = (norm, &q_weight[..], &k_weight[..]);
                        let expected = reference(heads, &rope, weights, position, row);
                        let out = out.next().unwrap();
                        assert_near(kind, out, &expected, &what);
                        let values = heads.q_columns() + kv_heads * head_dim;
                        assert!(bits(&out[values..]) == bits(&row[values..]), "{what}");
                        let cached = cached(&layer, &tables[i], block_tokens, position);
                        let cached: Vec<f32> =
                            cached.iter().map(|&bits| decoded(kind, bits)).collect();
                        assert!(bits(&cached) == bits(&out[heads.q_columns()..]), "{what}");
                        written += cached.len();
                    }
                }
                // Nothing else was written: the rest of the cache is still NaN.
                let numbers = (0..5)
                    .map(|block| layer.cache.read(layer.device, 1, block).unwrap())
                    .flat_map(|(keys, values)| [keys, values].concat())
                    .filter(|&bits| !decoded(kind, bits).is_nan())
                    .count();
                assert_eq!(numbers, written, "{heads:?} {norm:?}");
            }
        }
    }
}

#[test]
fn values_are_normalised_in_the_cache_without_weights() {
    let _gpu = gpu::lock();
    let mut random = Random::new(43);
    for kind in TYPES {
        let mut device = device(kind);
        for (head_dim, per_head) in [(64, true), (512, true), (32, false)] {
            let heads = HeadShape {
                q_heads: 2,
                kv_heads: 2,
                head_dim,
                values: Values::BesideKeys,
            };
            let columns = heads.qkv_columns();
            let numbers = random.numbers(3 * columns).into_iter();
            let rows: Vec<f32> = numbers.map(|value| kept(kind, value)).collect();
            let weight = random.numbers(if per_head { head_dim } else { 2 * head_dim });
            let mut layer = Layer::new(&mut device, heads, &identity(64), 16, 1);
            let [q, k] = [0, 1].map(|_| layer.device.load_vector(&weight).unwrap());
            layer.norm = Some((q, k, per_head));
            layer.normalizes_values = true;
            let out = layer.store(&[Part {
                qkv: &rows,
                range: 0..3,
                table: &[0],
            }]);
            for (position, (row, out)) in rows.chunks(columns).zip(out.chunks(columns)).enumerate()
            {
                let what = format!("{kind:?} {head_dim} {position}");
                let cached = cached(&layer, &[0], 16, position);
                let cached: Vec<f32> = cached.iter().map(|&bits| decoded(kind, bits)).collect();
                let (keys, values) = cached.split_at(2 * head_dim);
                assert!(
                    bits(keys) == bits(&out[2 * head_dim..4 * head_dim]),
                    "{what}"
                );
                let mut expected: Vec<f64> =
                    row[4 * head_dim..].iter().map(|&x| x.into()).collect();
                let ones = vec![1.0; head_dim];
                let each = expected.chunks_mut(head_dim);
                each.for_each(|head| normalize(head, &ones));
                assert_near(kind, values, &expected, &what);
            }
        }
    }
}

#[test]
fn queries_alone_are_rotated_like_those_beside_keys_and_values() {
    let _gpu = gpu::lock();
    let mut random = Random::new(44);
    let heads = HeadShape {
        q_heads: 3,
        kv_heads: 1,
        head_dim: 64,
        values: Values::BesideKeys,
    };
    let (columns, q_columns) = (heads.qkv_columns(), heads.q_columns());
    for (kind, is_normed) in TYPES.into_iter().zip([true, false]) {
        let mut device = device(kind);
        let rows: Vec<f32> = (random.numbers(7 * columns).into_iter())
            .map(|value| kept(kind, value))
            .collect();
        let weight = random.numbers(64);
        let mut layer = Layer::new(&mut device, heads, &spec(64, 1.25), 16, 1);
        let [q, k, alone] = [0, 1, 2].map(|_| layer.device.load_vector(&weight).unwrap());
        layer.norm = is_normed.then_some((q, k, true));
        let parts = [Part {
            qkv: &rows,
            range: 0..7,
            table: &[0],
        }];
        let together = layer.store(&parts);
        let queries = rows
            .chunks(columns)
            .flat_map(|row| row[..q_columns].to_vec());
        let mut queries = layer.tensor(q_columns, &queries.collect::<Vec<_>>());
        let (batch, _) = layer.batch(&parts);
        layer.stage(&batch);
        let norm = is_normed.then_some((&alone, EPSILON));
        let (device, rope) = (&mut *layer.device, &layer.rope);
        device
            .rope_queries(&mut queries, heads, norm, rope)
            .unwrap();
        let found = device.values(&queries, 7).unwrap();
        for (found, together) in found.chunks(q_columns).zip(together.chunks(columns)) {
            assert!(bits(found) == bits(&together[..q_columns]), "{kind:?}");
        }
        // Norms that do not fit, and rows with keys and values, are refused.
        let short = layer.device.load_vector(&weight[..32]).unwrap();
        let (device, rope) = (&mut *layer.device, &layer.rope);
        let norm = Some((&short, EPSILON));
        device
            .rope_queries(&mut queries, heads, norm, rope)
            .unwrap_err();
        let mut wide = device
            .tensor(columns, Precision::Activation, &rows)
            .unwrap();
        device
            .rope_queries(&mut wide, heads, None, rope)
            .unwrap_err();
        device.finish(Ok(())).unwrap();
    }
}

#[test]
fn other_rows_change_no_bit_of_a_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(42);
    let kind = CudaActivations::Bf16;
    let mut device = device(kind);
    let heads = HeadShape {
        q_heads: 6,
        kv_heads: 2,
        head_dim: 64,
        values: Values::BesideKeys,
    };
    let columns = heads.qkv_columns();
    let rows: Vec<f32> = random
        .numbers(20 * columns)
        .into_iter()
        .map(|value| kept(kind, value))
        .collect();
    let q_weight = random.numbers(heads.q_columns());
    let k_weight = random.numbers(2 * 64);
    let mut results = |chunk: usize| -> Vec<u32> {
        let mut layer = Layer::new(&mut device, heads, &spec(64, 1.0), 16, 2);
        let q = layer.device.load_vector(&q_weight).unwrap();
        let k = layer.device.load_vector(&k_weight).unwrap();
        layer.norm = Some((q, k, false));
        let mut out = Vec::new();
        for start in (0..20).step_by(chunk) {
            out.extend(layer.store(&[Part {
                qkv: &rows,
                range: start..20.min(start + chunk),
                table: &[1, 0],
            }]));
        }
        bits(&out)
    };
    let whole = results(20);
    assert!(results(1) == whole);
    assert!(results(7) == whole);
}

#[test]
fn queries_are_scaled_in_stages_of_their_positions() {
    let _gpu = gpu::lock();
    let heads = HeadShape {
        q_heads: 2,
        kv_heads: 1,
        head_dim: 16,
        values: Values::BesideKeys,
    };
    let columns = heads.qkv_columns();
    for kind in TYPES {
        let mut device = device(kind);
        let mut layer = Layer::new(&mut device, heads, &RopeSpec::nothing(64), 16, 2);
        let rows: Vec<f32> = Random::new(43)
            .numbers(30 * columns)
            .into_iter()
            .map(|value| kept(kind, value))
            .collect();
        let scale = |interval| QueryScale {
            slope: 0.3,
            interval,
            offset: 1,
        };
        let (batch, values) = layer.batch(&[Part {
            qkv: &rows,
            range: 2..30,
            table: &[1, 0],
        }]);
        let mut qkv = layer.tensor(columns, &values);
        layer.stage(&batch);
        layer.rope_store(&mut qkv).unwrap();
        layer
            .device
            .scale_queries(&mut qkv, heads, scale(8))
            .unwrap();
        let error = layer.device.scale_queries(&mut qkv, heads, scale(0));
        layer.device.finish(Ok(())).unwrap();
        assert!(error.unwrap_err().to_string().contains("interval"));
        let found = layer.device.values(&qkv, 28).unwrap();
        for (index, (found, stored)) in found.iter().zip(&values).enumerate() {
            let (row, column) = (index / columns, index % columns);
            let factor = match column < heads.q_columns() {
                true => scale(8).factor(2 + row as u32),
                false => 1.0,
            };
            let expected = f64::from(stored * factor);
            let error = (f64::from(*found) - expected).abs();
            let bound = expected.abs() * rounding(kind);
            assert!(error <= bound, "{found} at {row}, {column}, not {expected}");
        }
    }
}

#[test]
fn invalid_rope_arguments_are_refused() {
    let _gpu = gpu::lock();
    let mut device = device(CudaActivations::Bf16);
    let odd = RopeSpec {
        inverse_frequencies: vec![1.0; 3],
        magnitude: 1.0,
        max_positions: 8,
    };
    let error = device.load_rope(&odd).err();
    assert!(
        matches!(&error, Some(DeviceError::Unsupported { what, .. }) if what.contains('6')),
        "{error:?}"
    );

    let heads = HeadShape {
        q_heads: 2,
        kv_heads: 1,
        head_dim: 16,
        values: Values::BesideKeys,
    };
    let rows = vec![0.5; 40 * heads.qkv_columns()];
    let mut outcome = |rope: &RopeSpec, position: usize, table: &[u32], norm: usize| {
        let mut layer = Layer::new(&mut device, heads, rope, 16, 2);
        if norm > 0 {
            let weight = vec![1.0; norm];
            let q = layer.device.load_vector(&weight).unwrap();
            let k = layer.device.load_vector(&weight).unwrap();
            layer.norm = Some((q, k, true));
        }
        let (batch, values) = layer.batch(&[Part {
            qkv: &rows,
            range: position..position + 1,
            table,
        }]);
        let mut qkv = layer.tensor(heads.qkv_columns(), &values);
        layer.stage(&batch);
        let outcome = layer.rope_store(&mut qkv);
        layer.device.finish(Ok(())).unwrap();
        outcome
    };
    let rope = RopeSpec {
        max_positions: 20,
        ..spec(16, 1.0)
    };
    outcome(&rope, 19, &[0, 1], 0).unwrap();
    outcome(&rope, 19, &[0, 1], 16).unwrap();
    for (rope, position, table, norm, complaint) in [
        (&rope, 20, &[0, 1][..], 0, "position 20"),
        (&rope, 19, &[0, 2], 0, "slot 35"),
        (&rope, 19, &[0, 1], 8, "weights"),
        (&spec(32, 1.0), 19, &[0, 1], 0, "elements of a head"),
    ] {
        let error = outcome(rope, position, table, norm).unwrap_err();
        assert!(error.to_string().contains(complaint), "{error}");
    }
}
