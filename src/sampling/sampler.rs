//! The reference sampler: chooses one token from one row of logits.
//!
//! Random choice uses the Gumbel-max method with counter-based random numbers. The noise of
//! a token depends only on (seed, position, token id). The choice therefore does not depend
//! on the batch, on the order in which tokens are visited, or on earlier draws.

use super::constraint::allows;
use super::{SamplingParams, Token};
use std::sync::Arc;

/// What the sampler needs to know about a sequence for one row of logits.
#[derive(Clone, Debug, Default)]
pub struct SampleRow {
    /// Sampling parameters of the request.
    pub params: Arc<SamplingParams>,
    /// Index that the chosen token will have in the sequence. Together with the seed it
    /// determines the random numbers.
    pub position: u32,
    /// Tokens of the sequence so far, if [`SamplingParams::needs_history`]; empty
    /// otherwise.
    pub history: Vec<u32>,
    /// Number of tokens in `history` that belong to the prompt.
    pub prompt_tokens: usize,
    /// The tokens that may be chosen: bit `t % 32` of word `t / 32` for token `t`. Tokens
    /// beyond its end may not be chosen. `None` allows all.
    pub mask: Option<Arc<[u32]>>,
    /// A token that is already decided. Nothing is chosen then; only log probabilities are
    /// reported.
    pub forced: Option<u32>,
}

/// Chooses a token. Changes `logits` in place: applies penalties and bias, and sets the
/// logits of forbidden tokens to −∞. Log probabilities are those of the unmodified logits, and
/// are reported only if [`SamplingParams::logprobs`] asks for them.
///
/// If no token is possible because every logit is NaN or −∞, returns token 0, even if it is
/// forbidden. A NaN logit never wins.
pub fn sample(logits: &mut [f32], row: &SampleRow) -> Token {
    let params = &*row.params;
    let report = params.logprobs.map(|k| LogProbs::of(logits, k as usize));
    let id = match row.forced {
        Some(token) => token,
        None => choose(logits, row),
    };
    match report {
        Some(report) => Token {
            id,
            logprob: report.chosen(id),
            top: report.top,
        },
        None => Token::new(id),
    }
}

fn choose(logits: &mut [f32], row: &SampleRow) -> u32 {
    let params = &*row.params;
    apply_penalties(logits, row);
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if let Some(mask) = &row.mask {
        forbid(logits, mask);
    }
    let best = argmax(logits);
    let token = if params.temperature == 0.0 || logits[best] == f32::INFINITY {
        best
    } else {
        draw(logits, best, row)
    };
    token as u32
}

/// Log probabilities of the unmodified logits, computed before the logits are changed.
struct LogProbs {
    raw: Vec<f32>,
    log_sum: f32,
    top: Vec<(u32, f32)>,
}

impl LogProbs {
    fn of(logits: &[f32], count: usize) -> Self {
        let max = logits[argmax(logits)];
        // NaN counts as impossible, as it does when a token is chosen.
        let sum: f64 = logits
            .iter()
            .map(|&logit| f64::from((logit - max).exp()))
            .filter(|weight| !weight.is_nan())
            .sum();
        let log_sum = max + sum.ln() as f32;
        let mut order: Vec<u32> = (0..logits.len() as u32)
            .filter(|&id| !logits[id as usize].is_nan())
            .collect();
        let count = count.min(order.len());
        let descending = |&a: &u32, &b: &u32| {
            logits[b as usize]
                .total_cmp(&logits[a as usize])
                .then(a.cmp(&b))
        };
        if count > 0 && count < order.len() {
            order.select_nth_unstable_by(count - 1, descending);
        }
        order.truncate(count);
        order.sort_unstable_by(descending);
        let top = order
            .iter()
            .map(|&id| (id, logits[id as usize] - log_sum))
            .collect();
        Self {
            raw: logits.to_vec(),
            log_sum,
            top,
        }
    }

    fn chosen(&self, token: u32) -> f32 {
        let raw = self.raw.get(token as usize).copied();
        raw.unwrap_or(f32::NEG_INFINITY) - self.log_sum
    }
}

/// Returns the index of the largest logit, and the lowest index among equal ones. NaN never
/// wins.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    let mut value = f32::NEG_INFINITY;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > value {
            (best, value) = (index, logit);
        }
    }
    best
}

fn apply_penalties(logits: &mut [f32], row: &SampleRow) {
    let params = &*row.params;
    if !params.needs_history() {
        return;
    }
    let mut counts: std::collections::BTreeMap<u32, u32> = std::collections::BTreeMap::new();
    for (index, &token) in row.history.iter().enumerate() {
        *counts.entry(token).or_default() += u32::from(index >= row.prompt_tokens);
    }
    for (token, generated) in counts {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = penalise(*logit, generated, params);
        }
    }
}

/// Returns the penalised logit of a token that is in the prompt or the answer and occurs
/// `generated` times in the answer.
pub(crate) fn penalise(mut logit: f32, generated: u32, params: &SamplingParams) -> f32 {
    if logit > 0.0 {
        logit /= params.repetition_penalty;
    } else {
        logit *= params.repetition_penalty;
    }
    if generated > 0 {
        logit -= params.presence_penalty + params.frequency_penalty * generated as f32;
    }
    logit
}

/// Sets the logits of all tokens that the mask does not allow to −∞.
pub(crate) fn forbid(logits: &mut [f32], mask: &[u32]) {
    for (index, logits) in logits.chunks_mut(32).enumerate() {
        match mask.get(index) {
            Some(&u32::MAX) => {}
            Some(0) | None => logits.fill(f32::NEG_INFINITY),
            Some(_) => {
                let forbidden = |offset| !allows(mask, 32 * index + offset);
                for (offset, logit) in logits.iter_mut().enumerate() {
                    if forbidden(offset) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Draws one of the tokens that top-k, top-p and min-p leave.
fn draw(logits: &mut [f32], best: usize, row: &SampleRow) -> usize {
    let params = &*row.params;
    let inverse = 1.0 / params.temperature;
    let max = logits[best];
    // At most 0. NaN (0 · ∞ at the smallest temperatures) never wins over `best`.
    let scaled = |logit: f32| (logit - max) * inverse;
    let noise = |token: usize| gumbel(params.seed, row.position, token as u32);

    if params.top_k == 0 && params.top_p >= 1.0 {
        let floor = if params.min_p > 0.0 {
            params.min_p.ln()
        } else {
            f32::NEG_INFINITY
        };
        let all = 0..logits.len();
        return strongest(
            all.map(|token| (token, scaled(logits[token]))),
            floor,
            best,
            noise,
        );
    }
    let mut kept: Vec<(usize, f32)> = logits
        .iter()
        .enumerate()
        .map(|(token, &logit)| (token, scaled(logit)))
        .filter(|(_, score)| *score > f32::NEG_INFINITY)
        .collect();
    if kept.is_empty() {
        return best;
    }
    let descending = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, descending);
        kept.truncate(top_k);
    }
    if params.top_p < 1.0 {
        kept.sort_unstable_by(descending);
        let total: f64 = kept.iter().map(|(_, score)| f64::from(score.exp())).sum();
        let mut sum = 0.0;
        let enough = kept.iter().position(|(_, score)| {
            sum += f64::from(score.exp());
            sum >= f64::from(params.top_p) * total
        });
        kept.truncate(enough.map_or(kept.len(), |index| index + 1));
    }
    let floor = if params.min_p > 0.0 {
        params.min_p.ln()
    } else {
        f32::NEG_INFINITY
    };
    strongest(kept.into_iter(), floor, best, noise)
}

/// Returns the token with the largest score plus noise among those at or above `floor`.
///
/// The noise is at most [`MAX_GUMBEL`], so the noise of tokens that cannot reach the best
/// so far is not computed.
pub(crate) fn strongest(
    candidates: impl Iterator<Item = (usize, f32)>,
    floor: f32,
    best: usize,
    noise: impl Fn(usize) -> f32,
) -> usize {
    let (mut winner, mut value) = (best, noise(best));
    for (token, score) in candidates {
        let hopeless = score.is_nan() || score < floor || score + MAX_GUMBEL < value;
        if hopeless || token == best {
            continue;
        }
        let candidate = score + noise(token);
        if candidate > value || (candidate == value && token < winner) {
            (winner, value) = (token, candidate);
        }
    }
    winner
}

/// Upper bound of the Gumbel noise: above −ln(−ln(u)) for the largest u that [`gumbel`]
/// uses, 1 − 2⁻²⁵.
pub(crate) const MAX_GUMBEL: f32 = 17.4;

/// Returns standard Gumbel noise for one token, from Philox 4×32-10.
fn gumbel(seed: u64, position: u32, token: u32) -> f32 {
    gumbel_of(philox([token, position, 0, 0], [seed as u32, (seed >> 32) as u32])[0])
}

/// Converts random bits to standard Gumbel noise.
pub(crate) fn gumbel_of(bits: u32) -> f32 {
    // 24 bits, centred, so that neither 0 nor 1 occurs.
    let uniform = ((bits >> 8) as f64 + 0.5) / f64::from(1u32 << 24);
    -(-uniform.ln()).ln() as f32
}

/// Philox 4×32-10, a counter-based random number generator (Salmon et al., *Parallel Random
/// Numbers: As Easy as 1, 2, 3*, 2011).
pub(crate) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(params: SamplingParams, position: u32) -> SampleRow {
        SampleRow {
            params: Arc::new(params),
            position,
            ..SampleRow::default()
        }
    }

    fn draws(params: &SamplingParams, logits: &[f32], count: u32) -> Vec<usize> {
        let mut seen = vec![0; logits.len()];
        for position in 0..count {
            let sampled = sample(&mut logits.to_vec(), &row(params.clone(), position));
            seen[sampled.id as usize] += 1;
        }
        seen
    }

    #[test]
    fn philox_matches_the_published_test_vectors() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_of_equals() {
        let mut logits = [1.0, 3.0, f32::NAN, 3.0];
        assert_eq!(sample(&mut logits, &row(SamplingParams::greedy(), 0)).id, 1);
    }

    #[test]
    fn a_row_without_any_possible_token_gives_a_token_and_no_panic() {
        for value in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
            let mut logits = [value; 4];
            assert_eq!(
                sample(&mut logits, &row(SamplingParams::default(), 0)).id,
                0
            );
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [2.0f32, 1.0, 0.0, -1.0];
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let count = 40_000;
        let seen = draws(&SamplingParams::default(), &logits, count);
        for (token, &times) in seen.iter().enumerate() {
            let expected = logits[token].exp() / total;
            let found = times as f32 / count as f32;
            assert!(
                (found - expected).abs() < 0.01,
                "token {token}: {found} for {expected}"
            );
        }
    }

    #[test]
    fn temperature_flattens_and_sharpens() {
        let logits = [1.0f32, 0.0];
        let share = |temperature| {
            let params = SamplingParams {
                temperature,
                ..SamplingParams::default()
            };
            draws(&params, &logits, 20_000)[0] as f32 / 20_000.0
        };
        assert!((share(0.5) - 0.881).abs() < 0.01);
        assert!((share(2.0) - 0.622).abs() < 0.015);
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [3.0f32, 2.0, 1.0, 0.0];
        let cut = |params: SamplingParams| {
            draws(&params, &logits, 4_000)
                .iter()
                .filter(|&&times| times > 0)
                .count()
        };
        let base = SamplingParams::default();
        assert_eq!(cut(base.clone()), 4);
        assert_eq!(
            cut(SamplingParams {
                top_k: 2,
                ..base.clone()
            }),
            2
        );
        // Probabilities 0.644, 0.237, 0.087, 0.032.
        assert_eq!(
            cut(SamplingParams {
                top_p: 0.7,
                ..base.clone()
            }),
            2
        );
        assert_eq!(
            cut(SamplingParams {
                top_p: 0.6,
                ..base.clone()
            }),
            1
        );
        assert_eq!(
            cut(SamplingParams {
                min_p: 0.1,
                ..base.clone()
            }),
            3
        );
        assert_eq!(cut(SamplingParams { min_p: 1.0, ..base }), 1);
    }

    #[test]
    fn a_seed_and_a_position_fix_the_token() {
        let logits: Vec<f32> = (0..500).map(|i| (i as f32 * 0.37).sin()).collect();
        let params = |seed| SamplingParams {
            seed,
            ..SamplingParams::default()
        };
        let token = |seed, position| sample(&mut logits.clone(), &row(params(seed), position)).id;
        assert_eq!(token(7, 3), token(7, 3));
        let sequence = |seed| (0..20).map(|p| token(seed, p)).collect::<Vec<_>>();
        assert_ne!(sequence(7), sequence(8));
    }

    #[test]
    fn penalties_count_prompt_and_answer_as_documented() {
        let mut sampling = row(
            SamplingParams {
                repetition_penalty: 2.0,
                presence_penalty: 0.5,
                frequency_penalty: 0.25,
                ..SamplingParams::greedy()
            },
            0,
        );
        sampling.history = vec![0, 1, 1, 2];
        sampling.prompt_tokens = 1;
        let mut logits = [4.0, 4.0, -1.0, 1.5];
        sample(&mut logits, &sampling);
        assert_eq!(logits, [2.0, 2.0 - 1.0, -2.0 - 0.75, 1.5]);
    }

    #[test]
    fn bias_decides_and_logprobs_are_of_the_unmodified_logits() {
        let sampling = row(
            SamplingParams {
                logit_bias: vec![(2, 10.0)],
                logprobs: Some(2),
                ..SamplingParams::greedy()
            },
            0,
        );
        let logits = [1.0f32, 2.0, 0.0];
        let chosen = sample(&mut logits.clone(), &sampling);
        let log_sum = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
        assert_eq!(chosen.id, 2);
        assert!((chosen.logprob - (0.0 - log_sum)).abs() < 1e-6);
        assert_eq!(chosen.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
    }

    /// Returns a mask that allows `tokens`, for a vocabulary of `vocabulary` tokens.
    fn mask(vocabulary: usize, tokens: &[usize]) -> Option<Arc<[u32]>> {
        let mut mask = vec![0; vocabulary.div_ceil(32)];
        for &token in tokens {
            mask[token / 32] |= 1 << (token % 32);
        }
        Some(mask.into())
    }

    #[test]
    fn only_tokens_of_the_mask_are_chosen_whatever_else_is_asked_for() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
        let allowed = [0, 31, 32, 63, 64, 99];
        let base = SamplingParams {
            logit_bias: vec![(5, f32::INFINITY), (99, 1.0)],
            logprobs: Some(0),
            ..SamplingParams::default()
        };
        let cases = [
            SamplingParams {
                temperature: 0.0,
                ..base.clone()
            },
            SamplingParams {
                top_k: 3,
                ..base.clone()
            },
            SamplingParams {
                top_p: 0.8,
                ..base.clone()
            },
            SamplingParams {
                min_p: 0.01,
                temperature: 5.0,
                ..base.clone()
            },
            base,
        ];
        let log_sum = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
        for params in cases {
            let mut seen = std::collections::BTreeSet::new();
            for position in 0..200 {
                let row = SampleRow {
                    mask: mask(100, &allowed),
                    ..row(params.clone(), position)
                };
                let sampled = sample(&mut logits.clone(), &row);
                let token = sampled.id as usize;
                assert!(allowed.contains(&token), "{token}, {params:?}");
                assert!((sampled.logprob - (logits[token] - log_sum)).abs() < 1e-5);
                seen.insert(token);
            }
            assert_eq!(seen.len() > 1, params.temperature > 0.0, "{params:?}");
        }
    }

    #[test]
    fn a_mask_forbids_after_penalties_and_bias_and_allows_nothing_behind_its_end() {
        let mut row = row(
            SamplingParams {
                repetition_penalty: 2.0,
                logit_bias: vec![(1, 3.0), (2, 3.0)],
                ..SamplingParams::greedy()
            },
            0,
        );
        row.history = vec![0, 1];
        row.mask = mask(32, &[0, 2, 3]);
        let mut logits = [-1.0; 40];
        sample(&mut logits, &row);
        let never = f32::NEG_INFINITY;
        assert_eq!(logits[..5], [-2.0, never, 2.0, -1.0, never]);
        assert!(logits[32..].iter().all(|&logit| logit == never));
        // A mask that allows all tokens has the same effect as no mask.
        row.mask = mask(40, &(0..40).collect::<Vec<_>>());
        let mut allowed = [-1.0; 40];
        sample(&mut allowed, &row);
        row.mask = None;
        let mut free = [-1.0; 40];
        sample(&mut free, &row);
        assert_eq!(allowed, free);
    }

    #[test]
    fn a_forced_token_is_reported_whatever_the_parameters_say() {
        let forced = SampleRow {
            forced: Some(2),
            ..row(
                SamplingParams {
                    logit_bias: vec![(2, -10.0)],
                    logprobs: Some(2),
                    ..SamplingParams::default()
                },
                5,
            )
        };
        let logits = [1.0f32, 2.0, 0.0];
        let log_sum = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
        let sampled = sample(&mut logits.clone(), &forced);
        assert_eq!(sampled.id, 2);
        assert!((sampled.logprob - (0.0 - log_sum)).abs() < 1e-6);
        let top: Vec<u32> = sampled.top.iter().map(|top| top.0).collect();
        assert_eq!(top, [1, 0]);
        let beyond = SampleRow {
            forced: Some(3),
            ..forced
        };
        let sampled = sample(&mut logits.clone(), &beyond);
        assert_eq!(sampled.logprob, f32::NEG_INFINITY);
    }

    #[test]
    fn parameters_outside_their_range_are_named() {
        let check = |params: SamplingParams| params.validate(10).map_err(|error| error.name);
        let base = SamplingParams::default();
        assert_eq!(check(base.clone()), Ok(()));
        for temperature in [f32::NAN, -1.0, f32::INFINITY] {
            assert_eq!(
                check(SamplingParams {
                    temperature,
                    ..base.clone()
                }),
                Err("temperature")
            );
        }
        assert_eq!(
            check(SamplingParams {
                top_p: 0.0,
                ..base.clone()
            }),
            Err("top_p")
        );
        assert_eq!(
            check(SamplingParams {
                min_p: f32::NAN,
                ..base.clone()
            }),
            Err("min_p")
        );
        assert_eq!(
            check(SamplingParams {
                repetition_penalty: 0.0,
                ..base.clone()
            }),
            Err("repetition_penalty")
        );
        assert_eq!(
            check(SamplingParams {
                presence_penalty: 2.5,
                ..base.clone()
            }),
            Err("presence_penalty")
        );
        assert_eq!(
            check(SamplingParams {
                logit_bias: vec![(10, 1.0)],
                ..base.clone()
            }),
            Err("logit_bias")
        );
        assert_eq!(
            check(SamplingParams {
                logprobs: Some(1025),
                ..base
            }),
            Err("logprobs")
        );
    }
}
