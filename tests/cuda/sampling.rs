//! The CUDA device samples exactly like the reference sampler: the same token for the same
//! logits, whatever the parameters.
//!
//! Scores and noise are bit-identical on both. Only the weights of the tokens, which top-p sums
//! up, differ in their last bits. The thresholds in these tests therefore lie in the middle of
//! a token's share, so that no sum comes near one.

use common::cpu::{Random, bits};
use common::gpu;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use quell::internals::sampling::{SampleRow, sample};
use quell::{CudaOptions, SamplingParams, Token};
use std::sync::Arc;

const MAX_ROWS: usize = 64;

fn device() -> CudaDevice {
    let mut device = CudaDevice::new(&CudaOptions::default()).unwrap();
    let limits = DeviceLimits {
        rows: MAX_ROWS,
        sequences: MAX_ROWS,
        sequence_tokens: 64,
        block_tokens: 16,
        groups: 1,
        vocabulary: 1000,
        model: ModelShape::default(),
    };
    device.reserve(&limits).unwrap();
    device
}

/// Stages a step with one sampled row for each of `rows`. Rows in `feedback` take the token
/// that the previous step sampled for the same row.
fn stage(device: &mut CudaDevice, rows: usize, feedback: &[usize]) {
    let mut batch = Batch::new(1);
    for row in 0..rows {
        batch.push(&[0], 0, 16, [(0, [row as u32])]);
        batch.sample_rows.push(row);
    }
    let fed = |&row: &usize| Feedback { row, sample: row };
    batch.feedback.extend(feedback.iter().map(fed));
    device.stage(&batch).unwrap();
    device.finish(Ok(())).unwrap();
}

/// A row to sample, with its logits.
struct Case {
    logits: Vec<f32>,
    row: SampleRow,
}

impl Case {
    fn plain(logits: Vec<f32>, params: SamplingParams) -> Self {
        let row = SampleRow {
            params: Arc::new(params),
            position: 7,
            history: Vec::new(),
            prompt_tokens: 0,
            ..SampleRow::default()
        };
        Self { logits, row }
    }

    fn expected(&self) -> Token {
        sample(&mut self.logits.clone(), &self.row)
    }
}

/// Samples the cases in one step. All must have the same vocabulary.
fn on_device(device: &mut CudaDevice, cases: &[Case]) -> Vec<Token> {
    let vocabulary = cases[0].logits.len();
    let logits: Vec<f32> = cases.iter().flat_map(|case| case.logits.clone()).collect();
    let tensor = device.tensor(vocabulary, Precision::Full, &logits).unwrap();
    let rows: Vec<SampleRow> = cases.iter().map(|case| case.row.clone()).collect();
    let pending = device.sample(&tensor, &rows).unwrap();
    let samples = device.collect(pending).unwrap();
    let after = device.values(&tensor, cases.len()).unwrap();
    assert_eq!(bits(&after), bits(&logits), "the logits were changed");
    let broken = |&row: &usize| !cases[row].logits.iter().all(|logit| logit.is_finite());
    let not_finite: Vec<usize> = (0..cases.len()).filter(broken).collect();
    assert_eq!(samples.not_finite, not_finite);
    samples.tokens
}

fn assert_same(found: &Token, case: &Case) {
    let (expected, what) = (case.expected(), &case.row);
    assert_eq!(found.id, expected.id, "{what:?}");
    let near = |a: f32, b: f32| (a - b).abs() <= 1e-5 || a == b || (a.is_nan() && b.is_nan());
    let (a, b) = (found.logprob, expected.logprob);
    assert!(near(a, b), "{a} instead of {b}, {what:?}");
    let ids = |token: &Token| token.top.iter().map(|top| top.0).collect::<Vec<_>>();
    assert_eq!(ids(found), ids(&expected), "{what:?}");
    for (found, expected) in found.top.iter().zip(&expected.top) {
        let (a, b) = (found.1, expected.1);
        assert!(near(a, b), "{a} instead of {b}, {what:?}");
    }
}

fn check(device: &mut CudaDevice, cases: &[Case]) {
    for cases in cases.chunks(MAX_ROWS) {
        stage(device, cases.len(), &[]);
        let found = on_device(device, cases);
        assert_eq!(found.len(), cases.len());
        for (found, case) in found.iter().zip(cases) {
            assert_same(found, case);
        }
    }
}

/// Returns the logits after penalties, bias and temperature, highest first, without −∞ and NaN.
fn scores(case: &Case) -> Vec<f32> {
    let mut logits = case.logits.clone();
    let greedy = SamplingParams {
        temperature: 0.0,
        logprobs: None,
        ..(*case.row.params).clone()
    };
    let row = SampleRow {
        params: Arc::new(greedy),
        ..case.row.clone()
    };
    // This applies penalties and bias in place.
    let best = sample(&mut logits, &row).id as usize;
    let inverse = 1.0 / case.row.params.temperature;
    let score = |&logit: &f32| (logit - logits[best]) * inverse;
    let mut scores: Vec<f32> = logits.iter().map(score).collect();
    scores.retain(|score| *score > f32::NEG_INFINITY);
    scores.sort_unstable_by(|a, b| b.total_cmp(a));
    scores
}

/// Returns a top-p in the middle of a token's share, so that the sums need not be exact.
fn clear_top_p(random: &mut Random, case: &Case) -> f32 {
    let mut scores = scores(case);
    let top_k = case.row.params.top_k as usize;
    if top_k > 0 {
        scores.truncate(top_k);
    }
    let weights: Vec<f64> = scores.iter().map(|&s| f64::from(s).exp()).collect();
    let total: f64 = weights.iter().sum();
    // Avoid shares that are so small that rounding matters.
    let clear = weights.iter().filter(|w| **w > 1e-5 * total).count();
    if clear == 0 {
        return 1.0;
    }
    let last = random.below(clear);
    let before: f64 = weights[..last].iter().sum();
    ((before + 0.5 * weights[last]) / total) as f32
}

/// Returns logits with a random kind of distribution.
fn logits(random: &mut Random, vocabulary: usize) -> Vec<f32> {
    let numbers = random.numbers(vocabulary);
    let kind = random.below(10);
    let with = |map: &dyn Fn(f32) -> f32| numbers.iter().map(|&v| map(v)).collect();
    match kind {
        // Peaked, like those of a model.
        0..=2 => with(&|v| 12.0 * v * v * v),
        3 => with(&|v| 30.0 * v),
        4 => with(&|v| 0.01 * v),
        // A few or many ties, also between the largest logits.
        5 => with(&|v| (v * 4.0).round()),
        6 => with(&|v| (v * 40.0).round() * 0.25),
        7 => with(&|v| if v > 0.0 { 1.0 } else { 0.0 }),
        // Impossible tokens and NaN.
        8 => with(&|v| match (v * 100.0) as i32 {
            -100..=-40 => f32::NEG_INFINITY,
            -39..=-30 => f32::NAN,
            _ => 8.0 * v,
        }),
        _ => vec![numbers[0]; vocabulary],
    }
}

/// Returns a mask that allows one token, a few, half of them or all. It may be shorter or
/// longer than the vocabulary.
fn mask(random: &mut Random, vocabulary: usize) -> Arc<[u32]> {
    let mut mask = vec![0u32; vocabulary.div_ceil(32)];
    let mut allow = |token: usize| mask[token / 32] |= 1 << (token % 32);
    match random.below(6) {
        0 => allow(0),
        1 => allow(vocabulary - 1),
        2 => (0..3).for_each(|_| allow(random.below(vocabulary))),
        3 => (0..vocabulary).for_each(allow),
        _ => mask.fill_with(|| random.bits() as u32),
    }
    match random.below(4) {
        0 => mask.push(u32::MAX),
        1 if mask.len() > 1 => mask.truncate(mask.len() - 1),
        _ => {}
    }
    mask.into()
}

/// Returns a row with a random combination of parameters.
fn case(random: &mut Random, vocabulary: usize) -> Case {
    let logits = logits(random, vocabulary);
    let pick = |random: &mut Random, options: &[f32]| options[random.below(options.len())];
    let mut params = SamplingParams {
        temperature: pick(random, &[0.0, 0.3, 0.7, 1.0, 1.0, 1.7, 30.0]),
        top_k: pick(random, &[0.0, 0.0, 1.0, 2.0, 40.0, 300.0, 1e6]) as u32,
        min_p: pick(random, &[0.0, 0.0, 0.0, 0.05, 0.5, 1.0]),
        seed: random.bits(),
        ..SamplingParams::default()
    };
    let mut history = Vec::new();
    if random.below(3) == 0 {
        params.repetition_penalty = pick(random, &[1.0, 1.1, 1.7, 0.8]);
        params.presence_penalty = pick(random, &[0.0, 0.6, -0.5, 2.0]);
        params.frequency_penalty = pick(random, &[0.0, 0.3, -0.2, 1.1]);
        let beyond = vocabulary + 2;
        history.extend((0..random.below(60)).map(|_| random.below(beyond) as u32));
    }
    if random.below(3) == 0 {
        for _ in 0..random.below(12) {
            let bias = pick(random, &[-3.0, 0.1, 0.3, 5.0, f32::NEG_INFINITY]);
            params
                .logit_bias
                .push((random.below(vocabulary) as u32, bias));
        }
    }
    let mask = (random.below(3) == 0).then(|| mask(random, vocabulary));
    if random.below(3) == 0 {
        params.logprobs = Some(pick(random, &[0.0, 1.0, 5.0, 20.0, 1024.0]) as u32);
    }
    let top_p = random.below(2) == 0;
    let prompt_tokens = random.below(history.len() + 1);
    let row = SampleRow {
        params: Arc::new(params),
        position: random.bits() as u32,
        history,
        prompt_tokens,
        mask,
        ..SampleRow::default()
    };
    let mut case = Case { logits, row };
    if top_p && case.row.params.temperature > 0.0 {
        let top_p = clear_top_p(random, &case);
        Arc::make_mut(&mut case.row.params).top_p = top_p;
    }
    case
}

fn check_random(seed: u64, vocabulary: usize, count: usize) {
    let _gpu = gpu::lock();
    let mut random = Random::new(seed);
    let cases: Vec<Case> = (0..count).map(|_| case(&mut random, vocabulary)).collect();
    check(&mut device(), &cases);
}

#[test]
fn random_requests_match_the_reference_with_a_vocabulary_of_one_or_two() {
    check_random(1, 1, 64);
    check_random(2, 2, 192);
}

#[test]
fn random_requests_match_the_reference_with_a_vocabulary_of_a_few() {
    check_random(3, 33, 1024);
}

#[test]
fn random_requests_match_the_reference_with_a_vocabulary_of_hundreds() {
    check_random(4, 512, 1024);
}

#[test]
fn random_requests_match_the_reference_with_a_vocabulary_of_two_slices() {
    check_random(5, 5000, 256);
}

#[test]
fn random_requests_match_the_reference_with_a_models_vocabulary() {
    check_random(6, 49152, 16);
}

#[test]
fn default_sampling_matches_the_reference() {
    let _gpu = gpu::lock();
    let mut random = Random::new(7);
    let cases: Vec<Case> = (0..256)
        .map(|index| {
            let scale = [0.1, 1.0, 4.0][index % 3];
            let logits = random.numbers(3000).iter().map(|v| v * scale).collect();
            let params = SamplingParams {
                seed: random.bits(),
                ..SamplingParams::default()
            };
            Case::plain(logits, params)
        })
        .collect();
    check(&mut device(), &cases);
    // Most tokens must not be the most likely one, or the test would compare greedy search.
    let greedy = |case: &&Case| {
        let largest = case.logits.iter().copied().fold(f32::MIN, f32::max);
        case.logits[case.expected().id as usize] == largest
    };
    assert!(cases.iter().filter(greedy).count() < 64);
}

#[test]
fn a_greedy_row_takes_the_largest_logit_and_the_lowest_id_on_ties() {
    let _gpu = gpu::lock();
    let mut random = Random::new(8);
    let mut cases = Vec::new();
    for vocabulary in [9000; 32] {
        let mut logits = random.numbers(vocabulary);
        for _ in 0..3 {
            logits[random.below(vocabulary)] = 2.0;
        }
        cases.push(Case::plain(logits, SamplingParams::greedy()));
    }
    check(&mut device(), &cases);
}

#[test]
fn a_row_without_possible_tokens_gives_the_lowest_token() {
    let _gpu = gpu::lock();
    let reported = SamplingParams {
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let filtered = SamplingParams {
        top_k: 3,
        top_p: 0.9,
        ..SamplingParams::default()
    };
    let mut cases = Vec::new();
    for params in [
        SamplingParams::greedy(),
        SamplingParams::default(),
        reported,
        filtered,
    ] {
        for value in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
            cases.push(Case::plain(vec![value; 40], params.clone()));
        }
        for special in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![f32::NEG_INFINITY; 40];
            (logits[0], logits[17], logits[30]) = (f32::NAN, special, special);
            cases.push(Case::plain(logits, params.clone()));
        }
    }
    for case in &cases[..3] {
        assert_eq!(case.expected().id, 0);
    }
    check(&mut device(), &cases);
}

#[test]
fn only_tokens_in_the_mask_are_chosen() {
    let _gpu = gpu::lock();
    let mut random = Random::new(14);
    let vocabulary = 9001usize;
    let params = [
        SamplingParams::greedy(),
        SamplingParams::default(),
        SamplingParams {
            top_k: 5,
            ..SamplingParams::default()
        },
        SamplingParams {
            top_p: 0.999,
            temperature: 3.0,
            ..SamplingParams::default()
        },
        SamplingParams {
            logprobs: Some(3),
            // A forbidden token stays forbidden, whatever its bias.
            logit_bias: vec![(4000, f32::INFINITY), (0, -1.0)],
            ..SamplingParams::default()
        },
    ];
    let mut cases = Vec::new();
    for params in &params {
        for allowed in [&[0][..], &[9000], &[0, 9000], &[31, 32, 4095, 4096, 8999]] {
            let mut bits = vec![0u32; vocabulary.div_ceil(32)];
            for &token in allowed {
                bits[token / 32] |= 1 << (token % 32);
            }
            let params = SamplingParams {
                seed: random.bits(),
                ..params.clone()
            };
            let mut case = Case::plain(random.numbers(vocabulary), params);
            case.row.mask = Some(bits.into());
            assert!(allowed.contains(&(case.expected().id as usize)));
            // Add the same row without a mask to the same step.
            let free = Case::plain(case.logits.clone(), (*case.row.params).clone());
            assert_ne!(free.expected().id, case.expected().id);
            cases.extend([case, free]);
        }
    }
    check(&mut device(), &cases);
}

#[test]
fn a_row_without_possible_allowed_tokens_gives_the_lowest_token() {
    let _gpu = gpu::lock();
    let mut cases = Vec::new();
    for params in [SamplingParams::greedy(), SamplingParams::default()] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let mut logits = vec![1.0; 40];
            logits[33] = value;
            let mut case = Case::plain(logits, params.clone());
            case.row.mask = Some([0, 2].into());
            assert_eq!(case.expected().id, 0);
            cases.push(case);
        }
    }
    check(&mut device(), &cases);
}

#[test]
fn signed_zeros_and_extreme_temperatures_match_the_reference() {
    let _gpu = gpu::lock();
    let mut random = Random::new(9);
    let mut cases = Vec::new();
    for index in 0..128 {
        let mut logits: Vec<f32> = random
            .numbers(64)
            .iter()
            .map(|v| if *v > 0.0 { 0.0 } else { -0.0 })
            .collect();
        logits[random.below(64)] = -1e-30;
        logits[random.below(64)] = -f32::MAX;
        let params = SamplingParams {
            temperature: [1.0, 1e-40, 1e-44, 1e30, f32::MAX][index % 5],
            top_k: [0, 1, 7][index % 3],
            logprobs: Some(64),
            seed: random.bits(),
            ..SamplingParams::default()
        };
        cases.push(Case::plain(logits, params));
    }
    check(&mut device(), &cases);
}

#[test]
fn a_nucleus_that_ends_exactly_at_a_token_includes_it() {
    let _gpu = gpu::lock();
    // Equal weights have exact sums: half of 64 tokens is 32.
    let mut cases = Vec::new();
    for seed in 0..128 {
        let params = SamplingParams {
            top_p: 0.5,
            seed,
            ..SamplingParams::default()
        };
        cases.push(Case::plain(vec![1.5; 64], params));
    }
    check(&mut device(), &cases);
    let tokens: Vec<u32> = cases.iter().map(|case| case.expected().id).collect();
    assert_eq!(tokens.iter().max(), Some(&31));
}

#[test]
fn more_candidates_than_the_list_holds_are_ranked_correctly() {
    let _gpu = gpu::lock();
    let mut random = Random::new(10);
    let vocabulary = 10_000;
    let mut cases = Vec::new();
    for index in 0..24 {
        let numbers = random.numbers(vocabulary);
        let logits: Vec<f32> = match index % 3 {
            0 => numbers,
            1 => numbers.iter().map(|v| (v * 3.0).round()).collect(),
            _ => vec![numbers[0]; vocabulary],
        };
        let params = SamplingParams {
            top_k: [0, 7000, 9999, 4097][index % 4],
            seed: random.bits(),
            ..SamplingParams::default()
        };
        let mut case = Case::plain(logits, params);
        if index % 2 == 0 {
            let top_p = clear_top_p(&mut random, &case);
            Arc::make_mut(&mut case.row.params).top_p = top_p.max(0.7);
        }
        cases.push(case);
    }
    check(&mut device(), &cases);
}

#[test]
fn the_likeliest_tokens_are_reported_in_order_with_ties_by_id() {
    let _gpu = gpu::lock();
    let mut random = Random::new(11);
    let mut cases = Vec::new();
    for index in 0..48 {
        let numbers = random.numbers(6000);
        let logits: Vec<f32> = match index % 3 {
            0 => numbers.iter().map(|v| 20.0 * v).collect(),
            1 => numbers.iter().map(|v| (v * 5.0).round()).collect(),
            _ => vec![2.5; 6000],
        };
        let params = SamplingParams {
            logprobs: Some([0, 1, 2, 31, 500, 1023, 1024][index % 7]),
            ..SamplingParams::greedy()
        };
        cases.push(Case::plain(logits, params));
    }
    check(&mut device(), &cases);
}

#[test]
fn a_fed_back_token_counts_as_generated() {
    let _gpu = gpu::lock();
    let mut random = Random::new(12);
    let mut device = device();
    let (rows, vocabulary) = (MAX_ROWS, 40);
    let table: Vec<u8> = vec![0; 4 * 8 * vocabulary];
    let linear = device
        .load_linear(&LinearSpec {
            parts: vec![WeightRows {
                dtype: quell::internals::weights::DType::F32,
                rows: vocabulary,
                columns: 8,
                data: &table,
                order: RowOrder::AsStored,
            }],
            bias: None,
        })
        .unwrap();
    let mut embedded = device.allocate(rows, 8, Precision::Full).unwrap();

    let mut decided = 0;
    for round in 0..16 {
        let greedy =
            |random: &mut Random| Case::plain(random.numbers(vocabulary), SamplingParams::greedy());
        let first: Vec<Case> = (0..rows).map(|_| greedy(&mut random)).collect();
        stage(&mut device, rows, &[]);
        let fed: Vec<u32> = on_device(&mut device, &first)
            .iter()
            .map(|token| token.id)
            .collect();

        // Every other row is fed the sampled token, which is missing from the host's history.
        let feedback: Vec<usize> = (0..rows).filter(|row| row % 2 == round % 2).collect();
        let mut batch = Batch::new(1);
        for row in 0..rows {
            batch.push(&[0], 0, 16, [(0, [row as u32])]);
        }
        // Not all rows are sampled, so the index of a sample differs from that of its row.
        batch.sample_rows = (3..rows).collect();
        let entry = |&row: &usize| Feedback { row, sample: row };
        batch.feedback.extend(feedback.iter().map(entry));
        device.stage(&batch).unwrap();
        device.embed(&linear, 1.0, &mut embedded).unwrap();
        device.finish(Ok(())).unwrap();

        let mut known = Vec::new();
        let mut cases = Vec::new();
        for (row, &own) in fed.iter().enumerate().take(rows).skip(3) {
            let mut case = case(&mut random, vocabulary);
            // A mask would leave little to decide.
            case.row.mask = case.row.mask.filter(|_| row % 9 == 0);
            let params = Arc::make_mut(&mut case.row.params);
            params.top_p = 1.0;
            if row % 3 > 0 {
                params.repetition_penalty = 1.4;
                params.frequency_penalty = 0.4;
                // The token that was fed back has a bias too.
                params.logit_bias.push((own, 0.25));
            }
            if row % 4 == 0 {
                case.row.history.push(own);
            }
            let mut history = case.row.history.clone();
            if feedback.contains(&row) {
                history.push(own);
            }
            let full = SampleRow {
                history,
                ..case.row.clone()
            };
            known.push(Case {
                logits: case.logits.clone(),
                row: full,
            });
            cases.push(case);
        }
        let found = on_device(&mut device, &cases);
        for ((found, known), case) in found.iter().zip(&known).zip(&cases) {
            assert_same(found, known);
            decided += usize::from(known.expected().id != case.expected().id);
        }
    }
    // The token that was fed back made a difference.
    assert!(decided > 10, "{decided}");
}

#[test]
fn two_steps_in_flight_keep_their_samples_apart() {
    let _gpu = gpu::lock();
    let mut random = Random::new(13);
    let mut device = device();
    let mut in_flight = std::collections::VecDeque::new();
    for step in 0..12 {
        let vocabulary = 100 + 50 * (step % 3);
        let count = 1 + step * 5 % 17;
        let cases: Vec<Case> = (0..count).map(|_| case(&mut random, vocabulary)).collect();
        stage(&mut device, count, &[]);
        let logits: Vec<f32> = cases.iter().flat_map(|case| case.logits.clone()).collect();
        let tensor = device.tensor(vocabulary, Precision::Full, &logits).unwrap();
        let rows: Vec<SampleRow> = cases.iter().map(|case| case.row.clone()).collect();
        in_flight.push_back((device.sample(&tensor, &rows).unwrap(), cases));
        if in_flight.len() == 2 {
            let (pending, cases) = in_flight.pop_front().unwrap();
            let found = device.collect(pending).unwrap().tokens;
            assert_eq!(found.len(), cases.len());
            for (found, case) in found.iter().zip(&cases) {
                assert_same(found, case);
            }
        }
    }
}

#[test]
fn more_rows_than_reserved_are_refused() {
    let _gpu = gpu::lock();
    let mut device = device();
    let rows = MAX_ROWS + 1;
    let tensor = device
        .tensor(4, Precision::Full, &vec![0.0; 4 * rows])
        .unwrap();
    let row = Case::plain(Vec::new(), SamplingParams::greedy()).row;
    assert!(device.sample(&tensor, &vec![row.clone(); rows]).is_err());
    assert!(device.sample(&tensor, &[row]).is_ok());
}

#[test]
fn forced_tokens_are_reported_and_do_not_affect_other_rows() {
    let _gpu = gpu::lock();
    let mut random = Random::new(77);
    for vocabulary in [1, 513, 5000] {
        let mut device = device();
        let cases: Vec<Case> = (0..40)
            .map(|index| {
                let mut case = case(&mut random, vocabulary);
                let forced = index % 3 != 0;
                case.row.forced = forced.then(|| random.below(vocabulary) as u32);
                case
            })
            .collect();
        check(&mut device, &cases);
    }
}
