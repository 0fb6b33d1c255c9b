//! The CPU device's other operations agree with float64: norms, activations, experts, sampling
//! and feedback.

use common::cpu::*;
use common::experts;
use common::experts::{COLUMNS, EXPERTS, Mixture};
use quell::internals::device::*;
use quell::internals::sampling::{SampleRow, sample};
use quell::internals::weights::DType;
use quell::{Activations, SamplingParams, SimdLevel};
use std::sync::Arc;

const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 7), (1, 576), (40, 64), (65, 129)];

pub fn assert_near(out: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (out, expected)) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(*out) - expected).abs();
        let bound = tolerance * (1.0 + expected.abs());
        assert!(
            error <= bound,
            "{what}: {out} at {i} is {error} from {expected}"
        );
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn normalized(x: &[f64], weight: &[f32]) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean + 1e-6).sqrt();
            row.iter()
                .zip(weight)
                .map(move |(v, &w)| v * factor * f64::from(w))
        })
        .collect()
}

fn centred(x: &[f64], columns: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / columns as f64;
        row.iter().map(|v| v - mean).collect::<Vec<_>>()
    };
    x.chunks(columns).flat_map(row).collect()
}

#[test]
fn queries_are_scaled_in_stages_of_their_positions() {
    let heads = HeadShape {
        q_heads: 2,
        kv_heads: 1,
        head_dim: 4,
        values: Values::BesideKeys,
    };
    let columns = heads.qkv_columns();
    let mut d = device(SimdLevel::Auto, 1, Activations::Auto);
    let mut batch = Batch::new(1);
    batch.push(&[0; 9], 6, 16, [(0, [0])]);
    d.stage(&batch).unwrap();
    let scale = |offset| QueryScale {
        slope: 0.1,
        interval: 4,
        offset,
    };
    for offset in [0, 1] {
        let mut qkv = tensor(&mut d, columns, &vec![1.0; 9 * columns]);
        d.scale_queries(&mut qkv, heads, scale(offset)).unwrap();
        for row in 0..9 {
            let stage = (6 + row + offset as usize) / 4;
            let factor = 0.1 * (stage as f32 + 1.0).ln() + 1.0;
            let (queries, others) = qkv.row(row).split_at(heads.q_columns());
            assert!(queries.iter().all(|query| *query == factor), "row {row}");
            assert!(others.iter().all(|other| *other == 1.0), "row {row}");
        }
    }
    let never = QueryScale {
        interval: 0,
        ..scale(0)
    };
    let mut qkv = tensor(&mut d, columns, &vec![1.0; 9 * columns]);
    let error = d.scale_queries(&mut qkv, heads, never).unwrap_err();
    assert!(error.to_string().contains("interval"), "{error}");
}

#[test]
fn norms_agree_with_float64() {
    let mut random = Random::new(21);
    for (rows, columns) in SHAPES {
        let (x, r) = (
            random.numbers(rows * columns),
            random.numbers(rows * columns),
        );
        let (weight, bias) = (random.numbers(columns), random.numbers(columns));
        let sum: Vec<f64> = wide(&x).iter().zip(wide(&r)).map(|(a, b)| a + b).collect();
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let w = d.load_vector(&weight).unwrap();
            let what = format!("{level:?} {rows} × {columns}");
            let x_tensor = tensor(&mut d, columns, &x);
            let mut out = d.allocate(rows, columns, Precision::Full).unwrap();
            d.rms_norm(&x_tensor, &w, 1e-6, rows, &mut out).unwrap();
            assert_near(
                &values(&out, rows),
                &normalized(&wide(&x), &weight),
                1e-5,
                &what,
            );

            let mut residual = tensor(&mut d, columns, &r);
            d.add_rms_norm(&mut residual, &x_tensor, &w, 1e-6, rows, &mut out)
                .unwrap();
            assert_near(&values(&residual, rows), &sum, 1e-6, &what);
            assert_near(&values(&out, rows), &normalized(&sum, &weight), 1e-4, &what);

            let mut residual = tensor(&mut d, columns, &r);
            d.rms_norm_add(&x_tensor, &w, 1e-6, rows, &mut residual)
                .unwrap();
            let expected = normalized(&wide(&x), &weight);
            let expected: Vec<f64> = expected.iter().zip(wide(&r)).map(|(a, b)| a + b).collect();
            assert_near(&values(&residual, rows), &expected, 1e-5, &what);

            let mut residual = tensor(&mut d, columns, &r);
            d.add(&mut residual, &x_tensor, rows).unwrap();
            assert_near(&values(&residual, rows), &sum, 1e-6, &what);

            let b = d.load_vector(&bias).unwrap();
            for (x, sum) in [(None, wide(&r)), (Some(&x_tensor), sum.clone())] {
                let mut residual = tensor(&mut d, columns, &r);
                d.add_layer_norm(&mut residual, x, [&w, &b], 1e-6, rows, &mut out)
                    .unwrap();
                let normed = normalized(&centred(&sum, columns), &weight);
                let biases = bias.iter().cycle().map(|&b| f64::from(b));
                let expected: Vec<f64> = normed.iter().zip(biases).map(|(a, b)| a + b).collect();
                // A row of one column is its own mean.
                let tolerance = if columns == 1 { 1e-2 } else { 1e-4 };
                assert_near(&values(&residual, rows), &expected, tolerance, &what);
                assert_eq!(bits(&values(&out, rows)), bits(&values(&residual, rows)));
            }

            let mut residual = tensor(&mut d, columns, &r);
            d.centre(&mut residual, rows).unwrap();
            assert_near(
                &values(&residual, rows),
                &centred(&wide(&r), columns),
                1e-5,
                &what,
            );
        }
    }
}

#[test]
fn activations_agree_with_float64_even_far_from_zero() {
    let mut random = Random::new(22);
    for (rows, columns) in SHAPES {
        let x: Vec<f32> = random
            .numbers(rows * 2 * columns)
            .iter()
            .map(|v| v * 120.0)
            .collect();
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let gate_up = tensor(&mut d, 2 * columns, &x);
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut out = d.allocate(rows, columns, Precision::Full).unwrap();
                d.gated_activation(&gate_up, activation, rows, &mut out)
                    .unwrap();
                let expected: Vec<f64> = wide(&x)
                    .chunks(2 * columns)
                    .flat_map(|row| {
                        let (gate, up) = row.split_at(columns);
                        let activated = gate.iter().map(|&x| match activation {
                            Activation::Silu => x / (1.0 + (-x).exp()),
                            Activation::GeluTanh => {
                                let inner = (2.0 / std::f64::consts::PI).sqrt()
                                    * (x + 0.044_715 * x * x * x);
                                0.5 * x * (1.0 + inner.tanh())
                            }
                            Activation::ClampedSwiGlu { .. }
                            | Activation::SquaredRelu
                            | Activation::Gelu => {
                                unreachable!()
                            }
                        });
                        activated.zip(up).map(|(a, up)| a * up).collect::<Vec<_>>()
                    })
                    .collect();
                assert_near(
                    &values(&out, rows),
                    &expected,
                    2e-5,
                    &format!("{activation:?}"),
                );
            }
            let mut capped = tensor(&mut d, 2 * columns, &x);
            d.softcap(&mut capped, 30.0, rows).unwrap();
            let expected: Vec<f64> = wide(&x).iter().map(|x| 30.0 * (x / 30.0).tanh()).collect();
            assert_near(&values(&capped, rows), &expected, 1e-5, "softcap");
        }
    }
}

fn batch(rows: usize) -> Batch {
    let mut batch = Batch::new(1);
    batch.push(&vec![0; rows], 0, 16, [(0, 0..rows as u32)]);
    batch
}

#[test]
fn experts_are_chosen_weighted_and_summed() {
    let mut random = Random::new(23);
    let (count, width, hidden, rows) = (5, 32, 24, 13);
    let make = |random: &mut Random, rows, columns| -> Vec<Vec<u8>> {
        (0..count)
            .map(|_| weights(random, DType::F32, rows, columns))
            .collect()
    };
    let (gate_up, down) = (
        make(&mut random, 2 * hidden, width),
        make(&mut random, width, hidden),
    );
    let x = random.numbers(rows * width);
    let mut router: Vec<f32> = random
        .numbers(rows * count)
        .iter()
        .map(|v| v * 3.0)
        .collect();
    router[..count].fill(1.0); // A tie: the lowest indexes win.
    fn specs(data: &[Vec<u8>], rows: usize, columns: usize) -> Vec<LinearSpec<'_>> {
        data.iter()
            .map(|data| {
                let order = RowOrder::AsStored;
                let part = WeightRows {
                    dtype: DType::F32,
                    rows,
                    columns,
                    data,
                    order,
                };
                LinearSpec {
                    parts: vec![part],
                    bias: None,
                }
            })
            .collect()
    }
    for (level, top_k, normalize) in levels()
        .into_iter()
        .flat_map(|l| [(l, 2, true), (l, 3, false), (l, 5, true)])
    {
        let routing = RoutingSpec {
            top_k,
            score: RouterScore::Softmax,
            normalize,
            activation: Activation::Silu,
        };
        let mut expected = Vec::new();
        for (x, logits) in wide(&x).chunks(width).zip(wide(&router).chunks(count)) {
            let total: f64 = logits.iter().map(|l| l.exp()).sum();
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(top_k);
            let kept: f64 = order.iter().map(|&e| logits[e].exp()).sum();
            let mut sum = vec![0.0; width];
            for &e in &order {
                let factor = logits[e].exp() / if normalize { kept } else { total };
                let product = |w: &[u8], columns: usize, x: &[f64]| -> Vec<f64> {
                    let rows = w.len() / 4 / columns;
                    let w = wide(&dequantized(DType::F32, w, rows * columns));
                    let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum();
                    w.chunks(columns).map(dot).collect()
                };
                let both = product(&gate_up[e], width, x);
                let (gate, up) = both.split_at(hidden);
                let h: Vec<f64> = gate
                    .iter()
                    .zip(up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                let y = product(&down[e], hidden, &h);
                sum.iter_mut()
                    .zip(y)
                    .for_each(|(sum, y)| *sum += factor * y);
            }
            expected.extend(sum);
        }
        let mut d = device(level, 2, Activations::Auto);
        let experts = d
            .load_experts(
                &specs(&gate_up, 2 * hidden, width),
                &specs(&down, width, hidden),
                None,
                None,
            )
            .unwrap();
        let (x, router) = (tensor(&mut d, width, &x), tensor(&mut d, count, &router));
        let mut out = d.allocate(rows, width, Precision::Full).unwrap();
        d.experts(&x, &router, routing, &experts, rows, &mut out)
            .unwrap();
        assert_near(
            &values(&out, rows),
            &expected,
            1e-4,
            &format!("{level:?} {top_k}"),
        );
        let all = bits(&values(&out, rows));
        for row in 0..rows {
            let (x, router) = (
                tensor(&mut d, width, x.row(row)),
                tensor(&mut d, count, router.row(row)),
            );
            let mut alone = d.allocate(1, width, Precision::Full).unwrap();
            d.experts(&x, &router, routing, &experts, 1, &mut alone)
                .unwrap();
            assert_eq!(bits(alone.row(0)), all[row * width..][..width], "row {row}");
        }
    }
}

#[test]
fn every_kind_of_router_and_expert_agrees_with_float64() {
    let mut random = Random::new(26);
    let rows = 9;
    for options in experts::options() {
        let mixture = Mixture::new(&mut random);
        let x = random.numbers(rows * COLUMNS);
        let logits: Vec<f32> = random.numbers(rows * EXPERTS);
        let logits: Vec<f32> = logits.iter().map(|logit| logit * 3.0).collect();
        let expected: Vec<f64> = (0..rows)
            .flat_map(|row| {
                let x = &x[row * COLUMNS..][..COLUMNS];
                mixture.row(&options, x, &logits[row * EXPERTS..][..EXPERTS])
            })
            .collect();
        for level in levels() {
            let mut d = device(level, 2, Activations::F32);
            let loaded = mixture.load(&mut d, &options);
            let (x, router) = (
                tensor(&mut d, COLUMNS, &x),
                tensor(&mut d, EXPERTS, &logits),
            );
            let mut out = d.allocate(rows, COLUMNS, Precision::Full).unwrap();
            d.experts(&x, &router, options.routing, &loaded, rows, &mut out)
                .unwrap();
            assert_near(
                &values(&out, rows),
                &expected,
                1e-4,
                &format!("{options:?}"),
            );
        }
    }
}

#[test]
fn experts_that_cannot_be_chosen_are_refused() {
    let mut random = Random::new(27);
    let mixture = Mixture::new(&mut random);
    let options = experts::options()[2];
    let mut d = device(SimdLevel::Auto, 1, Activations::F32);
    let loaded = mixture.load(&mut d, &options);
    let x = tensor(&mut d, COLUMNS, &[0.0; COLUMNS]);
    let router = tensor(&mut d, EXPERTS, &[0.0; EXPERTS]);
    let mut out = d.allocate(1, COLUMNS, Precision::Full).unwrap();
    for (groups, top_groups, top_k) in [(3, 1, 1), (0, 1, 1), (8, 1, 1), (4, 5, 2), (4, 1, 3)] {
        let RouterScore::Sigmoid(sigmoid) = options.routing.score else {
            panic!("not a sigmoid");
        };
        let routing = RoutingSpec {
            top_k,
            score: RouterScore::Sigmoid(SigmoidRouting {
                groups,
                top_groups,
                ..sigmoid
            }),
            ..options.routing
        };
        let error = d.experts(&x, &router, routing, &loaded, 1, &mut out);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("experts"), "{error}");
    }
    let error = d.load_experts(&[], &[], Some(&[1.0]), None);
    assert!(error.err().unwrap().to_string().contains("corrections"));
}

#[test]
fn samples_equal_those_of_the_reference_sampler() {
    // The device may sum in another order. NaN must have the same bits.
    let near = |a: f32, b: f32| (a - b).abs() < 1e-5 || a.to_bits() == b.to_bits();
    let mut random = Random::new(24);
    let vocabulary = 1003usize;
    let params = [
        SamplingParams::greedy(),
        SamplingParams {
            logprobs: Some(3),
            ..SamplingParams::greedy()
        },
        SamplingParams {
            temperature: 0.8,
            seed: 7,
            ..Default::default()
        },
        SamplingParams {
            temperature: 1.5,
            top_k: 9,
            top_p: 0.9,
            seed: 8,
            ..Default::default()
        },
        SamplingParams {
            repetition_penalty: 2.0,
            ..SamplingParams::greedy()
        },
        SamplingParams {
            logit_bias: vec![(77, 100.0)],
            ..SamplingParams::greedy()
        },
    ];
    let rows: Vec<SampleRow> = params
        .into_iter()
        .chain([SamplingParams::greedy(), SamplingParams::greedy()])
        .enumerate()
        .map(|(i, params)| SampleRow {
            params: Arc::new(params),
            position: i as u32,
            history: (0..50).collect(),
            prompt_tokens: 20,
            ..SampleRow::default()
        })
        .chain([SampleRow {
            params: Arc::new(SamplingParams::greedy()),
            position: 0,
            history: vec![],
            prompt_tokens: 0,
            ..SampleRow::default()
        }])
        .collect();
    // Add each row a second time, with half of the tokens allowed.
    let half = vec![0x5555_5555; vocabulary.div_ceil(32)];
    let masked = rows.iter().map(|row| SampleRow {
        mask: Some(half.clone().into()),
        ..row.clone()
    });
    let rows: Vec<SampleRow> = rows.iter().cloned().chain(masked).collect();
    let mut logits = random.numbers(rows.len() * vocabulary);
    let last = (rows.len() - 1) * vocabulary;
    for fill in [None, Some(0.5), Some(f32::NAN), Some(f32::NEG_INFINITY)] {
        if let Some(value) = fill {
            logits[last..].fill(value);
        }
        let mut expected = Vec::new();
        for (row, logits) in rows.iter().zip(logits.chunks(vocabulary)) {
            expected.push(sample(&mut logits.to_vec(), row));
        }
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let logits = tensor(&mut d, vocabulary, &logits);
            let pending = d.sample(&logits, &rows).unwrap();
            let samples = d.collect(pending).unwrap();
            let broken = fill.is_some_and(|value| !value.is_finite());
            assert_eq!(
                samples.not_finite,
                Vec::from_iter(broken.then_some(rows.len() - 1))
            );
            for (got, expected) in samples.tokens.iter().zip(&expected) {
                assert_eq!(got.id, expected.id);
                assert!(near(got.logprob, expected.logprob));
                assert_eq!(got.top.len(), expected.top.len());
                for (got, expected) in got.top.iter().zip(&expected.top) {
                    assert_eq!(got.0, expected.0);
                    assert!(near(got.1, expected.1));
                }
            }
        }
    }
}

#[test]
fn a_feedback_row_gets_the_previous_steps_sample() {
    let mut d = device(SimdLevel::Auto, 1, Activations::Auto);
    let mut random = Random::new(25);
    let data = weights(&mut random, DType::F32, 10, 4);
    let table = linear(&mut d, DType::F32, 10, 4, &data);
    let mut logits = vec![0.0; 20];
    (logits[3], logits[10 + 8]) = (1.0, 1.0);
    let logits = tensor(&mut d, 10, &logits);
    let row = SampleRow {
        params: Arc::new(SamplingParams::greedy()),
        position: 0,
        history: vec![],
        prompt_tokens: 0,
        ..SampleRow::default()
    };
    d.sample(&logits, &[row.clone(), row]).unwrap();
    let mut batch = batch(2);
    batch.feedback = vec![Feedback { row: 0, sample: 1 }];
    batch.tokens[1] = 5;
    batch.sample_rows = vec![1];
    d.stage(&batch).unwrap();
    let mut out = d.allocate(2, 4, Precision::Full).unwrap();
    d.embed(&table, 1.0, &mut out).unwrap();
    let w = dequantized(DType::F32, &data, 40);
    assert_eq!(out.row(0), &w[8 * 4..][..4]);
    assert_eq!(out.row(1), &w[5 * 4..][..4]);
    let mut gathered = d.allocate(3, 4, Precision::Full).unwrap();
    d.gather_samples(&out, &mut gathered).unwrap();
    assert_eq!(gathered.row(0), out.row(1));
}

#[test]
fn ranges_of_rows_are_pooled() {
    let mut random = Random::new(29);
    let mut d = device(SimdLevel::Auto, 2, Activations::Auto);
    let x = random.numbers(9 * 7);
    let x_tensor = tensor(&mut d, 7, &x);
    let pooling = d.pool(&x_tensor, &[2..3, 0..9, 4..4]).unwrap();
    let sums = d.collect_pooled(pooling).unwrap();
    let rows: Vec<usize> = sums.iter().map(PooledRows::rows).collect();
    assert_eq!(rows, [1, 9, 0]);
    assert_near(&sums[0].mean().unwrap(), &wide(&x[14..21]), 1e-7, "one row");
    let column = |column: usize| (0..9).map(move |row| row * 7 + column);
    let mean = |c: usize| column(c).map(|at| f64::from(x[at])).sum::<f64>() / 9.0;
    let means: Vec<f64> = (0..7).map(mean).collect();
    assert_near(&sums[1].mean().unwrap(), &means, 1e-7, "all rows");
    assert_eq!(sums[2].mean(), None);
    assert!(d.pool(&x_tensor, &[0..9, 2..10]).is_err());
}
