//! `session_id`: the session that a request is a turn of.

/// The session that a request is a turn of.
#[derive(Debug)]
pub(crate) struct SessionTurn {
    pub id: String,
    pub prompt: SessionPrompt,
}

/// How the prompt of a turn relates to its session.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SessionPrompt {
    /// The prompt follows the turns before it.
    Next,
    /// The prompt is the whole conversation.
    Whole,
}
