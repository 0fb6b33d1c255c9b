//! Feed-forward parts whose activation has no gate agree with float64.

use common::cpu::*;
use quell::Activations;
use quell::internals::device::*;
use quell::internals::weights::DType;

fn near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= 1e-4 * (1.0 + expected.abs()),
            "{what}: {found}, not {expected}"
        );
    }
}

fn squared_relu(x: f64) -> f64 {
    x.max(0.0) * x.max(0.0)
}

fn product(weights: &[f32], columns: usize, x: &[f64]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
    weights.chunks(columns).map(dot).collect()
}

fn spec(data: &[u8], rows: usize, columns: usize) -> LinearSpec<'_> {
    let part = WeightRows {
        dtype: DType::F32,
        rows,
        columns,
        data,
        order: RowOrder::AsStored,
    };
    LinearSpec {
        parts: vec![part],
        bias: None,
    }
}

#[test]
fn the_squared_relu_reads_no_gate_and_keeps_what_is_not_a_number() {
    let mut random = Random::new(51);
    for (rows, columns) in [(1, 1), (3, 7), (5, 40)] {
        let mut x = random.numbers(rows * columns);
        x[0] = f32::NAN;
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let up = tensor(&mut d, columns, &x);
            let mut out = d.allocate(rows, columns, Precision::Full).unwrap();
            d.gated_activation(&up, Activation::SquaredRelu, rows, &mut out)
                .unwrap();
            let found = values(&out, rows);
            assert!(found[0].is_nan());
            let expected: Vec<f64> = x[1..].iter().map(|&x| squared_relu(x.into())).collect();
            near(&found[1..], &expected, &format!("{level:?}"));
            // There is no gate in front of it.
            let wide = d.allocate(rows, 2 * columns, Precision::Full).unwrap();
            d.gated_activation(&wide, Activation::SquaredRelu, rows, &mut out)
                .unwrap_err();
        }
    }
}

#[test]
fn the_exact_gelu_agrees_with_float64_even_far_from_zero() {
    let mut random = Random::new(53);
    let mut x: Vec<f32> = random.numbers(400).iter().map(|x| x * 12.0).collect();
    x[0] = f32::NAN;
    for level in levels() {
        let mut d = device(level, 2, Activations::Auto);
        let up = tensor(&mut d, 40, &x);
        let mut out = d.allocate(10, 40, Precision::Full).unwrap();
        d.gated_activation(&up, Activation::Gelu, 10, &mut out)
            .unwrap();
        let found = values(&out, 10);
        assert!(found[0].is_nan());
        for (found, &x) in found[1..].iter().zip(&x[1..]) {
            let expected = gelu(f64::from(x));
            let error = (f64::from(*found) - expected).abs();
            assert!(
                error <= 1e-6 * (1.0 + expected.abs()),
                "{level:?}: gelu({x}) is {found}"
            );
        }
    }
}

#[test]
fn experts_without_a_gate_agree_with_float64() {
    let mut random = Random::new(52);
    let (count, columns, hidden, rows) = (3, 32, 24, 5);
    let mut matrices = |rows, columns| -> Vec<Vec<u8>> {
        let make = |_| weights(&mut random, DType::F32, rows, columns);
        (0..count).map(make).collect()
    };
    let (up, down) = (matrices(hidden, columns), matrices(columns, hidden));
    let x = random.numbers(rows * columns);
    let logits = random.numbers(rows * count);
    let routing = RoutingSpec {
        top_k: count,
        score: RouterScore::Softmax,
        normalize: true,
        activation: Activation::SquaredRelu,
    };
    let mut expected = Vec::new();
    for (x, logits) in x.chunks(columns).zip(logits.chunks(count)) {
        let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let shares: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
        let total: f64 = shares.iter().sum();
        let mut sum = vec![0.0; columns];
        for (expert, share) in shares.iter().enumerate() {
            let up = dequantized(DType::F32, &up[expert], hidden * columns);
            let down = dequantized(DType::F32, &down[expert], hidden * columns);
            let inner = product(&up, columns, &x).into_iter().map(squared_relu);
            let y = product(&down, hidden, &inner.collect::<Vec<_>>());
            let sums = sum.iter_mut().zip(y);
            sums.for_each(|(sum, y)| *sum += share / total * y);
        }
        expected.extend(sum);
    }
    for level in levels() {
        let mut d = device(level, 2, Activations::Auto);
        let up: Vec<_> = up.iter().map(|data| spec(data, hidden, columns)).collect();
        let down: Vec<_> = down
            .iter()
            .map(|data| spec(data, columns, hidden))
            .collect();
        let loaded = d.load_experts(&up, &down, None, None).unwrap();
        let x = tensor(&mut d, columns, &x);
        let router = tensor(&mut d, count, &logits);
        let mut out = d.allocate(rows, columns, Precision::Full).unwrap();
        d.experts(&x, &router, routing, &loaded, rows, &mut out)
            .unwrap();
        near(&values(&out, rows), &expected, &format!("{level:?}"));
        let gated = RoutingSpec {
            activation: Activation::Silu,
            ..routing
        };
        let error = d.experts(&x, &router, gated, &loaded, rows, &mut out);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("Silu"), "{error}");
    }
}
