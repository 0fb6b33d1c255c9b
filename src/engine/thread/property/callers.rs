//! The callers in the property test: what they have requested, what they have observed, and
//! what they may observe.

use super::sim::constraint::Remainders;
use super::sim::{HIDDEN, expected, expected_where, hidden_state, logprob};
use crate::config::EngineConfig;
use crate::device::PooledRows;
use crate::engine::command::Command;
use crate::engine::event::{Event, PromptReport};
use crate::engine::sync::{Receiver, TryRecvError};
use crate::engine::{
    CancelReason, Cancellation, Drained, EmbedRequest, Engine, GenerateError, Outcome, Pending,
    Request, Session, SessionOptions, Shutdown, Stop, SubmitError, TokenStream,
};
use crate::id::{RequestId, SessionId};
use crate::sampling::Token;
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Longer than any test runs.
const FOR_EVER: Duration = Duration::from_secs(1 << 20);

/// What a request computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Tokens,
    /// Tokens, and the log probabilities of the prompt.
    Scores,
    /// Only the log probabilities of the prompt.
    OnlyScores,
    /// An embedding; or tokens where embeddings are not possible, in turns and for several
    /// samples.
    Embedding,
}

/// The parameters of a request.
#[derive(Clone, Debug)]
pub struct Ask {
    pub wanted: Wanted,
    /// Index of one of a few prompts.
    pub prompt: usize,
    pub length: usize,
    pub max_tokens: usize,
    /// Position in the answer of the token that is made a stop token.
    pub stop_at: Option<usize>,
    pub priority: i32,
    pub tenant: Option<u8>,
    /// Whether a deadline has passed from the start: `true` for that of the first token,
    /// `false` for that of the end.
    pub overdue: Option<bool>,
    /// Whether a constraint makes each token depend on all tokens before it, as the host counts
    /// them.
    pub constrained: bool,
}

impl Ask {
    /// Returns the answer of the simulated device.
    fn expected(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        match self.constrained {
            true => expected_where(prompt, count, Remainders::allow_after),
            false => expected(prompt, count),
        }
    }
}

/// What a caller does. A number selects one of the existing requests or sessions, modulo their
/// count.
#[derive(Clone, Debug)]
pub enum Act {
    Submit(Ask),
    Samples(Ask, usize),
    Read(usize),
    DropStream(usize),
    Cancel(usize),
    /// Posts the wake-up of a cancel, whether the flag is raised or not. Only the flag counts.
    CancelLate(usize),
    OpenSession {
        pin: Option<bool>,
    },
    Turn(usize, Ask),
    Stop(usize, bool),
    Rewind(usize, usize),
    Fork(usize),
    End(usize),
    DropSession(usize),
    AbortAll,
    ClearPrefixes,
    Drain {
        now: bool,
    },
}

/// How a request ended, as its caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Outcome(Outcome),
    Failed,
    /// The engine closed before it had accepted the request.
    Closed,
}

/// A request and all that is known about it.
pub struct Asked {
    pub id: RequestId,
    prompt: Vec<u32>,
    /// The whole answer; then the expected report on the prompt and the expected end.
    answer: Vec<u32>,
    report: Option<PromptReport>,
    finish: Outcome,
    stream: Option<TokenStream>,
    events: Receiver<Event>,
    pub read: Vec<u32>,
    pub end: Option<End>,
    /// Whether the end was read from the stream, rather than by [`Self::read_behind`].
    read_to_end: bool,
    session: Option<SessionId>,
    /// Reasons for which the request may end as cancelled.
    causes: Vec<CancelReason>,
    /// Iteration of the loop during or after which the first cancel was posted.
    pub cancelled_at: Option<u64>,
}

/// A session and what is known about it.
struct Held {
    session: Session,
    /// Tokens of the session before the turn in progress.
    context: Vec<u32>,
    /// Index of the request that is the session's turn.
    turn: Option<usize>,
    /// How the turn was stopped first, and whether it had been read to its end by then.
    stopped: Option<(Stop, bool)>,
}

/// A receipt that is due.
struct Owed {
    what: String,
    cancellation: Cancellation,
    posted_at: u64,
    in_flight: usize,
    /// Maximum number of tokens that may have been generated.
    tokens: usize,
}

/// All callers of one engine.
pub struct Callers {
    pub engine: Option<Engine>,
    pub asked: Vec<Asked>,
    sessions: Vec<Held>,
    owed: Vec<Owed>,
    drains: Vec<Pending<Drained>>,
    shutdowns: Vec<Pending<()>>,
    pub draining: bool,
    /// Whether the engine has closed or is about to.
    pub closed: bool,
    /// Number of steps that were made to fail.
    pub faults: usize,
    impatient: bool,
    total_blocks: usize,
    /// Most tokens that the steps in flight may produce for a request that has ended.
    most_discarded: usize,
    /// Iterations of the loop so far, including the one in progress.
    pub turn: u64,
    /// Number of cancels posted by streams.
    pub cancels: u64,
    /// Number of wake-ups that were posted without a cancel.
    pub late: u64,
    /// Number of receipts that have arrived.
    pub receipts: u64,
}

impl Ask {
    /// Returns the maximum number of generated tokens.
    fn max_tokens(&self) -> usize {
        match self.wanted {
            Wanted::OnlyScores => 0,
            _ => self.max_tokens,
        }
    }
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

fn pick<T>(all: &[T], number: usize) -> Option<usize> {
    (!all.is_empty()).then(|| number % all.len())
}

impl Asked {
    /// Returns whether the reader has read a normal end.
    fn finished(&self) -> bool {
        let own = matches!(
            self.end,
            Some(End::Outcome(Outcome::Stop | Outcome::Length))
        );
        own && self.read_to_end
    }

    /// Checks the report on the prompt that came with a message. It must come with the first
    /// message that has a token or a normal end, for which `counts` is true, and with no other.
    fn reported(&self, report: Option<&PromptReport>, counts: bool) {
        let due = self
            .report
            .as_ref()
            .filter(|_| counts && self.read.is_empty());
        let id = self.id;
        assert_eq!(
            report, due,
            "I10: {id} does not get what it would get alone"
        );
    }

    /// Records a token and checks it.
    fn token(&mut self, token: u32) {
        let id = self.id;
        assert!(
            self.end.is_none(),
            "I1: {id} got a token after its terminal"
        );
        self.read.push(token);
        assert!(
            self.answer.starts_with(&self.read),
            "I10: {id} got {:?}, alone it would have got {:?}",
            self.read,
            self.answer
        );
    }

    /// Records the end and checks it.
    fn ends(&mut self, end: End, faults: usize) {
        let id = self.id;
        assert!(
            self.end.is_none(),
            "I1: {id} ended as {:?} and as {end:?}",
            self.end
        );
        match end {
            End::Outcome(Outcome::Cancelled(reason)) => assert!(
                self.causes.contains(&reason),
                "I1: {id} was cancelled as {reason:?}, there was only {:?}",
                self.causes
            ),
            End::Outcome(outcome) => assert_eq!(
                (outcome, &self.read),
                (self.finish, &self.answer),
                "I10: {id} did not end as it would have alone"
            ),
            End::Failed => assert!(faults > 0, "I1: {id} failed without a fault"),
            End::Closed => {}
        }
        self.end = Some(end);
    }

    /// Reads the events of a stream that has been dropped.
    fn read_behind(&mut self, faults: usize) {
        if self.stream.is_some() {
            return;
        }
        loop {
            match self.events.try_recv() {
                Ok(Event {
                    tokens,
                    report,
                    ending,
                    ..
                }) => {
                    let finished = matches!(ending, Some(Ok(Outcome::Stop | Outcome::Length)));
                    if ending.is_some() && !finished {
                        let none = tokens.is_empty();
                        assert!(none, "I1: {} got a token with a cancel", self.id);
                    }
                    self.reported(report.as_deref(), !tokens.is_empty() || finished);
                    tokens.ids().for_each(|id| self.token(id));
                    let Some(ending) = ending else {
                        continue;
                    };
                    self.ends(ending.map_or(End::Failed, End::Outcome), faults);
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    if self.end.is_none() {
                        self.ends(End::Closed, faults);
                    }
                    return;
                }
            }
        }
    }

    fn cancelled(&mut self, turn: u64, reason: CancelReason) {
        self.cancelled_at.get_or_insert(turn);
        self.causes.push(reason);
    }

    /// Reads at most one event. Returns `false` if there is none.
    fn read_one(&mut self, faults: usize, closed: bool) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        let mut context = Context::from_waker(Waker::noop());
        let chunk = match Pin::new(stream).poll_next(&mut context) {
            Poll::Pending => return false,
            Poll::Ready(None) => {
                let ended = self.end.is_some();
                assert!(ended, "I1: {} ended without a terminal", self.id);
                return false;
            }
            Poll::Ready(Some(chunk)) => chunk,
        };
        match chunk {
            Ok(chunk) => {
                let finish = chunk.finish.map(|finish| finish.outcome);
                let sum = self.stream.as_mut().and_then(TokenStream::take_sum);
                let scores = chunk.prompt_logprobs.map(PromptReport::Scores);
                let report = scores.or(sum.map(PromptReport::Sum));
                let own = matches!(finish, Some(Outcome::Stop | Outcome::Length));
                self.reported(report.as_ref(), !chunk.tokens.is_empty() || own);
                let cancelled = matches!(finish, Some(Outcome::Cancelled(_)));
                for id in chunk.tokens.ids() {
                    assert!(!cancelled, "I1: {} got a token with a cancel", self.id);
                    self.token(id);
                }
                if let Some(outcome) = finish {
                    self.read_to_end = true;
                    self.ends(End::Outcome(outcome), faults);
                }
            }
            Err(GenerateError::Failed(_)) => self.ends(End::Failed, faults),
            Err(error) => {
                assert!(closed, "I1: {} ended without a terminal: {error}", self.id);
                self.ends(End::Closed, faults);
            }
        }
        true
    }
}

impl Callers {
    /// Creates the callers of an engine that is created later.
    pub fn new(config: &EngineConfig, total_blocks: usize, most_discarded: usize) -> Self {
        Self {
            engine: None,
            asked: Vec::new(),
            sessions: Vec::new(),
            owed: Vec::new(),
            drains: Vec::new(),
            shutdowns: Vec::new(),
            draining: false,
            closed: false,
            faults: 0,
            impatient: config.slow_consumer_deadline.is_some(),
            total_blocks,
            most_discarded,
            turn: 0,
            cancels: 0,
            late: 0,
            receipts: 0,
        }
    }

    fn request(&self, ask: &Ask, context: &[u32]) -> Request {
        let prompt = prompt(ask);
        let whole = [context, &prompt].concat();
        let mut request = Request::new(prompt)
            .max_tokens(ask.max_tokens())
            .priority(ask.priority);
        if matches!(ask.wanted, Wanted::Scores | Wanted::OnlyScores) {
            request = request.prompt_logprobs(0);
        }
        if let Some(tenant) = ask.tenant {
            let name = ["one", "two"][usize::from(tenant) % 2];
            request = request.tenant(name).cache_salt(name);
        }
        match ask.overdue {
            Some(true) => request = request.first_token_within(Duration::ZERO),
            Some(false) => request = request.finish_within(Duration::ZERO),
            None => {}
        }
        if let Some(at) = ask.stop_at {
            request.stop_token_ids = vec![ask.expected(&whole, at + 1)[at]];
        }
        if ask.constrained {
            request = request.constraint(Remainders::default());
        }
        request
    }

    /// Submits a prompt to be embedded. Parameters that an embedding does not have are ignored.
    fn embed(&mut self, engine: &Engine, ask: &Ask) {
        let request = self.request(ask, &[]);
        let embedding = engine.embed(EmbedRequest {
            finish_within: request.finish_within,
            priority: request.priority,
            tenant: request.tenant,
            cache_salt: request.cache_salt,
            ..EmbedRequest::new(request.prompt)
        });
        match embedding {
            Ok(embedding) => {
                let stream = embedding.into_stream();
                let report = PromptReport::Sum(sum(stream.prompt_ids()));
                let overdue = ask.overdue.filter(|first_token| !first_token);
                let ask = Ask {
                    stop_at: None,
                    overdue,
                    wanted: Wanted::OnlyScores,
                    ..ask.clone()
                };
                self.accepted(&ask, stream, None);
                if let Some(asked) = self.asked.last_mut() {
                    asked.report = Some(report);
                    asked.finish = Outcome::Stop;
                }
            }
            Err(error) => self.refused(&error),
        }
    }

    /// Records an accepted request, and what is expected of it.
    fn accepted(&mut self, ask: &Ask, stream: TokenStream, session: Option<SessionId>) {
        let prompt = stream.prompt_ids().to_vec();
        let room = self.engine.as_ref().map_or(0, Engine::max_sequence_tokens) - prompt.len();
        let mut answer = ask.expected(&prompt, ask.max_tokens().min(room));
        let mut finish = Outcome::Length;
        let scored = matches!(ask.wanted, Wanted::Scores | Wanted::OnlyScores);
        let report = scored.then(|| PromptReport::Scores(scores(&prompt)));
        if let Some(at) = ask.stop_at {
            let stop = ask.expected(&prompt, at + 1)[at];
            if let Some(end) = answer.iter().position(|token| *token == stop) {
                answer.truncate(end + 1);
                finish = Outcome::Stop;
            }
        }
        let mut asked = Asked {
            id: stream.id(),
            prompt,
            answer,
            report,
            finish,
            events: stream.events(),
            stream: Some(stream),
            read: Vec::new(),
            end: None,
            read_to_end: false,
            session,
            causes: Vec::new(),
            cancelled_at: None,
        };
        if self.impatient {
            asked.causes.push(CancelReason::SlowConsumer);
        }
        if ask.overdue.is_some() {
            asked.cancelled(self.turn, CancelReason::Deadline);
        }
        if self.closed {
            asked.cancelled(self.turn, CancelReason::Shutdown);
        }
        self.asked.push(asked);
    }

    /// Checks that there was a good reason to refuse a request.
    fn refused(&self, error: &SubmitError) {
        let expected = match error {
            SubmitError::PromptTooLong { .. }
            | SubmitError::InputTooLong { .. }
            | SubmitError::Overloaded { .. } => true,
            SubmitError::Draining => self.draining,
            SubmitError::Closed(_) => self.closed,
            _ => false,
        };
        assert!(expected, "refused: {error}");
    }

    /// Performs an act, while `in_flight` steps are in flight.
    pub fn act(&mut self, act: &Act, in_flight: usize) {
        let Some(engine) = self.engine.clone() else {
            return;
        };
        match act {
            Act::Submit(ask) if ask.wanted == Wanted::Embedding => self.embed(&engine, ask),
            Act::Submit(ask) => match engine.generate(self.request(ask, &[])) {
                Ok(stream) => self.accepted(ask, stream, None),
                Err(error) => self.refused(&error),
            },
            Act::Samples(ask, samples) => {
                match engine.generate_samples(self.request(ask, &[]), *samples) {
                    Ok(streams) => {
                        for stream in streams {
                            self.accepted(ask, stream, None);
                        }
                    }
                    Err(error) => {
                        // If the engine had closed, the streams were created and then dropped.
                        self.late += *samples as u64;
                        self.refused(&error);
                    }
                }
            }
            Act::Read(number) => {
                if let Some(index) = self.reading(*number) {
                    self.read(index);
                }
            }
            Act::DropStream(number) => {
                if let Some(index) = self.reading(*number) {
                    self.drop_stream(index);
                }
            }
            Act::Cancel(number) => {
                if let Some(index) = self.reading(*number) {
                    self.cancel(index, in_flight);
                }
            }
            Act::CancelLate(number) => {
                if let Some(index) = pick(&self.asked, *number) {
                    self.late += 1;
                    let _ = engine.post(Command::Cancel(self.asked[index].id));
                }
            }
            Act::OpenSession { pin } => {
                let pin = pin.map(|long| if long { FOR_EVER } else { Duration::ZERO });
                let session = engine.session_with(SessionOptions { pin });
                self.hold(session, Vec::new());
            }
            Act::Turn(number, ask) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    self.take_turn(index, ask);
                }
            }
            Act::Stop(number, keep) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    let stop = if *keep { Stop::Keep } else { Stop::Rewind };
                    self.stop(index, stop, in_flight);
                }
            }
            Act::Rewind(number, tokens) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    self.rewind(index, *tokens);
                }
            }
            Act::Fork(number) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    self.fork(index);
                }
            }
            Act::End(number) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    let Held { session, .. } = self.sessions.remove(index);
                    let id = session.id();
                    let tokens = self.cancel_turn(id, CancelReason::SessionEnded);
                    let cancellation = session.end();
                    self.owe(format!("end of {id}"), cancellation, in_flight, tokens);
                }
            }
            Act::DropSession(number) => {
                if let Some(index) = pick(&self.sessions, *number) {
                    let Held { session, .. } = self.sessions.remove(index);
                    self.cancel_turn(session.id(), CancelReason::SessionEnded);
                    drop(session);
                }
            }
            Act::AbortAll => {
                if engine.abort_all().is_ok() {
                    self.cancel_all(CancelReason::AbortAll);
                }
            }
            Act::ClearPrefixes => {
                let _ = engine.clear_prefix_cache();
            }
            Act::Drain { now } => {
                self.draining = true;
                if *now {
                    self.cancel_all(CancelReason::Shutdown);
                }
                let deadline = if *now { Duration::ZERO } else { FOR_EVER };
                self.drains.push(engine.drain(deadline));
            }
        }
    }

    /// Selects a request whose stream is still held.
    fn reading(&self, number: usize) -> Option<usize> {
        let held = |(index, asked): (usize, &Asked)| asked.stream.is_some().then_some(index);
        let held: Vec<usize> = self.asked.iter().enumerate().filter_map(held).collect();
        pick(&held, number).map(|index| held[index])
    }

    fn read(&mut self, index: usize) -> bool {
        let (faults, closed) = (self.faults, self.closed);
        self.asked[index].read_one(faults, closed)
    }

    /// Reads one event, if there is one.
    pub fn read_any(&mut self) -> bool {
        (0..self.asked.len()).any(|index| self.read(index))
    }

    /// Reads all events that there are.
    pub fn read_all(&mut self) {
        while self.read_any() {}
    }

    fn drop_stream(&mut self, index: usize) {
        let turn = self.turn;
        let asked = &mut self.asked[index];
        if asked.stream.is_some() && asked.end.is_none() {
            asked.cancelled(turn, CancelReason::StreamDropped);
            asked.cancelled(turn, CancelReason::SubmitDropped);
            self.cancels += 1;
        }
        asked.stream = None;
    }

    fn cancel(&mut self, index: usize, in_flight: usize) {
        let turn = self.turn;
        let asked = &mut self.asked[index];
        let Some(stream) = asked.stream.take() else {
            return;
        };
        if asked.end.is_none() {
            asked.cancelled(turn, CancelReason::Explicit);
            self.cancels += 1;
        }
        let (id, tokens) = (asked.id, asked.answer.len());
        let cancellation = stream.cancel();
        self.owe(
            format!("cancel of {id}"),
            cancellation,
            in_flight,
            Some(tokens),
        );
    }

    /// Records that a receipt is due, for a request with at most this many answer tokens.
    fn owe(
        &mut self,
        what: String,
        cancellation: Cancellation,
        in_flight: usize,
        tokens: Option<usize>,
    ) {
        self.owed.push(Owed {
            what,
            cancellation,
            posted_at: self.turn,
            in_flight,
            tokens: tokens.unwrap_or(0),
        });
    }

    fn hold(&mut self, session: Session, context: Vec<u32>) {
        self.sessions.push(Held {
            session,
            context,
            turn: None,
            stopped: None,
        });
    }

    /// Records that the turn of a session, if it has one, is cancelled. Returns the maximum
    /// number of its answer tokens.
    fn cancel_turn(&mut self, session: SessionId, reason: CancelReason) -> Option<usize> {
        let turn = self.turn;
        let of_session = self
            .asked
            .iter_mut()
            .filter(|asked| asked.session == Some(session));
        let open = of_session.filter(|asked| asked.end.is_none());
        open.map(|asked| {
            asked.cancelled(turn, reason);
            asked.answer.len()
        })
        .max()
    }

    fn cancel_all(&mut self, reason: CancelReason) {
        for asked in &mut self.asked {
            asked.cancelled(self.turn, reason);
        }
    }

    /// Returns all tokens that the context of a session may consist of, and the possible
    /// lengths of the context, now that the turn is over.
    fn contexts(&self, index: usize) -> (Vec<u32>, Vec<usize>) {
        let held = &self.sessions[index];
        let before = held.context.len();
        let Some(turn) = held.turn else {
            return (held.context.clone(), vec![before]);
        };
        let asked = &self.asked[turn];
        let full = [asked.prompt.as_slice(), &asked.answer].concat();
        let finished = asked.finished();
        let lengths = match held.stopped {
            None | Some((_, true)) if finished => vec![full.len()],
            // The turn may have finished before it was stopped, and have been read afterwards.
            Some((Stop::Rewind, _)) if finished => vec![before, full.len()],
            None | Some((Stop::Rewind, _)) => vec![before],
            Some((Stop::Keep, _)) => {
                let least = asked.prompt.len() + asked.read.len();
                std::iter::once(before).chain(least..=full.len()).collect()
            }
        };
        (full, lengths)
    }

    /// Records that the turn of a session is over and that its context has `tokens` tokens.
    fn settle(&mut self, index: usize, tokens: usize) {
        let (full, lengths) = self.contexts(index);
        assert!(
            lengths.contains(&tokens),
            "I7: {} has {tokens} tokens, it should have {lengths:?}",
            self.sessions[index].session.id()
        );
        let held = &mut self.sessions[index];
        held.context = full[..tokens].to_vec();
        held.turn = None;
        held.stopped = None;
    }

    /// Checks that a session that refused a call because of its turn has one that is not over.
    fn refused_turn(&self, index: usize, error: &SubmitError) {
        let held = &self.sessions[index];
        if !matches!(error, SubmitError::Conflict) {
            return self.refused(error);
        }
        let generating = held.turn.is_some_and(|turn| {
            let asked = &self.asked[turn];
            let rewound = matches!(held.stopped, Some((Stop::Rewind, _)));
            asked.stream.is_some() && asked.end.is_none() && !rewound
        });
        let id = held.session.id();
        assert!(generating, "I7: {id} is busy although its turn is over");
    }

    fn take_turn(&mut self, index: usize, ask: &Ask) {
        // The stop token follows from the tokens before it, so they must be known.
        let context = self.sessions[index].context.clone();
        let ask = Ask {
            stop_at: ask.stop_at.filter(|_| self.sessions[index].turn.is_none()),
            ..ask.clone()
        };
        let request = self.request(&ask, &context);
        match self.sessions[index].session.generate(request) {
            Ok(stream) => {
                let (prompt, id) = (prompt(&ask), self.sessions[index].session.id());
                let tokens = stream.prompt_ids().len() - prompt.len();
                self.settle(index, tokens);
                let whole = [&self.sessions[index].context[..], &prompt].concat();
                assert_eq!(
                    stream.prompt_ids(),
                    whole,
                    "I7: {id} continues from other tokens"
                );
                self.accepted(&ask, stream, Some(id));
                self.sessions[index].turn = Some(self.asked.len() - 1);
            }
            Err(error) => self.refused_turn(index, &error),
        }
    }

    fn stop(&mut self, index: usize, stop: Stop, in_flight: usize) {
        let held = &mut self.sessions[index];
        let over = held.turn.is_some_and(|turn| self.asked[turn].finished());
        if held.turn.is_some() {
            held.stopped.get_or_insert((stop, over));
        }
        let id = held.session.id();
        let cancellation = held.session.stop(stop);
        let tokens = self.cancel_turn(id, CancelReason::SessionStopped);
        self.owe(format!("stop of {id}"), cancellation, in_flight, tokens);
    }

    fn rewind(&mut self, index: usize, tokens: usize) {
        match self.sessions[index].session.rewind(tokens) {
            Ok(()) => {
                let left = self.sessions[index].session.context_tokens();
                let (full, lengths) = self.contexts(index);
                let before = lengths.iter().find(|before| left == tokens.min(**before));
                let id = self.sessions[index].session.id();
                let Some(before) = before.copied() else {
                    panic!("I7: {id} has {left} tokens after a rewind to {tokens}: {lengths:?}");
                };
                self.settle(index, before);
                self.sessions[index].context = full[..left].to_vec();
            }
            Err(error) => self.refused_turn(index, &error),
        }
    }

    fn fork(&mut self, index: usize) {
        match self.sessions[index].session.fork() {
            Ok(fork) => {
                self.settle(index, fork.context_tokens());
                let context = self.sessions[index].context.clone();
                self.hold(fork, context);
            }
            Err(error) => self.refused_turn(index, &error),
        }
    }

    /// Reads the events of dropped streams after an iteration of the loop, and takes the
    /// receipts, which must arrive in time.
    pub fn after_turn(&mut self) {
        for asked in &mut self.asked {
            asked.read_behind(self.faults);
        }
        let (turn, total) = (self.turn, self.total_blocks);
        let mut receipts = 0;
        self.owed.retain_mut(|owed| {
            let what = &owed.what;
            match poll(&mut owed.cancellation) {
                Poll::Pending => {
                    let turns = turn - owed.posted_at;
                    assert!(
                        turns <= owed.in_flight as u64,
                        "I6: no receipt of the {what} after {turns} turns"
                    );
                    true
                }
                Poll::Ready(Ok(receipt)) => {
                    receipts += 1;
                    assert!(
                        receipt.blocks_freed <= total
                            && receipt.tokens_generated <= owed.tokens
                            && receipt.tokens_discarded <= self.most_discarded,
                        "I6: {receipt:?} of the {what}, {} steps were in flight",
                        owed.in_flight
                    );
                    false
                }
                Poll::Ready(Err(error)) => {
                    assert!(self.closed, "I6: no receipt of the {what}: {error}");
                    false
                }
            }
        });
        self.receipts += receipts;
    }

    /// Checks, after the engine has closed, that everyone who waits has learned of it.
    pub fn after_close(&mut self, shut: bool) {
        self.closed = true;
        self.read_all();
        self.after_turn();
        assert!(
            self.owed.is_empty(),
            "I6: a receipt has not come and never will"
        );
        for asked in &self.asked {
            assert!(asked.end.is_some(), "I1: {} has no terminal", asked.id);
        }
        for mut drain in self.drains.drain(..) {
            let answered = poll(&mut drain).is_ready();
            assert!(answered, "I12: a drain was never answered");
        }
        for mut shutdown in self.shutdowns.drain(..) {
            let ended = poll(&mut shutdown);
            let clean = matches!(ended, Poll::Ready(Ok(())));
            assert!(
                clean || (!shut && ended.is_ready()),
                "I12: a shutdown was never answered"
            );
        }
    }

    /// Checks that nothing is due after the last step of an idle engine.
    pub fn when_idle(&mut self) {
        for asked in &self.asked {
            let gone = asked.stream.is_none();
            assert!(
                asked.end.is_some() || !gone,
                "I1: {} has no terminal",
                asked.id
            );
        }
        assert!(
            self.owed.is_empty(),
            "I6: a receipt is missing on an idle engine"
        );
        for mut drain in self.drains.drain(..) {
            let drained = match poll(&mut drain) {
                Poll::Ready(drained) => drained.expect("the engine is open"),
                Poll::Pending => panic!("I12: an idle engine has not drained"),
            };
            let all = self.asked.len() as u64;
            assert!(
                drained.finished + drained.aborted <= all,
                "I2: {drained:?} of {all} requests"
            );
        }
    }

    pub fn drop_streams(&mut self) {
        for index in 0..self.asked.len() {
            self.drop_stream(index);
        }
    }

    pub fn drop_sessions(&mut self) {
        for index in (0..self.sessions.len()).rev() {
            self.act(&Act::DropSession(index), 0);
        }
    }

    /// Returns whether a stream that is still held has not ended.
    pub fn waits(&self) -> bool {
        self.asked
            .iter()
            .any(|asked| asked.stream.is_some() && asked.end.is_none())
    }

    /// Posts a shutdown.
    pub fn shut_down(&mut self, abort: bool) {
        let Some(engine) = &self.engine else {
            return;
        };
        let how = match abort {
            true => Shutdown::Abort,
            false => Shutdown::Drain(FOR_EVER),
        };
        let shutdown = engine.shutdown(how);
        self.shutdowns.push(shutdown);
        if abort {
            self.cancel_all(CancelReason::Shutdown);
        }
        self.draining = true;
    }

    /// Counts the requests that ended in this way.
    pub fn ends(&self, kind: impl Fn(End) -> bool) -> u64 {
        let ends = self.asked.iter().filter_map(|asked| asked.end);
        ends.filter(|end| kind(*end)).count() as u64
    }
}

/// Returns the scores that the simulated model gives to a prompt.
fn scores(prompt: &[u32]) -> Vec<Token> {
    let score = |end: usize| Token {
        id: prompt[end],
        logprob: logprob(prompt[..end].iter().copied(), prompt[end]),
        top: Vec::new(),
    };
    (1..prompt.len()).map(score).collect()
}

/// Returns the sum of a prompt's hidden states.
fn sum(prompt: &[u32]) -> PooledRows {
    let mut sum = PooledRows::new(HIDDEN);
    for end in 1..=prompt.len() {
        sum.add_row(&hidden_state(prompt[..end].iter().copied()));
    }
    sum
}

/// Returns one of a few prompts that begin alike.
fn prompt(ask: &Ask) -> Vec<u32> {
    (0..ask.length)
        .map(|position| (position * 7 + if position < 3 { 0 } else { ask.prompt * 100 }) as u32)
        .collect()
}
