//! A step that decodes allocates nothing: neither on the scheduler thread nor on the
//! threads that compute. What a reader does with its tokens is its own affair.

#[path = "common/model.rs"]
mod model;

use quell::runner::{NullOptions, NullRunner};
use quell::{Engine, EngineConfig, LoadOptions, Request, SamplingParams};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what all threads allocate, but for those that read.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static READS: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // A thread that ends may allocate when its own variables are gone.
    if !READS.try_with(Cell::get).unwrap_or(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: all memory is the system's; counting touches none of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const STREAMS: u32 = 8;
/// The tokens of each stream between which allocations are counted: blocks are filled
/// and published there, and new ones taken.
const FROM: usize = 20;
const TO: usize = 120;

/// What is allocated while all streams decode.
fn allocations(engine: &Engine, request: impl Fn(Vec<u32>) -> Request) -> usize {
    let streams = (0..STREAMS).map(|index| {
        let mut request = request((0..16).map(|i| 5 + 16 * index + i).collect());
        request.ignore_eos = true;
        engine.generate(request.max_tokens(TO + 20)).unwrap()
    });
    let mut streams: Vec<_> = streams.collect();
    let mut read_to = |token: usize, from: usize| {
        for _ in from..token {
            for stream in &mut streams {
                let chunk = stream.next_blocking().unwrap().unwrap();
                assert!(chunk.token.is_some());
            }
        }
        ALLOCATIONS.load(Ordering::Relaxed)
    };
    let before = read_to(FROM, 0);
    read_to(TO, FROM) - before
}

fn config() -> EngineConfig {
    EngineConfig {
        audit: false,
        // Nobody is paused for a slow reader: that takes a deadline.
        stream_buffer: 2 * TO,
        kv_cache_bytes: Some(64 << 20),
        ..EngineConfig::default()
    }
}

/// One test: the count is the process's.
#[test]
fn a_step_that_decodes_allocates_nothing() {
    READS.set(true);
    let null = Engine::with_runner(config(), None, || NullRunner::start(NullOptions::default()));
    let null = null.unwrap();
    let greedy = |prompt| Request::new(prompt).greedy();
    assert_eq!(allocations(&null, greedy), 0, "null device");
    // The count is one: a request by itself allocates.
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    null.generate(greedy(vec![1]))
        .unwrap()
        .cancel()
        .wait()
        .unwrap();
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > before);
    drop(null);

    let cpu = Engine::load(model::smollm2(), config(), LoadOptions::cpu()).unwrap();
    assert_eq!(allocations(&cpu, greedy), 0, "CPU device, greedy");
    let penalised = |prompt| {
        Request::new(prompt).sampling(SamplingParams {
            temperature: 0.8,
            top_p: 0.9,
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        })
    };
    assert_eq!(
        allocations(&cpu, penalised),
        0,
        "CPU device, sampled and penalised"
    );
}
