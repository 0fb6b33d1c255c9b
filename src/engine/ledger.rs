//! The ledger: the scheduler thread's account with every caller.
//!
//! An account is opened by a submission and closed by exactly one terminal (I1).
//! After the terminal it is *closing* until its blocks are free; then the caller
//! gets the receipt. There is one door out, [`Ledger::close`], whatever the reason.

use super::command::AccountSpec;
use super::event::{Event, EventSender, Receipt, SessionCell, Terminal, Token};
use super::permit::Permit;
use super::stats::Outcomes;
use super::sync::Arc;
use super::sync::atomic::Ordering;
use crate::id::{SessionId, StepId};
use crate::schedule::{FinishReason, SequenceKey};
use std::collections::HashMap;
use std::time::Instant;

/// An open request.
struct Account {
    id: SessionId,
    key: SequenceKey,
    cell: Arc<SessionCell>,
    events: EventSender,
    permit: Permit,
    /// The token of this step, until the flush.
    token: Option<Token>,
}

/// A request that has ended and whose blocks a step in flight may still touch.
struct Closing {
    key: SequenceKey,
    fence: StepId,
    events: EventSender,
    receipt: Receipt,
}

/// What an ended request leaves behind.
pub(super) struct Remains {
    pub blocks: usize,
    pub tokens_generated: usize,
    /// The last step that touches its blocks.
    pub fence: StepId,
}

/// All accounts, open and closing.
#[derive(Default)]
pub(super) struct Ledger {
    open: HashMap<SequenceKey, Account>,
    by_id: HashMap<SessionId, SequenceKey>,
    closing: Vec<Closing>,
    /// Accounts with a token to flush.
    dirty: Vec<SequenceKey>,
    outcomes: Outcomes,
}

impl Ledger {
    pub fn outcomes(&self) -> Outcomes {
        self.outcomes
    }

    pub fn open_accounts(&self) -> usize {
        self.open.len()
    }

    pub fn closing_accounts(&self) -> usize {
        self.closing.len()
    }

    pub fn open_keys(&self) -> Vec<SequenceKey> {
        let mut keys: Vec<SequenceKey> = self.open.keys().copied().collect();
        // The map's order is random, and no schedule of a model checker could be replayed.
        keys.sort_unstable();
        keys
    }

    pub fn key_of(&self, id: SessionId) -> Option<SequenceKey> {
        self.by_id.get(&id).copied()
    }

    pub fn cell_of(&self, key: SequenceKey) -> Option<&SessionCell> {
        self.open.get(&key).map(|account| &*account.cell)
    }

    /// Opens the account of an accepted request.
    pub fn open(&mut self, key: SequenceKey, id: SessionId, spec: AccountSpec) {
        let AccountSpec {
            cell,
            events,
            permit,
        } = spec;
        self.outcomes.accepted += 1;
        self.by_id.insert(id, key);
        let account = Account {
            id,
            key,
            cell,
            events,
            permit,
            token: None,
        };
        self.open.insert(key, account);
    }

    /// Books a token; it is sent by the flush, or with the terminal.
    pub fn token(&mut self, key: SequenceKey, token: Token) {
        if let Some(account) = self.open.get_mut(&key) {
            account.token = Some(token);
            self.dirty.push(key);
        }
    }

    /// A step produced a token for a request that has ended.
    pub fn discarded(&mut self, key: SequenceKey) {
        if let Some(closing) = self.closing.iter_mut().find(|closing| closing.key == key) {
            closing.receipt.tokens_discarded += 1;
        }
    }

    /// Closes an account: the one terminal goes out, the receipt follows when the
    /// blocks are free. A second close of the same account does nothing (I8).
    pub fn close(&mut self, key: SequenceKey, terminal: Terminal, remains: Remains) {
        let Some(mut account) = self.open.remove(&key) else {
            return;
        };
        self.by_id.remove(&account.id);
        let count = match &terminal {
            Terminal::Finished(FinishReason::Stop) => &mut self.outcomes.stopped,
            Terminal::Finished(FinishReason::Length) => &mut self.outcomes.length,
            Terminal::Cancelled(_) => &mut self.outcomes.cancelled,
            Terminal::Failed(_) => &mut self.outcomes.failed,
        };
        *count += 1;
        let at = Instant::now();
        tracing::debug!(
            session = %account.id,
            terminal = ?terminal,
            tokens = remains.tokens_generated,
            blocks = remains.blocks,
            "request ended"
        );
        // A cancelled request's last token is dropped: no token follows a cancel.
        let token = account
            .token
            .take()
            .filter(|_| matches!(terminal, Terminal::Finished(_)));
        // Before the caller learns of the end: it may submit the next at once.
        drop(account.permit);
        account.events.send(Event {
            token,
            terminal: Some(terminal),
            at,
        });
        self.closing.push(Closing {
            key: account.key,
            fence: remains.fence,
            receipt: Receipt {
                blocks_freed: remains.blocks,
                tokens_generated: remains.tokens_generated,
                tokens_discarded: 0,
                step: remains.fence,
                posted_at: account.cell.posted_at().unwrap_or(at),
                freed_at: at,
            },
            events: account.events,
        });
    }

    /// All steps up to `completed` have completed, and their blocks are free: the
    /// receipts that waited for them go out.
    pub fn settle(&mut self, completed: StepId) {
        if self.closing.is_empty() {
            return;
        }
        let freed_at = Instant::now();
        for mut closing in self
            .closing
            .extract_if(.., |closing| closing.fence <= completed)
        {
            closing.events.send_receipt(Receipt {
                step: completed,
                freed_at,
                ..closing.receipt
            });
        }
    }

    /// Sends this step's tokens: one message a session, never blocking (I9). Gives
    /// the sessions whose readers are too slow.
    pub fn flush(&mut self, pause: &mut Vec<SequenceKey>) {
        let at = Instant::now();
        for key in self.dirty.drain(..) {
            let Some(account) = self.open.get_mut(&key) else {
                continue;
            };
            let Some(token) = account.token.take() else {
                continue;
            };
            account.events.send(Event {
                token: Some(token),
                terminal: None,
                at,
            });
            if account.events.is_full() {
                account.cell.paused.store(true, Ordering::SeqCst);
                // The reader may have caught up before it could see the flag.
                let caught_up = account.events.has_room();
                if !(caught_up && account.cell.paused.swap(false, Ordering::SeqCst)) {
                    pause.push(key);
                }
            }
        }
    }
}
