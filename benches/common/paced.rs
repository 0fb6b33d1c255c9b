//! A null device whose steps take time, either CPU time or only wall-clock time.

use quell::internals::runner::{NullOptions, NullRunner, Runner, RunnerInfo, StepOutput};
use quell::internals::schedule::{Sequences, StepPlan};
use quell::{DeviceError, LoadError};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A [`NullRunner`] whose steps run one after the other and all take the same time.
pub struct PacedRunner {
    null: NullRunner,
    step: Duration,
    /// Waits until a step is done.
    wait: fn(Instant),
    /// When the steps in flight will be done.
    done: VecDeque<Instant>,
    last: Instant,
}

/// Waits with microsecond precision, without yielding the CPU.
#[allow(dead_code)] // each bench uses one of the two
pub fn spin(until: Instant) {
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// Sleeps, as the scheduler thread does when it waits for a GPU.
#[allow(dead_code)] // each bench uses one of the two
pub fn sleep(until: Instant) {
    std::thread::sleep(until.saturating_duration_since(Instant::now()));
}

impl PacedRunner {
    pub fn start(
        options: NullOptions,
        step: Duration,
        wait: fn(Instant),
    ) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let null = NullRunner::new(options);
        let info = null.info();
        let paced = Self {
            null,
            step,
            wait,
            done: VecDeque::new(),
            last: Instant::now(),
        };
        Ok((Box::new(paced), info))
    }
}

impl Runner for PacedRunner {
    fn depth(&self) -> usize {
        self.null.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        self.last = self.last.max(Instant::now()) + self.step;
        self.done.push_back(self.last);
        self.null.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        if let Some(done) = self.done.pop_front() {
            (self.wait)(done);
        }
        self.null.collect()
    }

    fn recycle(&mut self, output: StepOutput) {
        self.null.recycle(output);
    }
}
