//! The callers of the state machine: what they have asked for, what they have seen, and
//! what they may see.

use super::constraint::Remainders;
use super::sim::{HIDDEN, expected, expected_where, hidden_state, logprob};
use crate::config::EngineConfig;
use crate::device::PooledRows;
use crate::engine::command::Command;
use crate::engine::event::{Event, PromptReport, Terminal};
use crate::engine::sync::{Receiver, TryRecvError};
use crate::engine::{
    CancelReason, Cancellation, Draining, EmbedRequest, Engine, GenerateError, Outcome, Request,
    Session, SessionOptions, Shutdown, ShuttingDown, Stop, SubmitError, Token, TokenStream,
};
use crate::id::{RequestId, SessionId};
use crate::schedule::FinishReason;
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Longer than any test.
const FOR_EVER: Duration = Duration::from_secs(1 << 20);

/// What a request wants of its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Tokens,
    /// Tokens, and the log-probabilities of the prompt.
    Scores,
    /// These alone.
    OnlyScores,
    /// A vector; tokens where there can be none, as a turn or one of several samples.
    Embedding,
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub struct Ask {
    pub wanted: Wanted,
    /// Which of the few prompts.
    pub prompt: usize,
    pub length: usize,
    pub max_tokens: usize,
    /// The answer token that is made a stop token.
    pub stop_at: Option<usize>,
    pub priority: i32,
    pub tenant: Option<u8>,
    /// Its deadline has passed already: of the first token, or of the end.
    pub overdue: Option<bool>,
    /// Its tokens depend on all those before, by the host's books.
    pub constrained: bool,
}

impl Ask {
    /// What the simulated device answers.
    fn expected(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        match self.constrained {
            true => expected_where(prompt, count, Remainders::allow_after),
            false => expected(prompt, count),
        }
    }
}

/// What a caller does. Numbers choose among what there is, round and round.
#[derive(Clone, Debug)]
pub enum Act {
    Submit(Ask),
    Samples(Ask, usize),
    Read(usize),
    DropStream(usize),
    Cancel(usize),
    /// A late wake-up: the flag is the truth, up or not.
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
    /// The engine closed before it had taken the request.
    Closed,
}

/// A request and all that is known of it.
pub struct Asked {
    pub id: RequestId,
    prompt: Vec<u32>,
    /// The whole answer, what comes with its first token, and how it ends.
    answer: Vec<u32>,
    report: Option<PromptReport>,
    finish: Outcome,
    stream: Option<TokenStream>,
    events: Receiver<Event>,
    pub read: Vec<u32>,
    pub end: Option<End>,
    /// The end was read from the stream, not from behind its back.
    read_to_end: bool,
    session: Option<SessionId>,
    /// Why it may end as cancelled.
    causes: Vec<CancelReason>,
    /// The turn of the loop during which, or after which, its first cancel was posted.
    pub cancelled_at: Option<u64>,
}

/// A session and what is known of it.
struct Held {
    session: Session,
    /// Its tokens before the turn in progress.
    context: Vec<u32>,
    /// The request that is its turn.
    turn: Option<usize>,
    /// The first way in which that was stopped, and whether it had been read to its end.
    stopped: Option<(Stop, bool)>,
}

/// A receipt that is due.
struct Owed {
    what: String,
    cancellation: Cancellation,
    posted_at: u64,
    in_flight: usize,
    /// At most so many tokens had been generated.
    tokens: usize,
}

/// All callers of one engine.
pub struct Callers {
    pub engine: Option<Engine>,
    pub asked: Vec<Asked>,
    sessions: Vec<Held>,
    owed: Vec<Owed>,
    drains: Vec<Draining>,
    shutdowns: Vec<ShuttingDown>,
    pub draining: bool,
    /// The engine has closed, or is about to.
    pub closed: bool,
    /// Steps were made to fail.
    pub faults: usize,
    impatient: bool,
    total_blocks: usize,
    depth: usize,
    /// Turns of the loop so far, the one in progress included.
    pub turn: u64,
    /// Cancels posted by streams.
    pub cancels: u64,
    /// Wake-ups for no cancel.
    pub late: u64,
    /// Receipts that have come.
    pub receipts: u64,
}

impl Ask {
    /// Tokens that are generated at most.
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
    /// Whether its reader has come to an end of its own.
    fn finished(&self) -> bool {
        let own = matches!(
            self.end,
            Some(End::Outcome(Outcome::Stop | Outcome::Length))
        );
        own && self.read_to_end
    }

    /// Takes note of what comes of the prompt, with a message that has a token or an end
    /// of its own if `counts`: the first of these brings it, and no other.
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

    /// Takes note of a token.
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

    /// Takes note of the end.
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

    /// Reads what nobody reads any more: the events of a stream that is gone.
    fn read_behind(&mut self, faults: usize) {
        if self.stream.is_some() {
            return;
        }
        loop {
            match self.events.try_recv() {
                Ok(Event {
                    token,
                    report,
                    terminal,
                    ..
                }) => {
                    let finished = matches!(terminal, Some(Terminal::Finished(_)));
                    if let Some(Terminal::Cancelled(_) | Terminal::Failed(_)) = terminal {
                        let none = token.is_none();
                        assert!(none, "I1: {} got a token with a cancel", self.id);
                    }
                    self.reported(report.as_deref(), token.is_some() || finished);
                    if let Some(token) = token {
                        self.token(token.id);
                    }
                    let Some(terminal) = terminal else {
                        continue;
                    };
                    self.ends(
                        match terminal {
                            Terminal::Finished(FinishReason::Stop) => End::Outcome(Outcome::Stop),
                            Terminal::Finished(FinishReason::Length) => {
                                End::Outcome(Outcome::Length)
                            }
                            Terminal::Cancelled(reason) => End::Outcome(Outcome::Cancelled(reason)),
                            Terminal::Failed(_) => End::Failed,
                        },
                        faults,
                    );
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

    /// Reads at most one event. `false` when there is none.
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
                self.reported(report.as_ref(), chunk.token.is_some() || own);
                if let Some(token) = chunk.token {
                    let cancelled = matches!(finish, Some(Outcome::Cancelled(_)));
                    assert!(!cancelled, "I1: {} got a token with a cancel", self.id);
                    self.token(token.id);
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
    /// Of an engine that is still to come.
    pub fn new(config: &EngineConfig, total_blocks: usize, depth: usize) -> Self {
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
            depth,
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

    /// Submits a prompt to be embedded. What nobody asks for in an embedding is left out.
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

    /// Takes note of a request that was accepted.
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

    /// A request may be refused for good reasons only.
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

    /// Does what a caller does; `in_flight` steps are in flight meanwhile.
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
                        // Where the engine had closed, the streams were made, and are dropped.
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

    /// A stream that somebody holds.
    fn reading(&self, number: usize) -> Option<usize> {
        let held = |(index, asked): (usize, &Asked)| asked.stream.is_some().then_some(index);
        let held: Vec<usize> = self.asked.iter().enumerate().filter_map(held).collect();
        pick(&held, number).map(|index| held[index])
    }

    fn read(&mut self, index: usize) -> bool {
        let (faults, closed) = (self.faults, self.closed);
        self.asked[index].read_one(faults, closed)
    }

    /// Reads one event, if there is one to be read.
    pub fn read_any(&mut self) -> bool {
        (0..self.asked.len()).any(|index| self.read(index))
    }

    /// Reads all that there is to be read.
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

    /// A receipt is to come, of a request with at most so many answer tokens.
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

    /// The turn of a session, if it has one, is cancelled: at most so many tokens.
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

    /// What the context of a session may have become, in tokens, now that its turn is
    /// over; and all the tokens that it may be a part of.
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
            // It may have finished before it was stopped, and been read since.
            Some((Stop::Rewind, _)) if finished => vec![before, full.len()],
            None | Some((Stop::Rewind, _)) => vec![before],
            Some((Stop::Keep, _)) => {
                let least = asked.prompt.len() + asked.read.len();
                std::iter::once(before).chain(least..=full.len()).collect()
            }
        };
        (full, lengths)
    }

    /// The turn of a session is over, and its context has `tokens` tokens.
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

    /// A session refused because of its turn must have one that is not over.
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
        // A stop token is worked out from the tokens before it, as far as they are known.
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
                    "I7: {id} goes on from other tokens"
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

    /// After a turn of the loop: reads what nobody reads any more, and takes the
    /// receipts, which must be there in time.
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
                            && receipt.tokens_discarded <= self.depth,
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

    /// The engine has closed: everybody who waits learns of it.
    pub fn after_close(&mut self, shut: bool) {
        self.closed = true;
        self.read_all();
        self.after_turn();
        assert!(
            self.owed.is_empty(),
            "I6: a receipt neither came nor will come"
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

    /// After the last step of an engine that has nothing to do.
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

    /// Whether somebody waits for the end of a stream.
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

    /// Requests by their end.
    pub fn ends(&self, kind: impl Fn(End) -> bool) -> u64 {
        let ends = self.asked.iter().filter_map(|asked| asked.end);
        ends.filter(|end| kind(*end)).count() as u64
    }
}

/// What the simulated model says of a prompt.
fn scores(prompt: &[u32]) -> Vec<Token> {
    let score = |end: usize| Token {
        id: prompt[end],
        logprob: logprob(prompt[..end].iter().copied(), prompt[end]),
        top: Vec::new(),
    };
    (1..prompt.len()).map(score).collect()
}

/// The sum of a prompt's hidden states.
fn sum(prompt: &[u32]) -> PooledRows {
    let mut sum = PooledRows::new(HIDDEN);
    for end in 1..=prompt.len() {
        sum.add_row(&hidden_state(prompt[..end].iter().copied()));
    }
    sum
}

/// One of a few prompts that begin alike.
fn prompt(ask: &Ask) -> Vec<u32> {
    (0..ask.length)
        .map(|position| (position * 7 + if position < 3 { 0 } else { ask.prompt * 100 }) as u32)
        .collect()
}
