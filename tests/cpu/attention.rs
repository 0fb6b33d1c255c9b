//! Attention, RoPE and the paged KV cache on the CPU device agree with float64, and the result
//! of a row depends only on its own sequence.

use common::cpu::*;
use quell::internals::device::cpu::{CpuDevice, CpuRope, CpuVector};
use quell::internals::device::*;
use quell::{Activations, CpuOptions, KvType, SimdLevel};
use std::ops::Range;

const BLOCK: usize = 16;

/// One layer: its cache, its settings and the device that computes it.
struct Layer {
    device: CpuDevice,
    cache: quell::internals::device::cpu::CpuCache,
    rope: CpuRope,
    spec: AttentionSpec,
    norm: Option<(CpuVector, CpuVector, bool)>,
    sinks: Option<CpuVector>,
}

/// Tokens `range` of one sequence, whose blocks are `table`.
struct Part<'a> {
    qkv: &'a [f32],
    range: Range<usize>,
    table: &'a [u32],
}

pub fn rope_spec(rotary_dim: usize) -> RopeSpec {
    let pairs = rotary_dim / 2;
    let frequency = |i| 10_000f32.powf(-(2.0 * i as f32) / rotary_dim as f32);
    RopeSpec {
        inverse_frequencies: (0..pairs).map(frequency).collect(),
        magnitude: 1.25,
        max_positions: 4096,
    }
}

impl Layer {
    fn new(
        options: &CpuOptions,
        spec: AttentionSpec,
        rotary_dim: usize,
        block_tokens: usize,
    ) -> Self {
        let mut device = CpuDevice::new(options).unwrap();
        let heads = spec.heads;
        let shape = CacheShape {
            layers: 2,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            blocks: 64,
            block_tokens,
            values: heads.values,
        };
        let cache = device.allocate_cache(&shape).unwrap();
        let rope = device.load_rope(&rope_spec(rotary_dim)).unwrap();
        Self {
            device,
            cache,
            rope,
            spec,
            norm: None,
            sinks: None,
        }
    }

    /// Runs one step: stores the tokens of the parts and computes their attention.
    fn step(&mut self, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
        let columns = self.spec.heads.qkv_columns();
        let block_tokens = self.cache.shape().block_tokens;
        let mut batch = Batch::new(1);
        let mut rows = Vec::new();
        for part in parts {
            let Range { start, end } = part.range;
            rows.extend_from_slice(&part.qkv[start * columns..end * columns]);
            let table = [(0, part.table.iter().copied())];
            batch.push(&vec![0; end - start], start, block_tokens, table);
        }
        let count = batch.rows();
        let mut qkv = tensor(&mut self.device, columns, &rows);
        let mut out = self
            .device
            .allocate(count, self.spec.heads.out_columns(), Precision::Full)
            .unwrap();
        self.device.stage(&batch).unwrap();
        let norm = self.norm.as_ref().map(|(q, k, per_head)| QkNorm {
            q,
            k,
            epsilon: 1e-5,
            per_head: *per_head,
            values: false,
        });
        let (heads, layer) = (self.spec.heads, CacheLayer::single_group(1));
        let sinks = self.sinks.as_ref();
        self.device
            .rope_store(
                &mut qkv,
                heads,
                norm.as_ref(),
                &self.rope,
                &mut self.cache,
                layer,
            )
            .unwrap();
        self.device
            .attend(&qkv, &self.spec, sinks, &self.cache, layer, &mut out)
            .unwrap();
        let mut row = 0;
        parts
            .iter()
            .map(|part| {
                let rows = row..row + part.range.len();
                row = rows.end;
                rows.flat_map(|row| out.row(row).to_vec()).collect()
            })
            .collect()
    }
}

/// RMSNorm in float64.
fn norm64(x: &mut [f64], weight: &[f32]) {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + 1e-5).sqrt();
    x.iter_mut()
        .zip(weight)
        .for_each(|(x, w)| *x *= factor * f64::from(*w));
}

/// Computes norms, rotation and attention of all tokens in float64.
pub fn reference(
    spec: &AttentionSpec,
    rope: &RopeSpec,
    norm: Option<(&[f32], &[f32], bool)>,
    qkv: &[f32],
) -> Vec<f64> {
    reference_with_sinks(spec, rope, norm, &[], qkv)
}

/// Computes norms, rotation and attention of all tokens in float64. There are no sinks if the list
/// is empty.
fn reference_with_sinks(
    spec: &AttentionSpec,
    rope: &RopeSpec,
    norm: Option<(&[f32], &[f32], bool)>,
    sinks: &[f32],
    qkv: &[f32],
) -> Vec<f64> {
    let HeadShape {
        q_heads,
        kv_heads,
        head_dim,
        ..
    } = spec.heads;
    let columns = spec.heads.qkv_columns();
    let mut rows: Vec<Vec<f64>> = qkv
        .chunks(columns)
        .map(|row| row.iter().map(|&v| f64::from(v)).collect())
        .collect();
    for (position, row) in rows.iter_mut().enumerate() {
        let (q, kv) = row.split_at_mut(q_heads * head_dim);
        let k = &mut kv[..kv_heads * head_dim];
        if let Some((q_weight, k_weight, per_head)) = norm {
            let (q_size, k_size) = if per_head {
                (head_dim, head_dim)
            } else {
                (q.len(), k.len())
            };
            q.chunks_mut(q_size).for_each(|head| norm64(head, q_weight));
            k.chunks_mut(k_size).for_each(|head| norm64(head, k_weight));
        }
        let half = rope.inverse_frequencies.len();
        for head in q.chunks_mut(head_dim).chain(k.chunks_mut(head_dim)) {
            for i in 0..half {
                let angle = f64::from(position as f32 * rope.inverse_frequencies[i]);
                let (sine, cosine) = angle.sin_cos();
                let m = f64::from(rope.magnitude);
                let (a, b) = (head[i], head[i + half]);
                head[i] = (a * cosine - b * sine) * m;
                head[i + half] = (b * cosine + a * sine) * m;
            }
        }
    }
    let group = q_heads / kv_heads;
    let mut out = Vec::new();
    for (position, row) in rows.iter().enumerate() {
        let first = spec.window.map_or(0, |window| match spec.chunked {
            true => position / window * window,
            false => (position + 1).saturating_sub(window),
        });
        let end = match spec.causal {
            true => position + 1,
            false => {
                let all = rows.len();
                spec.window.map_or(all, |window| all.min(position + window))
            }
        };
        for head in 0..q_heads {
            let q = &row[head * head_dim..][..head_dim];
            let k_at = (q_heads + head / group) * head_dim;
            let v_at = match spec.heads.values {
                Values::BesideKeys => k_at + kv_heads * head_dim,
                Values::InKeys(elements) => k_at + head_dim - elements,
            };
            let scores: Vec<f64> = rows[first..end]
                .iter()
                .map(|row| {
                    let dot: f64 = q.iter().zip(&row[k_at..]).map(|(q, k)| q * k).sum();
                    let score = dot * f64::from(spec.scale);
                    spec.softcap.map_or(score, |cap| {
                        f64::from(cap) * (score / f64::from(cap)).tanh()
                    })
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sink = sinks.get(head);
            let sink = sink.map_or(0.0, |&sink| (f64::from(sink) - largest).exp());
            let sum = sink + weights.iter().sum::<f64>();
            for d in 0..spec.heads.value_dim() {
                let value: f64 = weights
                    .iter()
                    .zip(&rows[first..])
                    .map(|(w, row)| w * row[v_at + d])
                    .sum();
                out.push(value / sum);
            }
        }
    }
    out
}

pub fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape {
        q_heads,
        kv_heads,
        head_dim,
        values: Values::BesideKeys,
    }
}

/// Heads whose values are the last elements of their keys.
fn latent_heads(q_heads: usize, kv_heads: usize, head_dim: usize, elements: usize) -> HeadShape {
    HeadShape {
        values: Values::InKeys(elements),
        ..heads(q_heads, kv_heads, head_dim)
    }
}

fn specs() -> Vec<(AttentionSpec, usize)> {
    let spec = |heads: HeadShape, window, softcap| AttentionSpec {
        heads,
        scale: 1.5 / (heads.head_dim as f32).sqrt(),
        window,
        causal: true,
        chunked: false,
        softcap,
    };
    vec![
        (spec(heads(9, 3, 64), None, None), 64),
        (spec(heads(4, 2, 16), Some(7), None), 16),
        (spec(heads(2, 1, 80), None, Some(2.0)), 80),
        (spec(heads(8, 1, 96), Some(33), Some(5.0)), 48),
        (spec(heads(3, 3, 24), Some(1), None), 8),
        (spec(heads(4, 1, 256), Some(16), None), 256),
        (spec(heads(1, 1, 8), None, None), 8),
        (spec(latent_heads(5, 1, 48, 32), None, None), 16),
        (spec(latent_heads(4, 2, 72, 40), Some(20), None), 32),
    ]
}

pub fn options(simd: SimdLevel, threads: usize, kv: KvType) -> CpuOptions {
    CpuOptions {
        threads: Some(threads),
        simd,
        activations: Activations::Auto,
        kv,
        ..CpuOptions::default()
    }
}

/// Returns a table of `count` blocks that are not in order.
fn table(first: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (first + i * 7) % 64).collect()
}

pub fn assert_near(out: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (out, expected)) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(*out) - expected).abs();
        assert!(
            error <= tolerance,
            "{what}: {out} at {i} is {error} from {expected}"
        );
    }
}

#[test]
fn attention_in_both_directions_agrees_with_float64_in_any_batch() {
    let mut random = Random::new(17);
    for (index, (spec, rotary)) in specs().into_iter().enumerate() {
        let spec = AttentionSpec {
            window: [None, Some(1), Some(20), Some(150)][index % 4],
            causal: false,
            ..spec
        };
        let lengths = [1, 17, 200];
        let qkvs = lengths.map(|length| random.numbers(length * spec.heads.qkv_columns()));
        let rope = rope_spec(rotary);
        for threads in [1, 3] {
            let options = options(SimdLevel::Auto, threads, KvType::F32);
            let mut layer = Layer::new(&options, spec, rotary, 16);
            let tables = [table(0, 1), table(7, 2), table(21, 13)];
            let part = |index: usize| Part {
                qkv: &qkvs[index],
                range: 0..lengths[index],
                table: &tables[index],
            };
            let together = layer.step(&[part(0), part(1), part(2)]);
            for (index, found) in together.iter().enumerate() {
                let expected = reference_with_sinks(&spec, &rope, None, &[], &qkvs[index]);
                let what = format!("{} tokens, {spec:?}", lengths[index]);
                assert_near(found, &expected, 2e-5, &what);
                let alone = layer.step(&[part(index)]).remove(0);
                assert!(bits(&alone) == bits(found), "{what}");
            }
        }
    }
}

#[test]
fn sinks_and_chunks_agree_with_float64_in_any_steps() {
    let mut random = Random::new(16);
    for (index, (spec, rotary)) in specs().into_iter().enumerate() {
        let spec = AttentionSpec {
            window: [None, Some(20), Some(150)][index % 3],
            causal: true,
            chunked: true,
            ..spec
        };
        let sinks: Vec<f32> = random.numbers(spec.heads.q_heads);
        let sinks: Vec<f32> = sinks.iter().map(|sink| sink * 4.0).collect();
        let tokens = 200;
        let qkv = random.numbers(tokens * spec.heads.qkv_columns());
        let rope = rope_spec(rotary);
        let expected = reference_with_sinks(&spec, &rope, None, &sinks, &qkv);
        let mut whole: Option<Vec<f32>> = None;
        for (chunk, threads) in [(tokens, 1), (1, 3), (7, 2), (64, 2)] {
            let options = options(SimdLevel::Auto, threads, KvType::F32);
            let mut layer = Layer::new(&options, spec, rotary, 16);
            layer.sinks = Some(layer.device.load_vector(&sinks).unwrap());
            let table = table(3, tokens.div_ceil(16));
            let mut out = Vec::new();
            for start in (0..tokens).step_by(chunk) {
                let range = start..tokens.min(start + chunk);
                let part = Part {
                    qkv: &qkv,
                    range,
                    table: &table,
                };
                out.extend(layer.step(&[part]).remove(0));
            }
            assert_near(&out, &expected, 2e-5, &format!("{spec:?}"));
            let whole = whole.get_or_insert_with(|| out.clone());
            assert!(bits(&out) == bits(whole), "{spec:?} in steps of {chunk}");
        }
    }
}

#[test]
fn attention_agrees_with_float64() {
    let mut random = Random::new(11);
    for (spec, rotary) in specs() {
        for tokens in [1, 15, 16, 17, 45, 200] {
            let qkv = random.numbers(tokens * spec.heads.qkv_columns());
            let expected = reference(&spec, &rope_spec(rotary), None, &qkv);
            for level in levels() {
                for (kv, tolerance) in [(KvType::F32, 2e-5), (KvType::F16, 4e-3)] {
                    let mut layer = Layer::new(&options(level, 2, kv), spec, rotary, BLOCK);
                    let table = table(5, 13);
                    let out = layer.step(&[Part {
                        qkv: &qkv,
                        range: 0..tokens,
                        table: &table,
                    }]);
                    let what = format!("{spec:?} {tokens} {level:?} {kv:?}");
                    assert_near(&out[0], &expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn queries_and_keys_are_normalised_by_head_or_by_row() {
    let mut random = Random::new(12);
    for per_head in [true, false] {
        let (spec, rotary) = specs()[0];
        let size = |heads: usize| spec.heads.head_dim * if per_head { 1 } else { heads };
        let q = random.numbers(size(spec.heads.q_heads));
        let k = random.numbers(size(spec.heads.kv_heads));
        let qkv = random.numbers(20 * spec.heads.qkv_columns());
        let norm = Some((&q[..], &k[..], per_head));
        let expected = reference(&spec, &rope_spec(rotary), norm, &qkv);
        for level in levels() {
            let mut layer = Layer::new(&options(level, 1, KvType::F32), spec, rotary, BLOCK);
            let (q, k) = (layer.device.load_vector(&q), layer.device.load_vector(&k));
            layer.norm = Some((q.unwrap(), k.unwrap(), per_head));
            let out = layer.step(&[Part {
                qkv: &qkv,
                range: 0..20,
                table: &table(0, 2),
            }]);
            assert_near(&out[0], &expected, 3e-5, &format!("{level:?} {per_head}"));
        }
    }
}

/// Computes a prompt in chunks of the given sizes and returns the bits of its results.
fn in_chunks(layer: &mut Layer, qkv: &[f32], chunks: impl Iterator<Item = usize>) -> Vec<u32> {
    let tokens = qkv.len() / layer.spec.heads.qkv_columns();
    let table = table(3, tokens.div_ceil(layer.cache.shape().block_tokens));
    let (mut start, mut out) = (0, Vec::new());
    for chunk in chunks {
        let range = start..tokens.min(start + chunk);
        start = range.end;
        let part = Part {
            qkv,
            range,
            table: &table,
        };
        out.extend(layer.step(&[part]).remove(0));
        if start == tokens {
            break;
        }
    }
    assert_eq!(start, tokens);
    bits(&out)
}

#[test]
fn chunk_sizes_change_no_bit_of_a_prompt() {
    let mut random = Random::new(13);
    let long = specs().into_iter().map(|spec| (spec, 53));
    let longer = [0, 3, 6].map(|index| (specs()[index], 401));
    for ((spec, rotary), tokens) in long.chain(longer) {
        let qkv = random.numbers(tokens * spec.heads.qkv_columns());
        for level in levels() {
            for kv in [KvType::F32, KvType::F16] {
                let layer =
                    |threads, block| Layer::new(&options(level, threads, kv), spec, rotary, block);
                let whole = in_chunks(&mut layer(1, 16), &qkv, [tokens].into_iter());
                for (threads, block, chunks) in [
                    (1, 16, &[1][..]),
                    (2, 32, &[1]),
                    (3, 48, &[5, 11, 1, 16, 19, 1]),
                    (2, 16, &[17, 36]),
                    (3, 16, &[130]),
                    (8, 16, &[200, 1]),
                ] {
                    let chunks = chunks.iter().copied().cycle();
                    let out = in_chunks(&mut layer(threads, block), &qkv, chunks);
                    assert!(out == whole, "{spec:?} {level:?} {kv:?} {threads} {block}");
                }
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_a_ragged_batch() {
    let mut random = Random::new(14);
    for (spec, rotary) in specs() {
        let columns = spec.heads.qkv_columns();
        let lengths = [40, 3, 17, 1, 33];
        let qkv: Vec<_> = lengths
            .iter()
            .map(|n| random.numbers(n * columns))
            .collect();
        let tables: Vec<_> = (0..5u32)
            .map(|i| (i * 3..i * 3 + 3).collect::<Vec<_>>())
            .collect();
        let mut together = Layer::new(&options(SimdLevel::Auto, 2, KvType::Auto), spec, rotary, 16);
        let parts = |from: fn(usize) -> usize, to: fn(usize) -> usize| -> Vec<Part<'_>> {
            (0..5)
                .map(|i| Part {
                    qkv: &qkv[i],
                    range: from(lengths[i])..to(lengths[i]),
                    table: &tables[i],
                })
                .collect()
        };
        together.step(&parts(|_| 0, |n| n - 1));
        let last = together.step(&parts(|n| n - 1, |n| n));
        for i in 0..5 {
            let mut alone =
                Layer::new(&options(SimdLevel::Auto, 1, KvType::Auto), spec, rotary, 16);
            let table = &tables[4 - i];
            let out = alone.step(&[Part {
                qkv: &qkv[i],
                range: 0..lengths[i],
                table,
            }]);
            let row = spec.heads.out_columns();
            assert!(
                bits(&out[0][out[0].len() - row..]) == bits(&last[i]),
                "{spec:?} {i}"
            );
        }
    }
}

#[test]
fn avx2_and_avx512_are_bit_identical() {
    if !levels().starts_with(&[SimdLevel::Avx512, SimdLevel::Avx2]) {
        eprintln!("skipped: this machine has no AVX-512");
        return;
    }
    let mut random = Random::new(15);
    for (spec, rotary) in specs() {
        let qkv = random.numbers(37 * spec.heads.qkv_columns());
        let [a, b] = [SimdLevel::Avx512, SimdLevel::Avx2].map(|level| {
            let mut layer = Layer::new(&options(level, 1, KvType::F16), spec, rotary, 16);
            bits(
                &layer.step(&[Part {
                    qkv: &qkv,
                    range: 0..37,
                    table: &table(0, 3),
                }])[0],
            )
        });
        assert!(a == b, "{spec:?}");
    }
}

#[test]
fn only_sequences_that_read_a_poisoned_block_get_nan() {
    let mut random = Random::new(16);
    for kv in [KvType::F32, KvType::F16] {
        let (spec, rotary) = specs()[0];
        let columns = spec.heads.qkv_columns();
        let qkv = random.numbers(40 * columns);
        let mut layer = Layer::new(&options(SimdLevel::Auto, 2, kv), spec, rotary, 16);
        // Blocks that were poisoned while free are overwritten when they are used.
        layer
            .device
            .poison(&mut layer.cache, &[0, 1, 2, 3])
            .unwrap();
        let out = layer.step(&[Part {
            qkv: &qkv,
            range: 0..39,
            table: &[2, 0, 1],
        }]);
        assert!(out[0].iter().all(|v| v.is_finite()));
        layer.device.poison(&mut layer.cache, &[0]).unwrap();
        let out = layer.step(&[Part {
            qkv: &qkv,
            range: 39..40,
            table: &[2, 0, 1],
        }]);
        assert!(out[0].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn blocks_before_the_window_are_not_read() {
    let mut random = Random::new(17);
    let (mut spec, rotary) = specs()[0];
    spec.window = Some(10);
    let qkv = random.numbers(41 * spec.heads.qkv_columns());
    let mut layer = Layer::new(&options(SimdLevel::Auto, 1, KvType::F32), spec, rotary, 16);
    layer.step(&[Part {
        qkv: &qkv,
        range: 0..40,
        table: &[0, 1, 2],
    }]);
    layer.device.poison(&mut layer.cache, &[0]).unwrap();
    let out = layer.step(&[Part {
        qkv: &qkv,
        range: 40..41,
        table: &[0, 1, 2],
    }]);
    assert!(out[0].iter().all(|v| v.is_finite()));
}

#[test]
fn invalid_batches_are_refused() {
    let mut device = CpuDevice::new(&CpuOptions::default()).unwrap();
    let mut good = Batch::new(2);
    good.push(&[1, 2], 3, 16, [(0, [0]), (0, [1])]);
    device.stage(&good).unwrap();
    let bad: [fn(&mut Batch); 13] = [
        |batch| batch.positions.truncate(1),
        |batch| batch.positions[1] = 5,
        |batch| batch.groups[0].slots[1] = batch.groups[0].slots[0],
        |batch| batch.groups[1].slots[1] = batch.groups[0].slots[0],
        |batch| batch.groups[1].slots.clear(),
        |batch| batch.sequences.clear(),
        |batch| batch.sequences[0].rows = 0..3,
        |batch| batch.sequences[0].rows = 1..2,
        |batch| batch.groups[1].tables[0].entries = 0..2,
        |batch| batch.groups[1].tables.clear(),
        |batch| batch.feedback.push(Feedback { row: 0, sample: 0 }),
        |batch| batch.feedback.push(Feedback { row: 2, sample: 0 }),
        |batch| batch.sample_rows.push(2),
    ];
    for change in bad {
        let mut batch = good.clone();
        change(&mut batch);
        let error = device.stage(&batch);
        assert!(
            matches!(
                error,
                Err(DeviceError::Failed {
                    operation: "stage",
                    ..
                })
            ),
            "{batch:?}"
        );
    }
}

#[test]
fn sharing_blocks_changes_no_bit() {
    let mut random = Random::new(19);
    let (spec, rotary) = specs()[0];
    let columns = spec.heads.qkv_columns();
    // The sequences share fifty blocks, and together have more than five times as many tokens
    // as the cache has slots.
    let shared = random.numbers(50 * BLOCK * columns);
    let chunks = [1, 1, 3, 1, 20, 1, 16];
    let qkv: Vec<Vec<f32>> = chunks
        .iter()
        .map(|chunk| [shared.clone(), random.numbers(chunk * columns)].concat())
        .collect();
    let tables: Vec<Vec<u32>> = (0..chunks.len() as u32)
        .map(|i| (0..50).chain([50 + 2 * i, 51 + 2 * i]).collect())
        .collect();
    let part = |i: usize, before: bool| Part {
        qkv: &qkv[i],
        range: match before {
            true => 0..50 * BLOCK,
            false => 50 * BLOCK..qkv[i].len() / columns,
        },
        table: &tables[i],
    };
    for threads in [1, 3] {
        for kv in [KvType::F16, KvType::F32] {
            let options = options(SimdLevel::Auto, threads, kv);
            let mut together = Layer::new(&options, spec, rotary, BLOCK);
            let tokens: usize = chunks.iter().map(|chunk| 50 * BLOCK + chunk).sum();
            assert!(tokens > 5 * together.cache.shape().blocks * BLOCK);
            together.step(&[part(0, true)]);
            let parts: Vec<Part<'_>> = (0..chunks.len()).map(|i| part(i, false)).collect();
            let out = together.step(&parts);
            for (i, out) in out.iter().enumerate() {
                let mut alone = Layer::new(&options, spec, rotary, BLOCK);
                alone.step(&[part(i, true)]);
                let expected = alone.step(&[part(i, false)]).remove(0);
                assert!(bits(out) == bits(&expected), "{i} {threads} {kv:?}");
            }
        }
    }
}

#[test]
fn blocks_slots_positions_and_layers_beyond_the_cache_are_refused() {
    let (spec, rotary) = specs()[0];
    let mut layer = Layer::new(&CpuOptions::default(), spec, rotary, 16);
    let columns = spec.heads.qkv_columns();
    let mut qkv = layer.device.allocate(1, columns, Precision::Full).unwrap();
    let mut out = layer
        .device
        .allocate(1, spec.heads.out_columns(), Precision::Full)
        .unwrap();
    let place = |group, index| CacheLayer {
        group,
        index,
        part: 0,
    };
    for (slot, position, block, of_layer, ok) in [
        (0, 0, 0, place(0, 0), (true, true)),
        (64 * 16, 0, 0, place(0, 0), (false, true)),
        (0, 4096, 0, place(0, 0), (false, false)),
        (0, 16, 0, place(0, 0), (true, false)),
        (0, 0, 64, place(0, 0), (true, false)),
        (0, 0, 0, place(0, 2), (false, false)),
        (0, 0, 0, place(1, 0), (false, false)),
    ] {
        let mut batch = Batch::new(1);
        batch.push(&[0], position, 16, [(0, [block])]);
        batch.groups[0].slots = vec![slot];
        layer.device.stage(&batch).unwrap();
        let (device, cache) = (&mut layer.device, &mut layer.cache);
        let stored = device.rope_store(&mut qkv, spec.heads, None, &layer.rope, cache, of_layer);
        let attended = device.attend(&qkv, &spec, None, cache, of_layer, &mut out);
        assert_eq!(
            (stored.is_ok(), attended.is_ok()),
            ok,
            "{batch:?} {of_layer:?}"
        );
    }
}

#[test]
fn unsupported_block_and_head_sizes_are_refused() {
    let mut device = CpuDevice::new(&CpuOptions::default()).unwrap();
    let shape = CacheShape {
        layers: 1,
        kv_heads: 1,
        head_dim: 64,
        blocks: 1,
        block_tokens: 16,
        values: Values::BesideKeys,
    };
    for bad in [
        CacheShape {
            block_tokens: 8,
            ..shape
        },
        CacheShape {
            block_tokens: 0,
            ..shape
        },
        CacheShape {
            head_dim: 12,
            ..shape
        },
        CacheShape {
            values: Values::InKeys(72),
            ..shape
        },
        CacheShape {
            values: Values::InKeys(0),
            ..shape
        },
    ] {
        let error = device.allocate_cache(&bad).err();
        assert!(
            matches!(error, Some(DeviceError::Unsupported { .. })),
            "{bad:?}"
        );
    }
    assert!(device.allocate_cache(&shape).is_ok());
    assert_eq!(device.cache_bytes(&shape), 2 * 64 * 2 * 16);
    let in_keys = CacheShape {
        values: Values::InKeys(48),
        ..shape
    };
    assert_eq!(device.cache_bytes(&in_keys), 64 * 2 * 16);
}
