//! The CPU device's recurrent layers agree with float64, whatever the steps, and keep the states
//! that they are asked to keep.

use common::cpu::*;
use quell::internals::device::cpu::{CpuCache, CpuDevice, CpuTensor};
use quell::internals::device::*;
use quell::{Activations, SimdLevel};

/// Rows of the sequence that the tests compute.
const ROWS: usize = 19;

/// What an operation computes of rows, given the part of the state that it uses.
type Operation<'a> = dyn Fn(&mut CpuDevice, &mut CpuCache, StatePart, &[usize]) -> Vec<f32> + 'a;

fn near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        let bound = 1e-5 * (1.0 + expected.abs());
        assert!(error <= bound, "{what}: {found}, not {expected}, at {at}");
    }
}

fn cache(device: &mut CpuDevice, elements: usize) -> CpuCache {
    let shape = CacheShape {
        blocks: 2,
        block_tokens: 16,
        layers: 1,
        kv_heads: 1,
        head_dim: 16,
        values: Values::BesideKeys,
    };
    let mut cache = device.allocate_cache(&shape).unwrap();
    let states = StateShape { slots: 4, elements };
    device.allocate_states(&mut cache, &states).unwrap();
    device.poison_states(&mut cache, &[0, 1, 2, 3]).unwrap();
    cache
}

/// Stages a step of one sequence.
fn stage(device: &mut CpuDevice, rows: usize, state: BatchState) {
    let mut batch = Batch::new(1);
    batch.push(&vec![0; rows], 0, 16, [(0, [0, 1])]);
    batch.states.push(state);
    device.stage(&batch).unwrap();
}

/// Checks that an operation gives the same bits for a sequence in one step and in several, also
/// from a state that was kept in the middle of a step; and that instruction sets with fused
/// products agree. Returns the results of the best one.
fn results(elements: usize, operation: &Operation<'_>) -> Vec<f32> {
    let padding = 16;
    let part = StatePart {
        offset: padding,
        elements,
    };
    let mut all = Vec::new();
    for level in levels() {
        let mut d = device(level, 3, Activations::Auto);
        let mut cache = cache(&mut d, padding + elements);
        let slots = |before, after| BatchState {
            before,
            after,
            snapshot: None,
        };
        let kept = BatchState {
            snapshot: Some(StateSnapshot { rows: 7, slot: 2 }),
            ..slots(None, 0)
        };
        stage(&mut d, ROWS, kept);
        let whole = operation(&mut d, &mut cache, part, &Vec::from_iter(0..ROWS));
        let columns = whole.len() / ROWS;
        // On from the state that was kept, which stays as it is.
        for after in [1, 3] {
            stage(&mut d, ROWS - 7, slots(Some(2), after));
            let rest = operation(&mut d, &mut cache, part, &Vec::from_iter(7..ROWS));
            assert_eq!(bits(&rest), bits(&whole[7 * columns..]), "{level:?}");
        }
        let mut in_chunks = Vec::new();
        let mut next = 0;
        for chunk in [1, 1, 5, 1, 11] {
            let before = (next > 0).then_some(1);
            stage(&mut d, chunk, slots(before, 1));
            let rows = Vec::from_iter(next..next + chunk);
            in_chunks.extend(operation(&mut d, &mut cache, part, &rows));
            next += chunk;
        }
        assert_eq!(bits(&in_chunks), bits(&whole), "{level:?}");
        all.push((level, whole));
    }
    let fused = all
        .iter()
        .filter(|(level, _)| *level != SimdLevel::Portable);
    let fused: Vec<_> = fused.map(|(_, whole)| bits(whole)).collect();
    assert!(fused.windows(2).all(|pair| pair[0] == pair[1]));
    all.swap_remove(0).1
}

/// Some rows of a matrix.
fn picked(device: &mut CpuDevice, columns: usize, values: &[f32], rows: &[usize]) -> CpuTensor {
    let rows = rows.iter().map(|row| &values[row * columns..][..columns]);
    tensor(
        device,
        columns,
        &rows.flatten().copied().collect::<Vec<_>>(),
    )
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn convolutions_agree_with_float64() {
    let mut random = Random::new(41);
    for (channels, taps, silu_after, has_bias, input) in [
        (32, 3, false, false, ConvInput::Gated),
        (48, 4, true, true, ConvInput::Columns(16)),
        (16, 2, true, false, ConvInput::Columns(0)),
        (16, 8, false, true, ConvInput::Gated),
    ] {
        let spec = ConvSpec {
            channels,
            taps,
            input,
            silu: silu_after,
        };
        let columns = 3 * channels + 16;
        let x = random.numbers(ROWS * columns);
        let weight = random.numbers(taps * channels);
        let bias = random.numbers(channels);
        let input_of = |row: usize, channel: usize| {
            let x = |column: usize| f64::from(x[row * columns + column]);
            match input {
                ConvInput::Columns(first) => x(first + channel),
                ConvInput::Gated => x(channel) * x(2 * channels + channel),
            }
        };
        let mut expected = Vec::new();
        for row in 0..ROWS {
            for channel in 0..channels {
                let mut sum = if has_bias {
                    f64::from(bias[channel])
                } else {
                    0.0
                };
                for tap in 0..taps {
                    let weight = f64::from(weight[tap * channels + channel]);
                    if let Some(row) = (row + tap).checked_sub(taps - 1) {
                        sum += weight * input_of(row, channel);
                    }
                }
                let mut y = if silu_after { silu(sum) } else { sum };
                if input == ConvInput::Gated {
                    y *= f64::from(x[row * columns + channels + channel]);
                }
                expected.push(y);
            }
        }
        let found = results(spec.state_elements(), &|d, cache, part, rows| {
            let input = picked(d, columns, &x, rows);
            let weight = d.load_vector(&weight).unwrap();
            let bias = has_bias.then(|| d.load_vector(&bias).unwrap());
            let mut out = d.allocate(rows.len(), channels, Precision::Full).unwrap();
            d.short_conv(
                &input,
                &spec,
                (&weight, bias.as_ref()),
                cache,
                part,
                &mut out,
            )
            .unwrap();
            values(&out, rows.len())
        });
        near(&found, &expected, &format!("{spec:?}"));
    }
}

#[test]
fn mamba2_agrees_with_float64() {
    let mut random = Random::new(42);
    for (heads, head_dim, state_size, groups, step_limits) in [
        (4, 16, 8, 1, [0.0, f32::INFINITY]),
        (6, 32, 24, 3, [0.4, 0.9]),
        (2, 48, 128, 2, [0.0, f32::INFINITY]),
    ] {
        let spec = Mamba2Spec {
            heads,
            head_dim,
            state_size,
            groups,
            step_limits,
        };
        let (projected, channels) = (spec.projected(), spec.channels());
        let of_rows = random.numbers(ROWS * projected);
        let convolved = random.numbers(ROWS * channels);
        let rates: Vec<f32> = random
            .numbers(heads)
            .iter()
            .map(|r| -2.0 * r.abs())
            .collect();
        let (skips, step_biases) = (random.numbers(heads), random.numbers(heads));
        let mut state = vec![0.0f64; spec.state_elements()];
        let mut expected = Vec::new();
        for row in 0..ROWS {
            let steps = &of_rows[(row + 1) * projected - heads..];
            let at = |column: usize| f64::from(convolved[row * channels + column]);
            for column in 0..spec.columns() {
                let head = column / head_dim;
                let group = head / (heads / groups);
                let raw = f64::from(steps[head]) + f64::from(step_biases[head]);
                let [least, most] = step_limits.map(f64::from);
                let step = raw.exp().ln_1p().clamp(least, most);
                let decay = (step * f64::from(rates[head])).exp();
                let mut sum = f64::from(skips[head]) * at(column);
                for n in 0..state_size {
                    let b = at(spec.columns() + group * state_size + n);
                    let c = at(spec.columns() + (groups + group) * state_size + n);
                    let element = &mut state[column * state_size + n];
                    *element = *element * decay + step * at(column) * b;
                    sum += *element * c;
                }
                expected.push(sum);
            }
        }
        let found = results(spec.state_elements(), &|d, cache, part, rows| {
            let of_rows = picked(d, projected, &of_rows, rows);
            let convolved = picked(d, channels, &convolved, rows);
            let [rates, skips, step_biases] =
                [&rates, &skips, &step_biases].map(|vector| d.load_vector(vector).unwrap());
            let weights = Mamba2Weights {
                rates: &rates,
                skips: &skips,
                step_biases: &step_biases,
            };
            let count = rows.len();
            let mut out = d.allocate(count, spec.columns(), Precision::Full).unwrap();
            d.mamba2(
                (&of_rows, &convolved),
                &spec,
                weights,
                cache,
                part,
                &mut out,
            )
            .unwrap();
            values(&out, count)
        });
        near(&found, &expected, &format!("{spec:?}"));
    }
}

#[test]
fn large_steps_of_time_are_exact_and_what_is_not_a_number_stays_so() {
    let spec = Mamba2Spec {
        heads: 1,
        head_dim: 16,
        state_size: 8,
        groups: 1,
        step_limits: [0.0, f32::INFINITY],
    };
    for (raw, expected) in [(100.0, 100.0), (-200.0, 0.0), (f32::NAN, f32::NAN)] {
        let mut d = device(SimdLevel::Auto, 1, Activations::Auto);
        let mut cache = cache(&mut d, spec.state_elements());
        let part = StatePart {
            offset: 0,
            elements: spec.state_elements(),
        };
        let state = BatchState {
            before: None,
            after: 0,
            snapshot: None,
        };
        stage(&mut d, 1, state);
        // The only input, with one element of `b` and of `c`.
        let mut convolved = vec![0.0; spec.channels()];
        for column in [3, 16, 24] {
            convolved[column] = 1.0;
        }
        let mut projected = vec![0.0; spec.projected()];
        projected[spec.projected() - 1] = raw;
        let projected = tensor(&mut d, spec.projected(), &projected);
        let convolved = tensor(&mut d, spec.channels(), &convolved);
        let [rate, zero] = [-1.0, 0.0].map(|value| d.load_vector(&[value]).unwrap());
        let weights = Mamba2Weights {
            rates: &rate,
            skips: &zero,
            step_biases: &zero,
        };
        let mut out = d.allocate(1, 16, Precision::Full).unwrap();
        d.mamba2(
            (&projected, &convolved),
            &spec,
            weights,
            &mut cache,
            part,
            &mut out,
        )
        .unwrap();
        let found = out.row(0)[3];
        assert!(
            found == expected || (found.is_nan() && expected.is_nan()),
            "{raw}: {found}"
        );
    }
}

#[test]
fn gated_norms_agree_with_float64() {
    let mut random = Random::new(43);
    for (columns, groups) in [(32, 1), (96, 4), (40, 5), (7, 1)] {
        let stride = columns + 9;
        let (x, gates) = (random.numbers(3 * columns), random.numbers(3 * stride));
        let weight = random.numbers(columns);
        let mut expected = Vec::new();
        for (x, gates) in x.chunks(columns).zip(gates.chunks(stride)) {
            let gated = x.iter().zip(gates);
            let gated = gated.map(|(&x, &gate)| f64::from(x) * silu(f64::from(gate)));
            let gated: Vec<f64> = gated.collect();
            for (at, group) in gated.chunks(columns / groups).enumerate() {
                let mean = group.iter().map(|v| v * v).sum::<f64>() / group.len() as f64;
                let weights = &weight[at * group.len()..];
                let normed = group.iter().zip(weights);
                expected.extend(normed.map(|(v, &w)| v / (mean + 1e-5).sqrt() * f64::from(w)));
            }
        }
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let weight = d.load_vector(&weight).unwrap();
            let mut out = tensor(&mut d, columns, &x);
            let gates = tensor(&mut d, stride, &gates);
            d.gated_norm(&mut out, &gates, &weight, groups, 1e-5, 3)
                .unwrap();
            near(&values(&out, 3), &expected, &format!("{level:?} {columns}"));
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let spec = Mamba2Spec {
        heads: 2,
        head_dim: 16,
        state_size: 8,
        groups: 1,
        step_limits: [0.0, f32::INFINITY],
    };
    let refused = |spec: Mamba2Spec, elements: usize, vector: usize| {
        let mut d = device(SimdLevel::Auto, 1, Activations::Auto);
        let mut cache = cache(&mut d, 4096);
        let state = BatchState {
            before: None,
            after: 0,
            snapshot: None,
        };
        stage(&mut d, 1, state);
        let part = StatePart {
            offset: 0,
            elements,
        };
        let mut make = |columns| d.allocate(1, columns, Precision::Full).unwrap();
        let (projected, convolved) = (make(spec.projected()), make(spec.channels()));
        let mut out = make(spec.columns());
        let vector = d.load_vector(&vec![0.0; vector]).unwrap();
        let weights = Mamba2Weights {
            rates: &vector,
            skips: &vector,
            step_biases: &vector,
        };
        let done = d.mamba2(
            (&projected, &convolved),
            &spec,
            weights,
            &mut cache,
            part,
            &mut out,
        );
        matches!(done, Err(DeviceError::Failed { .. }))
    };
    assert!(!refused(spec, 256, 2));
    assert!(refused(spec, 240, 2));
    assert!(refused(spec, 256, 1));
    let odd = Mamba2Spec {
        head_dim: 8,
        ..spec
    };
    assert!(refused(odd, odd.state_elements(), 2));
    let odd = Mamba2Spec { groups: 3, ..spec };
    assert!(refused(odd, odd.state_elements(), 2));
    let odd = Mamba2Spec {
        state_size: 9,
        ..spec
    };
    assert!(refused(odd, odd.state_elements(), 2));
}
