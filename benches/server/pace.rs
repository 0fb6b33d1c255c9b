//! A null device whose steps take time, without taking the processor.

use quell::LoadError;
use quell::device::DeviceError;
use quell::runner::{NullOptions, NullRunner, Runner, RunnerInfo, StepOutput};
use quell::schedule::{Sequences, StepPlan};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A [`NullRunner`] whose steps run one after the other, each for the same time, during
/// which the scheduler thread sleeps as it does when it waits for a GPU.
pub struct SleepingRunner {
    null: NullRunner,
    step: Duration,
    /// When the steps in flight will be done.
    done: VecDeque<Instant>,
    last: Instant,
}

impl SleepingRunner {
    pub fn start(
        options: NullOptions,
        step: Duration,
    ) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let null = NullRunner::new(options);
        let info = null.info();
        let sleeping = Self {
            null,
            step,
            done: VecDeque::new(),
            last: Instant::now(),
        };
        Ok((Box::new(sleeping), info))
    }
}

impl Runner for SleepingRunner {
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
            std::thread::sleep(done.saturating_duration_since(Instant::now()));
        }
        self.null.collect()
    }

    fn recycle(&mut self, output: StepOutput) {
        self.null.recycle(output);
    }
}
