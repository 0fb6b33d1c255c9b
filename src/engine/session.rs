//! [`Session`]: a conversation whose tokens, and their keys and values, carry over from
//! turn to turn.

use super::command::Command;
use super::stream::Cancellation;
use super::sync::{Arc, Mutex, MutexGuard, PoisonError};
use super::turn::{Stop, Turn, TurnCell};
use super::{Engine, Prompt, Request, SubmitError, TokenStream};
use crate::id::SessionId;
use crate::schedule::Kept;
use std::time::{Duration, Instant};

/// How a session is to be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// After each turn, keep its keys and values from others for this long. All pins
    /// together have a cap, [`EngineConfig::pinned_percent`]; beyond it, or without a
    /// pin, they may be given to others, and are computed anew at the next turn.
    ///
    /// [`EngineConfig::pinned_percent`]: crate::EngineConfig::pinned_percent
    pub pin: Option<Duration>,
}

/// A conversation: each turn continues from all the turns before it.
///
/// One turn at a time. A turn that is cancelled, dropped or fails leaves the session as
/// it was before the turn. Between turns the scheduler thread keeps the session's keys
/// and values, unless others need the memory: then they are computed anew.
///
/// Dropping the session ends it, its turn included.
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
    /// Takes over what the last turn has come to. `false` while it is generating.
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
    pub(super) fn new(engine: Engine, options: SessionOptions) -> Self {
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
        // The tokens are replaced as a whole: they are never half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state between two turns.
    fn idle(&self) -> Result<MutexGuard<'_, State>, SubmitError> {
        self.engine.require_open()?;
        let mut state = self.state();
        match state.settle() {
            true => Ok(state),
            false => Err(SubmitError::Conflict),
        }
    }

    /// The session's identity, as the logs name it.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Tokens of the finished turns.
    pub fn context_tokens(&self) -> usize {
        let mut state = self.state();
        state.settle();
        state.context.len()
    }

    /// Whether a turn is generating.
    pub fn is_generating(&self) -> bool {
        !self.state().settle()
    }

    /// What the engine keeps of this session now; waits for the scheduler thread, at
    /// most for one step. During a turn it is the turn that holds the blocks.
    pub fn kept(&self) -> Result<Kept, SubmitError> {
        self.engine.ask(|reply| Command::Kept(self.id, reply))
    }

    /// One turn: `request.prompt` is appended to the turns before it. A conversation
    /// ([`Prompt::Chat`], [`Prompt::Conversation`]) is one as a whole: it takes the
    /// place of the turns before it, and what it has in common with them is not computed
    /// again. Refused with [`SubmitError::Conflict`] while another turn of this session
    /// is generating.
    pub fn generate(&self, request: Request) -> Result<TokenStream, SubmitError> {
        let whole = matches!(
            request.prompt,
            Prompt::Chat(_) | Prompt::Conversation { .. }
        );
        self.turn(request, whole)
    }

    /// As [`Session::generate`], for a prompt that is the whole context, whatever it is
    /// written as: it takes the place of the turns before it.
    pub fn generate_anew(&self, request: Request) -> Result<TokenStream, SubmitError> {
        self.turn(request, true)
    }

    fn turn(&self, mut request: Request, whole: bool) -> Result<TokenStream, SubmitError> {
        // Tokens that begin a text belong to the first turn only.
        let first = whole || self.idle()?.context.is_empty();
        // Not under the lock: it may take a while.
        let new = self.engine.tokenize_part(&request.prompt, first)?;
        let mut state = self.idle()?;
        if !whole && state.context.is_empty() != first {
            return Err(SubmitError::Conflict);
        }
        request.prompt = Prompt::Tokens(match whole {
            true => new,
            false => [state.context.as_slice(), &new].concat(),
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

    /// Stops the turn that is generating, if there is one. Posted before this returns;
    /// the future is the acknowledgement. After [`Stop::Keep`] the next turn is refused
    /// until then, after [`Stop::Rewind`] it may begin at once.
    pub fn stop(&self, stop: Stop) -> Cancellation {
        let mut state = self.state();
        // A turn that is over is not stopped.
        state.settle();
        let turn = state.turn.clone();
        let posted_at = Instant::now();
        let cancellation = self.engine.acknowledged(|reply| Command::Stop {
            session: self.id,
            turn: turn.clone(),
            stop,
            posted_at,
            reply,
        });
        // After the post: the session's next turn is posted later still.
        if let Some(turn) = turn {
            turn.stop(stop);
        }
        cancellation
    }

    /// Keeps the first `tokens` tokens of the context and forgets the rest. Refused
    /// with [`SubmitError::Conflict`] while a turn is generating.
    pub fn rewind(&self, tokens: usize) -> Result<(), SubmitError> {
        let mut state = self.idle()?;
        self.engine.post(Command::Rewind(self.id, tokens))?;
        state.context.truncate(tokens);
        Ok(())
    }

    /// A second session that has had the same turns. The two share their keys and
    /// values, and each copies what it writes to. Refused with
    /// [`SubmitError::Conflict`] while a turn is generating.
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

    /// Ends the session and its turn, and gives all its memory back. Posted before this
    /// returns; the future is the acknowledgement.
    pub fn end(mut self) -> Cancellation {
        self.ended = true;
        self.post_end()
    }

    /// As [`Session::end`], for one that others hold as well; a turn that they begin
    /// later ends when the session is dropped.
    pub(crate) fn post_end(&self) -> Cancellation {
        let (session, posted_at) = (self.id, Instant::now());
        self.engine.acknowledged(|reply| Command::EndSession {
            session,
            posted_at,
            reply: Some(reply),
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            // Without an engine there is nothing left to end.
            let _ = self.engine.post(Command::EndSession {
                session: self.id,
                posted_at: Instant::now(),
                reply: None,
            });
        }
    }
}
