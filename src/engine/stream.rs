//! [`TokenStream`]: one request's answer as it is generated; dropping it cancels.

use super::command::Command;
use super::event::{
    CancelReason, Event, EventReceiver, Outcome, PromptReport, Receipt, RequestCell, Terminal,
    Token, has_room,
};
use super::metrics::{EngineMetrics, Noop};
use super::sync::atomic::Ordering;
use super::sync::{Arc, Receiver, Sender};
use super::turn::TurnCell;
use super::waiting::{Answer, EngineEnd};
use super::{EngineFault, GenerateError, Request};
use crate::device::PooledRows;
use crate::id::RequestId;
use crate::schedule::FinishReason;
use crate::text::{Detokenizer, StopMatcher, StopStep, StopStrings, Tokenizer};
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// A piece of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// Text that became complete: whole characters only, no special tokens, nothing
    /// of a stop string. Empty without a tokenizer.
    pub text: String,
    /// The token of this step, if the message carries one.
    pub token: Option<Token>,
    /// The prompt's tokens after the first with their log-probabilities, if they were
    /// asked for ([`Request::prompt_logprobs`](crate::Request::prompt_logprobs)): with the
    /// first token, or with the end where none is generated.
    pub prompt_logprobs: Option<Vec<Token>>,
    /// In the last chunk: how the request ended.
    pub finish: Option<Finish>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finish {
    /// The reason.
    pub outcome: Outcome,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, how many need not be computed: the cache held their keys and values.
    pub cached_tokens: usize,
    /// Tokens generated, a final stop token included.
    pub generated_tokens: usize,
    /// How long it took.
    pub timing: Timing,
}

/// How long a request took, from its submission on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Until its first token.
    pub first_token: Option<Duration>,
    /// Until its end.
    pub total: Duration,
}

impl Timing {
    /// Tokens a second after the first one; `None` for fewer than two tokens.
    pub fn decode_rate(&self, generated_tokens: usize) -> Option<f64> {
        let seconds = (self.total.checked_sub(self.first_token?)?).as_secs_f64();
        (generated_tokens > 1 && seconds > 0.0).then(|| (generated_tokens - 1) as f64 / seconds)
    }
}

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// The answer's text; `None` without a tokenizer.
    pub text: Option<String>,
    /// The answer's tokens, a final stop token included.
    pub tokens: Vec<Token>,
    /// The prompt's tokens after the first, if their log-probabilities were asked for.
    pub prompt_logprobs: Option<Vec<Token>>,
    /// How it ended.
    pub finish: Finish,
}

/// Turns a stream's tokens into text, on the caller's side.
pub(crate) struct TextState {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Whether the stop token that ends the answer is part of its text.
    include_stop: bool,
    /// Tokens before which no stop string counts.
    min_tokens: usize,
}

impl TextState {
    /// For an answer that goes on where `prompt` ends.
    pub fn new(
        prompt: &[u32],
        tokenizer: Arc<Tokenizer>,
        request: &Request,
        stop: StopStrings,
    ) -> Self {
        let stop = StopMatcher::new(stop);
        Self {
            detokenizer: Detokenizer::after(prompt, tokenizer, !request.keep_special),
            stop: stop.include_stop(request.include_stop),
            include_stop: request.include_stop,
            min_tokens: request.limits.min_tokens,
        }
    }

    /// Takes the next token, the last of so many.
    fn push(&mut self, token: u32, generated: usize) -> StopStep {
        let text = self.detokenizer.push(token);
        match generated <= self.min_tokens {
            true => self.stop.push_through(&text),
            false => self.stop.push(&text),
        }
    }
}

/// What a stream is made of.
pub(crate) struct StreamParts {
    pub id: RequestId,
    pub cell: Arc<RequestCell>,
    pub receiver: EventReceiver,
    pub commands: Sender<Command>,
    pub end: EngineEnd,
    pub metrics: Arc<EngineMetrics>,
    pub submitted: Instant,
    pub text: Option<TextState>,
    pub prompt: Arc<[u32]>,
    pub stop_tokens: Arc<[u32]>,
    pub buffer: usize,
    /// The session's turn that this is.
    pub turn: Option<Arc<TurnCell>>,
}

/// The answer to one request, token by token: a [`futures_core::Stream`], or an
/// iterator through [`TokenStream::blocking`].
///
/// Dropping it cancels the request: a flag is raised and a command posted, nothing
/// else; the scheduler thread frees what the request held. This works with no
/// runtime, while a runtime shuts down, during unwinding, and after the engine.
pub struct TokenStream {
    parts: StreamParts,
    /// Kept for a session, which continues from them.
    answer: Vec<u32>,
    /// Of an embedding.
    sum: Option<PooledRows>,
    first_token: Option<Duration>,
    generated: usize,
    ended: bool,
    drop_reason: CancelReason,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TokenStream")
            .field("id", &self.parts.id)
            .field("generated", &self.generated)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl TokenStream {
    pub(crate) fn new(parts: StreamParts) -> Self {
        Self {
            parts,
            answer: Vec::new(),
            sum: None,
            first_token: None,
            generated: 0,
            ended: false,
            drop_reason: CancelReason::StreamDropped,
        }
    }

    /// The request's identity, as the logs name it.
    pub fn id(&self) -> RequestId {
        self.parts.id
    }

    /// The tokens of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.parts.prompt
    }

    /// The tokens that end the answer, sorted: the model's own, unless they are
    /// ignored, and the request's.
    pub fn stop_tokens(&self) -> Arc<[u32]> {
        Arc::clone(&self.parts.stop_tokens)
    }

    /// Cancels the request. The cancel is posted before this returns; the future
    /// (or [`Cancellation::wait`]) is the acknowledgement that its blocks are free.
    pub fn cancel(self) -> Cancellation {
        self.cancel_because(CancelReason::Explicit)
    }

    /// As [`TokenStream::cancel`], for a reason that the caller knows better, such as
    /// [`CancelReason::Disconnect`]. The books, the metrics and the logs say it.
    pub fn cancel_because(mut self, reason: CancelReason) -> Cancellation {
        self.post_cancel(reason.of_a_caller());
        Cancellation(Acknowledgement::Stream {
            cell: Arc::clone(&self.parts.cell),
            receipt: self.parts.receiver.receipt.clone(),
            end: self.parts.end.clone(),
        })
    }

    /// Sets the reason that dropping the stream gives, in place of
    /// [`CancelReason::StreamDropped`]: a server whose connections own their streams
    /// says [`CancelReason::Disconnect`].
    pub fn when_dropped(mut self, reason: CancelReason) -> Self {
        self.drop_reason = reason.of_a_caller();
        self
    }

    /// The stream as a blocking iterator.
    pub fn blocking(self) -> Blocking {
        Blocking { stream: self }
    }

    /// The next chunk, waiting for it on this thread. `None` after the last.
    pub fn next_blocking(&mut self) -> Option<Result<Chunk, GenerateError>> {
        if self.ended {
            return None;
        }
        Some(match self.parts.end.recv(&self.parts.receiver.events) {
            Ok(event) => self.take(event),
            Err(fault) => self.lost(fault),
        })
    }

    /// Waits for the whole answer.
    pub async fn complete(mut self) -> Result<Generation, GenerateError> {
        let mut collector = Collector::new(&self);
        loop {
            let next = std::future::poll_fn(|context| Pin::new(&mut self).poll_next(context));
            if let Some(generation) = collector.add(next.await)? {
                return Ok(generation);
            }
        }
    }

    /// Waits for the whole answer on this thread.
    pub fn complete_blocking(mut self) -> Result<Generation, GenerateError> {
        let mut collector = Collector::new(&self);
        loop {
            if let Some(generation) = collector.add(self.next_blocking())? {
                return Ok(generation);
            }
        }
    }

    /// The events that are not read yet, also of a stream that is gone.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn events(&self) -> Receiver<Event> {
        self.parts.receiver.events.clone()
    }

    /// The sum of the prompt's hidden states, once it has come; given away once.
    pub(super) fn take_sum(&mut self) -> Option<PooledRows> {
        self.sum.take()
    }

    /// Raises the flag and posts the wake-up, once. Never blocks, never fails: when
    /// the engine is gone, there is nothing left to cancel.
    fn post_cancel(&mut self, reason: CancelReason) {
        if !self.ended {
            self.ended = true;
            let first = self.parts.cell.cancel(reason);
            let noop = if !first {
                Some(Noop::AlreadyCancelled)
            } else {
                let posted = self.parts.commands.send(Command::Cancel(self.parts.id));
                posted.err().map(|_| Noop::EngineClosed)
            };
            if let Some(why) = noop {
                self.parts.metrics.noop(why);
            }
            // After the post: the session's next turn is posted later still.
            if let (Some(turn), true) = (&self.parts.turn, first)
                && reason != CancelReason::StopString
            {
                turn.ended_by_reader(None);
            }
        }
    }

    /// Makes a chunk of an event.
    fn take(&mut self, event: Event) -> Result<Chunk, GenerateError> {
        self.resume_if_paused();
        let prompt_logprobs = match event.report.map(|report| *report) {
            Some(PromptReport::Scores(tokens)) => Some(tokens),
            Some(PromptReport::Sum(sum)) => {
                self.sum = Some(sum);
                None
            }
            None => None,
        };
        let mut text = String::new();
        let mut matched = false;
        if let Some(token) = &event.token {
            self.generated += 1;
            self.first_token
                .get_or_insert_with(|| event.at - self.parts.submitted);
            if self.parts.turn.is_some() {
                self.answer.push(token.id);
            }
            // A token that ends the answer is no part of its text.
            let ends = matches!(event.terminal, Some(Terminal::Finished(FinishReason::Stop)))
                && self.parts.stop_tokens.contains(&token.id);
            if let Some(state) = &mut self.parts.text
                && (!ends || state.include_stop)
            {
                let step = state.push(token.id, self.generated);
                text = step.text;
                matched = step.matched.is_some();
            }
        }
        let mut outcome = match event.terminal {
            None => None,
            Some(Terminal::Finished(FinishReason::Stop)) => Some(Outcome::Stop),
            Some(Terminal::Finished(FinishReason::Length)) => Some(Outcome::Length),
            Some(Terminal::Cancelled(reason)) => Some(Outcome::Cancelled(reason)),
            Some(Terminal::Failed(fault)) => {
                self.ended = true;
                return Err(GenerateError::Failed(*fault));
            }
        };
        if let (Some(state), Some(_), false) = (&mut self.parts.text, outcome, matched) {
            // What was held back as half a character or half a stop string.
            let step = state.stop.push(&state.detokenizer.finish());
            text.push_str(&step.text);
            // A cancel stays a cancel, whatever the last characters say.
            matched = step.matched.is_some() && !matches!(outcome, Some(Outcome::Cancelled(_)));
            if step.matched.is_none() {
                text.push_str(&state.stop.finish());
            }
        }
        if matched {
            if outcome.is_none() {
                if let Some(turn) = &self.parts.turn {
                    turn.keep_answer(self.answer.len());
                }
                self.post_cancel(CancelReason::StopString);
            }
            outcome = Some(Outcome::Stop);
        }
        let finish = outcome.map(|outcome| Finish {
            outcome,
            prompt_tokens: self.parts.prompt.len(),
            cached_tokens: self.parts.cell.cached_tokens.load(Ordering::Acquire),
            generated_tokens: self.generated,
            timing: Timing {
                first_token: self.first_token,
                total: event.at - self.parts.submitted,
            },
        });
        if let Some(finish) = &finish {
            self.ended = true;
            if let (Some(turn), Outcome::Stop | Outcome::Length) =
                (&self.parts.turn, finish.outcome)
            {
                let mut tokens = self.parts.prompt.to_vec();
                tokens.append(&mut self.answer);
                turn.ended_by_reader(Some(tokens));
            }
        }
        Ok(Chunk {
            text,
            token: event.token,
            prompt_logprobs,
            finish,
        })
    }

    /// Tells the scheduler thread once that a paused session's reader caught up.
    fn resume_if_paused(&self) {
        let cell = &self.parts.cell;
        if cell.paused.load(Ordering::SeqCst)
            && has_room(self.parts.receiver.events.len(), self.parts.buffer)
            && cell.paused.swap(false, Ordering::SeqCst)
        {
            // Without an engine there is nothing to resume.
            let _ = self.parts.commands.send(Command::Resume(self.parts.id));
        }
    }

    /// No terminal will come any more.
    fn lost(&mut self, fault: EngineFault) -> Result<Chunk, GenerateError> {
        self.ended = true;
        Err(match fault {
            EngineFault::Stuck { .. } => GenerateError::Failed(fault),
            fault => GenerateError::Closed(fault),
        })
    }
}

impl Stream for TokenStream {
    type Item = Result<Chunk, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let StreamParts {
            end,
            receiver,
            cell,
            ..
        } = &self.parts;
        let register = || cell.register_reader(context.waker());
        match end.poll(&receiver.events, register) {
            Poll::Ready(Ok(event)) => Poll::Ready(Some(self.take(event))),
            Poll::Ready(Err(fault)) => Poll::Ready(Some(self.lost(fault))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.post_cancel(self.drop_reason);
    }
}

/// [`TokenStream`] as an iterator that waits on the calling thread.
#[derive(Debug)]
pub struct Blocking {
    stream: TokenStream,
}

impl Iterator for Blocking {
    type Item = Result<Chunk, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.stream.next_blocking()
    }
}

/// Gathers a stream's chunks to a [`Generation`].
struct Collector {
    prompt_ids: Vec<u32>,
    text: Option<String>,
    tokens: Vec<Token>,
    prompt_logprobs: Option<Vec<Token>>,
}

impl Collector {
    fn new(stream: &TokenStream) -> Self {
        Self {
            prompt_ids: stream.parts.prompt.to_vec(),
            text: stream.parts.text.as_ref().map(|_| String::new()),
            tokens: Vec::new(),
            prompt_logprobs: None,
        }
    }

    /// Adds a chunk; gives the whole at the last.
    fn add(
        &mut self,
        chunk: Option<Result<Chunk, GenerateError>>,
    ) -> Result<Option<Generation>, GenerateError> {
        let Some(chunk) = chunk.transpose()? else {
            return Err(GenerateError::Closed(EngineFault::Shutdown));
        };
        if let Some(text) = &mut self.text {
            text.push_str(&chunk.text);
        }
        self.tokens.extend(chunk.token);
        self.prompt_logprobs = chunk.prompt_logprobs.or(self.prompt_logprobs.take());
        let Some(finish) = chunk.finish else {
            return Ok(None);
        };
        if let Outcome::Cancelled(reason) = finish.outcome {
            return Err(GenerateError::Cancelled(reason));
        }
        Ok(Some(Generation {
            prompt_ids: std::mem::take(&mut self.prompt_ids),
            text: self.text.take(),
            tokens: std::mem::take(&mut self.tokens),
            prompt_logprobs: self.prompt_logprobs.take(),
            finish,
        }))
    }
}

/// A posted cancel; await it, or [`Cancellation::wait`], for the receipt. Dropping
/// it changes nothing: the request is cancelled either way.
#[must_use = "the cancel is posted; await it, or drop it, to go on"]
pub struct Cancellation(Acknowledgement);

/// Where the receipt comes from.
enum Acknowledgement {
    /// The request's own channel.
    Stream {
        cell: Arc<RequestCell>,
        receipt: Receiver<Receipt>,
        end: EngineEnd,
    },
    /// The answer to a command of a session.
    Session(Answer<Receipt>),
}

impl std::fmt::Debug for Cancellation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Cancellation")
            .finish_non_exhaustive()
    }
}

impl Cancellation {
    pub(super) fn of_session(answer: Answer<Receipt>) -> Self {
        Self(Acknowledgement::Session(answer))
    }

    /// Waits for the receipt on this thread.
    pub fn wait(self) -> Result<Receipt, GenerateError> {
        let received = match &self.0 {
            Acknowledgement::Stream { receipt, end, .. } => end.recv(receipt),
            Acknowledgement::Session(answer) => answer.wait(),
        };
        received.map_err(GenerateError::Closed)
    }
}

impl Future for Cancellation {
    type Output = Result<Receipt, GenerateError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = match &self.0 {
            Acknowledgement::Stream { cell, receipt, end } => {
                end.poll(receipt, || cell.register_receipt(context.waker()))
            }
            Acknowledgement::Session(answer) => answer.poll(context),
        };
        polled.map_err(GenerateError::Closed)
    }
}
