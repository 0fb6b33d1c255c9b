//! [`NullRunner`]: a runner without a model, to measure the host side.

use super::{LoadError, Runner, RunnerInfo};
use crate::device::DeviceError;
use crate::sampling::Sampled;
use crate::schedule::{PlanItem, Sequences, StepPlan};
use std::collections::VecDeque;

/// Sizes of a [`NullRunner`]; it allocates none of what they describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullOptions {
    /// Steps in flight: 1 or 2.
    pub depth: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// Blocks of the key-value cache.
    pub cache_blocks: usize,
    /// Tokens a block.
    pub block_tokens: usize,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self {
            depth: 2,
            vocabulary: 32_000,
            context_tokens: 8192,
            cache_blocks: 65_536,
            block_tokens: 16,
        }
    }
}

/// A runner that computes nothing: all the time that an engine over it takes is
/// spent on the host side. Steps complete as soon as they are collected, and every
/// token is the one that [`NullOptions::token`] says.
///
/// ```
/// use quell::runner::{NullOptions, NullRunner};
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
    /// The samples of the steps in flight, oldest first.
    in_flight: VecDeque<Vec<Sampled>>,
}

impl NullOptions {
    /// The token at `position` of a sequence whose prompt begins with `first`: the
    /// sum of the two, in the vocabulary. It depends on no other sequence, and a
    /// sequence that is computed anew gets the same.
    pub fn token(&self, first: u32, position: usize) -> u32 {
        ((first as usize + position) % self.vocabulary.max(1)) as u32
    }
}

impl NullRunner {
    /// A runner of these sizes.
    pub fn new(options: NullOptions) -> Self {
        Self {
            options,
            in_flight: VecDeque::with_capacity(options.depth),
        }
    }

    /// The runner with its description, as [`Engine::with_runner`] takes them.
    ///
    /// [`Engine::with_runner`]: crate::Engine::with_runner
    pub fn start(options: NullOptions) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let runner = Self::new(options);
        let info = runner.info();
        Ok((Box::new(runner), info))
    }

    /// What an engine over it runs.
    pub fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocabulary: self.options.vocabulary,
            context_tokens: self.options.context_tokens,
            end_tokens: Vec::new(),
            cache_blocks: self.options.cache_blocks,
            block_tokens: self.options.block_tokens,
            swap: None,
            model: None,
        }
    }

    fn sample(&self, item: &PlanItem, sequences: &Sequences) -> Sampled {
        let first = sequences
            .get(item.key)
            .and_then(|sequence| sequence.tokens.first().copied());
        Sampled {
            token: self
                .options
                .token(first.unwrap_or(0), item.start + item.count),
            logprob: 0.0,
            top: Vec::new(),
        }
    }
}

impl Runner for NullRunner {
    fn depth(&self) -> usize {
        self.options.depth
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        // What `collect` gives away is the only allocation of a step.
        let mut samples = Vec::with_capacity(plan.items.len());
        samples.extend(plan.samples().map(|item| self.sample(item, sequences)));
        self.in_flight.push_back(samples);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, DeviceError> {
        Ok(self.in_flight.pop_front().unwrap_or_default())
    }
}
