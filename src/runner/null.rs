//! [`NullRunner`]: a runner without a model, to measure the host side.

use super::{LoadError, Runner, RunnerInfo, StepOutput};
use crate::cache::CacheLayout;
use crate::device::{DeviceError, PooledRows};
use crate::sampling::Token;
use crate::schedule::{PlanItem, Report, Sequences, StepPlan, Task};
use std::collections::VecDeque;
use std::ops::Range;

/// Sizes of a [`NullRunner`], which allocates nothing of what they describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullOptions {
    /// Number of steps in flight: 1 or 2.
    pub depth: usize,
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Maximum number of tokens per sequence, prompt and answer together.
    pub context_tokens: usize,
    /// Number of blocks of the KV cache.
    pub cache_blocks: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Length of an embedding vector.
    pub embedding: usize,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self {
            depth: 2,
            vocabulary: 32_000,
            context_tokens: 8192,
            cache_blocks: 65_536,
            block_tokens: 16,
            embedding: 64,
        }
    }
}

/// A runner that computes nothing, so that an engine with it spends all its time on the host
/// side.
///
/// Steps complete as soon as they are collected, and every token is the one that
/// [`NullOptions::token`] returns. An embedding is the mean of the prompt's
/// [`NullOptions::hidden_state`]s, and log probabilities are those of [`NullOptions::sampled`].
///
/// ```
/// use quell::internals::runner::{NullOptions, NullRunner};
/// use quell::{Engine, EngineConfig, Request};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let options = NullOptions::default();
/// let engine = Engine::with_runner(EngineConfig::default(), None, move || {
///     NullRunner::start(options)
/// })?;
/// let request = Request::new(vec![7, 8]).max_tokens(3);
/// let answer = engine.generate(request)?.complete_blocking()?;
/// let tokens: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
/// assert_eq!(tokens, [9, 10, 11]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct NullRunner {
    options: NullOptions,
    /// Outputs of the steps in flight, oldest first.
    in_flight: VecDeque<StepOutput>,
    /// Outputs that have been read, whose allocations are reused.
    spare: Vec<StepOutput>,
}

impl NullOptions {
    /// Returns the token at `position` of a sequence whose prompt begins with `first`: the sum
    /// of the two, modulo the size of the vocabulary. It does not depend on other sequences,
    /// and it stays the same after a recompute.
    pub fn token(&self, first: u32, position: usize) -> u32 {
        ((first as usize + position) % self.vocabulary.max(1)) as u32
    }

    /// Returns `token` with a log probability of 0. If `top` is given, it also has that many
    /// likeliest tokens: `token` and those after it in the vocabulary, each less likely than the
    /// one before by a factor of e.
    pub fn sampled(&self, token: u32, top: Option<u32>) -> Token {
        let size = self.vocabulary.max(1);
        let after = |step: usize| ((token as usize + step) % size) as u32;
        let top =
            (0..size.min(top.unwrap_or(0) as usize)).map(|step| (after(step), -(step as f32)));
        Token {
            id: token,
            logprob: 0.0,
            top: top.collect(),
        }
    }

    /// Returns the last hidden state of a token: 1 in the column that is the token id modulo
    /// the number of columns, 0 elsewhere.
    pub fn hidden_state(&self, token: u32) -> Vec<f32> {
        let mut state = vec![0.0; self.embedding];
        if let Some(column) = (token as usize).checked_rem(self.embedding) {
            state[column] = 1.0;
        }
        state
    }
}

impl NullRunner {
    /// Creates a runner of these sizes.
    pub fn new(options: NullOptions) -> Self {
        Self {
            options,
            in_flight: VecDeque::with_capacity(options.depth),
            spare: Vec::new(),
        }
    }

    /// Creates a runner and its description, as [`Engine::with_runner`] expects them.
    ///
    /// # Errors
    /// Never returns an error.
    ///
    /// [`Engine::with_runner`]: crate::Engine::with_runner
    pub fn start(options: NullOptions) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let runner = Self::new(options);
        let info = runner.info();
        Ok((Box::new(runner), info))
    }

    /// Returns the description of this runner.
    pub fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocabulary: self.options.vocabulary,
            context_tokens: self.options.context_tokens,
            max_batch_tokens: 512,
            embedding: (self.options.embedding > 0).then_some(self.options.embedding),
            pooling: Default::default(),
            generates: true,
            segments: 1,
            whole_prompts: false,
            end_tokens: Vec::new(),
            cache_blocks: self.options.cache_blocks,
            block_tokens: self.options.block_tokens,
            layout: CacheLayout::single(),
            states: None,
            swap: None,
            model: None,
        }
    }

    /// Returns the tokens after an item's sampled positions.
    fn run(&self, item: &PlanItem, sequences: &Sequences) -> impl Iterator<Item = Token> {
        let sequence = sequences.get(item.key);
        let first = sequence.and_then(|sequence| sequence.tokens.first().copied());
        let top = sequence.and_then(|sequence| sequence.spec.params.logprobs);
        let options = self.options;
        item.sampled.clone().map(move |position| {
            let token = options.token(first.unwrap_or(0), position + 1);
            options.sampled(token, top)
        })
    }

    /// Returns the samples of the known tokens after an item's scored rows.
    fn scores(&self, item: &PlanItem, sequences: &Sequences) -> Vec<Token> {
        let (Report::Scores(rows), Some(sequence)) = (&item.report, sequences.get(item.key)) else {
            return Vec::new();
        };
        let top = match sequence.spec.task {
            Task::Score { top } => Some(top),
            Task::Generate | Task::Embed(_) => None,
        };
        let next = sequence.tokens.get(rows.start + 1..rows.end + 1);
        let next = next.unwrap_or_default().iter();
        next.map(|&token| self.options.sampled(token, top))
            .collect()
    }

    fn sum(&self, item: &PlanItem, rows: Range<usize>, sequences: &Sequences) -> PooledRows {
        let mut sum = PooledRows::new(self.options.embedding);
        let tokens = sequences.get(item.key).map(|sequence| &sequence.tokens);
        for &token in tokens
            .and_then(|tokens| tokens.get(rows))
            .unwrap_or_default()
        {
            sum.add_row(&self.options.hidden_state(token));
        }
        sum
    }
}

impl Runner for NullRunner {
    fn depth(&self) -> usize {
        self.options.depth
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        let mut output = self.spare.pop().unwrap_or_default();
        output.clear();
        let tokens = &mut output.samples.tokens;
        for item in &plan.items {
            tokens.append(&mut self.scores(item, sequences));
            tokens.extend(self.run(item, sequences));
        }
        let sums = plan.sums();
        let sums = sums.map(|(item, rows)| self.sum(item, rows.clone(), sequences));
        output.sums.extend(sums);
        self.in_flight.push_back(output);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        Ok(self.in_flight.pop_front().unwrap_or_default())
    }

    fn recycle(&mut self, output: StepOutput) {
        if self.spare.len() < self.options.depth {
            self.spare.push(output);
        }
    }
}
