//! The ledger: one account per open request, through which the scheduler thread answers its
//! caller.
//!
//! A submission opens an account, and exactly one ending closes it (I1). After that, the
//! account is *closing* until its blocks are free; then the caller gets the receipt. Every
//! account is closed by [`Ledger::close`], whatever the reason.

use super::deadlines::{Deadlines, Due, RequestDeadlines};
use super::record::RequestRecord;
use crate::engine::RequestQuery;
use crate::engine::caller::permit::Permit;
use crate::engine::caller::turn::Turn;
use crate::engine::caller::waiting::Reply;
use crate::engine::command::AccountSpec;
use crate::engine::event::{
    Ending, Event, EventSender, Outcome, PromptReport, Receipt, RequestCell, wake,
};
use crate::engine::metrics::{EndLabels, EngineMetrics};
use crate::engine::stats::Outcomes;
use crate::engine::sync::Arc;
use crate::engine::sync::atomic::Ordering;
use crate::id::{RequestId, SessionId, StepId};
use crate::sampling::TokenRun;
use crate::schedule::SequenceKey;
use slotmap::SecondaryMap;
use std::collections::{HashMap, VecDeque};
use std::task::Waker;
use std::time::Instant;

/// The account of an open request.
struct Account {
    id: RequestId,
    key: SequenceKey,
    cell: Arc<RequestCell>,
    events: EventSender,
    permit: Permit,
    record: RequestRecord,
    deadlines: RequestDeadlines,
    /// The tokens of the current step, until they are flushed.
    tokens: TokenRun,
    /// Report on the prompt, until it is sent.
    report: Option<Box<PromptReport>>,
    /// The session turn that the request is, if it is one.
    turn: Option<Turn>,
    /// Label that the caller chose for the request.
    label: Option<Arc<str>>,
    /// Owner that the caller named for the request.
    owner: Option<u64>,
    /// Further recipients of the receipt.
    replies: Vec<ReceiptReply>,
}

/// What is known of a request from its submission.
pub(super) struct Origin {
    pub submitted: Instant,
    pub label: Option<Arc<str>>,
    pub owner: Option<u64>,
}

/// A recipient of a request's receipt in addition to the owner of its stream.
pub(super) enum ReceiptReply {
    /// The session of the request, which has stopped it.
    Session(Reply<Receipt>),
    /// A caller that has cancelled the request by its id.
    Request(Reply<Option<Receipt>>),
}

impl ReceiptReply {
    fn send(self, receipt: Receipt) {
        match self {
            Self::Session(reply) => reply.send(receipt),
            Self::Request(reply) => reply.send(Some(receipt)),
        }
    }
}

/// A receipt for the end of a session or a stopped turn. It is due when the steps in flight
/// that may still touch the blocks have completed.
struct PendingReceipt {
    fence: StepId,
    receipt: Receipt,
    reply: Reply<Receipt>,
}

/// A request that has ended, but whose blocks a step in flight may still touch.
struct Closing {
    id: RequestId,
    key: SequenceKey,
    fence: StepId,
    events: EventSender,
    receipt: Receipt,
    record: RequestRecord,
    end: EndLabels,
    ended_at: Instant,
    replies: Vec<ReceiptReply>,
}

/// A request that has ended and whose blocks are free.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub id: RequestId,
    pub end: EndLabels,
    pub receipt: Receipt,
}

/// Number of recently ended requests that are remembered.
const RECENT_ENDS: usize = 64;

impl Closing {
    /// Sends the receipt and logs the end, now that the blocks are free.
    fn settle(mut self, step: StepId, freed_at: Instant, metrics: &EngineMetrics) -> Ended {
        self.receipt.step = step;
        self.receipt.freed_at = freed_at;
        if self.end.is_cancelled() {
            let waited = freed_at.saturating_duration_since(self.receipt.posted_at);
            metrics.cancel_freed(waited, self.receipt.tokens_discarded);
        }
        self.record
            .report(self.end, self.ended_at, &self.receipt, true);
        for reply in self.replies {
            reply.send(self.receipt);
        }
        self.events.send_receipt(self.receipt);
        Ended {
            id: self.id,
            end: self.end,
            receipt: self.receipt,
        }
    }
}

/// Wakers of readers that have something to read. If the same task occurs several times in a
/// row, it is stored once. Whatever happens, every reader is woken when this is dropped.
#[derive(Default)]
struct PendingWakes(Vec<Waker>);

impl PendingWakes {
    fn add(&mut self, reader: Option<Waker>) {
        let Some(reader) = reader else { return };
        if !self.0.last().is_some_and(|last| last.will_wake(&reader)) {
            self.0.push(reader);
        }
    }

    fn wake(&mut self) {
        self.0.reverse(); // the first is woken first
        while let Some(reader) = self.0.pop() {
            wake(Some(reader));
        }
    }
}

impl Drop for PendingWakes {
    fn drop(&mut self) {
        self.wake();
    }
}

/// What an ended request leaves behind.
pub(super) struct Remains {
    pub blocks: usize,
    /// States of recurrent layers.
    pub states: usize,
    pub tokens_generated: usize,
    pub tokens_discarded: usize,
    /// The last step that touches the request's blocks.
    pub fence: StepId,
}

/// All accounts, open and closing.
pub(super) struct Ledger {
    metrics: Arc<EngineMetrics>,
    open: SecondaryMap<SequenceKey, Account>,
    by_id: HashMap<RequestId, SequenceKey>,
    /// The turns in progress, by session.
    turns: HashMap<SessionId, SequenceKey>,
    closing: Vec<Closing>,
    pending_receipts: Vec<PendingReceipt>,
    /// Accounts with tokens to flush.
    dirty: Vec<SequenceKey>,
    /// Readers to wake at the end of the flush.
    pending_wakes: PendingWakes,
    deadlines: Deadlines,
    outcomes: Outcomes,
    /// The most recently ended requests, oldest first.
    recent: VecDeque<Ended>,
}

impl Ledger {
    /// Creates a ledger without accounts.
    pub fn new(metrics: Arc<EngineMetrics>) -> Self {
        Self {
            metrics,
            open: SecondaryMap::new(),
            by_id: HashMap::new(),
            turns: HashMap::new(),
            closing: Vec::new(),
            pending_receipts: Vec::new(),
            dirty: Vec::new(),
            pending_wakes: PendingWakes::default(),
            deadlines: Deadlines::default(),
            outcomes: Outcomes::default(),
            recent: VecDeque::with_capacity(RECENT_ENDS),
        }
    }

    pub fn outcomes(&self) -> Outcomes {
        self.outcomes
    }

    pub fn open_accounts(&self) -> usize {
        self.open.len()
    }

    pub fn closing_accounts(&self) -> usize {
        self.closing.len() + self.pending_receipts.len()
    }

    /// Returns the turn of a session that is in progress.
    pub fn turn_key(&self, session: SessionId) -> Option<SequenceKey> {
        self.turns.get(&session).copied()
    }

    /// Returns the session turn that an open request is, if it is one.
    pub fn turn_of(&self, key: SequenceKey) -> Option<&Turn> {
        self.open.get(key)?.turn.as_ref()
    }

    /// Adds a recipient for the receipt of an open request.
    pub fn add_reply(&mut self, key: SequenceKey, reply: ReceiptReply) {
        if let Some(account) = self.open.get_mut(key) {
            account.replies.push(reply);
        }
    }

    /// Returns what is known of an open request from its submission.
    pub fn origin(&self, key: SequenceKey) -> Option<Origin> {
        let account = self.open.get(key)?;
        Some(Origin {
            submitted: account.record.submitted(),
            label: account.label.clone(),
            owner: account.owner,
        })
    }

    /// Returns the open requests that fit the query, in ascending order of their ids.
    pub fn find(&self, query: &RequestQuery) -> Vec<RequestId> {
        let fits = |account: &&Account| {
            query.id.is_none_or(|id| id == account.id)
                && query
                    .label
                    .as_ref()
                    .is_none_or(|label| account.label.as_ref() == Some(label))
                && query.owner.is_none_or(|owner| account.owner == Some(owner))
        };
        let found = self.open.values().filter(fits);
        let mut ids: Vec<RequestId> = found.map(|account| account.id).collect();
        ids.sort_unstable();
        ids
    }

    /// Returns the most recently ended requests, oldest first.
    pub fn recent_ends(&self) -> impl DoubleEndedIterator<Item = &Ended> {
        self.recent.iter()
    }

    /// Sends a receipt as soon as step `fence` has completed.
    pub fn send_receipt_after(&mut self, fence: StepId, receipt: Receipt, reply: Reply<Receipt>) {
        self.pending_receipts.push(PendingReceipt {
            fence,
            receipt,
            reply,
        });
    }

    pub fn open_keys(&self) -> Vec<SequenceKey> {
        self.open.keys().collect()
    }

    pub fn key_of(&self, id: RequestId) -> Option<SequenceKey> {
        self.by_id.get(&id).copied()
    }

    pub fn cell_of(&self, key: SequenceKey) -> Option<&RequestCell> {
        self.open.get(key).map(|account| &*account.cell)
    }

    /// Opens the account of an accepted request.
    pub fn open(&mut self, key: SequenceKey, id: RequestId, spec: AccountSpec) {
        let AccountSpec {
            cell,
            events,
            permit,
            record,
            deadlines,
            turn,
            label,
            owner,
        } = spec;
        let deadlines = self.deadlines.add(key, deadlines);
        self.outcomes.accepted += 1;
        self.by_id.insert(id, key);
        if let Some(turn) = &turn {
            self.turns.insert(turn.session, key);
        }
        let account = Account {
            id,
            key,
            cell,
            events,
            permit,
            record,
            deadlines,
            tokens: TokenRun::default(),
            report: None,
            turn,
            label,
            owner,
            replies: Vec::new(),
        };
        self.open.insert(key, account);
    }

    /// Records that a step with a part of the request's prompt was launched.
    pub fn started(&mut self, key: SequenceKey, at: Instant, cached_tokens: usize) {
        if let Some(account) = self.open.get_mut(key) {
            account.record.started(at, cached_tokens);
            let cached = &account.cell.cached_tokens;
            cached.store(cached_tokens, Ordering::Release);
        }
    }

    /// Records what a step has found about a prompt. It is sent with the first token or the
    /// ending.
    pub fn report(&mut self, key: SequenceKey, report: PromptReport) {
        if let Some(account) = self.open.get_mut(key) {
            match &mut account.report {
                Some(known) => known.add(report),
                None => account.report = Some(Box::new(report)),
            }
        }
    }

    /// Records the tokens of a step. They are sent by the flush or with the ending.
    pub fn tokens(&mut self, key: SequenceKey, tokens: TokenRun) {
        if let Some(account) = self.open.get_mut(key) {
            account.tokens = tokens;
            self.dirty.push(key);
            let due = Due::FirstToken;
            self.deadlines.set(key, &mut account.deadlines, due, None);
        }
    }

    /// Sets the time by which the reader of a paused request must have caught up. `None` clears
    /// it once the reader has.
    pub fn catch_up_due(&mut self, key: SequenceKey, at: Option<Instant>) {
        if let Some(account) = self.open.get_mut(key) {
            let due = Due::CatchUp;
            self.deadlines.set(key, &mut account.deadlines, due, at);
        }
    }

    /// Returns the earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Returns a request whose deadline has passed at `now`, starting with the most overdue.
    pub fn overdue(&self, now: Instant) -> Option<(SequenceKey, Due)> {
        self.deadlines.overdue(now)
    }

    /// Counts tokens that a step produced for a request that has already ended.
    pub fn discarded(&mut self, key: SequenceKey, tokens: usize) {
        if tokens == 0 {
            return;
        }
        if let Some(closing) = self.closing.iter_mut().find(|closing| closing.key == key) {
            closing.receipt.tokens_discarded += tokens;
        }
    }

    /// Closes an account: sends the ending now, and the receipt when the blocks are free.
    /// Closing the same account again does nothing (I8).
    pub fn close(&mut self, key: SequenceKey, ending: Ending, remains: Remains) {
        let Some(mut account) = self.open.remove(key) else {
            return;
        };
        self.by_id.remove(&account.id);
        if let Some(turn) = &account.turn {
            self.turns.remove(&turn.session);
        }
        self.deadlines.remove(key, account.deadlines);
        let count = match ending {
            Ok(Outcome::Stop) => &mut self.outcomes.stopped,
            Ok(Outcome::Length) => &mut self.outcomes.length,
            Ok(Outcome::Cancelled(_)) => &mut self.outcomes.cancelled,
            Err(_) => &mut self.outcomes.failed,
        };
        *count += 1;
        let at = Instant::now();
        let end = EndLabels::from(&ending);
        let posted_at = account.cell.posted_at().unwrap_or(at);
        self.metrics.ended(
            end,
            at.saturating_duration_since(account.record.submitted()),
        );
        if end.is_cancelled() {
            self.metrics
                .cancel_ended(at.saturating_duration_since(posted_at));
        }
        // The last tokens of a cancelled request are dropped: no token may follow a cancel.
        let finished = matches!(ending, Ok(Outcome::Stop | Outcome::Length));
        let tokens = Some(account.tokens)
            .filter(|_| finished)
            .unwrap_or_default();
        let report = account.report.take().filter(|_| finished);
        account.record.tokens(tokens.len(), at, &self.metrics);
        // Release the place before the caller learns of the end, so that it can submit again at
        // once.
        drop(account.permit);
        let reader = account.events.send(Event {
            tokens,
            report,
            ending: Some(ending),
            at,
        });
        wake(reader);
        self.closing.push(Closing {
            id: account.id,
            key: account.key,
            fence: remains.fence,
            receipt: Receipt {
                blocks_freed: remains.blocks,
                states_freed: remains.states,
                tokens_generated: remains.tokens_generated,
                tokens_discarded: remains.tokens_discarded,
                step: remains.fence,
                posted_at,
                freed_at: at,
            },
            events: account.events,
            record: account.record,
            end,
            ended_at: at,
            replies: account.replies,
        });
    }

    /// Sends the receipts of the accounts whose blocks are free, now that all steps up to
    /// `completed` have completed.
    pub fn settle(&mut self, completed: StepId) {
        if self.closing.is_empty() && self.pending_receipts.is_empty() {
            return;
        }
        let freed_at = Instant::now();
        let free = |closing: &mut Closing| closing.fence <= completed;
        for closing in self.closing.extract_if(.., free) {
            let ended = closing.settle(completed, freed_at, &self.metrics);
            if self.recent.len() == RECENT_ENDS {
                self.recent.pop_front();
            }
            self.recent.push_back(ended);
        }
        let free = |pending: &mut PendingReceipt| pending.fence <= completed;
        for pending in self.pending_receipts.extract_if(.., free) {
            pending.reply.send(Receipt {
                step: completed,
                freed_at,
                ..pending.receipt
            });
        }
    }

    /// Gives up the closing accounts after the engine broke. Their ends are logged, but no
    /// receipt is sent.
    pub fn abandon(&mut self) {
        self.pending_receipts.clear();
        for closing in self.closing.drain(..) {
            let Closing { record, end, .. } = &closing;
            record.report(*end, closing.ended_at, &closing.receipt, false);
        }
    }

    /// Sends the tokens of this step, at most one message per request and without blocking
    /// (I9). Appends to `paused` the requests whose readers lag behind, and whether they are
    /// paused now.
    ///
    /// Readers are woken after all messages are sent. A task that reads several consecutive
    /// requests is woken once.
    pub fn flush(&mut self, paused: &mut Vec<(SequenceKey, bool)>) {
        let at = Instant::now();
        for key in self.dirty.drain(..) {
            let Some(account) = self.open.get_mut(key) else {
                continue;
            };
            let tokens = std::mem::take(&mut account.tokens);
            if tokens.is_empty() {
                continue;
            }
            account.record.tokens(tokens.len(), at, &self.metrics);
            let reader = account.events.send(Event {
                tokens,
                report: account.report.take(),
                ending: None,
                at,
            });
            self.pending_wakes.add(reader);
            if account.events.is_full() {
                // A swap rather than a store, because loom allows a store too many orders
                // relative to the swaps of the other side.
                account.cell.paused.swap(true, Ordering::SeqCst);
                // The reader may have caught up before it could see the flag. The side that
                // clears the flag ends the pause, even one that an earlier step began.
                let caught_up = account.events.has_room();
                let goes_on = caught_up && account.cell.paused.swap(false, Ordering::SeqCst);
                paused.push((key, !goes_on));
            }
        }
        self.pending_wakes.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CancelReason;
    use crate::engine::event::{EventReceiver, channel};
    use crate::engine::sync::Receiver;
    use crate::engine::sync::atomic::AtomicUsize;
    use crate::sampling::Token;
    use slotmap::SlotMap;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::task::Wake;
    use std::time::Duration;

    fn account(
        ledger: &mut Ledger,
        key: SequenceKey,
        id: u64,
        deadlines: RequestDeadlines,
    ) -> EventReceiver {
        let cell = Arc::new(RequestCell::default());
        let (events, receiver) = channel(&cell, 4);
        let spec = AccountSpec {
            cell,
            events,
            permit: Permit::acquire(&Arc::new(AtomicUsize::new(0)), 1).unwrap(),
            record: RequestRecord::new(tracing::Span::none(), Instant::now(), 1),
            deadlines,
            turn: Some(Turn {
                session: SessionId(1000 + id),
                base: 0,
                pin: None,
                cell: Arc::default(),
            }),
            label: None,
            owner: None,
        };
        ledger.open(key, RequestId(id), spec);
        receiver
    }

    fn token() -> TokenRun {
        Token::new(1).into()
    }

    fn remains(fence: StepId) -> Remains {
        Remains {
            blocks: 3,
            states: 1,
            tokens_generated: 1,
            tokens_discarded: 0,
            fence,
        }
    }

    /// I1 and I8: a second close changes nothing.
    #[test]
    fn an_account_has_one_terminal_and_no_token_with_a_cancel_or_after_it() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let key = keys.insert(());
        let mut ledger = Ledger::new(Arc::new(EngineMetrics::new(None)));
        let receiver = account(&mut ledger, key, 1, RequestDeadlines::default());
        ledger.tokens(key, token());
        for _ in 0..2 {
            let ending = Ok(Outcome::Cancelled(CancelReason::Explicit));
            ledger.close(key, ending, remains(StepId::default()));
        }
        ledger.tokens(key, token());
        ledger.flush(&mut Vec::new());
        let event = receiver.events.try_recv().unwrap();
        assert!(event.tokens.is_empty());
        assert!(matches!(event.ending, Some(Ok(Outcome::Cancelled(_)))));
        assert!(receiver.events.try_recv().is_err(), "something follows");
        assert_eq!(ledger.outcomes().cancelled, 1);
    }

    /// I6: the receipt waits for the fence. I12: afterwards nothing is left.
    #[test]
    fn a_closed_account_is_gone_with_its_receipt_when_its_fence_is_reached() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let key = keys.insert(());
        let mut ledger = Ledger::new(Arc::new(EngineMetrics::new(None)));
        let receiver = account(&mut ledger, key, 1, RequestDeadlines::default());
        let ending = Ok(Outcome::Length);
        ledger.close(key, ending, remains(StepId(4)));
        ledger.settle(StepId(3));
        assert!(receiver.receipt.try_recv().is_err());
        assert_eq!(ledger.closing_accounts(), 1);
        ledger.settle(StepId(4));
        assert_eq!(receiver.receipt.try_recv().unwrap().blocks_freed, 3);
        assert_eq!(ledger.closing_accounts() + ledger.open_accounts(), 0);
        assert!(ledger.by_id.is_empty() && ledger.turns.is_empty());
    }

    /// Counts how often it was woken, and the messages that it found each time.
    #[derive(Default)]
    struct Reader {
        messages: Vec<Receiver<Event>>,
        woken: AtomicUsize,
        found: AtomicUsize,
    }

    impl Wake for Reader {
        fn wake(self: Arc<Self>) {
            let there = self.messages.iter().map(Receiver::len).sum();
            self.woken.fetch_add(1, Ordering::SeqCst);
            self.found.fetch_add(there, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_task_with_several_requests_is_woken_once_when_all_their_tokens_are_there() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let mut ledger = Ledger::new(Arc::new(EngineMetrics::new(None)));
        let all: Vec<_> = (0..3).map(|_| keys.insert(())).collect();
        let open = |(id, &key)| account(&mut ledger, key, id as u64, RequestDeadlines::default());
        let receivers: Vec<_> = all.iter().enumerate().map(open).collect();
        let reader = Arc::new(Reader {
            messages: receivers.iter().map(|ends| ends.events.clone()).collect(),
            ..Reader::default()
        });
        let waker = Waker::from(Arc::clone(&reader));
        for &key in &all {
            ledger.cell_of(key).unwrap().register_reader(&waker);
            ledger.tokens(key, token());
        }
        ledger.flush(&mut Vec::new());
        let seen = [&reader.woken, &reader.found].map(|count| count.load(Ordering::SeqCst));
        assert_eq!(seen, [1, 3]);
    }

    /// A waker that panics, and a log that panics when that panic is reported.
    struct Panics;

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the waker of a caller");
        }
    }

    impl tracing::Subscriber for Panics {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            panic!("the log");
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn readers_are_woken_even_if_the_waker_of_another_panics() {
        let reader = Arc::new(Reader::default());
        let mut readers = PendingWakes::default();
        readers.add(Some(Waker::from(Arc::new(Panics))));
        readers.add(Some(Waker::from(Arc::clone(&reader))));
        let all_woken = catch_unwind(AssertUnwindSafe(|| {
            tracing::subscriber::with_default(Panics, || readers.wake());
        }));
        assert!(all_woken.is_err());
        drop(readers);
        assert_eq!(reader.woken.load(Ordering::SeqCst), 1);
    }

    /// I12: a closed account leaves nothing behind.
    #[test]
    fn a_closed_account_leaves_no_deadline_behind() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let mut ledger = Ledger::new(Arc::new(EngineMetrics::new(None)));
        let later = Instant::now() + Duration::from_secs(3600);
        let all: Vec<_> = (0..20).map(|_| keys.insert(())).collect();
        for (index, &key) in all.iter().enumerate() {
            let deadlines = RequestDeadlines {
                first_token: Some(later),
                finish: Some(later),
                catch_up: None,
            };
            account(&mut ledger, key, index as u64, deadlines);
            ledger.catch_up_due(key, Some(later));
        }
        assert_eq!(ledger.next_deadline(), Some(later));
        for key in all {
            let ending = Ok(Outcome::Stop);
            ledger.close(key, ending, remains(StepId::default()));
        }
        assert_eq!(ledger.next_deadline(), None);
    }

    #[test]
    fn the_deadline_of_the_first_token_ends_with_the_first_token() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let key = keys.insert(());
        let mut ledger = Ledger::new(Arc::new(EngineMetrics::new(None)));
        let deadlines = RequestDeadlines {
            first_token: Some(Instant::now()),
            ..RequestDeadlines::default()
        };
        account(&mut ledger, key, 1, deadlines);
        assert_eq!(ledger.overdue(Instant::now()), Some((key, Due::FirstToken)));
        ledger.tokens(key, token());
        assert_eq!(ledger.next_deadline(), None);
    }
}
