//! [`TokenStream`], the answer to one request as it is generated. Dropping it cancels the
//! request.

use super::answer::{Chunk, Collector, Finish, Generation, Timing};
use super::pending::{Cancellation, Pending};
use super::turn::TurnCell;
use super::waiting::EngineEnd;
use crate::device::PooledRows;
use crate::engine::command::Command;
use crate::engine::event::{
    CancelReason, Event, EventReceiver, Outcome, PromptReport, RequestCell, has_room,
};
use crate::engine::metrics::{EngineMetrics, NoEffect};
use crate::engine::sync::atomic::Ordering;
use crate::engine::sync::{Arc, Sender};
use crate::engine::{EngineFault, GenerateError, Request};
use crate::id::RequestId;
use crate::sampling::TokenRun;
use crate::text::{Detokenizer, StopMatcher, StopStep, StopStrings, Tokenizer};
use futures_core::Stream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Converts a stream's tokens to text, on the caller's side.
pub(crate) struct TextState {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Whether the stop token that ends the answer is part of its text.
    include_stop: bool,
    /// Number of tokens within which stop strings are ignored.
    min_tokens: usize,
}

impl TextState {
    /// Creates the state for an answer that continues `prompt`.
    pub fn new(
        prompt: &[u32],
        tokenizer: Arc<Tokenizer>,
        request: &Request,
        stop: StopStrings,
    ) -> Self {
        let stop = StopMatcher::new(stop);
        Self {
            detokenizer: Detokenizer::after(prompt, tokenizer, !request.keep_special)
                .keeping(&request.kept_tokens),
            stop: stop.include_stop(request.include_stop),
            include_stop: request.include_stop,
            min_tokens: request.limits.min_tokens,
        }
    }

    /// Takes the next token. `generated` is the number of tokens so far, including this one.
    fn push(&mut self, token: u32, generated: usize) -> StopStep {
        let text = self.detokenizer.push(token);
        match generated <= self.min_tokens {
            true => self.stop.push_through(&text),
            false => self.stop.push(&text),
        }
    }
}

/// The text of the tokens of one step.
#[derive(Default)]
struct Reading {
    text: String,
    /// Where in `text` the text of each token but the last ends.
    splits: Vec<usize>,
    /// Whether the last token completes a stop string.
    matched: bool,
}

/// The parts of a stream.
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
    /// State of the session turn that this request is, if it is one.
    pub turn: Option<Arc<TurnCell>>,
}

/// The answer to one request, token by token: a [`futures_core::Stream`] or, through
/// [`TokenStream::blocking`], an iterator.
///
/// Dropping it cancels the request. The drop only raises a flag and posts a command; the
/// scheduler thread then frees what the request held. This works without a runtime, while a
/// runtime shuts down, during unwinding, and after the engine has ended.
pub struct TokenStream {
    parts: StreamParts,
    /// Tokens of the answer, collected only for a session, which continues from them.
    answer: Vec<u32>,
    /// Sum of the prompt's hidden states, for an embedding.
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

    /// Returns the request's id, which also appears in the logs.
    pub fn id(&self) -> RequestId {
        self.parts.id
    }

    /// Returns the tokens of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.parts.prompt
    }

    /// Returns the tokens that end the answer, sorted: the request's own and, unless the
    /// request ignores them, the model's.
    pub fn stop_tokens(&self) -> Arc<[u32]> {
        Arc::clone(&self.parts.stop_tokens)
    }

    /// Cancels the request. The cancel has been posted when this returns. Await the result, or
    /// call [`Pending::wait`], to wait until the request's blocks are free.
    pub fn cancel(self) -> Cancellation {
        self.cancel_because(CancelReason::Explicit)
    }

    /// Cancels the request like [`TokenStream::cancel`], for a more specific reason such as
    /// [`CancelReason::Disconnect`]. The reason appears in the metrics and in the logs.
    /// [`CancelReason::StopString`] is replaced by [`CancelReason::Explicit`].
    pub fn cancel_because(mut self, reason: CancelReason) -> Cancellation {
        self.post_cancel(reason.for_caller());
        Pending::receipt(
            Arc::clone(&self.parts.cell),
            self.parts.receiver.receipt.clone(),
            self.parts.end.clone(),
        )
    }

    /// Sets the reason that dropping the stream reports, instead of
    /// [`CancelReason::StreamDropped`]. For example, a server whose connections own their
    /// streams uses [`CancelReason::Disconnect`].
    pub fn when_dropped(mut self, reason: CancelReason) -> Self {
        self.drop_reason = reason.for_caller();
        self
    }

    /// Converts the stream to a blocking iterator.
    pub fn blocking(self) -> Blocking {
        Blocking { stream: self }
    }

    /// Waits on this thread for the next chunk. Returns `None` after the last one.
    ///
    /// # Errors
    ///
    /// Returns [`GenerateError::Failed`] if the request failed, alone or together with the
    /// engine, and [`GenerateError::Closed`] if the engine closed before the request had ended. No
    /// further chunk follows. The end of a request that was cancelled is no error: its last
    /// chunk says so.
    pub fn next_blocking(&mut self) -> Option<Result<Chunk, GenerateError>> {
        if self.ended {
            return None;
        }
        Some(match self.parts.end.recv(&self.parts.receiver.events) {
            Ok(event) => self.take(event),
            Err(fault) => self.lost(fault),
        })
    }

    fn collector(&self) -> Collector {
        Collector::new(&self.parts.prompt, self.parts.text.is_some())
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    ///
    /// Returns [`GenerateError::Failed`] if the request failed, alone or together with the
    /// engine, [`GenerateError::Cancelled`] if it was cancelled, and [`GenerateError::Closed`] if
    /// the engine closed before the answer was complete.
    pub async fn complete(mut self) -> Result<Generation, GenerateError> {
        let mut collector = self.collector();
        loop {
            let next = std::future::poll_fn(|context| Pin::new(&mut self).poll_next(context));
            if let Some(generation) = collector.add(next.await)? {
                return Ok(generation);
            }
        }
    }

    /// Waits on this thread for the whole answer.
    ///
    /// # Errors
    ///
    /// Returns [`GenerateError::Failed`] if the request failed, alone or together with the
    /// engine, [`GenerateError::Cancelled`] if it was cancelled, and [`GenerateError::Closed`] if
    /// the engine closed before the answer was complete.
    pub fn complete_blocking(mut self) -> Result<Generation, GenerateError> {
        let mut collector = self.collector();
        loop {
            if let Some(generation) = collector.add(self.next_blocking())? {
                return Ok(generation);
            }
        }
    }

    /// Returns a receiver of the unread events, which remains usable after the stream is gone.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(in crate::engine) fn events(&self) -> crate::engine::sync::Receiver<Event> {
        self.parts.receiver.events.clone()
    }

    /// Takes the sum of the prompt's hidden states, if it has arrived.
    pub(in crate::engine) fn take_sum(&mut self) -> Option<PooledRows> {
        self.sum.take()
    }

    /// Raises the cancel flag and posts the wake-up, at most once. Never blocks and never
    /// fails: if the engine is gone, there is nothing left to cancel.
    fn post_cancel(&mut self, reason: CancelReason) {
        if !self.ended {
            self.ended = true;
            let first = self.parts.cell.cancel(reason);
            let no_effect = if !first {
                Some(NoEffect::AlreadyCancelled)
            } else {
                let posted = self.parts.commands.send(Command::Cancel(self.parts.id));
                posted.err().map(|_| NoEffect::EngineClosed)
            };
            if let Some(cause) = no_effect {
                self.parts.metrics.no_effect(cause);
            }
            // Only after the post, so that the session posts its next turn after the cancel.
            if let (Some(turn), true) = (&self.parts.turn, first)
                && reason != CancelReason::StopString
            {
                turn.set_reader_end(None);
            }
        }
    }

    /// Converts an event to a chunk.
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
        let mut tokens = event.tokens;
        if !tokens.is_empty() {
            self.first_token
                .get_or_insert_with(|| event.at - self.parts.submitted);
        }
        let stopped = matches!(event.ending, Some(Ok(Outcome::Stop)));
        let Reading {
            mut text,
            splits,
            mut matched,
        } = self.read_run(&mut tokens, stopped);
        let mut outcome = match event.ending {
            None => None,
            Some(Ok(outcome)) => Some(outcome),
            Some(Err(fault)) => {
                self.ended = true;
                return Err(GenerateError::Failed(*fault));
            }
        };
        if let (Some(state), Some(_), false) = (&mut self.parts.text, outcome, matched) {
            // Text that was held back as part of a character or of a stop string.
            let step = state.stop.push(&state.detokenizer.finish());
            text.push_str(&step.text);
            // A cancel remains a cancel even if the last characters complete a stop string.
            matched = step.matched.is_some() && !matches!(outcome, Some(Outcome::Cancelled(_)));
            if step.matched.is_none() {
                text.push_str(&state.stop.finish());
            }
        }
        if matched {
            if outcome.is_none() {
                let kept = &self.parts.cell.kept_tokens;
                kept.store(self.generated, Ordering::Release);
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
                turn.set_reader_end(Some(tokens));
            }
        }
        Ok(Chunk {
            text,
            tokens,
            prompt_logprobs,
            finish,
            splits,
        })
    }

    /// Converts the tokens of a step to text. Drops the tokens after a stop string. If the
    /// answer has `stopped`, the last token may be the one that ended it.
    fn read_run(&mut self, tokens: &mut TokenRun, stopped: bool) -> Reading {
        let mut reading = Reading::default();
        for (index, token) in tokens.iter().enumerate() {
            if index > 0 {
                reading.splits.push(reading.text.len());
            }
            self.generated += 1;
            if self.parts.turn.is_some() {
                self.answer.push(token.id);
            }
            let Some(state) = &mut self.parts.text else {
                continue;
            };
            // A token that ends the answer is not part of its text.
            let ends = stopped && index + 1 == tokens.len();
            if ends && !state.include_stop && self.parts.stop_tokens.contains(&token.id) {
                continue;
            }
            let step = state.push(token.id, self.generated);
            match index {
                0 => reading.text = step.text,
                _ => reading.text.push_str(&step.text),
            }
            if step.matched.is_some() {
                reading.matched = true;
                tokens.truncate(index + 1);
                break;
            }
        }
        reading
    }

    /// Tells the scheduler thread, once per pause, that the reader of a paused request has
    /// caught up.
    fn resume_if_paused(&self) {
        let cell = &self.parts.cell;
        if cell.paused.load(Ordering::SeqCst)
            && has_room(self.parts.receiver.events.len(), self.parts.buffer)
            && cell.paused.swap(false, Ordering::SeqCst)
        {
            // If the engine has ended, there is nothing to resume.
            let _ = self.parts.commands.send(Command::Resume(self.parts.id));
        }
    }

    /// Ends the stream of an engine that will never send a terminal.
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

/// A [`TokenStream`] as an iterator that waits on the calling thread.
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
