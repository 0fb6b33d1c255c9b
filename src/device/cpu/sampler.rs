//! The choice of a row's token. Chooses the same tokens as the reference sampler,
//! [`sample`](crate::sampling::sample), but avoids its copies, its sort, and the random numbers
//! of tokens that cannot win.
//!
//! Log probabilities differ from those of the reference by the rounding of a sum. Rows in which
//! non-finite values affect the result are left to the reference.

use super::simd::{Isa, Kernel, LANES, Simd};
use crate::sampling::reference::{MAX_GUMBEL, forbid, gumbel_of, penalise, philox, strongest};
use crate::sampling::{self, HistoryCounts, SampleRow, SamplingParams, Token};
use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Chooses a token for a row.
pub(crate) fn choose(isa: Isa, logits: &[f32], row: &SampleRow) -> Token {
    SCRATCH.with_borrow_mut(|scratch| {
        let chosen = scratch.choose(isa, logits, row);
        chosen.unwrap_or_else(|| sampling::sample(&mut logits.to_vec(), row))
    })
}

/// Returns whether all logits of a row are finite.
pub(crate) fn is_finite(isa: Isa, logits: &[f32]) -> bool {
    isa.dispatch(AllFinite(logits))
}

thread_local! {
    /// Buffers that a thread reuses.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers for sampling a row. If the needed size is not known in advance, they reserve room
/// for the whole vocabulary, because memory that is not written costs nothing.
#[derive(Default)]
struct Scratch {
    /// Copy of the row's logits, for changing them.
    logits: Vec<f32>,
    counts: HistoryCounts,
    /// Tokens of the history, with the number of times that each was generated.
    seen: Vec<[u32; 2]>,
    best: BinaryHeap<Candidate>,
    kept: Vec<(usize, f32)>,
}

impl Scratch {
    /// Chooses a token. Returns `None` if the reference must decide.
    fn choose(&mut self, isa: Isa, logits: &[f32], row: &SampleRow) -> Option<Token> {
        let params = &*row.params;
        let report = params
            .logprobs
            .map(|count| (count as usize).min(logits.len()));
        let mut chosen = Token::default();
        let mut log_sum = 0.0;
        if let Some(count) = report {
            let max = isa.dispatch(Largest(logits));
            if !max.is_finite() {
                return None;
            }
            log_sum = max + isa.dispatch(ExpSum { logits, max }).ln() as f32;
            self.take_best(isa, logits, (0.0, 1.0), count);
            if self.kept.len() < count {
                return None;
            }
            let top = self.kept.iter();
            chosen.top = top
                .map(|&(id, logit)| (id as u32, logit - log_sum))
                .collect();
        }
        chosen.id = match row.forced {
            Some(token) => token,
            None => self.choose_token(isa, logits, row)?,
        };
        if report.is_some() {
            let raw = logits.get(chosen.id as usize).copied();
            chosen.logprob = raw.unwrap_or(f32::NEG_INFINITY) - log_sum;
        }
        Some(chosen)
    }

    fn choose_token(&mut self, isa: Isa, logits: &[f32], row: &SampleRow) -> Option<u32> {
        let params = &*row.params;
        let edited = params.needs_history() || !params.logit_bias.is_empty() || row.mask.is_some();
        if !edited {
            return self.pick(isa, logits, row);
        }
        let mut own = std::mem::take(&mut self.logits);
        own.clear();
        own.extend_from_slice(logits);
        self.apply_penalties(&mut own, row);
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = own.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if let Some(mask) = &row.mask {
            forbid(&mut own, mask);
        }
        let token = self.pick(isa, &own, row);
        self.logits = own;
        token
    }

    fn apply_penalties(&mut self, logits: &mut [f32], row: &SampleRow) {
        if !row.params.needs_history() {
            return;
        }
        self.seen.clear();
        self.seen.reserve_exact(logits.len());
        self.counts.count(row, logits.len(), &mut self.seen);
        for &[token, generated] in &self.seen {
            let logit = &mut logits[token as usize];
            *logit = penalise(*logit, generated, &row.params);
        }
    }

    /// Returns the token with the largest logit, or draws one. Returns `None` if the reference
    /// must decide.
    fn pick(&mut self, isa: Isa, logits: &[f32], row: &SampleRow) -> Option<u32> {
        let params = &*row.params;
        let max = isa.dispatch(Largest(logits));
        if max == f32::NEG_INFINITY {
            return Some(0);
        }
        let best = logits.iter().position(|&logit| logit == max)?;
        let max = logits[best]; // `max` may be the other zero, 0.0 or -0.0
        if params.temperature == 0.0 || max == f32::INFINITY {
            return Some(best as u32);
        }
        let inverse = 1.0 / params.temperature;
        if !inverse.is_finite() {
            return None;
        }
        let floor = match params.min_p > 0.0 {
            true => params.min_p.ln(),
            false => f32::NEG_INFINITY,
        };
        let noise = |token: u32| philox([token, row.position, 0, 0], key(params))[0];
        let scale = (max, inverse);
        if params.top_k == 0 && params.top_p >= 1.0 {
            let race = Race {
                logits,
                scale,
                floor,
                best: (best, gumbel_of(noise(best as u32))),
                position: row.position,
                key: key(params),
            };
            return Some(isa.dispatch(race) as u32);
        }
        let total = if params.top_k > 0 {
            let count = (params.top_k as usize).min(logits.len());
            self.take_best(isa, logits, scale, count);
            let scores = self.kept.iter().map(|(_, score)| score);
            scores.map(|score| f64::from(score.exp())).sum()
        } else {
            self.take_likely(isa, logits, scale, f64::from(params.top_p))
        };
        if params.top_p < 1.0 {
            let p = f64::from(params.top_p);
            let rounding = match params.top_k {
                0 => ROUNDING,
                _ => 0.0, // the sum is computed as in the reference
            };
            let cut = nucleus(&self.kept, p, total, rounding).or_else(|| {
                let weights = logits
                    .iter()
                    .map(|logit| f64::from(((logit - max) * inverse).exp()));
                let total = weights.filter(|weight| !weight.is_nan()).sum();
                nucleus(&self.kept, p, total, EXACT_ROUNDING)
            });
            self.kept.truncate(cut?);
        }
        let kept = self.kept.iter().copied();
        let noise = |token: usize| gumbel_of(noise(token as u32));
        Some(strongest(kept, floor, best, noise) as u32)
    }

    /// Fills `kept` with the `count` best tokens and their scores, best first.
    fn take_best(&mut self, isa: Isa, logits: &[f32], scale: (f32, f32), count: usize) {
        self.best.clear();
        self.best.reserve(count);
        self.kept.clear();
        self.kept.reserve(count);
        if count == 0 {
            return;
        }
        isa.dispatch(Best {
            logits,
            scale,
            count,
            best: &mut self.best,
        });
        let best = self.best.drain();
        self.kept
            .extend(best.map(|Candidate(id, score)| (id, score)));
        self.kept.sort_unstable_by(descending);
    }

    /// Fills `kept` with the best tokens and their scores, best first, and with at least as
    /// many as are needed for their weights to reach the share `p` of all weights. Returns the
    /// sum of all weights.
    fn take_likely(&mut self, isa: Isa, logits: &[f32], scale: (f32, f32), p: f64) -> f64 {
        let weights = isa.dispatch(Weights { logits, scale });
        let [total, above @ ..] = weights;
        // Takes slightly more than needed, because the sums are rounded.
        let enough = (p + ROUNDING) * total;
        let depths = DEPTHS.iter().zip(above);
        let depth = depths
            .filter(|(_, sum)| *sum >= enough)
            .map(|(depth, _)| -depth);
        self.kept.clear();
        self.kept.reserve_exact(logits.len());
        isa.dispatch(Above {
            logits,
            scale,
            floor: depth.reduce(f32::max).unwrap_or(f32::MIN),
            kept: &mut self.kept,
        });
        self.kept.sort_unstable_by(descending);
        total
    }
}

/// Returns how many of the best tokens are needed to reach the share `p` of all weights, whose
/// sum is `total`. Returns `None` if that depends on the rounding of the sums, whose error is
/// at most `rounding * total`.
fn nucleus(best: &[(usize, f32)], p: f64, total: f64, rounding: f64) -> Option<usize> {
    let mut sum = 0.0;
    for (index, (_, score)) in best.iter().enumerate() {
        sum += f64::from(score.exp());
        if (sum - p * total).abs() < rounding * total {
            return None;
        }
        if sum >= p * total {
            return Some(index + 1);
        }
    }
    Some(best.len())
}

fn key(params: &SamplingParams) -> [u32; 2] {
    [params.seed as u32, (params.seed >> 32) as u32]
}

/// Orders by descending score, then by ascending id.
fn descending(a: &(usize, f32), b: &(usize, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// A token and its score. The order puts worse candidates later, so that the worst one is at
/// the top of the heap.
struct Candidate(usize, f32);

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        descending(&(self.0, self.1), &(other.0, other.1))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Returns the scores `(logit − max) · inverse` of up to sixteen logits, where `scale` is
/// `(max, inverse)`. The score is −∞ for NaN and for lanes without a logit.
#[inline(always)]
fn scores<S: Simd>(s: S, logits: &[f32], scale: (f32, f32)) -> S::F {
    let nothing = s.splat(f32::NEG_INFINITY);
    let x = if logits.len() == LANES {
        // SAFETY: there are sixteen logits.
        unsafe { s.load(logits.as_ptr()) }
    } else {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        lanes[..logits.len()].copy_from_slice(logits);
        // SAFETY: `lanes` has sixteen elements.
        unsafe { s.load(lanes.as_ptr()) }
    };
    let score = s.mul(s.sub(x, s.splat(scale.0)), s.splat(scale.1));
    // If the score is NaN, the second operand is the result.
    s.max(score, nothing)
}

#[inline(always)]
fn lanes<S: Simd>(s: S, value: S::F) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: `lanes` has sixteen elements.
    unsafe { s.store(lanes.as_mut_ptr(), value) };
    lanes
}

/// Number of vectors that are summed in float32 before they are added to the float64 sum.
const RUN: usize = 32;

/// Bound on the relative error of a sum of weights. The weights of a run are added in float32,
/// and each has an error of up to two units in the last place.
const ROUNDING: f64 = 4e-6;

/// Like [`ROUNDING`], for float64 sums that differ only in the order of addition.
const EXACT_ROUNDING: f64 = 1e-10;

/// Whether all logits are finite.
struct AllFinite<'a>(&'a [f32]);

impl Kernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        // The difference of a number and itself is 0, or NaN if the number is not finite.
        let mut sum = s.splat(0.0);
        for chunk in chunks {
            // SAFETY: the chunk has sixteen logits.
            let x = unsafe { s.load(chunk.as_ptr()) };
            sum = s.add(sum, s.sub(x, x));
        }
        s.reduce_add(sum) == 0.0 && rest.iter().all(|logit| logit.is_finite())
    }
}

/// Computes Σ e^(logit − max).
struct ExpSum<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Kernel for ExpSum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let mut total = 0.0;
        for run in self.logits.chunks(RUN * LANES) {
            let mut sum = s.splat(0.0);
            for chunk in run.chunks(LANES) {
                sum = s.add(sum, s.exp(scores(s, chunk, (self.max, 1.0))));
            }
            total += f64::from(s.reduce_add(sum));
        }
        total
    }
}

/// Depths below the largest score. For each depth, [`Weights`] sums the weights of the tokens
/// whose scores are at most this far below the largest.
const DEPTHS: [f32; 8] = [0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0];

/// Computes the sum of e^score over all tokens, then over the tokens within each of the
/// [`DEPTHS`].
struct Weights<'a> {
    logits: &'a [f32],
    scale: (f32, f32),
}

impl Kernel for Weights<'_> {
    type Output = [f64; 1 + DEPTHS.len()];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let zero = s.splat(0.0);
        let mut totals = [0.0; 1 + DEPTHS.len()];
        for run in self.logits.chunks(RUN * LANES) {
            let mut sums = [zero; 1 + DEPTHS.len()];
            for chunk in run.chunks(LANES) {
                let score = scores(s, chunk, self.scale);
                let weight = s.exp(score);
                sums[0] = s.add(sums[0], weight);
                for (sum, depth) in sums[1..].iter_mut().zip(DEPTHS) {
                    let counted = s.select_lt(score, s.splat(-depth), zero, weight);
                    *sum = s.add(*sum, counted);
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += f64::from(s.reduce_add(sum));
            }
        }
        totals
    }
}

/// Collects the tokens whose scores are at least `floor`, which must be finite.
struct Above<'a> {
    logits: &'a [f32],
    scale: (f32, f32),
    floor: f32,
    kept: &'a mut Vec<(usize, f32)>,
}

impl Kernel for Above<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (index, chunk) in self.logits.chunks(LANES).enumerate() {
            let score = scores(s, chunk, self.scale);
            if s.reduce_max(score) < self.floor {
                continue;
            }
            for (lane, score) in lanes(s, score).into_iter().enumerate() {
                if score >= self.floor {
                    self.kept.push((index * LANES + lane, score));
                }
            }
        }
    }
}

/// Collects the `count` tokens with the largest scores, except those with score −∞.
struct Best<'a> {
    logits: &'a [f32],
    scale: (f32, f32),
    count: usize,
    best: &'a mut BinaryHeap<Candidate>,
}

impl Kernel for Best<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut worst = f32::NEG_INFINITY;
        for (index, chunk) in self.logits.chunks(LANES).enumerate() {
            let score = scores(s, chunk, self.scale);
            if s.reduce_max(score) < worst {
                continue;
            }
            for (lane, score) in lanes(s, score).into_iter().enumerate() {
                let candidate = Candidate(index * LANES + lane, score);
                if score == f32::NEG_INFINITY {
                } else if self.best.len() < self.count {
                    self.best.push(candidate);
                } else if let Some(mut last) = self.best.peek_mut()
                    && candidate < *last
                {
                    *last = candidate;
                }
            }
            if self.best.len() == self.count {
                worst = self.best.peek().map_or(worst, |last| last.1);
            }
        }
    }
}

/// Finds the token with the largest sum of score and noise, among those with a score of at
/// least `floor`.
struct Race<'a> {
    logits: &'a [f32],
    scale: (f32, f32),
    floor: f32,
    /// The likeliest token, whose score is 0, and its noise.
    best: (usize, f32),
    position: u32,
    key: [u32; 2],
}

impl Kernel for Race<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let (mut winner, mut value) = self.best;
        for (index, chunk) in self.logits.chunks(LANES).enumerate() {
            let score = scores(s, chunk, self.scale);
            let most = s.reduce_max(score);
            if most < self.floor || most + MAX_GUMBEL < value {
                continue;
            }
            let first = index * LANES;
            let bits = philox_of(first as u32, self.position, self.key);
            let scores = lanes(s, score);
            for lane in 0..LANES {
                let (token, score) = (first + lane, scores[lane]);
                let hopeless = score < self.floor || score + noise_bound(bits[lane]) < value;
                if hopeless || token == self.best.0 {
                    continue;
                }
                let candidate = score + gumbel_of(bits[lane]);
                if candidate > value || (candidate == value && token < winner) {
                    (winner, value) = (token, candidate);
                }
            }
        }
        winner
    }
}

/// Returns an upper bound of the noise −ln(−ln u) that `bits` produce. The noise is at most
/// −ln(1 − u), and 1 − u is at least the power of two that its leading zeros indicate.
#[inline(always)]
fn noise_bound(bits: u32) -> f32 {
    let rest = 0x00FF_FFFF - (bits >> 8);
    (rest.leading_zeros() - 7) as f32 * std::f32::consts::LN_2 + 1e-3
}

/// Returns the first word of [`philox`] for sixteen consecutive tokens.
#[inline(always)]
fn philox_of(first: u32, position: u32, mut key: [u32; 2]) -> [u32; LANES] {
    let mut counter = [[0; LANES], [position; LANES], [0; LANES], [0; LANES]];
    for (lane, token) in counter[0].iter_mut().enumerate() {
        *token = first + lane as u32;
    }
    for _ in 0..10 {
        let mut next = [[0; LANES]; 4];
        for lane in 0..LANES {
            let a = u64::from(counter[0][lane]) * 0xD251_1F53;
            let b = u64::from(counter[2][lane]) * 0xCD9E_8D57;
            next[0][lane] = (b >> 32) as u32 ^ counter[1][lane] ^ key[0];
            next[1][lane] = b as u32;
            next[2][lane] = (a >> 32) as u32 ^ counter[3][lane] ^ key[1];
            next[3][lane] = a as u32;
        }
        counter = next;
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter[0]
}

/// Largest of the numbers, or −∞ if there are none. NaN is ignored.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.0.as_chunks::<LANES>();
        let mut best = [s.splat(f32::NEG_INFINITY); 4];
        for (i, chunk) in whole.iter().enumerate() {
            // SAFETY: the chunk has `LANES` elements. If the first operand of `max` is NaN, the
            // second one is the result, so NaN is ignored.
            best[i % 4] = s.max(unsafe { s.load(chunk.as_ptr()) }, best[i % 4]);
        }
        let best = s.max(s.max(best[0], best[1]), s.max(best[2], best[3]));
        rest.iter().fold(
            s.reduce_max(best),
            |best, &x| if x > best { x } else { best },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::SimdLevel;
    use std::sync::Arc;

    fn levels() -> Vec<Isa> {
        let levels = [SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Portable];
        levels
            .into_iter()
            .filter_map(|level| Isa::choose(level).ok())
            .collect()
    }

    /// Returns logits similar to those of a model: normally distributed, with a few shifted up.
    fn logits(seed: u32, count: usize, width: f32) -> Vec<f32> {
        let uniform = |token: u32, word: usize| {
            f64::from(philox([token, seed, 7, 7], [seed, 1])[word]) / 4_294_967_296.0
        };
        let normal = |token: u32| {
            let radius = (-2.0 * (1.0 - uniform(token, 0)).ln()).sqrt();
            (radius * (std::f64::consts::TAU * uniform(token, 1)).cos()) as f32
        };
        let peak = |token: u32| if uniform(token, 2) < 0.001 { 6.0 } else { 0.0 };
        (0..count as u32)
            .map(|token| width * normal(token) + peak(token))
            .collect()
    }

    fn settings() -> Vec<SamplingParams> {
        let mut all = Vec::new();
        for temperature in [0.0, 0.3, 1.0, 2.5] {
            for (top_k, top_p, min_p) in [
                (0, 1.0, 0.0),
                (0, 1.0, 0.05),
                (1, 1.0, 0.0),
                (50, 1.0, 0.0),
                (50, 0.9, 0.0),
                (0, 0.1, 0.0),
                (0, 0.9, 0.0),
                (0, 0.999, 0.001),
                (5000, 0.95, 0.0),
            ] {
                for (repetition_penalty, bias) in [(1.0, None), (1.3, Some((77, 9.0)))] {
                    all.push(SamplingParams {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        repetition_penalty,
                        frequency_penalty: repetition_penalty - 1.0,
                        logit_bias: bias.into_iter().collect(),
                        seed: 1 << 40 | all.len() as u64,
                        logprobs: (top_k == 50).then_some(20),
                        ..SamplingParams::default()
                    });
                }
            }
        }
        all
    }

    #[test]
    fn tokens_match_the_reference() {
        let mut compared = 0;
        for (width, count) in [(0.5, 1003), (2.0, 5000), (4.0, 32_000)] {
            for (position, params) in settings().into_iter().enumerate() {
                let logits = logits(position as u32, count, width);
                let row = SampleRow {
                    history: (0..60).chain(20..30).collect(),
                    prompt_tokens: 30,
                    mask: position.is_multiple_of(3).then(|| {
                        let words = count as u32 / 32 - 1;
                        (0..words)
                            .map(|word| word.wrapping_mul(0x9E37_79B9))
                            .collect()
                    }),
                    params: Arc::new(params),
                    position: position as u32,
                    ..SampleRow::default()
                };
                let expected = sampling::sample(&mut logits.clone(), &row);
                for isa in levels() {
                    let found = choose(isa, &logits, &row);
                    let what = format!("{} {width} {:?}", isa.name(), row.params);
                    assert_eq!(found.id, expected.id, "{what}");
                    assert!((found.logprob - expected.logprob).abs() < 1e-5, "{what}");
                    let ids = |token: &Token| -> Vec<u32> {
                        token.top.iter().map(|(id, _)| *id).collect()
                    };
                    assert_eq!(ids(&found), ids(&expected), "{what}");
                    compared += 1;
                }
            }
        }
        assert!(compared >= 200, "{compared}");
    }

    #[test]
    fn ties_and_non_finite_logits_match_the_reference() {
        let reported = SamplingParams {
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        let top_k = SamplingParams {
            top_k: 1,
            ..SamplingParams::default()
        };
        let top_p = |top_p| SamplingParams {
            top_p,
            ..SamplingParams::default()
        };
        // In the first three rows, the sum of weights reaches the share exactly, up to
        // rounding.
        let mut rows = vec![
            (vec![0.0, -0.21], top_p(0.552_307_9)),
            (vec![0.0, -0.09], top_p(0.522_484_84)),
            (vec![0.0; 4], top_p(0.5)),
            (vec![-0.0, 0.0], top_k.clone()),
            (vec![0.0, -0.0], top_k.clone()),
        ];
        let all = [SamplingParams::greedy(), reported, top_k, top_p(0.9)];
        for params in all.into_iter().chain([SamplingParams::default()]) {
            for (fill, special) in [
                (f32::NAN, f32::NAN),
                (f32::INFINITY, f32::INFINITY),
                (f32::NEG_INFINITY, f32::NEG_INFINITY),
                (f32::NEG_INFINITY, f32::NAN),
                (f32::NEG_INFINITY, f32::INFINITY),
                (f32::NEG_INFINITY, 1.0),
                (0.25, f32::NAN),
            ] {
                let mut logits = vec![fill; 40];
                (logits[0], logits[17], logits[30]) = (f32::NAN, special, special);
                rows.push((logits, params.clone()));
            }
        }
        for (logits, params) in rows {
            for position in 0..64 {
                let row = SampleRow {
                    params: Arc::new(params.clone()),
                    position,
                    ..SampleRow::default()
                };
                let expected = sampling::sample(&mut logits.clone(), &row);
                for isa in levels() {
                    let found = choose(isa, &logits, &row);
                    let what = format!("{} {logits:?} {params:?}", isa.name());
                    assert_eq!(found.id, expected.id, "{what}");
                    let ids = |token: &Token| token.top.iter().map(|top| top.0).collect();
                    let (found, expected): (Vec<u32>, Vec<u32>) = (ids(&found), ids(&expected));
                    assert_eq!(found, expected, "{what}");
                }
            }
        }
    }

    #[test]
    fn non_finite_logits_are_detected_at_any_index() {
        let logits = logits(5, 1003, 4.0);
        for isa in levels() {
            assert!(is_finite(isa, &logits), "{}", isa.name());
            for at in [0, 1, 15, 16, 500, 991, 992, 1002] {
                for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut broken = logits.clone();
                    broken[at] = value;
                    assert!(!is_finite(isa, &broken), "{} {value} at {at}", isa.name());
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_log_probabilities() {
        let row = SampleRow {
            params: Arc::new(SamplingParams {
                logprobs: Some(64),
                ..SamplingParams::greedy()
            }),
            ..SampleRow::default()
        };
        let logits = logits(3, 49_152, 3.0);
        let vectors = levels().into_iter().filter(|isa| isa.name() != "portable");
        let found: Vec<_> = vectors.map(|isa| choose(isa, &logits, &row)).collect();
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn noise_is_never_more_than_its_bound() {
        for step in 0..1 << 16 {
            for bits in [
                step << 16,
                step << 16 | 0xFFFF,
                u32::MAX - (step << 8),
                step << 8,
            ] {
                let (noise, bound) = (gumbel_of(bits), noise_bound(bits));
                assert!(
                    noise <= bound && noise <= MAX_GUMBEL,
                    "{bits:x}: {noise} {bound}"
                );
            }
        }
    }

    #[test]
    fn philox_of_gives_the_same_bits_as_philox() {
        for first in [0, 16, 49_136, u32::MAX - 31] {
            let all = philox_of(first, 9, [3, 4]);
            for (lane, bits) in all.into_iter().enumerate() {
                assert_eq!(bits, philox([first + lane as u32, 9, 0, 0], [3, 4])[0]);
            }
        }
    }
}
