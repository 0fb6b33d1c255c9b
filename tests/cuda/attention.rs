//! Attention on the CUDA device agrees with float64, reads no key outside a row's window, and
//! gives a row the same bits however it is computed.

use crate::layer;
use crate::layer::*;
use common::cpu::{Random, bits};
use common::gpu;
use quell::CudaActivations;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use std::ops::Range;

/// The attention of a layer, and the block size of its cache.
#[derive(Clone, Copy, Debug)]
struct Case {
    spec: AttentionSpec,
    block_tokens: usize,
}

fn case(
    (q_heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
    softcap: Option<f32>,
    block_tokens: usize,
) -> Case {
    let heads = HeadShape {
        q_heads,
        kv_heads,
        head_dim,
        values: Values::BesideKeys,
    };
    // Spread the scores so that some keys matter much more than others.
    let scale = 4.0 / (head_dim as f32).sqrt();
    Case {
        spec: AttentionSpec {
            heads,
            scale,
            window,
            causal: true,
            chunked: false,
            softcap,
        },
        block_tokens,
    }
}

/// All head sizes, and groups of 1, 2, 3, 4, 8, 16 and more heads, whether they fill warps or
/// not.
fn cases() -> Vec<Case> {
    vec![
        case((2, 2, 16), None, None, 16),
        case((20, 1, 16), Some(1), None, 32),
        case((4, 2, 32), Some(7), None, 32),
        case((33, 1, 32), None, Some(3.0), 16),
        case((3, 1, 64), None, Some(2.0), 48),
        case((2, 1, 64), Some(300), None, 16),
        case((4, 1, 80), Some(150), None, 16),
        case((8, 1, 96), None, Some(5.0), 64),
        case((16, 2, 128), Some(33), None, 16),
        case((2, 1, 128), None, None, 256),
        case((16, 1, 256), None, None, 16),
        case((2, 1, 256), Some(129), Some(4.0), 32),
        case((2, 1, 512), None, None, 16),
        case((17, 1, 512), Some(40), None, 32),
    ]
}

/// Lengths around the boundaries at which keys are split.
const LENGTHS: [usize; 36] = [
    1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 255, 256,
    257, 383, 384, 385, 511, 512, 513, 640, 1000, 1023, 1024, 1025, 1500,
];

/// Returns the rows of `count` tokens, rounded to the type of the activations.
fn tokens(random: &mut Random, kind: CudaActivations, case: &Case, count: usize) -> Vec<f32> {
    let numbers = random.numbers(count * case.spec.heads.qkv_columns());
    numbers.into_iter().map(|value| kept(kind, value)).collect()
}

/// Returns tables for sequences of these lengths, with shuffled and unshared blocks, and the
/// number of blocks.
fn tables(random: &mut Random, lengths: &[usize], block_tokens: usize) -> (Vec<Vec<u32>>, usize) {
    let counts: Vec<usize> = lengths.iter().map(|n| n.div_ceil(block_tokens)).collect();
    let blocks = counts.iter().sum::<usize>() + 2;
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..blocks).rev() {
        order.swap(i, random.below(i + 1));
    }
    let mut rest = &order[..];
    let tables = counts.iter().map(|&count| {
        let (table, others) = rest.split_at(count);
        rest = others;
        table.to_vec()
    });
    (tables.collect(), blocks)
}

/// Returns the first position that a token attends to.
fn sees_from(spec: &AttentionSpec, position: usize) -> usize {
    let from = |window| match spec.chunked {
        true => position / window * window,
        false => (position + 1).saturating_sub(window),
    };
    spec.window.map_or(0, from)
}

/// Returns the position after the last one that a token attends to.
fn sees_until(spec: &AttentionSpec, position: usize, qkv: &[f32]) -> usize {
    let tokens = qkv.len() / spec.heads.qkv_columns();
    match spec.causal {
        true => position + 1,
        false => spec
            .window
            .map_or(tokens, |window| tokens.min(position + window)),
    }
}

/// Computes the attention of one token in float64.
pub fn reference(spec: &AttentionSpec, qkv: &[f32], position: usize) -> Vec<f64> {
    reference_with_sinks(spec, &[], qkv, position)
}

/// Computes the attention of one token in float64. There are no sinks if the list is empty.
fn reference_with_sinks(
    spec: &AttentionSpec,
    sinks: &[f32],
    qkv: &[f32],
    position: usize,
) -> Vec<f64> {
    let HeadShape {
        q_heads,
        kv_heads,
        head_dim,
        ..
    } = spec.heads;
    let columns = spec.heads.qkv_columns();
    let seen: Vec<&[f32]> = (sees_from(spec, position)..sees_until(spec, position, qkv))
        .map(|token| &qkv[token * columns..][..columns])
        .collect();
    let query = &qkv[position * columns..];
    let mut out = Vec::with_capacity(q_heads * head_dim);
    for head in 0..q_heads {
        let q = &query[head * head_dim..][..head_dim];
        let k_at = (q_heads + head / (q_heads / kv_heads)) * head_dim;
        let v_at = k_at + kv_heads * head_dim;
        let scores: Vec<f64> = seen
            .iter()
            .map(|row| {
                let products = q.iter().zip(&row[k_at..]);
                let dot: f64 = products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let score = dot * f64::from(spec.scale);
                let cap = |cap: f32| f64::from(cap) * (score / f64::from(cap)).tanh();
                spec.softcap.map_or(score, cap)
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sink = sinks.get(head);
        let sink = sink.map_or(0.0, |&sink| (f64::from(sink) - largest).exp());
        let sum = sink + weights.iter().sum::<f64>();
        let mut result = vec![0.0; head_dim];
        for (weight, row) in weights.iter().zip(&seen) {
            for (result, &value) in result.iter_mut().zip(&row[v_at..]) {
                *result += weight * f64::from(value);
            }
        }
        out.extend(result.iter().map(|value| value / sum));
    }
    out
}

/// Compares results with float64. The tolerance covers one rounding of each weight and each
/// result, for values between −1 and 1.
pub fn assert_near(kind: CudaActivations, out: &[f32], expected: &[f64], what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (&out, &expected)) in out.iter().zip(expected).enumerate() {
        let tolerance = 1.01 * rounding(kind) * (0.5 + expected.abs()) + 2e-5;
        let error = (f64::from(out) - expected).abs();
        assert!(
            error <= tolerance,
            "{what}: {out} at {i} instead of {expected}"
        );
    }
}

/// Computes the attention of the tokens `ranges` of several sequences in one step. All tokens
/// before them are in the cache, and are NaN if no token of the range attends to them.
fn check_step(
    random: &mut Random,
    device: &mut CudaDevice,
    kind: CudaActivations,
    case: &Case,
    ranges: &[Range<usize>],
) {
    let Case { spec, block_tokens } = *case;
    let lengths: Vec<usize> = ranges.iter().map(|range| range.end).collect();
    let (tables, blocks) = tables(random, &lengths, block_tokens);
    let mut layer = Layer::new(device, spec.heads, &identity(2048), block_tokens, blocks);
    let qkv: Vec<Vec<f32>> = lengths
        .iter()
        .map(|&length| tokens(random, kind, case, length))
        .collect();
    let columns = spec.heads.qkv_columns();
    let stored: Vec<Vec<f32>> = ranges
        .iter()
        .zip(&qkv)
        .map(|(range, qkv)| {
            let mut stored = qkv.clone();
            stored[..sees_from(&spec, range.start) * columns].fill(f32::NAN);
            stored
        })
        .collect();
    let part = |i: usize, rows, range| Part {
        qkv: rows,
        range,
        table: &tables[i],
    };
    let sequences = 0..ranges.len();
    let before: Vec<Part<'_>> = sequences
        .clone()
        .map(|i| part(i, &stored[i], 0..ranges[i].start))
        .filter(|part| !part.range.is_empty())
        .collect();
    if !before.is_empty() {
        layer.store(&before);
    }
    let parts: Vec<Part<'_>> = sequences
        .clone()
        .map(|i| part(i, &qkv[i], ranges[i].clone()))
        .collect();
    let out = layer.step(&spec, &parts);
    for i in sequences {
        let rows = out[i].chunks(spec.heads.q_columns());
        assert_eq!(rows.len(), ranges[i].len());
        for (position, row) in ranges[i].clone().zip(rows) {
            let what = format!("{kind:?} {case:?}, token {position} of {:?}", ranges[i]);
            assert_near(kind, row, &reference(&spec, &qkv[i], position), &what);
        }
    }
}

#[test]
fn decoding_agrees_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(31);
    for kind in TYPES {
        let mut device = device(kind);
        let mut lengths = LENGTHS.iter().cycle();
        for case in cases() {
            let ranges: Vec<Range<usize>> = lengths.by_ref().take(6).map(|&n| n - 1..n).collect();
            check_step(&mut random, &mut device, kind, &case, &ranges);
        }
    }
}

#[test]
fn prompts_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(32);
    for (kind, first) in TYPES.into_iter().zip([0, 1]) {
        let mut device = device(kind);
        for (index, case) in cases().into_iter().enumerate() {
            // Whole prompts, and chunks that follow other tokens.
            let ranges = match (index + first) % 4 {
                0 => vec![0..2, 0..131, 257..290],
                1 => vec![0..33, 120..137],
                2 => vec![96..128, 0..16, 511..514],
                _ => vec![1000..1003, 0..65],
            };
            check_step(&mut random, &mut device, kind, &case, &ranges);
        }
    }
}

#[test]
fn ragged_batches_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(33);
    for kind in TYPES {
        let mut device = device(kind);
        for case in cases() {
            let ranges = [0..1, 3..20, 128..129, 0..9, 299..300, 255..258];
            check_step(&mut random, &mut device, kind, &case, &ranges);
        }
    }
}

/// Computes all tokens in chunks of the given sizes and returns the bits of the results.
fn in_chunks(
    random: &mut Random,
    device: &mut CudaDevice,
    case: &Case,
    qkv: &[f32],
    chunks: &[usize],
) -> Vec<u32> {
    let spec = case.spec;
    let count = qkv.len() / spec.heads.qkv_columns();
    let (tables, blocks) = tables(random, &[count], case.block_tokens);
    let mut layer = Layer::new(
        device,
        spec.heads,
        &identity(2048),
        case.block_tokens,
        blocks,
    );
    let (mut start, mut out) = (0, Vec::new());
    for chunk in chunks.iter().cycle() {
        let range = start..count.min(start + chunk);
        start = range.end;
        let table = &tables[0][..start.div_ceil(case.block_tokens)];
        let part = Part { qkv, range, table };
        out.extend(layer.step(&spec, &[part]).remove(0));
        if start == count {
            break;
        }
    }
    assert!(out.iter().all(|value| value.is_finite()));
    bits(&out)
}

#[test]
fn chunk_sizes_change_no_bit_of_a_prompt() {
    let _gpu = gpu::lock();
    let mut random = Random::new(34);
    for kind in TYPES {
        let mut device = device(kind);
        for (index, case) in cases().into_iter().enumerate() {
            // Token by token is slow, so each type does it for every other case.
            let alone = (index % 2 == 0) == (kind == CudaActivations::Bf16);
            let count = if alone { 145 } else { 400 };
            let qkv = tokens(&mut random, kind, &case, count);
            let mut results = |block_tokens, chunks: &[usize]| {
                let case = Case {
                    block_tokens,
                    ..case
                };
                in_chunks(&mut random, &mut device, &case, &qkv, chunks)
            };
            let whole = results(case.block_tokens, &[count]);
            let mut cuts = vec![(16, vec![130]), (32, vec![5, 11, 1, 16, 40, 1, 33])];
            if alone {
                cuts.push((48, vec![1]));
            }
            for (block_tokens, chunks) in cuts {
                let out = results(block_tokens, &chunks);
                let row = case.spec.heads.q_columns();
                let differs = out.iter().zip(&whole).position(|(a, b)| a != b);
                let token = differs.map(|at| at / row);
                assert_eq!(token, None, "{kind:?} {case:?} {block_tokens} {chunks:?}");
                assert_eq!(out.len(), whole.len());
            }
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_a_ragged_batch() {
    let _gpu = gpu::lock();
    let mut random = Random::new(35);
    let kind = CudaActivations::Bf16;
    let mut device = device(kind);
    for case in cases() {
        let lengths = [40, 300, 17, 1, 133];
        let last = [1, 3, 17, 1, 50];
        let qkv: Vec<Vec<f32>> = lengths
            .iter()
            .map(|&length| tokens(&mut random, kind, &case, length))
            .collect();
        let mut run = |which: &[usize]| {
            let lengths: Vec<usize> = which.iter().map(|&i| lengths[i]).collect();
            let (tables, blocks) = tables(&mut random, &lengths, case.block_tokens);
            let (heads, rope) = (case.spec.heads, identity(2048));
            let mut layer = Layer::new(&mut device, heads, &rope, case.block_tokens, blocks);
            let parts = |before: bool| -> Vec<Part<'_>> {
                let part = |(&i, table): (&usize, _)| {
                    let border = qkv[i].len() / heads.qkv_columns() - last[i];
                    let range = if before {
                        0..border
                    } else {
                        border..border + last[i]
                    };
                    let (qkv, table): (_, &Vec<u32>) = (&qkv[i][..], table);
                    Part { qkv, range, table }
                };
                let parts = which.iter().zip(&tables).map(part);
                parts.filter(|part| !part.range.is_empty()).collect()
            };
            let before = parts(true);
            if !before.is_empty() {
                layer.store(&before);
            }
            layer.step(&case.spec, &parts(false))
        };
        let together = run(&[0, 1, 2, 3, 4]);
        let turned = run(&[4, 3, 2, 1, 0]);
        for i in 0..lengths.len() {
            let alone = run(&[i]).remove(0);
            assert!(bits(&alone) == bits(&together[i]), "{case:?} {i}");
            assert!(bits(&alone) == bits(&turned[4 - i]), "{case:?} {i}");
        }
    }
}

#[test]
fn rotating_and_storing_within_attention_changes_no_bit() {
    let _gpu = gpu::lock();
    let mut random = Random::new(38);
    let mut chunked = case((4, 2, 64), Some(512), None, 16);
    chunked.spec.chunked = true;
    let cases = [
        chunked,
        case((20, 1, 16), None, None, 32),
        case((4, 2, 32), Some(7), None, 16),
        case((3, 1, 64), None, Some(2.0), 48),
        case((4, 1, 80), Some(150), None, 16),
        case((8, 1, 96), None, None, 64),
        case((16, 2, 128), None, None, 16),
        case((2, 1, 256), None, None, 32),
        case((2, 1, 512), None, None, 16),
    ];
    // Some have several units, and more than one block works on the longest.
    let lengths = [1, 16, 17, 129, 300, 641];
    for (index, case) in cases.into_iter().enumerate() {
        let kind = TYPES[index % 2];
        let heads = case.spec.heads;
        let mut device = device(kind);
        let rotary_dim = if index % 2 == 0 { heads.head_dim } else { 16 };
        let rope = RopeSpec {
            inverse_frequencies: (0..rotary_dim / 2).map(|i| 0.7f32.powi(i as i32)).collect(),
            magnitude: 1.25,
            max_positions: 2048,
        };
        let sinks = (index % 2 == 0).then(|| random.numbers(heads.q_heads));
        let qkv = lengths.map(|length| tokens(&mut random, kind, &case, length));
        let (tables, blocks) = tables(&mut random, &lengths, case.block_tokens);
        for per_head in [None, Some(true), Some(false)] {
            let of = |heads: usize| match per_head {
                Some(false) => heads * heads_dim(case),
                _ => heads_dim(case),
            };
            let (q, k) = (
                random.numbers(of(heads.q_heads)),
                random.numbers(of(heads.kv_heads)),
            );
            let mut results = |fused: bool| {
                let block_tokens = case.block_tokens;
                let mut layer = Layer::new(&mut device, heads, &rope, block_tokens, blocks);
                layer.sinks = (sinks.as_ref()).map(|of| layer.device.load_vector(of).unwrap());
                layer.normalizes_values = index % 2 == 0;
                layer.norm = per_head.map(|per_head| {
                    let q = layer.device.load_vector(&q).unwrap();
                    (q, layer.device.load_vector(&k).unwrap(), per_head)
                });
                let part = |i: usize, range| Part {
                    qkv: &qkv[i],
                    range,
                    table: &tables[i],
                };
                let all = 0..lengths.len();
                let before: Vec<Part<'_>> = all
                    .clone()
                    .filter(|&i| lengths[i] > 1)
                    .map(|i| part(i, 0..lengths[i] - 1))
                    .collect();
                for one in before {
                    layer.store(&[one]);
                }
                let last: Vec<Part<'_>> =
                    all.map(|i| part(i, lengths[i] - 1..lengths[i])).collect();
                let out = layer.step_with(&case.spec, &last, fused).concat();
                let cached = (0..blocks).map(|block| layer.cache.read(layer.device, 1, block));
                let cached: Vec<_> = cached.map(Result::unwrap).collect();
                (bits(&out), cached)
            };
            let (out, cached) = results(false);
            let (fused_out, fused_cached) = results(true);
            assert!(out == fused_out, "{case:?} {per_head:?}");
            assert!(cached == fused_cached, "{case:?} {per_head:?}");
        }
    }
}

fn heads_dim(case: Case) -> usize {
    case.spec.heads.head_dim
}

#[test]
fn padding_of_recorded_steps_changes_no_bit() {
    let _gpu = gpu::lock();
    let mut random = Random::new(36);
    let kind = CudaActivations::F16;
    let mut device = device(kind);
    let case = case((6, 2, 64), None, None, 16);
    let (spec, heads) = (case.spec, case.spec.heads);
    let columns = heads.q_columns();
    let lengths = [5, 129, 40];
    let steps = 5;
    let ends: Vec<usize> = lengths.iter().map(|length| length + steps).collect();
    let (tables, blocks) = tables(&mut random, &ends, case.block_tokens);
    // All steps have the same rows, so that those in device memory can be reused.
    let rows: Vec<Vec<f32>> = lengths
        .iter()
        .map(|&length| {
            let context = tokens(&mut random, kind, &case, length);
            let row = tokens(&mut random, kind, &case, 1);
            [context, row.repeat(steps)].concat()
        })
        .collect();
    let part = |i: usize, range| Part {
        qkv: &rows[i],
        range,
        table: &tables[i],
    };
    let contexts = [0, 1, 2].map(|i| part(i, 0..lengths[i]));
    let next = |step: usize| [0, 1, 2].map(|i| part(i, lengths[i] + step..lengths[i] + step + 1));
    let rope = identity(2048);

    let mut layer = Layer::new(&mut device, heads, &rope, case.block_tokens, blocks);
    layer.store(&contexts);
    let expected: Vec<Vec<u32>> = (0..steps)
        .map(|step| bits(&layer.step(&spec, &next(step)).concat()))
        .collect();

    let mut layer = Layer::new(&mut device, heads, &rope, case.block_tokens, blocks);
    layer.store(&contexts);
    let (_, values) = layer.batch(&next(0));
    let padding = vec![0.0; heads.qkv_columns()];
    let mut qkv = layer.tensor(heads.qkv_columns(), &[values, padding].concat());
    let mut out = layer.tensor(columns, &vec![7.0; 4 * columns]);
    let mut replayed = 0;
    for (step, expected) in expected.iter().enumerate() {
        let (mut batch, _) = layer.batch(&next(step));
        batch.sample_rows = vec![0, 1, 2];
        match layer.device.stage(&batch).unwrap() {
            Staged::Replayed => replayed += 1,
            Staged::Enqueue => {
                layer.rope_store(&mut qkv).unwrap();
                let (device, cache) = (&mut layer.device, &layer.cache);
                device
                    .attend(&qkv, &spec, None, cache, LAYER, &mut out)
                    .unwrap();
                assert_eq!(device.finish(Ok(())).unwrap(), Finished::Done);
            }
        }
        let values = layer.device.values(&out, 4).unwrap();
        assert!(bits(&values[..3 * columns]) == *expected, "step {step}");
        assert!(values[3 * columns..].iter().all(|&value| value == 0.0));
    }
    assert!(replayed > 0, "no step was recorded");
    // Padding writes no key: slots that no sequence wrote are still NaN.
    let tokens = (0..blocks)
        .map(|block| layer.cache.read(layer.device, 1, block).unwrap())
        .flat_map(|(keys, values)| [keys, values].concat())
        .filter(|&bits| !decoded(kind, bits).is_nan())
        .count();
    let written: usize = ends.iter().sum();
    assert_eq!(tokens, written * 2 * heads.kv_heads * heads.head_dim);
}

/// Decodes one token per step of twelve sequences that begin with the same 112 tokens. Returns,
/// for each step, its bits and whether it was replayed.
fn decode_after_one_prompt(
    device: &mut CudaDevice,
    spec: &AttentionSpec,
    (rows, tables): (&[Vec<f32>], &[Vec<u32>]),
    blocks: usize,
    steps: usize,
) -> Vec<(Vec<u32>, bool)> {
    let heads = spec.heads;
    let mut layer = Layer::new(device, heads, &identity(2048), 16, blocks);
    let length = |i: usize| rows[i].len() / heads.qkv_columns() - steps;
    let part = |i: usize, range| Part {
        qkv: &rows[i],
        range,
        table: &tables[i],
    };
    for i in 0..rows.len() {
        // The shared blocks are already written.
        let written = i > 0 && tables[i][0] == tables[0][0];
        let start = if written { 112 } else { 0 };
        layer.store(&[part(i, start..length(i))]);
    }
    let next = |step: usize| -> Vec<Part<'_>> {
        let at = |i: usize| part(i, length(i) + step..length(i) + step + 1);
        (0..rows.len()).map(at).collect()
    };
    // All steps have the same rows, so that those in device memory can be reused.
    let (_, values) = layer.batch(&next(0));
    let padding = vec![0.0; 4 * heads.qkv_columns()];
    let mut qkv = layer.tensor(heads.qkv_columns(), &[values, padding].concat());
    let mut out = layer.tensor(heads.q_columns(), &vec![f32::NAN; 16 * heads.q_columns()]);
    let each = (0..steps).map(|step| {
        let (mut batch, _) = layer.batch(&next(step));
        batch.sample_rows = (0..rows.len()).collect();
        let staged = layer.device.stage(&batch).unwrap();
        if staged == Staged::Enqueue {
            layer.rope_store(&mut qkv).unwrap();
            let (device, cache) = (&mut layer.device, &layer.cache);
            device
                .attend(&qkv, spec, None, cache, LAYER, &mut out)
                .unwrap();
            assert_eq!(device.finish(Ok(())).unwrap(), Finished::Done);
        }
        let values = layer.device.values(&out, rows.len()).unwrap();
        assert!(values.iter().all(|value| value.is_finite()));
        (bits(&values), staged == Staged::Replayed)
    });
    each.collect()
}

#[test]
fn sharing_blocks_changes_no_bit() {
    const SEQUENCES: usize = 12;
    const STEPS: usize = 14;
    let _gpu = gpu::lock();
    let mut random = Random::new(38);
    let kind = CudaActivations::Bf16;
    let case = case((4, 2, 32), None, None, 16);
    let spec = case.spec;
    let prompt = tokens(&mut random, kind, &case, 112);
    let rows: Vec<Vec<f32>> = (0..SEQUENCES)
        .map(|i| {
            let own = tokens(&mut random, kind, &case, 8 + i % 4);
            let row = tokens(&mut random, kind, &case, 1);
            [prompt.clone(), own, row.repeat(STEPS)].concat()
        })
        .collect();
    let apart: Vec<Vec<u32>> = (0..SEQUENCES as u32)
        .map(|i| (9 * i..9 * (i + 1)).collect())
        .collect();
    let shared: Vec<Vec<u32>> = (0..SEQUENCES as u32)
        .map(|i| (0..7).chain([7 + 2 * i, 8 + 2 * i]).collect())
        .collect();
    let blocks = 7 + 2 * SEQUENCES;
    // The sequences have more tokens, and finally more units, than sequences that share nothing
    // could have in this many blocks.
    let columns = spec.heads.qkv_columns();
    let lengths = rows.iter().map(|rows| rows.len() / columns);
    assert!(lengths.clone().sum::<usize>() > 3 * blocks * 16);
    let units: usize = lengths.map(|length| length.div_ceil(128)).sum();
    assert!(units > (blocks * 16).div_ceil(128) + layer::limits(16).sequences);

    let expected = decode_after_one_prompt(
        &mut device(kind),
        &spec,
        (&rows, &apart),
        9 * SEQUENCES,
        STEPS,
    );
    let found = decode_after_one_prompt(&mut device(kind), &spec, (&rows, &shared), blocks, STEPS);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(found.0 == expected.0, "step {step}");
    }
    // Steps are replayed although they have that many units.
    let replayed: Vec<bool> = found.iter().map(|step| step.1).collect();
    assert!(replayed[2] && replayed[STEPS - 1], "{replayed:?}");
}

#[test]
fn splitting_a_step_into_several_launches_changes_no_bit() {
    const SEQUENCES: usize = 70;
    /// Position of the only unshared token of each sequence, the first one of its 2048th block.
    const POSITION: usize = 2047 * 16;
    let gpu = gpu::lock();
    let mut random = Random::new(39);
    let kind = CudaActivations::F16;
    let mut device = device(kind);
    // A small window makes this fast; the units are counted all the same.
    let case = case((2, 1, 16), Some(40), None, 16);
    let (spec, columns) = (case.spec, case.spec.heads.qkv_columns());
    let rope = identity(POSITION + 1);
    let mut layer = Layer::new(&mut device, spec.heads, &rope, 16, 1 + SEQUENCES);
    let limits = DeviceLimits {
        rows: 128,
        sequences: 128,
        sequence_tokens: POSITION + 16,
        ..layer::limits(16)
    };
    layer.device.reserve(&limits).unwrap();
    let shared = tokens(&mut random, kind, &case, 16);
    layer.store(&[Part {
        qkv: &shared,
        range: 0..16,
        table: &[0],
    }]);
    let own = tokens(&mut random, kind, &case, SEQUENCES);
    let mut step = |sequences: Range<usize>| {
        let (count, rows) = (sequences.len(), sequences.clone());
        let mut batch = Batch::new(1);
        for i in sequences {
            let table = std::iter::repeat_n(0, 2047).chain([1 + i as u32]);
            batch.push(&[0], POSITION, 16, [(0, table)]);
        }
        let values = &own[rows.start * columns..rows.end * columns];
        let mut qkv = layer.tensor(columns, values);
        let nothing = vec![f32::NAN; count * spec.heads.q_columns()];
        let mut out = layer.tensor(spec.heads.q_columns(), &nothing);
        layer.stage(&batch);
        layer.rope_store(&mut qkv).unwrap();
        let (device, cache) = (&mut layer.device, &layer.cache);
        device
            .attend(&qkv, &spec, None, cache, LAYER, &mut out)
            .unwrap();
        device.finish(Ok(())).unwrap();
        bits(&device.values(&out, count).unwrap())
    };
    // Each sequence has 256 units. Together they exceed the 16384 units of one launch.
    let launches = || match gpu::is_real() {
        true => 0,
        false => gpu
            .calls()
            .iter()
            .filter(|(name, _)| name.starts_with("cuLaunchKernel"))
            .map(|(_, count)| *count)
            .sum::<u64>(),
    };
    let before = launches();
    let together = step(0..SEQUENCES);
    let between = launches();
    let few = [step(0..30), step(30..60), step(60..SEQUENCES)].concat();
    if !gpu::is_real() {
        // A split step takes one more launch than a whole one.
        let whole = (launches() - between) / 3;
        assert_eq!(between - before, whole + 1);
    }
    assert_eq!(together.len(), few.len());
    assert!(together == few);
    assert!(
        together
            .iter()
            .all(|&bits| f32::from_bits(bits).is_finite())
    );
}

#[test]
fn invalid_attention_arguments_are_refused() {
    let _gpu = gpu::lock();
    let mut random = Random::new(37);
    let kind = CudaActivations::Bf16;
    let mut device = device(kind);
    let good = case((2, 1, 64), None, None, 16).spec;
    let heads = good.heads;
    let sizes = "16, 32, 64, 80, 96, 128, 256";
    let shape = CacheShape {
        layers: 1,
        kv_heads: 1,
        head_dim: 48,
        blocks: 1,
        block_tokens: 16,
        values: Values::BesideKeys,
    };
    let error = device.allocate_cache(&shape).err().unwrap();
    assert!(matches!(error, DeviceError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains(sizes), "{error}");

    let mut layer = Layer::new(&mut device, heads, &identity(64), 16, 2);
    let rows = random.numbers(heads.qkv_columns());
    let mut attend = |spec: &AttentionSpec, index: usize, columns: usize, block: u32| {
        let table = &[block];
        let part = Part {
            qkv: &rows,
            range: 0..1,
            table,
        };
        let (mut batch, values) = layer.batch(&[part]);
        batch.groups[0].slots = vec![0];
        let mut qkv = layer.tensor(heads.qkv_columns(), &values);
        let mut out = layer.tensor(columns, &vec![0.0; columns]);
        layer.stage(&batch);
        layer.rope_store(&mut qkv).unwrap();
        let (device, cache) = (&mut layer.device, &layer.cache);
        let place = CacheLayer::single_group(index);
        let outcome = device.attend(&qkv, spec, None, cache, place, &mut out);
        device.finish(Ok(())).unwrap();
        outcome
    };
    attend(&good, 1, 128, 0).unwrap();
    let other = |q_heads, kv_heads, head_dim| AttentionSpec {
        heads: HeadShape {
            q_heads,
            kv_heads,
            head_dim,
            values: Values::BesideKeys,
        },
        ..good
    };
    let error = attend(&other(2, 1, 48), 1, 128, 0).unwrap_err();
    assert!(error.to_string().contains(sizes), "{error}");
    for (spec, layer, columns, block, complaint) in [
        (good, 2, 128, 0, "layer 2"),
        (good, 1, 64, 0, "the result"),
        (good, 1, 128, 2, "block 2"),
        (other(3, 1, 64), 1, 192, 0, "qkv"),
        (other(2, 2, 64), 1, 128, 0, "the cache"),
        (other(2, 1, 128), 1, 256, 0, "the cache"),
    ] {
        let error = attend(&spec, layer, columns, block).unwrap_err();
        assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        assert!(error.to_string().contains(complaint), "{error}");
    }
}

#[test]
fn attention_in_both_directions_agrees_with_float64_in_any_batch() {
    let _gpu = gpu::lock();
    let mut random = Random::new(17);
    let lengths = [1, 2, 17, 64, 129, 200, 300];
    for kind in TYPES {
        let mut device = layer::device(kind);
        for (index, head_dim) in [32, 64, 256, 64].into_iter().enumerate() {
            let window = [None, Some(1), Some(20), Some(130)][index];
            let mut case = case((6, 2, head_dim), window, None, 16);
            case.spec.causal = false;
            let spec = &case.spec;
            let qkvs = lengths.map(|length| tokens(&mut random, kind, &case, length));
            let (tables, blocks) = tables(&mut random, &lengths, 16);
            let mut layer = Layer::new(&mut device, spec.heads, &identity(2048), 16, blocks);
            let part = |index: usize| Part {
                qkv: &qkvs[index],
                range: 0..lengths[index],
                table: &tables[index],
            };
            let parts: Vec<Part<'_>> = (0..lengths.len()).map(part).collect();
            let together = layer.step(spec, &parts);
            for (index, found) in together.iter().enumerate() {
                let expected: Vec<f64> = (0..lengths[index])
                    .flat_map(|position| reference(spec, &qkvs[index], position))
                    .collect();
                let what = format!("{} tokens, {spec:?}", lengths[index]);
                assert_near(kind, found, &expected, &what);
                let alone = layer.step(spec, &[part(index)]).remove(0);
                assert!(bits(&alone) == bits(found), "{what}");
            }
        }
    }
}

#[test]
fn sinks_and_chunks_agree_with_float64_in_any_steps() {
    let _gpu = gpu::lock();
    let mut random = Random::new(16);
    let tokens_of_all = 200;
    for kind in TYPES {
        let mut device = layer::device(kind);
        for (index, head_dim) in [32, 64, 128, 256].into_iter().enumerate() {
            let window = [None, Some(32), Some(128)][index % 3];
            let mut case = case((6, 2, head_dim), window, None, 16);
            case.spec.chunked = true;
            let spec = &case.spec;
            let sinks: Vec<f32> = random.numbers(6).iter().map(|sink| sink * 4.0).collect();
            let qkv = tokens(&mut random, kind, &case, tokens_of_all);
            let (tables, blocks) = tables(&mut random, &[tokens_of_all], 16);
            let mut steps = |range: Range<usize>, chunk: usize| -> Vec<f32> {
                let mut layer = Layer::new(&mut device, spec.heads, &identity(2048), 16, blocks);
                layer.sinks = Some(layer.device.load_vector(&sinks).unwrap());
                let part = |range| Part {
                    qkv: &qkv,
                    range,
                    table: &tables[0],
                };
                if range.start > 0 {
                    layer.store(&[part(0..range.start)]);
                }
                let ends = range.clone().step_by(chunk);
                let parts = ends.map(|start| part(start..range.end.min(start + chunk)));
                parts
                    .flat_map(|part| layer.step(spec, &[part]).remove(0))
                    .collect()
            };
            let whole = steps(0..tokens_of_all, tokens_of_all);
            let expected: Vec<f64> = (0..tokens_of_all)
                .flat_map(|position| reference_with_sinks(spec, &sinks, &qkv, position))
                .collect();
            assert_near(kind, &whole, &expected, &format!("{spec:?}"));
            let columns = spec.heads.q_columns();
            let decoded = steps(120..135, 1);
            assert!(
                bits(&decoded) == bits(&whole[120 * columns..135 * columns]),
                "{spec:?}"
            );
            let cut = steps(0..tokens_of_all, 77);
            assert!(bits(&cut) == bits(&whole), "{spec:?}");
        }
        let mut uneven = case((2, 1, 64), Some(48), None, 16);
        uneven.spec.chunked = true;
        let mut layer = Layer::new(&mut device, uneven.spec.heads, &identity(64), 16, 1);
        let rows = vec![0.5; uneven.spec.heads.qkv_columns()];
        let (batch, _) = layer.batch(&[Part {
            qkv: &rows,
            range: 0..1,
            table: &[0],
        }]);
        let qkv = layer.tensor(uneven.spec.heads.qkv_columns(), &rows);
        let mut out = layer.tensor(uneven.spec.heads.q_columns(), &[0.0; 128]);
        layer.stage(&batch);
        let (device, cache) = (&mut layer.device, &layer.cache);
        let error = device.attend(&qkv, &uneven.spec, None, cache, LAYER, &mut out);
        layer.device.finish(Ok(())).unwrap();
        assert!(error.unwrap_err().to_string().contains("48"));
    }
}
