//! [`Session`], a conversation that keeps its tokens, keys and values from turn to turn.

use super::pending::Cancellation;
use super::submit::take_prompt;
use super::turn::{Stop, Turn, TurnCell};
use crate::engine::command::Command;
use crate::engine::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::engine::{Engine, Prompt, Request, SubmitError, TokenStream};
use crate::id::SessionId;
use crate::schedule::RetainedCache;
use std::time::{Duration, Instant};

/// Settings of a session.
///
/// Construct it with `..SessionOptions::default()`: fields are added in minor releases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// How long, after each turn, the session's keys and values are protected from being
    /// evicted. All pinned blocks together are limited by [`EngineConfig::pinned_percent`].
    /// Beyond that limit, or without a pin, the blocks may be given to other requests; the next
    /// turn then recomputes them.
    ///
    /// [`EngineConfig::pinned_percent`]: crate::EngineConfig::pinned_percent
    pub pin: Option<Duration>,
}

/// A conversation, in which each turn continues from all turns before it.
///
/// Only one turn can generate at a time. A turn that is cancelled, dropped or fails leaves the
/// session as it was before the turn. Between turns, the scheduler thread keeps the session's
/// keys and values unless other requests need the memory; then the next turn recomputes them.
///
/// Dropping the session ends it, including its turn.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    id: SessionId,
    options: SessionOptions,
    state: Mutex<State>,
    ended: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Tokens of the finished turns.
    context: Vec<u32>,
    turn: Option<Arc<TurnCell>>,
}

impl State {
    /// Applies the outcome of the last turn. Returns `false` if the turn is still generating.
    fn settle(&mut self) -> bool {
        let Some(turn) = &self.turn else {
            return true;
        };
        let Some(tokens) = turn.outcome() else {
            return false;
        };
        if let Some(tokens) = tokens {
            self.context = tokens;
        }
        self.turn = None;
        true
    }
}

impl Session {
    pub(in crate::engine) fn new(engine: Engine, options: SessionOptions) -> Self {
        let id = engine.next_session_id();
        Self {
            engine,
            id,
            options,
            state: Mutex::default(),
            ended: false,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The tokens are replaced as a whole, so a panic cannot leave them half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the state between two turns, or an error if a turn is generating.
    fn idle(&self) -> Result<MutexGuard<'_, State>, SubmitError> {
        self.engine.require_open()?;
        let mut state = self.state();
        match state.settle() {
            true => Ok(state),
            false => Err(SubmitError::Conflict),
        }
    }

    /// Returns the session's id, which also appears in the logs.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Returns the number of tokens of the finished turns.
    pub fn context_tokens(&self) -> usize {
        let mut state = self.state();
        state.settle();
        state.context.len()
    }

    /// Returns whether a turn is generating.
    pub fn is_generating(&self) -> bool {
        !self.state().settle()
    }

    /// Returns what the engine keeps of this session at the moment. Waits for the scheduler
    /// thread, at most for one step. During a turn, the turn's request holds the blocks
    /// instead.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Closed`] if the engine has closed.
    pub fn retained(&self) -> Result<RetainedCache, SubmitError> {
        self.engine.ask(|reply| Command::Retained(self.id, reply))
    }

    /// Begins a turn: appends `request.prompt` to the turns before it and generates the answer.
    /// A conversation ([`Prompt::Chat`] or [`Prompt::Conversation`]) instead replaces the turns
    /// before it as a whole; what the two have in common is not computed again.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Conflict`] while another turn of this session is generating, and
    /// otherwise an error in the same cases as [`Engine::generate`].
    pub fn generate(&self, request: Request) -> Result<TokenStream, SubmitError> {
        let whole = matches!(
            request.prompt,
            Prompt::Chat(_) | Prompt::Conversation { .. }
        );
        self.turn(request, whole)
    }

    /// Begins a turn, like [`Session::generate`], whose prompt replaces the turns before it, in
    /// whatever form it is given.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`Session::generate`].
    pub fn generate_anew(&self, request: Request) -> Result<TokenStream, SubmitError> {
        self.turn(request, true)
    }

    fn turn(&self, mut request: Request, whole: bool) -> Result<TokenStream, SubmitError> {
        // Tokens that mark the beginning of a text belong only to the first turn.
        let first = whole || self.idle()?.context.is_empty();
        // Tokenize without the lock, because it may take a while.
        let new = self
            .engine
            .encode_prompt(take_prompt(&mut request), first)?;
        let mut state = self.idle()?;
        if !whole && state.context.is_empty() != first {
            return Err(SubmitError::Conflict);
        }
        request.prompt = Prompt::Tokens(match whole {
            true => new.kept(None),
            false => state.context.iter().chain(&*new).copied().collect(),
        });
        let cell = Arc::new(TurnCell::default());
        let turn = Turn {
            session: self.id,
            base: state.context.len(),
            pin: self.options.pin,
            cell: Arc::clone(&cell),
        };
        let stream = self.engine.generate_turn(request, Some(turn))?;
        state.turn = Some(cell);
        Ok(stream)
    }

    /// Stops the turn that is generating, if there is one. The stop has been posted when this
    /// returns; await the result to get the receipt. After [`Stop::Keep`], the next turn is
    /// refused until the stop has taken effect. After [`Stop::Rewind`], it may begin at once.
    pub fn stop(&self, stop: Stop) -> Cancellation {
        let mut state = self.state();
        // A turn that has already ended is not stopped.
        state.settle();
        let turn = state.turn.clone();
        let posted_at = Instant::now();
        let cancellation = self.engine.put(|reply| Command::Stop {
            session: self.id,
            turn: turn.clone(),
            stop,
            posted_at,
            reply,
        });
        // Only after the post, so that the session posts its next turn after the stop.
        if let Some(turn) = turn {
            turn.stop(stop);
        }
        cancellation
    }

    /// Keeps the first `tokens` tokens of the context and forgets the rest.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Conflict`] while a turn is generating, and
    /// [`SubmitError::Closed`] if the engine has closed.
    pub fn rewind(&self, tokens: usize) -> Result<(), SubmitError> {
        let mut state = self.idle()?;
        self.engine.post(Command::Rewind(self.id, tokens))?;
        state.context.truncate(tokens);
        Ok(())
    }

    /// Creates a second session with the same turns. The two sessions share their keys and
    /// values, and each copies the blocks to which it writes.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Conflict`] while a turn is generating, and
    /// [`SubmitError::Closed`] if the engine has closed.
    pub fn fork(&self) -> Result<Session, SubmitError> {
        let state = self.idle()?;
        let fork = Self::new(self.engine.clone(), self.options);
        self.engine.post(Command::Fork {
            from: self.id,
            to: fork.id,
        })?;
        fork.state().context.clone_from(&state.context);
        Ok(fork)
    }

    /// Ends the session and its turn, and frees all its memory. The end has been posted when
    /// this returns; await the result to get the receipt.
    pub fn end(mut self) -> Cancellation {
        self.ended = true;
        self.post_end()
    }

    /// Ends a session that has other owners, like [`Session::end`]. A turn that they begin
    /// afterwards ends when the session is dropped.
    pub(crate) fn post_end(&self) -> Cancellation {
        let (session, posted_at) = (self.id, Instant::now());
        self.engine.put(|reply| Command::EndSession {
            session,
            posted_at,
            reply: Some(reply),
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            // If the engine has ended, there is nothing left to end.
            let _ = self.engine.post(Command::EndSession {
                session: self.id,
                posted_at: Instant::now(),
                reply: None,
            });
        }
    }
}
