//! Streams and events: how work is queued, and what waiting does.

use super::codes;
use super::objects::{Exec, Recorded, Stream, StreamRole};
use super::queue::{HostSource, NodeId, Op};
use super::settings::Schedule;
use super::{Driver, Failure};
use std::thread;

/// Stream handle that denotes the default stream of the calling thread.
const PER_THREAD: u64 = 2;
/// Stream handles that denote the legacy default stream.
const LEGACY: [u64; 2] = [0, 1];

impl Driver {
    /// Resolves a stream argument, including default streams, to a handle. The handle is live
    /// and belongs to the current context.
    pub fn resolve_stream(&mut self, raw: u64) -> Result<u64, Failure> {
        let context = self.current()?;
        if LEGACY.contains(&raw) {
            return Ok(self
                .contexts
                .get(context)
                .map_or(0, |context| context.legacy));
        }
        if raw != PER_THREAD {
            self.stream(raw)?;
            return Ok(raw);
        }
        let me = thread::current().id();
        if let Some(made) = self
            .contexts
            .get(context)
            .and_then(|context| context.per_thread.get(&me))
        {
            return Ok(*made);
        }
        let made = self.streams.insert(Stream {
            context,
            role: StreamRole::PerThread,
            blocking: true,
            priority: 0,
            tail: None,
            last_kernel: None,
            capture: None,
            asked: None,
        });
        if let Some(context) = self.contexts.get_mut(context) {
            context.per_thread.insert(me, made);
        }
        Ok(made)
    }

    /// Queues work on a stream, or adds it to the capture that the stream takes part in.
    pub fn submit(&mut self, stream: u64, op: Op) -> Result<(), Failure> {
        self.check_op(&op)?;
        if self.capture(stream, &op)? {
            return Ok(());
        }
        self.enqueue(stream, op, Vec::new())?;
        self.run_ahead()
    }

    /// Fails if the operation uses memory that it must not use.
    pub fn check_op(&mut self, op: &Op) -> Result<(), Failure> {
        match self.wrong_memory(op) {
            Some(text) => self.refuse(codes::INVALID_VALUE, &text),
            None => Ok(()),
        }
    }

    fn wrong_memory(&mut self, op: &Op) -> Option<String> {
        let context = super::current_context();
        let leaving = |memory: &super::memory::DeviceMemory, address| {
            let found = memory.containing(address).filter(|found| found.leaving)?;
            Some(format!("{} is used after cuMemFreeAsync", found.label))
        };
        if let Op::Kernel(launch) = op {
            for (index, pointer) in launch.pointers() {
                if let Some(label) = self.memory.freed(pointer) {
                    let name = launch.name();
                    return Some(format!(
                        "parameter {index} of {name} is {pointer:#x}, in {label}, which has been \
                         freed"
                    ));
                }
                if let Some(text) = leaving(&self.memory, pointer) {
                    return Some(format!("parameter {index} of {}: {text}", launch.name()));
                }
            }
            return None;
        }
        for (address, len) in op.addresses() {
            if let Err(text) = self.memory.check(context, address, len) {
                return Some(text);
            }
            if let Some(text) = leaving(&self.memory, address) {
                return Some(text);
            }
        }
        let (host, len) = match op {
            Op::HostToDevice {
                from: HostSource::Pinned(from),
                len,
                ..
            } => (*from, *len),
            Op::DeviceToHost { to, len, .. } => (*to, *len),
            _ => return None,
        };
        match self.host.overlapping(host, len) {
            None => Some(format!(
                "host address {host:#x} ({len} bytes) is not pinned memory (freed?)"
            )),
            Some((base, found)) if host < base || host + len > base + found.len => Some(format!(
                "host address {host:#x} ({len} bytes) is pinned only in part"
            )),
            Some(_) => None,
        }
    }

    /// Queues work after everything that stream order and `extra` require.
    pub fn enqueue(&mut self, stream: u64, op: Op, extra: Vec<NodeId>) -> Result<NodeId, Failure> {
        let (context, role, blocking) = {
            let found = self.stream(stream)?;
            (found.context, found.role, found.blocking)
        };
        if role == StreamRole::Legacy {
            self.forbidden_on_legacy(context)?;
        }
        let mut depends = extra;
        depends.extend(self.tails(stream));
        if blocking && role != StreamRole::Legacy {
            let legacy = self
                .contexts
                .get(context)
                .map_or(0, |context| context.legacy);
            depends.extend(self.streams.get(legacy).and_then(|legacy| legacy.tail));
        }
        let (is_kernel, is_record) = (matches!(op, Op::Kernel(_)), matches!(op, Op::Record { .. }));
        let overlaps = op.overlaps() && self.settings.overlaps();
        let id = self.queue.add(context, stream, op, depends);
        self.report.queued += 1;
        let found = self.stream_mut(stream)?;
        found.tail = Some(id);
        let before = found.last_kernel;
        if !is_record {
            found.last_kernel = is_kernel.then_some(id);
        }
        if let Some(before) = before.filter(|_| overlaps) {
            self.queue.overlap(id, before);
        }
        Ok(id)
    }

    /// Returns the nodes that must run before the stream is idle. For the legacy default
    /// stream, this includes all blocking streams.
    fn tails(&self, stream: u64) -> Vec<NodeId> {
        let Some(found) = self.streams.get(stream) else {
            return Vec::new();
        };
        if found.role != StreamRole::Legacy {
            return found.tail.into_iter().collect();
        }
        let context = found.context;
        let ordered = self
            .streams
            .iter()
            .filter(|(_, other)| other.context == context && other.blocking);
        ordered.filter_map(|(_, other)| other.tail).collect()
    }

    /// Runs all or some of the work that was just queued, depending on the schedule.
    pub fn run_ahead(&mut self) -> Result<(), Failure> {
        let context = super::current_context();
        match self.settings.schedule {
            Schedule::Late => Ok(()),
            Schedule::Eager => self.run_context(context),
            Schedule::Shuffle(_) => {
                for _ in 0..self.queue.run_ahead() {
                    self.run_one(context);
                }
                Ok(())
            }
        }
    }

    /// Queues the nodes of a graph on a stream.
    pub fn launch_graph(&mut self, exec: u64, stream: u64) -> Result<(), Failure> {
        let (nodes, last) = {
            let exec = self.exec(exec)?;
            (exec.nodes.clone(), exec.last)
        };
        if self.stream(stream)?.capture.is_some() {
            return self.refuse(codes::NOT_SUPPORTED, "a graph within a graph");
        }
        for node in nodes.iter() {
            // Kernels of the stand-in for cuBLASLt belong to no module.
            if let Op::Kernel(launch) = &node.op
                && launch.module != 0
                && self.modules.get(launch.module).is_none()
            {
                let text = format!(
                    "the graph holds {} of a module that is unloaded",
                    node.op.describe()
                );
                return self.refuse(codes::INVALID_HANDLE, &text);
            }
            if let Some(text) = self.wrong_memory(&node.op) {
                let text = format!("the graph holds memory that it may not use: {text}");
                return self.refuse(codes::INVALID_VALUE, &text);
            }
        }
        let start = self.enqueue(stream, Op::Join, last.into_iter().collect())?;
        let context = self.stream(stream)?.context;
        let mut ids: Vec<NodeId> = Vec::with_capacity(nodes.len());
        for node in nodes.iter() {
            let mut depends: Vec<NodeId> = node
                .depends
                .iter()
                .filter_map(|at| ids.get(*at).copied())
                .collect();
            if depends.is_empty() {
                depends.push(start);
            }
            let id = self.queue.add(context, stream, node.op.clone(), depends);
            // A captured kernel overlaps with the one before it if it depends on nothing else.
            if let [before] = node.depends[..]
                && node.op.overlaps()
                && self.settings.overlaps()
                && matches!(nodes[before].op, Op::Kernel(_))
            {
                self.queue.overlap(id, ids[before]);
            }
            ids.push(id);
            self.report.queued += 1;
        }
        let end = self.enqueue(stream, Op::Join, ids)?;
        self.exec_mut(exec)?.last = Some(end);
        self.report.graph_launches += 1;
        self.run_ahead()
    }

    /// Creates an executable graph from a captured one.
    pub fn instantiate(&mut self, graph: u64) -> Result<u64, Failure> {
        let (context, nodes) = {
            let graph = self.graph(graph)?;
            (graph.context, graph.nodes.clone())
        };
        self.report.graph_nodes = nodes.len() as u64;
        Ok(self.execs.insert(Exec {
            context,
            nodes,
            last: None,
        }))
    }

    /// Records an event on a stream.
    pub fn record(&mut self, event: u64, stream: u64) -> Result<(), Failure> {
        self.event(event)?;
        if self.capture_record(stream, event)? {
            return Ok(());
        }
        let node = self.enqueue(stream, Op::Record { event }, Vec::new())?;
        let event = self.event_mut(event)?;
        event.recorded = Recorded::Node(node);
        event.time = None;
        event.asked = false;
        self.run_ahead()
    }

    /// Makes later work on the stream wait for what the event recorded.
    pub fn wait_event(&mut self, stream: u64, event: u64) -> Result<(), Failure> {
        if self.capture_wait(stream, event)? {
            return Ok(());
        }
        if let Recorded::Node(node) = self.event(event)?.recorded
            && self.queue.pending(node)
        {
            self.enqueue(stream, Op::Join, vec![node])?;
            return self.run_ahead();
        }
        Ok(())
    }

    /// Waits until the stream is idle.
    pub fn synchronise_stream(&mut self, stream: u64) -> Result<(), Failure> {
        self.forbidden_on_captured(stream)?;
        self.forbidden_while_capturing()?;
        let context = self.stream(stream)?.context;
        if self.stream(stream)?.role == StreamRole::Legacy {
            self.forbidden_on_legacy(context)?;
        }
        self.report.synchronisations += 1;
        let targets = self.tails(stream);
        self.run(context, targets)
    }

    /// Waits until the context is idle.
    pub fn synchronise_context(&mut self, context: u64) -> Result<(), Failure> {
        let captured = self
            .captures
            .iter()
            .find(|(_, capture)| capture.context == context)
            .map(|(id, _)| *id);
        if let Some(id) = captured {
            let text = "the context cannot be waited for while one of its streams is captured";
            return self.spoil(id, codes::STREAM_CAPTURE_UNSUPPORTED, text);
        }
        self.forbidden_while_capturing()?;
        self.report.synchronisations += 1;
        self.run_context(context)
    }

    /// Waits until what the event recorded has run.
    pub fn synchronise_event(&mut self, event: u64) -> Result<(), Failure> {
        self.forbidden_on_captured_event(event)?;
        self.forbidden_while_capturing()?;
        self.report.synchronisations += 1;
        let (context, recorded) = {
            let event = self.event(event)?;
            (event.context, event.recorded.clone())
        };
        match recorded {
            Recorded::Node(node) => self.run(context, vec![node]),
            Recorded::Never | Recorded::Captured { .. } => Ok(()),
        }
    }

    /// Queries whether what the event recorded has run. The first query of a pending record
    /// fails with `NOT_READY`, and the second one runs it, so that callers experience both
    /// answers and polling loops end.
    pub fn query_event(&mut self, event: u64) -> Result<(), Failure> {
        // An event stores its context, which need not be the current one.
        let Some(found) = self.events.get(event) else {
            let text = self.events.explain(event);
            return self.refuse(codes::INVALID_HANDLE, &text);
        };
        let (context, recorded, asked) = (found.context, found.recorded.clone(), found.asked);
        if let Recorded::Captured { capture, .. } = recorded {
            let text = "the event was last recorded in a capture";
            return self.spoil(capture, codes::CAPTURED_EVENT, text);
        }
        self.forbidden_while_capturing()?;
        self.sound(context)?;
        let Recorded::Node(node) = recorded else {
            return Ok(());
        };
        if !self.queue.pending(node) {
            return Ok(());
        }
        if asked {
            return self.run(context, vec![node]);
        }
        if let Some(found) = self.events.get_mut(event) {
            found.asked = true;
        }
        Err(Failure(codes::NOT_READY))
    }

    /// Queries whether the stream is idle, in the same way as [`Driver::query_event`].
    pub fn query_stream(&mut self, stream: u64) -> Result<(), Failure> {
        self.forbidden_on_captured(stream)?;
        self.forbidden_while_capturing()?;
        let mut targets = self.tails(stream);
        targets.retain(|node| self.queue.pending(*node));
        let Some(newest) = targets.iter().max().copied() else {
            return Ok(());
        };
        let found = self.stream_mut(stream)?;
        let context = found.context;
        if found.asked == Some(newest) {
            return self.run(context, targets);
        }
        found.asked = Some(newest);
        Err(Failure(codes::NOT_READY))
    }
}
