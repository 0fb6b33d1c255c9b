//! The row-wise operations of the CUDA device agree with float64, and the result of a row does
//! not depend on the number of rows.

use common::cpu::{Random, bits, gelu};
use common::gpu;
use half::{bf16, f16};
use quell::internals::device::cuda::{CudaCache, CudaDevice, CudaTensor};
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{CudaActivations, CudaOptions, SamplingParams};
use std::sync::Arc;

const TYPES: [CudaActivations; 2] = [CudaActivations::Bf16, CudaActivations::F16];
const SHAPES: [(usize, usize); 6] = [(1, 8), (3, 24), (1, 576), (7, 40), (5, 2056), (2, 8192)];
const EPSILON: f32 = 1e-6;

fn device(activations: CudaActivations) -> CudaDevice {
    let mut device = CudaDevice::new(&CudaOptions {
        activations,
        ..CudaOptions::default()
    })
    .unwrap();
    let limits = DeviceLimits {
        rows: 64,
        sequences: 64,
        sequence_tokens: 64,
        block_tokens: 16,
        groups: 1,
        vocabulary: 512,
        model: ModelShape::default(),
    };
    device.reserve(&limits).unwrap();
    device
}

/// Rounds `value` to the type of the activations.
fn kept(activations: CudaActivations, value: f32) -> f64 {
    match activations {
        CudaActivations::Bf16 => bf16::from_f32(value).to_f64(),
        CudaActivations::F16 => f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f64(),
    }
}

/// Half the distance between neighbouring numbers near 1, and a little for float32 errors.
fn rounding(activations: CudaActivations) -> f64 {
    match activations {
        CudaActivations::Bf16 => 1.01 / 256.0,
        CudaActivations::F16 => 1.01 / 2048.0,
    }
}

fn assert_near(out: &[f32], expected: &[f64], tolerance: f64, smallest: f64, what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (&out, &expected)) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(out) - expected).abs();
        assert!(
            error <= tolerance * expected.abs() + smallest,
            "{what}: {out} at {i} instead of {expected}"
        );
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn normalized(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let row = |row: &[f64]| {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + f64::from(EPSILON)).sqrt();
        let scaled = row.iter().zip(weight);
        scaled
            .map(|(v, &w)| v * factor * f64::from(w))
            .collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// The operands of a norm, before and after rounding on the device.
struct Operands {
    residual: Vec<f32>,
    x: Vec<f32>,
    x_kept: Vec<f64>,
    weight: Vec<f32>,
}

impl Operands {
    fn new(random: &mut Random, activations: CudaActivations, rows: usize, columns: usize) -> Self {
        let x = random.numbers(rows * columns);
        Self {
            residual: random.numbers(rows * columns),
            x_kept: x.iter().map(|&v| kept(activations, v)).collect(),
            x,
            weight: random.numbers(columns),
        }
    }
}

fn residual(device: &mut CudaDevice, columns: usize, values: &[f32]) -> CudaTensor {
    device.tensor(columns, Precision::Full, values).unwrap()
}

fn activations(device: &mut CudaDevice, columns: usize, values: &[f32]) -> CudaTensor {
    device
        .tensor(columns, Precision::Activation, values)
        .unwrap()
}

/// Returns what each of the norms and sums of these operands wrote.
fn norms(device: &mut CudaDevice, columns: usize, operands: &Operands) -> [Vec<f32>; 6] {
    let rows = operands.x.len() / columns;
    let weight = device.load_vector(&operands.weight).unwrap();
    let x = activations(device, columns, &operands.x);
    let mut out = device
        .allocate(rows, columns, Precision::Activation)
        .unwrap();
    let mut stream = residual(device, columns, &operands.residual);
    device
        .rms_norm(&stream, &weight, EPSILON, rows, &mut out)
        .unwrap();
    let plain = device.values(&out, rows).unwrap();
    device
        .add_rms_norm(&mut stream, &x, &weight, EPSILON, rows, &mut out)
        .unwrap();
    let sum = device.values(&stream, rows).unwrap();
    let of_sum = device.values(&out, rows).unwrap();
    let mut stream = residual(device, columns, &operands.residual);
    device
        .rms_norm_add(&x, &weight, EPSILON, rows, &mut stream)
        .unwrap();
    let added = device.values(&stream, rows).unwrap();
    let mut stream = residual(device, columns, &operands.residual);
    device.add(&mut stream, &x, rows).unwrap();
    let plain_sum = device.values(&stream, rows).unwrap();
    device.centre(&mut stream, rows).unwrap();
    let centred = device.values(&stream, rows).unwrap();
    [plain, sum, of_sum, added, plain_sum, centred]
}

#[test]
fn norms_and_sums_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(31);
    for activations in TYPES {
        let mut device = device(activations);
        for (rows, columns) in SHAPES {
            let what = format!("{rows} × {columns} in {activations:?}");
            let operands = Operands::new(&mut random, activations, rows, columns);
            let [plain, sum, of_sum, added, plain_sum, centred] =
                norms(&mut device, columns, &operands);
            let rounding = rounding(activations);
            let stream = wide(&operands.residual);
            let expected = normalized(&stream, &operands.weight);
            assert_near(&plain, &expected, rounding, 1e-6, &what);

            let exact: Vec<f32> = operands
                .residual
                .iter()
                .zip(&operands.x_kept)
                .map(|(&r, &x)| r + x as f32)
                .collect();
            assert_eq!(bits(&sum), bits(&exact), "{what}");
            assert_eq!(bits(&plain_sum), bits(&exact), "{what}");
            let expected = normalized(&wide(&exact), &operands.weight);
            assert_near(&of_sum, &expected, rounding, 1e-6, &what);
            let expected: Vec<f64> = wide(&exact)
                .chunks(columns)
                .flat_map(|row| {
                    let mean = row.iter().sum::<f64>() / columns as f64;
                    row.iter().map(|v| v - mean).collect::<Vec<_>>()
                })
                .collect();
            assert_near(&centred, &expected, 1e-6, 1e-5, &what);

            let expected: Vec<f64> = normalized(&operands.x_kept, &operands.weight)
                .iter()
                .zip(&stream)
                .map(|(a, b)| a + b)
                .collect();
            assert_near(&added, &expected, 1e-6, 2e-6, &what);
        }
    }
}

#[test]
fn other_rows_change_no_bit_of_a_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(32);
    for activations in TYPES {
        let mut device = device(activations);
        for (rows, columns) in [(9, 24), (5, 2056), (33, 64)] {
            let operands = Operands::new(&mut random, activations, rows, columns);
            let together = norms(&mut device, columns, &operands);
            for row in 0..rows {
                let range = row * columns..(row + 1) * columns;
                let alone = Operands {
                    residual: operands.residual[range.clone()].to_vec(),
                    x: operands.x[range.clone()].to_vec(),
                    x_kept: Vec::new(),
                    weight: operands.weight.clone(),
                };
                let alone = norms(&mut device, columns, &alone);
                for (alone, together) in alone.iter().zip(&together) {
                    assert_eq!(bits(alone), bits(&together[range.clone()]), "row {row}");
                }
            }
        }
    }
}

#[test]
fn float16_saturates_and_keeps_nan() {
    let _gpu = gpu::lock();
    let mut device = device(CudaActivations::F16);
    let columns = 8;
    // If all numbers are equal, the norm is the weight.
    let weight = [1e6, -1e6, 65504.0, 65519.0, 65535.0, 1.0, f32::NAN, 0.0];
    let vector = device.load_vector(&weight).unwrap();
    let x = residual(&mut device, columns, &[3.0; 8]);
    let mut out = device.allocate(1, columns, Precision::Activation).unwrap();
    device.rms_norm(&x, &vector, 0.0, 1, &mut out).unwrap();
    let found = device.values(&out, 1).unwrap();
    let expected = [65504.0, -65504.0, 65504.0, 65504.0, 65504.0, 1.0];
    assert_eq!(found[..6], expected);
    assert!(found[6].is_nan());
    assert_eq!(found[7], 0.0);
}

#[test]
fn activations_agree_with_float64_even_far_from_zero() {
    let _gpu = gpu::lock();
    let mut random = Random::new(33);
    for kind in TYPES {
        let mut device = device(kind);
        for (rows, columns) in SHAPES {
            // A few of them are so large that e^−x overflows.
            let x: Vec<f32> = random
                .numbers(rows * 2 * columns)
                .iter()
                .map(|v| v * v * v * 200.0)
                .collect();
            let gate_up = activations(&mut device, 2 * columns, &x);
            let x: Vec<f64> = x.iter().map(|&v| kept(kind, v)).collect();
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut out = device
                    .allocate(rows, columns, Precision::Activation)
                    .unwrap();
                device
                    .gated_activation(&gate_up, activation, rows, &mut out)
                    .unwrap();
                let row = |row: &[f64]| {
                    let (gate, up) = row.split_at(columns);
                    let activated = gate.iter().map(|&x| match activation {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        Activation::ClampedSwiGlu { .. }
                        | Activation::SquaredRelu
                        | Activation::Gelu => {
                            unreachable!()
                        }
                        Activation::GeluTanh => {
                            let inner =
                                (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                            x / (1.0 + (-2.0 * inner).exp())
                        }
                    });
                    activated.zip(up).map(|(a, up)| a * up).collect::<Vec<_>>()
                };
                let expected: Vec<f64> = x.chunks(2 * columns).flat_map(row).collect();
                assert_near(
                    &device.values(&out, rows).unwrap(),
                    &expected,
                    rounding(kind) + 1e-4,
                    1e-6,
                    &format!("{activation:?} {rows} × {columns} in {kind:?}"),
                );
            }
        }
    }
}

#[test]
fn the_squared_relu_reads_no_gate_and_keeps_what_is_not_a_number() {
    let _gpu = gpu::lock();
    let mut random = Random::new(37);
    for kind in TYPES {
        let mut device = device(kind);
        for (rows, columns) in SHAPES {
            let mut x = random.numbers(rows * columns);
            x[0] = f32::NAN;
            let up = activations(&mut device, columns, &x);
            let mut out = activations(&mut device, columns, &x);
            let activation = Activation::SquaredRelu;
            device
                .gated_activation(&up, activation, rows, &mut out)
                .unwrap();
            let found = device.values(&out, rows).unwrap();
            assert!(found[0].is_nan());
            let kept = x[1..].iter().map(|&x| kept(kind, x));
            let expected: Vec<f64> = kept.map(|x| x.max(0.0) * x.max(0.0)).collect();
            let what = format!("{rows} × {columns} in {kind:?}");
            assert_near(&found[1..], &expected, rounding(kind), 1e-6, &what);
            // There is no gate in front of it.
            let wide = device.allocate(rows, 2 * columns, Precision::Activation);
            let refused = device.gated_activation(&wide.unwrap(), activation, rows, &mut out);
            refused.unwrap_err();
        }
    }
}

#[test]
fn the_exact_gelu_agrees_with_float64_even_far_from_zero() {
    let _gpu = gpu::lock();
    let mut random = Random::new(38);
    for kind in TYPES {
        let mut device = device(kind);
        for (rows, columns) in SHAPES {
            let mut x: Vec<f32> = random.numbers(rows * columns);
            x.iter_mut().for_each(|x| *x *= 8.0);
            x[0] = f32::NAN;
            let up = activations(&mut device, columns, &x);
            let mut out = activations(&mut device, columns, &x);
            let activation = Activation::Gelu;
            device
                .gated_activation(&up, activation, rows, &mut out)
                .unwrap();
            let found = device.values(&out, rows).unwrap();
            assert!(found[0].is_nan());
            let expected: Vec<f64> = x[1..].iter().map(|&x| gelu(kept(kind, x))).collect();
            let what = format!("{rows} × {columns} in {kind:?}");
            assert_near(&found[1..], &expected, rounding(kind), 2e-6, &what);
        }
    }
}

#[test]
fn layer_norms_of_sums_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(39);
    for kind in TYPES {
        let mut device = device(kind);
        for (rows, columns) in SHAPES.into_iter().chain([(2, 10_248)]) {
            let operands = Operands::new(&mut random, kind, rows, columns);
            let bias = random.numbers(columns);
            let vectors = [&operands.weight, &bias].map(|own| device.load_vector(own).unwrap());
            let x = activations(&mut device, columns, &operands.x);
            let mut out = activations(&mut device, columns, &operands.x);
            for with_x in [false, true] {
                let mut stream = residual(&mut device, columns, &operands.residual);
                let x = with_x.then_some(&x);
                let parameters = [&vectors[0], &vectors[1]];
                device
                    .add_layer_norm(&mut stream, x, parameters, EPSILON, rows, &mut out)
                    .unwrap();
                let added = operands
                    .x_kept
                    .iter()
                    .map(|x| if with_x { *x } else { 0.0 });
                let sums = wide(&operands.residual).into_iter().zip(added);
                let sums: Vec<f64> = sums.map(|(a, b)| a + b).collect();
                let centre = |row: &[f64]| {
                    let mean = row.iter().sum::<f64>() / columns as f64;
                    row.iter().map(|v| v - mean).collect::<Vec<_>>()
                };
                let centred: Vec<f64> = sums.chunks(columns).flat_map(centre).collect();
                let normed = normalized(&centred, &operands.weight);
                let biases = bias.iter().cycle().map(|&b| f64::from(b));
                let expected: Vec<f64> = normed.iter().zip(biases).map(|(a, b)| a + b).collect();
                let what = format!("{rows} × {columns} in {kind:?}");
                let found = device.values(&stream, rows).unwrap();
                assert_near(&found, &expected, 1e-5, 1e-5, &what);
                let copied = device.values(&out, rows).unwrap();
                assert_near(&copied, &expected, rounding(kind), 1e-5, &what);
            }
        }
    }
}

#[test]
fn the_softcap_agrees_with_float64_for_any_number_of_columns() {
    let _gpu = gpu::lock();
    let mut random = Random::new(34);
    let mut device = device(CudaActivations::Bf16);
    for (rows, columns) in [(1, 1), (3, 33), (2, 300)] {
        let x: Vec<f32> = random
            .numbers(rows * columns)
            .iter()
            .map(|v| v * 100.0)
            .collect();
        let mut logits = residual(&mut device, columns, &x);
        device.softcap(&mut logits, 30.0, rows).unwrap();
        let expected: Vec<f64> = wide(&x).iter().map(|v| 30.0 * (v / 30.0).tanh()).collect();
        let found = device.values(&logits, rows).unwrap();
        assert_near(&found, &expected, 1e-6, 1e-7, "softcap");
    }
}

/// Builds a step of sequences with one row each.
fn batch(tokens: &[u32]) -> Batch {
    let mut batch = Batch::new(1);
    for (row, token) in (0..).zip(tokens) {
        batch.push(&[*token], 0, 16, [(0, [row])]);
    }
    batch
}

#[test]
fn embeddings_are_scaled_table_rows_and_use_feedback() {
    let _gpu = gpu::lock();
    let mut random = Random::new(35);
    let (vocabulary, columns) = (50, 72);
    let table = random.numbers(vocabulary * columns);
    let data: Vec<u8> = table.iter().flat_map(|v| v.to_le_bytes()).collect();
    for kind in TYPES {
        let mut device = device(kind);
        let spec = LinearSpec {
            parts: vec![WeightRows {
                dtype: DType::F32,
                rows: vocabulary,
                columns,
                data: &data,
                order: RowOrder::AsStored,
            }],
            bias: None,
        };
        let linear = device.load_linear(&spec).unwrap();
        let expected = |tokens: &[u32], scale: f32| -> Vec<f32> {
            let row = |&token: &u32| &table[token as usize * columns..][..columns];
            let numbers = tokens.iter().flat_map(row);
            numbers.map(|&v| kept(kind, v) as f32 * scale).collect()
        };
        let mut out = device.allocate(64, columns, Precision::Full).unwrap();
        let mut embed = |device: &mut CudaDevice, batch: &Batch, scale: f32| {
            assert_eq!(device.stage(batch).unwrap(), Staged::Enqueue);
            device.embed(&linear, scale, &mut out).unwrap();
            assert_eq!(device.finish(Ok(())).unwrap(), Finished::Done);
            device.values(&out, batch.rows()).unwrap()
        };
        let tokens = [0, 49, 7, 7, 21];
        for scale in [1.0, 2.5] {
            let found = embed(&mut device, &batch(&tokens), scale);
            assert_eq!(bits(&found), bits(&expected(&tokens, scale)), "{kind:?}");
        }

        // Two tokens are sampled, and the next step takes them from the device.
        let mut logits = vec![0.0; 2 * vocabulary];
        (logits[33], logits[vocabulary + 4]) = (1.0, 1.0);
        let logits = residual(&mut device, vocabulary, &logits);
        let row = quell::internals::sampling::SampleRow {
            params: Arc::new(SamplingParams::greedy()),
            position: 1,
            history: Vec::new(),
            prompt_tokens: 0,
            ..quell::internals::sampling::SampleRow::default()
        };
        let pending = device.sample(&logits, &[row.clone(), row]).unwrap();
        let mut fed = batch(&[11, 0, 12, 0]);
        for (row, sample) in [(1, 1), (3, 0)] {
            fed.feedback.push(Feedback { row, sample });
        }
        let found = embed(&mut device, &fed, 1.0);
        assert_eq!(
            bits(&found),
            bits(&expected(&[11, 4, 12, 33], 1.0)),
            "{kind:?}"
        );
        assert_eq!(device.collect(pending).unwrap().tokens.len(), 2);
    }
}

#[test]
fn sampled_rows_are_gathered_in_their_order() {
    let _gpu = gpu::lock();
    let mut random = Random::new(36);
    let mut device = device(CudaActivations::Bf16);
    let (rows, columns) = (6, 136);
    let x = random.numbers(rows * columns);
    let stream = residual(&mut device, columns, &x);
    let mut out = device.allocate(rows, columns, Precision::Full).unwrap();
    let mut batch = batch(&[1; 6]);
    batch.sample_rows = vec![0, 2, 5];
    device.stage(&batch).unwrap();
    device.gather_samples(&stream, &mut out).unwrap();
    device.finish(Ok(())).unwrap();
    let expected: Vec<f32> = [0, 2, 5]
        .iter()
        .flat_map(|row| x[row * columns..(row + 1) * columns].to_vec())
        .collect();
    assert_eq!(bits(&device.values(&out, 3).unwrap()), bits(&expected));
}

#[test]
fn blocks_of_the_cache_are_poisoned_and_copied_in_every_layer() {
    let _gpu = gpu::lock();
    let mut device = device(CudaActivations::F16);
    let shape = CacheShape {
        layers: 3,
        kv_heads: 2,
        head_dim: 32,
        blocks: 5,
        block_tokens: 16,
        values: Values::BesideKeys,
    };
    let elements = 2 * 32 * 16;
    assert_eq!(device.cache_bytes(&shape), 2 * 2 * 3 * 5 * elements);
    let mut cache = device.allocate_cache(&shape).unwrap();
    device.poison(&mut cache, &[3, 1]).unwrap();
    let poisoned = |cache: &CudaCache, device: &CudaDevice| {
        let mut blocks = Vec::new();
        for layer in 0..3 {
            for block in 0..5 {
                let (keys, values) = cache.read(device, layer, block).unwrap();
                assert_eq!((keys.len(), values.len()), (elements, elements));
                let count = keys
                    .iter()
                    .chain(&values)
                    .filter(|&&bits| f16::from_bits(bits).is_nan())
                    .count();
                assert!(count == 0 || count == 2 * elements, "part of block {block}");
                if count > 0 {
                    blocks.push((layer, block));
                }
            }
        }
        blocks
    };
    let all = |blocks: &[usize]| -> Vec<(usize, usize)> {
        let layers = (0..3).flat_map(|layer| blocks.iter().map(move |&block| (layer, block)));
        layers.collect()
    };
    assert_eq!(poisoned(&cache, &device), all(&[1, 3]));
    device.copy_blocks(&mut cache, &[[0, 3], [1, 4]]).unwrap();
    assert_eq!(poisoned(&cache, &device), all(&[1, 4]));

    assert!(device.poison(&mut cache, &[5]).is_err());
    assert!(device.copy_blocks(&mut cache, &[[0, 5]]).is_err());
    assert!(device.copy_blocks(&mut cache, &[[0, 1], [1, 2]]).is_err());
    assert!(device.copy_blocks(&mut cache, &[[0, 1], [2, 1]]).is_err());
    for wrong in [
        CacheShape {
            block_tokens: 8,
            ..shape
        },
        CacheShape {
            block_tokens: 0,
            ..shape
        },
        CacheShape {
            head_dim: 20,
            ..shape
        },
    ] {
        let error = device.allocate_cache(&wrong).err();
        assert!(
            matches!(error, Some(DeviceError::Unsupported { device: "cuda", .. })),
            "{wrong:?}: {error:?}"
        );
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let _gpu = gpu::lock();
    let mut device = device(CudaActivations::Bf16);
    let weight = device.load_vector(&[1.0; 16]).unwrap();
    let x = residual(&mut device, 16, &[1.0; 32]);
    let narrow = residual(&mut device, 8, &[1.0; 16]);
    let mut out = device.allocate(2, 16, Precision::Activation).unwrap();
    let mut full = device.allocate(2, 16, Precision::Full).unwrap();
    assert!(device.rms_norm(&x, &weight, EPSILON, 2, &mut out).is_ok());
    assert!(device.rms_norm(&x, &weight, EPSILON, 3, &mut out).is_err());
    assert!(
        device
            .rms_norm(&narrow, &weight, EPSILON, 2, &mut out)
            .is_err()
    );
    assert!(device.rms_norm(&x, &weight, EPSILON, 2, &mut full).is_err());
    assert!(device.add(&mut full, &narrow, 1).is_err());
    assert!(device.softcap(&mut out, 30.0, 1).is_err());
}

#[test]
fn pooled_rows_are_exact_sums_of_the_stored_values() {
    let _gpu = gpu::lock();
    let mut random = Random::new(37);
    for kind in TYPES {
        let mut device = device(kind);
        for columns in [8, 136, 520] {
            let rows = 23;
            let mut values = random.numbers(rows * columns);
            values.iter_mut().for_each(|value| *value *= 100.0);
            (values[3], values[columns + 7]) = (f32::NAN, -50_000.0);
            let x = activations(&mut device, columns, &values);
            let kept = device.values(&x, rows).unwrap();
            let ranges = [0..1, 1..23, 5..5, 2..9, 9..23];
            let expected = ranges.clone().map(|range| {
                let mut sum = PooledRows::new(columns);
                range.for_each(|row| sum.add_row(&kept[row * columns..][..columns]));
                sum
            });
            let pooling = device.pool(&x, &ranges).unwrap();
            // The second pooling is in flight while the first one is collected.
            let next = device.pool(&x, &ranges[3..]).unwrap();
            assert_eq!(device.collect_pooled(pooling).unwrap(), expected);
            assert_eq!(device.collect_pooled(next).unwrap(), expected[3..]);
            let unsound = |sum: &PooledRows| {
                let mean = sum.mean().unwrap();
                mean.iter().filter(|value| value.is_nan()).count()
            };
            assert_eq!((unsound(&expected[0]), unsound(&expected[1])), (1, 1));
            assert!(device.pool(&x, &[0..23, 2..24]).is_err());
        }
    }
}
