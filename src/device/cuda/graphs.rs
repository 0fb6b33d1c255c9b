//! Records decode steps as CUDA graphs, one per size, and replays them.
//!
//! The first step of a size is enqueued as usual, which loads the kernels that it needs, and makes
//! scratch memory grow if none was reserved. The second is recorded and launched as a graph. Later
//! steps launch the graph again, which replaces hundreds of launches by one. If recording fails,
//! the operations of the step are enqueued once more. What made it fail may pass, so that it is
//! tried again later, after more steps each time.
//!
//! The number of graphs is limited. If there are as many as that, the one that was launched the
//! longest time ago is forgotten for a new one.

use super::capture::{self, Captured, Executable};
use super::context::Context;
use super::step::{Bounds, StepInputs, StepKey};
use crate::device::{DeviceError, Finished, Staged};
use std::collections::HashMap;

/// A recorded step.
struct Graph {
    executable: Executable,
    /// Bounds of the memory that the graph refers to.
    bounds: Bounds,
    /// The longest window of the layers of each group.
    windows: Vec<usize>,
    /// Value of [`Graphs::launches`] after its last launch.
    launched: u64,
}

/// Number of steps of a size that run without recording after its recording has failed for the
/// first time. The number doubles with every further failure.
const STEPS_BEFORE_RETRY: u32 = 16;
/// How often that number doubles at most.
const MOST_DOUBLINGS: u32 = 12;

/// State of the steps of one size.
enum Record {
    /// A step of this size has run, so that the next one can be recorded.
    Warm,
    Recorded(Graph),
    /// Recording failed `failures` times in a row. It is tried again after `wait` more steps.
    Refused {
        failures: u32,
        wait: u32,
    },
}

/// The recorded steps of a device.
pub(super) struct Graphs {
    records: HashMap<StepKey, Record>,
    /// Maximum number of graphs, at least 1.
    most: usize,
    /// Number of graph launches so far.
    launches: u64,
    /// Value of `Handle::releases` when the graphs were recorded.
    releases: u64,
    /// The step that is being enqueued, if it may be recorded.
    current: Option<StepKey>,
    /// Bounds of the memory that its operations use.
    bounds: Option<Bounds>,
    /// The longest window of the layers of each group, as far as they have been enqueued.
    windows: Vec<usize>,
}

impl Graphs {
    /// Creates an empty set of at most `most` graphs, but at least one.
    pub(super) fn new(most: usize) -> Self {
        Self {
            records: HashMap::new(),
            most: most.max(1),
            launches: 0,
            releases: 0,
            current: None,
            bounds: None,
            windows: Vec::new(),
        }
    }

    /// Changes the maximum number of graphs. Those that there are already stay.
    pub(super) fn set_most(&mut self, most: usize) {
        self.most = most.max(1);
    }

    /// Replays a step of this size if one was recorded. Otherwise the caller must enqueue the
    /// operations, which are recorded if a step of this size has run before.
    pub(super) fn begin(
        &mut self,
        context: &Context,
        step: &StepInputs,
    ) -> Result<Staged, DeviceError> {
        self.forget_stale(context)?;
        self.current = step.key();
        self.bounds = Some(Bounds::UNLIMITED);
        self.windows.clear();
        let Some(key) = self.current else {
            return Ok(Staged::Enqueue);
        };
        match self.records.get_mut(&key) {
            Some(Record::Recorded(graph)) => {
                self.current = None;
                step.require_within(graph.bounds, "stage")?;
                for (group, &window) in graph.windows.iter().enumerate() {
                    step.require_window(group, window, "stage")?;
                }
                // The memory that it refers to has not been freed: otherwise `forget_stale` would
                // have dropped it.
                graph.executable.launch(context)?;
                self.launches += 1;
                graph.launched = self.launches;
                return Ok(Staged::Replayed);
            }
            Some(Record::Refused { wait, .. }) if *wait > 0 => *wait -= 1,
            Some(Record::Warm | Record::Refused { .. }) => self.record(context, key),
            None => {}
        }
        Ok(Staged::Enqueue)
    }

    /// Starts recording. If that fails, the step is enqueued as usual.
    fn record(&mut self, context: &Context, key: StepKey) {
        if let Err(error) = capture::begin(context) {
            self.refuse(key, &error);
        }
    }

    fn refuse(&mut self, key: StepKey, error: &DeviceError) {
        let failures = match self.records.get(&key) {
            Some(Record::Refused { failures, .. }) => failures.saturating_add(1),
            _ => 1,
        };
        let wait = STEPS_BEFORE_RETRY << (failures - 1).min(MOST_DOUBLINGS);
        let (rows, units) = (key.rows, key.units);
        tracing::warn!(
            rows, units, failures, %error,
            "recording a graph failed; the next {wait} steps of this size run without one"
        );
        self.records.insert(key, Record::Refused { failures, wait });
    }

    /// Adds the bounds of an operation's memory, which a replay must not exceed.
    pub(super) fn limit(&mut self, bounds: Bounds) {
        self.bounds = self.bounds.map(|known| known.min(bounds));
    }

    /// Records the window of a layer, for which the block tables of a replay must begin early
    /// enough.
    pub(super) fn limit_window(&mut self, group: usize, window: usize) {
        if self.windows.len() <= group {
            self.windows.resize(group + 1, 0);
        }
        self.windows[group] = self.windows[group].max(window);
    }

    /// Ends a step after its operations were enqueued; `outcome` says whether that failed. A
    /// step that was recorded is launched here.
    pub(super) fn finish(
        &mut self,
        context: &Context,
        outcome: Result<(), DeviceError>,
    ) -> Result<Finished, DeviceError> {
        let key = self.current.take();
        if !context.handle.capturing.get() {
            outcome?;
            if let Some(key) = key {
                self.records.entry(key).or_insert(Record::Warm);
            }
            return Ok(Finished::Done);
        }
        let captured = capture::end(context);
        let captured = outcome.and(captured);
        if key.is_some() && captured.is_ok() {
            self.make_room();
        }
        let recorded = captured.and_then(Captured::instantiate);
        match (key, recorded) {
            (Some(key), Ok(executable)) => {
                executable.launch(context)?;
                self.launches += 1;
                let graph = Graph {
                    executable,
                    bounds: self.bounds.unwrap_or(Bounds::UNLIMITED),
                    windows: self.windows.clone(),
                    launched: self.launches,
                };
                self.records.insert(key, Record::Recorded(graph));
                Ok(Finished::Done)
            }
            (_, Err(error @ DeviceError::Lost { .. })) => Err(error),
            (Some(key), Err(error)) => {
                self.refuse(key, &error);
                Ok(Finished::Repeat)
            }
            (None, recorded) => recorded.map(|_| Finished::Repeat),
        }
    }

    /// Forgets the graphs that were launched the longest time ago, until there is room for one
    /// more. The driver destroys a graph that still runs when it has completed.
    fn make_room(&mut self) {
        let launched = |(key, record): (&StepKey, &Record)| match record {
            Record::Recorded(graph) => Some((graph.launched, *key)),
            Record::Warm | Record::Refused { .. } => None,
        };
        let mut graphs: Vec<(u64, StepKey)> = self.records.iter().filter_map(launched).collect();
        graphs.sort_unstable_by_key(|(launched, _)| *launched);
        let surplus = (graphs.len() + 1).saturating_sub(self.most);
        for (_, key) in graphs.into_iter().take(surplus) {
            tracing::debug!(rows = key.rows, units = key.units, "forgetting a graph");
            self.records.remove(&key);
        }
    }

    /// Ends a recording that was not finished because its step failed.
    pub(super) fn abandon(&mut self, context: &Context) {
        self.current = None;
        if context.handle.capturing.get() {
            drop(capture::end(context));
        }
    }

    /// Drops all graphs if device memory was freed since they were recorded, because they may
    /// refer to it.
    fn forget_stale(&mut self, context: &Context) -> Result<(), DeviceError> {
        let releases = context.handle.releases.get();
        if self.releases == releases {
            return Ok(());
        }
        self.releases = releases;
        let recorded = |record: &Record| matches!(record, Record::Recorded(_));
        if self.records.values().any(recorded) {
            context.compute.synchronize("forgetting recorded steps")?;
        }
        // Freed scratch memory may not have been replaced yet: each size must first run once
        // more without recording.
        self.records.retain(|_, record| match record {
            Record::Refused { wait, .. } => {
                *wait = (*wait).max(1);
                true
            }
            Record::Warm | Record::Recorded(_) => false,
        });
        Ok(())
    }
}
