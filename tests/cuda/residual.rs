//! What some models do to the residual stream agrees with float64 on the CUDA device, and gives a
//! row the same bits whatever rows are beside it.

use crate::layer::{TYPES, device, kept, rounding};
use common::cpu::{Random, bits};
use common::gpu;
use quell::CudaActivations;
use quell::internals::device::cuda::{CudaDevice, CudaTensor};
use quell::internals::device::*;

/// Rows and columns, of which the last are more than a block has threads for.
const SHAPES: [(usize, usize); 4] = [(1, 8), (5, 48), (3, 2056), (2, 4096)];

fn full(device: &mut CudaDevice, columns: usize, values: &[f32]) -> CudaTensor {
    device.tensor(columns, Precision::Full, values).unwrap()
}

fn narrow(device: &mut CudaDevice, columns: usize, values: &[f32]) -> CudaTensor {
    let precision = Precision::Activation;
    device.tensor(columns, precision, values).unwrap()
}

fn numbers(random: &mut Random, kind: CudaActivations, count: usize) -> Vec<f32> {
    let numbers = random.numbers(count).into_iter();
    numbers.map(|value| kept(kind, value)).collect()
}

/// Compares with float64. `tolerance` is relative to the result, or to 1 if that is less.
fn near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * expected.abs().max(1.0),
            "{what}: {found} at {at} instead of {expected}"
        );
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

fn mean_square(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64
}

/// Checks an operation with all rows and with each row alone: the bits must be the same. `compute`
/// computes some rows. Returns the results.
fn row_by_row(
    (rows, columns): (usize, usize),
    what: &str,
    mut compute: impl FnMut(std::ops::Range<usize>) -> Vec<f32>,
) -> Vec<f32> {
    let together = compute(0..rows);
    let alone: Vec<f32> = (0..rows).flat_map(|row| compute(row..row + 1)).collect();
    assert_eq!(together.len(), rows * columns, "{what}");
    assert!(bits(&together) == bits(&alone), "{what}");
    together
}

#[test]
fn rows_are_copied_scaled_and_multiplied() {
    let _gpu = gpu::lock();
    let mut random = Random::new(81);
    for kind in TYPES {
        let mut d = device(kind);
        for (rows, columns) in SHAPES {
            let what = format!("{rows} × {columns} in {kind:?}");
            let (x, weight) = (random.numbers(rows * columns), random.numbers(columns));
            let from = full(&mut d, columns, &x);
            let vector = d.load_vector(&weight).unwrap();
            let mut copy = full(&mut d, columns, &vec![f32::NAN; x.len()]);
            d.copy(&from, rows, &mut copy).unwrap();
            assert_eq!(d.values(&copy, rows).unwrap(), x, "{what}");
            d.scale(&mut copy, 0.3, rows).unwrap();
            let scaled: Vec<f32> = x.iter().map(|x| x * 0.3).collect();
            assert_eq!(d.values(&copy, rows).unwrap(), scaled, "{what}");
            let mut out = narrow(&mut d, columns, &vec![f32::NAN; x.len()]);
            d.copy(&from, rows, &mut out).unwrap();
            let rounded: Vec<f32> = x.iter().map(|x| kept(kind, *x)).collect();
            assert_eq!(d.values(&out, rows).unwrap(), rounded, "{what}");
            d.multiply(&from, &vector, rows, &mut out).unwrap();
            let products = x.iter().zip(weight.iter().cycle());
            let products: Vec<f32> = products.map(|(x, w)| kept(kind, x * w)).collect();
            assert_eq!(d.values(&out, rows).unwrap(), products, "{what}");
        }
    }
}

#[test]
fn gates_multiply_their_columns_of_the_inputs() {
    let _gpu = gpu::lock();
    let mut random = Random::new(82);
    for kind in TYPES {
        let mut d = device(kind);
        for (rows, columns) in SHAPES {
            let (all, first) = (3 * columns, columns);
            let gate = numbers(&mut random, kind, rows * columns);
            let inputs = random.numbers(rows * all);
            for activation in [Activation::GeluTanh, Activation::Silu] {
                let what = format!("{activation:?} of {rows} × {columns} in {kind:?}");
                let expected: Vec<f64> = (0..rows * columns)
                    .map(|at| {
                        let x = f64::from(gate[at]);
                        let z = match activation {
                            Activation::Silu => x,
                            _ => 1.595_769_121_605_73 * (x + 0.044_715 * x.powi(3)),
                        };
                        let input = inputs[at / columns * all + first + at % columns];
                        x / (1.0 + (-z).exp()) * f64::from(input)
                    })
                    .collect();
                let found = row_by_row((rows, columns), &what, |range| {
                    let gate = &gate[range.start * columns..range.end * columns];
                    let mut gate = narrow(&mut d, columns, gate);
                    let inputs = &inputs[range.start * all..range.end * all];
                    let inputs = full(&mut d, all, inputs);
                    d.gate_columns(&mut gate, activation, &inputs, first, range.len())
                        .unwrap();
                    d.values(&gate, range.len()).unwrap()
                });
                near(&found, &expected, rounding(kind) + 1e-5, &what);
            }
            let mut gate = narrow(&mut d, columns, &gate);
            let inputs = full(&mut d, all, &inputs);
            let beyond = all - columns + 8;
            let refused = d.gate_columns(&mut gate, Activation::GeluTanh, &inputs, beyond, rows);
            assert!(matches!(refused, Err(DeviceError::Failed { .. })));
            let relu = Activation::SquaredRelu;
            let refused = d.gate_columns(&mut gate, relu, &inputs, first, rows);
            assert!(matches!(refused, Err(DeviceError::Unsupported { .. })));
        }
    }
}

#[test]
fn each_part_of_a_row_is_normalised_on_its_own() {
    let _gpu = gpu::lock();
    let mut random = Random::new(83);
    for kind in TYPES {
        let mut d = device(kind);
        for (rows, parts, length) in [(5, 6, 16), (2, 3, 264)] {
            let columns = parts * length;
            let x = numbers(&mut random, kind, rows * columns);
            let (before, weight) = (random.numbers(x.len()), random.numbers(length));
            let vector = d.load_vector(&weight).unwrap();
            let mut expected = wide(&before);
            for (x, sum) in wide(&x).chunks(length).zip(expected.chunks_mut(length)) {
                let factor = 1.0 / (mean_square(x) + 1e-3).sqrt();
                for ((sum, x), weight) in sum.iter_mut().zip(x).zip(&weight) {
                    *sum += x * factor * f64::from(*weight);
                }
            }
            let found = row_by_row((rows, columns), "parts", |range| {
                let own = range.start * columns..range.end * columns;
                let x = narrow(&mut d, columns, &x[own.clone()]);
                let mut sum = full(&mut d, columns, &before[own]);
                d.rms_norm_add(&x, &vector, 1e-3, range.len(), &mut sum)
                    .unwrap();
                d.values(&sum, range.len()).unwrap()
            });
            near(&found, &expected, 2e-6, "parts");
            let x = narrow(&mut d, columns, &x);
            let mut sum = full(&mut d, columns, &before);
            for length in [length - 1, columns + 8, 0] {
                let odd = d.load_vector(&vec![1.0; length]).unwrap();
                let refused = d.rms_norm_add(&x, &odd, 1e-3, rows, &mut sum);
                assert!(matches!(refused, Err(DeviceError::Failed { .. })));
            }
        }
    }
}

#[test]
fn activations_are_normalised_to_full_precision() {
    let _gpu = gpu::lock();
    let mut random = Random::new(84);
    for kind in TYPES {
        let mut d = device(kind);
        for (rows, columns) in SHAPES {
            let what = format!("{rows} × {columns} in {kind:?}");
            let x = numbers(&mut random, kind, rows * columns);
            let weight = random.numbers(columns);
            let vector = d.load_vector(&weight).unwrap();
            let expected: Vec<f64> = (wide(&x).chunks(columns))
                .flat_map(|row| {
                    let factor = 1.0 / (mean_square(row) + 1e-5).sqrt();
                    let scaled = row.iter().zip(&weight);
                    scaled
                        .map(|(x, w)| x * factor * f64::from(*w))
                        .collect::<Vec<_>>()
                })
                .collect();
            let found = row_by_row((rows, columns), &what, |range| {
                let own = &x[range.start * columns..range.end * columns];
                let x = narrow(&mut d, columns, own);
                let mut out = full(&mut d, columns, &vec![f32::NAN; own.len()]);
                d.rms_norm(&x, &vector, 1e-5, range.len(), &mut out)
                    .unwrap();
                d.values(&out, range.len()).unwrap()
            });
            near(&found, &expected, 2e-6, &what);
        }
    }
}

#[test]
fn magnitudes_match_those_of_another_row_unless_there_is_none() {
    let _gpu = gpu::lock();
    let mut random = Random::new(85);
    for kind in TYPES {
        let mut d = device(kind);
        for ((rows, columns), is_full) in SHAPES.into_iter().flat_map(|s| [(s, true), (s, false)]) {
            let what = format!("{rows} × {columns} in {kind:?}, {is_full}");
            let mut x = numbers(&mut random, kind, rows * columns);
            // The last row has no magnitude.
            x[(rows - 1) * columns..].fill(0.0);
            let like = random.numbers(x.len());
            let pairs = wide(&x);
            let pairs = pairs.chunks(columns).zip(like.chunks(columns));
            let expected: Vec<f64> = pairs
                .flat_map(|(x, like)| {
                    let factor = mean_square(&wide(like)) / mean_square(x).max(1e-5);
                    x.iter().map(|x| x * factor.sqrt()).collect::<Vec<_>>()
                })
                .collect();
            let found = row_by_row((rows, columns), &what, |range| {
                let own = range.start * columns..range.end * columns;
                let mut x = match is_full {
                    true => full(&mut d, columns, &x[own.clone()]),
                    false => narrow(&mut d, columns, &x[own.clone()]),
                };
                let like = full(&mut d, columns, &like[own]);
                d.match_magnitude(&mut x, &like, 1e-5, range.len()).unwrap();
                d.values(&x, range.len()).unwrap()
            });
            let tolerance = if is_full { 2e-6 } else { rounding(kind) };
            near(&found, &expected, tolerance, &what);
        }
    }
}

/// Streams, what is routed in each row, and the weights of `factors` factors.
struct Streams {
    streams: Vec<Vec<f32>>,
    routed: Vec<f32>,
    weights: Vec<f32>,
}

impl Streams {
    fn new(
        random: &mut Random,
        count: usize,
        factors: usize,
        (rows, columns): (usize, usize),
    ) -> Self {
        Self {
            streams: (0..count).map(|_| random.numbers(rows * columns)).collect(),
            routed: random.numbers(rows * count),
            weights: random.numbers(factors * count),
        }
    }

    /// Returns a factor of a row.
    fn factor(&self, row: usize, index: usize) -> f64 {
        let count = self.streams.len();
        let routed = self.routed[count * row..][..count].iter();
        let products = routed.zip(&self.weights[count * index..]);
        products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }
}

#[test]
fn streams_are_mixed_and_corrected_by_the_factors_of_each_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(86);
    let mut d = device(CudaActivations::F16);
    for (count, active) in [(1, 0), (2, 0), (3, 2), (4, 1)] {
        for (rows, columns) in SHAPES {
            let what = format!("{count} streams of {rows} × {columns}");
            let shape = (rows, columns);
            let all = Streams::new(&mut random, count, count * count, shape);
            let vector = d.load_vector(&all.weights).unwrap();
            let at_rows = |values: &[f32], range: &std::ops::Range<usize>, columns: usize| {
                values[range.start * columns..range.end * columns].to_vec()
            };
            for i in 0..count {
                let expected: Vec<f64> = (0..rows * columns)
                    .map(|at| {
                        let factor = |j| all.factor(at / columns, count * i + j);
                        let mixed = (0..count).map(|j| factor(j) * f64::from(all.streams[j][at]));
                        f64::from(all.streams[i][at]) + mixed.sum::<f64>()
                    })
                    .collect();
                let found = row_by_row(shape, &what, |range| {
                    let own = all.streams.iter().map(|own| at_rows(own, &range, columns));
                    let own: Vec<CudaTensor> = own.map(|own| full(&mut d, columns, &own)).collect();
                    let none = vec![f32::NAN; range.len() * columns];
                    let mut out: Vec<CudaTensor> =
                        (0..count).map(|_| full(&mut d, columns, &none)).collect();
                    let routed = full(&mut d, count, &at_rows(&all.routed, &range, count));
                    d.mix_streams(&own, &routed, &vector, range.len(), &mut out)
                        .unwrap();
                    d.values(&out[i], range.len()).unwrap()
                });
                near(&found, &expected, 2e-6, &what);
            }

            let all = Streams::new(&mut random, count, count, shape);
            let updated = random.numbers(rows * columns);
            let vector = d.load_vector(&all.weights).unwrap();
            for i in 0..count {
                let expected: Vec<f64> = (0..rows * columns)
                    .map(|at| {
                        let change = f64::from(updated[at]) - f64::from(all.streams[active][at]);
                        let factor = 1.0 + all.factor(at / columns, i);
                        f64::from(all.streams[i][at]) + factor * change
                    })
                    .collect();
                let found = row_by_row(shape, &what, |range| {
                    let own = all.streams.iter().map(|own| at_rows(own, &range, columns));
                    let mut own: Vec<CudaTensor> =
                        own.map(|own| full(&mut d, columns, &own)).collect();
                    let routed = full(&mut d, count, &at_rows(&all.routed, &range, count));
                    let update = full(&mut d, columns, &at_rows(&updated, &range, columns));
                    let factors = (&routed, &vector);
                    d.correct_streams(&update, factors, active, range.len(), &mut own)
                        .unwrap();
                    d.values(&own[i], range.len()).unwrap()
                });
                near(&found, &expected, 2e-6, &what);
            }
        }
    }
}

#[test]
fn streams_that_do_not_fit_are_refused() {
    let _gpu = gpu::lock();
    let mut d = device(CudaActivations::F16);
    let mut streams: Vec<CudaTensor> = (0..5).map(|_| full(&mut d, 16, &[0.0; 16])).collect();
    let mut out: Vec<CudaTensor> = (0..5).map(|_| full(&mut d, 16, &[0.0; 16])).collect();
    let update = full(&mut d, 16, &[0.0; 16]);
    let (two, five) = (full(&mut d, 2, &[0.0; 2]), full(&mut d, 5, &[0.0; 5]));
    let vector = d.load_vector(&[0.0; 8]).unwrap();
    let failed = |result| assert!(matches!(result, Err(DeviceError::Failed { .. })));
    failed(d.mix_streams(&streams[..2], &five, &vector, 1, &mut out[..2]));
    failed(d.mix_streams(&streams[..3], &two, &vector, 1, &mut out[..3]));
    failed(d.mix_streams(&streams[..2], &two, &vector, 1, &mut out[..3]));
    let short = d.load_vector(&[0.0; 4]).unwrap();
    failed(d.mix_streams(&streams[..2], &two, &short, 1, &mut out[..2]));
    failed(d.correct_streams(&update, (&two, &short), 2, 1, &mut streams[..2]));
    failed(d.correct_streams(&update, (&two, &vector), 1, 1, &mut streams[..2]));
    d.correct_streams(&update, (&two, &short), 1, 1, &mut streams[..2])
        .unwrap();
    // Models with more streams than there are kernels for are refused before anything is loaded.
    let many = d.load_vector(&[0.0; 125]).unwrap();
    let refused = d.mix_streams(&streams, &five, &many, 1, &mut out);
    assert!(matches!(refused, Err(DeviceError::Unsupported { .. })));
    let mut limits = crate::layer::limits(16);
    limits.model.streams = 5;
    let refused = d.reserve(&limits);
    assert!(matches!(refused, Err(DeviceError::Unsupported { .. })));
}

#[test]
fn only_gates_far_above_their_mean_are_left() {
    let _gpu = gpu::lock();
    let mut random = Random::new(87);
    for kind in TYPES {
        let mut d = device(kind);
        let mut all_left = 0;
        for (rows, columns) in SHAPES {
            let what = format!("{rows} × {columns} in {kind:?}");
            let gate_up = numbers(&mut random, kind, rows * 2 * columns);
            let mut expected = wide(&gate_up);
            for row in expected.chunks_mut(2 * columns) {
                let gate = &mut row[..columns];
                let mean = gate.iter().sum::<f64>() / columns as f64;
                let centred: Vec<f64> = gate.iter().map(|x| x - mean).collect();
                let cut = mean + 1.25 * mean_square(&centred).sqrt();
                gate.iter_mut().for_each(|x| *x = (*x - cut).max(0.0));
            }
            let found = row_by_row((rows, 2 * columns), &what, |range| {
                let own = &gate_up[range.start * 2 * columns..range.end * 2 * columns];
                let mut own = narrow(&mut d, 2 * columns, own);
                d.cut_gate(&mut own, 1.25, range.len()).unwrap();
                d.values(&own, range.len()).unwrap()
            });
            near(&found, &expected, rounding(kind) + 1e-6, &what);
            let gates = found.chunks(2 * columns).flat_map(|row| &row[..columns]);
            all_left += gates.filter(|x| **x > 0.0).count();
        }
        let all: usize = SHAPES.iter().map(|(rows, columns)| rows * columns).sum();
        assert!((1..all / 2).contains(&all_left), "{all_left} of {all}");
        // A row that is not finite stays so.
        let mut row = narrow(&mut d, 32, &[f32::NAN; 32]);
        d.cut_gate(&mut row, 1.25, 1).unwrap();
        assert!(d.values(&row, 1).unwrap().iter().all(|x| x.is_nan()));
    }
}
