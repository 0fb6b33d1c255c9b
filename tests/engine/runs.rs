//! Steps that return several tokens per request: what is delivered, what is discarded, and what
//! is counted.

use common::requests::{idle, prompt, request};
use quell::internals::cache::CacheLayout;
use quell::internals::runner::{Runner, RunnerInfo, StepOutput};
use quell::internals::schedule::{Sequences, StepPlan};
use quell::{
    Chunk, Constraint, ConstraintError, DeviceError, EncodeOptions, Engine, EngineConfig,
    EngineFault, GenerateError, LoadError, Outcome, Receipt, Request, Token, TokenStream,
    Tokenizer,
};
use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, Sender};

/// A runner that answers every prompt with the same tokens, several per step. The log
/// probability of each is its index in the answer, negated.
struct Scripted {
    answer: Vec<u32>,
    run: usize,
    depth: usize,
    /// Changes the output of each step.
    edit: fn(&mut StepOutput),
    in_flight: VecDeque<StepOutput>,
    /// Told of each launch.
    launched: Option<Sender<()>>,
    /// Each collected step waits for one permit, until the sender is dropped.
    gate: Option<Receiver<()>>,
}

impl Scripted {
    fn new(answer: Vec<u32>, run: usize) -> Self {
        Self {
            answer,
            run,
            depth: 1,
            edit: |_| {},
            in_flight: VecDeque::new(),
            launched: None,
            gate: None,
        }
    }

    fn engine(self, tokenizer: Option<Tokenizer>) -> Engine {
        let info = RunnerInfo {
            vocabulary: 1000.max(tokenizer.as_ref().map_or(0, Tokenizer::vocabulary_size)),
            context_tokens: 400,
            max_batch_tokens: 512,
            embedding: None,
            pooling: Default::default(),
            generates: true,
            segments: 1,
            whole_prompts: false,
            end_tokens: Vec::new(),
            cache_blocks: 200,
            block_tokens: 4,
            layout: CacheLayout::single(),
            states: None,
            swap: None,
            model: None,
        };
        let config = EngineConfig {
            audit: true,
            ..EngineConfig::default()
        };
        let start = move || Ok::<_, LoadError>((Box::new(self) as Box<dyn Runner>, info));
        Engine::with_runner(config, tokenizer, start).unwrap()
    }
}

impl Runner for Scripted {
    fn depth(&self) -> usize {
        self.depth
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        let mut output = StepOutput::default();
        for item in plan.samples() {
            let next = item.sampled.start + 1 - sequences[item.key].prompt_tokens;
            let tokens = (next..next + self.run).map(|index| {
                let id = self.answer.get(index).copied().unwrap_or(0);
                Token::with_logprob(id, -(index as f32))
            });
            output.samples.tokens.extend(tokens);
            output.runs.push(self.run);
        }
        (self.edit)(&mut output);
        self.in_flight.push_back(output);
        if let Some(launched) = &self.launched {
            let _ = launched.send(());
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        if let Some(gate) = &self.gate {
            let _ = gate.recv();
        }
        Ok(self.in_flight.pop_front().expect("a step is in flight"))
    }
}

/// Reads a stream to its end. Returns the chunks before an error, the error, and the receipt.
fn read(mut stream: TokenStream) -> (Vec<Chunk>, Option<GenerateError>, Receipt) {
    let mut chunks = Vec::new();
    let mut error = None;
    while let Some(next) = stream.next_blocking() {
        match next {
            Ok(chunk) => chunks.push(chunk),
            Err(failed) => error = Some(failed),
        }
    }
    (chunks, error, stream.cancel().wait().unwrap())
}

/// Checks that the chunks deliver these tokens, each with its own log probability.
fn assert_tokens(chunks: &[Chunk], expected: &[u32]) {
    let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens);
    let found: Vec<_> = tokens.map(|token| (token.id, token.logprob)).collect();
    let expected = expected.iter().enumerate();
    let expected: Vec<_> = expected.map(|(i, &id)| (id, -(i as f32))).collect();
    assert_eq!(found, expected);
}

fn lengths(chunks: &[Chunk]) -> Vec<usize> {
    chunks.iter().map(|chunk| chunk.tokens.len()).collect()
}

#[test]
fn a_run_ends_with_the_token_that_ends_the_answer_and_the_rest_is_discarded() {
    let answer: Vec<u32> = (1..20).collect();
    for (run, limit, stop, kept, discarded) in [
        (3, 7, 99, vec![3, 3, 1], 2),
        (3, 6, 99, vec![3, 3], 0),
        (3, 20, 5, vec![3, 2], 1),
        (5, 4, 4, vec![4], 1),
        (5, 4, 1, vec![1], 4),
        (1, 3, 99, vec![1, 1, 1], 0),
    ] {
        let engine = Scripted::new(answer.clone(), run).engine(None);
        let mut request = request(prompt(1, 6), limit);
        request.stop_token_ids = vec![stop];
        let (chunks, error, receipt) = read(engine.generate(request).unwrap());
        assert!(error.is_none());
        assert_eq!(lengths(&chunks), kept, "runs of {run}");
        let count = kept.iter().sum();
        assert_tokens(&chunks, &answer[..count]);
        let finish = chunks.last().unwrap().finish.unwrap();
        let outcome = match answer[count - 1] == stop {
            true => Outcome::Stop,
            false => Outcome::Length,
        };
        assert_eq!((finish.outcome, finish.generated_tokens), (outcome, count));
        let counted = (receipt.tokens_generated, receipt.tokens_discarded);
        assert_eq!(counted, (count, discarded), "runs of {run}");
        assert_eq!(idle(&engine).tokens_generated, count as u64);
    }
}

#[test]
fn the_run_of_a_request_that_is_cancelled_meanwhile_is_discarded_as_a_whole() {
    let (told, launched) = mpsc::channel();
    let (permit, gate) = mpsc::channel();
    let runner = Scripted {
        launched: Some(told),
        gate: Some(gate),
        ..Scripted::new(vec![5; 20], 3)
    };
    let engine = runner.engine(None);
    let mut stream = engine.generate(request(prompt(1, 6), 20)).unwrap();
    launched.recv().unwrap();
    permit.send(()).unwrap();
    let first = stream.next_blocking().unwrap().unwrap();
    assert_eq!(first.tokens.len(), 3);
    launched.recv().unwrap();
    let cancel = stream.cancel();
    drop(permit);
    let receipt = cancel.wait().unwrap();
    assert_eq!((receipt.tokens_generated, receipt.tokens_discarded), (3, 3));
    assert_eq!(idle(&engine).tokens_generated, 3);
}

fn tokenizer() -> Tokenizer {
    let folder = common::root().join("tests/fixtures/text/folder");
    Tokenizer::from_folder(&folder).unwrap()
}

const BEFORE: &str = "one two three ";

/// Returns the tokens of a text with a stop string in it, and the number of tokens up to the
/// end of the stop string.
fn with_stop_string(tokenizer: &Tokenizer) -> (Vec<u32>, usize) {
    let text = format!("{BEFORE}halt! four five six seven");
    let tokens = tokenizer.encode(&text, EncodeOptions::default()).unwrap();
    let contains = |count: &usize| tokenizer.decode(&tokens[..*count], true).contains("halt!");
    let kept = (1..tokens.len()).find(contains).unwrap();
    (tokens, kept)
}

#[test]
fn a_stop_string_that_completes_within_a_run_ends_the_answer_there() {
    let tokenizer = tokenizer();
    let (answer, kept) = with_stop_string(&tokenizer);
    let mut within = 0;
    for run in 1..=answer.len() {
        let (permit, gate) = mpsc::channel();
        let runner = Scripted {
            gate: Some(gate),
            ..Scripted::new(answer.clone(), run)
        };
        let engine = runner.engine(Some(self::tokenizer()));
        let stream = engine.generate(request(prompt(1, 6), 300).stop("halt!"));
        let steps = kept.div_ceil(run);
        (0..steps).for_each(|_| permit.send(()).unwrap());
        let mut stream = stream.unwrap();
        let chunks: Vec<Chunk> = (0..steps)
            .map(|_| stream.next_blocking().unwrap().unwrap())
            .collect();
        drop(permit);
        assert!(stream.next_blocking().is_none(), "nothing follows the end");
        assert_tokens(&chunks, &answer[..kept]);
        let text: String = chunks.iter().map(|chunk| chunk.text.as_str()).collect();
        assert_eq!(text, BEFORE);
        for chunk in &chunks {
            assert_eq!(chunk.texts().count(), chunk.tokens.len());
            assert_eq!(chunk.texts().collect::<String>(), chunk.text);
        }
        let finish = chunks.last().unwrap().finish.unwrap();
        let ended = (finish.outcome, finish.generated_tokens);
        assert_eq!(ended, (Outcome::Stop, kept));
        let receipt = stream.cancel().wait().unwrap();
        assert_eq!(receipt.tokens_generated, kept);
        // One more step may have been in flight.
        let behind = steps * run - kept;
        let discarded = receipt.tokens_discarded;
        assert!([behind, behind + run].contains(&discarded), "{discarded}");
        within += usize::from(behind > 0);
        assert_eq!(idle(&engine).outcomes.stopped, 1);
    }
    assert!(within > 3);
}

#[test]
fn a_session_keeps_nothing_behind_a_stop_string_within_a_run() {
    let (answer, kept) = with_stop_string(&tokenizer());
    let (permit, gate) = mpsc::channel();
    let runner = Scripted {
        gate: Some(gate),
        ..Scripted::new(answer.clone(), kept + 2)
    };
    let engine = runner.engine(Some(tokenizer()));
    let session = engine.session();
    let turn = session.generate(request(prompt(1, 6), 300).stop("halt!"));
    permit.send(()).unwrap();
    let chunk = turn.unwrap().next_blocking().unwrap().unwrap();
    assert_tokens(&[chunk], &answer[..kept]);
    drop(permit);
    idle_session(&engine);
    assert_eq!(session.context_tokens(), 6 + kept);
    let retained = session.retained().unwrap().tokens;
    assert!((6..=6 + kept).contains(&retained), "{retained}");
    let next = session.generate(request(prompt(2, 3), 4)).unwrap();
    let (chunks, error, _) = read(next);
    assert!(error.is_none());
    assert_tokens(&chunks, &answer[..4]);
    assert_eq!(session.context_tokens(), 6 + kept + 3 + 4);
}

/// Waits until no request is open. A session may keep blocks.
fn idle_session(engine: &Engine) {
    loop {
        let stats = engine.stats().unwrap();
        if stats.open + stats.closing == 0 {
            return;
        }
    }
}

/// Allows every token, but fails when it gets one.
#[derive(Clone, Debug)]
struct Refuses(u32);

impl Constraint for Refuses {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        mask.fill(u32::MAX);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        match token == self.0 {
            true => Err(ConstraintError(format!("{token} is refused"))),
            false => Ok(()),
        }
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[test]
fn the_tokens_before_one_that_the_constraint_refuses_are_delivered() {
    for (refused, kept, discarded) in [(6, vec![4, 1], 2), (5, vec![4], 3), (1, vec![], 3)] {
        let answer: Vec<u32> = (1..20).collect();
        let engine = Scripted::new(answer.clone(), 4).engine(None);
        let request =
            request(prompt(1, 6), 20).constraint(Box::new(Refuses(refused)) as Box<dyn Constraint>);
        let (chunks, error, receipt) = read(engine.generate(request).unwrap());
        assert_eq!(lengths(&chunks), kept);
        let count: usize = kept.iter().sum();
        assert_tokens(&chunks, &answer[..count]);
        assert!(
            matches!(
                error,
                Some(GenerateError::Failed(EngineFault::Constraint(_)))
            ),
            "{error:?}"
        );
        let counted = (receipt.tokens_generated, receipt.tokens_discarded);
        assert_eq!(counted, (count, discarded));
        assert_eq!(idle(&engine).tokens_generated, count as u64);
    }
}

#[test]
fn a_run_with_a_token_from_logits_that_are_not_finite_fails_its_own_request() {
    let (permit, gate) = mpsc::channel();
    let runner = Scripted {
        // The first of two requests is broken, at the second token of its second run.
        edit: |output| {
            let tokens = &output.samples.tokens;
            if tokens.len() > 3 && tokens[0].logprob == -3.0 {
                output.samples.not_finite.push(1);
            }
        },
        gate: Some(gate),
        ..Scripted::new((1..20).collect(), 3)
    };
    let engine = runner.engine(None);
    let mut both = engine
        .generate_batch(vec![request(prompt(1, 6), 9), request(prompt(2, 6), 9)], 1)
        .unwrap();
    drop(permit);
    let (other, broken) = (both.pop().unwrap(), both.pop().unwrap());
    let (chunks, error, _) = read(broken);
    assert_eq!(lengths(&chunks), [3]);
    let fault = matches!(
        error,
        Some(GenerateError::Failed(EngineFault::NotFinite { .. }))
    );
    assert!(fault, "{error:?}");
    let (chunks, error, _) = read(other);
    assert!(error.is_none());
    assert_tokens(&chunks, &(1..10).collect::<Vec<_>>());
    idle(&engine);
}

#[test]
fn an_output_whose_runs_do_not_fit_its_plan_fails_the_step() {
    type Edit = fn(&mut StepOutput);
    let cases: [(usize, Edit, &str); 4] = [
        (1, |output| output.runs.push(2), "runs of [2, 2] tokens"),
        (1, |output| output.runs[0] = 0, "at least one token"),
        (1, |output| output.runs[0] = 3, "returned 2 samples"),
        (2, |_| {}, "the step after it is in flight"),
    ];
    for (depth, edit, expected) in cases {
        let runner = Scripted {
            depth,
            edit,
            ..Scripted::new(vec![1; 20], 2)
        };
        let engine = runner.engine(None);
        let (chunks, error, _) = read(engine.generate(request(prompt(1, 6), 9)).unwrap());
        assert_eq!(lengths(&chunks), [0; 0]);
        let error = error.expect("the request fails").to_string();
        assert!(error.contains(expected), "{error}");
        idle(&engine);
    }
}

#[test]
fn prompts_are_scored_beside_runs() {
    let engine = Scripted {
        edit: |output| {
            // The five scores of the prompt come before its run.
            if output.samples.tokens[0].logprob == 0.0 {
                output.samples.tokens.splice(0..0, (0..5).map(Token::new));
            }
        },
        ..Scripted::new((1..20).collect(), 3)
    }
    .engine(None);
    let request: Request = request(prompt(1, 6), 5).prompt_logprobs(0);
    let (chunks, error, _) = read(engine.generate(request).unwrap());
    assert!(error.is_none(), "{error:?}");
    assert_eq!(lengths(&chunks), [3, 2]);
    assert_tokens(&chunks, &[1, 2, 3, 4, 5]);
    let scores = chunks[0].prompt_logprobs.as_ref().unwrap();
    assert_eq!(*scores, (0..5).map(Token::new).collect::<Vec<_>>());
}
