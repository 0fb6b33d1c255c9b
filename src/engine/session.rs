//! [`Session`]: a conversation whose tokens carry over from turn to turn.

use super::stream::TurnEnd;
use super::sync::atomic::{AtomicBool, Ordering};
use super::sync::{Arc, Mutex, MutexGuard, PoisonError};
use super::{Engine, Prompt, Request, SubmitError, TokenStream};

/// A conversation: each turn continues from all the turns before it.
///
/// One turn at a time. A turn that is cancelled, dropped or fails leaves the
/// session as it was before the turn. The tokens so far are computed anew at each
/// turn.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Tokens of the finished turns.
    context: Mutex<Vec<u32>>,
    busy: AtomicBool,
}

impl State {
    fn context(&self) -> MutexGuard<'_, Vec<u32>> {
        // The vector is replaced as a whole: it is never half-written.
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn in progress; dropping it frees the session for the next.
struct Turn(Arc<State>);

impl TurnEnd for Turn {
    fn finished(&mut self, tokens: Vec<u32>) {
        *self.0.context() = tokens;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}

impl Session {
    pub(super) fn new(engine: Engine) -> Self {
        Self {
            engine,
            state: Arc::default(),
        }
    }

    /// Tokens of the finished turns.
    pub fn context_tokens(&self) -> usize {
        self.state.context().len()
    }

    /// One turn: `request.prompt` is appended to the turns before it. Refused with
    /// [`SubmitError::Conflict`] while another turn of this session is generating.
    pub fn generate(&self, mut request: Request) -> Result<TokenStream, SubmitError> {
        if self.state.busy.swap(true, Ordering::AcqRel) {
            return Err(SubmitError::Conflict);
        }
        let turn = Turn(Arc::clone(&self.state));
        let mut tokens = self.state.context().clone();
        // Tokens that begin a text belong to the first turn only.
        let first = tokens.is_empty();
        tokens.extend(self.engine.tokenize_part(&request.prompt, first)?);
        request.prompt = Prompt::Tokens(tokens);
        let mut stream = self.engine.generate(request)?;
        stream.set_turn(Box::new(turn));
        Ok(stream)
    }

    /// Keeps the first `tokens` tokens of the context and forgets the rest. Refused
    /// with [`SubmitError::Conflict`] while a turn is generating.
    pub fn rewind(&self, tokens: usize) -> Result<(), SubmitError> {
        if self.state.busy.swap(true, Ordering::AcqRel) {
            return Err(SubmitError::Conflict);
        }
        let turn = Turn(Arc::clone(&self.state));
        self.state.context().truncate(tokens);
        drop(turn);
        Ok(())
    }
}
