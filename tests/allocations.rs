//! A decode step allocates nothing, neither on the scheduler thread nor on the worker threads.
//! What a reader of a stream allocates for its tokens is not counted.

use common::model;
use quell::internals::runner::{
    ModelFiles, NullOptions, NullRunner, Runner, RunnerInfo, StepOutput, build_runner,
};
use quell::internals::schedule::{Sequences, StepPlan};
use quell::{DeviceError, Engine, EngineConfig, LoadError, LoadOptions, Request, SamplingParams};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

/// Counts the allocations of all threads except those that read streams.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static READS: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // A thread that exits may allocate after its thread-local variables are gone.
    if !READS.try_with(Cell::get).unwrap_or(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system allocator; counting touches none of its memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    // By default, zeros would be written, and most of them are in pages that are never used.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const STREAMS: u32 = 8;
/// The steps between which allocations are counted. In this range all requests decode, blocks
/// are filled and published, and new blocks are taken.
const FROM: usize = 20;
const TO: usize = 120;

/// A runner that waits for a signal before its first step, and reads the count when it launches
/// the first and the last of the counted steps.
struct Counted {
    runner: Box<dyn Runner>,
    begin: Receiver<()>,
    launched: usize,
    /// The count at these two steps.
    counts: Arc<[AtomicUsize; 2]>,
}

impl Runner for Counted {
    fn depth(&self) -> usize {
        self.runner.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        if self.launched == 0 {
            let _ = self.begin.recv();
        }
        self.launched += 1;
        let counted = [FROM, TO].iter().position(|&step| step == self.launched);
        if let Some(count) = counted {
            let now = ALLOCATIONS.load(Ordering::Relaxed);
            self.counts[count].store(now, Ordering::Relaxed);
        }
        self.runner.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        self.runner.collect()
    }

    fn recycle(&mut self, output: StepOutput) {
        self.runner.recycle(output);
    }
}

/// Returns the number of allocations while all requests decode.
fn allocations<M>(make: M, request: impl Fn(Vec<u32>) -> Request) -> usize
where
    M: FnOnce(&EngineConfig) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> + Send + 'static,
{
    let config = EngineConfig {
        audit: false,
        // Large enough that no request is paused for a slow reader: pausing sets a deadline,
        // which may allocate.
        stream_buffer: 2 * TO,
        kv_cache_bytes: Some(64 << 20),
        // The watchdog's thread could start, and allocate, while steps are counted.
        step_deadline: None,
        ..EngineConfig::default()
    };
    let (told, begin) = channel();
    let counts = Arc::<[AtomicUsize; 2]>::default();
    let counted = Arc::clone(&counts);
    let settings = config.clone();
    let engine = Engine::with_runner(config, None, move || {
        let (runner, info) = make(&settings)?;
        let runner = Counted {
            runner,
            begin,
            launched: 0,
            counts,
        };
        Ok((Box::new(runner) as Box<dyn Runner>, info))
    });
    let engine = engine.unwrap();
    let streams = (0..STREAMS).map(|index| {
        let mut request = request((0..16).map(|i| 5 + 16 * index + i).collect());
        request.ignore_eos = true;
        engine.generate(request.max_tokens(TO + 20)).unwrap()
    });
    // Requests that miss the first step join in the second one.
    let streams: Vec<_> = streams.collect();
    told.send(()).unwrap();
    for stream in streams {
        let answer = stream.complete_blocking().unwrap();
        assert_eq!(answer.tokens.len(), TO + 20);
    }
    let [before, after] = [0, 1].map(|count| counted[count].load(Ordering::Relaxed));
    assert!(before > 0, "nothing was counted");
    after - before
}

/// Runs three engines and fails unless at least one of them allocates nothing. An allocation in
/// the step itself happens in every run; an allocation elsewhere in the process, such as in a
/// thread that starts late, does not.
fn allocates_nothing<M>(what: &str, make: impl Fn() -> M, request: impl Fn(Vec<u32>) -> Request)
where
    M: FnOnce(&EngineConfig) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> + Send + 'static,
{
    let mut counts = (0..3).map(|_| allocations(make(), &request));
    assert!(counts.any(|count| count == 0), "{what}");
}

/// Builds a runner of the demo model with this many threads. There must be few of them, and
/// only one if rows are modified before sampling: each thread allocates memory when it gets its
/// first such row, which may happen while steps are counted.
fn cpu(
    threads: usize,
) -> impl FnOnce(&EngineConfig) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
    let mut options = LoadOptions::cpu();
    options.cpu.threads = Some(threads);
    move |config| build_runner(ModelFiles::open(&model::smollm2())?, config, options)
}

/// There is one test in this file because the count covers the whole process.
#[test]
fn a_decode_step_allocates_nothing() {
    READS.set(true);
    let greedy = |prompt| Request::new(prompt).greedy();
    let null = |_: &EngineConfig| NullRunner::start(NullOptions::default());
    // Checks that the count works: starting an engine allocates.
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    allocates_nothing("null device", || null, greedy);
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > before);

    allocates_nothing("CPU device, greedy", || cpu(2), greedy);
    let penalised = |prompt| {
        Request::new(prompt).sampling(SamplingParams {
            temperature: 0.8,
            top_p: 0.9,
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        })
    };
    allocates_nothing("CPU device, sampled and penalised", || cpu(1), penalised);
}
