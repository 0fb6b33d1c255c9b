//! A simulated runner: a device whose "model" is a hash of the cached tokens.
//!
//! It stores one token per slot of the KV cache and accesses the slots through the block
//! tables, but only when a step is collected. A block that is handed out too early, or a wrong
//! table, therefore changes the tokens that come out. If there are several groups of layers, each
//! of them must hold the same tokens, as far as its layers attend to them. If there are recurrent
//! layers, the state of a sequence is a hash of its tokens, and must be that of the cached tokens.

pub mod constraint;

use quell::internals::cache::{
    BlockId, BlockTable, CacheLayout, GroupKind, StateSlot, StepState, Transfers,
};
use quell::internals::device::PooledRows;
use quell::internals::runner::{Runner, RunnerInfo, StateInfo, StepOutput, SwapInfo};
use quell::internals::schedule::{Report, SequenceKey, Sequences, StepPlan, TokenInput};
use quell::{DeviceError, Engine, EngineConfig, LoadError, SessionId, Token, Tokenizer};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, mpsc};

pub const VOCABULARY: u32 = 1000;
/// Length of a hidden state.
pub const HIDDEN: usize = 8;

/// Options of the simulated device.
pub struct SimOptions {
    /// Maximum number of steps in flight.
    pub depth: usize,
    /// Number of KV cache blocks.
    pub blocks: usize,
    pub block_tokens: usize,
    /// Groups of layers. The model's answers depend on the tokens that the first group attends
    /// to; [`expected`] assumes that these are all tokens.
    pub layout: CacheLayout,
    /// Memory for states; `None` if there are no recurrent layers.
    pub states: Option<StateInfo>,
    pub context: usize,
    /// Number of host blocks for swapped-out data. With 0, nothing can be swapped out.
    pub swap_blocks: usize,
    /// Maximum number of tokens per run. More than 1 is possible only with depth 1. Constrained
    /// sequences have runs of one token.
    pub run: usize,
    /// If set, each collected step waits for one permit from this channel.
    pub gate: Option<mpsc::Receiver<()>>,
    /// A fault, and the number of the step that it hits.
    pub fault: Option<(u64, Fault)>,
}

/// What can go wrong with a step.
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
            layout: CacheLayout::single(),
            states: None,
            context: 512,
            swap_blocks: 0,
            run: 1,
            gate: None,
            fault: None,
        }
    }
}

/// Owner of a set of blocks. Turns of one session use the same blocks one after another, which
/// is safe because steps take effect in launch order.
#[derive(Clone, Copy, PartialEq)]
enum Owner {
    Sequence(SequenceKey),
    Session(SessionId),
}

struct Item {
    owner: Owner,
    tokens: Vec<u32>,
    feedback: Option<usize>,
    /// Position of the first token of this step.
    start: usize,
    /// Position after the last token of this step.
    end: usize,
    groups: Vec<ItemGroup>,
    report: Report,
    /// For each scored row, the known token that follows it.
    next: Vec<u32>,
    sampled: bool,
    state: Option<StepState>,
    /// Bit mask of the tokens that may be chosen. Without one, all may be.
    mask: Option<Arc<[u32]>>,
}

/// The slots of one group of layers that an item accesses.
struct ItemGroup {
    kind: GroupKind,
    /// Position of the first slot.
    first: usize,
    /// Slots of all tokens from there on, up to the last one of this step. The layers may read
    /// all of them.
    slots: Vec<usize>,
}

impl Item {
    /// Returns the slots of the tokens of this step, in all groups.
    fn written(&self) -> impl Iterator<Item = usize> + '_ {
        let groups = self.groups.iter();
        groups.flat_map(|group| group.slots[self.start - group.first..].iter().copied())
    }

    /// Returns the slots that the layers may read, in all groups.
    fn reads(&self, slot: usize) -> bool {
        self.groups.iter().any(|group| group.slots.contains(&slot))
    }
}

impl ItemGroup {
    fn slot(&self, position: usize) -> usize {
        self.slots[position - self.first]
    }
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
    /// The state in each slot.
    states: Vec<u64>,
    host: Vec<u32>,
    previous: Vec<u32>,
    in_flight: VecDeque<Launched>,
}

/// An error that affects only the step that it happens in.
pub fn failure(operation: &'static str) -> DeviceError {
    DeviceError::Failed {
        device: "sim",
        operation,
        reason: "made to fail".to_owned(),
    }
}

impl SimRunner {
    /// Creates a device whose memory is empty.
    pub fn new(options: SimOptions) -> Self {
        assert!(options.run == 1 || options.depth == 1);
        Self {
            memory: vec![u32::MAX; options.blocks * options.block_tokens],
            states: vec![POISON; options.states.map_or(0, |states| states.slots)],
            host: vec![u32::MAX; options.swap_blocks * options.block_tokens],
            previous: Vec::new(),
            in_flight: VecDeque::new(),
            options,
        }
    }

    /// The token in each slot of the cache, as of the last collected step.
    pub fn memory(&self) -> &[u32] {
        &self.memory
    }

    /// The state in each slot, as of the last collected step.
    pub fn states(&self) -> &[u64] {
        &self.states
    }

    /// Number of steps in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Fails the oldest step in flight, which leaves no effects.
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

    /// I4: a step must not write to slots that a step in flight of another owner reads.
    fn check_writes(&self, owner: Option<Owner>, written: &[usize]) {
        for earlier in &self.in_flight {
            for old in &earlier.items {
                let shared = written.iter().find(|slot| old.reads(**slot));
                assert!(
                    owner == Some(old.owner) || shared.is_none(),
                    "I4: slot {shared:?} is handed out again while step {} is in flight",
                    earlier.step
                );
            }
        }
    }

    /// I4 for states: a step must not write to slots that a step in flight of another owner
    /// accesses.
    fn check_state_writes(&self, owner: Owner, state: &StepState) {
        let written = [Some(state.after), state.snapshot.map(|(_, slot)| slot)];
        for earlier in &self.in_flight {
            for old in earlier.items.iter().filter(|old| old.owner != owner) {
                let accessed = old.state.iter().flat_map(|state| {
                    let snapshot = state.snapshot.map(|(_, slot)| slot);
                    [state.before, Some(state.after), snapshot]
                });
                let mut accessed = accessed.flatten();
                let shared = accessed.find(|slot| written.contains(&Some(*slot)));
                assert!(
                    shared.is_none(),
                    "I4: state {shared:?} is handed out again while step {} is in flight",
                    earlier.step
                );
            }
        }
    }

    /// Advances the state of an item over its tokens. Returns the state after each of them.
    fn advance(&mut self, item: &Item) -> Vec<u64> {
        let Some(state) = item.state else {
            return Vec::new();
        };
        let mut hash = state.before.map_or(SEED, |slot| self.states[slot.index()]);
        let group = &item.groups[0];
        let mut hashes = Vec::new();
        for position in item.start..item.end {
            hash = step(hash, self.memory[group.slot(position)]);
            hashes.push(hash);
            if let Some((rows, slot)) = state.snapshot
                && rows == hashes.len()
            {
                self.states[slot.index()] = hash;
            }
        }
        self.states[state.after.index()] = hash;
        hashes
    }

    /// Returns the slots that a step with the tokens `positions` of a sequence accesses.
    fn groups(&self, positions: Range<usize>, table: &BlockTable) -> Vec<ItemGroup> {
        let SimOptions {
            block_tokens,
            layout,
            ..
        } = &self.options;
        let groups = layout.groups().iter().enumerate();
        let groups = groups.map(|(index, group)| {
            let first = layout.first_block(index, positions.start, *block_tokens) * block_tokens;
            let slot = |position| {
                let block = table.block(index, position / block_tokens);
                let block = block.unwrap_or_else(|| {
                    panic!("position {position} of group {index} has no block: {table:?}")
                });
                block.index() * block_tokens + position % block_tokens
            };
            ItemGroup {
                kind: group.kind,
                first,
                slots: (first..positions.end).map(slot).collect(),
            }
        });
        groups.collect()
    }

    /// Returns the tokens that the token at `position` attends to in the first group of layers.
    /// If another group holds other tokens at these positions, or if the state after the token is
    /// not that of these tokens, one more follows, which no sequence has. `hashes` are the states
    /// after each token of the step.
    fn seen(&self, item: &Item, hashes: &[u64], position: usize) -> impl Iterator<Item = u32> {
        let (first, others) = item.groups.split_first().expect("there is a group");
        let token = |group: &ItemGroup, position| self.memory[group.slot(position)];
        let own = first.kind.first_position(position)..=position;
        let differs = others.iter().any(|other| {
            let from = other.kind.first_position(position).max(*own.start());
            (from..=position).any(|position| token(other, position) != token(first, position))
        });
        let hash = hashes.get(position - item.start);
        let tokens = own.clone().map(|position| token(first, position));
        let differs = differs || hash.is_some_and(|hash| *hash != tokens.fold(SEED, step));
        own.map(move |position| token(first, position))
            .chain(differs.then_some(u32::MAX))
    }

    /// Returns the run that follows these tokens.
    fn run(&self, mut tokens: Vec<u32>, mask: Option<&[u32]>) -> Vec<Token> {
        let allowed = |token| mask.is_none_or(|mask| is_set(mask, token));
        let mut run = Vec::new();
        let mut length = 1;
        while run.len() < length {
            let token = nearest(next_token(tokens.iter().copied()), allowed);
            if mask.is_none() && run.is_empty() {
                length = 1 + token as usize % self.options.run;
            }
            run.push(Token::new(token));
            tokens.push(token);
        }
        run
    }

    fn slots(&self, block: usize) -> Range<usize> {
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
                let groups = self.groups(item.start..end, &sequence.table);
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
                    start: item.start,
                    end,
                    groups,
                    sampled: !item.sampled.is_empty(),
                    state: item.state,
                    mask: sequence
                        .spec
                        .constraint
                        .as_ref()
                        .map(|constraint| Arc::clone(constraint.mask())),
                }
            })
            .collect();
        for item in &items {
            let written: Vec<usize> = item.written().collect();
            self.check_writes(Some(item.owner), &written);
            if let Some(state) = &item.state {
                self.check_state_writes(item.owner, state);
            }
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

    fn poison_states(&mut self, slots: &[StateSlot]) -> Result<(), DeviceError> {
        for slot in slots {
            self.states[slot.index()] = POISON;
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        if let Some(gate) = &self.options.gate {
            // A closed gate lets every step through.
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
            for (index, slot) in item.written().enumerate() {
                self.memory[slot] = match item.feedback {
                    // A failed step leaves no sample to feed back.
                    Some(sample) => self.previous.get(sample).copied().unwrap_or(u32::MAX),
                    None => item.tokens[index % item.tokens.len()],
                };
            }
        }
        let mut output = StepOutput::default();
        for item in &items {
            let hashes = self.advance(item);
            let up_to = |position: usize| self.seen(item, &hashes, position);
            let scores = item.report.scored().zip(&item.next);
            output.samples.tokens.extend(
                scores.map(|(row, &token)| Token::with_logprob(token, logprob(up_to(row), token))),
            );
            if let Report::Sum(rows) = &item.report {
                let mut sum = PooledRows::new(HIDDEN);
                rows.clone()
                    .for_each(|row| sum.add_row(&hidden_state(up_to(row))));
                output.sums.push(sum);
            }
            if item.sampled {
                let run = self.run(up_to(item.end - 1).collect(), item.mask.as_deref());
                output.runs.push(run.len());
                output.samples.tokens.extend(run);
            }
        }
        let tokens = output.samples.tokens.iter().map(|token| token.id);
        self.previous = tokens.collect();
        Ok(output)
    }
}

/// Returns a layout with layers that need all tokens and others with a window of `window`
/// tokens. A sequence has a block table for each of the two groups.
pub fn layout_with_window(window: usize) -> CacheLayout {
    CacheLayout::new(&[None, Some(window)], usize::MAX, 1).expect("the window is not empty")
}

/// The state of a sequence without tokens.
const SEED: u64 = 0xcbf2_9ce4_8422_2325;
/// What a slot holds that no one has written.
const POISON: u64 = u64::MAX;

/// Returns the state of a sequence of these tokens.
pub fn state_of(tokens: &[u32]) -> u64 {
    tokens.iter().copied().fold(SEED, step)
}

/// Returns the state after one more token.
fn step(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
}

/// The "model": returns the token that follows these tokens.
pub fn next_token(tokens: impl Iterator<Item = u32>) -> u32 {
    let hash = tokens.fold(SEED, step);
    ((hash >> 20) % u64::from(VOCABULARY)) as u32
}

/// Returns the last hidden state of the last of these tokens.
pub fn hidden_state(tokens: impl Iterator<Item = u32>) -> [f32; HIDDEN] {
    let token = next_token(tokens) as usize;
    std::array::from_fn(|column| (token * (column + 1) % 97) as f32 / 97.0 - 0.5)
}

/// Returns the mean of the hidden states of a prompt.
pub fn expected_embedding(prompt: &[u32]) -> Vec<f32> {
    let mut sum = PooledRows::new(HIDDEN);
    for end in 1..=prompt.len() {
        sum.add_row(&hidden_state(prompt[..end].iter().copied()));
    }
    sum.mean().expect("a prompt has tokens")
}

/// Returns the log probability of `next` after these tokens.
pub fn logprob(tokens: impl Iterator<Item = u32>, next: u32) -> f32 {
    -(next_token(tokens.chain([next])) as f32) / 100.0
}

fn is_set(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] >> (token % 32) & 1 == 1
}

/// Returns the first allowed token from `token` on, wrapping around at the end of the
/// vocabulary, or `token` itself if no token is allowed.
fn nearest(token: u32, allowed: impl Fn(u32) -> bool) -> u32 {
    let order = (0..VOCABULARY).map(|next| (token + next) % VOCABULARY);
    order
        .into_iter()
        .find(|&token| allowed(token))
        .unwrap_or(token)
}

/// Returns the model's answer to a prompt if each token must be allowed after the ones before
/// it.
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

/// Returns the model's answer to a prompt.
pub fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(tokens.iter().copied()));
    }
    tokens.split_off(prompt.len())
}

/// Creates an engine over a simulated device. Its invariants are checked after every step.
pub fn engine(options: SimOptions, config: EngineConfig) -> Engine {
    start(options, config, None)
}

/// Like [`engine`], but with text: token ids are those of the tokenizer, as far as its
/// vocabulary reaches.
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

/// Describes the simulated device to an engine.
pub fn info(options: &SimOptions) -> RunnerInfo {
    RunnerInfo {
        vocabulary: VOCABULARY as usize,
        context_tokens: options.context,
        max_batch_tokens: 512,
        embedding: Some(HIDDEN),
        pooling: Default::default(),
        generates: true,
        segments: 1,
        whole_prompts: false,
        end_tokens: Vec::new(),
        cache_blocks: options.blocks,
        block_tokens: options.block_tokens,
        layout: options.layout.clone(),
        states: options.states,
        swap: (options.swap_blocks > 0).then_some(SwapInfo {
            blocks: options.swap_blocks,
            seconds_per_block: 1e-9,
        }),
        model: None,
    }
}
