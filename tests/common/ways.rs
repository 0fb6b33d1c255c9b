//! Ways in which the engine can compute an answer: in chunks of a prompt, after a preemption, from
//! cached blocks and states, and as a turn of a session. None of them may change a bit.
//!
//! Each way checks by the engine's counters that it was taken.

use crate::requests::idle;
use quell::{
    Engine, EngineConfig, MemoryPlan, Preemption, Request, SamplingParams, Token, TokenStream,
};
use std::path::Path;

/// Numbers of tokens. A turn of a session goes on beyond an interval between snapshots.
#[derive(Clone, Copy)]
pub struct Lengths {
    prompt: usize,
    answer: usize,
    /// The first prompt of a session, the later ones, and the answers.
    turns: [usize; 3],
    /// The session's tokens when it goes back.
    back: usize,
}

impl Lengths {
    /// More than the windows of the tiny checkpoints, and than an interval between snapshots.
    pub const SHORT: Self = Self {
        prompt: 70,
        answer: 12,
        turns: [60, 20, 8],
        back: 70,
    };

    /// Answers go on to where layers with a window give back their first blocks.
    pub const LONG: Self = Self {
        prompt: 140,
        answer: 24,
        turns: [120, 40, 12],
        back: 100,
    };
}

/// Tokens per block of the KV cache.
const BLOCK: usize = 16;

/// Tokens between snapshots of the states of recurrent layers.
const INTERVAL: usize = 64;

/// Vocabulary of the tiny checkpoints.
const VOCABULARY: usize = 512;

/// Loads a model on the device under test.
pub type Load<'a> = dyn Fn(&Path, EngineConfig) -> Engine + 'a;

/// The id of each token, and the bits of its log probability and of the likeliest tokens'.
pub type Bits = Vec<(u32, u32, Vec<(u32, u32)>)>;

/// A checkpoint, and the engine that computes what is compared with: every request alone, and its
/// prompt in one step.
pub struct Undisturbed<'a> {
    path: &'a Path,
    load: &'a Load<'a>,
    lengths: Lengths,
    engine: Engine,
}

impl<'a> Undisturbed<'a> {
    /// Loads a checkpoint.
    pub fn new(path: &'a Path, load: &'a Load<'a>, lengths: Lengths) -> Self {
        let engine = load(path, roomy());
        Self {
            path,
            load,
            lengths,
            engine,
        }
    }

    /// Computes the answer to a prompt.
    fn answer(&self, prompt: &[u32], tokens: usize) -> Bits {
        let before = self.engine.stats().unwrap();
        let (answer, cached) = read(self.engine.generate(request(prompt, tokens)).unwrap());
        let after = idle(&self.engine);
        assert_eq!(answer.len(), tokens);
        assert_eq!((cached, after.preemptions), (0, 0));
        let steps = after.steps.as_u64() - before.steps.as_u64();
        assert_eq!(steps, tokens as u64, "the prompt was cut");
        answer
    }

    /// Loads the checkpoint once more.
    fn load(&self, config: EngineConfig) -> Engine {
        (self.load)(self.path, config)
    }

    fn plan(&self) -> &MemoryPlan {
        &self.engine.info().model.as_ref().unwrap().memory
    }

    /// Returns with how many of `tokens` computed tokens a sequence can continue.
    fn reusable(&self, tokens: usize) -> usize {
        match self.plan().state_layers {
            0 => tokens,
            _ => tokens / INTERVAL * INTERVAL,
        }
    }

    /// Returns the settings of an engine whose cache is too small for two sequences: the second
    /// can start only if the first gives up its blocks.
    fn small(&self, preemption: Preemption) -> EngineConfig {
        // The states of both sequences, and one that is written while another is read.
        const SLOTS: usize = 3;
        let plan = self.plan();
        let groups = plan.sequence_blocks(1);
        let Lengths { prompt, answer, .. } = self.lengths;
        let blocks = plan.sequence_blocks(prompt + answer) + groups;
        EngineConfig {
            max_batch_tokens: Some(64),
            kv_cache_bytes: Some(blocks * plan.block_bytes + SLOTS * plan.state_bytes),
            state_slots: (plan.state_layers > 0).then_some(SLOTS),
            preemption,
            // Its reader lags behind after these tokens.
            stream_buffer: 8,
            ..roomy()
        }
    }

    /// Computes the prompt in chunks of this many tokens.
    pub fn agrees_in_chunks(&self, chunk: usize) {
        let engine = self.load(EngineConfig {
            max_batch_tokens: Some(chunk),
            ..roomy()
        });
        let Lengths { prompt, answer, .. } = self.lengths;
        let tokens = tokens(0, prompt);
        let stream = engine.generate(request(&tokens, answer)).unwrap();
        let (found, _) = read(stream);
        let steps = engine.stats().unwrap().steps.as_u64();
        assert_eq!(steps, (prompt.div_ceil(chunk) + answer - 1) as u64);
        self.require(&tokens, &found, &format!("in chunks of {chunk}"));
    }

    /// Preempts a request in the middle of its answer and lets it resume.
    pub fn agrees_after_preemption(&self, preemption: Preemption) {
        let engine = self.load(self.small(preemption));
        let Lengths { prompt, answer, .. } = self.lengths;
        let [first, second] = [0, 1].map(|index| tokens(index, prompt));
        // Nobody reads the first answer beyond its first token, so that the request is paused in
        // the middle of a block, and gives way to the second.
        let mut stream = engine.generate(request(&first, answer)).unwrap();
        let begun = stream.next_blocking().unwrap().unwrap().tokens;
        let (found, _) = read(engine.generate(request(&second, answer)).unwrap());
        self.require(&second, &found, &format!("beside one with {preemption:?}"));
        let paused = engine.stats().unwrap();
        assert_eq!((paused.preemptions, paused.waiting), (1, 1), "{paused:?}");
        assert_eq!(paused.swaps_in, 0);
        let swaps = u64::from(preemption == Preemption::Swap);
        assert_eq!(paused.swaps, swaps);
        assert_eq!(paused.swapped_blocks > 0, preemption == Preemption::Swap);

        let (rest, _) = read(stream);
        let found = [bits(&begun), rest].concat();
        self.require(&first, &found, &format!("after {preemption:?}"));
        let stats = idle(&engine);
        assert_eq!(stats.preemptions, 1);
        assert_eq!((stats.swaps, stats.swaps_in), (swaps, swaps));
    }

    /// Begins with what the prefix cache has of the prompt, and of the prompt and its answer.
    pub fn agrees_after_a_prefix_hit(&self) {
        let engine = self.load(EngineConfig {
            prefix_cache: true,
            ..roomy()
        });
        let Lengths { prompt, answer, .. } = self.lengths;
        let mut hits = 0;
        let mut tokens = tokens(0, prompt);
        for known in [0, prompt - 1, prompt + answer - 1] {
            let stream = engine.generate(request(&tokens, answer)).unwrap();
            let (found, cached) = read(stream);
            assert_eq!(cached, self.reusable(known / BLOCK * BLOCK));
            hits += cached;
            self.require(&tokens, &found, &format!("with {cached} tokens cached"));
            if known > 0 {
                tokens.extend(found.iter().map(|token| token.0));
                tokens.extend(self::tokens(1, 9));
            }
        }
        assert_eq!(idle(&engine).prefix_hits, hits as u64);
    }

    /// Computes three turns of a session; before the last, the session goes back to where its
    /// layers with a window have given up what they need.
    pub fn agrees_in_a_session(&self) {
        let Lengths { turns, back, .. } = self.lengths;
        let [first, next, answer] = turns;
        let engine = self.load(EngineConfig {
            prefix_cache: true,
            ..roomy()
        });
        let session = engine.session();
        let mut context = tokens(0, first);
        let turn = |context: &mut Vec<u32>, new: usize| {
            let begin = context.len() - new;
            let stream = session
                .generate(request(&context[begin..], answer))
                .unwrap();
            let (found, cached) = read(stream);
            let what = format!("in a session with {cached} tokens cached");
            self.require(context, &found, &what);
            context.extend(found.iter().map(|token| token.0));
            let kept = session.retained().unwrap().tokens;
            // The last token of an answer is not computed.
            assert_eq!(kept, self.reusable(context.len() - 1));
            cached
        };
        assert_eq!(turn(&mut context, first), 0);
        let kept = self.reusable(context.len() - 1);
        assert!(kept > first, "no snapshot was taken in the answer");
        context.extend(tokens(1, next));
        assert_eq!(turn(&mut context, next), kept);

        session.rewind(back).unwrap();
        context.truncate(back);
        context.extend(tokens(2, next));
        let cached = turn(&mut context, next);
        // Of tokens that are in the prefix cache, only whole blocks are known.
        let least = self.reusable(back / BLOCK * BLOCK);
        assert!(least > 0 && (least..=self.reusable(back)).contains(&cached));
        session.end().wait().unwrap();
        idle(&engine);
    }

    /// Requires that an answer has the bits of the undisturbed one.
    fn require(&self, prompt: &[u32], found: &Bits, how: &str) {
        let expected = self.answer(prompt, found.len());
        let pairs = found.iter().zip(&expected);
        let same = pairs.take_while(|(found, expected)| found == expected);
        let (same, path) = (same.count(), self.path.display());
        assert_eq!(same, found.len(), "equal tokens of {path}, {how}");
    }
}

/// The settings of an engine that has room for everything and reuses nothing.
fn roomy() -> EngineConfig {
    EngineConfig {
        max_batch_tokens: Some(256),
        max_sequences: 4,
        max_context: Some(256),
        kv_cache_bytes: Some(8 << 20),
        block_tokens: BLOCK,
        prefix_cache: false,
        audit: true,
        ..EngineConfig::default()
    }
}

/// Returns tokens of a prompt of this length, different for each index.
fn tokens(index: usize, length: usize) -> Vec<u32> {
    let token = |position| (index * 131 + position * (position + 5) * 7 + 3) % VOCABULARY;
    (0..length).map(|position| token(position) as u32).collect()
}

fn request(prompt: &[u32], tokens: usize) -> Request {
    let sampling = SamplingParams {
        logprobs: Some(8),
        ..SamplingParams::greedy()
    };
    let request = Request::new(prompt.to_vec());
    let mut request = request.max_tokens(tokens).sampling(sampling);
    request.ignore_eos = true;
    request
}

/// Returns an answer, or what has not been read of it, and how many tokens of the prompt were
/// cached.
fn read(stream: TokenStream) -> (Bits, usize) {
    let done = stream.complete_blocking().unwrap();
    (bits(&done.tokens), done.finish.cached_tokens)
}

fn bits(tokens: &[Token]) -> Bits {
    let of_token = |token: &Token| {
        let top = token.top.iter();
        let top = top.map(|(id, logprob)| (*id, logprob.to_bits()));
        (token.id, token.logprob.to_bits(), top.collect())
    };
    tokens.iter().map(of_token).collect()
}
