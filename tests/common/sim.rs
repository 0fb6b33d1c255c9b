//! A simulated runner: a device whose "model" is a hash of the cached tokens.
//!
//! It keeps one token a slot of the key-value cache, writes and reads it through
//! the block tables, and only when a step is collected: a block that is handed out
//! too early, or a table that is wrong, changes the tokens that come out.

#![allow(dead_code)] // each test file uses its part

use quell::cache::{BlockId, Transfers};
use quell::device::{DeviceError, PooledRows};
use quell::runner::{Runner, RunnerInfo, StepOutput, SwapInfo};
use quell::sampling::Sampled;
use quell::schedule::{Report, SequenceKey, Sequences, StepPlan, TokenInput};
use quell::text::Tokenizer;
use quell::{Engine, EngineConfig, LoadError, SessionId};
use std::collections::VecDeque;
use std::sync::{Arc, mpsc};

pub const VOCABULARY: u32 = 1000;
/// Numbers of a hidden state.
pub const HIDDEN: usize = 8;

/// What the simulated device is to do.
pub struct SimOptions {
    /// Steps in flight.
    pub depth: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    pub block_tokens: usize,
    pub context: usize,
    /// Blocks of host memory; none means that nothing can be swapped out.
    pub swap_blocks: usize,
    /// Each collected step takes one permit from here, if there is a gate.
    pub gate: Option<mpsc::Receiver<()>>,
    /// What happens when the step with this number is collected.
    pub fault: Option<(u64, Fault)>,
}

/// What a step can be made to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The launch is refused.
    Launch,
    /// The step fails.
    Step,
    /// The device is lost.
    Lost,
    /// The runner panics.
    Panic,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            depth: 1,
            blocks: 256,
            block_tokens: 4,
            context: 512,
            swap_blocks: 0,
            gate: None,
            fault: None,
        }
    }
}

/// Whose blocks they are. Turns of one session follow each other in the same blocks:
/// steps take effect in the order in which they are launched.
#[derive(Clone, Copy, PartialEq)]
enum Owner {
    Sequence(SequenceKey),
    Session(SessionId),
}

struct Item {
    owner: Owner,
    tokens: Vec<u32>,
    feedback: Option<usize>,
    /// Slots of the tokens of this step.
    written: Vec<usize>,
    /// Slots of all tokens up to the last of this step.
    read: Vec<usize>,
    report: Report,
    /// The known tokens after those of the scored rows.
    next: Vec<u32>,
    sample: bool,
    /// The tokens that may be chosen; all without one.
    mask: Option<Arc<[u32]>>,
}

/// A launched step.
struct Launched {
    step: u64,
    transfers: Transfers,
    items: Vec<Item>,
}

/// The simulated device.
pub struct SimRunner {
    options: SimOptions,
    memory: Vec<u32>,
    host: Vec<u32>,
    previous: Vec<u32>,
    in_flight: VecDeque<Launched>,
}

/// A failure that does not outlive its step.
pub fn failure(operation: &'static str) -> DeviceError {
    DeviceError::Failed {
        device: "sim",
        operation,
        reason: "made to fail".to_owned(),
    }
}

impl SimRunner {
    /// Its memory holds nothing.
    pub fn new(options: SimOptions) -> Self {
        Self {
            memory: vec![u32::MAX; options.blocks * options.block_tokens],
            host: vec![u32::MAX; options.swap_blocks * options.block_tokens],
            previous: Vec::new(),
            in_flight: VecDeque::new(),
            options,
        }
    }

    /// The token at each slot of the cache, as the collected steps have left it.
    pub fn memory(&self) -> &[u32] {
        &self.memory
    }

    /// Steps in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The oldest step in flight fails, and leaves nothing behind.
    pub fn fail_oldest(&mut self) -> DeviceError {
        self.in_flight.pop_front().expect("a step is in flight");
        self.previous.clear();
        failure("step")
    }

    fn fault(&self, step: u64) -> Option<Fault> {
        self.options
            .fault
            .filter(|(at, _)| *at == step)
            .map(|(_, fault)| fault)
    }

    /// I4: nobody writes where a step in flight of another owner reads.
    fn check_writes(&self, owner: Option<Owner>, written: &[usize]) {
        for earlier in &self.in_flight {
            for old in &earlier.items {
                let shared = written.iter().find(|slot| old.read.contains(slot));
                assert!(
                    owner == Some(old.owner) || shared.is_none(),
                    "I4: slot {shared:?} is handed out again while step {} is in flight",
                    earlier.step
                );
            }
        }
    }

    fn slots(&self, block: usize) -> std::ops::Range<usize> {
        let size = self.options.block_tokens;
        block * size..(block + 1) * size
    }

    fn transfer(&mut self, transfers: &Transfers) {
        for (block, host) in &transfers.swap_out {
            let (from, to) = (self.slots(block.index()), self.slots(host.index()));
            self.host[to].copy_from_slice(&self.memory[from]);
        }
        for (source, target) in &transfers.copies {
            let (from, to) = (self.slots(source.index()), self.slots(target.index()));
            self.memory.copy_within(from, to.start);
        }
        for (host, block) in &transfers.swap_in {
            let (from, to) = (self.slots(host.index()), self.slots(block.index()));
            self.memory[to].copy_from_slice(&self.host[from]);
        }
    }
}

impl Runner for SimRunner {
    fn depth(&self) -> usize {
        self.options.depth
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        if self.fault(plan.step.as_u64()) == Some(Fault::Launch) {
            return Err(failure("launch"));
        }
        let items: Vec<Item> = plan
            .items
            .iter()
            .map(|item| {
                let sequence = &sequences[item.key];
                let end = item.start + item.count;
                let slots: Vec<usize> = (0..end)
                    .map(|position| {
                        let slot = sequence.table.slot(position, self.options.block_tokens);
                        slot.expect("every planned position has a block") as usize
                    })
                    .collect();
                let (tokens, feedback) = match item.input {
                    TokenInput::Known => (sequence.tokens[item.start..end].to_vec(), None),
                    TokenInput::Feedback { sample } => (vec![0], Some(sample)),
                };
                let next = item.report.scored().map(|row| sequence.tokens[row + 1]);
                Item {
                    report: item.report.clone(),
                    next: next.collect(),
                    owner: sequence
                        .spec
                        .session
                        .map_or(Owner::Sequence(item.key), Owner::Session),
                    tokens,
                    feedback,
                    written: slots[item.start..].to_vec(),
                    read: slots,
                    sample: item.sample,
                    mask: sequence
                        .spec
                        .constraint
                        .as_ref()
                        .map(|constraint| Arc::clone(constraint.mask())),
                }
            })
            .collect();
        for item in &items {
            self.check_writes(Some(item.owner), &item.written);
        }
        let copied = plan.transfers.copies.iter().map(|(_, target)| target);
        let swapped = plan.transfers.swap_in.iter().map(|(_, target)| target);
        for target in copied.chain(swapped) {
            let slots: Vec<usize> = self.slots(target.index()).collect();
            self.check_writes(None, &slots);
        }
        self.in_flight.push_back(Launched {
            step: plan.step.as_u64(),
            transfers: plan.transfers.clone(),
            items,
        });
        Ok(())
    }

    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        let size = self.options.block_tokens;
        for block in blocks {
            self.memory[block.index() * size..][..size].fill(u32::MAX);
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        if let Some(gate) = &self.options.gate {
            // A closed gate lets everything through.
            let _ = gate.recv();
        }
        let launched = self.in_flight.pop_front().expect("a step is in flight");
        let Launched {
            step,
            transfers,
            items,
        } = launched;
        match self.fault(step) {
            Some(Fault::Panic) => panic!("made to panic"),
            Some(Fault::Step) => {
                self.previous.clear();
                return Err(failure("step"));
            }
            Some(Fault::Lost) => {
                return Err(DeviceError::Lost {
                    device: "sim",
                    operation: "step",
                    reason: "made to be lost".to_owned(),
                });
            }
            _ => {}
        }
        self.transfer(&transfers);
        for item in &items {
            for (index, &slot) in item.written.iter().enumerate() {
                self.memory[slot] = match item.feedback {
                    // Of a step that failed there is nothing to feed back.
                    Some(sample) => self.previous.get(sample).copied().unwrap_or(u32::MAX),
                    None => item.tokens[index],
                };
            }
        }
        let mut output = StepOutput::default();
        for item in &items {
            let up_to = |row: usize| item.read[..=row].iter().map(|&slot| self.memory[slot]);
            let scores = item.report.scored().zip(&item.next);
            output.samples.extend(scores.map(|(row, &token)| Sampled {
                token,
                logprob: logprob(up_to(row), token),
                top: Vec::new(),
                is_finite: true,
            }));
            if let Report::Sum(rows) = &item.report {
                let mut sum = PooledRows::new(HIDDEN);
                rows.clone()
                    .for_each(|row| sum.add_row(&hidden_state(up_to(row))));
                output.sums.push(sum);
            }
            if item.sample {
                let token = next_token(up_to(item.read.len() - 1));
                let mask = item.mask.as_deref();
                let allowed = |token| mask.is_none_or(|mask| is_set(mask, token));
                output.samples.push(Sampled {
                    token: nearest(token, allowed),
                    logprob: 0.0,
                    top: Vec::new(),
                    is_finite: true,
                });
            }
        }
        let tokens = output.samples.iter().map(|sample| sample.token);
        self.previous = tokens.collect();
        Ok(output)
    }
}

/// The "model": the next token after these.
pub fn next_token(tokens: impl Iterator<Item = u32>) -> u32 {
    let hash = tokens.fold(0xcbf2_9ce4_8422_2325u64, |hash, token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
    });
    ((hash >> 20) % u64::from(VOCABULARY)) as u32
}

/// The last hidden state of the last of these tokens.
pub fn hidden_state(tokens: impl Iterator<Item = u32>) -> [f32; HIDDEN] {
    let token = next_token(tokens) as usize;
    std::array::from_fn(|column| (token * (column + 1) % 97) as f32 / 97.0 - 0.5)
}

/// The mean of the hidden states of a prompt.
pub fn expected_embedding(prompt: &[u32]) -> Vec<f32> {
    let mut sum = PooledRows::new(HIDDEN);
    for end in 1..=prompt.len() {
        sum.add_row(&hidden_state(prompt[..end].iter().copied()));
    }
    sum.mean()
}

/// The log-probability of `next` after these tokens.
pub fn logprob(tokens: impl Iterator<Item = u32>, next: u32) -> f32 {
    -(next_token(tokens.chain([next])) as f32) / 100.0
}

fn is_set(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] >> (token % 32) & 1 == 1
}

/// The first token from `token` on that is allowed, beginning anew after the last; `token`
/// itself if there is none.
fn nearest(token: u32, allowed: impl Fn(u32) -> bool) -> u32 {
    let order = (0..VOCABULARY).map(|next| (token + next) % VOCABULARY);
    order
        .into_iter()
        .find(|&token| allowed(token))
        .unwrap_or(token)
}

/// What the model answers to a prompt, each token allowed after the ones before it.
pub fn expected_where(
    prompt: &[u32],
    count: usize,
    allowed: impl Fn(&[u32], u32) -> bool,
) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let free = next_token(tokens.iter().copied());
        tokens.push(nearest(free, |token| {
            allowed(&tokens[prompt.len()..], token)
        }));
    }
    tokens.split_off(prompt.len())
}

/// What the model answers to a prompt.
pub fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(tokens.iter().copied()));
    }
    tokens.split_off(prompt.len())
}

/// An engine over a simulated device; its books are checked after every step.
pub fn engine(options: SimOptions, config: EngineConfig) -> Engine {
    start(options, config, None)
}

/// As [`engine`], with text: the model's tokens are the tokenizer's, as far as it has
/// so many.
pub fn engine_with_text(options: SimOptions, config: EngineConfig, tokenizer: Tokenizer) -> Engine {
    start(options, config, Some(tokenizer))
}

fn start(options: SimOptions, config: EngineConfig, tokenizer: Option<Tokenizer>) -> Engine {
    let config = EngineConfig {
        audit: true,
        ..config
    };
    let info = info(&options);
    Engine::with_runner(config, tokenizer, move || {
        let runner = SimRunner::new(options);
        Ok::<_, LoadError>((Box::new(runner) as Box<dyn Runner>, info))
    })
    .expect("a simulated engine starts")
}

/// What an engine is told of the simulated device.
pub fn info(options: &SimOptions) -> RunnerInfo {
    RunnerInfo {
        vocabulary: VOCABULARY as usize,
        context_tokens: options.context,
        embedding: Some(HIDDEN),
        end_tokens: Vec::new(),
        cache_blocks: options.blocks,
        block_tokens: options.block_tokens,
        swap: (options.swap_blocks > 0).then_some(SwapInfo {
            blocks: options.swap_blocks,
            seconds_per_block: 1e-9,
        }),
        model: None,
    }
}
