//! What some models do to the residual stream agrees with float64, and gives a row the same bits
//! whatever rows are beside it.

use common::cpu::*;
use quell::internals::device::cpu::{CpuDevice, CpuTensor};
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{Activations, SimdLevel};

const ROWS: usize = 5;

fn new(level: SimdLevel) -> CpuDevice {
    device(level, 2, Activations::Auto)
}

fn near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= 1e-5 * (1.0 + expected.abs()),
            "{what}: {found}, not {expected}"
        );
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

#[test]
fn gates_multiply_their_columns_of_the_inputs() {
    let (columns, all, first) = (24, 72, 24);
    let mut random = Random::new(1);
    let (gate, inputs) = (random.numbers(ROWS * columns), random.numbers(ROWS * all));
    let expected: Vec<f64> = (0..ROWS * columns)
        .map(|at| {
            let (row, column) = (at / columns, at % columns);
            let x = f64::from(gate[at]);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh()) * f64::from(inputs[row * all + first + column])
        })
        .collect();
    for level in levels() {
        let mut d = new(level);
        let mut gate = tensor(&mut d, columns, &gate);
        let inputs = tensor(&mut d, all, &inputs);
        let gelu = Activation::GeluTanh;
        d.gate_columns(&mut gate, gelu, &inputs, first, ROWS)
            .unwrap();
        near(&values(&gate, ROWS), &expected, "gate");
        let beyond = d.gate_columns(&mut gate, gelu, &inputs, all - columns + 1, ROWS);
        assert!(beyond.is_err());
    }
}

#[test]
fn each_part_of_a_row_is_normalised_on_its_own() {
    let (columns, part) = (60, 20);
    let mut random = Random::new(2);
    let (x, weight) = (random.numbers(ROWS * columns), random.numbers(part));
    let before = random.numbers(ROWS * columns);
    let mut expected = wide(&before);
    for (x, sum) in wide(&x).chunks(part).zip(expected.chunks_mut(part)) {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / part as f64;
        let factor = 1.0 / (mean + 1e-3).sqrt();
        for ((sum, x), weight) in sum.iter_mut().zip(x).zip(&weight) {
            *sum += x * factor * f64::from(*weight);
        }
    }
    for level in levels() {
        let mut d = new(level);
        let weight = d.load_vector(&weight).unwrap();
        let x = tensor(&mut d, columns, &x);
        let mut sum = tensor(&mut d, columns, &before);
        d.rms_norm_add(&x, &weight, 1e-3, ROWS, &mut sum).unwrap();
        near(&values(&sum, ROWS), &expected, "parts");
        let odd = d.load_vector(&[1.0; 7]).unwrap();
        assert!(d.rms_norm_add(&x, &odd, 1e-3, ROWS, &mut sum).is_err());
    }
}

#[test]
fn tokens_outside_a_table_have_the_embedding_of_token_0() {
    let mut d = new(SimdLevel::Auto);
    let stored: Vec<f32> = (0..3 * 16).map(|at| at as f32).collect();
    let bytes: Vec<u8> = stored
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let rows = WeightRows {
        dtype: DType::F32,
        rows: 3,
        columns: 16,
        data: &bytes,
        order: RowOrder::AsStored,
    };
    let spec = LinearSpec {
        parts: vec![rows],
        bias: None,
    };
    let table = d.load_linear(&spec).unwrap();
    let mut batch = Batch::new(1);
    batch.push(&[2, 7, 0], 0, 16, [(0, [0])]);
    d.stage(&batch).unwrap();
    let mut out = d.allocate(3, 16, Precision::Full).unwrap();
    d.embed_within(&table, 2.0, &mut out).unwrap();
    for (row, token) in [2, 0, 0].into_iter().enumerate() {
        let expected: Vec<f32> = stored[token * 16..][..16].iter().map(|x| 2.0 * x).collect();
        assert_eq!(out.row(row), expected);
    }
}

/// Three streams, what is routed in each row, and the weights of `count` factors.
fn streams(seed: u64, count: usize) -> (Vec<Vec<f32>>, Vec<f32>, Vec<f32>) {
    let mut random = Random::new(seed);
    let streams = (0..3).map(|_| random.numbers(ROWS * 40)).collect();
    (streams, random.numbers(ROWS * 3), random.numbers(count * 3))
}

/// Returns a factor of a row.
fn factor(routed: &[f32], weights: &[f32], row: usize, index: usize) -> f64 {
    let products = routed[3 * row..][..3].iter().zip(&weights[3 * index..]);
    products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn streams_are_mixed_by_the_factors_of_each_row() {
    let (streams, routed, weights) = streams(3, 9);
    let mut d = new(SimdLevel::Auto);
    let own: Vec<CpuTensor> = streams.iter().map(|own| tensor(&mut d, 40, own)).collect();
    let rows = tensor(&mut d, 3, &routed);
    let vector = d.load_vector(&weights).unwrap();
    let mut out: Vec<CpuTensor> = streams
        .iter()
        .map(|own| tensor(&mut d, 40, &vec![0.0; own.len()]))
        .collect();
    d.mix_streams(&own, &rows, &vector, ROWS, &mut out).unwrap();
    for (i, out) in out.iter().enumerate() {
        let expected: Vec<f64> = (0..ROWS * 40)
            .map(|at| {
                let mixed = (0..3).map(|j| {
                    factor(&routed, &weights, at / 40, 3 * i + j) * f64::from(streams[j][at])
                });
                f64::from(streams[i][at]) + mixed.sum::<f64>()
            })
            .collect();
        near(&values(out, ROWS), &expected, "mixed");
    }
    let fewer = d.mix_streams(&own[..2], &rows, &vector, ROWS, &mut out[..2]);
    assert!(fewer.is_err());
}

#[test]
fn streams_are_corrected_by_what_changed_in_the_active_one() {
    let (streams, routed, weights) = streams(4, 3);
    let updated = Random::new(5).numbers(ROWS * 40);
    let mut d = new(SimdLevel::Auto);
    let mut own: Vec<CpuTensor> = streams.iter().map(|own| tensor(&mut d, 40, own)).collect();
    let (rows, update) = (tensor(&mut d, 3, &routed), tensor(&mut d, 40, &updated));
    let vector = d.load_vector(&weights).unwrap();
    d.correct_streams(&update, (&rows, &vector), 1, ROWS, &mut own)
        .unwrap();
    for (i, own) in own.iter().enumerate() {
        let expected: Vec<f64> = (0..ROWS * 40)
            .map(|at| {
                let change = f64::from(updated[at]) - f64::from(streams[1][at]);
                let factor = 1.0 + factor(&routed, &weights, at / 40, i);
                f64::from(streams[i][at]) + factor * change
            })
            .collect();
        near(&values(own, ROWS), &expected, "corrected");
    }
    let absent = d.correct_streams(&update, (&rows, &vector), 3, ROWS, &mut own);
    assert!(absent.is_err());
}

#[test]
fn only_gates_far_above_their_mean_are_left() {
    let mut random = Random::new(6);
    let gate_up = random.numbers(ROWS * 128);
    let mut expected = wide(&gate_up);
    for row in expected.chunks_mut(128) {
        let gate = &mut row[..64];
        let mean = gate.iter().sum::<f64>() / 64.0;
        let variance = gate.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 64.0;
        let cut = mean + 1.25 * variance.sqrt();
        gate.iter_mut().for_each(|x| *x = (*x - cut).max(0.0));
    }
    let mut d = new(SimdLevel::Auto);
    let mut out = tensor(&mut d, 128, &gate_up);
    d.cut_gate(&mut out, 1.25, ROWS).unwrap();
    let found = values(&out, ROWS);
    near(&found, &expected, "cut");
    let left = found
        .chunks(128)
        .flat_map(|row| &row[..64])
        .filter(|x| **x > 0.0);
    assert!((1..64).contains(&left.count()));
    // A row that is not finite stays so.
    let mut out = tensor(&mut d, 128, &[f32::NAN; 128]);
    d.cut_gate(&mut out, 1.25, 1).unwrap();
    assert!(out.row(0).iter().all(|x| x.is_nan()));
}

#[test]
fn magnitudes_match_those_of_another_row_unless_there_is_none() {
    let mut random = Random::new(7);
    let (like, mut x) = (random.numbers(2 * 48), random.numbers(2 * 48));
    x[48..].fill(0.0);
    let mut d = new(SimdLevel::Auto);
    let like = tensor(&mut d, 48, &like);
    let mut out = tensor(&mut d, 48, &x);
    d.match_magnitude(&mut out, &like, 1e-5, 2).unwrap();
    let square = |row: &[f32]| wide(row).iter().map(|x| x * x).sum::<f64>();
    assert!((square(out.row(0)) / square(like.row(0)) - 1.0).abs() < 1e-5);
    assert_eq!(out.row(1), [0.0; 48]);
}

#[test]
fn rows_are_copied_scaled_and_multiplied() {
    let mut d = new(SimdLevel::Auto);
    let x = Random::new(8).numbers(2 * 20);
    let (from, weight) = (tensor(&mut d, 20, &x), Random::new(9).numbers(20));
    let mut out = tensor(&mut d, 20, &[0.0; 40]);
    d.copy(&from, 2, &mut out).unwrap();
    assert_eq!(values(&out, 2), x);
    d.scale(&mut out, 0.5, 1).unwrap();
    assert_eq!(out.row(1), &x[20..]);
    assert!(
        out.row(0)
            .iter()
            .zip(&x)
            .all(|(found, x)| *found == 0.5 * x)
    );
    let vector = d.load_vector(&weight).unwrap();
    d.multiply(&from, &vector, 2, &mut out).unwrap();
    for (at, found) in values(&out, 2).iter().enumerate() {
        assert_eq!(*found, x[at] * weight[at % 20]);
    }
}
