//! Stream capture: work is recorded into a graph instead of being queued. A forked stream joins
//! a capture by waiting for an event that was recorded in it.

use super::codes::{self, Code};
use super::objects::Recorded;
use super::queue::Op;
use super::{Driver, Failure};
use std::collections::{BTreeMap, BTreeSet};
use std::thread::{self, ThreadId};

/// `CUstreamCaptureMode`: which calls a capture forbids, and to which threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forbids all threads to make calls that may wait or allocate.
    Global,
    /// Forbids the capturing thread to make such calls.
    ThreadLocal,
    /// Forbids nothing.
    Relaxed,
}

impl Mode {
    /// Converts from the number used in the C API.
    pub fn from_raw(raw: i32) -> Option<Self> {
        Some(match raw {
            0 => Mode::Global,
            1 => Mode::ThreadLocal,
            2 => Mode::Relaxed,
            _ => return None,
        })
    }
}

/// One node of a graph.
#[derive(Clone)]
pub struct GraphNode {
    /// The node's operation.
    pub op: Op,
    /// Indices of the nodes that must run before it.
    pub depends: Vec<usize>,
}

/// A capture that has begun and not yet ended.
pub struct Capture {
    /// Context of the streams that take part.
    pub context: u64,
    /// The stream in which the capture began, and in which it must end.
    pub origin: u64,
    mode: Mode,
    thread: ThreadId,
    /// Whether an illegal call has invalidated the capture.
    pub spoiled: bool,
    /// Nodes recorded so far.
    pub nodes: Vec<GraphNode>,
    /// For each stream that takes part, the nodes that its next node depends on.
    pub heads: BTreeMap<u64, Vec<usize>>,
}

thread_local! {
    static THREAD_MODE: std::cell::Cell<i32> = const { std::cell::Cell::new(0) };
}

/// Swaps this thread's capture mode (`cuThreadExchangeStreamCaptureMode`).
pub fn exchange_thread_mode(mode: i32) -> i32 {
    THREAD_MODE.with(|cell| cell.replace(mode))
}

impl Driver {
    /// Begins a capture in a stream.
    pub fn begin_capture(&mut self, stream: u64, mode: Mode) -> Result<(), Failure> {
        let (context, legacy, busy) = {
            let stream = self.stream(stream)?;
            (
                stream.context,
                stream.role == super::objects::StreamRole::Legacy,
                stream.capture.is_some(),
            )
        };
        if legacy {
            return self.refuse(
                codes::STREAM_CAPTURE_UNSUPPORTED,
                "the legacy default stream cannot be captured",
            );
        }
        if busy {
            return self.refuse(codes::ILLEGAL_STATE, "the stream is being captured already");
        }
        let id = self.next_capture;
        self.next_capture += 1;
        self.captures.insert(
            id,
            Capture {
                context,
                origin: stream,
                mode,
                thread: thread::current().id(),
                spoiled: false,
                nodes: Vec::new(),
                heads: BTreeMap::from([(stream, Vec::new())]),
            },
        );
        self.stream_mut(stream)?.capture = Some(id);
        Ok(())
    }

    /// Ends the capture that began in this stream. Returns its context and nodes.
    pub fn end_capture(&mut self, stream: u64) -> Result<(u64, Vec<GraphNode>), Failure> {
        let Some(id) = self.stream(stream)?.capture else {
            return self.refuse(codes::ILLEGAL_STATE, "the stream is not being captured");
        };
        let Some(capture) = self.captures.get(&id) else {
            return self.refuse(codes::ILLEGAL_STATE, "the capture is gone");
        };
        if capture.mode != Mode::Relaxed && capture.thread != thread::current().id() {
            return self.refuse(
                codes::STREAM_CAPTURE_WRONG_THREAD,
                "another thread began this capture",
            );
        }
        if capture.origin != stream {
            return self.spoil(
                id,
                codes::STREAM_CAPTURE_UNMATCHED,
                "the capture began in another stream",
            );
        }
        let unjoined = unjoined(capture, stream);
        let spoiled = capture.spoiled;
        let Some(capture) = self.captures.remove(&id) else {
            return Err(Failure(codes::ILLEGAL_STATE));
        };
        self.release_members(&capture);
        if spoiled {
            return Err(Failure(codes::STREAM_CAPTURE_INVALIDATED));
        }
        if let Some(node) = unjoined {
            let what = capture
                .nodes
                .get(node)
                .map(|node| node.op.describe())
                .unwrap_or_default();
            let text = format!(
                "the capture ends with work that was not joined into its origin stream: {what}"
            );
            return self.refuse(codes::STREAM_CAPTURE_UNJOINED, &text);
        }
        Ok((capture.context, capture.nodes))
    }

    /// Records work in the capture that the stream takes part in. Returns `false` if there is
    /// none.
    pub fn capture(&mut self, stream: u64, op: &Op) -> Result<bool, Failure> {
        let Some(id) = self.stream(stream)?.capture else {
            return Ok(false);
        };
        self.sound_capture(id)?;
        if let Some(capture) = self.captures.get_mut(&id) {
            let node = capture.nodes.len();
            let depends = capture.heads.insert(stream, vec![node]).unwrap_or_default();
            capture.nodes.push(GraphNode {
                op: op.clone(),
                depends,
            });
        }
        Ok(true)
    }

    /// Records an event in the capture that the stream takes part in. Returns `false` if there
    /// is none.
    pub fn capture_record(&mut self, stream: u64, event: u64) -> Result<bool, Failure> {
        let Some(id) = self.stream(stream)?.capture else {
            return Ok(false);
        };
        self.sound_capture(id)?;
        let heads = self
            .captures
            .get(&id)
            .and_then(|capture| capture.heads.get(&stream));
        let heads = heads.cloned().unwrap_or_default();
        let event = self.event_mut(event)?;
        event.recorded = Recorded::Captured { capture: id, heads };
        event.time = None;
        Ok(true)
    }

    /// Makes a stream wait for an event, if either of them belongs to a capture. Returns
    /// `false` if neither does.
    pub fn capture_wait(&mut self, stream: u64, event: u64) -> Result<bool, Failure> {
        let mine = self.stream(stream)?.capture;
        let recorded = self.event(event)?.recorded.clone();
        match (mine, recorded) {
            (None, Recorded::Captured { capture, heads }) => {
                if !self.captures.contains_key(&capture) {
                    return self.refuse(
                        codes::CAPTURED_EVENT,
                        "the event was last recorded in a capture that has ended",
                    );
                }
                self.sound_capture(capture)?;
                if self.stream(stream)?.role == super::objects::StreamRole::Legacy {
                    let text = "the legacy default stream cannot take part in a capture";
                    return self.spoil(capture, codes::STREAM_CAPTURE_IMPLICIT, text);
                }
                if let Some(capture) = self.captures.get_mut(&capture) {
                    capture.heads.insert(stream, heads);
                }
                self.stream_mut(stream)?.capture = Some(capture);
                Ok(true)
            }
            (Some(id), Recorded::Captured { capture, heads }) if id == capture => {
                self.sound_capture(id)?;
                if let Some(capture) = self.captures.get_mut(&id) {
                    let mine = capture.heads.entry(stream).or_default();
                    mine.extend(heads);
                    mine.sort_unstable();
                    mine.dedup();
                }
                Ok(true)
            }
            (Some(id), Recorded::Captured { capture, .. }) => {
                if self.captures.contains_key(&capture) {
                    let text = "waiting for an event of another capture would merge the two";
                    if let Some(other) = self.captures.get_mut(&capture) {
                        other.spoiled = true;
                    }
                    return self.spoil(id, codes::STREAM_CAPTURE_MERGE, text);
                }
                self.spoil(
                    id,
                    codes::CAPTURED_EVENT,
                    "the event was last recorded in a capture that has ended",
                )
            }
            (Some(id), Recorded::Never | Recorded::Node(_)) => {
                let text = "a captured stream cannot wait for an event that was recorded outside of the capture";
                self.spoil(id, codes::STREAM_CAPTURE_ISOLATION, text)
            }
            (None, Recorded::Never | Recorded::Node(_)) => Ok(false),
        }
    }

    /// Fails if a capture forbids this thread to make a call that may wait or allocate. The
    /// attempt invalidates the capture.
    pub fn forbidden_while_capturing(&mut self) -> Result<(), Failure> {
        let thread_mode =
            Mode::from_raw(THREAD_MODE.with(std::cell::Cell::get)).unwrap_or(Mode::Global);
        let me = thread::current().id();
        let forbids = |capture: &&Capture| match (thread_mode, capture.mode) {
            (Mode::Relaxed, _) | (_, Mode::Relaxed) => false,
            (Mode::Global, Mode::Global) => true,
            (Mode::Global | Mode::ThreadLocal, _) => capture.thread == me,
        };
        let found: Vec<u64> = self
            .captures
            .iter()
            .filter(|(_, capture)| forbids(capture))
            .map(|(id, _)| *id)
            .collect();
        let Some(first) = found.first() else {
            return Ok(());
        };
        for id in &found {
            if let Some(capture) = self.captures.get_mut(id) {
                capture.spoiled = true;
            }
        }
        let text = "the call may wait or allocate, which is not allowed while a stream is captured";
        self.spoil(*first, codes::STREAM_CAPTURE_UNSUPPORTED, text)
    }

    /// Fails if the stream is being captured, since it cannot be waited for then. The attempt
    /// invalidates the capture.
    pub fn forbidden_on_captured(&mut self, stream: u64) -> Result<(), Failure> {
        match self.stream(stream)?.capture {
            Some(id) => {
                let text = "the call is not allowed on a stream that is being captured";
                self.spoil(id, codes::STREAM_CAPTURE_UNSUPPORTED, text)
            }
            None => Ok(()),
        }
    }

    /// Fails if work on the legacy default stream would depend on a captured stream.
    pub fn forbidden_on_legacy(&mut self, context: u64) -> Result<(), Failure> {
        let of = |stream: &super::objects::Stream| stream.context == context && stream.blocking;
        let caught = self
            .streams
            .iter()
            .filter(|(_, stream)| of(stream))
            .find_map(|(_, stream)| stream.capture);
        match caught {
            Some(id) => {
                let text = "the legacy default stream would wait for a blocking stream that is being captured";
                self.spoil(id, codes::STREAM_CAPTURE_IMPLICIT, text)
            }
            None => Ok(()),
        }
    }

    /// Fails if the event was last recorded in a capture, since the host cannot query it or
    /// wait for it then.
    pub fn forbidden_on_captured_event(&mut self, event: u64) -> Result<(), Failure> {
        match self.event(event)?.recorded {
            Recorded::Captured { capture, .. } => self.spoil(
                capture,
                codes::CAPTURED_EVENT,
                "the event was last recorded in a capture",
            ),
            Recorded::Never | Recorded::Node(_) => Ok(()),
        }
    }

    /// Handles the destruction of a stream that takes part in a capture: this invalidates the
    /// capture, or removes it if it began in that stream.
    pub fn lose_captured_stream<T>(&mut self, id: u64, stream: u64) -> Result<T, Failure> {
        if self
            .captures
            .get(&id)
            .is_some_and(|capture| capture.origin == stream)
            && let Some(capture) = self.captures.remove(&id)
        {
            self.release_members(&capture);
        }
        let text = "the stream that is destroyed is being captured";
        self.spoil(id, codes::STREAM_CAPTURE_UNSUPPORTED, text)
    }

    /// Drops all captures of a context.
    pub fn drop_captures(&mut self, context: u64) {
        for stream in self.streams.values_mut() {
            if stream.context == context {
                stream.capture = None;
            }
        }
        self.captures
            .retain(|_, capture| capture.context != context);
    }

    fn release_members(&mut self, capture: &Capture) {
        for member in capture.heads.keys() {
            if let Some(member) = self.streams.get_mut(*member) {
                member.capture = None;
            }
        }
    }

    /// Returns whether an illegal call has invalidated the capture.
    pub fn capture_is_spoiled(&self, id: u64) -> bool {
        self.captures.get(&id).is_none_or(|capture| capture.spoiled)
    }

    fn sound_capture(&mut self, id: u64) -> Result<(), Failure> {
        match self.captures.get(&id) {
            Some(capture) if !capture.spoiled => Ok(()),
            _ => Err(Failure(codes::STREAM_CAPTURE_INVALIDATED)),
        }
    }

    /// Invalidates a capture and refuses the call.
    pub fn spoil<T>(&mut self, id: u64, code: Code, text: &str) -> Result<T, Failure> {
        if let Some(capture) = self.captures.get_mut(&id) {
            capture.spoiled = true;
        }
        self.refuse(code, text)
    }
}

/// Returns a node that is not joined into the capture's first stream, if there is one.
fn unjoined(capture: &Capture, origin: u64) -> Option<usize> {
    let mut joined = BTreeSet::new();
    let mut open = capture.heads.get(&origin).cloned().unwrap_or_default();
    while let Some(node) = open.pop() {
        if joined.insert(node)
            && let Some(node) = capture.nodes.get(node)
        {
            open.extend(&node.depends);
        }
    }
    (0..capture.nodes.len()).find(|node| !joined.contains(node))
}
